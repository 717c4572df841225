"""Held-out pictures with features, for looking at a model: while it trains, and by `arra probe`.

    store -> rows of a split, in two halves -> batches with codes, conditions and features -> arra.train.watch.Watcher
Legend: N pictures, F feature, P patches.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from arra.config import Recipe
from arra.data.batches import HeldOutBatches, TrainBatch
from arra.data.store import Store
from arra.encoders import open_encoder
from arra.encoders.settings import EncoderChoice
from arra.errors import ArraError
from arra.models.language_folder import LanguageCard
from arra.stages.conditions import open_conditions
from arra.stages.language import Shapes, held_out_batches
from arra.stages.makers import CODES, FeaturesMaker, center_variant, teacher_made_by
from arra.stages.origin import judged_columns
from arra.stages.pictures import held_out_codes, is_imported
from arra.stages.process import Progress, silent
from arra.stages.squares import center_pictures, spaced
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.text import TextTokenizer
from arra.train.watch import MIN_IMAGES, Watcher

BATCH_NUMBERS = 2**26
"""States of one layer in a batch, rows x positions x width, at most."""
MAX_BATCH = 64
PICTURES_AT_A_TIME = 32
"""Through an encoder."""
MIN_MEMBERS, MAX_CLASSES = 4, 1000
"""Of a class that a classifier is to tell; classes of a classifier."""


@dataclass(frozen=True)
class WithFeatures(Sequence[TrainBatch]):
    """Batches, each with its pictures' features."""

    batches: HeldOutBatches
    features: Mapping[str, Tensor]
    """(N, ...) by teacher, in the pictures' order."""

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> TrainBatch:  # type: ignore[override]
        batch = self.batches[number]
        assert batch.rows is not None
        return replace(batch, features={name: each[batch.rows] for name, each in self.features.items()})


