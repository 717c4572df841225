"""The records of a split as wishes: a model is asked for what each of them is called, in their order.

    store --> prompts, classes or caption features of its records --> Wishes --> arra.stages.paint

Legend: N records asked for together, C positions of a caption, F caption feature.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from arra.data.conditions import CaptionConditions
from arra.data.remote import open_store
from arra.data.store import Store
from arra.errors import ArraError
from arra.models import CausalLM, Decoder
from arra.stages.caption_features import CAPTION_FEATURES
from arra.stages.conditions import labels_of
from arra.stages.origin import noted
from arra.stages.painters import LoadedDecoder, LoadedRun
from arra.stages.wishes import Asked, Wishes, class_names_of, label_wishes, number_wishes, prompt_wishes


def make_wishes(
    loaded: LoadedDecoder, asked: Asked, *, folder: Path | None = None, grid: tuple[int, int] | None = None
) -> Wishes:
    """The wishes of what the command line asks for; `folder` holds a text encoder, `grid` is in codes.

    Raises:
        ArraError: the model cannot paint one, or there is no such split.
    """
    if asked.labels:
        return label_wishes(loaded.model, asked.labels)
    if asked.split is None:
        return prompt_wishes(loaded.model, asked.prompts, section=loaded.text_encoder, folder=folder, grid=grid)
    store = _store_of(loaded, asked)
    model = loaded.model
    column = None if folder is not None else _caption_column(loaded, store)
    rows = store.rows(asked.split, columns=[] if column is None else [column])
    table = store.table(["id", "prompt"]).take(pa.array(rows))
    if not isinstance(model, CausalLM) and model.settings.condition == "class":
        wishes = number_wishes(model, _labels(model, store, rows))
    elif column is not None:
        assert isinstance(model, Decoder)
        wishes = _stored_captions(model, store, rows, column, table.column("prompt").to_pylist())
    else:
        prompts = table.column("prompt").to_pylist()
        wishes = prompt_wishes(model, prompts, section=loaded.text_encoder, folder=folder, grid=grid)
    ids = table.column("id").to_pylist()
    facts = [{**fact, "id": each} for fact, each in zip(wishes.facts, ids, strict=True)]
    return replace(wishes, facts=facts, of_records=True)


def _store_of(loaded: LoadedDecoder, asked: Asked) -> Store:
    if asked.store is not None:
        return open_store(asked.store)
    if isinstance(loaded, LoadedRun) and loaded.store is not None:
        return loaded.store
    place = noted(loaded.path).get("at_first", "STORE")
    why = "its store is gone or has changed" if isinstance(loaded, LoadedRun) else "a model that no store belongs to"
    raise ArraError(f"{loaded.path}: {why}; name the one whose split is meant, as in --store {place}")


def _labels(model: Decoder, store: Store, rows: np.ndarray) -> list[int]:
    """The classes of some records, as the model numbers them."""
    labels, names, theirs = labels_of(store, rows).tolist(), class_names_of(model), list(store.about["classes"])
    for label in sorted(set(labels)):
        if label >= model.settings.num_classes:
            raise ArraError(
                f"{store.path}: a record of class {label}, the model paints 0..{model.settings.num_classes - 1}; name "
                "the store that it was trained on"
            )
        if names is not None and label < len(theirs) and theirs[label] != names[label]:
            raise ArraError(
                f"{store.path}: class {label} is '{theirs[label]}' there, the model's is '{names[label]}'; name a "
                "store of the same classes"
            )
    return labels


def _caption_column(loaded: LoadedDecoder, store: Store) -> str | None:
    """The column of caption features by the text encoder that the model was trained with; None if there is none."""
    if loaded.model.settings.condition != "caption":
        return None
    trained = loaded.model.about.get("text_encoder")
    trained = trained if isinstance(trained, dict) else {}
    name = trained.get("name") or (None if loaded.text_encoder is None else loaded.text_encoder.name)
    column = f"{CAPTION_FEATURES}.{name}"
    entry = store.entry(column)
    if name is None or entry is None:
        return None
    # imported features do not say by whose weights they are, nor how captions were cleaned
    for told, key in (("sha256", "weights"), ("clean", "clean")):
        ours, theirs = trained.get(told), entry.made_by.get(key)
        if None not in (ours, theirs) and ours != theirs:
            return None
    return column


def _stored_captions(model: Decoder, store: Store, rows: np.ndarray, column: str, prompts: Sequence[str]) -> Wishes:
    reader, length = store.reader(column), model.settings.condition_length
    slots, width = reader.entry.made_by.get("slots"), reader.entry.shape[-1]
    if width != model.settings.caption_dim or (isinstance(slots, int) and slots > length):
        raise ArraError(
            f"{store.path}: {column}: up to {slots} vectors of {width} numbers, the model takes {length} of "
            f"{model.settings.caption_dim}; name the store that it was trained on"
        )
    conditions = CaptionConditions(rows, reader, length, width)

    def captions(places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.ones(len(places), 3)
        prefix = conditions.take(torch.tensor(places, dtype=torch.int64), whole, whole[:, :1])
        assert prefix.caption is not None
        assert prefix.mask is not None
        return prefix.caption.float(), prefix.mask[:, :length]

    facts = [{"prompt": prompt} for prompt in prompts]
    return Wishes(list(prompts), facts, captions=captions, captions_by=f"{column} {reader.entry.sha256()}")
