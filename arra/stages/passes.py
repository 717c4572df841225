"""One pass over the pictures (decoded once, cropped once, seen by every maker) or the captions, written shard by shard.

Any process can make any shard; the bytes are the same. Legend: V variants.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arra.config import Recipe
from arra.data.loading import Loaded, Loader, Task, Waiting, load_tasks
from arra.data.records import Failure
from arra.data.store import Store
from arra.distributed import choose_device
from arra.stages.caption_features import CaptionLoader, caption_makers, is_of_captions
from arra.stages.makers import CODES, Maker, build_makers, views_of
from arra.stages.tokenizer import recipe_tokenizer

CAPTIONS_AT_A_TIME = 16
"""Batches of captions that are loaded together, so that a batch holds captions of one length."""


@dataclass(frozen=True)
class PassPlan:
    """All that a process must know to make shards; it can be sent to another machine.

    Its columns are made of pictures or all of captions.
    """

    recipe: Recipe
    store: Path
    columns: Mapping[str, Mapping[str, Any]]
    batch_size: int
    workers: int
    device: str
    again: frozenset[str] = frozenset()
    """Columns that are published and to be made again: damaged ones, or those with failures."""


@dataclass(frozen=True)
class ShardDone:
    """A shard whose columns are all written."""

    shard: int
    records: int
    failed: int
    waiting_seconds: float


class Pass:
    """The networks and writers of a pass: makes whole shards, any of them, in any process."""

    makers: Sequence[Maker]
    loader: Callable[[Task], Loaded]

    def __init__(self, plan: PassPlan) -> None:
        self.plan, self.store = plan, Store.open(plan.store)
        recipe, names, size = plan.recipe, list(plan.columns), plan.batch_size
        device = choose_device(plan.device)
        self.workers, self.task_records = plan.workers, size
        if all(map(is_of_captions, names)):
            self.makers = caption_makers(recipe, names, device=device, batch_size=size)
            self.loader = CaptionLoader(plan.store)
            self.workers, self.task_records = 0, CAPTIONS_AT_A_TIME * size
        else:
            tokenizer = recipe_tokenizer(recipe, self.store) if CODES in names else None
            self.makers = build_makers(recipe, names, tokenizer, device=device, batch_size=size)
            views = views_of(recipe, [view for maker in self.makers for view in maker.views])
            self.loader = Loader(plan.store, views, grey16=recipe.data.crop.grey16)
        self.writers = {
            maker.name: self.store.writer(
                maker.name,
                made_by=maker.made_by,
                shape=maker.shape,
                dtype=maker.dtype,
                variants=maker.variants,
                again=maker.name in plan.again,
            )
            for maker in self.makers
        }

    def run(
        self, shards: Sequence[int], *, on_batch: Callable[[int, float], None] = lambda records, waited: None
    ) -> Iterator[ShardDone]:
        """Each shard as it is done; `on_batch(records, seconds waited for data)` is called after every batch."""
        size = self.task_records
        tasks = [
            Task(shard, start, min(start + size, self.store.about["shards"][shard]))
            for shard in shards
            for start in range(0, self.store.about["shards"][shard], size)
        ]
        waiting, waited = Waiting(), 0.0
        values: dict[str, list[tuple[int, np.ndarray]]] = {maker.name: [] for maker in self.makers}
        failures: list[Failure] = []
        for loaded in load_tasks(tasks, self.loader, workers=self.workers, waiting=waiting):
            self._make(loaded, values)
            failures += loaded.failures
            on_batch(loaded.task.stop - loaded.task.start, waiting.seconds)
            shard = loaded.task.shard
            if loaded.task.stop == self.store.about["shards"][shard]:
                self._write(shard, values, failures)
                yield ShardDone(shard, loaded.task.stop, len(failures), waiting.seconds - waited)
                waited = waiting.seconds
                values, failures = {name: [] for name in values}, []

    def _make(self, loaded: Loaded, values: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        if not loaded.places:
            return
        places = [loaded.task.start + place for place in loaded.places]
        for maker in self.makers:
            values[maker.name] += zip(places, maker.make(loaded), strict=True)

    def _write(self, shard: int, values: dict[str, list[tuple[int, np.ndarray]]], failures: list[Failure]) -> None:
        table = self.store.records_of(shard)
        valid = np.zeros(len(table), dtype=bool)
        for maker in self.makers:
            made = values[maker.name]
            valid[[place for place, _ in made]] = True
            ids = table.column("id").combine_chunks()
            self.writers[maker.name].write(
                shard, ids, _in_rows(maker, made, len(table)), valid=valid, failures=failures
            )


def _in_rows(maker: Maker, made: list[tuple[int, np.ndarray]], count: int) -> np.ndarray | list[np.ndarray]:
    """The made values in the order of the shard's rows, zeros where there is none."""
    if None in maker.shape:
        rows = [np.zeros((0,) * len(maker.shape), maker.dtype)] * count
        for place, value in made:
            rows[place] = value[0]
        return rows
    shape = [size for size in maker.shape if size is not None]
    dense = np.zeros((count, maker.variants, *shape), maker.dtype)
    for place, value in made:
        dense[place] = value
    return dense
