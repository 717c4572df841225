"""Batches for training: which pictures, in which order, with which condition, are functions of (seed, step) alone.

Legend: B batch, C prefix positions, P image positions, T = C + P, F feature, N records of the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from arra.data.layout import text_prefix

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
    prefix = torch.tensor([tokens for tokens, _ in written], dtype=torch.int64)
    tokens = torch.cat([prefix, codes], 1)
    code_mask = torch.zeros_like(tokens, dtype=torch.bool)
    code_mask[:, prefix_length:] = True
    return TrainBatch(
        tokens=tokens,
        labels=torch.where(code_mask, tokens, NOTHING),
        code_mask=code_mask,
        prefix_mask=torch.tensor([mask for _, mask in written]),
        features=features,
        rows=rows,
    )


@dataclass(frozen=True)
class Batches:
    """The training split as an endless, seekable sequence of batches."""

    captions: Sequence[Sequence[Sequence[int]]]
    """For each record the ids of its prompt, then of its alternatives."""
    codes: Int[Tensor, "N P"]
    features: Float[Tensor, "N F"] | None
    prefix_length: int
    batch_size: int
    condition_dropout: float
    """Share of rows whose prompt is replaced by the empty one, so that guidance has its unconditional model."""
    alternative_share: float
    """Share of rows that use one of the record's alternative texts, where it has any."""
    seed: int
    word_dropout: float = 0.0
    """Share of a prompt's ids left out, each on its own, so that a model cannot learn captions as a whole by heart."""

    def batch(self, step: int) -> TrainBatch:
        """The batch of a step, counted from 0."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        rows = torch.tensor([self._record_at(position) for position in positions])
        # drawn whole even where nothing is replaced, so settings do not shift each other's randomness
        chance = torch.rand(self.batch_size, 3, generator=generator(self.seed, "condition", step))
        prompts = [self._prompt(int(row), *draws.tolist()) for row, draws in zip(rows, chance, strict=True)]
        kept = torch.rand(self.batch_size, self.prefix_length, generator=generator(self.seed, "words", step))
        if self.word_dropout:
            prompts = [
                [each for each, share in zip(ids, shares, strict=False) if share >= self.word_dropout]
                for ids, shares in zip(prompts, kept.tolist(), strict=True)
            ]
        return text_batch(
            prompts,
            self.codes[rows],
            prefix_length=self.prefix_length,
            features=None if self.features is None else self.features[rows],
            rows=rows,
        )

    def _record_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.codes))
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> Tensor:
        cached: dict[int, Tensor] = self.__dict__.setdefault("_orders", {})
        if epoch not in cached:
            while len(cached) > 1:
                cached.pop(next(iter(cached)))
            cached[epoch] = torch.randperm(len(self.codes), generator=generator(self.seed, "order", epoch))
        return cached[epoch]

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


def mix(seed: int, purpose: str, index: int) -> int:
    """A 63-bit number that depends on all three."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:8], "big") >> 1
