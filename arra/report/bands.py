"""Curves over several training seeds: the mean, and a band from the lowest to the highest of them.

Place in the pipeline: reads the rows of `metrics.jsonl`; the pages of several runs draw what comes back. Two horizontal
axes: the step, and the time of training, to which a row's teachers' pass over the training pictures is added (its
projectors and losses are part of the training steps already). A point stands where all seeds of a row were measured;
its time is their mean.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from arra.report.drawing import Drawing, Series, drawn, is_finite
from arra.report.measure_words import measure_name

MOST_BAND_POINTS = 60
"""Of a curve: pages hold many; of more, every n-th is drawn, and the last."""
BAND_MEANING = "Lines are means over training seeds; bands reach from the lowest to the highest seed."
TEACHER_MEANING = (
    "Where the time is the horizontal axis, what a row's teachers take for one pass over the training pictures stands "
    "before its first step."
)

Axis = Literal["step", "seconds"]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One training, of a row that others may be seeds of."""

    label: str
    """What the row is called."""
    metrics: Sequence[Row]
    """Rows of metrics.jsonl."""
    teacher_seconds: float | None = None
    """None: without a teacher, or unknown."""


def band_drawings(runs: Sequence[SeedRun], *, places: Mapping[str, int]) -> list[Drawing]:
    """Validation loss and the quality of painted pictures against steps and time; without rows of a kind, none of it.

    `places` gives each label its colour.
    """
    found: list[Drawing] = []
    wanted = [("validation", "ntp_loss", "Validation NLL", "nats per token")]
    wanted += [("quality", key, measure_name(key), "of pictures painted on the way") for key in _quality_columns(runs)]
    for kind, key, title, unit in wanted:
        for axis in ("step", "seconds"):
            found += _drawings(runs, kind, key, axis, title=title, unit=unit, places=places)
    return found


def band_series(runs: Sequence[SeedRun], *, kind: str, key: str, axis: Axis, places: Mapping[str, int]) -> list[Series]:
    """A curve for each label that has column `key` in rows of this kind; time is in seconds."""
    found = []
    for label in dict.fromkeys(run.label for run in runs):
        curves = [_points(run, kind, key) for run in runs if run.label == label]
        curves = [one for one in curves if one]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(one) for one in curves)))
        stride = -(-len(steps) // MOST_BAND_POINTS)
        steps = steps[::-1][:: max(1, stride)][::-1]
        at = {step: float(step) if axis == "step" else fmean(one[step][0] for one in curves) for step in steps}
        values = {step: [one[step][1] for one in curves] for step in steps}
        found.append(
            Series(
                label=label,
                points=[(at[step], fmean(values[step])) for step in steps],
                band=[(at[step], min(values[step]), max(values[step])) for step in steps] if len(curves) > 1 else (),
                place=places[label],
            )
        )
    return found


def _drawings(
    runs: Sequence[SeedRun],
    kind: str,
    key: str,
    axis: Axis,
    *,
    title: str,
    unit: str,
    places: Mapping[str, int],
) -> Iterator[Drawing]:
    series = band_series(runs, kind=kind, key=key, axis=axis, places=places)
    x_label = "step"
    if axis == "seconds":
        longest = max((x for one in series for x, _ in one.points), default=0.0)
        x_label, size = next(
            (name, size)
            for name, size, least in (("hours", 3600.0, 7200.0), ("minutes", 60.0, 300.0), ("seconds", 1.0, -1.0))
            if longest > least
        )
        series = [_rescaled(one, size) for one in series]
    where = "by step" if axis == "step" else f"by time, {x_label}"
    yield from drawn(f"{title} {where}", series, unit=unit, x_label=x_label, skips_start=True)


def _points(run: SeedRun, kind: str, key: str) -> dict[int, tuple[float, float]]:
    """Time with the teachers' pass, and value, by step."""
    clock = {0: 0.0} | {int(row["step"]): float(row["seconds"]) for row in run.metrics if "seconds" in row}
    steps = sorted(clock)
    rows = [row for row in run.metrics if row.get("kind") == kind and is_finite(row.get(key))]
    # rows of painted pictures do not say when they were: steps before and after them do
    at = np.interp([int(row["step"]) for row in rows], steps, [clock[step] for step in steps])
    at = at + (run.teacher_seconds or 0.0)
    return {int(row["step"]): (float(when), float(row[key])) for row, when in zip(rows, at, strict=True)}


def _quality_columns(runs: Sequence[SeedRun]) -> list[str]:
    """The first distance and the last retrieval, which is the one of the most neighbours."""
    rows = [row for run in runs for row in run.metrics if row.get("kind") == "quality"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("kind", "step", "seconds")))
    retrievals = [key for key in columns if "retrieval" in key]
    return [key for key in columns if key not in retrievals][:1] + retrievals[-1:]


def _rescaled(one: Series, size: float) -> Series:
    return Series(
        label=one.label,
        points=[(x / size, y) for x, y in one.points],
        band=[(x / size, low, high) for x, low, high in one.band],
        place=one.place,
    )
