"""The store: what preparation leaves for training, Arrow columns keyed by record id, each in a folder of its own.

store/manifest.json      the record set: name, sources, splits, classes, hash
      records/           id, prompt, alternatives, label, split, group, source, image (where the picture lies)
      NAME/              one column: `pictures`, `pixels`, `codes`, `features.ENCODER`; see `arra/data/columns.py`
      failures.jsonl     every record without a value and every item that made no record: id, where, reason, stage
      skipped.jsonl      items that a rule of the source left out

Codes are stored, not token sequences: the layout is applied when a batch is made, so one store serves any model. Adding
a column adds a folder and touches nothing else. Legend: N records, then the column's own shape.
"""

import bisect
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arra.data.cells import ArrowCells, map_table
from arra.data.columns import ColumnEntry, ColumnReader, ColumnWriter, Shape, read_entry, read_failures
from arra.data.records import Failure, name_hash
from arra.errors import ArraError
from arra.runs import atomic_write

FORMAT = 2
RECORDS = "records"
REMAKE = "run: arra prepare RECIPE (or choose another store)"
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "alternatives": pa.list_(pa.string()),
        "label": pa.int32(),
        "split": pa.string(),
        "group": pa.string(),
        "source": pa.int16(),
        "image": pa.string(),
    }
)
"""Of the records."""
COLUMNS_FILE = "columns.json"
"""Stands in an export, in place of the columns' folders; see `arra/data/remote.py`."""
CHECKED_BYTES = 2**28
"""Columns up to this size have their content hashed when they are opened, larger ones their files' sizes; `arra data
verify` hashes all."""


