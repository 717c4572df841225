"""Chameleon's tokenizer: whatever file it comes in, its codes are those of Meta's network."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import arra
from arra.errors import ArraError
from arra.models.fitting import Fitting
from arra.models.weights import read_weights
from arra.stages.reconstruct import ReconstructOptions, reconstruct
from arra.stages.weights import import_weights
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.chameleon import original_vqgan_state
from arra.tokenizers.image import open_vq_weights
from arra.tokenizers.vq import VQSettings
from tests.tokenizers.toy_vqgan import PLAIN, TOY, lively, save_meta, some_images

# Meta's decoder written out over its keys, so that the places of blocks and attention are told by somebody else


def norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, state[f"{key}.weight"], state[f"{key}.bias"], eps=1e-6)


def conv(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x, weight, state[f"{key}.bias"], padding=weight.shape[-1] // 2)


def residual(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    h = conv(state, f"{key}.conv1", F.silu(norm(state, f"{key}.norm1", x)))
    h = conv(state, f"{key}.conv2", F.silu(norm(state, f"{key}.norm2", h)))
    return (conv(state, f"{key}.nin_shortcut", x) if f"{key}.nin_shortcut.weight" in state else x) + h


def attention(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    q, k, v = (conv(state, f"{key}.{each}", norm(state, f"{key}.norm", x)).flatten(2) for each in "qkv")
    weights = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(2)
    return x + conv(state, f"{key}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))


def plain_decode(state: dict[str, Tensor], codes: Tensor, *, levels: int, blocks: int) -> Tensor:
    x = conv(state, "post_quant_conv", state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2))
    x = residual(state, "decoder.mid.block_1", conv(state, "decoder.conv_in", x))
    x = residual(state, "decoder.mid.block_2", attention(state, "decoder.mid.attn_1", x))
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            x = residual(state, f"decoder.up.{level}.block.{block}", x)
            if f"decoder.up.{level}.attn.{block}.q.weight" in state:
                x = attention(state, f"decoder.up.{level}.attn.{block}", x)
        if level:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(state, f"decoder.up.{level}.upsample.conv", x)
    return conv(state, "decoder.conv_out", F.silu(norm(state, "decoder.norm_out", x)))


@pytest.mark.parametrize("attended", [(), (0,), (1, 2), (0, 1, 2), None], ids=str)
@torch.no_grad()
def test_decoder_written_out(attended: tuple[int, ...] | None) -> None:
    model = lively(TOY.model_copy(update={"attention_levels": attended}))
    state = original_vqgan_state(model, torch.float32, source="toy")
    for levels in ("encoder.down", "decoder.up"):
        numbers = {int(key.split(".")[2]) for key in state if key.startswith(levels) and ".attn." in key}
        assert numbers == set(model.settings.attended)
    codes = torch.randint(40, (2, 3, 4))
    plain = plain_decode(state, codes, levels=3, blocks=1)
    torch.testing.assert_close(model.decode(codes), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_codes_are_the_nearest_rows() -> None:
    model, images = lively(TOY), some_images()
    latents = model.latents(images)
    rows = model.quantize.embedding.weight
    nearest = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2).double(), rows.double()).argmin(1)
    assert torch.equal(model.encode(images).flatten(), nearest)
    assert nearest.unique().numel() > 3
    assert torch.equal(model.quantize.rows(nearest.view(2, 4, 6))[1, :, 2, 3], rows[nearest.view(2, 4, 6)[1, 2, 3]])


def test_strips_say_what_whole_tensors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arra.tokenizers.strips.STRIP_BYTES", 4096)
    model, images, codes = lively(TOY), some_images(), torch.randint(40, (2, 4, 6))
    kept = images.clone()
    plain = model.latents(images), model.decode(codes)
    with torch.no_grad():
        strips = model.latents(images), model.decode(codes)
    assert torch.equal(images, kept)
    for a, b in zip(strips, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# files


def meta_file(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder)
    return "chameleon", folder / "vqgan.ckpt"


def meta_folder(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder)
    return "chameleon", folder


def metas_download(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder / "tokenizer")
    return "chameleon", folder


def luminas_repository(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder / "original_tokenizers", described=False)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"not looked at")
    return "chameleon", folder


def folder_as_name(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder)
    return str(folder), None


def imported_folder(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder / "original_tokenizers")
    import_weights(folder / "original_tokenizers", folder / "ours")
    return str(folder / "ours"), None


def imported(folder: Path) -> tuple[str, Path | None]:
    save_meta(folder / "theirs")
    done = import_weights(folder / "theirs" / "vqgan.ckpt", folder / "ours")
    assert "VQ tokenizer" in done.summary()
    return str(folder / "ours"), None


@pytest.mark.parametrize(
    "given", [meta_file, meta_folder, metas_download, luminas_repository, folder_as_name, imported, imported_folder]
)
def test_every_way_to_the_same_network(given: Callable[[Path], tuple[str, Path | None]], tmp_path: Path) -> None:
    name, weights = given(tmp_path)
    tokenizer = arra.load_tokenizer(name, weights=weights)
    model = lively(TOY)
    assert tokenizer.model.settings == TOY
    for key, value in tokenizer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(some_images()), model.encode(some_images()))
    save_meta(tmp_path / "again")
    assert tokenizer.codes_of == arra.load_tokenizer("chameleon", weights=tmp_path / "again").codes_of


def test_the_hubs_way_in(tmp_path: Path) -> None:
    save_meta(tmp_path)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path, file="vqgan.ckpt")
    assert (tokenizer.name, tokenizer.model.settings) == ("chameleon", TOY)


def test_a_folder_named_like_the_tokenizer_does_not_hide_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_meta(tmp_path / "weights")
    (tmp_path / "chameleon").mkdir()
    monkeypatch.chdir(tmp_path)
    assert arra.load_tokenizer("chameleon", weights="weights").model.settings == TOY


def test_other_codes_have_another_name(tmp_path: Path) -> None:
    """Of all tensors, just those that decide the codes count."""
    save_meta(tmp_path)
    first = arra.load_tokenizer("chameleon", weights=tmp_path)
    content = torch.load(tmp_path / "vqgan.ckpt", weights_only=True)
    content["state_dict"]["decoder.conv_out.bias"] += 1
    torch.save(content, tmp_path / "vqgan.ckpt")
    painted = arra.load_tokenizer("chameleon", weights=tmp_path)
    assert painted.codes_of == first.codes_of
    assert painted.weights_hash != first.weights_hash
    for key in ("encoder.mid.attn_1.q.bias", "quant_conv.weight", "quantize.embedding.weight"):
        changed = {**content["state_dict"], key: content["state_dict"][key] + 1}
        torch.save({"state_dict": changed}, tmp_path / "vqgan.ckpt")
        assert arra.load_tokenizer("chameleon", weights=tmp_path).codes_of != first.codes_of


# Hugging Face's half


def hugging_face(folder: Path, settings: VQSettings, *, max_shard_size: str = "1GB") -> Any:
    """transformers' Chameleon with the toy's encoder half, saved."""
    transformers = pytest.importorskip("transformers", reason="the extra 'text' is not installed")
    vq_config = {
        "embed_dim": settings.code_dim,
        "num_embeddings": settings.num_codes,
        "latent_channels": settings.z_channels,
        "resolution": 64,
        "base_channels": settings.channels,
        "channel_multiplier": list(settings.ch_mult),
        "num_res_blocks": settings.num_res_blocks,
        "attn_resolutions": [64 // 2**level for level in settings.attended] or None,
    }
    config = transformers.ChameleonConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vq_config=vq_config,
        vocabulary_map={"<image>": 60, "IMGIMGBZ": 1},
    )
    network = transformers.ChameleonForConditionalGeneration(config).eval()
    state = original_vqgan_state(lively(settings), torch.float32, source="toy")
    half = {key: value for key, value in state.items() if not key.startswith("decoder.")}
    network.model.vqmodel.load_state_dict(half)
    network.save_pretrained(folder, max_shard_size=max_shard_size)
    return network


@pytest.mark.parametrize("settings", [TOY, PLAIN], ids=["attention", "none"])
@torch.no_grad()
def test_encoder_half_of_transformers(settings: VQSettings, tmp_path: Path) -> None:
    theirs = hugging_face(tmp_path / "hf", settings)
    tokenizer = arra.load_tokenizer("chameleon", weights=tmp_path / "hf")
    for sides in ((16, 24), (32, 8)):
        images = some_images(*sides)
        said = theirs.model.vqmodel.encode(images)
        torch.testing.assert_close(tokenizer.model.encoder(images), said.last_hidden_state, atol=1e-4, rtol=1e-4)
        assert torch.equal(tokenizer.encode(images).flatten(), said.image_tokens.flatten())
    assert tokenizer.model.settings == settings.model_copy(update={"has_decoder": False})


def test_the_half_is_kept_and_says_what_it_lacks(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", TOY, max_shard_size="100KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    (tmp_path / "hf" / "tokenizer.json").write_text('{"version": "1.0"}')  # the text tokenizer's
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    tokenizer = arra.load_tokenizer(tmp_path / "hf")
    save_meta(tmp_path / "meta")
    whole = arra.load_tokenizer("chameleon", weights=tmp_path / "meta")
    assert tokenizer.codes_of == whole.codes_of  # so codes made with the half can be painted with the whole
    tokenizer.save(tmp_path / "ours")
    again = arra.load_tokenizer(tmp_path / "ours")
    assert (again.model.settings, again.codes_of) == (tokenizer.model.settings, whole.codes_of)
    codes = whole.encode(some_images())
    message = r"tokenizer .*: its weights are the encoder half alone, .*; give vqgan\.ckpt"
    for half in (tokenizer, again):
        assert torch.equal(half.encode(some_images()), codes)
        with pytest.raises(ArraError, match=message):
            half.decode(codes)
        assert ("decoder", "none: pictures become codes, codes no pictures") in half._describe().facts
    with pytest.raises(ArraError, match=r"Meta's VQGAN cannot be this tokenizer: no decoder"):
        original_vqgan_state(again.model, torch.float32, source="here")


def test_a_shard_alone_and_a_language_model_without(tmp_path: Path) -> None:
    """A reader takes `model.` off where every key has it; what has no tokenizer says so."""
    hugging_face(tmp_path / "hf", TOY)
    state = read_weights(tmp_path / "hf").state
    vq = {key: value for key, value in state.items() if "vqmodel" in key}
    torch.save(vq, tmp_path / "vq.pt")
    assert read_weights(tmp_path / "vq.pt").stripped == ("model.",)
    assert not arra.load_tokenizer("chameleon", weights=tmp_path / "vq.pt").model.settings.has_decoder
    torch.save({key: value for key, value in state.items() if key not in vq}, tmp_path / "lm.pt")
    with pytest.raises(
        ArraError, match=r"lm\.pt: no Chameleon tokenizer inside \(no encoder\.down\); pass vqgan\.ckpt"
    ):
        arra.load_tokenizer("chameleon", weights=tmp_path / "lm.pt")


# the stages


def test_reconstruct(tmp_path: Path) -> None:
    save_meta(tmp_path / "weights")
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        pixels = ((some_images(16, 16)[0] * (number + 1) / 3 + 1) * 127.5).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{number}.png")
    options = ReconstructOptions(weights=str(tmp_path / "weights"), image_size=16)
    reconstruct("chameleon", str(tmp_path / "pictures"), out=tmp_path / "out", options=options)
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "chameleon" in json.dumps(measured)
    shutil.rmtree(tmp_path / "out")
    half = {
        k: v for k, v in original_vqgan_state(lively(TOY), torch.float32, source="toy").items() if "decoder" not in k
    }
    torch.save(half, tmp_path / "half.pt")
    options = ReconstructOptions(weights=str(tmp_path / "half.pt"), image_size=16)
    with pytest.raises(ArraError, match="the encoder half alone"):
        reconstruct("chameleon", str(tmp_path / "pictures"), out=tmp_path / "out", options=options)


def test_opened_as_given(tmp_path: Path) -> None:
    """`arra import` hands weights over without a name."""
    save_meta(tmp_path)
    weights = read_weights(tmp_path / "vqgan.ckpt")
    assert open_vq_weights(weights, known={}, how=Fitting()).name == "vqgan"
    assert open_vq_weights(weights, known={}, how=Fitting(), name="chameleon").name == "chameleon"
