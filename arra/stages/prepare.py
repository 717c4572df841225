"""From pictures and captions to the store: `arra prepare`, `arra tokenize`, `arra extract`.

sources -> index (records) -> one pass over the pictures: decoded once, cropped once, seen by every maker -> columns
                           -> one pass over the captions, where the model is told of them by a text encoder
                           -> files of others that hold codes or features of the records
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arra.config import Recipe
from arra.data.columns import ColumnWriter, folder_lock, tidy_column
from arra.data.crops import describe
from arra.data.huggingface import HuggingFaceSource
from arra.data.index import build_index, is_too_many
from arra.data.llamagen_lists import LlamaGenCodesSource
from arra.data.loading import default_workers
from arra.data.store import Store
from arra.distributed import set_threads
from arra.encoders import EncoderChoice, check_encoder_name
from arra.encoders.text import require_transformers
from arra.encoders.text_cleaning import clean_caption
from arra.errors import ArraError
from arra.runs import remove_unfinished
from arra.stages.caption_features import (
    CAPTION_FEATURES,
    CUT_FILE,
    caption_column_names,
    caption_columns,
    is_of_captions,
    note_cut_captions,
    num_cut_captions,
    require_cleaning,
)
from arra.stages.feature_files import import_feature_files
from arra.stages.imports import brought_caption_columns, import_caption_features, import_codes
from arra.stages.makers import CODES, feature_choices, is_named, picture_columns
from arra.stages.passes import Pass, PassPlan, ShardDone
from arra.stages.preparation import Preparation
from arra.stages.process import Progress, silent
from arra.stages.tokenizer import prepare_tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """How the work is done; of what is made only `batch_size` changes a thing: the rounding of features."""

    engine: Literal["local", "ray"] = "local"
    batch_size: int = 32
    """Pictures per loaded batch, and per batch of a network."""
    workers: int | None = None
    """Loader processes (local) or actors (ray); null takes the cores but one."""
    shard: tuple[int, int] | None = None
    """(i, n): this process makes the i-th of n parts; null asks torchrun's environment."""
    threads: int | None = None
    device: str = "auto"
    retry_failed: bool = False
    """Make records again that failed before."""
    replace: bool = False
    """Make columns anew that were made otherwise than the recipe says; else they are a mistake that is told."""

    def part(self) -> tuple[int, int]:
        """Which part of how many this process makes.

        Raises:
            ArraError: RANK and WORLD_SIZE, as torchrun sets them, say no part.
        """
        if self.shard is not None:
            return self.shard
        return parse_part(f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}", "RANK/WORLD_SIZE")

    def own_shards(self, store: Store) -> range:
        """The shards of this process's part."""
        part, parts = self.part()
        return range(store.num_shards * part // parts, store.num_shards * (part + 1) // parts)


def parse_options(
    *,
    engine: str,
    shard: str | None,
    workers: int | None,
    batch_size: int,
    threads: int | None,
    device: str,
    retry_failed: bool,
    replace: bool,
) -> PrepareOptions:
    """The options as the command line gives them.

    Raises:
        ArraError: an unknown engine, or a shard that is not i/n.
    """
    if engine not in ("local", "ray"):
        raise ArraError(f"--engine {engine}: expected local or ray")
    part = None if shard is None else parse_part(shard, "--shard")
    return PrepareOptions(engine, batch_size, workers, part, threads, device, retry_failed, replace)  # type: ignore[arg-type]


def parse_part(text: str, name: str) -> tuple[int, int]:
    """(i, n) of a text i/n.

    Raises:
        ArraError: it is no part of a whole; `name` says where it was given.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ArraError(f"{name} {text}: expected i/n with i from 0 to n-1, as in 0/8")
    return int(match[1]), int(match[2])


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    options: PrepareOptions | None = None,
    only: Sequence[str] | None = None,
    feature_files: Path | None = None,
    accept: Callable[[Store], None] = lambda store: None,
    progress: Progress = silent,
) -> Preparation:
    """The store of the recipe, with all its columns (or those in `only`); columns that are there stay.

    `only` has names of columns, or first parts of them (`features`). With `feature_files`, a folder of the original
    ARRA extraction, the features that it names are taken from there, and no picture is read. The tokenizer is trained
    first where the recipe says so; it then lies in `folder/tokenizer`. `accept` is called with the records, before
    anything is computed; it may raise.
    """
    options = options or PrepareOptions()
    set_threads(options.threads)
    part, parts = options.part()
    started = time.monotonic()
    with _alone(folder, part, parts):
        remove_unfinished(folder)
        indexed = build_index(
            recipe.data.all_sources,
            folder,
            shard_records=recipe.data.shard_records,
            max_failed_fraction=recipe.data.max_failed_fraction,
            progress=lambda count: progress("reading records", count, 0),
        )
        found = Preparation(
            indexed.store,
            indexed.items,
            skipped=indexed.skipped,
            failed=indexed.failed,
            max_failed_fraction=recipe.data.max_failed_fraction,
            place=folder,
        )
        if indexed.store is None:
            return found
        accept(indexed.store)
        for column in indexed.store.column_names():
            tidy_column(folder / column)
        if feature_files is not None:
            writers = _import_features(recipe, indexed.store, options, only, feature_files, found, progress)
            _finish(found, indexed.store, writers)
            found.seconds = time.monotonic() - started
            return found
        writers = {} if only is not None else _import(recipe, indexed.store, options, found, progress)
        # told now if something is missing for them, not after hours with the pictures
        captions = _missing_captions(recipe, indexed.store, options, only)
        if not _is_codes_alone(recipe) and (only is None or set(only) != {CAPTION_FEATURES}):
            if recipe.tokenizer.train is not None and parts == 1:
                # before hours of training, know that the pictures can be read
                _finish(found, indexed.store, _make(recipe, indexed.store, options, (), found, progress))
                if not found.ok:
                    return found
                found.done = found.already = 0
            writers |= _make(recipe, indexed.store, options, only, found, progress)
        if captions is not None:
            writers |= _make_captions(recipe, captions, indexed.store, options, only, found, progress)
        _finish(found, indexed.store, writers)
        if captions is not None:
            _count_cut_captions(recipe, indexed.store, found)
    found.seconds = time.monotonic() - started
    progress("store ready" if found.ok else "too many failures", 1, 1)
    return found


def _is_codes_alone(recipe: Recipe) -> bool:
    return all(isinstance(source, LlamaGenCodesSource) for source in recipe.data.all_sources)


def _import(
    recipe: Recipe, store: Store, options: PrepareOptions, found: Preparation, progress: Progress
) -> dict[str, ColumnWriter]:
    """Columns that sources bring along: this process's shards of them are written."""
    sources, writers, own = recipe.data.all_sources, {}, options.own_shards(store)
    codes = [source for source in sources if isinstance(source, LlamaGenCodesSource)]
    if codes:
        if len(codes) < len(sources):
            raise ArraError(f"{codes[0].path}: codes without pictures do not mix with pictures; prepare them apart")
        entry = store.entry(CODES)
        found.already = 0 if entry is None else len(store) - entry.failed
        writer = import_codes(recipe, store, codes, own, progress, replace=options.replace)
        if writer is not None:
            writers[CODES] = writer
            found.already, failed = 0, sum(writer.done().get(shard, 0) for shard in own)
            found.done = sum(store.about["shards"][shard] for shard in own) - failed
    for name in brought_caption_columns(recipe):
        writer = import_caption_features(recipe, store, name, own, progress, replace=options.replace)
        if writer is not None:
            writers[name] = writer
    return writers


def _import_features(
    recipe: Recipe,
    store: Store,
    options: PrepareOptions,
    only: Sequence[str] | None,
    folder: Path,
    found: Preparation,
    progress: Progress,
) -> dict[str, ColumnWriter]:
    """The column of features whose files lie in a folder: this process's shards of it are written.

    Raises:
        ArraError: `only` names no one column, or the store has it otherwise made.
    """
    meant = {name: each for name, each in feature_choices(recipe).items() if is_named(each.column, only)}
    named = list(meant.values())
    if len({each.column for each in named}) != 1:
        raise ArraError(
            f"--from {folder}: its features are of one encoder, and several of the recipe are meant: "
            f"{', '.join(meant)}; say by one of these names whose they are (--encoder)"
        )
    own, name = options.own_shards(store), named[0].column
    entry = store.entry(name)
    found.already = 0 if entry is None else len(store) - entry.failed
    writer = import_feature_files(
        recipe,
        store,
        named[0],
        folder,
        own,
        progress,
        replace=options.replace,
        retry_failed=options.retry_failed,
    )
    if writer is None:
        return {}
    found.already, failed = 0, sum(writer.done().get(shard, 0) for shard in own)
    found.done = sum(store.about["shards"][shard] for shard in own) - failed
    return {name: writer}


def asked_features(recipe: Recipe, encoder: str | None) -> tuple[Recipe, tuple[str, ...]]:
    """What `arra extract` is to make: the recipe, with a further encoder where it has not the named one, and columns.

    `encoder` is a teacher by its name in the recipe, or the name of a network; None asks for every teacher's features.

    Raises:
        ArraError: no such encoder.
    """
    choices = feature_choices(recipe)
    if encoder is None:
        return recipe, ("features",)
    found = [choice for name, choice in choices.items() if encoder in (name, choice.name)]
    if not found:
        check_encoder_name(encoder)
        found = [EncoderChoice(name=encoder)]
        others = {**recipe.encoder.others, "extracted": found[0]}
        recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"others": others})})
    return recipe, tuple(choice.column for choice in found)


