"""Laws of trouble: a batch that is left out might as well not be in the data, whenever the training is stopped."""

import json
import math
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from arra.data.batches import TrainBatch
from arra.errors import ArraError
from arra.train.interrupt import TrainingInterrupted
from arra.train.passes import Steps
from arra.train.trouble import Action
from tests.train.toy_training import ALIGN, Disturbed, different, disturbed, make_trainer, rows_of, state_of, trained

DAMAGED = 7
LEFT_OUT: dict[Action, list[int]] = {"skip": [7], "rewind": [6, 7]}


class Without:
    """Batches without those at some positions."""

    def __init__(self, batches: Steps, positions: list[int]) -> None:
        self.batches, self.positions = batches, positions

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        kept = [position for position in range(step + len(self.positions) + 1) if position not in self.positions]
        return self.batches.batch(kept[step], rank=rank, num_ranks=num_ranks)


def told(action: Action) -> dict[str, Any]:
    align = ALIGN.model_copy(update={"balance": 0.5})
    return {"trouble": {"nonfinite": action, "skip_batches": 2}, "align": align, "ema_decay": [0.9, 0.5]}


@pytest.mark.parametrize("action", LEFT_OUT)
@pytest.mark.parametrize("stopped_at", [None, 9])
def test_what_trouble_leaves_out_might_not_be_there(action: Action, stopped_at: int | None, tmp_path: Path) -> None:
    """Bit for bit, in weights and in metrics; the next start leaves it out as well."""
    expected = make_trainer(tmp_path / "without", **told(action))
    expected.ahead.batches = Without(expected.batches, LEFT_OUT[action])
    expected.train()
    trainer = make_trainer(tmp_path / "run", damaged_at=DAMAGED, **told(action))
    if stopped_at is not None:
        trainer.ahead.batches = Disturbed(
            trainer.ahead.batches, stopped_at, signal.SIGTERM, tmp_path / "run" / "signalled"
        )
        with suppress(TrainingInterrupted):
            trainer.train()
        assert trainer.step < trainer.settings.steps
        trainer = make_trainer(tmp_path / "run", damaged_at=DAMAGED, **told(action))
    trainer.train()
    assert trainer.skipped.positions == LEFT_OUT[action]
    assert different(state_of(trainer), state_of(expected)) == []
    assert rows_of(trainer) == rows_of(expected)
    (record,) = (tmp_path / "run" / "trouble").glob("*.json")
    assert json.loads(record.read_text())["action"] == action


def test_later_steps_are_judged_by_the_losses_of_those_before(tmp_path: Path) -> None:
    """After a new start, too."""
    first = trained(tmp_path, log_every_steps=1)
    losses = [row["loss"] for row in rows_of(first) if row["kind"] == "train"]
    second = make_trainer(tmp_path, log_every_steps=1)
    second.resume()
    assert first.losses_seen.recent == second.losses_seen.recent == losses


def test_a_projectors_gradient_that_is_not_finite_is_trouble(tmp_path: Path) -> None:
    """Though it is clipped apart, and every loss is a number."""
    trainer = make_trainer(tmp_path / "run")
    next(iter(trainer.projector.values())).register_hook(lambda gradient: gradient * math.nan)
    before = state_of(trainer)
    with pytest.raises(ArraError, match=r"step 0: .*norm is nan"):
        trainer.train_step()
    assert different(before, state_of(trainer)) == []


def test_a_balanced_weight_goes_on_where_it_was(tmp_path: Path) -> None:
    align = ALIGN.model_copy(update={"balance": 0.5})
    whole = trained(tmp_path / "whole", align=align)
    stopped = disturbed(make_trainer(tmp_path / "run", align=align), 6, signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    assert different(state_of(trained(tmp_path / "run", align=align)), state_of(whole)) == []
