"""Durations: what is written is what is trained, whole steps, and a mistake is one line."""

import math
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arra.config import Recipe, dump_recipe, json_schema, parse_recipe
from arra.errors import ArraError
from arra.train.durations import to_steps
from arra.train.settings import AlignSettings, TrainSettings


def steps(written: int | str, **known: Any) -> int:
    return to_steps(written, **{"batch_size": 32, "records": 1000, "steps": 500, **known})


def recipe(train: str, *, more: str = "", overrides: tuple[str, ...] = ()) -> Recipe:
    return parse_recipe(f"name: x\ntrain: {train}\n{more}", Recipe, source="x.yaml", overrides=overrides)


def refusal(train: str, **given: Any) -> str:
    with pytest.raises(ArraError) as caught:
        recipe(train, **given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (7, 7), ("7 steps", 7), ("1 step", 1), ("64 images", 2), ("65 images", 3), ("10_000 images", 313),
        ("3 epochs", 94), ("1epoch", 32), ("0.5 epochs", 16), ("3 percent", 15), ("3%", 15), ("0.1 %", 1),
        ("100%", 500),
    ],
)  # fmt: skip
def test_every_unit_in_steps_rounded_up(written: int | str, expected: int) -> None:
    assert steps(written) == expected


def test_parts_are_exact() -> None:
    """As floats a tenth of 30 pictures is more than 3, and would be a step more."""
    assert steps("0.1 epochs", records=30, batch_size=1) == 3
    assert steps("29 percent", steps=100) == 29


@given(st.integers(1, 400), st.integers(1, 10**7), st.integers(1, 4096))
def test_epochs_see_every_picture_so_often_and_no_batch_more(epochs: int, records: int, batch_size: int) -> None:
    found = steps(f"{epochs} epochs", records=records, batch_size=batch_size)
    assert (found - 1) * batch_size < epochs * records <= found * batch_size


@given(st.decimals("0.001", 100, places=3), st.integers(1, 10**6))
def test_a_part_is_at_least_a_step_and_at_most_all(percent: Any, whole: int) -> None:
    found = steps(f"{percent} percent", steps=whole)
    assert 1 <= found <= whole
    assert found == math.ceil(Fraction(percent) * whole / 100)


def test_settings_are_resolved_once_and_whole() -> None:
    written = TrainSettings(
        steps="2 epochs",
        batch_size=10,
        warmup_steps="3%",
        log_every_steps="95 images",
        validate_every_steps="0.5 epochs",
        keep_every_steps=7,
    )
    found = written.resolved(1000)
    numbers = (found.steps, found.warmup_steps, found.decay_steps, found.log_every_steps, found.validate_every_steps)
    assert numbers == (200, 6, 40, 10, 50)
    assert (found.keep_every_steps, found.preview_every_steps) == (7, None)
    assert found.resolved(None) == found
    assert written.resolved(500).steps == 100  # what was written stays


def test_alignment_follows_the_training() -> None:
    written = AlignSettings(warmup_steps="10%", stop_step="1 epoch", more={"other": {"stop_step": "50 percent"}})
    found = written.resolved(batch_size=10, records=300, steps=200)
    assert (found.warmup_steps, found.stop_step, found.more["other"].stop_step) == (20, 30, 100)


def test_a_recipe_is_in_steps_unless_it_counts_epochs() -> None:
    align = "align: {warmup_steps: 1%, more: {b: {stop_step: 64 images}}}"
    plain = recipe("{steps: 3_200 images, warmup_steps: 5%}", more=align)
    assert plain.in_epochs == {}
    assert (plain.train.steps, plain.train.warmup_steps, plain.train.decay_steps) == (100, 5, 20)
    assert plain.align is not None
    assert (plain.align.warmup_steps, plain.align.more["b"].stop_step) == (1, 2)
    assert parse_recipe(dump_recipe(plain), Recipe, source="dump") == plain

    waiting = recipe("{steps: 3 epochs, warmup_steps: 5%}", more="align: {more: {b: {stop_step: 0.5 epochs}}}")
    assert waiting.in_epochs == {"train.steps": "3 epochs", "align.more.b.stop_step": "0.5 epochs"}
    assert parse_recipe(dump_recipe(waiting), Recipe, source="dump") == waiting
    found = waiting.resolved(1000)
    assert (found.in_epochs, found.train.steps, found.train.warmup_steps) == ({}, 94, 5)
    assert found.align is not None
    assert found.align.more["b"].stop_step == 16
    with pytest.raises(ArraError, match=r"^train\.steps: '3 epochs' needs to know how many pictures there are; write"):
        waiting.resolved(None)


