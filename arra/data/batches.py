"""Batches for training: which pictures, in which order, with which condition, are functions of (seed, step) alone.

Legend: B batch, C prefix positions, W of them without the REP token, P image positions, T = C + P, F feature,
E caption feature, N records of the split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from arra.data.conditions import Conditions, Prefix, text_prefixes
from arra.data.order import Plan, mix, part_of

Features: TypeAlias = Mapping[str, Tensor]
"""By the name that the recipe gives each teacher: (B, F) of whole pictures, (B, P, F) of patches or bands."""

NOTHING = -100
"""Label of a position whose token nobody predicts."""
NO_RECORD = -1
"""Number of a row that is no picture's record."""


@runtime_checkable
class HoldsTensors(Protocol):
    """Something of tensors that goes where its batch goes."""

    def changed(self, change: Callable[[Tensor], Tensor]) -> "HoldsTensors":
        """The same with every tensor changed."""
        ...


@dataclass(frozen=True)
class TrainBatch:
    """Whole sequences; the model is fed all but the last token."""

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    """The token itself where it is a code, -100 elsewhere."""
    code_mask: Bool[Tensor, "B T"]
    prefix_mask: Bool[Tensor, "B C"] | None
    features: Features | None = None
    rows: Int[Tensor, " B"] | None = None
    """Which record each row is; `NO_RECORD` for text, which comes last."""
    caption: Float[Tensor, "B W E"] | None = None
    null_caption: Bool[Tensor, " B"] | None = None
    rep_mask: Bool[Tensor, "B T"] | None = None
    """Where the token stands that target `rep` aligns; None where the model has none."""
    grid: tuple[int, int] | None = None
    """Height and width in codes of the batch's pictures."""
    dropout_seeds: Int64[Tensor, " B"] | None = None
    """From which a model draws what it drops of each row; None lets it draw as it likes."""
    places: Mapping[str, HoldsTensors] | None = None
    """Positions that the loss looks at, found while the batch was on the CPU (`arra.train.objective.located`)."""

    def inputs(self) -> dict[str, Tensor]:
        """What the model is told beside the tokens, by the names of its keyword arguments."""
        names = ("prefix_mask", "caption", "null_caption", "dropout_seeds")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainBatch":
        """The batch with every tensor changed; rows are chosen before places are found."""

        def of(part: Any) -> Any:
            if isinstance(part, Tensor):
                return change(part)
            if isinstance(part, Mapping):
                return {name: of(each) for name, each in part.items()}
            return part.changed(change) if isinstance(part, HoldsTensors) else part

        return TrainBatch(**{field.name: of(getattr(self, field.name)) for field in fields(self)})

    @property
    def labelled(self) -> Bool[Tensor, "B S"]:
        """S = T - 1 positions of the fed sequence whose state predicts a token that carries next-token loss."""
        return self.labels[:, 1:] != NOTHING

    @property
    def predicting(self) -> Bool[Tensor, "B S"]:
        """S = T - 1 positions of the fed sequence whose state predicts a code: one to the left of each code."""
        return self.code_mask[:, 1:]


def text_batch(
    prompts: Sequence[Sequence[int]],
    codes: Int[Tensor, "B P"],
    *,
    prefix_length: int,
    features: Features | None = None,
    rows: Int[Tensor, " B"] | None = None,
    rep_token: bool = False,
) -> TrainBatch:
    """A batch from prompt ids and codes; `prefix_length` does not count the REP token."""
    prefix = text_prefixes(prompts, prefix_length, rep_token=rep_token)
    return make_batch(prefix, codes, features=features, rows=rows)


def make_batch(
    prefix: Prefix,
    codes: Int[Tensor, "B P"],
    *,
    features: Features | None = None,
    rows: Int[Tensor, " B"] | None = None,
) -> TrainBatch:
    """A batch from prefixes and codes, laid out as sampling does it."""
    tokens = torch.cat([prefix.tokens, codes], 1)
    code_mask = torch.zeros_like(tokens, dtype=torch.bool)
    length = prefix.tokens.shape[1]
    code_mask[:, length:] = True
    rep_mask = None
    if prefix.rep_token:
        rep_mask = torch.zeros_like(code_mask)
        rep_mask[:, length - 1] = True
    return TrainBatch(
        tokens=tokens,
        labels=torch.where(code_mask, tokens, NOTHING),
        code_mask=code_mask,
        prefix_mask=prefix.mask,
        features=features,
        rows=rows,
        caption=prefix.caption,
        null_caption=prefix.null_caption,
        rep_mask=rep_mask,
        grid=prefix.grid,
    )


@runtime_checkable
class Writes(Protocol):
    """Makes a batch of conditions and codes, as the model at hand wants it."""

    def __call__(
        self,
        prefix: Prefix,
        codes: Int[Tensor, "B P"],
        *,
        features: Features | None = None,
        rows: Int[Tensor, " B"] | None = None,
    ) -> TrainBatch: ...


