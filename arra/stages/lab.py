"""The alignment lab: rows of a recipe at equal training compute, with several seeds, in one table: `arra lab`.

    a recipe's rows -> one store -> FLOPs of a step -> steps -> rows x seeds trained and evaluated -> lab.json, lab.html

What is finished is kept, so the same command continues. A run that fails is told and the others go on. Only counted
operations decide how long a row trains (`train/flops.py`): clocks of busy machines would not be fair.
Legend: S training seeds.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arra.config import Recipe, dump_recipe, find_recipe, load_recipe
from arra.data.store import Store
from arra.display import Display
from arra.distributed import set_threads
from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.evaluate.lab import MeasureTable, lab_tables
from arra.report.grids import GridColumn, readme_grid
from arra.report.lab_page import (
    LabPage,
    RowBudget,
    budget_cells,
    cell_texts,
    interval_meaning,
    lab_markdown,
    measure_title,
    short_count,
    write_lab,
)
from arra.runs import Run, atomic_write, writing
from arra.stages.compute import step_phases, steps_within, teacher_flops, total_flops
from arra.stages.evaluate import SAME_FAMILY, current_evaluation, held_out_splits, prepare_caption_judge
from arra.stages.origin import noted
from arra.stages.painters import load_run
from arra.stages.prepare import prepare
from arra.stages.report import grid_references, grid_samples, painted_pictures
from arra.stages.tasks import Failure, Places, Task, evaluate_tasks, finished, tell_failure, train_tasks
from arra.stages.training_data import epoch_length

DEFAULT_ROWS = ("baseline", "hybnext", "at", "rep", "patch", "both")
RESULTS_FILE = "lab.json"


@dataclass(frozen=True)
class LabOptions:
    """What a lab is asked for."""

    recipe: str = "alignment_lab"
    rows: tuple[str, ...] = DEFAULT_ROWS
    """The first one is the baseline: its training compute is the budget, and the others are held against it."""
    seeds: int = 3
    steps: int | None = None
    """The baseline's; None takes the recipe's `train.steps`."""
    processes: int | None = None
    """At a time; None takes one for each accelerator, else for each core."""
    charge_teacher: bool = False
    """Whether a row's budget also pays for its teachers' pass over the training pictures."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabDone:
    """What a lab left behind."""

    page: Path
    tables: list[MeasureTable]
    budgets: list[RowBudget]
    failures: list[Failure]


def run_lab(options: LabOptions, out: Path, *, console: Console) -> LabDone:
    """Tables, page and failures, after all stages; what was finished before is not done again.

    Raises:
        ArraError: no such recipe or row, a folder with runs of other settings, or no run that could be evaluated.
        KeyboardInterrupt: after the trainings have saved.
    """
    source, recipes = read_rows(options)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with Run(out).lock(), Display(console) as display:  # one lab at a time
        return _run_stages(options, source, recipes, out, display)


def read_rows(options: LabOptions) -> tuple[Path, dict[str, Recipe]]:
    """The recipe's file, and the recipe of every asked row at the baseline's steps.

    Raises:
        ArraError: a row that the recipe has not, or one asked for twice, or too few seeds, steps or processes.
    """
    for name, number in (("seeds", options.seeds), ("steps", options.steps), ("processes", options.processes)):
        if number is not None and number < 1:
            raise ArraError(f"--{name} {number}: expected 1 or more")
    if not options.rows:
        raise ArraError("--rows: names no row; expected names of the recipe's rows, the baseline first, as in a,b")
    if twice := [row for place, row in enumerate(options.rows) if row in options.rows[:place]]:
        raise ArraError(f"--rows: '{twice[0]}' is named twice; name each row once")
    name, given = options.recipe, () if options.steps is None else (f"train.steps={options.steps}",)
    recipes = {
        row: load_recipe(name, row=row, overrides=[*row_overrides(name, row, options.overrides), *given])
        for row in options.rows
    }
    return find_recipe(name).resolve(), recipes


