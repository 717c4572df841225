"""The loop over the codes of one batch: read the prefix, draw a code, feed it, until the pictures are whole.

It asks little of a model family (`Reader`), so that decoders of LlamaGen's kind, Chameleon and any causal LM are
decoded by the same loop: prefixes are read once for all rows that share them, conditional and null rows stand in one
batch while guidance is on and only then, runs of codes that are given are fed together and cost no head and no draw.
Letters: B images of the batch, R rows (B, or 2B while guided: conditional, then null), U distinct rows, n codes fed,
P = h*w codes, K codes of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.models import Condition
from arra.sample.logits import SamplingSettings, guide, pick

FREE = -1
"""In given codes: to be painted."""
Watch = Callable[[int, Tensor], None]


@runtime_checkable
class Memory(Protocol):
    """What a model has read of some rows; each family has its own."""

    def rows(self, count: int) -> Any:
        """The first rows alone; this one must not be used any more."""

    def select(self, places: Int[Tensor, "R"]) -> Any:
        """One with as much room, whose row i is a copy of row places[i]."""

    def spread(self, places: Int[Tensor, "R"], *, length: int) -> Any:
        """One with room for `length` positions, whose row i is a copy of row places[i]."""

    def join(self, other: Any) -> Any:
        """These rows followed by those of another one with as much room."""


@runtime_checkable
class Reader(Protocol):
    """What the loop asks of a model."""

    @property
    def keeps_all(self) -> bool:
        """Whether its memory keeps every position; if not it can only be read on, and lose its last rows."""

    def memory_length(self, rows: Condition, grid: tuple[int, int]) -> int:
        """Positions that a memory needs room for."""

    def null_condition(self, condition: Condition, *, grid: tuple[int, int] | None = None) -> Condition:
        """The unconditional twin of each row."""

    def prefill(
        self, rows: Condition, codes: Int[Tensor, "U n"], *, grid: tuple[int, int]
    ) -> tuple[Any, Float[Tensor, "U K"]]:
        """A memory of the prefix and the first n codes (with room for more only if it cannot be spread), and logits."""

    def decode(
        self, rows: Condition, cache: Any, *, codes: Int[Tensor, "R n"], index: int, grid: tuple[int, int], every: bool
    ) -> Tensor:
        """Logits (R, K) after feeding the codes at index..index+n-1; behind every one of them (R, n, K) if asked."""


@dataclass(frozen=True)
class Batch:
    """Some images to be painted together."""

    condition: Condition
    whose: Sequence[int]
    """Which of all conditions each row is; equal numbers say equal rows."""
    keys: Int[Tensor, "B P"]
    given: Int[Tensor, "B P"] | None = None
    """Codes that are as they are; FREE elsewhere."""

    @property
    def num_images(self) -> int:
        """Images B."""
        return len(self.condition)


@dataclass
class Prefixes:
    """Prefixes that were read for the last batch, for the next one's images of the same prompts."""

    names: list[bytes] = field(default_factory=list)
    memory: Any = None
    logits: Tensor | None = None


def decode_batch(
    model: Reader,
    batch: Batch,
    *,
    grid: tuple[int, int],
    settings: SamplingSettings,
    prefixes: Prefixes | None = None,
    watch: Watch | None = None,
) -> Int[Tensor, "B P"]:
    """The codes; `watch(index, logits)` sees the logits each code is taken from, before the filters."""
    codes = start_codes(batch)
    free = (codes == FREE).any(0).nonzero()[:, 0].tolist()
    if not free:
        return codes
    scales = settings.cfg_scales(codes.shape[1])
    rows = Rows(model, batch, grid, codes, guided=[scales[index] != 1 for index in free], prefixes=prefixes)
    rows.begin(free[0])
    for place, index in enumerate(free):
        logits = rows.logits
        if rows.is_guided and scales[index] != 1:
            logits = guide(logits[: batch.num_images], logits[batch.num_images :], cfg_scale=scales[index])
        logits = logits[: batch.num_images]
        if watch is not None:
            watch(index, logits)
        drawn = pick(logits, settings, keys=batch.keys[:, index])
        codes[:, index] = drawn if batch.given is None else torch.where(codes[:, index] == FREE, drawn, codes[:, index])
        if place + 1 < len(free):
            rows.feed(index, free[place + 1], place + 1)
    return codes


def start_codes(batch: Batch) -> Int[Tensor, "B P"]:
    """Codes that are known before anything is drawn, and FREE."""
    return torch.full_like(batch.keys, FREE) if batch.given is None else batch.given.clone()


