"""Distances between two sets of pictures in a judge's feature space, and intervals by resampling pictures.

Place in the pipeline: encoders/ turn generated and reference pictures into features; here two sets of features become
one number with an interval. Features come as float32 and everything inside is float64.

A *statistic* here is a function of counts: `statistic(counts)` is the value on the resample in which picture i occurs
`counts[i]` times, and all-ones counts give the value itself. One precomputation (a kernel matrix, a projection) then
serves every resample, and two models are compared on the very same resamples.

Letters: N generated pictures, M reference pictures, F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.errors import ArraError

NUM_RESAMPLES = 500
"""Resamples behind an interval: its ends are then good to some 4 % of its width."""

LEVEL = 0.95
"""Coverage of every interval unless said otherwise."""

FRECHET_COMPONENTS = 64
"""Principal axes kept for the Frechet distance: a covariance of 1280 features of some hundred pictures is singular."""

Counts = Float[np.ndarray, "N"]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval, all in the unit of the statistic."""

    value: float
    low: float
    high: float


def frechet_distance(
    a: Float[Tensor, "N F"], b: Float[Tensor, "M F"], *, num_components: int | None = FRECHET_COMPONENTS
) -> float:
    """Frechet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) between Gaussians fitted to `a` and to `b`.

    `b` is the reference. With `num_components` both sets are projected on the leading principal axes of `b` first, as
    many as `b` has (at most M - 1 and F): with few pictures the full covariances are singular, and most of the distance
    would be noise of directions in which the reference hardly varies. A projected distance sees no difference outside
    those axes and is not symmetric; with `num_components=None` it is symmetric. It grows as N and M shrink, so compare
    values at equal numbers of pictures only.

    Raises: ArraError when a set has fewer than two pictures or a feature is not finite.
    Source: Heusel et al. 2017 (FID), covariances with N - 1 as in the reference code.
    """
    return FrechetStatistic(a, b, num_components=num_components)(np.ones(len(a)), np.ones(len(b)))


def kernel_distance(a: Float[Tensor, "N F"], b: Float[Tensor, "M F"], *, block_images: int = 4096) -> float:
    """Unbiased squared maximum mean discrepancy x1000 under the kernel (x.y / F + 1)^3, over all pictures at once.

    Unbiased means that sets of one distribution give zero on average, hence also values below zero; nothing is clipped.
    `block_images` bounds the memory and changes no value.

    Raises: ArraError when a set has fewer than two pictures or a feature is not finite.
    Source: Binkowski et al. 2018 (KID), without its random subsets.
    """
    x, y = _as_float64(a, name="generated"), _as_float64(b, name="reference")
    num_a, num_b = len(x), len(y)
    within_a = sum(_kernel(block, x).sum() for block in _blocks(x, block_images)) - _kernel_diagonal(x).sum()
    within_b = sum(_kernel(block, y).sum() for block in _blocks(y, block_images)) - _kernel_diagonal(y).sum()
    across = sum(_kernel(block, y).sum() for block in _blocks(x, block_images))
    squared = within_a / (num_a * (num_a - 1)) + within_b / (num_b * (num_b - 1)) - 2 * across / (num_a * num_b)
    return float(1000 * squared)


class MeanStatistic:
    """Mean of per-picture values under counts: NLL, caption gain, hits of a retrieval."""

    def __init__(self, values: Float[Tensor, "N"]) -> None:
        self.values = _as_float64(values, name="per-picture", minimum=1)
        self.num_images = len(self.values)

    def __call__(self, counts: Counts) -> float:
        """The mean of the values, each taken `counts` times."""
        return float(counts @ self.values / counts.sum())


