"""Our VQ network against arrays made by running Meta's VQGAN, as ARRA ships it, on random weights (arra/README.md)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import arra
from arra.tokenizers import PUBLISHED, ImageTokenizer
from arra.tokenizers.chameleon import original_vqgan_state, under_metas_names
from arra.tokenizers.image import to_uint8
from arra.tokenizers.vq import VQModel, VQSettings

FOLDER = Path(__file__).parent / "arra"
NAMES = ("f16", "f2")
IMAGES = [("f16", 0), ("f16", 1), ("f16", 2), ("f2", 0), ("f2", 1)]
FLIPPING_GAP = 1e-3
"""Where the best two codes are nearer than this (squared distance), another summation order may choose the other."""


def stored(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"vqgan_tiny_{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


GOLD = {name: stored(name) for name in NAMES}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageTokenizer]:
    """Each from a folder that holds vqgan.ckpt and vqgan.yaml, as Meta's download does."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        (folder / "vqgan.ckpt").write_bytes((FOLDER / f"vqgan_tiny_{name}.pt").read_bytes())
        (folder / "vqgan.yaml").write_text(yaml.safe_dump(described(name)))
        (folder / "text_tokenizer.json").write_text("{}")
        made[name] = arra.load_tokenizer("chameleon", weights=folder)
    return made


def described(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"vqgan_tiny_{name}.json").read_text())
    return content


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def picture(name: str, image: int) -> Tensor:
    return GOLD[name][f"{image}/image"][None]


def as_float(pixels: Tensor) -> Tensor:
    return (pixels.double() / 255 * 2 - 1).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_the_yaml(name: str, tokenizers: dict[str, ImageTokenizer]) -> None:
    params = described(name)["model"]["params"]
    shape, settings = params["ddconfig"], tokenizers[name].model.settings
    assert settings == VQSettings(
        channels=shape["ch"],
        ch_mult=shape["ch_mult"],
        num_res_blocks=shape["num_res_blocks"],
        z_channels=shape["z_channels"],
        num_codes=params["n_embed"],
        code_dim=params["embed_dim"],
        normalize=False,
        attention_levels=(),
    )
    assert tokenizers[name].downsampling == {"f16": 16, "f2": 2}[name]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_tell_what_the_yaml_tells(name: str, tokenizers: dict[str, ImageTokenizer]) -> None:
    bare = arra.load_tokenizer("chameleon", weights=FOLDER / f"vqgan_tiny_{name}.pt")
    assert bare.model.settings == tokenizers[name].model.settings
    assert bare.codes_of == tokenizers[name].codes_of


@pytest.mark.parametrize("with_gradients", [False, True], ids=["strips", "plain"])
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_encoder(name: str, image: int, with_gradients: bool, tokenizers: dict[str, ImageTokenizer]) -> None:
    gold, model = GOLD[name], tokenizers[name].model
    with torch.set_grad_enabled(with_gradients):
        pixels = as_float(picture(name, image))
        agree(model.encoder(pixels)[0], gold[f"{image}/encoder_out"])
        agree(model.latents(pixels)[0], gold[f"{image}/latent"])


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_codes(name: str, image: int, tokenizers: dict[str, ImageTokenizer]) -> None:
    gold = GOLD[name]
    assert gold[f"{image}/code_margin"].min() > FLIPPING_GAP  # so that every code must be the same
    codes = tokenizers[name].encode(picture(name, image))
    assert torch.equal(codes[0], gold[f"{image}/codes"].long())
    assert torch.equal(codes[0], gold[f"{image}/hf523_codes"].long())  # transformers' ChameleonVQVAE says the same
    assert torch.equal(tokenizers[name].encode(as_float(picture(name, image))), codes)
    with torch.no_grad():
        assert torch.equal(tokenizers[name].model.quantize.codes(gold[f"{image}/latent"][None]), codes)


@pytest.mark.parametrize("which", ["", "random_"])
@pytest.mark.parametrize("with_gradients", [False, True], ids=["strips", "plain"])
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_decoder(
    name: str, image: int, with_gradients: bool, which: str, tokenizers: dict[str, ImageTokenizer]
) -> None:
    gold, tokenizer = GOLD[name], tokenizers[name]
    codes = gold[f"{image}/{which}codes"].long()[None]
    with torch.set_grad_enabled(with_gradients):
        agree(tokenizer.model.decode(codes)[0], gold[f"{image}/{which}pixels_float"])
    theirs = gold[f"{image}/{which}pixels_uint8"].int()
    ours = tokenizer.decode(codes)[0].int()
    assert (ours - theirs).abs().max() <= 1
    levels = ((gold[f"{image}/{which}pixels_float"].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    assert (ours - levels).abs().max() <= 0.5 + 0.02  # the nearest level, where the reference takes the one below


@pytest.mark.parametrize("name", NAMES)
def test_conversion_rounds_where_the_reference_truncates(name: str) -> None:
    theirs = GOLD[name]["ramp_uint8"].int()
    ours = to_uint8(GOLD[name]["ramp_float"][None])[0].int()
    assert set((ours - theirs).unique().tolist()) == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_comes_in_and_goes_out_again(name: str, tokenizers: dict[str, ImageTokenizer]) -> None:
    theirs = torch.load(FOLDER / f"vqgan_tiny_{name}.pt", weights_only=True)["state_dict"]
    strays = {key for key in theirs if key.startswith("loss.")}
    assert len(strays) == 2
    dropped = tokenizers[name].about["origin"]["dropped"].split(", ")
    assert set(dropped) == strays
    again = original_vqgan_state(tokenizers[name].model, torch.float32, source="here")
    assert set(again) == set(theirs) - strays
    for key, value in again.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_the_codebook_is_not_normalised(name: str, tokenizers: dict[str, ImageTokenizer]) -> None:
    """Or it would give other codes: what LlamaGen's way would say of the same network."""
    model, gold = tokenizers[name].model, GOLD[name]
    cosine = VQModel(model.settings.model_copy(update={"normalize": True})).eval()
    cosine.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.equal(cosine.encode(as_float(picture(name, 0)))[0], gold["0/codes"].long())


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = VQModel(VQSettings(**PUBLISHED["chameleon"]))
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    rounded = {name: round(count, 2) for name, count in millions.items() if "conv" not in name}
    assert rounded == {"encoder": 27.19, "decoder": 39.29, "quantize": 2.10}
    assert millions["quant_conv"] + millions["post_quant_conv"] == pytest.approx(0.13, abs=0.005)
    state = under_metas_names(model).state_dict()
    assert state["quantize.embedding.weight"].shape == (8192, 256)
    shortcuts = {key.removesuffix(".nin_shortcut.weight") for key in state if key.endswith("nin_shortcut.weight")}
    # channels 128 128 256 256 512: the decoder counts its levels from full resolution, too
    assert shortcuts == {
        *("encoder.down.2.block.0", "encoder.down.4.block.0"),
        *("decoder.up.1.block.0", "decoder.up.3.block.0"),
    }
    assert {key for key in state if ".attn." in key} == set()
    assert {key.split(".")[2] for key in state if "sample" in key and "encoder" in key} == set("0123")
    assert {key.split(".")[2] for key in state if "sample" in key and "decoder" in key} == set("1234")
    assert "decoder.up.0.block.2.conv1.weight" in state
    assert "encoder.down.0.block.2.conv1.weight" not in state
