"""Distances of two sets of pictures by the mean of a kernel over pairs of them: KID and CMMD.

    Collected.features of both sets --> kid, cmmd --> KernelDistance --> a row of the card with its interval

Features are read a block at a time, all arithmetic is float64, and every picture is used: no random subsets, hence no
seed. The pairs are N^2 / 2 + M^2 / 2 + N M scalar products of F numbers.

Legend: N generated pictures, M pictures of the reference, F feature.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int

from arra.errors import ArraError
from arra.evaluate.measured import Measured
from arra.evaluate.sets import Blocks

SCALE = 1000
"""KID and CMMD are both told in thousandths."""

CMMD_SIGMA = 10.0
"""Width of CMMD's Gaussian kernel, on vectors of length one."""

BLOCK_IMAGES = 1024
"""Pictures on each side of a block: two blocks of 2,048 features and their kernel take 42 MB."""

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """The distance with what each picture of either set adds to it; both means are the value."""

    generated: Measured
    """Its interval tells what other generated pictures would give against this very reference: what a card says, and
    what decides between two models that are measured against one reference."""
    reference: Measured
    """Its interval tells what other pictures of the reference would give; the two are independent."""


def kid(
    generated: Blocks,
    reference: Float32[np.ndarray, "M F"],
    *,
    partners: Int[np.ndarray, "N"] | None = None,
    block_images: int = BLOCK_IMAGES,
) -> KernelDistance:
    """Squared maximum mean discrepancy x1000 under the kernel (x.y / F + 1)^3, unbiased.

    Unbiased means that sets of one distribution give zero on average, hence also values below zero; nothing is clipped.
    The influence is the Hoeffding projection of the U-statistic. Where the two distributions are one, its true spread
    is of second order, and the interval of the projection is about sqrt(2) too wide rather than too narrow: it holds
    second-order noise once too often (the Efron-Stein inequality). `block_images` bounds the memory and changes the
    value by rounding alone.

    `partners` is for each generated picture the row of the reference that shows the same prompt, or -1. A picture is
    more like its partner than like other pictures, so with them the value would be too small, by 2 / M of how much
    more: such pairs are left out, as in the U-statistic for paired samples (Gretton et al. 2012, equation 3).

    Raises:
        ArraError: a set has fewer than two pictures, or a feature is not finite.
        ValueError: a partner that is no row of the reference.

    Source: Binkowski et al. 2018, with one subset of all pictures; torch-fidelity and torchmetrics average 100 random
    subsets of 1,000, which estimates the same number with more noise.
    """
    num, num_reference = len(generated), len(reference)
    if partners is not None and (partners.min(initial=-1) < -1 or partners.max(initial=-1) >= num_reference):
        raise ValueError(f"partners are not rows of {num_reference} reference pictures, or -1")
    sums = _sum_kernel(generated, reference, kernel=_cubic, block_images=block_images, partners=partners)
    return _distance(
        within=(sums.within - sums.within_own) / (num - 1),
        within_reference=(sums.within_reference - sums.within_reference_own) / (num_reference - 1),
        across=sums.across,
        across_reference=sums.across_reference,
    )


def cmmd(
    generated: Blocks, reference: Float32[np.ndarray, "M F"], *, block_images: int = BLOCK_IMAGES
) -> KernelDistance:
    """Squared maximum mean discrepancy x1000 under exp(-|x - y|^2 / (2 * 10^2)) of vectors of length one, biased.

    As its authors do, a picture is also paired with itself, so the value is never below zero and too large by about
    1000 * (1 - mean kernel) * (1 / N + 1 / M); compare at equal numbers of pictures. Vectors are brought to length one
    here. Published values use CLIP ViT-L/14 at 336 px, projected.

    Raises:
        ArraError: as `kid`, or a vector is zero.

    Source: Jayasumana et al. 2024; google-research/cmmd, distance.py, whose float32 leaves noise in the fourth digit
    after the point.
    """
    sums = _sum_kernel(generated, reference, kernel=_gaussian_less_one, block_images=block_images, is_unit=True)
    num, num_reference = len(generated), len(reference)
    return _distance(
        within=sums.within / num,
        within_reference=sums.within_reference / num_reference,
        across=sums.across,
        across_reference=sums.across_reference,
    )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Kernel sums of each picture with all of its set, and with itself; its mean kernel with the other set."""

    within: Float64[np.ndarray, "N"]
    within_own: Float64[np.ndarray, "N"]
    within_reference: Float64[np.ndarray, "M"]
    within_reference_own: Float64[np.ndarray, "M"]
    across: Float64[np.ndarray, "N"]
    across_reference: Float64[np.ndarray, "M"]
    """Pictures that have a partner weigh M / (M - 1) in it, so that its mean is that of `across`."""


def _distance(
    *, within: np.ndarray, within_reference: np.ndarray, across: np.ndarray, across_reference: np.ndarray
) -> KernelDistance:
    """From each picture's mean kernel with the others of its set and with the other set."""
    value = SCALE * float(within.mean() + within_reference.mean() - 2 * across.mean())
    sides = (within - across, within_reference - across_reference)
    generated, reference = (value + 2 * SCALE * (side - side.mean()) for side in sides)
    return KernelDistance(
        generated=Measured(value=value, per_picture=generated),
        reference=Measured(value=value, per_picture=reference, of="reference"),
    )


