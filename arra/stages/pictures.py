"""Codes and features of training pictures: read from the store, or made from the pictures while training.

Legend: B batch, P image positions, F feature, N records of the split.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from arra.config import Recipe
from arra.data.batches import Features
from arra.data.columns import ColumnReader
from arra.data.crops import Draw, describe
from arra.data.loading import Loaded, Loader
from arra.data.remote import RemoteColumn, RemoteStore
from arra.data.store import Store
from arra.errors import ArraError
from arra.runs import leave_with
from arra.stages.makers import (
    CODES,
    CROP,
    PIXELS,
    CodesMaker,
    FeaturesMaker,
    build_makers,
    center_variant,
    used_choices,
    views_of,
    wanted_columns,
)
from arra.stages.model import tokenizer_network
from arra.stages.squares import center_pictures
from arra.stages.tokenizer import recipe_tokenizer
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.image import PUBLISHED

REMOTE_RUN = 256
STATISTICS_RECORDS, STATISTICS_VECTORS, FEWEST_RECORDS = 8192, 65536, 256
"""Pictures whose features give the mean and the components of the target space: enough for a few hundred components;
where a picture has many vectors, fewer of them."""


@dataclass(frozen=True)
class StoredPictures:
    """Codes and features read from the store, the asked rows alone."""

    rows: np.ndarray
    """Row numbers of the split's records."""
    codes: ColumnReader
    features: Mapping[str, ColumnReader] = field(default_factory=dict)
    """Of every teacher that is trained on, by its name in the recipe."""
    feature_rows: np.ndarray | None = None
    """Whose features each record is given, where not its own (the shuffled control)."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> tuple[Int[Tensor, "B P"], Features | None]:
        """Of several crops of a picture the one that `chance` falls on, the same in codes and features."""
        own = self.rows[rows.numpy()]
        variants = (chance[:, 0].double() * self.codes.entry.variants).long().numpy()
        if self.codes.entry.is_ragged:  # pictures of one shape are asked for together
            taken = np.stack(self.codes.take_ragged(own))
        else:
            taken = self.codes.take(own, variants=variants)
        codes = torch.from_numpy(taken.astype(np.int64)).flatten(1)
        return codes, self.take_features(rows, chance) if self.features else None

    def take_features(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> Features:
        """The features of any pictures together, whatever their shapes."""
        whose = self.rows[rows.numpy()] if self.feature_rows is None else self.feature_rows[rows.numpy()]
        variants = (chance[:, 0].double() * self.codes.entry.variants).long().numpy()
        return {
            name: torch.from_numpy(column.take(whose, variants=variants).astype(np.float32))
            for name, column in self.features.items()
        }

    def expect(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> None:
        """Nothing; a remote store begins to fetch them."""
        own = self.rows[rows.numpy()]
        for column in (self.codes, *self.features.values()):
            column.expect(own)

    def close(self) -> None:
        """Nothing; what was expected of a remote store is not fetched any more."""
        if isinstance(self.codes, RemoteColumn):
            self.codes.groups.close()


@dataclass
class OnlinePictures:
    """Codes and features made while training, by the same loader, crop, tokenizer and encoder as preparation."""

    rows: np.ndarray
    loader: Loader
    codes: CodesMaker
    features: Mapping[str, FeaturesMaker]
    """Of every teacher that is trained on, by its name in the recipe."""
    is_random: bool
    workers: int
    feature_rows: np.ndarray | None = None
    _pool: ProcessPoolExecutor | None = None
    _expected: dict[tuple[int, ...], list[Future[Loaded]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> tuple[Int[Tensor, "B P"], Features | None]:
        """The pictures' codes and features now.

        Raises:
            ArraError: a picture cannot be read any more, or is another one than it was.
        """
        loaded = self._loaded(rows, chance)
        variants = (chance[:, 0].double() * self.codes.variants).long().tolist()
        codes = _chosen(self.codes.make(loaded), variants)
        return codes.long().flatten(1), self._made(loaded, variants) if self.features else None

    def take_features(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> Features:
        """The features of any pictures together, whatever their shapes.

        Raises:
            ArraError: a picture cannot be read any more, or is another one than it was.
        """
        variants = (chance[:, 0].double() * self.codes.variants).long().tolist()
        return self._made(self._loaded(rows, chance), variants)

    def _made(self, loaded: Loaded, variants: Sequence[int]) -> Features:
        return {name: _chosen(maker.make(loaded), variants).float() for name, maker in self.features.items()}

    def _loaded(self, rows: Tensor, chance: Tensor) -> Loaded:
        self.expect(rows, chance)
        loaded = _joined([part.result() for part in self._expected.pop(_key(rows))])
        if loaded.failures:
            failure = loaded.failures[0]
            raise ArraError(f"{failure.where}: picture of record '{failure.id}': {failure.reason}")
        return loaded

    def expect(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> None:
        """Nothing; loader processes begin to read and crop these pictures."""
        if _key(rows) in self._expected:
            return
        own = self.rows[rows.numpy()]
        draws = [Draw(*each) if self.is_random else None for each in chance.tolist()]
        pool = self._started()
        parts = np.array_split(np.arange(len(own)), max(1, min(len(own), self.workers)))
        self._expected[_key(rows)] = [
            pool.submit(_load_rows, own[part].tolist(), [draws[place] for place in part]) for part in parts
        ]
        while len(self._expected) > 2:  # a resumed or jumping reader leaves what it expected
            self._expected.pop(next(iter(self._expected)))

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = get_context("spawn")  # a copy of a process whose threads compute may hang
            self._pool = ProcessPoolExecutor(
                max(1, self.workers), context, initializer=_use_loader, initargs=(self.loader, os.getpid())
            )
        return self._pool

    def close(self) -> None:
        """Nothing; the loader processes have left."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


