"""The page of an evaluated set of pictures: its card, what must be known of it first, and pictures nobody picked.

Place in the pipeline: `arra evaluate` measures and writes the card; here it becomes HTML that looks like the report and
works without a network. Prompts and file names are other people's text: the template escapes everything.

Legend: H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arra.evaluate.card import CLASS_BALANCE, WARNINGS, Card, Result, warnings_of
from arra.report.check_page import shown_picture
from arra.report.measure_words import measure_meaning, measure_name
from arra.report.style import styled_page

PAGE_FILE = "card.html"
NOT_MEASURED = "not_measured"
"""The key of `Card.about` under which it says what could not be measured, and why."""
MAX_HEADLINES = 4
MAX_LISTED = 12
"""Values of a list that are written out."""
TELLING = (
    "fid", "fd", "kid_x1000", "fid_infinity", "fd_infinity", "cmmd", "findings_auroc", "accuracy", "clip_score",
    "clip_score_x100", "inception_score", "bits_per_token", "sfid", "ms_ssim", "precision", "recall", "coverage",
)  # fmt: skip
"""Measures that may head a page, the most telling first."""

_FOUR_DIGITS = frozenset({"cosine", "similarity", "AUROC"})


@dataclass(frozen=True)
class Nearest:
    """A picture of the set beside the training picture that it is nearest to."""

    generated: np.ndarray = field(repr=False)
    """uint8 (H, W, 3), like the other."""
    training: np.ndarray = field(repr=False)
    words: str
    """How near, and which they are."""


def card_page(
    card: Card,
    *,
    title: str,
    unpicked: Sequence[tuple[str, np.ndarray]] = (),
    nearest: Sequence[Nearest] = (),
) -> str:
    """The page as HTML; `unpicked` are pictures, uint8 (H, W, 3), each with what it was asked to show."""
    return styled_page(
        "card.html.j2",
        title=title,
        warnings=warnings_of(card),
        headlines=[_cells(row) for row in headline_rows(card)],
        groups=_groups(card),
        unpicked=unpicked,
        nearest=nearest,
        shown=shown_picture,
        protocol=[(words(key), plain(value)) for key, value in card.protocol.items()],
        missing=grouped_lines(card.about.get(NOT_MEASURED) or {}),
        about=[
            (words(key), fact_text(key, value))
            for key, value in card.about.items()
            if key not in (WARNINGS, NOT_MEASURED)
        ],
    )


def grouped_lines(told: Mapping[str, str]) -> list[str]:
    """What is told of `METRIC in PLACE`, each once: `fd, kid_x1000 in dinov2-l14; fid in inception: no reference`."""
    by_text: dict[str, dict[str, list[str]]] = {}
    for name, text in told.items():
        metric, _, place = name.partition(" in ")
        by_text.setdefault(text, {}).setdefault(place, []).append(metric)
    found = []
    for text, places in by_text.items():
        names = (", ".join(metrics) + (f" in {place}" if place else "") for place, metrics in places.items())
        found.append(f"{'; '.join(names)}: {text}")
    return found


def mark_lines(marked: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Each mark once, after all that bear it, which are `METRIC in PLACE`."""
    marks = dict.fromkeys(mark for _, own in marked for mark in own)
    return [line for mark in marks for line in grouped_lines({name: mark for name, own in marked if mark in own})]


def headline_rows(card: Card) -> tuple[Result, ...]:
    """The few most telling rows: first one of another space than the teacher's, and a biased distance with its KID.

    Where the teacher's is the only space there is, its rows stand alone, and `warnings_of` says so.
    """
    rows = [row for row in card.results if row.subject == "model" and row.metric in TELLING]
    kernels = {(row.space, row.split, row.cfg_scale): row for row in rows if row.metric == "kid_x1000"}
    found: dict[Any, Result] = {}
    rows.sort(key=lambda row: (TELLING.index(row.metric), row.is_teachers))
    first = [row for row in rows if row.space is not None and not row.is_teachers][:1]
    for row in (*first, *rows):
        if len(found) >= MAX_HEADLINES:
            break
        if any(row.metric == other.metric for other in found.values()):
            continue
        found[row.key] = row
        beside = kernels.get((row.space, row.split, row.cfg_scale))
        if row.is_biased and beside is not None:
            found[beside.key] = beside
    return tuple(found.values())


def value_text(value: float, *, unit: str, scale: float | None = None) -> str:
    """A number with the digits that its unit deserves; shares are percent, `scale` fixes the digits of a table row."""
    if unit == "fraction":
        text, end = f"{100 * value:.1f}", " %"
    else:
        size = abs(value) if scale is None else scale
        digits = 4 if unit in _FOUR_DIGITS else 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
        text, end = f"{value:,.{digits}f}", ""
    return (text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")) + end


def interval_text(low: float | None, high: float | None, *, unit: str, scale: float) -> str:
    """`1.23 to 4.56`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    start = value_text(low, unit=unit, scale=scale).removesuffix(" %")
    return f"{start} to {value_text(high, unit=unit, scale=scale)}"


def place_words(row: Result) -> str:
    """Where a row was measured: space, split, guidance."""
    parts = [row.space or "no space of its own", row.split]
    if row.cfg_scale is not None:
        parts.append(f"guidance {row.cfg_scale:g}")
    return ", ".join(parts)


def words(key: str) -> str:
    """A key as words: `reference_sha256` is `reference sha256`."""
    return key.replace("_", " ").replace(".", " ")


def fact_text(key: str, value: Any) -> str:
    """A fact of `Card.about` as a person reads it."""
    return _balance(value) if key == CLASS_BALANCE else plain(value)


def plain(value: Any) -> str:
    """A fact as a person reads it; long lists are cut and counted."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        each = [f"{words(str(key))} {plain(one)}" for key, one in value.items()]
    elif isinstance(value, list | tuple):
        each = [plain(one) for one in value]
    else:
        return f"{value:g}" if isinstance(value, float) else str(value)
    rest = f" ... {len(each):,} in all" if len(each) > MAX_LISTED else ""
    return ", ".join(each[:MAX_LISTED]) + rest if each else "none"


def _balance(counts: Mapping[str, int] | None) -> str:
    """How many classes there are, and how many pictures of each."""
    if not counts:
        return "not known"
    least, most = min(counts.values()), max(counts.values())
    each = f"{least:,} pictures each" if least == most else f"{least:,} to {most:,} pictures each"
    return f"{len(counts):,} classes, {each}"


def _groups(card: Card) -> list[dict[str, Any]]:
    """The rows by where they were measured, in the order of the card."""
    found: dict[str, list[Result]] = {}
    for row in card.results:
        found.setdefault(place_words(row), []).append(row)
    return [
        {"name": name, "is_teachers": all(row.is_teachers for row in rows), "rows": [_cells(row) for row in rows]}
        for name, rows in found.items()
    ]


def _cells(row: Result) -> dict[str, Any]:
    return {
        "name": measure_name(row.metric) + (", the tokenizer alone" if row.subject != "model" else ""),
        "meaning": measure_meaning(row.metric) or f"{row.better.capitalize()} is better.",
        "where": row.space or "",
        "value": value_text(row.value, unit=row.unit),
        "interval": interval_text(row.low, row.high, unit=row.unit, scale=abs(row.value)),
        "pictures": f"{row.num_images:,}",
        "marks": row.marks,
    }
