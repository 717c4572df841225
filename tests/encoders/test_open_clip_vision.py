"""Vision towers of open_clip and BioMedCLIP: the home library's numbers, no text tower, no code of a file."""

import json
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arra.encoders import load_encoder
from arra.encoders import open_clip_vision as room
from arra.encoders.base import CLIP_MEAN, Encoder, preprocessed
from arra.encoders.open_clip_vision import BIOMEDCLIP, OpenClipVision, load_biomedclip, load_open_clip
from arra.encoders.pickled_modules import is_torchscript, torchscript_state
from arra.errors import ArraError

open_clip = pytest.importorskip("open_clip")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
SMALL = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": SMALL,
    "vit-average": {**SMALL, "pool_type": "avg", "final_ln_after_pool": True},
    "coca": {**SMALL, "attentional_pool": True, "attn_pooler_heads": 2},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "timm-vit": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (3, 70, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def shaken(network: Any) -> Any:
    """With no bias of zeros and no norm of ones, which would hide what is left out."""
    for name, value in network.named_parameters():
        if value.ndim == 1:
            nn.init.normal_(value, mean=float("weight" in name), std=0.1)
    return network.eval()


def model(vision: dict[str, Any], *, quick_gelu: bool = True) -> Any:
    torch.manual_seed(0)
    return shaken(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT, quick_gelu=quick_gelu))


def written(folder: Path, vision: dict[str, Any], **more: Any) -> Any:
    """A whole CLIP with random weights, and its folder as open_clip pushes it to the hub."""
    network = model(vision, quick_gelu=more.get("quick_gelu", True))
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    told = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT, **more}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": told, "preprocess_cfg": PREPROCESS}))
    return network


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_the_projection_equals_encode_image(kind: str, tmp_path: Path, pictures: Tensor) -> None:
    network = written(tmp_path, TOWERS[kind])
    encoder = load_open_clip("open_clip:small", weights=tmp_path)
    assert isinstance(encoder, Encoder)
    spec = encoder.spec
    assert (spec.mean, spec.std) == (tuple(PREPROCESS["mean"]), tuple(PREPROCESS["std"]))
    assert (spec.interpolation, spec.fit, spec.output) == ("bilinear", "squash", "projected")
    wanted = network.encode_image(preprocessed(pictures, spec))
    torch.testing.assert_close(encoder.encode(pictures), wanted, **CLOSE)
    assert spec.feature_size == wanted.shape[1] == 24
    has_cls = kind in ("vit", "timm-vit")
    assert ("cls" in spec.outputs) == has_cls
    for output in spec.outputs:  # every one that it says it has
        assert encoder.encode(pictures, aggregate=output).isfinite().all()


