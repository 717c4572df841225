"""A table of the paper with ours beside it, as text in its cells: what pages and exports share.

Place in the pipeline: takes what `arra.evaluate.verdicts` has; `tables_page` makes HTML of it, `tables_export` Markdown
and LaTeX.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from arra.evaluate.lab import Measure
from arra.evaluate.verdicts import Cell, Judged, RowResult, Statement, TableResult, Verdict, tally
from arra.report.lab_page import estimate_text, measure_title
from arra.report.style import format_seconds

VERDICT_TEXTS: Mapping[Verdict, tuple[str, str]] = {
    "reproduced": (
        "✓",
        "The paper's number lies where one more run of ours would; or our difference is clear and of its sign.",
    ),
    "not reproduced": (
        "✗",
        "The paper's number lies elsewhere; or our difference is clear and of the other sign.",
    ),
    "unclear": ("?", "There is too little of ours to say: one seed, or a difference that is not clear."),
    "not comparable": ("–", "What we measured is not what the paper measured, or the paper has no difference there."),
}
"""The sign of each verdict, and what it says."""
STATEMENTS: Mapping[Statement, str] = {"effect": "difference", "number": "number"}
"""What pages call the paper's statements, in the order in which they are told."""
COUNTED = (
    "Counted is each number that the paper gives for a row, and each difference to the row that it is held against, "
    "once: by the first measure of ours that stands for it. The others are shown beside it."
)
MOST_MEASURES = 3
"""Of ours beside a column of the paper; the first speaks for it."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A verdict as text."""

    statement: Statement
    verdict: Verdict
    why: str

    @property
    def sign(self) -> str:
        """One letter that stands for it."""
        return VERDICT_TEXTS[self.verdict][0]

    @property
    def text(self) -> str:
        """The verdict, and on which statement where that is not the difference."""
        return f"{self.sign} {'' if self.statement == 'effect' else 'number '}{self.verdict}"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What our row reached in a measure that stands for a column of the paper."""

    mean: str
    difference: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class PaperColumn:
    """A column of the paper and what of ours stands for it."""

    key: str
    heading: str
    measures: tuple[Measure, ...]

    @property
    def num_measures(self) -> int:
        """How many columns of ours stand beside the paper's."""
        return len(self.measures)


@dataclass(frozen=True, kw_only=True)
class ViewCell:
    """A row in a column of the paper."""

    paper: str
    paper_difference: str
    ours: tuple[Ours | None, ...]
    """In the order of the column's measures; None where there is nothing."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of a table, one after the other, that were measured by the same measures."""

    columns: tuple[PaperColumn, ...]
    rows: tuple[RowResult, ...]
    cells: tuple[tuple[ViewCell, ...], ...]
    """By row and column."""


def blocks(table: TableResult) -> list[Block]:
    """The table in the paper's order, cut where other measures begin; rows without any go with those before them.

    Of several splits, guidances or references of one measure it has the first, and at most `MOST_MEASURES`:
    `measures_of` has all.
    """
    parts: list[tuple[tuple[PaperColumn, ...], list[RowResult]]] = []
    for rows in _groups(table.rows):
        columns = _columns(table, rows)
        measured = any(column.measures for column in columns)
        if parts and (not measured or columns == parts[-1][0]):
            parts[-1][1].extend(rows)
        elif parts and not any(column.measures for column in parts[-1][0]):
            parts[-1] = (columns, [*parts[-1][1], *rows])
        else:
            parts.append((columns, rows))
    return [
        Block(
            columns=columns,
            rows=tuple(rows),
            cells=tuple(tuple(_view_cell(table, row, column) for column in columns) for row in rows),
        )
        for columns, rows in parts
    ]


def measures_of(rows: Iterable[RowResult]) -> list[tuple[str | None, Measure]]:
    """Column of the paper and measure of all cells, each once: those that stand for a column first."""
    found = dict.fromkeys((cell.column, same_measure(cell.measure)) for row in rows for cell in row.cells)
    return sorted(found, key=lambda pair: pair[0] is None)


def cell_of(row: RowResult, measure: Measure, column: str | None) -> Cell | None:
    """The row's cell of this measure."""
    return next((one for one in row.cells if one.column == column and same_measure(one.measure) == measure), None)


def same_measure(measure: Measure) -> Measure:
    """The measure without the count of its pictures, in which rows of one table may differ."""
    return replace(measure, num_images=None)


