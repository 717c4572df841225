"""An export holds what its store does, any tool reads it, and training streams it from afar in an order of its own."""

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import arra.data.remote
from arra.data.batches import Batches
from arra.data.conditions import TextConditions
from arra.data.index import build_index
from arra.data.order import Plan, part_of
from arra.data.records import Failure, ImageRef, Record, Source
from arra.data.remote import RemoteColumn, RemoteStore, RowGroups, open_store, remote_text
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.export import describe_store, export_store, verify_store
from arra.stages.pictures import StoredPictures

ROWS = 7
"""Records of a row group here."""
NUMBERS = {
    "codes": (2, (3, 2), "uint16"),
    "features.small": (2, (5,), "float32"),
    "features.half": (1, (4,), "float16"),
}
NUMBERS |= {"pixels": (1, (2, 2, 3), "uint8"), "flags": (1, (1,), "int16")}
FAILED = {"codes": [3, 40, 41], "features.small": [40], "caption_features": [0, 99]}


class Toys(Source):
    """Records of names alone."""

    kind: Literal["toys"] = "toys"
    count: int
    labelled: bool = False

    def scan(self) -> Iterator[Record]:
        for number in range(self.count):
            split = ["train", "train", "validation", "held-out", "train"][number % 5]
            yield Record(
                f"{self.name}-{number}",
                ImageRef("file", f"/home/nobody/secret/{number}.png"),
                "" if self.labelled else f"toy {number} of {self.name}",
                split,
                label=number % 3 if self.labelled else None,
                alternatives=("another",) * (number % 3),
                group=f"{self.name} {number // 2}",
            )