@torch.no_grad()
def test_tokens_equal_open_clips(tmp_path: Path, pictures: Tensor) -> None:
    network = written(tmp_path, SMALL)
    encoder = load_open_clip("open_clip:small", weights=tmp_path)
    network.visual.output_tokens = True
    pixels = preprocessed(pictures, encoder.spec)
    _, tokens = network.visual(pixels)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="patches"), tokens, **CLOSE)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="mean"), tokens.mean(1), **CLOSE)
    cls = encoder.encode(pictures, aggregate="cls")
    torch.testing.assert_close(cls @ network.visual.proj, encoder.encode(pictures), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_layers_are_the_blocks(kind: str, tmp_path: Path, pictures: Tensor) -> None:
    network, seen = written(tmp_path, TOWERS[kind]), {}
    encoder = load_open_clip("open_clip:small", weights=tmp_path)
    blocks = network.visual.transformer.resblocks if kind == "vit" else network.visual.trunk.blocks
    for number in (1, 3):
        blocks[number - 1].register_forward_hook(lambda *told, at=number: seen.update({at: told[-1]}))
    network.encode_image(preprocessed(pictures, encoder.spec))
    found = encoder.encode(pictures, aggregate="concat", layers=(3, 1))
    wanted = [part for at in (3, 1) for part in (seen[at][:, 0], seen[at][:, 1:].mean(1))]
    torch.testing.assert_close(found, torch.cat(wanted, 1), **CLOSE)
    with pytest.raises(ArraError, match="its projection is of the end of the network; leave layers out"):
        encoder.encode(pictures, layers=(1,))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_another_size_is_open_clips_own_resampling(kind: str, tmp_path: Path, pictures: Tensor) -> None:
    network = written(tmp_path, TOWERS[kind])
    side = 2 * TOWERS[kind]["image_size"]
    encoder = load_open_clip("open_clip:small", weights=tmp_path, image_size=side)
    if kind == "vit":
        larger = model({**SMALL, "image_size": side})
        open_clip.load_checkpoint(larger, str(tmp_path / "open_clip_model.safetensors"))
        network = larger
    else:
        network.visual.set_input_size(side)
    wanted = network.encode_image(preprocessed(pictures, encoder.spec))
    torch.testing.assert_close(encoder.encode(pictures), wanted, **CLOSE)


@torch.no_grad()
def test_a_published_architecture_from_a_training_checkpoint(
    tmp_path: Path, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `open_clip_train` writes: a dict with the state dict, `module.` before every key."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-S-32-test", {"embed_dim": 24, "vision_cfg": SMALL})
    network = model(SMALL, quick_gelu=False)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    encoder = load_encoder("open_clip:ViT-S-32-test", weights=tmp_path / "epoch_3.pt")
    assert encoder.spec.mean == CLIP_MEAN
    wanted = network.encode_image(preprocessed(pictures, encoder.spec))
    torch.testing.assert_close(encoder.encode(pictures), wanted, **CLOSE)


def test_preprocessing_follows_the_published_weights() -> None:
    """SigLIP's all agree; of ViT-L-14 some were trained with another mean, and the tag says which."""
    assert room._agreed("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert room._agreed("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert room._agreed("ViT-L-14") == {}
    plain = room._plan("x", "ViT-L-14", "", Path("/nowhere/x.pt"))
    tagged = room._plan("x", "ViT-L-14", "laion2b_s32b_b82k", Path("/nowhere/x.pt"))
    assert (plain.preprocess, tagged.preprocess["mean"]) == ({}, (0.5, 0.5, 0.5))
    assert room._plan("x", "ViT-L-14", "openai", Path("/nowhere/x.pt")).quick_gelu
    assert room._plan("x", "ViT-L-14-quickgelu", "", Path("/nowhere/x.pt")).quick_gelu
    assert not plain.quick_gelu


def test_without_weights_the_tags_repository_is_asked() -> None:
    repository = room._tagged("open_clip:ViT-B-32", "ViT-B-32", "laion2b_s34b_b79k")
    assert repository == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    with pytest.raises(ArraError, match=r"no weights; set weights .* or name published ones as open_clip:ViT-B-32/TAG"):
        load_open_clip("open_clip:ViT-B-32")
    with pytest.raises(ArraError, match="no published weights 'nothing'; choose of openai, "):
        load_open_clip("open_clip:ViT-B-32/nothing")


def test_every_published_architecture_has_a_plan() -> None:
    for architecture in open_clip.list_models():
        plan = room._plan(f"open_clip:{architecture}", architecture, "", Path("/nowhere/x.pt"))
        assert plan.embed_dim > 0


@pytest.mark.parametrize(
    ("vision", "told"),
    [
        ({"timm_model_name": "hf-hub:stranger/network"}, "names a place, not an architecture"),
        ({"timm_model_name": "local-dir:/tmp"}, "names a place, not an architecture"),
        ({**SMALL, "width": 10**9}, "vision_cfg.width: 1000000000: nothing that this open_clip knows"),
        ({**SMALL, "trust_remote_code": True}, "vision_cfg.trust_remote_code"),
        ({**SMALL, "act_kwargs": {"approximate": {"a": "b"}}}, "vision_cfg.act_kwargs"),
        ({**SMALL, "width": 65}, "open_clip cannot make its tower"),
    ],
)
def test_a_configuration_names_no_place_and_no_code(vision: dict[str, Any], told: str, tmp_path: Path) -> None:
    written(tmp_path, SMALL)
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ArraError) as caught:
        load_open_clip("open_clip:small", weights=tmp_path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_never_fetches_image_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    written(tmp_path, {**TOWERS["timm-vit"], "timm_model_pretrained": False})
    path = tmp_path / "open_clip_config.json"
    path.write_text(path.read_text().replace('"timm_model_pretrained": false', '"timm_model_pretrained": true'))
    create = timm.create_model

    def watched(*given: Any, **told: Any) -> Any:
        assert not told.get("pretrained")
        return create(*given, **told)

    monkeypatch.setattr(timm, "create_model", watched)
    load_open_clip("open_clip:small", weights=tmp_path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    written(tmp_path, SMALL)
    file = tmp_path / "open_clip_model.safetensors"
    (tmp_path / "apart").mkdir()
    alone = file.rename(tmp_path / "apart" / file.name)
    with pytest.raises(ArraError, match=r"not weights of open_clip:ViT-B-32: missing transformer\.resblocks"):
        load_open_clip("open_clip:ViT-B-32", weights=alone)
    with pytest.raises(ArraError, match=r"no architecture 'small', and .*apart no open_clip_config\.json"):
        load_open_clip("open_clip:small", weights=alone)
    written(tmp_path, SMALL)
    with pytest.raises(ArraError, match="its layers is 3, that of ViT-B-32 12; name the architecture that it is of"):
        load_open_clip("open_clip:ViT-B-32", weights=tmp_path)
    save_file({"text.weight": torch.ones(1)}, file)
    with pytest.raises(ArraError, match=r"no tensors visual\.\* in it"):
        load_open_clip("open_clip:small", weights=tmp_path)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for load in (load_open_clip, load_biomedclip):
        with pytest.raises(ArraError, match=r"package 'open_clip_torch' is missing; pip install 'arra\[encoders\]'"):
            load("open_clip:ViT-B-32")


class Scripted(nn.Module):
    """Keys and dtypes of a small OpenAI file; what they published is such an archive of the whole CLIP."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in state.items():
            at: nn.Module = self
            *parts, last = key.split(".")
            for part in parts:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]  # type: ignore[assignment]
            at.register_parameter(last, nn.Parameter(value, requires_grad=False))
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return x


def scripted(state: dict[str, Tensor], path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.save(torch.jit.script(Scripted(state)), path)
    return path


@torch.no_grad()
def test_openais_file_is_read_without_its_code(
    tmp_path: Path, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-S-32-test", {"embed_dim": 24, "vision_cfg": SMALL})
    network = model(SMALL, quick_gelu=True)
    half = {key: value.half() for key, value in network.state_dict().items() if key.startswith("visual.")}
    path = scripted(half, tmp_path / "ViT-S-32.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *told, **named: pytest.fail("its code was loaded"))
    assert is_torchscript(path)
    read = torchscript_state(path)
    assert set(read) == set(half)
    assert all(torch.equal(value, half[key]) and value.dtype == torch.float16 for key, value in read.items())
    encoder = load_open_clip("open_clip:ViT-S-32-test", weights=path)
    network.visual.load_state_dict({key.removeprefix("visual."): value.float() for key, value in half.items()})
    wanted = network.encode_image(preprocessed(pictures, encoder.spec))  # with the quick form, told by the file alone
    torch.testing.assert_close(encoder.encode(pictures), wanted, **CLOSE)


def test_a_hostile_or_broken_archive_is_refused(tmp_path: Path) -> None:
    path = scripted({"visual.proj": torch.ones(4, 4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("/data.pkl"))

    def changed(content: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "changed.pt", "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, content if name == pickled else part)
        return tmp_path / "changed.pt"

    hostile = b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00false\x85R."
    with pytest.raises(ArraError, match=r"refused: it names posix\.system, .*could run code"):
        torchscript_state(changed(hostile))
    with pytest.raises(ArraError, match="not a readable file of a network"):
        torchscript_state(changed(parts[pickled][:-30]))
    claimed = parts[pickled].replace(b"(K\x04K\x04t", b"(K\x40K\x40t")  # 64 x 64 over sixteen numbers
    assert claimed != parts[pickled]
    with pytest.raises(ArraError, match="a tensor is larger than its storage"):
        torchscript_state(changed(claimed))


# BioMedCLIP: the same tower at a small size


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BIOMEDCLIP_TRUNK", "test_vit")
    monkeypatch.setattr(room, "BIOMEDCLIP", room.replace(BIOMEDCLIP, image_size=160))


def biomedclip_tower() -> Any:
    """As open_clip builds it of BioMedCLIP's open_clip_config.json."""
    torch.manual_seed(0)
    return shaken(open_clip.timm_model.TimmModel("test_vit", embed_dim=512, pool="", proj="linear"))


@pytest.mark.usefixtures("small")
@torch.no_grad()
@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_biomedclip_equals_open_clip(file: str, tmp_path: Path, pictures: Tensor) -> None:
    tower = biomedclip_tower()
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    state |= {"text.transformer.embeddings.word_embeddings.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
    torch.save(state, tmp_path / file) if file.endswith(".bin") else save_file(state, tmp_path / file)
    encoder = load_biomedclip(weights=tmp_path)
    pixels = preprocessed(pictures, encoder.spec)
    found = encoder.encode(pictures)
    assert found.shape == (3, 512)
    torch.testing.assert_close(found, tower(pixels), **CLOSE)
    assert not torch.allclose(found.norm(dim=1), torch.ones(3))  # un-normalised, as ARRA's features are
    tokens = tower.trunk.forward_features(pixels)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="cls"), tokens[:, 0], **CLOSE)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="patches"), tokens[:, 1:], **CLOSE)


