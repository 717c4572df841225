"""Spaces: the Inception of torch-fidelity with ADM's three outputs, and encoders as spaces."""

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arra.errors import ArraError
from arra.evaluate.sets import Space
from arra.evaluate.spaces import INCEPTION_FILE, InceptionSpace, exact_convolutions, load_inception, open_space
from arra.evaluate.spaces import inception_file as published_file
from tests.encoders.toy_vision import TOYS, save_toy
from tests.evaluate.toy_inception import random_inception

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


def pictures(number: int, side: int = 40) -> Tensor:
    return torch.randint(0, 256, (number, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> InceptionSpace:
    return load_inception(inception_file)


@torch.no_grad()
def test_inceptions_outputs_are_the_networks(inception: InceptionSpace) -> None:
    assert isinstance(inception, Space)
    images = pictures(3)
    found = inception.encode(images)
    network: Any = inception.network
    assert {name: vectors.shape for name, vectors in found.items()} == {
        name: (3, size) for name, size in inception.sizes.items()
    }
    pooled, logits = network(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(found["features"], pooled)
    torch.testing.assert_close(found["logits"], pooled @ network.fc.weight.T, **CLOSE)  # without the bias
    torch.testing.assert_close(found["logits"], logits)
    # the rectified first branch of the fourth block of 17 x 17, its channels last
    seen: dict[str, Tensor] = {}
    hook = network.Mixed_6d.register_forward_hook(
        lambda _m, given, said: seen.update(given=given[0], said=said.clone())
    )
    network(images.permute(0, 3, 1, 2))
    hook.remove()
    branch = network.Mixed_6d.branch1x1
    maps = nn.functional.relu(branch.bn(branch.conv(seen["given"])))
    spatial = found["spatial"].view(3, 17, 17, 7)
    torch.testing.assert_close(spatial.permute(0, 3, 1, 2), maps[:, :7], **CLOSE)
    torch.testing.assert_close(spatial.permute(0, 3, 1, 2), seen["said"][:, :7], **CLOSE)
    assert spatial.amin() == 0
    assert spatial.amax() > 0
    # each as if it were alone
    alone = inception.encode(images[1:2])
    for name, vectors in found.items():
        torch.testing.assert_close(alone[name][0], vectors[1], **CLOSE)


def test_published_weights_are_known_by_their_hash(inception: InceptionSpace) -> None:
    assert not inception.is_published
    published = InceptionSpace(inception.network, weights_sha256="6726825d" + "0" * 56, device="cpu")
    assert published.is_published


def test_inceptions_weights_are_looked_for_where_torch_keeps_them(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ArraError, match=r"no weights in .*checkpoints; .*wget -P .*6726825d\.pth, or .*--inception"):
        open_space("inception")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_FILE).symlink_to(inception_file)
    assert published_file() == tmp_path / "checkpoints" / INCEPTION_FILE
    with pytest.raises(ArraError, match="space inception: has its outputs and sees 299 pixels a side; leave"):
        open_space("inception", image_size=256)


def test_inception_weights_that_do_not_fit_are_told(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ArraError, match=r"other\.pth: not the InceptionV3 of torch-fidelity .*2015-12-05"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(ArraError, match="no such"):
        load_inception(tmp_path / "none.pth")
    usual = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch_fidelity"):
            raise ImportError("No module named 'torch_fidelity'")
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArraError, match=r"space inception: needs torch-fidelity .*pip install 'arra\[metrics\]'"):
        load_inception(inception_file)


@pytest.mark.parametrize("name", ["clip-l14", "rad-dino"])
def test_encoders_are_spaces(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    toy = TOYS[name]
    save_toy(toy, tmp_path)
    space = open_space(name, weights=tmp_path, image_size=toy.image_size)
    assert isinstance(space, Space)
    assert space.name == (name if toy.image_size is None else f"{name}.px{toy.image_size}")
    images = pictures(7, side=50)
    found = space.encode(images)["features"]
    assert space.sizes == {"features": found.shape[1]}
    assert found.shape[1] == {"clip-l14": 20, "rad-dino": 32}[name]
    alone = torch.cat([space.encode(image[None])["features"] for image in images])
    torch.testing.assert_close(found, alone, **CLOSE)
    other = open_space(name, weights=tmp_path, output="concat", image_size=toy.image_size)
    assert other.sizes == {"features": 64}
    assert other.name.startswith(f"{name}.concat")
    assert other.weights_sha256 == space.weights_sha256
    assert "shorter side, then the middle square, bicubic" in space.resize


def test_chest_x_ray_classifiers_tell_findings_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchxrayvision").models
    torch.manual_seed(0)
    network = models.DenseNet().eval()
    nn.init.normal_(network.classifier.bias)
    published = models.model_urls["densenet121-res224-chex"]
    path = tmp_path / Path(published["weights_url"]).name
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    torch.save(network.state_dict(), path)
    images = pictures(2, side=224)
    pixels = (images.float().mean(-1)[:, None] / 127.5 - 1) * 1024
    own = open_space("xrv-densenet121", weights=tmp_path / "own.safetensors")
    found = own.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(found["features"], network.features2(pixels), **CLOSE)
        torch.testing.assert_close(found["findings"], network(pixels).sigmoid(), **CLOSE)
        # of published weights the library's names and operating points
        network.op_threshs = torch.tensor(published["op_threshs"])
        wanted = network(pixels)[:, [place for place, name in enumerate(published["labels"]) if name]]
    space: Any = open_space("xrv-densenet121", weights=path)
    torch.testing.assert_close(space.encode(images)["findings"], wanted, **CLOSE)
    assert space.findings == tuple(filter(None, published["labels"]))
    assert space.sizes == {"features": 1024, "findings": len(space.findings)} == {"features": 1024, "findings": 11}


def test_a_users_patches_become_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def patches(pixels: Tensor) -> Tensor:
        return pixels.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).flatten(2).transpose(1, 2)

    patches.image_size = 32  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_network", SimpleNamespace(patches=patches, __name__="own_network"))
    space = open_space("python:own_network:patches")
    images = pictures(3, side=32)
    wanted = images.permute(0, 3, 1, 2).float().mean((2, 3)) / 127.5 - 1
    torch.testing.assert_close(space.encode(images)["features"], wanted, **CLOSE)
    assert (space.sizes, space.name) == ({"features": 3}, "python-own_network-patches")


def test_names_that_mean_no_space_are_told() -> None:
    with pytest.raises(ArraError, match=r"space 'incepton': unknown; known are inception and more \(arra list enc"):
        open_space("incepton")
    with pytest.raises(ArraError, match=r"space 'dinov2-l': unknown; known are dinov2-l14, .*python:MODULE:NAME"):
        open_space("dinov2-l")
    with pytest.raises(ArraError, match="space dinov2-l14: 'patches' are many vectors of a picture, a space has one"):
        open_space("dinov2-l14", output="patches")


def test_convolutions_are_not_rounded() -> None:
    cudnn: Any = torch.backends.cudnn
    usual = cudnn.conv.fp32_precision
    with exact_convolutions():
        assert cudnn.conv.fp32_precision == "ieee"
    assert cudnn.conv.fp32_precision == usual
