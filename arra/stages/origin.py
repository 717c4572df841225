"""Which store a run was trained on: noted in the run folder, found again wherever the folders were moved together.

runs/NAME/store.json   where the store lies, seen from the run, and the credit line its pictures ask for
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arra.config import Recipe
from arra.data.llamagen_lists import LlamaGenCodesSource
from arra.data.remote import open_store, remote_text
from arra.data.store import Store
from arra.errors import ArraError
from arra.runs import atomic_write
from arra.stages.makers import caption_features_name, used_choices

STORE_FILE = "store.json"


def columns_of(recipe: Recipe) -> list[str]:
    """The columns of the store that a run of this recipe is trained on."""
    told = _told(recipe)
    if recipe.data.mode == "online":
        return ["pictures", *told]
    features = dict.fromkeys(choice.column for choice in used_choices(recipe).values())
    return ["codes", *features, *told]


def _told(recipe: Recipe) -> list[str]:
    """The columns of what a model of captions is told."""
    if recipe.model.condition != "caption" or recipe.text_encoder is None:
        return []
    return [
        caption_features_name(recipe, short) for short in ((False, True) if recipe.text_encoder.short else (False,))
    ]


def judged_columns(recipe: Recipe) -> list[str]:
    """The columns of the store that held-out pictures are measured by."""
    first = "codes" if recipe.data.mode == "cached" else "pictures"
    sources = recipe.data.sources or ()
    codes_alone = recipe.data.source == "llamagen-codes" or (
        len(sources) > 0 and all(isinstance(source, LlamaGenCodesSource) for source in sources)
    )
    return [first, *(["pixels"] if recipe.data.keeps_pixels and not codes_alone else []), *_told(recipe)]


def note_store(folder: Path, store: Store) -> None:
    """Nothing; the run folder says where its store lies."""
    here, there = folder.resolve(), store.place
    note = {
        "path": None if remote_text(there) else os.path.relpath(there, here),
        "at_first": there,
        "attribution": store.manifest()["records"]["attribution"],
    }
    if noted(folder) != note:
        atomic_write(folder / STORE_FILE, json.dumps(note, indent=2) + "\n")


def noted(folder: Path) -> dict[str, Any]:
    """What `note_store` wrote; empty where there is nothing readable."""
    try:
        note = json.loads((folder / STORE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def find_store(folder: Path, columns: list[str], expected: str) -> Store | None:
    """The store whose columns have the hash that the run was trained on, or None if it is not found.

    It is looked for from the run folder, then where it was at first, then beside the run as `arra demo` lays it.
    """
    for place in _candidates(folder):
        try:
            store = open_store(place)
            if store.manifest_hash(*columns) == expected:
                return store
        except (ArraError, KeyError):  # no store, or one without these columns: another one
            continue
    return None


def _candidates(folder: Path) -> Iterator[Path | str]:
    note = noted(folder)
    if isinstance(note.get("path"), str):
        yield Path(os.path.normpath(folder.resolve() / note["path"]))
    if isinstance(note.get("at_first"), str):
        yield note["at_first"]
    for above in list(folder.resolve().parents)[:2]:
        yield above / "store"