@pytest.mark.parametrize(
    ("train", "line"),
    [
        ("{steps: soon}", "x.yaml: train.steps: 'soon' is no duration; write steps as a number, or as in '300 epochs' "
                          "or '10_000_000 images'"),
        ("{steps: 3 parsecs}", "x.yaml: train.steps: '3 parsecs' is no duration; write"),
        ("{steps: -3 epochs}", "x.yaml: train.steps: '-3 epochs' is no duration; write"),
        ("{steps: '100'}", "x.yaml: train.steps: '100' is no duration; write steps as a number"),
        ("{steps: 0 epochs}", "x.yaml: train.steps: '0 epochs' is no time at all; expected more than 0"),
        ("{steps: 9, warmup_steps: 200 percent}", "x.yaml: train.warmup_steps: '200 percent' is more than the whole "
                                                  "training; expected at most 100 percent"),
        ("{steps: 5%}", "x.yaml: train.steps: '5%' is a part of the whole training and cannot say how long that is; "
                        "write it as in '300 epochs'"),
        ("{steps: 0}", "x.yaml: train.steps: expected steps (an integer >= 1) or text as in '300 epochs' or "
                       "'10_000_000 images', found 0"),
        ("{steps: true}", "x.yaml: train.steps: expected steps (an integer >= 1) or text as in '300 epochs' or "
                          "'10_000_000 images', found true"),
        ("{steps: 2.5}", "x.yaml: train.steps: expected steps (an integer >= 1) or text"),
        ("{steps: [1]}", "x.yaml: train.steps: expected steps (an integer >= 1) or text"),
        ("{steps: 9, warmup_steps: -1}", "x.yaml: train.warmup_steps: expected steps (an integer >= 0) or text as in "
                                         "'300 epochs' or '3 percent', found -1"),
        ("{steps: 9, keep_every_steps: 0}", "x.yaml: train.keep_every_steps: expected steps (an integer >= 1) or text"),
        ("{}", "x.yaml: train.steps: missing; expected an integer >= 1 or text as in '300 epochs'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(train: str, line: str) -> None:
    found = refusal(train)
    assert found.startswith(line)
    assert "\n" not in found
    assert "more)" not in found  # one mistake, though two forms are taken


def test_a_mistake_names_its_key_wherever_it_is() -> None:
    assert refusal("{steps: 9}", overrides=("train.steps=x",)).startswith("--set train.steps: 'x' is no duration;")
    found = refusal("{steps: 9}", more="align: {more: {b: {stop_step: 3 x}}}")
    assert found.startswith("x.yaml: align.more.b.stop_step: '3 x' is no duration;")


def test_zero_and_whole_floats_are_taken() -> None:
    found = recipe("{steps: 1e3, warmup_steps: 0 epochs, log_every_steps: 20.0}").resolved(10)
    assert (found.train.steps, found.train.warmup_steps, found.train.log_every_steps) == (1000, 0, 20)


def test_the_schema_describes_both_forms() -> None:
    field = json_schema()["$defs"]["TrainSettings"]["properties"]["warmup_steps"]
    number, text = field["anyOf"]
    assert number == {"type": "integer", "minimum": 0}
    assert text["type"] == "string"
    for good in (*text["examples"], "3%", "1 epoch", "0.5 epochs"):
        assert re.search(text["pattern"], good)  # as JSON schema reads a pattern
    for bad in ("soon", "3 epochs or so", "in 3 epochs", "-3 epochs"):
        assert not re.search(text["pattern"], bad)
