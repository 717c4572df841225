"""The pictures a tokenizer is trained on: drawn from memory, or read while training; a function of (seed, step)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.data.crops import CropSettings, Draw
from arra.data.folder import FolderSource
from arra.data.index import build_index
from arra.data.loading import Loader
from arra.data.store import Store
from arra.errors import ArraError
from arra.train.pictures import HeldPictures, Pictures, ReadPictures, StepTasks, random_views

CROP = CropSettings(kind="random", min_fraction=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, draw_pictures: Callable[[Path], Path]) -> Store:
    root = tmp_path_factory.mktemp("pictures")
    found = build_index([FolderSource(path=str(draw_pictures(root / "drawn")))], root / "store").store
    assert found is not None
    return found


def read(store: Store, *, seed: int = 0, steps: int = 40, workers: int = 0, rows: int = 10) -> ReadPictures:
    loader = Loader(store.path, random_views(CROP, 16))
    return ReadPictures(loader, np.arange(rows), batch_size=4, steps=steps, seed=seed, workers=workers)


def drawn(pictures: Pictures, *steps: int) -> list[Tensor]:
    found = [pictures.draw(step, torch.Generator()) for step in steps]
    pictures.close()
    return found


def test_a_step_is_the_same_whenever_it_is_drawn(store: Store) -> None:
    first = drawn(read(store), 0, 1, 2, 3)
    assert first[0].shape == (4, 3, 16, 16)
    assert first[0].min() >= -1
    assert first[0].max() <= 1
    for again in (drawn(read(store), 3, 1, 0), drawn(read(store, workers=2), 3, 1, 0)):
        assert all(torch.equal(one, other) for one, other in zip(again, (first[3], first[1], first[0]), strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(drawn(read(store, seed=1), 0)[0], first[0])


def test_an_epoch_visits_every_picture_once_in_ever_new_crops(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = read(store)
    visited: list[int] = []
    crops: list[Draw] = []
    load = pictures.walk.loader.load_rows

    def watched(rows, draws, *, task):
        visited.extend(rows)
        crops.extend(draws)
        return load(rows, draws, task=task)

    monkeypatch.setattr(pictures.walk.loader, "load_rows", watched)
    batches = torch.cat(drawn(pictures, *range(5)))
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert visited[:10] != visited[10:]
    assert len(set(crops)) == 20
    of_first = batches[[place for place, row in enumerate(visited) if row == visited[0]]]
    assert len(of_first) == 2
    assert not torch.equal(of_first[0], of_first[1])


def test_a_picture_that_is_gone_is_told(tmp_path: Path, draw_pictures: Callable[[Path], Path]) -> None:
    folder = draw_pictures(tmp_path / "drawn")
    found = build_index([FolderSource(path=str(folder))], tmp_path / "store").store
    assert found is not None
    (folder / "003.png").unlink()
    with pytest.raises(ArraError, match=r"003\.png: picture of record '003\.png': "):
        drawn(read(found), 0, 1, 2)


def test_tasks_of_steps_are_counted_without_a_list() -> None:
    tasks = StepTasks(3, 10**9, 16)
    assert len(tasks) == 10**9 - 3
    assert (tasks[0].start, tasks[0].stop) == (48, 64)
    assert tasks[2:][1] == tasks[3]
    assert tasks[-1].stop == 16 * 10**9


def test_held_pictures_are_mirrored_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without distortion a batch holds each picture at half its size, or its mirror image."""
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = HeldPictures(pixels, 20, 0.0).draw(0, torch.Generator().manual_seed(0))
    assert found.shape == (20, 3, 4, 4)
    halves = torch.nn.functional.avg_pool2d(pixels.float() / 127.5 - 1, 2)
    known = torch.cat([halves, halves.flip(3)])
    nearest = (found[:, None] - known[None]).abs().amax((2, 3, 4)).min(1)
    assert nearest.values.max() < 1e-4
    assert len(set(nearest.indices.tolist())) == 6
    changed = HeldPictures(pixels, 20, 1.0).draw(0, torch.Generator().manual_seed(0))
    assert not torch.equal(changed, found)