def make_store(folder: Path) -> Store:
    """126 records of two sources in shards of 32, columns of every kind, some cells empty."""
    store = build_index([Toys(path="a", count=90), Toys(path="b", count=36, labelled=True)], folder, shard_records=32)
    assert store.store is not None
    random, found = np.random.default_rng(0), store.store
    shapes = random.integers(1, 4, (len(found), 2))
    for name in (*NUMBERS, "caption_features"):
        variants, shape, dtype = NUMBERS.get(name, (1, (None, None), "float32"))
        writer = found.writer(name, made_by={"maker": name}, shape=shape, dtype=dtype, variants=variants)
        for shard in range(found.num_shards):
            rows = found.shard_rows(shard)
            ids = found.records_of(shard).column("id").combine_chunks()
            valid = ~np.isin(rows, FAILED.get(name, []))
            values: Any = [random.normal(size=shapes[row] * valid[row - rows.start]).astype(np.float32) for row in rows]
            if None not in shape:
                drawn = random.integers(0, 60000, (len(rows), variants, *shape))
                values = drawn.astype(dtype)
                values[~valid] = 0
            reasons = [Failure(ids[place].as_py(), "here", "broken") for place in np.nonzero(~valid)[0].tolist()]
            writer.write(shard, ids, values, valid=valid, failures=reasons)
        assert writer.publish()
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture(scope="module")
def exported(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, change only a copy."""
    return export_store(
        store, tmp_path_factory.mktemp("out") / "export", columns=store.column_names(), rows_per_group=ROWS
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arra.data.remote, "RETRY_SECONDS", (0.0,))
    return tmp_path / "cache"


def far(place: Path | str) -> RemoteStore:
    found = open_store(place)
    assert isinstance(found, RemoteStore)
    return found


def order_of(store: Store, other: Store) -> np.ndarray:
    """For each record of `other`, its row in `store`."""
    rows = {name: row for row, name in enumerate(store.table(["id"]).column("id").to_pylist())}
    return np.array([rows[name] for name in other.table(["id"]).column("id").to_pylist()])


def one_line(caught: pytest.ExceptionInfo[ArraError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# an export holds what the store does


def test_records_and_columns_come_back_exactly(store: Store, exported: Path) -> None:
    found = far(exported)
    rows = order_of(store, found)
    assert sorted(rows.tolist()) == list(range(len(store)))
    for name in ("id", "prompt", "alternatives", "label", "split", "group", "source"):
        assert found.table([name]).column(name).to_pylist() == store.table([name]).take(rows).column(name).to_pylist()
    assert found.column_names() == store.column_names()
    every = np.arange(len(store))
    for name, (variants, _, dtype) in NUMBERS.items():
        ours, theirs = store.reader(name), found.reader(name)
        for variant in range(variants):
            chosen = np.full(len(rows), variant)
            values = theirs.take(every, variants=chosen)
            assert values.dtype == dtype
            np.testing.assert_array_equal(values, ours.take(rows, variants=chosen))
        np.testing.assert_array_equal(theirs.valid(), ours.valid()[rows])
        assert (found.entry(name) or theirs.entry).made_by == {"maker": name}
    ragged, own = found.reader("caption_features"), store.reader("caption_features")
    for one, other in zip(ragged.take_ragged(every), own.take_ragged(rows), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(ragged.shapes(), own.shapes()[rows])
    with pytest.raises(ArraError, match="no records in split 'novel'; it has held-out, train, validation"):
        found.rows("novel")
    ids = store.table(["id"]).column("id").to_pylist()
    for columns in ([], ["codes"], ["codes", "caption_features"]):
        there = [ids[rows[row]] for row in found.rows("train", columns=columns)]
        assert sorted(there) == sorted(ids[row] for row in store.rows("train", columns=columns))


def test_each_file_is_of_one_split_and_source(exported: Path) -> None:
    found, names = far(exported), sorted(path.name for path in (exported / "data").iterdir())
    assert names == sorted(
        f"{split}-{number:05d}-of-00002.parquet" for split in ("train", "validation", "held-out") for number in range(2)
    )
    assert found.num_shards == 6
    for shard, name in enumerate(file.name for file in found.columns.files):
        records, table = found.records_of(shard), pq.read_table(exported / "data" / name)
        assert records.column("id").to_pylist() == table.column("id").to_pylist()
        assert len(set(records.column("source").to_pylist())) == 1
        assert set(table.column("split").to_pylist()) == {name.rpartition("-of-")[0].rpartition("-")[0]}
    assert found.source_counts(found.rows("train")) == (54, 22)


def test_nothing_tells_where_the_pictures_lay(exported: Path, store: Store) -> None:
    for path in exported.rglob("*"):
        if path.is_file():
            content = (
                path.read_bytes() if path.suffix != ".parquet" else pq.read_table(path).to_pandas().to_csv().encode()
            )
            assert b"/home/nobody" not in content, path
            assert str(store.path).encode() not in content, path


def test_plain_tools_read_it(store: Store, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from datasets import load_dataset

    files = sorted((exported / "data").glob("train-*.parquet"))
    ids = store.table(["id"]).column("id").to_pylist()
    codes, half = store.reader("codes"), store.reader("features.half")
    table = pa.concat_tables([pq.read_table(path) for path in files])
    frame = pd.concat([pd.read_parquet(path) for path in files])
    with duckdb.connect() as engine:
        names = ", ".join(f'"{name}"' for name in ("id", "codes", "features.half", "features.small", "prompt"))
        query = f"select {names} from '{exported}/data/train-*.parquet'"
        from_duckdb = {row[0]: row[1:] for row in engine.sql(query).fetchall()}
    streamed = {
        row["id"]: row
        for row in load_dataset("parquet", data_files={"train": [str(path) for path in files]}, streaming=True)["train"]
    }
    assert len(table) == len(frame) == len(from_duckdb) == len(streamed) == len(store.rows("train"))
    for row, framed in zip(table.to_pylist(), frame.to_dict("records"), strict=True):
        number = ids.index(row["id"])
        both = [codes.take(np.array([number]), variants=np.array([variant])).ravel() for variant in range(2)]
        expected = None if number in FAILED["codes"] else np.concatenate(both).tolist()
        assert row["codes"] == expected == from_duckdb[row["id"]][0] == streamed[row["id"]]["codes"]
        assert framed["codes"] is None if expected is None else framed["codes"].tolist() == expected
        halves = half.take(np.array([number])).ravel().astype(float).tolist()
        assert (
            list(map(float, row["features.half"]))
            == halves
            == list(map(float, from_duckdb[row["id"]][1]))
            == streamed[row["id"]]["features.half"]
        )
        assert row["prompt"] == framed["prompt"] == from_duckdb[row["id"]][3] == streamed[row["id"]]["prompt"]
        assert row["label"] == streamed[row["id"]]["label"]


def test_the_readme_says_how_to_read_it_and_is_right(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    text = (exported / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    assert scope["values"].shape[1:] == (1, 4) or scope["values"].shape[2:]
    assert "126 captioned pictures" in text
    assert "  - split: held_out\n    path: data/held-out-?????-of-*.parquet\n" in text  # datasets knows no hyphen


def test_pixels_are_left_out_unless_asked_for(store: Store, tmp_path: Path) -> None:
    assert "pixels" not in far(export_store(store, tmp_path / "one")).column_names()
    assert far(export_store(store, tmp_path / "two", columns=["codes"])).column_names() == ["codes"]


def test_a_column_has_one_identity_whatever_stands_beside_it(store: Store, exported: Path, tmp_path: Path) -> None:
    alone = far(export_store(store, tmp_path / "alone", columns=["codes"], rows_per_group=ROWS))
    assert alone.manifest_hash("codes") == far(exported).manifest_hash("codes")


def test_the_same_again_is_left_alone_and_anything_else_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out = export_store(store, tmp_path / "out", columns=["codes"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert export_store(store, out, columns=["codes"]) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ArraError, match="an export of other records or columns; name a new folder"):
        export_store(store, out, columns=["flags"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex", store.path):
        with pytest.raises(ArraError, match="exists and is no export; name a new folder"):
            export_store(store, taken, columns=["codes"])
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    with pytest.raises(ArraError, match="column 'x' is missing; it has caption_features, codes"):
        export_store(store, tmp_path / "x", columns=["x"])
    with pytest.raises(ArraError, match="an export already; copy its folder"):
        export_store(open_store(out), tmp_path / "x")
    with pytest.raises(ArraError, match="an export is only read"):
        far(out).writer("x", made_by={}, shape=(1,), dtype="uint8")


def test_a_kill_leaves_nothing_and_damage_is_not_published(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = open_store(shutil.copytree(store.path, tmp_path / "store"))
    path = copy.path / "codes" / "00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArraError, match=r"codes/00001\.arrow: missing or damaged"):
        export_store(copy, tmp_path / "out")
    calls = iter(["0" * 32] * 3)

    def killed(*given: Any) -> str:
        found = next(calls, None)
        if found is None:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr("arra.data.remote.Decoded.digest", killed)
    with pytest.raises(KeyboardInterrupt):
        export_store(store, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


# from afar


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, parts of files too."""

    asked: list[str] = []

    def do_GET(self) -> None:
        header = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if header is None or not path.is_file() or not self.knows_ranges:
            return super().do_GET()
        first, last = header.removeprefix("bytes=").split("-")
        content = path.read_bytes()
        part = content[int(first) : int(last) + 1 if last else None]
        self.asked.append(path.name)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    knows_ranges = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_over_http(exported: Path, store: Store, knows_ranges: bool) -> None:
    pytest.importorskip("aiohttp", reason="fsspec's http needs it")
    handler = type("Handler", (Ranges,), {"knows_ranges": knows_ranges, "asked": []})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(exported.parent))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            found = far(f"http://127.0.0.1:{server.server_port}/{exported.name}")
            rows = order_of(store, found)
            values = found.reader("codes").take(np.arange(len(rows)))
            np.testing.assert_array_equal(values, store.reader("codes").take(rows))
            with pytest.raises(ArraError, match=r"nowhere/manifest\.json: missing or not readable"):
                open_store(f"http://127.0.0.1:{server.server_port}/nowhere")
        finally:
            server.shutdown()
            thread.join()
    asked = [name for name in handler.asked if name.endswith(".parquet")]  # type: ignore[attr-defined]
    if knows_ranges:  # per file its footer, and per row group the one column
        assert len(asked) == len(found.columns.files) + len(found.groups.sizes)


