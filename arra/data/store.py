"""The store: what preparation leaves for training, one Parquet column set per maker, all keyed by record id.

store/records.parquet     id, prompt, alternatives, split, group
      NAME.parquet        one column: `pixels`, `codes`, `features.ENCODER`
      manifest.json       the record set's hash, and who made each column, from which weights, with which crop

Codes are stored, not token sequences: the layout is applied when a batch is made, so one store serves any model.
Legend: N records, then the column's own shape: codes (h, w), features (F,), pixels (H, W, 3).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arra.data.records import RecordSet
from arra.errors import ArraError
from arra.runs import atomic_file, atomic_write, file_hash

ROWS_PER_GROUP = 4096


@dataclass(frozen=True)
class Store:
    """A store folder whose record set is fixed; columns are added or replaced whole."""

    path: Path

    @classmethod
    def create(cls, path: Path, records: RecordSet) -> "Store":
        """A store for these records: a new one, or the one that is there.

        Raises:
            ArraError: the folder holds the store of another record set, or cannot be written.
        """
        store = cls(path)
        identity = {
            "name": records.name,
            "sha256": records.content_hash(),
            "splits": records.splits(),
            "attribution": records.attribution,
        }
        if store.manifest_path.exists():
            kept = store.manifest()["records"]
            if kept["sha256"] != identity["sha256"]:
                raise ArraError(
                    f"{path}: made from other records ({kept['name']}, {sum(kept['splits'].values())} pictures) than "
                    f"given ({records.name}, {len(records)} pictures); use another folder or delete this store"
                )
            return store
        table = pa.table(
            {
                "id": [r.id for r in records.records],
                "prompt": [r.prompt for r in records.records],
                "alternatives": pa.array([list(r.alternatives) for r in records.records], pa.list_(pa.string())),
                "split": [r.split for r in records.records],
                "group": [r.group or r.id for r in records.records],
            }
        )
        with atomic_file(path / "records.parquet") as temporary:
            pq.write_table(table, temporary)
        atomic_write(store.manifest_path, json.dumps({"records": identity, "columns": {}}, indent=2) + "\n")
        return store

    @classmethod
    def open(cls, path: Path) -> "Store":
        """An existing store.

        Raises:
            ArraError: there is none.
        """
        if not (path / "manifest.json").is_file():
            raise ArraError(f"{path}: no store here; make one with: arra prepare RECIPE")
        return cls(path)

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """Identity of the records and of every column."""
        try:
            content = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            return {"records": dict(content["records"]), "columns": dict(content["columns"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArraError(
                f"{self.manifest_path}: unreadable ({error}); delete the store and prepare again"
            ) from error

    def manifest_hash(self, *columns: str) -> str:
        """SHA-256 of the record set's identity and of the named columns'."""
        manifest = self.manifest()
        parts = [manifest["records"]["sha256"], *(manifest["columns"][name] for name in columns)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def has(self, name: str, made_by: dict[str, Any]) -> bool:
        """Whether the column is there, made exactly so, and whole."""
        entry = self.manifest()["columns"].get(name)
        return entry is not None and entry["made_by"] == made_by and self._is_whole(name, entry)

    def require(self, name: str, made_by: dict[str, Any]) -> None:
        """Nothing.

        Raises:
            ArraError: the column is missing or was made by something else than the recipe names.
        """
        entry = self.manifest()["columns"].get(name)
        if entry is None:
            raise ArraError(f"{self.path}: column '{name}' is missing; run: arra prepare RECIPE")
        for key in {**made_by, **entry["made_by"]}:
            old, new = entry["made_by"].get(key), made_by.get(key)
            if old != new:
                raise ArraError(
                    f"{self.path}: column '{name}' was made with {key} {old!r}, the recipe says {new!r}; "
                    "run: arra prepare RECIPE (or choose another store)"
                )

    def write(self, name: str, values: np.ndarray, made_by: dict[str, Any]) -> None:
        """Nothing; the column holds `values` (N, ...), and the manifest who made them."""
        ids = self.table().column("id")
        if len(values) != len(ids):
            raise ValueError(f"{len(values)} rows for {len(ids)} records")
        flat = np.ascontiguousarray(values).reshape(len(values), -1)
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        with atomic_file(self._file(name)) as temporary:
            pq.write_table(pa.table({"id": ids, name: column}), temporary, row_group_size=ROWS_PER_GROUP)
        manifest = self.manifest()
        manifest["columns"][name] = {
            "made_by": made_by,
            "shape": list(values.shape[1:]),
            "dtype": str(values.dtype),
            "sha256": file_hash(self._file(name)),
        }
        atomic_write(self.manifest_path, json.dumps(manifest, indent=2) + "\n")

    def column(self, name: str) -> np.ndarray:
        """All rows (N, ...) of a column, in record order.

        Raises:
            ArraError: the column is missing or its file is damaged.
        """
        entry = self.manifest()["columns"].get(name)
        if entry is None:
            raise ArraError(f"{self.path}: column '{name}' is missing; run: arra prepare RECIPE")
        path = self._file(name)
        if not self._is_whole(name, entry):
            raise ArraError(f"{path}: missing or damaged (its hash is not the manifest's); run: arra prepare RECIPE")
        rows = pq.read_table(path).column(name).combine_chunks()
        flat = rows.flatten().to_numpy(zero_copy_only=False)
        return np.array(flat.reshape(-1, *entry["shape"]))

    def table(self) -> pa.Table:
        """id, prompt, alternatives, split and group of every record.

        Raises:
            ArraError: the file is missing or damaged.
        """
        path = self.path / "records.parquet"
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise ArraError(f"{path}: missing or damaged ({reason}); delete the store and prepare again") from error

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split's records.

        Raises:
            ArraError: no record has this split.
        """
        splits = np.array(self.table().column("split").to_pylist())
        rows = np.nonzero(splits == split)[0]
        if not len(rows):
            raise ArraError(f"{self.path}: no records in split '{split}'; it has {', '.join(sorted(set(splits)))}")
        return rows

    def prompts(self) -> list[str]:
        """Every record's prompt, in record order."""
        return list(self.table().column("prompt").to_pylist())

    def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        return self._file(name).is_file() and file_hash(self._file(name)) == entry["sha256"]

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.parquet"
