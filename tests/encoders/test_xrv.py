"""TorchXRayVision's DenseNet: the home library's numbers, and published files read without running them."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arra.encoders import EncoderChoice, encoder_weights_hash
from arra.encoders.base import Encoder
from arra.encoders.files import weights_hash
from arra.encoders.xrv import XRV_DENSENET121, XrvDenseNet, load_xrv
from arra.errors import ArraError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    xrv = pytest.importorskip("torchxrayvision")


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    made = xrv.models.DenseNet().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def folder(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as the library publishes it (today's torch, and torch before 1.6), and as a state dict."""
    place = tmp_path_factory.mktemp("xrv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(network, place / "whole.pt")
        torch.save(network, place / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(network.state_dict(), place / "state.pt")
    save_file(network.state_dict(), place / "state.safetensors")
    return place


@pytest.fixture(scope="module")
def encoder(folder: Path) -> XrvDenseNet:
    return load_xrv(weights=folder / "whole.pt")


def grey(side: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, side, side, 1), dtype=torch.uint8, generator=generator).expand(2, side, side, 3)


@torch.no_grad()
@pytest.mark.parametrize("side", [224, 300])
def test_it_equals_the_library(side: int, network: Any, encoder: XrvDenseNet) -> None:
    """From uint8 pictures on: its own normalisation, its own resizing, `features2`."""
    assert isinstance(encoder, Encoder)
    pictures = grey(side)
    normal = [torch.from_numpy(xrv.utils.normalize(each[:, :, 0].numpy(), 255, reshape=True)) for each in pictures]
    pixels = xrv.utils.fix_resolution(torch.stack(normal), 224, network)
    wanted = network.features2(pixels)
    found = encoder.encode(pictures)
    assert found.shape == (2, XRV_DENSENET121.feature_size)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    maps = network.features(pixels).relu()
    patches = encoder.encode(pictures, aggregate="patches")
    torch.testing.assert_close(patches.mT.unflatten(2, maps.shape[2:]), maps, atol=1e-5 * float(maps.max()), rtol=1e-5)


@torch.no_grad()
def test_colour_becomes_the_mean_of_its_channels(encoder: XrvDenseNet) -> None:
    colours = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(3)) * 2 - 1
    plain = colours.mean(1, keepdim=True).expand(2, 3, 224, 224)
    found, wanted = encoder.encode(colours), encoder.encode(plain)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)


@torch.no_grad()
def test_layers_are_the_dense_blocks(network: Any, encoder: XrvDenseNet) -> None:
    pictures, seen = grey(224), []
    network.features.denseblock2.register_forward_hook(lambda *told: seen.append(told[-1].clone()))
    network.features((pictures[..., 0].float() / 127.5 - 1).unsqueeze(1) * 1024)
    wanted = seen[0].mean((2, 3))
    found = encoder.encode(pictures, layers=(2,))
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)


def test_every_kind_of_file_holds_the_same_network(folder: Path) -> None:
    encoders = [load_xrv(weights=path) for path in sorted(folder.iterdir())]
    assert len(encoders) == 4
    first, *others = [encoder.network.state_dict() for encoder in encoders]
    for other in others:
        assert all(torch.equal(value, first[key]) for key, value in other.items())
    assert len({encoder.weights_hash for encoder in encoders}) == 4
    assert not any(parameter.requires_grad for parameter in encoders[0].network.parameters())


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hostile-code-ran",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "inside"])
def test_a_file_with_anything_else_is_refused(
    zipped: bool, where: str, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content: Any = Hostile()
    if where == "inside":
        content = nn.Sequential(nn.ReLU())
        content.more = Hostile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, "hostile.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArraError, match=r"hostile\.pt: refused: it names posix\.system, .* could run code") as caught:
        load_xrv(weights="hostile.pt")
    assert "\n" not in str(caught.value)
    assert not Path("hostile-code-ran").exists()


@pytest.mark.parametrize("file", ["whole.pt", "legacy.pt"])
def test_damage_is_told_in_one_line(file: str, folder: Path, tmp_path: Path) -> None:
    whole = (folder / file).read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole[:100] + b"\xff" * 50 + whole[150:]):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ArraError) as caught:
            load_xrv(weights=tmp_path / file)
        assert "\n" not in str(caught.value)


def test_what_is_not_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"features.conv0.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ArraError, match=r"other\.safetensors: not weights of xrv-densenet121: missing "):
        load_xrv(weights=tmp_path / "other.safetensors")
    with pytest.raises(ArraError, match="sees 224 pixels a side and nothing else, not 512"):
        load_xrv(weights=tmp_path / "other.safetensors", image_size=512)
    monkeypatch.setenv("HOME", str(tmp_path))
    for weights in (None, "densenet121-res224-all", "all"):
        with pytest.raises(ArraError, match=r"densenet121-res224-all is not here; fetch it: wget .*-best\.pt"):
            load_xrv(weights=weights)
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", None)
    with pytest.raises(ArraError, match=r"package 'torchxrayvision' is missing; pip install 'arra\[encoders\]'"):
        load_xrv()


def test_the_librarys_own_cache_is_looked_at(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / ".torchxrayvision" / "models_data"
    place.mkdir(parents=True)
    (place / xrv.models.model_urls["nih"]["weights_url"].rsplit("/", 1)[1]).symlink_to(folder / "legacy.pt")
    assert load_xrv(weights="densenet121-res224-nih").weights_hash == weights_hash(folder / "legacy.pt")


def test_the_hash_of_a_recipe_is_the_encoders(
    folder: Path, encoder: XrvDenseNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / ".torchxrayvision" / "models_data"
    place.mkdir(parents=True)
    (place / xrv.models.model_urls["chex"]["weights_url"].rsplit("/", 1)[1]).symlink_to(folder / "whole.pt")
    for weights in ("densenet121-res224-chex", str(folder / "whole.pt")):
        assert encoder_weights_hash(EncoderChoice(name="xrv-densenet121", weights=weights)) == encoder.weights_hash
