"""What stands before the codes of every record: the words of a prompt, a class, or the features of a caption.

Batches ask for it with chances drawn for the whole batch, so that a row's condition is a function of (seed, step).
Legend: B batch, C prefix positions, W of them without the REP token, F caption feature, N records of the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from arra.data.layout import append_rep, caption_prefix, text_prefix


@dataclass(frozen=True)
class Prefix:
    """The positions before the codes, for some records."""

    tokens: Int[Tensor, "B C"]
    """Text or class ids; zeros where caption features or the REP token stand."""
    mask: Bool[Tensor, "B C"] | None = None
    """False where there is padding; None where there can be none."""
    caption: Float[Tensor, "B W F"] | None = None
    null_caption: Bool[Tensor, " B"] | None = None
    """Rows whose caption the model replaces by its null caption."""
    prompts: tuple[Sequence[int] | None, ...] | None = None
    """For language models: the prompts' ids, of any length; None writes a row without a prompt."""
    grid: tuple[int, int] | None = None
    """For language models: height and width in codes of these pictures."""
    rep_token: bool = False
    """Whether the last position is the REP token, whose state can be aligned; a language model's layout says so."""

    def with_rep(self, rep_token: bool) -> "Prefix":
        """The same, with the REP token behind it if there is to be one."""
        if not rep_token:
            return self
        tokens, mask = append_rep(self.tokens, self.mask)
        return replace(self, tokens=tokens, mask=mask, rep_token=True)


@runtime_checkable
class Conditions(Protocol):
    """What a model is told of every record of a split."""

    @property
    def length(self) -> int:
        """Prefix positions W, the REP token not counted, so that chances are the same with and without it."""
        ...

    def __len__(self) -> int: ...

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 3"], kept: Float[Tensor, "B W"]) -> Prefix:
        """The prefixes of the records.

        `chance` in [0, 1] says whether a condition is dropped, whether another text stands in its place, and which;
        `kept` which of its words stay. Ones give every record its own condition, whole.
        """
        ...

    def expect(self, rows: Int[Tensor, " B"]) -> None:
        """Nothing; says what will be taken next, so that slow work can begin."""
        ...


@dataclass(frozen=True)
class TextConditions:
    """Prompts as text ids, padded on the left, with a begin-of-image token at the end."""

    captions: Sequence[Sequence[Sequence[int]]]
    """For each record the ids of its prompt, then of its alternatives."""
    length: int
    dropout: float = 0.0
    """Share of rows whose prompt is replaced by the empty one, so that guidance has its unconditional model."""
    alternative_share: float = 0.0
    """Share of rows that use one of the record's alternative texts, where it has any."""
    word_dropout: float = 0.0
    """Share of a prompt's ids left out, each on its own, so that a model cannot learn captions as a whole by heart."""
    rep_token: bool = False

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 3"], kept: Float[Tensor, "B W"]) -> Prefix:
        prompts = [self._prompt(int(row), *draws.tolist()) for row, draws in zip(rows, chance, strict=True)]
        if self.word_dropout:
            prompts = [
                [each for each, share in zip(ids, shares, strict=False) if share >= self.word_dropout]
                for ids, shares in zip(prompts, kept.tolist(), strict=True)
            ]
        return text_prefixes(prompts, self.length, rep_token=self.rep_token)

    def expect(self, rows: Int[Tensor, " B"]) -> None:
        """Nothing; all is there."""

    def _prompt(self, row: int, drop: float, replace: float, which: float) -> Sequence[int]:
        own, *others = self.captions[row]
        if drop < self.dropout:
            return ()
        if others and replace < self.alternative_share:
            return others[int(which * len(others))]
        return own


@dataclass(frozen=True)
class ClassConditions:
    """Class numbers; the class after the last is the null class."""

    labels: Int[Tensor, " N"]
    null: int
    dropout: float = 0.0
    """Share of rows whose class is replaced by the null class."""
    rep_token: bool = False

    @property
    def length(self) -> int:
        return 1

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 3"], kept: Float[Tensor, "B W"]) -> Prefix:
        labels = torch.where(chance[:, 0] < self.dropout, self.null, self.labels[rows])
        return Prefix(labels[:, None]).with_rep(self.rep_token)

    def expect(self, rows: Int[Tensor, " B"]) -> None:
        """Nothing; all is there."""


@runtime_checkable
class Vectors(Protocol):
    """Arrays of their own lengths, one for each record, as a ragged column of a store gives them."""

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]: ...

    def expect(self, rows: np.ndarray) -> None: ...


@dataclass(frozen=True)
class CaptionConditions:
    """Features of a text encoder, read from the store: as many vectors as the caption has, padded on the left."""

    rows: np.ndarray
    """Row numbers of the split's records."""
    features: Vectors
    length: int
    width: int
    """Of a vector."""
    short: Vectors | None = None
    """Features of a shorter text of the same picture."""
    dropout: float = 0.0
    """Share of rows whose caption the model replaces by its null caption; their mask stays, as in LlamaGen."""
    alternative_share: float = 0.0
    """Share of rows that use the shorter text, where the record has one."""
    rep_token: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 3"], kept: Float[Tensor, "B W"]) -> Prefix:
        own = self.rows[rows.numpy()]
        values = self.features.take_ragged(own)
        if self.short is not None:
            chosen = np.nonzero((chance[:, 1] < self.alternative_share).numpy())[0]
            for place, value in zip(chosen.tolist(), self.short.take_ragged(own[chosen]), strict=True):
                if len(value):  # empty where the record has none
                    values[place] = value
        caption, mask = caption_prefix(values, self.length, width=self.width)
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
        return Prefix(tokens, mask, caption, chance[:, 0] < self.dropout).with_rep(self.rep_token)

    def expect(self, rows: Int[Tensor, " B"]) -> None:
        """Nothing; a remote store begins to fetch them."""
        for column in (self.features, *([] if self.short is None else [self.short])):
            column.expect(self.rows[rows.numpy()])


def text_prefixes(prompts: Sequence[Sequence[int]], length: int, *, rep_token: bool = False) -> Prefix:
    """Prompt ids laid out as sampling does it: `length` positions, and the REP token behind them where it is wanted."""
    written = [text_prefix(ids, length) for ids in prompts]
    tokens = torch.tensor([tokens for tokens, _ in written], dtype=torch.int64).view(-1, length)
    mask = torch.tensor([mask for _, mask in written], dtype=torch.bool).view(-1, length)
    return Prefix(tokens, mask).with_rep(rep_token)