def test_any_place_that_fsspec_opens(exported: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(exported), "/sets/export", recursive=True)
    monkeypatch.chdir(exported.parent)
    for place in (f"file://{exported}", "memory://sets/export", Path("memory://sets/export"), exported.name):
        found = far(place)
        np.testing.assert_array_equal(found.column("flags"), far(exported).column("flags"))
    assert far(exported.name).place == str(exported)
    memory.rm("/sets", recursive=True)


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("runs/store", None),
        ("/a:b/c", None),
        ("C", None),
        ("https://a/b", "https://a/b"),
        (Path("https://a/b"), "https://a/b"),
        (Path("file:///a/b"), "file:///a/b"),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
    ],
)
def test_urls_survive_being_paths(place: Path | str, url: str | None) -> None:
    assert remote_text(place) == url


def test_a_server_that_stumbles_is_asked_again(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = far(exported)
    files, answers = found.source.files, iter([OSError("reset"), None, None, OSError("reset"), OSError("reset"), None])
    read = type(files).cat_file

    def stumbling(self: Any, *given: Any, **named: Any) -> bytes:
        answer = next(answers, None)
        if answer is not None:
            raise answer
        content: bytes = read(self, *given, **named)
        return content

    monkeypatch.setattr(type(files), "cat_file", stumbling)
    reader = found.reader("codes")
    reader.take(np.array([0]))  # its footer twice, its row group
    with pytest.raises(ArraError, match=r"cannot be read \(reset\); check the network") as caught:
        reader.take(np.array([ROWS]))
    one_line(caught)
    assert len(reader.take(np.array([ROWS]))) == 1  # whoever asks again is served


# the cache of row groups


def test_columns_share_what_is_fetched_and_memory_is_bounded(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = far(exported)
    codes, small = found.reader("codes"), found.reader("features.small")
    every = np.arange(len(found))
    codes.take(every)
    small.take(every)
    assert found.groups.fetched == len(found.groups.sizes)
    assert found.window(["codes", "features.small"]) == arra.data.remote.WINDOW
    whole = sum(shard.bytes for shard in codes.entry.shards) // len(found.groups.sizes)
    monkeypatch.setattr(arra.data.remote, "CACHE_BYTES", 3 * 5 * whole)
    assert found.window(["codes"]) == 5  # and as much again is fetched ahead, while the one before leaves
    tight = RowGroups(found.source, found.columns, max_bytes=2000)
    reader = RemoteColumn("codes", codes.entry, tight)
    np.testing.assert_array_equal(reader.take(every), codes.take(every))
    held = sum(each.bytes for each in tight._held.values())
    assert 0 < held <= 2000
    assert tight.fetched >= len(tight.sizes)
    tight.close()


def test_only_the_wanted_columns_are_read(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arra.data.remote, "MAX_GAP", 0)
    monkeypatch.setattr(arra.data.remote, "FOOTER_BYTES", 8)
    found, sizes = far(exported), []
    read = type(found.source).read

    def counting(self: Any, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        content = read(self, name, start, stop)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(type(found.source), "read", counting)
    found.reader("flags").take(np.array([0]))
    footer = pq.read_metadata(exported / "data" / found.columns.files[0].name)
    paths = [footer.row_group(0).column(number) for number in range(footer.num_columns)]
    wanted = next(each for each in paths if each.path_in_schema == "flags.list.element")
    assert sizes == [8, footer.serialized_size + 8, wanted.total_compressed_size]


# the order of records that are fetched in groups

GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(sizes=GROUPS, window=st.integers(1, 14), batch=st.integers(1, 11), seed=st.integers(0, 9))
def test_an_epoch_is_a_permutation_and_stays_near(sizes: list[int], window: int, batch: int, seed: int) -> None:
    total = sum(sizes)
    plan = Plan.build([total], batch_size=batch, seed=seed, groups=sizes, window=window)
    steps = -(-3 * total // batch) + 1
    rows = np.concatenate([plan.batch(step) for step in range(steps)])
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    for epoch in range(3):
        visits = rows[epoch * total : (epoch + 1) * total]
        assert sorted(visits.tolist()) == list(range(total))
        ends: dict[int, list[int]] = {}  # each group is begun and ended within `window` groups
        for place, group in enumerate(group_of[visits].tolist()):
            ends.setdefault(group, [place, place])[1] = place
        for first, last in ends.values():
            assert len(set(group_of[visits[first : last + 1]].tolist())) <= window
    again = Plan.build([total], batch_size=batch, seed=seed, groups=sizes, window=window)
    for step in (steps - 1, 0, steps // 2):  # a resumed run jumps
        np.testing.assert_array_equal(again.batch(step), rows[step * batch : (step + 1) * batch])
    for num_ranks in (1, 2, 3, 5):
        parts = [plan.batch(1)[part_of(plan.batch(1), rank, num_ranks)] for rank in range(num_ranks)]
        np.testing.assert_array_equal(np.concatenate(parts), plan.batch(1))


def test_epochs_and_seeds_differ_and_windows_mix() -> None:
    orders = set()
    for sizes in ([20] * 20, [400]):
        for seed in (0, 1):
            plan = Plan.build([400], batch_size=400, seed=seed, groups=sizes, window=5)
            orders |= {tuple(plan.batch(step).tolist()) for step in range(3)}
    assert len(orders) == 12
    groups = Plan.build([400], batch_size=100, seed=0, groups=[20] * 20, window=5).batch(0) // 20
    assert len(set(groups.tolist())) == 5
    assert len(set(groups[:20].tolist())) > 2  # not one after the other


def test_sources_have_their_weights() -> None:
    plan = Plan.build([9, 0, 6], batch_size=21, seed=0, weights=[1.0, 1.0, 2.0], groups=[5, 4, 3, 3], window=2)
    for step in range(3):
        counts = np.bincount(plan.batch(step), minlength=15)
        assert counts.tolist() == [1] * 9 + [2] * 6
    with pytest.raises(ArraError, match=r"weight 0\.5; an export is read in groups of records, expected whole"):
        Plan.build([9, 6], batch_size=4, seed=0, weights=[1.0, 0.5], groups=[5, 4, 3, 3], window=2)
    with pytest.raises(ValueError, match="a group holds records of two sources"):
        Plan.build([8, 7], batch_size=4, seed=0, weights=[1.0, 2.0], groups=[5, 4, 3, 3], window=2)
    with pytest.raises(ValueError, match="do not go together"):
        Plan.build([9], batch_size=4, seed=0, buckets=np.zeros(9), groups=[9])


def test_a_source_without_records_of_the_split_is_no_obstacle() -> None:
    plain = Plan.build([5, 0, 4], batch_size=9, seed=0, weights=[1.0, 0.5, 1.0])
    assert sorted(plain.batch(0).tolist()) == list(range(9))


# training from afar


@dataclass(frozen=True)
class Ahead(StoredPictures):
    """Pictures that are fetched ahead."""

    def expect(self, rows: torch.Tensor, chance: torch.Tensor) -> None:
        assert isinstance(self.codes, RemoteColumn)
        self.codes.expect(self.rows[rows.numpy()])


def batches_of(store: Store, *, window: int, batch_size: int, kind: type[StoredPictures] = Ahead) -> Batches:
    columns = ["codes", "features.small"]
    rows = store.rows("train", columns=columns)
    return Batches(
        conditions=TextConditions([[[row]] for row in range(len(rows))], 4),
        pictures=kind(rows, store.reader("codes"), {"teacher": store.reader("features.small")}),
        batch_size=batch_size,
        seed=0,
        counts=store.source_counts(rows),
        weights=(1.0, 1.0),
        groups=store.group_sizes(rows),
        window=window,
    )


@pytest.mark.parametrize("batch_size", [4, 16])
def test_batches_hold_what_the_local_store_holds(store: Store, exported: Path, batch_size: int) -> None:
    found = far(exported)
    rows = order_of(store, found)[found.rows("train", columns=["codes", "features.small"])]
    near = StoredPictures(rows, store.reader("codes"), {"teacher": store.reader("features.small")})
    batches, seen = batches_of(found, window=3, batch_size=batch_size), []
    assert sum(batches.groups or ()) == len(rows)
    for step in range(-(-len(rows) // batch_size)):
        batch = batches.batch(step)
        assert batch.rows is not None
        chance = batches._picked(step)[1]
        codes, features = near.take(batch.rows, chance)
        assert torch.equal(batch.tokens[:, 4:], codes)
        assert features is not None
        assert batch.features is not None
        assert torch.equal(batch.features["teacher"], features["teacher"])
        seen += batch.rows.tolist()
        halves = [batches.batch(step, rank=rank, num_ranks=2) for rank in range(2)]
        assert torch.equal(torch.cat([half.tokens for half in halves]), batch.tokens)
    assert sorted(seen[: len(rows)]) == list(range(len(rows)))
    found.groups.close()


def test_a_window_is_fetched_once_and_ahead(exported: Path) -> None:
    """An epoch fetches each row group once, though three windows fit the cache, and only the first step waits."""
    found = far(exported)
    columns = ["codes", "features.small"]
    largest = max(
        sum(found.reader(name).take(np.arange(first, first + rows)).nbytes * 2 for name in columns)
        for first, rows in zip(np.cumsum([0, *found.groups.sizes]), found.groups.sizes, strict=False)
    )
    found.groups.close()
    groups = found.__dict__["groups"] = RowGroups(found.source, found.columns, max_bytes=3 * 2 * largest)
    batches = batches_of(found, window=2, batch_size=2)
    assert batches.groups is not None
    for step in range(batches.plan.steps_per_epoch - batches.ahead[-1]):
        if step:
            assert isinstance(batches.pictures, Ahead)
            later = [batches.plan.batch(step + ahead) for ahead in range(ROWS - 2)]  # nearly a window of 2 x ROWS
            rows = batches.pictures.rows[np.concatenate(later)]
            assert set(np.searchsorted(np.cumsum(groups.sizes), rows, side="right").tolist()) <= set(groups._held)
        batches.batch(step)
        for held in list(groups._held.values()):
            held.future.result()  # the network is quick enough here
        assert sum(held.bytes for held in groups._held.values()) <= groups.max_bytes
    assert groups.fetched <= len(batches.groups) + 2  # of the next epoch a few
    groups.close()


# what is wrong is told in one line, and nothing is trusted


def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replaces a mirrored file and writes a manifest that vouches for it, as one who means harm would."""
    import hashlib

    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["export"]["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("export", None),
        ("export.edition", 9),
        ("export.files.../../escape", {"bytes": 1, "sha256": "0" * 64}),
        ("export.files./etc/passwd", {"bytes": 1, "sha256": "0" * 64}),
        ("export.files.tokenizer/../../x", {"bytes": 1, "sha256": "0" * 64}),
        ("export.files.records/00000.arrow", {"bytes": 1, "sha256": "../../x"}),
        ("export.files.columns.json", {"bytes": 2**40, "sha256": "0" * 64}),
        ("records.shards", [10**12]),
        ("records.shards", []),
        ("records.shards", "many"),
        ("records.splits", []),
    ],
)
def test_a_forged_manifest_is_refused(exported: Path, tmp_path: Path, cache: Path, key: str, value: Any) -> None:
    folder = copied(exported, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    first, _, rest = key.partition(".")
    second, _, third = rest.partition(".")
    if third:
        manifest[first][second][third] = value
    elif second:
        manifest[first][second] = value
    else:
        manifest[first] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArraError, match=r"manifest\.json: no export of this version") as caught:
        open_store(folder)
    one_line(caught)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"uint16"', '"object"', r"dtype: String should match pattern"),
        ('"name": "train-', '"name": "../train-', r"name: String should match pattern"),
        ('"variants": 2', '"variants": 99999', r"variants: Input should be less than"),
        ('"shape": [\n    3,', '"shape": [\n    60000000,', "values in a record"),
        ('"rows": ', '"rows": 1', "do not hold the records of manifest.json"),
        ('"rows_per_group": 7', '"rows_per_group": 8', r"has \d row groups of column"),
        ('"failed": [\n', '"failed": [\n 2147483646,', "names failed rows that it does not have"),
        ("{", "", "Invalid JSON"),
    ],
)
def test_a_forged_list_of_columns_is_refused(exported: Path, tmp_path: Path, old: str, new: str, reason: str) -> None:
    folder = copied(exported, tmp_path)
    text = (folder / "columns.json").read_text()
    assert old in text
    forge(folder, "columns.json", text.replace(old, new).encode())
    with pytest.raises(ArraError, match=rf"columns\.json: .*{reason}") as caught:
        open_store(folder)
    one_line(caught)


def test_records_may_not_name_files_of_this_machine(exported: Path, tmp_path: Path, cache: Path) -> None:
    folder = copied(exported, tmp_path)
    path = folder / "records" / "00000.arrow"
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    place = table.column_names.index("image")
    image = pa.array([ImageRef("file", "/etc/passwd").text()] * len(table))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.set_column(place, "image", image))
    forge(folder, "records/00000.arrow", sink.getvalue().to_pybytes())
    with pytest.raises(
        ArraError, match=r"records/00000\.arrow: no records of an export \(they have other fields, or name"
    ):
        open_store(folder)
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize("name", ["records/00001.arrow", "columns.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_mirrored_file_is_told(exported: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = copied(exported, tmp_path)
    path = folder / name
    hurt(path, damage)
    place = f"file://{folder}"
    with pytest.raises(ArraError, match=rf"{name}: (damaged|missing or not|\d+ bytes came)") as caught:
        open_store(place)
    one_line(caught)
    shutil.copy(exported / name, path)
    assert len(open_store(place)) == 126  # what was fetched before the error is of use


def hurt(path: Path, damage: str, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-9])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_parquet_file_is_told(exported: Path, tmp_path: Path, damage: str) -> None:
    found = far(copied(exported, tmp_path))
    path = tmp_path / "copy" / "data" / found.columns.files[0].name
    hurt(path, damage, at=0.5 if damage != "flip" else place_of("codes", path))
    with pytest.raises(ArraError, match=rf"{re.escape(path.name)}: (row group 0: damaged|missing|\d+ bytes)") as caught:
        found.reader("codes").take(np.arange(3))
    one_line(caught)
    assert not verify_store(found).ok


def place_of(column: str, path: Path) -> float:
    """Where in a file the last values of a column's first row group lie, as a share of the file."""
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunk = next(each for each in chunks if each.path_in_schema == f"{column}.list.element")
    return (chunk.dictionary_page_offset + chunk.total_compressed_size - 2.5) / path.stat().st_size


def test_a_sound_file_of_other_content_is_told(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    about = json.loads((folder / "columns.json").read_text())
    path = folder / "data" / about["files"][0]["name"]
    table = pq.read_table(path)
    zeros = pa.array([[0] * 12] * len(table), pa.list_(pa.uint16()))
    changed = table.set_column(table.column_names.index("codes"), "codes", zeros)
    pq.write_table(changed, path, row_group_size=ROWS)
    about["files"][0]["bytes"] = path.stat().st_size
    forge(folder, "columns.json", json.dumps(about).encode())
    with pytest.raises(ArraError, match=r"row group 0: column 'codes' is not what columns\.json says"):
        far(folder).reader("codes").take(np.arange(3))
    renamed = table.set_column(table.column_names.index("codes"), "codes", pa.array(["import os"] * len(table)))
    pq.write_table(renamed, path, row_group_size=ROWS)
    about["files"][0]["bytes"] = path.stat().st_size
    forge(folder, "columns.json", json.dumps(about).encode())
    with pytest.raises(ArraError, match=r"row group 0: damaged \("):
        far(folder).reader("codes").take(np.arange(3))


def test_no_flipped_bit_goes_unseen(exported: Path, tmp_path: Path) -> None:
    """Wherever a bit of a column's bytes flips, the values are right or an error comes."""
    folder = copied(exported, tmp_path)
    whole = far(exported)
    path = folder / "data" / whole.columns.files[2].name
    content = path.read_bytes()
    start = sum(file.rows for file in whole.columns.files[:2])
    rows = np.arange(start, start + 2 * ROWS)
    expected, told = whole.reader("codes").take(rows), list[str]()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(content), 200).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        found = far(folder)
        try:
            np.testing.assert_array_equal(found.reader("codes").take(rows), expected)
        except ArraError as error:
            told.append(str(error))
        found.groups.close()
    assert len(told) > 5
    assert not any("\n" in line for line in told)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("nonsense://a/b", "cannot be opened"),
        ("memory://nothing/here", "missing or not readable"),
        ("file:///nothing/here", "missing or not readable"),
    ],
)
def test_no_export(place: str, line: str) -> None:
    with pytest.raises(ArraError, match=line) as caught:
        open_store(place)
    one_line(caught)


# show and verify


def test_verify_names_what_is_damaged(store: Store, exported: Path, tmp_path: Path) -> None:
    for found in (store, open_store(exported)):
        assert verify_store(found).damaged == ()
    near = open_store(shutil.copytree(store.path, tmp_path / "store"))
    hurt(near.path / "codes" / "00001.arrow", "flip")
    (near.path / "flags" / "00002.arrow").unlink()
    seen = verify_store(near)
    assert [line.partition(":")[0] for line in seen.damaged] == ["codes/00001.arrow", "flags/00002.arrow"]
    assert seen.files == store.num_shards * 7
    away = far(copied(exported, tmp_path))
    hurt(tmp_path / "copy" / "data" / away.columns.files[3].name, "flip")
    (tmp_path / "copy" / "records" / "00002.arrow").unlink()
    with (tmp_path / "copy" / "records" / "00003.arrow").open("ab") as file:
        file.write(b"x")
    lines = verify_store(away).damaged
    assert len(lines) == 3
    assert "records/00002.arrow: missing" in lines[0]
    assert "records/00003.arrow: damaged (its size is not" in lines[1]
    assert lines[2] == f"data/{away.columns.files[3].name}: damaged; export or upload it again"


def test_verify_reads_the_records_themselves(store: Store, tmp_path: Path) -> None:
    near = open_store(shutil.copytree(store.path, tmp_path / "store"))
    path = near.path / "records" / "00000.arrow"
    content = path.read_bytes()
    assert b"toy 7 of a" in content
    path.write_bytes(content.replace(b"toy 7 of a", b"toy 7 of z"))
    assert verify_store(near).damaged == (
        "records: the records are not those of manifest.json; delete the store and prepare again",
    )


def test_show_tells_every_column(store: Store, exported: Path) -> None:
    for found in (store, open_store(exported)):
        table = describe_store(found)
        names, failed = list(table.columns[0].cells), list(table.columns[3].cells)
        assert names == store.column_names()
        assert failed[names.index("codes")] == "3"
        assert "126 records (25 held-out" in str(table.title)
