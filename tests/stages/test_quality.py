"""Pictures measured while training: the numbers of an evaluation, and a model that does not notice."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from arra.config import Recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.evaluate.card import measure, values_key
from arra.evaluate.evaluation import encode_all, paint_split
from arra.evaluate.retrieval import retrieval_ranks
from arra.stages.painters import LoadedRun, load_run
from arra.stages.quality import Quality, open_quality
from tests.conftest import Pipeline

IMAGES = 8


@pytest.fixture(scope="module")
def loaded(pipeline: Pipeline) -> LoadedRun:
    torch.set_num_threads(1)
    return load_run(pipeline.baseline)


def recipe_of(loaded: LoadedRun, **train: Any) -> Recipe:
    told = loaded.recipe.model_dump()
    return Recipe.model_validate({**told, "train": {**told["train"], "evaluate_images": IMAGES, **train}})


def store_of(loaded: LoadedRun) -> Store:
    assert loaded.store is not None
    return loaded.store


@pytest.fixture(scope="module")
def quality(loaded: LoadedRun) -> Quality:
    """Over pictures of another split: the toy has too few for validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arra.stages.quality.SPLIT", "train")
        return open_quality(recipe_of(loaded), store_of(loaded), loaded.tokenizer)


def test_numbers_are_those_of_an_evaluation_of_the_same_pictures(loaded: LoadedRun, quality: Quality) -> None:
    found = quality(loaded.model, 10)
    split, settings = quality.split, loaded.recipe.evaluate
    assert len(split.prompts) == IMAGES
    scale = settings.cfg_scales[0]
    images = paint_split(loaded.model, loaded.tokenizer, split, settings, range(IMAGES), range(IMAGES), cfg_scale=scale)
    features, references = encode_all(quality.judge, images), encode_all(quality.judge, split.reconstructions)
    values = {
        values_key("features", split="train", cfg_scale=scale): features,
        values_key("reference/reconstructions", split="train"): references,
        values_key("ranks", split="train", cfg_scale=scale): retrieval_ranks(features, references),
    }
    for metric in ("frechet", "kid_x1000", "retrieval_at_1", "retrieval_at_10"):
        expected = measure(
            values, metric=metric, split="train", cfg_scale=scale, reference="reconstructions",
            num_components=settings.frechet_components, num_resamples=2,
        ).value  # fmt: skip
        assert found.pop(metric) == pytest.approx(expected, rel=1e-9)
    assert not found


def test_the_same_model_has_the_same_quality_and_does_not_notice(loaded: LoadedRun, quality: Quality) -> None:
    model = loaded.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    first = quality(model, 1)
    drawn = torch.rand(1)
    assert quality(model, 2) == first
    assert all(module.training for module in model.modules())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_what_a_model_paints_decides(loaded: LoadedRun, quality: Quality) -> None:
    """A perfect one, whose pictures are the held-out ones as the tokenizer has them, is at no distance."""
    first = quality(loaded.model, 1)
    reached = dataclasses.replace(
        quality.split,
        reconstruction_features=encode_all(
            quality.judge,
            paint_split(
                loaded.model,
                loaded.tokenizer,
                quality.split,
                quality.settings,
                range(IMAGES),
                range(IMAGES),
                cfg_scale=quality.settings.cfg_scales[0],
            ),
        ),
    )
    perfect = dataclasses.replace(quality, split=reached)(loaded.model, 1)
    assert perfect["frechet"] == pytest.approx(0, abs=1e-6)
    assert perfect["frechet"] < first["frechet"]
    assert perfect["kid_x1000"] < first["kid_x1000"]


def test_refusals_name_what_to_do(loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, store = recipe_of(loaded), store_of(loaded)
    with pytest.raises(
        ArraError, match=r"^train.evaluate_every_steps: nothing here turns codes of .* or set it to null"
    ):
        open_quality(recipe, store, None)
    told = recipe.model_dump()
    buckets = Recipe.model_validate({**told, "data": {**told["data"], "crop": {"kind": "buckets"}}})
    with pytest.raises(ArraError, match=r"pictures of many shapes .*set it to null$"):
        open_quality(buckets, store, loaded.tokenizer)
    with pytest.raises(
        ArraError, match=r"3 pictures of split 'validation', train.evaluate_every_steps needs 8 or more"
    ):
        open_quality(recipe, store, loaded.tokenizer)
    unknown = {
        **told,
        "encoder": {**told["encoder"], "judge": {"name": "clip-b32", "weights": str(tmp_path / "no")}},
    }
    monkeypatch.setattr("arra.stages.quality.SPLIT", "train")
    with pytest.raises(ArraError, match=str(tmp_path / "no")):
        open_quality(Recipe.model_validate(unknown), store, loaded.tokenizer)
