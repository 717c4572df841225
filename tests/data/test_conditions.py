"""What stands before the codes is a function of the record and of chances that are drawn for the whole batch."""

from typing import Any

import numpy as np
import pytest
import torch

from arra.data.batches import Batches, HeldOutBatches, InMemory, TrainBatch
from arra.data.conditions import CaptionConditions, ClassConditions, Conditions, TextConditions
from arra.data.layout import caption_prefix
from arra.errors import ArraError

COUNT, WIDTH = 10, 3


class Stored:
    """Vectors of record r: r + 1 of them, each r with the number of the vector behind it."""

    def __init__(self, sign: int = 1, lengths: dict[int, int] | None = None) -> None:
        self.sign, self.lengths = sign, lengths or {}
        self.expected: list[list[int]] = []

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._value(int(row)) for row in rows]

    def expect(self, rows: np.ndarray) -> None:
        self.expected.append(rows.tolist())

    def _value(self, row: int) -> np.ndarray:
        length = self.lengths.get(row, row + 1)
        return np.array([[self.sign * row, number, 7] for number in range(length)], np.float16).reshape(length, WIDTH)


def captions(**changes: Any) -> CaptionConditions:
    fields: dict[str, Any] = {"rows": np.arange(COUNT), "features": Stored(), "length": 12, "width": WIDTH}
    return CaptionConditions(**{**fields, **changes})


def batches(conditions: Conditions, batch_size: int = 4) -> Batches:
    return Batches(conditions, InMemory(torch.arange(COUNT * 6).view(COUNT, 6)), batch_size=batch_size, seed=0)


KINDS: dict[str, Conditions] = {
    "class": ClassConditions(torch.arange(COUNT) % 3, null=3, dropout=0.3),
    "caption": captions(dropout=0.3, short=Stored(-1), alternative_share=0.5),
    "text": TextConditions([[[10 + row], [20 + row]] for row in range(COUNT)], 5, dropout=0.3, alternative_share=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_and_jumps_see_the_same(kind: str, num_ranks: int) -> None:
    whole = batches(KINDS[kind])
    for step in (0, 7, 1):
        parts = [batches(KINDS[kind]).batch(step, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        expected = whole.batch(step)
        for name, value in vars(expected).items():
            found = [getattr(part, name) for part in parts]
            assert all(each is None for each in found) if value is None else torch.equal(torch.cat(found), value), name


def all_of(conditions: Conditions, steps: int = 200) -> tuple[TrainBatch, ...]:
    made = batches(conditions, COUNT)
    return tuple(made.batch(step) for step in range(steps))


def test_classes_and_their_null() -> None:
    labels = torch.arange(COUNT) % 3
    found = all_of(ClassConditions(labels, null=3, dropout=0.1))
    dropped = 0
    for batch in found:
        assert batch.rows is not None
        told = batch.tokens[:, 0]
        dropped += int((told == 3).sum())
        assert ((told == 3) | (told == labels[batch.rows])).all()
        assert [*batch.inputs()] == ["dropout_seeds"]
        assert batch.code_mask[:, 0].sum() == 0
        assert batch.predicting.all()  # the class predicts the first code
    assert dropped / (200 * COUNT) == pytest.approx(0.1, abs=0.03)


def test_captions_stand_at_the_end_of_the_prefix() -> None:
    batch = batches(captions(), COUNT).batch(0)
    assert batch.rows is not None
    assert batch.caption is not None
    assert batch.prefix_mask is not None
    assert batch.caption.dtype == torch.float16
    assert batch.prefix_mask.sum(1).tolist() == (batch.rows + 1).tolist()
    for row, vectors, mask in zip(batch.rows.tolist(), batch.caption, batch.prefix_mask, strict=True):
        assert mask.tolist() == [False] * (11 - row) + [True] * (row + 1)
        assert not vectors[~mask].any()
        assert vectors[mask].tolist() == [[row, number, 7] for number in range(row + 1)]
    assert batch.predicting[:, 11:].all()
    assert not batch.predicting[:, :11].any()


def test_dropped_captions_keep_their_vectors_and_short_ones_take_their_place() -> None:
    short = Stored(-1, lengths={4: 0})  # record 4 has no short text
    plain, mixed = all_of(captions(), 100), all_of(captions(dropout=0.1, short=short, alternative_share=0.3), 100)
    dropped = replaced = both = 0
    for ours, theirs in zip(plain, mixed, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)  # the pictures are not shifted
        assert theirs.rows is not None
        assert theirs.caption is not None
        assert theirs.null_caption is not None
        assert not ours.null_caption.any()  # type: ignore[union-attr]
        dropped += int(theirs.null_caption.sum())
        signs = theirs.caption[:, -1, 0]
        is_short = signs < 0
        replaced += int(is_short.sum())
        both += int((is_short & theirs.null_caption).sum())
        assert torch.equal(signs.abs().long(), theirs.rows)
        assert not is_short[theirs.rows == 4].any()
    assert dropped / 1000 == pytest.approx(0.1, abs=0.04)
    assert replaced / (1000 * 8 / 10) == pytest.approx(0.3, abs=0.06)  # record 0 has no sign
    assert both < dropped / 2  # one is drawn apart from the other


def test_what_comes_next_is_expected() -> None:
    ones = {100 + row: 1 for row in range(COUNT)}
    stored, short = Stored(lengths=ones), Stored(-1, lengths=ones)
    made = batches(captions(rows=np.arange(COUNT) + 100, features=stored, short=short))
    for step in range(3):
        made.batch(step)
    for column in (stored, short):
        assert column.expected == [(made.plan.batch(step) + 100).tolist() for step in (1, 2, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_sees_every_record_once_with_its_own_condition(kind: str) -> None:
    codes = torch.arange(COUNT * 6).view(COUNT, 6)
    held_out = list(HeldOutBatches(KINDS[kind], codes, batch_size=4))
    assert [len(batch.tokens) for batch in held_out] == [5, 5]
    assert torch.cat([batch.tokens[:, -6:] for batch in held_out]).equal(codes)
    for batch in held_out:
        assert batch.rows is not None
        if kind == "class":
            assert torch.equal(batch.tokens[:, 0], batch.rows % 3)
        elif kind == "text":
            assert torch.equal(batch.tokens[:, 3], 10 + batch.rows)
        else:
            assert batch.caption is not None
            assert torch.equal(batch.caption[:, -1, 0].long(), batch.rows)
            assert not batch.null_caption.any()  # type: ignore[union-attr]


def test_captions_that_are_too_long() -> None:
    with pytest.raises(ArraError, match=r"10 vectors do not fit the 9 prefix positions; raise model\.prefix_length"):
        batches(captions(length=9), COUNT).batch(0)
    assert caption_prefix([], 4, width=2)[0].shape == (0, 4, 2)
