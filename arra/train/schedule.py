"""The learning rate of every step: up over the warm-up, then as the schedule says.

It follows from the settings alone, so a resumed run goes on where it was. The loop asks for it before each update.
"""

import math

from arra.train.settings import TrainSettings


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of a step, counted from 0, of resolved settings; never 0 in the first step.

    A schedule that falls reaches `final_learning_rate` where the training ends, at `step == settings.steps`: the last
    step, `settings.steps - 1`, is one step's fall above it, and so not lost where that is 0. A warm-up that is longer
    than the training is cut off by its end; a decay that would begin in the warm-up begins after it.
    """
    s = settings
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    begin = s.warmup_steps
    if s.schedule == "wsd":
        begin = max(begin, s.steps - s.decay_steps)
    if s.schedule == "constant" or step < begin:
        return s.learning_rate
    share = _share_left((step - begin) / max(1, s.steps - begin), s.decay_shape if s.schedule == "wsd" else s.schedule)
    return s.final_learning_rate + (s.learning_rate - s.final_learning_rate) * share


def _share_left(done: float, shape: str) -> float:
    """Of the fall, in [0, 1], after a share of its steps."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - (math.sqrt(done) if shape == "sqrt" else done)  # sqrt: Hägele et al. 2024, arXiv 2405.18392
