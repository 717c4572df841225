"""What preparation makes of captions: the vectors of a frozen text encoder, a column that no picture is decoded for.

    store/caption_features.NAME/   (n, F) for every record: as many vectors as its caption has tokens, the end included
                      cut.jsonl    id and number of tokens of the captions that were longer than the encoder's slots
    store/caption_features.NAME.short/   the same of every caption's first sentence

Legend: n tokens of a caption, F feature.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arra.config import Recipe
from arra.data.columns import Shape
from arra.data.loading import Loaded, Task
from arra.data.store import Store
from arra.encoders import TextEncoder, caption_text, load_text_encoder, text_encoder_hash, text_encoder_spec
from arra.encoders.text import load_caption_tokenizer
from arra.errors import ArraError
from arra.runs import atomic_write

CAPTION_FEATURES, SHORT = "caption_features", ".short"
"""How the names of these columns begin, and how those of first sentences end."""
CUT_FILE = "cut.jsonl"


@dataclass
class CaptionFeaturesMaker:
    """The vectors that a frozen text encoder has of every caption, as many as it has tokens."""

    encoder: TextEncoder
    made_by: dict[str, Any]
    batch_size: int
    name: str
    clean: bool
    short: bool
    dtype: str = "float32"
    variants: int = 1
    views: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        return (None, self.encoder.spec.feature_size)

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        found: list[np.ndarray] = [np.empty(0)] * len(loaded.captions)
        ids = self.encoder.tokenize(
            [caption_text(each, clean=self.clean, short=self.short) for each in loaded.captions]
        )
        for place, features in self.encoder.encode_ids(ids, batch_size=self.batch_size):
            with np.errstate(over="ignore"):  # told just below
                found[place] = features.cpu().numpy().astype(self.dtype)[None]  # (1, n, F)
            if not np.isfinite(found[place]).all():
                raise ArraError(
                    f"{self.name}: values beyond {self.dtype} for the caption {loaded.captions[place][:60]!r}; set "
                    "data.features_dtype: float32 and text_encoder.dtype: float32"
                )
        return found


class CaptionLoader:
    """Loads the captions of a store's records, and no picture."""

    def __init__(self, store: Path) -> None:
        self.store = Store.open(store)

    def __call__(self, task: Task) -> Loaded:
        prompts = self.store.records_of(task.shard).column("prompt").slice(task.start, task.stop - task.start)
        return Loaded(task, places=list(range(len(prompts))), captions=prompts.to_pylist())


def is_of_captions(name: str) -> bool:
    """Whether a column is made of captions, without a picture."""
    return name.startswith(f"{CAPTION_FEATURES}.")


def caption_features_name(recipe: Recipe, short: bool = False) -> str:
    """The column of the captions' vectors, or of their first sentences'.

    Raises:
        ArraError: the recipe names no text encoder.
    """
    if recipe.text_encoder is None:
        raise ArraError(
            f"recipe {recipe.name}: no text encoder; add one, as in text_encoder: {{name: flan-t5-xl, weights: FOLDER}}"
        )
    return f"{CAPTION_FEATURES}.{recipe.text_encoder.name}" + (SHORT if short else "")


def caption_features_made_by(recipe: Recipe, short: bool = False, *, store: Store | None = None) -> dict[str, Any]:
    """What the store says of the captions' vectors.

    A column that `store` has and that serves as well is wanted as it is: LlamaGen's own features where the recipe
    cleans captions as LlamaGen does, and features made elsewhere by an encoder whose weights are not on this machine.

    Raises:
        ArraError: the text encoder's weights are needed and not here.
    """
    name, section = caption_features_name(recipe, short), recipe.text_encoder
    assert section is not None
    entry = None if store is None else store.entry(name)
    made_by = {
        "encoder": section.name,
        "weights": None if entry is None else entry.made_by.get("weights"),
        "slots": text_encoder_spec(section.name).num_slots,
        "text": "first sentence" if short else "whole caption",
        "clean": section.clean,
        "compute": section.dtype,
        "dtype": recipe.data.features_dtype,
    }
    if entry is not None and "imported" in entry.made_by:
        require_cleaning(recipe, name)
        return entry.made_by
    if entry is None or (section.weights is not None and Path(section.weights).is_dir()):
        made_by["weights"] = text_encoder_hash(section.name, section.weights)
    return made_by


def require_cleaning(recipe: Recipe, name: str) -> None:
    """Nothing.

    Raises:
        ArraError: LlamaGen's own features are of cleaned captions, and the recipe cleans none.
    """
    if recipe.text_encoder is not None and not recipe.text_encoder.clean:
        raise ArraError(
            f"recipe {recipe.name}: text_encoder.clean: the imported column '{name}' is of captions that LlamaGen has "
            "cleaned; set it to true, so that prompts are cleaned alike"
        )


def caption_column_names(recipe: Recipe) -> list[str]:
    """The columns of the recipe's text encoder.

    Raises:
        ArraError: the recipe names none.
    """
    name = caption_features_name(recipe)
    return [name, name + SHORT] if recipe.text_encoder is not None and recipe.text_encoder.short else [name]


def caption_columns(
    recipe: Recipe, *, store: Store | None = None, without: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Those columns, some left out, with what the store will say of them."""
    names = [name for name in caption_column_names(recipe) if name not in without]
    return {name: caption_features_made_by(recipe, name.endswith(SHORT), store=store) for name in names}


def caption_makers(
    recipe: Recipe, names: Sequence[str], *, device: torch.device, batch_size: int
) -> list[CaptionFeaturesMaker]:
    """Makers of the named columns, with one text encoder for all.

    Raises:
        ArraError: its weights or a package are missing.
    """
    section = recipe.text_encoder
    assert section is not None
    encoder = load_text_encoder(section.name, weights=section.weights, device=device, dtype=section.dtype)
    return [
        CaptionFeaturesMaker(
            encoder,
            caption_features_made_by(recipe, name.endswith(SHORT)),
            batch_size,
            name,
            clean=section.clean,
            short=name.endswith(SHORT),
            dtype=recipe.data.features_dtype,
        )
        for name in names
    ]


def note_cut_captions(recipe: Recipe, store: Store, column: str) -> None:
    """Nothing; `cut.jsonl` in the published column names the captions that were longer than the encoder's slots.

    Those are looked for among the records that fill all slots, so a resumed run knows them too, and at no cost.
    """
    section, file = recipe.text_encoder, store.path / column / CUT_FILE
    assert section is not None
    slots = text_encoder_spec(section.name).num_slots
    full = np.nonzero(store.reader(column, content=False).shapes()[:, 0] == slots)[0].tolist()
    lines: list[str] = []
    if full:
        tokenize = load_caption_tokenizer(section.name, weights=section.weights)
        for row in full:
            name, caption = store.fields(row, "id", "prompt")
            (ids,) = tokenize([caption_text(caption, clean=section.clean, short=column.endswith(SHORT))])
            if len(ids) > slots:
                lines.append(json.dumps({"id": name, "tokens": len(ids), "slots": slots}, ensure_ascii=False) + "\n")
    atomic_write(file, "".join(lines))


def num_cut_captions(store: Store, names: Sequence[str]) -> int:
    """How many texts of the named columns were cut."""
    files = [store.path / name / CUT_FILE for name in names]
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
