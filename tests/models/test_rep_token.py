"""The REP token of decoders: one real position before the codes, in training and in sampling."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from arra.data.batches import HeldOutBatches, TrainBatch, make_batch
from arra.data.conditions import CaptionConditions, ClassConditions, Conditions, TextConditions
from arra.errors import ArraError
from arra.models import load_decoder, save_model
from arra.models.decoder import Condition, Decoder, DecoderSettings
from arra.sample.generate import generate
from arra.stages.model import start_from
from arra.stages.weights import export_weights

GRID, NUM_CODES, POSITIONS = (3, 4), 40, 12
KINDS: dict[str, dict[str, Any]] = {
    "class": {"condition": "class", "num_classes": 5},
    "caption": {"condition": "caption", "caption_dim": 12, "prefix_length": 6},
    "text": {"condition": "text", "text_vocab_size": 30, "prefix_length": 7},
}
PROMPTS = ["", "abc", "abcdef"]


class Letters:
    """A text tokenizer for tests: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 28 for letter in prompt]

    def save(self, path: Any) -> None:
        raise NotImplementedError


def settings_of(kind: str, *, rep_token: bool, **changes: Any) -> DecoderSettings:
    fields = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "num_codes": NUM_CODES, "grid": GRID, **KINDS[kind]}
    if rep_token:
        fields |= {"rep_token": True, "prefix_length": fields.get("prefix_length", 1) + 1}
    return DecoderSettings(**{**fields, **changes})


