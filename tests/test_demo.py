"""The demo: killed and run again it ends in the same weights; its options mean what they say."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import arra.demo
import arra.stages.tasks
from arra.data.store import Store
from arra.demo import (
    ALIGNED,
    BASELINE,
    DemoOptions,
    budget,
    plan_tasks,
    recipe_overrides,
    refuse_other_options,
    run_demo,
    store_overrides,
)
from arra.display import Display
from arra.errors import ArraError
from arra.runs import Run, file_hash
from arra.stages.tasks import Task

WEIGHTS = ("model.safetensors", "model.json", "tokenizer.json")
PATIENCE_SECONDS = 240.0
"""For a demo on a busy machine; it needs about ten."""


def command(pipeline: Any, settings: tuple[str, ...], out: Path) -> list[str]:
    """The demo that ends in the weights of the toy pipeline."""
    chosen = [part for text in settings for part in ("--set", text)]
    return [sys.executable, "-m", "arra", "demo", "--data", str(pipeline.pictures), "--out", str(out), *chosen]


def newest_step(run: Path) -> int:
    rows = Run(run).read_metrics()
    return max((row["step"] for row in rows), default=0)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, ppid in map(str.split, listed.splitlines()) if int(ppid) == parent]


def is_alive(pid: int) -> bool:
    return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def start(pipeline, toy_settings, toy_copy, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the toy demo in the copy's folder as a session of its own; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(pipeline, toy_settings, toy_copy.store.parent),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_a_killed_demo_that_runs_again_ends_in_the_same_weights(pipeline, start, toy_copy):
    """With the baseline trained before; trainings that are killed themselves are told of in tests/whole/test_faults."""
    out = toy_copy.store.parent
    for folder in (toy_copy.store, toy_copy.aligned):
        shutil.rmtree(folder)
    # the demo alone dies; its trainings notice, save and leave
    process = start()
    wait_for(lambda: newest_step(out / ALIGNED) >= 10, process)
    trainings = descendants(process.pid)
    process.kill()
    process.communicate()
    assert trainings
    assert not (out / ALIGNED / "model.json").exists()
    # run again at once: it waits for them and continues
    process = start()
    text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, text
    assert not any(is_alive(pid) for pid in trainings)
    assert "arra generate" in text.splitlines()[-1]
    for row in (BASELINE, ALIGNED):
        for name in WEIGHTS:
            assert file_hash(out / row / name) == file_hash(getattr(pipeline, row) / name)
        assert newest_step(out / row) == 40
        steps = [line["step"] for line in Run(out / row).read_metrics() if line["kind"] == "train"]
        assert steps == list(range(1, 41))
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".log", ".part")]
    again(pipeline, out)


def again(pipeline: Any, out: Path) -> None:
    """Running a finished demo again, from elsewhere, changes no file."""
    kept = json.loads((out / "demo.json").read_text())
    options = DemoOptions(**{**kept, "overrides": tuple(kept["overrides"])})
    before = hashes(out)
    printed = io.StringIO()
    page = run_demo(options, out, console=Console(file=printed, width=80))
    assert page == out / "report.html"
    assert hashes(out) == before
    lines = printed.getvalue().splitlines()
    assert any(line.startswith("aligned against baseline") for line in lines)
    assert all(len(line) <= 80 for line in lines if not line.startswith(("report", "try next", "pictures")))
    assert "…" not in printed.getvalue()
    moved = out.with_name("moved demo")
    shutil.move(out, moved)
    run_demo(options, moved, console=Console(file=printed, width=80))
    assert hashes(moved) == before
    assert f"try next  arra generate '{moved}/aligned'" in printed.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_a_training_says_is_passed_on(pipeline, toy_settings, toy_copy, run_arra: Callable[..., Any]):
    out = toy_copy.store.parent
    shutil.rmtree(out / ALIGNED / "checkpoints")
    (out / ALIGNED / "checkpoints").write_text("in the way")
    (out / ALIGNED / "model.json").unlink()
    error = run_arra(*command(pipeline, toy_settings, out)[3:]).error
    assert error.startswith(f"{out}/aligned/checkpoints/tokenizer.json: ")
    assert not list(out.glob(".*.log"))


def tasks_of(options: DemoOptions, *overrides: str) -> list[Task]:
    return list(plan_tasks(options, Path("out"), (*recipe_overrides(options), *overrides, *options.overrides)))


def test_rows_differ_in_the_alignment_alone():
    baseline, aligned, shuffled = tasks_of(DemoOptions(shuffled=True))
    assert [task.folder for task in (baseline, aligned, shuffled)] == [
        Path("out") / t.row for t in (baseline, aligned, shuffled)
    ]
    for other in (aligned, shuffled):
        assert other.recipe.model_dump(exclude={"row", "align"}) == baseline.recipe.model_dump(exclude={"row", "align"})
    assert baseline.recipe.align is None
    assert aligned.recipe.align is not None
    assert shuffled.recipe.align == aligned.recipe.align.model_copy(update={"shuffle_targets": True})


def test_a_key_of_the_alignment_leaves_the_baseline_without():
    baseline, aligned = tasks_of(DemoOptions(overrides=("align.weight=0.5", "align={weight: 0.5, layer: 2}")))
    assert baseline.recipe.align is None
    assert aligned.recipe.align is not None
    assert (aligned.recipe.align.weight, aligned.recipe.align.layer) == (0.5, 2)


def test_training_seeds_count_up_from_the_recipes():
    tasks = tasks_of(DemoOptions(seeds=2, overrides=("train.seed=5",)))
    assert [(t.row, t.seed, str(t.folder), t.label) for t in tasks] == [
        ("baseline", 5, "out/seed-5/baseline", "baseline 5"),
        ("aligned", 5, "out/seed-5/aligned", "aligned 5"),
        ("baseline", 6, "out/seed-6/baseline", "baseline 6"),
        ("aligned", 6, "out/seed-6/aligned", "aligned 6"),
    ]
    assert [(t.recipe.train.seed, t.recipe.model.seed) for t in tasks] == [(5, 0), (5, 0), (6, 1), (6, 1)]


def test_what_the_user_sets_wins_over_what_options_derive():
    fresh = DemoOptions(fresh_tokenizer=True, overrides=("tokenizer.train.steps=20", "tokenizer.network.channels=64"))
    section = tasks_of(fresh)[0].recipe.tokenizer
    assert section.train is not None
    assert section.network is not None
    assert (section.train.steps, section.network.channels) == (20, 64)
    assert section.train.batch_size == 16  # the rest is the tokenizer recipe's
    data = DemoOptions(data="/pictures", overrides=("tokenizer.train.steps=20", "train.steps=7"))
    recipe = tasks_of(data, "train.steps=900")[0].recipe
    assert recipe.tokenizer.train is not None
    assert (recipe.tokenizer.train.steps, recipe.train.steps, recipe.data.path) == (20, 7, "/pictures")


def test_a_folder_called_demo_is_not_taken_for_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "tokenizer"):
        (tmp_path / name).mkdir()
    assert tasks_of(DemoOptions(fresh_tokenizer=True))[1].recipe.name == "demo"


def test_own_pictures_get_their_splits_and_room_for_their_captions(pipeline):
    options, store = DemoOptions(data=str(pipeline.pictures)), Store.open(pipeline.store)
    recipe = tasks_of(options, "model.prefix_length=2", "model.text_vocab_size=300")[0].recipe
    splits, length = store_overrides(options, recipe, store)
    assert splits == 'evaluate.splits=["heldout"]'
    longest = int(length.removeprefix("model.prefix_length="))
    assert 3 < longest <= 8
    roomy = tasks_of(options, f"model.prefix_length={longest}", "model.text_vocab_size=300")[0].recipe
    assert list(store_overrides(options, roomy, store)) == [splits]
    assert list(store_overrides(DemoOptions(), recipe, store)) == []


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (DemoOptions(), DemoOptions(), None),
        (DemoOptions(), DemoOptions(shuffled=True), None),  # one run more
        (DemoOptions(seeds=2), DemoOptions(seeds=3), None),
        (DemoOptions(seeds=1), DemoOptions(seeds=2), "started with --seeds 1, now 2"),
        (DemoOptions(shuffled=True), DemoOptions(), "started with --shuffled given, now not given"),
        (DemoOptions(minutes=4.0), DemoOptions(), "started with --minutes 4.0, now nothing"),
        (DemoOptions(), DemoOptions(data="/a"), "started with --data nothing, now /a"),
        (DemoOptions(), DemoOptions(fresh_tokenizer=True), "started with --fresh-tokenizer not given, now given"),
        (DemoOptions(overrides=("train.steps=3",)), DemoOptions(), "started with --set train.steps=3, now nothing"),
    ],
)
def test_a_folder_keeps_the_options_of_its_runs(
    tmp_path: Path, before: DemoOptions, now: DemoOptions, message: str | None
):
    (tmp_path / "demo.json").write_text(json.dumps(vars(before)))
    refuse_other_options(now, tmp_path)  # no run yet, so nothing is bound
    (tmp_path / "seed-0" / "aligned").mkdir(parents=True)
    (tmp_path / "seed-0" / "aligned" / "recipe.yaml").write_text("")
    if message is None:
        refuse_other_options(now, tmp_path)
        return
    with pytest.raises(ArraError) as error:
        refuse_other_options(now, tmp_path)
    assert str(error.value) == f"{tmp_path}: {message}; use another folder (--out) or delete this one"


def test_minutes_become_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    probed = []

    def pretend(tasks: list[Task], store: Path, display: Display) -> None:
        probed.append([(task.row, task.recipe.train.steps) for task in tasks])
        for task in tasks:
            Run(task.folder).path.mkdir(parents=True)
            Run(task.folder).append_metrics({"kind": "train", "step": 20, "seconds": 2.0})

    monkeypatch.setattr(arra.demo, "train_tasks", pretend)
    monkeypatch.setattr(arra.stages.tasks, "num_parallel", lambda: 2)
    display = Display(Console(file=io.StringIO()))

    def steps(options: DemoOptions) -> list[str]:
        return list(budget(options, [], tmp_path, display))

    assert steps(DemoOptions()) == []
    assert steps(DemoOptions(minutes=4.0, overrides=("train.steps=30",))) == []
    assert steps(DemoOptions(minutes=4.0)) == ["train.steps=900"]  # (240 - 150) s at 0.1 s a step
    assert steps(DemoOptions(minutes=4.0)) == ["train.steps=900"]
    assert steps(DemoOptions(minutes=4.0, seeds=2)) == ["train.steps=900"]  # kept: measured once
    assert probed == [[("baseline", 20), ("aligned", 20)]]
    assert not (tmp_path / "probe").exists()
    assert steps(DemoOptions(minutes=14.0, seeds=2)) == ["train.steps=3450"]  # two rounds of two
    with pytest.raises(ArraError, match=r"^--minutes 2: leaves 0 steps .*; give at least 4 minutes$"):
        steps(DemoOptions(minutes=2.0))


def test_progress_without_a_terminal_says_a_thing_once():
    printed = io.StringIO()
    with Display(Console(file=printed)) as display:
        for _ in range(3):
            display.show("[a]", "training", 10, 10, "loss 1")
            display.show("data", "reading", 0, 1)
    assert printed.getvalue().splitlines() == ["[a]: training 10/10  loss 1", "data: reading"]
