"""Tables of a paper as recipes to train: which rows there are, and the recipe of each at full or embedded scale.

    recipes/table1.yaml --scale full------> base + file + row                          --> Recipe
                        --scale embedded--> recipes/embedded.yaml + its row
                                            + the table row's own `align` + `embedded` --> Recipe

Place in the pipeline: `arra reproduce` trains what comes back, `arra plan` tells what it costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arra.config import Recipe, RecipeFile, read_recipe_file, recipe_of_row
from arra.errors import ArraError
from arra.evaluate.paper import TableRow, TableSection

Scale = Literal["embedded", "full"]
OF_THE_LARGE = ("layer", "encoder", "components")
"""Keys of `align` that mean something else in another model, with other teachers: `embedded` says what stands in."""
START = "row:"
"""Begins a recipe's `model.weights` that are another row's finished run."""


@dataclass(frozen=True)
class PaperRow:
    """A row of a table."""

    name: str
    facts: TableRow
    recipe: Recipe | None
    """None of another system's row."""


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper, and what its rows train."""

    name: str
    """As commands take it."""
    section: TableSection
    rows: tuple[PaperRow, ...]
    starts: Mapping[str, Recipe]
    """Recipes of the rows whose finished runs others start from, by name."""

    def protocol_of(self, row: PaperRow) -> str:
        """How a row is measured at full scale."""
        return row.facts.protocol or self.section.protocol


def read_table(
    name: str, *, scale: Scale, rows: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> PaperTable:
    """The table of a recipe; with `rows` these alone and those that they are held against.

    `overrides` are of every row; keys below `align` pass by rows without it.

    Raises:
        ArraError: the recipe has no table, no such row, or a row cannot be a recipe at this scale.
    """
    file = read_recipe_file(name)
    if file.table is None:
        raise ArraError(f"{name}: has no 'table' section, so it is no table of a paper; arra list recipes names those")
    chosen = list(file.facts) if rows is None else _with_references(file, rows)
    found, starts = list[PaperRow](), dict[str, Recipe]()
    for row in file.facts:
        if row not in chosen:
            continue
        facts = file.facts[row]
        recipe = None if facts.external else row_recipe(file, row, scale=scale, overrides=overrides)
        found.append(PaperRow(row, facts, recipe))
        start = None if recipe is None else start_of(recipe)
        if start is not None and start not in starts:
            starts[start] = _start_recipe(file, start, scale=scale, overrides=overrides)
    return PaperTable(file.source, file.table, tuple(found), starts)


def _with_references(file: RecipeFile, rows: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(rows))
    for row in chosen:
        if row not in file.facts:
            file.row(row)  # refuses it
        against = file.facts[row].against
        if against is not None and against not in chosen:
            chosen.append(against)
    return chosen


def row_recipe(file: RecipeFile, row: str, *, scale: Scale, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a row of a table at this scale.

    Raises:
        ArraError: settings that do not fit each other, or a stand-in that is none.
    """
    source, name = f"{file.source}: rows.{row}", {"row": row}
    differences = [file.row(row), name]
    settings = file.settings
    if scale == "embedded":
        facts = file.facts[row].embedded
        small, source = file.stand_ins, f"{source}.embedded"
        try:
            stand_in = small.row(facts.get("row"))
        except ArraError as error:
            raise ArraError(f"{source}.row: {error}") from None
        mapped = {key: value for key, value in facts.items() if key != "row"}
        settings = small.settings | ({"name": settings["name"]} if "name" in settings else {})
        differences = [stand_in, _carried(file.row(row)), mapped, name]
    return recipe_of_row(
        settings, differences, source=source, overrides=_fitting(settings, differences, source, overrides)
    )


def _carried(difference: Mapping[str, Any]) -> dict[str, Any]:
    """What a row changes of the alignment, as far as it means the same in a small model."""
    if "align" not in difference:
        return {}
    align = difference["align"]
    if not isinstance(align, dict):  # null; all else is refused with the row's settings
        return {"align": align}
    return {"align": {key: value for key, value in align.items() if key not in OF_THE_LARGE}}


def _fitting(
    settings: dict[str, Any], differences: Sequence[dict[str, Any]], source: str, overrides: Sequence[str]
) -> Sequence[str]:
    """The overrides without those below `align` where the row has no alignment, which they would bring back."""
    rest = [text for text in overrides if text.partition("=")[0].strip().split(".")[0] != "align"]
    if len(rest) == len(overrides):
        return overrides
    aligned = recipe_of_row(settings, differences, source=source, overrides=rest).align is not None
    return overrides if aligned else rest


def start_of(recipe: Recipe) -> str | None:
    """The row whose finished run the recipe starts from; None where it names none."""
    weights = recipe.model.weights
    return weights.removeprefix(START) if weights is not None and weights.startswith(START) else None


def _start_recipe(file: RecipeFile, name: str, *, scale: Scale, overrides: Sequence[str]) -> Recipe:
    """The recipe of a row that others start from: of the embedded recipe, or of the table's own file."""
    file = file.stand_ins if scale == "embedded" else file
    source = f"{file.source}: rows.{name}"
    plain = [text for text in overrides if text.partition("=")[0].strip().split(".")[0] != "align"]
    recipe = recipe_of_row(file.settings, [file.row(name), {"row": name}], source=source, overrides=plain)
    if start_of(recipe) is not None:
        raise ArraError(f"{source}: others start from it, so it cannot start from a row itself")
    return recipe
