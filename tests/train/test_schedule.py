"""The learning rate: no jumps, no way back up, the final rate at the end, and more than 0 from the first step on."""

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arra.train.schedule import learning_rate
from arra.train.settings import TrainSettings

Schedule = Literal["constant", "cosine", "linear", "wsd"]
Shape = Literal["linear", "cosine", "sqrt"]


def settings(**changes: Any) -> TrainSettings:
    given = {"steps": 100, "learning_rate": 1.0, "warmup_steps": 10, "final_learning_rate": 0.1}
    return TrainSettings(**{**given, **changes}).resolved(None)


ANY = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 60),
        "warmup_steps": st.integers(0, 70),
        "decay_steps": st.integers(1, 70),
        "schedule": st.sampled_from(get_args(Schedule)),
        "decay_shape": st.sampled_from(get_args(Shape)),
        "final_learning_rate": st.sampled_from([0.0, 0.3, 1.0]),
    }
)


@given(ANY)
def test_up_over_the_warm_up_then_never_up_again(changes: dict[str, Any]) -> None:
    s = settings(**changes)
    rates = [learning_rate(step, s) for step in range(s.steps + 1)]
    warm = rates[: s.warmup_steps]
    assert warm == pytest.approx([(step + 1) / s.warmup_steps for step in range(len(warm))])
    after = rates[max(0, s.warmup_steps - 1) :]
    assert all(a >= b for a, b in pairwise(after))
    assert all(s.final_learning_rate - 1e-12 <= rate <= 1 for rate in after)
    assert rates[0] > 0
    if s.warmup_steps < s.steps:  # where it ends; the last step is one step's fall above that
        assert rates[s.steps] == pytest.approx(1.0 if s.schedule == "constant" else s.final_learning_rate)
        assert rates[s.steps - 1] > 0


@pytest.mark.parametrize("shape", get_args(Shape))
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_no_jumps(schedule: Schedule, shape: Shape) -> None:
    """Of ten times as many steps each takes a tenth of the fall; the root's first one is steeper at its beginning."""
    largest = {}
    for steps in (1000, 10_000):
        s = settings(steps=steps, warmup_steps="10%", schedule=schedule, decay_shape=shape)
        rates = [learning_rate(step, s) for step in range(steps + 1)]
        largest[steps] = max(abs(a - b) for a, b in pairwise(rates))
    shrinking = math.sqrt(10) if (schedule, shape) == ("wsd", "sqrt") else 10
    assert largest[10_000] == pytest.approx(largest[1000] / shrinking, rel=0.02)


def test_cosine_and_line_are_half_way_down_in_the_middle() -> None:
    for schedule in ("cosine", "linear"):
        assert learning_rate(55, settings(schedule=schedule)) == pytest.approx(0.55)
    assert learning_rate(77, settings(schedule="linear", warmup_steps=54)) == pytest.approx(0.55)
    assert learning_rate(32, settings(schedule="cosine")) > learning_rate(32, settings(schedule="linear"))


@pytest.mark.parametrize(("shape", "left"), [("linear", 0.75), ("cosine", 0.5 + math.sqrt(2) / 4), ("sqrt", 0.5)])
def test_wsd_is_constant_before_its_decay(shape: Shape, left: float) -> None:
    s, constant = settings(schedule="wsd", decay_shape=shape), settings(schedule="constant")
    assert [learning_rate(step, s) for step in range(81)] == [learning_rate(step, constant) for step in range(81)]
    assert learning_rate(81, s) < 1
    assert learning_rate(85, s) == pytest.approx(0.1 + 0.9 * left)  # a quarter of its 20 steps


def test_a_decay_longer_than_the_training_begins_after_the_warm_up() -> None:
    s = settings(schedule="wsd", decay_steps=500, decay_shape="linear")
    line = settings(schedule="linear")
    assert [learning_rate(step, s) for step in range(101)] == [learning_rate(step, line) for step in range(101)]