class FrechetStatistic:
    """`frechet_distance` as a function of counts; the principal axes are fitted once, on the whole reference."""

    def __init__(
        self,
        a: Float[Tensor, "N F"],
        b: Float[Tensor, "M F"],
        *,
        num_components: int | None = FRECHET_COMPONENTS,
    ) -> None:
        x, y = _as_float64(a, name="generated"), _as_float64(b, name="reference")
        center = y.mean(0)
        x, y = x - center, y - center
        if num_components is not None:
            kept = min(num_components, len(y) - 1, y.shape[1])
            axes = np.linalg.svd(y, full_matrices=False)[2][:kept].T  # (F, kept)
            x, y = x @ axes, y @ axes
        self.x, self.y = x, y
        self.num_images = len(x)
        # More features than pictures: the N x M products hold all that is needed and are smaller than the covariances.
        self.products = x @ y.T if x.shape[1] > min(len(x), len(y)) else None

    def __call__(self, counts: Counts, reference_counts: Float[np.ndarray, "M"] | None = None) -> float:
        """The distance on a resample; without `reference_counts` reference picture i is drawn with picture i."""
        weights_a = counts
        weights_b = counts if reference_counts is None else reference_counts
        mean_a = weights_a @ self.x / weights_a.sum()
        mean_b = weights_b @ self.y / weights_b.sum()
        scaled_a = np.sqrt(weights_a / (weights_a.sum() - 1))[:, None]
        scaled_b = np.sqrt(weights_b / (weights_b.sum() - 1))[:, None]
        root_a, root_b = scaled_a * (self.x - mean_a), scaled_b * (self.y - mean_b)  # covariance = root.T @ root
        # tr (A B)^(1/2) is the nuclear norm of root_a @ root_b.T: no matrix root, hence no ridge and no complex part.
        if self.products is None:
            triangle_a, triangle_b = np.asarray(np.linalg.qr(root_a, "r")), np.asarray(np.linalg.qr(root_b, "r"))
            cross = triangle_a @ triangle_b.T
        else:
            of_mean_a, of_mean_b = self.y @ mean_a, self.x @ mean_b
            cross = self.products - of_mean_b[:, None] - of_mean_a[None, :] + mean_a @ mean_b
            cross = scaled_a * cross * scaled_b.T
        trace_root = np.linalg.svd(cross, compute_uv=False).sum()
        shift = mean_a - mean_b
        return float(shift @ shift + (root_a**2).sum() + (root_b**2).sum() - 2 * trace_root)


class KernelStatistic:
    """`kernel_distance` as a function of counts, from kernel matrices computed once (N^2 + M^2 + N M numbers)."""

    def __init__(self, a: Float[Tensor, "N F"], b: Float[Tensor, "M F"]) -> None:
        x, y = _as_float64(a, name="generated"), _as_float64(b, name="reference")
        self.within_a, self.within_b, self.across = _kernel(x, x), _kernel(y, y), _kernel(x, y)
        np.fill_diagonal(self.within_a, 0.0)
        np.fill_diagonal(self.within_b, 0.0)
        self.num_images = len(x)
        self.own = self.across.diagonal().copy() if len(x) == len(y) else None

    def __call__(self, counts: Counts, reference_counts: Float[np.ndarray, "M"] | None = None) -> float:
        """The distance on a resample, pairs of a picture with its own copy left out; see `bootstrap`."""
        within_a = _mean_over_pairs(self.within_a, counts)
        if reference_counts is not None:
            within_b = _mean_over_pairs(self.within_b, reference_counts)
            across = counts @ self.across @ reference_counts / (counts.sum() * reference_counts.sum())
        else:
            if self.own is None:
                raise ValueError("a paired resample needs as many generated as reference pictures")
            within_b = _mean_over_pairs(self.within_b, counts)
            # A picture is more like its own reference than like another one. A resample would hold twice as many own
            # pairs as the sample does, so own and other pairs are averaged apart and keep the sample's proportion.
            share = 1 / len(counts)
            others = counts @ self.across @ counts - (counts**2) @ self.own
            across = share * (counts @ self.own / counts.sum()) + (1 - share) * others / _num_pairs(counts)
        return float(1000 * (within_a + within_b - 2 * across))


Statistic = MeanStatistic | FrechetStatistic | KernelStatistic


