"""What the pipeline is about: one record per picture, and ordered sets of them.

First stage of the pipeline; every source (embedded set, folder, ...) yields these.
"""

import hashlib
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from arra.data.images import to_rgb
from arra.errors import ArraError


@dataclass(frozen=True)
class Record:
    """One picture with its text."""

    id: str
    prompt: str
    split: str
    image: Path | bytes
    """A file, or an encoded picture (PNG) held in memory."""
    alternatives: tuple[str, ...] = ()
    """Other names of the same picture; training may use them in place of `prompt`, evaluation never does."""
    group: str = ""
    """Pictures of one group are variants of each other; intervals resample whole groups. Empty: a group of its own."""


@dataclass(frozen=True)
class RecordSet:
    """Records in a fixed order, with what every later stage needs to say about them."""

    name: str
    records: tuple[Record, ...]
    attribution: str = ""
    """Credit line that must stand beside the pictures, empty where none is asked for."""

    def __len__(self) -> int:
        return len(self.records)

    def split_indices(self, split: str) -> list[int]:
        return [i for i, record in enumerate(self.records) if record.split == split]

    def splits(self) -> dict[str, int]:
        """Number of records per split, in order of first appearance."""
        counts: dict[str, int] = {}
        for record in self.records:
            counts[record.split] = counts.get(record.split, 0) + 1
        return counts

    def content_hash(self) -> str:
        """SHA-256 over ids, texts, splits and picture bytes: the identity that the store is keyed by."""
        digest = hashlib.sha256()
        for record in self.records:
            texts = [record.id, record.prompt, record.split, record.group, *record.alternatives]
            digest.update(json.dumps(texts).encode())
            digest.update(hashlib.sha256(image_bytes(record)).digest())
        return digest.hexdigest()


def image_bytes(record: Record) -> bytes:
    """Encoded bytes of a record's picture.

    Raises:
        ArraError: the file is missing or unreadable.
    """
    if isinstance(record.image, bytes):
        return record.image
    try:
        return record.image.read_bytes()
    except OSError as error:
        raise ArraError(
            f"{record.image}: image of record '{record.id}' cannot be read ({error.strerror}); "
            "restore the file or remove its line from the metadata"
        ) from error


def load_image(record: Record) -> Image.Image:
    """The record's picture as 8-bit RGB, upright, on white where it was transparent.

    Raises:
        ArraError: the file is missing, no image, or so large that it looks like a decompression bomb.
    """
    where = str(record.image) if isinstance(record.image, Path) else f"record '{record.id}'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata beside sound pixels, and of sizes that to_rgb judges
            with Image.open(io.BytesIO(image_bytes(record))) as image:
                return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArraError(f"{where}: not a readable image ({error}); replace it or remove its line") from error
