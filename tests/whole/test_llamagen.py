"""Models of classes and of captions from pictures to the report, by the commands a user types."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from arra.data.store import Store
from arra.evaluate.card import Evaluation
from arra.models import load_decoder, save_model
from arra.runs import Run
from arra.stages.painters import load_run
from arra.train.checkpoints import saved_step
from tests.encoders.toy_t5 import make_toy_t5
from tests.models.original import gpt_shapes

CLASSES = {"blue_bar": "blue", "green_bar": "green", "red_bar": "red"}
PER_CLASS = 20
"""With few pictures no class is spread over all splits."""
TOY = (
    "train.steps=6",
    "train.batch_size=4",
    "train.threads=1",
    "train.precision=float32",
    "train.warmup_steps=2",
    "train.log_every_steps=1",
    "train.validate_every_steps=3",
    "train.preview_every_steps=3",
    "train.checkpoint_every_steps=3",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.hidden_size=32",
    "data.image_size=16",
    "data.encoder_image_size=48",
    "evaluate.cfg_scales=[2.0]",
    "evaluate.num_resamples=4",
    "evaluate.frechet_components=2",
    "evaluate.grid_prompts=2",
    "evaluate.grid_seeds=2",
)


@dataclass(frozen=True)
class Workshop:
    """A folder with pictures, and the commands in it."""

    root: Path
    run_arra: Callable[..., Any]
    settings: tuple[str, ...]
    recipe: str

    def __call__(self, command: str, *arguments: object, with_settings: bool = False) -> Any:
        chosen = [each for text in self.settings for each in ("--set", text)] if with_settings else []
        return self.run_arra(command, *arguments, *chosen)

    def done(self, command: str, *arguments: object, **options: Any) -> str:
        answer = self(command, *arguments, **options)
        assert answer.code == 0, answer
        return str(answer.out)

    def train(self, row: str, *arguments: object) -> Path:
        folder = self.root / "runs" / row
        chosen = ("--row", row, "--store", self.root / "store", "--out", folder)
        self.done("train", self.recipe, *chosen, *arguments, with_settings=True)
        return folder


def draw(path: Path, color: str, number: int) -> None:
    image = Image.new("RGB", (40, 40), "white")
    left, top = random.Random(f"{color} {number}").choices(range(20), k=2)
    ImageDraw.Draw(image).rectangle((left, top, left + 18, top + 6 + number % 9), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def classes(tmp_path: Path, run_arra: Callable[..., Any]) -> Workshop:
    for name, color in CLASSES.items():
        for number in range(PER_CLASS):
            draw(tmp_path / "classes" / name / f"{number:02d}.png", color, number)
    return Workshop(tmp_path, run_arra, (f"data.path={tmp_path / 'classes'}", *TOY), "llamagen_c2i")


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> dict[str, float]:
    return {row.metric: row.value for row in Evaluation.load(folder).card.results}


@pytest.mark.slow
def test_classes_from_a_folder_to_the_report(classes: Workshop) -> None:
    store = classes.root / "store"
    prepared = ("--row", "arra-base-tiny", "--store", store, "--workers", 0)
    assert "60" in classes.done("prepare", "llamagen_c2i", *prepared, with_settings=True)
    plain, aligned = classes.train("tiny"), classes.train("arra-base-tiny")
    again = classes.train("tiny")  # finished: nothing happens
    assert again == plain
    rows = [Run.open(run).read_metrics() for run in (plain, aligned)]
    assert rows[0][0]["ntp_loss"] == rows[1][0]["ntp_loss"]  # same weights, pictures, dropout
    assert (rows[0][0]["gva_loss"], 0 < rows[1][0]["gva_loss"] < 2) == (None, True)
    assert len(list((aligned / "previews").glob("*.png"))) == 2
    model = load_decoder(aligned)
    assert (model.settings.condition, model.settings.num_classes, model.settings.multiple_of) == ("class", 3, 32)
    assert model.about["class_names"] == ["blue bar", "green bar", "red bar"]

    # the original reads both runs: its keys, and the bits of the run's own file
    for run in (plain, aligned):
        file = run.with_suffix(".pt")
        assert "for LlamaGen:" in classes.done("export", run, file, "--to", "llamagen")
        content = torch.load(file, weights_only=True)
        assert list(content) == ["model"]
        own = safetensors.torch.load_file(run / "model.safetensors")
        width = model.settings.ffn_width
        assert {key: tuple(value.shape) for key, value in content["model"].items()} == gpt_shapes(
            2, 32, width, codes=2048, classes=3
        )
        assert own.keys() == content["model"].keys()
        assert all(torch.equal(own[key], value) for key, value in content["model"].items())
    assert any(name.startswith("align.") for name in saved_step(aligned / "checkpoints", 6).tensors)

    out = classes.root / "painted"
    asked = ("--label", "red bar", "--label", "0-1", "--seeds", "0-1", "--cfg-interval", 2, "--min-p", 0.01)
    classes.done("generate", aligned, *asked, "--out", out, "--batch-size", 4)
    found = samples(out)
    told = [(row["label"], row["class"], row["seed"]) for row in found]
    assert told == [
        (label, name, seed) for label, name in ((2, "red bar"), (0, "blue bar"), (1, "green bar")) for seed in (0, 1)
    ]
    assert {(row["cfg_interval"], row["min_p"], row["cfg_scale"]) for row in found} == {(2, 0.01, 2.0)}
    with Image.open(out / found[0]["file"]) as picture:
        assert picture.size == (16, 16)
        assert picture.info["arra:class"] == "red bar"
    first = {row["file"]: (out / row["file"]).read_bytes() for row in found}
    alone = classes.root / "painted_alone"
    classes.done("generate", aligned, *asked, "--out", alone, "--batch-size", 1)
    assert first == {row["file"]: (alone / row["file"]).read_bytes() for row in found}
    classes.done("generate", aligned, "--split", "heldout", "--num-images", 3, "--out", classes.root / "split")
    records = Store.open(store)
    asked_of = [records.fields(int(row), "id", "label") for row in records.rows("heldout")[:3]]
    assert [(row["id"], row["label"]) for row in samples(classes.root / "split")] == asked_of
    assert "no such class; did you mean 'red bar'?" in classes("generate", plain, "--label", "red bat").error

    assert "class_gain" in classes.done("evaluate", plain, aligned)
    measured = metrics(aligned)
    assert {"nll", "bits_per_token", "class_gain", "class_retrieval_at_1", "frechet", "kid_x1000", "psnr_db"} == set(
        measured
    )
    card = Evaluation.load(aligned).card
    assert card.protocol["condition"] == "class"
    assert "retrieval of single pictures" in str(card.protocol["not_measured"])
    page = Path(classes.done("report", plain, aligned, "--out", classes.root / "report").strip())
    assert "Class gain" in page.read_text()


def test_a_model_of_classes_goes_on_from_given_weights(classes: Workshop) -> None:
    store = classes.root / "store"
    classes.done("prepare", "llamagen_c2i", "--row", "tiny", "--store", store, "--workers", 0, with_settings=True)
    first = classes.train("tiny")
    gone = classes.root / "runs" / "more"
    start = ("--set", f"model.weights={first}", "--set", "train.steps=1", "--set", "train.learning_rate=1e-9")
    common = ("train", "llamagen_c2i", "--row", "tiny", "--store", store, "--out", gone)
    settings = [each for text in classes.settings for each in ("--set", text)]
    answer = classes.run_arra(*common, *settings, *start)
    assert answer.code == 0, answer
    before, after = load_decoder(first), load_decoder(gone)
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, atol=1e-6, rtol=0)
    assert after.about["started_from"]["weights"] == str(first)

    # other classes: a fresh table, the rest stays
    answer = classes.run_arra(*common[:-1], gone.with_name("five"), *settings, *start, "--set", "model.num_classes=5")
    assert answer.code == 0, answer
    after = load_decoder(gone.with_name("five"))
    table = "cls_embedding.embedding_table.weight"
    assert after.state_dict()[table].shape[0] == 6
    torch.testing.assert_close(after.state_dict()[table][-1], before.state_dict()[table][-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(after.output.weight, before.output.weight, atol=1e-6, rtol=0)

    # a decoder alone, as `arra import` leaves it, needs a tokenizer to paint
    del before.about["codes_of"]
    alone = save_model(before, classes.root / "alone")
    assert "a model without an image tokenizer; name one" in classes("generate", alone, "--label", 0).error
    out = classes.root / "painted"
    painting = ("--label", 1, "--seeds", "3", "--cfg-scale", 2)
    classes.done("generate", alone, *painting, "--tokenizer", "openmoji-vq4", "--out", out)
    classes.done("generate", first, *painting, "--out", classes.root / "by_run")
    with Image.open(out / "000000.png") as one, Image.open(classes.root / "by_run" / "000000.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))

    # and what does not fit is told
    wrong = classes.run_arra(*common[:-1], gone.with_name("no"), *settings, *start, "--set", "model.num_layers=1")
    assert f"model.weights: {first} has num_layers 2, the recipe's model 1" in wrong.error
    wrong = classes.run_arra(*common[:-1], gone.with_name("no"), *settings, *start, "--set", "model.weights=nowhere")
    assert "nowhere: no weights there" in wrong.error
    assert not gone.with_name("no").exists()
    wrong = classes.run_arra(*common[:-1], gone.with_name("no"), *settings, "--set", "model.num_classes=2")
    assert "model.num_classes: 2, but" in wrong.error


def code_folder(root: Path, name: str, *, count: int, crops: int, num_codes: int, num_classes: int) -> Path:
    """Random codes of 4 x 4 as LlamaGen's script leaves them, their labels in the folder beside."""
    rng = np.random.default_rng(0)
    codes, labels = root / f"{name}_codes", root / f"{name}_labels"
    codes.mkdir()
    labels.mkdir()
    for number in range(count):
        np.save(codes / f"{number}.npy", rng.integers(0, num_codes, (1, crops, 16)))
        np.save(labels / f"{number}.npy", np.array([number % num_classes]))
    return codes


