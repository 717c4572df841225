"""The static memory of a `transformers` model's attention while an image is decoded: sized once, read where filled.

`transformers`' own choices copy the whole cache at every step, or attend to all of it, filled or not. Layers that do
not look at everything (sliding windows, linear attention) keep the library's own cache.
Letters: B batch, H key-value heads, T sequence, S new positions, E size of one head.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def growing_cache(config: Any, *, room: int) -> Any:
    """An empty cache of `transformers` for sequences of up to `room` positions."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache, growing = DynamicCache(config=config), _growing_layer()
    cache.layers = [growing(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@lru_cache(maxsize=1)
def _growing_layer() -> Any:
    """The class of one layer's memory; made here, since its base comes with an extra."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values (B, H, T, E) in memory of a fixed length, of which the filled part is handed out."""

        def __init__(self, room: int) -> None:
            super().__init__()
            self.room, self.filled = room, 0
            self.all_keys, self.all_values = torch.empty(0), torch.empty(0)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Keys and values of all positions so far, after storing the new ones."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.all_keys, self.all_values = (
                    new.new_empty((*new.shape[:2], self.room, new.shape[3])) for new in (key_states, value_states)
                )
            start, self.filled = self.filled, self.filled + key_states.shape[2]
            self.all_keys[:, :, start : self.filled] = key_states
            self.all_values[:, :, start : self.filled] = value_states
            self.keys, self.values = self.all_keys[:, :, : self.filled], self.all_values[:, :, : self.filled]
            return self.keys, self.values

        def get_seq_length(self) -> int:
            """Positions that are filled."""
            return self.filled

        def batch_select_indices(self, indices: Tensor) -> None:
            """Nothing; only these rows are left."""
            self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
            self.keys, self.values = self.all_keys[:, :, : self.filled], self.all_values[:, :, : self.filled]

    return GrowingLayer
