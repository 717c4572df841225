"""What others have already computed, taken into the store: LlamaGen's code folders and its T5 caption features.

Legend: V variants of a picture, L = h w codes, C caption positions, F feature.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arra.config import Recipe
from arra.data.columns import ColumnWriter
from arra.data.crops import Crop, describe
from arra.data.llamagen_lists import BROKEN_HEADER, LlamaGenCodesSource, LlamaGenListSource
from arra.data.records import Failure, Source, source_names
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.makers import CODES, smallest_unsigned
from arra.stages.process import Progress
from arra.tokenizers.image import PUBLISHED

CAPTION_FEATURES = "caption_features.flan-t5-xl"
T5_WIDTH = 2048


def import_codes(
    recipe: Recipe, store: Store, sources: Sequence[LlamaGenCodesSource], shards: Sequence[int], progress: Progress
) -> ColumnWriter | None:
    """The written column of the sources' codes, to be published; None if the store has it.

    Raises:
        ArraError: the recipe's tokenizer, crop or image size is not what the sources say.
    """
    crop, first = Crop(recipe.data.crop, recipe.data.image_size), sources[0]
    for source in sources:
        for key, ours, theirs in (
            ("tokenizer.name", recipe.tokenizer.name, source.tokenizer),
            ("num_codes", first.num_codes, source.num_codes),
        ):
            if ours != theirs:
                raise ArraError(f"{source.path}: its codes are of {key} {theirs!r}, the recipe says {ours!r}")
    grid = first.grid or _square_grid(first, store)
    if first.tokenizer in PUBLISHED:
        side = recipe.data.image_size // 2 ** (len(PUBLISHED[first.tokenizer]["ch_mult"]) - 1)
        if grid != (side, side):
            raise ArraError(
                f"{first.path}: its codes make a grid of {grid[0]} x {grid[1]}, data.image_size "
                f"{recipe.data.image_size} one of {side} x {side}; set the size of the pictures they were made from"
            )
    made_by = {
        "tokenizer": first.tokenizer,
        "weights": None,
        "num_codes": first.num_codes,
        "crop": describe(recipe.data.crop, recipe.data.image_size),
        "imported": "LlamaGen code folder",
    }

    def read(source: Source, name: str) -> np.ndarray:
        assert isinstance(source, LlamaGenCodesSource)
        codes = source.read_codes(name)
        if codes.shape != (crop.num_variants, grid[0] * grid[1]):
            raise ValueError(
                f"codes of {codes.shape[0]} crops with {codes.shape[1]} each; the recipe's {made_by['crop']} has "
                f"{crop.num_variants} with {grid[0] * grid[1]}"
            )
        return codes.reshape(-1, *grid)

    return _import(
        store,
        CODES,
        made_by,
        shape=grid,
        variants=crop.num_variants,
        dtype=smallest_unsigned(first.num_codes),
        sources=sources,
        read=read,
        shards=shards,
        progress=progress,
    )


def import_caption_features(
    recipe: Recipe, store: Store, sources: Sequence[LlamaGenListSource], shards: Sequence[int], progress: Progress
) -> ColumnWriter | None:
    """The written column of the sources' T5 features, each as long as its caption; None if the store has it."""
    made_by = {"encoder": "google/flan-t5-xl", "weights": None, "slots": 120, "imported": "LlamaGen caption features"}

    def read(source: Source, name: str) -> np.ndarray:
        assert isinstance(source, LlamaGenListSource)
        path = source.caption_feature_path(name)
        features = _read_array(path)
        if features.ndim != 3 or features.shape[0] != 1 or features.shape[2] != T5_WIDTH or features.dtype.kind != "f":
            raise ValueError(f"{path}: {features.dtype} {features.shape}; expected floats (1, up to 120, {T5_WIDTH})")
        return features[0]

    return _import(
        store,
        CAPTION_FEATURES,
        made_by,
        shape=(None, T5_WIDTH),
        variants=1,
        dtype=recipe.data.features_dtype,
        sources=sources,
        read=read,
        shards=shards,
        progress=progress,
    )


def _import(
    store: Store,
    name: str,
    made_by: dict[str, Any],
    *,
    shape: tuple[int | None, ...],
    variants: int,
    dtype: str,
    sources: Sequence[Source],
    read: Callable[[Source, str], np.ndarray],
    shards: Sequence[int],
    progress: Progress,
) -> ColumnWriter | None:
    if store.has(name, made_by):
        return None
    writer = store.writer(name, made_by=made_by, shape=shape, variants=variants, dtype=dtype)
    writer.forget_failed(shards)
    done = writer.done()
    names = [f"{each}/" for each in source_names(sources)] if len(sources) > 1 else [""]
    for shard in shards:
        progress(f"importing {name}", store.shard_starts[shard], len(store))
        if shard in done:
            continue
        table = store.records_of(shard)
        empty = np.zeros([variants, *shape] if None not in shape else [0] * len(shape), dtype)  # type: ignore[list-item]
        values, valid, failures = [empty] * len(table), np.zeros(len(table), dtype=bool), []
        for place, (record, source) in enumerate(_ids_and_sources(table)):
            try:
                values[place] = read(sources[source], record.removeprefix(names[source]))
                valid[place] = True
            except BROKEN_HEADER as error:
                failures.append(
                    Failure(record, f"{sources[source].path}: {record}", " ".join(str(error).split())[:500])
                )
        ready = np.stack(values) if None not in shape else values
        writer.write(shard, table.column("id").combine_chunks(), ready, valid=valid, failures=failures)
    return writer


def _ids_and_sources(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table.column("id").to_pylist(), table.column("source").to_pylist(), strict=True))


def _square_grid(source: LlamaGenCodesSource, store: Store) -> tuple[int, int]:
    count = source.read_codes(str(store.fields(0, "id")[0]).rpartition("/")[2]).shape[1]
    side = round(count**0.5)
    if side * side != count:
        raise ArraError(f"{source.path}: {count} codes are no square; say the source's 'grid: [rows, columns]'")
    return side, side


def _read_array(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: np.ndarray = np.load(path, allow_pickle=False)
    return found
