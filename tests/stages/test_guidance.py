"""`arra guidance` on a finished toy run: what it paints, keeps, writes and refuses."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arra.errors import ArraError
from arra.evaluate.measured import Measured
from arra.evaluate.retrieval import retrieval_ranks
from arra.sample.generate import generate
from arra.sample.logits import SamplingSettings
from arra.stages import guidance_pictures
from arra.stages.guidance_options import (
    candidates,
    effect,
    parse_budget,
    parse_options,
    parse_schedule,
    schedule_text,
    short_name,
)
from arra.stages.guidance_pictures import open_sitting
from arra.stages.painters import load_run
from tests.conftest import Pipeline

ON = ("--split", "train", "--images", 8, "--threads", 1, "--device", "cpu", "--batch-size", 4)
FEW = (*ON, "--cfg", "1,2,4", "--schedule", "constant", "--temperature", "1")


@pytest.fixture(autouse=True)
def few_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance_pictures, "MOST_REFERENCES", 8)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes as long as the search."""
    monkeypatch.setattr("arra.report.guidance_page.layer_plot", lambda *_, **__: "data:,")


def test_a_search_writes_what_the_run_paints_with(
    toy_copy: Any, run_arra: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_copy.aligned
    kept = {path.name: path.read_bytes() for path in (run / "recipe.yaml", run / "manifest.json", run / "metrics.json")}
    dry = run_arra("guidance", run, *FEW, "--dry-run")
    assert dry.code == 0
    assert "nothing painted" in dry.out
    assert not (run / "guidance").exists()
    answer = run_arra("guidance", run, *FEW)
    assert (answer.code, answer.err) == (0, "")
    found = json.loads((run / "guidance.json").read_text())
    names = {trial["name"] for trial in found["trials"]}
    # the recipe's own (cfg 2, temperature 0.7) and its unguided twin stand beside the three that were asked for
    assert names == {
        "cfg 2 constant, temp 0.7", "no guidance, temp 0.7", "no guidance, temp 1", "cfg 2 constant, temp 1",
        "cfg 4 constant, temp 1",
    }  # fmt: skip
    assert found["rounds"] == [{"num_settings": 5, "num_images": 8}]
    assert (found["pictures_painted"], found["settings_tried"], found["metrics"]) == (40, 5, ["caption_kid_x1000"])
    assert found["seconds"] > 0
    best = min(found["trials"], key=lambda trial: trial["values"]["caption_kid_x1000"])
    assert found["trials"][0] == best
    assert "winner" in best["roles"]
    assert any("was trained on" in note for note in found["notes"])
    assert "kid_x1000" in found["teachers_measures"]
    assert "caption_kid_x1000" not in found["teachers_measures"]
    loaded = load_run(run)
    assert loaded.sampling.model_dump(mode="json") == found["chosen"] == best["settings"]
    assert loaded.recipe.sample.temperature == 0.7
    assert kept == {name: (run / name).read_bytes() for name in kept}
    page = (run / "guidance.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    # what was painted is not painted again, whatever decides, and the teacher's relatives are told
    monkeypatch.setattr(guidance_pictures.Sitting, "_more", None)
    again = run_arra("guidance", run, *FEW, "--metric", "kid_x1000")
    assert again.code == 0
    assert "0 of them now" in " ".join(again.out.split())
    other = json.loads((run / "guidance.json").read_text())
    assert any("of the family of the recipe's teacher" in note for note in other["notes"])
    assert {t["name"]: t["values"] for t in other["trials"]} == {t["name"]: t["values"] for t in found["trials"]}


def test_prompts_seeds_and_references_stay_together(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(pipeline.baseline)
    loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, path=tmp_path))
    shutil.copy(pipeline.baseline / "model.safetensors", tmp_path)  # it is named by its hash
    how: dict[str, Any] = {"split": "train", "images": 6, "spaces": (), "batch_size": 4, "device": torch.device("cpu")}
    sitting = open_sitting(loaded, seed=5, **how)
    assert loaded.store is not None
    rows = loaded.store.rows("train")
    captions = loaded.store.table(["prompt"]).column("prompt").to_pylist()
    codes = loaded.store.reader("codes").take(rows, variants=np.zeros(len(rows), int))
    own = dict(zip([captions[row] for row in rows], codes, strict=True))
    assert len(sitting.split.prompts) == 8  # references too
    assert sitting.split.prompts != [prompt for prompt in own if prompt in sitting.split.prompts]  # drawn
    for prompt, found in zip(sitting.split.prompts, sitting.split.codes, strict=True):
        assert np.array_equal(found.numpy(), own[prompt])
    decoded = loaded.tokenizer.decode(sitting.split.codes)
    for eye in sitting.eyes:
        assert torch.allclose(eye.encode(decoded), sitting.references[eye.prefix], atol=1e-4)
    # painted six at once or bit by bit, read back or not, it is what `generate` paints with these prompts and seeds
    settings = SamplingSettings(cfg_scale=3, temperature=0.5)
    sitting(settings, 3)
    few = sitting(settings, 6)
    plain = generate(
        loaded.model, loaded.tokenizer, prompts=sitting.split.prompts[:6], seeds=range(5, 11), **settings.model_dump()
    ).images
    assert plain is not None
    kept = sitting.painted(settings, 6)
    assert kept.pictures is not None
    assert torch.equal(kept.pictures, plain)
    assert torch.allclose(few["train/features"], sitting.eyes[0].encode(plain), atol=1e-4)
    assert torch.equal(few["train/ranks"], retrieval_ranks(few["train/features"], sitting.references[""][:6]))
    sitting._kept.clear()
    again = sitting(settings, 6)
    assert all(torch.equal(again[key], value) for key, value in few.items())
    monkeypatch.setattr(guidance_pictures, "MOST_REFERENCES", 6)  # more or fewer, the first ones are the same
    assert open_sitting(loaded, seed=5, **how).split.prompts == sitting.split.prompts[:6]
    other = open_sitting(loaded, seed=6, **how)
    assert other.split.prompts != sitting.split.prompts[:6]
    assert "accuracy.all" not in sitting.metrics()
    # of drawn shapes every picture is held against its own caption
    monkeypatch.setattr(guidance_pictures, "is_drawn", lambda prompts: True)
    told: list[str] = []

    def accuracy(images: list[np.ndarray], captions: list[str]) -> dict[str, Measured]:
        told.extend(captions)
        return {"all": Measured(value=0.0, per_picture=np.array([float(image.mean()) for image in images]))}

    monkeypatch.setattr(guidance_pictures, "attribute_accuracy", accuracy)
    found = other(settings, 6)["train/accuracy.all"]
    pictures = other.painted(settings, 6).pictures
    assert pictures is not None
    assert told == other.split.prompts[:6]
    assert found.tolist() == [float(image.numpy().mean()) for image in pictures]
    assert other.metrics()[-1] == "accuracy.all"


@pytest.mark.usefixtures("without_plots")
def test_a_stopped_search_goes_on(toy_copy: Any, run_arra: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, more = toy_copy.baseline, guidance_pictures.Sitting._more
    left = 3

    def stop(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return more(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(guidance_pictures.Sitting, "_more", stop)
        assert run_arra("guidance", run, *FEW).code == 130
    assert not (run / "sampling.json").exists()
    stopped = run_arra("guidance", run, *FEW)
    assert "40 pictures in" in stopped.out
    assert "28 of them now" in " ".join(stopped.out.split())  # three batches of 4 were there
    found = json.loads((run / "guidance.json").read_text())
    assert found["metrics"] == ["caption_kid_x1000"]  # as of the aligned row
    for file in (run / "guidance").iterdir():
        file.write_bytes(b"damaged")
    (run / "sampling.json").unlink()
    whole = run_arra("guidance", run, *FEW, "--budget", "40")
    assert "40 of them now" in " ".join(whole.out.split())
    fresh = json.loads((run / "guidance.json").read_text())
    for key in ("trials", "chosen", "rounds"):
        assert fresh[key] == found[key]


def test_what_cannot_be_searched_is_told(toy_copy: Any, run_arra: Callable[..., Any]) -> None:
    run = toy_copy.baseline
    on = ("--threads", 1, "--device", "cpu")
    for arguments, told in {
        ("--split", "heldout"): "--split heldout: the run's card reports it (evaluate.splits), and settings chosen on",
        ("--split", "none"): "no records in split 'none'",
        (*ON, "--metric", "fid"): "--metric fid: unknown here; there are kid_x1000, caption_kid_x1000, frechet",
        (*ON, "--space", "inceptoin"): "space 'inceptoin': unknown",
        (*ON, "--budget", "20"): "--budget: 26 settings need at least 208 pictures, the budget has 20",
        ("--cfg", "1,x"): "--cfg 1,x: expected numbers from 0 on, as in 1,1.5,2",
        ("--top-k", "1.5"): "--top-k 1.5: expected whole numbers",
        ("--schedule", "linear:2"): "--schedule linear:2: expected constant, linear, cosine",
        ("--schedule", "constant@0.9-0.1"): "'cfg_start' is 0.9, behind 'cfg_stop' 0.1",
        ("--budget", "5 days"): "--budget 5 days: expected pictures, as in 5000, or a time",
    }.items():
        assert told in run_arra("guidance", run, *arguments, *on).error, arguments
    assert not (run / "sampling.json").exists()
    assert run_arra("guidance", toy_copy.root, *on).error.startswith(f"{toy_copy.root}: not a run")


def test_settings_that_do_the_same_are_tried_once() -> None:
    own = SamplingSettings(cfg_scale=2, temperature=0.7)
    options = parse_options(cfg="1,2", schedule="constant,cosine,cosine:1", temperature="0.7,0", top_k="0,3,50,60")
    found = candidates(options, own, num_codes=(16, 50))
    # unguided, constant and cosine: each with the whole vocabulary or 3 of it, and greedy, where no filter acts
    assert len(found) == 9
    assert len({effect(each, 16, 50) for each in found}) == 9
    assert found[own] == ("before",)
    assert next(each for each, roles in found.items() if "no guidance" in roles).cfg_scale == 1
    plain = candidates(parse_options(cfg="1"), SamplingSettings(), num_codes=(16, 50))
    assert list(plain.values()) == [("before", "no guidance")]


@pytest.mark.parametrize("text", ["constant", "linear", "cosine:2", "power:2.5", "constant@0.1", "power:2@0.1-0.8"])
def test_schedules_are_read_as_they_are_written(text: str) -> None:
    settings = SamplingSettings(cfg_scale=3, **parse_schedule(text))
    assert schedule_text(settings) == text
    assert short_name(settings) == f"cfg 3 {text}, temp 1"


def test_budgets_are_pictures_or_times() -> None:
    assert (parse_budget("5000").pictures, parse_budget("5000").seconds) == (5000, None)
    assert [parse_budget(text).seconds for text in ("90s", "1.5min", "2h")] == [90, 90, 7200]
    for text in ("0", "1.5", "-3", "min", ""):
        with pytest.raises(ArraError, match=r"expected pictures, as in 5000, or a time"):
            parse_budget(text)


@pytest.mark.usefixtures("without_plots")
def test_a_budget_in_time_is_a_number_of_pictures_from_the_start(
    toy_copy: Any, run_arra: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(guidance_pictures.time, "monotonic", lambda: float(next(clock)))  # a batch takes a second
    run: Path = toy_copy.baseline
    assert run_arra("guidance", run, *FEW, "--budget", "10s").code == 0  # 10 batches of 4 pictures
    found = json.loads((run / "guidance.json").read_text())
    assert (found["pictures_painted"], found["budget"], found["seconds"]) == (40, "10s", 10.0)
    assert (
        "--budget: 5 settings need at least 40 pictures, the budget has 36"
        in run_arra("guidance", run, *FEW, "--budget", "9s").error
    )
