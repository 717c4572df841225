"""Gaussians fitted to features, added up a batch at a time, and the Frechet distance between them.

Place in the pipeline: `collecting` feeds `MomentSums` while it looks at pictures; `FrechetTo` makes FID, sFID and FD of
what it leaves, with each picture's part in them. Everything is float64, on the CPU.

Legend: B batch, N pictures, F feature, R rank of a covariance, L level of an extrapolation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.measured import Measured

BLOCK_IMAGES = 1024
"""Rows of mapped features in memory at a time; changes no value."""
WELL_CONDITIONED = 1e-12
"""Least over largest eigenvalue of a product of covariances down to which their roots keep 8 digits or more. Below,
factors are multiplied in place of covariances, which costs twice the time."""
NOT_POSITIVE = 1e-6
"""Of the largest eigenvalue; what lies as far below zero is no rounding."""
EXTRAPOLATION: Mapping[int, float] = {1: 8 / 3, 2: -2.0, 4: 1 / 3}
"""Weights of the whole, the halves and the quarters: they sum to 1, and 1/n and 1/n^2 cancel."""
LEAST_PER_FEATURE = 8
"""Pictures per feature that an extrapolation needs."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and covariance of features, as float64."""

    mean: Float64[np.ndarray, "F"] = field(repr=False)
    covariance: Float64[np.ndarray, "F F"] = field(repr=False)
    """With N - 1, as in the reference code."""
    count: int | None
    """N; None for published statistics that do not say."""


class MomentSums:
    """Mean and scatter about it of the features so far, whatever the batches they came in and whichever rank saw them.

    Batches are merged by their own means, so nothing cancels however far features lie from zero.
    Source: Chan, Golub and LeVeque 1979.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = np.zeros(size)
        self._scatter = np.zeros((size, size))

    def add(self, features: Float[Tensor | np.ndarray, "B F"]) -> None:
        """Nothing; takes in the features of some pictures.

        Raises:
            ArraError: one is not finite.
        """
        values = features.detach().cpu().double().numpy() if isinstance(features, Tensor) else features
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            row = self.count + int((~np.isfinite(values)).any(1).argmax())
            raise ArraError(f"features: picture {row} has a value that is not finite; did the training diverge?")
        if len(values):
            mean = values.mean(0)
            values -= mean
            self._take(len(values), mean, values.T @ values)

    def merge(self, other: "MomentSums") -> None:
        """Nothing; takes in what another has seen."""
        if other.count:
            self._take(other.count, other.mean, other._scatter)

    def finish(self) -> Moments:
        """The moments of all features so far, which may go on.

        Raises:
            ArraError: fewer than two pictures.
        """
        if self.count < 2:
            raise ArraError(f"a covariance needs at least 2 pictures, got {self.count}; give more")
        return Moments(mean=self.mean.copy(), covariance=self._scatter / (self.count - 1), count=self.count)

    def state(self) -> dict[str, Float64[np.ndarray, "..."]]:
        """What `joined` takes, to be sent or kept: `count` (1,), `mean` (F,), `scatter` (F, F)."""
        return {"count": np.array([float(self.count)]), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def joined(cls, states: Sequence[Mapping[str, Float64[np.ndarray, "..."]]]) -> "MomentSums":
        """The sums over all that several have seen; the order of the states changes rounding only."""
        whole = cls(len(states[0]["mean"]))
        for state in states:
            count = int(state["count"][0])
            if count:
                whole._take(count, state["mean"], state["scatter"])
        return whole

    def _take(self, count: int, mean: Float64[np.ndarray, "F"], scatter: Float64[np.ndarray, "F F"]) -> None:
        total = self.count + count
        between = mean - self.mean
        self._scatter += scatter
        self._scatter += np.outer(between, between * (self.count * count / total))
        self.mean += between * (count / total)
        self.count = total


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two Gaussians, zero for equal ones.

    Raises:
        ArraError: moments that are not finite, of different numbers of features, or with a covariance that is none.
    Source: Heusel et al. 2017 (FID).
    """
    return FrechetTo(b).value(a)