def _sum_kernel(
    generated: np.ndarray,
    reference: np.ndarray,
    *,
    kernel: Kernel,
    block_images: int,
    is_unit: bool = False,
    partners: np.ndarray | None = None,
) -> _Sums:
    """Sums over all pairs; between the sets those of partners are left out."""
    for features, name in ((generated, "generated"), (reference, "reference")):
        if len(features) < 2:
            raise ArraError(f"{name} features: {len(features)} pictures, expected at least 2; evaluate on more")
        # Once, ahead of the pairs: blocks are read many times there.
        for _ in _blocks(features, block_images, name=name, is_unit=is_unit):
            pass

    def blocks(features: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        return _blocks(features, block_images, is_unit=is_unit)

    def within(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums, own = np.zeros(len(features)), np.zeros(len(features))
        for rows, x in blocks(features):
            diagonal = kernel(x, x)
            sums[rows] += diagonal.sum(1)
            own[rows] = diagonal.diagonal()
            # The matrix is symmetric: what lies right of the diagonal block is counted for both of its pictures.
            for others, y in _blocks(features[rows.stop :], block_images, is_unit=is_unit):
                products = kernel(x, y)
                sums[rows] += products.sum(1)
                sums[rows.stop :][others] += products.sum(0)
        return sums, own

    across, across_reference = np.zeros(len(generated)), np.zeros(len(reference))
    partner_of = np.full(len(generated), -1) if partners is None else partners
    num_others = len(reference) - (partner_of >= 0)
    for rows, x in blocks(generated):
        for others, y in blocks(reference):
            products = kernel(x, y)
            places = partner_of[rows] - others.start
            at = np.flatnonzero((places >= 0) & (places < len(y)))  # -1 is no row of any block
            products[at, places[at]] = 0
            products /= num_others[rows][:, None]
            across[rows] += products.sum(1)
            across_reference[others] += products.sum(0) * (len(reference) / len(generated))
    sums, own = within(generated)
    sums_reference, own_reference = within(reference)
    return _Sums(
        within=sums,
        within_own=own,
        within_reference=sums_reference,
        within_reference_own=own_reference,
        across=across,
        across_reference=across_reference,
    )


def _blocks(
    features: np.ndarray, size: int, *, name: str | None = None, is_unit: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields rows and their float64 vectors; with a `name` they are checked first."""
    for start in range(0, len(features), size):
        rows = slice(start, min(start + size, len(features)))
        block = np.asarray(features[rows], dtype=np.float64)
        if name is not None and not np.isfinite(block).all():
            row = start + int((~np.isfinite(block)).any(1).argmax())
            raise ArraError(f"{name} features: picture {row} has a value that is not finite; did the training diverge?")
        if is_unit:
            lengths = np.sqrt((block * block).sum(1, keepdims=True))
            if name is not None and not lengths.all():
                row = start + int((lengths == 0).argmax())
                raise ArraError(f"{name} features: picture {row} is a zero vector, which has no direction")
            block = block / lengths
        yield rows, block


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = x @ y.T
    products /= x.shape[1]
    products += 1
    return products * products * products  # numpy's power of 3 is ten times slower


def _gaussian_less_one(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel of vectors of length one, less 1: at this width it lies in [0.98, 1], and the ones cancel anyway."""
    squared = x @ y.T
    squared *= -2
    squared += 2
    squared *= -1 / (2 * CMMD_SIGMA**2)
    return np.asarray(np.expm1(squared))
