"""Two evaluated runs or sets of pictures side by side: `arra compare`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE, Card, Evaluation, warnings_of
from arra.evaluate.compare import Difference, compare
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
    differences = compare(first, second)
    page = None
    if out is not None:
        page = out if out.suffix == ".html" else out / PAGE_FILE
        title = f"{first.card.run} and {second.card.run}"
        page.parent.mkdir(parents=True, exist_ok=True)
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
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", BASELINE, CANDIDATE, f"{CANDIDATE} - {BASELINE}, 95 % interval", "p", f"{CANDIDATE} is"):
        is_text = heading in ("", f"{CANDIDATE} is")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "")
    last, notes = "", list[str]()
    for one in compared.differences:
        if (place := place_of(one)) != last:
            table.add_row(Text(place, style="bold"))
            last = place
        cells = comparison_cells(one)
        verdict = "-" if cells["side"] is None else one.verdict if cells["is_clear"] else f"({one.verdict})"
        gap = f"{cells['difference']} ({cells['interval']})"
        table.add_row(escape(cells["name"]), cells["baseline"], cells["candidate"], gap, cells["p"], verdict)
        notes += [f"{one.metric}, {place}: {mark}" for mark in cells["marks"]]
    for label, card in ((BASELINE, compared.baseline), (CANDIDATE, compared.candidate)):
        notes += [f"{label}: {line}" for line in warnings_of(card)]
    notes += [
        f"{name}: {first} ({BASELINE}), {second} ({CANDIDATE})"
        for name, first, second in differing_facts(compared.baseline, compared.candidate)
    ]
    return Group(
        Text(f"{BASELINE}: {compared.baseline.run}\n{CANDIDATE}: {compared.candidate.run}\n"),
        table,
        Text(
            "\np: probability of such a difference, either way, if it were noise. In brackets: not clear once "
            f"corrected for {len(compared.differences)} rows (Holm). Of other pictures, not of other training seeds."
        ),
        *(Text(note, style="dim") for note in dict.fromkeys(notes)),
        Text("\n" + tally(compared.differences), style="bold"),
    )
