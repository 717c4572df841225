"""Curves come from the rows as they are, and drawing leaves matplotlib's global state alone."""

import base64
import subprocess
import sys

import pytest

from arra.report.plots import plot, running_mean, training_curves, validation_curves

COLORS = {"baseline": "#3d7ec7", "aligned": "#d9622b"}
ROWS = [
    {"kind": "train", "step": 1, "seconds": 0.5, "ntp_loss": 4.0, "gva_loss": None},
    {"kind": "validation", "step": 1, "seconds": 0.5, "ntp_loss": 3.5},
    {"kind": "train", "step": 2, "seconds": 1.0, "ntp_loss": 2.0, "gva_loss": 0.9},
]


def test_curves_are_the_rows() -> None:
    validation = validation_curves([("baseline", ROWS), ("aligned", [])], colors=COLORS, x="seconds")
    assert [(one.label, one.x, one.y) for one in validation] == [("baseline", (0.5,), (3.5,))]
    (training,) = training_curves([("baseline", ROWS)], colors=COLORS, y="ntp_loss")
    assert (training.x, training.y) == ((1.0, 2.0), (4.0, 2.0))
    (alignment,) = training_curves([("baseline", ROWS)], colors=COLORS, y="gva_loss")
    assert alignment.y == (0.9,)


def test_running_mean_looks_back_only() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0], window=1) == [1, 2, 3, 4]
    assert running_mean([1.0, 2.0, 3.0, 4.0], window=2) == pytest.approx([1, 1.5, 2.5, 3.5])
    assert running_mean([1.0, 2.0, 3.0], window=9) == pytest.approx([1, 1.5, 2])


def test_a_plot_is_an_svg_that_takes_the_colour_of_the_page() -> None:
    curves = validation_curves([("baseline", ROWS)], colors=COLORS, x="step")
    address = plot(curves, title="NLL", x_label="step", y_label="nats")
    svg = base64.b64decode(address.removeprefix("data:image/svg+xml;base64,")).decode()
    assert "prefers-color-scheme" in svg
    assert "currentColor" in svg
    assert COLORS["baseline"] in svg


def test_plots_leave_pyplot_alone() -> None:
    code = "import sys; import arra.report.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)  # here other libraries may have loaded it
