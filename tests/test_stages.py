"""Stages on a toy: repeating, moving, interrupting and damaging them changes nothing or is told in one line."""

import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from arra.config import Recipe, load_recipe, parse_recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.runs import Run, file_hash
from arra.stages import training_data
from arra.stages.evaluate import evaluate
from arra.stages.paint import paint
from arra.stages.painters import load_run
from arra.stages.prepare import PrepareOptions, prepare
from arra.stages.report import report
from arra.stages.request import PaintOptions, PaintRequest
from arra.stages.train import train
from arra.stages.wishes import Asked
from arra.train.interrupt import TrainingInterrupted
from arra.train.loop import Trainer

INLINE = PrepareOptions(workers=0)
"""A loader process costs the import of torch."""


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file, by its place."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def recipe_of(run: Path) -> Recipe:
    return parse_recipe(Run.open(run).recipe_yaml(), Recipe, source=str(run))


def line_of(error: pytest.ExceptionInfo[ArraError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def raise_signal_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets a signal arrive in the middle of a training."""
    after_step = Trainer.after_step

    def interrupted(self: Trainer, *arguments: Any) -> None:
        after_step(self, *arguments)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "after_step", interrupted)


def test_every_stage_leaves_what_it_says(pipeline):
    for run in (pipeline.baseline, pipeline.aligned):
        names = {path.name for path in run.iterdir()}
        assert {"recipe.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "previews", "store.json"} <= names
        assert {"model.safetensors", "model.json", "tokenizer.json", "metrics.json"} <= names
        assert [path.name for path in sorted((run / "previews").iterdir())] == ["step-000020.png", "step-000040.png"]
        rows = Run.open(run).read_metrics()
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 41))
        assert [row["step"] for row in rows if row["kind"] == "validation"] == [20, 40]
        found = {result.metric: result.value for result in Evaluation.load(run).card.results}
        assert {"nll", "caption_gain", "frechet", "kid_x1000", "retrieval_at_1", "psnr_db"} <= found.keys()
        assert found["bits_per_token"] == pytest.approx(found["nll"] / math.log(2))
    first = [Run.open(run).read_metrics()[0] for run in (pipeline.baseline, pipeline.aligned)]
    assert first[0]["ntp_loss"] == first[1]["ntp_loss"]  # same weights, same pictures, same dropout
    assert first[0]["gva_loss"] is None
    assert 0 < first[1]["gva_loss"] < 2
    page = pipeline.page.read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "red " in page


def test_weights_for_a_tokenizer_that_has_its_own_are_refused(pipeline):
    with pytest.raises(ArraError, match=r"^--tokenizer-weights vq.pt: the tokenizer openmoji-vq4 has its own; leave"):
        evaluate(pipeline.baseline, tokenizer_weights=Path("vq.pt"))


def test_repeating_every_stage_changes_nothing(pipeline, toy_copy):
    before = contents(toy_copy.root)
    recipe = recipe_of(toy_copy.aligned)
    store = prepare(recipe, toy_copy.store).checked()
    run = train(recipe, store, toy_copy.aligned)
    evaluate(run.path)
    after = contents(toy_copy.root)
    assert {name for name in after if before.get(name) != after[name]} == {"runs/aligned/store.json"}  # it was moved
    assert before.keys() == after.keys()


def test_an_interrupted_training_ends_in_the_same_weights(pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, store = recipe_of(pipeline.aligned), Store.open(pipeline.store)
    with monkeypatch.context() as patch:
        raise_signal_at(patch, 33)
        with pytest.raises(TrainingInterrupted, match="interrupted at step 33, saved"):
            train(recipe, store, tmp_path / "aligned")
    with pytest.raises(ArraError, match="training has not finished; run the command that began it again, or: arra tr"):
        load_run(tmp_path / "aligned")
    with pytest.raises(ArraError, match="what is saved paints too: arra checkpoint "):
        load_run(tmp_path / "aligned")
    told: list[tuple[Any, ...]] = []
    train(recipe, store, tmp_path / "aligned", progress=lambda *what: told.append(what))
    for name in ("model.safetensors", "model.json", "tokenizer.json"):
        assert file_hash(tmp_path / "aligned" / name) == file_hash(pipeline.aligned / name)
    rows = Run.open(tmp_path / "aligned").read_metrics()
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 41))
    steps = [row["step"] for row in rows if row["step"] > 33]
    assert [what[:3] for what in told] == [("step", step, 40) for step in steps]
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert f"ntp {last['ntp_loss']:.3f}, gva {last['gva_loss']:.3f}, " in [what[3] for what in told][steps.index(40)]


def test_features_that_are_no_numbers_are_told_before_training(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sample = training_data.feature_sample

    def spoilt(*arguments: Any) -> dict[str, Any]:
        found = sample(*arguments)
        found["teacher"][3, 2] = float("nan")
        return found

    monkeypatch.setattr(training_data, "feature_sample", spoilt)
    with pytest.raises(ArraError, match=r"features of 'teacher' hold numbers that are not finite, in 1 of"):
        train(recipe_of(pipeline.aligned), Store.open(pipeline.store), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lost_weights_come_back_from_the_checkpoint(pipeline, toy_copy):
    expected = file_hash(toy_copy.aligned / "model.safetensors")
    (toy_copy.aligned / "model.safetensors").unlink()
    train(recipe_of(toy_copy.aligned), Store.open(toy_copy.store), toy_copy.aligned)
    assert file_hash(toy_copy.aligned / "model.safetensors") == expected


def test_a_run_folder_of_another_recipe_is_refused(pipeline, toy_copy):
    recipe = load_recipe(toy_copy.aligned / "recipe.yaml", overrides=["train.learning_rate=1e-4"])
    with pytest.raises(ArraError) as error:
        train(recipe, Store.open(toy_copy.store), toy_copy.aligned)
    assert "another recipe: train.learning_rate is 0.00" in line_of(error)
    assert "now 0.0001; use another folder or delete this one" in line_of(error)


def test_a_recipe_that_does_not_fit_its_pictures_leaves_no_run(pipeline, tmp_path: Path):
    store = Store.open(pipeline.store)
    recipe = load_recipe(pipeline.aligned / "recipe.yaml", overrides=["model.prefix_length=2"])
    with pytest.raises(ArraError, match=r"its caption has \d+ tokens, more than .* raise it with --set model.prefix_"):
        train(recipe, store, tmp_path / "run")
    for change, message in {
        "data.image_size=32": r"'codes' was made with crop .*, the recipe says 'center_crop\(32\)'; run: arra prepare",
        "encoder.teacher=efficientnet-lite2": r"'features.efficientnet-lite2' is missing; run: arra prepare",
    }.items():
        with pytest.raises(ArraError, match=message):
            train(load_recipe(pipeline.aligned / "recipe.yaml", overrides=[change]), store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_of_other_pictures_is_refused(
    pipeline, toy_copy, tmp_path: Path, draw_pictures: Callable[[Path], Path]
):
    other = draw_pictures(tmp_path / "other")
    (other / "000.png").unlink()
    Image.new("RGB", (9, 9)).save(other / "000.png")
    recipe = load_recipe(pipeline.aligned / "recipe.yaml", overrides=[f"data.path={other}"])
    prepared = prepare(recipe, tmp_path / "other-store", options=INLINE).checked()
    with pytest.raises(ArraError, match=r"another recipe: data.path"):
        train(recipe, prepared, toy_copy.aligned)
    with pytest.raises(ArraError, match="another manifest: store_sha256"):
        train(recipe_of(toy_copy.aligned), prepared, toy_copy.aligned)
    lines = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(lines.replace("red circle left", "round and red"))
    with pytest.raises(ArraError, match=r"made from other records .*; use another folder or delete this store"):
        prepare(recipe, toy_copy.store)


def test_a_column_added_later_sees_the_pictures_of_the_others(
    pipeline, toy_copy, tmp_path: Path, draw_pictures: Callable[[Path], Path]
):
    """The same records may lie elsewhere; a picture that has changed is told, and no column is mixed from both."""
    moved = draw_pictures(tmp_path / "moved")
    changes = [f"data.path={moved}", "encoder.teacher=efficientnet-lite1"]
    recipe = load_recipe(pipeline.aligned / "recipe.yaml", overrides=changes)
    shutil.copy(moved / "000.png", moved / "001.png")
    found = prepare(recipe, toy_copy.store, options=INLINE, only=("features",))
    assert (found.ok, found.failed) == (False, 1)
    with pytest.raises(ArraError, match=r"moved/001.png: the picture is not the one that the store was made from; re"):
        found.checked()
    before = contents(toy_copy.store)
    draw_pictures(tmp_path / "again")
    shutil.copy(tmp_path / "again" / "001.png", moved / "001.png")
    found = prepare(recipe, toy_copy.store, options=INLINE, only=("features",))
    assert found.ok
    after = contents(toy_copy.store)
    added = {name for name in after if before.get(name) != after[name]}
    assert added == {f"features.efficientnet-lite1/{name}" for name in ("00000.arrow", "column.json")}
    assert {name for name in before if name not in after} == {
        "failures.jsonl",
        ".features.efficientnet-lite1.part/00000.arrow",
        ".features.efficientnet-lite1.part/00000.json",
        ".features.efficientnet-lite1.part/header.json",
    }


def test_a_moved_demo_finds_its_store(pipeline, toy_copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = load_run(toy_copy.aligned).store
    assert found is not None
    assert found.path == toy_copy.store.resolve()
    monkeypatch.chdir(toy_copy.root)
    found = load_run(Path("runs/aligned")).store
    assert found is not None
    assert found.path == toy_copy.store.resolve()
    shutil.move(toy_copy.aligned, tmp_path / "alone")  # the store stays: it is where it was at first
    found = load_run(tmp_path / "alone").store
    assert found is not None
    assert found.path == pipeline.store.resolve()


def test_a_lost_store_is_told_and_can_be_made_again(pipeline, toy_copy):
    (toy_copy.aligned / "metrics.json").unlink()
    shutil.rmtree(toy_copy.store)
    note = toy_copy.aligned / "store.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"at_first": str(toy_copy.root / "gone")}))
    with pytest.raises(ArraError) as error:
        evaluate(toy_copy.aligned)
    assert "the store it was trained on is gone or has changed, it was" in line_of(error)
    assert "arra prepare" in line_of(error)
    prepare(recipe_of(toy_copy.aligned), toy_copy.store, options=INLINE)
    expected = {(r.key, r.value) for r in Evaluation.load(pipeline.aligned).card.results}
    assert {(r.key, r.value) for r in evaluate(toy_copy.aligned, threads=1).card.results} == expected


def test_pictures_that_changed_since_are_not_judged(toy_copy, tmp_path: Path, draw_pictures: Callable[[Path], Path]):
    pictures = draw_pictures(tmp_path / "pictures")
    changes = [f"data.path={pictures}", "train.steps=2", "data.store_pixels=false", "caption_judge=null"]
    recipe = load_recipe(toy_copy.baseline / "recipe.yaml", overrides=changes)
    run = train(recipe, prepare(recipe, tmp_path / "store", options=INLINE).checked(), tmp_path / "run")
    for path in pictures.glob("*.png"):
        Image.new("RGB", (48, 48), "teal").save(path)
    with pytest.raises(
        ArraError, match=r"\d+\.png: .*the picture is not the one that the store was made from; restore it"
    ):
        evaluate(run.path)


@pytest.mark.parametrize("name", ["metrics.json", "evaluation.safetensors", "samples/evaluation.safetensors"])
def test_a_lost_or_broken_evaluation_is_made_again(pipeline, toy_copy, name: str):
    before = Evaluation.load(toy_copy.aligned)
    for damage in (Path.unlink, lambda path: path.write_bytes(b"{")):
        damage(toy_copy.aligned / name)
        with pytest.raises(ArraError, match=r"missing|broken|damaged|cannot read|not JSON"):
            report([toy_copy.baseline, toy_copy.aligned], toy_copy.root / "page", title="toy")
        if name.startswith("samples/") and damage is not Path.unlink:
            (toy_copy.aligned / name).unlink()
        after = evaluate(toy_copy.aligned, threads=1)
        assert [(r.key, r.value, r.low) for r in after.card.results] == [
            (r.key, r.value, r.low) for r in before.card.results
        ]


def test_damaged_files_of_the_store_are_told_or_made_again(pipeline, toy_copy):
    judged = next((toy_copy.store / "judged").iterdir())
    judged.write_bytes(judged.read_bytes()[:100])
    (toy_copy.aligned / "metrics.json").unlink()
    evaluate(toy_copy.aligned, threads=1)
    assert len(judged.read_bytes()) > 100
    codes = toy_copy.store / "codes" / "00000.arrow"
    codes.write_bytes(codes.read_bytes()[:-20])
    (toy_copy.aligned / "metrics.json").unlink()
    with pytest.raises(ArraError, match=r"codes/00000.arrow: missing or damaged .*; run: arra prepare"):
        evaluate(toy_copy.aligned)
    prepare(recipe_of(toy_copy.aligned), toy_copy.store, options=INLINE)
    evaluate(toy_copy.aligned, threads=1)


def test_damaged_weights_are_told(pipeline, toy_copy):
    weights = toy_copy.aligned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArraError) as error:
        load_run(toy_copy.aligned)
    assert line_of(error).startswith(f"{weights}: not a readable safetensors file")
    assert line_of(error).endswith("model.json and run the training again: it continues from its checkpoint")
    (toy_copy.aligned / "model.json").unlink()
    train(recipe_of(toy_copy.aligned), Store.open(toy_copy.store), toy_copy.aligned)
    assert file_hash(weights) == file_hash(pipeline.aligned / "model.safetensors")


def test_a_tokenizer_is_trained_into_the_store_and_travels_with_the_run(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def recipe(*changes: str) -> Recipe:
        small = ["tokenizer.train={steps: 3, batch_size: 4}", "train.steps=2", "train.preview_every_steps=null"]
        return load_recipe(pipeline.baseline / "recipe.yaml", overrides=[*small, *changes])

    with pytest.raises(ArraError, match="its tokenizer is not trained yet; run: arra prepare"):
        train(recipe(), Store.open(pipeline.store), tmp_path / "run")

    def interrupt(what: str, done: int, total: int, note: str = "") -> None:
        if "tokenizer" in what and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        prepare(recipe(), tmp_path / "store", options=INLINE, progress=interrupt)
    steps: list[int] = []

    def count(what: str, done: int, total: int, note: str = "") -> None:
        if "tokenizer" in what:
            steps.append(done)

    store = prepare(recipe(), tmp_path / "store", options=INLINE, progress=count).checked()
    assert steps == [3]
    whole = prepare(recipe(), tmp_path / "uninterrupted", options=INLINE).checked()
    weights = "tokenizer/tokenizer.safetensors"
    assert file_hash(store.path / weights) == file_hash(whole.path / weights)
    run = train(recipe(), store, tmp_path / "run")
    assert load_run(run.path).tokenizer.weights_hash == file_hash(store.path / weights)

    steps.clear()  # another training of the tokenizer starts anew, though checkpoints of the first are there
    with pytest.raises(ArraError, match="trained otherwise than the recipe says; use another store, or make both anew"):
        prepare(recipe("tokenizer.train.steps=2"), tmp_path / "store")
    anew = PrepareOptions(workers=0, replace=True)
    store = prepare(recipe("tokenizer.train.steps=2"), tmp_path / "store", options=anew, progress=count).checked()
    assert steps == [1, 2]
    assert load_run(run.path).store is None
    asked = PaintRequest(run.path, Asked(prompts=("red circle",)), seeds=[0])
    assert paint(asked, options=PaintOptions(tmp_path / "painted")).num_painted == 1


def test_reports_compare_seeds_of_rows(pipeline, toy_copy, tmp_path: Path):
    def another_seed(folder: Path) -> Path:
        changes = ["train.seed=1", "model.seed=1", "train.steps=20"]
        recipe = load_recipe(folder / "recipe.yaml", overrides=changes)
        run = train(recipe, Store.open(toy_copy.store), tmp_path / "seed-1" / folder.name)
        evaluate(run.path, threads=1)
        return run.path

    with pytest.raises(ArraError, match="given twice; name each run once"):
        report([toy_copy.aligned, toy_copy.aligned], tmp_path / "page", title="toy")
    same_row = report([pipeline.aligned, toy_copy.aligned], tmp_path / "page", title="toy").read_text()
    assert str(pipeline.aligned) in same_row  # two runs of one row and seed are told apart by their folders
    second = [another_seed(folder) for folder in (toy_copy.baseline, toy_copy.aligned)]
    with pytest.raises(ArraError, match="share no training seed"):
        report([toy_copy.baseline, second[1]], tmp_path / "page", title="toy")
    page = report([toy_copy.baseline, toy_copy.aligned, *second], tmp_path / "page", title="toy")
    assert "seed" in page.read_text()
    assert (tmp_path / "page" / "grid.png").is_file()
