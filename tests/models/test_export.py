"""What `arra export` writes is what LlamaGen's own strict loading expects, and nothing is lost on the way there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models import load_decoder, save_model
from arra.models.decoder import Decoder, DecoderSettings
from arra.models.llamagen import SIZES, launch_hint, original_state
from arra.stages.weights import export_weights, import_weights
from arra.tokenizers.image import ImageTokenizer, load_tokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from arra.tokenizers.weights import original_vq_state, vq_launch_hint
from tests.models.original import GPT_TABLE, VQ_TABLE, gpt_shapes, vq_shapes
from tests.models.toys import toy_decoder

CAPTION: dict[str, Any] = {"condition": "caption", "caption_dim": 6}
# the smallest network that LlamaGen's configuration can say: its base width is fixed
SMALL_VQ = VQSettings(ch_mult=(1, 2), z_channels=32, num_codes=64, code_dim=4)


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("size", list(SIZES))
def test_every_published_decoder(size: str, kind: str) -> None:
    layers, heads, width, ffn, *counts = GPT_TABLE[size]
    assert SIZES[size] == {"num_layers": layers, "num_heads": heads, "hidden_size": width}
    with torch.device("meta"):
        model = Decoder(DecoderSettings(**SIZES[size], condition="class" if kind == "c2i" else "caption"))
    state = original_state(model, torch.float32, source="here")
    assert shapes_of(state) == gpt_shapes(layers, width, ffn, classes=1000 if kind == "c2i" else None)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts[kind == "t2i"]
    assert len(state) == counts[2 + (kind == "t2i")]
    hint = launch_hint(model.settings, file="f.pt", bare=False)
    tokens = 1 if kind == "c2i" else 120
    for words in (f"--gpt-model GPT-{size.upper()} ", f"--gpt-type {kind} ", f"--cls-token-num {tokens}"):
        assert words in hint
    assert "--image-size 256 --downsample-size 16" in hint


@pytest.mark.parametrize("ch_mult", list(VQ_TABLE))
def test_every_published_tokenizer(ch_mult: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = VQModel(VQSettings(ch_mult=ch_mult))
    state = original_vq_state(model, torch.float32, source="here")
    assert shapes_of(state) == vq_shapes(ch_mult)
    parameters, entries = VQ_TABLE[ch_mult]
    assert (model.num_parameters(), len(state)) == (parameters, entries)
    assert f"--vq-model VQ-{2 ** (len(ch_mult) - 1)} " in vq_launch_hint(model.settings, file="f.pt")


@pytest.mark.parametrize("layout", ["train", "fsdp"])
@pytest.mark.parametrize("changes", [{}, CAPTION, {"num_classes": 3}], ids=["c2i", "t2i", "three classes"])
def test_there_and_back(changes: dict[str, Any], layout: str, tmp_path: Path) -> None:
    """Export, import, export: the same bits, in files of the same bytes."""
    model = toy_decoder(**changes)
    save_model(model, tmp_path / "model")
    done = export_weights(tmp_path / "model", tmp_path / "first.pt", layout=layout)
    content = torch.load(done.path, weights_only=True)  # plain tensors: nothing to allow
    assert layout == "fsdp" or list(content) == ["model"]
    state = content["model"] if layout == "train" else content
    classes = None if changes is CAPTION else model.settings.num_classes
    assert shapes_of(state) == gpt_shapes(2, 32, 256, codes=16, classes=classes, caption_dim=6)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in state.values())
    back = import_weights(done.path, tmp_path / "back", num_heads=4, grid="2x2").path
    assert {**load_decoder(back).settings.model_dump(), "ffn_hidden_size": None} == model.settings.model_dump()
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    again = export_weights(back, tmp_path / "again.pt", layout=layout)
    assert again.path.read_bytes() == done.path.read_bytes()


def test_a_tokenizer_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQModel(SMALL_VQ)
    ImageTokenizer(model, name="mine", weights_hash=None).save(tmp_path / "vq")
    done = export_weights(tmp_path / "vq", tmp_path / "vq.pt")
    assert "encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2], z_channels=32, codebook_size=64" in done.hint
    state = torch.load(done.path, weights_only=True)["model"]
    assert shapes_of(state) == vq_shapes((1, 2), latent=32, codes=64, code_dim=4)
    assert not state["quantize.codebook_used"].any()
    assert state["quantize.codebook_used"].dtype == torch.float32
    back = load_tokenizer(import_weights(done.path, tmp_path / "back").path)
    assert back.model.settings == SMALL_VQ
    assert all(torch.equal(back.model.state_dict()[key], value) for key, value in model.state_dict().items())
    assert export_weights(tmp_path / "back", tmp_path / "again.pt").path.read_bytes() == done.path.read_bytes()


def test_half_precision_is_kept_unless_told(tmp_path: Path) -> None:
    model = toy_decoder(**CAPTION)
    save_model(model, tmp_path / "model")
    half = export_weights(tmp_path / "model", tmp_path / "half.pt", dtype="bfloat16").path
    kept = import_weights(half, tmp_path / "kept", num_heads=4, grid="2x2").path
    wide = import_weights(half, tmp_path / "wide", num_heads=4, grid="2x2", dtype="float32").path
    expected = {key: value.bfloat16() for key, value in model.state_dict().items()}
    for folder, dtype in ((kept, torch.bfloat16), (wide, torch.float32)):
        state = load_decoder(folder, dtype=None).state_dict()
        assert all(
            value.dtype == dtype and torch.equal(value.bfloat16(), expected[key]) for key, value in state.items()
        )
    assert all(value.dtype == torch.float32 for value in load_decoder(kept).state_dict().values())
    assert torch.load(export_weights(kept, tmp_path / "full.pt").path)["model"]["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"condition": "text", "text_vocab_size": 9, "prefix_length": 5}, ["text tokens", "prefix_rotary"]),
        ({"grid": (2, 3)}, ["2 x 3"]),
        ({"rep_token": True, "prefix_length": 2}, ["trained with the REP token before the codes"]),
        ({"num_kv_heads": 2}, ["2 key-value heads for 4"]),
        ({"ffn_hidden_size": 48, **CAPTION, "prefix_length": 7}, ["feed-forward of 48", "7 caption positions"]),
    ],
)
def test_what_llamagen_has_no_word_for(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    save_model(toy_decoder(**changes), tmp_path / "model")
    with pytest.raises(ArraError) as caught:
        export_weights(tmp_path / "model", tmp_path / "out.pt")
    for word in (*words, str(tmp_path / "model"), "LlamaGen"):
        assert word in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("changes", [{"channels": 64}, {"num_res_blocks": 1}])
def test_tokenizers_llamagen_cannot_build(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = VQSettings(**{**SMALL_VQ.model_dump(), **changes})
    ImageTokenizer(VQModel(settings), name="mine", weights_hash=None).save(tmp_path / "vq")
    with pytest.raises(ArraError, match="LlamaGen cannot build this tokenizer"):
        export_weights(tmp_path / "vq", tmp_path / "out.pt")


def test_hints_for_odd_models(tmp_path: Path) -> None:
    shape: dict[str, Any] = {**SIZES["b"], "num_classes": 10, "num_codes": 99, "grid": (24, 24)}
    hint = launch_hint(DecoderSettings(**shape), file="f.pt", bare=True)
    assert "--image-size 384" in hint
    assert "--from-fsdp --num-classes 10 (and vocab_size=99 " in hint
    for odd in ({"num_layers": 3}, {"rope_base": 5e5}):
        hint = launch_hint(DecoderSettings(**{**shape, **odd}), file="f.pt", bare=False)
        assert "Transformer(ModelArgs(n_layer=" in hint
        assert "--gpt-model" not in hint


def test_the_command(tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    save_model(toy_decoder(), tmp_path / "model")
    answer = run_arra("export", tmp_path / "model", tmp_path / "out.pt", "--to", "llamagen")
    assert answer.code == 0
    assert answer.out.splitlines()[-1] == str(tmp_path / "out.pt")
    assert f"for LlamaGen: {tmp_path / 'out.pt'} is of no size" in answer.out
    bare = run_arra("export", tmp_path / "model", tmp_path / "folder", "--layout", "fsdp")
    assert bare.out.splitlines()[-1] == str(tmp_path / "folder" / "consolidated.pth")
    mistakes: list[tuple[list[Any], str]] = [
        ([tmp_path / "model", tmp_path / "out.pt"], "exists already"),
        ([tmp_path / "model", tmp_path / "b.pt", "--to", "diffusers"], "--to diffusers: unknown"),
        ([tmp_path / "model", tmp_path / "b.pt", "--dtype", "int8"], "--dtype int8: unknown"),
        ([tmp_path / "model", tmp_path / "b.pt", "--layout", "zip"], "--layout zip: unknown"),
        ([tmp_path / "none", tmp_path / "b.pt"], "no such folder"),
        ([tmp_path, tmp_path / "b.pt"], "no model.json in it"),
        ([tmp_path / "model", tmp_path / "out.pt" / "b.pt"], "is a file|part of this path is a file"),
    ]
    for arguments, message in mistakes:
        assert re.search(message, run_arra("export", *arguments).error), arguments