@runtime_checkable
class Pictures(Protocol):
    """What a model trains on of every record, however it is come by."""

    def __len__(self) -> int: ...

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> tuple[Int[Tensor, "B P"], Features | None]:
        """Codes and features of the records; `chance` in [0, 1) chooses among a picture's crops."""
        ...

    def expect(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> None:
        """Nothing; says what will be taken next, so that slow work can begin."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Codes and features held as tensors."""

    codes: Int[Tensor, "N P"]
    features: Features | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> tuple[Int[Tensor, "B P"], Features | None]:
        if self.features is None:
            return self.codes[rows], None
        return self.codes[rows], {name: each[rows] for name, each in self.features.items()}

    def expect(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> None:
        """Nothing; all is there."""


@dataclass(frozen=True)
class Batches:
    """The training split as an endless, seekable sequence of batches.

    A batch is the same whoever asks for it: a rank takes its part of it, a resumed run asks for the next step.
    """

    conditions: Conditions
    pictures: Pictures
    batch_size: int
    seed: int
    counts: tuple[int, ...] | None = None
    """Records of each source, in order; null is one source."""
    weights: tuple[float, ...] | None = None
    """How often an epoch visits each record of each source."""
    buckets: np.ndarray | None = None
    """(N,) numbers; records of one number make batches together (lengths, aspects)."""
    groups: tuple[int, ...] | None = None
    """Sizes of the runs of records that are fetched together (row groups of an export); null is one by one."""
    window: int = 1
    """Groups whose records are mixed with each other."""
    write: Writes = make_batch

    @cached_property
    def plan(self) -> Plan:
        """Which records make the batch of a step."""
        return Plan.build(
            self.counts or (len(self.pictures),),
            weights=self.weights,
            batch_size=self.batch_size,
            seed=self.seed,
            buckets=self.buckets,
            groups=self.groups,
            window=self.window,
        )

    @cached_property
    def ahead(self) -> tuple[int, ...]:
        """How many steps ahead pictures are expected: the next one, and where groups are fetched a window as well."""
        if self.groups is None:
            return (1,)
        records = min(self.window, len(self.groups)) * sum(self.groups) / len(self.groups)
        return (1, 1 + math.ceil(records / self.batch_size))

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        """A rank's part of the batch of a step, counted from 0."""
        rows, chance = self._picked(step)
        # drawn whole, even where nothing is replaced: neither ranks nor settings shift each other's randomness
        dropped = torch.rand(len(rows), 3, generator=generator(self.seed, "condition", step))
        kept = torch.rand(len(rows), self.conditions.length, generator=generator(self.seed, "words", step))
        part = part_of(rows.numpy(), rank, num_ranks)
        prefix = self.conditions.take(rows[part], dropped[part], kept[part])
        codes, features = self.pictures.take(rows[part], chance[part])
        for ahead in self.ahead:
            next_rows, next_chance = self._picked(step + ahead)
            part_next = part_of(next_rows.numpy(), rank, num_ranks)
            self.pictures.expect(next_rows[part_next], next_chance[part_next])
            self.conditions.expect(next_rows[part_next])
        batch = self.write(prefix, codes, features=features, rows=rows[part])
        return replace(batch, dropout_seeds=row_seeds(self.seed, "dropout", step * self.batch_size, len(rows))[part])

    @cached_property
    def _picked(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        """The records of a step and their chances; what was expected of the next step is not computed again."""
        return lru_cache(maxsize=4)(self._pick)

    def _pick(self, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self.plan.batch(step))
        return rows, torch.rand(len(rows), 4, generator=generator(self.seed, "picture", step))


@dataclass(frozen=True)
class HeldOutBatches(Sequence[TrainBatch]):
    """Validation batches: every record once, in order, with its own condition; made when they are asked for."""

    conditions: Conditions
    codes: Int[Tensor, "N P"]
    batch_size: int = 64
    write: Writes = make_batch

    def __len__(self) -> int:
        return max(1, len(self.codes) // self.batch_size)

    def __getitem__(self, number: int) -> TrainBatch:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)  # what ends a loop over it
        rows = torch.from_numpy(np.array_split(np.arange(len(self.codes)), len(self))[number])
        whole = torch.ones(len(rows), max(3, self.conditions.length))
        prefix = self.conditions.take(rows, whole[:, :3], whole[:, : self.conditions.length])
        return self.write(prefix, self.codes[rows], rows=rows)


def row_seeds(seed: int, purpose: str, first: int, count: int) -> Int64[Tensor, " B"]:
    """A number for each of `count` rows that follow one another in the data, from their places in it alone."""
    return torch.tensor([mix(seed, purpose, place) for place in range(first, first + count)], dtype=torch.int64)


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of its own for each (seed, purpose, index)."""
    return torch.Generator().manual_seed(mix(seed, purpose, index))