_LOADER: Loader | None = None


def _use_loader(loader: Loader, parent: int) -> None:
    global _LOADER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training's to answer
    leave_with(parent)
    _LOADER = loader


def _load_rows(rows: list[int], draws: Sequence[Draw | None]) -> Loaded:
    assert _LOADER is not None
    return _LOADER.load_rows(rows, draws)


def _key(rows: Tensor) -> tuple[int, ...]:
    return tuple(rows.tolist())


def _joined(parts: Sequence[Loaded]) -> Loaded:
    first, *rest = parts
    for part in rest:
        first.extend(part)
    return first


def _chosen(values: Sequence[np.ndarray], variants: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([value[variant] for value, variant in zip(values, variants, strict=True)]))


def tokenizer_if_given(recipe: Recipe, store: Store) -> ImageTokenizer | None:
    """The recipe's image tokenizer; None where the store's codes were imported and its weights are not here.

    Raises:
        ArraError: it is needed and missing.
    """
    section = recipe.tokenizer
    if section.name in PUBLISHED and section.weights is None and section.train is None and is_imported(store, CODES):
        return None
    return recipe_tokenizer(recipe, store)


def is_imported(store: Store, column: str) -> bool:
    """Whether somebody else's files were taken into the store as this column."""
    entry = store.entry(column)
    return entry is not None and "imported" in entry.made_by


def require_columns(recipe: Recipe, store: Store, tokenizer: ImageTokenizer | None, columns: Sequence[str]) -> None:
    """Nothing.

    Raises:
        ArraError: the store's columns are missing or were not made as the recipe says.
    """
    there = [name for name in columns if store.entry(name) is not None]  # of the others nothing need be known
    wanted = wanted_columns(recipe, tokenizer, store, there)
    for name in columns:
        made_by = wanted.get(name, {})
        if name == CODES and is_imported(store, CODES):
            # imported codes cannot say of which weights they are; the rest must fit
            entry, crop = store.entry(CODES), describe(recipe.data.crop, recipe.data.image_size)
            assert entry is not None
            network = tokenizer_network(recipe) if tokenizer is None else tokenizer.model.settings
            told = {"tokenizer": recipe.tokenizer.name, "num_codes": network.num_codes, "crop": crop}
            made_by = entry.made_by | told
        store.require(name, made_by)


