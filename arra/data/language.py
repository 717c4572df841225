"""Batches for language models: whole sequences as an `ImageLayout` writes them, and rows of plain text beside them.

Rows begin at position 0 and are padded behind, so a causal model sees the same row whatever its batch-mates are.
Legend: B rows, T longest sequence of a batch, P image positions, F feature, N records of the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.data.batches import NO_RECORD, NOTHING, Batches, Features, TrainBatch, generator, row_seeds
from arra.data.conditions import Prefix
from arra.data.layout import Grid, ImageLayout, Written
from arra.data.order import part_of


@dataclass(frozen=True)
class PromptConditions:
    """The prompts of records as text ids, of any length."""

    captions: tuple[Sequence[Sequence[Sequence[int]]], ...]
    """For each grid: for each record the ids of its prompt (worded for that grid), then of its alternatives."""
    grids: tuple[Grid, ...]
    grid_numbers: np.ndarray | None = None
    """(N,) which grid each record has; None where there is one."""
    dropout: float = 0.0
    """Share of rows that are written without a prompt, so that guidance has its unconditional model."""
    alternative_share: float = 0.0
    """Share of rows that use one of the record's alternative texts, where it has any."""
    length: int = 1

    def __len__(self) -> int:
        return len(self.captions[0])

    def take(self, rows: Int[Tensor, " B"], chance: Float[Tensor, "B 3"], kept: Float[Tensor, "B _"]) -> Prefix:
        """The prompts of records that share a grid; None where one is dropped."""
        number = 0 if self.grid_numbers is None or not len(rows) else int(self.grid_numbers[int(rows[0])])
        prompts = tuple(
            self._prompt(number, int(row), *draws.tolist()) for row, draws in zip(rows, chance, strict=True)
        )
        return Prefix(torch.empty(len(rows), 0, dtype=torch.int64), prompts=prompts, grid=self.grids[number])

    def expect(self, rows: Int[Tensor, " B"]) -> None:
        """Nothing; all is there."""

    def _prompt(self, grid: int, row: int, drop: float, replace: float, which: float) -> Sequence[int] | None:
        if drop < self.dropout:
            return None
        own, *others = self.captions[grid][row]
        return others[int(which * len(others))] if others and replace < self.alternative_share else own


@dataclass(frozen=True)
class LayoutWriter:
    """Writes prompts and codes as the layout has them."""

    layout: ImageLayout

    def __call__(
        self,
        prefix: Prefix,
        codes: Int[Tensor, "B P"],
        *,
        features: Features | None = None,
        rows: Int[Tensor, " B"] | None = None,
    ) -> TrainBatch:
        """The batch."""
        assert prefix.prompts is not None
        assert prefix.grid is not None
        grids = codes.unflatten(1, prefix.grid).numpy()
        written = [self.layout.sequence(ids, grid) for ids, grid in zip(prefix.prompts, grids, strict=True)]
        return padded_batch(written, features=features, rows=rows, grid=prefix.grid)


def padded_batch(
    written: Sequence[Written],
    *,
    features: Features | None = None,
    rows: Int[Tensor, " B"] | None = None,
    grid: Grid | None = None,
) -> TrainBatch:
    """A batch of sequences of any lengths, padded behind with tokens that nobody predicts and nobody sees."""
    shape = (len(written), max((len(each.tokens) for each in written), default=0))
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NOTHING)
    code_mask = torch.zeros(shape, dtype=torch.bool)
    rep_mask = None if all(each.rep_mask is None for each in written) else torch.zeros_like(code_mask)
    for place, each in enumerate(written):
        length = len(each.tokens)
        tokens[place, :length] = torch.as_tensor(each.tokens)
        labels[place, :length] = torch.as_tensor(each.labels)
        code_mask[place, :length] = torch.as_tensor(each.code_mask)
        if rep_mask is not None and each.rep_mask is not None:
            rep_mask[place, :length] = torch.as_tensor(each.rep_mask)
    return TrainBatch(tokens, labels, code_mask, None, features=features, rows=rows, rep_mask=rep_mask, grid=grid)


@dataclass(frozen=True)
class TextRows:
    """Plain text as rows of one length, on which every token is learnt."""

    ids: Int[Tensor, "N L"]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def cut(cls, documents: Sequence[Sequence[int]], *, length: int, between: Sequence[int]) -> "TextRows":
        """Documents one after another with `between` behind each, cut into rows; what fills no row is left out.

        Raises:
            ValueError: all of it fills none.
        """
        stream = np.array([token for document in documents for token in (*document, *between)], np.int64)
        count = len(stream) // length
        if not count:
            raise ValueError(f"{len(stream)} tokens fill no row of {length}")
        return cls(torch.from_numpy(stream[: count * length].reshape(count, length)))

    def split(self, held_out_share: float) -> tuple["TextRows", "TextRows"]:
        """The rows to train on, and the last ones, at least one, to measure on."""
        held = min(len(self) - 1, max(1, round(len(self) * held_out_share)))
        return TextRows(self.ids[: len(self) - held]), TextRows(self.ids[len(self) - held :])

    def batch(self, places: Int[Tensor, " B"]) -> TrainBatch:
        """Some of the rows."""
        tokens = self.ids[places]
        labels = tokens.clone()
        labels[:, 0] = NOTHING
        return TrainBatch(tokens, labels, torch.zeros_like(tokens, dtype=torch.bool), None)


@dataclass(frozen=True)
class MixedBatches:
    """Batches of pictures with rows of text behind them, so that a model keeps its language."""

    pictures: Batches
    text: TextRows
    text_rows: int
    """In each batch."""

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        """A rank's part of the batch of a step, counted from 0: its pictures, then its rows of text."""
        images, seed = self.pictures.batch(step, rank=rank, num_ranks=num_ranks), self.pictures.seed
        places = torch.randint(len(self.text), (self.text_rows,), generator=generator(seed, "text", step))
        part = part_of(places.numpy(), rank, num_ranks)
        seeds = row_seeds(seed, "text dropout", step * self.text_rows, self.text_rows)
        return joined(images, replace(self.text.batch(places[part]), dropout_seeds=seeds[part]))


def joined(images: TrainBatch, text: TrainBatch) -> TrainBatch:
    """Rows of pictures, then rows of text, whose features nobody looks at."""
    width = max(images.tokens.shape[1], text.tokens.shape[1])

    def both(name: str, fill: int | bool) -> Tensor:
        parts = (getattr(images, name), getattr(text, name))
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])

    features = images.features
    if features is not None:
        features = {
            name: torch.cat([each, each.new_zeros(len(text.tokens), *each.shape[1:])])
            for name, each in features.items()
        }
    rep_mask = None
    if images.rep_mask is not None:
        rest = (0, width - images.tokens.shape[1], 0, len(text.tokens))
        rep_mask = torch.nn.functional.pad(images.rep_mask, rest, value=False)
    rows = images.rows
    if rows is not None:
        rows = torch.cat([rows, rows.new_full((len(text.tokens),), NO_RECORD)])
    seeds = None
    if images.dropout_seeds is not None and text.dropout_seeds is not None:
        seeds = torch.cat([images.dropout_seeds, text.dropout_seeds])
    return TrainBatch(
        both("tokens", 0),
        both("labels", NOTHING),
        both("code_mask", False),
        None,
        features=features,
        rows=rows,
        rep_mask=rep_mask,
        grid=images.grid,
        dropout_seeds=seeds,
    )
