"""The static memory of attention while a sequence is decoded: `models` reads and writes it, `sample` owns it.

It is sized once and handed in as an argument, never attached to a model, so it cannot enter a state dict.
Letters: N layers, B batch, R rows of another batch, H key-value heads, T sequence, S new positions, E size of one head.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer for positions 0..T-1; what lies past the last write is undefined."""

    both: Float[Tensor, "N 2 B H T E"]
    """Keys, then values: what one position adds is one copy."""

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        length: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "KVCache":
        """A cache of zeros for `length` positions."""
        shape = (num_layers, 2, batch_size, num_kv_heads, length, head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype))

    @property
    def length(self) -> int:
        """Number of positions there is room for."""
        return self.both.shape[4]

    def write(
        self, layer: int, start: int, keys: Float[Tensor, "B H S E"], values: Float[Tensor, "B H S E"]
    ) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values at positions 0..start+S-1, after storing the S new ones."""
        end = start + keys.shape[2]
        self.both[layer, 0, :, :, start:end] = keys
        self.both[layer, 1, :, :, start:end] = values
        return self.both[layer, 0, :, :, :end], self.both[layer, 1, :, :, :end]

    def write_step(self, layer: int, start: int, both: Float[Tensor, "B 2 H E"]) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values at positions 0..start, after storing those of the last."""
        filled = self.both[layer, :, :, :, : start + 1]
        filled[:, :, :, start] = both.transpose(0, 1)
        return filled[0], filled[1]

    def rows(self, count: int) -> "KVCache":
        """A view of the first `count` rows of the batch (the null half is dropped when guidance ends)."""
        return KVCache(self.both[:, :, :count])

    def select(self, places: Int[Tensor, "R"]) -> "KVCache":
        """A cache whose row i is a copy of row `places[i]`."""
        return KVCache(self.both[:, :, places])

    def spread(self, places: Int[Tensor, "R"], *, length: int) -> "KVCache":
        """A cache of `length` positions whose row i is a copy of row `places[i]`; what is new of it is undefined."""
        layers, two, _, heads, filled, width = self.both.shape
        found = self.both.new_zeros(layers, two, len(places), heads, length, width)
        found[:, :, :, :, :filled] = self.both[:, :, places]
        return KVCache(found)

    def join(self, other: "KVCache") -> "KVCache":
        """A copy with these rows followed by those of a cache of as many positions."""
        return KVCache(torch.cat([self.both, other.both], 2))

    def copy_rows(self, other: "KVCache", *, first: int, filled: int) -> None:
        """Nothing; rows from `first` on hold what another cache's rows do at positions 0..filled-1."""
        rows = slice(first, first + other.both.shape[2])
        self.both[:, :, rows, :, :filled] = other.both[:, :, :, :, :filled]


@dataclass(frozen=True)
class LayerWindow:
    """One layer of a cache as a program of fixed shapes sees it: where to write is a number on the device."""

    keys: Float[Tensor, "B H T E"]
    values: Float[Tensor, "B H T E"]
    place: Int[Tensor, "1"]
    """The position that is written next."""
    reach: int
    """How many positions are looked at; a mask hides those that are not filled."""

    def write(
        self, layer: int, start: int, keys: Float[Tensor, "B H 1 E"], values: Float[Tensor, "B H 1 E"]
    ) -> tuple[Tensor, Tensor]:
        """Views of the first `reach` positions, after storing one; layer and start are the window's own."""
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys[:, :, : self.reach], self.values[:, :, : self.reach]