def row_overrides(source: Path | str, row: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that a row takes: a key below `align` would bring the term back to a row without it."""
    rest = [text for text in overrides if text.partition("=")[0].strip().split(".")[0] != "align"]
    own = overrides if load_recipe(source, row=row, overrides=rest).align is not None else rest
    return tuple(own)


def _run_stages(
    options: LabOptions, source: Path, recipes: Mapping[str, Recipe], out: Path, display: Display
) -> LabDone:
    set_threads(1)  # on a few shared cores a second thread of one process waits more than it works
    console = display.console
    store = prepare_store(recipes, out / "store", display)
    records = epoch_length(next(iter(recipes.values())), store)
    recipes = {row: recipe.resolved(records) for row, recipe in recipes.items()}
    budgets = equal_compute(recipes, store, charge_teacher=options.charge_teacher, display=display)
    console.print(budget_table(budgets, charged=options.charge_teacher))
    tasks = list(plan_tasks(options, source, recipes, budgets, out, records=records))
    refuse_other_runs(tasks)
    places = Places(options.processes)
    failures = train_tasks(tasks, out / "store", display, places=places, keep_going=True)
    trained = [task for task in tasks if finished(task)]
    if not trained:
        raise ArraError(f"{out}: no run was trained: {failures[0].why if failures else 'nothing was asked for'}")
    waiting, damaged = not_evaluated(trained, display)
    failures += damaged
    failures += evaluate_tasks(waiting, display, places=places, keep_going=True)
    broken = {failure.task.folder for failure in failures}
    done = [task for task in trained if task.folder not in broken]
    if not done:
        raise ArraError(f"{out}: no run was evaluated: {failures[0].why}")
    tables = tables_of(done, baseline=options.rows[0])
    page = write_results(options, tasks, done, budgets, tables, failures, out)
    console.print()
    for table in terminal_tables(tables):
        console.print(table)
    for line in (interval_meaning(options.seeds), *failure_lines(failures), f"tables  {page.with_name('lab.md')}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"page    {page}", highlight=False, markup=False, soft_wrap=True)
    return LabDone(page, tables, budgets, failures)


def prepare_store(recipes: Mapping[str, Recipe], folder: Path, display: Display) -> Store:
    """One store with the columns of all rows.

    Raises:
        ArraError: rows ask for columns made in different ways, or pictures cannot be read.
    """
    seen: list[dict[str, Any]] = []
    store = None
    for recipe in recipes.values():
        asked = recipe.model_dump(include={"data", "tokenizer", "encoder", "text_encoder"})
        asked["condition"] = recipe.model.condition
        if asked not in seen:
            seen.append(asked)
            store = prepare(recipe, folder, progress=display.row("data")).checked()
    assert store is not None
    return store


# Equal compute


def equal_compute(
    recipes: Mapping[str, Recipe], store: Store, *, charge_teacher: bool, display: Display
) -> list[RowBudget]:
    """Cost of a step, number of steps and cost of the teachers, for every row; the first one's total is the budget.

    Raises:
        ArraError: a row's budget does not pay for a single step.
    """
    budgets: list[RowBudget] = []
    total, known = 0, dict[str, int]()
    for place, (row, recipe) in enumerate(recipes.items()):
        display.show("compute", f"counting a step of {row}", place, len(recipes))
        phases = step_phases(recipe, store)
        teacher = teacher_flops(recipe, store, known=known)
        if charge_teacher and teacher is None:
            raise ArraError(f"--charge-teacher: the teachers of row '{row}' are not on this machine; leave it out")
        if place == 0:
            total = total_flops(phases, recipe.train.steps)
        charged = teacher if charge_teacher and teacher is not None else 0
        steps = steps_within(phases, total - charged)
        if steps < 1:
            raise ArraError(
                f"--rows {row}: the baseline's {recipe.train.steps} steps cost {short_count(total)} FLOPs, which do "
                "not pay for a step of this row; raise --steps"
            )
        budgets.append(
            RowBudget(
                row=row,
                step_flops=phases[0].flops,
                later_step_flops=phases[-1].flops if len(phases) > 1 else None,
                steps=steps,
                total_flops=total_flops(phases, steps),
                teacher_flops=teacher,
            )
        )
    display.show("compute", "counted", 1, 1)
    return budgets


def budget_table(budgets: Sequence[RowBudget], *, charged: bool) -> Table:
    """FLOPs and steps of every row, for the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title="equal training compute")
    table.title_justify = "left"
    told = "charged" if charged else "not charged"
    for column in ("row", "FLOPs/step", "steps", "training FLOPs", f"teachers ({told})"):
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for row, *numbers, _ in budget_cells(budgets):  # the time is not known yet
        table.add_row(escape(row), *numbers)
    return table


