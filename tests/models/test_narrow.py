"""Narrower weights: as near as their bits allow, smaller, painting the same pictures at any batch size, never saved."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, Decoder, Painter, load_model, save_model
from arra.models.narrow import GROUP_SIZE, narrow_weights, stored_bytes
from arra.models.products import is_plain
from arra.sample.generate import generate
from arra.tokenizers.prompts import prompt_tokenizer
from tests.models.toy_lms import toy_lm, toy_words
from tests.models.toys import toy_decoder

GRID, TEXT, CODES = (2, 3), 300, 16
CAST, WHOLE = ["bfloat16", "float16"], ["int8", "int4"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01, "int8": 0.08, "int4": 0.5}
"""Root mean square of a logit's error in units of the logits' spread, for weights that are all noise."""


@pytest.fixture(params=[*CAST, *WHOLE])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param in WHOLE:
        pytest.importorskip("torchao", reason="the extra 'lean' is not installed")
    return request.param


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization", reason="the extra 'lean' is not installed")


def decoder(**changes: Any) -> Decoder:
    """Wide enough for groups of 4 bits; layer norms of one, logits of some spread."""
    fields = {"hidden_size": 64, "grid": GRID, "num_classes": 10, "num_codes": CODES, **changes}
    model = toy_decoder(**fields)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return model


def language_model(family: str = "smollm") -> CausalLM:
    """Smollm's embeddings are its head."""
    layout = ImageLayout(
        family="generic", bos=0, begin_image=TEXT, end_image=TEXT + 1, new_line=TEXT + 2, first_size=TEXT + 2,
        num_sizes=8, closing=(1,), first_code=TEXT + 11, num_codes=CODES, unconditional="empty_prompt",
        max_positions=512,
    )  # fmt: skip
    text = prompt_tokenizer(toy_words().backend_tokenizer.to_str(), reserved=layout.reserved(), source="toy")
    wide = {} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    lm = toy_lm(family, rows=TEXT + 11 + CODES, **wide)
    return CausalLM(lm, layout=layout, grid=GRID, text_tokenizer=text)


MODELS: dict[str, Callable[[], Painter]] = {"decoder": decoder, "language": language_model}


def asked(model: Painter, count: int) -> dict[str, Any]:
    if isinstance(model, Decoder):
        return {"labels": list(range(count))}
    return {"prompts": ["a red bar", "the green circle", "", "blue", "an orange frame"][:count]}


@torch.no_grad()
def logits(model: Painter) -> Tensor:
    codes = torch.randint(CODES, (3, 6), generator=torch.Generator().manual_seed(1))
    return model.logits(codes, **asked(model, 3))


def linear_layers(model: Painter) -> dict[str, nn.Linear]:
    """All but the head."""
    named = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    return {name: layer for name, layer in named.items() if name not in ("output", "lm.lm_head")}


@pytest.mark.parametrize("family", MODELS)
def test_logits_stay_near_and_are_float32(family: str, kind: str) -> None:
    model = MODELS[family]()
    wanted = logits(model)
    narrow_weights(model, kind)
    found = logits(model)
    assert found.dtype == torch.float32
    error = (found - wanted).square().mean().sqrt() / wanted.std()
    assert 0 < error < TOLERANCE[kind]


@pytest.mark.parametrize("family", MODELS)
def test_a_picture_is_the_same_at_any_batch_size(family: str, kind: str) -> None:
    model = MODELS[family]()
    narrow_weights(model, kind)
    told = {"seeds": range(5), "cfg_scale": 2.0, **asked(model, 5)}
    whole = generate(model, **told, batch_size=5).codes
    assert len({tuple(row) for row in whole.flatten(1).tolist()}) == 5
    for size in (1, 2, 3):
        assert torch.equal(generate(model, **told, batch_size=size).codes, whole), size


