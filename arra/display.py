"""What a person sees while a stage works: a live display on a terminal, a line now and then elsewhere."""

import math
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

SECONDS_BETWEEN_LINES = 15.0
SECONDS_OF_SPEED = 600.0
"""By how long the time that is left is told: large models log once in minutes."""


class Display:
    """Named rows of progress; `show` may be called as often as wanted."""

    def __init__(self, console: Console, *, seconds_between_lines: float | None = None) -> None:
        self.console = console
        self.interval = SECONDS_BETWEEN_LINES if seconds_between_lines is None else seconds_between_lines
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=min(24, max(6, console.width // 8)), table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            # where there is little room the note goes on below: neither it nor the time that is left is cut
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=False)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("[dim]left"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=SECONDS_OF_SPEED,
        )
        self.rows: dict[str, TaskID] = {}
        self.last_time: dict[str, float] = {}
        self.last_line: dict[str, str] = {}
        self.begun: dict[tuple[str, str], tuple[float, int]] = {}

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def row(self, name: str) -> Callable[..., None]:
        """What a stage calls to tell its progress, shown in the row of this name."""

        def tell(what: str, done: int, total: int, note: str = "") -> None:
            self.show(name, what, done, total, note)

        return tell

    def show(self, row: str, what: str, done: int, total: int, note: str = "") -> None:
        """Sets a row to `done` of `total`, with what is going on and a note (losses, speed)."""
        if not self.console.is_terminal:
            self._line(row, what, done, total, note)
            return
        if row not in self.rows:
            self.rows[row] = self.progress.add_task(f"{row}: {what}", total=total or None, note=note)
        self.progress.update(
            self.rows[row], description=f"{row}: {what}", completed=done, total=total or None, note=note
        )

    def _line(self, row: str, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if (done < total or not total) and now - self.last_time.get(row, -math.inf) < self.interval:
            return
        count = f" {done}/{total}" if total > 1 else f" {done}" if done and not total else ""
        begun, first = self.begun.setdefault((row, what), (now, done))
        left = ""
        if self.interval and first < done < total and now - begun > self.interval:
            left = f", {timedelta(seconds=round((now - begun) / (done - first) * (total - done)))} left"
        line = f"{row}: {what}{count}{'  ' + note if note else ''}"
        if line != self.last_line.get(row):
            self.console.print(line + left, highlight=False, markup=False, soft_wrap=True)
        self.last_time[row], self.last_line[row] = now, line