def _make(
    recipe: Recipe,
    store: Store,
    options: PrepareOptions,
    only: Sequence[str] | None,
    found: Preparation,
    progress: Progress,
) -> dict[str, ColumnWriter]:
    """Columns made from the pictures: this process's shards of the missing ones are written."""
    needs_tokenizer = only is None or CODES in only
    tokenizer = (
        prepare_tokenizer(recipe, store, replace=options.replace, progress=progress) if needs_tokenizer else None
    )
    chosen = None if only is None else {*only, *ALWAYS}
    wanted = picture_columns(recipe, tokenizer, None if options.replace else store, chosen)
    if not options.replace:
        _refuse_other_makers(recipe, store, wanted)
    missing = {
        name: made_by
        for name, made_by in wanted.items()
        if not store.has(name, made_by) or (options.retry_failed and _failed(store, name))
    }
    if not missing:
        found.already = len(store) - max((_failed(store, name) for name in wanted), default=0)
        return {}
    workers = default_workers() if options.workers is None else options.workers
    if any(isinstance(source, HuggingFaceSource) and source.streaming for source in recipe.data.all_sources):
        workers = min(workers, 1)  # each would read the whole stream for its share of it
    again = frozenset(name for name in missing if store.entry(name) is not None)
    plan = PassPlan(recipe, store.path, missing, options.batch_size, workers, options.device, again)
    return _run_pass(plan, store, options, found, progress)


