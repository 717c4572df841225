"""A store as others take it: a publishable copy in Parquet files, a table of its columns, a check of every file.

`arra data export`, `arra data show`, `arra data verify`. The layout of an export stands in `arra/data/remote.py`.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from arra.data.cells import map_table
from arra.data.columns import ColumnEntry, write_table
from arra.data.index import default_shard_records
from arra.data.remote import (
    EDITION,
    RECORD_FIELDS,
    TOKENIZER_FILES,
    ColumnNote,
    ColumnPart,
    Columns,
    DataFile,
    RemoteStore,
    decode_column,
)
from arra.data.store import COLUMNS_FILE, FORMAT, RECORDS, Store
from arra.errors import ArraError
from arra.runs import atomic_file, atomic_write, file_hash, writing
from arra.stages.makers import PIXELS
from arra.stages.process import Progress, silent

ROWS_PER_GROUP = 1024
TEXTS = ["id", "prompt", "alternatives.list.element", "label", "split", "group"]


@dataclass(frozen=True)
class Verification:
    """What hashing every file of a store found."""

    files: int
    bytes: int
    damaged: tuple[str, ...]
    """A line for each damaged or missing file."""

    @property
    def ok(self) -> bool:
        """Whether every file is as it was written."""
        return not self.damaged


def export_store(
    store: Store,
    out: Path,
    *,
    columns: Sequence[str] | None = None,
    rows_per_group: int = ROWS_PER_GROUP,
    progress: Progress = silent,
) -> Path:
    """The folder `out`, a copy of the store that can be published: records and columns, no pictures, no paths.

    `columns` are all but `pixels` unless named. An export of the same content that is there already is left alone.

    Raises:
        ArraError: `out` holds something else, a column is missing or damaged, or the disk is full.
    """
    if isinstance(store, RemoteStore):
        raise ArraError(f"{store.place}: an export already; copy its folder")
    if rows_per_group < 1:
        raise ArraError(f"--rows-per-group {rows_per_group}: expected a number > 0")
    names = list(columns) if columns is not None else [name for name in store.column_names() if name != PIXELS]
    for name in names:
        if store.entry(name) is None:
            have = ", ".join(store.column_names()) or "none"
            raise ArraError(f"{store.path}: column '{name}' is missing; it has {have}")
    names = sorted(set(names))
    made_from = _identity(store, names, rows_per_group)
    if _is_there(out, made_from):
        return out
    for name in names:
        store.reader(name, content=True)  # damage is not published
    part = out.absolute().parent / f".{out.name}.part"
    with writing(out):
        shutil.rmtree(part, ignore_errors=True)
        (part / "data").mkdir(parents=True)
        try:
            _Export(store, part, names, rows_per_group, progress).write(made_from)
            if out.is_dir():
                out.rmdir()  # it is empty
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return out


def _identity(store: Store, names: Sequence[str], rows_per_group: int) -> str:
    parts = [EDITION, store.manifest_hash(*names), rows_per_group, store.about["attribution"], store.about["classes"]]
    parts += [file_hash(store.path / name) for name in TOKENIZER_FILES if (store.path / name).is_file()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_there(out: Path, made_from: str) -> bool:
    """Whether the folder holds this very export.

    Raises:
        ArraError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["export"]["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArraError(f"{out}: exists and is no export; name a new folder") from None
    if found != made_from:
        raise ArraError(f"{out}: an export of other records or columns; name a new folder or delete this one")
    return True


@dataclass
class _Export:
    store: Store
    part: Path
    names: list[str]
    rows_per_group: int
    progress: Progress

    def __post_init__(self) -> None:
        self.notes: dict[str, ColumnNote] = {}
        for name in self.names:
            entry = self.store.entry(name)
            assert entry is not None
            self.notes[name] = _note(entry)

    def write(self, made_from: str) -> None:
        """Nothing; the part folder holds the whole export, its manifest written last."""
        pieces = list(self._pieces())
        per_split = Counter(split for split, _ in pieces)
        files, digest, done, numbers = [], hashlib.sha256(), 0, Counter[str]()
        for number, (split, rows) in enumerate(pieces):
            self.progress("exporting", done, len(self.store))
            records = self._records(rows)
            for row in records.select(list(RECORD_FIELDS)).to_pylist():
                own = [row[key] for key in ("id", "prompt", "split", "group", "label", "alternatives")]
                digest.update(json.dumps(own).encode())
            write_table(self.part / RECORDS / f"{number:05d}.arrow", records)
            name = f"{split}-{numbers[split]:05d}-of-{per_split[split]:05d}.parquet"
            files.append(self._write_file(name, rows, records))
            numbers[split] += 1
            done += len(rows)
        self.progress("exporting", done, len(self.store))
        about = Columns(edition=1, rows_per_group=self.rows_per_group, columns=self.notes, files=tuple(files))
        atomic_write(self.part / COLUMNS_FILE, about.model_dump_json(indent=1) + "\n")
        for file in TOKENIZER_FILES:
            if (self.store.path / file).is_file():
                atomic_write(self.part / file, (self.store.path / file).read_bytes())
        content = {**self.store.about, "sha256": digest.hexdigest(), "shards": [len(rows) for _, rows in pieces]}
        atomic_write(self.part / "README.md", data_card(content, about))
        mirrored = [*(f"{RECORDS}/{number:05d}.arrow" for number in range(len(pieces))), COLUMNS_FILE, *TOKENIZER_FILES]
        paths = {name: self.part / name for name in mirrored if (self.part / name).is_file()}
        note = {
            "edition": EDITION,
            "made_from": made_from,
            "files": {name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for name, p in paths.items()},
        }
        manifest = {"format": FORMAT, "records": content, "export": note}
        atomic_write(self.part / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def _pieces(self) -> Iterator[tuple[str, np.ndarray]]:
        """(split, rows) of every file: of one split and one source, in the store's order."""
        size = -(-default_shard_records(len(self.store)) // self.rows_per_group) * self.rows_per_group
        table = self.store.table(["split", "source"])
        sources = table.column("source").to_numpy()
        for split in sorted(self.store.about["splits"]):
            inside = np.nonzero(pa.compute.equal(table.column("split"), split).to_numpy())[0]
            for source in np.unique(sources[inside]).tolist():
                rows = inside[sources[inside] == source]
                for start in range(0, len(rows), size):
                    yield split, rows[start : start + size]

    def _records(self, rows: np.ndarray) -> pa.Table:
        """The records of the rows; where their pictures lie on this machine is nobody's business."""
        found = pa.concat_tables(
            self.store.records_of(shard).take(pa.array(local)) for shard, local in _by_shard(self.store, rows)
        )
        place = found.column_names.index("image")
        return found.set_column(place, "image", pa.array([""] * len(found), pa.string())).combine_chunks()

    def _write_file(self, name: str, rows: np.ndarray, records: pa.Table) -> DataFile:
        failed: dict[str, list[int]] = {column: [] for column in self.names}
        sizes, digests = Counter[str](), {column: [] for column in self.names}  # type: ignore[var-annotated]
        path = self.part / "data" / name
        with atomic_file(path) as temporary:
            writer = None
            try:
                for start in range(0, len(rows), self.rows_per_group):
                    table = records.slice(start, self.rows_per_group).select(list(RECORD_FIELDS))
                    for column in self.names:
                        table = self._with_column(table, column, rows[start : start + self.rows_per_group])
                        decoded = decode_column(table, column, self.notes[column])
                        failed[column] += (np.nonzero(~decoded.valid)[0] + start).tolist()
                        digests[column].append(decoded.digest())
                        sizes[column] += decoded.nbytes
                    writer = writer or self._writer(temporary, table.schema)
                    writer.write_table(table, row_group_size=self.rows_per_group)
            finally:
                if writer is not None:
                    writer.close()
        parts = {
            column: ColumnPart(failed=tuple(failed[column]), bytes=sizes[column], groups=tuple(digests[column]))
            for column in self.names
        }
        return DataFile(name=name, rows=len(rows), bytes=path.stat().st_size, sha256=file_hash(path), columns=parts)

    def _with_column(self, table: pa.Table, column: str, rows: np.ndarray) -> pa.Table:
        """The records of a row group with the column's values beside them, as lists that any reader knows."""
        parts = [
            map_table(self.store.path / column / f"{shard:05d}.arrow").take(pa.array(local))
            for shard, local in _by_shard(self.store, rows)
        ]
        found = pa.concat_tables(parts)
        if found.column("id").to_pylist() != table.column("id").to_pylist():
            raise ArraError(f"{self.store.path / column}: its records are not the store's; run: arra prepare RECIPE")
        kind = pa.list_(pa.from_numpy_dtype(np.dtype(self.notes[column].dtype)))
        table = table.append_column(column, found.column(column).combine_chunks().cast(kind))
        if "shape" in found.column_names:
            shapes = found.column("shape").combine_chunks().cast(pa.list_(pa.int32()))
            table = table.append_column(f"{column}.shape", shapes)
        return table

    def _writer(self, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
        # codes and pixels take few values: a dictionary packs their bits, where plain Parquet takes four bytes each
        packed = [f"{name}.list.element" for name, note in self.notes.items() if note.dtype.startswith("u")]
        apart = [f"{name}.list.element" for name, note in self.notes.items() if note.dtype in ("float32", "float64")]
        return pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=TEXTS + packed,
            use_byte_stream_split=apart,
            write_statistics=["id", "label", "split"],
            write_page_checksum=True,
        )


def _by_shard(store: Store, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(shard, rows inside it) of ascending rows."""
    shards = np.searchsorted(np.array(store.shard_starts), rows, side="right") - 1
    for shard in np.unique(shards).tolist():
        yield shard, rows[shards == shard] - store.shard_starts[shard]


def data_card(about: dict[str, Any], columns: Columns) -> str:
    """README.md of an export: what it is, whose it is, how plain tools read it."""
    counts, largest = about["splits"], max(about["splits"], key=about["splits"].get)
    configs = "".join(
        f"  - split: {re.sub(r'[.-]', '_', split)}\n    path: data/{split}-?????-of-*.parquet\n"
        for split in sorted(counts)
    )
    first = next(file.name for file in columns.files if re.fullmatch(rf"{re.escape(largest)}-00000-of-.*", file.name))
    rows = "".join(
        f"| `{name}` | {note.dtype} | {_shape(note)} | {_maker(note.made_by)} |\n"
        for name, note in columns.columns.items()
    )
    shown = next((name for name, note in columns.columns.items() if None not in note.shape), None)
    numpy_line = ""
    if shown is not None:
        note = columns.columns[shown]
        dims = ", ".join(str(size) for size in (note.variants, *note.shape))
        numpy_line = (
            f'values = np.stack(pq.read_table("data/{first}")["{shown}"].drop_null().to_pylist()).reshape(-1, {dims})\n'
        )
    credit = " ".join(about["attribution"].split())
    return f"""---
configs:
- config_name: default
  data_files:
{configs}---

# {" ".join(str(about["name"]).split())}

{sum(about["shards"]):,} captioned pictures as codes and features, made by `arra data export`: \
{", ".join(f"{count:,} {split}" for split, count in sorted(counts.items()))}. The pictures themselves are not here.

{f"Credit: {credit}" if credit else "Credit: name the makers of the pictures here before you publish this."}

One row per record: `id`, `prompt`, `alternatives` (other texts of the picture), `label`{_classes(about)}, `split`, \
`group` (variants of one picture share it), and

| column | type | values of a row | made by |
|---|---|---|---|
{rows}
Values are flat lists, row-major; a cell is null where the picture could not be used. `columns.json` says who made each
column, down to the hash of the weights, and holds the hash of every file.

## Reading it

```python
import duckdb, numpy as np, pandas as pd, pyarrow.parquet as pq
from datasets import load_dataset

pq.read_table("data/{first}")
{numpy_line}pd.read_parquet("data/{first}")
duckdb.sql("select split, count(*) from 'data/*.parquet' group by split")
load_dataset("parquet", data_files={{"{largest}": "data/{largest}-?????-of-*.parquet"}}, streaming=True)
```

Training on it, from this folder or from any address it is served at (https://, s3://, hf://):
`arra train RECIPE --store PLACE`. `arra data verify PLACE` hashes every file.
"""


def _note(entry: ColumnEntry) -> ColumnNote:
    return ColumnNote(
        made_by=entry.made_by,
        shape=entry.shape,
        variants=entry.variants,
        versions=dict(entry.versions),
        dtype=entry.dtype,
    )


def _shape(note: ColumnNote) -> str:
    sizes = " x ".join("any" if size is None else str(size) for size in note.shape)
    return f"{note.variants} variants of {sizes}" if note.variants > 1 else sizes


def _maker(made_by: dict[str, Any]) -> str:
    """Who made a column, in a table cell."""
    shown = {key: value for key, value in made_by.items() if value is not None}
    text = ", ".join(f"{key} {str(value)[:12] if key == 'weights' else value}" for key, value in shown.items())
    return " ".join(text.replace("|", "/").split())


def _classes(about: dict[str, Any]) -> str:
    return f" (a number of {len(about['classes'])} classes, named in `manifest.json`)" if about["classes"] else ""


def describe_store(store: Store) -> Table:
    """What is in a store, a row for each column, to be printed."""
    splits = ", ".join(f"{count:,} {split}" for split, count in sorted(store.about["splits"].items()))
    table = Table(title=f"{store.about['name']}: {len(store):,} records ({splits})", title_justify="left")
    for heading in ("column", "type", "values of a row", "failed", "MiB", "made by"):
        table.add_column(heading, justify="right" if heading in ("failed", "MiB") else "left", overflow="fold")
    for name in store.column_names():
        entry = store.entry(name)
        assert entry is not None
        mib = sum(shard.bytes for shard in entry.shards) / 2**20
        table.add_row(
            name, entry.dtype, _shape(_note(entry)), f"{entry.failed:,}", f"{mib:,.1f}", _maker(entry.made_by)
        )
    return table


def verify_store(store: Store, *, progress: Progress = silent) -> Verification:
    """What hashing every file of a store, or of an export wherever it lies, finds.

    Raises:
        ArraError: the store's own lists of hashes are damaged.
    """
    checks = _remote_checks(store) if isinstance(store, RemoteStore) else _local_checks(store)
    files, total, damaged = 0, 0, []
    for name, size, reason in checks:
        files, total = files + 1, total + size
        progress("verifying", files, 0, name)
        if reason:
            damaged.append(f"{name}: {reason}")
    return Verification(files, total, tuple(damaged))


def _local_checks(store: Store) -> Iterator[tuple[str, int, str | None]]:
    """(file, bytes, what is wrong) of every file."""
    digest, rows = hashlib.sha256(), 0
    for shard in range(store.num_shards):
        name = f"{RECORDS}/{shard:05d}.arrow"
        try:
            table = store.records_of(shard)
        except ArraError as error:
            yield name, 0, str(error)
            continue
        rows += len(table)
        for start in range(0, len(table), ROWS_PER_GROUP):
            for row in table.slice(start, ROWS_PER_GROUP).to_pylist():
                own = [row[key] for key in ("id", "prompt", "split", "group", "label", "alternatives")]
                digest.update(json.dumps(own).encode())
        expected = store.about["shards"][shard]
        yield name, table.nbytes, None if len(table) == expected else f"{len(table)} records, expected {expected}"
    if digest.hexdigest() != store.about["sha256"]:
        yield RECORDS, 0, "the records are not those of manifest.json; delete the store and prepare again"
    for column in store.column_names():
        entry = store.entry(column)
        assert entry is not None
        for number, each in enumerate(entry.shards):
            path = store.path / column / f"{number:05d}.arrow"
            whole = path.is_file() and path.stat().st_size == each.bytes and file_hash(path) == each.sha256
            yield f"{column}/{path.name}", each.bytes, None if whole else "missing or damaged; run: arra prepare RECIPE"


def _remote_checks(store: RemoteStore) -> Iterator[tuple[str, int, str | None]]:
    """(file, bytes, what is wrong) of every file at the export's place and of its mirror in the cache."""
    note = json.loads(store.manifest_path.read_text(encoding="utf-8"))["export"]
    for name, file in note["files"].items():
        path = store.path / name
        kept = path.is_file() and file_hash(path) == file["sha256"]
        yield str(path), file["bytes"], None if kept else f"damaged; delete the folder {store.path}"
        yield _far_check(store, name, file["bytes"], file["sha256"])
    for data in store.columns.files:
        yield _far_check(store, f"data/{data.name}", data.bytes, data.sha256)


def _far_check(store: RemoteStore, name: str, size: int, sha256: str) -> tuple[str, int, str | None]:
    hashed = hashlib.sha256()
    try:
        if store.source.size(name) not in (size, None):
            return name, size, f"damaged (its size is not {size}); export or upload it again"
        for start in range(0, size, 2**24):
            hashed.update(store.source.read_range(name, start, min(size, start + 2**24), size))
    except ArraError as error:
        return name, size, str(error)
    return name, size, None if hashed.hexdigest() == sha256 else "damaged; export or upload it again"
