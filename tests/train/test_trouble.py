"""What counts as trouble, which batches it leaves out, and that a kill at any time leaves out the same ones."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.train.settings import TroubleSettings
from arra.train.trouble import LossWatch, Skipped, Survived

ALONE = Ranks()


def watch(losses: list[float] | None = None, **given: Any) -> LossWatch:
    made = LossWatch(TroubleSettings(**{"spike": "skip", **given}))
    for loss in losses or []:
        made.accept(loss)
    return made


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_numbers_that_are_not_finite_are_trouble_from_the_first_step(loss: float, norm: float):
    assert watch().judge(loss, norm) == "nonfinite"
    assert watch(spike="ignore").judge(loss, norm) == "nonfinite"


def test_a_spike_is_so_many_deviations_above_the_mean_and_only_above():
    losses = [1.0, 3.0] * 8  # mean 2, deviation 1
    judge = watch(losses, spike_deviations=4.0).judge
    assert judge(6.0, 1.0) is None
    assert judge(6.001, 1.0) == "spike"
    assert judge(-1e9, 1.0) is None
    assert watch(losses, spike="ignore").judge(1e9, 1.0) is None


def test_a_spike_needs_eight_steps_to_compare_with():
    assert watch([1.0] * 7).judge(1e9, 1.0) is None
    assert watch([1.0] * 8).judge(1e9, 1.0) == "spike"


@pytest.mark.parametrize("level", [2.0, -2.0])
def test_a_loss_at_rest_may_move_by_a_share_of_itself(level: float):
    judge = watch([level] * 64, spike_deviations=6.0).judge
    assert judge(level + 0.119, 1.0) is None
    assert judge(level + 0.121, 1.0) == "spike"


def test_only_the_window_counts():
    judge = watch([100.0, 0.0] * 20 + [1.0] * 8, spike_window=8).judge
    assert judge(2.0, 1.0) == "spike"


@given(
    st.lists(st.floats(-10, 10, allow_subnormal=False), max_size=30),
    st.lists(st.floats(-10, 10, allow_subnormal=False), max_size=10),
    st.integers(8, 12),
)
def test_a_restored_watch_judges_as_the_one_that_went_on(before: list[float], after: list[float], window: int):
    first = watch(before, spike_window=window)
    second = watch([5.0] * 20, spike_window=window)
    state = first.tensor()
    assert state.shape == (window,)  # of one shape at any step: a checkpoint is read into what is there
    assert state.dtype == torch.float64
    second.restore(state)
    for loss in after:
        assert first.limit() == second.limit()
        assert first.judge(loss, 1.0) == second.judge(loss, 1.0)
        first.accept(loss)
        second.accept(loss)


def survived(*positions: int, step: int = 0) -> Survived:
    return Survived(step, "nonfinite", "skip", positions)


def test_positions_are_the_steps_without_what_is_left_out(tmp_path: Path):
    skipped = Skipped(tmp_path, ALONE)
    assert [skipped.position(step) for step in range(3)] == [0, 1, 2]
    assert not skipped.path.exists()
    skipped.add(survived(3, 4))
    skipped.add(survived(0))
    assert [skipped.position(step) for step in range(5)] == [1, 2, 5, 6, 7]
    assert Skipped(tmp_path, ALONE).survived == skipped.survived


@given(st.sets(st.integers(0, 40), max_size=12))
def test_every_position_is_taken_once_or_left_out(left_out: set[int]):
    skipped = Skipped(Path("/nonexistent"), ALONE)
    skipped.survived = [survived(position) for position in left_out]
    taken = [skipped.position(step) for step in range(41 - len(left_out))]
    assert sorted([*taken, *left_out]) == list(range(41))
    assert taken == sorted(taken)


def test_a_plan_leaves_out_the_batch_and_those_before_it_since_the_checkpoint(tmp_path: Path):
    skipped = Skipped(tmp_path, ALONE)
    skipped.add(survived(4))
    assert skipped.plan("stop", step=6, since=3, batches=2) == ()
    assert skipped.plan("skip", step=6, since=3, batches=2) == (7,)
    assert skipped.plan("rewind", step=6, since=3, batches=1) == (7,)
    assert skipped.plan("rewind", step=6, since=3, batches=3) == (5, 6, 7)  # of steps 4, 5, 6
    assert skipped.plan("rewind", step=6, since=5, batches=3) == (6, 7)
    assert skipped.plan("rewind", step=6, since=6, batches=3) == (7,)


def test_the_recipe_says_what_is_done_until_it_was_done_often_enough(tmp_path: Path):
    wanted = TroubleSettings(nonfinite="rewind", spike="skip", most=2)
    skipped = Skipped(tmp_path, ALONE)
    for _ in range(2):
        assert skipped.action("nonfinite", wanted) == "rewind"
        assert skipped.action("spike", wanted) == "skip"
        skipped.add(survived(0))
    assert skipped.action("nonfinite", wanted) == skipped.action("spike", wanted) == "stop"
    assert Skipped(tmp_path, ALONE).action("spike", wanted) == "stop"  # a restart does not begin to count anew


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"survived": 1}',
        '{"survived": [{"step": 1}]}',
        '{"survived": [{"step": 1, "reason": "spike", "action": "skip", "positions": [-1]}]}',
    ],
)
def test_a_damaged_file_is_told(content: str, tmp_path: Path):
    (tmp_path / "skipped.json").write_text(content)
    with pytest.raises(
        ArraError, match=r"skipped\.json: damaged; without it training cannot go on as it began: restore"
    ):
        Skipped(tmp_path, ALONE)


def test_a_file_that_cannot_be_written_leaves_nothing_out(tmp_path: Path):
    skipped = Skipped(tmp_path / "run", ALONE)
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(ArraError, match=r"run/skipped\.json: is a file, expected a folder"):
        skipped.add(survived(3))
    assert skipped.survived == []


class Killed(Exception):
    """Stands for kill -9: nothing but files outlives it."""


@dataclass
class Disk:
    """What outlives a kill."""

    folder: Path
    checkpoints: dict[int, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)


@dataclass
class Clock:
    """Kills after so many things done; None never."""

    left: int | None

    def tick(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1


STEPS, EVERY = 16, 4


def toy_training(
    disk: Disk, clock: Clock, *, losses: dict[int, float], chosen: TroubleSettings
) -> tuple[int, ...] | None:
    """The loop's order of things with positions as weights; None where it stopped.

    A batch's loss is a number of its position, but where the weights have met an odd number of batches it is doubled:
    trouble may depend on the way that led there.
    """
    skipped, seen = Skipped(disk.folder, ALONE), LossWatch(chosen)

    def back() -> tuple[int, tuple[int, ...]]:
        newest = max(disk.checkpoints, default=0)
        weights, state = disk.checkpoints.get(newest, ((), LossWatch(chosen).tensor()))
        seen.restore(state)
        return newest, weights

    step, weights = back()
    while step < STEPS:
        position = skipped.position(step)
        clock.tick()
        loss = losses.get(position, 1.0 + 0.5 * (len(weights) % 2))
        reason = seen.judge(loss, 1.0)
        if reason is not None:
            action = skipped.action(reason, chosen)
            if action == "stop":
                return None
            since = max(disk.checkpoints, default=0)
            left_out = skipped.plan(action, step=step, since=since, batches=chosen.skip_batches)
            assert all(skipped.position(saved) <= min(left_out) for saved in disk.checkpoints)
            clock.tick()
            skipped.add(Survived(step, reason, action, left_out))
            clock.tick()
            if action == "rewind":
                step, weights = back()
            continue
        seen.accept(loss)
        weights, step = (*weights, position), step + 1
        clock.tick()
        if step % EVERY == 0:
            disk.checkpoints[step] = weights, seen.tensor()
            clock.tick()
    return weights


@settings(max_examples=60, deadline=None)
@given(
    bad=st.dictionaries(st.integers(0, 20), st.sampled_from([math.nan, math.inf, 40.0]), max_size=5),
    kills=st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=4),
    nonfinite=st.sampled_from(["stop", "skip", "rewind"]),
    spike=st.sampled_from(["ignore", "skip", "rewind"]),
    batches=st.integers(1, 6),
    most=st.integers(1, 6),
)
def test_kills_at_any_time_end_in_the_weights_of_no_kill(
    tmp_path_factory: pytest.TempPathFactory,
    bad: dict[int, float],
    kills: list[tuple[int, bool]],
    nonfinite: Any,
    spike: Any,
    batches: int,
    most: int,
):
    chosen = TroubleSettings(nonfinite=nonfinite, spike=spike, skip_batches=batches, most=most, spike_window=8)
    calm = Disk(tmp_path_factory.mktemp("calm"))
    wanted = toy_training(calm, Clock(None), losses=bad, chosen=chosen)
    disk = Disk(tmp_path_factory.mktemp("killed"))
    for after, damages in kills:
        with suppress(Killed):
            toy_training(disk, Clock(after), losses=bad, chosen=chosen)
        if damages and disk.checkpoints:  # the newest one, so that the one before it is used
            del disk.checkpoints[max(disk.checkpoints)]
    assert toy_training(disk, Clock(None), losses=bad, chosen=chosen) == wanted
    files = [each.folder / "skipped.json" for each in (calm, disk)]
    assert [file.exists() for file in files] in ([True, True], [False, False])
    if files[0].exists():
        assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())
