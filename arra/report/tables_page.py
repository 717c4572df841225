"""The page of the paper's tables: what the paper says, what our rows reached, and what came of every statement.

Place in the pipeline: `arra reproduce` trains and measures, `arra.evaluate.verdicts` judges; here it becomes one HTML
file that looks like the report and works without a network. Nothing here knows which row is expected to win.

Letters: R prompts, S pictures of each, H height, W width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image

from arra.evaluate.distances import LEVEL
from arra.evaluate.lab import Measure
from arra.evaluate.verdicts import VERDICTS, Cell, TableResult, tally
from arra.report.bands import BAND_MEANING, TEACHER_MEANING, SeedRun, band_drawings
from arra.report.comparison_page import p_text
from arra.report.differences import recipe_differences
from arra.report.drawing import draw
from arra.report.grids import SCALE, GridColumn, data_url, strip
from arra.report.lab_page import CORRECTION, estimate_text, interval_meaning
from arra.report.page import glossary
from arra.report.style import ACCENTS, styled_page
from arra.report.table_view import (
    COUNTED,
    STATEMENTS,
    VERDICT_TEXTS,
    blocks,
    cell_of,
    cost_text,
    marks_of,
    measure_heading,
    measures_of,
    shared_reason,
    tally_line,
)

SHOWN_SIDE = 160
"""Pixels per side at which pictures are shown at most; small ones are enlarged by a whole factor."""


@dataclass(frozen=True, kw_only=True)
class TableRun:
    """One training of a row; a training that stands in several tables is told once for each."""

    table: str
    """`recipe` of its `TableResult`."""
    row: str
    """`name` of its `RowResult`."""
    seed: int
    metrics: tuple[Mapping[str, Any], ...] = ()
    """Rows of metrics.jsonl."""
    teacher_seconds: float | None = None
    """What its teachers' pass over the training pictures took; None for a row without one, or where it is unknown."""
    recipe: str = ""
    """The resolved recipe as YAML."""


@dataclass(frozen=True, kw_only=True)
class TablePictures:
    """What rows of a table painted of the same prompts with the same seeds."""

    table: str
    """`recipe` of its `TableResult`."""
    title: str = ""
    """What tells these pictures from others of the table: the data set, the split, the guidance."""
    prompts: tuple[str, ...]
    columns: tuple[GridColumn, ...]
    """Pictures (R, S, H, W, 3) of each row; the label is the row's name, or says what else is shown."""


@dataclass(frozen=True, kw_only=True)
class TablesPage:
    """All that the page shows."""

    title: str = "The paper's tables"
    command: str
    versions: Mapping[str, str]
    tables: tuple[TableResult, ...]
    seeds: tuple[int, ...]
    """Training seeds that were asked for."""
    runs: tuple[TableRun, ...] = ()
    pictures: tuple[TablePictures, ...] = ()
    failures: tuple[str, ...] = ()
    """What did not come through, a line each."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How pictures were measured, as the cards have it."""
    notes: tuple[str, ...] = ()
    """What a reader must know, beside what the page says by itself."""
    attribution: str | None = None
    """Who made the training pictures."""


def tables_html(page: TablesPage) -> str:
    """The page as HTML."""
    metrics = dict.fromkeys(cell.measure.metric for table in page.tables for row in table.rows for cell in row.cells)
    return styled_page(
        "tables.html.j2",
        labels=ACCENTS,
        colors=dict(zip(ACCENTS, ACCENTS, strict=True)),
        page=page,
        summary=[_summary(table, anchor=f"t{place}") for place, table in enumerate(page.tables)],
        tally=tally_line(page.tables),
        verdicts=VERDICT_TEXTS,
        tables=[_table_view(page, table, anchor=f"t{place}") for place, table in enumerate(page.tables)],
        meaning=[COUNTED, interval_meaning(len(page.seeds), pooled=True), CORRECTION, BAND_MEANING, TEACHER_MEANING],
        glossary=glossary(list(metrics)),
    )


def _summary(table: TableResult, *, anchor: str) -> dict[str, Any]:
    """A line for each kind of statement: how many came to what."""
    counts = tally([table])
    told = [(word, [counts[one][verdict] for verdict in VERDICTS]) for one, word in STATEMENTS.items()]
    return {"anchor": anchor, "table": table, "lines": [(word, found) for word, found in told if any(found)]}


def _table_view(page: TablesPage, table: TableResult, *, anchor: str) -> dict[str, Any]:
    """What the template needs of a table."""
    places, names = _places(table), _names(table)
    runs = [run for run in page.runs if run.table == table.recipe and run.row in names]
    cut = blocks(table)
    shown = {(column.key, measure) for block in cut for column in block.columns for measure in column.measures}
    forests = [
        {"is_shown": (column, measure) in shown, **forest}
        for column, measure in measures_of(table.rows)
        if (forest := _forest(table, column, measure, places=places))
    ]
    return {
        "anchor": anchor,
        "table": table,
        "tally": tally_line([table]),
        "blocks": cut,
        "places": places,
        "told_once": shared_reason(table),
        "told": {row.name: [text for text in (row.note, row.missing) if text] for row in table.rows},
        "costs": {row.name: cost_text(row) for row in table.rows},
        "heading": measure_heading,
        "forests": [one for one in forests if one["is_shown"]],
        "more_forests": [one for one in forests if not one["is_shown"]],
        "groups": list(_curves(table, runs, places, names)),
        "pictures": [_pictures(one, table, places) for one in page.pictures if one.table == table.recipe],
        "differences": _differences(runs, names),
        "names": names,
    }


