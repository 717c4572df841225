"""The store gives back what was put in, and refuses what was made from or by something else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arra.data.records import Record, RecordSet
from arra.data.store import Store
from arra.errors import ArraError

RECORDS = RecordSet(
    "toys",
    tuple(
        Record(f"id{n}", f"prompt {n}", ["train", "validation"][n % 2], bytes([n]), ("other",) * (n % 3), "ab"[n % 2])
        for n in range(5)
    ),
    attribution="by nobody",
)
MAKER: dict[str, Any] = {"tokenizer": "vq", "weights": "abc", "num_codes": 64}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", RECORDS)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(5 * 2 * 3, dtype=np.int32).reshape(5, 2, 3),
        np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32),
        np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8),
        np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16),
        np.array([[True, False]] * 5),
        np.asfortranarray(np.arange(20.0).reshape(5, 4)),
    ],
    ids=["codes", "features", "pixels", "half", "bool", "column-major"],
)
def test_a_column_comes_back_exactly(store: Store, values: np.ndarray) -> None:
    store.write("x", values, MAKER)
    found = Store.open(store.path).column("x")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    assert found.flags.writeable  # torch.from_numpy warns of read-only memory
    assert store.manifest()["columns"]["x"]["made_by"] == MAKER


def test_records_come_back(store: Store) -> None:
    table = store.table()
    assert table.column("id").to_pylist() == [record.id for record in RECORDS.records]
    assert table.column("alternatives").to_pylist() == [list(record.alternatives) for record in RECORDS.records]
    assert table.column("group").to_pylist() == ["a", "b", "a", "b", "a"]
    assert store.prompts() == [record.prompt for record in RECORDS.records]
    assert store.rows("train").tolist() == [0, 2, 4]
    assert store.manifest()["records"] == {
        "name": "toys",
        "sha256": RECORDS.content_hash(),
        "splits": {"train": 3, "validation": 2},
        "attribution": "by nobody",
    }
    with pytest.raises(ArraError, match="no records in split 'novel'; it has train, validation"):
        store.rows("novel")


def test_a_record_without_a_group_is_its_own(tmp_path: Path) -> None:
    alone = RecordSet("alone", (replace(RECORDS.records[0], group=""),))
    assert Store.create(tmp_path, alone).table().column("group").to_pylist() == ["id0"]


def test_the_same_records_reopen_and_others_are_refused(store: Store) -> None:
    store.write("x", np.zeros((5, 1)), MAKER)
    assert Store.create(store.path, RECORDS).has("x", MAKER)
    changed = replace(RECORDS, records=(replace(RECORDS.records[0], prompt="new"), *RECORDS.records[1:]))
    with pytest.raises(
        ArraError, match=r"made from other records \(toys, 5 pictures\) than given \(toys, 5 pictures\)"
    ):
        Store.create(store.path, changed)


def test_another_maker_is_named(store: Store) -> None:
    store.write("codes", np.zeros((5, 1)), MAKER)
    store.require("codes", dict(MAKER))
    other = {**MAKER, "weights": "xyz"}
    assert not store.has("codes", other)
    with pytest.raises(ArraError, match="column 'codes' was made with weights 'abc', the recipe says 'xyz'"):
        store.require("codes", other)
    with pytest.raises(ArraError, match="column 'codes' was made with crop None, the recipe says 'center"):
        store.require("codes", {**MAKER, "crop": "center"})
    with pytest.raises(ArraError, match="column 'codes' was made with weights 'abc', the recipe says None"):
        store.require("codes", {key: value for key, value in MAKER.items() if key != "weights"})


def test_a_missing_column(store: Store) -> None:
    assert not store.has("features.x", MAKER)
    for ask in (lambda: store.column("features.x"), lambda: store.require("features.x", MAKER)):
        with pytest.raises(ArraError, match=r"column 'features\.x' is missing; run: arra prepare RECIPE"):
            ask()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_column_is_named_and_made_again(store: Store, damage: str) -> None:
    """Reading says to prepare again, so preparing must see the damage too."""
    store.write("codes", np.arange(5)[:, None], MAKER)
    path = store.path / "codes.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.raises(ArraError, match=r"codes\.parquet: missing or damaged .*; run: arra prepare RECIPE"):
        store.column("codes")
    assert not store.has("codes", MAKER)
    store.write("codes", np.arange(5)[:, None], MAKER)
    assert store.has("codes", MAKER)
    assert store.column("codes")[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and nothing"])
def test_a_damaged_record_table_is_named(store: Store, content: bytes | None) -> None:
    path = store.path / "records.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ArraError, match=r"records\.parquet: missing or damaged .*; delete the store") as caught:
        store.prompts()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"records": {}}', '{"records": [1], "columns": {}}'])
def test_a_damaged_manifest_is_named(store: Store, content: str) -> None:
    store.manifest_path.write_text(content)
    for ask in (lambda: store.column("x"), lambda: Store.create(store.path, RECORDS)):
        with pytest.raises(ArraError, match=r"manifest\.json: unreadable .*; delete the store and prepare again"):
            ask()


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(ArraError, match="no store here; make one with: arra prepare RECIPE"):
        Store.open(tmp_path)


def test_a_column_must_have_a_row_for_each_record(store: Store) -> None:
    with pytest.raises(ValueError, match="4 rows for 5 records"):
        store.write("codes", np.zeros((4, 1)), MAKER)
    assert not (store.path / "codes.parquet").exists()


def test_the_manifest_hash_knows_the_records_and_the_named_columns(store: Store, tmp_path: Path) -> None:
    store.write("codes", np.zeros((5, 1)), MAKER)
    before = store.manifest_hash("codes")
    store.write("features.x", np.zeros((5, 2)), MAKER)
    assert store.manifest_hash("codes") == before  # a column that is not used may come and go
    assert store.manifest_hash("codes", "features.x") != before
    store.write("codes", np.ones((5, 1)), MAKER)
    assert store.manifest_hash("codes") != before
    store.write("codes", np.zeros((5, 1)), MAKER)
    assert store.manifest_hash("codes") == before
    moved = Store.create(tmp_path / "other", RECORDS)
    moved.write("codes", np.zeros((5, 1)), MAKER)
    assert moved.manifest_hash("codes") == before
    fewer = Store.create(tmp_path / "fewer", replace(RECORDS, records=RECORDS.records[:4]))
    fewer.write("codes", np.zeros((4, 1)), MAKER)
    assert fewer.manifest_hash("codes") != before


def test_a_kill_while_writing_leaves_the_old_column(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("codes", np.zeros((5, 1)), MAKER)
    manifest = json.loads(store.manifest_path.read_text())

    def killed(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("arra.data.store.pq.write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write("codes", np.ones((5, 1)), {**MAKER, "weights": "new"})
    assert store.manifest() == manifest
    assert store.column("codes").sum() == 0
