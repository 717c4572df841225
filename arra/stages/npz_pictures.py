"""Pictures and statistics in one .npz, as the ADM evaluation has them, without holding the file in memory.

FILE.npz   arr_0           uint8 (N, H, W, 3), the pictures
           label, arr_1    integers (N,), their classes (ours and ADM's name of them)
           mu, sigma       mean (F,) and covariance (F, F) of Inception's pooled features
           mu_s, sigma_s   the same of its spatial features, for sFID

Of pictures that are stored as they are (by `np.savez`, by `arra generate`, by ADM) only those asked for are read.
Compressed ones are unpacked into a temporary file first: no memory, but their whole size on the disk. Neither is
mapped: pages of a mapped file would count as memory of the process, all 10 GB of 50,000 pictures.

Legend: N pictures, H W pixels, F feature.
"""

import hashlib
import io
import math
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arra.data.lines import one_line
from arra.errors import ArraError
from arra.evaluate.moments import Moments
from arra.evaluate.sets import chosen_rows
from arra.runs import writing
from arra.stages.picture_folders import Fit, class_balance, in_threads

PICTURES, LABELS = "arr_0", ("label", "arr_1")
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Names of mean and covariance, by output of the Inception space."""
MAX_FEATURES = 2**14
"""Of published statistics; a square of more in float64 would fill the memory."""
ASYMMETRY = 1e-5
"""Of a covariance, relative to its greatest value: what float32 leaves."""
LOCAL_HEADER = struct.Struct("<26s2H")
"""Of a zip member: what is known already, then the lengths of its name and of its extra field."""
UNREADABLE = (OSError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)
"""What broken, encrypted or strangely packed archives raise."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """Published means and covariances, to be compared with where their pictures are not at hand."""

    name: str
    sha256: str
    """Of the arrays."""
    moments: Mapping[str, Moments] = field(repr=False)
    """By output: `features`, and `spatial` where the file has them too."""

    def of(self, output: str, *, size: int) -> Moments | None:
        """The moments of an output of so many numbers; None where the file has none of it.

        Raises:
            ArraError: they are of another number.
        """
        found = self.moments.get(output)
        if found is not None and len(found.mean) != size:
            raise ArraError(
                f"{self.name}: {STATISTICS[output][0]} has {len(found.mean)} numbers, {output} of this space have "
                f"{size}; the statistics are of another network"
            )
        return found


@dataclass(frozen=True, eq=False)
class RawPictures:
    """Pictures one behind the other in an open file, which is closed when nobody needs it any more."""

    file: io.BufferedIOBase
    first: int
    """Byte of the file at which they begin."""
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        weakref.finalize(self, self.file.close)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, row: int) -> UInt8[np.ndarray, "H W 3"]:
        """One picture, by any number of threads at a time.

        Raises:
            OSError: the file was cut off meanwhile, or the disk fails.
        """
        size = math.prod(self.shape[1:])
        content = os.pread(self.file.fileno(), size, self.first + row * size)
        if len(content) != size:
            raise OSError(f"picture {row} has {len(content)} bytes of {size}")
        return np.frombuffer(content, np.uint8).reshape(self.shape[1:])


@dataclass
class NpzPictures:
    """The pictures of an .npz as a `arra.evaluate.sets.PictureSet`; ids are numbers."""

    path: Path
    pictures: RawPictures = field(repr=False)
    rows: Sequence[int] = field(repr=False)
    """Those of the file that are measured."""
    fit: Fit
    labels: Sequence[int] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[str] | None = None
    records: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.name = str(self.path)
        self.ids: Sequence[str] = [str(row) for row in self.rows]
        self.resize = self.fit.told([(self.pictures.shape[2], self.pictures.shape[1])])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Some pictures, in the order asked for.

        Raises:
            ArraError: one cannot be read; the line names it.
        """
        return list(in_threads(self._fitted, [self.rows[row] for row in rows]))

    def content_hash(self) -> str:
        """SHA-256 of the pictures in their order and of what is done to them."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        told = hashlib.sha256(f"pixels {self.pictures.shape[1:]}, {self.fit}\n".encode())
        for row in self.rows:
            told.update(self._pixels(row).data)
        return told.hexdigest()

    def _fitted(self, row: int) -> UInt8[np.ndarray, "H W 3"]:
        pixels = self._pixels(row)
        return pixels if self.fit.size is None else self.fit(Image.fromarray(pixels))

    def _pixels(self, row: int) -> UInt8[np.ndarray, "H W 3"]:
        try:
            return self.pictures.read(row)
        except OSError as error:
            raise ArraError(f"{self.path}: cannot be read ({one_line(error)}); get the file again") from error


def open_npz(path: Path, *, fit: Fit, max_images: int | None = None) -> NpzPictures | None:
    """The pictures of an .npz; None where it holds statistics alone.

    Raises:
        ArraError: it cannot be read, or `arr_0` is not uint8 (N, H, W, 3).
    """
    with _archive(path) as archive:
        names = _names(archive)
        if PICTURES not in names:
            if set(STATISTICS["features"]) <= names:
                return None
            told = ", ".join(sorted(names)[:8]) or "nothing"
            raise ArraError(f"{path}: no {PICTURES}, found {told}; expected pictures as {PICTURES}, uint8 (N, H, W, 3)")
        pictures = _pictures(path, archive)
        key = next((key for key in LABELS if key in names), None)
        labels = None if key is None else _read(archive, key, most=8 * len(pictures))
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(pictures),)):
        raise ArraError(
            f"{path}: {key} is {labels.dtype} {labels.shape}; expected whole numbers ({len(pictures)},), the classes"
        )
    rows = chosen_rows(len(pictures), max_images)
    about: dict[str, Any] = {}
    if len(rows) < len(pictures):
        about["chosen"] = f"{len(rows)} of {len(pictures)}, at random (the same for every set of {len(pictures)})"
    own = None if labels is None else labels[rows].tolist()
    if own:
        about["class_balance"] = class_balance(own)
    return NpzPictures(path, pictures, rows.tolist(), fit, labels=own, about=about)


def read_statistics(path: Path) -> ReferenceStatistics | None:
    """Means and covariances of an .npz of ADM, pytorch-fid or clean-fid; None where it has none.

    Raises:
        ArraError: it cannot be read, or they are no mean and covariance: sizes, finite, symmetric.
    """
    told, moments = hashlib.sha256(), {}
    with _archive(path) as archive:
        names = _names(archive)
        for output, (mean_key, covariance_key) in STATISTICS.items():
            there = [key for key in (mean_key, covariance_key) if key in names]
            if not there:
                continue
            if len(there) == 1:
                raise ArraError(f"{path}: {there[0]} alone; expected both {mean_key} and {covariance_key}")
            mean = _read(archive, mean_key, most=8 * MAX_FEATURES)
            covariance = _read(archive, covariance_key, most=8 * MAX_FEATURES**2)
            _check_statistics(path, (mean_key, mean), (covariance_key, covariance))
            for key, array in ((mean_key, mean), (covariance_key, covariance)):
                told.update(f"{key} {array.dtype} {array.shape}\n".encode())
                told.update(np.ascontiguousarray(array).data)
            wide = covariance.astype(np.float64)
            moments[output] = Moments(mean=mean.astype(np.float64), covariance=(wide + wide.T) / 2, count=None)
    return ReferenceStatistics(str(path), told.hexdigest(), moments) if moments else None


def _check_pictures(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Nothing; arrays of this shape and type are pictures."""
    if dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and min(shape) > 0:
        return
    hint = "scale them to 0..255 and round" if dtype.kind == "f" else "write them so"
    if dtype == np.uint8 and len(shape) == 4 and shape[1] == 3:
        hint = "move the colours to the end: arr.transpose(0, 2, 3, 1)"
    raise ArraError(f"{path}: {PICTURES} is {dtype} {shape}; expected uint8 (N, H, W, 3), {hint}")


