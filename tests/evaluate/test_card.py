"""The card as a file: what is written comes back, and what is broken is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arra.errors import ArraError
from arra.evaluate.card import Card, Evaluation, Result, measure, values_key
from arra.evaluate.distances import frechet_distance, kernel_distance
from arra.evaluate.retrieval import recall_at


def test_a_card_comes_back_from_its_json(make_evaluation: Callable[..., Evaluation]) -> None:
    card = make_evaluation("a", quality=0.0, seed=1).card
    assert Card.from_json(card.to_json()) == card


def test_json_has_the_keys_that_other_tools_read() -> None:
    row = Result(metric="nll", split="composed", value=1.5, num_images=3, better="lower", unit="nats/token")
    content = json.loads(Card(run="runs/x", protocol={"seed": 0}, results=(row,)).to_json())
    assert content["run"] == "runs/x"
    assert content["protocol"] == {"seed": 0}
    assert set(content["results"][0]) == {
        *(
            "metric",
            "split",
            "cfg_scale",
            "reference",
            "subject",
            "value",
            "low",
            "high",
            "num_images",
            "better",
            "unit",
            "space",
            "of",
            "is_teachers",
            "note",
        )
    }


def test_an_evaluation_comes_back_from_its_folder(tmp_path: Path, make_evaluation: Callable[..., Evaluation]) -> None:
    written = make_evaluation("a", quality=0.0, seed=1)
    written.save(tmp_path / "run")
    read = Evaluation.load(tmp_path / "run")
    assert read.card == written.card
    assert read.values.keys() == written.values.keys()
    assert all(torch.equal(read.values[key], value) for key, value in written.values.items())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["evaluation.safetensors", "metrics.json"]


def test_measured_rows_are_the_plain_functions(make_evaluation: Callable[..., Evaluation]) -> None:
    evaluation = make_evaluation("a", quality=0.0, seed=1)
    values, rows = evaluation.values, {row.key[:4]: row for row in evaluation.card.results}
    features, reference = values["composed/cfg1/features"], values["composed/reference/reconstructions"]
    key = ("composed", 1.0, "reconstructions")
    assert rows["frechet", *key].value == pytest.approx(frechet_distance(features, reference, num_components=8))
    assert rows["kid_x1000", *key].value == pytest.approx(kernel_distance(features, reference))
    assert rows["retrieval_at_10", *key].value == pytest.approx(recall_at(values["composed/cfg1/ranks"], 10))
    assert rows["nll", "composed", None, None].value == pytest.approx(float(values["composed/nll"].double().mean()))


def test_a_second_judge_keeps_its_own_ranks() -> None:
    values = {"novel/cfg2/caption_ranks": torch.tensor([0, 5, 20]), "novel/cfg2/ranks": torch.tensor([0, 0, 0])}
    row = measure(values, metric="caption_retrieval_at_10", split="novel", cfg_scale=2.0)
    assert row.value == pytest.approx(2 / 3)
    assert row.better == "higher"
    assert row.unit == "fraction"


def test_keys_say_guidance_shortly() -> None:
    assert values_key("nll", split="novel") == "novel/nll"
    assert values_key("features", split="novel", cfg_scale=1.0) == "novel/cfg1/features"
    assert values_key("features", split="novel", cfg_scale=1.5) == "novel/cfg1.5/features"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("protocol"), "no protocol"),
        (lambda content: content.update(extra=1), "unknown extra"),
        (lambda content: content.update(results={}), "`results` must be a list"),
        (lambda content: content["results"][0].pop("value"), r"results\[0\]: no value"),
        (lambda content: content["results"][0].update(value="high"), r"results\[0\]: value: 'high' is not a number"),
        (lambda content: content["results"][0].update(better="bigger"), "'bigger' is not one of lower, higher"),
        (lambda content: content["results"][0].update(typo=1), "unknown typo"),
    ],
)
def test_a_broken_card_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    row = Result(metric="nll", split="composed", value=1.5, num_images=3, better="lower", unit="nats/token")
    content = json.loads(Card(run="runs/x", protocol={}, results=(row,)).to_json())
    change(content)
    with pytest.raises(ArraError, match=message) as caught:
        Card.from_json(json.dumps(content), where="runs/x/metrics.json")
    assert str(caught.value).startswith("runs/x/metrics.json")
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path, make_evaluation: Callable[..., Evaluation]) -> None:
    with pytest.raises(ArraError, match=r"metrics\.json: missing; run `arra evaluate"):
        Evaluation.load(tmp_path)
    make_evaluation("a", quality=0.0, seed=1).save(tmp_path)
    (tmp_path / "evaluation.safetensors").write_bytes(b"cut off")
    with pytest.raises(ArraError, match="cannot read the evaluation"):
        Evaluation.load(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ArraError, match="not JSON"):
        Evaluation.load(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, make_evaluation: Callable[..., Evaluation]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArraError, match="cannot write the evaluation"):
        make_evaluation("a", quality=0.0, seed=1).save(tmp_path / "file")
