"""What the pipeline is about: one record per picture, and the sources that yield records.

First stage of the pipeline. A source tells of every item it meets: a `Record`, a `Failure` (what is wrong, where), or a
`Skipped` (left out by a rule the user knows of). Nothing is left out in silence: in = records + failures + skipped.
"""

import errno
import hashlib
import io
import json
import lzma
import os
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from arra.data.images import FORMATS, Grey16, to_rgb
from arra.data.lines import one_line
from arra.settings import Settings

MAX_IMAGE_BYTES = 512 * 2**20
"""Encoded pictures larger than this are refused unread."""

BROKEN_PICTURE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, MemoryError,
    RuntimeError, AssertionError, EOFError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
"""What reading and decoding hostile bytes may raise: Pillow's decoders raise nearly anything."""


@dataclass(frozen=True)
class ImageRef:
    """Where the encoded bytes of a picture lie."""

    kind: Literal["file", "slice", "parquet", "dataset", "stream", "embedded"]
    """A whole file; bytes of a file (a member of a tar); a cell of a Parquet file, of a Hugging Face data set saved on
    disk, or the item of a streamed one; a picture of an embedded set: a cell of its cache, or drawn when it is read."""
    path: str
    place: int = 0
    """First byte of a slice, row number of a cell, number of a streamed item, seed of a drawing."""
    size: int = 0
    """Bytes of a slice."""
    column: str = ""
    """Column of a cell, caption of a drawing."""

    def text(self) -> str:
        """The reference as one JSON line; `parse` reads it back."""
        return json.dumps([self.kind, self.path, self.place, self.size, self.column], ensure_ascii=False)

    @classmethod
    def parse(cls, text: str) -> "ImageRef":
        return cls(*json.loads(text))

    def __str__(self) -> str:
        if self.kind in ("dataset", "stream"):
            about = json.loads(self.path)
            split = about.get("split") or about.get("data_split") or ""
            return f"{about['path']}: {split} row {self.place}".replace(":  ", ": ")
        inside = {"slice": f" at byte {self.place}", "file": ""}.get(self.kind, f" row {self.place}")
        return f"{self.path}{inside}"


@dataclass(frozen=True)
class Record:
    """One picture with its text, its class, or both."""

    id: str
    """Unique within its source; names the record in the store, in failures and in reports."""
    image: ImageRef | None
    """None where a source gives codes in place of pictures."""
    prompt: str = ""
    """Empty only where there is a label."""
    split: str = ""
    """Empty where the source names none; the index then gives one by a hash."""
    label: int | None = None
    """Class number, into the source's `class_names()`."""
    alternatives: tuple[str, ...] = ()
    """Other texts of the same picture; training may use them in place of `prompt`, evaluation never does."""
    group: str = ""
    """Pictures of one group are variants of each other; intervals resample whole groups. Empty: a group of its own."""
    where: str = field(default="", compare=False)
    """File and line the record was read from, for messages."""


@dataclass(frozen=True)
class Failure:
    """An item that is not as it should be: it counts against `max_failed_fraction`."""

    id: str
    """The record's id, or the file and line where it has none."""
    where: str
    reason: str


@dataclass(frozen=True)
class Skipped:
    """An item that a rule leaves out (another view, another split); it is counted and listed, and is no failure."""

    id: str
    where: str
    reason: str


Found = Record | Failure | Skipped


class Source(Settings):
    """Base of all sources: settings that can be scanned. Each kind adds `kind: Literal[...]`, fields, and `scan`."""

    path: str
    split: str | None = Field(None, min_length=1)
    """Split of all records; null takes what the source says, else a share by hash; `hash` never asks the source."""
    weight: float = Field(1.0, gt=0)
    """How often an epoch visits each record of this source; 0.5 takes another half every epoch."""

    def scan(self) -> Iterator[Found]:
        """Every item in the source's own fixed order, without decoding a picture.

        Raises:
            ArraError: the source itself is missing or not of this kind.
        """
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label; empty where records have no labels."""
        return ()

    @property
    def name(self) -> str:
        """What reports call the source."""
        path = Path(self.path)
        # of a pattern of files, the folder
        return (path.parent if set("{}*?") & set(path.name) else path).resolve().stem

    @property
    def attribution(self) -> str:
        """Credit line that must stand beside the pictures; empty where none is asked for."""
        return ""


def name_hash(name: str) -> int:
    """A 64-bit number that an id or a caption alone decides; no two ids of a store have the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def source_names(sources: Sequence[Source]) -> list[str]:
    """What each source is called where several are: its own name, with a number where that is another's too."""
    names: list[str] = []
    for source in sources:
        tried = (source.name if number == 1 else f"{source.name}-{number}" for number in count(1))
        names.append(next(name for name in tried if name not in names))
    return names


def inside(root: Path, name: str) -> Path:
    """The file called `name` below `root`; absolute names are fine if they lie below it.

    Raises:
        ValueError: it leaves the folder, is no file, or is no name at all; one line that says which.
    """
    path = root / name
    try:
        stays = path.resolve().is_relative_to(root.resolve())
        found = stays and stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        found = False
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a loop of links
        raise ValueError(f"{name[:80]!r} is no file name ({str(error)[:80]})") from error
    if not stays:
        raise ValueError(f"picture {name[:200]!r} leaves {root}; pictures must lie inside it")
    if not found:
        raise ValueError(f"picture {name[:200]!r} does not exist in {root}; add it or remove the line")
    return path


def read_file(path: str, *, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `start` on.

    Raises:
        OSError, ValueError: it is missing, unreadable, no plain file, too large, or ends before.
    """
    # without waiting: a named pipe in place of a file would be waited for
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        size = about.st_size if size is None else size
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes are more than {MAX_IMAGE_BYTES}")
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"ends after {len(content)} of {size} bytes")
    return content


def decode_image(content: bytes, *, grey16: Grey16 = "full") -> Image.Image:
    """An encoded picture as 8-bit RGB, upright, on white where it was transparent.

    Raises:
        ValueError: not a picture of a known format, broken, or so large that it looks like a decompression bomb.
    """
    if not content:
        raise ValueError("not a readable image (zero bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata beside sound pixels, and of sizes that to_rgb judges
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return to_rgb(image, grey16=grey16)
    except BROKEN_PICTURE as error:
        raise ValueError(f"not a readable image ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture of a known format"
    return one_line(error)
