"""The folder that `arra generate` fills, and that any later start continues.

    OUT/  request.json          what was asked for; first on disk, so that nothing else is mixed in
          NNNNNN.png            a picture, with what made it in its metadata
          samples.jsonl         the same facts, one line for each picture that is whole
          samples.PART.jsonl    lines of one process of several, until all is painted
          grid.png, samples.npz made of the pictures at the end

Legend: N pictures, H W pixels.
"""

import errno
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arra.data.columns import folder_lock
from arra.errors import ArraError
from arra.runs import atomic_file, atomic_write, remove_unfinished, writing
from arra.stages.process import Progress, silent

REQUEST_FILE, LIST_FILE, GRID_FILE, NPZ_FILE = "request.json", "samples.jsonl", "grid.png", "samples.npz"
PICTURE = re.compile(r"(\d{6,})\.png")
LISTS = re.compile(r"samples\.((shard-\d+-of-\d+|rank-\d+)\.)*jsonl")
WRITERS = min(8, os.cpu_count() or 1)
"""Threads that compress pictures while the next ones are painted."""


@dataclass(frozen=True)
class Samples:
    """A folder of samples, all numbers of one request."""

    path: Path
    count: int
    """N of the request."""
    facts: Callable[[int], dict[str, Any]]
    """What made the picture of a number."""

    def picture_path(self, number: int) -> Path:
        """Where the picture of a number lies."""
        return self.path / f"{number:06d}.png"

    def about(self, number: int) -> dict[str, Any]:
        """What is noted of a picture, its file's name first."""
        return {"file": self.picture_path(number).name, **self.facts(number)}

    def line(self, number: int) -> str:
        """The line of samples.jsonl about a picture."""
        return json.dumps(self.about(number), ensure_ascii=False) + "\n"

    def painting(self, part: str) -> AbstractContextManager[None]:
        """A block in which no other process paints this part of the folder.

        Raises:
            ArraError: another process does, or the folder cannot be written.
        """
        return folder_lock(
            self.path, name=f".{part}.lock" if part else ".lock", wait=False, busy="paints into this folder"
        )

    def in_turn(self) -> AbstractContextManager[None]:
        """A block that jobs which paint parts of the folder are in one after the other: to begin, and to finish.

        Raises:
            ArraError: the folder cannot be written.
        """
        return folder_lock(self.path, name=".turn.lock")

    def begin(self, request: dict[str, Any], *, replace: bool) -> None:
        """Nothing; the folder is this request's, empty or begun. For one process, in its turn.

        Raises:
            ArraError: it holds another request's pictures, or files of others that are called like ours.
        """
        remove_unfinished(self.path)
        request = json.loads(json.dumps(request))
        kept = _read_request(self.path)
        if replace and kept != request:
            self._clear(kept)
            kept = None
        if kept is None:
            if lists := [path.name for path in _lists(self.path)]:
                raise ArraError(
                    f"{self.path}: {lists[0]} lists pictures, and no {REQUEST_FILE} says what was asked for; choose "
                    "another --out, or start anew with --replace"
                )
            if taken := [path.name for path in self.path.glob("*.png") if self._is_called_like_ours(path)]:
                raise ArraError(
                    f"{self.path}: {min(taken)} is there, and is none of ours; choose another --out, or move it away"
                )
            atomic_write(self.path / REQUEST_FILE, json.dumps(request, indent=2, ensure_ascii=False) + "\n")
        elif (difference := _difference(kept, request)) is not None:
            raise ArraError(
                f"{self.path}: holds pictures of another request: {difference}; choose another --out, or start anew "
                "with --replace"
            )

    def done(self) -> Bool[np.ndarray, " N"]:
        """Which pictures are whole: there is a line about them, and the file."""
        listed, there = np.zeros(self.count, bool), np.zeros(self.count, bool)
        for path in _lists(self.path):
            for number in _listed(path):
                if number < self.count:
                    listed[number] = True
        with os.scandir(self.path) as entries:
            for entry in entries:
                match = PICTURE.fullmatch(entry.name)
                if match is not None and int(match[1]) < self.count:
                    there[int(match[1])] = True
        return listed & there

    def merge(self) -> None:
        """Nothing; samples.jsonl lists all pictures by number, and no other list is left. Every picture is whole."""
        with atomic_file(self.path / LIST_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
            for number in range(self.count):
                file.write(self.line(number))
        for path in _lists(self.path):
            if path.name != LIST_FILE:
                path.unlink(missing_ok=True)

    def read(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """A picture that is whole.

        Raises:
            ArraError: it is not, or has been changed by others.
        """
        path = self.picture_path(number)
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise ArraError(f"{path}: damaged; delete it, and run the same command again") from error

    def write_npz(self, labels: Iterable[int] | None, *, progress: Progress = silent) -> None:
        """Nothing; samples.npz holds arr_0, the pictures (N, H, W, 3) as uint8, and `label`, their classes as int64.

        Source: openai/guided-diffusion, evaluations/README.md (arr_0).
        Raises:
            ArraError: a picture is damaged or of another size, or the disk is full.
        """
        shape = self.read(0).shape
        with atomic_file(self.path / NPZ_FILE) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with _array(archive, "arr_0", (self.count, *shape), np.dtype(np.uint8)) as file:
                for number in range(self.count):
                    image = self.read(number)
                    if image.shape != shape:
                        raise ArraError(
                            f"{self.picture_path(number)}: of another size than the first; delete it, and run the same "
                            "command again"
                        )
                    file.write(image.tobytes())
                    progress("packing", number + 1, self.count)
            if labels is not None:
                with _array(archive, "label", (self.count,), np.dtype(np.int64)) as file:
                    for label in labels:
                        file.write(np.int64(label).tobytes())

    def _is_called_like_ours(self, path: Path) -> bool:
        match = PICTURE.fullmatch(path.name)
        return match is not None and int(match[1]) < self.count

    def _clear(self, kept: dict[str, Any] | None) -> None:
        """Nothing; what an earlier request has painted here is gone, and nothing else."""
        with writing(self.path):
            numbers = {number for path in _lists(self.path) for number in _listed(path)}
            # a killed process may have left pictures without a line
            many = 0 if kept is None else kept.get("num_images")
            own = range(many if isinstance(many, int) else 0)
            for path in self.path.glob("*.png"):
                match = PICTURE.fullmatch(path.name)
                if match is not None and (int(match[1]) in own or int(match[1]) in numbers):
                    path.unlink(missing_ok=True)
            for path in (*_lists(self.path), *(self.path / name for name in (GRID_FILE, NPZ_FILE, REQUEST_FILE))):
                path.unlink(missing_ok=True)


class Recorder:
    """Writes pictures, each followed by its line, in threads of its own; use it as a context manager."""

    def __init__(self, samples: Samples, name: str) -> None:
        self.samples, self.path = samples, samples.path / name
        self.pool = ThreadPoolExecutor(WRITERS)
        self.pending: list[Future[None]] = []
        self.turn = Lock()

    def __enter__(self) -> "Recorder":
        with writing(self.path):
            self.file = self.path.open("ab+", buffering=0)
            _end_line(self.file)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.pool.shutdown(cancel_futures=kind is not None)
            self.file.close()

    def take(self, numbers: Sequence[int], images: UInt8[np.ndarray, "B H W 3"]) -> None:
        """Nothing; the pictures will be on disk. Those given before are, so that no more than these are held.

        Raises:
            ArraError: one of those before could not be written.
        """
        self.wait()
        self.pending = [self.pool.submit(self._keep, *each) for each in zip(numbers, images, strict=True)]

    def wait(self) -> None:
        """Nothing; all pictures given so far are on disk, with their lines.

        Raises:
            ArraError: one could not be written.
        """
        for future in self.pending:
            future.result()
        self.pending = []

    def _keep(self, number: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        info = PngInfo()
        for key, value in self.samples.about(number).items():
            if value is not None:
                info.add_itxt(f"arra:{key}", str(value))
        with atomic_file(self.samples.picture_path(number)) as temporary:
            Image.fromarray(image).save(temporary, "PNG", pnginfo=info)
        line = self.samples.line(number).encode()
        with self.turn, writing(self.path):
            if os.write(self.file.fileno(), line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def part_list(part: str) -> str:
    """The name of the list that a process of several writes."""
    return f"samples.{part}.jsonl" if part else LIST_FILE


def _lists(path: Path) -> list[Path]:
    """samples.jsonl and those of parts, as far as they are there."""
    return sorted(each for each in path.glob("samples.*") if LISTS.fullmatch(each.name))


def _listed(path: Path) -> Iterator[int]:
    """Numbers of the pictures that a list has whole lines about."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # torn by a kill: no line
                    continue
                match = PICTURE.fullmatch(str(row.get("file"))) if isinstance(row, dict) else None
                if match is not None:
                    yield int(match[1])
    except FileNotFoundError:  # merged by another job in this moment
        return


def _end_line(file: BinaryIO) -> None:
    """Nothing; what is written next begins a line, also behind one that a kill has torn."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _read_request(path: Path) -> dict[str, Any] | None:
    """What request.json says; None where there is none."""
    try:
        content = json.loads((path / REQUEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _difference(kept: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first keys at which two requests differ, in words."""
    if not kept:
        return f"{REQUEST_FILE} is damaged"
    keys = [key for key in {**now, **kept} if kept.get(key) != now.get(key)]
    # the hash alone says little, where the words beside it tell
    keys = [key for key in keys if not (key == "conditions_sha256" and "conditions" in keys)]
    told = [f"{key} {_short(kept.get(key))} there, now {_short(now.get(key))}" for key in keys[:2]]
    return ", ".join(told) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "") if keys else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Any]:
    """A file to write an array's bytes to, as `np.savez` lays it out, that the whole of need not be there."""
    about = zipfile.ZipInfo(f"{name}.npy")  # of 1980: equal pictures give equal files
    with archive.open(about, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
