"""A paper's tables, trained and measured: `arra reproduce`.

    tables -> their rows' recipes (stages/tables.py) -> one store for each data and tokenizer -> runs that others start
    from -> rows x seeds trained and evaluated -> tables judged (stages/reproduce_results.py)

A recipe that stands in several rows is trained once: runs are named by what they train. What is finished is kept, so
the same command continues, with more tables, rows or seeds too; parts of it may run as jobs side by side (`--shard`).
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from arra.config import Recipe, dump_recipe, find_recipe, read_recipe_file
from arra.data.store import Store
from arra.display import Display
from arra.distributed import set_threads
from arra.errors import ArraError
from arra.runs import atomic_write, without_keys, writing
from arra.stages.begun import fixed_settings
from arra.stages.compute import step_phases, steps_within, teacher_flops, total_flops
from arra.stages.lab import not_evaluated, prepare_store
from arra.stages.reproduce_options import ReproduceOptions, card_folder, card_in, measured_by, require_measures
from arra.stages.reproduce_results import Reproduced, collect, print_results, write_results
from arra.stages.set_options import SetOptions
from arra.stages.tables import PaperRow, PaperTable, read_table, start_of
from arra.stages.tasks import Failure, Task, evaluate_tasks, finished, train_tasks
from arra.stages.training_data import epoch_length

STORES, RUNS, RECIPES, LOCK_FILE = "stores", "runs", "recipes", ".shared.lock"
OF_ALIGNMENT = ("align", "encoder")
"""Sections that say how a row is aligned."""
NOT_OF_THE_STORE = ("max_train_records", "expected_records", "mode")
"""Keys of `data` that say how a store is used."""


@dataclass(frozen=True)
class Variant:
    """What one recipe trains, whatever rows it stands in."""

    name: str
    """The first row that has it, and a hash of what is trained."""
    recipe: Recipe
    rows: tuple[tuple[str, str], ...]
    """(table, row)."""
    store: Path
    alike: str
    """What it shares with rows that are trained alike but for their alignment."""
    protocols: tuple[str | None, ...]
    """Of its evaluations, those of its rows; None measures as the recipe says."""
    records: int
    """Training pictures of an epoch."""
    step_flops: int | None = None
    teacher_flops: int | None = None


def run_reproduce(options: ReproduceOptions, out: Path, *, console: Console) -> Reproduced:
    """Tables with verdicts, and what failed; what was finished before is not done again.

    Raises:
        ArraError: no such table or row, a folder with runs of other settings, or pictures that cannot be read.
        KeyboardInterrupt: after the trainings have saved.
    """
    options.places.require()
    tables = read_tables(options)
    require_measures(tables, options)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if not options.places.devices:
        set_threads(1)  # on a few shared cores a second thread of one process waits more than it works
    with Display(console) as display:
        with _alone(out, display):
            variants = prepare_rows(tables, options, out, display)
        console.print(variants_table(variants, seeds=options.seeds))
        tasks = tasks_of(variants, options.seeds, out)
        own = tasks if options.shard is None else tasks[options.shard[0] :: options.shard[1]]
        failures = train_tasks(own, None, display, places=options.places, keep_going=True)
        trained = [task for task in own if finished(task)]
        failures += evaluate_rows(trained, variants, options, out, display)
        with _alone(out, display):
            found = collect(tables, variants, tasks, options, failures)
            write_results(found, out)
    print_results(found, out, console)
    return found


def read_tables(options: ReproduceOptions) -> list[PaperTable]:
    """The tables with the rows that are asked for.

    Raises:
        ArraError: a table or row that there is not, one named twice, or numbers out of range.
    """
    if options.seeds < 1:
        raise ArraError(f"--seeds {options.seeds}: expected 1 or more")
    files = [find_recipe(name).resolve() for name in options.tables]
    if twice := [name for place, name in enumerate(options.tables) if files[place] in files[:place]]:
        raise ArraError(f"{twice[0]}: named twice; name each table once")
    if options.rows is not None and not options.rows:
        raise ArraError("--rows: names no row; expected names of the tables' rows with commas between")
    left = list(options.rows or ())
    found = []
    for name in options.tables:
        rows = options.rows
        if rows is not None:
            there = read_recipe_file(name).facts
            rows = tuple(row for row in rows if row in there)
            left = [row for row in left if row not in rows]
            if not rows:
                continue
        found.append(read_table(name, scale=options.scale, rows=rows, overrides=options.overrides))
    if left:
        raise ArraError(
            f"--rows {left[0]}: no row of {', '.join(options.tables)}; arra reproduce TABLE --dry-run lists them"
        )
    return found


@contextmanager
def _alone(out: Path, display: Display) -> Iterator[None]:
    """A block that one job at a time is in; the others wait."""
    with writing(out):
        lock = (out / LOCK_FILE).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.console.print("another job is at what all share; waiting for it", highlight=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# What all rows share


def prepare_rows(tables: Sequence[PaperTable], options: ReproduceOptions, out: Path, display: Display) -> list[Variant]:
    """What each row trains; stores with everything that rows need and the runs that others start from are there.

    Raises:
        ArraError: pictures cannot be read, rows ask for columns made in different ways, or a start cannot be trained.
    """
    recipes = {(table.name, row.name): row.recipe for table in tables for row in table.rows if row.recipe is not None}
    starts = {(table.name, name): recipe for table in tables for name, recipe in table.starts.items()}
    stores = _stores([*recipes.values(), *starts.values()], out, display)
    finished_starts, begun = dict[tuple[str, str], tuple[str, Path]](), dict[str, Task]()
    for (table, name), recipe in starts.items():
        store = stores[_store_name(recipe)]
        key = _key(recipe, None)
        task = _task(_run_name(name, key, out), recipe, recipe.train.seed, store.path, out, epoch_length(recipe, store))
        begun[key] = task
        finished_starts[table, name] = key, task.folder
    train_tasks(list(begun.values()), None, display, places=options.places)
    variants, costs = dict[str, Variant](), Costs()
    protocols = {
        (table.name, row.name): table.protocol_of(row) if options.scale == "full" else None
        for table in tables
        for row in table.rows
    }
    for (table, row), recipe in recipes.items():
        start = start_of(recipe)
        known = None if start is None else finished_starts[table, start]
        store = stores[_store_name(recipe)]
        resolved = _started(recipe, known).resolved(epoch_length(recipe, store))
        display.show("rows", f"{table}: {row}", len(variants), len(recipes))
        begun_from = None if known is None else known[0]
        alike = _key(resolved, begun_from, without=OF_ALIGNMENT)
        resolved, step, teacher = _budgeted(resolved, store, options, costs)
        key = _key(resolved, begun_from)
        one = variants.get(key) or Variant(
            name=_run_name(row, key, out),
            recipe=resolved,
            rows=(),
            store=store.path,
            alike=alike,
            protocols=(),
            records=epoch_length(recipe, store),
            step_flops=step,
            teacher_flops=teacher,
        )
        variants[key] = replace(
            one,
            rows=(*one.rows, (table, row)),
            protocols=tuple(dict.fromkeys((*one.protocols, protocols[table, row]))),
        )
    display.show("rows", "told", 1, 1)
    return list(variants.values())


def _stores(recipes: Sequence[Recipe], out: Path, display: Display) -> dict[str, Store]:
    """One store for each data and tokenizer, with the columns of all their recipes."""
    groups: dict[str, dict[str, Recipe]] = {}
    for place, recipe in enumerate(recipes):
        groups.setdefault(_store_name(recipe), {})[str(place)] = recipe
    return {name: prepare_store(group, out / STORES / name, display) for name, group in groups.items()}


def _store_name(recipe: Recipe) -> str:
    """The folder of the store: its source, its side in pixels, and a hash of how it is made."""
    data = recipe.data.model_dump(mode="json", exclude=set(NOT_OF_THE_STORE))
    made = json.dumps([data, recipe.tokenizer.model_dump(mode="json")], sort_keys=True)
    source = recipe.data.source if recipe.data.sources is None else recipe.data.sources[0].kind
    return f"{source}-{recipe.data.image_size}px-{hashlib.sha256(made.encode()).hexdigest()[:6]}"


def _started(recipe: Recipe, start: tuple[str, Path] | None) -> Recipe:
    if start is None:
        return recipe
    folder = str(start[1].resolve())  # the same command may be run again from another folder
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": folder})})


@dataclass(frozen=True)
class Costs:
    """Operations that were counted for other rows already."""

    teachers: dict[str, int] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)
    """Of all steps without alignment, by the recipe's key and its store."""