def draw_counts(
    num_images: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    groups: Int[Tensor, "N"] | None = None,
) -> Iterator[Counts]:
    """Yields `num_resamples` vectors (N,) saying how often each picture occurs; the same seed gives the same resamples.

    With `groups` whole groups are drawn (all skin tones of one profession, say): pictures of a group are near-copies,
    and drawing them one by one would call the same evidence independent. A draw of one single picture is drawn again.

    Raises: ArraError when there are fewer than two pictures, or fewer than two groups.
    """
    if num_images < 2:
        raise ArraError(f"an interval needs at least 2 pictures, got {num_images}; evaluate on more pictures")
    labels = np.arange(num_images) if groups is None else np.unique(groups.cpu().numpy(), return_inverse=True)[1]
    num_groups = int(labels.max()) + 1
    if num_groups < 2:
        raise ArraError(f"an interval needs at least 2 groups of pictures, all {num_images} are of one group")
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        drawn = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups))
        while np.count_nonzero(drawn) < 2:
            drawn = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups))
        yield drawn[labels].astype(np.float64)


def bootstrap(
    statistic: Statistic,
    *,
    num_reference: int | None = None,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    groups: Int[Tensor, "N"] | None = None,
) -> Interval:
    """The statistic on all pictures, with an interval from resampling pictures with replacement.

    Without `num_reference` one draw serves both sets: generated picture i and reference picture i share a prompt and
    are drawn together, which keeps the dependence between them (the counts go in as `statistic(counts)`). With
    `num_reference` the sets are unrelated and drawn independently (`statistic(counts, reference_counts)`).

    What is biased, and what is done about it. A resample holds only about 63 % of the pictures, the rest are copies.
    The kernel distance would count each copy as a perfect match within its set: such pairs are left out, in numerator
    and denominator. The Frechet distance has an upward bias of order 1/N which a resample adds a second time. So the
    interval of a distance is the percentile interval of the resamples *centred*: shifted by (value - mean of the
    resamples). It describes the value one would get from other pictures at the same N, and lies around the reported
    value. A reflected ("basic") interval would also subtract the bias of the value itself and need not contain the
    value it stands beside. A mean has no such bias and is not shifted: the noise of a shift would push the interval of
    a share, which moves in jumps, across zero. When both sets are of one distribution the kernel distance is degenerate
    and its interval is too wide rather than too narrow. A share with no hit at all, or with hits alone, gets an
    interval of width zero.
    """
    draws = draw_counts(statistic.num_images, num_resamples=num_resamples, seed=seed, groups=groups)
    ones = np.ones(statistic.num_images)
    if num_reference is None or isinstance(statistic, MeanStatistic):
        value = statistic(ones)
        resampled = [statistic(counts) for counts in draws]
    else:
        value = statistic(ones, np.ones(num_reference))
        reference_draws = draw_counts(num_reference, num_resamples=num_resamples, seed=seed + 1)
        resampled = [statistic(*pair) for pair in zip(draws, reference_draws, strict=True)]
    center = not isinstance(statistic, MeanStatistic)
    return percentile_interval(value, np.asarray(resampled), center=center, level=level)


def percentile_interval(
    value: float, resampled: Float[np.ndarray, "R"], *, center: bool, level: float = LEVEL
) -> Interval:
    """`value` with the percentile interval of `resampled`, shifted onto `value` by its mean if `center`."""
    shift = value - float(resampled.mean()) if center else 0.0
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low) + shift, high=float(high) + shift)


def _as_float64(features: Tensor, *, name: str, minimum: int = 2) -> np.ndarray:
    """The tensor as a float64 array, refused when it is too short or holds a value that is not finite."""
    if len(features) < minimum:
        raise ArraError(f"{name} features: {len(features)} pictures, expected at least {minimum}; evaluate on more")
    if not bool(torch.isfinite(features).all()):
        row = int((~torch.isfinite(features)).reshape(len(features), -1).any(1).nonzero()[0])
        raise ArraError(f"{name} features: picture {row} has a value that is not finite; did the training diverge?")
    return features.detach().cpu().to(torch.float64).numpy()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3  # (N, M)


def _kernel_diagonal(x: np.ndarray) -> np.ndarray:
    return ((x * x).sum(1) / x.shape[1] + 1) ** 3  # (N,)


def _blocks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _num_pairs(counts: Counts) -> float:
    """Ordered pairs of different pictures in the resample."""
    return float(counts.sum() ** 2 - (counts**2).sum())


def _mean_over_pairs(hollow: np.ndarray, counts: Counts) -> float:
    """Mean of a matrix of zero diagonal over the pairs of different pictures in the resample."""
    return float(counts @ hollow @ counts / _num_pairs(counts))
