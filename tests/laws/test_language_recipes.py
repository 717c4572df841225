"""A recipe with a language model, from the store to a folder that paints: what is trained, kept and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import arra
from arra.config import Recipe, parse_recipe
from arra.data.language import PromptConditions
from arra.data.layout import NO_LABEL
from arra.data.store import Store
from arra.errors import ArraError
from arra.models import CausalLM
from arra.models.extend import is_tied
from arra.stages.description import describe_recipe
from arra.stages.init import init_painter
from arra.stages.language import read_texts
from arra.stages.train import train
from arra.stages.training_data import training_data
from tests.models.toy_lms import save_toy_lm

TOKENIZER = "openmoji-vq4"
MakesRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A painter of 16 pixels, its head tied to its embeddings."""
    place = tmp_path_factory.mktemp("painter")
    llm = save_toy_lm(place / "lm", "smollm")
    return init_painter(str(llm), place / "painter", tokenizer=TOKENIZER, image_size=16).path


@pytest.fixture
def recipe(pipeline: Any, folder: Path) -> MakesRecipe:
    """The toy pipeline's recipe with the painter in place of its decoder."""
    content = yaml.safe_load((pipeline.aligned / "recipe.yaml").read_text())

    def made(*, llm: dict[str, Any] | None = None, align: bool = True, **training: Any) -> Recipe:
        told = {
            **content,
            "model": {"llm": {"folder": str(folder), **(llm or {})}},
            "align": content["align"] if align else None,
            "train": {
                **content["train"],
                "optimizer": "adamw",
                "steps": 4,
                "batch_size": 4,
                "checkpoint_every_steps": 2,
                "validate_every_steps": 2,
                "preview_every_steps": None,
                **training,
            },
        }
        return parse_recipe(yaml.safe_dump(told), Recipe, source="toy")

    return made


@pytest.fixture
def store(pipeline: Any) -> Store:
    return Store.open(pipeline.store)


def opened(path: Path) -> CausalLM:
    model = arra.load_model(path)
    assert isinstance(model, CausalLM)
    return model


@pytest.mark.parametrize("part", ["all", "lora", "head"])
def test_a_run_is_an_ordinary_folder_that_paints(
    part: str, recipe: MakesRecipe, store: Store, folder: Path, tmp_path: Path
) -> None:
    """Of rows that are not trained every bit is kept, in the merged model too."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a red bar number {number}"}) + "\n" for number in range(30)))
    llm = {"train": part, "text": {"path": str(text), "rows": 2, "length": 16}}
    run = train(recipe(llm=llm), store, tmp_path / "run", previews=False)
    before, after = opened(folder), opened(run.path)
    assert after.settings == before.settings
    assert is_tied(after.lm)
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file() == (part != "all")
    assert not any("lora" in name or "token_adapter" in name for name in after.lm.state_dict())
    rows = sorted(before.layout.image_ids())
    words = torch.ones(len(before.lm.get_input_embeddings().weight), dtype=torch.bool)  # type: ignore[operator]
    words[rows] = False
    old, new = before.lm.state_dict(), after.lm.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert "model.embed_tokens.weight" in moved
    assert torch.equal(old["model.embed_tokens.weight"][words], new["model.embed_tokens.weight"][words]) == (
        part != "all"
    )
    assert any("mlp" in name for name in moved) == (part != "head")
    watched = [row for row in run.read_metrics() if row["kind"] == "validation"]
    assert len(watched) == 2
    assert all(0 < row["text_loss"] < 20 for row in watched)
    images = arra.load_tokenizer(TOKENIZER)
    found = arra.generate(after, images, prompts=["red bar", "blue frame"], seeds=[0, 1], cfg_scale=2.0)
    assert found.images is not None
    assert found.images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("part", ["all", "head"])
def test_a_sharded_training_leaves_the_same_folder(
    part: str, recipe: MakesRecipe, store: Store, tmp_path: Path
) -> None:
    """A head that is tied to its embeddings is one matrix in it."""
    files = []
    for kind in ("ddp", "fsdp"):
        told = recipe(llm={"train": part}, parallel={"kind": kind})
        run = train(told, store, tmp_path / kind, previews=False)
        assert is_tied(opened(run.path).lm)
        files.append(safetensors.torch.load_file(run.path / "model.safetensors"))
    ours, theirs = files
    assert ours.keys() == theirs.keys()
    assert "lm_head.weight" not in ours
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_weight_nought_trains_the_baseline(recipe: MakesRecipe, store: Store, tmp_path: Path) -> None:
    plain = train(recipe(align=False), store, tmp_path / "plain", previews=False)
    told = recipe()
    assert told.align is not None
    nought = told.model_copy(update={"align": told.align.model_copy(update={"weight": 0.0})})
    other = train(nought, store, tmp_path / "nought", previews=False)
    ours, theirs = (opened(run.path).lm.state_dict() for run in (plain, other))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_what_is_trained_on_is_the_stores(recipe: MakesRecipe, store: Store, folder: Path) -> None:
    """Each row is the layout's sequence of its own prompt and codes; about a tenth has no prompt."""
    told = recipe(condition_dropout=0.5, alternative_share=0.0)
    data = training_data(told, store, arra.load_tokenizer(TOKENIZER))
    model = opened(folder)
    layout, dropped, count = model.layout, 0, 0
    assert model.text_tokenizer is not None
    rows = store.rows("train")
    for step in range(4):
        batch = data.batches.batch(step)
        assert batch.rows is not None
        for place, row in enumerate(rows[batch.rows.numpy()]):
            codes = layout.read_image(batch.tokens[place].tolist())
            prompt = str(store.fields(int(row), "prompt")[0])
            written = layout.sequence(model.text_tokenizer.encode(prompt), codes)
            length = len(written.tokens)
            whole = batch.tokens[place, :length].tolist() == written.tokens.tolist()
            empty = layout.sequence(None, codes)
            assert whole or batch.tokens[place, : len(empty.tokens)].tolist() == empty.tokens.tolist()
            expected = written if whole else empty
            assert batch.labels[place, : len(expected.tokens)].tolist() == expected.labels.tolist()
            assert (batch.labels[place, len(expected.tokens) :] == NO_LABEL).all()
            dropped, count = dropped + (not whole), count + 1
    assert 0 < dropped < count


