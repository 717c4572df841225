"""Which pictures of a set are the same: byte for byte, or to the eye. `arra data check` asks it before training does.

Beside the pass over the pictures: it takes digests and 32-pixel copies, holds 40 bytes a picture in memory and the
copies in a scratch file. Near copies share one of four bands of a 64-bit perceptual hash, so nothing is compared with
everything; the copies themselves have the last word. Re-encoded and resized pictures are found; cropped, mirrored or
recoloured ones are other pictures.

Legend: N pictures, P pairs.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64

from arra.data.loading import DIGEST_BYTES
from arra.data.openmoji import SAME_PICTURE_RMS

SIDE = 32
"""Pixels per side of the small copies."""
VIEW_SIDE = 128
"""Pixels per side of the centre square that a small copy is the mean of: cut at 32 pixels right away, another size of
the same picture would lie half a pixel beside it."""
LOW = 8
"""Frequencies per axis that the hash is made of."""
FLAT = 8.0
"""Coefficients below this (orthonormal transform of 0..255) say nothing: JPEG's noise is 2 to 3 of it."""
NUM_BANDS = 4
MAX_BITS = 10
"""Bits in which hashes of near copies may differ; up to three always leave one of the four bands untouched."""
MAX_NEIGHBOURS = 64
"""Pictures of one band and about one brightness that each is compared with: bounds the work on sets of look-alikes."""
PAIRS_AT_A_TIME = 1024


