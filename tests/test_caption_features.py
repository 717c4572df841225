"""Captions to the store: a text encoder's vectors, whatever makes them, however often it dies; no picture is read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import arra
from arra.config import Recipe, load_recipe
from arra.data.store import Store
from arra.encoders import caption_text
from arra.errors import ArraError
from arra.stages.caption_features import CUT_FILE
from arra.stages.makers import caption_features_name, wanted_columns
from arra.stages.prepare import PrepareOptions, prepare
from tests.encoders.toy_t5 import make_toy_t5

INLINE = PrepareOptions(workers=0, batch_size=2, threads=1)
SHARD = 16
"""Records of a file of the store."""
NAME = "caption_features.flan-t5-small"
TEXT = ("caption_features",)
CAPTIONS = [f"{color} {shape}. Photo {number}" for number in range(10) for color in ("Red", "blue") for shape in "ab"]


def tree(path: Path) -> dict[str, str]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(".lock")]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_t5(tmp_path_factory.mktemp("t5") / "flan-t5-small")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty captions whose pictures are none: whoever decodes one fails."""
    folder = tmp_path_factory.mktemp("captions") / "pictures"
    folder.mkdir()
    exactly_full = "red " * 118 + "red. blue"  # its first sentence, with the end token
    captions = [*CAPTIONS[:36], "漢字", exactly_full, "red circle " * 250, "short. " + "red circle " * 250]
    lines = [{"file_name": f"{number:02}.png", "text": caption} for number, caption in enumerate(captions)]
    for line in lines:
        (folder / line["file_name"]).write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def recipe_for(pictures: Path, weights: Path) -> Callable[..., Recipe]:
    def recipe(*more: str) -> Recipe:
        own = ["data.source=folder", f"data.path={pictures}", f"data.shard_records={SHARD}", "tokenizer.train=null"]
        text = f"{{name: flan-t5-small, weights: {weights}, dtype: float32, clean: true, short: true}}"
        return load_recipe("demo", row="baseline", overrides=[*own, f"text_encoder={text}", *more])

    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe_for: Callable[..., Recipe]) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("whole") / "store"
    found = prepare(recipe_for(), folder, options=INLINE, only=TEXT)
    assert (found.items, found.done, found.already, found.failed, found.pending) == (40, 40, 0, 0, 0)
    assert found.cut == 4  # three whole captions, and one first sentence
    return folder, tree(folder)


def prompts_of(store: Store) -> list[str]:
    return [str(store.fields(row, "prompt")[0]) for row in range(len(store))]


def test_a_row_holds_the_vectors_of_its_caption(whole: tuple[Path, dict[str, str]], weights: Path) -> None:
    store = Store.open(whole[0])
    assert store.column_names() == [NAME, f"{NAME}.short"]  # nothing of pictures
    encoder = arra.load_text_encoder("flan-t5-small", weights=weights, dtype="float32")
    for name, short in ((NAME, False), (f"{NAME}.short", True)):
        captions = [caption_text(each, clean=True, short=short) for each in prompts_of(store)]
        rows = store.reader(name).take_ragged(np.arange(40))
        for first in range(0, 40, SHARD):  # beside the same captions, so that sums are rounded alike on any processor
            expected = encoder.encode(captions[first : first + SHARD], batch_size=INLINE.batch_size)
            for place, row in enumerate(rows[first : first + SHARD]):
                length = int(expected.mask[place].sum())
                assert row.shape == (length, 512)
                np.testing.assert_allclose(row, expected.features[place, :length], rtol=0, atol=1e-5)
    made_by = store.manifest()["columns"][NAME]["made_by"]
    assert made_by == {
        "encoder": "flan-t5-small",
        "weights": encoder.weights_hash,
        "slots": 120,
        "text": "whole caption",
        "clean": True,
        "compute": "float32",
        "dtype": "float32",
    }


