"""The loop over the codes as a program of fixed shapes, so that a GPU replays it without waiting for its host.

One step (embed, all blocks, head, guidance, filters, draw, store) is captured as a CUDA graph; the place in the picture
is a number on the device that the step itself moves on. A graph looks at a fixed number of positions, and there is one
for every `REACH` of them, so that attention costs what is filled, rounded up. Batches are filled up to one size, which
also makes a picture the same bits in any company. Blocks are compiled where that is wanted. On a CPU the same step runs
uncaptured: slower than `decoding.py` there, and how it is tested.
Letters: B images of the batch, R rows (B, or 2B while guided: conditional, then null), C prefix length, P = h*w codes,
K codes of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from arra.models import Condition
from arra.sample.decoding import FREE, Batch, Prefixes, Reader, Rows, start_codes
from arra.sample.logits import SamplingSettings, guide, pick

REACH = 128
"""Positions between one graph and the next: at 256 codes three graphs, at 1,024 nine."""
WARM_UPS = 3
"""Steps before a capture, in which kernels are chosen and compiled."""
Block = Callable[..., Tensor]


@runtime_checkable
class StaticReader(Reader, Protocol):
    """What a step of fixed shapes asks of a model beside what every loop does."""

    def static_condition(self, rows: Condition) -> Condition:
        """The rows in a form of few lengths."""

    def static_places(self, prefix_length: int, grid: tuple[int, int]) -> Int64[Tensor, " P"]:
        """The position of every code."""

    def tail(self, index: int, grid: tuple[int, int]) -> tuple[int, ...]:
        """Tokens that are fed behind the code at `index`."""

    def decode_at(
        self,
        prefix_mask: Bool[Tensor, "R C"] | None,
        cache: Any,
        *,
        codes: Int[Tensor, "R 1"],
        place: Int[Tensor, "1"],
        reach: int,
        tail: tuple[int, ...],
        block: Block | None,
    ) -> Float[Tensor, "R K"]:
        """Logits after feeding one code and its tail at a place that the device alone knows.

        The first R rows of the memory are meant. `block` may stand in for calling a block.
        """


@dataclass(frozen=True)
class Picture:
    """The tensors that steps read and write, at addresses that stay."""

    width: int
    """Prefix length C."""
    codes: Int[Tensor, "B P"]
    given: Int[Tensor, "B P"]
    keys: Int[Tensor, "B P"]
    scales: Float[Tensor, " P"]
    places: Int64[Tensor, " P"]
    index: Int[Tensor, "1"]
    """The code that is fed next."""
    prefix_mask: Bool[Tensor, "R C"] | None
    memory: Any


@dataclass
class StaticLoop:
    """The loop of one model for batches of up to `batch_size` images."""

    model: StaticReader
    grid: tuple[int, int]
    settings: SamplingSettings
    batch_size: int
    captures: bool
    """Whether steps are captured as CUDA graphs."""
    compiler: str | None = None
    """What compiles blocks: a backend of `torch.compile`; None leaves them as they are."""
    _picture: Picture | None = None
    _steps: dict[tuple[int, int, tuple[int, ...]], Callable[[], None]] = field(default_factory=dict)
    _pool: Any = None

    def decode_batch(self, batch: Batch, *, prefixes: Prefixes | None = None) -> Int[Tensor, "B P"]:
        """The codes, as `decoding.decode_batch` gives them (but for what other shapes round otherwise)."""
        count, batch = batch.num_images, self._filled_up(batch)
        codes = start_codes(batch)
        free = (codes == FREE).any(0).nonzero()[:, 0].tolist()
        if not free:
            return codes[:count]
        # from the first free code on every one is drawn, and what is given put over it
        first, scales = free[0], self.settings.cfg_scales(codes.shape[1])
        guided = [scale != 1 for scale in scales[first:]]
        rows = Rows(self.model, batch, self.grid, codes, guided=guided, prefixes=prefixes)
        rows.begin(first)
        logits = rows.logits
        if guided[0]:
            logits = guide(logits[: self.batch_size], logits[self.batch_size :], cfg_scale=scales[first])
        drawn = pick(logits[: self.batch_size], self.settings, keys=batch.keys[:, first])
        codes[:, first] = torch.where(codes[:, first] == FREE, drawn, codes[:, first])
        picture = self._seated(rows, batch, codes, first)
        rows.memory = None  # the picture has it now
        self._paint(rows, picture, first)
        assert self._picture is not None
        return self._picture.codes[:count].clone()

    def forget(self) -> None:
        """Nothing; memory and steps are given back, and made anew for the next batch."""
        self._picture = self._pool = None
        self._steps.clear()

    def _paint(self, rows: Rows, picture: Picture, first: int) -> None:
        """Nothing; all codes behind the first one are drawn."""
        places = picture.places.tolist()
        is_guided, guided = rows.is_guided, [False] * (first + 1) + list(rows.guided[1:])
        for index in range(first, len(places) - 1):  # the code that is fed; the next one is drawn
            tail, is_guided = self.model.tail(index, self.grid), is_guided and any(guided[index + 1 :])
            if guided[index + 1] and not is_guided:  # null rows come behind the others, which have read on meanwhile
                null, is_guided = rows.null(), True
                memory, _ = self.model.prefill(null, picture.codes[:, :index], grid=self.grid)
                picture.memory.copy_rows(memory, first=self.batch_size, filled=places[index])
            reach = static_length(places[index] + 1 + len(tail))
            key = (self.batch_size * (2 if is_guided else 1), reach, tail)
            if key not in self._steps:
                step = self._step(picture, *key)
                self._steps[key] = self._captured(step, picture) if self.captures else step
            self._steps[key]()

    def _seated(self, rows: Rows, batch: Batch, codes: Tensor, first: int) -> Picture:
        """The picture's tensors, holding this batch; new ones if its prefix is of another form than the last one's."""
        width, device, mask = rows.condition.tokens.shape[1], codes.device, rows.condition.prefix_mask
        if mask is not None and not rows.is_guided:
            mask = torch.cat([mask, rows.null().prefix_mask])  # type: ignore[list-item]
        picture = self._picture
        if picture is None or picture.width != width or (picture.prefix_mask is None) != (mask is None):
            self.forget()
            everyone = torch.zeros(2 * self.batch_size, dtype=torch.int64, device=device)
            self._picture = picture = Picture(
                width=width,
                codes=codes.clone(),
                given=codes.clone(),
                keys=batch.keys.clone(),
                scales=torch.tensor(self.settings.cfg_scales(codes.shape[1]), device=device),
                places=self.model.static_places(width, self.grid),
                index=torch.zeros(1, dtype=torch.int64, device=device),
                prefix_mask=None if mask is None else mask.new_zeros(2 * self.batch_size, width),
                memory=rows.memory.spread(
                    everyone, length=static_length(self.model.memory_length(rows.condition, self.grid))
                ),
            )
        picture.codes.copy_(codes)
        picture.given.copy_(start_codes(batch))
        picture.keys.copy_(batch.keys)
        picture.index.fill_(first)
        if picture.prefix_mask is not None and mask is not None:
            picture.prefix_mask[: len(mask)] = mask
        picture.memory.copy_rows(rows.memory, first=0, filled=int(picture.places[first]))
        return picture

    def _step(self, picture: Picture, num_rows: int, reach: int, tail: tuple[int, ...]) -> Callable[[], None]:
        """What feeds the code at `picture.index`, draws the next one and moves on."""
        count = self.batch_size
        mask = None if picture.prefix_mask is None else picture.prefix_mask[:num_rows]
        block = self._block(picture.width)

        def step() -> None:
            fed = picture.codes.index_select(1, picture.index)
            logits = self.model.decode_at(
                mask,
                picture.memory,
                codes=fed if num_rows == count else torch.cat([fed, fed]),
                place=picture.places.index_select(0, picture.index),
                reach=reach,
                tail=tail,
                block=block,
            )
            picture.index.add_(1)
            if num_rows > count:
                scale = picture.scales.index_select(0, picture.index).expand(count)[:, None]
                logits = guide(logits[:count], logits[count:], cfg_scale=scale)
            drawn = pick(logits, self.settings, keys=picture.keys.index_select(1, picture.index)[:, 0])[:, None]
            known = picture.given.index_select(1, picture.index)
            picture.codes.index_copy_(1, picture.index, torch.where(known == FREE, drawn, known))

        return step

    def _block(self, width: int) -> Block | None:
        """What calls a block compiled; None where that is not wanted."""
        if self.compiler is None:
            return None
        # once for each reach, with null rows and without; a compiler that has to give up raises
        variants = 2 * static_length(width + 2 * self.grid[0] * (self.grid[1] + 1)) // REACH + 8
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, variants)
        return torch.compile(_call_block, dynamic=False, fullgraph=True, backend=self.compiler)

    def _captured(self, step: Callable[[], None], picture: Picture) -> Callable[[], None]:
        """The step as a CUDA graph; the picture is as it was before."""
        index = picture.index.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
                picture.index.copy_(index)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # one step at a time: they can share what they need
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()  # noted, not run: the first replay is what paints
        return graph.replay

    def _filled_up(self, batch: Batch) -> Batch:
        """The batch with copies of its last image, up to the size of all, and its prefixes in a form of few lengths."""
        missing = self.batch_size - batch.num_images
        rows = torch.arange(self.batch_size, device=batch.keys.device).clamp(max=batch.num_images - 1)
        return Batch(
            condition=self.model.static_condition(batch.condition.select(rows)),
            whose=[*batch.whose, *[batch.whose[-1]] * missing],
            keys=batch.keys[rows],
            given=None if batch.given is None else batch.given[rows],
        )


def static_length(positions: int) -> int:
    """Positions that are looked at for so many: a multiple of `REACH`, which kernels with masks like as well."""
    return -(-positions // REACH) * REACH


def _call_block(block: Any, x: Tensor, table: Tensor, mask: Tensor, window: Any) -> Tensor:
    found: Tensor = block(x, table, mask, window)
    return found