def test_biomedclip_at_its_real_size_has_the_specs_numbers() -> None:
    tower = room._tower(
        "biomedclip",
        room.TowerPlan(
            512, {"timm_model_name": room.BIOMEDCLIP_TRUNK, "timm_pool": "", "timm_proj": "linear"}, False, {}
        ),
        None,
    )
    encoder = room._ready(BIOMEDCLIP, tower, device="cpu", identity="x")
    assert isinstance(encoder, OpenClipVision)
    assert room.replace(encoder.spec, weights_sha256="") == BIOMEDCLIP
    picture = torch.zeros(1, 3, 224, 224)
    assert encoder.encode(picture).shape == (1, BIOMEDCLIP.feature_size)
    assert encoder.encode(picture, aggregate="cls").shape == (1, 768)


def port() -> Any:
    """The Hugging Face port's vision half, put together from parts of transformers.

    It is their CLIP with a bias in the patch embedding, no norm before the blocks, plain GELU and epsilon 1e-12.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=2, image_size=160,
        patch_size=16, projection_dim=512, hidden_act="gelu", layer_norm_eps=1e-12,
    )  # fmt: skip
    torch.manual_seed(1)
    network = transformers.CLIPVisionModelWithProjection(config)
    network.vision_model.embeddings.patch_embedding = nn.Conv2d(3, 64, 16, 16)
    network.vision_model.pre_layrnorm = nn.Identity()
    return shaken(network)


@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_biomedclip_equals_the_port(tmp_path: Path, pictures: Tensor) -> None:
    network = port()
    state = {key: value for key, value in network.state_dict().items() if "position_ids" not in key}
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in state
    state |= {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "modeling_biomed_clip.py").write_text("raise SystemExit('its code was run')")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_biomed_clip.X"}}))
    encoder = load_biomedclip(weights=tmp_path)
    said = network(pixel_values=preprocessed(pictures, encoder.spec))
    torch.testing.assert_close(encoder.encode(pictures), said.image_embeds, **CLOSE)
    for part in ("visual_projection.weight", "vision_model.encoder.layers.3.self_attn.k_proj.bias"):
        torch.save({key: value for key, value in state.items() if key != part}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ArraError, match=f"no {part} in it; expected the weights of BiomedCLIP-vit-bert-hf"):
            load_biomedclip(weights=tmp_path)
