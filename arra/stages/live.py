"""A training while it runs: the line beside its progress, and the page of the run so far.

runs/NAME/report.html    written anew whenever there is news, and by `arra report` of a run that is not evaluated
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from arra.config import Recipe, parse_recipe
from arra.report.run_page import RunSoFar, run_page
from arra.runs import Run, atomic_write
from arra.stages.origin import noted
from arra.train.checkpoints import steps_in

PAGE_FILE = "report.html"
NUM_PREVIEWS = 4
PREVIEW = re.compile(r"step-(\d+)\.png")


def live_page(folder: Path, *, out: Path | None = None) -> Path:
    """The page of a run as far as it has come, whole at every moment; in `out` or beside the run's other files.

    While the run is unfinished the page loads itself anew. Files that are being written, or are damaged, are left out.

    Raises:
        ArraError: no run, or the page cannot be written.
    """
    run = Run.open(folder)
    rows = run.read_metrics()
    text = run.recipe_yaml()
    recipe = parse_recipe(text, Recipe, source=str(run.recipe_path))
    steps = recipe.train.steps if isinstance(recipe.train.steps, int) else None
    page = run_page(
        RunSoFar(
            name=str(folder),
            rows=rows,
            steps=steps,
            is_finished=is_finished(run, recipe),
            written_at=_time_of(run.metrics_path),
            previews=_previews(folder),
            checkpoints=_checkpoints(folder, rows),
            troubles=[found for path in sorted(folder.glob("trouble/*.json")) if (found := _read(path))],
            recipe=text,
            manifest={key: str(value) for key, value in run.manifest().items()},
            attribution=noted(folder).get("attribution") or None,
        )
    )
    path = (out or folder) / PAGE_FILE
    atomic_write(path, page)
    return path


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Whether the run's last step is done and its model saved."""
    saved = all((run.path / name).is_file() for name in ("model.safetensors", "model.json"))
    return saved and any(row["step"] == recipe.train.steps for row in run.read_metrics()[-3:])


def validation_losses(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Of a run's metrics, by step."""
    return {row["step"]: row["ntp_loss"] for row in rows if row.get("kind") == "validation"}


def training_note(row: Mapping[str, Any]) -> str:
    """What stands beside a training's progress: losses, speed, how well the device is used, memory, waiting."""
    if row["kind"] == "validation":
        return f"validation {row['ntp_loss']:.3f}" + (f", text {row['text_loss']:.3f}" if "text_loss" in row else "")
    parts = [f"ntp {row['ntp_loss']:.3f}"]
    if row.get("gva_loss") is not None:
        parts.append(f"gva {row['gva_loss']:.3f}")
    written = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.0%}",
        "peak_memory_gib": "{:.1f} GiB",
        "waiting_share": "waiting {:.0%}",
    }
    return ", ".join(parts + [text.format(row[key]) for key, text in written.items() if key in row])


def _time_of(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    except FileNotFoundError:
        return None


def _previews(folder: Path) -> list[tuple[int, bytes]]:
    """The newest ones, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("previews/*") if (match := PREVIEW.fullmatch(path.name))]
    return [(step, path.read_bytes()) for step, path in sorted(found)[-NUM_PREVIEWS:]]


def _checkpoints(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[int, float | None]]:
    """Their steps, with what was measured there."""
    measured = validation_losses(rows)
    return [(step, measured.get(step)) for step in steps_in(folder / "checkpoints")]


def _read(path: Path) -> dict[str, Any] | None:
    """An event of trouble; None for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "step" in found else None
