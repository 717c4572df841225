"""From a trained model to pictures: `arra generate`. Nothing here knows how the model was trained.

request --> wishes, numbers --> those whose picture is missing, shared by jobs and ranks --> Engine, chunk by chunk
        --> NNNNNN.png, samples.jsonl --> at the end grid.png, samples.npz
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from arra.distributed import Ranks, joined_ranks, own_device
from arra.errors import ArraError
from arra.models import Decoder
from arra.models.narrow import WeightKind, narrow_weights
from arra.report.grids import SCALE, GridColumn, png_bytes, sample_grid
from arra.runs import atomic_write
from arra.sample.generate import Engine, sampling_settings
from arra.sample.logits import SamplingSettings
from arra.sample.memory import PaintingMemory, painting_memory, refuse_too_large
from arra.sample.presets import find_preset
from arra.stages.given import GivenPicture, read_given
from arra.stages.model import weights_hash
from arra.stages.painters import LoadedDecoder, LoadedRun, load_painter
from arra.stages.process import Progress, silent
from arra.stages.request import (
    Numbers,
    PaintOptions,
    PaintRequest,
    balance_note,
    check_request,
    described,
    number,
    parse_grid,
)
from arra.stages.samples import GRID_FILE, NPZ_FILE, Recorder, Samples, part_list
from arra.stages.split_wishes import make_wishes
from arra.stages.wishes import Wishes

BATCHES_AT_A_TIME = 8
"""Painted at most before their pictures are written."""
SECONDS_AT_A_TIME = 10.0
"""Slow models are asked for one batch at a time: little is lost when they are stopped, and progress is seen."""
GRID_ROWS, GRID_COLUMNS = 64, 16
"""Of grid.png, at most."""
GRID_PIXELS = 2**26
"""Of grid.png, about: all the rows for pictures of 256 pixels, fewer for larger ones."""
ENLARGED_TO = 192
"""Small pictures are enlarged in grid.png, up to so many pixels a side."""


@dataclass(frozen=True)
class Painted:
    """What a start of `arra generate` has done."""

    folder: Path
    num_images: int
    """That the request has in all."""
    num_painted: int
    """Now, by all processes of this start."""
    seconds: float
    """In which those were painted."""
    num_missing: int
    """Which other jobs of an array have still to paint."""
    note: str = ""
    files: tuple[Path, ...] = ()
    """Made of all pictures together."""

    @property
    def images_per_second(self) -> float:
        """Pictures a second of painting, all processes together."""
        return self.num_painted / self.seconds if self.seconds else 0.0

    def summary(self) -> str:
        """What ends the command."""
        there = self.num_images - self.num_missing
        count = f"{there} picture{'' if there == 1 else 's'}"
        if self.num_missing:
            count += f" of {self.num_images}"
        already = there - self.num_painted
        speed = f"{self.num_painted} painted now, {self.images_per_second:.3g} images/s" if self.num_painted else ""
        told = ", ".join(filter(None, [f"{already} there before" if already else "", speed]))
        made = f", all together in {' and '.join(map(str, self.files))}" if self.files else ""
        note = f"{self.note}\n" if self.note else ""
        return f"{note}{count} in {self.folder} ({told}){made}"


def paint(request: PaintRequest, *, options: PaintOptions | None = None, progress: Progress = silent) -> Painted:
    """What was painted: NNNNNN.png for every picture of the request that was missing, and what is made of all.

    Under torchrun its processes share the work. Started again, it goes on where it was stopped, with the same bytes.

    Raises:
        ArraError: a request that the model cannot paint, a folder with pictures of another request, or one that cannot
            be written.
    """
    options = options or PaintOptions()
    check_request(request)  # before a large model is read
    device = own_device(options.device)
    with joined_ranks(device) as ranks:
        told = progress if ranks.is_first else silent
        told("opening the model", 0, 1)
        loaded = load_painter(
            request.model, tokenizer=request.tokenizer, tokenizer_weights=request.tokenizer_weights
        ).on(device)
        return open_job(loaded, request, options=options, ranks=ranks).run(told)


@dataclass(frozen=True)
class Job:
    """One request, ready to be painted by one of its processes."""

    loaded: LoadedDecoder
    request: PaintRequest
    options: PaintOptions
    ranks: Ranks
    wishes: Wishes
    numbers: Numbers
    settings: SamplingSettings
    grid: tuple[int, int] | None
    given: GivenPicture | None
    samples: Samples
    identity: dict[str, Any]
    """What request.json holds."""

    def run(self, progress: Progress) -> Painted:
        """What was painted, as of `paint`."""
        with ExitStack() as stack:
            # told before the folder is touched, if the model cannot be asked so
            engine = stack.enter_context(self._engine())
            self._refuse_too_large()
            done = np.frombuffer(self.ranks.by_first(lambda: self._begin(stack)), np.uint8)
            missing = np.flatnonzero(~np.unpackbits(done, count=len(self.numbers)).astype(bool))
            part, parts = self.options.part or (0, 1)
            missing = missing[missing % parts == part]
            own = missing[self.ranks.rank :: self.ranks.size]
            started = time.monotonic()
            if len(own):
                with Recorder(self.samples, part_list(self._part(ranked=True))) as recorder:
                    self._paint(engine, recorder, own, _telling(progress, self.ranks.size, len(missing)))
            self.ranks.barrier()
            seconds = time.monotonic() - started
            num_missing, names = self.ranks.by_first(lambda: self._finish(progress))
            return Painted(
                folder=self.samples.path,
                num_images=len(self.numbers),
                num_painted=len(missing),
                seconds=seconds,
                num_missing=num_missing,
                note=balance_note(self.wishes, self.numbers),
                files=tuple(self.samples.path / name for name in names),
            )

    def _engine(self) -> Engine:
        return Engine(
            self.loaded.model,
            self.loaded.tokenizer,
            settings=self.settings,
            batch_size=self.options.batch_size,
            grid=self.grid,
            jacobi_window=self.request.jacobi_window,
            graphs=self.options.graphs,
            compiler="inductor" if self.options.compiled else None,
        )

    def _refuse_too_large(self) -> None:
        """Nothing; with model and engine in place there is room for a batch."""
        model, options, device = self.loaded.model, self.options, self.loaded.model.device
        static = options.compiled or options.graphs or (options.graphs is None and device.type == "cuda")
        together = 1 if self.request.jacobi_window else options.batch_size
        length = self.wishes.positions
        if length is None:
            assert isinstance(model, Decoder)
            length = model.settings.prefix_length
        if self.given is not None:  # those before the first painted one are read together
            length += int(self.given.painted.to(torch.uint8).argmax())

        def memory_with(size: int) -> PaintingMemory:
            return painting_memory(
                model,
                self.loaded.tokenizer,
                batch_size=size,
                settings=self.settings,
                grid=self.grid,
                prefix_length=length,
                static=bool(static),
            )

        # steps of fixed shapes have room for a whole batch, however few pictures are asked for
        refuse_too_large(
            memory_with, batch_size=together if static else min(together, len(self.numbers)), device=device
        )

    def _part(self, *, ranked: bool = False) -> str:
        """The name of this job's, or this process's, part of the work; empty where it is all of it."""
        names = []
        if self.options.part is not None:
            names.append("shard-{}-of-{}".format(*self.options.part))
        if ranked and self.ranks.size > 1:
            names.append(f"rank-{self.ranks.rank}")
        return ".".join(names)

    def _begin(self, stack: ExitStack) -> bytes:
        """Which pictures are there, a bit each; the folder is this job's until the stack is left."""
        stack.enter_context(self.samples.painting(self._part()))
        with self.samples.in_turn():
            self.samples.begin(self.identity, replace=self.options.replace)
            return np.packbits(self.samples.done()).tobytes()

    def _paint(self, engine: Engine, recorder: Recorder, own: np.ndarray, told: Callable[[int], None]) -> None:
        size, batches, first = self.options.batch_size, 1, 0
        told(0)
        while first < len(own):
            chosen = own[first : first + size * batches].tolist()
            begun = time.monotonic()
            seeds = [self.numbers.seed(each) for each in chosen]
            result = engine.generate(
                seeds=seeds,
                given_codes=None if self.given is None else self.given.rows(seeds),
                **self.wishes.inputs([self.numbers.place(each) for each in chosen]),
            )
            assert result.images is not None
            recorder.take(chosen, result.images.cpu().numpy())
            first += len(chosen)
            batches = min(2 * batches, BATCHES_AT_A_TIME) if time.monotonic() - begun < SECONDS_AT_A_TIME else 1
            told(first)

    def _finish(self, progress: Progress) -> tuple[int, list[str]]:
        """How many pictures are missing; where none is, the names of the files made of all."""
        folder, samples = self.samples.path, self.samples
        with samples.in_turn():
            missing = int((~samples.done()).sum())
            if missing and self.options.part is None:
                raise ArraError(f"{folder}: {missing} pictures have vanished meanwhile; run the same command again")
            if missing:
                return missing, []
            samples.merge()
            names = []
            if self.options.grid:
                names.append(GRID_FILE)
                if not (folder / GRID_FILE).is_file():
                    progress("grid", 0, 1)
                    atomic_write(folder / GRID_FILE, self._grid())
            if self.options.npz:
                names.append(NPZ_FILE)
                if not (folder / NPZ_FILE).is_file():
                    labels, numbers = self.wishes.labels, self.numbers
                    each = None if labels is None else (labels[numbers.place(n)] for n in range(len(numbers)))
                    samples.write_npz(each, progress=progress)
        return 0, names

    def _grid(self) -> bytes:
        """The PNG with the first pictures of the first conditions."""
        height, width = self.samples.read(0).shape[:2]
        scale = max(1, min(SCALE, ENLARGED_TO // max(height, width)))
        sheet = self.numbers.sheet(GRID_ROWS, GRID_COLUMNS)
        sheet = sheet[: max(1, GRID_PIXELS // (len(sheet[0]) * height * width * scale**2))]
        images = np.stack([np.stack([self.samples.read(each) for each in row]) for row in sheet])
        column = GridColumn(label=self.loaded.path.resolve().name, images=images)
        return png_bytes(sample_grid([column], captions=self.wishes.texts[: len(sheet)], scale=scale))


def open_job(loaded: LoadedDecoder, request: PaintRequest, *, options: PaintOptions, ranks: Ranks) -> Job:
    """The request as a job, after a look at everything a user may have got wrong.

    Raises:
        ArraError: the model cannot paint it.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    grid = parse_grid(model, request.image_size)
    wishes = make_wishes(loaded, request.asked, folder=request.text_encoder, grid=grid)
    numbers = number(len(wishes), request)
    usual = loaded.sampling if request.preset is None else find_preset(request.preset).settings
    chosen = {key: value for key, value in request.sampling.items() if value is not None}
    settings = sampling_settings(**{**usual.model_dump(), **chosen})
    height, width = grid or model.settings.grid
    given = None
    if request.given is not None:
        grey16 = loaded.recipe.data.crop.grey16 if isinstance(loaded, LoadedRun) else "full"
        given = read_given(request.given, tokenizer, grid=(height, width), grey16=grey16)
    if request.weights is not None:
        narrow_weights(model, cast(WeightKind, request.weights))  # others it refuses
    made_by: dict[str, Any] = {
        "model_sha256": ranks.by_first(lambda: weights_hash(str(loaded.path))),
        "tokenizer_sha256": tokenizer.weights_hash,
    }
    how = dict(settings.model_dump())
    if request.weights is not None:
        how["weights"] = request.weights
    if request.jacobi_window:
        how["jacobi_window"] = request.jacobi_window
    if request.given is not None:
        how |= request.given.facts()

    def facts(which: int) -> dict[str, Any]:
        return {**wishes.facts[numbers.place(which)], "seed": numbers.seed(which), **how, **made_by}

    pixels = f"{width * tokenizer.downsampling}x{height * tokenizer.downsampling}"
    identity = {**described(wishes, numbers), "image_size": pixels, **how, **made_by}
    folder = options.out or request.model / "samples" / "generated"
    samples = Samples(folder, len(numbers), facts)
    return Job(loaded, request, options, ranks, wishes, numbers, settings, grid, given, samples, identity)


def _telling(progress: Progress, size: int, total: int) -> Callable[[int], None]:
    """What rank zero calls with the number of its own pictures: all processes are about as fast."""
    started = time.monotonic()

    def told(own: int) -> None:
        done, seconds = min(own * size, total), time.monotonic() - started
        progress("painting", done, total, f"{done / seconds:.3g} images/s" if done and seconds else "")

    return told
