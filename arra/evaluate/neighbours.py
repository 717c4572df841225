"""What lies next to what in a space: precision, recall, density, coverage, and copies of training pictures.

    Collected.features of two or three sets --> prdc, nearest, copied --> rows of the card, pairs to look at

Memory is bounded by `block_images`, which changes no value, because every decision is exact. Scalar products are
float32, and their worst rounding error is known; where it could change what is nearer, the distance is taken again as
a float64 sum of squared differences. So equal pictures are at distance zero, and ties are ties.

Legend: N generated pictures, M pictures of the reference, T training pictures, Q queries, X and Y pictures of either
side of a pair, F feature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from arra.errors import ArraError
from arra.evaluate.measured import Measured
from arra.evaluate.sets import Blocks

BLOCK_IMAGES = 2048
"""Pictures on each side of a block of distances: with 2,048 features some 100 MB in all."""

ADM_NEIGHBOURS = 3
"""k of precision and recall in the ADM evaluator."""

COPY_LEVEL = 0.01
"""Share of pictures that may look copied where nothing is."""

_EXACT_NUMBERS = 1 << 20
"""Numbers of a chunk of exact differences: 8 MB, some of them in the processor's cache."""

_DIGEST_BYTES = 16
"""Of a vector, in place of it: equal ones are the same, and others never in practice."""

_MOST_OPEN = 0.002
"""Share of a block that float32 may leave open before float64 products are cheaper than exact distances."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Fidelity (precision, density) as means over generated pictures, variety (recall, coverage) over the reference.

    Intervals take the other set as it is: they say nothing of what its pictures being others would change.
    """

    precision: Measured
    """Share of generated pictures inside the ball of some picture of the reference."""
    recall: Measured
    """Share of the reference inside the ball of some generated picture."""
    density: Measured
    """Number of balls of the reference that hold a generated picture, / k; can exceed 1."""
    coverage: Measured
    """Share of balls of the reference with a generated picture in them."""
    k: int


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """For each of Q pictures the nearest one of another set."""

    distances: Float64[np.ndarray, "Q"] = field(repr=False)
    rows: Int64[np.ndarray, "Q"] = field(repr=False)
    """Which picture it is; the first of equally near ones."""


@dataclass(frozen=True, kw_only=True)
class Copying:
    """Generated pictures nearer to the training set than unseen real pictures are."""

    copied: Measured
    """Share of generated pictures called copies."""
    expected: float
    """The share that a generator of new pictures has on average, at most; more than that is copying."""
    threshold: float
    """A picture nearer to its nearest training picture than this is called a copy."""
    nearest: Nearest
    """Of every generated picture, in their order."""
    nearest_held_out: Nearest
    """Of every held-out real picture."""

    def closest(self, num_pairs: int) -> Int64[np.ndarray, "P 2"]:
        """Generated and training picture of the `num_pairs` nearest pairs, nearest first: what a page should show."""
        order = np.argsort(self.nearest.distances, kind="stable")[:num_pairs]
        return np.stack([order, self.nearest.rows[order]], axis=1).astype(np.int64)


