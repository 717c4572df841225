"""Batches are functions of (seed, step); the aligned positions are exactly the states that predict the codes."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.data.batches import NOTHING, Batches, InMemory, TrainBatch, text_batch
from arra.data.conditions import TextConditions
from arra.data.layout import BOI, PAD, text_prefix
from arra.data.order import mix
from arra.errors import ArraError

TOLD = ("captions", "dropout", "alternative_share", "word_dropout")


def make(**changes: Any) -> Batches:
    count = changes.pop("count", 11)
    told: dict[str, Any] = {
        "captions": [[[10 + row], [100 + row, 5], [200 + row]] for row in range(count)],
        "length": 5,
    }
    told |= {name: changes.pop(name) for name in TOLD if name in changes}
    fields: dict[str, Any] = {
        "conditions": TextConditions(**told),
        "pictures": InMemory(
            torch.arange(count * 6).view(count, 6), {"teacher": torch.arange(count).float()[:, None].expand(-1, 3)}
        ),
        "batch_size": 4,
        "seed": 0,
    }
    return Batches(**{**fields, **changes})


def held(batches: Batches) -> InMemory:
    assert isinstance(batches.pictures, InMemory)
    return batches.pictures


def equal(one: TrainBatch, other: TrainBatch) -> bool:
    names = ("tokens", "labels", "code_mask", "prefix_mask", "rows", "dropout_seeds")
    assert one.features is not None
    assert other.features is not None
    same = [torch.equal(getattr(one, name), getattr(other, name)) for name in names]
    return all(same) and torch.equal(one.features["teacher"], other.features["teacher"])


def rows_of(batches: Batches, steps: range) -> list[int]:
    rows = []
    for step in steps:
        found = batches.batch(step).rows
        assert found is not None
        rows += found.tolist()
    return rows


def prompt_ids(batch: TrainBatch) -> list[tuple[int, ...]]:
    assert batch.prefix_mask is not None
    length = batch.prefix_mask.shape[1]
    pairs = zip(batch.tokens[:, :length], batch.prefix_mask, strict=True)
    return [tuple(tokens[mask].tolist()) for tokens, mask in pairs]


@pytest.mark.parametrize(("count", "batch_size"), [(11, 4), (8, 4), (3, 7), (1, 2)])
def test_every_epoch_is_a_permutation(count: int, batch_size: int) -> None:
    batches = make(count=count, batch_size=batch_size)
    rows = rows_of(batches, range(count * 3))
    epochs = [rows[start : start + count] for start in range(0, len(rows) - count + 1, count)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 3:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    options: dict[str, Any] = {"dropout": 0.3, "alternative_share": 0.5}
    forward = make(**options)
    in_order = [forward.batch(step) for step in range(30)]
    torch.manual_seed(5)
    jumping = make(**options)
    before = torch.get_rng_state()
    for step in (29, 3, 17, 0, 29, 8):
        assert equal(jumping.batch(step), in_order[step]), step
    assert torch.equal(torch.get_rng_state(), before)  # no global randomness
    assert rows_of(make(seed=1), range(5)) != rows_of(make(seed=0), range(5))


def test_one_setting_does_not_shift_the_randomness_of_another() -> None:
    """Baseline and variants see the same pictures, and the same prompts wherever they may."""
    base = make(count=50, batch_size=50, alternative_share=0.5)
    told = base.conditions
    assert isinstance(told, TextConditions)
    dropping = replace(base, conditions=replace(told, dropout=0.3))
    bare = replace(
        base, pictures=InMemory(held(base).codes), conditions=replace(told, dropout=0.3, alternative_share=0.0)
    )
    for step in range(3):
        kept = 0
        ours, dropped, plain = base.batch(step), dropping.batch(step), bare.batch(step)
        assert torch.equal(ours.tokens[:, 5:], dropped.tokens[:, 5:])
        assert torch.equal(ours.tokens[:, 5:], plain.tokens[:, 5:])
        for one, other in zip(prompt_ids(ours), prompt_ids(dropped), strict=True):
            assert other in (one, (BOI,))
            kept += other == one
        assert 25 <= kept <= 45
        empty = [ids == (BOI,) for ids in prompt_ids(dropped)]
        assert empty == [ids == (BOI,) for ids in prompt_ids(plain)]


@pytest.mark.parametrize(("dropout", "alternatives"), [(0.0, 0.0), (0.1, 0.3), (0.5, 1.0), (0.0, 1.0)])
def test_shares_of_prompts(dropout: float, alternatives: float) -> None:
    batches = make(count=100, batch_size=100, dropout=dropout, alternative_share=alternatives)
    kinds: Counter[str] = Counter()
    for step in range(40):
        batch = batches.batch(step)
        assert batch.rows is not None
        for row, ids in zip(batch.rows.tolist(), prompt_ids(batch), strict=True):
            texts = {(BOI,): "empty", (10 + row, BOI): "own", (100 + row, 5, BOI): "first", (200 + row, BOI): "second"}
            kinds[texts[ids]] += 1
    total = 4000
    deviation = 3.5 * (0.25 / total) ** 0.5
    assert kinds["empty"] / total == pytest.approx(dropout, abs=deviation if dropout else 0)
    expected = (1 - dropout) * alternatives / 2
    assert kinds["first"] / total == pytest.approx(expected, abs=deviation if alternatives else 0)
    assert kinds["second"] / total == pytest.approx(expected, abs=deviation if alternatives else 0)
    if alternatives == 1:
        assert kinds["own"] == 0


def test_records_without_alternatives_keep_their_prompt() -> None:
    batches = make(captions=[[[10 + row]] for row in range(11)], alternative_share=1.0)
    batch = batches.batch(0)
    assert batch.rows is not None
    assert prompt_ids(batch) == [(10 + row, BOI) for row in batch.rows.tolist()]


def test_codes_and_features_belong_to_the_row() -> None:
    batches = make()
    batch = batches.batch(2)
    assert batch.rows is not None
    assert batch.features is not None
    assert torch.equal(batch.tokens[:, 5:], held(batches).codes[batch.rows])
    assert torch.equal(batch.features["teacher"][:, 0], batch.rows.float())
    assert make(pictures=InMemory(held(batches).codes)).batch(2).features is None


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(2, 40), max_size=6), min_size=1, max_size=5),
    num_codes=st.integers(1, 9),
    spare=st.integers(0, 4),
)
def test_layout_of_any_batch(prompts: list[list[int]], num_codes: int, spare: int) -> None:
    """For every prompt length and padding: P states predict, each the code one to its right, and nothing else."""
    length = max(map(len, prompts)) + 1 + spare
    codes = torch.arange(len(prompts) * num_codes).view(len(prompts), num_codes)
    batch = text_batch(prompts, codes, prefix_length=length)
    assert batch.tokens.shape == batch.labels.shape == batch.code_mask.shape == (len(prompts), length + num_codes)
    assert batch.predicting.shape == (len(prompts), length + num_codes - 1)
    assert batch.predicting.sum(1).tolist() == [num_codes] * len(prompts)
    # the first predicting state is the begin-of-image token, whatever the prompt; the last code predicts nothing
    assert batch.tokens[:, :-1][batch.predicting].view(len(prompts), -1)[:, 0].tolist() == [BOI] * len(prompts)
    assert torch.equal(batch.tokens[:, 1:][batch.predicting].view_as(codes), codes)
    assert torch.equal(batch.labels[:, 1:][batch.predicting].view_as(codes), codes)
    assert (batch.labels[~batch.code_mask] == NOTHING).all()
    assert torch.equal(batch.labels != NOTHING, batch.code_mask)
    assert batch.prefix_mask is not None
    for row, ids in enumerate(prompts):
        assert batch.tokens[row, :length].tolist() == [PAD] * (length - len(ids) - 1) + ids + [BOI]
        assert batch.prefix_mask[row].tolist() == [False] * (length - len(ids) - 1) + [True] * (len(ids) + 1)


def test_text_prefix() -> None:
    assert text_prefix([7, 8], 5) == ([PAD, PAD, 7, 8, BOI], [False, False, True, True, True])
    assert text_prefix([], 2) == ([PAD, BOI], [False, True])
    assert text_prefix([7, 8], 3) == ([7, 8, BOI], [True] * 3)
    with pytest.raises(ArraError, match="prompt: 3 tokens and the begin-of-image token do not fit the 3 prefix"):
        text_prefix([7, 8, 9], 3)


def joined(parts: list[TrainBatch]) -> TrainBatch:
    lists = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    features = {"teacher": torch.cat([each["teacher"] for each in lists.pop("features")])}
    fields: dict[str, Any] = {name: None if each[0] is None else torch.cat(each) for name, each in lists.items()}
    return TrainBatch(**fields, features=features)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["plain", "weighted", "buckets"])
def test_the_parts_of_all_ranks_are_the_whole_batch(num_ranks: int, kind: str) -> None:
    """Also where a batch is smaller than the ranks are many, and whoever asks for a step first."""
    options: dict[str, Any] = {"dropout": 0.3, "alternative_share": 0.5, "word_dropout": 0.2}
    if kind == "weighted":
        options |= {"counts": (4, 7), "weights": (2.0, 0.5)}
    if kind == "buckets":
        options |= {"buckets": np.arange(11) % 3}
    whole = make(**options)
    for step in (0, 1, 5, 17, 1, 0):
        parts = [make(**options).batch(step, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        assert equal(joined(parts), whole.batch(step)), step


class Watched(InMemory):
    """Notes what it is asked for."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.arange(count * 6).view(count, 6))
        self.__dict__["asked"] = []

    def take(self, rows: Any, chance: Any) -> Any:
        self.__dict__["asked"].append(("take", rows.tolist(), chance.tolist()))
        return super().take(rows, chance)

    def expect(self, rows: Any, chance: Any) -> None:
        self.__dict__["asked"].append(("expect", rows.tolist(), chance.tolist()))


