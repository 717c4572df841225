"""Checkpoints: what is saved comes back on any number of ranks; whatever ends a save, earlier ones stay whole."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import arra.train.checkpoints
import arra.train.shards
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.train.checkpoints import (
    Checkpoints,
    SavedStep,
    kept_steps,
    read_tensors,
    saved_step,
)
from arra.train.optimizer_state import optimizer_space, optimizer_tensors, restore_optimizer
from arra.train.shards import file_numbers
from tests.train.forked_ranks import in_child, on_ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def alone(folder: Path, **fields: Any) -> Checkpoints:
    return Checkpoints(folder, ranks=Ranks(), **({"keep_last": 3} | fields))


def toys(seed: int = 0) -> dict[str, Tensor]:
    """Every kind of tensor that a training holds, and kinds that are easily forgotten."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 5, generator=generator)
    table = torch.randint(0, 255, (16,), generator=generator, dtype=torch.uint8)
    return {
        "model.matrix": matrix,
        "model.transposed": matrix.t(),
        "model.row": matrix[2],
        "model.half": matrix.bfloat16(),
        "model.scale": torch.tensor(0.5 + seed),
        "model.mask": matrix[0] > 0,
        "model.nothing": torch.empty(0, 4),
        "optimizer.w.step": torch.tensor(7 + seed),
        "optimizer.a.table": table,  # bitsandbytes: one table for all parameters
        "optimizer.b.table": table,
        "balance": matrix.double(),
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}


