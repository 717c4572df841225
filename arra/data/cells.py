"""Single rows of an Arrow file by positional reads: nothing of the file stays in this process's memory.

Reading mapped pages would do the same with less code, but on current Linux a first touch of a mapped file can bring in
a megabyte: random batches of 256 rows then run five times slower and resident memory grows to the size of the store.
Legend: B rows.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arra.errors import ArraError

MAX_OPEN_FILES = 700
"""Below the 1,024 that systems allow a process by default, with room for everything else."""


@dataclass(frozen=True)
class FileId:
    """One file as it was when it was looked at; another one under its name is not it."""

    path: str
    inode: int
    changed_ns: int

    @classmethod
    def of(cls, path: str, descriptor: int | None = None) -> "FileId":
        about = os.stat(path if descriptor is None else descriptor)
        return cls(path, about.st_ino, about.st_mtime_ns)


class FileHandles:
    """Open files, the least used closed first."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self.limit, self._open, self._lock = limit, OrderedDict[FileId, int](), threading.Lock()

    def read(self, file: FileId, size: int, offset: int) -> bytes:
        """`size` bytes of a file from `offset` on.

        Raises:
            ArraError: the file is missing, another one than it was, or ends before.
        """
        content = bytearray(size)
        self.read_into(file, memoryview(content), offset)
        return bytes(content)

    def read_into(self, file: FileId, target: memoryview, offset: int) -> None:
        """Nothing; `target` is filled from `offset` on."""
        while len(target):  # one read gives 2 GiB at most
            with self._lock:
                size = os.preadv(self._descriptor(file), [target], offset)
            if not size:
                raise ArraError(f"{file.path}: ends early (damaged); run: arra prepare RECIPE")
            target, offset = target[size:], offset + size

    def _descriptor(self, file: FileId) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        while len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1])
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArraError(
                f"{file.path}: missing or unreadable ({error.strerror}); run: arra prepare RECIPE"
            ) from error
        if FileId.of(file.path, descriptor) != file:
            os.close(descriptor)
            raise ArraError(f"{file.path}: replaced while it was being read; start again")
        self._open[file] = descriptor
        return descriptor


HANDLES = FileHandles()


def map_table(path: Path) -> pa.Table:
    """The table of an Arrow file, memory-mapped: nothing is read before it is looked at.

    Raises:
        ArraError: the file is missing or damaged.
    """
    return _mapped(path)[0]


def one_chunk(table: pa.Table, name: str) -> pa.Array:
    """A column of a mapped table where it lies; our files hold one batch. (`combine_chunks` would copy it.)"""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _mapped(path: Path) -> tuple[pa.Table, int]:
    """The mapped table and the address at which the file begins."""
    try:
        with pa.memory_map(str(path)) as source:  # closing gives the handle back, the map stays with the buffers
            start = source.read_buffer(1)
            source.seek(0)
            return pa.ipc.open_file(source).read_all(), start.address
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ArraError(f"{path}: missing or damaged ({reason}); run: arra prepare RECIPE") from error


class ArrowCells:
    """The layout of one Arrow file of one batch, and its cells: numbers, texts, lists of them."""

    def __init__(self, path: Path) -> None:
        table, begin = _mapped(path)
        self.file, self.num_rows = FileId.of(str(path)), len(table)
        self.types: dict[str, pa.DataType] = {}
        self.places: dict[str, list[int]] = {}
        for name in table.column_names:
            array = one_chunk(table, name)
            self.types[name] = array.type
            self.places[name] = [-1 if buffer is None else buffer.address - begin for buffer in array.buffers()]

    def values_place(self, name: str) -> int:
        """Where the flat values of a list column begin in the file."""
        return self.places[name][-1]

    def get(self, name: str, row: int) -> Any:
        """The cell of a column of texts, lists of texts, or integers; None where it is null."""
        kind, places = self.types[name], self.places[name]
        if places[0] >= 0 and not HANDLES.read(self.file, 1, places[0] + row // 8)[0] >> row % 8 & 1:
            return None
        if pa.types.is_string(kind):
            return self._text(places[1], places[2], row)
        if pa.types.is_list(kind):
            first, last = self._pair(places[1], row)
            return [self._text(places[3], places[4], place) for place in range(first, last)]
        width = kind.bit_width // 8
        return int.from_bytes(HANDLES.read(self.file, width, places[1] + row * width), "little", signed=True)

    def _pair(self, offsets: int, row: int) -> tuple[int, int]:
        first, last = np.frombuffer(HANDLES.read(self.file, 8, offsets + 4 * row), np.int32)
        return int(first), int(last)

    def _text(self, offsets: int, data: int, row: int) -> str:
        first, last = self._pair(offsets, row)
        return HANDLES.read(self.file, last - first, data + first).decode() if last > first else ""