def measure_heading(measure: Measure) -> str:
    """A measure with all that tells it from others of a table: name, guidance, split, whose space."""
    network = "" if measure.network is None else f"{measure.network}; "
    return f"{measure_title(measure, split=False)} ({measure.split}; {network}{measure.space})"


def marks_of(cell: Cell) -> tuple[Mark, ...]:
    """The verdicts of a cell: on the paper's difference, on its number."""
    told: dict[Statement, Judged | None] = {"effect": cell.effect, "number": cell.number}
    return tuple(
        Mark(statement=statement, verdict=one.verdict, why=one.why)
        for statement in STATEMENTS
        if (one := told[statement]) is not None
    )


def shared_reason(table: TableResult) -> str | None:
    """Why none of the paper's numbers is comparable, where one reason holds for all: it is then told once."""
    numbers = {cell.number for row in table.rows for cell in row.cells if cell.number is not None}
    one = numbers.pop() if len(numbers) == 1 else None
    return None if one is None or one.verdict != "not comparable" else one.why


def tally_line(tables: Iterable[TableResult]) -> str:
    """How many of the paper's statements came to what, in words; empty where nothing was judged."""
    parts = []
    counts = tally(tables)
    for statement, word in STATEMENTS.items():
        total = sum(counts[statement].values())
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts[statement].items())
        if total:
            parts.append(f"{total} {word}{'' if total == 1 else 's'} of the paper: {told}")
    return "; ".join(parts) + ("." if parts else "")


def paper_text(table: TableResult, column: str, value: float | None, *, sign: bool = False) -> str:
    """A number of the paper with the digits that its column has there."""
    if value is None:
        return ""
    numbers = [row.expect[column] for row in table.rows if column in row.expect]
    text = f"{value:+.{_decimals(numbers)}f}" if sign else f"{value:.{_decimals(numbers)}f}"
    return text.replace("-", "−")


def cost_text(row: RowResult) -> str:
    """What our row cost: `3 seeds, 600 steps, 2 min 5 s + 12 s of its teachers`; empty where there is nothing of it."""
    parts = [f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"] if row.seeds else []
    parts += [] if row.steps is None else [f"{row.steps:,} steps"]
    if row.train_seconds is not None:
        teacher = "" if not row.teacher_seconds else f" + {format_seconds(row.teacher_seconds)} of its teachers"
        parts.append(format_seconds(row.train_seconds) + teacher)
    return ", ".join(parts)


def _groups(rows: Sequence[RowResult]) -> Iterator[list[RowResult]]:
    """Rows of one group that stand together."""
    part: list[RowResult] = []
    for row in rows:
        if part and row.group != part[-1].group:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _columns(table: TableResult, rows: Sequence[RowResult]) -> tuple[PaperColumn, ...]:
    measures = measures_of(rows)
    found = []
    for key, heading in table.columns.items():
        own: dict[tuple[str, str | None], Measure] = {}
        for column, measure in measures:
            if column == key:
                own.setdefault((measure.metric, measure.network), measure)
        found.append(PaperColumn(key=key, heading=heading, measures=tuple(own.values())[:MOST_MEASURES]))
    return tuple(found)


def _view_cell(table: TableResult, row: RowResult, column: PaperColumn) -> ViewCell:
    cells = [cell_of(row, measure, column.key) for measure in column.measures]
    told_once = shared_reason(table)
    against = next((one for one in table.rows if one.name == row.against), None)
    difference = None
    if against is not None and column.key in row.expect and column.key in against.expect:
        difference = row.expect[column.key] - against.expect[column.key]
    return ViewCell(
        paper=paper_text(table, column.key, row.expect.get(column.key)),
        paper_difference=paper_text(table, column.key, difference, sign=True),
        ours=tuple(None if cell is None else _ours(cell, told_once) for cell in cells),
    )


def _ours(cell: Cell, told_once: str | None) -> Ours:
    scale, measure = abs(cell.ours.value), cell.measure
    difference = "" if cell.difference is None else estimate_text(cell.difference, measure, scale=scale, sign=True)
    marks = tuple(mark for mark in marks_of(cell) if told_once is None or mark.statement != "number")
    return Ours(mean=estimate_text(cell.ours, measure, scale=scale), difference=difference, marks=marks)


def _decimals(numbers: Sequence[float]) -> int:
    """Digits after the point of the number that has most."""
    exponents = [Decimal(repr(number)).normalize().as_tuple().exponent for number in numbers]
    return max((-one for one in exponents if isinstance(one, int) and one < 0), default=0)
