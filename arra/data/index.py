"""From sources to the store's records: every item is checked, given a split, and written, or told why not.

The sources are read once, front to back, into a scratch file; then splits are known and the shards are written. Memory
holds one number per record, so ten million records fit. Legend: N records.
"""

import filecmp
import hashlib
import json
import math
import os
import platform
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from arra.data.columns import FAILURES_FILE, folder_lock, write_table
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source, name_hash, source_names
from arra.data.store import FORMAT, RECORDS, SCHEMA, Store
from arra.errors import ArraError
from arra.runs import atomic_write, is_alive, writing

ROWS_AT_A_TIME = 8192
HELD_OUT_SHARE = 0.05
MAX_TEXT = 20_000
"""Characters of a caption; longer ones are files taken for captions."""
SPLIT = re.compile(r"[\w.-]{0,64}", re.ASCII)
BY_HASH = "hash"
"""As a source's `split`: whatever the source says, a share of its records is held out by hash."""
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class Indexed:
    """What became of the sources' items."""

    records: int
    failed: int
    skipped: int
    store: Store | None
    """None where more items failed than may."""

    @property
    def items(self) -> int:
        return self.records + self.failed + self.skipped


def is_too_many(failed: int, total: int, max_failed_fraction: float) -> bool:
    """Whether `failed` of `total` items are more than may fail."""
    return failed > max_failed_fraction * total


def build_index(
    sources: Sequence[Source],
    folder: Path,
    *,
    shard_records: int | None = None,
    max_failed_fraction: float = 0.0,
    progress: Callable[[int], None] = lambda count: None,
) -> Indexed:
    """The store of the sources' records: a new one, or the one that is there if it holds the same records.

    Raises:
        ArraError: a source cannot be read, there is no record at all, or the folder holds other records.
    """
    part = folder / f".{RECORDS}.{platform.node()}-{os.getpid()}.part"  # parts of a job array index side by side
    with writing(folder):
        _remove_abandoned(folder)
        part.mkdir(parents=True)
        scan = _Scan(part, sources, progress)
        counts = scan.run()
        failed, skipped = counts[Failure], counts[Skipped]
        _keep_or_drop(part / SKIPPED_FILE, folder / SKIPPED_FILE)
        if is_too_many(failed, counts[Record] + failed, max_failed_fraction):
            _list_failures(part / FAILURES_FILE, folder / "failures.jsonl")
            shutil.rmtree(part)
            return Indexed(counts[Record], failed, skipped, None)
        if not counts[Record]:
            _list_failures(part / FAILURES_FILE, folder / "failures.jsonl")
            shutil.rmtree(part)
            where = ", ".join(source.path for source in sources)
            why = f"all of {failed} items failed, see {folder / 'failures.jsonl'}" if failed else "nothing to prepare"
            raise ArraError(f"{where}: no records found; {why}")
        about = scan.write_shards(shard_records or _kept_shard_records(folder) or default_shard_records(counts[Record]))
        with folder_lock(folder):
            _publish(folder, part, about)
    return Indexed(counts[Record], failed, skipped, Store.open(folder))


def _kept_shard_records(folder: Path) -> int | None:
    """Records per shard of the store that is there, which a recipe without a number of its own keeps."""
    if not (folder / "manifest.json").is_file() or not _is_bound(folder):
        return None
    return max(Store.open(folder).about["shards"])


def default_shard_records(count: int) -> int:
    """Records per shard: a power of two that gives at most 256 shards, and at least 1,024 records each."""
    return max(1024, 1 << max(0, math.ceil(count / 256) - 1).bit_length())


