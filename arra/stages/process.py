"""What all stages share as processes: how they tell their progress, and when they leave."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

from arra.errors import ArraError
from arra.runs import Run

PARENT = "ARRA_PARENT"
"""Environment variable that names the process a stage was started by."""
SECONDS_FOR_ORPHANS = 30.0
"""How long the trainings of a killed demo may take to notice, finish their step and save."""


@runtime_checkable
class Progress(Protocol):
    """How a stage tells where it is; a total of 0 is not known yet."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""


def started_by_demo() -> bool:
    """Whether this process is a stage of a demo, which reads what it prints."""
    return PARENT in os.environ


def is_first_process() -> bool:
    """Whether this process does the talking: the only one of a command, or the first of those of torchrun."""
    return os.environ.get("RANK", "0") == "0"


def leave_with_parent() -> None:
    """Nothing; if the process that started this one dies, this one is asked to save and leave.

    torchrun may stand between the two.
    """
    parent, starter = os.environ.get(PARENT), os.getppid()
    if parent is None:
        return

    def is_watched() -> bool:
        if starter == int(parent) or "TORCHELASTIC_RUN_ID" not in os.environ:
            return os.getppid() == int(parent)
        try:
            os.kill(int(parent), 0)  # asks whether it lives, and does nothing
        except ProcessLookupError:
            return False
        return os.getppid() == starter

    def wait() -> None:
        while is_watched():
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """A block in which no other process trains in the run.

    A training that a demo started waits first: the demo before it may have been killed, and its trainings are saving.

    Raises:
        ArraError: another process holds the run, or the folder cannot be written.
    """
    deadline = time.monotonic() + (SECONDS_FOR_ORPHANS if started_by_demo() else 0.0)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run.lock())
                break
            except ArraError as error:
                cannot_be_written = error.__cause__ is not None
                if cannot_be_written or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)
        yield
