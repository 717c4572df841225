"""What all stages share as processes: how they tell their progress, and when they leave."""

import os
import signal
import threading
import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)"""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def leave_with_parent() -> None:
    """Nothing; if the process that started this one dies, this one is asked to save and leave."""
    parent = os.environ.get("ARRA_PARENT")
    if parent is None:
        return

    def wait() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
