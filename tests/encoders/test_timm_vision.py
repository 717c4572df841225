"""Networks of timm as encoders: the numbers of the home library on the same pixels, and no weights but its own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arra.encoders import load_encoder
from arra.encoders import timm_vision as room
from arra.encoders.base import Encoder, preprocessed
from arra.encoders.timm_vision import load_timm
from arra.errors import ArraError

timm = pytest.importorskip("timm")
VIT, PLAIN, CONVOLUTIONAL = "test_vit", "test_vit3", ("test_resnet", "test_efficientnet", "test_convnext")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (3, 70, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def written(folder: Path, architecture: str, **more: Any) -> tuple[Any, Path]:
    """A network of timm with random weights, its classifier included, and the file of them."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, **more).eval()
    for name, value in network.named_parameters():
        if name.endswith("bias") or "token" in name or "gamma" in name:
            torch.nn.init.normal_(value, std=0.1)  # zeros would hide what is left out
    path = folder / f"{architecture}.safetensors"
    save_file(network.state_dict(), path)
    return network, path


@torch.no_grad()
def test_a_transformer_equals_timm(tmp_path: Path, pictures: Tensor) -> None:
    network, path = written(tmp_path, VIT)
    encoder = load_timm(f"timm:{VIT}", weights=path)
    assert isinstance(encoder, Encoder)
    assert encoder.spec.outputs == ("cls", "mean", "concat", "patches")
    assert (encoder.spec.output, encoder.spec.num_layers, encoder.spec.feature_size) == ("cls", 6, 64)
    pixels = preprocessed(pictures, encoder.spec)
    tokens = network.forward_features(pixels)
    torch.testing.assert_close(encoder.encode(pictures), tokens[:, 0], **CLOSE)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="patches"), tokens[:, 1:], **CLOSE)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="mean"), tokens[:, 1:].mean(1), **CLOSE)
    both = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(encoder.encode(pictures, aggregate="concat"), both, **CLOSE)


@torch.no_grad()
def test_layers_are_the_blocks_in_the_order_asked_for(tmp_path: Path, pictures: Tensor) -> None:
    network, path = written(tmp_path, VIT)
    encoder = load_timm(f"timm:{VIT}", weights=path)
    seen = {}
    for number in (2, 5):
        network.blocks[number - 1].register_forward_hook(lambda *told, at=number: seen.update({at: told[-1]}))
    network(preprocessed(pictures, encoder.spec))
    for output, places in (("cls", 0), ("patches", slice(1, None))):
        wanted = torch.cat([seen[5][:, places], seen[2][:, places]], -1)
        found = encoder.encode(pictures, aggregate=output, layers=(5, 2))  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, **CLOSE)
    states = encoder.states_of(preprocessed(pictures, encoder.spec), (1,))
    torch.testing.assert_close(states[-1].cls, encoder.encode(pictures), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_a_convolutional_network_equals_timm(architecture: str, tmp_path: Path, pictures: Tensor) -> None:
    network, path = written(tmp_path, architecture)
    encoder = load_timm(f"timm:{architecture}", weights=path, image_size=64)
    pixels = preprocessed(pictures, encoder.spec)
    maps = network.forward_features(pixels)
    torch.testing.assert_close(encoder.encode(pictures), maps.mean((2, 3)), **CLOSE)
    patches = encoder.encode(pictures, aggregate="patches")
    torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, maps.shape[2:]), maps, **CLOSE)
    stages = network.forward_intermediates(pixels, intermediates_only=True)
    taken = torch.cat([stages[2].mean((2, 3)), stages[1].mean((2, 3))], 1)
    torch.testing.assert_close(encoder.encode(pictures, layers=(3, 2)), taken, **CLOSE)
    for wrong in ("cls", "concat"):
        with pytest.raises(ArraError, match=f"has no output '{wrong}'; it has mean, patches"):
            encoder.encode(pictures, aggregate=wrong)


@torch.no_grad()
def test_timms_own_pooling_is_an_output_where_it_is_another(tmp_path: Path, pictures: Tensor) -> None:
    """The norm after pooling of a ConvNeXt; of a ResNet it would be the mean again."""
    for architecture in ("test_convnext", PLAIN):
        network, path = written(tmp_path, architecture)
        encoder = load_timm(f"timm:{architecture}", weights=path)
        features = network.forward_features(preprocessed(pictures, encoder.spec))
        wanted = network.forward_head(features, pre_logits=True)
        torch.testing.assert_close(encoder.encode(pictures, aggregate="projected"), wanted, **CLOSE)
    assert "projected" not in load_timm("timm:test_resnet", weights=written(tmp_path, "test_resnet")[1]).spec.outputs