def test_cut_captions_are_named(whole: tuple[Path, dict[str, str]]) -> None:
    store = Store.open(whole[0])
    cut = {
        name: [json.loads(line) for line in (whole[0] / name / CUT_FILE).read_text().splitlines()]
        for name in (NAME, f"{NAME}.short")
    }
    long = {store.fields(row, "id")[0]: prompt for row, prompt in enumerate(prompts_of(store)) if len(prompt) > 200}
    assert {line["id"] for line in cut[NAME]} == set(long)
    assert [line["id"] for line in cut[f"{NAME}.short"]] == [key for key, text in long.items() if "." not in text]
    assert all(line["tokens"] > 120 and line["slots"] == 120 for line in cut[NAME])


def test_parts_and_batches_of_a_job_array_make_the_store_of_one(
    tmp_path: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    store = tmp_path / "store"
    for part, pending in ((1, True), (0, False)):
        found = prepare(recipe_for(), store, options=replace(INLINE, shard=(part, 2)), only=TEXT)
        assert bool(found.pending) == pending
    assert tree(store) == whole[1]


def test_interrupted_at_any_shard_it_continues(
    tmp_path: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]],
    interrupt_writing: Callable[[int], AbstractContextManager[None]],
) -> None:  # fmt: skip
    store = tmp_path / "store"
    for survive in (0, 1, 3):
        with interrupt_writing(survive):
            prepare(recipe_for(), store, options=INLINE, only=TEXT)
    found = prepare(recipe_for(), store, options=INLINE, only=TEXT)
    assert found.already + found.done == 40
    assert found.already > 0
    assert tree(store) == whole[1]


