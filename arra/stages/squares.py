"""The middle squares of a store's pictures, read and cropped by the loader: what tokenizers and models are judged by.

Legend: N pictures, H W pixels.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from arra.config import Recipe
from arra.data.crops import CropSettings
from arra.data.images import Grey16
from arra.data.loading import Loaded, Loader, Task, View, default_workers, load_tasks
from arra.data.store import Store
from arra.errors import ArraError

PICTURES_AT_A_TIME = 64


def center_pictures(
    recipe: Recipe,
    store: Store,
    *,
    rows: np.ndarray,
    pixels: int | None = None,
    may_fail: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UInt8[Tensor, "N H W 3"]:
    """Middle squares of some records' pictures, of `pixels` (else the recipe's size) a side.

    Raises:
        ArraError: a picture cannot be read (all of them, where some `may_fail`).
    """
    images: list[np.ndarray] = []
    size = pixels or recipe.data.image_size
    for done, loaded in center_loads(store, rows, pixels=size, grey16=recipe.data.crop.grey16):
        if loaded.failures and not may_fail:
            failure = loaded.failures[0]
            raise ArraError(f"{failure.where}: picture of record '{failure.id}': {failure.reason}")
        images += [each[0] for each in loaded.views["x"]]
        progress(done, len(rows))
    if not images:
        raise ArraError(f"{store.path}: none of {len(rows)} pictures can be read; see arra data check")
    return torch.from_numpy(np.stack(images))


def center_loads(
    store: Store, rows: np.ndarray, *, pixels: int, grey16: Grey16, workers: int | None = None
) -> Iterator[tuple[int, Loaded]]:
    """The middle squares of some records (view `x`) as they are read, with the number of records so far."""
    starts = np.array(store.shard_starts)
    tasks = list(_tasks(rows, np.searchsorted(starts, rows, side="right") - 1, starts))
    loader = Loader(store.path, {"x": View(CropSettings(), pixels, pixels)}, grey16=grey16)
    if workers is None:
        workers = default_workers() if len(tasks) > 1 else 0
    done = 0
    for loaded in load_tasks(tasks, loader, workers=workers):
        done += loaded.task.stop - loaded.task.start
        yield done, loaded


def _tasks(rows: np.ndarray, shards: np.ndarray, starts: np.ndarray) -> Iterator[Task]:
    """Tasks that cover the rows, runs of neighbours together."""
    begin = 0
    for place in range(1, len(rows) + 1):
        ends = place == len(rows) or rows[place] != rows[place - 1] + 1 or shards[place] != shards[begin]
        if ends or place - begin == PICTURES_AT_A_TIME:
            first, last = int(rows[begin] - starts[shards[begin]]), int(rows[place - 1] - starts[shards[begin]])
            yield Task(int(shards[begin]), first, last + 1)
            begin = place


def spaced(rows: np.ndarray, most: int | None) -> np.ndarray:
    """At most so many of the rows, evenly spaced."""
    if most is None or len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