def open_watcher(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    choices: Mapping[str, EncoderChoice],
    *,
    hidden_size: int,
    text: TextTokenizer | None = None,
    card: LanguageCard | None = None,
    split: str = "validation",
    images: int = 256,
    layers: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Watcher:
    """A watcher over evenly spaced pictures of a split, beside the features of the named encoders.

    Features are read from the store where they are as the recipe has them, else made now. Pictures of one group lie in
    one half. `text` is the tokenizer of a decoder that reads prompts, `card` a language model's.

    Raises:
        ArraError: too few pictures, pictures of many shapes, or an encoder or its pictures are missing.
    """
    if recipe.data.crop.kind == "buckets":
        raise ArraError(
            "data.crop: 'buckets' gives pictures of many grids, whose positions do not mean the same; only models of "
            "one grid can be looked at"
        )
    stored = {name: choice for name, choice in choices.items() if is_stored(recipe, store, choice)}
    columns = [*judged_columns(recipe), *dict.fromkeys(choice.column for choice in stored.values())]
    found = store.rows(split, columns=columns)
    if min(len(found), images) < MIN_IMAGES:
        raise ArraError(
            f"{store.path}: {min(len(found), images)} pictures of split '{split}', at least {MIN_IMAGES} are needed, "
            "half of them to fit maps on; take more pictures, or another split"
        )
    rows = spaced(found, images)
    table = store.table(["label", "group"]).take(pa.array(rows))
    groups, labels = table.column("group").to_pylist(), table.column("label").to_pylist()
    order = halves(groups)
    features = {
        name: _stored_features(recipe, store, choice, rows)
        if name in stored
        else _made_features(recipe, store, choice, rows, device=device, progress=progress)
        for name, choice in choices.items()
    }
    for name, each in features.items():
        if choices[name].bands is None and each.dim() == 3 and round(each.shape[1] ** 0.5) ** 2 != each.shape[1]:
            raise ArraError(f"encoder '{name}': {each.shape[1]} patches a picture, which make no square")
    codes = held_out_codes(recipe, store, tokenizer, rows).flatten(1)
    sides = []
    for side in order:
        mine = rows[side]
        if card is not None:
            shapes = Shapes((card.settings.grid,))
            batches = held_out_batches(recipe, store, mine, card, shapes, codes[side])
            assert isinstance(batches, HeldOutBatches)
        else:
            batches = HeldOutBatches(open_conditions(recipe, store, mine, text), codes[side])
        length = batches[0].tokens.shape[1]
        size = max(1, min(MAX_BATCH, BATCH_NUMBERS // (length * hidden_size)))
        own = {name: each[side] for name, each in features.items()}
        sides.append(WithFeatures(replace(batches, batch_size=size), own))
    return Watcher(
        fit=sides[0],
        score=sides[1],
        layers=layers,
        bands=frozenset(name for name, choice in choices.items() if choice.bands is not None),
        classes=classes_of(labels, groups, np.concatenate(order)),
    )


def halves(groups: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """The places of two halves, in order; pictures of one group lie in one of them, unless one group is most of all."""
    units: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        units.setdefault(place if group is None else group, []).append(place)
    sides: tuple[list[int], list[int]] = ([], [])
    for members in sorted(units.values(), key=lambda unit: (-len(unit), unit[0])):
        min(sides, key=len).extend(members)
    if 3 * min(map(len, sides)) < len(groups):
        sides = (list(range(0, len(groups), 2)), list(range(1, len(groups), 2)))
    return np.array(sorted(sides[0])), np.array(sorted(sides[1]))


def classes_of(labels: Sequence[int | None], groups: Sequence[str | None], order: np.ndarray) -> Tensor | None:
    """Class numbers of pictures in this order, by label, else by group, -1 where a class has few members; None if none.

    A classifier is worth its number with two classes or more, of four members or more, and not where every picture is
    a class of its own.
    """
    for names in (labels, groups):
        counts = Counter(name for name in names if name is not None)
        kept = [name for name, count in sorted(counts.items(), key=lambda each: str(each[0])) if count >= MIN_MEMBERS]
        if 2 <= len(kept) <= MAX_CLASSES and sum(counts[name] for name in kept) >= MIN_IMAGES:
            numbers = {name: number for number, name in enumerate(kept)}
            return torch.tensor([numbers.get(names[place], -1) for place in order.tolist()])
    return None


def is_stored(recipe: Recipe, store: Store, choice: EncoderChoice) -> bool:
    """Whether the store has these features of the middle of every picture, made as the recipe says."""
    entry = store.entry(choice.column)
    if entry is None or recipe.data.mode == "online" or recipe.data.crop.kind == "random":
        return False
    try:
        store.require(choice.column, teacher_made_by(recipe, choice, store))
    except ArraError:  # of other weights or another crop: they are made anew
        return False
    return True


def _stored_features(recipe: Recipe, store: Store, choice: EncoderChoice, rows: np.ndarray) -> Tensor:
    reader = store.reader(choice.column)
    variant = min(center_variant(recipe), reader.entry.variants - 1)
    taken = reader.take(rows, variants=np.full(len(rows), variant))
    return torch.from_numpy(taken.astype(np.float32))


def _made_features(
    recipe: Recipe,
    store: Store,
    choice: EncoderChoice,
    rows: np.ndarray,
    *,
    device: torch.device | None,
    progress: Progress,
) -> Tensor:
    """Features made now from the middle squares of the pictures."""
    if is_imported(store, CODES):
        held = ", ".join(name for name in store.column_names() if name.startswith("features.")) or "none"
        raise ArraError(
            f"{store.path}: codes without pictures, and no column '{choice.column}'; only encoders whose features it "
            f"holds can be compared: {held}"
        )
    place = device or torch.device("cpu")
    encoder = open_encoder(choice, device=place)
    maker = FeaturesMaker(encoder, choice, 1, {}, place, PICTURES_AT_A_TIME, "", ())
    progress(f"reading pictures for {choice.name}", 0, len(rows))
    side = recipe.data.encoder_image_size or encoder.spec.image_size
    pixels = center_pictures(recipe, store, rows=rows, pixels=side)
    parts = []
    for part in pixels.split(PICTURES_AT_A_TIME):
        parts.append(maker.encode(part).float())
        progress(f"features of {choice.name}", len(parts) * PICTURES_AT_A_TIME, len(rows))
    return torch.cat(parts)
