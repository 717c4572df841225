"""What came of a paper's tables: read from the runs' cards, judged, written as a page, Markdown, LaTeX, CSV and JSON.

Place in the pipeline: `arra reproduce` calls it after its runs, of which some may be missing.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arra.config import dump_recipe
from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.evaluate.lab import VALIDATION, Resampled
from arra.evaluate.spread import SeedSpread
from arra.evaluate.verdicts import Reached, RowResult, TableResult, table_rows
from arra.report.grids import GridColumn
from arra.report.table_view import tally_line
from arra.report.tables_export import tables_csv, tables_latex, tables_markdown
from arra.report.tables_page import TablePictures, TableRun, TablesPage, tables_html
from arra.runs import Run, atomic_write
from arra.stages.begun import FREE
from arra.stages.evaluate import PICTURES_FILE, SAME_FAMILY
from arra.stages.lab import failure_lines
from arra.stages.origin import noted
from arra.stages.painters import load_run
from arra.stages.report import grid_references, grid_samples, painted_pictures
from arra.stages.reproduce_options import ReproduceOptions, card_folder, card_in, measured_by
from arra.stages.set_options import SetOptions
from arra.stages.tables import PaperTable
from arra.stages.tasks import Failure, Task, finished, words_of

if TYPE_CHECKING:
    from arra.stages.reproduce import Variant

PLACES = ("data.path", "model.weights", "model.llm.folder", "tokenizer.weights", "evaluate.batch_size")
"""Keys that say where the paper's data and weights lie here, or how many pictures are painted together.

