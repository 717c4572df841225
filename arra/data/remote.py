"""An export read from afar: records mirrored into the cache, columns fetched by row group when a batch asks for them.

OUT/manifest.json   the records as a store has them, ordered by split and source; hash and size of the mirrored files
    records/        one Arrow file for each Parquet file, in the store's own format, naming no picture
    tokenizer/      the tokenizer that was trained into the store, if one was
    data/           SPLIT-00000-of-0000N.parquet: id, prompt, alternatives, label, split, group and every column
    columns.json    who made each column; of every Parquet file: rows, hash, and of each of its row groups a digest

`arra data export` writes it (`arra/stages/export.py`). What comes from afar is not trusted: names of files are made
here, the manifest's hashes cover everything else, and each row group must have the digest that `columns.json` says.
Legend: G records of a row group, V variants, then the column's own shape.
"""

import hashlib
import json
import math
import mmap
import re
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arra.data.cells import map_table
from arra.data.columns import ColumnEntry, ColumnReader, ColumnWriter, ShardEntry, folder_lock
from arra.data.lines import one_line
from arra.data.openmoji import cache_folder
from arra.data.store import COLUMNS_FILE, RECORDS, SCHEMA, Store
from arra.errors import ArraError
from arra.runs import atomic_file, atomic_write, file_hash

EDITION = 1
TOKENIZER_FILES = ("tokenizer/tokenizer.safetensors", "tokenizer/tokenizer.json")
"""As `arra/tokenizers/image.py` names them; the card last, a folder with a card is a tokenizer."""
RECORD_FIELDS = ("id", "prompt", "alternatives", "label", "split", "group")
"""What stands beside the columns in a Parquet file."""
CACHE_BYTES = 2**28
"""Decoded row groups are held up to about this much."""
WINDOW = 64
"""Row groups whose records are mixed: the more, the nearer to a full shuffle; three windows must fit the cache."""
FETCHES = 8
"""Requests at a time: enough to hide a round trip of some 50 ms."""
RETRY_SECONDS = (1.0, 5.0, 25.0)
"""Pauses before a request is made again: a training of days outlives a server's hiccup."""
MAX_GAP = 2**20
"""Bytes between two wanted columns that are rather read than skipped with a request of their own."""
FOOTER_BYTES = 2**16
"""Read from the end of a file at first; nearly every footer fits."""
MAX_MANIFEST_BYTES, MAX_COLUMNS_BYTES = 2**26, 2**29
MAX_VALUES = 2**26
"""Values of one record in one column, far above any picture; more is a trap for memory."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**50)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MirroredFile(_Model):
    """A file that is copied into the cache."""

    bytes: Count
    sha256: Sha256


class ExportNote(_Model):
    """What `manifest.json` says beside the records."""

    edition: Literal[1]
    made_from: Sha256
    """Of the records, the columns and the options; the same export is not made twice."""
    files: dict[str, MirroredFile]


class ColumnPart(_Model):
    """One column's share of a Parquet file."""

    failed: tuple[Count, ...]
    """Rows of the file without a value."""
    bytes: Count
    """Of the values, decoded."""
    groups: tuple[Digest, ...]
    """Of the content of every row group."""