class _Scan:
    """One pass over the sources into a scratch file, then the shards."""

    def __init__(self, part: Path, sources: Sequence[Source], progress: Callable[[int], None]) -> None:
        self.part, self.sources, self.progress = part, sources, progress
        self.seen: set[int] = set()
        self.keys = array("Q")
        self.classes: list[str] = []
        self.per_source = [0] * len(sources)
        self.names = source_names(sources)

    def run(self) -> Counter[type]:
        """How many records, failures and skipped items there were."""
        counts: Counter[type] = Counter()
        with (
            pa.OSFile(str(self.part / "scan.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
            (self.part / FAILURES_FILE).open("w", encoding="utf-8") as failures,
            (self.part / SKIPPED_FILE).open("w", encoding="utf-8") as skipped,
        ):
            rows: list[dict[str, Any]] = []
            for number, found in self._items():
                counts[type(found)] += 1
                if isinstance(found, Record):
                    rows.append(self._row(number, found))
                else:
                    _write_line(failures if isinstance(found, Failure) else skipped, found)
                if len(rows) == ROWS_AT_A_TIME:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                    rows = []
                if sum(counts.values()) % ROWS_AT_A_TIME == 0:
                    self.progress(sum(counts.values()))
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
        return counts

    def _items(self) -> Iterator[tuple[int, Found]]:
        for number, source in enumerate(self.sources):
            names = list(source.class_names())
            self._take_classes(source, names)
            for found in source.scan():
                if not isinstance(found, Record):
                    yield number, _safe(found)
                    continue
                if len(self.sources) > 1:
                    found = replace(found, id=f"{self.names[number]}/{found.id}")
                if source.split is not None:
                    found = replace(found, split="" if source.split == BY_HASH else source.split)
                reason = self._fault(found, len(names))
                if reason is None:
                    self.per_source[number] += 1
                    yield number, found
                else:
                    yield number, _safe(Failure(found.id, found.where, reason))

    def _take_classes(self, source: Source, names: list[str]) -> None:
        if self.classes and names and names != self.classes:
            raise ArraError(
                f"{source.path}: its {len(names)} classes are not those of the source before ({len(self.classes)}); "
                "labels of mixed sources must mean the same classes"
            )
        self.classes = names or self.classes

    def _fault(self, record: Record, num_classes: int) -> str | None:
        """What is wrong with a record, whatever source it comes from."""
        for name, text in (("id", record.id), ("caption", record.prompt), ("caption", "".join(record.alternatives))):
            if "\0" in text:
                return f"the {name} holds a null character; remove it"
            if any("\ud800" <= character <= "\udfff" for character in text):
                return f"the {name} is not Unicode text (a lone surrogate); write it in UTF-8"
            if len(text) > MAX_TEXT:
                return f"the {name} has {len(text)} characters, at most {MAX_TEXT} are read; shorten it"
        if not record.id.strip():
            return "no id; expected a name for the record"
        if record.label is None and not record.prompt.strip():
            return "the caption is blank; write one or remove the line"
        if record.label is not None and not 0 <= record.label < (num_classes or 2**31):
            return f"label {record.label}; expected a class number of 0..{(num_classes or 2**31) - 1}"
        if not SPLIT.fullmatch(record.split):
            return f"split {record.split[:64]!r}; expected letters, digits, '.', '_' or '-'"
        number = name_hash(record.id)
        if number in self.seen:
            return "listed twice; keep one line, or give the records ids of their own"
        self.seen.add(number)
        return None

    def _row(self, number: int, record: Record) -> dict[str, Any]:
        if not record.split:
            self.keys.append(self._split_key(record.prompt, record.id, record.label))
        return {
            "id": record.id,
            "prompt": record.prompt,
            "alternatives": list(record.alternatives),
            "label": record.label,
            "split": record.split,
            "group": record.group or record.id,
            "source": number,
            "image": "" if record.image is None else _from_anywhere(record.image).text(),
        }

    def write_shards(self, shard_records: int) -> dict[str, Any]:
        """The manifest's section on the records, whose shards now lie in the folder."""
        self.seen.clear()
        choose = _split_chooser(np.frombuffer(self.keys, dtype=np.uint64)) if len(self.keys) else None
        shards: list[int] = []
        digest, splits = hashlib.sha256(), Counter[str]()
        for rows in self._regrouped(shard_records):
            for row in rows:
                if not row["split"] and choose is not None:
                    row["split"] = choose(self._split_key(row["prompt"], row["id"], row["label"]))
                splits[row["split"]] += 1
                own = [row[key] for key in ("id", "prompt", "split", "group", "label", "alternatives")]
                digest.update(json.dumps(own).encode())
            write_table(self.part / f"{len(shards):05d}.arrow", pa.Table.from_pylist(rows, SCHEMA))
            shards.append(len(rows))
        (self.part / "scan.arrow").unlink()
        return {
            "name": "+".join(dict.fromkeys(source.name for source in self.sources)),
            "sha256": digest.hexdigest(),
            "splits": dict(splits),
            "attribution": "; ".join(dict.fromkeys(s.attribution for s in self.sources if s.attribution)),
            "classes": self.classes,
            "sources": [
                {"name": name, "kind": getattr(source, "kind", ""), "records": count}
                for name, source, count in zip(self.names, self.sources, self.per_source, strict=True)
            ],
            "shards": shards,
        }

    def _split_key(self, prompt: str, record_id: str, label: int | None) -> int:
        """Equal captions have equal keys, so they never straddle a split; pictures with a class alone go by their ids,
        else whole classes would be held out."""
        named = label is not None and label < len(self.classes) and prompt == self.classes[label]
        text = "" if named else " ".join(prompt.lower().split())
        return name_hash(text or record_id)

    def _regrouped(self, size: int) -> Iterator[list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        with pa.OSFile(str(self.part / "scan.arrow"), "rb") as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                rows += batch.to_pylist()
                while len(rows) >= size:
                    yield rows[:size]
                    rows = rows[size:]
        if rows:
            yield rows


def _from_anywhere(ref: ImageRef) -> ImageRef:
    """The reference with a path that does not depend on the working folder."""
    return replace(ref, path=os.path.abspath(ref.path)) if ref.kind in ("file", "slice", "parquet") else ref


def _split_chooser(keys: np.ndarray) -> Callable[[int], str]:
    """The split of a key: in the order of the hashes the first twentieth is `validation`, the next `heldout`."""
    ranked = np.unique(keys)
    count = math.ceil(HELD_OUT_SHARE * len(ranked))
    validation_end = int(ranked[count - 1])
    heldout_end = int(ranked[min(2 * count, len(ranked)) - 1])
    return lambda key: "validation" if key <= validation_end else "heldout" if key <= heldout_end else "train"


def _remove_abandoned(folder: Path) -> None:
    """Nothing; what killed processes of this machine left half scanned is gone."""
    for path in folder.glob(f".{RECORDS}.{platform.node()}-*.part"):
        number = path.name.removesuffix(".part").rpartition("-")[2]
        if number.isdigit() and (int(number) == os.getpid() or not is_alive(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def _publish(folder: Path, part: Path, about: dict[str, Any]) -> None:
    """Nothing; the store holds these records, under the names of before if they are the same."""
    if (folder / "manifest.json").is_file():
        kept = Store.open(folder).about
        differs = kept["sha256"] != about["sha256"] or kept["shards"] != about["shards"]
        if differs and not _is_bound(folder):
            for begun in folder.glob(".*.part"):
                if not begun.name.startswith(f".{RECORDS}."):
                    shutil.rmtree(begun)
        elif differs:
            shutil.rmtree(part)
            if kept["sha256"] == about["sha256"]:
                raise ArraError(
                    f"{folder}: its files hold {max(kept['shards'])} records each, data.shard_records says "
                    f"{max(about['shards'])}; leave it out, or use another folder"
                )
            raise ArraError(
                f"{folder}: made from other records ({kept['name']}, {sum(kept['shards'])} pictures) than given "
                f"({about['name']}, {sum(about['shards'])} pictures): ids, captions, splits or order differ; "
                "use another folder or delete this store"
            )
    for name in (FAILURES_FILE, SKIPPED_FILE):
        path = part / name
        if not path.stat().st_size:
            path.unlink()
    old = folder / f".{RECORDS}.old"
    shutil.rmtree(old, ignore_errors=True)
    if (folder / "manifest.json").is_file() and _same_files(part, folder / RECORDS):
        shutil.rmtree(part)  # others may be reading the ones that are there
        return
    if (folder / RECORDS).exists():
        (folder / RECORDS).rename(old)  # the same records, but their pictures may lie elsewhere now
    part.rename(folder / RECORDS)
    shutil.rmtree(old, ignore_errors=True)
    atomic_write(folder / "manifest.json", json.dumps({"format": FORMAT, "records": about}, indent=1) + "\n")


def _is_bound(folder: Path) -> bool:
    """Whether something in the store was made of its records, so that they must stay the same."""
    return any(folder.glob("*/column.json")) or any(folder.glob("tokenizer/*.safetensors"))


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if not other.is_dir() or names != sorted(path.name for path in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _safe(found: Failure | Skipped) -> Failure | Skipped:
    """The same in text that any file can hold."""
    texts = {key: value.encode("utf-8", "backslashreplace").decode() for key, value in asdict(found).items()}
    return type(found)(**texts)


def _write_line(file: TextIO, found: Failure | Skipped) -> None:
    file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")


def _keep_or_drop(source: Path, target: Path) -> None:
    if source.stat().st_size:
        atomic_write(target, source.read_bytes())
    else:
        target.unlink(missing_ok=True)


def _list_failures(source: Path, target: Path) -> None:
    """Nothing; `target` lists failures that kept the index from being made, as the store would."""
    lines = [
        json.loads(line) | {"columns": [RECORDS]} for line in source.read_text(encoding="utf-8").split("\n") if line
    ]
    atomic_write(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
