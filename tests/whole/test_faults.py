"""Whatever ends a training, running it again ends in the weights of the undisturbed one, bit for bit.

Trainings are processes of their own, forked from one that has imported everything.
"""

import errno
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.train.toy_training import STEPS, TOLD, different, rows_of, state_of, trained

OPTIONS: dict[str, Any] = {"checkpoint_every_steps": 3, "keep_checkpoints": 2, "ema_decay": 0.9}


Ended = tuple[dict[str, Tensor], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """State at the end, and metrics, of an undisturbed training."""
    trainer = trained(tmp_path_factory.mktemp("whole") / "run", **OPTIONS)
    return state_of(trainer), rows_of(trainer)


def assert_ends_like(whole: Ended, folder: Path) -> None:
    """Run once more, here, it is the undisturbed training in weights, optimiser, averages and metrics."""
    again = trained(folder, **OPTIONS)
    assert again.step == STEPS
    state, rows = whole
    assert different(state, state_of(again)) == []
    assert rows == rows_of(again)


def test_killed_at_ten_random_steps(toy_server: Callable[..., int], whole: Ended, tmp_path: Path) -> None:
    for position in sorted(random.Random(11).sample(range(STEPS), 10)):
        assert toy_server(folder=tmp_path / "run", options=OPTIONS, killed_at=position) == -signal.SIGKILL
    assert_ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "unlink"])
def test_killed_while_saving(call: str, toy_server: Callable[..., int], whole: Ended, tmp_path: Path) -> None:
    """At several of the moments in which a checkpoint is half there."""
    codes = []
    for at in (0, 3):
        folder = tmp_path / str(at)
        codes.append(toy_server(folder=folder, options=OPTIONS, fault={"call": call, "at": at}))
        assert codes[-1] in (-signal.SIGKILL, 0)
        if codes[-1]:
            assert_ends_like(whole, folder)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_full_disk_while_saving(call: str, toy_server: Callable[..., int], whole: Ended, tmp_path: Path) -> None:
    """It is told in words, what was saved before is whole, and with room again it goes on."""
    for at in (0, 5):
        folder = tmp_path / str(at)
        code = toy_server(folder=folder, options=OPTIONS, fault={"call": call, "at": at, "error": errno.ENOSPC})
        assert code in (TOLD, 0)
        if code:
            told = (folder / "told").read_text()
            assert "no space left on device; free some" in told
            assert "\n" not in told
            assert_ends_like(whole, folder)


def test_a_damaged_newest_checkpoint(toy_server: Callable[..., int], whole: Ended, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert toy_server(folder=folder, options=OPTIONS, killed_at=10) == -signal.SIGKILL
    newest = max((folder / "checkpoints").glob("step-*"))
    shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-7])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.warns(UserWarning, match=rf"{newest.name}: damaged"):
        assert_ends_like(whole, copy)