Those that a begun training may change stand beside them.
"""
RESULTS_FILE, PAGE_FILE = "results.json", "tables.html"
MARKDOWN_FILE, LATEX_FILE, CSV_FILE = "tables.md", "tables.tex", "tables.csv"


@dataclass(frozen=True)
class Reproduced:
    """What `arra reproduce` found."""

    page: TablesPage
    runs: Mapping[str, str]
    """Folders of evaluated runs, by "table: row, seed"."""
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Done:
    """An evaluated run."""

    task: Task
    evaluation: Evaluation
    metrics: tuple[Mapping[str, Any], ...]

    @property
    def validation(self) -> float | None:
        """Next-token loss on the validation split after training, nats a token."""
        losses = [row["ntp_loss"] for row in self.metrics if row["kind"] == "validation"]
        return float(losses[-1]) if losses else None

    @property
    def seconds(self) -> float | None:
        """Of the training."""
        times = [row["seconds"] for row in self.metrics if row["kind"] == "train"]
        return float(times[-1]) if times else None


def collect(
    tables: Sequence[PaperTable],
    variants: Sequence["Variant"],
    tasks: Sequence[Task],
    options: ReproduceOptions,
    failures: Sequence[Failure],
) -> Reproduced:
    """The tables, judged, from every run that is finished and evaluated, whoever trained it.

    Raises:
        ArraError: no run is.
    """
    placed = _placed(tables, variants, tasks, options)
    done = [one.runs for one in placed.values() if one.runs]
    if not done:
        raise ArraError(f"no run is trained and evaluated: {failures[0].why if failures else 'none was asked for'}")
    resampled = Resampled(num_resamples=variants[0].recipe.evaluate.num_resamples)
    spreads = _spreads(placed)
    results = [_table_result(table, placed, options, resampled, spreads) for table in tables]
    first = done[0][0]
    manifest = Run(first.task.folder).manifest()
    page = TablesPage(
        command=_command_of(options),
        versions={key: str(manifest.get(key)) for key in ("arra", "git_commit", "torch", "python", "platform")},
        tables=tuple(results),
        seeds=tuple(dict.fromkeys(task.seed for task in tasks)),
        runs=tuple(run for place, one in placed.items() for run in _page_runs(place, one)),
        pictures=tuple(_pictures(tables, placed)) if options.scale == "embedded" else (),
        failures=tuple(failure_lines(failures)),
        protocol={
            key: value
            for key, value in first.evaluation.card.protocol.items()
            if not key.startswith(("model", "store"))
        },
        notes=(_SCALE_NOTES[options.scale],),
        attribution=noted(first.task.folder).get("attribution") or None,
    )
    folders = {
        f"{table}: {row}, seed {run.task.seed}": str(run.task.folder)
        for (table, row), one in placed.items()
        for run in one.runs
    }
    return Reproduced(page, folders, tuple(failures))


_SCALE_NOTES = {
    "embedded": (
        "Embedded scale: small decoders, small drawn pictures, another teacher and other judges. None of the paper's "
        "numbers is comparable; its differences are looked for, with what stands in for its measures. Seconds of a "
        "teacher's pass are its counted operations at the rate of the row's own training."
    ),
    "full": "Full scale: the recipes as they stand, measured by the protocols of the tables.",
}


@dataclass(frozen=True)
class Placed:
    """A row of a table: what it trains, and its runs that are trained and evaluated as its table asks."""

    variant: "Variant"
    runs: tuple[Done, ...]


def _placed(
    tables: Sequence[PaperTable], variants: Sequence["Variant"], tasks: Sequence[Task], options: ReproduceOptions
) -> dict[tuple[str, str], Placed]:
    """By table and row, all that are trained here."""
    by_row = {place: one for one in variants for place in one.rows}
    seen: dict[tuple[str, str | None], tuple[Done, ...]] = {}
    placed: dict[tuple[str, str], Placed] = {}
    for table in tables:
        for row in table.rows:
            if row.recipe is None:
                continue
            variant = by_row[table.name, row.name]
            protocol = table.protocol_of(row) if options.scale == "full" else None
            if (variant.name, protocol) not in seen:
                own = [task for task in tasks if task.row == variant.name]
                measured = None if protocol is None else measured_by(protocol, options)
                seen[variant.name, protocol] = tuple(_done_of(own, measured))
            placed[table.name, row.name] = Placed(variant, seen[variant.name, protocol])
    return placed


def _done_of(tasks: Sequence[Task], measured: SetOptions | None) -> Iterator[Done]:
    """The runs that are trained and evaluated."""
    for task in tasks:
        if not finished(task):
            continue
        evaluation = card_in(card_folder(task.folder, measured))
        if evaluation is not None:  # else it is told as missing, and the next call evaluates it
            yield Done(task, evaluation, tuple(Run(task.folder).read_metrics()))


def _spreads(placed: Mapping[tuple[str, str], Placed]) -> dict[str, SeedSpread]:
    """The spread over seeds of rows that are trained alike but for their alignment."""
    found: dict[str, SeedSpread] = {}
    for one in {each.variant.name: each for each in placed.values()}.values():
        found.setdefault(one.variant.alike, SeedSpread()).add(
            {run.task.seed: run.evaluation for run in one.runs},
            others={VALIDATION: {run.task.seed: run.validation for run in one.runs if run.validation is not None}},
        )
    return found


def _table_result(
    table: PaperTable,
    placed: Mapping[tuple[str, str], Placed],
    options: ReproduceOptions,
    resampled: Resampled,
    spreads: Mapping[str, SeedSpread],
) -> TableResult:
    reached: dict[str, Reached] = {}
    changed = _changed_settings(options.overrides)
    related = False
    for row in table.rows:
        if row.recipe is None:
            reached[row.name] = Reached(facts=row.facts)
            continue
        variant, runs = placed[table.name, row.name].variant, placed[table.name, row.name].runs
        related |= any(bool(run.evaluation.card.protocol.get(SAME_FAMILY)) for run in runs)
        times = [run.seconds for run in runs if run.seconds is not None]
        reached[row.name] = Reached(
            facts=row.facts,
            evaluations={run.task.seed: run.evaluation for run in runs},
            validation={run.task.seed: run.validation for run in runs if run.validation is not None},
            spread=spreads[variant.alike],
            not_comparable=dict.fromkeys(row.facts.expect, f"settings changed by --set {changed}") if changed else {},
            steps=variant.recipe.train.steps,
            train_seconds=sum(times) / len(times) if times else None,
            teacher_seconds=_teacher_seconds(variant, times),
            missing=None if runs else "not trained, or not evaluated",
        )
    section = table.section
    return TableResult(
        recipe=table.name,
        title=section.title,
        about=section.about,
        scale=options.scale,
        columns=section.columns,
        notes=section.notes,
        rows=table_rows(
            reached,
            columns=section.columns,
            scale=options.scale,
            judge_is_related=related,
            resampled=resampled,
        ),
    )


def _changed_settings(overrides: Sequence[str]) -> str:
    """The keys of `--set` that say what is trained, and not where it lies or how fast it runs."""
    keys = [text.partition("=")[0].strip() for text in overrides]
    return ", ".join(key for key in keys if not f"{key}.".startswith(tuple(f"{free}." for free in (*FREE, *PLACES))))


def _teacher_seconds(variant: "Variant", times: Sequence[float]) -> float | None:
    """What the teachers' pass over the training pictures would take at the training's own rate of operations."""
    if not times or variant.teacher_flops is None or not variant.step_flops:
        return None
    return variant.teacher_flops / (variant.step_flops * variant.recipe.train.steps) * sum(times) / len(times)


def _page_runs(place: tuple[str, str], placed: Placed) -> Iterator[TableRun]:
    times = [run.seconds for run in placed.runs if run.seconds is not None]
    for run in placed.runs:
        yield TableRun(
            table=place[0],
            row=place[1],
            seed=run.task.seed,
            metrics=run.metrics,
            teacher_seconds=_teacher_seconds(placed.variant, times),
            recipe=dump_recipe(placed.variant.recipe),
        )


def _pictures(tables: Sequence[PaperTable], placed: Mapping[tuple[str, str], Placed]) -> Iterator[TablePictures]:
    """Of every table and store, the first seed's pictures of the same prompts."""
    for table in tables:
        columns: dict[Path, list[GridColumn]] = {}
        prompts: dict[Path, tuple[str, ...]] = {}
        for row in table.rows:
            one = placed.get((table.name, row.name))
            if one is None or not one.runs:
                continue
            variant, folder = one.variant, one.runs[0].task.folder
            if not (folder / PICTURES_FILE).is_file():
                continue
            loaded, painted = load_run(folder), painted_pictures(folder)
            split = loaded.recipe.evaluate.splits[0]
            samples = [one for one in grid_samples(loaded, painted) if one.split == split]
            if variant.store not in prompts:
                references = grid_references(painted, split)
                prompts[variant.store] = references.prompts
                columns[variant.store] = [GridColumn(label="tokenizer", images=references.reconstructions[:, None])]
            columns[variant.store].append(GridColumn(label=row.name, images=samples[-1].images))
        for store, found in columns.items():
            yield TablePictures(table=table.name, title=store.name, prompts=prompts[store], columns=tuple(found))


