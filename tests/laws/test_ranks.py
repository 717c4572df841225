"""Laws of several processes: they train the model that one process trains, and go on from each other's checkpoints.

Sums over ranks and micro-batches are made in another order, so numbers are equal up to rounding: AdamW divides a
gradient by its size, so where one is nearly nothing a weight may move by a part of its step otherwise.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train import toy_training
from tests.train.toy_training import different, make_trainer, rows_of, run_case, state_of, trained

SHARDED = {"kind": "fsdp"}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": SHARDED},
    "hsdp": {"parallel": {"kind": "hsdp", "replicas": 2}},
    "keeping": {"parallel": {"kind": "fsdp", "reshard": False}},
    "parts": {"micro_batch_size": 1, "batch_size": 5, "parallel": SHARDED},
    "recomputing": {"recompute": "full", "parallel": SHARDED},
    "muon": {"optimizer": "muon", "ema_decay": [0.9, 0.5], "parallel": SHARDED},
    "contrast": {"align": {"loss": "nt-xent", "balance": 0.5}},
    "plain": {"align": None},
    "trouble": {"damaged_at": 7, "trouble": {"nonfinite": "rewind", "skip_batches": 2}, "parallel": SHARDED},
}
"""Options of toy trainings, each run on two ranks and on one."""


def state_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "state.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-3, equal_nan=True, msg=name)


@pytest.fixture(scope="module")
def two(toy_server: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, one of them stopped in its middle, one that went on where one process had stopped."""
    folder = tmp_path_factory.mktemp("two")
    alone = make_trainer(folder / "from-one")
    run_case(folder / "from-one", alone.ranks, signal_at=(6, signal.SIGTERM))
    stopped = {"parallel": SHARDED, "signal_at": [6, signal.SIGTERM]}
    cases = {**CASES, "stopped": stopped, "from-one": {"parallel": SHARDED}}
    assert toy_server(folder=folder, cases=cases, ranks=2) == 0
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_model_that_one_trains(case: str, two: Path, tmp_path: Path) -> None:
    options = {name: value for name, value in CASES[case].items() if name not in ("parallel", "align")}
    if "align" in CASES[case]:
        align = CASES[case]["align"]
        options["align"] = align and toy_training.AlignSettings(**{**toy_training.ALIGN.model_dump(), **align})
    alone = trained(tmp_path / "run", **options)
    assert_same(state_of(alone), state_in(two / case))
    ours = [json.loads(line) for line in (two / case / "metrics.jsonl").read_text().splitlines()]
    for row, expected in zip(ours, rows_of(alone), strict=True):
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), name


def test_no_rank_holds_all_weights(two: Path) -> None:
    """Of a sharded training each rank writes the shards it has."""
    entry = json.loads(next((two / "fsdp" / "checkpoints").glob("step-*/checkpoint.json")).read_text())
    assert entry["ranks"] == 2
    assert len(entry["files"]) >= 2


@pytest.mark.parametrize("case", ["stopped", "from-one"])
def test_another_number_of_ranks_goes_on_as_if_nothing_had_been(
    case: str, two: Path, toy_server: Callable[..., int], tmp_path: Path
) -> None:
    """From two to one and to three; from one to two."""
    whole = state_of(trained(tmp_path / "whole"))
    if case == "from-one":
        assert_same(whole, state_in(two / case))
        return
    for number in (1, 3):
        folder = tmp_path / str(number)
        shutil.copytree(two / "stopped", folder / "stopped")
        begun = make_trainer(folder / "stopped")
        saved = begun.checkpoints.newest()
        assert saved is not None
        assert saved.step == 8  # what one of two ranks is asked, both learn in the next step
        if number == 1:
            begun.train()
            assert_same(whole, state_of(begun))
        else:
            assert toy_server(folder=folder, cases={"stopped": {"parallel": SHARDED}}, ranks=number) == 0
            assert_same(whole, state_in(folder / "stopped"))


def test_one_of_two_ranks_dies_and_torchrun_starts_again(
    two: Path, toy_server: Callable[..., int], tmp_path: Path
) -> None:
    """Every rank is ended and started again, and the end is the undisturbed run's, bit for bit."""
    cases = {"ddp": {"signal_at": [7, signal.SIGKILL]}}
    assert toy_server(folder=tmp_path, cases=cases, ranks=2, restarts=1) == 0
    assert (tmp_path / "ddp" / "signal-7").exists()
    assert different(state_in(two / "ddp"), state_in(tmp_path / "ddp")) == []
