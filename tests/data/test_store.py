"""The store gives back what was put in, and refuses what was made from or by something else."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from arra.data import store as store_module
from arra.data.index import build_index
from arra.data.records import Failure, Found, ImageRef, Record, Source
from arra.data.store import Store
from arra.errors import ArraError

MAKER: dict[str, Any] = {"tokenizer": "vq", "weights": "abc", "num_codes": 64}
RECORDS = tuple(
    Record(
        f"id{n}",
        ImageRef("file", f"/pictures/{n}.png"),
        f"prompt {n} \u00fc",
        ["train", "validation"][n % 2],
        label=n if n > 3 else None,
        alternatives=("other", "\u4e2d")[: n % 3],
        group="ab"[n % 2],
    )
    for n in range(7)
)
COUNT = len(RECORDS)


class Toys(Source):
    """Records as they are given."""

    path: str = "/toys"
    found: tuple[Any, ...] = RECORDS

    def scan(self) -> Any:
        return iter(self.found)


def make_store(folder: Path, found: tuple[Found, ...] = RECORDS) -> Store:
    store = build_index([Toys(found=found)], folder, shard_records=3).store
    assert store is not None
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_records_come_back(store: Store) -> None:
    again = Store.open(store.path)
    assert (len(again), again.num_shards, again.shard_starts) == (COUNT, 3, [0, 3, 6, 7])
    assert [list(again.shard_rows(shard)) for shard in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    table = again.table()
    for row in (6, 0, 3, 5, 1, 2, 4):
        record = RECORDS[row]
        expected = {
            "id": record.id,
            "prompt": record.prompt,
            "alternatives": list(record.alternatives),
            "label": record.label,
            "split": record.split,
            "group": record.group,
            "source": 0,
            "image": f'["file", "/pictures/{row}.png", 0, 0, ""]',
        }
        assert table.slice(row, 1).to_pylist() == [expected]
        assert dict(zip(expected, again.fields(row, *expected), strict=True)) == expected
    assert again.prompts() == [record.prompt for record in RECORDS]
    assert again.table(["id"]).column_names == ["id"]
    assert again.rows("train").tolist() == [0, 2, 4, 6]
    with pytest.raises(ArraError, match="no records in split 'novel'; it has train, validation"):
        again.rows("novel")


def test_the_manifest_tells_of_the_records(store: Store) -> None:
    about = store.manifest()["records"]
    assert len(about.pop("sha256")) == 64
    assert about == {
        "name": "toys",
        "splits": {"train": 4, "validation": 3},
        "attribution": "",
        "classes": [],
        "sources": [{"name": "toys", "kind": "", "records": 7}],
        "shards": [3, 3, 1],
    }


@pytest.mark.parametrize(
    "values",
    [
        np.arange(COUNT * 2 * 3, dtype=np.int32).reshape(COUNT, 2, 3),
        np.random.default_rng(0).normal(size=(COUNT, 7)).astype(np.float32),
        np.asfortranarray(np.arange(COUNT * 4.0).reshape(COUNT, 4)),
    ],
    ids=["codes", "features", "column-major"],
)
def test_a_column_comes_back_exactly(store: Store, values: np.ndarray) -> None:
    store.write("x", values, MAKER)
    found = Store.open(store.path).column("x")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    assert store.column_names() == ["x"]
    about = store.manifest()["columns"]["x"]
    assert about["made_by"] == MAKER
    assert (about["shape"], about["dtype"], about["failed"]) == (list(values.shape[1:]), str(values.dtype), 0)


def test_a_second_column_touches_nothing_else(store: Store) -> None:
    store.write("codes", np.zeros((COUNT, 4), np.uint16), MAKER)
    before = tree(store.path)
    store.write("features.x", np.zeros((COUNT, 3), np.float32), MAKER)
    after = tree(store.path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"features.x"}


def test_records_are_read_without_our_code(store: Store) -> None:
    import duckdb
    import pyarrow.dataset

    files = sorted(map(str, (store.path / "records").glob("*.arrow")))
    store.write("codes", np.arange(COUNT, dtype=np.uint8)[:, None], MAKER)
    records = pyarrow.dataset.dataset(files, format="ipc")
    codes = pyarrow.dataset.dataset(sorted(map(str, (store.path / "codes").glob("*.arrow"))), format="ipc")
    connection = duckdb.connect()
    connection.register("records", records)
    connection.register("made", codes)
    rows = connection.execute("select id, prompt, codes from records join made using (id) where split = 'train'")
    found = [(name, prompt, list(made)) for name, prompt, made in rows.fetchall()]
    assert sorted(found) == [(f"id{n}", f"prompt {n} \u00fc", [n]) for n in (0, 2, 4, 6)]
    connection.close()


def test_another_maker_is_named(store: Store) -> None:
    store.write("codes", np.zeros((COUNT, 1)), MAKER)
    store.require("codes", dict(MAKER))
    assert store.has("codes", MAKER)
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
    for ask in (
        lambda: store.column("features.x"),
        lambda: store.require("features.x", MAKER),
        lambda: store.rows("train", columns=["features.x"]),
    ):
        with pytest.raises(ArraError, match=r"column 'features\.x' is missing; run: arra prepare RECIPE"):
            ask()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink], ids=["flip", "cut", "gone"]
)
def test_a_damaged_column_is_named_and_made_again(store: Store, damage: Callable[[Path], Any]) -> None:
    """Reading says to prepare again, so preparing must see the damage too."""
    store.write("codes", np.arange(COUNT)[:, None], MAKER)
    damage(store.path / "codes" / "00001.arrow")
    with pytest.raises(ArraError, match=r"codes/00001\.arrow: missing or damaged .*; run: arra prepare RECIPE"):
        store.column("codes")
    assert not store.has("codes", MAKER)
    store.write("codes", np.arange(COUNT)[:, None], MAKER)
    assert store.has("codes", MAKER)
    assert store.column("codes")[:, 0].tolist() == list(range(COUNT))


def test_large_columns_are_checked_by_size(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("codes", np.arange(COUNT)[:, None], MAKER)
    flip(store.path / "codes" / "00001.arrow")
    monkeypatch.setattr(store_module, "CHECKED_BYTES", 10)
    store.reader("codes")
    with pytest.raises(ArraError, match=r"its hash is not that of column\.json"):
        store.reader("codes", content=True)


@pytest.mark.parametrize("content", [None, b"", b"ARROW1 and nothing"])
def test_a_damaged_record_table_is_named(store: Store, content: bytes | None) -> None:
    path = store.path / "records" / "00001.arrow"
    path.unlink() if content is None else path.write_bytes(content)
    for ask in (store.prompts, lambda: Store.open(store.path).fields(4, "id"), lambda: store.rows("train")):
        with pytest.raises(
            ArraError, match=r"records/00001\.arrow: missing or damaged .*; run: arra prepare"
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"records": {}}', '{"records": [1], "format": 2}'])
def test_a_damaged_manifest_is_named(store: Store, content: str) -> None:
    store.manifest_path.write_text(content)
    for ask in (lambda: Store.open(store.path), lambda: make_store(store.path)):
        with pytest.raises(ArraError, match=r"manifest\.json: unreadable .*; delete the store and prepare again"):
            ask()


def test_a_store_of_another_format_is_named(store: Store) -> None:
    about = json.loads(store.manifest_path.read_text())
    store.manifest_path.write_text(json.dumps(about | {"format": 1}))
    with pytest.raises(ArraError, match=r"a store of format 1, this version reads format 2; prepare again in another"):
        Store.open(store.path)


def test_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArraError, match="no store here; make one with: arra prepare RECIPE"):
            Store.open(path)


def test_a_column_must_have_a_row_for_each_record(store: Store) -> None:
    with pytest.raises(ValueError, match="6 rows for 7 records"):
        store.write("codes", np.zeros((6, 1)), MAKER)
    assert store.column_names() == []
    other = make_store(store.path.parent / "fewer", RECORDS[:5])
    other.write("codes", np.zeros((5, 1)), MAKER)
    shutil.copytree(other.path / "codes", store.path / "codes")
    with pytest.raises(ArraError, match="column 'codes' has 5 rows for 7 records; run: arra prepare RECIPE"):
        store.column("codes")


def test_rows_without_a_value_are_left_out(store: Store) -> None:
    valid = np.array([True, True, False, True, False, True, True])
    for name in ("codes", "x"):
        writer = store.writer(name, made_by=MAKER, shape=(1,), dtype="uint8")
        for shard in range(store.num_shards):
            rows = store.shard_rows(shard)
            ids = store.records_of(shard).column("id").combine_chunks()
            own = valid[rows.start : rows.stop] | (name == "x")
            failures = [
                Failure(f"id{row}", f"{row}.png", "broken") for row, good in zip(rows, own, strict=True) if not good
            ]
            writer.write(shard, ids, np.ones((len(rows), 1, 1)), valid=own, failures=failures)
        writer.publish()
    assert store.rows("train").tolist() == [0, 2, 4, 6]
    assert store.rows("train", columns=["x"]).tolist() == [0, 2, 4, 6]
    assert store.rows("train", columns=["x", "codes"]).tolist() == [0, 6]
    assert store.write_failures() == 2
    lines = [json.loads(line) for line in (store.path / "failures.jsonl").read_text().splitlines()]
    assert lines == [
        {"id": f"id{row}", "where": f"{row}.png", "reason": "broken", "columns": ["codes"]} for row in (2, 4)
    ]
    pending = {"features.y": [Failure("id2", "2.png", "broken"), Failure("id5", "5.png", "odd")]}
    assert store.write_failures(pending) == 3
    lines = [json.loads(line) for line in (store.path / "failures.jsonl").read_text().splitlines()]
    assert [(line["id"], line["columns"]) for line in lines] == [
        ("id2", ["codes", "features.y"]),
        ("id4", ["codes"]),
        ("id5", ["features.y"]),
    ]
    shutil.rmtree(store.path / "codes")
    assert store.write_failures() == 0
    assert not (store.path / "failures.jsonl").exists()


def ids_of(store: Store, rows: np.ndarray) -> list[str]:
    return [store.fields(int(row), "id")[0] for row in rows]


def test_a_share_of_a_split_is_chosen_by_the_ids_alone(tmp_path: Path) -> None:
    """Whatever the order, the files and the other records of the store, and a smaller share lies in a larger one."""
    records = [replace(RECORDS[0], id=f"picture {n}") for n in range(40)]
    others = [replace(RECORDS[1], id=f"held out {n}") for n in range(40)]
    whole = make_store(tmp_path / "whole", tuple(records))
    mixed = make_store(
        tmp_path / "mixed", tuple(each for pair in zip(records[::-1], others, strict=True) for each in pair)
    )
    ranked = sorted((record.id for record in records), key=lambda name: hashlib.sha256(name.encode()).digest())
    for most in (1, 7, 20, 39):
        for store in (whole, mixed):
            rows = store.rows("train", at_most=most)
            assert set(ids_of(store, rows)) == set(ranked[:most])
            assert (np.diff(rows) > 0).all()
    for enough in (40, 41, None):
        np.testing.assert_array_equal(mixed.rows("train", at_most=enough), mixed.rows("train"))
    assert len(mixed.rows("validation")) == 40


def test_no_record_stands_in_for_one_that_failed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", tuple(replace(RECORDS[0], id=f"picture {n}") for n in range(20)))
    chosen = store.rows("train", at_most=6)
    writer = store.writer("codes", made_by=MAKER, shape=(1,), dtype="uint8")
    for shard in range(store.num_shards):
        rows = store.shard_rows(shard)
        ids: pa.Array = store.records_of(shard).column("id").combine_chunks()
        good = ~np.isin(np.array(rows), chosen[:2])
        writer.write(shard, ids, np.ones((len(rows), 1, 1)), valid=good)
    writer.publish()
    assert store.rows("train", columns=["codes"], at_most=6).tolist() == chosen[2:].tolist()


def test_a_split_whose_records_all_failed_is_told(store: Store) -> None:
    writer = store.writer("codes", made_by=MAKER, shape=(1,), dtype="uint8")
    for shard in range(store.num_shards):
        ids: pa.Array = store.records_of(shard).column("id").combine_chunks()
        writer.write(shard, ids, np.ones((len(ids), 1, 1)), valid=np.zeros(len(ids), dtype=bool))
    writer.publish()
    with pytest.raises(ArraError, match=r"every record of split 'train' failed; see .*failures\.jsonl"):
        store.rows("train", columns=["codes"])


def test_the_manifest_hash_knows_the_records_and_the_named_columns(store: Store, tmp_path: Path) -> None:
    store.write("codes", np.zeros((COUNT, 1)), MAKER)
    before = store.manifest_hash("codes")
    store.write("features.x", np.zeros((COUNT, 2)), MAKER)
    assert store.manifest_hash("codes") == before  # a column that is not used may come and go
    assert store.manifest_hash("codes", "features.x") != before
    store.write("codes", np.ones((COUNT, 1)), MAKER)
    assert store.manifest_hash("codes") != before
    store.write("codes", np.zeros((COUNT, 1)), MAKER)
    assert store.manifest_hash("codes") == before
    moved = make_store(tmp_path / "other")
    moved.write("codes", np.zeros((COUNT, 1)), MAKER)
    assert moved.manifest_hash("codes") == before
    fewer = make_store(tmp_path / "fewer", RECORDS[:-1])
    fewer.write("codes", np.zeros((COUNT - 1, 1)), MAKER)
    assert fewer.manifest_hash("codes") != before
    with pytest.raises(KeyError):
        store.manifest_hash("none")


CHANGES: dict[str, Any] = {
    "id": "A",
    "prompt": "prompt  0 \u00fc",
    "split": "novel",
    "label": 3,
    "alternatives": ("love", "heart"),
    "group": "hearts",
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_records_hash_changes_with_every_field(field: str, store: Store) -> None:
    changed = (replace(RECORDS[0], **{field: CHANGES[field]}), *RECORDS[1:])
    store.write("x", np.zeros((len(store), 1)), {"made": "of these records"})
    with pytest.raises(
        ArraError, match=r"made from other records \(toys, 7 pictures\) than given \(toys, 7 pictures\): ids, capt"
    ):
        make_store(store.path, changed)
    make_store(store.path)  # the store is as it was


def test_a_store_of_which_nothing_was_made_binds_to_nothing(store: Store) -> None:
    """A mistake that was told before anything was computed can be mended in place."""
    before = store.about["sha256"]
    begun = store.writer("x", made_by={}, shape=(1,), dtype="float32")
    mended = make_store(store.path, (replace(RECORDS[0], prompt="mended"), *RECORDS[1:]))
    assert mended.about["sha256"] != before
    assert mended.fields(0, "prompt") == ("mended",)
    assert not begun.part.exists()  # what was begun belonged to the other records


def test_fields_cannot_trade_places(tmp_path: Path) -> None:
    """Text may not slide from one field into its neighbour."""
    base = RECORDS[0]
    variants = [
        replace(base, id="ab", prompt="c"),
        replace(base, id="a", prompt="bc"),
        replace(base, group="x", alternatives=("y", "z")),
        replace(base, group="x", alternatives=('y", "z',)),
        replace(base, group="", alternatives=("x", "y", "z")),
    ]
    hashes = {make_store(tmp_path / str(n), (variant,)).about["sha256"] for n, variant in enumerate(variants)}
    assert len(hashes) == len(variants)
