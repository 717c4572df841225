"""Curves of training runs as SVG images that fit a light and a dark page.

Place in the pipeline: reads the rows of `metrics.jsonl`; `report/page.py` embeds what comes back. Only matplotlib's
Figure objects are used: no pyplot, no backend choice, no changed defaults.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK = "#123321"  # stands for the text colour of the page while matplotlib draws; replaced by currentColor
_ADAPTIVE = "<style>svg{color:#3b4048}@media (prefers-color-scheme:dark){svg{color:#b9c0ca}}</style>"


@dataclass(frozen=True)
class Curve:
    """One line of a plot; curves of one label share a colour and one entry in the legend."""

    label: str
    color: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def validation_curves(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, colors: Mapping[str, str], x: str
) -> list[Curve]:
    """Validation NLL of (label, metrics rows) against `x`, "step" or "seconds"; runs without such rows are left out."""
    return _curves(runs, colors=colors, kind="validation", x=x, y="ntp_loss", window=1)


def training_curves(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    *,
    colors: Mapping[str, str],
    y: str,
    smooth_share: float = 0.03,
) -> list[Curve]:
    """Column `y` of the train rows against the step, as a running mean over `smooth_share` of each run's rows."""
    longest = max((len(rows) for _, rows in runs), default=0)
    return _curves(runs, colors=colors, kind="train", x="step", y=y, window=max(1, round(longest * smooth_share)))


def plot(curves: Sequence[Curve], *, title: str, x_label: str, y_label: str) -> str:
    """A `data:image/svg+xml;base64,...` address of the plot; text is drawn as outlines, so no font is needed."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, curves, title=title, x_label=x_label, y_label=y_label)
    return _address(figure)


def _address(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().replace(_INK, "currentColor")
    opening_end = svg.index(">", svg.index("<svg")) + 1
    svg = svg[:opening_end] + _ADAPTIVE + svg[opening_end:]
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Means of the last `window` values up to each position (fewer at the start): no value looks ahead."""
    sums, means = 0.0, []
    for i, value in enumerate(values):
        sums += value - (values[i - window] if i >= window else 0.0)
        means.append(sums / min(i + 1, window))
    return means


def _curves(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    *,
    colors: Mapping[str, str],
    kind: str,
    x: str,
    y: str,
    window: int,
) -> list[Curve]:
    curves = []
    for label, rows in runs:
        points = [(float(row[x]), float(row[y])) for row in rows if row.get("kind") == kind and row.get(y) is not None]
        if points:
            smooth = running_mean([value for _, value in points], window=window)
            curves.append(Curve(label=label, color=colors[label], x=tuple(at for at, _ in points), y=tuple(smooth)))
    return curves


def _draw(axes: Axes, curves: Sequence[Curve], *, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK, pad=10)
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.set_ylabel(y_label, fontsize=9, color=_INK)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0, pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.spines["bottom"].set_alpha(0.35)
    axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)
    labelled: set[str] = set()
    num_points = max((len(curve.x) for curve in curves), default=0)
    for curve in curves:
        axes.plot(
            curve.x,
            curve.y,
            color=curve.color,
            linewidth=1.8,
            marker="o" if num_points <= 40 else None,  # few points are measurements, many are a line
            markersize=3.5,
            label="_" + curve.label if curve.label in labelled else curve.label,
        )
        labelled.add(curve.label)
    # The first steps fall from log(codes) and would flatten all that matters: the axis fits what comes after 15 % of x.
    start = 0.15 * max((max(curve.x) for curve in curves), default=0.0)
    shown = [level for curve in curves for at, level in zip(curve.x, curve.y, strict=True) if at >= start]
    if shown:
        margin = 0.06 * (max(shown) - min(shown)) or 0.05
        axes.set_ylim(min(shown) - margin, max(shown) + 2 * margin)
    if labelled:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right", handlelength=1.4)


def layer_plot(curves: Sequence[Curve], *, title: str, y_label: str, x_label: str = "layer") -> str:
    """A measure by layer (or by position), as `plot` gives it; the axis holds all values, and nought."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, curves, title=title, x_label=x_label, y_label=y_label)
    values = [value for curve in curves for value in curve.y]
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin * (low < 0), high + 2 * margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len({curve.label for curve in curves}) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="best", handlelength=1.4)
    elif (legend := axes.get_legend()) is not None:
        legend.remove()
    return _address(figure)


def position_maps(maps: Sequence[tuple[str, Sequence[Sequence[float]]]], *, title: str, symmetric: bool = False) -> str:
    """Maps over the image's positions side by side on one scale, as `plot` gives it.

    `symmetric` puts nought in the middle of the colours: for angles, which may be of either sign.
    """
    columns = min(6, max(1, len(maps)))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(0.6 + 1.5 * columns, 0.5 + 1.75 * rows), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=_INK)
    flat = [value for _, values in maps for row in values for value in row]
    high = max([abs(value) for value in flat] if symmetric else flat, default=1.0)
    low = -high if symmetric else min(flat, default=0.0)
    image, drawn = None, []
    for place, (name, values) in enumerate(maps):
        axes = figure.add_subplot(rows, columns, place + 1)
        image = axes.imshow(values, cmap="RdBu_r" if symmetric else "viridis", vmin=low, vmax=high)
        axes.set_title(name, fontsize=9, color=_INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        drawn.append(axes)
    if image is not None:
        bar = figure.colorbar(image, ax=drawn, fraction=0.05, shrink=0.8)
        bar.ax.tick_params(colors=_INK, labelsize=8, length=0)
        bar.outline.set_visible(False)
    return _address(figure)
