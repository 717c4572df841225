"""From records to crops: pictures are read, checked and cropped in loader processes, each decoded once.

A task is a run of records of one shard; what comes back is in the order of the tasks, whatever process made it, so a
store does not depend on the number of processes. Legend: B records of a task, V variants, H W pixels.
"""

import errno
import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from arra.data.columns import ColumnReader
from arra.data.crops import Crop, CropSettings, Draw
from arra.data.images import Grey16
from arra.data.lines import one_line
from arra.data.reading import ImageReader
from arra.data.records import BROKEN_PICTURE, Failure, ImageRef, decode_image
from arra.data.store import Store
from arra.runs import leave_with

DIGEST_BYTES = 16


@dataclass(frozen=True)
class View:
    """One size at which a picture's crop is wanted."""

    crop: CropSettings
    crop_size: int
    """The size that the crop is defined at."""
    size: int
    """Pixels per side that come out: the same region of the picture at another resolution."""


@dataclass(frozen=True)
class Task:
    """Records of one shard that are loaded together."""

    shard: int
    start: int
    stop: int


@dataclass
class Loaded:
    """What became of a task's records."""

    task: Task
    places: list[int] = field(default_factory=list)
    """Which of the task's records are loaded, counted from its start."""
    views: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By name of the view, for every loaded record uint8 (V, H, W, 3)."""
    digests: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height, upright, before the crop."""
    failures: list[Failure] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    """Where captions are loaded in place of pictures."""

    def extend(self, other: "Loaded") -> None:
        """Nothing; a later part of the task is taken over."""
        shift = other.task.start - self.task.start
        self.places += [place + shift for place in other.places]
        for name, images in other.views.items():
            self.views.setdefault(name, []).extend(images)
        self.digests += other.digests
        self.sizes += other.sizes
        self.failures += other.failures
        self.captions += other.captions


def picture_digest(content: bytes) -> bytes:
    """What tells two encoded pictures apart."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class Loader:
    """Loads tasks of a store; lives once in every loader process."""

    def __init__(self, store: Path, views: Mapping[str, View], *, grey16: Grey16 = "full") -> None:
        self.path, self.views, self.grey16 = store, dict(views), grey16
        self.crops = {name: Crop(view.crop, view.crop_size) for name, view in self.views.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return _loader, (self.path, self.views, self.grey16)  # what is open stays in its process

    def __call__(self, task: Task) -> Loaded:
        """The task's crops; a record that cannot be loaded is a failure, never an error."""
        first = self.store.shard_starts[task.shard]
        return self.load_rows(range(first + task.start, first + task.stop), task=task)

    @cached_property
    def store(self) -> Store:
        return Store.open(self.path)

    @cached_property
    def known(self) -> ColumnReader | None:
        """The digests that the pictures must have, once a pass has noted them."""
        return None if self.store.entry("pictures") is None else self.store.reader("pictures", content=False)

    @cached_property
    def reader(self) -> ImageReader:
        return ImageReader()

    def load_rows(
        self, rows: Sequence[int], draws: Sequence[Draw | None] | None = None, *, task: Task | None = None
    ) -> Loaded:
        """The crops of some rows of the store; random ones with the given numbers."""
        loaded = Loaded(task or Task(0, 0, len(rows)), views={name: [] for name in self.views})
        known = None if self.known is None else self.known.take(np.asarray(rows))
        for place, row in enumerate(rows):
            name, text = self.store.fields(row, "id", "image")
            ref = ImageRef.parse(text) if text else None
            expected = None if known is None or not known[place].any() else known[place].tobytes()
            try:
                if ref is None:
                    raise ValueError("the record has codes and no picture")
                content = self.reader.read(ref)
                digest = picture_digest(content)
                if expected is not None and digest != expected:
                    raise ValueError("the picture is not the one that the store was made from; restore it")
                image = decode_image(content, grey16=self.grey16)
                crops = {
                    view: crop.views(image, size=self.views[view].size, draw=None if draws is None else draws[place])
                    for view, crop in self.crops.items()
                }
            except BROKEN_PICTURE as error:
                if isinstance(error, OSError) and error.errno in OUR_ERRORS:
                    raise
                loaded.failures.append(Failure(name, str(ref), _reason(error)))
                continue
            loaded.places.append(place)
            loaded.digests.append(digest)
            loaded.sizes.append(image.size)
            for view, images in crops.items():
                loaded.views[view].append(images)
        return loaded


def _loader(store: Path, views: Mapping[str, View], grey16: Grey16) -> Loader:
    return Loader(store, views, grey16=grey16)


OUR_ERRORS = {errno.EMFILE, errno.ENFILE}
"""Too many open files: no picture's fault."""


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


class _Tasks(torch.utils.data.Dataset[Loaded]):
    def __init__(self, tasks: Sequence[Task], load: Callable[[Task], Loaded]) -> None:
        self.tasks, self.load = tasks, load

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Loaded:
        return self.load(self.tasks[index])


@dataclass
class Waiting:
    """How long the consumer of `load_tasks` waited for data."""

    seconds: float = 0.0


def load_tasks(
    tasks: Sequence[Task], load: Callable[[Task], Loaded], *, workers: int, waiting: Waiting | None = None
) -> Iterator[Loaded]:
    """What became of every task, in order.

    A picture that ends its loader process (a crash inside a decoder, memory) is found by loading the task's records
    one by one, each in a process of its own, and is a failure like any other.
    """
    done, waiting = 0, waiting or Waiting()
    while done < len(tasks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of more processes than cores, which were asked for
            loader = torch.utils.data.DataLoader(
                _Tasks(tasks[done:], load),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                # a worker whose parent was killed waits for ever on a pipe of which it holds the other end
                worker_init_fn=partial(_begin_worker, os.getpid()),
            )
        found = iter(loader)
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever this process happens to be, in the networks too; without it the loader
            # notices a dead worker by itself when it waits for it, within seconds
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            while True:
                started = time.perf_counter()
                try:
                    loaded = next(found)
                except StopIteration:
                    return
                waiting.seconds += time.perf_counter() - started
                yield loaded
                done += 1
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
                raise
        del found, loader
        yield _one_by_one(tasks[done], load)
        done += 1


def _one_by_one(task: Task, load: Callable[[Task], Loaded]) -> Loaded:
    together = Loaded(task)
    for start in range(task.start, task.stop):
        alone = Task(task.shard, start, start + 1)
        receiver, sender = get_context("fork").Pipe(duplex=False)
        process = get_context("fork").Process(target=_load_into, args=(sender, alone, load))
        process.start()
        sender.close()
        try:
            together.extend(receiver.recv())
        except EOFError:
            process.join()
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            together.failures.append(_ended(load, alone, how))
        process.join()
    return together


def _begin_worker(parent: int, number: int) -> None:
    leave_with(parent)


def _load_into(sender: Connection, task: Task, load: Callable[[Task], Loaded]) -> None:
    sender.send(load(task))


def _ended(load: Callable[[Task], Loaded], task: Task, how: str) -> Failure:
    reason = f"not a readable image (reading it ended the process: {how})"
    if not isinstance(load, Loader):
        return Failure(str(task), "", reason)
    name, text = load.store.fields(load.store.shard_starts[task.shard] + task.start, "id", "image")
    return Failure(name, str(ImageRef.parse(text)), reason)


def default_workers() -> int:
    """Loader processes where nobody says otherwise: the cores but one, at most 16, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, allowed - 1))
