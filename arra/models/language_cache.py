"""What a language model has read of some pictures that are being painted, and what stays the same while they are.

`causal.py` makes it and reads on in it, the loop in `sample` moves its rows about.
Letters: B batch, R rows of another batch, T sequence, S new positions, C prefix length, L picture behind the prefix,
n codes, K codes of the vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from arra.models.growing import join_caches, spread_cache
from arra.models.head import CalledHead, Head, PackedHead


@dataclass(frozen=True)
class CodeHead:
    """The head over the codes, and the token of every code."""

    logits: Head | CalledHead | PackedHead
    ids: Int[Tensor, " K"]


@dataclass(frozen=True)
class ImageBody:
    """What follows the prefix of a picture: codes, and the tokens between and behind them."""

    tokens: Int64[Tensor, " L"]
    """`CODE` where codes stand."""
    places: tuple[int, ...]
    """Of the codes."""

    def end(self, count: int) -> int:
        """Where the code after the first `count` codes stands; behind them all, the end."""
        return self.places[count] if count < len(self.places) else len(self.tokens)

    def written(self, tokens: Int64[Tensor, "B n"], index: int) -> Int64[Tensor, "B S"]:
        """The tokens of the codes at index..index+n-1, with what stands between them and before the next code."""
        first, end, count = self.end(index), self.end(index + tokens.shape[1]), tokens.shape[1]
        if end - first == count:
            return tokens
        found = self.tokens[first:end].repeat(len(tokens), 1)
        found[:, [place - first for place in self.places[index : index + count]]] = tokens
        return found

    def predicting(self, index: int, count: int) -> list[int]:
        """Of the codes at index..index+count-1, where in what is `written` the states stand that predict the next."""
        first = self.end(index)
        return [self.end(place + 1) - first - 1 for place in range(index, index + count)]


@dataclass(frozen=True)
class Places:
    """Where the tokens of some sequences stand, padding on the left or not."""

    positions: Int64[Tensor, "B T"]
    real: Int64[Tensor, "B T"] | None
    """0 for padding; None where there is none."""

    @classmethod
    def of(cls, prefix_mask: Bool[Tensor, "B C"] | None, *, rows: int, length: int, device: torch.device) -> "Places":
        """Of sequences of that length whose first positions are real where the mask is True; None: all are."""
        if prefix_mask is None or bool(prefix_mask.all()):
            return cls(torch.arange(length, device=device).expand(rows, -1), None)
        real = torch.ones(rows, length, dtype=torch.int64, device=device)
        width = min(length, prefix_mask.shape[1])
        real[:, :width] = prefix_mask[:, :width]
        return cls((real.cumsum(1) - 1).clamp(min=0), real)

    def select(self, rows: Int[Tensor, "R"] | slice) -> "Places":
        """Those of some rows."""
        return Places(self.positions[rows], None if self.real is None else self.real[rows])

    def join(self, other: "Places") -> "Places":
        """These rows followed by those of another."""
        positions = torch.cat([self.positions, other.positions])
        if self.real is None and other.real is None:
            return Places(positions, None)
        parts = (torch.ones_like(one.positions) if one.real is None else one.real for one in (self, other))
        return Places(positions, torch.cat([*parts]))

    def inputs(self, start: int, end: int) -> dict[str, Tensor]:
        """What a network of `transformers` is told of the tokens start..end-1."""
        told = {"position_ids": self.positions[:, start:end]}
        return told if self.real is None else told | {"attention_mask": self.real[:, :end]}


@dataclass
class LanguageCache:
    """What has been read so far: attention's memory, how far it reaches, and what stays the same for the picture."""

    layers: Any
    """A cache of `transformers`."""
    places: Places
    """Of all positions that the picture will have."""
    head: CodeHead
    body: ImageBody
    filled: int = 0

    def rows(self, count: int) -> "LanguageCache":
        """The same with the first `count` rows of the batch alone; this one must not be used any more."""
        self.layers.reorder_cache(torch.arange(count))  # recurrent layers can do this alone
        return replace(self, places=self.places.select(slice(count)))

    def select(self, places: Int[Tensor, "R"]) -> "LanguageCache":
        """One whose row i is a copy of row `places[i]`, without room for more; for growing layers alone."""
        return self.spread(places, length=self.filled)

    def spread(self, places: Int[Tensor, "R"], *, length: int) -> "LanguageCache":
        """One with room for `length` positions whose row i is a copy of row `places[i]`; for growing layers alone."""
        layers = spread_cache(self.layers, places, room=length)
        return replace(self, layers=layers, places=self.places.select(places))

    def rewind(self, length: int) -> None:
        """Nothing; what was read after the first `length` positions is forgotten.

        Raises: ValueError where a memory that does not keep everything would have to.
        """
        if length == self.filled:
            return
        if not all(hasattr(layer, "room") for layer in self.layers.layers):
            raise ValueError("this memory cannot go back")
        for layer in self.layers.layers:
            layer.filled = length
        self.filled = length

    def join(self, other: "LanguageCache") -> "LanguageCache":
        """These rows followed by those of one with as much room; for growing layers alone."""
        layers = join_caches(self.layers, other.layers)
        return replace(self, layers=layers, places=self.places.join(other.places))

    def copy_rows(self, other: "LanguageCache", *, first: int, filled: int) -> None:
        """Nothing; rows from `first` on hold what another one's rows do at the first positions; for growing layers."""
        for mine, theirs in zip(self.layers.layers, other.layers.layers, strict=True):
            rows = slice(first, first + len(theirs.all_keys))
            mine.all_keys[rows, :, :filled] = theirs.all_keys[:, :, :filled]
            mine.all_values[rows, :, :filled] = theirs.all_values[:, :, :filled]