@dataclass(frozen=True)
class Store:
    """A store folder whose record set is fixed; columns are added or replaced whole."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "Store":
        """An existing store on disk; `arra.data.remote.open_store` opens exports too.

        Raises:
            ArraError: there is none, or it is of another format.
        """
        store = cls(path)
        if not store.manifest_path.is_file():
            raise ArraError(f"{path}: no store here; make one with: arra prepare RECIPE")
        store.about  # noqa: B018  its errors are this call's
        return store

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the manifest says of the records, read once."""
        try:
            content = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            found = content["format"], dict(content["records"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArraError(
                f"{self.manifest_path}: unreadable ({error}); delete the store and prepare again"
            ) from error
        if found[0] != FORMAT:
            raise ArraError(
                f"{self.manifest_path}: a store of format {found[0]}, this version reads format {FORMAT}; "
                "prepare again in another folder"
            )
        return found[1]

    def __len__(self) -> int:
        return int(sum(self.about["shards"]))

    @property
    def place(self) -> str:
        """Where the store lies: a path, or the URL of an export."""
        return str(self.path.resolve())

    @property
    def num_shards(self) -> int:
        return len(self.about["shards"])

    def shard_rows(self, shard: int) -> range:
        """Row numbers of a shard's records."""
        start = sum(self.about["shards"][:shard])
        return range(start, start + self.about["shards"][shard])

    def records_of(self, shard: int) -> pa.Table:
        """The records of a shard, memory-mapped."""
        return map_table(self.path / RECORDS / f"{shard:05d}.arrow")

    @cached_property
    def shard_starts(self) -> list[int]:
        """Row number of every shard's first record, then the number of records."""
        return [0, *accumulate(self.about["shards"])]

    @cached_property
    def _cells(self) -> dict[int, ArrowCells]:
        return {}

    def fields(self, row: int, *names: str) -> tuple[Any, ...]:
        """The named fields of one record."""
        shard = bisect.bisect_right(self.shard_starts, row) - 1
        if shard not in self._cells:
            self._cells[shard] = ArrowCells(self.path / RECORDS / f"{shard:05d}.arrow")
        return tuple(self._cells[shard].get(name, row - self.shard_starts[shard]) for name in names)

    def column_names(self) -> list[str]:
        """Names of the published columns."""
        return sorted(
            path.parent.name for path in self.path.glob("*/column.json") if not path.parent.name.startswith(".")
        )

    def entry(self, name: str) -> ColumnEntry | None:
        """Who made a column, and of what it is made; None if it is not there."""
        return read_entry(self.path / name)

    def manifest(self) -> dict[str, Any]:
        """Identity of the records and of every column."""
        columns = {}
        for name in self.column_names():
            entry = self._entry(name)
            columns[name] = {
                "made_by": entry.made_by,
                "shape": list(entry.shape),
                "variants": entry.variants,
                "dtype": entry.dtype,
                "failed": entry.failed,
                "sha256": entry.sha256(),
            }
        return {"records": dict(self.about), "columns": columns}

    def manifest_hash(self, *columns: str) -> str:
        """SHA-256 of the record set's identity and of the named columns'.

        Raises:
            KeyError: a column is not there.
        """
        parts: list[Any] = [self.about["sha256"]]
        for name in columns:
            entry = self.entry(name)
            if entry is None:
                raise KeyError(name)
            parts.append([name, entry.made_by, list(entry.shape), entry.dtype, entry.sha256()])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def has(self, name: str, made_by: Mapping[str, Any]) -> bool:
        """Whether the column is there, made exactly so, and whole."""
        entry = self.entry(name)
        if entry is None or entry.made_by != json.loads(json.dumps(made_by)):
            return False
        try:
            self.reader(name)
        except ArraError:  # damaged: it will be made again
            return False
        return True

    def require(self, name: str, made_by: Mapping[str, Any], *, advice: str = REMAKE) -> None:
        """Nothing.

        Raises:
            ArraError: the column is missing or was made by something else than the recipe names; both sides are told.
        """
        entry, wanted = self._entry(name), json.loads(json.dumps(made_by))
        for key in {**wanted, **entry.made_by}:
            old, new = entry.made_by.get(key), wanted.get(key)
            if old != new:
                raise ArraError(
                    f"{self.path}: column '{name}' was made with {key} {old!r}, the recipe says {new!r}; {advice}"
                )

    def writer(
        self,
        name: str,
        *,
        made_by: Mapping[str, Any],
        shape: Shape,
        dtype: str,
        variants: int = 1,
        again: bool = False,
    ) -> ColumnWriter:
        """A column to be written shard by shard; what was begun the same way is continued."""
        return ColumnWriter(
            self.path,
            name,
            made_by=made_by,
            shape=shape,
            variants=variants,
            dtype=dtype,
            num_shards=self.num_shards,
            again=again,
        )

    def write(self, name: str, values: np.ndarray, made_by: Mapping[str, Any]) -> None:
        """Nothing; the column holds `values` (N, ...), and its entry who made them."""
        if len(values) != len(self):
            raise ValueError(f"{len(values)} rows for {len(self)} records")
        writer = self.writer(name, made_by=made_by, shape=values.shape[1:], dtype=str(values.dtype), again=True)
        for shard in range(self.num_shards):
            rows = self.shard_rows(shard)
            part = values[rows.start : rows.stop]
            ids = self.records_of(shard).column("id").combine_chunks()
            writer.write(shard, ids, part, valid=np.ones(len(part), dtype=bool))
        writer.publish()

    def reader(self, name: str, *, content: bool | None = None) -> ColumnReader:
        """A published column, read where it lies.

        Its files are checked first: by content up to `CHECKED_BYTES` (or as `content` says), else by size.

        Raises:
            ArraError: the column is missing or a file is damaged.
        """
        entry = self._entry(name)
        reader = ColumnReader(self.path / name, entry)
        total = sum(shard.bytes for shard in entry.shards)
        reader.check_files(content=total <= CHECKED_BYTES if content is None else content)
        if len(reader) != len(self):
            raise ArraError(
                f"{self.path}: column '{name}' has {len(reader)} rows for {len(self)} records; run: arra prepare RECIPE"
            )
        return reader

    def column(self, name: str) -> np.ndarray:
        """All rows (N, ...) of a column, in record order; of several variants the first.

        Raises:
            ArraError: the column is missing or its file is damaged.
        """
        return self.reader(name).take(np.arange(len(self)))

    def table(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Fields of every record, memory-mapped.

        Raises:
            ArraError: a file is missing or damaged.
        """
        parts = [self.records_of(shard) for shard in range(self.num_shards)]
        return pa.concat_tables([part if columns is None else part.select(list(columns)) for part in parts])

    def rows(self, split: str, *, columns: Sequence[str] = (), at_most: int | None = None) -> np.ndarray:
        """Row numbers of a split's records that have a value in all the named columns, ascending.

        `at_most` keeps so many records of the split, those with the smallest hashes of their ids: the same ones in any
        order and any store of them, fewer among more. It is they that are asked for values, so none stands in for
        one that failed.

        Raises:
            ArraError: no record has this split.
        """
        names = list(self.about["splits"])
        if split not in names:
            raise ArraError(
                f"{self.path}: no records in split '{split}'; it has {', '.join(sorted(names))}; name it in the "
                "source, or say 'split: hash' there to hold a share out"
            )
        found = []
        for shard in range(self.num_shards):
            same = pc.equal(self.records_of(shard).column("split"), split)
            found.append(np.nonzero(same.to_numpy())[0] + self.shard_starts[shard])
        rows = np.concatenate(found)
        if at_most is not None and at_most < len(rows):
            rows = rows[np.sort(np.argsort(self._id_hashes(rows))[:at_most])]
        for name in columns:
            if self._entry(name).failed:
                rows = rows[self.reader(name, content=False).valid()[rows]]
        if not len(rows):
            raise ArraError(f"{self.path}: every record of split '{split}' failed; see {self.path / 'failures.jsonl'}")
        return rows

    def _id_hashes(self, rows: np.ndarray) -> np.ndarray:
        ids = self.table(["id"]).column("id").take(pa.array(rows))
        return np.fromiter((name_hash(record_id.as_py()) for record_id in ids), np.uint64, len(rows))

    def source_counts(self, rows: np.ndarray) -> tuple[int, ...]:
        """How many of the rows come from each source, whose records follow each other within a split."""
        sources = self.table(["source"]).column("source").to_numpy()[rows]
        return tuple(np.bincount(sources, minlength=len(self.about["sources"])).tolist())

    def group_sizes(self, rows: np.ndarray) -> tuple[int, ...] | None:
        """How many of the rows are read together, run by run; None where each is read alone."""
        return None

    def window(self, columns: Sequence[str]) -> int:
        """How many such runs may be mixed with each other."""
        return 1

    def prompts(self) -> list[str]:
        """Every record's prompt, in record order."""
        return list(self.table(["prompt"]).column("prompt").to_pylist())

    def write_failures(self, unpublished: Mapping[str, Sequence[Failure]] | None = None) -> int:
        """Number of failed items and records; `failures.jsonl` lists them, a line for each reason of a record.

        `unpublished` are the failures of columns that are still in the making.
        """
        by_column = {name: read_failures(self.path / name) for name in (RECORDS, *self.column_names())}
        by_column |= {name: list(failures) for name, failures in (unpublished or {}).items()}
        lines: dict[tuple[str, str, str], list[str]] = {}
        for name in sorted(by_column, key=lambda name: (name != RECORDS, name)):
            for failure in by_column[name]:
                lines.setdefault((failure.id, failure.where, failure.reason), []).append(name)
        rows = [{"id": key[0], "where": key[1], "reason": key[2], "columns": names} for key, names in lines.items()]
        target = self.path / "failures.jsonl"
        if rows:
            atomic_write(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        else:
            target.unlink(missing_ok=True)
        return len({key[:2] for key in lines})

    def _entry(self, name: str) -> ColumnEntry:
        entry = self.entry(name)
        if entry is None:
            raise ArraError(f"{self.path}: column '{name}' is missing; run: arra prepare RECIPE")
        return entry
