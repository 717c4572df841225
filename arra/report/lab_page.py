"""The page and the Markdown of the alignment lab: what every row cost, and what it reached, with intervals.

Place in the pipeline: `arra.stages.lab` trains and measures; here its tables become one HTML file that looks like the
report and works without a network, and text ready for a log. Nothing here knows which row is expected to win.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from arra.evaluate.lab import Estimate, Measure, MeasureTable, RowEstimate
from arra.report import plots
from arra.report.grids import data_url
from arra.report.measure_words import measure_name
from arra.report.page import glossary, number_text
from arra.report.style import ACCENTS, format_seconds, styled_page
from arra.runs import atomic_write

PAGE_FILE = "lab.html"
SPACE_TEXTS = {
    "no judge": "no judge: the model's own likelihood",
    "independent": "independent: the caption judge, trained from random weights on the training split alone",
    "teacher's family": "the teacher's family: an encoder like the teacher, trained on the same photographs",
    "other encoder": "another encoder, of no teacher's family",
}
"""In whose feature space a measure is taken, in words."""
CORRECTION = (
    "A difference is called better or worse where its p-value, after Holm's correction for the number of rows compared "
    "in that measure, is at most 0.05. There is no correction for the number of measures, which are not independent of "
    "each other: with twenty of them, one in twenty may be clear by chance alone."
)


@dataclass(frozen=True, kw_only=True)
class RowBudget:
    """What a row may do: its share of the baseline's training compute, in counted operations."""

    row: str
    step_flops: int
    """A training step, forward and backward, of model, projectors and losses; the optimiser is left out."""
    later_step_flops: int | None = None
    """After a term of the alignment has stopped, where one does."""
    steps: int
    total_flops: int
    """Of all its training steps."""
    teacher_flops: int | None
    """One pass of its teachers over the training pictures; None where they are not on this machine."""
    train_seconds: float | None = None
    """Mean over its runs."""


@dataclass(frozen=True, kw_only=True)
class LabPage:
    """All that the page shows."""

    command: str
    versions: Mapping[str, str]
    baseline: str
    seeds: tuple[int, ...]
    charged: bool
    """Whether the teachers' pass was paid for by training steps."""
    budgets: tuple[RowBudget, ...]
    tables: tuple[MeasureTable, ...]
    failures: tuple[str, ...] = ()
    curves: tuple[tuple[str, tuple[Mapping[str, Any], ...]], ...] = ()
    """(row, metrics rows) of every run."""
    grid: Image.Image | None = None
    recipe: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    attribution: str | None = None


def write_lab(page: LabPage, folder: Path) -> Path:
    """The path of `folder/lab.html`, one file with everything inside.

    Raises: ArraError when it cannot be written.
    """
    path = folder / PAGE_FILE
    atomic_write(path, lab_html(page))
    return path


def lab_html(page: LabPage) -> str:
    """The page as HTML."""
    rows = [one.row for one in page.budgets]
    colors = {row: ACCENTS[place % len(ACCENTS)] for place, row in enumerate(rows)}
    return styled_page(
        "lab.html.j2",
        labels=rows,
        colors=colors,
        page=page,
        rows=rows,
        summary=summary_lines(page),
        budgets=list(budget_cells(page.budgets)),
        tables=[_table_view(table) for table in page.tables],
        meaning=interval_meaning(len(page.seeds)),
        correction=CORRECTION,
        glossary=glossary([table.measure.metric for table in page.tables]),
        curves=_curves(page, colors),
        grid=None if page.grid is None else data_url(page.grid),
    )


