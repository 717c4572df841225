"""Whether the parts of painted pictures belong together: attributes of drawn shapes, codes far apart, shuffled patches.

Place in the pipeline: `arra evaluate` of a run on `arra.data.shapes` measures these beside its other numbers. Three
measures that need the whole picture:

- `accuracy.*`: `arra.evaluate.drawings`, exact;
- `token_information.dD`: bits that codes D rows or columns apart tell of each other beyond what their places tell;
- `shuffle_auroc`: how surely a probe that learned on real pictures tells painted ones from their own patches shuffled:
  a picture without order over long distances looks like its shuffled self.

A `Standard` holds what is fitted to held-out pictures, so that all models are measured alike, and its own values are
what a perfect model over the same tokenizer would reach.

Legend: N pictures, M shuffled ones, h w code grid, H W pixels, F feature, K codes told apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int, UInt8

from arra.data.shapes import find_request
from arra.errors import ArraError
from arra.evaluate.drawings import attribute_accuracy
from arra.evaluate.measured import Measured

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 pictures (N, H, W, 3) to features (N, F)."""

MEASURES = frozenset({"accuracy", "token_information", "shuffle_auroc"})
"""What metrics are called before the dot."""
NUM_KEPT = 32
"""Codes told apart by `token_information`, all rarer ones being one: with more, some hundred pictures say little."""
NUM_SHIFTS = 8
"""Pairings with other pictures behind the baseline of `token_information`."""
PATCHES = 4
"""Patches per side that are shuffled."""
RIDGES = 10.0 ** np.arange(-3, 5)
"""Regularisations of the probe to choose from, as shares of the features' mean square."""


@dataclass(frozen=True, kw_only=True)
class Standard:
    """What painted pictures of some captions are held against."""

    kept: Int[np.ndarray, "K"]
    """The codes that `token_information` tells apart."""
    probe: "ShuffleProbe"
    ceiling: dict[str, Measured]
    """By metric: what held-out pictures reach that went through the tokenizer."""
    seed: int


def is_drawn(captions: Sequence[str]) -> bool:
    """Whether all captions are of the drawn shapes, so that their pictures can be measured here."""
    return bool(captions) and all(find_request(caption) is not None for caption in captions)


def open_standard(
    images: UInt8[np.ndarray, "N H W 3"],
    codes: Int[np.ndarray, "N h w"],
    *,
    captions: Sequence[str],
    encode: Encode,
    seed: int = 0,
) -> Standard:
    """The standard that held-out pictures set; `images` are their codes decoded.

    The probe learns on every other picture, and its ceiling is of the rest.

    Raises:
        ArraError: fewer than 8 pictures, or a caption that is not of the drawn shapes.
    """
    if len(images) < 8:
        raise ArraError(f"coherence of {len(images)} pictures: expected 8 or more; evaluate more (evaluate.max_images)")
    kept = frequent_codes(codes)
    shuffled = shuffle_patches(images, seed=seed)
    real_features, shuffled_features = encode(images), encode(shuffled)
    probe = fit_shuffle_probe(real_features[::2], shuffled_features[::2])
    ceiling = {
        **_accuracies(images, captions),
        **_informations(codes, kept),
        "shuffle_auroc": shuffle_detectability(
            probe, features=real_features[1::2], shuffled_features=shuffled_features[1::2]
        ),
    }
    return Standard(kept=kept, probe=probe, ceiling=ceiling, seed=seed)


def measure_coherence(
    images: UInt8[np.ndarray, "N H W 3"],
    codes: Int[np.ndarray, "N h w"],
    *,
    captions: Sequence[str],
    encode: Encode,
    standard: Standard,
) -> dict[str, Measured]:
    """All measures of painted pictures by metric; per-picture values are in the pictures' order.

    Raises:
        ArraError: as `attribute_accuracy`.
    """
    shuffled = shuffle_patches(images, seed=standard.seed)
    auroc = shuffle_detectability(standard.probe, features=encode(images), shuffled_features=encode(shuffled))
    return {
        **_accuracies(images, captions),
        **_informations(codes, standard.kept),
        "shuffle_auroc": auroc,
    }