def _budgeted(
    recipe: Recipe, store: Store, options: ReproduceOptions, costs: Costs
) -> tuple[Recipe, int | None, int | None]:
    """The recipe with the steps that its budget pays for, what one of them costs, and what its teachers' pass does."""
    if recipe.align is None or not options.is_equal:
        return recipe, None, None
    plain = recipe.model_copy(update={"align": None})
    named = f"{store.path} {_key(plain, None)}"
    if named not in costs.plain:
        costs.plain[named] = total_flops(step_phases(plain, store), recipe.train.steps)
    phases = step_phases(recipe, store)
    steps = steps_within(phases, costs.plain[named])
    if steps < 1:
        raise ArraError(
            f"train.steps: {recipe.train.steps} steps without alignment do not pay for one with it; raise it"
        )
    teachers = teacher_flops(recipe, store, known=costs.teachers)
    train = recipe.train.model_copy(update={"steps": steps})
    return recipe.model_copy(update={"train": train}), phases[0].flops, teachers


def _key(recipe: Recipe, start: str | None, *, without: Sequence[str] = ()) -> str:
    """A hash of what is trained and how it is measured, whatever it is called and however fast it runs."""
    data: dict[str, Any] = without_keys(fixed_settings(recipe), ("name", "row", *without))
    if start is not None:
        data["model"]["weights"] = f"row:{start}"
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