def test_what_is_taken_next_is_announced() -> None:
    """The same rows and the same chance as the next step takes, so that no picture is cropped twice."""
    pictures = Watched(11)
    batches = make(pictures=pictures)
    for step in range(6):
        batches.batch(step, rank=1, num_ranks=2)
    asked = pictures.__dict__["asked"]
    assert [kind for kind, *_ in asked] == ["take", "expect"] * 6
    for (_, *announced), (_, *taken) in zip(asked[1::2], asked[2::2], strict=False):
        assert announced == taken
    chances = [value for _, _, chance in asked[::2] for row in chance for value in row]
    assert len(set(chances)) == len(chances)
    assert all(0 <= value < 1 for value in chances)


def test_weights_of_sources_are_visits() -> None:
    batches = make(counts=(4, 7), weights=(2.0, 1.0), batch_size=5)
    visits = Counter(rows_of(batches, range(3)))
    assert visits == {row: 2 if row < 4 else 1 for row in range(11)}


def test_mix_depends_on_all_three() -> None:
    numbers = {mix(seed, purpose, index) for seed in range(9) for purpose in ("a", "b", "1/a") for index in range(9)}
    assert len(numbers) == 9 * 3 * 9
    assert all(0 <= number < 2**63 for number in numbers)
    assert mix(1, "2", 3) != mix(1, "2/3", 3)
    assert mix(0, "order", 0) == 3955691223199900983  # the order of every training so far; another loses its resume