def lab_markdown(page: LabPage) -> str:
    """Tables for a log: the command, versions and seeds, then what every row cost and what it reached."""
    rows = [one.row for one in page.budgets if any(each.row == one.row for t in page.tables for each in t.rows)]
    lines = [
        f"`{page.command}`",
        "",
        ", ".join(f"{name} {value}" for name, value in page.versions.items())
        + f"; training seeds {', '.join(map(str, page.seeds))}.",
        "",
        _markdown_row("row", "FLOPs a step", "steps", "training FLOPs", _teacher_heading(page), "training time"),
        _markdown_row("---", *["---:"] * 5),
        *(_markdown_row(*cells) for cells in budget_cells(page.budgets)),
        "",
        f"Mean over seeds with its 95 % interval; below it the difference to {page.baseline} with its own, and whether "
        "it is clear. **Independent** measures look at pictures in a space that has nothing of the teacher.",
    ]
    for split in dict.fromkeys(table.measure.split for table in page.tables):
        lines += [
            "",
            f"{split}:",
            "",
            _markdown_row("measure", "space", *rows),
            _markdown_row(*["---"] * (2 + len(rows))),
        ]
        for table in page.tables:
            if table.measure.split == split:
                found = {row.row: row for row in table.rows}
                cells = [_markdown_cell(found[row], table.measure) if row in found else "not measured" for row in rows]
                space = table.measure.space
                name = measure_title(table.measure, split=False)
                lines.append(_markdown_row(name, "**independent**" if space == "independent" else space, *cells))
    lines += ["", interval_meaning(len(page.seeds)), "", CORRECTION]
    lines += ["", *(f"- {line}" for line in page.failures)] if page.failures else []
    return "\n".join(lines) + "\n"


def summary_lines(page: LabPage) -> list[str]:
    """A sentence for each row: how often it is clearly better or worse, in independent measures and in the others."""
    lines = []
    for row in (one.row for one in page.budgets if one.row != page.baseline):
        counts = dict.fromkeys(("better", "worse", "unclear"), 0)
        independent = dict(counts)
        for table in page.tables:
            for found in table.rows:
                if found.row == row and found.verdict is not None:
                    chosen = independent if table.measure.space == "independent" else counts
                    chosen[found.verdict] += 1
        if sum(counts.values()) + sum(independent.values()):
            lines.append(
                f"{row} against {page.baseline}: in the independent space {_tally(independent)}; elsewhere "
                f"{_tally(counts)}."
            )
    return lines


def interval_meaning(num_seeds: int, *, pooled: bool = False) -> str:
    """What an interval over so many seeds says; `pooled`: their spread is that of all rows measured alike."""
    if num_seeds == 1:
        return (
            "One training seed: intervals say what other held-out pictures would change and nothing of other seeds, so "
            "no difference is called clear."
        )
    if pooled:
        return (
            f"Intervals join two independent errors as squares: the spread over {num_seeds} training seeds, which is "
            "taken to be the same for all rows measured on the same data and is pooled over them (Student's t with as "
            "many degrees of freedom as all their seeds give), and what other held-out pictures would change (drawn "
            "again in whole groups). Differences are paired by seed and by picture. Of the validation NLL the first "
            "alone is known."
        )
    return (
        f"Intervals join two independent errors as squares: the spread over {num_seeds} training seeds (Student's t "
        f"with {num_seeds - 1} degrees of freedom{', wide by right' if num_seeds < 5 else ''}) and what other held-out "
        "pictures would change (drawn again in whole groups). Differences are paired by seed and by picture. Of the "
        "validation NLL the first alone is known."
    )


def measure_title(measure: Measure, *, split: bool = True) -> str:
    """A measure in a few words: `Fréchet distance to reconstructions, guidance 2 (composed, 166 pictures)`."""
    name = measure_name(measure.metric)
    name += f" to {measure.reference}" if measure.reference else ""
    if measure.cfg_scale is not None:
        name += ", no guidance" if measure.cfg_scale == 1 else f", guidance {measure.cfg_scale:g}"
    if not split:
        return name
    pictures = "" if measure.num_images is None else f", {measure.num_images} pictures"
    return f"{name} ({measure.split}{pictures}; {measure.space})"


def cell_texts(row: RowEstimate, measure: Measure) -> tuple[str, str, str, str]:
    """Mean with interval, difference with interval, corrected p-value and verdict of a row, as text."""
    p = row.p_corrected
    return (
        estimate_text(row.mean, measure, scale=abs(row.mean.value)),
        "" if row.difference is None else estimate_text(row.difference, measure, scale=abs(row.mean.value), sign=True),
        "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
        row.verdict or "",
    )


