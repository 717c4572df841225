"""The static memory of a `transformers` model's attention while an image is decoded: sized once, read where filled.

`transformers`' own choices copy the whole cache at every step, or attend to all of it, filled or not. Layers that do
not look at everything (sliding windows, linear attention) keep the library's own cache.
Letters: B batch, H key-value heads, T sequence, S new positions, E size of one head.
"""

import copy
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


def all_growing(config: Any) -> bool:
    """Whether all layers of an architecture keep every position, so that `growing_cache` is ours throughout."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def spread_cache(cache: Any, places: Tensor, *, room: int) -> Any:
    """A growing cache of `room` positions whose row i is a copy of row `places[i]`."""
    found = copy.copy(cache)
    found.layers = [layer.spread(places, room) for layer in cache.layers]
    return found


def join_caches(cache: Any, other: Any) -> Any:
    """A growing cache with the rows of both."""
    found = copy.copy(cache)
    found.layers = [mine.join(theirs) for mine, theirs in zip(cache.layers, other.layers, strict=True)]
    return found


def window_cache(cache: Any, places: Tensor, *, num_rows: int, reach: int) -> Any:
    """A growing cache as a program of fixed shapes sees it: the next tokens are written at `places` on the device.

    The first `reach` positions of the first rows are handed out; a mask hides those that are not filled.
    """
    from transformers.cache_utils import Cache

    window = _window_layer()
    return Cache(
        layers=[window(each.all_keys[:num_rows], each.all_values[:num_rows], places, reach) for each in cache.layers]
    )


@lru_cache(maxsize=1)
def _window_layer() -> Any:
    """The class of one layer of a window; made here, since its base comes with an extra."""
    from transformers.cache_utils import DynamicLayer

    class WindowLayer(DynamicLayer):
        """Keys and values (B, H, T, E) at an address that stays."""

        def __init__(self, all_keys: Tensor, all_values: Tensor, places: Tensor, reach: int) -> None:
            super().__init__()
            self.all_keys, self.all_values, self.places, self.reach = all_keys, all_values, places, reach
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Keys and values of the first positions, after storing the new ones."""
            self.all_keys.index_copy_(2, self.places, key_states)
            self.all_values.index_copy_(2, self.places, value_states)
            return self.all_keys[:, :, : self.reach], self.all_values[:, :, : self.reach]

        def get_seq_length(self) -> int:
            """Nobody is told: positions come with the tokens."""
            return 0

    return WindowLayer


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

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Nothing; these rows are left, in this order."""
            rows = beam_idx.to(self.all_keys.device)
            self.all_keys, self.all_values = self.all_keys[rows], self.all_values[rows]
            self.keys, self.values = self.all_keys[:, :, : self.filled], self.all_values[:, :, : self.filled]

        def spread(self, places: Tensor, room: int) -> "GrowingLayer":
            """One with room for `room` positions whose row i is a copy of row `places[i]`."""
            parts = []
            for part in (self.all_keys, self.all_values):
                # no chance content: what a mask hides is multiplied by 0, not left out
                new = part.new_zeros((len(places), part.shape[1], room, part.shape[3]))
                new[:, :, : self.filled] = part[places, :, : self.filled]
                parts.append(new)
            return self._with(*parts)

        def join(self, other: "GrowingLayer") -> "GrowingLayer":
            """One with the rows of both."""
            mine, theirs = (self.all_keys, self.all_values), (other.all_keys, other.all_values)
            return self._with(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))

        def _with(self, all_keys: Tensor, all_values: Tensor) -> "GrowingLayer":
            found = copy.copy(self)
            found.room, found.all_keys, found.all_values = all_keys.shape[2], all_keys, all_values
            found.keys, found.values = all_keys[:, :, : self.filled], all_values[:, :, : self.filled]
            return found

    return GrowingLayer
