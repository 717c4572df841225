"""Run folders: they keep their recipe, survive a kill, and say in one line why they cannot be written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arra.errors import ArraError
from arra.runs import Run, atomic_file, atomic_write, file_hash, writing

RECIPE = "name: toy\ntrain:\n  steps: 10\n  lr: 0.001\n"


def make(path: Path, recipe: str = RECIPE, seed: int = 0) -> Run:
    return Run.create(path, recipe, {"seed": seed, "hashes": {"store": "ab"}})


def line_of(error: pytest.ExceptionInfo[ArraError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_new_run_holds_recipe_and_manifest(tmp_path: Path):
    run = make(tmp_path / "runs" / "a")
    assert run.recipe_yaml() == RECIPE
    manifest = run.manifest()
    assert manifest["seed"] == 0
    assert manifest["hashes"] == {"store": "ab"}
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "arra", "git_commit"} <= manifest.keys()
    assert Run.open(run.path) == run


def test_reopening_keeps_what_is_there(tmp_path: Path):
    first = make(tmp_path)
    first.append_metrics({"step": 1})
    kept = first.manifest() | {"torch": "0.0"}
    atomic_write(tmp_path / "manifest.json", json.dumps(kept))
    again = make(tmp_path, "# the same, written differently\n" + RECIPE.replace("0.001", "1.0e-3"))
    assert again.read_metrics() == [{"step": 1}]
    assert again.manifest() == kept
    assert again.recipe_yaml() == RECIPE


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("steps: 10", "steps: 20", "train.steps is 10 in this run, now 20"),
        ("steps: 10", "steps: null", "train.steps is 10 in this run, now None"),
        ("  lr: 0.001\n", "", "train.lr is 0.001 in this run, now absent"),
        ("name: toy", "name: toy\nalign: {layer: 1}", "align is absent in this run, now {'layer': 1}"),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, old: str, new: str, difference: str):
    make(tmp_path)
    with pytest.raises(ArraError) as error:
        make(tmp_path, RECIPE.replace(old, new))
    assert line_of(error) == (f"{tmp_path}: another recipe: {difference}; use another folder or delete this one")


def test_other_inputs_are_refused(tmp_path: Path):
    make(tmp_path)
    with pytest.raises(ArraError, match="another manifest: seed is 0 in this run, now 1; use another folder"):
        make(tmp_path, seed=1)
    with pytest.raises(ArraError, match=r"hashes\.store is 'ab' in this run, now 'cd'"):
        Run.create(tmp_path, RECIPE, {"hashes": {"store": "cd"}})


def test_creation_cut_short_starts_over(tmp_path: Path):
    atomic_write(tmp_path / "manifest.json", "{}")  # killed before the recipe was written
    assert make(tmp_path).manifest()["seed"] == 0


def test_opening_what_is_no_run_lists_the_runs_near(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArraError, match=r"empty: not a run, has no recipe\.yaml; make one with: arra demo"):
        Run.open(tmp_path / "empty")
    make(tmp_path / "runs" / "demo")
    with pytest.raises(ArraError, match=r"dmo: not a run, no such folder; runs there: .*runs/demo$"):
        Run.open(tmp_path / "runs" / "dmo")
    with pytest.raises(ArraError, match=r"has no recipe\.yaml; runs there: .*runs/demo$"):
        Run.open(tmp_path / "runs")


def test_broken_manifest_is_named(tmp_path: Path):
    run = make(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArraError, match=r"manifest\.json: missing or not JSON"):
        run.manifest()


def test_metrics_come_back_in_order(tmp_path: Path):
    run = make(tmp_path)
    assert run.read_metrics() == []
    rows = [{"kind": "train", "step": step, "loss": 1 / (step + 1), "gva_loss": None} for step in range(5)]
    for row in rows:
        run.append_metrics(row)
    assert run.read_metrics() == rows
    run.truncate_metrics(2)
    assert run.read_metrics() == rows[:3]
    run.truncate_metrics(99)
    assert run.read_metrics() == rows[:3]


@pytest.mark.parametrize("torn", ['{"step": 1, "lo', '{"step": 1}', '{"caption": "\u00fc'])
def test_torn_last_line_is_left_out_and_not_grown_onto(tmp_path: Path, torn: str):
    run = make(tmp_path)
    run.append_metrics({"step": 0})
    with run.metrics_path.open("ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("\u00fc") else torn.encode())
    assert run.read_metrics() == [{"step": 0}]
    run.append_metrics({"step": 1})
    assert run.read_metrics() == [{"step": 0}, {"step": 1}]


def test_truncation_drops_a_torn_line(tmp_path: Path):
    run = make(tmp_path)
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    run.truncate_metrics(1)
    assert run.metrics_path.read_text() == '{"step": 1}\n'


def test_broken_line_in_the_middle_is_named(tmp_path: Path):
    run = make(tmp_path)
    run.metrics_path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ArraError, match=r"metrics\.jsonl: line 2 is no JSON object"):
        run.read_metrics()


def test_others_may_read_what_the_user_lets_them(tmp_path: Path):
    """Also where a library makes its files for the owner alone, as safetensors does."""
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "weights") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


def test_atomic_write_replaces_whole_files(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    atomic_write(path, "text ü")
    assert path.read_text(encoding="utf-8") == "text ü"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on device; free some or pass --out elsewhere"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "expected a folder"),
    ],
)
def test_system_errors_become_one_line(number: int, words: str):
    with pytest.raises(ArraError, match=words) as error, writing("runs/demo"):
        raise OSError(number, os.strerror(number))
    assert line_of(error).startswith("runs/demo: ")


def test_other_system_errors_stay_bugs():
    with pytest.raises(OSError, match="Bad file"), writing("runs/demo"):
        raise OSError(errno.EBADF, "Bad file descriptor")


def test_real_full_disk_and_real_file_in_the_way(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArraError, match="expected a folder"):
        make(tmp_path / "file")
    with pytest.raises(ArraError, match="expected a folder"):
        make(tmp_path / "file" / "below")
    with pytest.raises(ArraError, match="is a folder, expected a file"):
        atomic_write(tmp_path, "x")
    if Path("/dev/full").exists():
        run = make(tmp_path / "full")
        run.metrics_path.symlink_to("/dev/full")
        with pytest.raises(ArraError, match="no space left on device"):
            run.append_metrics({"step": 1})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArraError, match="not writable for this user"):
        make(tmp_path / "run")


def test_file_hash_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


HOLDER = """
import sys, time
from arra.runs import Run, atomic_file
run = Run.open(sys.argv[1])
with run.lock(), atomic_file(run.path / "checkpoints" / "step.pt") as temporary:
    temporary.write_text("half")
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_and_a_killed_one_leaves_no_trace(tmp_path: Path):
    run = make(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(ArraError, match=rf"another process \({holder.pid}\) trains in this run; wait for it"),
            run.lock(),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert list((tmp_path / "checkpoints").iterdir())
    with run.lock():
        assert not list((tmp_path / "checkpoints").iterdir())
    with run.lock():  # given back at the end of the block
        pass


WRITER = """
import sys
from arra.runs import Run
run = Run.open(sys.argv[1])
step = len(run.read_metrics())
while True:
    run.append_metrics({"step": step, "text": "x" * 500})
    step += 1
"""


def test_metrics_survive_kill_9(tmp_path: Path):
    run = make(tmp_path)
    for _ in range(3):
        known = len(run.read_metrics())
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) as writer:
            deadline = time.monotonic() + 30
            while len(run.read_metrics()) < known + 20 and time.monotonic() < deadline:
                time.sleep(0.01)
            writer.kill()
        rows = run.read_metrics()
        assert len(rows) >= known + 20
        assert [row["step"] for row in rows] == list(range(len(rows)))


def test_a_recipe_may_differ_in_what_is_free_and_is_taken_by_who_trains(tmp_path: Path):
    """A start that goes no further, because another one holds the run, changes nothing."""
    first = "name: toy\ntrain:\n  steps: 5\n  parallel:\n    kind: ddp\n"
    other = first.replace("ddp", "fsdp")
    Run.create(tmp_path, first, {})
    again = Run.create(tmp_path, other, {}, free=("train.parallel",))
    assert again.recipe_yaml() == first
    again.take_recipe(other)
    assert again.recipe_yaml() == other
    with pytest.raises(ArraError, match=r"another recipe: train\.steps is 5 in this run, now 6"):
        Run.create(tmp_path, first.replace("5", "6"), {}, free=("train.parallel",))
    with pytest.raises(ArraError, match=r"another recipe: train\.parallel\.kind is 'fsdp' in this run, now 'ddp'"):
        Run.create(tmp_path, first, {})