def _places(table: TableResult) -> dict[str, int]:
    """Number of the colour of every row that is ours, within its group: groups share no drawing."""
    found: dict[str, int] = {}
    for group in dict.fromkeys(row.group for row in table.rows):
        own = [row.name for row in table.rows if row.group == group and not row.external]
        found |= {name: place for place, name in enumerate(own)}
    return found


def _names(table: TableResult) -> dict[str, str]:
    """What every row is called: its label, with its name where another of its group has the same label."""
    told = [(row.group, row.label) for row in table.rows]
    return {
        row.name: row.label if told.count((row.group, row.label)) == 1 else f"{row.label} ({row.name})"
        for row in table.rows
    }


def _forest(
    table: TableResult, column: str | None, measure: Measure, *, places: Mapping[str, int]
) -> dict[str, Any] | None:
    """Differences of all rows in one measure on one scale, right of zero where the row is better; None without any."""
    found = [(row, cell) for row in table.rows if (cell := cell_of(row, measure, column)) and cell.difference]
    papers = {
        row.name: cell.paper_difference
        for row, cell in found
        if table.scale == "full" and cell.paper_difference is not None  # elsewhere its unit is another one
    }
    ends = [abs(end) for _, cell in found for end in _ends(cell)] + [abs(value) for value in papers.values()]
    extent = max(ends, default=0.0) * 1.08
    if not extent:
        return None
    side = -1.0 if measure.better == "lower" else 1.0
    rows = [
        {
            "label": row.label,
            "group": row.group if len({one.group for one in table.rows}) > 1 else None,
            "against": next((one.label for one in table.rows if one.name == row.against), row.against),
            "place": places.get(row.name, 0),
            "bar": sorted(round(50 + 50 * side * end / extent, 2) for end in _ends(cell)),
            "paper": None if row.name not in papers else round(50 + 50 * side * papers[row.name] / extent, 2),
            "difference": _difference_text(cell),
            "p": "" if cell.p_corrected is None else p_text(cell.p_corrected),
            "marks": [mark for mark in marks_of(cell) if mark.statement == "effect"],
            "verdict": "" if cell.effect is not None else _direction(cell),
        }
        for row, cell in found
    ]
    return {
        "title": measure_heading(measure),
        "better": measure.better,
        "stands_for": table.columns.get(column) if column is not None else None,
        "rows": rows,
        "has_paper": bool(papers),
    }


def _ends(cell: Cell) -> tuple[float, float, float]:
    """Lower end, value and upper end of a difference; without an interval all are the value."""
    one = cell.difference
    assert one is not None
    low, high = (one.value if end is None else end for end in (one.low, one.high))
    return low, one.value, high


def _direction(cell: Cell) -> str:
    """What a difference that the paper says nothing of comes to."""
    assert cell.difference is not None
    if cell.p_corrected is None or cell.p_corrected > 1 - LEVEL:
        return "unclear"
    return "better" if (cell.difference.value < 0) == (cell.measure.better == "lower") else "worse"


def _difference_text(cell: Cell) -> str:
    assert cell.difference is not None
    return estimate_text(cell.difference, cell.measure, scale=abs(cell.ours.value), sign=True)


def _curves(
    table: TableResult, runs: Sequence[TableRun], places: Mapping[str, int], names: Mapping[str, str]
) -> Iterator[tuple[str, list[Markup]]]:
    """Name and drawings of every group of the table: groups are trained on other data, and share no axis."""
    for group in dict.fromkeys(row.group for row in table.rows):
        own = [row.name for row in table.rows if row.group == group]
        found = [
            SeedRun(label=names[run.row], metrics=run.metrics, teacher_seconds=run.teacher_seconds)
            for run in runs
            if run.row in own
        ]
        drawings = band_drawings(found, places={names[name]: places[name] for name in own if name in places})
        if drawings:
            yield group or "", [draw(one) for one in drawings]


def _pictures(one: TablePictures, table: TableResult, places: Mapping[str, int]) -> dict[str, Any]:
    """A figure for each prompt: the rows' pictures beside each other."""
    has_groups = len({row.group for row in table.rows}) > 1
    names = {
        row.name: " ".join(text for text in (row.group if has_groups else None, row.label) if text)
        for row in table.rows
    }
    figures = []
    for place, prompt in enumerate(one.prompts):
        strips = [
            {
                "label": names.get(column.label, column.label),
                "place": places.get(column.label),
                **_strip(column.images[place]),
            }
            for column in one.columns
        ]
        figures.append({"prompt": prompt, "strips": strips})
    return {"title": one.title, "figures": figures}


def _strip(images: UInt8[np.ndarray, "S H W 3"]) -> dict[str, Any]:
    """Address and width of pictures side by side."""
    side = max(images.shape[1:3])
    if side > SHOWN_SIDE:
        size = (max(1, images.shape[2] * SHOWN_SIDE // side), max(1, images.shape[1] * SHOWN_SIDE // side))
        images = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in images])
    found = strip(images, scale=max(1, min(SCALE, SHOWN_SIDE // max(images.shape[1:3]))))
    return {"url": data_url(found), "width": found.width}


def _differences(runs: Sequence[TableRun], names: Mapping[str, str]) -> dict[str, Any]:
    """Settings in which the rows' recipes differ, one seed of each row."""
    recipes: dict[str, str] = {}
    for run in runs:
        recipes.setdefault(run.row, run.recipe)
    found = recipe_differences(recipes)
    rows = [name for name in names if any(name in values for _, values in found)]
    return {"rows": rows, "settings": found}
