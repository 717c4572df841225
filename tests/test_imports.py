"""What others have computed comes into the store as it was: LlamaGen's codes and its T5 caption features."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arra.config import Recipe, load_recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.imports import CAPTION_FEATURES, T5_WIDTH
from arra.stages.prepare import PrepareOptions, prepare

INLINE = PrepareOptions(workers=0, batch_size=8, threads=1)
TEN = "data.crop={kind: ten_crop, range: 1.1}"


@pytest.fixture
def codes_folder(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """LlamaGen's ten-crop codes of 30 pictures at 4 x 4, with their labels."""
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 16384, (30, 10, 16)), rng.integers(0, 1000, 30)
    folder = tmp_path / "imagenet64_codes"
    for path in (folder, tmp_path / "imagenet64_labels"):
        path.mkdir()
    for number in range(30):
        np.save(folder / f"{number}.npy", codes[number][None])
        np.save(tmp_path / "imagenet64_labels" / f"{number}.npy", labels[number : number + 1])
    return folder, codes, labels


def codes_recipe(folder: Path, *more: str) -> Recipe:
    own = ["data.source=llamagen-codes", f"data.path={folder}", "data.image_size=64", "data.shard_records=8", TEN]
    return load_recipe("demo", row="baseline", overrides=[*own, "tokenizer.name=llamagen-vq16", *more])


def test_codes_come_in_as_they_were(codes_folder: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, codes, labels = codes_folder
    store = prepare(codes_recipe(folder), tmp_path / "store", options=INLINE).checked()
    assert store.column_names() == ["codes"]
    reader = store.reader("codes")
    assert reader.entry.dtype == "uint16"
    assert reader.entry.made_by["crop"] == "ten_crop(64, range=1.1)"
    for variant in (0, 4, 9):
        found = reader.take(np.arange(30), variants=np.full(30, variant))
        np.testing.assert_array_equal(found.reshape(30, 16), codes[:, variant])
    assert [store.fields(row, "label")[0] for row in range(30)] == labels.tolist()
    assert [store.fields(row, "id")[0] for row in (0, 29)] == ["0", "29"]
    assert prepare(codes_recipe(folder), tmp_path / "store", options=INLINE).ok  # nothing to do


def test_a_broken_code_file_is_a_failure(codes_folder: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, codes, _ = codes_folder
    np.save(folder / "3.npy", codes[3][None] + 99_999)
    np.save(folder / "4.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "5.npy", codes[5][None, :2])
    found = prepare(codes_recipe(folder), tmp_path / "store", options=INLINE)
    assert (found.failed, found.ok) == (3, False)
    lines = [json.loads(line) for line in (tmp_path / "store" / "failures.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["3", "4", "5"]
    assert not (tmp_path / "store" / "codes").exists()
    tolerant = prepare(codes_recipe(folder, "data.max_failed_fraction=0.1"), tmp_path / "store", options=INLINE)
    assert np.nonzero(~tolerant.checked().reader("codes").valid())[0].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer.name=llamagen-vq8", "its codes are of tokenizer.name 'llamagen-vq16', the recipe says "),
        ("data.image_size=16", "its codes make a grid of 4 x 4, data.image_size 16 one of 1 x 1; set the size"),
        ("data.crop={kind: center}", "_codes: 0: codes of 10 crops with 16 each; the recipe's center_crop"),
    ],
)  # fmt: skip
def test_codes_of_something_else_are_refused(
    codes_folder: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(ArraError, match=message):
        prepare(codes_recipe(codes_folder[0], change), tmp_path / "store", options=INLINE).checked()


def test_caption_features_come_with_the_list(
    tmp_path: Path, draw_pictures: Callable[[Path], Path], toy_settings: tuple[str, ...]
) -> None:
    pictures, rng = draw_pictures(tmp_path / "pictures"), np.random.default_rng(0)
    names = sorted(path.name for path in pictures.glob("*.png"))[:40]
    lines = [
        {"image_path": str(pictures / name), "text": ["blip", f"a picture, {name}", "a picture"]} for name in names
    ]
    (pictures / "part.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    lengths = rng.integers(1, 7, len(names))
    features = [rng.normal(size=(1, length, T5_WIDTH)).astype(np.float32) for length in lengths]
    (tmp_path / "t5" / "part").mkdir(parents=True)
    for number, each in enumerate(features):
        np.save(tmp_path / "t5" / "part" / f"{number}.npy", each)
    source = f"{{kind: llamagen-list, path: {pictures / 'part.jsonl'}, caption_features: {tmp_path / 't5'}}}"
    own = [f"data.sources=[{source}]", "data.shard_records=16", "data.features_dtype=float16"]
    recipe = load_recipe("demo", row="aligned", overrides=[*toy_settings, *own])
    store: Store = prepare(recipe, tmp_path / "store", options=INLINE).checked()
    reader = store.reader(CAPTION_FEATURES)
    assert reader.shapes().tolist() == [[length, T5_WIDTH] for length in lengths]
    for row, found in zip((39, 0, 17), reader.take_ragged(np.array([39, 0, 17])), strict=True):
        np.testing.assert_array_equal(found, features[row][0].astype(np.float16))
    assert store.reader("codes").valid().all()
