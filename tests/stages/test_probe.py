"""`arra probe` on finished toy runs: what it writes, that it changes nothing, what it proposes and what it refuses."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from arra.config import load_recipe
from arra.errors import ArraError
from arra.stages.painters import load_run
from arra.stages.probe import parse_layers, probe, suggested
from arra.stages.watch import classes_of, halves, open_watcher
from arra.train.watch import Measured
from tests.models.toy_lms import save_toy_lm

ON = ("--split", "train", "--images", 32, "--threads", 1, "--device", "cpu")
"""The toy's validation split is too small to look at."""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_aligned_run_is_looked_at(toy_copy: Any, run_arra: Callable[..., Any]) -> None:
    before = contents(toy_copy.aligned)
    answer = run_arra("probe", toy_copy.aligned, *ON)
    assert (answer.code, answer.err) == (0, "")
    assert "term main at layer 1: cosine" in answer.out
    found = json.loads((toy_copy.aligned / "probe" / "probe.json").read_text())
    assert (found["step"], found["images"], found["layers"], found["aligned"]) == (40, 32, 1, True)
    rows = [row for row in found["rows"] if "term" not in row]
    assert [row["layer"] for row in rows] == [0, 1]
    (term,) = [row for row in found["rows"] if row.get("term") == "main" and row["layer"] == 1]
    assert term["cosine"] > 0.2  # it was trained on these pictures
    assert len(found["maps"]["main/1/cosine"]) == 4
    assert {len(line) for line in found["maps"]["teacher/1/linear_cosine"]} == {4}
    page = (toy_copy.aligned / "probe" / "probe.html").read_text()
    assert "Trained term" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    after = contents(toy_copy.aligned)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"probe/probe.html", "probe/probe.json"}
    again = run_arra("probe", toy_copy.aligned, *ON, "--out", toy_copy.root / "again")
    assert again.code == 0
    assert json.loads((toy_copy.root / "again" / "probe.json").read_text()) == found


def test_checkpoints_and_encoders_are_chosen(toy_copy: Any, run_arra: Callable[..., Any]) -> None:
    out = toy_copy.root / "out"
    more = (*ON, "--out", out)
    assert run_arra("probe", toy_copy.aligned, *more, "--checkpoint", 30).code == 0
    early = json.loads((out / "probe.json").read_text())
    assert run_arra("probe", toy_copy.aligned, *more, "--checkpoint", 40).code == 0
    late = json.loads((out / "probe.json").read_text())
    assert (early["step"], late["step"]) == (30, 40)
    assert early["rows"] != late["rows"]
    # the last checkpoint is the final model
    found = probe(toy_copy.aligned, split="train", images=32, threads=1, device="cpu", out=out)
    assert found.facts["step"] == 40
    for row, other in zip(found.measured.rows, late["rows"], strict=True):
        assert other["layer"] == row["layer"]
        assert other["gva_norm"] == pytest.approx(row["gva_norm"], rel=1e-4)
    assert run_arra("probe", toy_copy.baseline, *more, "--encoder", "judge", "--layers", 1).code == 0
    judged = json.loads((out / "probe.json").read_text())
    assert list(judged["encoders"]) == ["judge"]
    assert [row["layer"] for row in judged["rows"]] == [1]


def test_features_made_now_are_those_of_the_store(pipeline: Any) -> None:
    """Whether a column is there or not, the same pictures have the same features."""
    loaded = load_run(pipeline.baseline)
    assert loaded.store is not None
    teacher = loaded.recipe.encoder.choice("teacher")
    told: dict[str, Any] = {"hidden_size": 32, "text": loaded.model.text_tokenizer, "split": "train", "images": 16}
    stored = open_watcher(loaded.recipe, loaded.store, loaded.tokenizer, {"it": teacher}, **told)
    named = teacher.model_copy(update={"output": "mean"})  # the same by a longer name, which no column has
    made = open_watcher(loaded.recipe, loaded.store, loaded.tokenizer, {"it": named}, **told)
    for side, other in ((stored.fit, made.fit), (stored.score, made.score)):
        for batch, twin in zip(side, other, strict=True):
            assert torch.equal(batch.tokens, twin.tokens)
            assert batch.features is not None
            assert twin.features is not None
            assert torch.allclose(batch.features["it"], twin.features["it"], atol=2e-2)  # stored as float16