def test_codes_that_others_extracted_train_without_a_tokenizer(tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    """LlamaGen's own code folders, twenty crops of each picture; the published tokenizer's weights are not here."""
    codes = code_folder(tmp_path, "imagenet64", count=40, crops=10, num_codes=16384, num_classes=4)
    source = f"{{kind: llamagen-codes, path: {codes}, num_classes: 4}}"
    settings = [f"data.sources=[{source}]", "data.path=null", "data.source=openmoji"]
    settings += [text for text in TOY if not text.startswith(("data.", "evaluate."))]
    settings += ["model.size=null", "data.image_size=64", "data.crop.range=1.1", "tokenizer.weights=null"]
    chosen = [each for text in settings for each in ("--set", text)]
    store, run = tmp_path / "store", tmp_path / "run"
    assert run_arra("prepare", "llamagen_c2i", "--row", "b", "--store", store, *chosen).code == 0
    answer = run_arra("train", "llamagen_c2i", "--row", "b", "--store", store, "--out", run, *chosen)
    assert answer.code == 0, answer
    model = load_decoder(run)
    assert (model.settings.num_codes, model.settings.grid, model.settings.num_classes) == (16384, (4, 4), 4)
    assert model.about["class_names"] == ["0", "1", "2", "3"]
    assert not (run / "previews").exists()
    for command in (("generate", run, "--label", 0), ("evaluate", run)):
        assert "give its weights: --tokenizer-weights FILE" in run_arra(*command).error
    other = run_arra(
        "train",
        "llamagen_c2i",
        "--row",
        "b",
        "--store",
        store,
        "--out",
        tmp_path / "x",
        *chosen,
        "--set",
        "data.image_size=32",
    )
    assert "column 'codes' was made with crop" in other.error


def test_codes_without_pictures_are_evaluated_as_far_as_they_can_be(
    tmp_path: Path, run_arra: Callable[..., Any]
) -> None:
    """Here the tokenizer is one that we have."""
    codes = code_folder(tmp_path, "toy", count=80, crops=1, num_codes=2048, num_classes=2)
    source = f"{{kind: llamagen-codes, path: {codes}, num_classes: 2, tokenizer: openmoji-vq4, num_codes: 2048}}"
    settings = [f"data.sources=[{source}]", "data.path=null", "data.source=openmoji", *TOY]
    chosen = [each for text in settings for each in ("--set", text)]
    store, run = tmp_path / "store", tmp_path / "run"
    assert run_arra("prepare", "llamagen_c2i", "--row", "tiny", "--store", store, *chosen).code == 0
    answer = run_arra("train", "llamagen_c2i", "--row", "tiny", "--store", store, "--out", run, *chosen)
    assert answer.code == 0, answer
    assert load_run(run).tokenizer.name == "openmoji-vq4"
    answer = run_arra("evaluate", run)
    assert answer.code == 0, answer
    assert "not measured:" in answer.out
    card = Evaluation.load(run).card
    assert {row.metric for row in card.results} == {
        "nll",
        "bits_per_token",
        "class_gain",
        "class_retrieval_at_1",
        "frechet",
        "kid_x1000",
    }
    assert {row.reference for row in card.results} == {None, "reconstructions"}
    assert "the store holds codes without pictures" in str(card.protocol["not_measured"])
    assert run_arra("report", run, "--out", tmp_path / "report").code == 0


@pytest.mark.slow
def test_captions_from_pictures_to_the_report(tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    pytest.importorskip("transformers", reason="the text encoder comes with the extra 'text'")
    lines = []
    for number in range(60):
        color = ("red", "green", "blue")[number % 3]
        draw(tmp_path / "pictures" / f"{number}.png", color, number)
        lines.append({"file_name": f"{number}.png", "text": f"a {color} bar, at the left. a photo of {number}"})
    (tmp_path / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = make_toy_t5(tmp_path / "t5")
    own = [
        "data.source=folder",
        f"data.path={tmp_path / 'pictures'}",
        "tokenizer={name: openmoji-vq4}",
        "model.size=null",
    ]
    own += [
        "data.store_pixels=null",
        f"text_encoder={{name: flan-t5-small, weights: {encoder}, short: true, clean: true}}",
    ]
    own += [
        "caption_judge={steps: 2, batch_size: 8}",
        "train.alternative_share=0.5",
        "encoder.teacher=efficientnet-lite0",
    ]
    shop = Workshop(tmp_path, run_arra, (*own, *TOY), "llamagen_t2i")
    store = tmp_path / "store"
    shop.done("prepare", "llamagen_t2i", "--row", "arra-base-xl", "--store", store, "--workers", 0, with_settings=True)
    shop.train("xl")
    aligned = shop.train("arra-base-xl", "--set", "align.components=4")
    model = load_decoder(aligned)
    assert (model.settings.condition, model.settings.prefix_length, model.settings.caption_dim) == ("caption", 120, 512)
    assert model.about["text_encoder"].keys() == {"name", "sha256", "clean"}
    assert (model.about["text_encoder"]["name"], model.about["text_encoder"]["clean"]) == ("flan-t5-small", True)
    assert len(list((aligned / "previews").glob("*.png"))) == 2

    out = tmp_path / "painted"
    shop.done(
        "generate", aligned, "--prompt", "a red bar", "--prompt", "blue", "--seeds", "0-1", "--out", out, "--top-k", 5
    )
    assert [(row["prompt"], row["seed"]) for row in samples(out)] == [
        (p, s) for p in ("a red bar", "blue") for s in (0, 1)
    ]
    other = make_toy_t5(tmp_path / "other", seed=1)
    asked = ("generate", aligned, "--prompt", "a red bar", "--seeds", "0")
    assert "the model was trained with flan-t5-small" in shop(*asked, "--text-encoder", other).error
    encoder.rename(tmp_path / "moved")
    assert "no such folder" in shop(*asked).error
    shop.done(*asked, "--text-encoder", tmp_path / "moved", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "000000.png").is_file()
    # the records' own features lie in the store, so that no encoder is needed
    shop.done("generate", aligned, "--split", "heldout", "--num-images", 2, "--out", tmp_path / "split")
    assert [(row["seed"], "id" in row) for row in samples(tmp_path / "split")] == [(0, True), (1, True)]

    shop.done("evaluate", aligned)
    expected = {
        "nll",
        "bits_per_token",
        "caption_gain",
        "retrieval_at_1",
        "caption_retrieval_at_1",
        "frechet",
        "kid_x1000",
        "psnr_db",
    }
    assert expected <= set(metrics(aligned))
    shop.done("report", aligned, "--out", tmp_path / "report")