def test_patches_of_stages_of_several_sizes_need_a_grid(tmp_path: Path, pictures: Tensor) -> None:
    encoder = load_timm("timm:test_resnet", weights=written(tmp_path, "test_resnet")[1])
    with pytest.raises(ArraError, match="maps differ in size; set grid to bring them together"):
        encoder.encode(pictures, aggregate="patches", layers=(1, 2))
    assert encoder.encode(pictures, aggregate="patches", layers=(1, 2), grid=4).shape == (3, 16, 64)


@torch.no_grad()
def test_registers_are_no_patches(tmp_path: Path, pictures: Tensor) -> None:
    small: dict[str, Any] = {"img_size": 32, "reg_tokens": 3, "depth": 1, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", **small).eval()
    trunk = room.TimmTrunk(network, "timm:with-registers", 32)
    features, states, _ = trunk.states_of(torch.randn(2, 3, 32, 32), ())
    torch.testing.assert_close(states.patches, features[:, 4:])
    assert states.cls is not None
    torch.testing.assert_close(states.cls, features[:, 0])
    assert trunk.grid == (2, 2)


@torch.no_grad()
def test_another_size_resamples_the_positions_as_timm_does(tmp_path: Path, pictures: Tensor) -> None:
    _, path = written(tmp_path, VIT)
    encoder = load_timm(f"timm:{VIT}", weights=path, image_size=96)
    theirs = timm.create_model(VIT, pretrained=True, img_size=96, pretrained_cfg_overlay={"file": str(path)}).eval()
    tokens = theirs.forward_features(preprocessed(pictures, encoder.spec))
    torch.testing.assert_close(encoder.encode(pictures), tokens[:, 0], **CLOSE)
    with pytest.raises(ArraError, match="100 pixels are no multiple of its patches' 16; choose 96"):
        load_timm(f"timm:{VIT}", weights=path, image_size=100)


def test_preprocessing_is_the_architectures(tmp_path: Path) -> None:
    spec = load_timm("timm:test_resnet", weights=written(tmp_path, "test_resnet")[1]).spec
    data = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    assert (spec.mean, spec.std, spec.interpolation) == (data["mean"], data["std"], data["interpolation"])
    assert spec.image_size == data["input_size"][-1]


def test_its_identity_is_the_files(tmp_path: Path) -> None:
    _, path = written(tmp_path, VIT)
    first = load_encoder(f"timm:{VIT}", weights=path)
    again = load_encoder(f"timm:{VIT}", weights=path, image_size=96)
    assert first.weights_hash == again.weights_hash == first.spec.weights_sha256
    network = timm.create_model(VIT)
    torch.save(network.state_dict(), tmp_path / "other.pth")
    assert load_encoder(f"timm:{VIT}", weights=tmp_path / "other.pth").weights_hash != first.weights_hash


def test_other_weights_are_refused(tmp_path: Path) -> None:
    network, path = written(tmp_path, VIT)
    with pytest.raises(ArraError, match=r"test_vit\.safetensors: not weights of timm:test_resnet"):
        load_timm("timm:test_resnet", weights=path)
    state = network.state_dict()
    for damaged, told in (
        ({key: value for key, value in state.items() if key != "norm.weight"}, r"missing norm\.weight"),
        ({**state, "blocks.6.norm1.weight": torch.ones(64)}, r"unexpected blocks\.6\.norm1\.weight"),
    ):
        save_file(damaged, tmp_path / "damaged.safetensors")
        with pytest.raises(ArraError, match=told) as caught:
            load_timm(f"timm:{VIT}", weights=tmp_path / "damaged.safetensors")
        assert "\n" not in str(caught.value)


def test_a_name_is_an_architecture_and_no_place() -> None:
    for place in ("hf-hub:timm/vit", "local-dir:/tmp/x", "timm/vit_tiny"):
        with pytest.raises(ArraError, match="names a place, not an architecture"):
            load_timm(f"timm:{place}")
    with pytest.raises(ArraError, match="has no architecture 'test_vitt'; near it are "):
        load_timm("timm:test_vitt")


def test_without_weights_the_repository_of_timm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = written(tmp_path, VIT)
    asked = []

    def fake(weights: str, *, name: str) -> Path:
        asked.append(weights)
        return path

    monkeypatch.setattr(room, "located", fake)
    encoder = load_timm(f"timm:{VIT}.r160_in1k")
    assert asked == ["timm/test_vit.r160_in1k"]
    assert encoder.spec.source == "huggingface.co/timm/test_vit.r160_in1k"
    network = timm.create_model("test_vit", pretrained_cfg={"url": "https://there/x.pth"})
    with pytest.raises(ArraError, match=r"outside the hub; download https://there/x\.pth and set weights to the file"):
        room._pretrained("timm:x", network)
    with pytest.raises(ArraError, match="timm has no pretrained weights of it; set weights to a file"):
        room._pretrained(
            "timm:x", timm.create_model("test_vit", pretrained_cfg={"url": "", "input_size": (3, 160, 160)})
        )


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArraError, match=r"package 'timm' is missing; pip install 'arra\[encoders\]'"):
        load_timm("timm:test_vit")
