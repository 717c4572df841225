"""The identity of a record set changes with everything a later stage depends on, and with nothing else."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from arra.data.records import Record, RecordSet, image_bytes
from arra.errors import ArraError

RECORDS = (
    Record("a", "red heart", "train", b"one", ("love",), "heart"),
    Record("b", "cat", "validation", b"two"),
    Record("c", "dog", "train", b"three"),
)


def hash_of(*records: Record) -> str:
    return RecordSet("set", records).content_hash()


def test_splits_and_their_rows() -> None:
    found = RecordSet("set", RECORDS)
    assert len(found) == 3
    assert found.splits() == {"train": 2, "validation": 1}
    assert found.split_indices("train") == [0, 2]
    assert found.split_indices("novel") == []


CHANGES: dict[str, Any] = {
    "id": "A",
    "prompt": "red  heart",
    "split": "novel",
    "image": b"One",
    "alternatives": ("love", "heart"),
    "group": "hearts",
}


def test_every_field_is_covered() -> None:
    assert set(CHANGES) == {field.name for field in fields(Record)}


@pytest.mark.parametrize("field", CHANGES)
def test_the_hash_changes_with_every_field(field: str) -> None:
    assert hash_of(replace(RECORDS[0], **{field: CHANGES[field]}), *RECORDS[1:]) != hash_of(*RECORDS)


def test_the_hash_changes_with_order_and_number() -> None:
    hashes = [hash_of(*RECORDS), hash_of(*RECORDS[::-1]), hash_of(*RECORDS[:2]), hash_of(*RECORDS, RECORDS[0])]
    assert len(set(hashes)) == len(hashes)


def test_fields_cannot_trade_places() -> None:
    """Text may not slide from one field into its neighbour."""
    base = RECORDS[0]
    pairs = [
        replace(base, id="ab", prompt="c"),
        replace(base, id="a", prompt="bc"),
        replace(base, group="x", alternatives=("y", "z")),
        replace(base, group="x", alternatives=('y", "z',)),
        replace(base, group="", alternatives=("x", "y", "z")),
    ]
    assert len({hash_of(record) for record in pairs}) == len(pairs)


def test_the_name_and_the_place_are_no_part_of_the_identity(tmp_path: Path) -> None:
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(b"one")
    in_files = [(replace(RECORDS[0], image=tmp_path / name), *RECORDS[1:]) for name in ("x.png", "y.png")]
    assert {hash_of(*records) for records in in_files} == {hash_of(*RECORDS)}
    assert RecordSet("other", RECORDS, attribution="me").content_hash() == hash_of(*RECORDS)


def test_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    record = replace(RECORDS[0], image=tmp_path)
    with pytest.raises(ArraError, match=r"record 'a' cannot be read .*; restore the file or remove its line"):
        image_bytes(record)