def prdc(
    generated: Blocks,
    reference: Float32[np.ndarray, "M F"],
    *,
    k: int = ADM_NEIGHBOURS,
    block_images: int = BLOCK_IMAGES,
) -> Neighbours:
    """Precision, recall, density and coverage by Euclidean balls that reach to the k-th other picture of the own set.

    ADM's evaluator has k = 3 for precision and recall, Naeem et al. k = 5 for density and coverage. A picture on the
    rim is inside for precision and recall and outside for density and coverage, as in the code of their authors. All
    four depend on N and M: compare at equal numbers.

    Raises:
        ArraError: a set has no k + 1 pictures, or a feature is not finite.

    Source: Kynkaanniemi et al. 2019 (precision, recall), whose code and ADM's compare float16 distances: they differ
    in the third digit; torch-fidelity's prc, float32, agrees. Naeem et al. 2020 (density, coverage).
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    for features, name in ((generated, "generated"), (reference, "reference")):
        if len(features) <= k:
            raise ArraError(
                f"{name} features: {len(features)} pictures, expected at least k + 1 = {k + 1}; evaluate on more"
            )
    fake_radii = _squared_radii(generated, name="generated", k=k, block_images=block_images)
    real_radii = _squared_radii(reference, name="reference", k=k, block_images=block_images)
    fakes, reals = _sides(generated, reference, names=("generated", "reference"), block_images=block_images)
    is_precise, is_recalled = np.zeros(len(generated), dtype=bool), np.zeros(len(reference), dtype=bool)
    num_balls, is_covered = np.zeros(len(generated)), np.zeros(len(reference), dtype=bool)
    for rows, columns in _block_pairs(fakes, reals, block_images=block_images):
        (in_real, inside_real), (in_fake, _) = _compare(
            fakes, reals, rows, columns, limits=(real_radii[columns][None, :], fake_radii[rows][:, None])
        )
        is_precise[rows] |= in_real.any(1)
        is_recalled[columns] |= in_fake.any(0)
        num_balls[rows] += inside_real.sum(1)
        is_covered[columns] |= inside_real.any(0)
    return Neighbours(
        precision=_mean(is_precise),
        recall=_mean(is_recalled, is_reference=True),
        density=_mean(num_balls / k),
        coverage=_mean(is_covered, is_reference=True),
        k=k,
    )


def nearest(
    queries: Float32[np.ndarray, "Q F"],
    training: Float32[np.ndarray, "T F"],
    *,
    is_cosine: bool = True,
    block_images: int = BLOCK_IMAGES,
) -> Nearest:
    """The nearest training picture of each query, by the distance 1 - cosine in [0, 2], or else by the Euclidean one.

    Raises:
        ArraError: there is no training picture, or features are not finite, or all zero under a cosine.
    """
    if len(training) == 0:
        raise ArraError("training features: 0 pictures, expected at least 1; prepare the training split")
    asked, known = _sides(queries, training, names=("query", "training"), block_images=block_images, is_unit=is_cosine)
    squared, rows = _neighbours(asked, known, k=1, block_images=block_images)
    # Vectors of length one are |x - y|^2 = 2 - 2 cos apart.
    distances = squared[:, 0] / 2 if is_cosine else np.sqrt(squared[:, 0])
    return Nearest(distances=distances, rows=rows[:, 0])


def copied(
    generated: Blocks,
    training: Float32[np.ndarray, "T F"],
    *,
    held_out: Float32[np.ndarray, "M F"],
    level: float = COPY_LEVEL,
    is_cosine: bool = True,
    block_images: int = BLOCK_IMAGES,
) -> Copying:
    """The share of generated pictures nearer to the training set than all but a share `level` of held-out pictures.

    The threshold is the floor(level * (M + 1))-th smallest of the M held-out distances. If generated pictures were
    drawn as the held-out ones are, the chance of any one to lie below it is at most `level`, whatever the space and the
    distribution (the argument of conformal p-values). So the share has a known meaning: `level` is what copying nothing
    gives, and a few copies among thousands of new pictures show, which a comparison of the two distributions as wholes
    (the C_T test of Meehan et al. 2020) averages away. Distances relative to the training picture's own neighbourhood
    (authenticity, Alaa et al. 2022; the ratios of Yoon et al. 2023) are blind to the pictures that are copied most:
    those that stand in the training set several times.

    What it cannot tell: plain pictures of a dense region are near to many, so a bland generator has a large share too.
    Look at the `closest` pairs before saying copy. Held-out pictures must be unseen in training, of other patients too.
    The interval takes training and held-out pictures as they are.

    Raises:
        ArraError: too few held-out pictures for the level, too many that training has seen, or as `nearest`.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a share between 0 and 1")
    if len(generated) == 0:
        raise ArraError("generated features: 0 pictures, expected at least 1; generate some first")
    rank = int(level * (len(held_out) + 1) + 1e-9)  # 0.01 * 100 may be a rounding below 1
    if rank < 1:
        raise ArraError(
            f"held-out features: {len(held_out)} pictures cannot tell a share of {level:g}, expected at least "
            f"{int(np.ceil(1 / level - 1e-9)) - 1}; hold out more or leave the copying check out"
        )
    of_generated = nearest(generated, training, is_cosine=is_cosine, block_images=block_images)
    of_held_out = nearest(held_out, training, is_cosine=is_cosine, block_images=block_images)
    threshold = float(np.sort(of_held_out.distances)[rank - 1])
    if threshold == 0:
        seen = np.flatnonzero(of_held_out.distances == 0)
        raise ArraError(
            f"held-out features: {len(seen)} of {len(held_out)} pictures (the first is {seen[0]}) are in the training "
            "set themselves, so nothing can be nearer; hold out pictures that training has not seen"
        )
    return Copying(
        copied=_mean(of_generated.distances < threshold),
        expected=rank / (len(held_out) + 1),
        threshold=threshold,
        nearest=of_generated,
        nearest_held_out=of_held_out,
    )