def _missing_captions(
    recipe: Recipe, store: Store, options: PrepareOptions, only: Sequence[str] | None
) -> dict[str, dict[str, Any]] | None:
    """The columns that a text encoder has still to make; None where the recipe, or the command, asks for none.

    Raises:
        ArraError: its weights or a package are missing, or a column is there that was made otherwise.
    """
    asked = recipe.model.condition == "caption" if only is None else CAPTION_FEATURES in only
    if not asked:
        return None
    brought = brought_caption_columns(recipe) if only is None else ()
    for name in brought:
        require_cleaning(recipe, name)
    wanted = caption_columns(recipe, store=None if options.replace else store, without=brought)
    if not options.replace:
        _refuse_other_makers(recipe, store, wanted)
    missing = {name: made_by for name, made_by in wanted.items() if not store.has(name, made_by)}
    if missing and recipe.text_encoder is not None:
        require_transformers(recipe.text_encoder.name)
        if recipe.text_encoder.clean:
            clean_caption("")  # asks for its package now, before hours over the pictures
    return missing


def _make_captions(
    recipe: Recipe,
    missing: Mapping[str, Mapping[str, Any]],
    store: Store,
    options: PrepareOptions,
    only: Sequence[str] | None,
    found: Preparation,
    progress: Progress,
) -> dict[str, ColumnWriter]:
    """Columns made from the captions: this process's shards of the missing ones are written."""
    own = Preparation(store, found.items, already=len(store), max_failed_fraction=found.max_failed_fraction)
    writers: dict[str, ColumnWriter] = {}
    if missing:
        workers = default_workers() if options.workers is None else options.workers
        again = frozenset(name for name in missing if store.entry(name) is not None)
        plan = PassPlan(recipe, store.path, missing, options.batch_size, workers, options.device, again)
        writers = _run_pass(plan, store, options, own, progress)
    found.num_captions, found.seconds_reading = own.done, own.seconds_making
    # where pictures were asked for too, a record was there before if nothing of it was made now
    found.done, found.already = max(found.done, own.done), own.already if only else min(found.already, own.already)
    return writers


