"""Language models from a folder of others' weights to pictures, by the commands a user types."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

import arra
from arra.data.store import Store
from arra.evaluate.card import Evaluation
from arra.models import CausalLM
from arra.runs import Run
from arra.tokenizers.vq import VQSettings
from tests.models import toy_chameleon
from tests.models.toy_lms import save_toy_lm
from tests.tokenizers.toy_vqgan import PLAIN, save_meta

NUM_CODES = 40
SIXTEENTH = VQSettings(**{**PLAIN.model_dump(), "ch_mult": (1, 1, 1, 1, 1), "num_codes": NUM_CODES})
"""A toy of Chameleon's tokenizer with as many pixels per code."""
TRAIN = {
    "steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1, "log_every_steps": 1,
    "validate_every_steps": 2, "preview_every_steps": 4, "checkpoint_every_steps": 2, "threads": 1,
}  # fmt: skip
EVALUATE = {
    "splits": ["heldout"], "cfg_scales": [2.0], "max_images": 4, "num_resamples": 4, "frechet_components": 2,
    "grid_prompts": 2, "grid_seeds": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Workshop:
    """Commands, in a folder that they are typed in."""

    run_arra: Callable[..., Any]

    def done(self, command: str, *arguments: object) -> str:
        """What a command prints; it must succeed and have nothing to say beside."""
        answer = self.run_arra(command, *arguments)
        assert (answer.code, answer.err) == (0, ""), answer
        return str(answer.out)

    def refused(self, command: str, *arguments: object) -> str:
        """The one line in which a command says what the user did wrong."""
        return str(self.run_arra(command, *arguments).error)


@pytest.fixture
def shop(tmp_path: Path, run_arra: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.chdir(tmp_path)
    return Workshop(run_arra)


def write_recipe(**sections: Any) -> str:
    Path("toy.yaml").write_text(yaml.safe_dump({"name": "toy", "train": TRAIN, "evaluate": EVALUATE, **sections}))
    return "toy.yaml"


def drawn_recipe() -> str:
    """For the folder `pictures` that the fixture `draw_pictures` draws, and the painter `painter`."""
    return write_recipe(
        data={"source": "folder", "path": "pictures", "image_size": 16, "encoder_image_size": 48},
        model={"llm": {"folder": "painter"}},
        align={"layer": 1, "components": 4},
        caption_judge={"steps": 2, "batch_size": 8},
        rows={
            "baseline": {"align": None},
            "aligned": {"model": {"llm": {"text": {"path": "texts.jsonl", "rows": 2, "length": 16}}}},
            "qlora": {"model": {"llm": {"train": "lora", "four_bit": True, "frozen_dtype": "bfloat16"}}},
        },
    )


INIT = ("painter", "--llm", "lm", "--tokenizer", "openmoji-vq4", "--image-size", 16)


def sizes(folder: str) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        with Image.open(Path(folder, row["file"])) as picture:
            assert picture.info["arra:prompt"] == row["prompt"]
            found.append(picture.size)
    return found


def test_a_language_model_becomes_a_painter(shop: Workshop, draw_pictures: Callable[[Path], Path]) -> None:
    draw_pictures(Path("pictures"))
    Path("texts.jsonl").write_text('{"text": "the red bar is on the left, and nobody knows why"}\n' * 20)
    save_toy_lm(Path("lm"))
    assert "16 x 16 pixels: 25 tokens" in shop.done("init", *INIT, "--template", "Draw {prompt}.")
    recipe = drawn_recipe()
    assert "60" in shop.done("prepare", recipe, "--store", "store", "--workers", 0)
    assert "# sequence: the prompt + 25 tokens" in shop.done("train", recipe, "--row", "aligned", "--dry-run")
    for row in ("baseline", "aligned"):
        shop.done("train", recipe, "--row", row, "--store", "store", "--out", row)
    plain, aligned = (Run.open(Path(row)).read_metrics() for row in ("baseline", "aligned"))
    assert [row["step"] for row in aligned if row["kind"] == "train"] == [1, 2, 3, 4]
    assert (plain[0]["gva_loss"], 0 < aligned[0]["gva_loss"] < 2) == (None, True)
    assert all(row["text_loss"] > 0 for row in aligned if row["kind"] == "validation")
    assert [path.name for path in Path("aligned/previews").glob("*.png")] == ["step-000004.png"]
    model = arra.load_model("aligned")
    assert isinstance(model, CausalLM)
    assert model.layout.template == "Draw {prompt}."

    store = Store.open(Path("store"))
    prompts = [store.prompts()[row] for row in store.rows("heldout")][:3]
    Path("prompts.txt").write_text("\n".join(prompts))
    asked = ("--prompts", "prompts.txt", "--seeds", "0-1", "--cfg-scale", 2)
    shop.done("generate", "aligned", *asked, "--out", "painted")
    assert sizes("painted") == [(16, 16)] * 2 * len(prompts)
    shop.done("generate", "aligned", "--prompt", "a bar", "--seeds", 0, "--out", "wide", "--image-size", "32x16")
    assert sizes("wide") == [(32, 16)]
    shop.done("evaluate", "baseline", "aligned")
    card = Evaluation.load(Path("aligned")).card
    assert {"nll", "caption_gain", "retrieval_at_1", "frechet", "psnr_db"} <= {row.metric for row in card.results}
    shop.done("export", "aligned", "exported")

    # a finished run is a model to go on from, and none to write over
    more = ("--store", "store", "--set", "train.steps=1", "--set", "model.llm.folder=aligned")
    shop.done("train", recipe, "--row", "baseline", *more, "--out", "more")
    started = arra.load_model("more").about["started_from"]
    assert started["weights"] == "aligned"

    def misused(*changes: str, out: str = "new") -> str:
        chosen = [part for change in changes for part in ("--set", change)]
        line = shop.refused("train", recipe, "--row", "aligned", "--store", "store", "--out", out, *chosen)
        assert not Path("new").exists()
        return line

    before = Path("lm/model.safetensors").read_bytes()
    assert misused(out="lm").startswith("lm: holds a model already (config.json), which training would write over")
    assert misused(out="painter").startswith("painter: holds a model already (model.json)")
    assert Path("lm/model.safetensors").read_bytes() == before
    for folder, line in {"lm": "no model.json in it", "nowhere": "no such folder", "store": "no model.json"}.items():
        assert misused(f"model.llm.folder={folder}").startswith(f"model.llm.folder: {folder}: {line}")
    assert "another recipe: train.steps is 4 in this run, now 5" in misused("train.steps=5", out="aligned")
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": "more of it"}\n')
    assert "another manifest: text_sha256" in misused(out="aligned")
    chosen = ("--set", "model.llm=null", "--set", "model.weights=painter")
    line = shop.refused("train", recipe, "--row", "baseline", "--store", "store", "--out", "new", *chosen)
    assert line == "model.weights: painter is a language model, no decoder; name it as model.llm.folder instead"

    paint = ("generate", "aligned", "--prompt", "a bar", "--out", "new")
    assert "this model is conditioned on text; give --prompt" in shop.refused("generate", "aligned", "--label", 3)
    assert (
        shop.refused(*paint, "--text-encoder", "lm")
        == "--text-encoder: this model reads its prompts itself; leave it out"
    )
    assert "--image-size 18x16: sides must be multiples of 4" in shop.refused(*paint, "--image-size", "18x16")
    assert shop.refused(*paint, "--image-size", 512).startswith("--image-size 512: generic layout: sides of 128 x 128")
    assert "its codes are those of" in shop.refused(*paint, "--tokenizer", other_tokenizer())
    assert "arra init OUT --llm lm --tokenizer NAME" in shop.refused("generate", "lm", "--prompt", "a bar")
    assert not Path("new").exists()


def other_tokenizer() -> str:
    """A tokenizer with as many codes that mean something else."""
    save_meta(Path("other"), VQSettings(**{**PLAIN.model_dump(), "num_codes": 2048}))
    made = arra.load_tokenizer("chameleon", weights="other")
    made.about["codes_of"] = made.codes_of
    made.save(Path("other_tokenizer"))
    return "other_tokenizer"


def test_without_sides_and_rows_there_is_one_size(shop: Workshop) -> None:
    save_toy_lm(Path("lm"))
    shop.done("init", *INIT, "--no-rows")
    paint = ("generate", "painter", "--prompt", "a bar", "--seeds", 0, "--out", "painted")
    shop.done(*paint, "--image-size", 16)
    assert sizes("painted") == [(16, 16)]
    for size in (32, "16x32"):
        line = shop.refused(*paint, "--image-size", size)
        assert line == f"--image-size {size}: this model's pictures do not say their shape; it paints 16 x 16 alone"


def test_a_caption_too_long_is_refused_before_training(shop: Workshop, draw_pictures: Callable[[Path], Path]) -> None:
    draw_pictures(Path("pictures"))
    save_toy_lm(Path("lm"), max_position_embeddings=45)
    shop.done("init", *INIT)
    recipe, longer = drawn_recipe(), "model.llm.template='On a white page, {prompt}'"
    shop.done("prepare", recipe, "--store", "store", "--workers", 0)
    line = shop.refused("train", recipe, "--store", "store", "--out", "run", "--set", longer)
    assert "tokens do not fit the model's 45 positions" in line
    assert "record '" in line
    assert "or shorten the prompt" in line
    assert not Path("run").exists()
    line = shop.refused("generate", "painter", "--prompt", "a red bar " * 9, "--out", "run")
    assert line.startswith("prompt 'a red bar a red bar")


def scans() -> dict[str, Any]:
    """The section `data` of drawn scans of many shapes, in a conversation file."""
    points = []
    for number in range(24):
        width, height = ((64, 64), (128, 64), (64, 128), (100, 60))[number % 4]
        scan = Image.new("L", (width, height), 20)
        place = width // 4 if number % 3 else 3 * width // 4
        ImageDraw.Draw(scan).ellipse((place - 12, 10, place + 12, height - 10 - number % 9), fill=200)
        scan.save(f"{number}.png")
        asked = f"Generate an image according to the following prompt:\nopacity {number}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "<|image|>"}]
        split = "train" if number < 16 else "validation" if number < 20 else "heldout"
        points.append({"image": [f"{number}.png"], "conversations": turns, "split": split})
    Path("scans.json").write_text(json.dumps(points))
    return {
        "sources": [{"kind": "conversations", "path": "scans.json"}],
        "image_size": 64,
        "encoder_image_size": 48,
        "store_pixels": False,
        "crop": {"kind": "buckets"},
    }


def test_chameleons_kin_paint_any_aspect(shop: Workshop) -> None:
    config = toy_chameleon.config(NUM_CODES)
    toy_chameleon.save(Path("Lumina-mGPT"), config, toy_chameleon.state(config, rows=1))
    assert "pass --text-tokenizer FILE" in shop.refused("import", "Lumina-mGPT", "lumina", "--image-size", 64)
    toy_chameleon.text_tokenizer(Path("Lumina-mGPT/tokenizer.json"), NUM_CODES)
    assert "arra import Lumina-mGPT OUT" in shop.refused("generate", "Lumina-mGPT", "--prompt", "opacity")
    told = shop.done("import", "Lumina-mGPT", "lumina", "--image-size", 64)
    assert "1 row shared by all heads in training" in told
    assert "rows of codes kept" in told
    shop.done("import", "Lumina-mGPT", "anole", "--image-size", 64, "--layout", "chameleon")
    save_meta(Path("tokenizer"), SIXTEENTH)
    shop.done("import", "tokenizer", "vqgan")

    recipe = write_recipe(
        data=scans(),
        tokenizer={"name": "vqgan"},
        model={"llm": {"folder": "lumina", "dropout": 0.05}},
        align={"layer": 1, "center": False},
        train={**TRAIN, "z_weight": 1e-5, "recompute": "full"},
        caption_judge=None,
    )
    shop.done("prepare", recipe, "--store", "store", "--workers", 0)
    train_it = ("train", recipe, "--store", "store", "--out", "run")
    line = shop.refused(*train_it, "--set", "model.llm.folder=anole")
    assert line.startswith("data.crop.kind: buckets, but anole writes neither sides nor ends of rows")
    assert "align.layer: 3 is outside 0..2 of lumina" in shop.refused(*train_it, "--set", "align.layer=3")
    assert not Path("run").exists()
    shop.done(*train_it)
    losses = [row for row in Run.open(Path("run")).read_metrics() if row["kind"] == "train"]
    assert losses[-1]["ntp_loss"] < losses[0]["ntp_loss"]
    assert losses[-1]["gva_loss"] < losses[0]["gva_loss"]
    model = arra.load_model("run")
    assert isinstance(model, CausalLM)
    assert model.about["codes_of"] == arra.load_tokenizer("vqgan").codes_of  # what the imported folder did not say
    norm = model.lm.state_dict()["model.layers.0.self_attn.q_norm.weight"]
    assert len(norm) == model.settings.head_norm_rows == 1  # still shared

    paint = ("generate", "run", "--prompt", "opacity 3", "--seeds", "0-1", "--top-k", 5, "--out", "painted")
    shop.done(*paint, "--image-size", "128x64")
    assert sizes("painted") == [(128, 64)] * 2
    assert "image_size 128x64 there, now 64x64; choose another --out" in shop.refused(*paint)
    shop.done(*paint, "--replace")
    assert sizes("painted") == [(64, 64)] * 2
    assert "sides of 3 x 3 codes cannot be written" in shop.refused(*paint, "--image-size", 48)
    assert "trained on pictures of many shapes" in shop.refused("evaluate", "run")
    assert "Lumina-mGPT: Chameleon" in shop.done("export", "run", "exported", "--to", "lumina")
    assert "no such folder" in shop.refused("export", "rum", "other", "--to", "lumina")
    assert "vqgan: an image tokenizer, which transformers has no class for" in shop.refused(
        "export", "vqgan", "x", "--to", "hf"
    )
    assert "--layout fsdp: of LlamaGen's" in shop.refused("export", "run", "other", "--layout", "fsdp")


def test_damaged_folders_are_told(shop: Workshop, toy_copy: Any) -> None:
    save_toy_lm(Path("lm"))
    shop.done("init", *INIT)
    config = json.loads(Path("painter/config.json").read_text())
    words = json.loads(Path("painter/tokenizer.json").read_text())
    paint = ("generate", "painter", "--prompt", "a bar", "--out", "new")
    Path("painter/config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    assert "weights missing or of another shape than config.json says: model.layers.0.mlp" in shop.refused(*paint)
    Path("painter/config.json").write_text(json.dumps(config))
    ids = max(words["model"]["vocab"].values()) + 1
    words["model"]["vocab"] |= {f"word{number}": ids + number for number in range(3000)}
    words["added_tokens"] = []
    Path("painter/tokenizer.json").write_text(json.dumps(words))
    assert "tokenizer.json: text goes up to token 3299, the model has 2416" in shop.refused(*paint)

    torn = toy_copy.aligned / "recipe.yaml"
    torn.write_text(torn.read_text()[:300])
    line = shop.refused("train", "demo", "--store", toy_copy.store, "--out", toy_copy.aligned, *same_settings(toy_copy))
    assert line == f"{torn}: damaged; delete the run folder and train again"


def same_settings(toy: Any) -> list[str]:
    """What makes the demo's recipe that of the toy pipeline, as far as its store must agree."""
    data = json.dumps({"source": "auto", "path": str(toy.pictures), "image_size": 16, "encoder_image_size": 48})
    return ["--row", "aligned", "--set", f"data={data}", "--set", "tokenizer.train=null"]


@pytest.mark.slow
def test_libraries_keep_quiet(tmp_path: Path, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say when they are first imported shows in a fresh process alone."""
    pytest.importorskip("bitsandbytes", reason="the extra 'lean' is not installed")
    monkeypatch.chdir(tmp_path)
    save_toy_lm(Path("lm"))
    commands = (
        ("init", *INIT),
        ("train", drawn_recipe(), "--row", "qlora", "--store", pipeline.store, "--out", "run",
         "--set", f"data.path={pipeline.pictures}", "--set", "train.optimizer=adamw8bit"),
        ("generate", "run", "--prompt", "a bar", "--seeds", "0"),
    )  # fmt: skip
    code = """
import json, sys
from arra.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["arra", *command]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command
"""
    told = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