def _run_name(row: str, key: str, out: Path) -> str:
    """The name that runs of this key have already, whatever row they were first trained for; else a new one."""
    known = sorted(path.stem for path in (out / RECIPES).glob(f"*-{key}.yaml"))
    safe = re.sub(r"[^\w.-]", "-", row)  # a row's name may not lead to another folder
    return known[0] if known else f"{safe}-{key}"


# Runs


def tasks_of(variants: Sequence[Variant], seeds: int, out: Path) -> list[Task]:
    """The runs, seed by seed, so that an interrupted command has whole comparisons first."""
    return [
        _task(one.name, one.recipe, one.recipe.train.seed + number, one.store, out, one.records, number)
        for number in range(seeds)
        for one in variants
    ]


def _task(name: str, recipe: Recipe, seed: int, store: Path, out: Path, records: int, number: int = 0) -> Task:
    """A run; its recipe is written where its process reads it."""
    file = out / RECIPES / f"{name}.yaml"
    row = {"name": recipe.name, "row": name}
    content = dump_recipe(recipe.model_copy(update=row)) + f"rows:\n  {name}: {{}}\n"
    if not file.is_file() or file.read_text() != content:  # how fast it runs may have changed
        atomic_write(file, content)
    own = (f"train.seed={seed}", f"model.seed={recipe.model.seed + number}")
    return Task(name, seed, out / RUNS / name / f"seed-{seed}", own, f"{name} {seed}", file, records, store)


def evaluate_rows(
    trained: Sequence[Task], variants: Sequence[Variant], options: ReproduceOptions, out: Path, display: Display
) -> list[Failure]:
    """What could not be evaluated; all other trained runs have a card."""
    protocols = {one.name: one.protocols for one in variants}
    failures: list[Failure] = []
    if options.scale == "embedded":
        waiting: list[Task] = []
        with _alone(out, display):  # judges and what they say of the store are made once
            for store in dict.fromkeys(task.store for task in trained):
                others, damaged = not_evaluated([task for task in trained if task.store == store], display)
                waiting += others
                failures += damaged
        return failures + evaluate_tasks(waiting, display, places=options.places, keep_going=True)
    for protocol in dict.fromkeys(each for one in variants for each in one.protocols if each is not None):
        own = measured_by(protocol, options)
        waiting = [
            task
            for task in trained
            if protocol in protocols[task.row] and card_in(card_folder(task.folder, own)) is None
        ]

        def asked(task: Task, own: SetOptions = own) -> SetOptions:
            return replace(own, out=card_folder(task.folder, own))

        failures += evaluate_tasks(waiting, display, places=options.places, keep_going=True, sets=asked)
    return failures


def variants_table(variants: Sequence[Variant], *, seeds: int) -> Table:
    """What is trained, for the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left")
    table.title = f"{len(variants)} recipes, {seeds} training seed{'s' if seeds > 1 else ''} each"
    for column in ("recipe", "steps", "stands in"):
        table.add_column(column, justify="right" if column == "steps" else "left", no_wrap=column != "stands in")
    for one in variants:
        listed = ", ".join(f"{table}: {row}" for table, row in one.rows)
        table.add_row(escape(one.name), f"{one.recipe.train.steps:,}", escape(listed))
    return table


def list_rows(options: ReproduceOptions) -> Table:
    """The rows that are asked for, for the terminal: what each trains, and which of them are the same training.

    Raises:
        ArraError: as `read_tables`.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left")
    for column in ("table", "row", "held against", "steps", "trains"):
        table.add_column(column, no_wrap=column not in ("table", "trains"), overflow="fold")
    seen: dict[str, str] = {}
    for one in read_tables(options):
        for row in one.rows:
            name, against = f"{one.name}: {row.name}", row.facts.against or ""
            if row.recipe is None:
                table.add_row(escape(one.name), escape(row.name), "", "", "nothing, another system's")
                continue
            first = seen.setdefault(_key(row.recipe, None), name)
            trains = f"as {first}" if first != name else _stand_in(one, row) if options.scale == "embedded" else ""
            table.add_row(*map(escape, (one.name, row.name, against, str(row.recipe.train.steps), trains)))
    return table


def _stand_in(table: PaperTable, row: PaperRow) -> str:
    """What a row is laid over at embedded scale."""
    named, recipe = row.facts.embedded.get("row"), table.section.embedded
    return f"over {recipe}: {named}" if named else f"over {recipe} as it is: the row has no embedded.row"
