"""What all pages of the report share: their look, their colours, how they say a duration.

Place in the pipeline: below every page of this room; nothing here draws, so that a page without plots needs no
matplotlib, which takes a second to import.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

# One accent per label, in order of appearance: each keeps a contrast of at least 3 to both papers of the page, and blue
# and orange stay apart under the common colour blindnesses.
ACCENTS = ("#3d7ec7", "#d9622b", "#8a7bb8", "#3c9a78", "#b0863a", "#c05b8c")


def format_seconds(seconds: float) -> str:
    """A duration as a person says it: `42 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def interval_bar(low: float | None, value: float, high: float | None, *, better: str) -> dict[str, float] | None:
    """Positions in 0..100 of a difference and its interval about zero in the middle; right favours the candidate."""
    if low is None or high is None:
        return None
    extent = max(abs(low), abs(high), abs(value)) * 1.08
    side = -1.0 if better == "lower" else 1.0
    places = [50 + 50 * side * each / extent if extent > 0 else 50.0 for each in (low, value, high)]
    return {"left": round(min(places), 2), "at": round(places[1], 2), "right": round(max(places), 2)}


def styled_page(
    template: str, *, labels: Sequence[str] = (), colors: Mapping[str, str] | None = None, **values: Any
) -> str:
    """Another page of this room as HTML, in the report's style, with the labels' colours."""
    style = _source("page.html.j2").partition("<style>")[2].partition("</style>")[0]
    told = _environment().from_string(style).render(labels=labels, colors=colors or {})
    return _environment().from_string(_source(template)).render(style=told, **values)


@cache
def template(name: str) -> jinja2.Template:
    """A template of this room; it escapes all that is put in."""
    return _environment().from_string(_source(name))


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _source(template: str) -> str:
    return files("arra.report").joinpath(template).read_text(encoding="utf-8")