def _accuracies(images: np.ndarray, captions: Sequence[str]) -> dict[str, Measured]:
    return {f"accuracy.{name}": found for name, found in attribute_accuracy(list(images), captions).items()}


def _informations(codes: np.ndarray, kept: np.ndarray) -> dict[str, Measured]:
    """At distances 1, 2, 4, ... that fit into the grid."""
    distances = [2**power for power in range(min(codes.shape[1:]).bit_length()) if 2**power < min(codes.shape[1:])]
    return {f"token_information.d{d}": token_information(codes, kept=kept, distance=d) for d in distances}


def frequent_codes(codes: Int[np.ndarray, "N h w"], *, num_kept: int = NUM_KEPT) -> Int[np.ndarray, "K"]:
    """The most frequent codes, at most `num_kept - 1` of them; for `token_information` all others are one more."""
    found, counts = np.unique(codes, return_counts=True)
    return found[np.argsort(-counts, kind="stable")][: num_kept - 1]


def token_information(
    codes: Int[np.ndarray, "N h w"], *, kept: Int[np.ndarray, "K"], distance: int, num_shifts: int = NUM_SHIFTS
) -> Measured:
    """Mutual information in bits of two codes `distance` apart, the mean over rows and columns.

    Codes outside `kept` count as one, so this is a lower bound. What is measured over pairs of one picture, minus what
    the same places of two different pictures seem to share: that is zero but for chance (the bias of few pairs) and
    for what places alone tell (borders are empty). Some of the true information is subtracted with the bias, so
    compare at equal numbers of pictures. Neighbours in the order of pictures must be unrelated.

    Raises:
        ArraError: fewer than two pictures, or a distance that does not fit into the grid.
    """
    num, height, width = codes.shape
    if num < 2 or not 0 < distance < min(height, width):
        raise ArraError(
            f"codes {tuple(codes.shape)} at distance {distance}: expected two pictures or more and a distance from 1 "
            f"to {min(height, width) - 1}"
        )
    order = np.sort(kept)
    places = np.searchsorted(order, codes).clip(max=max(len(order) - 1, 0))
    classes = np.where(order[places] == codes, places, len(order)) if len(order) else np.zeros_like(codes)
    size = len(order) + 1
    found = []
    for axis in (1, 2):
        first, second = (
            np.take(classes, np.arange(start, classes.shape[axis] - distance + start), axis=axis).reshape(num, -1)
            for start in (0, distance)
        )
        found.append(_excess_information(first, second, size=size, num_shifts=min(num_shifts, num - 1)))
    per_picture = (found[0] + found[1]) / 2
    return Measured(value=float(per_picture.mean()), per_picture=per_picture)


def _excess_information(
    first: Int[np.ndarray, "N pairs"], second: Int[np.ndarray, "N pairs"], *, size: int, num_shifts: int
) -> Float64[np.ndarray, "N"]:
    """Information of pairs beyond that of pairs across pictures, with every picture's influence."""
    own = _information_shares(first, second, size=size)
    per_picture = own.copy()
    for shift in range(1, num_shifts + 1):
        across = _information_shares(first, np.roll(second, -shift, 0), size=size)
        # a picture stands in two pairings, as the first of one and as the second of another
        influence = across + np.roll(across, shift) - 2 * across.mean()
        per_picture -= (across.mean() + influence) / num_shifts
    return per_picture


def _information_shares(
    first: Int[np.ndarray, "N pairs"], second: Int[np.ndarray, "N pairs"], *, size: int
) -> Float64[np.ndarray, "N"]:
    """Mean over a picture's pairs of log2 p(a, b) / (p(a) p(b)); the mean over pictures is the plug-in information."""
    pairs = first * size + second
    joint = np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size) / pairs.size
    expected = joint.sum(1)[:, None] * joint.sum(0)[None]
    ratio = np.zeros_like(joint)
    np.log2(np.divide(joint, expected, where=joint > 0, out=np.ones_like(joint)), where=joint > 0, out=ratio)
    return ratio.ravel()[pairs].mean(1)


