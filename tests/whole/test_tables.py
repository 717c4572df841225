"""Recipes of the paper's tables: the paper's numbers, models that can be built, rows that differ at every scale."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import yaml

from arra.config import Recipe, dump_recipe, read_recipe_file, recipes_folder
from arra.evaluate.protocols import PROTOCOLS
from arra.stages.planned_model import PlannedModel, planned_model
from arra.stages.tables import PaperTable, Scale, read_table, start_of

TABLES = [path.stem for path in sorted(recipes_folder().glob("*.yaml")) if read_recipe_file(path).table is not None]
OF_THE_PAPER = yaml.safe_load(Path(__file__).with_name("paper_numbers.yaml").read_text())
SCALES: tuple[Scale, ...] = ("embedded", "full")
SAME = ("target", "loss", "weight", "projector", "decay", "balance", "position_power", "whiten", "shuffle_targets")
TIMES = ("warmup_steps", "stop_step")
"""Other steps of another training."""

read = cache(read_table)


def trained(table: PaperTable) -> dict[str, Recipe]:
    """Recipes of the rows that are trained, by name."""
    return {row.name: row.recipe for row in table.rows if row.recipe is not None}


@cache
def built(settings: str) -> PlannedModel:
    return planned_model(Recipe.model_validate_json(settings))


def network(recipe: Recipe) -> PlannedModel:
    """The row's model and projectors on `meta`; built once for all rows that have the same shapes."""
    settings = recipe.model_dump(mode="json") | {"name": "", "row": None, "train": {"steps": 1}}
    if recipe.model.llm is not None:
        settings["model"]["llm"]["folder"] = "models/none"  # one of published sizes stands in
    if recipe.align is not None:
        for term in (settings["align"], *settings["align"]["more"].values()):
            term |= {"layer": 1, "weight": 1.0, "loss": "cosine", "balance": None, "stop_step": None, "warmup_steps": 0}
    return built(json.dumps(settings))


def ranks(values: Sequence[float]) -> list[int]:
    return [sorted(set(values)).index(value) for value in values]


def test_every_table_of_the_paper_has_a_recipe() -> None:
    """And no other recipe says that its table is the paper's."""
    assert {name for name in TABLES if read(name, scale="full").section.source is None} == set(OF_THE_PAPER)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_expected_numbers_are_the_papers(name: str) -> None:
    columns = {column: numbers.split() for column, numbers in OF_THE_PAPER[name].items()}
    table = read(name, scale="full")
    assert list(table.section.columns) == list(columns)
    for column, numbers in columns.items():
        expected = [row.facts.expect.get(column) for row in table.rows]
        assert expected == [None if number == "-" else float(number) for number in numbers], column


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_what_the_protocol_measures(name: str) -> None:
    table = read(name, scale="full")
    of_all = set()
    for row in table.rows:
        protocol = PROTOCOLS[row.facts.protocol or table.section.protocol]
        others = table.section.source is not None
        measured = {measure.metric for measure in protocol.measures if measure.in_paper or others}
        assert set(row.facts.expect) in (set(), measured & set(table.section.columns)), row.name
        of_all |= measured
    assert set(table.section.columns) <= of_all


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_no_two_rows_train_the_same(name: str, scale: Scale) -> None:
    recipes = trained(read(name, scale=scale)).values()
    assert len({dump_recipe(recipe.model_copy(update={"row": None})) for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_rows_are_held_against_rows_of_the_same_pictures(name: str, scale: Scale) -> None:
    table = read(name, scale=scale)
    recipes, facts = trained(table), {row.name: row.facts for row in table.rows}
    for row, fact in facts.items():
        if fact.against is None:
            continue
        ours, other = recipes[row], recipes[fact.against]
        for section in ("data", "tokenizer", "text_encoder", "sample", "caption_judge", "evaluate"):
            assert getattr(ours, section) == getattr(other, section), (row, section)
        assert ours.encoder.judge == other.encoder.judge
        assert fact.protocol == facts[fact.against].protocol
        assert not fact.expect or fact.expect.keys() == facts[fact.against].expect.keys()


@pytest.mark.parametrize("name", TABLES)
def test_what_a_row_varies_is_varied_in_its_stand_in(name: str) -> None:
    """The alignment's own settings are the row's; layers, sizes of models and pictures keep their order."""
    full, small = trained(read(name, scale="full")), trained(read(name, scale="embedded"))
    assert list(full) == list(small)
    layers: tuple[list[int], list[int]] = ([], [])
    sizes: tuple[list[int], list[int]] = ([], [])
    pictures: tuple[list[int], list[int]] = ([], [])
    for scale, recipes in enumerate((full, small)):
        layers[scale].extend(recipe.align.layer for recipe in recipes.values() if recipe.align is not None)
        pictures[scale].extend(recipe.data.image_size for recipe in recipes.values())
        if all(recipe.model.llm is None for recipe in full.values()):
            sizes[scale].extend(parameters(recipe) for recipe in recipes.values())
    for of_full, of_small in (layers, sizes, pictures):
        assert ranks(of_full) == ranks(of_small)
    for row, recipe in full.items():
        align, stand_in = recipe.align, small[row].align
        assert (align is None) == (stand_in is None), row
        assert [getattr(align, key, None) for key in SAME] == [getattr(stand_in, key, None) for key in SAME], row
        assert [bool(getattr(align, key, 0)) for key in TIMES] == [bool(getattr(stand_in, key, 0)) for key in TIMES]


def parameters(recipe: Recipe) -> int:
    return sum(parameter.numel() for parameter in network(recipe).model.parameters())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_every_row_builds_on_meta(name: str, scale: Scale) -> None:
    table = read(name, scale=scale)
    for recipe in (*trained(table).values(), *table.starts.values()):
        planned = network(recipe)
        assert all(parameter.is_meta for parameter in planned.model.parameters())
        assert len(planned.projectors) == len(recipe.align_terms())
        assert all(term.layer <= len(planned.model.blocks) for _, term in recipe.align_terms())


@pytest.mark.parametrize("name", TABLES)
def test_adapted_models_start_from_one_that_paints(name: str) -> None:
    small = read(name, scale="embedded")
    for row, recipe in trained(read(name, scale="full")).items():
        paints = recipe.model.llm is not None and recipe.model.llm.folder == "models/lumina-7b"
        assert start_of(trained(small)[row]) == ("general" if paints else None), row
    assert set(small.starts) == {start_of(recipe) for recipe in trained(small).values()} - {None}
