"""Bands hold the seeds of a row, and time counts its teachers."""

from typing import Any

import pytest

from arra.report.bands import MOST_BAND_POINTS, SeedRun, band_drawings, band_series
from arra.report.drawing import DASHES, Series, draw, drawn
from arra.report.style import ACCENTS


def run(label: str, values: dict[int, float], *, pace: float = 1.0, teacher: float | None = None) -> SeedRun:
    rows: list[dict[str, Any]] = [
        {"kind": "validation", "step": step, "seconds": pace * step, "ntp_loss": value}
        for step, value in values.items()
    ]
    return SeedRun(label=label, metrics=rows, teacher_seconds=teacher)


def series(*runs: SeedRun, **changes: Any) -> list[Series]:
    places = {label: place for place, label in enumerate(dict.fromkeys(run.label for run in runs))}
    asked: dict[str, Any] = {"kind": "validation", "key": "ntp_loss", "axis": "step", "places": places}
    return band_series(runs, **{**asked, **changes})


def test_a_band_reaches_from_the_lowest_to_the_highest_seed() -> None:
    first, second = series(run("a", {0: 3, 10: 2.0}), run("b", {0: 5.0}), run("a", {0: 4, 10: 1.0}))
    assert (first.label, first.points, first.band) == ("a", [(0, 3.5), (10, 1.5)], [(0, 3, 4), (10, 1, 2)])
    assert (second.place, second.points, second.band) == (1, [(0, 5)], ())  # one seed has no band


def test_a_point_stands_where_all_seeds_of_a_row_were_measured() -> None:
    (one,) = series(run("a", {0: 3.0, 10: 2.0, 20: 1.0}), run("a", {0: 3.0, 20: float("nan"), 10: 4.0}), run("a", {}))
    assert one.points == [(0, 3), (10, 3)]


def test_time_is_the_mean_over_seeds_after_the_teachers_pass() -> None:
    runs = [run("a", {0: 3.0, 10: 2.0}, pace=pace, teacher=100.0) for pace in (1.0, 2.0)]
    (one,) = series(*runs, axis="seconds")
    assert [x for x, _ in one.points] == [100, 115]
    assert [x for x, _, _ in one.band] == [100, 115]
    (by_step,) = series(*runs)
    assert [x for x, _ in by_step.points] == [0, 10]


def test_painted_pictures_are_at_the_time_of_their_step() -> None:
    rows = [{"kind": "train", "step": 40, "seconds": 80.0}, {"kind": "quality", "step": 20, "frechet": 60.0}]
    (one,) = series(SeedRun(label="a", metrics=rows), kind="quality", key="frechet", axis="seconds")
    assert one.points == [(40, 60)]


def test_long_curves_keep_their_last_point() -> None:
    (one,) = series(run("a", {step: 1.0 for step in range(1000)}))
    assert len(one.points) <= MOST_BAND_POINTS
    assert one.points[-1][0] == 999


@pytest.mark.parametrize(("end", "axis"), [(200.0, "seconds"), (301.0, "minutes"), (7201.0, "hours")])
def test_time_has_a_fitting_unit(end: float, axis: str) -> None:
    step, time = band_drawings([run("a", {0: 2.0, 1: 1.0}, pace=end)], places={"a": 0})
    assert (step.x_label, time.x_label, time.title) == ("step", axis, f"Validation NLL by time, {axis}")


def test_one_distance_and_the_widest_retrieval_are_drawn() -> None:
    rows = [
        {"kind": "quality", "step": 1, "frechet": 1.0, "kid_x1000": 2.0, "retrieval_at_1": 0.1, "retrieval_at_10": 1.0}
    ]
    drawings = band_drawings([SeedRun(label="a", metrics=rows)], places={"a": 0})
    assert [one.title for one in drawings if one.x_label == "step"] == [
        "Fréchet distance by step", "Retrieval, top ten by step"
    ]  # fmt: skip


def test_bands_fit_into_their_drawing_and_colours_repeat_dashed() -> None:
    runs = [
        Series(label="a", points=[(0.0, 1.0), (1.0, 1.0)], band=[(0.0, 0.0, 3.0), (1.0, 0.0, 3.0)], place=len(ACCENTS))
    ]
    (one,) = drawn("x", runs)
    (line,) = one.lines
    assert (line.color, line.dash) == (0, DASHES[1])
    heights = [float(place.split(",")[1]) for place in line.band.split()]
    assert max(heights) < 238
    assert min(heights) > 12
    assert f'stroke-dasharray="{DASHES[1]}"' in draw(one)
    assert "<polygon" in draw(one)
