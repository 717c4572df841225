"""Two evaluated runs or sets of pictures side by side: `arra compare`."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE, Card, Evaluation, warnings_of
from arra.evaluate.compare import Difference, compare
from arra.report.card_page import mark_lines
from arra.report.comparison_page import (
    BASELINE,
    CANDIDATE,
    PAGE_FILE,
    comparison_cells,
    comparison_page,
    differing_facts,
    place_of,
    tally,
)
from arra.runs import atomic_write

HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""A SHA-256, whose beginning is enough for a terminal; the page has it whole."""
WIDTH, GAP, LEAST_NAME = 80, 2, 12
"""Columns of a terminal, between those of the table, and that names of measures have at least."""


@dataclass(frozen=True)
class Compared:
    """Two cards and what differs."""

    baseline: Card
    candidate: Card
    differences: tuple[Difference, ...]
    page: Path | None
    """Where the page lies, if one was asked for."""

    def to_json(self) -> str:
        """All of it as indented JSON."""
        content = {
            "baseline": self.baseline.run,
            "candidate": self.candidate.run,
            "verdict": tally(self.differences),
            "differences": [dataclasses.asdict(one) for one in self.differences],
        }
        return json.dumps(content, indent=2, allow_nan=False)


def compare_places(baseline: Path, candidate: Path, *, out: Path | None = None) -> Compared:
    """What differs between two evaluations; `out` is a page to write, or a folder for it.

    Raises:
        ArraError: one is not evaluated, or the two were measured differently; the line names what differs.
    """
    first, second = open_evaluation(baseline), open_evaluation(candidate)
    page = None
    if out is not None:  # before the work: a place that cannot be written is better known now
        page = out if out.suffix == ".html" else out / PAGE_FILE
        page.parent.mkdir(parents=True, exist_ok=True)
    differences = compare(first, second)
    if page is not None:
        title = f"{first.card.run} and {second.card.run}"
        atomic_write(page, comparison_page(first.card, second.card, differences, title=title))
    return Compared(first.card, second.card, tuple(differences), page)


def open_evaluation(place: Path) -> Evaluation:
    """The evaluation of a run, of an evaluated set's folder, or of a card's file.

    Raises:
        ArraError: there is none.
    """
    if place.is_file() and place.name != CARD_FILE:
        raise ArraError(f"{place}: not a card; expected a folder that arra evaluate wrote, or its {CARD_FILE}")
    return Evaluation.load(place.parent if place.name == CARD_FILE else place)


def comparison_table(compared: Compared) -> Group:
    """What differs, for a terminal of 80 columns."""
    places = dict.fromkeys(place_of(one) for one in compared.differences)
    lines = {place: [_line(one) for one in compared.differences if place_of(one) == place] for place in places}
    headings = ("", BASELINE, CANDIDATE, f"{CANDIDATE} - {BASELINE}, 95 % interval", "p", f"{CANDIDATE} is")
    every = [headings, *(line for group in lines.values() for line in group)]
    widths = [max(len(line[column]) for line in every) for column in range(len(headings))]
    widths[0] = min(widths[0], max(LEAST_NAME, WIDTH - sum(widths[1:]) - GAP * (len(headings) - 1)))
    shown: list[RenderableType] = [_columns([headings], widths)]
    for place, group in lines.items():
        shown += [Text(place, style="bold"), _columns(group, widths)]
    marked = [(f"{one.metric} in {place_of(one)}", comparison_cells(one)["marks"]) for one in compared.differences]
    notes = mark_lines(marked)
    for label, card in ((BASELINE, compared.baseline), (CANDIDATE, compared.candidate)):
        notes += [f"{label}: {line}" for line in warnings_of(card)]
    notes += [
        HASH.sub(r"\1...", f"{name}: {first} ({BASELINE}), {second} ({CANDIDATE})")
        for name, first, second in differing_facts(compared.baseline, compared.candidate)
    ]
    return Group(
        Text(f"{BASELINE}: {compared.baseline.run}\n{CANDIDATE}: {compared.candidate.run}\n"),
        *shown,
        Text(
            "\np: probability of such a difference, either way, if it were noise. In brackets: not clear once "
            f"corrected for {len(compared.differences)} rows (Holm). Of other pictures, not of other training seeds."
        ),
        *(Text(note, style="dim") for note in dict.fromkeys(notes)),
        Text("\n" + tally(compared.differences), style="bold"),
    )


def _line(one: Difference) -> tuple[str, ...]:
    """A row of the table as text."""
    cells = comparison_cells(one)
    verdict = "-" if cells["side"] is None else one.verdict if cells["is_clear"] else f"({one.verdict})"
    gap = f"{cells['difference']} ({cells['interval']})"
    return cells["name"], cells["baseline"], cells["candidate"], gap, cells["p"], verdict


def _columns(lines: Sequence[tuple[str, ...]], widths: Sequence[int]) -> Table:
    """Lines in columns of these widths, words to the left and numbers to the right; only names may wrap."""
    table = Table(box=None, padding=(0, GAP, 0, 0), show_header=False, pad_edge=False)
    for column, width in enumerate(widths):
        is_words = column in (0, len(widths) - 1)
        table.add_column(width=width, justify="left" if is_words else "right", no_wrap=column > 0)
    for line in lines:
        table.add_row(*map(escape, line))
    return table
