"""Drawn shapes with classes through every stage: a model that is asked for a class, and read from its pixels."""

from pathlib import Path

from arra.config import Recipe, parse_recipe
from arra.data.shapes import CLASS_NAMES
from arra.models import Decoder
from arra.stages.evaluate import evaluate
from arra.stages.painters import load_run
from arra.stages.prepare import PrepareOptions, prepare
from arra.stages.train import train

RECIPE = """
# evaluated on what it was trained on: so small a set has one picture of test
name: classes
data: {sources: [{kind: shapes, classes: true, num_images: 20}], image_size: 16, encoder_image_size: 48}
encoder: {judge: efficientnet-lite0}
model: {condition: class, num_layers: 1, num_heads: 2, hidden_size: 16}
align: null
caption_judge: null
train: {steps: 2, batch_size: 4, warmup_steps: 0, preview_every_steps: null, threads: 1}
evaluate: {splits: [train], max_images: 8, num_resamples: 2, frechet_components: 2, cfg_scales: [1.0]}
"""


def test_a_class_is_asked_for_by_its_caption_and_read_from_the_picture(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, Recipe, source="classes")
    store = prepare(recipe, tmp_path / "store", options=PrepareOptions(workers=0)).checked()
    assert store.about["classes"] == list(CLASS_NAMES)
    run = train(recipe, store, tmp_path / "run")
    model = load_run(run.path).model
    assert isinstance(model, Decoder)
    assert (model.settings.num_classes, model.about["class_names"]) == (24, list(CLASS_NAMES))
    card = evaluate(run.path, threads=1).card
    found = {row.metric for row in card.results if row.subject == "model"}
    assert {"nll", "class_gain", "class_retrieval_at_1", "accuracy.all", "frechet"} <= found
    assert not any("caption" in name for name in found)