def loaded(checkpoints: Checkpoints, saved: SavedStep, like: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = blank(like)
    checkpoints.load(saved, tensors)
    return tensors


def steps(folder: Path) -> list[int]:
    """Of what has a name that counts; anything else there fails the test."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


@pytest.mark.parametrize("in_background", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(folder: Path, in_background: bool) -> None:
    checkpoints = alone(folder, in_background=in_background)
    assert checkpoints.newest() is None
    checkpoints.save(500, toys(), card={"seconds": 1.5, "position": [3, None]}, score=0.25)
    saved = checkpoints.newest()
    assert saved is not None
    assert (saved.step, saved.path, saved.card) == (
        500,
        folder / "step-0000500",
        {"seconds": 1.5, "position": [3, None]},
    )
    assert same(loaded(checkpoints, saved, toys()), {name: each.contiguous() for name, each in toys().items()})
    assert same(read_tensors(saved_step(folder, 500), ["model.half"]), {"model.half": toys()["model.half"]})


def test_no_pickle_is_written_or_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, refuse)
    checkpoints = alone(folder)
    checkpoints.save(1, toys(), card={})
    saved = checkpoints.newest()
    assert saved is not None
    assert same(loaded(checkpoints, saved, toys()), toys())
    assert {path.suffix for path in saved.path.iterdir()} == {".safetensors", ".json"}


def test_large_states_go_into_several_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arra.train.checkpoints, "FILE_BYTES", 100)
    checkpoints = alone(folder)
    checkpoints.save(1, toys(), card={})
    saved = checkpoints.newest()
    assert saved is not None
    assert len(list(saved.path.glob("*.safetensors"))) == len(set(file_numbers(toys(), most_bytes=100).values())) > 2
    assert same(loaded(checkpoints, saved, toys()), toys())


def test_training_may_change_what_is_being_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    save = arra.train.shards.dcp.save

    def slow(*given: Any, **named: Any) -> Any:
        assert go_on.wait(20)
        return save(*given, **named)

    monkeypatch.setattr(arra.train.shards.dcp, "save", slow)
    checkpoints = alone(folder)
    tensors = toys()
    checkpoints.save(1, tensors, card={})
    for tensor in tensors.values():
        tensor.zero_()
    assert not folder.exists()
    assert not checkpoints.failed
    threading.Timer(0.3, go_on.set).start()
    checkpoints.save(2, tensors, card={})  # waits for the one before
    assert (folder / "step-0000001").exists()
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 2
    assert same(loaded(checkpoints, saved_step(folder, 1), toys()), toys())
    assert same(loaded(checkpoints, saved, toys()), tensors)


def test_what_is_no_json_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(TypeError):
        alone(folder).save(1, toys(), card={"loss": torch.tensor(1.0)})


NUMBERS = st.floats(-3, 3, allow_subnormal=False)
"""A training before in this process may have made denormals zero."""


@given(
    scores=st.dictionaries(
        st.integers(0, 60), st.none() | st.floats(-3, 3, allow_subnormal=False) | st.just(float("nan"))
    ),
    last=st.integers(1, 4),
    every=st.none() | st.integers(1, 20),
    best=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_kept_are_the_last_the_multiples_and_the_best(
    scores: dict[int, float | None], last: int, every: int | None, best: int
) -> None:
    kept = kept_steps(scores, last=last, every=every, best=best)
    for step in scores:
        score = scores[step]
        better = [
            each
            for each, other in scores.items()
            if other is not None and score is not None and (other, each) < (score, step)
        ]
        is_best = score is not None and score == score and len(better) < best
        is_last = sum(each > step for each in scores) < last
        assert (step in kept) == (is_best or is_last or (every is not None and step % every == 0))
    assert kept <= scores.keys()


def test_pruning_follows_that_law_also_after_a_restart(folder: Path) -> None:
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: float("nan"), 60: 5.0}
    for step, score in scores.items():
        checkpoints = alone(folder, keep_last=2, keep_every=40, keep_best=1)
        checkpoints.save(step, toys(), card={}, score=score)
        checkpoints.wait()
    assert steps(folder) == [20, 40, 50, 60]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda path: flip(next(path.glob("*.safetensors"))), "its hash is not the one it was saved with"),
    "cut": (lambda path: os.truncate(next(path.glob("*.safetensors")), 100), "100 bytes, saved were"),
    "file gone": (lambda path: next(path.glob("*.safetensors")).unlink(), "safetensors is missing"),
    "card gone": (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    "card cut": (lambda path: os.truncate(path / "checkpoint.json", 40), "checkpoint.json: "),
    "card changed": (lambda path: flip(path / "checkpoint.json"), "checkpoint.json: "),
    "stray": (
        lambda path: shutil.copy(next(path.glob("*.safetensors")), path / "a.safetensors"),
        "a.safetensors was not saved with it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before(folder: Path, damage: str) -> None:
    checkpoints = alone(folder, keep_last=2)
    for step in (1, 2):
        checkpoints.save(step, toys(step), card={})
    checkpoints.wait()
    spoil, why = DAMAGES[damage]
    spoil(folder / "step-0000002")
    checkpoints = alone(folder, keep_last=2)
    with pytest.warns(UserWarning, match=rf"step-0000002: damaged \(.*{why}.*\); using the checkpoint before it"):
        saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 1
    assert same(loaded(checkpoints, saved, toys()), toys(1))
    with pytest.raises(ArraError, match=rf"step-0000002: damaged \(.*{why}"):
        saved_step(folder, 2)
    checkpoints.save(3, toys(3), card={})
    checkpoints.wait()
    assert steps(folder) == [1, 3]  # the damaged one does not take the place of a whole one


def test_none_whole_is_refused_not_begun_anew(folder: Path) -> None:
    checkpoints = alone(folder)
    for step in (1, 2):
        checkpoints.save(step, toys(step), card={})
    checkpoints.wait()
    for step in (1, 2):
        flip(next((folder / f"step-000000{step}").glob("*.safetensors")))
    with pytest.raises(
        ArraError, match=r"no checkpoint is whole \(step-0000002: shard.*\); put a copy in its place, or"
    ):
        alone(folder).newest()


def test_checkpoints_of_an_earlier_version_are_told_not_overlooked(folder: Path) -> None:
    folder.mkdir()
    (folder / "step-0000020.safetensors").touch()
    with pytest.raises(ArraError, match=r"step-0000020.safetensors: a checkpoint of an earlier version of arra"):
        alone(folder).newest()


def test_a_step_that_is_not_there_is_told_with_those_that_are(folder: Path) -> None:
    with pytest.raises(ArraError, match="no checkpoint of step 3; there are none"):
        saved_step(folder, 3)
    checkpoints = alone(folder)
    for step in (1, 2):
        checkpoints.save(step, toys(), card={})
    checkpoints.wait()
    with pytest.raises(ArraError, match=r"no checkpoint of step 3; there are 1, 2$"):
        saved_step(folder, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.new": torch.ones(2), "model.newer": torch.ones(2)},
            r"'model\.new' is not in the checkpoint \(nor 1 more",
        ),
        ({"model.scale": None}, r"'model\.scale' is not in this training; the model or its optimiser is another one"),
        (
            {"model.scale": torch.ones(1)},
            r"'model\.scale' was saved as \[\] torch\.float32, expected \[1\] torch\.float32",
        ),
        ({"model.scale": torch.tensor(1)}, r"saved as \[\] torch\.float32, expected \[\] torch\.int64"),
    ],
)
def test_another_model_is_refused_by_name(folder: Path, change: dict[str, Tensor | None], message: str) -> None:
    checkpoints = alone(folder)
    checkpoints.save(1, toys(), card={})
    saved = checkpoints.newest()
    assert saved is not None
    wanted = {name: each for name, each in (toys() | change).items() if each is not None}
    with pytest.raises(ArraError, match=message):
        checkpoints.load(saved, wanted)


def kill_at(call: int, names: tuple[str, ...]) -> None:
    """This process dies, as by kill -9, in the call of that number of any of these functions of `os`."""
    count = 0
    for name in names:
        kept = getattr(os, name)

        def count_down(*given: Any, kept: Any = kept, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return kept(*given, **named)

        setattr(os, name, count_down)


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_kill_at_any_moment_leaves_a_whole_one(folder: Path, step: int, in_background: bool) -> None:
    """Every system call that changes the folder is one of the moments; the last run gets through."""
    alone(folder, keep_last=1, in_background=False).save(1, toys(1), card={})
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    call, code, outcomes = 0, -signal.SIGKILL, []
    while code == -signal.SIGKILL:
        call += 1
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)

        def work(call: int = call) -> None:
            checkpoints = alone(folder, keep_last=1, in_background=in_background)
            kill_at(call, ("mkdir", "fsync", "replace", "unlink", "rmdir"))
            checkpoints.save(step, toys(9), card={})
            checkpoints.wait()

        code = in_child(work)
        checkpoints = alone(folder, keep_last=1)
        saved = checkpoints.newest()
        assert saved is not None
        tensors = loaded(checkpoints, saved, toys())
        new = same(tensors, toys(9))
        assert new or same(tensors, toys(1))
        assert saved.step == (step if new else 1)
        assert set(steps(folder)) <= {1, step}
        outcomes.append(new)
    assert code == 0
    assert call > 6
    assert outcomes == sorted(outcomes)  # before the renaming the old one, after it the new one
    assert outcomes[-1]


def test_what_dead_processes_left_is_removed_and_live_ones_are_left_alone(folder: Path) -> None:
    checkpoints = alone(folder)
    checkpoints.save(1, toys(), card={})
    checkpoints.wait()
    node = checkpoints._owner.rpartition("-")[0]
    for owner in (f"{node}-{os.getpid()}", f"{node}-999999999", "elsewhere-1", f"{node}-{os.getppid()}"):
        (folder / f".step-0000002.{owner}.tmp").mkdir()
    alone(folder)
    assert {path.name for path in folder.iterdir()} == {"step-0000001", f".step-0000002.{node}-{os.getppid()}.tmp"}


@contextmanager
def file_limit(most_bytes: int) -> Iterator[None]:
    """A block in which the kernel refuses to write files beyond a size."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def save_to_the_end(checkpoints: Checkpoints, step: int, tensors: dict[str, Tensor]) -> None:
    """Nothing; raises what went wrong, after `failed` has told that something did."""
    checkpoints.save(step, tensors, card={})
    while not checkpoints.failed:
        time.sleep(0.001)
    checkpoints.wait()


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("most_bytes", [0, 200, 2000])  # nothing; in the first shard; in the middle of it
def test_a_write_that_the_system_refuses_is_one_line(folder: Path, most_bytes: int, in_background: bool) -> None:
    checkpoints = alone(folder, keep_last=1, in_background=in_background)
    checkpoints.save(1, toys(1), card={})
    checkpoints.wait()
    large = toys(2) | {"model.large": torch.zeros(1000)}
    with file_limit(most_bytes), pytest.raises(ArraError, match=r"^\S+/step-0000002: larger than a file may be here; "):
        save_to_the_end(checkpoints, 2, large)
    assert not checkpoints.failed
    assert steps(folder) == [1]
    assert same(loaded(checkpoints, saved_step(folder, 1), toys()), toys(1))
    checkpoints.save(3, large, card={})  # there is space again
    checkpoints.wait()
    assert steps(folder) == [3]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("name", ["mkdir", "fsync", "replace"])
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_full_disk_is_one_line_at_every_moment_of_saving(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, name: str, number: int
) -> None:
    checkpoints = alone(folder)
    checkpoints.save(1, toys(1), card={})
    checkpoints.wait()
    kept, calls = getattr(os, name), 0
    refused: list[str] = []

    def full(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == len(refused) + 1:
            raise OSError(number, os.strerror(number))
        return kept(*given, **named)

    monkeypatch.setattr(os, name, full)
    while True:
        calls = 0
        try:
            checkpoints.save(step, toys(2), card={})
            checkpoints.wait()
        except ArraError as error:
            refused.append(str(error))
        else:
            break
        assert steps(folder) == [1]
        assert same(loaded(checkpoints, saved_step(folder, 1), toys()), toys(1))
    assert refused
    assert all("\n" not in line and f"step-000000{step}: " in line for line in refused)


def test_a_bug_in_the_background_is_no_line_for_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(path: Path) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(arra.train.shards, "file_hash", bug)
    checkpoints = alone(folder)
    checkpoints.save(1, toys(), card={})
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()
    assert steps(folder) == []


def full_tensors() -> dict[str, Tensor]:
    """As one process sees them: sharded ones of sizes that do not divide, some smaller than the number of ranks."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.a": (7, 3), "model.b": (1, 5), "model.c": (2,), "model.nothing": (0, 4), "model.d": (4, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | toys()


def placed(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Sharded as FSDP does it on so many ranks, `d` by columns, `toys` replicated as under DDP."""
    mesh = init_device_mesh("cpu", (size,))
    sharded: dict[str, Tensor] = dict(toys())
    for name in tensors.keys() - sharded.keys():
        sharded[name] = distribute_tensor(tensors[name], mesh, [Shard(1 if name == "model.d" else 0)])
    sharded["model.half"] = distribute_tensor(tensors["model.half"], mesh, [Replicate()])
    return sharded


def adamw(fused: bool, size: int) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]:
    """A fresh optimiser of one sharded and one plain parameter."""
    mesh = init_device_mesh("cpu", (size,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(2))
    return torch.optim.AdamW([{"params": [sharded]}, {"params": [plain]}], fused=fused), {sharded: "w", plain: "w.x"}


def make_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_resuming_on_one_two_or_three_ranks(folder: Path) -> None:
    """Saved on two, twice: with sharded tensors beside replicated ones, and with the states of optimisers."""

    def save(ranks: Ranks) -> None:
        checkpoints = Checkpoints(folder, ranks=ranks, keep_last=9)
        checkpoints.save(1, placed(full_tensors(), ranks.size), card={"by": ranks.size})
        state: dict[str, Tensor] = {}
        for fused in (False, True):
            optimizer, names = adamw(fused, ranks.size)
            make_step(optimizer)
            state |= optimizer_tensors(optimizer, {p: f"{fused}.{name}" for p, name in names.items()})
        checkpoints.save(2, state, card={})
        checkpoints.wait()
        load(ranks)

    def load(ranks: Ranks) -> None:
        checkpoints = Checkpoints(folder, ranks=ranks, keep_last=9)
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.step == 2
        for fused in (False, True):
            optimizer, names = adamw(fused, ranks.size)
            names = {p: f"{fused}.{name}" for p, name in names.items()}
            space = optimizer_space(optimizer, names, saved=newest)
            others = {
                name: torch.empty_like(newest.tensors[name], device="cpu") for name in newest.tensors.keys() - space
            }
            checkpoints.load(newest, space | others)
            restore_optimizer(optimizer, names, tensors=space)
            for parameter in names:
                state = optimizer.state[parameter]
                assert state["exp_avg"].placements == parameter.placements if isinstance(parameter, DTensor) else True
                assert isinstance(state["exp_avg"], DTensor) == isinstance(parameter, DTensor)
                assert not isinstance(state["step"], DTensor)
            expected, _ = adamw(fused, ranks.size)
            make_step(expected)
            make_step(expected)
            make_step(optimizer)
            for one, two in zip(optimizer.param_groups, expected.param_groups, strict=True):
                # the restored weights are fresh ones, so they moved by the second step alone
                for mine, theirs in zip(one["params"], two["params"], strict=True):
                    for key in ("step", "exp_avg", "exp_avg_sq"):
                        assert torch.equal(full(optimizer.state[mine][key]), full(expected.state[theirs][key]))
        first = saved_step(folder, 1)
        assert first.card == {"by": 2}
        tensors = blank(placed(full_tensors(), ranks.size))
        checkpoints.load(first, tensors)
        assert same({name: full(tensor) for name, tensor in tensors.items()}, full_tensors())

    assert on_ranks(2, folder.with_name("two"), save) == [0, 0]
    assert on_ranks(3, folder.with_name("three"), load) == [0, 0, 0]
    checkpoints = alone(folder)
    saved = saved_step(folder, 1)
    assert same(loaded(checkpoints, saved, full_tensors()), full_tensors())
    with_hashes = json.loads((saved.path / "checkpoint.json").read_text())
    assert with_hashes["ranks"] == 2
    sizes = [file["bytes"] for file in with_hashes["files"].values()]
    assert len(sizes) == 2
    once = sum(tensor.nbytes for tensor in full_tensors().values())
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in saved.path.glob("*.safetensors"))
    assert sum(sizes) == once + headers  # what two ranks hold alike is written once


def test_a_refused_write_on_one_rank_is_told_on_all(folder: Path) -> None:
    def save(ranks: Ranks) -> None:
        checkpoints = Checkpoints(folder, ranks=ranks, keep_last=1)
        checkpoints.save(1, placed(full_tensors(), ranks.size), card={})
        checkpoints.wait()
        with file_limit(200 if ranks.rank == 1 else 10**6), pytest.raises(ArraError, match="step-0000002: larger than"):
            save_to_the_end(checkpoints, 2, placed(full_tensors(), ranks.size))
        ranks.barrier()
        assert steps(folder) == [1]
        damaged = next((folder / "step-0000001").glob("shard-00002*"))
        if ranks.is_first:
            flip(damaged)
        ranks.barrier()
        with pytest.raises(ArraError, match=f"no checkpoint is whole .*{damaged.name}: its hash is not"):
            checkpoints.newest()

    assert on_ranks(2, folder.with_name("store"), save) == [0, 0]


def test_states_return_to_the_device_of_their_weights() -> None:
    weight, scale = nn.Parameter(torch.zeros(2, 3, device="meta")), nn.Parameter(torch.zeros((), device="meta"))
    optimizer = torch.optim.AdamW([weight, scale])
    saved = {f"optimizer.w.{key}": torch.ones(2, 3) for key in ("exp_avg", "exp_avg_sq")}
    saved |= {f"optimizer.w.s.{key}": torch.tensor(1.0) for key in ("exp_avg", "step")}
    restore_optimizer(optimizer, {weight: "w", scale: "w.s"}, tensors=saved | {"optimizer.w.step": torch.tensor(5.0)})
    devices = [{key: value.device.type for key, value in optimizer.state[each].items()} for each in (weight, scale)]
    assert devices == [{"exp_avg": "meta", "exp_avg_sq": "meta", "step": "cpu"}, {"exp_avg": "meta", "step": "cpu"}]
