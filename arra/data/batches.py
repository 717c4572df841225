"""Batches for training: which pictures, in which order, with which condition, are functions of (seed, step) alone.

Legend: B batch, C prefix positions, P image positions, T = C + P, F feature, N records of the split.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from arra.data.layout import text_prefix
from arra.data.order import Plan, mix, part_of

NOTHING = -100
"""Label of a position whose token nobody predicts."""


@dataclass(frozen=True)
class TrainBatch:
    """Whole sequences; the model is fed all but the last token."""

    tokens: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    """The token itself where it is a code, -100 elsewhere."""
    code_mask: Bool[Tensor, "B T"]
    prefix_mask: Bool[Tensor, "B C"]
    features: Float[Tensor, "B F"] | None = None
    rows: Int[Tensor, " B"] | None = None
    """Which record each row is."""

    @property
    def predicting(self) -> Bool[Tensor, "B S"]:
        """S = T - 1 positions of the fed sequence whose state predicts a code: one to the left of each code."""
        return self.code_mask[:, 1:]


def text_batch(
    prompts: Sequence[Sequence[int]],
    codes: Int[Tensor, "B P"],
    *,
    prefix_length: int,
    features: Float[Tensor, "B F"] | None = None,
    rows: Int[Tensor, " B"] | None = None,
) -> TrainBatch:
    """A batch from prompt ids and codes, laid out as sampling does it."""
    written = [text_prefix(ids, prefix_length) for ids in prompts]
    prefix = torch.tensor([tokens for tokens, _ in written], dtype=torch.int64).view(-1, prefix_length)
    tokens = torch.cat([prefix, codes], 1)
    code_mask = torch.zeros_like(tokens, dtype=torch.bool)
    code_mask[:, prefix_length:] = True
    return TrainBatch(
        tokens=tokens,
        labels=torch.where(code_mask, tokens, NOTHING),
        code_mask=code_mask,
        prefix_mask=torch.tensor([mask for _, mask in written], dtype=torch.bool).view(-1, prefix_length),
        features=features,
        rows=rows,
    )


@runtime_checkable
class Pictures(Protocol):
    """What a model trains on of every record, however it is come by."""

    def __len__(self) -> int: ...

    def take(
        self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]
    ) -> tuple[Int[Tensor, "B P"], Float[Tensor, "B F"] | None]:
        """Codes and features of the records; `chance` in [0, 1) chooses among a picture's crops."""
        ...

    def expect(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> None:
        """Nothing; says what will be taken next, so that slow work can begin."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Codes and features held as tensors."""

    codes: Int[Tensor, "N P"]
    features: Float[Tensor, "N F"] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def take(
        self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]
    ) -> tuple[Int[Tensor, "B P"], Float[Tensor, "B F"] | None]:
        return self.codes[rows], None if self.features is None else self.features[rows]

    def expect(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 4"]) -> None:
        """Nothing; all is there."""


@dataclass(frozen=True)
class Batches:
    """The training split as an endless, seekable sequence of batches.

    A batch is the same whoever asks for it: a rank takes its part of it, a resumed run asks for the next step.
    """

    captions: Sequence[Sequence[Sequence[int]]]
    """For each record the ids of its prompt, then of its alternatives."""
    pictures: Pictures
    prefix_length: int
    batch_size: int
    condition_dropout: float
    """Share of rows whose prompt is replaced by the empty one, so that guidance has its unconditional model."""
    alternative_share: float
    """Share of rows that use one of the record's alternative texts, where it has any."""
    seed: int
    word_dropout: float = 0.0
    """Share of a prompt's ids left out, each on its own, so that a model cannot learn captions as a whole by heart."""
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
        prompts = self._prompts(step, rows)
        part = part_of(rows.numpy(), rank, num_ranks)
        codes, features = self.pictures.take(rows[part], chance[part])
        for ahead in self.ahead:
            next_rows, next_chance = self._picked(step + ahead)
            part_next = part_of(next_rows.numpy(), rank, num_ranks)
            self.pictures.expect(next_rows[part_next], next_chance[part_next])
        return text_batch(prompts[part], codes, prefix_length=self.prefix_length, features=features, rows=rows[part])

    @cached_property
    def _picked(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        """The records of a step and their chances; what was expected of the next step is not computed again."""
        return lru_cache(maxsize=4)(self._pick)

    def _pick(self, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self.plan.batch(step))
        return rows, torch.rand(len(rows), 4, generator=generator(self.seed, "picture", step))

    def _prompts(self, step: int, rows: Tensor) -> list[Sequence[int]]:
        # drawn whole even where nothing is replaced, so settings do not shift each other's randomness
        chance = torch.rand(len(rows), 3, generator=generator(self.seed, "condition", step))
        prompts = [self._prompt(int(row), *draws.tolist()) for row, draws in zip(rows, chance, strict=True)]
        kept = torch.rand(len(rows), self.prefix_length, generator=generator(self.seed, "words", step))
        if self.word_dropout:
            prompts = [
                [each for each, share in zip(ids, shares, strict=False) if share >= self.word_dropout]
                for ids, shares in zip(prompts, kept.tolist(), strict=True)
            ]
        return prompts

    def _prompt(self, row: int, drop: float, replace: float, which: float) -> Sequence[int]:
        own, *others = self.captions[row]
        if drop < self.condition_dropout:
            return ()
        if others and replace < self.alternative_share:
            return others[int(which * len(others))]
        return own


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of its own for each (seed, purpose, index)."""
    return torch.Generator().manual_seed(mix(seed, purpose, index))
