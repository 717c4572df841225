"""Scores of generated pictures that need no distance between sets: Inception Score and MS-SSIM.

    logits of a space ------------> inception_score -----------> a row of the card
    pictures, and their real ones -> ms_ssim (of pairs), ms_ssim_within (variety of a set)

Legend: B batch, N pictures, P pairs, C classes, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int, UInt8
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.measured import Measured

ADM_SPLIT_IMAGES = 5000
"""Pictures of a split of the ADM evaluator."""

MS_SSIM_LEAST_SIZE = 176
"""Pixels per side: after four halvings torchmetrics wants the window of 11 pixels to fit (176 / 16 = 11)."""

_BLOCK_IMAGES = 1024
_PAIRS_AT_ONCE = 16
"""Pairs of 512 pixels in MS-SSIM at a time: some 0.5 GB."""

ReadPictures = Callable[[Sequence[int]], list[UInt8[np.ndarray, "H W 3"]]]
"""`PictureSet.read`."""


def inception_score(
    logits: Float32[np.ndarray, "N C"],
    *,
    split_size: int = ADM_SPLIT_IMAGES,
    num_splits: int | None = None,
    order: Int[np.ndarray, "N"] | None = None,
) -> Measured:
    """Mean over splits of exp(mean KL(p(class | picture) || p(class) of the split)).

    `logits` are Inception's 1,008 without bias. As in ADM's evaluator, splits are `split_size` pictures that follow
    each other, the last one shorter if need be, and each counts alike. With `num_splits` they are that many of equal
    size instead, as in torch-fidelity, which has 10 and shuffles: `order=np.random.RandomState(2020).permutation(N)`.
    The score depends on the order and grows with the size of splits, so say both with it.

    Raises:
        ArraError: fewer than two pictures, logits that are not finite, or more splits than pictures.

    Source: Salimans et al. 2016; openai/guided-diffusion, evaluations/evaluator.py.
    """
    num = len(logits)
    if num < 2:
        raise ArraError(f"Inception Score: {num} pictures, expected at least 2; evaluate on more")
    if num_splits is not None and not 1 <= num_splits <= num:
        raise ArraError(f"Inception Score: {num_splits} splits of {num} pictures; expected 1..{num}")
    if split_size < 1:
        raise ValueError(f"split_size is {split_size}, expected at least 1")
    rows = np.arange(num) if order is None else np.asarray(order)
    if len(rows) != num or not np.array_equal(np.sort(rows), np.arange(num)):
        raise ValueError(f"order is no permutation of {num} pictures")
    if num_splits is None:
        splits = [rows[start : start + split_size] for start in range(0, num, split_size)]
    else:
        splits = [rows[i * num // num_splits : (i + 1) * num // num_splits] for i in range(num_splits)]
    per_picture, scores = np.empty(num), []
    for split in splits:
        divergences = _divergences(logits, split)
        score = float(np.exp(divergences.mean()))
        scores.append(score)
        # A picture's weight also moves the split's mean, but the mean is where the sum of divergences is least.
        per_picture[split] = num / (len(splits) * len(split)) * score * (divergences - divergences.mean())
    value = float(np.mean(scores))
    return Measured(value=value, per_picture=value + per_picture)


def ms_ssim(images: UInt8[Tensor, "B H W 3"], others: UInt8[Tensor, "B H W 3"]) -> Float64[np.ndarray, "B"]:
    """Multi-scale structural similarity of each pair, in [0, 1]; 1 is the same picture.

    Five scales, a Gaussian window of 11 pixels, pixels in [0, 1] with a data range of 1. The scales' similarities are
    clipped at 0 before they are taken to a power. A grey picture in three equal channels scores as its one channel.

    Raises:
        ArraError: the sides are under 176 pixels, or torchmetrics is not there.

    Source: Wang et al. 2003, by torchmetrics.
    """
    height, width = images.shape[1:3]
    if min(height, width) < MS_SSIM_LEAST_SIZE:
        raise ArraError(
            f"MS-SSIM: pictures of {height} x {width} pixels, expected at least {MS_SSIM_LEAST_SIZE} per side (five "
            "scales with a window of 11); evaluate with a larger --image-size or leave MS-SSIM out"
        )
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    except ImportError as error:
        raise ArraError(
            f"MS-SSIM needs torchmetrics ({error}); pip install 'arra[metrics]' -c constraints.txt"
        ) from error
    one, other = (pictures.permute(0, 3, 1, 2).float() / 255 for pictures in (images, others))
    with torch.no_grad():
        similarities = multiscale_structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    return similarities.double().cpu().numpy().reshape(len(images))


def ms_ssim_within(read: ReadPictures, *, num_images: int, num_pairs: int = 1000, seed: int = 0) -> Measured:
    """Mean MS-SSIM of random pairs of a set: lower is more varied.

    No picture is in two pairs, so pairs are independent and the interval is right; there are at most half as many
    pairs as pictures. The values are of pairs, in the order of drawing.

    Raises:
        ArraError: as `ms_ssim`, a pair is of two sizes, or there are fewer than 2 pictures.
    """
    if num_images < 2:
        raise ArraError(f"MS-SSIM within a set: {num_images} pictures, expected at least 2; evaluate on more")
    drawn = np.random.default_rng(seed).permutation(num_images)
    count = min(num_pairs, num_images // 2)
    return _of_pairs(read, drawn[:count], drawn[count : 2 * count])


def _divergences(logits: np.ndarray, split: Int[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
    """KL of each picture's class distribution from the split's mean, in two passes over the logits."""

    def blocks() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(split), _BLOCK_IMAGES):
            rows = slice(start, min(start + _BLOCK_IMAGES, len(split)))
            block = np.asarray(logits[split[rows]], dtype=np.float64)
            if not np.isfinite(block).all():
                row = int(split[rows][(~np.isfinite(block)).any(1).argmax()])
                raise ArraError(f"Inception Score: picture {row} has a logit that is not finite; encode it again")
            yield rows, _log_softmax(block)

    total, of_own = np.zeros(logits.shape[1]), np.empty(len(split))
    for rows, logs in blocks():
        shares = np.exp(logs)
        total += shares.sum(0)
        of_own[rows] = (shares * logs).sum(1)
    # A class that no picture could be has a share of 0 everywhere, and adds 0 whatever its logarithm.
    mean_logs = np.log(np.maximum(total / len(split), np.finfo(np.float64).tiny))
    divergences = np.empty(len(split))
    for rows, logs in blocks():
        divergences[rows] = of_own[rows] - np.exp(logs) @ mean_logs
    return divergences


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _of_pairs(read: ReadPictures, rows: Int[np.ndarray, "P"], others: Int[np.ndarray, "P"]) -> Measured:
    values = np.empty(len(rows))
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        some = slice(start, min(start + _PAIRS_AT_ONCE, len(rows)))
        pairs = list(zip(read(rows[some].tolist()), read(others[some].tolist()), strict=True))
        for place, (one, other) in enumerate(pairs, start):
            if one.shape != other.shape:
                raise ArraError(
                    f"MS-SSIM: picture {rows[place]} has {one.shape[0]} x {one.shape[1]} pixels and picture "
                    f"{others[place]}, which it is compared with, {other.shape[0]} x {other.shape[1]}; evaluate with "
                    "one --image-size"
                )
        shapes = [one.shape for one, _ in pairs]
        for shape in dict.fromkeys(shapes):  # pairs of one size go together
            at = [place for place, its in enumerate(shapes) if its == shape]
            stacks = (torch.from_numpy(np.stack([pairs[place][side] for place in at])) for side in (0, 1))
            values[start + np.array(at)] = ms_ssim(*stacks)
    return Measured(value=float(values.mean()), per_picture=values)