# Runs


def plan_tasks(
    options: LabOptions,
    source: Path,
    recipes: Mapping[str, Recipe],
    budgets: Sequence[RowBudget],
    out: Path,
    *,
    records: int | None = None,
) -> Iterator[Task]:
    """The runs, seed by seed, so that an interrupted lab has whole comparisons first."""
    steps = {one.row: one.steps for one in budgets}
    for number in range(options.seeds):
        for row, recipe in recipes.items():
            seed = recipe.train.seed + number
            own = (
                *row_overrides(source, row, options.overrides),
                f"train.steps={steps[row]}",
                f"train.seed={seed}",
                f"model.seed={recipe.model.seed + number}",
            )
            yield Task(row, seed, out / row / f"seed-{seed}", own, f"{row} {seed}", source, records)


def refuse_other_runs(tasks: Sequence[Task]) -> None:
    """Nothing, if the folders' runs were begun with these settings.

    Raises:
        ArraError: one was begun with others, as with other --steps or --set.
    """
    for task in tasks:
        run = Run(task.folder)
        if not run.recipe_path.is_file():
            continue
        try:
            before = yaml.safe_load(run.recipe_yaml())
        except yaml.YAMLError as error:
            raise ArraError(f"{run.recipe_path}: damaged; delete the run folder and run again") from error
        now = yaml.safe_load(dump_recipe(task.recipe))
        if before != now:
            key, old, new = _first_difference(before, now)
            raise ArraError(
                f"{task.folder}: begun with {key} {old!r}, now {new!r}; use another folder (--out) or delete this one"
            )


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return _first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    return key, before, now


def not_evaluated(trained: Sequence[Task], display: Display) -> tuple[list[Task], list[Failure]]:
    """The runs without a current evaluation, and damaged ones.

    What the judges need of the store is there once for all of them.
    """
    judging = display.row("judges")
    caption_judge, waiting, failures = None, list[Task](), list[Failure]()
    for task in trained:
        try:
            loaded = load_run(task.folder)
        except ArraError as error:
            failures.append(tell_failure(Failure(task, "evaluating", str(error)), display))
            continue
        if caption_judge is None:
            caption_judge = prepare_caption_judge(loaded, progress=judging)
        if current_evaluation(loaded, caption_judge) is None:
            if not waiting:
                held_out_splits(loaded, progress=judging)
            waiting.append(task)
    judging("ready", 1, 1)
    return waiting, failures


# Results


def tables_of(done: Sequence[Task], *, baseline: str) -> list[MeasureTable]:
    """All measures of the evaluated runs.

    Raises:
        ArraError: the baseline has no evaluated run.
    """
    evaluations: dict[str, dict[int, Evaluation]] = {}
    validation: dict[str, dict[int, float]] = {}
    for task in sorted(done, key=lambda task: task.row != baseline):  # the baseline first
        evaluations.setdefault(task.row, {})[task.seed] = Evaluation.load(task.folder)
        rows = [row for row in Run(task.folder).read_metrics() if row["kind"] == "validation"]
        if rows:
            validation.setdefault(task.row, {})[task.seed] = float(rows[-1]["ntp_loss"])
    if baseline not in evaluations:
        raise ArraError(f"no run of the baseline '{baseline}' was evaluated; look at why it failed, and run again")
    settings = done[0].recipe.evaluate
    cards = [each.card for by_seed in evaluations.values() for each in by_seed.values()]
    return lab_tables(
        evaluations,
        judge_is_related=any(bool(card.protocol.get(SAME_FAMILY)) for card in cards),
        validation=validation if baseline in validation else None,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )


