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
from arra.encoders import TEXT_SPECS
from arra.errors import ArraError
from arra.stages.caption_features import CAPTION_FEATURES, SHORT
from arra.stages.makers import CODES, smallest_unsigned
from arra.stages.process import Progress
from arra.tokenizers.image import PUBLISHED

T5_FEATURES = f"{CAPTION_FEATURES}.flan-t5-xl"
T5_WIDTH = TEXT_SPECS["flan-t5-xl"].feature_size


def import_codes(
    recipe: Recipe,
    store: Store,
    sources: Sequence[LlamaGenCodesSource],
    shards: Sequence[int],
    progress: Progress,
    *,
    replace: bool = False,
) -> ColumnWriter | None:
    """The written column of the sources' codes, to be published; None if the store has it.

    A crop of two ranges takes the second ten variants from the folder beside each source's.

    Raises:
        ArraError: the recipe's tokenizer, crop or image size is not what the sources say, or the store's codes are not
            these (and not to be replaced).
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

    folders = {source.path: source.folders(recipe.data.crop.ranges) for source in sources}

    def read(source: Source, name: str, row: int) -> np.ndarray:
        assert isinstance(source, LlamaGenCodesSource)
        codes = np.concatenate([source.read_codes(name, folder=folder) for folder in folders[source.path]])
        if codes.shape != (crop.num_variants, grid[0] * grid[1]):
            raise ValueError(
                f"codes of {codes.shape[0]} crops with {codes.shape[1]} each; the recipe's {made_by['crop']} has "
                f"{crop.num_variants} with {grid[0] * grid[1]}"
            )
        return codes.reshape(-1, *grid)

    return import_column(
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
        replace=replace,
    )


def brought_caption_columns(recipe: Recipe) -> list[str]:
    """The columns of caption features that the recipe's sources bring along.

    Raises:
        ArraError: some of its sources do and some do not.
    """
    sources, names = recipe.data.all_sources, []
    for field, name in (("caption_features", T5_FEATURES), ("short_caption_features", T5_FEATURES + SHORT)):
        given = [getattr(source, field, None) is not None for source in sources]
        if all(given):
            names.append(name)
        elif any(given):
            raise ArraError(f"{sources[given.index(True)].path}: {field} must be given for all sources or for none")
    return names


def import_caption_features(
    recipe: Recipe,
    store: Store,
    column: str,
    shards: Sequence[int],
    progress: Progress,
    *,
    replace: bool = False,
) -> ColumnWriter | None:
    """The written column of the sources' T5 features, each as long as its caption; None if the store has it.

    Raises:
        ArraError: the store's features are not these (and not to be replaced).
    """
    made_by = {"encoder": "google/flan-t5-xl", "weights": None, "slots": 120, "imported": "LlamaGen caption features"}

    def read(source: Source, name: str, row: int) -> np.ndarray:
        assert isinstance(source, LlamaGenListSource)
        path = source.caption_feature_path(name, short=column.endswith(SHORT))
        features = _read_array(path)
        slots_fit = features.ndim == 3 and features.shape[0] == 1 and 1 <= features.shape[1] <= made_by["slots"]
        if not slots_fit or features.shape[2] != T5_WIDTH or features.dtype.kind != "f":
            raise ValueError(f"{path}: {features.dtype} {features.shape}; expected floats (1, up to 120, {T5_WIDTH})")
        return features[0]

    return import_column(
        store,
        column,
        made_by,
        shape=(None, T5_WIDTH),
        variants=1,
        dtype=recipe.data.features_dtype,
        sources=recipe.data.all_sources,
        read=read,
        shards=shards,
        progress=progress,
        replace=replace,
    )


def import_column(
    store: Store,
    name: str,
    made_by: dict[str, Any],
    *,
    shape: tuple[int | None, ...],
    variants: int,
    dtype: str,
    sources: Sequence[Source],
    read: Callable[[Source, str, int], np.ndarray],
    shards: Sequence[int],
    progress: Progress,
    replace: bool,
    retry_failed: bool = False,
) -> ColumnWriter | None:
    """A column written from what `read` says of every record; None if the store has it (and none is to be tried again).

    `read` is given the record's source, its id there, and its row in the store; what it raises of `BROKEN_HEADER` is
    the record's failure.

    Raises:
        ArraError: the store's column was made otherwise (and is not to be replaced).
    """
    entry = store.entry(name)
    again = retry_failed and entry is not None and entry.failed > 0
    if not again and store.has(name, made_by):
        return None
    if entry is not None and not replace:
        store.require(name, made_by, advice="use another store, or make it anew with --replace")
    writer = store.writer(name, made_by=made_by, shape=shape, variants=variants, dtype=dtype, again=again)
    if again:
        writer.adopt()
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
                values[place] = read(
                    sources[source], record.removeprefix(names[source]), store.shard_starts[shard] + place
                )
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
