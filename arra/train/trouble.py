"""Trouble of a training step: told before its update, left out of the data order, survived or not.

Place in the pipeline: the loop asks `LossWatch` after the backward pass whether the step may be made, `Skipped` which
batch a step takes. Both are functions of what all ranks know alike (the loss of the whole batch, a file of rank zero),
so all ranks decide the same. What is found out about a step in trouble is `arra.train.trouble_record`'s.
"""

import json
import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.runs import atomic_write
from arra.train.settings import TroubleSettings

Reason = Literal["nonfinite", "spike"]
Action = Literal["stop", "skip", "rewind"]

FEWEST_LOSSES = 8
"""Before so many steps nothing can be called a spike."""
LEAST_DEVIATION = 0.01
"""Of the mean: a loss that has come to rest deviates so little that its smallest move would be a spike."""


class LossWatch:
    """Judges a step by the losses before it; its state is part of a checkpoint, so a resumed run judges the same."""

    def __init__(self, settings: TroubleSettings) -> None:
        self.settings = settings
        self._accepted: deque[float] = deque(maxlen=settings.spike_window)

    @property
    def recent(self) -> list[float]:
        """The last accepted losses, oldest first."""
        return list(self._accepted)

    def judge(self, loss: float, grad_norm: float) -> Reason | None:
        """What is wrong with a step whose update is not made yet; None where nothing is.

        A spike is a loss more than `spike_deviations` standard deviations above the mean of the last accepted ones;
        where the recipe ignores spikes there are none.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "nonfinite"
        if self.settings.spike != "ignore" and loss > self.limit():
            return "spike"
        return None

    def limit(self) -> float:
        """The loss above which a step is a spike; infinite while there is too little to compare with."""
        count = len(self._accepted)
        if count < FEWEST_LOSSES:
            return math.inf
        mean = math.fsum(self._accepted) / count
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._accepted) / count)
        return mean + self.settings.spike_deviations * max(deviation, LEAST_DEVIATION * abs(mean))

    def accept(self, loss: float) -> None:
        """Nothing; the update was made, and later steps are compared with this loss as well."""
        self._accepted.append(loss)

    def tensor(self) -> Float64[Tensor, " window"]:
        """The state for a checkpoint: accepted losses, oldest first, behind them NaN for those still to come."""
        state = torch.full((self.settings.spike_window,), math.nan, dtype=torch.float64)
        state[: len(self._accepted)] = torch.tensor(self.recent, dtype=torch.float64)
        return state

    def restore(self, state: Float64[Tensor, " window"]) -> None:
        """Nothing; the state is that of the `tensor()` given."""
        self._accepted.clear()
        self._accepted.extend(loss for loss in state.tolist() if not math.isnan(loss))


@dataclass(frozen=True)
class Survived:
    """One time that training went on after trouble."""

    step: int
    reason: Reason
    action: Action
    positions: tuple[int, ...]
    """Of the data order, left out from then on."""


class Skipped:
    """Which batches of the data order are left out for good, and how often training went on after trouble.

    Kept in `RUN/skipped.json`, not in checkpoints: what is left out must outlive a return to an older one. Whoever
    resumes at a step finds the same batches before it, because a batch is only ever left out at or after the step of
    every checkpoint that there is; so a kill at any time ends in the same weights.
    """

    def __init__(self, run: Path, ranks: Ranks) -> None:
        """Reads the file on rank zero, for all ranks.

        Raises:
            ArraError: the file is damaged.
        """
        self.path, self._ranks = run / "skipped.json", ranks
        self.survived: list[Survived] = ranks.by_first(lambda: _read(self.path))

    @property
    def positions(self) -> list[int]:
        """All positions that are left out, in order."""
        return sorted({position for each in self.survived for position in each.positions})

    def position(self, step: int) -> int:
        """The position in the data order of the batch of a step: the `step`-th, from 0, that is not left out."""
        position = step
        for left_out in self.positions:
            if left_out > position:
                break
            position += 1
        return position

    def plan(self, action: Action, *, step: int, since: int, batches: int) -> tuple[int, ...]:
        """The positions to leave out after trouble in `step`, whose update was not made.

        For `skip` the batch of this step; for `rewind` also the `batches` - 1 before it, of steps from `since` on,
        the step of the checkpoint that training goes back to; for `stop` none.
        """
        if action == "stop":
            return ()
        first = step if action == "skip" else max(since, step - batches + 1)
        return tuple(self.position(each) for each in range(first, step + 1))

    def add(self, survived: Survived) -> None:
        """Nothing; the file knows of it, and all ranks leave the positions out from now on.

        Called on all ranks, before training goes on.
        Raises:
            ArraError: the file cannot be written.
        """
        told = [*self.survived, survived]
        content = json.dumps({"survived": [asdict(each) for each in told]}, indent=2) + "\n"
        self._ranks.by_first(lambda: atomic_write(self.path, content))
        self.survived = told

    def action(self, reason: Reason, settings: TroubleSettings) -> Action:
        """What the recipe wants done; `stop` where training went on so often that it may not again."""
        wanted = settings.nonfinite if reason == "nonfinite" else settings.spike
        assert wanted != "ignore"  # then there are no spikes
        return "stop" if len(self.survived) >= settings.most else wanted


def _read(path: Path) -> list[Survived]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_checked(each) for each in content["survived"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise ArraError(
            f"{path}: damaged; without it training cannot go on as it began: restore it, or delete the run folder and "
            "train again"
        ) from None


def _checked(entry: dict[str, Any]) -> Survived:
    each = Survived(**entry | {"positions": tuple(entry["positions"])})
    if not all(type(position) is int and position >= 0 for position in each.positions):
        raise ValueError(each.positions)
    return each