def _count_cut_captions(recipe: Recipe, store: Store, found: Preparation) -> None:
    """Nothing; the captions that were longer than the text encoder's slots are named and counted."""
    names = caption_column_names(recipe)
    assert recipe.text_encoder is not None
    for name in names:
        entry = store.entry(name)
        made_here = entry is not None and "imported" not in entry.made_by
        if made_here and recipe.text_encoder.weights and not (store.path / name / CUT_FILE).exists():
            note_cut_captions(recipe, store, name)
    found.cut = num_cut_captions(store, names)


ALWAYS = ("pictures", "sizes")
"""Columns that every pass makes where they are missing: they cost nothing and guard the others."""


def _refuse_other_makers(recipe: Recipe, store: Store, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Nothing.

    Raises:
        ArraError: a column is there that was made otherwise; both sides are named, and nothing is overwritten.
    """
    for name, made_by in wanted.items():
        entry = store.entry(name)
        if entry is not None:
            store.require(name, made_by, advice="use another store, or make it anew with --replace")
        elif name.startswith("features.") and (codes := store.entry(CODES)) is not None:
            # tokenizer and encoder must have seen the same crop
            own, theirs = describe(recipe.data.crop, recipe.data.image_size), str(codes.made_by.get("crop"))
            if own != theirs and not all(text.startswith("center_crop(") for text in (own, theirs)):
                raise ArraError(
                    f"{store.path}: column 'codes' was made with crop {theirs!r}, '{name}' would be with {own!r}; use "
                    "the same crop, or another store"
                )


def _failed(store: Store, name: str) -> int:
    entry = store.entry(name)
    return 0 if entry is None else entry.failed


def _run_pass(
    plan: PassPlan, store: Store, options: PrepareOptions, found: Preparation, progress: Progress
) -> dict[str, ColumnWriter]:
    """The writers of the plan's columns, after this process's shards are written."""
    work, sizes, own = Pass(plan), store.about["shards"], options.own_shards(store)
    if options.retry_failed:
        for writer in work.writers.values():
            writer.adopt()
    before = {failure.id for writer in work.writers.values() for failure in writer.failures()}
    if is_too_many(found.failed + len(before), found.items - found.skipped, found.max_failed_fraction):
        for writer in work.writers.values():  # an earlier run ended over the limit: their pictures may be mended now
            writer.forget_failed(own)
    done = set.intersection(*(set(writer.done()) for writer in work.writers.values()))
    shards = [shard for shard in own if shard not in done]
    total, begun = sum(sizes[shard] for shard in shards), time.monotonic()
    failed = [writer.done() for writer in work.writers.values()]
    found.already = sum(sizes[shard] - max(each[shard] for each in failed) for shard in own if shard in done)
    made, what = 0, "captions" if all(map(is_of_captions, plan.columns)) else "pictures"

    def on_batch(records: int, waited: float) -> None:
        nonlocal made
        made += records
        seconds = time.monotonic() - begun
        note = f"{made / seconds:.1f} {what}/s, {100 * waited / seconds:.0f} % of the time waiting for data"
        progress(f"{what} to {', '.join(plan.columns)}", made, total, note)

    results: Iterator[ShardDone]
    if options.engine == "ray":
        from arra.stages.ray_engine import run_on_ray

        results = run_on_ray(plan, shards, on_batch=on_batch)
    else:
        results = work.run(shards, on_batch=on_batch)
    for result in results:
        found.done += result.records - result.failed
        found.waiting_seconds += result.waiting_seconds
    found.seconds_making = time.monotonic() - begun
    return dict(work.writers)


def _finish(found: Preparation, store: Store, writers: Mapping[str, ColumnWriter]) -> None:
    """Nothing; the columns are published if every part is made and no more failed than may."""
    sizes = store.about["shards"]
    whole = [set(writer.done()) for writer in writers.values()]
    found.pending = sum(size for shard, size in enumerate(sizes) if not all(shard in each for each in whole))
    found.failed = store.write_failures({name: writer.failures() for name, writer in writers.items()})
    if found.ok and not found.pending:
        for writer in writers.values():
            writer.publish()


@contextmanager
def _alone(folder: Path, part: int, parts: int) -> Iterator[None]:
    """A block in which no other process makes this part of the store.

    Raises:
        ArraError: another one does.
    """
    with folder_lock(folder, name=f".prepare-{part}-of-{parts}.lock", wait=False):
        yield
