"""How a training hears that it should stop: a flag that it reads between steps, never in the middle of one."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""From the keyboard; from a scheduler or torchrun; from SLURM, some time before a job's time is over."""
ECHO_SECONDS = 1.0
"""A SIGINT this soon after the first is the same one: torchrun passes on what the terminal has sent to all."""


class TrainingInterrupted(Exception):
    """A signal asked to stop; the state is saved, running the same command again continues."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A block in which SIGINT, SIGTERM and SIGUSR1 only set a flag, which the given function reads.

    Raises:
        KeyboardInterrupt: a second SIGINT, at once.
    """
    asked, interrupted_at = False, None

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked, interrupted_at
        asked = True
        if number == signal.SIGINT:
            if interrupted_at is not None and time.monotonic() - interrupted_at > ECHO_SECONDS:
                raise KeyboardInterrupt
            interrupted_at = interrupted_at or time.monotonic()

    kept = {number: signal.signal(number, ask) for number in ASKING}
    try:
        yield lambda: asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
