"""What is loaded does not depend on who loads it; a picture that cannot be is told, and takes no other with it."""

import errno
import io
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arra.data import loading
from arra.data.crops import CropSettings, Draw
from arra.data.index import build_index
from arra.data.loading import Loaded, Loader, Task, View, Waiting, default_workers, load_tasks, picture_digest
from arra.data.reading import ImageReader
from arra.data.records import ImageRef, Record, Source
from arra.data.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
COUNT, SHARD = 23, 10
MARKER = 7
VIEWS = {"small": View(CropSettings(), 8, 8), "large": View(CropSettings(), 8, 16)}


class Given(Source):
    """Records as they are given."""

    path: str = "/toys"
    found: tuple[Any, ...] = ()

    def scan(self) -> Any:
        return iter(self.found)


def draw(path: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Shards of 10, 10 and 3 records."""
    records = []
    for number in range(COUNT):
        draw(tmp_path / f"{number:02d}.png", number)
        ref = ImageRef("file", str(tmp_path / f"{number:02d}.png"))
        records.append(Record(f"id{number}", ref, f"prompt {number}"))
    found = build_index([Given(found=tuple(records))], tmp_path / "store", shard_records=SHARD).store
    assert found is not None
    return found


def tasks_of(store: Store, size: int = 4) -> list[Task]:
    return [
        Task(shard, start, min(start + size, count))
        for shard, count in enumerate(store.about["shards"])
        for start in range(0, count, size)
    ]


def load(store: Store, workers: int, *, size: int = 4) -> list[Loaded]:
    return list(load_tasks(tasks_of(store, size), Loader(store.path, VIEWS), workers=workers))


def told(loaded: list[Loaded]) -> list[Any]:
    return [
        (
            part.task,
            part.places,
            part.digests,
            part.sizes,
            part.failures,
            {name: [image.tobytes() for image in images] for name, images in part.views.items()},
        )
        for part in loaded
    ]


def test_results_are_the_same_whoever_loads(store: Store, tmp_path: Path) -> None:
    (tmp_path / "05.png").write_bytes(b"no picture")
    (tmp_path / "12.png").unlink()
    alone = load(store, 0)
    assert [part.task for part in alone] == tasks_of(store)
    assert told(load(store, 1)) == told(load(store, 3)) == told(alone)
    assert [failure.id for part in alone for failure in part.failures] == ["id5", "id12"]
    assert [failure.where for part in alone for failure in part.failures] == [
        str(tmp_path / name) for name in ("05.png", "12.png")
    ]
    rows = [store.shard_starts[part.task.shard] + part.task.start + place for part in alone for place in part.places]
    assert rows == [row for row in range(COUNT) if row not in (5, 12)]
    for part in alone:
        assert len(part.places) == len(part.digests) == len(part.sizes) == len(part.views["small"])


def test_what_is_loaded_is_the_record(store: Store, tmp_path: Path) -> None:
    rows = [17, 3, 22]
    loaded = Loader(store.path, VIEWS).load_rows(rows)
    assert loaded.places == [0, 1, 2]
    for place, row in enumerate(rows):
        path = tmp_path / f"{row:02d}.png"
        assert loaded.digests[place] == picture_digest(path.read_bytes())
        assert loaded.sizes[place] == (30, 20 + row)
        for name, size in (("small", 8), ("large", 16)):
            image = loaded.views[name][place]
            assert image.shape == (1, size, size, 3)
            assert image.dtype == np.uint8
    again = Loader(store.path, VIEWS).load_rows([3])
    assert np.array_equal(again.views["small"][0], loaded.views["small"][1])


def test_random_crops_are_functions_of_their_numbers(store: Store) -> None:
    loader = Loader(store.path, {"x": View(CropSettings(kind="random"), 8, 8)})
    draws = [Draw(*np.random.default_rng(row).random(4).tolist()) for row in range(3)]
    one, other = loader.load_rows([4, 5, 6], draws), loader.load_rows([6, 4], [draws[2], draws[0]])
    assert np.array_equal(one.views["x"][2], other.views["x"][0])
    assert np.array_equal(one.views["x"][0], other.views["x"][1])


def aborting(monkeypatch: pytest.MonkeyPatch, how: int) -> None:
    """Lets the picture of one record end its process, as a crash in a decoder does."""
    decode, own = loading.decode_image, os.getpid()
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(MARKER).integers(0, 256, (20 + MARKER, 30, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )

    def crash(content: bytes, **options: Any) -> Image.Image:
        if content == buffer.getvalue():
            assert os.getpid() != own, "the test's own process must not die"
            os.kill(os.getpid(), how)
        return decode(content, **options)

    monkeypatch.setattr(loading, "decode_image", crash)


def test_a_dying_process_disturbs_nobody_between_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is met where the next batch is asked for, never in the middle of what a batch is used for."""
    with monkeypatch.context() as patch:
        aborting(patch, signal.SIGSEGV)
        found = []
        for loaded in load_tasks(tasks_of(store), Loader(store.path, VIEWS), workers=3):
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:  # the networks' work
                pass
            found.append(loaded.task)
    assert found == tasks_of(store)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_picture_that_ends_its_process_is_one_failure(
    workers: int, how: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all others survive, those of its batch and those after it."""
    (tmp_path / "06.png").write_bytes(b"no picture")  # an ordinary failure beside it
    expected = load(store, 0)
    with monkeypatch.context() as patch:
        aborting(patch, how)
        found = load(store, workers)
    assert [part.task for part in found] == tasks_of(store)
    (broken,) = [part for part in found if any(failure.id == f"id{MARKER}" for failure in part.failures)]
    assert broken.task == Task(0, 4, 8)
    assert [(failure.id, failure.reason.partition(" (")[0]) for failure in broken.failures] == [
        ("id6", "not a readable image"),
        (f"id{MARKER}", "not a readable image"),
    ]
    name = signal.Signals(how).name
    assert broken.failures[1].reason == f"not a readable image (reading it ended the process: {name})"
    assert broken.failures[1].where == str(tmp_path / "07.png")
    whole = expected[1]
    assert whole.places == [0, 1, 3]
    without = replace(
        whole,
        places=[0, 1],
        digests=whole.digests[:2],
        sizes=whole.sizes[:2],
        views={view: images[:2] for view, images in whole.views.items()},
        failures=broken.failures,
    )
    expected[1] = without
    assert told(found) == told(expected)


def test_another_picture_than_before_is_a_failure_that_names_it(store: Store, tmp_path: Path) -> None:
    digests = np.array([list(digest) for part in load(store, 0) for digest in part.digests], np.uint8)
    store.write("pictures", digests, {})
    assert not any(part.failures for part in load(store, 0))
    draw(tmp_path / "04.png", 99)
    (failure,) = [failure for part in load(store, 1) for failure in part.failures]
    assert (failure.id, failure.where) == ("id4", str(tmp_path / "04.png"))
    assert failure.reason == "the picture is not the one that the store was made from; restore it"


def test_a_record_whose_picture_failed_before_may_be_mended(store: Store, tmp_path: Path) -> None:
    digests = np.array([list(digest) for part in load(store, 0) for digest in part.digests], np.uint8)
    digests[4] = 0  # what a failed record has
    store.write("pictures", digests, {})
    draw(tmp_path / "04.png", 99)
    assert not any(part.failures for part in load(store, 0))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_nobodys_picture(number: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ImageReader, ref: ImageRef) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ImageReader, "read", full)
    with pytest.raises(OSError, match="open files"):
        load(store, 0)


def test_a_bug_is_no_failure(store: Store) -> None:
    def load_badly(task: Task) -> Loaded:
        raise NotImplementedError("a bug")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug"):
            list(load_tasks(tasks_of(store), load_badly, workers=workers))


def test_records_with_codes_alone_have_no_picture(tmp_path: Path) -> None:
    found = build_index([Given(found=(Record("a", None, "x"),))], tmp_path / "codes").store
    assert found is not None
    loaded = Loader(found.path, VIEWS).load_rows([0])
    assert [(each.id, each.reason) for each in loaded.failures] == [("a", "the record has codes and no picture")]


def test_waiting_is_measured(store: Store) -> None:
    waiting = Waiting()
    for _ in load_tasks(tasks_of(store), Loader(store.path, VIEWS), workers=0, waiting=waiting):
        pass
    assert waiting.seconds > 0
    assert default_workers() >= 1
    assert list(load_tasks([], Loader(store.path, VIEWS), workers=0)) == []
