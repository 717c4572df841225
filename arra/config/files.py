"""Files of recipes: settings, what each row changes, a base below them, what a paper has for the rows.

file --read_recipe_file--> RecipeFile --row, --set--> pydantic --> Recipe
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from arra.config.explaining import Tree, did_you_mean, explain, problems_of, show
from arra.config.folders import find_recipe, named_recipe
from arra.config.merging import assign, holds, is_beside, merge
from arra.config.sections import Recipe
from arra.config.yaml_text import dump_yaml, parse_yaml, read_text
from arra.errors import ArraError
from arra.evaluate.paper import TableRow, TableSection
from arra.settings import Settings

S = TypeVar("S", bound=Settings)

MOST_BASES = 4
"""Recipes that stand on each other."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's file as it is written: settings of all rows, what each row changes, what a paper has for it."""

    source: str
    settings: Tree
    """Those of the base, with the file's own laid over them."""
    differences: dict[str, Tree]
    """By row."""
    table: TableSection | None
    facts: dict[str, TableRow]
    """By row; empty ones where the file has no table."""

    @property
    def stand_ins(self) -> "RecipeFile":
        """The recipe whose rows stand in at embedded scale.

        Raises:
            ArraError: the file has no table, or names no recipe there.
        """
        if self.table is None:
            raise ArraError(f"{self.source}: has no 'table' section, so nothing stands in for its rows")
        return read_recipe_file(named_recipe(self.table.embedded, self.source, "table.embedded"))

    def row(self, name: str | None) -> Tree:
        """What a row changes; nothing without a name.

        Raises:
            ArraError: there is no such row, or it is another system's.
        """
        if name is None:
            return {}
        if name not in self.differences:
            listed = f"rows: {', '.join(self.differences)}" if self.differences else "it has none"
            raise ArraError(f"{self.source}: no row '{name}'{did_you_mean(name, list(self.differences))}; {listed}")
        if self.facts[name].external:
            raise ArraError(
                f"{self.source}: row '{name}' is another system's, only its numbers are told; choose another"
            )
        return self.differences[name]


def recipe_of_row(
    settings: Tree, differences: Sequence[Tree], *, source: str, overrides: Sequence[str] = ()
) -> "Recipe":
    """Settings with differences laid over them one after another, as a recipe; `source` names them in errors."""
    for difference in differences:
        settings = merge(settings, difference)
    return _settled(settings, Recipe, source=source, overrides=overrides)


