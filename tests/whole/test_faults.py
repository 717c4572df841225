"""Whatever ends a training, running it again ends in the weights of the undisturbed one, bit for bit.

Trainings are processes of their own, forked from one that has imported everything.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train import toy_training
from tests.train.toy_training import STEPS, TOLD, different, make_trainer, rows_of, state_of, trained

OPTIONS: dict[str, Any] = {"checkpoint_every_steps": 3, "keep_checkpoints": 2, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., int]]:
    """Trains in a folder, in a process of its own, and gives its exit code, negative for a signal."""
    command = [sys.executable, str(Path(toy_training.__file__)), "serve"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, text=True, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asking, answers = server.stdin, server.stdout

        def run(folder: Path, killed_at: int | None = None, fault: dict[str, Any] | None = None) -> int:
            asking.write(json.dumps([str(folder), OPTIONS, killed_at, fault]) + "\n")
            asking.flush()
            return int(answers.readline())

        yield run
        asking.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training's folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained(folder, **OPTIONS)
    return folder


def assert_ends_like(whole: Path, folder: Path) -> None:
    """Run once more, here, it is the undisturbed training in weights, optimiser, averages and metrics."""
    again, expected = trained(folder, **OPTIONS), make_trainer(whole, **OPTIONS)
    expected.resume()
    assert again.step == expected.step == STEPS
    assert different(state_of(expected), state_of(again)) == []
    assert rows_of(expected) == rows_of(again)


def test_killed_at_ten_random_steps(start: Callable[..., int], whole: Path, tmp_path: Path) -> None:
    for position in sorted(random.Random(11).sample(range(STEPS), 10)):
        assert start(tmp_path / "run", position) == -signal.SIGKILL
    assert_ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "unlink"])
def test_killed_while_saving(call: str, start: Callable[..., int], whole: Path, tmp_path: Path) -> None:
    """At several of the moments in which a checkpoint is half there."""
    codes = []
    for at in (0, 1, 3):
        folder = tmp_path / str(at)
        codes.append(start(folder, None, {"call": call, "at": at}))
        assert codes[-1] in (-signal.SIGKILL, 0)
        if codes[-1]:
            assert_ends_like(whole, folder)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_full_disk_while_saving(call: str, start: Callable[..., int], whole: Path, tmp_path: Path) -> None:
    """It is told in words, what was saved before is whole, and with room again it goes on."""
    for at in (0, 5):
        folder = tmp_path / str(at)
        code = start(folder, None, {"call": call, "at": at, "error": errno.ENOSPC})
        assert code in (TOLD, 0)
        if code:
            told = (folder / "told").read_text()
            assert "no space left on device; free some" in told
            assert "\n" not in told
            assert_ends_like(whole, folder)


def test_a_damaged_newest_checkpoint(start: Callable[..., int], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert start(folder, 10) == -signal.SIGKILL
    newest = max((folder / "checkpoints").glob("step-*"))
    shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-7])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.warns(UserWarning, match=rf"{newest.name}: damaged"):
        assert_ends_like(whole, copy)
