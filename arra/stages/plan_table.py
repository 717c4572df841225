"""What every row of a paper's table would take of a machine: `arra plan` of a recipe with a table and no row.

read_table --> a plan for each row (rows of one model are traced once) --> one line each, and the sum of all
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arra.config import Recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.plan import MachinePlan, plan
from arra.stages.plan_machines import Machine
from arra.stages.plan_report import UNKNOWN, gib, in_short, number, span
from arra.stages.planned_model import KnownPasses, planned_model, with_known_passes
from arra.stages.tables import Scale, read_table
from arra.train.memory import local_elements

PICTURES = {"source", "path", "sources"}
"""Keys of `data` that say which pictures there are."""


@dataclass(frozen=True)
class RowPlan:
    """A row's training on one machine."""

    name: str
    recipe: Recipe
    parameters: int
    found: MachinePlan
    advice: str | None
    """What to change, in a line; None where nothing."""


@dataclass(frozen=True)
class TablePlan:
    """All rows of a table that are trained."""

    title: str
    machine: Machine
    rows: tuple[RowPlan, ...]
    seeds: int

    @property
    def fits(self) -> bool:
        """Whether every row fits."""
        return all(row.found.fits for row in self.rows)

    @property
    def device_hours(self) -> float | None:
        """Of all rows and seeds; None where one is not known."""
        hours = [row.found.hours for row in self.rows]
        if any(each is None for each in hours):
            return None
        return self.seeds * sum((row.found.hours or 0.0) * row.found.machine.count for row in self.rows)


def plan_table(
    name: str,
    *,
    machine: Machine,
    scale: Scale = "full",
    seeds: int = 1,
    overrides: Sequence[str] = (),
    stand_in: str | None = None,
    store: Store | None = None,
    known: KnownPasses | None = None,
) -> TablePlan:
    """What the rows of a table take on a machine; `known` are passes that were made for other machines or tables.

    Raises:
        ArraError: the recipe has no table, a row cannot be planned, or a store is given and rows have other pictures.
    """
    table = read_table(name, scale=scale, overrides=overrides)
    named = {row.recipe.data.model_dump_json(include=PICTURES) for row in table.rows if row.recipe is not None}
    if store is not None and len(named) > 1:
        raise ArraError(f"--store {store.path}: rows of {name} have different pictures; name one with --row")
    rows, known = [], {} if known is None else known
    for row in table.rows:
        if row.recipe is None:
            continue
        decoder = row.recipe.model.llm is None
        planned = with_known_passes(planned_model(row.recipe, None if decoder else stand_in), row.recipe, known=known)
        found = plan(row.recipe, machines=[machine], store=store, planned=planned)
        count = sum(local_elements(held.shape, 1) for held in found.planned.parts.all)
        rows.append(RowPlan(row.name, row.recipe, count, found.machines[0], in_short(found)))
    return TablePlan(f"{table.section.title}: {table.section.about}", machine, tuple(rows), seeds)


def table_report(found: TablePlan) -> Group:
    """The rows for a console, and what all of them take together."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for place, heading in enumerate(("row", "weights", "GiB", "fits", "s/step", "steps", "time", "of devices")):
        table.add_column(heading, justify="left" if place == 0 else "right", no_wrap=True, overflow="fold")
    for row in found.rows:
        each = row.found
        hours, step = each.hours, None if each.time is None else each.time.seconds
        table.add_row(
            row.name,
            f"{number(row.parameters / 1e6)}M",
            gib(each.needed),
            "yes" if each.fits else "no",
            UNKNOWN if step is None else number(step),
            UNKNOWN if each.steps is None else f"{each.steps:,}",
            UNKNOWN if hours is None else span(hours),
            UNKNOWN if hours is None else span(hours * each.machine.count),
        )
    total = found.device_hours
    seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
    sum_line = (
        f"{len(found.rows)} rows, {seeds}: "
        + ("the time is not known" if total is None else f"{span(total)} of devices")
        + " in training, where no row is trained for another table too"
    )
    return Group(Text(found.title), table, Text("\n".join([sum_line, *_advice(found)])))


def _advice(found: TablePlan) -> list[str]:
    """What to change, a line for all rows of which it is the same."""
    told: dict[str, list[str]] = {}
    for row in found.rows:
        if row.advice is not None:
            told.setdefault(row.advice, []).append(row.name)
    return [
        f"{'every row' if len(names) == len(found.rows) > 1 else ', '.join(names)}: {advice}"
        for advice, names in told.items()
    ]