@pytest.mark.parametrize("family", MODELS)
def test_decoding_step_by_step_is_the_whole_forward(family: str, kind: str) -> None:
    model = MODELS[family]()
    narrow_weights(model, kind)
    seen: dict[int, Tensor] = {}
    codes = generate(
        model, seeds=range(3), **asked(model, 3), watch=lambda _, index, found: seen.update({index: found})
    )
    with torch.no_grad():
        wanted = model.logits(codes.codes, **asked(model, 3))
    found = torch.stack([seen[index] for index in range(6)], 1)
    assert (found - wanted).square().mean().sqrt() < (1e-2 if kind == "float16" else 5e-2) * wanted.std()


@pytest.mark.parametrize("family", MODELS)
def test_bytes_by_arithmetic(family: str, kind: str) -> None:
    model = MODELS[family]()
    layers = linear_layers(model)
    matrices = sum(layer.weight.numel() for layer in layers.values())
    rows = sum(layer.out_features for layer in layers.values())
    assert matrices > 0
    every = sum(map(stored_bytes, model.parameters())) // 4
    narrow_weights(model, kind)
    rest = 2 * (every - matrices)
    if kind == "int4":  # half a byte, and for each group two numbers of two bytes
        assert sum(map(stored_bytes, model.parameters())) == rest + matrices // 2 + 4 * matrices // GROUP_SIZE
    elif kind == "int8":  # a byte, and for each row a scale and a zero point that is none
        assert rest + matrices + 4 * rows <= sum(map(stored_bytes, model.parameters())) <= rest + matrices + 5 * rows
    else:
        assert sum(map(stored_bytes, model.parameters())) == 2 * every


def test_a_weight_of_8_bits_is_off_by_half_a_step_at_most(torchao: Any) -> None:
    model = decoder()
    before = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    narrow_weights(model, "int8")
    for name, layer in linear_layers(model).items():
        weight: Any = layer.weight
        error = (weight.dequantize().float() - before[name]).abs()
        assert bool((error <= weight.scale / 2 * (1 + 1e-4)).all())
        assert weight.scale.numel() == layer.out_features, "a scale for each row"
        most = before[name].abs().amax(1, keepdim=True)
        assert bool((weight.scale <= most / 127 * (1 + 1e-4)).all()), "no step coarser than the row needs"


def test_a_weight_of_4_bits_is_off_by_half_a_step_at_most(torchao: Any) -> None:
    model = decoder()
    before = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    narrow_weights(model, "int4")
    for name, layer in linear_layers(model).items():
        found = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float().unflatten(1, (-1, GROUP_SIZE))
        wanted = before[name].unflatten(1, (-1, GROUP_SIZE))
        step = (wanted.amax(2, keepdim=True) - wanted.amin(2, keepdim=True)) / 15
        slack = wanted.abs().amax(2, keepdim=True) / 64  # weight, scale, zero point and product are bfloat16: 2^-8 each
        assert bool(((found - wanted).abs() <= step / 2 + slack).all()), name


def test_what_stays_wide(torchao: Any) -> None:
    model = decoder()
    table = model.rotary.table.clone()
    narrow_weights(model, "int8")
    assert model.rotary.table.dtype == torch.float32
    assert torch.equal(model.rotary.table, table)
    narrow = {name for name, layer in model.named_modules() if getattr(layer, "weight", None) is not None
              and type(layer.weight) is not nn.Parameter}  # fmt: skip
    assert narrow == set(linear_layers(model))
    lm = language_model()
    angles = lm.lm.model.rotary_emb.inv_freq.clone()  # type: ignore[union-attr,operator]
    narrow_weights(lm, "bfloat16")
    assert torch.equal(lm.lm.model.rotary_emb.inv_freq, angles)  # type: ignore[union-attr,arg-type]


def test_tied_weights_stay_tied(kind: str) -> None:
    model = language_model()
    narrow_weights(model, kind)
    assert model.lm.lm_head.weight is model.lm.model.embed_tokens.weight  # type: ignore[union-attr]


def test_float32_changes_nothing(tmp_path: Path) -> None:
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    narrow_weights(model, "float32")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_model(model, tmp_path / "model")
    assert torch.equal(logits(load_model(tmp_path / "model")), logits(model))


def test_it_is_for_inference(kind: str) -> None:
    model = decoder(resid_dropout=0.5).train()
    narrow_weights(model, kind)
    assert not any(module.training for module in model.modules())
    assert not model.logits(torch.zeros(1, 6, dtype=torch.int64), labels=[1]).requires_grad


