"""How a training hears that it should stop: a flag that it reads between steps, never in the middle of one."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingInterrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is saved, running the same command again continues."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A block in which SIGINT and SIGTERM only set a flag, which the given function reads."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    kept = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
