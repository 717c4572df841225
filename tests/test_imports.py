"""What others have computed comes into the store as it was: LlamaGen's codes and its T5 caption features."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arra.config import Recipe, load_recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.imports import T5_FEATURES, T5_WIDTH
from arra.stages.makers import wanted_columns
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


def test_two_ranges_come_from_two_folders(codes_folder: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """Twenty variants: the ten of the folder, then the ten of its sibling; a record that one lacks is a failure."""
    folder, codes, _ = codes_folder
    first, second = (tmp_path / name / "imagenet64_codes" for name in ("flip_ten_crop", "flip_ten_crop_105"))
    for path in (first, second):
        path.parent.mkdir()
    folder.rename(first)
    (tmp_path / "imagenet64_labels").rename(first.parent / "imagenet64_labels")
    second.mkdir()
    for number in range(29):
        np.save(second / f"{number}.npy", 16383 - codes[number][None])
    recipe = codes_recipe(first, "data.crop={kind: ten_crop, range: [1.1, 1.05]}", "data.max_failed_fraction=0.1")
    store = prepare(recipe, tmp_path / "store", options=INLINE).checked()
    reader = store.reader("codes")
    assert (reader.entry.variants, reader.entry.made_by["crop"]) == (20, "ten_crop(64, range=1.1+1.05)")
    for variant in (0, 9, 10, 19):
        found = reader.take(np.arange(29), variants=np.full(29, variant)).reshape(29, 16)
        np.testing.assert_array_equal(found, codes[:29, variant] if variant < 10 else 16383 - codes[:29, variant - 10])
    assert np.nonzero(~reader.valid())[0].tolist() == [29]
    with pytest.raises(ArraError, match=r"made with crop 'ten_crop\(64, range=1.1\+1.05\)', the recipe says 'ten_crop"):
        prepare(codes_recipe(first, "data.max_failed_fraction=0.1"), tmp_path / "store", options=INLINE)
    again = replace(INLINE, replace=True)
    assert (
        prepare(codes_recipe(first), tmp_path / "store", options=again).checked().reader("codes").entry.variants == 10
    )


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
    shutil.copytree(tmp_path / "t5", tmp_path / "short")
    np.save(tmp_path / "short" / "part" / "0.npy", features[1])
    folders = f"caption_features: {tmp_path / 't5'}, short_caption_features: {tmp_path / 'short'}"
    source = f"{{kind: llamagen-list, path: {pictures / 'part.jsonl'}, {folders}}}"
    own = [f"data.sources=[{source}]", "data.shard_records=16", "data.features_dtype=float16"]
    recipe = load_recipe("demo", row="aligned", overrides=[*toy_settings, *own])
    store: Store = prepare(recipe, tmp_path / "store", options=INLINE).checked()
    (short,) = store.reader(f"{T5_FEATURES}.short").take_ragged(np.array([0]))
    np.testing.assert_array_equal(short, features[1][0].astype(np.float16))
    reader = store.reader(T5_FEATURES)
    assert reader.shapes().tolist() == [[length, T5_WIDTH] for length in lengths]
    for row, found in zip((39, 0, 17), reader.take_ragged(np.array([39, 0, 17])), strict=True):
        np.testing.assert_array_equal(found, features[row][0].astype(np.float16))
    assert store.reader("codes").valid().all()

    # a model that is told of captions takes them, with no text encoder on this machine
    told = ["model.condition=caption", "text_encoder.short=true"]
    unclean = load_recipe("demo", row="aligned", overrides=[*toy_settings, *own, *told])
    with pytest.raises(
        ArraError, match=r"clean: the imported column 'caption_features.flan-t5-xl' is of captions that"
    ):
        prepare(unclean, store.path, options=INLINE)
    with pytest.raises(ArraError, match="set it to true, so that prompts are cleaned alike"):
        wanted_columns(unclean, None, store)
    recipe = load_recipe("demo", row="aligned", overrides=[*toy_settings, *own, *told, "text_encoder.clean=true"])
    again = prepare(recipe, store.path, options=INLINE)
    assert (again.done, again.already) == (0, 40)
    for name, made_by in wanted_columns(recipe, None, store).items():
        if name.startswith("caption_features"):
            store.require(name, made_by)
            assert made_by["imported"] == "LlamaGen caption features"
