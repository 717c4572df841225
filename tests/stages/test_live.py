"""The page of a run so far, from the files of its folder; the line beside its progress."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arra.config import dump_recipe, load_recipe
from arra.errors import ArraError
from arra.report.grids import png_bytes, strip
from arra.runs import Run
from arra.stages.live import NUM_PREVIEWS, live_page, training_note
from tests.conftest import Answer

REFRESH = 'http-equiv="refresh"'


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "images": step, "seconds": step, "loss": 3.0, "ntp_loss": 2.5} | changes


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = load_recipe("demo", row="aligned", overrides=["train.steps=20"])
    made = Run.create(tmp_path / "toy", dump_recipe(recipe), {"seed": 0})
    for step in (1, 2, 3):
        made.append_metrics(row(step))
    return made


def test_a_run_on_its_way(run: Run) -> None:
    for step in range(1, NUM_PREVIEWS + 3):
        path = run.path / "previews" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png_bytes(strip(np.full((1, 4, 4, 3), step, np.uint8))))
    for step in (2, 3):
        (run.path / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
        (run.path / "checkpoints" / f"step-{step:07d}" / "checkpoint.json").write_text("{}")
    (run.path / "checkpoints" / ".step-0000004.host-1.tmp").mkdir()
    run.append_metrics({"kind": "validation", "step": 3, "seconds": 3, "ntp_loss": 2.25})
    page = live_page(run.path)
    assert page == run.path / "report.html"
    html = page.read_text()
    assert REFRESH in html
    assert "Step 3 of 20 (15 %), about 17 s of training left." in html
    assert "step 2, 3 (2.25)" in html
    shown = [step for step in range(1, NUM_PREVIEWS + 3) if f"painted at step {step}" in html]
    assert shown == list(range(3, NUM_PREVIEWS + 3))
    assert "name: demo" in html
    run.append_metrics(row(20))
    assert "Step 20 of 20" in live_page(run.path).read_text()  # not finished before its model is saved
    for name in ("model.safetensors", "model.json"):
        (run.path / name).write_text("{}")
    finished = live_page(run.path).read_text()
    assert "Finished: 20 steps" in finished
    assert REFRESH not in finished


def test_files_that_are_damaged_are_left_out(run: Run) -> None:
    (run.path / "trouble").mkdir()
    for name, text in (("a", "{"), ("b", "[1]"), ("c", json.dumps({"step": 41, "reason": "spike"}))):
        (run.path / "trouble" / f"{name}.json").write_text(text)
    with run.metrics_path.open("a") as file:
        file.write('{"kind": "train", "st')  # a process was killed in it
    html = live_page(run.path).read_text()
    assert "1 step whose update was not made" in html
    assert "the loss jumped" in html


def test_the_page_is_whole_at_every_moment(run: Run) -> None:
    stop, found = threading.Event(), list[bool]()
    page = live_page(run.path)

    def read() -> None:
        while not stop.is_set():
            found.append(page.read_text().endswith("</html>"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        live_page(run.path)
    stop.set()
    reader.join()
    assert all(found)
    assert not list(run.path.glob(".*.tmp"))


def test_report_of_a_run_that_is_not_evaluated_is_its_page(
    run: Run, tmp_path: Path, run_arra: Callable[..., Answer]
) -> None:
    out = tmp_path / "out"
    assert run_arra("report", run.path, "--out", out).out.strip() == str(out / "report.html")
    assert "Step 3 of 20" in (out / "report.html").read_text()
    told = run_arra("report", run.path, run.path, "--out", out).error  # several must be evaluated, as ever
    assert "Step" not in told
    with pytest.raises(ArraError, match="not a run"):
        live_page(tmp_path / "nothing")


def test_a_page_that_cannot_be_written_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArraError, match=r"file/report.html: .*--out elsewhere"):
        live_page(run.path, out=tmp_path / "file")


def test_the_note_says_what_there_is() -> None:
    measured = {"tokens_per_second": 123456.7, "mfu": 0.412, "peak_memory_gib": 12.34, "waiting_share": 0.021}
    whole = row(3, gva_loss=0.4123, **measured)
    assert training_note(whole) == "ntp 2.500, gva 0.412, 123,457 tokens/s, MFU 41%, 12.3 GiB, waiting 2%"
    assert training_note(row(3, gva_loss=None)) == "ntp 2.500"
    assert training_note({"kind": "validation", "ntp_loss": 2.5}) == "validation 2.500"
    assert training_note({"kind": "validation", "ntp_loss": 2.5, "text_loss": 3.0}) == "validation 2.500, text 3.000"