class Rows:
    """The rows of a batch on their way: what they have read, and the logits of what comes next."""

    def __init__(
        self,
        model: Reader,
        batch: Batch,
        grid: tuple[int, int],
        codes: Tensor,
        *,
        guided: Sequence[bool],
        prefixes: Prefixes | None,
    ) -> None:
        self.model, self.batch, self.grid, self.codes = model, batch, grid, codes
        self.guided, self.prefixes = guided, prefixes
        self.is_guided = False
        self.condition = batch.condition
        self.memory: Any = None
        self.logits = torch.empty(0)

    def begin(self, index: int) -> None:
        """Nothing; the prefix and the codes before `index` are read."""
        null = None
        # schedules that grow are off at the first code alone, and joining null rows behind it copies the whole memory;
        # a memory that forgets cannot take them in later at all
        if any(self.guided[:2]) or (any(self.guided) and not self.model.keeps_all):
            null, self.is_guided = self.null(), True
            self.condition = self.condition.join(null)
        known = self.codes[:, :index]
        if not self.model.keeps_all:
            self.memory, self.logits = self.model.prefill(self.condition, self._each_row(known), grid=self.grid)
            return
        names = [b"%d " % whose + row for whose, row in zip(self.batch.whose, _bytes(known), strict=True)]
        if null is not None:
            names += [b"null " + row for row in _bytes(null.tokens, null.prefix_mask, known)]
        found = self._read(names, self._each_row(known))
        places = torch.tensor([found.names.index(name) for name in names], device=self.codes.device)
        assert found.logits is not None
        length = self.model.memory_length(self.condition, self.grid)
        self.memory, self.logits = found.memory.spread(places, length=length), found.logits[places]

    def feed(self, index: int, until: int, place: int) -> None:
        """Nothing; the codes at index..until-1 are read, by null rows only if the next draw needs them."""
        self.seat(index, place)
        self.logits = self.read(index, until)

    def seat(self, index: int, place: int, *, count: int = 1) -> None:
        """Nothing; null rows, which have read what is before `index`, are there if a draw needs them.

        They come for the next `count` free codes, of which the first is the one of that place, and leave for good.
        """
        if self.is_guided and not any(self.guided[place:]):
            self.is_guided, self.condition = False, self.batch.condition
            self.memory = self.memory.rows(self.batch.num_images)
        if not self.is_guided and any(self.guided[place : place + count]):
            null = self.null()
            memory, _ = self.model.prefill(null, self.codes[:, :index], grid=self.grid)
            length = self.model.memory_length(self.condition, self.grid)
            everyone = torch.arange(len(null), device=self.codes.device)
            self.memory = self.memory.join(memory.spread(everyone, length=length))
            self.condition, self.is_guided = self.condition.join(null), True

    def read(self, index: int, until: int, *, every: bool = False) -> Tensor:
        """Logits after reading the codes at index..until-1: of the code behind the last, or behind every one."""
        fed = self._each_row(self.codes[:, index:until])
        return self.model.decode(self.condition, self.memory, codes=fed, index=index, grid=self.grid, every=every)

    def null(self) -> Condition:
        """The null row of every image."""
        return self.model.null_condition(self.batch.condition, grid=self.grid)

    def _each_row(self, codes: Tensor) -> Tensor:
        # conditional and null rows of an image share its codes
        return torch.cat([codes, codes]) if self.is_guided else codes

    def _read(self, names: list[bytes], known: Tensor) -> Prefixes:
        """Every distinct prefix; those of the last batch are not read again."""
        old = Prefixes() if self.prefixes is None else self.prefixes
        missing = {name: place for place, name in enumerate(names) if name not in old.names}
        rows = torch.tensor(list(missing.values()), dtype=torch.int64, device=self.codes.device)
        if not missing:
            return old
        memory, logits = self.model.prefill(self.condition.select(rows), known[rows], grid=self.grid)
        new = Prefixes(list(missing), memory, logits)
        kept = [place for place, name in enumerate(old.names) if name in names]
        if kept and old.logits is not None:
            which = torch.tensor(kept, device=self.codes.device)
            memory = old.memory.select(which).join(memory)
            new = Prefixes(
                [old.names[place] for place in kept] + new.names, memory, torch.cat([old.logits[which], logits])
            )
        if self.prefixes is not None:
            self.prefixes.names, self.prefixes.memory, self.prefixes.logits = new.names, new.memory, new.logits
        return new


def _bytes(*parts: Tensor | None) -> list[bytes]:
    """What stands in each row of some tensors of whole numbers."""
    there = [part.to(torch.int64).flatten(1) for part in parts if part is not None]
    return [row.tobytes() for row in torch.cat(there, 1).cpu().numpy()]