class DataFile(_Model):
    """One Parquet file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}-\d{5}-of-\d{5}\.parquet$")]
    rows: Annotated[int, Field(ge=1, le=2**31)]
    bytes: Count
    sha256: Sha256
    columns: dict[str, ColumnPart]


class ColumnNote(_Model):
    """Who made a column, and of what it is made."""

    made_by: dict[str, Any]
    shape: tuple[Annotated[int, Field(ge=1, le=MAX_VALUES)] | None, ...]
    variants: Annotated[int, Field(ge=1, le=1024)]
    versions: dict[str, str] = {}
    dtype: Annotated[str, Field(pattern=r"^(bool|u?int(8|16|32|64)|float(16|32|64))$")]

    @property
    def width(self) -> int:
        """Values of one record where all have the same shape."""
        return self.variants * math.prod(size or 1 for size in self.shape)


class Columns(_Model):
    """What `columns.json` says."""

    edition: Literal[1]
    rows_per_group: Annotated[int, Field(ge=1, le=2**24)]
    columns: dict[str, ColumnNote]
    files: tuple[DataFile, ...]

    def check(self, shards: Sequence[int]) -> None:
        """Nothing.

        Raises:
            ValueError: the files are not those of the manifest's shards, or a number contradicts another.
        """
        if [file.rows for file in self.files] != list(shards):
            raise ValueError("its files do not hold the records of manifest.json")
        for name, note in self.columns.items():
            if note.width > MAX_VALUES:
                raise ValueError(f"column {name[:64]!r} has {note.width} values in a record")
        for file in self.files:
            if set(file.columns) != set(self.columns):
                raise ValueError(f"{file.name} has other columns than the rest")
            for name, part in file.columns.items():
                if len(part.groups) != -(-file.rows // self.rows_per_group):
                    raise ValueError(f"{file.name} has {len(part.groups)} row groups of column {name[:64]!r}")
                if len(part.failed) > file.rows or any(row >= file.rows for row in part.failed):
                    raise ValueError(f"{file.name} names failed rows that it does not have")

    def entry(self, name: str) -> ColumnEntry:
        """The column as a store describes it, a shard for each file."""
        note = self.columns[name]
        shards = []
        for file in self.files:
            part = file.columns[name]
            content = hashlib.sha256("".join(part.groups).encode()).hexdigest()
            shards.append(ShardEntry(file.rows, len(part.failed), part.bytes, content))
        return ColumnEntry(note.made_by, note.shape, note.variants, note.dtype, tuple(shards), note.versions)


@dataclass(frozen=True)
class Decoded:
    """The values of a row group's records."""

    values: np.ndarray
    """Flat; of a column of one shape G times its width, zeros where a record failed."""
    valid: np.ndarray
    """(G,) bool."""
    offsets: np.ndarray | None = None
    """(G + 1,) of a ragged column."""
    dims: np.ndarray | None = None
    """(G, D) of a ragged column."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.offsets, self.dims) if part is not None)

    def digest(self) -> str:
        """What tells this content from any other, whatever program wrote the file."""
        hashed = hashlib.blake2b(np.packbits(self.valid).tobytes(), digest_size=16)
        for part in (self.offsets, self.dims, self.values):
            if part is not None:
                little = np.ascontiguousarray(part.reshape(-1), dtype=part.dtype.newbyteorder("<"))
                hashed.update(little.view(np.uint8).data)
        return hashed.hexdigest()


def decode_column(table: pa.Table, name: str, note: ColumnNote) -> Decoded:
    """A column of a row group as arrays.

    Raises:
        ValueError: it does not hold what its entry says.
    """
    column, dtype = table.column(name).combine_chunks(), np.dtype(note.dtype)
    if not pa.types.is_list(column.type) or column.type.value_type != pa.from_numpy_dtype(dtype):
        raise ValueError(f"column {name!r} holds {column.type}, expected lists of {note.dtype}")
    flat, valid = column.flatten(), column.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if flat.null_count:
        raise ValueError(f"column {name!r} holds {flat.null_count} empty values")
    values = flat.to_numpy(zero_copy_only=False)
    if None not in note.shape:
        if (lengths[valid] != note.width).any():
            raise ValueError(f"column {name!r} does not hold {note.width} values in every record")
        if not valid.all():
            spread = np.zeros((len(valid), note.width), dtype)
            spread[valid] = values.reshape(-1, note.width)
            values = spread.reshape(-1)
        return Decoded(values, valid)
    dims = table.column(f"{name}.shape").combine_chunks()
    sizes = dims.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    if dims.null_count or sizes.size != len(valid) * len(note.shape):
        raise ValueError(f"column {name!r} does not say the shape of every record")
    sizes = sizes.reshape(len(valid), len(note.shape))
    sizes[~valid] = 0
    if (sizes < 0).any() or (np.prod(sizes, axis=1, dtype=np.float64)[valid] != lengths[valid]).any():
        raise ValueError(f"column {name!r} holds other numbers of values than its shapes say")
    return Decoded(values, valid, np.concatenate([[0], np.cumsum(lengths)]), sizes)


def _network_errors() -> tuple[type[BaseException], ...]:
    """What the file systems that are loaded raise when a server does not answer as it should, or a URL is none."""
    names = {
        "aiohttp": "ClientError",
        "httpx": "HTTPError",
        "httpx2": "HTTPError",
        "botocore.exceptions": "BotoCoreError",
    }
    names |= {"requests": "RequestException", "google.auth.exceptions": "GoogleAuthError"}
    found = [getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules]
    return (OSError, ValueError, *(each for each in found if isinstance(each, type)))


@dataclass(frozen=True)
class Place:
    """Where an export lies, as fsspec opens it."""

    text: str
    files: Any
    root: str

    @classmethod
    def open(cls, text: str) -> "Place":
        """The place of a path or URL.

        Raises:
            ArraError: its protocol is unknown, or needs a package that is not here.
        """
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(text)
        except ImportError as error:
            extra = text.partition(":")[0].replace("https", "http")
            raise ArraError(
                f"{text}: this protocol needs another package ({one_line(error)}); install it: "
                f"pip install 'fsspec[{extra}]'"
            ) from error
        except _network_errors() as error:
            raise ArraError(
                f"{text}: cannot be opened ({one_line(error)}); expected a folder, or a URL such as https://, s3://, hf://"
            ) from error
        return cls(text.rstrip("/"), files, str(root).rstrip("/"))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes of a file, asked for again if the server fails.

        Raises:
            ArraError: it is not there or cannot be read.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                content: bytes = self.files.cat_file(f"{self.root}/{name}", start=start, end=stop)
                return content
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
                raise ArraError(f"{self.text}/{name}: missing or not readable; is the address right?") from error
            except _network_errors() as error:
                if pause is None or _is_final(error):
                    raise ArraError(
                        f"{self.text}/{name}: cannot be read ({one_line(error)}); check the network and run again"
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last pause is None")

    def read_range(self, name: str, start: int, stop: int, size: int) -> bytes:
        """The bytes `start` to `stop` of a file of `size` bytes.

        Raises:
            ArraError: it is not there, cannot be read, or is shorter.
        """
        content = self.read(name, start, stop)
        if len(content) == size != stop - start:  # a server that knows no ranges sends all
            content = content[start:stop]
        if len(content) != stop - start:
            raise ArraError(
                f"{self.text}/{name}: {len(content)} bytes came where {stop - start} were asked for; "
                "the file is damaged or its server knows no ranges"
            )
        return content

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where its server does not say."""
        try:
            size: int | None = self.files.size(f"{self.root}/{name}")
            return size
        except _network_errors() as error:
            raise ArraError(f"{self.text}/{name}: missing or not readable ({one_line(error)})") from error

    def copy(self, name: str, target: Path, expected: MirroredFile) -> None:
        """Nothing; `target` is the file, or nothing is there.

        Raises:
            ArraError: it is not there, cannot be read, or is another file than the manifest names.
        """
        hashed, size = hashlib.sha256(), 0
        with atomic_file(target) as temporary, temporary.open("wb") as file:
            while size < expected.bytes:
                stop = min(expected.bytes, size + 2**24)
                content = self.read_range(name, size, stop, expected.bytes)
                file.write(content)
                hashed.update(content)
                size = stop
            if hashed.hexdigest() != expected.sha256:
                raise ArraError(f"{self.text}/{name}: damaged (its hash is not that of manifest.json); export it again")


