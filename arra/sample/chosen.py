"""The sampling settings that were chosen for a run after its training: `sampling.json` beside its recipe.

    arra guidance --write_chosen--> RUN/sampling.json --read_chosen--> whoever paints with the run

The recipe stays what the run was trained by. Delete the file and the run paints as its recipe says.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from arra.errors import ArraError
from arra.runs import atomic_write
from arra.sample.logits import SamplingSettings

CHOSEN_FILE = "sampling.json"


def write_chosen(folder: Path, settings: SamplingSettings, *, steps: int, about: Mapping[str, Any]) -> None:
    """Nothing; the run in `folder`, trained for so many steps, paints with these settings; `about` says why.

    Raises:
        ArraError: the folder cannot be written.
    """
    content = {"sampling": settings.model_dump(mode="json"), "steps": steps, "about": dict(about)}
    atomic_write(folder / CHOSEN_FILE, json.dumps(content, indent=2) + "\n")


def read_chosen(folder: Path, *, steps: int) -> SamplingSettings | None:
    """What was chosen for the run in `folder`, which was trained for so many steps; None where nothing was.

    Raises:
        ArraError: the file is damaged, or was chosen for the run as it was at another step.
    """
    path = folder / CHOSEN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, chosen_at = SamplingSettings(**content["sampling"]), content["steps"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArraError(f"{path}: not what arra guidance writes; delete it, and choose again") from error
    if chosen_at != steps:
        raise ArraError(
            f"{path}: chosen when the run was at step {chosen_at}, it is at {steps}; delete it, and choose again: "
            f"arra guidance {folder}"
        )
    return settings
