"""Models from checkpoints and averages paint by themselves; what goes wrong in a run is told with its records."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from arra.errors import ArraError
from arra.runs import Run
from arra.stages.checkpoint import checkpoint_table, model_of_checkpoint
from arra.stages.painters import load_painter

Runs = Callable[..., Any]


@pytest.fixture(scope="module")
def averaged(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two averages, whose steps 2 and 4 are saved and validated."""
    from arra.config import load_recipe
    from arra.data.store import Store
    from arra.stages.train import train

    folder = tmp_path_factory.mktemp("averaged") / "run"
    keys = ("steps=4", "ema_decay=[0.5,0.9]", "checkpoint_every_steps=2", "validate_every_steps=2")
    recipe = load_recipe(pipeline.aligned / "recipe.yaml", overrides=[f"train.{key}" for key in keys])
    train(recipe, Store.open(pipeline.store), folder)
    return folder


def test_a_checkpoint_is_the_model_that_the_run_ends_with(averaged: Path, tmp_path: Path) -> None:
    newest = load_file(model_of_checkpoint(averaged, "newest", out=tmp_path / "newest") / "model.safetensors")
    assert_same(newest, load_file(averaged / "model.safetensors"))
    plain = model_of_checkpoint(averaged, "4", out=tmp_path / "plain", average=False)
    trained = load_file(plain / "model.safetensors")
    assert any(not value.equal(newest[name]) for name, value in trained.items())


def test_folders_of_a_model_alone_paint_as_the_run_does(
    averaged: Path, tmp_path: Path, run_arra: Runs, pipeline: Any
) -> None:
    folder = model_of_checkpoint(averaged, "newest", out=tmp_path / "alone")
    asked = ("--prompt", "red circle left", "--seeds", "0-1")
    for source, out in ((averaged, "by_run"), (folder, "by_folder"), (averaged / "ema-0.9", "by_average")):
        assert run_arra("generate", source, *asked, "--out", tmp_path / out).code == 0
    by_run, by_folder = (Image.open(tmp_path / name / "000001.png") for name in ("by_run", "by_folder"))
    assert by_run.tobytes() == by_folder.tobytes()
    other = load_painter(averaged / "ema-0.9")
    assert other.tokenizer.weights_hash == Run.open(averaged).manifest()["tokenizer_sha256"]


def test_other_codes_than_the_model_was_trained_on_are_refused(averaged: Path, tmp_path: Path) -> None:
    folder = model_of_checkpoint(averaged, "best", out=tmp_path / "alone")
    card = json.loads((folder / "model.json").read_text())
    card["about"]["codes_of"]["weights"] = "0" * 64
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ArraError, match=r"the run was trained on codes of openmoji-vq4 000000000000; name that one"):
        load_painter(folder)


def test_the_table_and_the_refusals(averaged: Path, tmp_path: Path) -> None:
    assert checkpoint_table(averaged).row_count == 2
    for which, words in (
        ("3", "no checkpoint of step 3; there are 2, 4"),
        ("last", "--step last: expected a step, 'best' or 'newest'"),
    ):
        with pytest.raises(ArraError, match=words):
            model_of_checkpoint(averaged, which, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ArraError, match="exists already; name a new folder"):
        model_of_checkpoint(averaged, "newest", out=averaged)


def test_a_damaged_newest_checkpoint_is_told_in_one_line(averaged: Path, tmp_path: Path, run_arra: Runs) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(averaged, copy)
    (shard,) = (copy / "checkpoints" / "step-0000004").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "step-0000004: damaged (" in run_arra("checkpoint", copy, "--out", tmp_path / "none").error


def test_diverging_tells_the_records_of_its_batch(pipeline: Any, tmp_path: Path, run_arra: Runs) -> None:
    """Where only gradients are no finite numbers, no record is to blame, and the batch is named."""
    out = tmp_path / "run"
    sets = ("learning_rate=1e20", "optimizer=adamw", "clip_norm=1e9", "warmup_steps=0")
    told = run_arra(
        *("train", pipeline.aligned / "recipe.yaml", "--store", pipeline.store, "--out", out),
        *(part for key in sets for part in ("--set", f"train.{key}")),
    ).error
    assert "trouble/step-" in told
    assert "lower train.learning_rate" in told
    (path,) = (out / "trouble").glob("*.json")
    assert len(json.loads(path.read_text())["records"]) > 1


@pytest.mark.parametrize("kind", ["auto", "ddp", "fsdp"])
def test_groups_that_are_none_leave_no_run(pipeline: Any, tmp_path: Path, run_arra: Runs, kind: str) -> None:
    out = tmp_path / "run"
    told = run_arra(
        *("train", pipeline.aligned / "recipe.yaml", "--store", pipeline.store, "--out", out),
        *("--set", "train.parallel.replicas=2", "--set", f"train.parallel.kind={kind}"),
    ).error
    assert told.startswith("train.parallel.replicas: is of kind hsdp, found ")
    assert not out.exists()


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.equal(ours[name]), name
