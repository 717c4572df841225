"""Memory of a fixed length: what is handed out is what was stored, in place, and no more than there is room for."""

from typing import Any

import pytest
import torch

from arra.models.growing import all_growing, growing_cache, join_caches, spread_cache
from tests.models.toy_lms import toy_lm


def filled(cache: Any, parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer hands out after it was given some keys and, as values, their negatives."""
    for part in parts:
        found: tuple[torch.Tensor, torch.Tensor] = cache.update(part, -part, 0)
    return found


def test_what_was_stored_is_handed_out_in_place() -> None:
    config = toy_lm("llama", rows=20).config
    assert all_growing(config)
    cache = growing_cache(config, room=7)
    parts = [torch.randn(2, 2, count, 8) for count in (3, 1, 2)]
    keys, values = filled(cache, parts)
    assert torch.equal(keys, torch.cat(parts, 2))
    assert torch.equal(values, -keys)
    assert keys.data_ptr() == cache.layers[0].all_keys.data_ptr()
    assert cache.get_seq_length() == 6
    with pytest.raises(RuntimeError, match="size"):
        cache.update(torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8), 0)


def test_rows_are_copied_into_memory_of_their_own() -> None:
    """So that what one reads afterwards is not seen by those of the same beginning."""
    config = toy_lm("llama", rows=20, num_hidden_layers=1).config
    begin, other, more = torch.randn(2, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(4, 2, 1, 8)
    cache, late = growing_cache(config, room=3), growing_cache(config, room=3)
    filled(cache, [begin])
    filled(late, [other])
    wide = join_caches(
        spread_cache(cache, torch.tensor([1, 0, 1]), room=5), spread_cache(late, torch.tensor([0]), room=5)
    )
    keys, values = filled(wide, [more])
    assert torch.equal(keys, torch.cat([torch.cat([begin[[1, 0, 1]], other]), more], 2))
    assert torch.equal(values, -keys)
    assert torch.equal(cache.layers[0].keys, begin)
    wide.reorder_cache(torch.arange(2))
    assert torch.equal(filled(wide, [more[:2]])[0], torch.cat([keys[:2], more[:2]], 2))


@pytest.mark.parametrize(("family", "changes"), [("mistral", {"sliding_window": 7}), ("gemma2", {})])
def test_windows_keep_the_librarys_memory(family: str, changes: dict[str, int]) -> None:
    config = toy_lm(family, rows=20, **changes).config
    assert not all_growing(config)
    kinds = [type(layer).__name__ for layer in growing_cache(config, room=7).layers]
    assert "DynamicSlidingWindowLayer" in kinds
    assert kinds.count("GrowingLayer") + kinds.count("DynamicSlidingWindowLayer") == len(kinds)
