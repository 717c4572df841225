"""How pictures are numbered, and what of the command line is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arra.errors import ArraError
from arra.stages.paint import paint
from arra.stages.request import (
    MAX_SEED,
    Numbers,
    PaintOptions,
    PaintRequest,
    balance_note,
    chosen_seeds,
    number,
    parse_options,
    parse_seeds,
)
from arra.stages.wishes import Asked, Wishes, read_asked


def test_seeds_are_read_as_written() -> None:
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("5, 1,9-10") == [5, 1, 9, 10]
    assert parse_seeds(str(2**63 - 1)) == [2**63 - 1]
    for text in ("", "a", "3-1", "-1", "1,", "1-", "1.5"):
        with pytest.raises(ArraError, match=r"^--seeds .*: expected numbers as in 0-7 or 1,5,9$"):
            parse_seeds(text)
    for text in ("0-99999999999", str(2**63)):
        with pytest.raises(ArraError, match="expected at most 10000 seeds"):
            parse_seeds(text)


def test_a_number_of_pictures_takes_one_seed() -> None:
    assert list(chosen_seeds(None, None)) == list(range(8))
    assert list(chosen_seeds(None, 50_000)) == [0]
    assert list(chosen_seeds("7", 50_000)) == [7]
    with pytest.raises(ArraError, match="--seeds 0-7: with --num-images every picture has its own; give the first"):
        chosen_seeds("0-7", 10)
    numbers = number(1000, PaintRequest(Path("run"), Asked(labels=("all",)), num_images=50_000, seeds=[3]))
    assert len(numbers) == 50_000
    assert (numbers.place(49_999), numbers.seed(49_999)) == (999, 50_002)
    with pytest.raises(ArraError, match="--num-images 2: seeds from 9223372036854775807 on would go beyond"):
        number(1, PaintRequest(Path("run"), Asked(), num_images=2, seeds=[MAX_SEED]))


def test_replacing_is_not_for_jobs_of_an_array() -> None:
    how: dict[str, Any] = {"out": None, "batch_size": 1, "device": "cpu", "npz": False, "grid": True}
    how |= {"graphs": None, "compiled": False}
    with pytest.raises(ArraError, match="--replace and --shard do not go together"):
        parse_options(shard="0/2", replace=True, **how)
    with pytest.raises(ArraError, match="--shard 2/2: expected i/n with i from 0 to n-1, as in 0/8"):
        parse_options(shard="2/2", replace=False, **how)


def test_steps_are_what_is_compiled() -> None:
    assert PaintOptions(compiled=True).graphs is None
    with pytest.raises(ArraError, match="--compile and --no-graphs do not go together"):
        PaintOptions(compiled=True, graphs=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "none"}, "preset 'none': unknown; known are llamagen-c2i"),
        ({"sampling": {"cfg_scale": None, "top_p": 0.0}}, "generate: top_p: Input should be greater than 0, got 0.0"),
        ({"weights": "int2"}, "--weights int2: unknown; expected one of float32, bfloat16, float16, int8, int4"),
    ],
)
def test_what_needs_no_model_is_told_before_one_is_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArraError, match="^" + message):
        paint(PaintRequest(Path("no such model"), Asked(labels=("all",)), **fields))


def test_who_gets_no_picture_is_told() -> None:
    some = Wishes(["a", "b", "c"], [{}] * 3)
    seen = [
        (some, 2),
        (some, 4),
        (replace(some, labels=[0, 1, 2]), 4),
        (replace(some, labels=[0, 0, 1], of_records=True), 1),
    ]
    assert [balance_note(wishes, Numbers(3, range(count), in_turn=True)) for wishes, count in seen] == [
        "3 prompts: the first 2 get 1 picture, the others none",
        "",
        "3 classes: the first gets 2 pictures, the others 1",
        "3 records: the first gets 1 picture, the others none",
    ]


def test_a_split_goes_alone() -> None:
    assert read_asked([], None, [], split="test", store="s") == Asked(split="test", store="s")
    with pytest.raises(ArraError, match="--split says what to paint; leave out --prompt, --prompts and --label"):
        read_asked(["x"], None, [], split="test")
    with pytest.raises(ArraError, match="--store: belongs to --split NAME"):
        read_asked(["x"], None, [], store="s")


def test_a_grid_shows_conditions_by_rows() -> None:
    assert Numbers(3, range(4), in_turn=False).sheet(2, 3) == [[0, 1, 2], [4, 5, 6]]
    assert Numbers(3, range(4), in_turn=False).sheet(64, 16) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert Numbers(3, range(7), in_turn=True).sheet(64, 16) == [[0, 3], [1, 4], [2, 5]]
    assert Numbers(3, range(2), in_turn=True).sheet(64, 16) == [[0], [1]]
