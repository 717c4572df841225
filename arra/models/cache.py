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

    keys: Float[Tensor, "N B H T E"]
    values: Float[Tensor, "N B H T E"]

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
        shape = (num_layers, batch_size, num_kv_heads, length, head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    @property
    def length(self) -> int:
        """Number of positions there is room for."""
        return self.keys.shape[3]

    def write(
        self, layer: int, start: int, keys: Float[Tensor, "B H S E"], values: Float[Tensor, "B H S E"]
    ) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values at positions 0..start+S-1, after storing the S new ones."""
        end = start + keys.shape[2]
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def rows(self, count: int) -> "KVCache":
        """A view of the first `count` rows of the batch (the null half is dropped when guidance ends)."""
        return KVCache(self.keys[:, :count], self.values[:, :count])

    def spread(self, places: Int[Tensor, "R"], *, length: int) -> "KVCache":
        """A cache of `length` positions whose row i is a copy of row `places[i]`; what is new of it is undefined."""
        return KVCache(*(self._spread(part, places, length) for part in (self.keys, self.values)))

    def join(self, other: "KVCache") -> "KVCache":
        """A copy with these rows followed by those of a cache of as many positions."""
        return KVCache(torch.cat([self.keys, other.keys], 1), torch.cat([self.values, other.values], 1))

    def _spread(self, part: Tensor, places: Tensor, length: int) -> Tensor:
        layers, _, heads, filled, width = part.shape
        found = part.new_zeros(layers, len(places), heads, length, width)
        found[:, :, :, :filled] = part[:, places]
        return found