def tiny(kind: str, *, rep_token: bool = True, **changes: Any) -> Decoder:
    """A decoder with every weight alive."""
    torch.manual_seed(1)
    model = Decoder(settings_of(kind, rep_token=rep_token, **changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.text_tokenizer = Letters()
    return model


def saved(model: Decoder, folder: Path) -> Path:
    model.text_tokenizer = None
    return save_model(model, folder)


def features_of(length: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(3, length, 12, generator=torch.Generator().manual_seed(0))
    return features, torch.arange(length) < torch.tensor([1, 4, length])[:, None]


def asked_of(kind: str) -> dict[str, Any]:
    if kind == "class":
        return {"labels": [0, 4, 2]}
    return {"prompts": PROMPTS} if kind == "text" else {"captions": features_of(6)}


def codes_of(rows: int = 3) -> Tensor:
    return torch.randint(0, NUM_CODES, (rows, POSITIONS), generator=torch.Generator().manual_seed(2))


class Captions:
    """The caption features of `asked_of`, as a store has them: as many vectors as are real."""

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]:
        features, mask = features_of(6)
        return [features[row, : int(mask[row].sum())].numpy() for row in rows.tolist()]

    def expect(self, rows: np.ndarray) -> None:
        pass


def conditions_of(kind: str, *, rep_token: bool = True, **changes: Any) -> Conditions:
    if kind == "class":
        return ClassConditions(torch.tensor([0, 4, 2]), null=5, rep_token=rep_token, **changes)
    if kind == "text":
        ids = [[Letters().encode(prompt)] for prompt in PROMPTS]
        return TextConditions(ids, 7, rep_token=rep_token, **changes)
    return CaptionConditions(np.arange(3), Captions(), 6, 12, rep_token=rep_token, **changes)


def states(model: Decoder, condition: Condition | TrainBatch, codes: Tensor, layer: int = 1) -> Tensor:
    tokens = condition.tokens if isinstance(condition, TrainBatch) else torch.cat([condition.tokens, codes], dim=1)
    output: Tensor = model(tokens[:, :-1], **condition.inputs(), capture=(layer,)).captured[layer]
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_the_rep_state_is_the_one_before_the_first_code(kind: str) -> None:
    """For every length of the condition; a real position in rows of training, of sampling, and of guidance's null."""
    model, length = tiny(kind), settings_of(kind, rep_token=True).prefix_length
    (batch,) = HeldOutBatches(conditions_of(kind), codes_of())
    assert batch.rep_mask is not None
    assert batch.rep_mask.nonzero()[:, 1].tolist() == [length - 1] * 3
    assert (batch.predicting.int().argmax(1) == length - 1).all()
    assert not (batch.rep_mask & batch.code_mask).any()
    told = model.condition(**asked_of(kind))
    for condition in (told, model.null_condition(told)):
        assert condition.tokens.shape == (3, length)
        assert condition.prefix_mask is None or condition.prefix_mask[:, -1].all()
        embedded = states(model, condition, codes_of(), layer=0)
        assert torch.equal(embedded[:, length - 1], model.rep_embedding.weight.expand(3, -1))
    assert batch.prefix_mask is None or batch.prefix_mask[:, -1].all()
    torch.testing.assert_close(states(model, batch, codes_of()), states(model, told, codes_of()))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_conditions_have_it_as_well(kind: str) -> None:
    """What training drops is the null row of sampling."""
    model = tiny(kind)
    prefix = conditions_of(kind, dropout=1.0).take(torch.arange(3), torch.zeros(3, 3), torch.ones(3, 7))
    batch = make_batch(prefix, codes_of())
    null = model.null_condition(model.condition(**asked_of(kind)))
    torch.testing.assert_close(states(model, batch, codes_of()), states(model, null, codes_of()))
    assert batch.rep_mask is not None
    assert batch.rep_mask.sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_chances_with_and_without(kind: str) -> None:
    """A run with the token drops, replaces and shortens the same conditions as one without it."""
    plain, rep = (conditions_of(kind, rep_token=wanted, dropout=0.5) for wanted in (False, True))
    assert plain.length == rep.length
    chance = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    one, other = (each.take(torch.arange(3), chance, torch.ones(3, each.length)) for each in (plain, rep))
    assert torch.equal(one.tokens, other.tokens[:, :-1])
    assert one.mask is None or torch.equal(one.mask, other.mask[:, :-1])  # type: ignore[index]
    assert make_batch(one, codes_of()).rep_mask is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cuts", [(), "prefix", "each"])
def test_cached_decoding_equals_full_forward(kind: str, cuts: Any, grad: bool) -> None:
    """By the ordinary blocks, and without gradients by the short way of single steps, REP among them."""
    model = tiny(kind)
    condition, length = model.condition(**asked_of(kind)), model.settings.prefix_length
    tokens = torch.cat([condition.tokens, codes_of()[:, :-1]], dim=1)
    with torch.set_grad_enabled(grad):
        full = model(tokens, **condition.inputs(), capture=(0, 1, 2))
        cache = model.new_cache(3)
        inner: Any = {(): (), "prefix": (length - 1, length), "each": range(1, tokens.shape[1])}[cuts]
        parts = [
            model(tokens[:, start:end], **condition.inputs(), capture=(0, 1, 2), cache=cache, start=start)
            for start, end in pairwise([0, *inner, tokens.shape[1]])
        ]
    assert cache.length == tokens.shape[1]
    close: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-5}
    torch.testing.assert_close(torch.cat([part.last_hidden for part in parts], 1), full.last_hidden, **close)
    for layer in range(3):
        torch.testing.assert_close(
            torch.cat([part.captured[layer] for part in parts], 1), full.captured[layer], **close
        )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_images_are_what_teacher_forcing_says(kind: str) -> None:
    model = tiny(kind)
    result = generate(model, seeds=[0, 1, 2], temperature=0.0, **asked_of(kind))
    with torch.no_grad():
        logits = model.logits(result.codes, **asked_of(kind))
    assert torch.equal(logits.argmax(-1).view_as(result.codes), result.codes)
    guided = generate(model, seeds=[0, 1, 2], temperature=0.0, cfg_scale=3.0, **asked_of(kind))
    told = model.condition(**asked_of(kind))
    with torch.no_grad():
        cond, uncond = (
            model.head(
                model(torch.cat([rows.tokens, guided.codes.flatten(1)[:, :-1]], 1), **rows.inputs()).last_hidden
            )[:, model.settings.prefix_length - 1 :]
            for rows in (told, model.null_condition(told))
        )
    assert torch.equal((uncond + (cond - uncond) * 3.0).argmax(-1).view_as(guided.codes), guided.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_see_the_token_and_it_sees_its_own_condition(kind: str) -> None:
    """Another vector changes what follows and nothing before; its state is a function of the condition."""
    model, length = tiny(kind), settings_of(kind, rep_token=True).prefix_length
    condition = model.condition(**asked_of(kind))
    before = states(model, condition, codes_of(), layer=2)
    with torch.no_grad():
        model.rep_embedding.weight += 1
    after = states(model, condition, codes_of(), layer=2)
    assert torch.equal(before[:, : length - 1], after[:, : length - 1])
    assert (before[:, length - 1 :] != after[:, length - 1 :]).any(-1).all()
    assert len(after[:, length - 1].unique(dim=0)) == 3
    rotary = model.rotary.table[length - 1]
    assert (rotary[:, 0] == 1).all()
    assert (rotary[:, 1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained(kind: str) -> None:
    model = tiny(kind)
    condition = model.condition(**asked_of(kind))
    states(model, condition, codes_of())[:, model.settings.prefix_length - 1].square().sum().backward()
    assert model.rep_embedding.weight.grad is not None
    assert (model.rep_embedding.weight.grad != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_other_first_weights_are_those_without_it(kind: str) -> None:
    models = []
    for wanted in (False, True):
        torch.manual_seed(3)
        models.append(Decoder(settings_of(kind, rep_token=wanted)))
    plain, rep = (model.state_dict() for model in models)
    assert [*rep] == [*plain, "rep_embedding.weight"]
    assert all(torch.equal(rep[name], value) for name, value in plain.items())
    assert rep["rep_embedding.weight"].shape == (1, 32)
    assert 0 < float(rep["rep_embedding.weight"].std()) < 0.04
    assert torch.equal(models[1].rotary.table[:-13], models[0].rotary.table[:-12])
    assert torch.equal(models[1].rotary.table[-12:], models[0].rotary.table[-12:])


def test_settings_count_the_token() -> None:
    assert DecoderSettings(num_layers=1, num_heads=1, hidden_size=8, rep_token=True).prefix_length == 2
    captions = DecoderSettings(num_layers=1, num_heads=1, hidden_size=8, rep_token=True, condition="caption")
    assert (captions.prefix_length, captions.condition_length) == (121, 120)
    with pytest.raises(ValidationError, match="prefix_length: a class takes one position, got 2"):
        settings_of("class", rep_token=True, prefix_length=3)
    for kind in ("class", "caption"):
        with pytest.raises(ValidationError, match="prefix_length: 1 leaves no position beside the REP token"):
            settings_of(kind, rep_token=True, prefix_length=1)
    with pytest.raises(ArraError, match="prompt: 7 tokens and the begin-of-image token do not fit the 7 prefix"):
        tiny("text").condition(prompts=["abcdefg"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_it_and_llamagens_file_does_not(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    folder = saved(model, tmp_path / "model")
    again = load_decoder(folder)
    assert again.settings == model.settings
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    bare = load_decoder("llamagen", weights=folder / "model.safetensors", num_heads=4, grid=GRID)
    assert (bare.settings.rep_token, bare.settings.prefix_length) == (True, model.settings.prefix_length)
    with pytest.raises(ArraError, match="LlamaGen cannot run this decoder: it was trained with the REP token") as told:
        export_weights(folder, tmp_path / "out.pt")
    assert "\n" not in str(told.value)


def test_an_older_folder_has_none(tmp_path: Path) -> None:
    model = tiny("class", rep_token=False)
    folder = saved(model, tmp_path / "model")
    card = json.loads((folder / "model.json").read_text())
    assert card["settings"].pop("rep_token") is False
    (folder / "model.json").write_text(json.dumps(card))
    assert load_decoder(folder).settings == model.settings


@pytest.mark.parametrize("kind", KINDS)
def test_given_weights_without_it_get_a_fresh_one(kind: str, tmp_path: Path) -> None:
    given = tiny(kind, rep_token=False)
    saved(given, tmp_path / "given")
    torch.manual_seed(5)
    model = Decoder(settings_of(kind, rep_token=True))
    fresh = model.rep_embedding.weight.detach().clone()
    start_from(model, str(tmp_path / "given"))
    assert torch.equal(model.rep_embedding.weight, fresh)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in given.state_dict().items())
    trained = tiny(kind)
    saved(trained, tmp_path / "trained")
    start_from(model, str(tmp_path / "trained"))
    assert torch.equal(model.rep_embedding.weight, trained.rep_embedding.weight)
    with pytest.raises(ArraError, match=r"trained was trained with the REP token .* no term of align has target rep"):
        start_from(Decoder(settings_of(kind, rep_token=False)), str(tmp_path / "trained"))


def test_the_prefix_is_still_compared(tmp_path: Path) -> None:
    given = tiny("text", rep_token=False, prefix_length=6)
    saved(given, tmp_path / "given")
    with pytest.raises(ArraError, match="given has prefix_length 6, the recipe's model 7"):
        start_from(Decoder(settings_of("text", rep_token=True)), str(tmp_path / "given"))
