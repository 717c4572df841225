"""Curves as inline SVG of a few kilobytes: lines, bands about them, and round numbers on both axes.

Place in the pipeline: below the pages that hold many drawings or are made again and again; `report/plots.py` draws the
few that matplotlib draws better.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from arra.report.style import ACCENTS, template

MOST_POINTS = 300
"""Of a curve: each is then the mean of the rows that it stands for."""
MOST_DOTS = 40
"""Of a curve whose points are marked: few points are measurements, many are a line."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 540, 270, 62, 516, 12, 238
"""Of a drawing, and the edges of its field."""
DASHES = ("", "7 3", "2 3", "9 3 2 3")
"""Of lines whose colour has been used before."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve to be drawn."""

    label: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    """Place on the horizontal axis, lower and upper edge; empty for a curve without a band."""
    place: int | None = None
    """Number of its colour and dashes, the same in all drawings of a page; None: as it comes."""


@dataclass(frozen=True)
class Line:
    """One line of a drawing."""

    label: str
    color: int
    """Number of an accent."""
    path: str
    """Places of its points, x,y x,y ..."""
    dots: tuple[tuple[float, float], ...] = ()
    """Where the points are marked, as they are few."""
    last: str = ""
    """Its last value."""
    dash: str = ""
    band: str = ""
    """Places round about its band."""


@dataclass(frozen=True)
class Drawing:
    """Curves over steps, seconds or layers, ready to be drawn."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    across: tuple[tuple[float, str], ...]
    """Places and numbers of the horizontal axis."""
    up: tuple[tuple[float, str], ...]
    x_label: str = "step"
    says_last: bool = True
    """Whether the legend tells the last values."""


def draw(drawing: Drawing) -> Markup:
    """The drawing as a figure of HTML with its legend; the page's style gives `run-0`, `run-1`, ... their accents."""
    box = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return Markup(template("drawing.html.j2").render(drawing=drawing, box=box, accents=ACCENTS))


def drawn(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "step",
    says_last: bool = True,
    skips_start: bool = False,
    floor: float | None = None,
) -> Iterator[Drawing]:
    """The drawing of the curves that have points, unless there is none.

    With `skips_start` the first steps, which fall from far above, need not fit in; `floor` is a value that must.
    """
    series = [one for one in series if one.points]
    if not series:
        return
    low, high = _span([x for one in series for x, _ in one.points])
    begin = low + (high - low) * 0.15 if skips_start else -math.inf
    edges = [edge for one in series for x, *both in one.band if x >= begin for edge in both]
    shown = [y for one in series for x, y in one.points if x >= begin] + edges
    bottom, top = _span([*shown, *([] if floor is None else [floor])])
    margin = 0.06 * (top - bottom)
    bottom, top = bottom - margin, top + margin
    to_x, to_y = _scale(low, high, (LEFT, RIGHT)), _scale(bottom, top, (BOTTOM, TOP))
    yield Drawing(
        title,
        unit,
        tuple(_line(one, number if one.place is None else one.place, to_x, to_y) for number, one in enumerate(series)),
        tuple((to_x(value), text) for value, text in ticks(low, high, most=6)),
        tuple((to_y(value), text) for value, text in ticks(bottom, top, most=6)),
        x_label,
        says_last,
    )


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: means of neighbours, each at the place of its last."""
    size = -(-len(points) // MOST_POINTS)
    if size < 2:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, *, most: int) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high`, at most so many, and how they are written."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    small = digits > 4  # learning rates
    return [
        (number * step, f"{number * step:.6g}" if small else f"{number * step:,.{digits}f}".replace("-", "−"))
        for number in range(first, last + 1)
    ]


def is_finite(value: object) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def short_number(value: Any) -> str:
    """Four digits that count, with a true minus sign; what is no number as it is."""
    if not is_finite(value):
        return str(value)
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return text.replace("-", "−") if "e" not in text else text


def _line(one: Series, number: int, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> Line:
    def place(x: float, y: float) -> tuple[float, float]:
        # far outside the field a point is as good as at its edge, and large numbers upset some browsers
        return to_x(x), min(max(to_y(y), -1.0 * HEIGHT), 2.0 * HEIGHT)

    places = [place(x, y) for x, y in one.points]
    around = [place(x, high) for x, _, high in one.band] + [place(x, low) for x, low, _ in reversed(one.band)]
    return Line(
        one.label,
        number % len(ACCENTS),
        _path(places),
        tuple(places) if len(places) <= MOST_DOTS else (),
        short_number(one.points[-1][1]),
        DASHES[number // len(ACCENTS) % len(DASHES)],
        _path(around),
    )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, set apart where they are one."""
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    around = abs(low) * 0.1 or 1.0
    return low - around, high + around


def _scale(low: float, high: float, places: tuple[int, int]) -> Callable[[float], float]:
    """Where a value stands between two places of a drawing."""
    first, last = places
    return lambda value: round(first + (value - low) / (high - low) * (last - first), 1)