def write_results(
    options: LabOptions,
    tasks: Sequence[Task],
    done: Sequence[Task],
    budgets: Sequence[RowBudget],
    tables: Sequence[MeasureTable],
    failures: Sequence[Failure],
    out: Path,
) -> Path:
    """The page; `lab.json`, `lab.md` and `lab.html` are written."""
    manifest = Run(done[0].folder).manifest()
    versions = {key: str(manifest.get(key)) for key in ("arra", "git_commit", "torch", "python", "platform")}
    timed = [replace(one, train_seconds=_seconds(one.row, done)) for one in budgets]
    page = LabPage(
        command=command_of(options, out),
        versions=versions,
        baseline=options.rows[0],
        seeds=tuple(dict.fromkeys(task.seed for task in tasks)),
        charged=options.charge_teacher,
        budgets=tuple(timed),
        tables=tuple(tables),
        failures=tuple(failure_lines(failures)),
        curves=tuple((task.row, tuple(Run(task.folder).read_metrics())) for task in done),
        grid=_grid(done),
        recipe=dump_recipe(done[0].recipe),
        protocol={
            key: value
            for key, value in Evaluation.load(done[0].folder).card.protocol.items()
            if not key.startswith("model")
        },
        attribution=noted(done[0].folder).get("attribution") or None,
    )
    content = {
        "command": page.command,
        "versions": versions,
        "options": asdict(options),
        "seeds": page.seeds,
        "budgets": [asdict(one) for one in timed],
        "intervals": interval_meaning(options.seeds),
        "measures": [asdict(table) for table in tables],
        "failures": [{"row": f.task.row, "seed": f.task.seed, "what": f.what, "why": f.why} for f in failures],
        "runs": {task.label: str(task.folder) for task in done},
    }
    atomic_write(out / RESULTS_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    atomic_write(out / "lab.md", lab_markdown(page))
    return write_lab(page, out)


def command_of(options: LabOptions, out: Path) -> str:
    """The command line that runs this lab."""
    parts = ["arra", "lab", options.recipe, "--rows", ",".join(options.rows), "--seeds", str(options.seeds)]
    parts += [] if options.steps is None else ["--steps", str(options.steps)]
    parts += ["--charge-teacher"] if options.charge_teacher else []
    parts += [part for text in options.overrides for part in ("--set", text)]
    return shlex.join([*parts, "--out", str(out)])


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """What went wrong, a line each."""
    return [f"{failure.task.label}: {failure.what} failed: {failure.why}" for failure in failures]


def terminal_tables(tables: Sequence[MeasureTable]) -> Iterator[Table]:
    """A table for each measure, 80 columns wide."""
    for table in tables:
        shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
        shown.title = Text(measure_title(table.measure), style="bold")
        for column in ("", "mean [95 %]", "difference [95 %]", "p", ""):
            shown.add_column(column, justify="left", no_wrap=True)
        for row in table.rows:
            shown.add_row(escape(row.row), *(escape(text) for text in cell_texts(row, table.measure)))
        yield shown


def _seconds(row: str, done: Sequence[Task]) -> float | None:
    """Mean training time of a row's runs, told beside the counted compute."""
    found = [
        [line["seconds"] for line in Run(task.folder).read_metrics() if line["kind"] == "train"][-1]
        for task in done
        if task.row == row
    ]
    return sum(found) / len(found) if found else None


def _grid(done: Sequence[Task]) -> Any:
    """Pictures of the first seed's runs for the same prompts and sampling seeds, beside the held-out ones."""
    first = [task for task in done if task.seed == done[0].seed]
    columns, captions = list[GridColumn](), tuple[str, ...]()
    for task in first:
        loaded, painted = load_run(task.folder), painted_pictures(task.folder)
        split = loaded.recipe.evaluate.splits[0]
        samples = [one for one in grid_samples(loaded, painted) if one.split == split]
        if not columns:
            references = grid_references(painted, split)
            captions = references.prompts
            columns.append(GridColumn(label="tokenizer", images=references.reconstructions[:, None]))
        columns.append(GridColumn(label=task.row, images=samples[-1].images))  # the strongest guidance
    return readme_grid(columns, captions=captions)
