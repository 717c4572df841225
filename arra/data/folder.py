"""A folder of captioned pictures as a record set.

Two layouts are read: `metadata.jsonl` or `metadata.csv` with a `file_name` column and a `text` (or `prompt`, `caption`)
column and, if wanted, a `split` column (the Hugging Face imagefolder convention); or pictures with a `.txt` of the same
name beside them. Pictures without a split get one by their caption: in the order of the captions' hashes the first
twentieth is `validation`, the next `heldout`, so equal captions never straddle a split and file order does not matter.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from arra.data.records import Record, RecordSet, load_image
from arra.errors import ArraError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXT_COLUMNS = ("text", "prompt", "caption")
HELD_OUT_SHARE = 0.05
MIN_RECORDS = 40


def load_folder(path: Path) -> RecordSet:
    """The folder's record set, in the metadata's order or by file name. Every picture is opened once, to check it.

    Raises:
        ArraError: no folder, no pictures, a picture without text, a line whose picture is missing or broken, or a
            path that leaves the folder.
    """
    if not path.is_dir():
        raise ArraError(f"{path}: no such folder; expected pictures with metadata.jsonl, metadata.csv or .txt captions")
    metadata = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
    if len(metadata) > 1:
        raise ArraError(f"{path}: both metadata.jsonl and metadata.csv; keep one")
    rows = _metadata_rows(metadata[0]) if metadata else _caption_files(path)
    records = _with_splits([_record(path, *row) for row in rows])
    if len(records) < MIN_RECORDS:
        raise ArraError(
            f"{path}: {len(records)} captioned pictures; at least {MIN_RECORDS} are needed for three splits"
        )
    seen: dict[str, str] = {}
    for record in records:
        if record.id in seen:
            raise ArraError(f"{path}: '{record.id}' is listed twice; keep one line")
        seen[record.id] = record.prompt
        load_image(record)
    found = RecordSet(name=path.resolve().name, records=records)
    for split in ("train", "validation"):
        if not found.split_indices(split):
            raise ArraError(
                f"{path}: no record in split '{split}'; it has {', '.join(found.splits())}; name some '{split}' in the "
                "metadata's split column"
            )
    if len(found.splits()) < 3:
        raise ArraError(f"{path}: no held-out split besides validation; name one 'heldout' in the split column")
    return found


def _metadata_rows(path: Path) -> Iterator[tuple[str, str, str, str | None]]:
    """(where, file name, text, split) of each line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArraError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if path.suffix == ".csv":
        numbered = _csv_rows(path, text)
    else:
        numbered = (
            (f"{path}: line {n}", _json_line(line, f"{path}: line {n}"))
            for n, line in enumerate(text.split("\n"), start=1)  # JSON strings may hold other line separators
            if line.strip()
        )
    for where, row in numbered:
        column = next((name for name in TEXT_COLUMNS if row.get(name)), None)
        if not row.get("file_name") or column is None:
            raise ArraError(
                f"{where}: expected 'file_name' and one of {', '.join(TEXT_COLUMNS)}, found {', '.join(row)}"
            )
        for name in ("file_name", column, "split"):
            if not isinstance(row.get(name) or "", str):
                raise ArraError(f"{where}: {name} is {row[name]!r}; expected a text")
        if not row[column].strip():
            raise ArraError(f"{where}: {column} is blank; write a caption or remove the line")
        yield where, row["file_name"], row[column], row.get("split") or None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), restkey="")
    try:
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if "" in row:
                raise ArraError(f"{where}: more fields than the first line names; put quotes around text with commas")
            yield where, row
    except csv.Error as error:
        raise ArraError(f"{path}: line {reader.line_num + 1}: not CSV ({error})") from error


def _json_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ArraError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ArraError(f"{where}: expected an object with 'file_name' and 'text'")
    return row


def _caption_files(path: Path) -> Iterator[tuple[str, str, str, str | None]]:
    for image in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES):
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            raise ArraError(f"{image}: no caption; expected {caption.name} beside it, or a metadata.jsonl in {path}")
        text = caption.read_text(encoding="utf-8", errors="replace").strip()
        if not text:
            raise ArraError(f"{caption}: empty; write a caption or remove the picture")
        yield str(image), image.relative_to(path).as_posix(), text, None


def _record(folder: Path, where: str, file_name: str, text: str, split: str | None) -> Record:
    image = folder / file_name
    try:
        inside, found = image.resolve().is_relative_to(folder.resolve()), image.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a loop of links
        raise ArraError(f"{where}: {file_name[:80]!r} is no file name ({error})") from error
    if not inside:
        raise ArraError(f"{where}: '{file_name}' leaves the folder; pictures must lie inside it")
    if not found:
        raise ArraError(f"{where}: picture '{file_name}' does not exist; add it or remove the line")
    name = image.relative_to(folder).as_posix()
    return Record(id=name, prompt=" ".join(text.split()), split=split or "", image=image)


def _with_splits(records: list[Record]) -> tuple[Record, ...]:
    """The records, those without a split given one by the rank of their caption's hash."""
    captions = {record.prompt.lower() for record in records if not record.split}
    ranked = sorted(captions, key=lambda caption: hashlib.sha256(caption.encode()).digest())
    count = math.ceil(HELD_OUT_SHARE * len(ranked))
    split_of = dict.fromkeys(ranked, "train")
    split_of |= dict.fromkeys(ranked[:count], "validation") | dict.fromkeys(ranked[count : 2 * count], "heldout")
    return tuple(r if r.split else replace(r, split=split_of[r.prompt.lower()]) for r in records)