class FrechetTo:
    """Frechet distances to one reference, whose covariance is factored once.

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of L^T A L with B = L L^T: symmetric, so several times
    faster than the root of A B, which is not. Where those eigenvalues span more than float64 has digits for (singular
    covariances above all: fewer pictures than features) it is the sum of the singular values of K^T L with A = K K^T.

    Raises:
        ArraError: the reference is not finite, or its covariance is none.
    """

    def __init__(self, reference: Moments) -> None:
        self.reference = _checked(reference, "reference")
        self._factor = _factor(reference, "reference")  # (F, R)

    def value(self, a: Moments) -> float:
        """The distance of `a`, at most rounding from exact and never below zero.

        Raises:
            ArraError: as `frechet`.
        """
        self._require_fit(a)
        if not _is_thin(a) and self._factor.shape[1]:
            spectrum = np.linalg.eigvalsh(self._factor.T @ a.covariance @ self._factor)
            if spectrum[0] > WELL_CONDITIONED * spectrum[-1]:
                return self._distance(a, float(np.sqrt(spectrum).sum()))
        cross = _factor(a, "generated").T @ self._factor
        return self._distance(a, float(np.linalg.svd(cross, compute_uv=False).sum()) if cross.size else 0.0)

    def measured(self, a: Moments, features: Float32[np.ndarray, "N F"]) -> Measured:
        """The distance of `a` with each picture's part in it: the distance plus the picture's influence.

        `features` are of the pictures that `a` is of, or of K of them, whose interval is then sqrt(N / K) times as wide
        as that of all. The influence of picture x is the derivative of the distance with respect to the weight of x,

            2 (mean_a - mean_b).(x - mean_a) + N / (N - 1) (x - mean_a)^T (I - T) (x - mean_a), less its mean,

        with T = B^(1/2) (B^(1/2) A B^(1/2))^(-1/2) B^(1/2) the optimal map from a to b, its inverse root within the
        span of what it is of. Influences of the features given sum to zero.

        Intervals from these are about the mean distance of N pictures from this reference. In simulations they hold it
        95 times in 100 or more, with fewer pictures than features too; they are up to 1.4 times too wide where the two
        distributions are near. Exact resamples, a third of whose pictures are copies, are up to 9 times too wide there.

        Raises:
            ArraError: as `frechet`.
        """
        return self._of_rows(a, features, np.arange(len(features)))

    def _of_rows(self, a: Moments, features: Float32[np.ndarray, "N F"], rows: Int[np.ndarray, "K"]) -> Measured:
        """As `measured`, with influences of some rows of the features."""
        self._require_fit(a)
        trace_root, weights = self._coupling(a, features)
        value = self._distance(a, trace_root)
        return Measured(value=value, per_picture=value + _influences(a, self.reference, weights, features, rows))

    def _coupling(self, a: Moments, features: Float32[np.ndarray, "N F"]) -> tuple[float, Float64[np.ndarray, "F R"]]:
        """tr (A B)^(1/2), and W with T = W W^T."""
        if not _is_thin(a) and self._factor.shape[1]:
            spectrum, axes = np.linalg.eigh(self._factor.T @ a.covariance @ self._factor)
            if spectrum[0] > WELL_CONDITIONED * spectrum[-1]:
                return float(np.sqrt(spectrum).sum()), (self._factor @ axes) * spectrum**-0.25
        if _is_thin(a) and len(features) == a.count:  # the features are a factor already
            cross = (np.asarray(features, dtype=np.float64) - a.mean) @ self._factor / np.sqrt(len(features) - 1)
        else:
            cross = _factor(a, "generated").T @ self._factor
        if not cross.size:
            return 0.0, np.zeros((len(a.mean), 0))
        _, singular, axes = np.linalg.svd(cross, full_matrices=False)
        is_kept = singular > max(cross.shape) * np.finfo(np.float64).eps * singular[0]
        return float(singular.sum()), (self._factor @ axes[is_kept].T) * singular[is_kept] ** -0.5

    def _distance(self, a: Moments, trace_root: float) -> float:
        shift, b = a.mean - self.reference.mean, self.reference
        return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root))

    def _require_fit(self, a: Moments) -> None:
        _checked(a, "generated")
        if len(a.mean) != len(self.reference.mean):
            raise ArraError(
                f"moments of {len(a.mean)} features beside a reference of {len(self.reference.mean)}; expected those "
                "of one network, take the reference of the same one"
            )


