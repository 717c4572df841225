"""Dropout whose masks are functions of (seed of a row, site, element), whatever rows stand beside a row.

A batch gives every row a seed that follows from its place in the order of the data (`arra.data.batches`), so neither
ranks nor micro-batches nor recomputing in the backward pass change a mask, and a resumed training drops what the
uninterrupted one drops. Every site of a model (a layer's dropout) mixes its number into the seed. Draws are SplitMix
with integers that wrap, so they are the same bits on every device and compiled; 16 bits each, so a rate is rounded to
1/65536, and scaling is by the rounded one. On one thread of a CPU a mask of (4, 257, 768) took 0.9 ms, `bernoulli_`
4.5 ms.
Legend: B rows, L layers.
Source: Steele, Lea, Flood 2014 (SplitMix: a counter times the golden ratio, then a finaliser) with 64 bits; Wellons'
lowbias32 in its place with 32.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from arra.errors import ArraError

GOLDEN_64, FIRST_64, SECOND_64 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
GOLDEN_32, FIRST_32, SECOND_32 = -0x61C88647, 0x7FEB352D, -0x7B935975
"""The golden ratio and the factors of the finalisers (SplitMix's, and Wellons' lowbias32), as signed integers."""
LEVELS = 2**16
"""Of a draw."""
CHUNK = 2**18
"""Pairs of draws made at a time on a CPU, so that they stay in its cache; a quarter as many cost a fifth more."""


def random_seeds(rows: int, device: torch.device) -> Int64[Tensor, " B"]:
    """Seeds for rows that came without, from torch's generator."""
    return torch.randint(2**62, (rows,), device=device)


def site_seeds(seeds: Int64[Tensor, " B"], sites: int) -> Int64[Tensor, "sites B"]:
    """The rows' seeds for each of so many sites, as tensors: numbers would have every block compiled on its own."""
    return _mixed(seeds[None] + _counted(sites, GOLDEN_64, seeds)[:, None])


def keep_mask(seeds: Int64[Tensor, " B"], shape: Sequence[int], *, site: int, p: float) -> Bool[Tensor, "B *shape"]:
    """What stays where a share `p` is dropped; an element's draw does not depend on how far the shape reaches."""
    *outer, width = shape
    keys = _keys(seeds, outer, site)
    rows, bound = (keys.flatten() >> 32).to(torch.int32), _dropped_levels(p) - LEVELS // 2
    if torch.compiler.is_compiling():  # what follows can be fused, a view of other integers cannot
        places = torch.arange(width, device=seeds.device, dtype=torch.int32)
        pairs = _finished(rows[:, None] + _counted(width, GOLDEN_32, rows, shift=1))
        return ((pairs << (16 * (1 - (places & 1)))) >= bound * LEVELS).view(len(seeds), *shape)
    half = (width + 1) // 2
    columns = _counted(half, GOLDEN_32, rows)
    kept = torch.empty(len(rows), 2 * half, dtype=torch.bool, device=seeds.device)
    count = max(1, CHUNK // max(1, half)) if seeds.device.type == "cpu" else max(1, len(rows))
    spare = torch.empty(2, min(count, len(rows)), half, dtype=torch.int32, device=seeds.device)
    for start in range(0, len(rows), count):
        part = rows[start : start + count, None]
        pairs, shifted = spare[:, : len(part)]
        torch.add(part, columns, out=pairs)
        _finish(pairs, shifted)
        torch.ge(pairs.view(torch.int16), bound, out=kept[start : start + count])
    return kept[:, :width].reshape(len(seeds), *shape)


def dropped(
    x: Float[Tensor, "B *any"], p: float, seeds: Int64[Tensor, " B"], *, site: int = 0
) -> Float[Tensor, "B *any"]:
    """`x` with a share `p` of its elements set to 0 and the others scaled up; 1 byte is kept for each."""
    if not p:
        return x
    return torch.where(keep_mask(seeds, x.shape[1:], site=site, p=p), x * scale(p), 0)


def path_factors(seeds: Int64[Tensor, "L B"], drop_path: float, *, site: int) -> Float[Tensor, "L 2 B"]:
    """What the two branches of every layer's block are multiplied with: 0, or 1 / share that stays.

    The share that is dropped rises evenly from 0 in the first layer to `drop_path` in the last.
    """
    layers, rows = seeds.shape
    # in whole numbers, which no device rounds otherwise
    numbers = torch.arange(layers, device=seeds.device, dtype=torch.int32)[:, None, None]
    numbers = numbers * _dropped_levels(drop_path) // max(1, layers - 1)
    draws = (_keys(seeds.flatten(), (2,), site) >> 48).to(torch.int32).view(layers, rows, 2).transpose(1, 2)
    return (draws >= numbers - LEVELS // 2) * (LEVELS / (LEVELS - numbers))


def scale(p: float) -> float:
    """One over the share that stays."""
    return LEVELS / (LEVELS - _dropped_levels(p))


def _dropped_levels(p: float) -> int:
    return min(round(p * LEVELS), LEVELS - 1)


def _keys(seeds: Tensor, outer: Sequence[int], site: int) -> Int64[Tensor, "B *outer"]:
    """64 bits for every place of the outer dimensions."""
    keys = _mixed(seeds + (site << 48))
    for size in outer:
        keys = _mixed(keys[..., None] + _counted(size, GOLDEN_64, keys))
    return keys


def _counted(size: int, factor: int, like: Tensor, *, shift: int = 0) -> Tensor:
    """Multiples of a factor by the numbers up to `size` shifted right, as integers that wrap like those given."""
    numbers = torch.arange(size, device=like.device, dtype=like.dtype) >> shift
    # multiples of plain numbers are places of an array to a compiler, whose arithmetic does not wrap; and none is 0
    return (numbers ^ 2**30) * factor


def _mixed(x: Tensor) -> Tensor:
    """SplitMix's finaliser."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST_64  # the sign is shifted in and cut off again
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND_64
    return x ^ ((x >> 31) & (2**33 - 1))


def _finished(x: Tensor) -> Tensor:
    """A finaliser of 32 bits."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST_32
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND_32
    return x ^ ((x >> 16) & 0xFFFF)


def _finish(x: Tensor, spare: Tensor) -> None:
    """Nothing; `x` is overwritten by its finished form, `spare` by anything."""
    for shift, mask, factor in ((16, 0xFFFF, FIRST_32), (15, 0x1FFFF, SECOND_32), (16, 0xFFFF, None)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_(mask))
        if factor is not None:
            x.mul_(factor)


class RowDropout(nn.Module):
    """Dropout by rows in the place of an `nn.Dropout`; whoever calls the network gives it seeds before.

    They stay until the next call, so that a block which is computed again in the backward pass drops the same.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.seeds: Tensor | None = None
        """Of the rows, for this site; None draws from torch's generator."""

    def extra_repr(self) -> str:
        """The rate, as torch's own dropout shows it."""
        return f"p={self.p}"

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The input, while training with a share `p` dropped.

        Its first dimension is that of the rows, or rows times positions.
        Raises: ArraError for a first dimension that is no multiple of the rows.
        """
        if not self.training or not self.p:
            return x
        seeds = random_seeds(len(x), x.device) if self.seeds is None else self.seeds
        if len(x) == len(seeds):
            return dropped(x, self.p, seeds)
        if len(x) % max(1, len(seeds)):
            raise ArraError(
                f"dropout: states of shape {tuple(x.shape)} do not show which of {len(seeds)} rows they belong to; "
                "set this network's own dropout to 0"
            )
        return dropped(x.unflatten(0, (len(seeds), -1)), self.p, seeds).flatten(0, 1)
