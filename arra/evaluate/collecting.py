"""One pass over a set of pictures, in which everything that looks at pictures sees each of them once.

    PictureSet --read ahead--> batches of one size --Look.note--> FOLDER/LOOK.OUTPUT.npy, sums --> Seen

Memory holds a few batches and the sums; vectors go to files and are mapped from there. The processes of torchrun take
a stretch of the set each and write into the same files, so their folder must be one that all of them see.

Legend: B batch, N pictures of a set, K of them whose vectors are kept, H W pixels, F feature.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.evaluate.moments import MomentSums
from arra.evaluate.sets import Collected, PictureSet, Space, chosen_rows
from arra.runs import writing

KEPT_VECTORS = 50_000
"""Of a larger set the vectors of so many pictures are kept, chosen at random, for what compares vectors one by one;
means and covariances are of all."""
DIGEST_BYTES = 16
DIGESTS = "digests"


@dataclass(frozen=True)
class Look:
    """Something that is noted of every picture of a set, the same whichever pictures are beside it."""

    name: str
    sizes: Mapping[str, int]
    """Numbers per picture, by output."""
    note: Callable[[Sequence[int], UInt8[Tensor, "B H W 3"]], Mapping[str, Float[Tensor, "B F"]]]
    """What is noted of some rows of the set and their pictures, which are of one size and on the device."""
    identity: str = ""
    """What it is made of, for what is kept: weights, input size, filter."""
    distributions: frozenset[str] = frozenset()
    """Outputs whose mean and covariance are wanted."""


@dataclass(frozen=True)
class Seen:
    """What a pass has left."""

    count: int
    """N."""
    outputs: Mapping[str, Collected] = field(repr=False)
    """By `LOOK.OUTPUT`."""
    digests: UInt8[np.ndarray, "N D"] = field(repr=False)
    """Of every picture's shape and pixels: equal pictures have equal ones."""
    shapes: Mapping[str, int]
    """How many pictures of each size, as `256 x 256` (width x height)."""

    @property
    def num_duplicates(self) -> int:
        """Pictures that are the same, pixel by pixel, as one before them."""
        return self.count - len(np.unique(self.digests, axis=0))

    def shared_with(self, other: "Seen") -> int:
        """How many of these pictures are the same, pixel by pixel, as one of the other's."""
        theirs = {bytes(row) for row in other.digests}
        return sum(bytes(row) in theirs for row in self.digests)


def look_of(space: Space, outputs: Sequence[str], *, name: str, distributions: Sequence[str] = ()) -> Look:
    """A space as something to look with; only the named outputs are kept, under the name that it was asked for by."""

    def note(rows: Sequence[int], images: Tensor) -> dict[str, Tensor]:
        found = space.encode(images)
        return {output: found[output] for output in outputs}

    return Look(
        name,
        {output: space.sizes[output] for output in outputs},
        note,
        identity=f"{space.name} {space.weights_sha256} {space.resize}",
        distributions=frozenset(distributions),
    )


