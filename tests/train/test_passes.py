"""What a rank is given to pass: the batch of its position, and a row without anything to learn where it has none."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arra.data.batches import NOTHING, TrainBatch
from arra.distributed import Ranks
from arra.train.passes import Ahead, select, validation_loss
from tests.train.toy_training import make_batches, make_trainer


class Noted:
    """Toy batches, and what was asked for."""

    def __init__(self) -> None:
        self.batches, self.asked = make_batches(), list[int]()

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        self.asked.append(step)
        return self.batches.batch(step, rank=rank, num_ranks=num_ranks)


def test_what_was_made_ahead_is_taken_for_its_own_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble changes what comes next after it was begun."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    noted = Noted()
    with Ahead(noted, Ranks(), threaded=True) as ahead:
        for position, then in ((0, 1), (1, 2), (5, 6), (6, 7)):
            found = ahead.take(position, then=then)
            assert torch.equal(found.tokens, make_batches().batch(position).tokens)
    assert noted.asked.count(1) == noted.asked.count(6) == 1


def test_a_rank_without_rows_passes_one_that_teaches_nothing(tmp_path: Path) -> None:
    ranks = Ranks(rank=0, size=7)
    batch = Ahead(make_batches(), ranks, threaded=False).take(0, then=1)  # of six rows
    assert len(batch.tokens) == 1
    assert bool((batch.labels == NOTHING).all())
    assert not bool(batch.code_mask.any())
    trainer = make_trainer(tmp_path, micro_batch_size=1)
    passed = trainer.passes.gradients(batch, step=0)
    assert (passed.counts.labelled, passed.counts.images) == (0, 0)
    assert passed.losses.total == 0
    for name, parameter in trainer.parameters.items():
        assert parameter.grad is not None, name  # what has none would be left out of sums over ranks
        assert not bool(parameter.grad.any()), name


class OneOfTwo(Ranks):
    """A rank that tells what it would add to the other's."""

    def sum(self, values: Sequence[float]) -> list[float]:
        SUMMED.append(list(values))
        return list(values)


SUMMED: list[list[float]] = []


def test_ranks_share_out_what_is_validated_and_count_nothing_twice(tmp_path: Path) -> None:
    """Three batches on two ranks, which make two passes each."""
    trainer = make_trainer(tmp_path)
    (batch,) = trainer.validation
    batches = [select(batch, rows) for rows in (slice(0, 1), slice(1, 3), slice(2, 3))]
    alone = validation_loss(trainer.model, batches)
    SUMMED.clear()
    for rank in range(2):
        validation_loss(trainer.model, batches, ranks=OneOfTwo(rank=rank, size=2))
    (total, count), (other, more) = SUMMED
    assert (count, more) == (12, 12)  # codes
    assert (total + other) / (count + more) == pytest.approx(alone, rel=1e-6)
