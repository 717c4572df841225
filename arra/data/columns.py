"""One column of the store: Arrow files that any Arrow reader opens, written shard by shard, published whole.

store/NAME/00000.arrow ...   id, NAME (a list; of any length beside its `shape`); null where a record failed
           column.json       who made it, shape, dtype; of every shard: rows, failed, bytes, sha256
           failures.jsonl    id, where, reason of the records without a value, if there are any
      .NAME.part/            the same in the making: 00000.json beside a file says that it is whole

A shard's file is written under another name and renamed, then its .json; the folder is renamed when every shard is
there. So a kill at any point leaves whole shards and at most one file to make again.
Legend: N records, V variants (crops) of one picture, then the column's own shape: codes (h, w), features (F,).
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arra.data.cells import HANDLES, ArrowCells, map_table, one_chunk
from arra.data.records import Failure
from arra.errors import ArraError
from arra.runs import atomic_file, atomic_write, file_hash, writing

ENTRY_FILE, FAILURES_FILE = "column.json", "failures.jsonl"
RAGGED_SHARDS = 64
"""Shards of a ragged column whose offsets are held in memory."""

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ShardEntry:
    """What is known of one shard's file."""

    rows: int
    failed: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ColumnEntry:
    """What `column.json` says."""

    made_by: dict[str, Any]
    shape: Shape
    """Of one variant; null where records differ."""
    variants: int
    dtype: str
    shards: tuple[ShardEntry, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries that made it: another Pillow may give other pixels. Told, and not held against a recipe."""

    @property
    def failed(self) -> int:
        """Records without a value."""
        return sum(shard.failed for shard in self.shards)

    @property
    def is_ragged(self) -> bool:
        """Whether records differ in shape."""
        return None in self.shape

    def sha256(self) -> str:
        """One hash over the content of all shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def read_entry(folder: Path) -> ColumnEntry | None:
    """The entry of a published column, or None if there is none.

    Raises:
        ArraError: the file is damaged.
    """
    path = folder / ENTRY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(ShardEntry(**shard) for shard in content["shards"])
        return ColumnEntry(
            dict(content["made_by"]),
            tuple(content["shape"]),
            content["variants"],
            content["dtype"],
            shards,
            dict(content.get("versions", {})),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArraError(f"{path}: unreadable ({error}); delete the folder {folder} and prepare again") from error


def library_versions() -> dict[str, str]:
    """Versions of what decodes, resizes and computes."""
    return {name: metadata.version(name) for name in ("arra", "pillow", "torch")}


def write_table(path: Path, table: pa.Table) -> None:
    """Nothing; `path` holds the table as an Arrow file of one record batch, uncompressed so that it can be mapped."""
    table = table.combine_chunks()
    with (
        atomic_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=max(1, len(table)))


@contextmanager
def folder_lock(
    path: Path, *, name: str = ".lock", wait: bool = True, busy: str = "is preparing this store"
) -> Iterator[None]:
    """A block that one process at a time is in; others wait, or with `wait` false are refused.

    The system releases the lock if the process dies. `busy` says what the other process does.

    Raises:
        ArraError: another process is in it, or the folder cannot be written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        file = (path / name).open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ArraError(f"{path}: another process {busy}; wait for it, or use another folder") from None
        yield


class ColumnWriter:
    """A column in the making; several processes may write different shards of it."""

    def __init__(
        self,
        store: Path,
        name: str,
        *,
        made_by: Mapping[str, Any],
        shape: Shape,
        variants: int,
        dtype: str,
        num_shards: int,
        again: bool = False,
    ) -> None:
        """Continues what was begun with exactly these arguments, and forgets anything else.

        A column that is published just so is left alone, unless it is to be made `again`.

        Raises:
            ArraError: the store cannot be written.
        """
        if np.dtype(dtype).kind not in "uif":
            raise ValueError(f"{name}: {dtype} columns are not read back; use integers or floats")
        self.store, self.name = store, name
        self.folder, self.part = store / name, store / f".{name}.part"
        header = {"made_by": made_by, "shape": shape, "variants": variants, "dtype": dtype, "num_shards": num_shards}
        header["versions"] = library_versions()
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        begun = self.part / "header.json"
        with folder_lock(store), writing(self.part):
            if not again and self._published() is not None:
                tidy_column(self.folder)
                return
            if not _says(begun, self.header):
                shutil.rmtree(self.part, ignore_errors=True)
                atomic_write(begun, json.dumps(self.header))

    def done(self) -> dict[int, int]:
        """Number of failed records of every shard that is whole."""
        published = None if self.part.is_dir() else self._published()
        if published is not None:
            return {number: shard.failed for number, shard in enumerate(published.shards)}
        found = {}
        for path in sorted(self.part.glob("[0-9]*.json")):
            found[int(path.stem)] = int(json.loads(path.read_text())["failed"])
        return found

    def write(
        self,
        shard: int,
        ids: pa.Array,
        values: np.ndarray | Sequence[np.ndarray],
        *,
        valid: np.ndarray,
        failures: Sequence[Failure] = (),
    ) -> None:
        """Nothing; the shard is whole.

        `values` are dense (N, V, *shape), or with a ragged shape one array per record; `valid` (N,) says which rows
        hold a value, `failures` why the others do not.
        """
        table = self._table(ids, values, valid)
        path = self.part / f"{shard:05d}.arrow"
        with folder_lock(self.store):
            if not self.part.is_dir() and self._published() is not None:
                return  # another process made this shard too, and published
            write_table(path, table)
            about = ShardEntry(len(table), int((~valid).sum()), path.stat().st_size, file_hash(path))
            content = {**asdict(about), "failures": [asdict(failure) for failure in failures]}
            atomic_write(path.with_suffix(".json"), json.dumps(content, ensure_ascii=False))

    def _table(self, ids: pa.Array, values: np.ndarray | Sequence[np.ndarray], valid: np.ndarray) -> pa.Table:
        dtype = np.dtype(self.header["dtype"])
        mask = None if valid.all() else pa.array(~valid)
        columns: dict[str, Any] = {"id": ids}
        if None in self.header["shape"]:
            rows = [np.ascontiguousarray(row, dtype=dtype) for row in values]
            offsets = np.cumsum([0, *(row.size for row in rows)], dtype=np.int64)
            flat = pa.array(np.concatenate([row.ravel() for row in rows]) if rows else np.empty(0, dtype))
            columns[self.name] = pa.LargeListArray.from_arrays(pa.array(offsets), flat, mask=mask)
            dims = np.array([row.shape for row in rows], dtype=np.int32).reshape(len(rows), -1)
            columns["shape"] = pa.FixedSizeListArray.from_arrays(pa.array(dims.ravel()), len(self.header["shape"]))
        else:
            dense = np.ascontiguousarray(values, dtype=dtype)
            width = self.header["variants"] * math.prod(self.header["shape"])
            if dense.size != len(ids) * width:
                raise ValueError(f"{self.name}: {dense.shape} for {len(ids)} records of {width} values")
            columns[self.name] = pa.FixedSizeListArray.from_arrays(pa.array(dense.ravel()), width, mask=mask)
        about = {key: json.dumps(self.header[key]) for key in ("shape", "variants", "made_by")}
        return pa.table(columns).replace_schema_metadata({f"arra.{key}": value for key, value in about.items()})

    def failures(self) -> list[Failure]:
        """Why records of the whole shards have no value, in record order."""
        if not self.part.is_dir():
            return read_failures(self.folder)
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.part.glob("[0-9]*.json"))]
        return [Failure(**failure) for content in contents for failure in content["failures"]]

    def forget_failed(self, shards: Collection[int]) -> None:
        """Nothing; those of the shards that have failed records will be made again: they may be mended now."""
        for shard, failed in self.done().items():
            if failed and shard in shards and self.part.is_dir():
                (self.part / f"{shard:05d}.json").unlink()

    def publish(self) -> bool:
        """Whether the column is published now: every shard is whole and the folder has its name."""
        with folder_lock(self.store), writing(self.folder):
            if not self.part.is_dir():  # another process made the last shard and published
                return self._published() is not None
            sidecars = [self.part / f"{shard:05d}.json" for shard in range(self.header["num_shards"])]
            if not all(path.is_file() for path in sidecars):
                return False
            contents = [json.loads(path.read_text()) for path in sidecars]
            failures = [failure for content in contents for failure in content.pop("failures")]
            (self.part / FAILURES_FILE).unlink(missing_ok=True)
            if failures:
                lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
                atomic_write(self.part / FAILURES_FILE, lines)
            header = {key: self.header[key] for key in ("made_by", "shape", "variants", "dtype", "versions")}
            atomic_write(self.part / ENTRY_FILE, json.dumps({**header, "shards": contents}, indent=1) + "\n")
            old = self.store / f".{self.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if self.folder.exists():
                os.replace(self.folder, old)
            os.replace(self.part, self.folder)
            tidy_column(self.folder)
            return True

    def _published(self) -> ColumnEntry | None:
        """The published column, if it was made just so."""
        entry = read_entry(self.folder)
        same = entry is not None and entry.made_by == self.header["made_by"] and entry.dtype == self.header["dtype"]
        return entry if same and len(entry.shards) == self.header["num_shards"] else None  # type: ignore[union-attr]

    def adopt(self) -> None:
        """Nothing; whole shards of the published column, made the same way, are taken over by link.

        Those that have failed records are left to be made again.
        """
        entry = self._published()
        if entry is None:
            return
        with writing(self.part):
            for number, shard in enumerate(entry.shards):
                source = self.folder / f"{number:05d}.arrow"
                if shard.failed or not source.is_file() or file_hash(source) != shard.sha256:
                    continue
                target = self.part / source.name
                if not target.exists():
                    os.link(source, target)
                content = {**asdict(shard), "failures": []}
                atomic_write(target.with_suffix(".json"), json.dumps(content, ensure_ascii=False))


def _says(path: Path, content: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == content)
    except (FileNotFoundError, ValueError):  # not begun, or damaged: begun anew
        return False


def tidy_column(folder: Path) -> None:
    """Nothing; what publishing a column leaves behind, from which a killed start would continue, is gone."""
    for path in (*folder.glob("[0-9]*.json"), *folder.glob(".*.tmp"), folder / "header.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder.parent / f".{folder.name}.old", ignore_errors=True)


def read_failures(folder: Path) -> list[Failure]:
    """The records without a value and why, in record order."""
    try:
        lines = (folder / FAILURES_FILE).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [Failure(**json.loads(line)) for line in lines if line]


class ColumnReader:
    """All rows of a published column, read where they lie: `take` reads the asked rows alone."""

    def __init__(self, folder: Path, entry: ColumnEntry) -> None:
        self.folder, self.entry = folder, entry
        self.name = folder.name
        self.starts = np.cumsum([0, *(shard.rows for shard in entry.shards)])
        self._shards: dict[int, ArrowCells] = {}
        self._ragged: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def check_files(self, *, content: bool) -> None:
        """Nothing.

        Raises:
            ArraError: a file is missing, has another size than the entry says, or (with `content`) another hash.
        """
        for number, shard in enumerate(self.entry.shards):
            path = self._path(number)
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes or (content and file_hash(path) != shard.sha256):
                raise ArraError(
                    f"{path}: missing or damaged (its {'hash' if size == shard.bytes else 'size'} is not that of "
                    f"{ENTRY_FILE}); run: arra prepare RECIPE"
                )

    def valid(self) -> np.ndarray:
        """Which records have a value: bool (N,)."""
        found = np.ones(len(self), dtype=bool)
        for number, shard in enumerate(self.entry.shards):
            if shard.failed:
                column = one_chunk(map_table(self._path(number)), self.name)
                found[self.starts[number] : self.starts[number + 1]] = column.is_valid().to_numpy(zero_copy_only=False)
        return found

    def take(self, rows: np.ndarray, *, variants: np.ndarray | None = None) -> np.ndarray:
        """Values (B, *shape) of the rows, each of the named variant (0 unless given); zeros where a record failed."""
        if self.entry.is_ragged:
            raise ValueError(f"{self.name}: records differ in shape; use take_ragged")
        shape = tuple(size for size in self.entry.shape if size is not None)
        out = np.empty((len(rows), *shape), dtype=self.entry.dtype)
        width = out.itemsize * math.prod(shape)
        if not out.size:
            return out
        target = out.reshape(-1).view(np.uint8).data
        shards, local = self._find(rows)
        places = local * self.entry.variants + (0 if variants is None else variants)
        # neighbours in the file that are neighbours here are one read
        breaks = (np.diff(shards) != 0) | (np.diff(places) != 1)
        firsts = np.concatenate([[0], np.nonzero(breaks)[0] + 1, [len(rows)]]).tolist()
        for first, last in pairwise(firsts):
            cells = self._cells(int(shards[first]))
            offset = cells.values_place(self.name) + int(places[first]) * width
            HANDLES.read_into(cells.file, target[first * width : last * width], offset)
        return out

    def expect(self, rows: np.ndarray) -> None:
        """Nothing; what lies on a local disk needs no fetching."""

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]:
        """The value of each row in its own shape; empty where a record failed."""
        dtype, found = np.dtype(self.entry.dtype), []
        for number, row in zip(*(each.tolist() for each in self._find(rows)), strict=True):
            offsets, dims = self._ragged_layout(number)
            cells = self._cells(number)
            begin, end = (int(each) * dtype.itemsize for each in offsets[row : row + 2])
            content = (
                HANDLES.read(cells.file, end - begin, cells.values_place(self.name) + begin) if end > begin else b""
            )
            found.append(np.frombuffer(content, dtype).reshape(dims[row]).copy())
        return found

    def shapes(self) -> np.ndarray:
        """Of a ragged column, the shape of every record: (N, number of dimensions)."""
        return np.concatenate([self._ragged_layout(number)[1] for number in range(len(self.entry.shards))])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.arrow"

    def _find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of every row, and the row inside it."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"{self.name}: rows {rows.min()}..{rows.max()} of {len(self)}")
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        return shards, np.asarray(rows) - self.starts[shards]

    def _cells(self, number: int) -> ArrowCells:
        if number not in self._shards:
            cells = ArrowCells(self._path(number))
            if cells.num_rows != self.entry.shards[number].rows or self.name not in cells.types:
                raise ArraError(f"{cells.file.path}: not the file that {ENTRY_FILE} tells of; run: arra prepare RECIPE")
            self._shards[number] = cells
        return self._shards[number]

    def _ragged_layout(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Where every row's values begin (then the end), and the rows' shapes."""
        if number not in self._ragged:
            while len(self._ragged) >= RAGGED_SHARDS:
                self._ragged.popitem(last=False)
            table = map_table(self._path(number))
            offsets = np.array(one_chunk(table, self.name).offsets)
            dims = np.array(one_chunk(table, "shape").values).reshape(len(table), -1)
            self._ragged[number] = offsets, dims
        return self._ragged[number]
