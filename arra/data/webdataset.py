"""WebDataset tars as a source: consecutive members with one key are one sample.

First stage of the pipeline, between the user's tars and the index. Only headers and captions are read here; a picture
is named by the bytes of the tar it lies in, so nothing is unpacked.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from arra.data.folder import SUFFIXES, TEXT_COLUMNS
from arra.data.lines import one_line
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source
from arra.data.tables import MAX_CLASSES
from arra.errors import ArraError

MAX_TEXT_BYTES = 2**20
"""Captions and JSON members larger than this are refused unread."""
MAX_TARS = 1_000_000
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""
TAR_NAME = re.compile(r".*\.(tar|tar\.(gz|bz2|xz|zst)|tgz)", re.IGNORECASE | re.DOTALL)
MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
"""Key and suffix of a member: the base name is cut at its first dot.

Source: webdataset `tariterators.py`, `base_plus_ext`.
"""
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BROKEN_TAR = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, MemoryError, RecursionError)
"""What tarfile raises on broken files."""


@dataclass
class _Sample:
    """The members of one key, by suffix."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    """Content of the small members that are read."""
    problem: str = ""


class _BrokenTarError(Exception):
    """A tar that cannot be read on: one line that says why and where."""

    def __init__(self, reason: str, *, begun: bool = True, cut: bool = False) -> None:
        super().__init__(reason)
        self.begun = begun
        """Whether it is a tar at all."""
        self.cut = cut
        """Whether it ends inside a member, so that the last sample lacks something."""


class WebDatasetSource(Source):
    """WebDataset tars: a picture, its caption in `.txt` or `.json`, and if wanted its class number in `.cls`.

    Records are called `tar/key`. Tars must not be compressed, so that pictures can be read at any place.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """One tar, a folder of tars, or a pattern such as `shard-{000000..000009}.tar`."""
    image_suffix: str | None = Field(None, min_length=1)
    """Suffix of the picture, after the key's dot; null takes the only one that names a picture format."""
    caption_key: str | None = Field(None, min_length=1)
    """Key of the caption in the `.json` member; null takes `.txt`, else text, prompt or caption of the JSON."""

    def scan(self) -> Iterator[Found]:
        tars, labelled = self._tars(), bool(self.class_names())
        for name, tar in tars:
            broken = None
            try:
                for found in self._samples(name, tar):
                    yield found if isinstance(found, Skipped) else self._found(name, tar, found, labelled)
            except _BrokenTarError as error:
                broken = error
            if broken is not None and len(tars) == 1 and not broken.begun:
                raise ArraError(f"{tar}: {broken}") from broken
            if broken is not None:
                yield Failure(str(tar), str(tar), str(broken))

    def class_names(self) -> tuple[str, ...]:
        """The numbers of the classes; empty where the first sample has no `.cls` member."""
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        largest = -1
        for name, tar in self._tars():
            try:
                for sample in self._samples(name, tar):
                    if isinstance(sample, _Sample) and not sample.problem:
                        if "cls" not in sample.members and largest < 0:
                            return ()
                        largest = max(largest, _class_number(sample, default=-1))
            except _BrokenTarError:
                continue  # scan tells it
        return tuple(str(number) for number in range(largest + 1))

    def _tars(self) -> list[tuple[str, Path]]:
        """The tars in order, each after what its samples are called."""
        path = Path(self.path)
        if path.is_file():
            return [(_stem(path.name), path)]
        tars: list[Path] = []
        if path.is_dir():
            tars = sorted(tar for tar in path.rglob("*") if TAR_NAME.fullmatch(tar.name) and tar.is_file())
        elif RANGE.search(self.path):
            tars = [Path(name) for name in _expand(self.path)]
            path = Path(os.path.commonpath([tar.parent for tar in tars]))
        if not any(tar.is_file() for tar in tars):
            raise ArraError(f"{self.path}: no tars; expected a tar, a folder of them, or a pattern as a-{{00..09}}.tar")
        return [(_stem(tar.relative_to(path).as_posix()), tar) for tar in tars]

    def _samples(self, name: str, path: Path) -> Iterator[_Sample | Skipped]:
        """The samples of one tar; what comes before a broken place is told.

        Raises:
            _BrokenTarError: the tar cannot be read on.
        """
        sample: _Sample | None = None
        with _open_tar(path) as tar:
            try:
                for member in _members(tar, path):
                    if member.isdir():
                        continue
                    parts = MEMBER_NAME.fullmatch(member.name.removeprefix("./"))
                    if parts is None:
                        yield Skipped(
                            f"{name}/{member.name}", f"{path}: {member.name}", "no key and suffix: in no sample"
                        )
                        continue
                    if sample is not None and sample.key != parts[1]:
                        yield sample
                        sample = None
                    sample = sample or _Sample(parts[1])
                    _add(sample, parts[2].lower(), member, tar)
            except _BrokenTarError as error:
                if sample is not None and not error.cut:
                    yield sample
                raise
            if sample is not None:
                yield sample

    def _found(self, name: str, tar: Path, sample: _Sample, labelled: bool) -> Found:
        where = f"{tar}: {sample.key}"
        try:
            if sample.problem:
                raise ValueError(sample.problem)
            picture = self._picture(sample)
            prompt = self._caption(sample)
            label = _class_number(sample) if "cls" in sample.members else None
            if label is not None and not labelled:
                raise ValueError("has a .cls member and the first sample has none; give all samples one, or none")
            if prompt is None and label is None:
                raise ValueError(f"no caption; expected a .txt or .json member, found {_suffixes(sample)}")
        except ValueError as error:
            return Failure(f"{name}/{sample.key}", where, str(error))
        return Record(
            id=f"{name}/{sample.key}",
            image=ImageRef("slice", str(tar), place=picture.offset_data, size=picture.size),
            prompt=prompt or "",
            label=label,
            where=where,
        )

    def _picture(self, sample: _Sample) -> tarfile.TarInfo:
        wanted = self.image_suffix.lower().removeprefix(".") if self.image_suffix else None
        suffixes = [s for s in sample.members if (s == wanted if wanted else f".{s}" in SUFFIXES)]
        if not suffixes:
            raise ValueError(
                f"no picture; expected {wanted or 'a .jpg, .png or .webp'} member, found {_suffixes(sample)}"
            )
        if len(suffixes) > 1:
            raise ValueError(f"more than one picture ({', '.join(suffixes)}); name one in image_suffix")
        picture = sample.members[suffixes[0]]
        if not picture.isreg() or picture.issparse():
            raise ValueError(
                f".{suffixes[0]} member is no regular file but a link, a device or sparse; pack the file itself"
            )
        return picture

    def _caption(self, sample: _Sample) -> str | None:
        if self.caption_key is None and "txt" in sample.texts:
            return _decode(sample.texts["txt"], ".txt").strip()
        if "json" not in sample.texts:
            return None
        try:
            values: Any = json.loads(_decode(sample.texts["json"], ".json"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f".json member is not JSON ({str(error)[:80]})") from error
        keys = (self.caption_key,) if self.caption_key else TEXT_COLUMNS
        key = next((key for key in keys if isinstance(values, dict) and values.get(key) is not None), None)
        if key is not None and not isinstance(values[key], str):
            raise ValueError(f"{key} in .json is {repr(values[key])[:80]}; expected a text")
        return None if key is None else values[key]


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        with path.open("rb") as file:
            start = file.read(6)
        for magic, name in COMPRESSED.items():
            if start.startswith(magic):
                raise _BrokenTarError(
                    f"compressed with {name}; decompress it first, to read pictures in place", begun=False
                )
        return tarfile.open(path, "r:")
    except FileNotFoundError as error:
        raise _BrokenTarError("no such file; add it or correct the pattern", begun=False) from error
    except BROKEN_TAR as error:
        raise _BrokenTarError(f"not a tar ({one_line(error)}); expected one", begun=False) from error


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members whose bytes are all there, one at a time in memory.

    Raises:
        _BrokenTarError: the tar ends early, or goes on behind its end.
    """
    size, place = path.stat().st_size, 0
    while True:
        try:
            member = tar.next()
        except BROKEN_TAR as error:
            raise _BrokenTarError(f"broken at byte {place} ({one_line(error)}); make it anew") from error
        if member is None:
            break
        tar.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
        if tar.offset <= place or member.size < 0:
            raise _BrokenTarError(f"broken at byte {place} (a size below zero); make it anew")
        if member.offset_data + (member.size if member.isreg() and not member.issparse() else 0) > size:
            raise _BrokenTarError(f"ends inside {member.name[:80]!r} at byte {size}; make it anew", cut=True)
        place = tar.offset
        yield member
    with path.open("rb") as file:
        file.seek(place)
        rest = file.read(512)
        if len(rest) < 512:
            raise _BrokenTarError(f"ends at byte {size} without the mark of its end; it may be cut off, make it anew")
        while rest:
            if rest.strip(b"\0"):
                raise _BrokenTarError(
                    f"broken or joined to another tar at byte {file.tell() - len(rest)}; make it anew"
                )
            rest = file.read(2**20)


def _add(sample: _Sample, suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """Puts a member into its sample, with its content if it is a caption, JSON or class."""
    if suffix in sample.members:
        sample.problem = f"two .{suffix} members; keep one"
    sample.members[suffix] = member
    if suffix not in ("txt", "json", "cls"):
        return
    if not member.isreg() or member.issparse():
        sample.problem = f".{suffix} member is no regular file but a link, a device or sparse; pack the file itself"
    elif member.size > MAX_TEXT_BYTES:
        sample.problem = f".{suffix} member has {member.size} bytes; at most {MAX_TEXT_BYTES} are read"
    else:
        content = tar.extractfile(member)
        assert content is not None  # a regular file
        with content:
            sample.texts[suffix] = content.read()


def _class_number(sample: _Sample, default: int | None = None) -> int:
    """The class that a sample's `.cls` member names.

    Raises:
        ValueError: it names none, and there is no default.
    """
    text = sample.texts.get("cls", b"").strip()
    if text.isdigit() and len(text) < 6 and int(text) < MAX_CLASSES:
        return int(text)
    if default is None:
        raise ValueError(f".cls member holds {text[:40]!r}; expected a class number below {MAX_CLASSES}")
    return default


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} member is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from error


def _expand(pattern: str) -> Iterator[str]:
    """The names that a pattern with ranges stands for."""
    found = RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MAX_TARS:
        raise ArraError(f"{pattern}: range {found[0]}; expected it to rise, by less than {MAX_TARS}")
    for number in range(first, last + 1):
        yield from _expand(f"{pattern[: found.start()]}{number:0{len(found[1])}}{pattern[found.end() :]}")


def _stem(name: str) -> str:
    return re.sub(r"\.(tar(\.\w+)?|tgz)$", "", name, flags=re.IGNORECASE)


def _suffixes(sample: _Sample) -> str:
    return ", ".join(f".{suffix}" for suffix in sample.members)[:80]