def _mean(values: np.ndarray, *, is_reference: bool = False) -> Measured:
    numbers = values.astype(np.float64)
    return Measured(value=float(numbers.mean()), per_picture=numbers, of="reference" if is_reference else "generated")


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One set, read as vectors about a center (a shift changes no distance but makes rounding errors small)."""

    features: np.ndarray
    center: np.ndarray | None
    is_unit: bool
    norms: Float64[np.ndarray, "X"]
    """Squared lengths of the vectors about the center."""
    alike: Int64[np.ndarray, "X"]
    """The first picture with the very same features: a collapsed model has thousands."""

    @classmethod
    def of(
        cls, features: np.ndarray, *, name: str, center: np.ndarray | None, block_images: int, is_unit: bool = False
    ) -> "_Side":
        norms, alike = np.empty(len(features)), np.empty(len(features), dtype=np.int64)
        first: dict[bytes, int] = {}
        side = cls(features=features, center=center, is_unit=is_unit, norms=norms, alike=alike)
        for start in range(0, len(features), block_images):
            rows = slice(start, min(start + block_images, len(features)))
            block = np.asarray(features[rows])
            if not np.isfinite(block).all():
                row = start + int((~np.isfinite(block)).any(1).argmax())
                raise ArraError(
                    f"{name} features: picture {row} has a value that is not finite; did the training diverge?"
                )
            if is_unit and not block.any(1).all():
                row = start + int((~block.any(1)).argmax())
                raise ArraError(f"{name} features: picture {row} is a zero vector, which has no direction")
            for row, vector in enumerate(block, start):
                alike[row] = first.setdefault(blake2b(vector.tobytes(), digest_size=_DIGEST_BYTES).digest(), row)
            norms[rows] = (side.vectors(rows) ** 2).sum(1)
        return side

    def __len__(self) -> int:
        return len(self.features)

    def exact(self, rows: slice | np.ndarray) -> Float64[np.ndarray, "X F"]:
        """The vectors as given, or of length one."""
        block = np.asarray(self.features[rows], dtype=np.float64)
        return block / np.sqrt((block * block).sum(1, keepdims=True)) if self.is_unit else block

    def vectors(self, rows: slice) -> Float64[np.ndarray, "X F"]:
        """The vectors about the center."""
        block = self.exact(rows)
        return block if self.center is None else block - self.center


def _sides(
    first: np.ndarray, second: np.ndarray, *, names: tuple[str, str], block_images: int, is_unit: bool = False
) -> tuple[_Side, _Side]:
    """Two sets about the mean of the second, checked."""
    center = None if is_unit else _center(second)
    one, other = (
        _Side.of(features, name=name, center=center, block_images=block_images, is_unit=is_unit)
        for features, name in zip((first, second), names, strict=True)
    )
    return one, other


def _squared_radii(features: np.ndarray, *, name: str, k: int, block_images: int) -> Float64[np.ndarray, "X"]:
    """How far each picture's k-th other picture is, squared."""
    side = _Side.of(features, name=name, center=_center(features), block_images=block_images)
    return _neighbours(side, side, k=k, block_images=block_images, is_same=True)[0][:, -1]


