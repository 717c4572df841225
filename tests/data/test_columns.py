"""A column gives back what was put in, to any Arrow reader, is published whole or not at all, touches nothing else."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from arra.data import cells, columns
from arra.data.columns import ColumnReader, ColumnWriter, folder_lock, read_entry, read_failures
from arra.data.records import Failure
from arra.errors import ArraError

MAKER: dict[str, Any] = {"tokenizer": "vq", "weights": "abc", "num_codes": 64}
SHARDS = (4, 4, 3)
ROWS = sum(SHARDS)
IDS = [f"id{number}" for number in range(ROWS)]
RANDOM = np.random.default_rng(0)


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file, by its place; locks hold nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def parts() -> Iterator[tuple[int, slice]]:
    start = 0
    for shard, count in enumerate(SHARDS):
        yield shard, slice(start, start + count)
        start += count


def writer_for(store: Path, values: np.ndarray, name: str = "codes", **changes: Any) -> ColumnWriter:
    fields = {"made_by": MAKER, "shape": values.shape[2:], "variants": values.shape[1], "dtype": str(values.dtype)}
    return ColumnWriter(store, name, num_shards=len(SHARDS), **{**fields, **changes})


def write_shard(
    writer: ColumnWriter, shard: int, values: np.ndarray | Sequence[np.ndarray], valid: np.ndarray | None = None
) -> None:
    rows = dict(parts())[shard]
    own = np.ones(ROWS, dtype=bool)[rows] if valid is None else valid[rows]
    failed = [Failure(name, f"{name}.png", "broken") for name, good in zip(IDS[rows], own, strict=True) if not good]
    writer.write(shard, pa.array(IDS[rows]), values[rows], valid=own, failures=failed)


def write(store: Path, values: np.ndarray, name: str = "codes", valid: np.ndarray | None = None) -> ColumnReader:
    writer = writer_for(store, values, name)
    for shard, _ in parts():
        write_shard(writer, shard, values, valid)
    assert writer.publish()
    return reader_of(store, name)


def reader_of(store: Path, name: str = "codes") -> ColumnReader:
    entry = read_entry(store / name)
    assert entry is not None
    return ColumnReader(store / name, entry)


CODES = RANDOM.integers(0, 60_000, (ROWS, 3, 2, 2)).astype(np.uint16)
DENSE: dict[str, np.ndarray] = {
    "codes": CODES,
    "many codes": RANDOM.integers(0, 2**32, (ROWS, 1, 4, 4)).astype(np.uint32),
    "few codes": RANDOM.integers(0, 256, (ROWS, 10, 2, 2)).astype(np.uint8),
    "features": RANDOM.normal(size=(ROWS, 2, 7)).astype(np.float32),
    "half": RANDOM.normal(size=(ROWS, 1, 5)).astype(np.float16),
    "sizes": RANDOM.integers(0, 2**20, (ROWS, 1, 2)).astype(np.int32),
    "pixels": RANDOM.integers(0, 256, (ROWS, 1, 4, 4, 3)).astype(np.uint8),
    "column-major": np.asfortranarray(RANDOM.normal(size=(ROWS, 2, 3, 2))),
    "not finite": np.array([np.nan, np.inf, -np.inf, -0.0] * ROWS).astype(np.float32).reshape(ROWS, 1, 4),
}


@pytest.mark.parametrize("values", DENSE.values(), ids=DENSE)
def test_dense_values_come_back_exactly(values: np.ndarray, tmp_path: Path) -> None:
    reader = write(tmp_path, values)
    assert len(reader) == ROWS
    for variant in range(values.shape[1]):
        found = reader.take(np.arange(ROWS), variants=np.full(ROWS, variant))
        assert found.dtype == values.dtype
        assert found.tobytes() == values[:, variant].tobytes()
        assert found.flags.writeable  # torch.from_numpy warns of read-only memory
    assert reader.take(np.arange(ROWS)).tobytes() == values[:, 0].tobytes()
    assert reader.valid().all()


def test_any_rows_in_any_order_are_those_rows(tmp_path: Path) -> None:
    reader = write(tmp_path, CODES)
    for seed in range(20):
        random = np.random.default_rng(seed)
        rows, variants = random.integers(0, ROWS, 50), random.integers(0, 3, 50)
        np.testing.assert_array_equal(reader.take(rows, variants=variants), CODES[rows, variants])
    assert reader.take(np.arange(0)).shape == (0, 2, 2)
    for row in (-1, ROWS):
        with pytest.raises(IndexError, match=f"codes: rows {row}..{row} of {ROWS}"):
            reader.take(np.array([row]))


@pytest.mark.parametrize("dtype", ["uint16", "float32", "float16"])
def test_ragged_values_come_back_exactly(dtype: str, tmp_path: Path) -> None:
    values = [RANDOM.integers(0, 99, (n % 4, 1 + n % 3)).astype(dtype) for n in range(ROWS)]
    values[5] = np.zeros((0, 0), dtype)
    valid = np.arange(ROWS) != 5
    writer = ColumnWriter(
        tmp_path, "codes", made_by=MAKER, shape=(None, None), variants=1, dtype=dtype, num_shards=len(SHARDS)
    )
    for shard, _ in parts():
        write_shard(writer, shard, values, valid)
    writer.publish()
    reader = reader_of(tmp_path)
    rows = np.random.default_rng(1).permutation(ROWS)
    for row, found in zip(rows, reader.take_ragged(rows), strict=True):
        assert found.dtype == dtype
        assert found.shape == values[row].shape
        assert found.tobytes() == values[row].tobytes()
    assert reader.shapes().tolist() == [list(value.shape) for value in values]
    assert reader.valid().tolist() == valid.tolist()
    with pytest.raises(ValueError, match="codes: records differ in shape; use take_ragged"):
        reader.take(rows)


def test_failed_rows_hold_nothing_and_are_told(tmp_path: Path) -> None:
    valid = np.ones(ROWS, dtype=bool)
    valid[[2, 8, 9]] = False
    values = np.where(valid[:, None, None, None], CODES, 0).astype(np.uint16)
    reader = write(tmp_path, values, valid=valid)
    assert reader.valid().tolist() == valid.tolist()
    np.testing.assert_array_equal(reader.take(np.arange(ROWS)), values[:, 0])
    assert reader.entry.failed == 3
    assert [failure.id for failure in read_failures(tmp_path / "codes")] == ["id2", "id8", "id9"]
    nulls = [pa.ipc.open_file(path).read_all() for path in sorted((tmp_path / "codes").glob("*.arrow"))]
    assert (
        np.array([row is not None for table in nulls for row in table["codes"].to_pylist()]).tolist() == valid.tolist()
    )


def test_any_arrow_reader_reads_it(tmp_path: Path) -> None:
    """pyarrow, pandas, duckdb and datasets, each without a line of ours."""
    import duckdb
    import pandas

    features = RANDOM.normal(size=(ROWS, 1, 3)).astype(np.float32)
    write(tmp_path, features, "features.x")
    files = sorted(map(str, (tmp_path / "features.x").glob("*.arrow")))
    expected = dict(zip(IDS, features[:, 0].tolist(), strict=True))

    tables = [pa.ipc.open_file(file).read_all() for file in files]
    assert {row["id"]: row["features.x"] for table in tables for row in table.to_pylist()} == expected
    made_by = tables[0].schema.metadata[b"arra.made_by"]
    assert json.loads(made_by) == MAKER
    frames = pandas.concat([pandas.read_feather(file) for file in files])
    assert {
        key: list(map(float, value)) for key, value in zip(frames["id"], frames["features.x"], strict=True)
    } == expected
    whole = pyarrow.dataset.dataset(files, format="ipc")
    assert {row["id"]: row["features.x"] for row in whole.to_table().to_pylist()} == expected
    asked = duckdb.from_arrow(whole).query("t", "select id, \"features.x\" from t where id > 'id3'")
    assert asked is not None
    assert {key: list(value) for key, value in asked.fetchall()} == {
        key: value for key, value in expected.items() if key > "id3"
    }
    loaded = datasets.load_dataset(
        "arrow", data_files={"train": files}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert {row["id"]: row["features.x"] for row in loaded} == expected


def test_another_column_touches_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, CODES)
    before = tree(tmp_path)
    write(tmp_path, DENSE["features"], "features.x")
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after if name not in before} == {"features.x"}


def test_a_column_in_the_making_is_not_there(tmp_path: Path) -> None:
    writer = writer_for(tmp_path, CODES)
    for shard in (2, 0):
        write_shard(writer, shard, CODES)
        assert not writer.publish()
        assert read_entry(tmp_path / "codes") is None
    assert writer_for(tmp_path, CODES).done() == {0: 0, 2: 0}  # what was begun the same way is continued
    assert writer_for(tmp_path, CODES, made_by={**MAKER, "weights": "other"}).done() == {}
    assert writer_for(tmp_path, CODES).done() == {}


def test_wrong_values_are_a_bug(tmp_path: Path) -> None:
    writer = writer_for(tmp_path, CODES)
    with pytest.raises(ValueError, match=r"codes: \(3, 3, 2, 2\) for 4 records of 12 values"):
        writer.write(0, pa.array(IDS[:4]), CODES[:3], valid=np.ones(4, dtype=bool))


def test_failed_shards_are_made_again(tmp_path: Path) -> None:
    valid = np.arange(ROWS) != 5
    writer = writer_for(tmp_path, CODES)
    for shard, _ in parts():
        write_shard(writer, shard, CODES, valid)
    assert [failure.id for failure in writer.failures()] == ["id5"]
    writer.forget_failed([0, 2])
    assert writer.done() == {0: 0, 1: 1, 2: 0}  # another part's shard is not ours to forget
    writer.forget_failed(range(3))
    assert writer.done() == {0: 0, 2: 0}
    write_shard(writer, 1, CODES)
    assert writer.failures() == []
    assert writer.publish()
    assert reader_of(tmp_path).valid().all()


def test_whole_shards_of_a_published_column_are_adopted(tmp_path: Path) -> None:
    valid = np.arange(ROWS) != 5
    published = tree(write(tmp_path, CODES, valid=valid).folder)
    writer = writer_for(tmp_path, CODES, again=True)
    writer.adopt()
    assert writer.done() == {0: 0, 2: 0}
    write_shard(writer, 1, CODES)
    assert tree(tmp_path / "codes") == published  # until it is published the old one is there
    assert writer.publish()
    assert reader_of(tmp_path).valid().all()


def test_other_columns_are_not_adopted(tmp_path: Path) -> None:
    write(tmp_path, CODES)
    writer = writer_for(tmp_path, CODES, made_by={**MAKER, "weights": "other"}, again=True)
    writer.adopt()
    assert writer.done() == {}


def test_damaged_shards_are_not_adopted(tmp_path: Path) -> None:
    write(tmp_path, CODES)
    flip(tmp_path / "codes" / "00001.arrow")
    (tmp_path / "codes" / "00002.arrow").unlink()
    writer = writer_for(tmp_path, CODES, again=True)
    writer.adopt()
    assert writer.done() == {0: 0}
    for shard in (1, 2):
        write_shard(writer, shard, CODES)
    assert writer.publish()
    reader_of(tmp_path).check_files(content=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "seen_by_size"), [(Path.unlink, True), (cut, True), (flip, False)], ids=["gone", "cut", "flipped"]
)
def test_damaged_files_are_told(damage: Callable[[Path], None], seen_by_size: bool, tmp_path: Path) -> None:
    reader = write(tmp_path, CODES)
    reader.check_files(content=True)
    damage(tmp_path / "codes" / "00001.arrow")
    for content in [True, *([False] if seen_by_size else [])]:
        with pytest.raises(ArraError, match=r"codes/00001\.arrow: missing or damaged .*; run: arra prepare RECIPE$"):
            reader.check_files(content=content)


@pytest.mark.parametrize("content", [b"", b"ARROW1 and nothing", None])
def test_files_that_are_no_tables_are_told_on_reading(content: bytes | None, tmp_path: Path) -> None:
    write(tmp_path, CODES)
    path = tmp_path / "codes" / "00001.arrow"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(
        ArraError, match=r"codes/00001\.arrow: missing or damaged .*; run: arra prepare RECIPE$"
    ) as error:
        reader_of(tmp_path).take(np.arange(ROWS))
    assert "\n" not in str(error.value)


def test_a_table_of_other_rows_is_told(tmp_path: Path) -> None:
    write(tmp_path, CODES)
    shutil.copy(tmp_path / "codes" / "00002.arrow", tmp_path / "codes" / "00001.arrow")
    with pytest.raises(ArraError, match=r"00001\.arrow: not the file that column\.json tells of; run: arra prepare"):
        reader_of(tmp_path).take(np.arange(ROWS))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"shards": [{"rows": 3}]}', '{"shards": 3}'])
def test_a_damaged_entry_is_told(content: str, tmp_path: Path) -> None:
    write(tmp_path, CODES)
    (tmp_path / "codes" / "column.json").write_text(content)
    with pytest.raises(ArraError, match=r"codes/column\.json: unreadable .*; delete the folder .* and prepare again$"):
        read_entry(tmp_path / "codes")


class Crash(BaseException):
    """A kill: nothing may catch it."""


def crash_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every `number`-th step that changes the file system fail, before it is done; lists the steps made."""
    made: list[str] = []

    def counted(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if len(made) == number:
                raise Crash(name)
            made.append(name)
            return step(*arguments, **named)

        return run

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "link"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    for name in ("rename", "unlink", "write_bytes", "mkdir"):
        monkeypatch.setattr(Path, name, counted(name, getattr(Path, name)))
    return made


def finish(store: Path, values: np.ndarray, valid: np.ndarray) -> int:
    """What every start of a preparation does: make the missing shards (how many), publish."""
    writer = writer_for(store, values)
    missing = [shard for shard, _ in parts() if shard not in writer.done()]
    for shard in missing:
        write_shard(writer, shard, values, valid)
    writer.publish()
    return len(missing)


@pytest.mark.parametrize("before", [None, "other"])
def test_a_crash_at_any_step_leaves_a_whole_column_or_none(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next start ends in the same bytes as an undisturbed one."""
    valid = np.arange(ROWS) != 5
    new = np.where(valid[:, None, None, None], CODES, 0).astype(np.uint16)
    old = (CODES + 1).astype(np.uint16)

    def begin(store: Path) -> dict[str, str]:
        if before is not None:
            writer = writer_for(store, old, made_by={**MAKER, "weights": before})
            for shard, _ in parts():
                write_shard(writer, shard, old)
            writer.publish()
        return tree(store)

    begin(tmp_path / "whole")
    finish(tmp_path / "whole", new, valid)
    expected = tree(tmp_path / "whole")
    for number in range(500):
        store = tmp_path / str(number)
        kept = begin(store)
        with monkeypatch.context() as patch:
            steps = crash_at(number, patch)
            try:
                finish(store, new, valid)
                crashed = False
            except Crash:
                crashed = True
        leftover = re.compile(
            r"\..*|codes/(\d+\.json|header\.json|\..*)"
        )  # beside a whole column, gone at the next start
        visible = {name: value for name, value in tree(store).items() if not leftover.fullmatch(name)}
        assert visible in ({}, kept, expected), (number, steps[-1:])
        if read_entry(store / "codes") is not None:
            reader_of(store).check_files(content=True)
        whole = len([*store.glob(".codes.part/0000?.arrow")]) if visible != expected else len(SHARDS)
        assert finish(store, new, valid) <= len(SHARDS) + 1 - whole, (number, steps[-1:])  # one may lack its .json
        assert tree(store) == expected, (number, steps[-1:])
        shutil.rmtree(store)
        if not crashed:
            break
    else:
        raise AssertionError("never undisturbed")
    assert number > 30


def _write_some(store: Path, shards: Sequence[int], ready: Any) -> None:
    ready.wait()
    writer = writer_for(store, CODES)
    for shard in shards:
        write_shard(writer, shard, CODES)
    writer.publish()


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "one", CODES)
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    shares = ([0, 2], [1, 2])  # one shard is even made by both
    processes = [context.Process(target=_write_some, args=(tmp_path / "two", share, ready)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert writer_for(tmp_path / "two", CODES).publish()  # it is there already
    assert reader_of(tmp_path / "two").take(np.arange(ROWS)).tobytes() == CODES[:, 0].tobytes()


def test_a_store_that_is_being_prepared_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, free = context.Event(), context.Event()

    def hold() -> None:
        with folder_lock(tmp_path):
            held.set()
            free.wait()

    process = context.Process(target=hold)
    process.start()
    held.wait()
    with (
        pytest.raises(ArraError, match="another process is preparing this store; wait for it, or use another folder"),
        folder_lock(tmp_path, wait=False),
    ):
        pass
    free.set()
    process.join()
    with folder_lock(tmp_path, wait=False):
        pass


def test_few_files_are_open_however_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of hundreds of shards, for hours, in a process that may open 1,024 files."""
    handles = cells.FileHandles(limit=2)
    monkeypatch.setattr(columns, "HANDLES", handles)
    opened = len(os.listdir("/proc/self/fd"))
    readers = [write(tmp_path, CODES), write(tmp_path, DENSE["features"], "features.x")]
    for seed in range(20):
        rows = np.random.default_rng(seed).integers(0, ROWS, 30)
        np.testing.assert_array_equal(readers[0].take(rows), CODES[rows, 0])
        np.testing.assert_array_equal(readers[1].take(rows), DENSE["features"][rows, 0])
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
    for descriptor in handles._open.values():
        os.close(descriptor)


def test_reading_takes_no_memory(tmp_path: Path) -> None:
    """64 MiB of pictures are read several times at random; the process grows by far less."""
    values = RANDOM.integers(0, 256, (ROWS, 1, 1024, 1024, 6)).astype(np.uint8)
    reader = write(tmp_path, values)
    rows = np.random.default_rng(0).integers(0, ROWS, 60)
    assert reader.take(rows[:1]).tobytes() == values[rows[0], 0].tobytes()
    before = resident_bytes()
    for row in rows:
        reader.take(row[None])
    assert resident_bytes() - before < 20 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_file_that_is_replaced_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never rows of two versions of a column in one training."""
    reader = write(tmp_path, CODES)
    reader.take(np.arange(ROWS))
    write_again = writer_for(tmp_path, CODES, made_by={**MAKER, "weights": "new"})
    for shard, _ in parts():
        write_shard(write_again, shard, (CODES + 1).astype(np.uint16))
    assert write_again.publish()
    assert reader.take(np.arange(ROWS)).tobytes() == CODES[:, 0].tobytes()  # the old files are still open
    monkeypatch.setattr(columns, "HANDLES", cells.FileHandles())
    with pytest.raises(ArraError, match=r"00000\.arrow: replaced while it was being read; start again"):
        reader.take(np.arange(ROWS))
