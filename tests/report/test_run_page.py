"""The page of a training says where it is, draws what was logged, loads nothing, and trusts no text."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arra.report.drawing import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, thinned, ticks
from arra.report.grids import png_bytes, strip
from arra.report.run_page import RunSoFar, run_page, seconds_left, where_it_is

EVIL = "<script>alert('x')</script> \"quoted\" & <img src=https://example.org/x.png>"


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "train", "step": step, "images": 8 * step, "seconds": 2.0 * step, "loss": 4.0, "ntp_loss": 5 / step,
        "gva_loss": 0.5, "z_loss": 1.0, "lr": 0.002, "grad_norm": 1.5, "tokens_per_second": 1234.5,
        "images_per_second": 12.0, "mfu": 0.41, "waiting_share": 0.02, "peak_memory_gib": 2.5,
    }  # fmt: skip
    return row | changes


def rows(count: int = 10) -> list[dict[str, Any]]:
    found = [train_row(step) for step in range(1, count + 1)]
    found += [{"kind": "validation", "step": step, "ntp_loss": 1 + 1 / step} for step in (5, 10)]
    found += [{"kind": "quality", "step": 5, "frechet": 60.0, "retrieval_at_1": 0.25}]
    watched = {"kind": "watch", "encoder": "teacher", "positions": {"cka": [0.1]}}
    found += [{**watched, "step": step, "layer": layer, "cka": 0.1 * layer} for step in (5, 10) for layer in range(3)]
    return found


def so_far(**changes: Any) -> RunSoFar:
    fields: dict[str, Any] = {"name": "runs/toy", "rows": rows(), "steps": 40, "is_finished": False}
    return RunSoFar(**{**fields, **changes})


class Page(HTMLParser):
    """Start tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html.partition("</style>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def drawings(self) -> dict[str, list[list[tuple[float, float]]]]:
        """Places of the points of every line, by what the drawing is of."""
        found: dict[str, list[list[tuple[float, float]]]] = {}
        for tag, values in self.tags:
            if tag == "svg" and "aria-label" in values:
                last = found.setdefault(values["aria-label"], [])
            if tag == "polyline":
                x_y = [point.split(",") for point in values["points"].split()]
                last.append([(float(x), float(y)) for x, y in x_y])
        return found


def test_the_page_loads_nothing_and_trusts_no_text() -> None:
    trouble = {"step": EVIL, "reason": EVIL, "records": [EVIL], "began": EVIL}
    html = run_page(
        so_far(
            name=EVIL, recipe=EVIL, manifest={EVIL: EVIL}, troubles=[trouble], attribution=EVIL,
            rows=[train_row(1, **{f"gva_loss.{EVIL}": 0.5}), {"kind": "quality", "step": 1, EVIL: 1.0}],
        )
    )  # fmt: skip
    for tag, values in Page(html).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in values.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith("data:image/")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert "<script" not in html


def test_it_loads_itself_until_the_run_is_finished() -> None:
    refresh = '<meta http-equiv="refresh" content="30">'
    assert refresh in run_page(so_far())
    finished = run_page(so_far(is_finished=True, steps=10))
    assert refresh not in finished
    text = Page(finished).text
    assert "Finished: 10 steps, 20 s of training." in text
    assert "come with arra evaluate runs/toy" in text


def test_it_says_where_a_training_is() -> None:
    assert where_it_is(rows(), 40, is_finished=False) == "Step 10 of 40 (25 %), about 1 min 0 s of training left."
    assert where_it_is(rows(), None, is_finished=False) == "Step 10."
    assert where_it_is([], 40, is_finished=False) == "No step is logged yet."


def test_time_left_follows_the_last_rows() -> None:
    slow_start = [train_row(1, seconds=100.0), *(train_row(step, seconds=100.0 + step) for step in range(2, 60))]
    assert seconds_left(slow_start, 159) == pytest.approx(100)
    assert seconds_left([train_row(1)], 40) is None


def test_facts_are_those_of_the_last_row() -> None:
    text = Page(run_page(so_far(written_at="today", checkpoints=[(5, 1.2), (10, None)]))).text
    for told in (
        "Next-token loss 0.5 nats per token",
        "Validation 1.1 nats per token; lowest 1.1 at step 10",
        "Speed 1,234 tokens/s, 12.0 pictures/s",
        "Use 41.0 % of the peak (MFU), 2.0 % of the time waiting for data",
        "Memory 2.50 GiB at most",
        "Seen 80 pictures in 20 s",
        "Last news today",
        "Checkpoints step 5 (1.2), 10",
    ):
        assert told in text


def test_every_column_that_was_logged_is_drawn() -> None:
    drawings = Page(run_page(so_far())).drawings
    assert {name: len(lines) for name, lines in drawings.items()} == {
        "Next token, by step": 2, "Alignment, by step": 1, "Whole loss, by step": 1, "Learning rate, by step": 1,
        "Gradient norm, by step": 1, "Speed, by step": 1, "Use of the device, by step": 2, "Frechet, by step": 1,
        "Retrieval at 1, by step": 1, "CKA of states and 'teacher', by layer, by layer": 1,
    }  # fmt: skip
    points = [point for lines in drawings.values() for line in lines for point in line]
    assert min(x for x, _ in points) == LEFT
    assert max(x for x, _ in points) == RIGHT
    (training, _) = drawings["Next token, by step"]
    assert training[0][1] < TOP  # the first steps are left to run out of the field
    assert all(TOP <= y <= BOTTOM for x, y in training[2:])
    assert [y for _, y in training[2:]] == sorted(y for _, y in training[2:])  # it falls, and down is a larger y
    (cka,) = drawings["CKA of states and 'teacher', by layer, by layer"]
    assert len(cka) == 3


def test_a_run_without_alignment_or_meters_draws_what_there_is() -> None:
    old = {"kind": "train", "step": 3, "images": 24, "seconds": 6.0, "loss": 2.0, "ntp_loss": 2.0, "gva_loss": None}
    assert list(Page(run_page(so_far(rows=[old]))).drawings) == ["Next token, by step"]
    assert Page(run_page(so_far(rows=[]))).drawings == {}


def test_numbers_that_are_none_leave_gaps_and_no_traces() -> None:
    broken = [*rows(), train_row(11, ntp_loss=float("nan"), grad_norm=float("inf"))]
    html = run_page(so_far(rows=broken))
    assert len(Page(html).drawings["Next token, by step"][0]) == 10
    assert not re.search(r'points="[^"]*(nan|inf)', html)


def test_trouble_is_told_in_words_whatever_there_is_of_it() -> None:
    whole = {
        "step": 7, "position": 9, "reason": "nonfinite", "action": "rewind", "losses": {"loss": "nan"},
        "grad_norm": 12.5, "began": "first non-finite states after block 3", "records": [f"r{i}" for i in range(10)],
    }  # fmt: skip
    text = Page(run_page(so_far(troubles=[{"step": 2}, whole]))).text
    assert "2 steps whose update was not made" in text
    assert (
        "7 9 not finite went back to a checkpoint loss nan; gradient norm 12.5; first non-finite states after block 3; "
        "records r0, r1, r2, r3, r4, r5, r6, r7 and 2 more 2 ? unknown"
    ) in text


def test_previews_come_newest_first_and_large_ones_are_made_small() -> None:
    small = png_bytes(strip(np.zeros((2, 8, 8, 3), np.uint8)))
    noise = np.random.default_rng(0).integers(0, 255, (200, 3200, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=1)
    large = buffer.getvalue()
    page = Page(run_page(so_far(previews=[(100, small), (1200, large)])))
    shown = [values for tag, values in page.tags if tag == "img"]
    assert [values["alt"] for values in shown] == ["pictures painted at step 1200", "pictures painted at step 100"]
    assert base64.b64decode(shown[1]["src"].partition("base64,")[2]) == small
    made = Image.open(io.BytesIO(base64.b64decode(shown[0]["src"].partition("base64,")[2])))
    assert made.width == 1600
    assert len(shown[0]["src"]) < len(large) / 4


def test_thinned_curves_keep_their_means_and_their_end() -> None:
    points = [(float(step), math.sin(step)) for step in range(1, 1002)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert few[-1][0] == 1001
    assert few[0][0] == 4.0
    assert few[0][1] == pytest.approx(sum(y for _, y in points[:4]) / 4)
    assert thinned(points[:10]) == points[:10]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.1, 0.1, ["−0.10", "−0.05", "0.00", "0.05", "0.10"]),
        (0.0, 25000.0, ["0", "5,000", "10,000", "15,000", "20,000", "25,000"]),
        (0.0, 2e-5, ["0", "5e-06", "1e-05", "1.5e-05", "2e-05"]),
    ],
)
def test_ticks_are_round(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in ticks(low, high, most=6)] == texts


def test_a_constant_is_a_line_in_the_middle() -> None:
    (line,) = Page(run_page(so_far())).drawings["Learning rate, by step"]
    assert {y for _, y in line} == {(TOP + BOTTOM) / 2}
