"""What a store tells a model of every picture: its caption's words, its class, or its caption's features.

Legend: N records of a split, F caption feature.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int
from torch import Tensor

from arra.config import Recipe
from arra.data.conditions import CaptionConditions, ClassConditions, Conditions, TextConditions
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.captions import StoreCaptions
from arra.stages.makers import caption_features_name
from arra.tokenizers.text import TextTokenizer


def open_conditions(recipe: Recipe, store: Store, rows: np.ndarray, text: TextTokenizer | None) -> Conditions:
    """The conditions of some records, dropped and replaced as the recipe says when training asks for them.

    Raises:
        ArraError: a record has no class, a class has no number, or caption features do not fit.
    """
    model, settings = recipe.model, recipe.train
    if model.condition == "class":
        return ClassConditions(
            labels_of(store, rows),
            num_classes(recipe, store),
            dropout=settings.condition_dropout,
            rep_token=recipe.has_rep,
        )
    if model.condition == "caption":
        return open_captions(recipe, store, rows)
    assert text is not None
    return TextConditions(
        StoreCaptions(store, rows, text),
        model.prefix_length,
        dropout=settings.condition_dropout,
        alternative_share=settings.alternative_share,
        word_dropout=settings.word_dropout,
        rep_token=recipe.has_rep,
    )


def open_captions(recipe: Recipe, store: Store, rows: np.ndarray) -> CaptionConditions:
    """The caption features of some records, read from the store.

    Raises:
        ArraError: they may be longer than the prefix.
    """
    features, short = store.reader(caption_features_name(recipe)), caption_features_name(recipe, short=True)
    slots, length = features.entry.made_by.get("slots"), recipe.model.prefix_length
    if isinstance(slots, int) and slots > length:
        raise ArraError(
            f"model.prefix_length: {length} is too short for captions of up to {slots} vectors; set it to {slots}"
        )
    return CaptionConditions(
        rows,
        features,
        length,
        caption_width(recipe, store) or 0,
        short=None if store.entry(short) is None else store.reader(short),
        dropout=recipe.train.condition_dropout,
        alternative_share=recipe.train.alternative_share,
        rep_token=recipe.has_rep,
    )


def labels_of(store: Store, rows: np.ndarray) -> Int[Tensor, " N"]:
    """The class numbers of some records.

    Raises:
        ArraError: a record has none.
    """
    labels = store.table(["label"]).column("label").take(pa.array(rows)).combine_chunks()
    if labels.null_count:
        first = store.fields(int(rows[labels.is_null().to_numpy(zero_copy_only=False).argmax()]), "id")[0]
        raise ArraError(
            f"{store.path}: record '{first}' has no class ({labels.null_count} of {len(rows)} have none); "
            "model.condition: class needs labels, as of a folder per class"
        )
    return torch.from_numpy(labels.to_numpy().astype(np.int64))


def num_classes(recipe: Recipe, store: Store) -> int:
    """Classes of the model, without the null class.

    Raises:
        ArraError: a record's class is beyond them.
    """
    highest = pc.max(store.table(["label"]).column("label")).as_py()
    found = max(len(store.about["classes"]), 0 if highest is None else highest + 1)
    count = recipe.model.num_classes or found
    if count < 1:
        raise ArraError(f"{store.path}: no record has a class; model.condition: class needs labels")
    if highest is not None and highest >= count:
        raise ArraError(f"model.num_classes: {count}, but {store.path} has a record of class {highest}; raise it")
    return count


def class_names(store: Store, count: int) -> list[str]:
    """The names of a model's classes; the number where the store knows none."""
    names = list(store.about["classes"])[:count]
    return [*names, *map(str, range(len(names), count))]


def condition_facts(recipe: Recipe, store: Store) -> dict[str, Any]:
    """What a model must know of its conditions to be asked again: names of classes, or who encoded the captions."""
    if recipe.model.condition == "class":
        return {"class_names": class_names(store, num_classes(recipe, store))}
    if recipe.model.condition == "caption":
        assert recipe.text_encoder is not None
        entry = store.entry(caption_features_name(recipe))
        made_by = {} if entry is None else entry.made_by
        # imported features do not say whose weights made them, nor how the captions were cleaned
        facts = {"name": recipe.text_encoder.name, "sha256": made_by.get("weights")}
        return {"text_encoder": facts | {"clean": made_by.get("clean", recipe.text_encoder.clean)}}
    return {}


def caption_width(recipe: Recipe, store: Store) -> int | None:
    """Size of the store's caption features; None for other models."""
    if recipe.model.condition != "caption":
        return None
    entry = store.entry(caption_features_name(recipe))
    return None if entry is None else entry.shape[-1]


def asked_of(conditions: Conditions, store: Store, rows: np.ndarray) -> Callable[[Sequence[int]], dict[str, Any]]:
    """What to ask a model for some of the records (by their places in `rows`), as `generate` and `logits` take it."""

    def asked(places: Sequence[int]) -> dict[str, Any]:
        chosen = torch.tensor(places, dtype=torch.int64)
        if isinstance(conditions, ClassConditions):
            return {"labels": conditions.labels[chosen].tolist()}
        if isinstance(conditions, CaptionConditions):
            whole = torch.ones(len(places), 3)
            prefix = conditions.take(chosen, whole, whole[:, :1])
            assert prefix.caption is not None
            assert prefix.mask is not None
            return {"captions": (prefix.caption.float(), prefix.mask[:, : conditions.length])}  # the model adds REP
        return {"prompts": [store.fields(int(rows[place]), "prompt")[0] for place in places]}

    return asked
