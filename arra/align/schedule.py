"""How much the alignment counts as training goes on: a schedule of its weight, and a balance of gradients.

Alignment helps most early on and may hold a model back later; all of this is off unless asked for.
"""

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["none", "linear", "cosine"]


@dataclass(frozen=True)
class WeightSchedule:
    """A factor in [0, 1] for every step: up over the warm-up, then down to 0 at the stop (or the end)."""

    warmup_steps: int = 0
    decay: Decay = "none"
    stop_step: int | None = None
    """From this step on there is no alignment; null is the end of training."""

    def factor(self, step: int, *, steps: int) -> float:
        """Of a step counted from 0, of `steps` in all."""
        end = steps if self.stop_step is None else min(self.stop_step, steps)
        if step >= end:
            return 0.0
        rising = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay == "none":
            return rising
        done = max(0, step - self.warmup_steps) / max(1, end - self.warmup_steps)
        return rising * ((1 - done) if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


@dataclass
class Balance:
    """A factor that keeps the alignment's gradient at a share of all other gradient at the states it is taken from.

    The norms are of whole batches and averaged over some steps, so a step's factor follows from the steps before it.
    """

    share: float
    decay: float = 0.9
    ratio: float = 0.0
    """Average of other norm / alignment norm; 0 before the first step, whose factor is 1."""
    steps: int = 0

    LIMIT = 1e4
    """An alignment with next to no gradient would be given an endless weight."""

    @property
    def factor(self) -> float:
        """By which the weight is multiplied."""
        return 1.0 if not self.steps else min(self.LIMIT, self.share * self.ratio / (1 - self.decay**self.steps))

    def update(self, *, aligned: float, other: float) -> None:
        """Nothing; the squared gradient norms of a step are taken in, unless one is 0: then there is nothing to weigh.

        A head that starts at zero sends nothing in the first step, a batch without pictures has no alignment.
        """
        if not (aligned > 0 and other > 0):
            return
        found = min(self.LIMIT, math.sqrt(other / aligned))
        self.ratio = self.decay * self.ratio + (1 - self.decay) * found
        self.steps += 1


def position_shares(count: int, power: float) -> list[float]:
    """Weights of an image's positions, mean 1: equal for power 0, else rising as (place / count) ** power.

    Early tokens have seen little of the picture that they are asked to know.
    """
    raw = [((place + 1) / count) ** power for place in range(count)]
    return [each * count / sum(raw) for each in raw]
