"""Every item of every source is a record, a failure or skipped; splits are fair; a store keeps its records."""

import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.data import index
from arra.data.index import HELD_OUT_SHARE, MAX_TEXT, Indexed, build_index, default_shard_records, is_too_many
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source
from arra.data.store import Store
from arra.errors import ArraError


class Given(Source):
    """Items as they are given."""

    path: str = "/toys"
    found: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()

    def scan(self) -> Iterator[Found]:
        yield from self.found

    def class_names(self) -> tuple[str, ...]:
        return self.names


def record(number: int, **changes: Any) -> Record:
    given = Record(
        f"id{number}", ImageRef("file", f"/pictures/{number}.png"), f"prompt {number}", where=f"line {number}"
    )
    return replace(given, **changes)


def build(folder: Path, *found: Found, **options: Any) -> Indexed:
    return build_index([Given(found=found)], folder, **options)


def store_of(indexed: Indexed) -> Store:
    assert indexed.store is not None
    return indexed.store


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def failures_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()]


KINDS: dict[str, Callable[[int], Found]] = {
    "record": lambda n: record(n),
    "own split": lambda n: record(n, split="novel"),
    "label": lambda n: record(n, prompt="", label=n),
    "twice": lambda n: record(0),
    "blank": lambda n: record(n, prompt=" \n"),
    "failure": lambda n: Failure(f"id{n}", f"line {n}", "broken"),
    "skipped": lambda n: Skipped(f"id{n}", f"line {n}", "another view"),
}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.lists(st.sampled_from(sorted(KINDS)), max_size=12), min_size=1, max_size=3),
    shard_records=st.integers(1, 9),
)
def test_nothing_is_lost(kinds: list[list[str]], shard_records: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In = records + failures + skipped, each where it belongs, in the order of the sources."""
    folder = tmp_path_factory.mktemp("index")
    items: list[tuple[Found, ...]] = [tuple(KINDS[kind](n) for n, kind in enumerate(each, 1)) for each in kinds]
    items[0] = (record(0), *items[0])
    sources = [Given(path=f"/source{number}", found=each) for number, each in enumerate(items)]
    found = build_index(sources, folder, shard_records=shard_records, max_failed_fraction=1.0)
    store = store_of(found)
    store.write_failures()
    failed = failures_of(folder) if found.failed else []
    skipped = (folder / "skipped.jsonl").read_text().splitlines() if found.skipped else []
    assert found.items == sum(map(len, items)) == len(store) + found.failed + len(skipped)
    assert found.skipped == len(skipped)
    assert (folder / "skipped.jsonl").exists() == bool(found.skipped)
    prefixed = len(sources) > 1
    expected, seen = [], set()
    for number, each in enumerate(items):
        for item in each:
            name = f"source{number}/{item.id}" if prefixed else item.id
            if isinstance(item, Record) and (item.prompt.strip() or item.label is not None) and name not in seen:
                expected.append((name, item.prompt, number))
                seen.add(name)
    table = store.table()
    columns = (table.column(name).to_pylist() for name in ("id", "prompt", "source"))
    assert list(zip(*columns, strict=True)) == expected
    assert store.about["shards"] == [len(store.records_of(shard)) for shard in range(store.num_shards)]
    assert all(size == shard_records for size in store.about["shards"][:-1])
    assert sum(source["records"] for source in store.about["sources"]) == len(store)
    assert sum(store.about["splits"].values()) == len(store)
    assert len({line["reason"] for line in failed}) <= 3
    shutil.rmtree(folder)


FAULTS = {
    "null in the caption": ({"prompt": "a\0b"}, "the caption holds a null character; remove it"),
    "null in the id": ({"id": "a\0b"}, "the id holds a null character; remove it"),
    "null in an alternative": ({"alternatives": ("a", "\0")}, "the caption holds a null character; remove it"),
    "surrogate": ({"prompt": "a\ud800b"}, "the caption is not Unicode text (a lone surrogate); write it in UTF-8"),
    "surrogate in the id": ({"id": "\udcff"}, "the id is not Unicode text (a lone surrogate); write it in UTF-8"),
    "long": ({"prompt": "x" * (MAX_TEXT + 1)}, "the caption has 20001 characters, at most 20000 are read; shorten it"),
    "blank": ({"prompt": " \t\n\u3000"}, "the caption is blank; write one or remove the line"),
    "no id": ({"id": " "}, "no id; expected a name for the record"),
    "twice": ({"id": "id0"}, "listed twice; keep one line, or give the records ids of their own"),
    "split": ({"split": "../x"}, "split '../x'; expected letters, digits, '.', '_' or '-'"),
    "long split": ({"split": "x" * 65}, f"split '{'x' * 64}'; expected letters, digits, '.', '_' or '-'"),
    "label": ({"label": -1, "prompt": ""}, "label -1; expected a class number of 0..1"),
    "large label": ({"label": 2}, "label 2; expected a class number of 0..1"),
}


@pytest.mark.parametrize(("changes", "reason"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_told_whatever_the_source(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = (record(0), record(1, **changes), record(2))
    sources = [Given(found=found, names=("cat", "dog"))]
    refused = build_index(sources, tmp_path / "none")
    assert (refused.records, refused.failed, refused.store) == (2, 1, None)
    kept = store_of(build_index(sources, tmp_path / "one", max_failed_fraction=0.5))
    kept.write_failures()
    for folder in ("none", "one"):
        (line,) = failures_of(tmp_path / folder)
        assert (line["where"], line["reason"], line["columns"]) == ("line 1", reason, ["records"])
        assert "\n" not in line["reason"]
    assert kept.table(["id"]).column("id").to_pylist() == ["id0", "id2"]


def test_texts_pass_as_they_stand(tmp_path: Path) -> None:
    texts = [" padded ", '<|image|> \\n "quoted"', "\u00e9 e\u0301", "\U0001f600", "x" * MAX_TEXT, "line\nline"]
    store = store_of(build(tmp_path, *(record(n, prompt=text) for n, text in enumerate(texts))))
    assert store.prompts() == texts


def test_nothing_is_begun_where_too_many_fail(tmp_path: Path) -> None:
    assert not is_too_many(0, 0, 0.0)
    assert is_too_many(1, 1000, 0.0)
    assert not is_too_many(1, 10, 0.1)
    found = build(tmp_path, record(0), record(1), Failure("x", "line 9", "broken"), max_failed_fraction=0.3)
    assert (found.records, found.failed, found.store) == (2, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures.jsonl"]
    assert failures_of(tmp_path) == [{"id": "x", "where": "line 9", "reason": "broken", "columns": ["records"]}]
    assert build(tmp_path, record(0), record(1), Failure("x", "line 9", "broken"), max_failed_fraction=0.34).store


def test_sources_without_a_record(tmp_path: Path) -> None:
    for found in ((), (Skipped("a", "line 1", "another view"),)):
        with pytest.raises(ArraError, match="/toys: no records found; nothing to prepare"):
            build(tmp_path, *found)
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.glob(".records*"))


def test_mixed_sources_must_mean_the_same_classes(tmp_path: Path) -> None:
    one = Given(path="/one", found=(record(0, label=1),), names=("cat", "dog"))
    other = one.model_copy(update={"path": "/other", "names": ("cat", "fish")})
    with pytest.raises(ArraError, match=r"/other: its 2 classes are not those of the source before \(2\); labels of"):
        build_index([one, other], tmp_path)
    assert store_of(build_index([one, one.model_copy(update={"path": "/b"})], tmp_path)).about["classes"] == [
        "cat",
        "dog",
    ]


def splits_of(indexed: Indexed) -> dict[str, str]:
    table = store_of(indexed).table(["id", "split"])
    return dict(zip(*(table.column(name).to_pylist() for name in ("id", "split")), strict=True))


def test_equal_captions_share_a_split(tmp_path: Path) -> None:
    """Else a model is asked for what it has learnt by heart."""
    spellings = ("{}", " {} ", "{}\n", "  {}")
    records = [record(n, prompt=spellings[n % 4].format(f"A  thing {n // 4}")) for n in range(800)]
    records += [record(900 + n, prompt=f"a thing {n}".upper()) for n in range(200)]
    by_text: dict[str, set[str]] = {}
    splits = splits_of(build(tmp_path, *records))
    for each in records:
        by_text.setdefault(" ".join(each.prompt.lower().split()), set()).add(splits[each.id])
    assert len(by_text) == 200
    assert all(len(found) == 1 for found in by_text.values())


def test_shares_of_the_splits(tmp_path: Path) -> None:
    splits = splits_of(build(tmp_path, *(record(n) for n in range(1000))))
    counts = {name: list(splits.values()).count(name) for name in set(splits.values())}
    share = round(1000 * HELD_OUT_SHARE)
    assert counts == {"train": 1000 - 2 * share, "validation": share, "heldout": share}
    few = splits_of(build(tmp_path / "few", *(record(n) for n in range(3))))
    assert sorted(few.values()) == ["heldout", "train", "validation"]
    labels = splits_of(build(tmp_path / "labels", *(record(n, prompt="", label=3) for n in range(400))))
    assert sorted(set(labels.values())) == ["heldout", "train", "validation"]  # by id, not all by the one class
    assert splits_of(build(tmp_path / "one", record(0))) == {"id0": "validation"}


def test_splits_do_not_depend_on_the_order(tmp_path: Path) -> None:
    records = [record(n) for n in range(300)]
    shuffled = random.Random(0).sample(records, 300)
    assert splits_of(build(tmp_path / "a", *records)) == splits_of(build(tmp_path / "b", *shuffled, shard_records=7))


def test_splits_that_are_given_stay(tmp_path: Path) -> None:
    given = [record(n, split=("train", "test", "")[n % 3], prompt="same" if n < 3 else f"p{n}") for n in range(90)]
    splits = splits_of(build(tmp_path, *given))
    for each in given:
        if each.split:
            assert splits[each.id] == each.split
    assert set(splits.values()) == {"train", "test", "validation", "heldout"}
    whole = build_index([Given(found=tuple(given), split="novel")], tmp_path / "novel")
    assert set(splits_of(whole).values()) == {"novel"}


def test_the_same_records_reopen_and_no_file_is_touched(tmp_path: Path) -> None:
    items: list[Found] = [record(0), Failure("x", "line 9", "broken"), record(1), Skipped("y", "line 8", "rule")]
    store = store_of(build(tmp_path, *items, max_failed_fraction=1.0))
    store.write("x", np.zeros((2, 1)), {})
    before = files(tmp_path)
    again = build(tmp_path, *items, max_failed_fraction=1.0)
    after = files(tmp_path)
    assert (again.records, again.failed, again.skipped) == (2, 1, 1)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {"skipped.jsonl"}
    assert after["skipped.jsonl"][0] == before["skipped.jsonl"][0]


@pytest.mark.parametrize(
    "items",
    [
        [record(0), record(1, prompt="new")],
        [record(1), record(0)],
        [record(0)],
        [record(0), record(1), record(2)],
    ],
    ids=["changed", "reordered", "fewer", "more"],
)
def test_other_records_are_refused(items: list[Record], tmp_path: Path) -> None:
    store = store_of(build(tmp_path, record(0), record(1)))
    store.write("x", np.zeros((2, 1)), {})
    before = files(tmp_path)
    with pytest.raises(
        ArraError,
        match=rf"made from other records \(toys, 2 pictures\) than given \(toys, {len(items)} pictures\): ids, cap.*; "
        "use another folder or delete this store",
    ):
        build(tmp_path, *items)
    assert files(tmp_path) == before


def test_pictures_that_moved_change_the_references_alone(tmp_path: Path) -> None:
    store = store_of(build(tmp_path, *(record(n) for n in range(5)), shard_records=2))
    store.write("x", np.zeros((5, 1)), {})
    before = files(tmp_path)
    moved = [record(n, image=ImageRef("file", f"/elsewhere/{n}.png"), where=f"other line {n}") for n in range(5)]
    again = store_of(build(tmp_path, *moved, shard_records=2))
    assert [json.loads(text)[1] for text in again.table().column("image").to_pylist()] == [
        f"/elsewhere/{n}.png" for n in range(5)
    ]
    after = files(tmp_path)
    changed = {name for name in before if before[name][0] != after[name][0]}
    assert changed == {f"records/{shard:05d}.arrow" for shard in range(3)}
    assert before.keys() == after.keys()
    assert again.manifest_hash("x") == store.manifest_hash("x")


def test_references_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = store_of(build(Path("store"), record(0, image=ImageRef("file", "pictures/0.png"))))
    assert json.loads(store.fields(0, "image")[0])[1] == str(tmp_path / "pictures" / "0.png")


def _build_together(folder: Path, items: list[Record], ready: Any) -> None:
    ready.wait()
    assert build(folder, *items, shard_records=50).records == len(items)


def test_processes_of_a_job_array_index_one_store(tmp_path: Path) -> None:
    items = [record(n) for n in range(200)]
    build(tmp_path / "one", *items, shard_records=50)
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        folder, ready = tmp_path / f"array{attempt}", context.Barrier(4)
        processes = [context.Process(target=_build_together, args=(folder, items, ready)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert {name: content for name, (content, _) in files(folder).items()} == {
            name: content for name, (content, _) in files(tmp_path / "one").items()
        }


class Killed(BaseException):
    pass


def test_a_kill_at_any_step_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [*(record(n) for n in range(5)), Failure("x", "line 9", "broken")]
    moved = [replace(each, image=None) if isinstance(each, Record) else each for each in items]

    def make(folder: Path, found: list[Any]) -> None:
        build(folder, *found, shard_records=2, max_failed_fraction=1.0)

    for start in (None, moved):
        whole = tmp_path / f"whole{start is None}"
        for each in (start, items):
            if each is not None:
                make(whole, each)
        expected = {name: content for name, (content, _) in files(whole).items()}
        for number in range(300):
            folder = tmp_path / f"killed{start is None}-{number}"
            if start is not None:
                make(folder, start)
            made: list[str] = []

            def counted(
                owner: Any, name: str, patch: pytest.MonkeyPatch, made: list[str] = made, at: int = number
            ) -> None:
                step = getattr(owner, name)

                def run(*arguments: Any, **named: Any) -> Any:
                    if len(made) == at:
                        raise Killed
                    made.append(name)
                    return step(*arguments, **named)

                patch.setattr(owner, name, run)

            with monkeypatch.context() as patch:
                for owner, names in (
                    (os, ("replace", "fsync")),
                    (shutil, ("rmtree",)),
                    (Path, ("rename", "unlink", "write_bytes", "mkdir")),
                ):
                    for name in names:
                        counted(owner, name, patch)
                try:
                    make(folder, items)
                    killed = False
                except Killed:
                    killed = True
            make(folder, items)
            unfinished = r"\..*\.tmp"  # `prepare` removes those of dead processes; this one lives
            found = {
                name: content for name, (content, _) in files(folder).items() if not re.fullmatch(unfinished, name)
            }
            assert found == expected, (number, made[-1:])
            assert not list(folder.glob(".records*")), (number, made[-1:])
            if not killed:
                break
        assert number > 15


def test_parts_of_dead_processes_go_and_others_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    node = platform.node()
    gone = tmp_path / f".records.{node}-{ended.pid}.part"
    stays = [tmp_path / f".records.{node}-{os.getppid()}.part", tmp_path / f".records.elsewhere-{ended.pid}.part"]
    for path in (gone, *stays):
        path.mkdir()
        (path / "scan.arrow").write_bytes(b"half")
    build(tmp_path, record(0))
    assert not gone.exists()
    assert all((path / "scan.arrow").exists() for path in stays)


def test_sizes_of_shards() -> None:
    for count in (1, 1024, 1025, 100_000, 10_000_000, 1_000_000_000):
        size = default_shard_records(count)
        assert size >= 1024
        assert size & (size - 1) == 0
        assert -(-count // size) <= 256


def test_many_records_pass_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_AT_A_TIME", 7)
    told: list[int] = []
    store = store_of(build(tmp_path, *(record(n) for n in range(50)), shard_records=9, progress=told.append))
    assert store.table().column("id").to_pylist() == [f"id{n}" for n in range(50)]
    assert store.about["shards"] == [9, 9, 9, 9, 9, 5]
    assert told == list(range(7, 50, 7))
