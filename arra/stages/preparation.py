"""What became of a preparation: counts of all items, times, the verdict, and the table of them for the terminal."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from arra.data.index import is_too_many
from arra.data.store import Store
from arra.errors import ArraError


@dataclass
class Preparation:
    """What became of every item, and how the time went."""

    store: Store | None
    """None where so many items made no record that nothing was begun."""
    items: int
    done: int = 0
    already: int = 0
    skipped: int = 0
    failed: int = 0
    pending: int = 0
    """Records that other parts (`--shard`) have still to make."""
    max_failed_fraction: float = 0.0
    seconds: float = 0.0
    seconds_making: float = 0.0
    """Of the pass over the pictures alone."""
    waiting_seconds: float = 0.0
    cut: int = 0
    """Captions that were longer than the text encoder's slots; `cut.jsonl` in their column names them."""
    num_captions: int = 0
    """Captions that a text encoder read now."""
    seconds_reading: float = 0.0
    place: Path = field(default_factory=Path)

    @property
    def ok(self) -> bool:
        """Whether no more items failed than may."""
        return not is_too_many(self.failed, self.items - self.skipped, self.max_failed_fraction)

    @property
    def verdict(self) -> str:
        """Why this is not a success, in one line."""
        told = (
            f"{self.failed} of {self.items - self.skipped} items failed, more than data.max_failed_fraction "
            f"{self.max_failed_fraction:g} allows"
        )
        if self.store is None:
            return f"{told}; nothing was made yet: mend what failures.jsonl lists, or raise it, and run again"
        if not self.done:
            return f"{told}; the store is finished without them: mend them and run again with --retry-failed"
        return f"{told}; the columns are not finished: mend what failures.jsonl lists, or raise it, and run again"

    def checked(self) -> Store:
        """The store.

        Raises:
            ArraError: too many items failed.
        """
        if not self.ok or self.store is None:
            first, more = json.loads(self.place.joinpath("failures.jsonl").read_text().split("\n")[0]), self.failed - 1
            others = f" (and {more} more in {self.place / 'failures.jsonl'})" if more else ""
            advice = "" if ";" in first["reason"] else "; replace it or remove its line"
            raise ArraError(f"{first['where'] or first['id']}: {first['reason']}{advice}{others}")
        return self.store


def summary_table(found: Preparation) -> Table:
    """Counts and times for the terminal."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="left")
    table.add_column(justify="right")
    rows: list[tuple[str, int]] = [
        ("items in the sources", found.items),
        ("done now", found.done),
        ("there before", found.already),
        ("skipped by the sources' rules", found.skipped),
        ("failed", found.failed),
    ]
    if found.pending:
        rows.append(("left to other parts", found.pending))
    if found.cut:
        rows.append(("captions cut to the text encoder's slots", found.cut))
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    if found.done and found.seconds_making:
        rate = found.done / found.seconds_making
        share = 100 * found.waiting_seconds / found.seconds_making
        table.add_row("pictures per second", f"{rate:.1f}")
        table.add_row("share of the time waiting for data", f"{share:.0f} %")
    if found.num_captions and found.seconds_reading:
        table.add_row("captions per second", f"{found.num_captions / found.seconds_reading:.1f}")
    return table
