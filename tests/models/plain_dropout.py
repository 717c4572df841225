"""The draws of dropout written out once more, with numpy's unsigned integers; shares no line with `arra.models`."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

LEVELS = 65536


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counted(size: int) -> np.ndarray:
    return (np.arange(size, dtype=np.uint64) ^ np.uint64(2**30)) * np.uint64(0x9E3779B97F4A7C15)


def site_seeds(seeds: Tensor, sites: int) -> np.ndarray:
    return mixed(seeds.numpy().astype(np.uint64) + counted(sites)[:, None])


def keys(seeds: np.ndarray, outer: Sequence[int], site: int) -> np.ndarray:
    found = mixed(seeds + np.uint64(site << 48))
    for size in outer:
        found = mixed(found[..., None] + counted(size))
    return found


def kept(seeds: np.ndarray, shape: Sequence[int], site: int, p: float) -> np.ndarray:
    """Which elements of (B, *shape) stay."""
    *outer, width = shape
    places = np.arange(width, dtype=np.uint32)
    x = (keys(seeds, outer, site) >> np.uint64(32)).astype(np.uint32)[..., None]
    x = x + ((places >> np.uint32(1)) ^ np.uint32(2**30)) * np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    halves = np.where(places & 1, x >> np.uint32(16), x & np.uint32(0xFFFF)).astype(np.uint16)
    return halves.view(np.int16) >= round(p * LEVELS) - LEVELS // 2


def path_kept(seeds: np.ndarray, site: int, levels: int) -> np.ndarray:
    """(B, 2): which branches of a block stay, where so many of 65536 are dropped."""
    draws = (keys(seeds, (2,), site) >> np.uint64(48)).astype(np.uint16).view(np.int16)
    return draws >= levels - LEVELS // 2
