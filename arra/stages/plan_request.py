"""What `arra plan` answers: one recipe on some machines, or every row of a paper's table.

PlanRequest --> plan_report.py or plan_table.py --> PlanAnswer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType

from arra.config import load_recipe, read_recipe_file
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.plan import plan
from arra.stages.plan_machines import Machine, parse_machine
from arra.stages.plan_report import report
from arra.stages.plan_table import plan_table, table_report
from arra.stages.planned_model import KnownPasses
from arra.stages.tables import Scale


@dataclass(frozen=True)
class PlanRequest:
    """What is asked, as the command line has it."""

    recipe: str
    machines: tuple[str, ...]
    row: str | None = None
    overrides: tuple[str, ...] = ()
    stand_in: str | None = None
    """In place of a language model that is not there."""
    store: Path | None = None
    """Tells how many pictures there are."""
    probing: bool = False
    scale: str | None = None
    """Of a table's rows: full, unless told, or embedded."""
    seeds: int = 1
    """Of a table's rows."""


@dataclass(frozen=True)
class PlanAnswer:
    """What is shown, and whether it fits."""

    shown: RenderableType
    fits: bool


def answer(request: PlanRequest) -> PlanAnswer:
    """The plan of a recipe; of every row where it has a table and no row is named.

    Raises:
        ArraError: a recipe, row or machine that is none, or a table with what is one recipe's alone.
    """
    machines = [parse_machine(written) for written in request.machines]
    if not machines:
        raise ArraError("--gpu: name the machine, as in --gpu 8xa6000-48g, 4x48 (GiB) or cpu")
    store = None if request.store is None else Store.open(request.store)
    if request.row is None and read_recipe_file(request.recipe).table is not None:
        return _of_table(request, machines, store)
    if request.scale is not None:
        raise ArraError("--scale: is of the rows of a table; leave out --row, or name a recipe that has a table")
    if request.seeds != 1:
        raise ArraError("--seeds: is of the rows of a table; leave it out")
    recipe = load_recipe(request.recipe, row=request.row, overrides=request.overrides)
    found = plan(recipe, machines=machines, stand_in=request.stand_in, store=store, probing=request.probing)
    return PlanAnswer(report(found), found.fits)


def _of_table(request: PlanRequest, machines: Sequence[Machine], store: Store | None) -> PlanAnswer:
    if request.probing:
        raise ArraError("--probe: is of one training; name a row of the table with --row")
    if request.scale not in (None, "full", "embedded"):
        raise ArraError(f"--scale {request.scale}: expected full or embedded")
    scale: Scale = "embedded" if request.scale == "embedded" else "full"
    known: KnownPasses = {}
    tables = [
        plan_table(
            request.recipe,
            machine=machine,
            scale=scale,
            seeds=request.seeds,
            overrides=request.overrides,
            stand_in=request.stand_in,
            store=store,
            known=known,
        )
        for machine in machines
    ]
    shown = [part for table in tables for part in (f"{table.machine.written}:", table_report(table))]
    return PlanAnswer(Group(*shown), any(table.fits for table in tables))