def test_killed_before_the_cut_captions_were_named(
    tmp_path: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    store = shutil.copytree(whole[0], tmp_path / "store")
    (store / NAME / CUT_FILE).unlink()
    found = prepare(recipe_for(), store, options=INLINE, only=TEXT)
    assert (found.done, found.already, found.cut) == (0, 40, 4)
    assert tree(store) == whole[1]


def test_ray_makes_the_same_store(
    tmp_path: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One actor in this process in place of a cluster: what a cluster does with a plan is tested with the pictures."""
    from arra.stages import ray_engine

    def run(plan, shards, *, on_batch):
        actor = ray_engine.ShardActor(replace(plan, workers=0, again=frozenset()))
        for shard in shards:
            yield ray_engine.ShardDone(**actor({"shard": shard}))

    monkeypatch.setattr(ray_engine, "run_on_ray", run)
    prepare(recipe_for(), tmp_path / "store", options=replace(INLINE, engine="ray"), only=TEXT)
    assert tree(tmp_path / "store") == whole[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text_encoder.clean=false", "was made with clean True, the recipe says False; use another store, or"),
        ("text_encoder.dtype=bfloat16", "was made with compute 'float32', the recipe says 'bfloat16'"),
        ("data.features_dtype=float16", "was made with dtype 'float32', the recipe says 'float16'"),
        ("text_encoder=null", "no text encoder; add one, as in text_encoder: {name: flan-t5-xl, weights: FOLDER}"),
        ("text_encoder.name=flan-t5-xl", "512 wide (d_model), those of flan-t5-xl 2048; say flan-t5-small"),
    ],
)
def test_another_maker_is_refused(
    recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]], change: str, message: str
) -> None:
    with pytest.raises(ArraError) as caught:
        prepare(recipe_for(change), whole[0], options=INLINE, only=TEXT)
    assert message in str(caught.value)
    assert tree(whole[0]) == whole[1]


def test_other_weights_are_refused_and_replaced(
    tmp_path: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    store = shutil.copytree(whole[0], tmp_path / "store")
    recipe = recipe_for(f"text_encoder.weights={make_toy_t5(tmp_path / 'other', seed=1)}")
    with pytest.raises(ArraError, match="was made with weights"):
        prepare(recipe, store, options=INLINE, only=TEXT)
    before = Store.open(store).reader(NAME).take_ragged(np.array([0]))[0]
    assert prepare(recipe, store, options=replace(INLINE, replace=True), only=TEXT).done == 40
    after = Store.open(store).reader(NAME).take_ragged(np.array([0]))[0]
    assert after.shape == before.shape
    assert np.abs(after - before).max() > 0.1


def test_what_is_stored_serves_where_the_weights_are_not(
    recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """A training machine needs no text encoder; one that is there must be the one that made the features."""
    told, store = "model.condition=caption", Store.open(whole[0])
    for gone in ("text_encoder.weights=null", f"text_encoder.weights={tmp_path / 'gone'}"):
        wanted = wanted_columns(recipe_for(told, gone), None, store)
        for name in (NAME, f"{NAME}.short"):
            store.require(name, wanted[name])
        with pytest.raises(ArraError, match=r"no weights; set|no such folder; expected flan-t5-small"):
            wanted_columns(recipe_for(told, gone), None)
    other = recipe_for(told, f"text_encoder.weights={make_toy_t5(tmp_path / 'other', seed=1)}")
    with pytest.raises(ArraError, match="was made with weights"):
        store.require(NAME, wanted_columns(other, None, store)[NAME])
    changed = recipe_for(told, "text_encoder.weights=null", "text_encoder.clean=false")
    with pytest.raises(ArraError, match="was made with clean"):
        store.require(NAME, wanted_columns(changed, None, store)[NAME])


def test_prepare_makes_them_for_models_that_are_told_of_captions(
    tmp_path: Path, weights: Path, draw_pictures: Callable[[Path], Path], toy_settings: tuple[str, ...]
) -> None:
    chosen = [text for text in toy_settings if not text.startswith(("align.", "model.prefix"))]
    own = ["data.source=folder", f"data.path={draw_pictures(tmp_path / 'pictures')}", f"data.shard_records={SHARD}"]
    text = f"text_encoder={{name: flan-t5-small, weights: {weights}}}"
    recipe = load_recipe("demo", row="baseline", overrides=[*chosen, *own, text, "data.features_dtype=float16"])
    assert not prepare(recipe, tmp_path / "store", options=INLINE).checked().entry(NAME)  # words need no encoder
    told = recipe.model_copy(update={"model": recipe.model.model_copy(update={"condition": "caption"})})
    found = prepare(told, tmp_path / "store", options=INLINE)
    assert (found.done, found.already, found.num_captions) == (60, 0, 60)
    reader = found.checked().reader(caption_features_name(told))
    assert reader.entry.dtype == "float16"
    assert reader.entry.made_by["compute"] == "bfloat16"
    assert reader.shapes()[:, 0].min() > 3
    again = prepare(told, tmp_path / "store", options=INLINE)
    assert (again.done, again.already) == (0, 60)


def test_vectors_beyond_the_type_are_told(tmp_path: Path, recipe_for: Callable[..., Recipe], weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    large = shutil.copytree(weights, tmp_path / "large")
    content = load_file(large / "model.safetensors")
    content["encoder.final_layer_norm.weight"] = torch.full((512,), 1e6)
    save_file(content, large / "model.safetensors")
    recipe = recipe_for(f"text_encoder.weights={large}", "data.features_dtype=float16")
    with pytest.raises(ArraError, match=r"values beyond float16 for the caption .*; set data.features_dtype: float32"):
        prepare(recipe, tmp_path / "store", options=INLINE, only=TEXT)


def test_the_command(tmp_path: Path, pictures: Path, weights: Path, run_arra) -> None:
    sets = [f"data.path={pictures}", "data.source=folder", "text_encoder.name=flan-t5-small"]
    command = ["extract", "demo", "--text", "--store", tmp_path / "store", "--threads", 1, "--row", "baseline"]
    command += [part for text in sets for part in ("--set", text)]
    assert "no weights; set text_encoder.weights to its folder" in run_arra(*command).error
    assert "are two encoders; give one" in run_arra(*command, "--encoder", "efficientnet-lite1").error
    answer = run_arra(*command, "--set", f"text_encoder.weights={weights}")
    assert answer.code == 0, answer
    assert "captions cut to the text encoder's slots" in answer.out
    assert "cut.jsonl" in answer.out
    assert {line.split()[0] for line in run_arra("list", "encoders").out.splitlines()} >= {
        "flan-t5-small",
        "flan-t5-xl",
    }
    assert "extra 'text'" in run_arra("doctor").out
