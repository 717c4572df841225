"""What a training reads from a store: batches, held-out batches, features for the target spaces.

Legend: N records, P image positions, F feature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arra.config import Recipe
from arra.data.batches import Batches, HeldOutBatches, TrainBatch
from arra.data.language import LayoutWriter, MixedBatches
from arra.data.loading import default_workers
from arra.data.order import Order
from arra.data.records import source_names
from arra.data.store import Store
from arra.errors import ArraError
from arra.models.language_folder import LanguageCard
from arra.stages.captions import check_caption_lengths
from arra.stages.conditions import asked_of, open_conditions
from arra.stages.language import (
    check_sequences,
    held_out_batches,
    language_card,
    prompt_conditions,
    shapes_of,
    text_rows,
)
from arra.stages.makers import center_variant, crop_of
from arra.stages.model import text_tokenizer_of
from arra.stages.origin import columns_of
from arra.stages.pictures import OnlinePictures, StoredPictures, feature_sample, held_out_codes, open_pictures
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.text import TextTokenizer
from arra.train.alignment import check_features

MAX_TEXT_ROWS, TEXT_ROWS_AT_A_TIME = 256, 16
"""Of held-out text on which a language model is watched."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, read from a store after checking that the recipe fits it."""

    store: Store
    tokenizer: ImageTokenizer | None
    """None where the codes were imported and nobody gave the tokenizer's weights: training needs none."""
    text: TextTokenizer | None
    pictures: StoredPictures | OnlinePictures
    batches: Batches | MixedBatches
    validation: Sequence[TrainBatch]
    validation_rows: np.ndarray
    asked: Callable[[Sequence[int]], dict[str, Any]]
    """What a model is asked for some of the validation records."""
    features: Mapping[str, Tensor] | None
    """Every teacher's, of a sample of the training pictures, to fit the target spaces on."""
    card: LanguageCard | None = None
    """Of a language model."""
    text_validation: Sequence[TrainBatch] = ()


def training_data(
    recipe: Recipe, store: Store, tokenizer: ImageTokenizer | None, *, device: torch.device | None = None
) -> TrainingData:
    """Batches of the training split and the validation batches.

    Raises:
        ArraError: a column is missing or damaged, or a condition does not fit the model.
    """
    columns = columns_of(recipe)
    train, validation = training_rows(recipe, store), store.rows("validation", columns=columns)
    workers = default_workers()
    pictures = open_pictures(recipe, store, tokenizer, train, workers=workers, device=device or torch.device("cpu"))
    features = None
    if recipe.align is not None:
        features = feature_sample(pictures, center_variant(recipe), crop_of(recipe).num_variants)
        for where, term in recipe.align_terms():
            check_features(term, tuple(features[term.encoder].shape[1:]), where=where)
        for name, found in features.items():
            if bad := int((~found.flatten(1).isfinite().all(1)).sum()):
                raise ArraError(
                    f"{store.path}: features of '{name}' hold numbers that are not finite, in {bad} of {len(found)} "
                    "pictures looked at; make them again: arra extract --replace"
                )
    told: dict[str, Any] = {
        "pictures": pictures,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
        "counts": store.source_counts(train),
        "groups": store.group_sizes(train),
        "window": store.window(columns),
        "weights": source_weights(recipe, store),
    }
    open_data = decoder_data if recipe.model.llm is None else language_data
    return TrainingData(
        store=store,
        tokenizer=tokenizer,
        pictures=pictures,
        validation_rows=validation,
        features=features,
        **open_data(recipe, store, tokenizer, train=train, validation=validation, told=told),
    )


def decoder_data(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    *,
    train: np.ndarray,
    validation: np.ndarray,
    told: dict[str, Any],
) -> dict[str, Any]:
    """What a decoder of fixed prefix is trained on, as fields of `TrainingData`."""
    text = text_tokenizer_of(recipe, store)
    if text is not None:
        check_caption_lengths(store, np.concatenate([train, validation]), text, recipe.model.prefix_length)
    conditions = open_conditions(recipe, store, validation, text)
    codes = held_out_codes(recipe, store, tokenizer, validation).flatten(1)
    return {
        "text": text,
        "batches": Batches(conditions=open_conditions(recipe, store, train, text), **told),
        "validation": HeldOutBatches(conditions, codes),
        "asked": asked_of(conditions, store, validation),
    }


def language_data(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    *,
    train: np.ndarray,
    validation: np.ndarray,
    told: dict[str, Any],
) -> dict[str, Any]:
    """What a language model is trained on, as fields of `TrainingData`.

    Raises:
        ArraError: a sequence does not fit the model's positions, or its text cannot be read.
    """
    card = language_card(recipe, tokenizer)
    shapes, held = (shapes_of(recipe, store, rows, card) for rows in (train, validation))
    for rows, grids in ((train, shapes), (validation, held)):
        check_sequences(store, rows, card, grids)
    batches = Batches(
        conditions=prompt_conditions(recipe, store, train, card, shapes),
        buckets=shapes.numbers,
        write=LayoutWriter(card.settings.layout),
        **told,
    )
    codes = held_out_codes(recipe, store, tokenizer, validation).flatten(1) if held.numbers is None else None
    mixed: Batches | MixedBatches = batches
    text_validation: list[TrainBatch] = []
    llm = recipe.model.llm
    if llm is not None and llm.text is not None:
        own, watched = text_rows(llm.text, card)
        places = torch.arange(len(watched))[:MAX_TEXT_ROWS]
        text_validation = [watched.batch(part) for part in places.split(TEXT_ROWS_AT_A_TIME)]
        if llm.text.rows:
            mixed = MixedBatches(batches, own, llm.text.rows)
    return {
        "text": None,
        "card": card,
        "batches": mixed,
        "validation": held_out_batches(recipe, store, validation, card, held, codes),
        "asked": asked_of(batches.conditions, store, validation),
        "text_validation": text_validation,
    }


def training_rows(recipe: Recipe, store: Store) -> np.ndarray:
    """The store's rows that a run of the recipe trains on, ascending: `data.max_train_records` of them at most.

    Raises:
        ArraError: there are none.
    """
    return store.rows("train", columns=columns_of(recipe), at_most=recipe.data.max_train_records)


def epoch_length(recipe: Recipe, store: Store) -> int:
    """Pictures of an epoch: every training record as often as its source's weight says.

    Raises:
        ArraError: the recipe weighs other sources than the store was made from.
    """
    counts = store.source_counts(training_rows(recipe, store))
    weights = source_weights(recipe, store) or (1.0,) * len(counts)
    used = [(count, weight) for count, weight in zip(counts, weights, strict=True) if count]
    return Order(tuple(n for n, _ in used), tuple(w for _, w in used), recipe.train.seed).epoch_length


def source_weights(recipe: Recipe, store: Store) -> tuple[float, ...] | None:
    """How often an epoch visits the records of each of the store's sources; None where all count once.

    Raises:
        ArraError: the recipe weighs other sources than the store was made from.
    """
    if recipe.data.sources is None or all(source.weight == 1 for source in recipe.data.sources):
        return None
    sources = recipe.data.all_sources
    ours, theirs = source_names(sources), [each["name"] for each in store.about["sources"]]
    if ours != theirs:
        raise ArraError(
            f"{store.path}: made from the sources {', '.join(theirs)}, the recipe weighs {', '.join(ours)}; name the "
            "same ones in the same order, or leave the weights out"
        )
    return tuple(source.weight for source in sources)