def collect(
    pictures: PictureSet,
    looks: Sequence[Look],
    *,
    folder: Path,
    ranks: Ranks,
    device: torch.device,
    batch_size: int,
    keep: int = KEPT_VECTORS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Seen:
    """What was seen of a set, on every rank; its vectors lie in `folder`, which must be there and stay.

    Raises:
        ArraError: fewer than two pictures, one that cannot be read or of which a look notes what is not finite, or a
            folder that cannot be written.
    """
    count = len(pictures)
    if count < 2:
        raise ArraError(f"{pictures.name}: {count} picture{'' if count == 1 else 's'}; expected 2 at least, give more")
    kept = chosen_rows(count, keep)
    files = _make_files(folder, looks, count=count, kept=len(kept), ranks=ranks)
    sums = {key: MomentSums(size) for key, size in _distributions(looks)}
    stretch = range(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)

    def look() -> Counter[str]:
        read = _batches(pictures, stretch, batch_size=batch_size)
        return _look_at(
            pictures,
            read,
            looks,
            kept=kept,
            device=device,
            files=files,
            sums=sums,
            progress=lambda done: progress(done, len(stretch)),
        )

    shapes = ranks.by_all(look)
    for file in files.values():
        file.flush()
    told = ranks.gather((dict(shapes), {key: one.state() for key, one in sums.items()}))
    merged = {key: MomentSums.joined([states[key] for _, states in told]).finish() for key in sums}
    return Seen(
        count=count,
        outputs={
            key: Collected(moments=merged.get(key), features=_mapped(folder / file_name(key)), rows=kept)
            for key in files
            if key != DIGESTS
        },
        digests=np.asarray(_mapped(folder / file_name(DIGESTS))),
        shapes=dict(sum((Counter(part) for part, _ in told), Counter())),
    )


def _look_at(
    pictures: PictureSet,
    batches: Iterator[tuple[list[int], UInt8[np.ndarray, "B H W 3"]]],
    looks: Sequence[Look],
    *,
    kept: np.ndarray,
    device: torch.device,
    files: Mapping[str, np.memmap],
    sums: Mapping[str, MomentSums],
    progress: Callable[[int], None],
) -> Counter[str]:
    """How many pictures of each size there were; what looks noted is in the files and the sums."""
    shapes: Counter[str] = Counter()
    places = np.full(len(pictures), -1, dtype=np.int64)  # of a row among the kept
    places[kept] = np.arange(len(kept))
    for rows, batch in batches:
        shapes[f"{batch.shape[2]} x {batch.shape[1]}"] += len(rows)
        files[DIGESTS][rows] = _digests(batch)
        images, is_kept = torch.from_numpy(batch).to(device), places[rows] >= 0
        for look in looks:
            noted = look.note(rows, images)
            for output in look.sizes:
                key = f"{look.name}.{output}"
                values = noted[output].float().cpu().numpy().reshape(len(rows), -1)
                _require_finite(values, look=key, of=[pictures.ids[row] for row in rows], where=pictures.name)
                if key in sums:
                    sums[key].add(values)
                files[key][places[rows][is_kept]] = values[is_kept]
        progress(sum(shapes.values()))
    return shapes


def file_name(key: str) -> str:
    """Where the values of `LOOK.OUTPUT` lie: names of spaces may have colons and slashes."""
    return re.sub(r"[^\w.+-]", "-", key) + ".npy"


def _require_finite(values: Float[np.ndarray, "B F"], *, look: str, of: Sequence[str], where: str) -> None:
    is_finite = np.isfinite(values).all(1)
    if not is_finite.all():
        raise ArraError(
            f"{where}: {look} of picture {of[int(is_finite.argmin())]} is not finite; are the network's weights whole?"
        )


def _distributions(looks: Sequence[Look]) -> Iterator[tuple[str, int]]:
    for look in looks:
        for output in look.sizes:
            if output in look.distributions:
                yield f"{look.name}.{output}", look.sizes[output]


def _make_files(folder: Path, looks: Sequence[Look], *, count: int, kept: int, ranks: Ranks) -> dict[str, np.memmap]:
    """The files that all ranks write into, made by the first."""
    shapes: dict[str, tuple[tuple[int, int], Any]] = {DIGESTS: ((count, DIGEST_BYTES), np.uint8)}
    for look in looks:
        for output, size in look.sizes.items():
            shapes[f"{look.name}.{output}"] = ((kept, size), np.float32)

    def make() -> None:
        with writing(folder):
            for name, (shape, kind) in shapes.items():
                path = folder / file_name(name)
                np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape).flush()
                if hasattr(os, "posix_fallocate"):  # a disk that fills up later ends a process that writes a map
                    with path.open("rb+") as file:
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    ranks.by_first(make)
    return {name: np.lib.format.open_memmap(folder / file_name(name), mode="r+") for name in shapes}


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _batches(
    pictures: PictureSet, rows: range, *, batch_size: int
) -> Iterator[tuple[list[int], UInt8[np.ndarray, "B H W 3"]]]:
    """Stacked pictures of one size and their rows; the next ones are read meanwhile."""
    parts = [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(pictures.read, parts[0]) if parts else None
        for number, part in enumerate(parts):
            assert waiting is not None
            read = waiting.result()
            waiting = reader.submit(pictures.read, parts[number + 1]) if number + 1 < len(parts) else None
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for place, image in enumerate(read):
                by_shape.setdefault(image.shape, []).append(place)
            for places in by_shape.values():
                yield [part[place] for place in places], np.stack([read[place] for place in places])


def _digests(images: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B D"]:
    shape = str(images.shape[1:]).encode()
    told = [hashlib.blake2b(image.tobytes(), digest_size=DIGEST_BYTES, person=shape[:16]).digest() for image in images]
    return np.frombuffer(b"".join(told), dtype=np.uint8).reshape(len(images), DIGEST_BYTES)
