"""Runs with target `rep`: trained with the token, saved with it, painting with it; nothing else is another run's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import arra
from arra.config import Recipe, parse_recipe
from arra.data.store import Store
from arra.models import CausalLM, Decoder
from arra.stages.init import init_painter
from arra.stages.tokenizer import load_named
from arra.stages.train import train
from arra.stages.training_data import training_data
from tests.models.toy_lms import save_toy_lm

FEW: dict[str, Any] = {
    "steps": 3, "batch_size": 4, "checkpoint_every_steps": 3, "validate_every_steps": 3, "preview_every_steps": None,
}  # fmt: skip


def recipe_of(pipeline: Any, *, target: str, **sections: Any) -> Recipe:
    content = yaml.safe_load((pipeline.aligned / "recipe.yaml").read_text())
    told = {
        **content, "align": {**content["align"], "target": target}, "train": {**content["train"], **FEW}, **sections,
    }  # fmt: skip
    return parse_recipe(yaml.safe_dump(told), Recipe, source="toy")


def test_a_decoder_from_training_to_painting(pipeline: Any, tmp_path: Path) -> None:
    store, recipe = Store.open(pipeline.store), recipe_of(pipeline, target="rep")
    tokenizer = load_named(recipe)
    data, plain = (training_data(told, store, tokenizer) for told in (recipe, recipe_of(pipeline, target="hybnext")))
    batch, other = data.batches.batch(0), plain.batches.batch(0)
    assert batch.rep_mask is not None
    assert other.rep_mask is None
    place = int(batch.rep_mask[0].nonzero())
    assert place == recipe.model.prefix_length
    assert torch.equal(torch.cat([batch.tokens[:, :place], batch.tokens[:, place + 1 :]], 1), other.tokens)
    run = train(recipe, store, tmp_path / "run")
    model = arra.load_model(run.path)
    assert isinstance(model, Decoder)
    assert (model.settings.rep_token, model.settings.condition_length) == (True, recipe.model.prefix_length)
    assert run.read_metrics()[0]["gva_loss"] is not None
    result = arra.generate(model, None, prompts=["a red bar"], seeds=[0], temperature=0, cfg_scale=2.0)
    assert result.codes.shape == (1, *model.settings.grid)
    further = recipe_of(
        pipeline, target="rep", model={**recipe.model.model_dump(mode="json"), "weights": str(run.path)}
    )
    again = train(further, store, tmp_path / "again")
    assert "rep_embedding.weight" in arra.load_model(again.path).state_dict()


def test_a_language_model_from_training_to_painting(pipeline: Any, tmp_path: Path) -> None:
    store = Store.open(pipeline.store)
    llm = str(save_toy_lm(tmp_path / "lm", "smollm"))
    folder = init_painter(llm, tmp_path / "painter", tokenizer="openmoji-vq4", image_size=16, rep_token=True).path
    section = {"llm": {"folder": str(folder), "train": "lora", "lora": {"rank": 2}}}
    recipe = recipe_of(pipeline, target="rep", model=section)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"optimizer": "adamw"})})
    run = train(recipe, store, tmp_path / "run")
    before, model = arra.load_model(folder), arra.load_model(run.path)
    assert isinstance(before, CausalLM)
    assert isinstance(model, CausalLM)
    token = before.layout.rep_id
    assert token is not None
    assert (before.layout.rep, model.layout.rep) == (None, token)
    tables = [each.lm.get_input_embeddings().weight for each in (before, model)]  # type: ignore[operator]
    assert not torch.equal(tables[0][token], tables[1][token])  # adapters leave rows alone, but for those of images
    assert torch.equal(tables[0][:300], tables[1][:300])
    told = model.condition(prompts=["a red bar", ""])
    for rows in (told, model.null_condition(told)):
        assert rows.tokens.eq(token).sum(1).tolist() == [1, 1]
    result = arra.generate(model, None, prompts=["a red bar"], seeds=[0], temperature=0)
    with torch.no_grad():
        assert torch.equal(model.logits(result.codes, prompts=["a red bar"]).argmax(-1), result.codes.flatten(1))


@pytest.mark.parametrize("target", ["rep", "hybnext"])
def test_weight_zero_trains_the_model_with_the_token(pipeline: Any, tmp_path: Path, target: str) -> None:
    """The projector's gradient is none, and what is measured leaves the run alone: the same bits with another layer."""
    store, states = Store.open(pipeline.store), []
    for layer in (0, 1):
        recipe = recipe_of(pipeline, target=target)
        told = recipe.model_copy(update={"align": recipe.align.model_copy(update={"weight": 0.0, "layer": layer})})  # type: ignore[union-attr]
        states.append(arra.load_model(train(told, store, tmp_path / str(layer)).path).state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert ("rep_embedding.weight" in states[0]) == (target == "rep")
