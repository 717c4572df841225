"""A recipe whose alignment has target `rep`: its decoder, its conditions and its language model have the token."""

from pathlib import Path
from typing import Any

import pytest

from arra.config import Recipe, load_recipe
from arra.errors import ArraError
from arra.models.language_folder import read_language_card
from arra.stages.description import describe_recipe
from arra.stages.init import init_painter
from arra.stages.language import language_card
from arra.stages.model import build_model, decoder_settings
from tests.models.toy_lms import save_toy_lm

KINDS = {"class": ("llamagen_c2i", "b", 1), "caption": ("llamagen_t2i", None, 120), "text": ("demo", None, 14)}
REP = ["align.target=rep", "align.layer=1"]


def recipe_of(kind: str, *, rep: bool, also: list[str] | None = None) -> Recipe:
    name, row, _ = KINDS[kind]
    return load_recipe(name, row=row, overrides=[*(REP if rep else ["align=null"]), *(also or [])])


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_has_a_position_more(kind: str) -> None:
    plain, rep = (decoder_settings(recipe_of(kind, rep=told), num_codes=16, downsampling=16) for told in (False, True))
    assert (plain.rep_token, rep.rep_token) == (False, True)
    assert plain.prefix_length == plain.condition_length == rep.condition_length == rep.prefix_length - 1
    assert {**plain.model_dump(), "rep_token": True, "prefix_length": rep.prefix_length} == rep.model_dump()


def test_any_term_asks_for_it() -> None:
    further = "align.more={rep: {target: rep, encoder: teacher, layer: 1}}"
    recipe = load_recipe("demo", overrides=["align.target=hybnext", further])
    assert decoder_settings(recipe, num_codes=16, downsampling=16).rep_token


def test_first_weights_are_those_of_the_run_without_it() -> None:
    small = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=2"]
    models = []
    for told in (False, True):
        recipe = recipe_of("text", rep=told, also=small)
        models.append(build_model(recipe, decoder_settings(recipe, num_codes=16, downsampling=16), text=None))
    plain, rep = (model.state_dict() for model in models)
    assert set(rep) - set(plain) == {"rep_embedding.weight"}
    assert all((rep[name] == value).all() for name, value in plain.items())


def test_the_command_that_shows_a_recipe_counts_it() -> None:
    assert "# sequence: 14 text positions + the REP token + " in describe_recipe(recipe_of("text", rep=True))
    assert "REP" not in describe_recipe(recipe_of("text", rep=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Painters with the token in their vocabulary and without it."""
    place = tmp_path_factory.mktemp("painters")
    llm = str(save_toy_lm(place / "lm"))
    told: dict[str, Any] = {"tokenizer": "openmoji-vq4", "image_size": 16}
    return {rep: init_painter(llm, place / str(rep), rep_token=rep, **told).path for rep in (False, True)}


def language_recipe(folder: Path, *, rep: bool) -> Recipe:
    told = [f"model.llm.folder={folder}", "model.llm.text=null", "data.image_size=16"]
    return load_recipe("llm_openmoji", overrides=[*told, f"align.target={'rep' if rep else 'hybnext'}"])


def test_a_language_models_card_writes_it_for_these_recipes_alone(folders: dict[bool, Path]) -> None:
    kept = read_language_card(folders[True]).settings.layout
    assert kept.rep is None
    for rep in (False, True):
        layout = language_card(language_recipe(folders[True], rep=rep)).settings.layout
        assert layout.rep == (kept.rep_id if rep else None)
        assert (kept.rep_id in layout.prefix([5], (4, 4))) == rep
        assert layout.model_copy(update={"rep": None}) == kept


def test_a_folder_without_it_is_refused(folders: dict[bool, Path]) -> None:
    language_card(language_recipe(folders[False], rep=False))
    with pytest.raises(
        ArraError, match=r"^align\.target: rep, but .*False knows no REP token; .* arra init \.\.\. --rep"
    ):
        language_card(language_recipe(folders[False], rep=True))
