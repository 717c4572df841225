"""What is advised against too little memory can be done: the recipe with it is valid, and it is not done already."""

from itertools import product
from typing import Any

import pytest

from arra.config import Recipe, load_recipe
from arra.distributed import Ranks
from arra.train.parallel import SHARDED, chosen_kind
from arra.train.savings import Saving, savings

MIMIC = ("train.steps=100", "train.batch_size=8")


def of(recipe: Recipe, *, ranks: int) -> list[Saving]:
    parallel, llm = recipe.train.parallel, recipe.model.llm
    return savings(
        recipe.train,
        ranks=ranks,
        sharded=parallel.kind in SHARDED or parallel.offload,
        language_model=None if llm is None else llm.train,
        four_bit=llm is not None and llm.four_bit,
    )


@pytest.mark.parametrize("row", ["arra-adapt", "arra-adapt-qlora"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_advised_is_valid_and_not_advised_again(row: str, ranks: int) -> None:
    """A step at a time, whatever was taken before, until nothing is left."""
    seen: set[frozenset[str]] = set()
    waiting: list[frozenset[str]] = [frozenset()]
    while waiting:
        taken = waiting.pop()
        recipe = load_recipe("arra_mimic", row=row, overrides=[*MIMIC, *sorted(taken)])
        four_bit = recipe.model.llm is not None and recipe.model.llm.four_bit
        kind = chosen_kind(recipe.train, ranks=Ranks(size=ranks), state_bytes=0, device_bytes=1, may_shard=not four_bit)
        assert not (four_bit and kind in SHARDED), taken
        for saving in of(recipe, ranks=ranks):
            changes = set(saving.written.split(", "))
            keys = {each.split("=")[0] for each in changes}
            assert not changes <= taken
            more = frozenset({each for each in taken if each.split("=")[0] not in keys} | changes)
            if more not in seen and "train.micro_batch_size" not in keys:
                seen.add(more)
                waiting.append(more)
    assert seen


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("train.ema_decay=0.9",), {"train.ema_offload"}),
        (("train.ema_decay=0.9", "train.ema_offload=true"), set()),
        (("train.ema_decay=null",), set()),
    ],
)
def test_averages_are_moved_where_there_are_some(overrides: tuple[str, ...], told: set[str]) -> None:
    found = of(load_recipe("llamagen_c2i", row="b", overrides=overrides), ranks=1)
    assert {key for each in found for key in each.changes if "ema" in key} == told


def test_what_changes_the_result_comes_last() -> None:
    wide: list[Any] = ["train.precision=float32", "train.precision=bfloat16"]
    for precision, ranks in product(wide, (1, 4)):
        found = of(load_recipe("llamagen_c2i", row="b", overrides=[precision]), ranks=ranks)
        assert [each.same for each in found] == sorted((each.same for each in found), reverse=True)
        assert ("train.precision" in found[-2].changes) == (precision == wide[0])
