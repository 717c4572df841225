"""A decoder under `transformers`: the same numbers and pictures as under our engine, and nothing lost on the way."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import arra
from arra.errors import ArraError
from arra.models import Decoder, load_decoder, save_model
from arra.sample.generate import generate
from arra.sample.logits import SamplingSettings
from arra.sample.processors import code_processors
from arra.stages.painters import load_painter
from arra.stages.weights import export_weights
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.text import train_text_tokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.models.toys import toy_decoder

transformers: Any = pytest.importorskip("transformers")

CAPTION: dict[str, Any] = {"condition": "caption", "caption_dim": 6, "prefix_length": 7, "grid": (3, 3)}
WORDS = ["red heart", "blue heart on fire", ""]
TEXT: dict[str, Any] = {"condition": "text", "text_vocab_size": 300, "prefix_length": 9, "num_kv_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "class": {"num_classes": 5, "grid": (3, 4)},
    "class, REP": {"num_classes": 5, "rep_token": True},
    "caption": CAPTION,
    "caption, REP": {**CAPTION, "prefix_length": 8, "rep_token": True},
    "text": TEXT,
    "text, REP": {**TEXT, "prefix_length": 10, "rep_token": True, "grid": (2, 3)},
}


def made(kind: str) -> Decoder:
    model = toy_decoder(**KINDS[kind])
    for block in model.layers:  # lively, but not so much that the next code is certain
        for parameter in block.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    if model.settings.condition == "text":
        model.text_tokenizer = train_text_tokenizer(WORDS, vocab_size=300)
    return model


def asked(model: Decoder) -> dict[str, Any]:
    """Conditions of three rows, for our engine and for `inputs`."""
    if model.settings.condition == "class":
        return {"labels": [0, 3, 4]}
    if model.settings.condition == "text":
        return {"prompts": WORDS}
    features = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    return {"captions": (features, torch.tensor([[0, 1, 0, 1, 1, 1, 0], [1] * 7, [0] * 6 + [1]]))}


def saved(model: Decoder, folder: Path) -> Any:
    """The model of the exported folder, as `transformers` opens it."""
    save_model(model, folder / "model")
    export_weights(folder / "model", folder / "exported", to="hf")
    arra.register_with_transformers()
    lm, info = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported", output_loading_info=True)
    assert not any(info.values())
    return lm


@pytest.fixture(params=[*KINDS], scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    torch.manual_seed(0)
    model = made(request.param)
    return model, saved(model, tmp_path_factory.mktemp("pair"))


def codes_of(model: Decoder, tokens: Tensor) -> Tensor:
    return tokens[:, model.settings.prefix_length :].unflatten(1, model.settings.grid)


@torch.no_grad()
def test_logits_are_our_decoders(pair: tuple[Decoder, Any]) -> None:
    """Read at once and with a cache in pieces; a condition's token can never follow."""
    model, lm = pair
    settings, inputs = model.settings, lm.inputs(**asked(model))
    codes = torch.randint(16, (3, settings.num_positions), generator=torch.Generator().manual_seed(1))
    expected = model.logits(codes, **asked(model))
    told = {"caption": inputs["caption"]} if "caption" in inputs else {}
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(codes)], 1)
    tokens = torch.cat([inputs["input_ids"], codes], 1)
    logits = lm(tokens, attention_mask=mask, **told).logits
    assert logits.shape == (*tokens.shape, lm.config.vocab_size)
    torch.testing.assert_close(logits[:, settings.prefix_length - 1 : -1, :16], expected, atol=1e-4, rtol=1e-4)
    assert (logits[..., 16:] == torch.finfo(torch.float32).min).all()
    cache, found = None, []
    for piece in tokens.split([settings.prefix_length, 1, 2, settings.num_positions - 3], dim=1):
        end = (0 if cache is None else cache.get_seq_length()) + piece.shape[1]
        output = lm(piece, attention_mask=mask[:, :end], **told, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_greedy_pictures_are_our_engines(pair: tuple[Decoder, Any], cfg_scale: float) -> None:
    """With the library's own guidance; with and without a cache."""
    model, lm = pair
    ours = generate(model, seeds=[0] * 3, cfg_scale=cfg_scale, temperature=0, **asked(model)).codes
    inputs = lm.inputs(**asked(model))
    tokens = lm.generate(**inputs, do_sample=False, guidance_scale=cfg_scale)
    assert torch.equal(codes_of(model, tokens), ours)
    assert len({tuple(row) for row in ours.flatten(1).tolist()}) > 1
    whole = lm.generate(**inputs, do_sample=False, guidance_scale=cfg_scale, use_cache=False)
    assert torch.equal(whole, tokens)


def test_a_seeds_picture_is_our_engines(pair: tuple[Decoder, Any]) -> None:
    """Under a schedule of guidance that begins late and ends early, with filters; two pictures of each condition."""
    model, lm = pair
    sampling = SamplingSettings(
        cfg_scale=3.0, cfg_schedule="cosine", cfg_start=0.3, cfg_stop=0.8, temperature=0.9, top_k=12, top_p=0.95
    )
    ours = generate(model, seeds=[5, 6], **asked(model), **sampling.model_dump()).codes
    steps = code_processors(lm, sampling=sampling, seeds=[5, 6] * 3)
    told: dict[str, Any] = {"do_sample": False, "num_beams": 1, "logits_processor": steps}
    rows = torch.arange(3).repeat_interleave(2)
    inputs = {name: value[rows] for name, value in lm.inputs(**asked(model)).items()}
    assert torch.equal(codes_of(model, lm.generate(**inputs, **told)), ours)
    with pytest.raises(ArraError, match="seeds: 6 for 3 rows; give one for each"):
        lm.generate(**lm.inputs(**asked(model)), **{**told, "logits_processor": steps})


def test_several_pictures_of_a_condition(pair: tuple[Decoder, Any]) -> None:
    """Drawn by the library, under its guidance: each picture has an unconditional twin of its own."""
    model, lm = pair
    torch.manual_seed(0)
    told = {**lm.inputs(**asked(model)), "num_return_sequences": 4, "guidance_scale": 2.5}
    codes = codes_of(model, lm.generate(**told))
    assert len(codes) == 12
    assert codes.max() < 16
    assert len({tuple(row) for row in codes[:4].flatten(1).tolist()}) > 1
    ours = generate(model, seeds=[0] * 3, cfg_scale=2.5, temperature=0, **asked(model)).codes
    assert torch.equal(codes_of(model, lm.generate(**told, top_k=1)), ours.repeat_interleave(4, dim=0))


@torch.no_grad()
def test_beams_under_guidance(pair: tuple[Decoder, Any]) -> None:
    """Their rows change places, so both caches have to follow: the score of what is found is that of a whole pass."""
    model, lm = pair
    steps = code_processors(lm, sampling=SamplingSettings(cfg_scale=2.0))
    told: dict[str, Any] = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "output_scores": True}
    found = lm.generate(**lm.inputs(**asked(model)), logits_processor=steps, return_dict_in_generate=True, **told)
    codes = codes_of(model, found.sequences)
    null = null_logits(model, codes)
    guided = null + 2.0 * (model.logits(codes, **asked(model)).log_softmax(-1) - null)
    expected = guided.gather(2, codes.flatten(1)[..., None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def null_logits(model: Decoder, codes: Tensor) -> Tensor:
    condition = model.null_condition(model.condition(**asked(model)))
    tokens = torch.cat([condition.tokens, codes.flatten(1)[:, :-1]], 1)
    return model.head(model(tokens, **condition.inputs()).last_hidden[:, model.settings.prefix_length - 1 :])


def test_a_picture_begun_is_finished(tmp_path: Path) -> None:
    """Codes behind the condition are read with it; the null condition may be given by hand."""
    model = made("class")
    lm = saved(model, tmp_path)
    given = torch.tensor([[3, 1, 4, 1, 5]])
    ours = generate(model, labels=[2], seeds=[0], temperature=0, cfg_scale=2.0, prefix_codes=given).codes
    begun, null = (torch.cat([torch.tensor([[first]]), given], 1) for first in (18, 21))
    for told in ({}, {"negative_prompt_ids": null}):
        tokens = lm.generate(begun, **told, guidance_scale=2.0, do_sample=False, max_new_tokens=7)
        assert torch.equal(codes_of(model, tokens), ours)


@pytest.mark.parametrize("kind", ["text", "caption, REP"])
def test_the_folder_is_ours_as_well(kind: str, tmp_path: Path) -> None:
    """Exported, opened by `transformers`, saved from there: the weights, card and text tokenizer of the first model."""
    model = made(kind)
    model.about = {"sampling": {"cfg_scale": 3.0, "temperature": 0.5, "top_k": 7}, "licence": "mit"}
    lm = saved(model, tmp_path)
    assert (lm.generation_config.temperature, lm.generation_config.top_k) == (0.5, 7)
    lm.save_pretrained(tmp_path / "again")
    state = lm.state_dict()
    lm.load_state_dict(load_file(tmp_path / "again" / "model.safetensors"))  # as Trainer does when it goes on
    assert all(torch.equal(lm.state_dict()[key], value) for key, value in state.items())
    weights = (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    for folder in ("exported", "again"):
        back = load_decoder(tmp_path / folder)
        assert (back.settings, back.about) == (model.settings, model.about)
        assert all(torch.equal(back.state_dict()[key], value) for key, value in model.state_dict().items())
        ours = generate(model, seeds=[1] * 3, **asked(model)).codes
        assert torch.equal(generate(back, seeds=[1] * 3, **asked(model)).codes, ours)
    card = (tmp_path / "exported" / "README.md").read_text()
    for words in ("license: mit", "library_name: transformers", "guidance_scale=3.0", "AutoModelForCausalLM"):
        assert words in card


def test_half_precision_is_kept_or_made(tmp_path: Path) -> None:
    save_model(made("class").bfloat16(), tmp_path / "half")
    arra.register_with_transformers()
    for name, told, kind in (("kept", None, torch.bfloat16), ("wide", "float32", torch.float32)):
        export_weights(tmp_path / "half", tmp_path / name, to="hf", dtype=told)
        lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {parameter.dtype for parameter in lm.parameters()} == {kind}
        assert lm.decoder.rotary.table.dtype == torch.float32
        assert torch.equal(lm.decoder.rotary.table, made("class").rotary.table)
        assert lm.inputs(labels=[1])["input_ids"].tolist() == [[17]]
        assert lm.generate(**lm.inputs(labels=[1])).shape == (1, 13)


def test_the_readmes_lines_paint(tmp_path: Path, run_arra: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with the image tokenizer that lay in the model's folder; and `arra` paints with the folder."""
    save_model(made("class"), tmp_path / "model")
    vq = VQModel(VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=16, code_dim=4))
    ImageTokenizer(vq, name="tiny", weights_hash=None).save(tmp_path / "model" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    answer = run_arra("export", "model", "exported", "--to", "hf")
    assert answer.code == 0
    assert answer.out.splitlines()[-1] == "exported"
    assert "arra.register_with_transformers()" in answer.out
    lines = (tmp_path / "exported" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    found: dict[str, Any] = {}
    exec(lines.replace("FOLDER_OR_REPOSITORY", "exported"), found)
    assert found["images"].shape == (1, 6, 8, 3)
    assert found["tokens"][0, 0] == 16 + 4
    assert load_painter(Path("exported")).tokenizer.name == "tiny"
    assert len({file.stat().st_mode for file in Path("exported").glob("*.*")}) == 1  # safetensors' too


@pytest.mark.parametrize("kind", ["class", "text, REP"])
def test_it_learns(kind: str, tmp_path: Path) -> None:
    """The library's loss: every code's own, gradients reach every weight, conditions are not to be predicted."""
    model = made(kind)
    lm = saved(model, tmp_path)
    inputs = lm.inputs(**asked(model))
    codes = torch.randint(16, (3, model.settings.num_positions), generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([inputs["input_ids"], codes], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(codes)], 1)
    output = lm(tokens, attention_mask=mask, labels=tokens)
    expected = torch.nn.functional.cross_entropy(model.logits(codes, **asked(model)).flatten(0, 1), codes.flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())
    assert lm.train()(tokens, attention_mask=mask, labels=tokens).past_key_values is None


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = made("text")
    lm = saved(model, tmp_path)
    inputs = lm.inputs(prompts=WORDS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    picture = saved(made("caption"), tmp_path / "caption")
    captioned = picture.inputs(**asked(made("caption")))
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: lm(ids[:, 1:], attention_mask=mask[:, 1:]), r"expected 9 ids from 16 on .* model\.inputs\(prompts"),
        (lambda: lm(ids - 16), "expected 9 ids from 16 on"),
        (lambda: lm(ids, attention_mask=torch.ones_like(ids)), "padding of the condition is to be seen"),
        (lambda: lm.generate(**inputs, max_new_tokens=6), r"14 positions, .* 9 for the condition and 4 for codes"),
        (lambda: lm.generate(**inputs, cache_implementation="static"), "a cache of fixed size"),
        (
            lambda: lm.generate(**inputs, guidance_scale=2.0, num_beams=2),
            r"follow beams; .* pass logits_processor=arra",
        ),
        (lambda: lm.save_pretrained(tmp_path / "up", push_to_hub=True), r"call model\.push_to_hub"),
        (lambda: picture(captioned["input_ids"]), "the features of the caption are missing"),
        (lambda: lm.inputs(labels=[1]), "conditioned on text, got class"),
    ]
    for call, message in mistakes:
        with pytest.raises(ArraError, match=message):
            call()


def test_the_commands_refusals(tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    save_model(made("class"), tmp_path / "model")
    vq = VQModel(VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=16, code_dim=4))
    ImageTokenizer(vq, name="tiny", weights_hash=None).save(tmp_path / "vq")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    out = tmp_path / "out"
    mistakes: list[tuple[list[Any], str]] = [
        (["model", out, "--to", "lumina"], "writes a language model, and .* is none of arra's; use hf, llamagen"),
        (["model", out, "--to", "hf", "--layout", "fsdp"], "--to hf writes a folder; leave it out"),
        (["model", out, "--to", "hf", "--dtype", "int8"], "--dtype int8: unknown"),
        (["model", tmp_path / "used", "--to", "hf"], "exists already; name a new folder"),
        (
            ["vq", out, "--to", "hf"],
            "an image tokenizer, which transformers has no class for; use llamagen or chameleon",
        ),
        (["model", out, "--to", "onnx"], "--to onnx: unknown; expected hf"),
    ]
    for (source, *rest), message in mistakes:
        answer = run_arra("export", tmp_path / source, *rest)
        assert answer.code == 2
        assert re.search(message, answer.error), (rest, answer.error)
    assert not out.exists()