def test_each_grid_has_its_own_words() -> None:
    """Where pictures have shapes of their own, a prompt that names the size names theirs."""
    small, large = [[[1]], [[2]], [[3]]], [[[11]], [[12]], [[13]]]
    conditions = PromptConditions((small, large), ((2, 2), (2, 4)), np.array([0, 1, 1]))
    chance = torch.ones(2, 3)
    first = conditions.take(torch.tensor([0]), chance[:1], chance[:1])
    second = conditions.take(torch.tensor([2, 1]), chance, chance)
    assert (first.prompts, first.grid) == (([1],), (2, 2))
    assert (second.prompts, second.grid) == (([13], [12]), (2, 4))


def test_alternatives_take_their_share() -> None:
    conditions = PromptConditions(([[[1], [2], [3]], [[4]]],), ((2, 2),), dropout=0.1, alternative_share=0.5)
    chances = torch.tensor([[0.2, 0.4, 0.6], [0.2, 0.4, 0.4], [0.2, 0.6, 0.6], [0.05, 0.4, 0.6]])
    assert conditions.take(torch.zeros(4, dtype=torch.int64), chances, chances).prompts == ([3], [2], [1], None)
    assert conditions.take(torch.ones(1, dtype=torch.int64), chances[:1], chances[:1]).prompts == ([4],)


def test_recipes_that_do_not_fit_leave_no_run(recipe: MakesRecipe, store: Store, folder: Path, tmp_path: Path) -> None:
    def refused(told: Recipe, match: str) -> None:
        with pytest.raises(ArraError, match=match) as caught:
            train(told, store, tmp_path / "run", previews=False)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    few = tmp_path / "few"
    few.mkdir()
    for file in folder.iterdir():
        (few / file.name).symlink_to(file)
    card = json.loads((folder / "model.json").read_text())
    (few / "model.json").unlink()

    def changed(**changes: Any) -> dict[str, Any]:
        content = {**card, "settings": {**card["settings"], "layout": {**card["settings"]["layout"], **changes}}}
        (few / "model.json").write_text(json.dumps(content))
        return {"folder": str(few)}

    refused(recipe(llm=changed(max_positions=30)), r"record '\d+.*': \d+ tokens do not fit the model's 30 positions")
    refused(recipe(llm=changed(pixels_per_code=8)), r"openmoji-vq4 has 2048 codes of 4 pixels, .* paints 2048 of 8")
    refused(recipe(llm={"folder": str(tmp_path / "nowhere")}), "nowhere: no ")
    refused(recipe(llm={"text": {"path": str(tmp_path / "none.txt")}}), r"none\.txt: cannot be read")
    short = tmp_path / "short.txt"
    short.write_text("a red bar")
    refused(recipe(llm={"text": {"path": str(short), "length": 512}}), r"short\.txt: \d+ tokens fill no row of 512")
    refused(recipe(llm={"text": {"path": str(short), "length": 513}}), r"more than the model's 512 positions")
    told = recipe()
    assert told.align is not None
    refused(
        told.model_copy(update={"align": told.align.model_copy(update={"layer": 3})}), r"align\.layer: 3 is outside"
    )


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "zwölf"}\n', encoding="utf-8")
    assert read_texts(tmp_path / "b.jsonl") == ["one", "zwölf"]
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(ArraError, match=r'c\.jsonl: line 2: expected {"text": "..."}'):
        read_texts(tmp_path / "c.jsonl")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ArraError, match=r"d\.txt: not UTF-8 text"):
        read_texts(tmp_path / "d.txt")


def test_a_recipe_says_what_follows_from_its_model(recipe: MakesRecipe) -> None:
    described = describe_recipe(recipe())
    assert "# layout: generic, read as '{prompt}'" in described
    assert "# image: 16 codes (4 x 4) of 2048" in described