def load_recipe(path: Path | str, *, row: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` (or the built-in one of that name), with a row's differences and `a.b=c` overrides applied.

    Its durations are steps; where one is in epochs all stay as they are written, until `resolved` is told the pictures.

    Raises:
        ArraError: one line that names file, key, what was expected and what was found.
    """
    found = find_recipe(path)
    return parse_recipe(read_text(found), Recipe, source=str(path), row=row, overrides=overrides)


def parse_recipe(text: str, model: type[S], *, source: str, row: str | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings of class `model` from the text of a recipe; `source` names it in errors."""
    file = parse_file(text, source)
    difference = file.row(row)
    named = {"row": row} if row is not None and "row" in model.model_fields else {}
    data = merge(file.settings | named, difference)
    return _settled(data, model, source=source, row=row, difference=difference, overrides=overrides)


def _settled(
    data: Tree,
    model: type[S],
    *,
    source: str,
    row: str | None = None,
    difference: Tree | None = None,
    overrides: Sequence[str] = (),
) -> S:
    """The settings that `data` says, after the overrides; a mistake in what the row changes is told as the row's."""
    data = deepcopy(data)
    assigned = [assign(data, text) for text in overrides]
    try:
        found = model.model_validate(data)
        return cast(S, found.resolved(None)) if isinstance(found, Recipe) and not found.in_epochs else found
    except ValidationError as error:
        problems = problems_of(error)
        key, message = explain(problems[0], data, model)
        dotted = ".".join(map(str, key))
        if key and any(is_beside(key, path) for path in assigned):
            where = f"--set {dotted}"
        else:
            in_row = [f"rows.{row}"] if difference and holds(difference, key) else []
            where = f"{source}: {'.'.join([*in_row, *([dotted] if dotted else [])])}".removesuffix(": ")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArraError(f"{where}: {message}{more}") from None


def row_names(path: Path | str) -> list[str]:
    """The rows of a recipe file that can be trained, in its order; other systems' rows of a table are left out."""
    file = read_recipe_file(path)
    return [name for name in file.differences if not file.facts[name].external]


def read_recipe_file(path: Path | str) -> "RecipeFile":
    """What the file at `path` (or the built-in recipe of that name) says, its base below it, before it is settings.

    Raises:
        ArraError: no such file, no YAML, or a base, a table or facts of a row that are none.
    """
    return parse_file(read_text(find_recipe(path)), str(path))


def dump_recipe(recipe: Settings) -> str:
    """YAML without rows that loads back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def parse_file(text: str, source: str, below: tuple[Path, ...] = ()) -> RecipeFile:
    """The file with this text; `below` are files that have it as their base."""
    data = parse_yaml(text, source)
    base = data.pop("base", None)
    rows = _take_rows(data, source)
    table = _facts(TableSection, data.pop("table", None), f"{source}: table")
    if base is not None:
        data = merge(_base_settings(base, source, below), data)
    facts: dict[str, TableRow] = {}
    for name, difference in rows.items():
        own: Tree = {fact: difference.pop(fact) for fact in TableRow.model_fields if fact in difference}
        if own and table is None:
            raise ArraError(f"{source}: rows.{name}.{next(iter(own))}: is of a paper's table; add a 'table' section")
        facts[name] = _facts(TableRow, own, f"{source}: rows.{name}") or TableRow()
    _check_table(table, facts, source)
    return RecipeFile(source, data, rows, table, facts)


def _base_settings(base: Any, source: str, below: tuple[Path, ...]) -> Tree:
    """The settings of the recipe that a file names as its base: a built-in one, or a file in the same folder."""
    found = named_recipe(base, source, "base")
    if found.resolve() in below or len(below) >= MOST_BASES:
        raise ArraError(f"{source}: base: {base} stands on itself, or on more than {MOST_BASES} others; name another")
    return parse_file(read_text(found), str(found), (*below, found.resolve())).settings


def _facts(model: type[S], data: Any, where: str) -> S | None:
    """What a table or a row of it says beside settings."""
    if data is None:
        return None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found, message = explain(problems_of(error)[0], data if isinstance(data, dict) else {}, model)
        raise ArraError(f"{'.'.join([where, *map(str, found)])}: {message}") from None


def _check_table(table: TableSection | None, facts: dict[str, TableRow], source: str) -> None:
    """Nothing, if every fact of a row is of a column and a row that there is."""
    for name, row in facts.items():
        where = f"{source}: rows.{name}"
        for column in row.expect:
            if table is not None and column not in table.columns:
                near = did_you_mean(column, list(table.columns))
                raise ArraError(
                    f"{where}.expect.{column}: no column of the table{near}; it has {', '.join(table.columns)}"
                )
        if row.against is not None and (row.against not in facts or row.against == name):
            near = did_you_mean(row.against, list(facts))
            raise ArraError(f"{where}.against: '{row.against}' is no other row of the table{near}")


def _take_rows(base: Tree, source: str) -> dict[str, Tree]:
    rows = base.pop("rows", None)
    rows = {} if rows is None else rows
    if not isinstance(rows, dict):
        raise ArraError(f"{source}: rows: expected names with what differs, found {show(rows)}")
    for name, difference in rows.items():
        if difference is not None and not isinstance(difference, dict):
            raise ArraError(f"{source}: rows.{name}: expected what differs from the base, found {show(difference)}")
    return {name: dict(difference or {}) for name, difference in rows.items()}