def test_layers_that_4_bits_do_not_fit_are_bfloat16(torchao: Any) -> None:
    model = decoder(hidden_size=48, num_heads=4, ffn_hidden_size=64)  # the last matrix has rows of 64, the others of 48
    narrow_weights(model, "int4")
    kinds = {name: type(layer.weight) is nn.Parameter for name, layer in linear_layers(model).items()}
    assert {name for name, plain in kinds.items() if not plain} == {f"layers.{i}.feed_forward.w2" for i in range(2)}
    assert model.layers[0].feed_forward.w1.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert len(generate(model, seeds=[0], labels=[1]).codes) == 1


def test_layers_of_torchao_are_called_as_they_are(torchao: Any) -> None:
    """Float32 beside whole numbers is what a user's own call of torchao makes; our CPU products must keep off."""
    model = decoder()
    wanted = logits(model)
    for layer in linear_layers(model).values():
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
        assert not is_plain(layer)
    found = logits(model)
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()
    with model.packed():
        assert torch.equal(logits(model), found)
        assert len(generate(model, seeds=range(2), labels=[1, 2], cfg_scale=2.0).codes) == 2


def test_a_narrowed_model_is_not_saved(tmp_path: Path, kind: str) -> None:
    for model in (decoder(), language_model()):
        narrow_weights(model, kind)
        with pytest.raises(ArraError, match=f"save_model: the weights were narrowed to {kind} for painting; load the"):
            save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("second", ["float32", "bfloat16", "int8"])
def test_a_model_is_narrowed_once(second: str) -> None:
    model = decoder()
    narrow_weights(model, "float16")
    with pytest.raises(ArraError, match=f"weights: {second}: the model's are float16 already; load it again"):
        narrow_weights(model, second)


def test_foreign_weights_are_refused(torchao: Any) -> None:
    model = decoder()
    torchao.quantize_(model.layers[0], torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(ArraError, match="weights: bfloat16: the model's are Int8Tensor already; load it again"):
        narrow_weights(model, "bfloat16")


def test_an_unknown_kind_is_told() -> None:
    with pytest.raises(
        ArraError, match="weights: int2: unknown; expected one of float32, bfloat16, float16, int8, int4"
    ):
        narrow_weights(decoder(), "int2")


@pytest.mark.parametrize("kind", WHOLE)
def test_a_missing_torchao_is_told_and_nothing_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ArraError, match=rf"weights: {kind}: the package 'torchao' is missing; pip install 'arra\[lean\]'"
    ):
        narrow_weights(model, kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_of_no_fitting_layer_is_told(torchao: Any) -> None:
    with pytest.raises(
        ArraError, match="weights: int4: no layer of this model has a shape for it on cpu; use bfloat16"
    ):
        narrow_weights(decoder(hidden_size=24, num_heads=3, ffn_hidden_size=24), "int4")
    model = language_model("gpt2")  # whose layers are no nn.Linear
    with pytest.raises(
        ArraError, match="weights: int8: no layer of this model has a shape for it on cpu; use bfloat16"
    ):
        narrow_weights(model, "int8")
    assert model.lm.lm_head.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_no_kernel_for_a_device_is_told(torchao: Any) -> None:
    with pytest.raises(ArraError, match=r"weights: int4: no kernel for this device \(meta\); it takes a CPU or a GPU"):
        narrow_weights(decoder().to("meta"), "int4")


def test_weights_beyond_float16_are_told() -> None:
    model = decoder()
    model.tok_embeddings.weight.data[0, 0] = 1e5
    with pytest.raises(
        ArraError, match=r"weights: float16: tok_embeddings\.weight holds a weight beyond its range of 655"
    ):
        narrow_weights(model, "float16")


def test_torchao_leaves_other_models_alone(torchao: Any) -> None:
    model = decoder()
    before = logits(model)
    narrow_weights(decoder(), "int8")
    assert torch.equal(logits(model), before)
    assert all(map(is_plain, linear_layers(model).values()))