def held_out_codes(
    recipe: Recipe, store: Store, tokenizer: ImageTokenizer | None, rows: np.ndarray
) -> Int[Tensor, "B h w"]:
    """The codes of some pictures' middle squares, whatever the crop of training; stored or made now.

    Of codes that were imported without pictures it is the middle one of the stored crops.
    """
    stored = recipe.data.mode == "cached" and recipe.data.crop.kind in ("center", "flip")
    if stored or is_imported(store, CODES):
        variants = np.full(len(rows), center_variant(recipe))
        return torch.from_numpy(store.reader(CODES).take(rows, variants=variants).astype(np.int64))
    assert tokenizer is not None
    return tokenizer.encode(held_out_pixels(recipe, store, rows))


def held_out_pixels(recipe: Recipe, store: Store, rows: np.ndarray) -> UInt8[Tensor, "B H W 3"]:
    """The middle squares of some pictures, stored or cropped now."""
    if store.entry(PIXELS) is not None:
        return torch.from_numpy(store.reader(PIXELS).take(rows))
    if isinstance(store, RemoteStore):
        raise ArraError(
            f"{store.place}: this export has no pixels, which held-out pictures are measured by; export it again and "
            "name pixels in --columns"
        )
    return center_pictures(recipe, store, rows=rows)


def feature_sample(
    pictures: StoredPictures | OnlinePictures, center: int, num_variants: int
) -> dict[str, Float[Tensor, "N F"] | Float[Tensor, "N P F"]]:
    """Every teacher's features of some evenly spaced pictures, for the statistics of the target spaces.

    At most `STATISTICS_RECORDS` pictures; fewer where each has many patches.
    """
    # from afar neighbours come together: runs of them touch few row groups
    far = isinstance(pictures, StoredPictures) and isinstance(pictures.codes, RemoteColumn)
    chance = torch.full((1, 4), (center + 0.5) / num_variants)
    first = pictures.take_features(torch.zeros(1, dtype=torch.int64), chance)
    most = max((each[0].numel() // each.shape[-1] for each in first.values()), default=1)
    count = min(len(pictures), STATISTICS_RECORDS, max(FEWEST_RECORDS, STATISTICS_VECTORS // most))
    run = min(count, REMOTE_RUN) if far else 1
    starts = torch.linspace(0, len(pictures) - run, max(1, count // run), dtype=torch.float64).round().long()
    places = (starts[:, None] + torch.arange(run)).flatten()
    parts = [pictures.take_features(part, chance.expand(len(part), 4)) for part in places.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in first}


def open_pictures(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    rows: np.ndarray,
    *,
    workers: int,
    device: torch.device,
) -> StoredPictures | OnlinePictures:
    """The pictures of the given rows, from the store or made online as `data.mode` says; with features if aligned."""
    feature_rows = None
    if recipe.align is not None and recipe.align.shuffle_targets:
        if isinstance(store, RemoteStore):
            raise ArraError("align.shuffle_targets: the shuffled control needs a store on disk; it has no locality")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.train.seed + 1))
        feature_rows = rows[order.numpy()]
    if recipe.data.mode == "online" and isinstance(store, RemoteStore):
        raise ArraError(f"{store.place}: an export holds no pictures to train on online; set data.mode: cached")
    used = used_choices(recipe)
    if recipe.data.mode == "cached":
        features = {name: store.reader(choice.column) for name, choice in used.items()}
        return StoredPictures(rows, store.reader(CODES), features, feature_rows)
    if feature_rows is not None:
        raise ArraError("align.shuffle_targets: the shuffled control needs stored features; set data.mode: cached")
    columns = list(dict.fromkeys(choice.column for choice in used.values()))
    codes, *rest = build_makers(recipe, [CODES, *columns], tokenizer, device=device, batch_size=32)
    assert isinstance(codes, CodesMaker)
    made = {maker.name: maker for maker in rest if isinstance(maker, FeaturesMaker)}
    makers = {name: made[choice.column] for name, choice in used.items()}
    seen = {CROP, *(view for maker in makers.values() for view in maker.views)}
    loader = Loader(store.path, views_of(recipe, seen), grey16=recipe.data.crop.grey16)
    return OnlinePictures(rows, loader, codes, makers, recipe.data.crop.kind == "random", workers)