def frechet_infinity(reference: FrechetTo, features: Float32[np.ndarray, "N F"], *, seed: int = 0) -> Measured | None:
    """The distance that infinitely many pictures would have, with each picture's part in it; None below 8 F pictures.

    The distance of N pictures is too large by about a / N + b / N^2. Pictures are dealt at random into quarters; the
    distances of the quarters, of the halves that two of them make and of the whole, each averaged, leave neither term
    in 8/3 whole - 2 halves + 1/3 quarters. So it may fall below zero. A reference of few pictures, which is biased the
    same way, is taken as it is. One pass finds the moments of the quarters; the larger parts are merged from them.

    In simulations with Gaussians of 64 and 256 features, of level and falling spectra, near and far, about 1 % of the
    bias is left from 8 pictures per feature on, and intervals hold; a straight line in 1 / N through the same parts
    leaves 9 %, many standard errors. At 4 per feature 4 to 8 % are left, which intervals miss where the two
    distributions are near.

    Raises:
        ArraError: as `frechet`.
    Source: Chong and Forsyth 2020 (FID-infinity), who fit a straight line to nested subsets.
    """
    count, size = features.shape
    if count < LEAST_PER_FEATURE * size:
        return None
    quarter_of = np.random.default_rng(seed).permutation(np.arange(count) % 4)
    quarters = _sums_of_parts(features, quarter_of, 4)
    value, per_picture = 0.0, np.zeros(count)
    for num_parts, weight in EXTRAPOLATION.items():
        for part in range(num_parts):
            members = range(part * 4 // num_parts, (part + 1) * 4 // num_parts)
            rows = np.flatnonzero(np.isin(quarter_of, members))
            measured = reference._of_rows(_merged([quarters[member] for member in members]), features, rows)
            value += weight * measured.value / num_parts
            # A picture's weight among all is a num_parts-th of its weight in its part: the mean's division cancels.
            per_picture[rows] += weight * (measured.per_picture - measured.value)
    return Measured(value=value, per_picture=value + per_picture)


def _sums_of_parts(
    features: Float32[np.ndarray, "N F"], part_of: Int[np.ndarray, "N"], num_parts: int
) -> list[MomentSums]:
    sums = [MomentSums(features.shape[1]) for _ in range(num_parts)]
    for start in range(0, len(features), BLOCK_IMAGES):
        block, labels = features[start : start + BLOCK_IMAGES], part_of[start : start + BLOCK_IMAGES]
        for part, one in enumerate(sums):
            one.add(block[labels == part])
    return sums


def _merged(parts: Sequence[MomentSums]) -> Moments:
    whole = MomentSums(len(parts[0].mean))
    for part in parts:
        whole.merge(part)
    return whole.finish()


def _influences(
    a: Moments,
    b: Moments,
    weights: Float64[np.ndarray, "F R"],
    features: Float32[np.ndarray, "N F"],
    rows: Int[np.ndarray, "K"],
) -> Float64[np.ndarray, "K"]:
    """Of some rows of the features, which are pictures that `a` is of; they sum to zero."""
    unbias = 1.0 if a.count is None else a.count / (a.count - 1)
    shift = 2 * (a.mean - b.mean)
    found = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK_IMAGES):
        part = slice(start, start + BLOCK_IMAGES)
        x = features[rows[part]].astype(np.float64) - a.mean
        mapped = x @ weights
        found[part] = x @ shift + unbias * ((x * x).sum(1) - (mapped * mapped).sum(1))
    return found - found.mean()


def _is_thin(a: Moments) -> bool:
    """Whether so few pictures that the covariance is singular for sure."""
    return a.count is not None and a.count <= len(a.mean)


def _factor(a: Moments, name: str) -> Float64[np.ndarray, "F R"]:
    """K with K K^T the covariance, of as many columns as its rank if that is less than full."""
    if not _is_thin(a):
        try:
            return np.asarray(np.linalg.cholesky(a.covariance))
        except np.linalg.LinAlgError:
            pass  # singular: features that never vary, or a count that is not told
    spectrum, axes = np.linalg.eigh(a.covariance)
    if spectrum[0] < -NOT_POSITIVE * max(spectrum[-1], 0.0):
        raise ArraError(
            f"{name} covariance: an eigenvalue of {spectrum[0]:.3g} beside {spectrum[-1]:.3g}; a covariance has none "
            "below zero, expected statistics made with float64"
        )
    is_kept = spectrum > len(spectrum) * np.finfo(np.float64).eps * spectrum[-1]
    return axes[:, is_kept] * np.sqrt(spectrum[is_kept])


def _checked(a: Moments, name: str) -> Moments:
    if not (np.isfinite(a.mean).all() and np.isfinite(a.covariance).all()):
        raise ArraError(f"{name} moments: a value is not finite; did the training diverge, or is the file damaged?")
    return a
