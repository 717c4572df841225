"""Where a training's news arrive."""

import sys
from contextlib import suppress
from typing import Any

from arra.config import Recipe
from arra.errors import ArraError
from arra.runs import Run, atomic_write
from arra.stages.live import live_page, training_note
from arra.stages.process import Progress
from arra.train.trackers import open_trackers


class Desk:
    """Where a training's news arrive on rank zero: the display, trackers, the page of the run so far."""

    def __init__(self, run: Run, recipe: Recipe, progress: Progress) -> None:
        self.run, self.steps, self.progress = run, recipe.train.steps, progress
        self.trackers = open_trackers(
            recipe.train.trackers, run_folder=run.path, name=run.path.name, config=recipe.model_dump(mode="json")
        )

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        for tracker in self.trackers:
            tracker.close()

    def take(self, row: dict[str, Any]) -> None:
        """Nothing; a row of the metrics is shown and passed on."""
        for tracker in self.trackers:
            tracker.log(row)
        if row["kind"] in ("train", "validation"):
            self.progress("step", row["step"], self.steps, training_note(row))
        if row["kind"] in ("validation", "quality"):
            self.refresh()

    def refresh(self) -> None:
        """Nothing; the page is as far as the run."""
        with suppress(ArraError):  # no room for a page is no reason to end a training
            live_page(self.run.path)

    def warn(self, line: str) -> None:
        """Nothing; a line that somebody should read is on the error output."""
        print(f"warning: {line}", file=sys.stderr, flush=True)

    def preview(self, png: bytes, step: int) -> None:
        """Nothing; the pictures are kept and passed on."""
        atomic_write(self.run.path / "previews" / f"step-{step:06d}.png", png)
        for tracker in self.trackers:
            tracker.image("preview", png, step=step)
        self.refresh()