def short_count(number: int) -> str:
    """A large number as a person says it: `7.31 G`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return str(number)


def estimate_text(one: Estimate, measure: Measure, *, scale: float, sign: bool = False) -> str:
    """A mean or a difference with its interval, in the digits of numbers as large as `scale`: `+0.4 [−0.1, 0.9]`."""
    value = measured_text(one.value, measure, scale=scale)
    value = f"+{value}" if sign and one.value > 0 else value
    if one.low is None or one.high is None:
        return value
    low, high = (measured_text(end, measure, scale=scale).removesuffix(" %") for end in (one.low, one.high))
    return f"{value} [{low}, {high}]"


def measured_text(value: float, measure: Measure, *, scale: float) -> str:
    """A value of a measure in the digits of numbers as large as `scale`; small ones get more."""
    small = measure.unit not in ("fraction", "dB") and not measure.unit.startswith("nats") and scale < 1
    return number_text(value, unit=measure.unit, scale=scale, extra=2 if small else 0)


def _tally(counts: Mapping[str, int]) -> str:
    return f"better in {counts['better']}, worse in {counts['worse']}, unclear in {counts['unclear']}"


def budget_cells(budgets: Iterable[RowBudget]) -> Iterator[tuple[str, ...]]:
    """Of every row: name, FLOPs of a step, steps, FLOPs of all steps and of its teachers, training time."""
    for one in budgets:
        step = short_count(one.step_flops)
        step += "" if one.later_step_flops is None else f", later {short_count(one.later_step_flops)}"
        teacher = "not here" if one.teacher_flops is None else short_count(one.teacher_flops)
        seconds = "" if one.train_seconds is None else format_seconds(one.train_seconds)
        yield one.row, step, f"{one.steps:,}", short_count(one.total_flops), teacher, seconds


def _teacher_heading(page: LabPage) -> str:
    return f"teachers' pass ({'charged' if page.charged else 'not charged'})"


def _markdown_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _markdown_cell(row: RowEstimate, measure: Measure) -> str:
    mean, difference, _, verdict = cell_texts(row, measure)
    if not difference:
        return mean
    return f"{mean}<br>{difference} " + (verdict if verdict == "unclear" else f"**{verdict}**")


def _table_view(table: MeasureTable) -> dict[str, Any]:
    """What the template needs of a measure; the bars of its rows share a scale."""
    ends = [
        abs(end)
        for row in table.rows
        if row.difference is not None
        for end in (row.difference.value, row.difference.low, row.difference.high)
        if end is not None
    ]
    extent = max(ends, default=0.0) * 1.08
    rows = []
    for row in table.rows:
        mean, difference, p, verdict = cell_texts(row, table.measure)
        rows.append(
            {
                "row": row.row,
                "mean": mean,
                "difference": difference,
                "p": p,
                "verdict": verdict,
                "bar": _bar(row.difference, table.measure, extent),
                "seeds": ", ".join(
                    f"{seed}: {measured_text(value, table.measure, scale=abs(row.mean.value))}"
                    for seed, value in row.per_seed.items()
                ),
            }
        )
    return {
        "title": measure_title(table.measure, split=False),
        "split": table.measure.split,
        "space": SPACE_TEXTS[table.measure.space],
        "is_independent": table.measure.space == "independent",
        "better": table.measure.better,
        "rows": rows,
    }


def _bar(one: Estimate | None, measure: Measure, extent: float) -> dict[str, float] | None:
    """Positions in 0..100 about the zero in the middle; right favours the row."""
    if one is None or one.low is None or one.high is None or not extent:
        return None
    side = -1.0 if measure.better == "lower" else 1.0
    places = [50 + 50 * side * value / extent for value in (one.low, one.value, one.high)]
    return {"left": round(min(places), 2), "at": round(places[1], 2), "right": round(max(places), 2)}


def _curves(page: LabPage, colors: Mapping[str, str]) -> list[tuple[str, str]]:
    wanted = [
        ("Validation NLL by step", plots.validation_curves(page.curves, colors=colors, x="step"), "nats per token"),
        (
            "Training loss, alignment (running mean)",
            plots.training_curves(page.curves, colors=colors, y="gva_loss"),
            "as the row's loss has it",
        ),
    ]
    return [(title, plots.plot(found, title=title, x_label="step", y_label=y)) for title, found, y in wanted if found]