def test_a_layer_and_a_weight_are_proposed(toy_copy: Any, run_arra: Callable[..., Any]) -> None:
    answer = run_arra("probe", toy_copy.baseline, *ON, "--suggest", "--share", 1)
    assert answer.code == 0
    assert "heuristic" in answer.out
    found = json.loads((toy_copy.baseline / "probe" / "probe.json").read_text())["suggestion"]
    assert found["layer"] == 1
    (row,) = [row for row in found["evidence"] if row["layer"] == 1]
    assert row["weight"] == pytest.approx(row["ntp_norm"] / row["gva_norm"], rel=0.06)
    assert found["weight"] == row["weight"]
    lines = yaml.safe_load(found["recipe"])
    recipe = load_recipe(
        toy_copy.baseline / "recipe.yaml",
        overrides=[f"align={json.dumps(lines['align'])}"],
    )
    assert recipe.align is not None
    assert (recipe.align.layer, recipe.align.weight) == (1, found["weight"])
    assert "Proposed: layer 1" in (toy_copy.baseline / "probe" / "probe.html").read_text()


def imagined(readable: dict[int, float], *, noise: float) -> Measured:
    """Layers that are read so well on 50 pictures, which differ from each other alike for all layers."""
    drawn = torch.randn(50, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(1)
    measured = Measured()
    for layer, value in readable.items():
        each = value + noise * (drawn - drawn.mean()) + 0.001 * torch.randn(50, generator=own)
        measured.each["teacher", layer] = each
        norms = {"ntp_norm": 1.0, "gva_norm": 0.25, "gradient_cosine": -0.2}
        measured.rows.append({"encoder": "teacher", "layer": layer, **norms})
    return measured


@pytest.mark.parametrize(
    ("readable", "noise", "layer", "clear"),
    [
        ({0: 0.1, 1: 0.2, 2: 0.49, 3: 0.5, 4: 0.51}, 0.1, 2, True),  # as good as the best, within a tenth
        ({0: 0.1, 1: 0.49, 2: 0.5, 3: 0.5, 4: 0.9}, 0.1, 1, True),  # the last layer is the head's
        ({0: 0.6, 1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2}, 0.1, 2, True),
        ({0: 0.0, 1: 0.01, 2: 0.02, 3: 0.015, 4: 0.0}, 0.4, 1, False),  # nothing is read at all
    ],
)
def test_the_lowest_of_the_best_layers_is_proposed(
    readable: dict[int, float], noise: float, layer: int, clear: bool
) -> None:
    recipe = load_recipe("demo", row="baseline")
    choice = recipe.encoder.choice("teacher")
    found = suggested(imagined(readable, noise=noise), "teacher", choice, recipe, 4, 0.5)
    assert (found.layer, found.is_clear) == (layer, clear)
    assert found.weight == 2.0
    assert any("oppose" in reason for reason in found.reasons)
    assert found.recipe == f"align: {{layer: {layer}, weight: 2}}"


def test_a_named_encoder_is_written_into_the_proposal() -> None:
    recipe = load_recipe("demo", row="baseline")
    measured = imagined({1: 0.3}, noise=0.1)
    choice = recipe.encoder.choice("judge")
    lines = yaml.safe_load(suggested(measured, "teacher", choice, recipe, 1, 0.5).recipe)
    assert list(lines) == ["align"]
    measured.each["judge", 1] = measured.each["teacher", 1]
    measured.rows[0]["encoder"] = "judge"
    lines = yaml.safe_load(suggested(measured, "judge", choice, recipe, 1, 0.5).recipe)
    assert lines["encoder"] == {"teacher": {"name": "efficientnet-lite1"}}
    with pytest.raises(ArraError, match=r"--suggest: chooses among layers 1\.\.3; measure them \(--layers\)"):
        suggested(imagined({0: 0.3}, noise=0.1), "teacher", choice, recipe, 4, 0.5)


def test_mistakes_are_told_in_one_line(toy_copy: Any, run_arra: Callable[..., Any], tmp_path: Path) -> None:
    def refused(*arguments: object, run: Path = toy_copy.aligned) -> str:
        return str(run_arra("probe", run, *arguments).error)

    assert "no checkpoint of step 7; there are 30, 40" in refused(*ON, "--checkpoint", 7)
    assert refused(*ON, "--layers", "0-3").startswith("--layers 0-3: layer 2 is outside 0..1 of")
    assert "expected numbers as in 0-3 or 1,5,9" in refused(*ON, "--layers", "one")
    assert "at least 16 are needed, half of them to fit maps on" in refused("--split", "train", "--images", 9)
    assert "no records in split 'nope'" in refused("--split", "nope")
    assert "encoder 'nope'" in refused(*ON, "--encoder", "nope")
    assert "not a run" in refused(*ON, run=tmp_path / "nothing")
    damaged = next((toy_copy.aligned / "checkpoints" / "step-0000030").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "step-0000030: damaged (" in refused(*ON, "--checkpoint", 30)
    shutil.rmtree(toy_copy.store)
    store = json.loads((toy_copy.aligned / "store.json").read_text())
    (toy_copy.aligned / "store.json").write_text(json.dumps({**store, "at_first": str(tmp_path / "gone")}))
    assert "the store it was trained on is gone or has changed" in refused(*ON)


def test_without_its_checkpoint_the_trained_term_is_left_out(toy_copy: Any, run_arra: Callable[..., Any]) -> None:
    shutil.rmtree(toy_copy.aligned / "checkpoints")
    answer = run_arra("probe", toy_copy.aligned, *ON)
    assert answer.code == 0
    assert "the projector is gone" in " ".join(answer.out.split())
    found = json.loads((toy_copy.aligned / "probe" / "probe.json").read_text())
    assert not [row for row in found["rows"] if "term" in row]
    assert len(found["rows"]) == 2


def test_a_language_model_is_looked_at(
    tmp_path: Path, draw_pictures: Callable[[Path], Path], run_arra: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters, whose checkpoints hold nothing else of the model."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    draw_pictures(Path("pictures"))
    save_toy_lm(Path("lm"))
    train = {"steps": 4, "batch_size": 4, "checkpoint_every_steps": 2, "threads": 1, "preview_every_steps": None}
    sections = {
        "data": {"source": "folder", "path": "pictures", "image_size": 16, "encoder_image_size": 48},
        "model": {"llm": {"folder": "painter", "train": "lora", "lora": {"rank": 2}}},
        "align": {"layer": 1, "components": 4},
    }
    Path("toy.yaml").write_text(yaml.safe_dump({"name": "toy", "train": train, **sections}))
    few = (*ON, "--images", 16)
    commands = (
        ("init", "painter", "--llm", "lm", "--tokenizer", "openmoji-vq4", "--image-size", 16),
        ("prepare", "toy.yaml", "--store", "store", "--workers", 0),
        ("train", "toy.yaml", "--store", "store", "--out", "run"),
        ("probe", "run", *few, "--suggest"),
        ("probe", "run", *few, "--checkpoint", 4, "--out", "last"),
        ("probe", "run", *few, "--checkpoint", 2, "--out", "first"),
    )
    for command in commands:
        answer = run_arra(*command)
        assert answer.code == 0, answer
    final, last, first = (json.loads(Path(place, "probe.json").read_text()) for place in ("run/probe", "last", "first"))
    assert [row["layer"] for row in final["rows"] if "term" not in row] == [0, 1, 2]
    for row, other, early in zip(final["rows"], last["rows"], first["rows"], strict=True):
        assert other["ntp_norm"] == pytest.approx(row["ntp_norm"], rel=1e-3)
        assert early["ntp_norm"] != pytest.approx(row["ntp_norm"], rel=1e-6)


def test_layers_are_read() -> None:
    assert parse_layers("0-2, 5,1") == (0, 1, 2, 5)
    for text in ("", "3-1", "-1", "1,,2", "a"):
        with pytest.raises(ArraError, match="expected numbers"):
            parse_layers(text)


def test_a_group_lies_in_one_half() -> None:
    groups = ["a", "b", "a", None, "c", "c", "b", None, "d", "a"]
    one, two = halves(groups)
    assert sorted([*one, *two]) == list(range(10))
    assert abs(len(one) - len(two)) <= 2
    names = [{groups[place] for place in side} - {None} for side in (one, two)]
    assert not names[0] & names[1]
    same, other = halves(["a"] * 9 + ["b"])  # one group is nearly all: nothing better than every other picture
    assert (len(same), len(other)) == (5, 5)


def test_classes_need_members() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 3
    order = np.arange(23)[::-1].copy()
    classes = classes_of(labels, [None] * 23, order)
    assert classes is not None
    assert classes.tolist() == [-1] * 3 + [1] * 10 + [0] * 10
    assert classes_of([None] * 23, [f"g{n % 2}" for n in range(23)], order) is not None  # by group, where no label is
    assert classes_of(list(range(23)), [None] * 23, order) is None
    assert classes_of([0] * 23, [None] * 23, order) is None
