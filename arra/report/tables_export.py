"""The paper's tables with ours beside them as Markdown, LaTeX and CSV.

Place in the pipeline: `arra reproduce` writes them beside the page; Markdown and LaTeX show what the page's tables
show, CSV has every number of every measure.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from arra.evaluate.lab import Estimate, Measure
from arra.evaluate.verdicts import Cell, Judged, RowResult, TableResult
from arra.report.markup import LATEX_PREAMBLE, csv_text, latex_row, latex_text, markdown_row, markdown_text
from arra.report.table_view import (
    COUNTED,
    VERDICT_TEXTS,
    Block,
    Mark,
    Ours,
    PaperColumn,
    ViewCell,
    blocks,
    cost_text,
    measure_heading,
    shared_reason,
    tally_line,
)

CSV_COLUMNS = (
    "recipe", "title", "scale", "group", "row", "label", "against", "external", "column", "heading", "paper",
    "paper_difference", "metric", "split", "cfg_scale", "reference", "network", "better", "unit", "space",
    "num_images", "ours", "ours_low", "ours_high", "ours_seed_error", "ours_picture_error", "difference",
    "difference_low", "difference_high", "difference_seed_error", "difference_picture_error", "p_corrected",
    "number_verdict", "number_why", "effect_verdict", "effect_why", "seeds", "steps", "train_seconds",
    "teacher_seconds", "missing", "note",
)  # fmt: skip
"""Of `tables_csv`, one line for each cell."""


def tables_markdown(tables: Sequence[TableResult]) -> str:
    """The tables as Markdown, with tallies, notes and the reasons of all verdicts."""
    lines = [f"- {sign} {verdict}: {told}" for verdict, (sign, told) in VERDICT_TEXTS.items()]
    lines += ["", COUNTED, ""]
    for table in tables:
        lines += [f"## {markdown_text(table.title)}", "", markdown_text(table.about), ""]
        lines += [line for text in _told(table) for line in (markdown_text(text), "")]
        for block in blocks(table):
            lines += [*_markdown_block(block), ""]
        lines += [f"- {markdown_text(note)}" for note in table.notes] + ([""] if table.notes else [])
    return "\n".join(lines).rstrip("\n") + "\n"


def tables_latex(tables: Sequence[TableResult]) -> str:
    """The tables as LaTeX floats; they need the packages that the first lines name, and no other."""
    return LATEX_PREAMBLE + "\n".join(_latex_table(table) for table in tables)


def tables_csv(tables: Sequence[TableResult]) -> str:
    """All numbers, a line for each measure of each row, and for each number of the paper that nothing stands for."""
    return csv_text(CSV_COLUMNS, (line for table in tables for row in table.rows for line in _csv_lines(table, row)))


def _told(table: TableResult) -> list[str]:
    """What came of the table, and why its numbers are not comparable where that holds for all."""
    why = shared_reason(table)
    told = "" if why is None else f"Numbers are not comparable: {why}."
    return [text for text in (f"Scale: {table.scale}.", tally_line([table]), told) if text]


def _markdown_block(block: Block) -> Iterator[str]:
    heads = ["row"]
    for column in block.columns:
        heads.append(f"{markdown_text(column.heading)}, paper")
        heads += [markdown_text(measure_heading(measure)) for measure in column.measures]
    yield markdown_row(heads)
    yield markdown_row(["---", *["---:"] * (len(heads) - 1)])
    group = None
    for row, cells in zip(block.rows, block.cells, strict=True):
        if row.group and row.group != group:
            yield markdown_row([f"**{markdown_text(row.group)}**", *[""] * (len(heads) - 1)])
        group = row.group
        told = [text for text in (cost_text(row), row.note, row.missing) if text]
        name = "<br>".join([markdown_text(row.label), *(f"<small>{markdown_text(text)}</small>" for text in told)])
        yield markdown_row([name, *(text for cell in cells for text in _markdown_cells(cell))])


def _markdown_cells(cell: ViewCell) -> Iterator[str]:
    yield "<br>".join(text for text in (cell.paper, cell.paper_difference) if text)
    for ours in cell.ours:
        if ours is None:
            yield ""
            continue
        marks = [f"{mark.text}: {markdown_text(mark.why)}" for mark in ours.marks]
        yield "<br>".join(text for text in (ours.mean, ours.difference, *marks) if text)


def _latex_table(table: TableResult) -> str:
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{latex_text(table.title)}: {latex_text(table.about)}}}",
        *(line for block in blocks(table) for line in _latex_block(block)),
        r"\par\smallskip\raggedright\footnotesize",
        *(rf"{latex_text(line)}\par" for line in (*_told(table), *table.notes)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_block(block: Block) -> Iterator[str]:
    width = 1 + sum(1 + column.num_measures for column in block.columns)
    yield rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}"
    yield r"\toprule"
    yield latex_row(
        ["", *(rf"\multicolumn{{{1 + one.num_measures}}}{{c}}{{{latex_text(one.heading)}}}" for one in block.columns)]
    )
    yield "".join(_rules(block.columns))
    yield latex_row(["", *(text for column in block.columns for text in _latex_heads(column))])
    yield r"\midrule"
    group = None
    for row, cells in zip(block.rows, block.cells, strict=True):
        if row.group and row.group != group:
            yield rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_text(row.group)}}}}} \\"
        group = row.group
        yield latex_row([latex_text(row.label), *(text for cell in cells for text in _latex_cells(cell))])
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _rules(columns: Sequence[PaperColumn]) -> Iterator[str]:
    start = 2
    for column in columns:
        yield rf"\cmidrule(lr){{{start}-{start + column.num_measures}}}"
        start += 1 + column.num_measures


def _latex_heads(column: PaperColumn) -> Iterator[str]:
    yield "paper"
    for measure in column.measures:
        yield rf"\parbox[b]{{9em}}{{\raggedleft {latex_text(measure_heading(measure))}}}"


def _latex_cells(cell: ViewCell) -> Iterator[str]:
    yield latex_text(cell.paper)
    for ours in cell.ours:
        yield "" if ours is None else _latex_ours(ours)


def _latex_ours(ours: Ours) -> str:
    lines = [latex_text(ours.mean), *([latex_text(ours.difference)] if ours.difference else [])]
    lines += [_latex_mark(mark) for mark in ours.marks]
    stack = r" \\ ".join(lines)
    return stack if len(lines) == 1 else rf"\shortstack[r]{{{stack}}}"


def _latex_mark(mark: Mark) -> str:
    """The verdict alone on a narrow page; what for is in the other exports."""
    return latex_text(mark.text)


def _csv_lines(table: TableResult, row: RowResult) -> Iterator[list[Any]]:
    """A line for each cell; then those columns of the paper that no cell of the row stands for; at least one."""
    start = [table.recipe, table.title, table.scale, row.group, row.name, row.label, row.against, row.external]
    end = [
        " ".join(map(str, row.seeds)),
        row.steps,
        row.train_seconds,
        row.teacher_seconds,
        row.missing,
        row.note,
    ]
    lines: list[list[Any]] = []
    for cell in row.cells:
        heading = None if cell.column is None else table.columns.get(cell.column)
        lines.append([cell.column, heading, cell.paper, cell.paper_difference, *_csv_cell(cell)])
    empty = [None] * (len(CSV_COLUMNS) - len(start) - 4 - len(end))
    held = {cell.column for cell in row.cells}
    for column, value in row.expect.items():
        if column not in held:
            lines.append([column, table.columns.get(column), value, None, *empty])
    for line in lines or [[None] * 4 + empty]:
        yield [*start, *line, *end]


def _csv_cell(cell: Cell) -> list[Any]:
    measure = cell.measure
    return [
        *_csv_measure(measure),
        *_csv_estimate(cell.ours),
        *_csv_estimate(cell.difference),
        cell.p_corrected,
        *_csv_judged(cell.number),
        *_csv_judged(cell.effect),
    ]


def _csv_measure(measure: Measure) -> list[Any]:
    return [
        measure.metric,
        measure.split,
        measure.cfg_scale,
        measure.reference,
        measure.network,
        measure.better,
        measure.unit,
        measure.space,
        measure.num_images,
    ]


def _csv_estimate(one: Estimate | None) -> list[float | None]:
    return [None] * 5 if one is None else [one.value, one.low, one.high, one.seed_error, one.picture_error]


def _csv_judged(one: Judged | None) -> list[str | None]:
    return [None, None] if one is None else [one.verdict, one.why]