def _check_statistics(path: Path, mean: tuple[str, np.ndarray], covariance: tuple[str, np.ndarray]) -> None:
    """Nothing; the two named arrays are a mean and its covariance."""
    (mean_key, mu), (covariance_key, sigma) = mean, covariance
    for key, array in (mean, covariance):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ArraError(f"{path}: {key} is {array.dtype} and not all finite numbers; get the file again")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ArraError(
            f"{path}: {mean_key} {mu.shape} and {covariance_key} {sigma.shape} do not fit; expected (F,) and (F, F)"
        )
    greatest = float(np.abs(sigma).max(initial=0.0))
    if float(np.abs(sigma - sigma.T).max(initial=0.0)) > ASYMMETRY * greatest or (np.diag(sigma) < 0).any():
        raise ArraError(f"{path}: {covariance_key} is no covariance (not symmetric, or a negative variance)")


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open file; whatever is wrong inside becomes one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UNREADABLE as error:
        if isinstance(error, FileNotFoundError):
            raise ArraError(f"{path}: no such file; expected an .npz of pictures or statistics") from error
        raise ArraError(f"{path}: cannot be read as .npz ({one_line(error)}); get or make the file again") from error


def _names(archive: zipfile.ZipFile) -> set[str]:
    return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array whose file is open, which then stands at its first byte.

    Raises:
        ValueError: no such file, or one with Python objects or columns before rows.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which could run code")
    if by_columns and len(shape) > 1:
        raise ValueError("an array in Fortran order; save np.ascontiguousarray of it")
    return shape, dtype


def _read(archive: zipfile.ZipFile, name: str, *, most: int) -> np.ndarray:
    """A small array, in memory."""
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _header(file)
        size = math.prod(shape) * dtype.itemsize
        if size > most:
            raise ValueError(f"{name} of {shape} is larger than it can be")
        content = file.read(size + 1)
        if len(content) != size:
            raise ValueError(f"{name} has {len(content)} bytes of {size}")
        file.read()  # to the end, where its checksum is compared
    return np.frombuffer(content, dtype=dtype).reshape(shape)


def _pictures(path: Path, archive: zipfile.ZipFile) -> RawPictures:
    """The pictures where they lie in the archive, or in a temporary file that they are unpacked into."""
    member = archive.getinfo(f"{PICTURES}.npy")
    with archive.open(member) as file:
        shape, dtype = _header(file)
        begin = file.tell()
        _check_pictures(path, shape, dtype)
        if begin + math.prod(shape) != member.file_size:
            raise ValueError(f"{PICTURES} has {member.file_size - begin} bytes, {shape} take {math.prod(shape)}")
        if member.compress_type != zipfile.ZIP_STORED:
            return _unpacked(path, file, shape)
    with path.open("rb") as raw:
        raw.seek(member.header_offset)
        _, name_length, extra_length = LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size))
    first = member.header_offset + LOCAL_HEADER.size + name_length + extra_length + begin
    found = RawPictures(path.open("rb"), first, shape)
    found.read(len(found) - 1)  # a file that ends before says so now
    return found


def _unpacked(path: Path, file: Any, shape: tuple[int, ...]) -> RawPictures:
    """The rest of an open member in a temporary file without a name."""
    found = RawPictures(tempfile.TemporaryFile(), 0, shape)  # noqa: SIM115  closed with it
    with writing(f"{tempfile.gettempdir()} (where {path.name} is unpacked; TMPDIR names another place)"):
        shutil.copyfileobj(file, found.file, 2**20)
        found.file.flush()
    return found