def _center(features: np.ndarray) -> Float64[np.ndarray, "F"]:
    """About the mean: of a thousand pictures, which is near enough."""
    some = features[:: max(1, len(features) // 1000)]
    return np.asarray(some, dtype=np.float64).mean(0)


def _block_pairs(x: _Side, y: _Side, *, block_images: int) -> Iterator[tuple[slice, slice]]:
    """Yields all pairs of blocks of rows of `x` and of `y`."""
    for start in range(0, len(x), block_images):
        for first in range(0, len(y), block_images):
            yield (
                slice(start, min(start + block_images, len(x))),
                slice(first, min(first + block_images, len(y))),
            )


def _bounds(
    x: _Side, y: _Side, rows: slice, columns: slice, *, dtype: type[np.floating]
) -> tuple[Float[np.ndarray, "X Y"], Float[np.ndarray, "X Y"]]:
    """Bounds below and above of the squared distances of a block, from scalar products in `dtype`.

    A scalar product of F numbers is off by at most F u |x| |y| in whatever order it is added up, u being half an ulp of
    1. Rounding the vectors adds 4 u (|x|^2 + |y|^2), the sums here and in `_exact_squared` less than 28 u of it.
    """
    unit = (x.features.shape[1] + 32) * float(np.finfo(dtype).eps) / 2
    scale = x.norms[rows].astype(dtype)[:, None] + y.norms[columns].astype(dtype)[None, :]
    upper = x.vectors(rows).astype(dtype) @ y.vectors(columns).astype(dtype).T
    upper *= -2
    upper += scale
    scale *= unit
    lower = upper - scale
    upper += scale
    return lower, upper


def _exact_squared(
    x: _Side, y: _Side, rows: Int64[np.ndarray, "P"], columns: Int64[np.ndarray, "P"]
) -> Float64[np.ndarray, "P"]:
    """Squared distances of pairs as float64 sums of squared differences; equal pairs of vectors are computed once."""
    pairs = x.alike[rows] * len(y) + y.alike[columns]
    distinct, where = np.unique(pairs, return_inverse=True)
    squared = np.empty(len(distinct))
    chunk = max(1, _EXACT_NUMBERS // x.features.shape[1])
    for start in range(0, len(distinct), chunk):
        some = distinct[start : start + chunk]
        gaps = x.exact(some // len(y)) - y.exact(some % len(y))
        squared[start : start + chunk] = (gaps * gaps).sum(1)
    return squared[where]


def _compare(
    x: _Side, y: _Side, rows: slice, columns: slice, *, limits: Sequence[Float64[np.ndarray, "..."]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of the limits which pairs of a block are at most, and which less than, its root apart: (X, Y) masks."""
    bounds = _bounds(x, y, rows, columns, dtype=np.float32)
    masks = []
    for limit in limits:
        lower, upper = bounds
        is_less = upper < limit
        is_open = (lower <= limit) & ~is_less
        if is_open.mean() > _MOST_OPEN:
            lower, upper = _bounds(x, y, rows, columns, dtype=np.float64)
            is_less = upper < limit
            is_open = (lower <= limit) & ~is_less
        is_at_most = is_less.copy()
        at = np.nonzero(is_open)
        exact, exact_limit = (
            _exact_squared(x, y, at[0] + rows.start, at[1] + columns.start),
            np.broadcast_to(limit, is_less.shape)[at],
        )
        is_less[at], is_at_most[at] = exact < exact_limit, exact <= exact_limit
        masks.append((is_at_most, is_less))
    return masks


def _neighbours(
    x: _Side, y: _Side, *, k: int, block_images: int, is_same: bool = False
) -> tuple[Float64[np.ndarray, "X K"], Int64[np.ndarray, "X K"]]:
    """Squared distances, ascending, and rows of the k nearest of `y`; a picture is not its own where the sets are one.

    Of each block, pictures stay that could be among the k, given the bounds; the exact distances of these decide.
    """
    best = np.full((len(x), k), np.inf)
    best_rows = np.full((len(x), k), len(y), dtype=np.int64)
    for rows, columns in _block_pairs(x, y, block_images=block_images):
        at, others = _candidates(x, y, rows, columns, limit=best[rows, -1], k=k, is_same=is_same)
        num = rows.stop - rows.start
        row = np.concatenate([np.repeat(np.arange(num), k), at])
        squared = np.concatenate([best[rows].ravel(), _exact_squared(x, y, at + rows.start, others)])
        column = np.concatenate([best_rows[rows].ravel(), others])
        order = np.lexsort((column, squared, row))  # by row, then distance; of equally near ones the first
        taken = order[np.searchsorted(row[order], np.arange(num))[:, None] + np.arange(k)]  # (X, K)
        best[rows], best_rows[rows] = squared[taken], column[taken]
    return best, best_rows


def _candidates(
    x: _Side, y: _Side, rows: slice, columns: slice, *, limit: Float64[np.ndarray, "X"], k: int, is_same: bool
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"]]:
    """Pairs of a block that could be among the k nearest and within `limit`: row in the block, and row of `y`."""
    num, is_candidate = columns.stop - columns.start, np.zeros(0, dtype=bool)
    for dtype in (np.float32, np.float64):
        lower, upper = _bounds(x, y, rows, columns, dtype=dtype)
        if is_same:
            own = np.arange(max(rows.start, columns.start), min(rows.stop, columns.stop))
            lower[own - rows.start, own - columns.start] = upper[own - rows.start, own - columns.start] = np.inf
        farthest = np.partition(upper, k - 1, axis=1)[:, k - 1] if num >= k else np.inf
        is_candidate = (lower <= np.minimum(limit, farthest)[:, None]) & (lower < np.inf)
        if is_candidate.sum() <= 4 * k * len(lower) + _MOST_OPEN * lower.size:
            break
    at = np.nonzero(is_candidate)
    return at[0], at[1] + columns.start
