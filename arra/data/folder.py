"""Folders of pictures as sources: captioned ones, and trees with one folder per class.

First stage of the pipeline, between the user's folder and the index. Folders are walked in sorted order, one folder's
names in memory at a time. Folders before the pictures that are called train, test, val, ... name the split.
"""

import errno
import hashlib
import json
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from arra.data.lines import SPLITS, parse_json, read_lines, read_rows, split_name
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source, inside
from arra.errors import ArraError

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif",
    ".jp2",
)  # fmt: skip
"""Names of files that are taken for pictures."""
OTHER_SUFFIXES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".dcm", ".dicom", ".dng", ".cr2", ".nef", ".arw")
"""Pictures in formats that are not read: told as failures, so that none is overlooked."""
PICTURES = frozenset(SUFFIXES + OTHER_SUFFIXES)
TEXT_COLUMNS = ("text", "prompt", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION_BYTES = 2**20


def inside_image_root(root: Path, image: str) -> Path:
    """The picture that a list names, for lists that may lie apart from their pictures.

    Raises:
        ValueError: as `inside`; the line names the setting too.
    """
    try:
        return inside(root, image)
    except ValueError as error:
        raise ValueError(f"{error}; or set image_root to the folder that holds the pictures") from error


class FolderSource(Source):
    """A folder of captioned pictures, with metadata files or a `.txt` beside each picture.

    Metadata is the Hugging Face imagefolder convention: `metadata.jsonl` or `metadata.csv` in the folder or in folders
    below it, with `file_name` (relative to the metadata's folder), a text, and if wanted `split` and `label`.
    """

    kind: Literal["folder"] = "folder"
    path: str
    """The folder."""
    caption_column: str | None = Field(None, min_length=1)
    """Metadata column of the text; null takes the first filled one of text, prompt, caption."""

    def scan(self) -> Iterator[Found]:
        found = self._walk()
        first = next(found, None)
        if first is None:
            raise ArraError(
                f"{self.path}: no pictures; expected {METADATA[0]}, {METADATA[1]} or pictures with .txt captions"
            )
        yield first
        yield from found

    def _walk(self) -> Iterator[Found]:
        root = _folder(self.path)
        folders: list[tuple[str, tuple[_Names, ...]]] = [("", ())]
        while folders:
            below, named = folders.pop()
            metadata = [name for name in METADATA if os.path.lexists(root / below / name)]
            if metadata:
                named = (*named, _Names())
                yield from self._listed(below, metadata[0], named[-1])
                named[-1].sort()
            yield from self._unread(below, metadata)
            listing = _list_folder(root, below, named)
            yield from listing.told
            yield from self._unlisted(listing, bool(named))
            folders += [(name, named) for name in reversed(listing.folders)]

    def _unread(self, below: str, metadata: list[str]) -> Iterator[Failure]:
        for name in [*metadata[1:], "metadata.parquet"]:
            path = Path(self.path, below, name)
            if os.path.lexists(path):
                kept = f"{metadata[0]} beside it is; keep one" if metadata else f"write its rows into {METADATA[0]}"
                yield Failure(str(path), str(path), f"not read, {kept}")

    def _listed(self, below: str, name: str, named: "_Names") -> Iterator[Found]:
        """What each line of a metadata file says; names of pictures go into `named`."""
        root = Path(self.path)
        path = root / below / name
        try:
            inside(root, str(Path(below, name)))
            for where, row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
                yield Failure(where, where, row) if isinstance(row, str) else self._record(below, where, row, named)
        except (OSError, ValueError) as error:
            yield Failure(str(path), str(path), f"cannot be read ({_reason(error)})")

    def _record(self, below: str, where: str, row: dict[str, Any], named: "_Names") -> Record | Failure:
        root, name = Path(self.path), row.get("file_name")
        try:
            label = _label(row.get("label"))
            column = self._text_column(row, needed=label is None)
            for key in ("file_name", *([column] if column else []), "split"):
                if row.get(key) is not None and not isinstance(row[key], str):
                    raise ValueError(f"{key} is {repr(row[key])[:80]}; expected a text")
            file = inside(root / below, row["file_name"])
        except ValueError as error:
            if isinstance(name, str) and name:
                named.add(os.path.normpath(Path(below, name)))  # told here, so it is not told again as unlisted
            return Failure(where, where, str(error))
        found_name = _below(root, file)
        named.add(found_name)
        return Record(
            id=found_name,
            image=ImageRef("file", str(file)),
            prompt=row[column].strip() if column else "",
            split=split_name(row["split"]) if row.get("split") else _first_split(found_name),
            label=label,
            where=where,
        )

    def _text_column(self, row: dict[str, Any], *, needed: bool) -> str | None:
        """The first filled text column, else the first that is there."""
        columns = (self.caption_column,) if self.caption_column else TEXT_COLUMNS
        there = sorted((c for c in columns if row.get(c) is not None), key=lambda c: row[c] == "")
        if row.get("file_name") in (None, "") or (needed and not there):
            found = ", ".join(repr(key)[1:-1] for key, value in row.items() if value not in (None, ""))
            one_of = "one of " if len(columns) > 1 else ""
            raise ValueError(f"expected 'file_name' and {one_of}{', '.join(columns)}, found {found[:200]}")
        return there[0] if there else None

    def _unlisted(self, listing: "_Listing", metadata: bool) -> Iterator[Found]:
        """The pictures of one folder that no metadata names."""
        root = Path(self.path)
        stems = {os.path.splitext(name)[0] for name in listing.pictures}
        for name in listing.pictures:
            caption = f"{os.path.splitext(name)[0]}.txt"
            if metadata:
                yield Skipped(name, str(root / name), "no line of the metadata names it")
            elif fault := listing.faults.get(name) or listing.faults.get(caption):
                yield Failure(name, str(root / name), fault)
            elif caption not in listing.texts:
                expected = f"{Path(caption).name} beside it, or a {METADATA[0]} in {root}"
                yield Failure(name, str(root / name), f"no caption; expected {expected}")
            else:
                yield _captioned(root, name, caption)
        for text in () if metadata else sorted(listing.texts):
            if os.path.splitext(text)[0] not in stems:
                yield Skipped(text, str(root / text), "no picture of this name beside it")


class ClassFolderSource(Source):
    """One folder of pictures per class, as ImageNet has it: `CLASS/x.jpg`, or `train/CLASS/x.jpg`, `val/CLASS/x.jpg`.

    The label is the rank of the class folder's name over all splits; an empty class folder keeps its label.
    """

    kind: Literal["classes"] = "classes"
    path: str
    """The folder that holds the class folders, or the split folders above them."""
    class_names_file: str | None = None
    """Readable class names: JSON `{folder: name}`, or lines as `n01440764 tench, Tinca tinca`; or null."""

    def scan(self) -> Iterator[Found]:
        root, tops = _folder(self.path), self._tops()
        label_of = {folder: label for label, folder in enumerate(self._class_folders(tops))}
        names = self.class_names()
        if tops != [""]:
            first = _list_folder(root, "")
            yield from first.told
            yield from (_outside_classes(root, name) for name in first.pictures)
            for folder in first.folders:
                if folder not in tops:
                    yield Skipped(folder, str(root / folder), "lies beside split folders, is none, and is not read")
        for top in tops:
            listing = _list_folder(root, top)
            yield from listing.told
            yield from (_outside_classes(root, name) for name in listing.pictures)
            for folder in listing.folders:
                label, empty = label_of[Path(folder).name], True
                for found in _pictures(root, folder):
                    empty = False
                    yield (
                        found
                        if isinstance(found, Failure | Skipped)
                        else Record(
                            id=found,
                            image=ImageRef("file", str(root / found)),
                            prompt=names[label],
                            split=SPLITS[top.lower()] if top else "",
                            label=label,
                            where=str(root / found),
                        )
                    )
                if empty:
                    yield Skipped(folder, str(root / folder), f"no pictures; the class keeps label {label}")

    def class_names(self) -> tuple[str, ...]:
        """Readable names by label, without underscores."""
        folders = self._class_folders(self._tops())
        if self.class_names_file is None:
            return tuple(folder.replace("_", " ") for folder in folders)
        names = _read_class_names(Path(self.class_names_file))
        nameless = [folder for folder in folders if not names.get(folder, "").strip()]
        if nameless:
            raise ArraError(
                f"{self.class_names_file}: no name for class folder {nameless[0]!r} ({len(nameless)} of {len(folders)} "
                "lack one); add it, or set class_names_file to null"
            )
        return tuple(names[folder].replace("_", " ").strip() for folder in folders)

    def _tops(self) -> list[str]:
        """The folders that hold class folders: split folders, else the root, called ''."""
        root = _folder(self.path)
        named = [name for name in _list_folder(root, "").folders if name.lower() in SPLITS]
        return named if any(_list_folder(root, name).folders for name in named) else [""]

    def _class_folders(self, tops: list[str]) -> list[str]:
        root = Path(self.path)
        found = sorted({Path(folder).name for top in tops for folder in _list_folder(root, top).folders})
        if not found or all(name.lower() in SPLITS for name in found):
            raise ArraError(
                f"{root}: no class folders; expected CLASS/x.jpg, or train/CLASS/x.jpg, with a folder per class"
            )
        return found


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise ArraError(f"{path}: no such folder; expected a folder of pictures")
    return Path(path)


class _Names:
    """A set of names in 8 bytes each, for millions of them. Sort it before asking."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, name: str) -> None:
        self._hashes.append(self._hash(name))

    def sort(self) -> None:
        if self._hashes:
            np.frombuffer(self._hashes, dtype=np.uint64).sort()

    def __contains__(self, name: str) -> bool:
        code = self._hash(name)
        place = bisect_left(self._hashes, code)
        return place < len(self._hashes) and self._hashes[place] == code

    @staticmethod
    def _hash(name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass
class _Listing:
    """What one folder holds, as sorted names relative to the root."""

    folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    faults: dict[str, str] = field(default_factory=dict)
    """Why some of the pictures and texts cannot be read."""
    told: list[Failure | Skipped] = field(default_factory=list)
    """What else is not read, and why."""


def _list_folder(root: Path, below: str, named: tuple[_Names, ...] = ()) -> _Listing:
    """The folder `below` the root without pictures that are named already."""
    listing = _Listing()
    try:
        with os.scandir(root / below) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                suffix = os.path.splitext(entry.name)[1].lower()
                if _is_folder(entry):
                    _add_folder(listing, root, name, entry)
                elif suffix == ".txt" or (suffix in PICTURES and not any(name in names for names in named)):
                    _add_file(listing, root, name, entry, suffix)
    except OSError as error:
        where = str(root / below)
        listing.told.append(Failure(where, where, f"folder cannot be read ({_reason(error)})"))
    listing.folders.sort()
    listing.pictures.sort()
    listing.told.sort(key=lambda item: item.id)
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _add_folder(listing: _Listing, root: Path, name: str, entry: os.DirEntry[str]) -> None:
    where = str(root / name)
    if _told_by_name(listing, root, name, entry):
        return
    if not entry.is_symlink():
        listing.folders.append(name)
    elif Path(where).resolve().is_relative_to(root.resolve()):
        listing.told.append(Skipped(name, where, "a link to a folder inside; its pictures are read there"))
    else:
        reason = f"folder {name[:200]!r} is a link that leaves {root}; make its target a source of its own"
        listing.told.append(Failure(name, where, reason))


def _add_file(listing: _Listing, root: Path, name: str, entry: os.DirEntry[str], suffix: str) -> None:
    if _told_by_name(listing, root, name, entry):
        return
    if suffix == ".txt":
        listing.texts.add(name)
    else:
        listing.pictures.append(name)
    if suffix in OTHER_SUFFIXES:
        listing.faults[name] = f"format {suffix} is not read; convert it to PNG or JPEG"
    elif not entry.is_file(follow_symlinks=False):
        try:
            inside(root, name)
        except ValueError as error:
            listing.faults[name] = str(error)


def _told_by_name(listing: _Listing, root: Path, name: str, entry: os.DirEntry[str]) -> bool:
    if _shown(name) != name:
        reason = "its name is not UTF-8; rename it"
        listing.told.append(Failure(_shown(name), _shown(str(root / name)), reason))
    elif entry.name.startswith(".") or entry.name == "__MACOSX":
        listing.told.append(Skipped(name, str(root / name), "hidden"))
    else:
        return False
    return True


def _pictures(root: Path, below: str) -> Iterator[str | Failure | Skipped]:
    """Names of the pictures below a folder, and what else is to be told."""
    folders = [below]
    while folders:
        listing = _list_folder(root, folders.pop())
        folders += reversed(listing.folders)
        yield from listing.told
        for name in listing.pictures:
            fault = listing.faults.get(name)
            yield Failure(name, str(root / name), fault) if fault else name


def _outside_classes(root: Path, name: str) -> Failure:
    return Failure(name, str(root / name), "lies in no class folder; move it into the folder of its class")


def _captioned(root: Path, name: str, caption: str) -> Record | Failure:
    where = str(root / caption)
    try:
        with open(where, "rb") as file:
            content = file.read(MAX_CAPTION_BYTES + 1)
        if len(content) > MAX_CAPTION_BYTES:
            raise ValueError(f"longer than {MAX_CAPTION_BYTES} bytes; expected a caption")
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Failure(name, where, f"not UTF-8 text (byte {error.start + 1}: {error.reason}); save it as UTF-8")
    except (OSError, ValueError) as error:
        return Failure(name, where, _reason(error))
    return Record(name, ImageRef("file", str(root / name)), text, _first_split(name), where=where)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where, row or what is wrong) of each line."""
    for number, line in read_lines(path):
        try:
            row = parse_json(line)
            fault = None if isinstance(row, dict) else "expected an object with 'file_name' and 'text'"
        except ValueError as error:
            fault = str(error)
        yield f"{path}: line {number}", fault or row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    header: list[str] | None = None
    for place, row in read_rows(path):
        where = f"{path}: {place}"
        if isinstance(row, ValueError):
            yield where, str(row)
            if header is None:
                return
        elif header is None:
            header = row
        elif any(_shown(text) != text for text in row):
            yield where, "not UTF-8 text; save it as UTF-8"
        elif len(row) > len(header):
            yield where, "more fields than the first line names; put quotes around text with commas"
        else:
            yield where, dict(zip(header, row, strict=False))


def _label(value: object) -> int | None:
    if value is None or value == "":
        return None
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
        raise ValueError(f"label is {repr(value)[:80]}; expected a class number from 0, or name the column otherwise")
    return number


def _read_class_names(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            names = json.loads(text)
        else:
            names = dict([*line.split(None, 1), ""][:2] for line in text.split("\n") if line.strip())
    except (OSError, ValueError, RecursionError) as error:
        raise ArraError(
            f"{path}: class names cannot be read ({_reason(error)}); expected UTF-8 text or JSON"
        ) from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ArraError(f"{path}: expected a JSON object {{folder: name}}, as {{'n01440764': 'tench'}}")
    return names


def _first_split(name: str) -> str:
    """The split that the first folder of the name means; '' where it is no split folder."""
    first, slash, _ = name.partition("/")
    return SPLITS.get(first.lower(), "") if slash else ""


def _below(root: Path, file: Path) -> str:
    if not file.is_relative_to(root) or ".." in file.relative_to(root).parts:
        file, root = file.resolve(), root.resolve()
    return file.relative_to(root).as_posix()


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.errno in errno.errorcode else str(error)
    return " ".join(str(text).split())[:300]


def _shown(text: str) -> str:
    """The text with bytes that are not UTF-8 spelled out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