def small_copy(square: UInt8[np.ndarray, "128 128 3"]) -> UInt8[np.ndarray, "32 32 3"]:
    """The small copy of a centre square."""
    parts = square.reshape(SIDE, VIEW_SIDE // SIDE, SIDE, VIEW_SIDE // SIDE, 3)
    return np.rint(parts.mean((1, 3))).astype(np.uint8)


def perceptual_hashes(small: UInt8[np.ndarray, "N 32 32 3"]) -> UInt64[np.ndarray, " N"]:
    """64 bits of every picture that hardly change when it is re-encoded or resized: which low frequencies it has.

    A bit says that a coefficient of the cosine transform is clearly positive. Unlike a comparison with the median, as
    in the usual pHash, this keeps the many zeros of drawings and blank pictures from turning with the noise.
    """
    places = np.arange(SIDE) + 0.5
    waves = np.cos(np.pi / SIDE * np.outer(np.arange(LOW), places)) * np.sqrt(2 / SIDE)
    waves[0] *= np.sqrt(0.5)
    grey = small @ np.array([0.299, 0.587, 0.114])
    low = waves @ grey @ waves.T  # (N, 8, 8)
    return np.packbits((low > FLAT).reshape(len(small), -1), axis=1).view(np.uint64)[:, 0]


class Fingerprints:
    """What is remembered of every picture of a set while it is read once."""

    def __init__(self, count: int, scratch: Path) -> None:
        self.read = np.zeros(count, dtype=bool)
        """Which pictures could be read."""
        self.digests = np.zeros((count, DIGEST_BYTES), dtype=np.uint8)
        self.hashes = np.zeros(count, dtype=np.uint64)
        self.means = np.zeros(count, dtype=np.float64)
        """Brightness in 0..1."""
        self.scratch = scratch
        with scratch.open("wb") as file:
            file.truncate(count * SIDE * SIDE * 3)

    def add(self, rows: Int[np.ndarray, " B"], digests: Sequence[bytes], small: UInt8[np.ndarray, "B 32 32 3"]) -> None:
        """Nothing; the pictures of these rows are remembered."""
        if not len(rows):
            return
        self.read[rows] = True
        self.digests[rows] = np.frombuffer(b"".join(digests), np.uint8).reshape(len(rows), DIGEST_BYTES)
        self.hashes[rows] = perceptual_hashes(small)
        self.means[rows] = small.mean((1, 2, 3)) / 255
        with self.scratch.open("r+b") as file:  # not mapped, which would fill the resident memory
            for row, picture in zip(rows.tolist(), small, strict=True):
                file.seek(row * picture.nbytes)
                file.write(picture.tobytes())

    def small(self, rows: Int[np.ndarray, " B"]) -> UInt8[np.ndarray, "B 32 32 3"]:
        """The small copies of some pictures."""
        size = SIDE * SIDE * 3
        with self.scratch.open("rb") as file:
            content = b"".join(os.pread(file.fileno(), size, row * size) for row in rows.tolist())
        return np.frombuffer(content, np.uint8).reshape(len(rows), SIDE, SIDE, 3)


@dataclass(frozen=True)
class Copies:
    """Numbers that same pictures share; -1 where a picture could not be read."""

    exact: Int[np.ndarray, " N"]
    """Equal files."""
    near: Int[np.ndarray, " N"]
    """Equal files, and all that look the same, one being like the next."""


def find_copies(found: Fingerprints, *, max_rms: float = SAME_PICTURE_RMS) -> Copies:
    """The clusters of same pictures."""
    rows = np.nonzero(found.read)[0]
    exact = np.full(len(found.read), -1, dtype=np.int64)
    if not len(rows):
        return Copies(exact, exact.copy())
    halves = found.digests[rows].view(np.uint64)
    _, firsts, numbers = np.unique(halves, axis=0, return_index=True, return_inverse=True)
    exact[rows] = numbers.reshape(-1)
    pairs = near_pairs(found, rows[firsts], max_rms=max_rms)
    roots = _roots(len(firsts), exact[pairs])
    near = np.full(len(exact), -1, dtype=np.int64)
    near[rows] = roots[exact[rows]]
    return Copies(exact, near)


def near_pairs(found: Fingerprints, rows: Int[np.ndarray, " M"], *, max_rms: float) -> Int[np.ndarray, "P 2"]:
    """Pairs of the given rows whose small copies differ by less than `max_rms` (root mean square, colours in 0..1).

    Same pictures are as bright (the mean of a difference is at most its root mean square), so those of one band are
    compared in the order of their brightness, each with the next ones only.
    """
    hashes, means = found.hashes[rows], found.means[rows]
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for band in range(NUM_BANDS):
        values = (hashes >> np.uint64(64 // NUM_BANDS * band)).astype(np.uint16)
        order = np.lexsort((means, values))
        values, bright = values[order], means[order]
        first = np.arange(len(order))
        for step in range(1, MAX_NEIGHBOURS + 1):
            first = first[first + step < len(order)]
            second = first + step
            first = first[(values[first] == values[second]) & (bright[second] - bright[first] < max_rms)]
            if not len(first):
                break
            one, other = order[first], order[first + step]
            like = np.bitwise_count(hashes[one] ^ hashes[other]) <= MAX_BITS
            pairs.append(_look_the_same(rows[np.stack([one[like], other[like]], axis=1)], found, max_rms))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def _look_the_same(pairs: Int[np.ndarray, "P 2"], found: Fingerprints, max_rms: float) -> Int[np.ndarray, "Q 2"]:
    same = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), PAIRS_AT_A_TIME):
        part = slice(start, start + PAIRS_AT_A_TIME)
        one, other = (found.small(pairs[part, side]).astype(np.float32) for side in (0, 1))
        same[part] = np.sqrt(np.square(one - other).mean((1, 2, 3))) < max_rms * 255
    return pairs[same]


def _roots(count: int, pairs: Int[np.ndarray, "P 2"]) -> Int[np.ndarray, " N"]:
    """For each of `count` numbers the least number that it is connected with."""
    parents = list(range(count))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    return np.array([root(number) for number in range(count)], dtype=np.int64)


def shared_with(
    keys: np.ndarray, held_out: Bool[np.ndarray, " N"], train: Bool[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Which of the `held_out` items have a key that an item of `train` has too."""
    return held_out & np.isin(keys, keys[train])


def num_repeats(keys: np.ndarray) -> int:
    """How many items are there beyond the first of each key."""
    return len(keys) - len(np.unique(keys))


def num_straddling(keys: np.ndarray, splits: np.ndarray) -> int:
    """How many keys occur in more than one split."""
    places = np.unique(np.stack([keys.astype(np.int64), splits.astype(np.int64)], axis=1), axis=0)
    return int((np.unique(places[:, 0], return_counts=True)[1] > 1).sum())