# Writing


def write_results(found: Reproduced, out: Path) -> None:
    """Nothing; page, Markdown, LaTeX, CSV and JSON are written."""
    page = found.page
    content = {
        "command": page.command,
        "versions": page.versions,
        "seeds": page.seeds,
        "notes": page.notes,
        "tables": [asdict(table) for table in page.tables],
        "failures": page.failures,
        "runs": found.runs,
    }
    atomic_write(out / RESULTS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(out / MARKDOWN_FILE, tables_markdown(page.tables))
    atomic_write(out / LATEX_FILE, tables_latex(page.tables))
    atomic_write(out / CSV_FILE, tables_csv(page.tables))
    atomic_write(out / PAGE_FILE, tables_html(page))


def print_results(found: Reproduced, out: Path, console: Console) -> None:
    """Nothing; what came of every statement of the paper is printed."""
    for table in found.page.tables:
        console.print(terminal_table(table))
    told = [
        tally_line(found.page.tables),
        *found.page.failures,
        f"tables  {out / MARKDOWN_FILE}",
        f"page    {out / PAGE_FILE}",
    ]
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def terminal_table(table: TableResult) -> Table:
    """A table of the paper for the terminal, 80 columns wide: the paper's number, ours, differences, the verdict."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    shown.title = Text(f"{table.title}: {table.about}", style="bold")
    for column in ("", "paper", "ours", "difference [95 %]", "paper's", "verdict"):
        shown.add_column(column, justify="left", no_wrap=True)
    for row in table.rows:
        name = " ".join(filter(None, (row.group, row.label)))
        why = "another system" if row.external else row.missing or ""
        shown.add_row(Text(name, style="bold"), "", "", why)
        for line in _terminal_lines(table, row):
            shown.add_row(*(escape(text) for text in line))
    return shown


def _terminal_lines(table: TableResult, row: RowResult) -> Iterator[tuple[str, ...]]:
    """A line for each column that has a number of the paper or of ours."""
    for column, heading in table.columns.items():
        paper = f"{row.expect[column]:g}" if column in row.expect else ""
        cell = row.speaking(column)
        if cell is None:
            if paper:
                yield f"  {heading}", paper, "", "", "", ""
            continue
        difference = "" if cell.difference is None else f"{cell.difference.value:+.3g}"
        if cell.difference is not None and cell.difference.low is not None and cell.difference.high is not None:
            difference += f" [{cell.difference.low:.3g}, {cell.difference.high:.3g}]"
        theirs = "" if cell.paper_difference is None else f"{cell.paper_difference:+.3g}"
        judged = cell.number if table.scale == "full" and cell.number is not None else cell.effect
        verdict = "" if judged is None else judged.verdict
        yield f"  {heading}", paper, f"{cell.ours.value:.4g}", difference, theirs, verdict


def _command_of(options: ReproduceOptions) -> str:
    parts = ["arra", "reproduce", *options.tables, "--scale", options.scale, "--seeds", str(options.seeds)]
    parts += [] if options.rows is None else ["--rows", ",".join(options.rows)]
    parts += [] if options.equal_compute is None else ["--equal-compute" if options.equal_compute else "--own-steps"]
    parts += [part for text in options.overrides for part in ("--set", text)]
    parts += [part for name, place in options.references.items() for part in ("--reference", f"{name}={place}")]
    return shlex.join([*parts, *words_of(options.measuring)])