class RowGroups:
    """Row groups of an export, fetched by threads and held decoded up to a number of bytes; all columns share them."""

    def __init__(self, place: Place, about: Columns, *, max_bytes: int | None = None) -> None:
        self.place, self.about, self.max_bytes = place, about, CACHE_BYTES if max_bytes is None else max_bytes
        self.sizes = [
            min(about.rows_per_group, file.rows - start)
            for file in about.files
            for start in range(0, file.rows, about.rows_per_group)
        ]
        self.first_groups = np.cumsum([0, *(-(-file.rows // about.rows_per_group) for file in about.files)])
        self.readers: weakref.WeakSet[RemoteColumn] = weakref.WeakSet()
        """Columns that are being read; a row group is fetched for all of them at once."""
        self.fetched = 0
        """Row groups fetched so far."""
        self._footers: dict[int, pq.FileMetaData] = {}
        self._reading_footer = [threading.Lock() for _ in about.files]
        self._held: OrderedDict[int, _Group] = OrderedDict()
        self._lock = threading.RLock()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(FETCHES, thread_name_prefix="row-groups")

    def ask(self, group: int, name: str) -> "Future[dict[str, Decoded]]":
        """The group's columns, the named one among them, now or soon."""
        with self._lock:
            held = self._held.get(group)
            if held is not None and name in held.names:
                self._held.move_to_end(group)
                return held.future
            names = {name, *(reader.name for reader in self.readers), *(() if held is None else held.names)}
            future = self._pool.submit(self._fetch, group, names)
            self._held[group] = _Group(frozenset(names), future)
            self._held.move_to_end(group)
        future.add_done_callback(lambda done: self._account(group, done))
        return future

    def close(self) -> None:
        """Nothing; what was asked for ahead and has not begun never begins."""
        self._pool.shutdown(cancel_futures=True)

    def _account(self, group: int, done: "Future[dict[str, Decoded]]") -> None:
        with self._lock:
            held = self._held.get(group)
            if held is None or held.future is not done:
                return
            if done.cancelled() or done.exception() is not None:
                del self._held[group]  # whoever asks next tries again
                return
            held.bytes = sum(decoded.nbytes for decoded in done.result().values())
            total = sum(each.bytes for each in self._held.values())
            for oldest in list(self._held):
                if total <= self.max_bytes or len(self._held) == 1:
                    break
                if self._held[oldest].future.done() and oldest != group:
                    total -= self._held.pop(oldest).bytes

    def _fetch(self, group: int, names: Iterable[str]) -> dict[str, Decoded]:
        number = int(np.searchsorted(self.first_groups, group, side="right")) - 1
        file, local = self.about.files[number], group - int(self.first_groups[number])
        where = f"{self.place.text}/data/{file.name}: row group {local}"
        try:
            found = self._decode(number, local, sorted(names))
        except (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError, pa.ArrowException) as error:
            raise ArraError(f"{where}: damaged ({one_line(error)}); fetch or export the file again") from error
        for name, decoded in found.items():
            if decoded.digest() != file.columns[name].groups[local]:
                raise ArraError(f"{where}: column '{name}' is not what {COLUMNS_FILE} says; export it again")
        with self._lock:
            self.fetched += 1
        return found

    def _decode(self, number: int, local: int, names: Sequence[str]) -> dict[str, Decoded]:
        file, rows = self.about.files[number], self.sizes[int(self.first_groups[number]) + local]
        footer = self._footer(number)
        if footer.num_row_groups != len(file.columns[names[0]].groups) or footer.row_group(local).num_rows != rows:
            raise ValueError("its footer counts other rows")
        notes = {name: self.about.columns[name] for name in names}
        fields = [*names, *(f"{name}.shape" for name, note in notes.items() if None in note.shape)]
        wanted = [f"{field}.list.element" for field in fields]
        content = mmap.mmap(-1, file.bytes)  # the file as far as it is needed: what is not written takes no memory
        for start, stop in _ranges(footer.row_group(local), wanted):
            content[start:stop] = self.place.read_range(f"data/{file.name}", start, stop, file.bytes)
        with pq.ParquetFile(pa.BufferReader(pa.py_buffer(content)), metadata=footer) as opened:
            table = opened.read_row_group(local, columns=wanted, use_threads=False)
        if len(table) != rows:
            raise ValueError(f"{len(table)} rows, expected {rows}")
        return {name: decode_column(table, name, note) for name, note in notes.items()}

    def _footer(self, number: int) -> pq.FileMetaData:
        with self._reading_footer[number]:
            if number not in self._footers:
                file, name = self.about.files[number], f"data/{self.about.files[number].name}"
                tail = self.place.read_range(name, max(0, file.bytes - FOOTER_BYTES), file.bytes, file.bytes)
                size = int.from_bytes(tail[-8:-4], "little") + 8
                if tail[-4:] != b"PAR1" or size > file.bytes:
                    raise ValueError("no Parquet file")
                if size > len(tail):
                    tail = self.place.read_range(name, file.bytes - size, file.bytes, file.bytes)
                self._footers[number] = pq.read_metadata(pa.BufferReader(tail))
            return self._footers[number]


@dataclass
class _Group:
    names: frozenset[str]
    future: "Future[dict[str, Decoded]]"
    bytes: int = 0


def _ranges(group: pq.RowGroupMetaData, wanted: Sequence[str]) -> list[tuple[int, int]]:
    """The bytes of a row group's wanted columns, neighbours together."""
    found: list[tuple[int, int]] = []
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema not in wanted:
            continue
        start = min(each for each in (chunk.dictionary_page_offset, chunk.data_page_offset) if each is not None)
        found.append((start, start + chunk.total_compressed_size))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if merged and start - merged[-1][1] <= MAX_GAP:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


class RemoteColumn(ColumnReader):
    """A column of an export, read as one of a store is; a row group stands where a shard does."""

    def __init__(self, name: str, entry: ColumnEntry, groups: RowGroups) -> None:
        self.name, self.entry, self.groups = name, entry, groups
        self.starts = np.cumsum([0, *groups.sizes])
        groups.readers.add(self)

    def check_files(self, *, content: bool) -> None:
        """Nothing; each row group is checked when it comes."""

    def valid(self) -> np.ndarray:
        """Which records have a value: bool (N,); nothing is fetched for it."""
        found, first = np.ones(len(self), dtype=bool), 0
        for file in self.groups.about.files:
            found[first + np.array(file.columns[self.name].failed, dtype=np.int64)] = False
            first += file.rows
        return found

    def expect(self, rows: np.ndarray) -> None:
        """Nothing; the rows' groups are being fetched."""
        for number in np.unique(np.searchsorted(self.starts, rows, side="right") - 1).tolist():
            self.groups.ask(number, self.name)

    def take(self, rows: np.ndarray, *, variants: np.ndarray | None = None) -> np.ndarray:
        """As `ColumnReader.take`.

        Raises:
            ArraError: a row group cannot be fetched or is damaged.
        """
        if self.entry.is_ragged:
            raise ValueError(f"{self.name}: records differ in shape; use take_ragged")
        shape = tuple(size for size in self.entry.shape if size is not None)
        out = np.empty((len(rows), *shape), dtype=self.entry.dtype)
        which = np.zeros(len(rows), dtype=np.int64) if variants is None else variants
        for group, places, local in self._by_group(rows):
            values = self._group(group).values.reshape(-1, self.entry.variants, *shape)
            out[places] = values[local, which[places]]
        return out

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]:
        """As `ColumnReader.take_ragged`.

        Raises:
            ArraError: a row group cannot be fetched or is damaged.
        """
        out: list[np.ndarray] = [np.empty(0)] * len(rows)
        for group, places, local in self._by_group(rows):
            held = self._group(group)
            assert held.offsets is not None
            assert held.dims is not None
            for place, row in zip(places.tolist(), local.tolist(), strict=True):
                out[place] = held.values[held.offsets[row] : held.offsets[row + 1]].reshape(held.dims[row]).copy()
        return out

    def shapes(self) -> np.ndarray:
        """Of a ragged column, the shape of every record: (N, number of dimensions); fetches the whole column."""
        return np.concatenate([self._group(group).dims for group in range(len(self.groups.sizes))])

    def _by_group(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(group, places in `rows`, rows inside the group) of every group that is asked; all are being fetched."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"{self.name}: rows {rows.min()}..{rows.max()} of {len(self)}")
        self.expect(rows)
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(groups, kind="stable")
        numbers, firsts = np.unique(groups[order], return_index=True)
        for group, places in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=False):
            yield group, places, rows[places] - self.starts[group]

    def _group(self, group: int) -> Decoded:
        return self.groups.ask(group, self.name).result()[self.name]


@dataclass(frozen=True)
class RemoteStore(Store):
    """An export as a store that is only read. `path` is the mirror of its records."""

    source: Place = field(kw_only=True)
    columns: Columns = field(kw_only=True, repr=False)

    @property
    def place(self) -> str:
        """The path or URL of the export."""
        return self.source.text

    @cached_property
    def groups(self) -> RowGroups:
        """The row groups, held for all columns together."""
        return RowGroups(self.source, self.columns)

    def column_names(self) -> list[str]:
        return sorted(self.columns.columns)

    def entry(self, name: str) -> ColumnEntry | None:
        return self.columns.entry(name) if name in self.columns.columns else None

    def reader(self, name: str, *, content: bool | None = None) -> RemoteColumn:
        """A column whose row groups are fetched when they are asked for.

        Raises:
            ArraError: the export has no such column.
        """
        return RemoteColumn(name, self._entry(name), self.groups)

    def writer(self, name: str, **about: Any) -> ColumnWriter:
        """Nothing.

        Raises:
            ArraError: always.
        """
        raise ArraError(f"{self.place}: an export is only read; add the column to the store it was made from")

    def group_sizes(self, rows: np.ndarray) -> tuple[int, ...]:
        """How many of the rows (ascending) lie in each row group, from the first group that has one to the last."""
        edges = np.searchsorted(rows, np.cumsum([0, *self.groups.sizes]))
        counts = np.diff(edges)
        return tuple(counts[counts > 0].tolist())

    def window(self, columns: Sequence[str]) -> int:
        """How many row groups may be mixed, so that three windows of the columns fit the cache."""
        total = sum(shard.bytes for name in columns for shard in self._entry(name).shards)
        per_group = max(1, total // max(1, len(self.groups.sizes)))
        return max(1, min(WINDOW, CACHE_BYTES // (3 * per_group)))


def open_store(place: Path | str) -> Store:
    """An existing store, or an export of one, at a path or a URL.

    Raises:
        ArraError: there is none, or it is of another format.
    """
    url = remote_text(place)
    if url is not None or (Path(place) / COLUMNS_FILE).is_file():
        return open_remote(url or str(Path(place).resolve()))
    return Store.open(Path(place))


def open_remote(place: str) -> RemoteStore:
    """The export at a path or URL; its records are copied into the cache unless they are there.

    Raises:
        ArraError: there is none, it cannot be read, or it is damaged.
    """
    source = Place.open(place)
    content = source.read("manifest.json", 0, MAX_MANIFEST_BYTES)
    about, note = _checked_manifest(source, content)
    folder = cache_folder() / "remote" / hashlib.sha256(content).hexdigest()[:32]
    with folder_lock(folder):
        if not (folder / "manifest.json").is_file():
            for name, file in note.files.items():
                _mirror(source, name, folder / name, file)
            atomic_write(folder / "manifest.json", content)
    try:
        columns = Columns.model_validate_json((folder / COLUMNS_FILE).read_bytes())
        columns.check(about["shards"])
    except (OSError, ValueError) as error:
        raise ArraError(f"{source.text}/{COLUMNS_FILE}: {_fault(error)}; export it again") from error
    return RemoteStore(folder, source=source, columns=columns)


def _checked_manifest(source: Place, content: bytes) -> tuple[dict[str, Any], ExportNote]:
    where = f"{source.text}/manifest.json"
    try:
        found = json.loads(content)
        about, note = dict(found["records"]), ExportNote.model_validate(found["export"])
        shards = about["shards"]
        if not shards or not all(type(rows) is int and 0 < rows < 2**31 for rows in shards):
            raise ValueError("its shards are no numbers of records")
        for key, kind in {"splits": dict, "sources": list, "classes": list, "attribution": str, "sha256": str}.items():
            if not isinstance(about[key], kind):
                raise ValueError(f"its {key} are missing")
        names = [*(f"{RECORDS}/{number:05d}.arrow" for number in range(len(shards))), COLUMNS_FILE]
        if sorted(set(note.files) - set(TOKENIZER_FILES)) != sorted(names):
            raise ValueError("it names other files than its records have")
        if note.files[COLUMNS_FILE].bytes > MAX_COLUMNS_BYTES:
            raise ValueError(f"{COLUMNS_FILE} is too large")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArraError(f"{where}: no export of this version ({_fault(error)}); make one: arra data export") from error
    return about, note


def _mirror(source: Place, name: str, target: Path, file: MirroredFile) -> None:
    """Nothing; the file is in the cache, whole, and if it holds records, they name no picture on this machine."""
    if not (target.is_file() and target.stat().st_size == file.bytes and file_hash(target) == file.sha256):
        source.copy(name, target, file)
    if target.suffix == ".arrow":
        try:
            table = map_table(target)
            table.validate(full=True)
            if table.schema != SCHEMA or pc.any(pc.not_equal(pc.fill_null(table.column("image"), "?"), "")).as_py():
                raise ValueError("they have other fields, or name pictures, which those of an export do not")
        except (ValueError, pa.ArrowException, ArraError) as error:
            target.unlink()
            raise ArraError(f"{source.text}/{name}: no records of an export ({one_line(error)})") from error


def _is_final(error: BaseException) -> bool:
    """Whether asking again is of no use: a request that was refused (too many at once and a time-out excepted)."""
    status = getattr(error, "status", None)
    return isinstance(error, ValueError) or (
        isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    )


def _fault(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}"[:300]
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return one_line(error)


def remote_text(place: Path | str) -> str | None:
    """The URL that a place names, or None if it is a path; a path made of a URL has lost a slash."""
    match = re.match(r"^([a-z][a-z0-9+.-]+(?:::[a-z][a-z0-9+.-]+)*):/+(.*)$", str(place), re.DOTALL)
    if match is None:
        return None
    return f"{match[1]}://{'/' if match[1] == 'file' else ''}{match[2]}"