def shuffle_patches(
    images: UInt8[np.ndarray, "N H W 3"], *, patches: int = PATCHES, seed: int = 0
) -> UInt8[np.ndarray, "N H W 3"]:
    """The pictures with their `patches` x `patches` patches in another order, drawn for each.

    Raises:
        ArraError: the sides are no multiples of `patches`.
    """
    num, height, width, _ = images.shape
    if height % patches or width % patches:
        raise ArraError(f"pictures of {width} x {height} pixels do not part into {patches} x {patches} patches")
    generator = np.random.default_rng(seed)
    down, across = height // patches, width // patches
    parts = images.reshape(num, patches, down, patches, across, 3).swapaxes(2, 3).reshape(num, -1, down, across, 3)
    order = np.stack([generator.permutation(patches * patches) for _ in range(num)])
    parts = parts[np.arange(num)[:, None], order]
    parts = parts.reshape(num, patches, patches, down, across, 3).swapaxes(2, 3)
    return parts.reshape(num, height, width, 3)


@dataclass(frozen=True, kw_only=True)
class ShuffleProbe:
    """A linear probe that tells pictures from their patches shuffled; higher scores are whole pictures."""

    center: Float64[np.ndarray, "F"]
    weights: Float64[np.ndarray, "F"]

    def score(self, features: Float[np.ndarray, "N F"]) -> Float64[np.ndarray, "N"]:
        """How whole each picture looks, around 1 for whole ones and -1 for shuffled ones."""
        return (features.astype(np.float64) - self.center) @ self.weights


def fit_shuffle_probe(real: Float[np.ndarray, "N F"], shuffled: Float[np.ndarray, "M F"]) -> ShuffleProbe:
    """Ridge regression of 1 (whole) and -1 (shuffled), with the ridge of the least leave-one-out error.

    Raises:
        ArraError: a feature is not finite.
    """
    features = np.concatenate([real, shuffled]).astype(np.float64)
    if not np.isfinite(features).all():
        raise ArraError("features for the shuffle probe are not finite; is the encoder's precision too low?")
    targets = np.concatenate([np.ones(len(real)), -np.ones(len(shuffled))])
    center = features.mean(0)
    left, sizes, right = np.linalg.svd(features - center, full_matrices=False)
    squares, along = sizes**2, left.T @ targets
    best_error, best = np.inf, np.zeros(len(sizes))
    for ridge in RIDGES * max(squares.mean(), np.finfo(np.float64).tiny):
        shrunk = squares / (squares + ridge)
        leverage = (left**2) @ shrunk + 1 / len(targets)  # the last is the fitted mean's
        error = np.mean(((targets - targets.mean() - left @ (shrunk * along)) / (1 - leverage).clip(1e-9)) ** 2)
        if error < best_error:
            best_error, best = error, sizes / (squares + ridge) * along
    return ShuffleProbe(center=center, weights=right.T @ best)


def shuffle_detectability(
    probe: ShuffleProbe, *, features: Float[np.ndarray, "N F"], shuffled_features: Float[np.ndarray, "N F"]
) -> Measured:
    """AUROC of the probe between pictures and the same pictures shuffled: 0.5 if their order is no more than chance."""
    whole, shuffled = probe.score(features), probe.score(shuffled_features)
    above = _share_below(whole, shuffled)
    below = 1 - _share_below(shuffled, whole)
    auroc = float(above.mean())
    # both of a picture's scores move with its weight: the influences of its two roles add up
    return Measured(value=auroc, per_picture=above + below - auroc)


def _share_below(scores: Float64[np.ndarray, "N"], others: Float64[np.ndarray, "M"]) -> Float64[np.ndarray, "N"]:
    """Of each score, the share of the others that are lower; equal ones count half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / (2 * len(ordered))
