"""LPIPS: equal to torchmetrics' network on the same weights, and its files read safely."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.train.perceptual import PerceptualDistance, load_perceptual

torchmetrics = pytest.importorskip("torchmetrics", reason="the second library; pip install 'arra[metrics]'")
pytest.importorskip("torchvision", reason="torchmetrics' network takes VGG16 from torchvision")


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of torchvision's published file."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    with torch.device("meta"):
        network = vgg16(weights=None)
    state = {name: torch.randn(value.shape) for name, value in network.features.state_dict().items()}
    for name, value in state.items():
        value *= 0.05 if name.endswith("bias") else (2 / value[0].numel()) ** 0.5
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{n}": v for n, v in state.items()} | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def theirs(vgg_file: Path, images: Tensor, others: Tensor) -> Tensor:
    """torchmetrics' LPIPS with its packaged heads and the same VGG16."""
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)  # random VGG16, published heads
    state = torch.load(vgg_file, weights_only=True)
    own = network.net.state_dict()
    convolutions = {name.rpartition(".")[0].rpartition(".")[2]: name for name in own}
    assert len(convolutions) == 13
    network.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in own})
    with torch.no_grad():
        found: Tensor = network(images, others)
    return found.flatten()


def pair(side: int, number: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(number, 3, side, side, generator=generator) * 2 - 1
    return images, (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("side", [16, 40])
def test_the_distance_equals_torchmetrics(vgg_file: Path, side: int) -> None:
    images, others = pair(side)
    ours = load_perceptual([vgg_file])(images, others)
    assert ours.min() > 0.01
    torch.testing.assert_close(ours, theirs(vgg_file, images, others), rtol=1e-4, atol=1e-6)


def test_equal_pictures_have_no_distance_and_a_finite_gradient(vgg_file: Path) -> None:
    network = load_perceptual([vgg_file])
    images = pair(16)[0].requires_grad_()
    network(images, images.detach()).sum().backward()
    assert network(images, images).abs().max() == 0
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_come_from_one_file_or_two_of_any_kind(vgg_file: Path, tmp_path: Path) -> None:
    """The heads that torchmetrics has are those of LPIPS 0.1 in the published layout."""
    place = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
    whole = load_perceptual([vgg_file, place]).state_dict()
    state = torch.load(vgg_file, weights_only=True)
    heads = torch.load(place, map_location="cpu", weights_only=True)
    safetensors.torch.save_file(state | heads, tmp_path / "both.safetensors")
    for again in (load_perceptual([vgg_file]), load_perceptual([tmp_path / "both.safetensors"])):
        assert all(torch.equal(value, whole[name]) for name, value in again.state_dict().items())
    assert torch.equal(whole["heads.0"], heads["lin0.model.1.weight"].flatten())


def test_files_that_do_not_fit_are_told(vgg_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"features.x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ArraError, match=r"other\.pth: neither VGG16 .* nor LPIPS heads"):
        load_perceptual([tmp_path / "other.pth"])
    state = torch.load(vgg_file, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "features.5.bias"}, tmp_path / "less.pth")
    with pytest.raises(ArraError, match=r"less\.pth: not the weights of LPIPS with VGG16: missing features\.5\.bias;"):
        load_perceptual([tmp_path / "less.pth"])
    torch.save(state | {"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "wide.pth")
    with pytest.raises(ArraError, match=r"features\.0\.weight is \(64, 3, 5, 5\), expected \(64, 3, 3, 3\)"):
        load_perceptual([tmp_path / "wide.pth"])
    with pytest.raises(ArraError, match="no such"):
        load_perceptual([tmp_path / "none.pth"])
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(print))
    with pytest.raises(ArraError, match="could run code"):
        load_perceptual([tmp_path / "evil.pth"])
    monkeypatch.setattr("arra.train.perceptual.find_spec", lambda name: None)
    with pytest.raises(ArraError, match=r"no LPIPS heads .*name their file .* or install torchmetrics"):
        load_perceptual([vgg_file])


def test_names_are_those_of_the_published_files() -> None:
    names = [name for name in PerceptualDistance().state_dict() if name.endswith("weight")]
    assert names == [f"features.{i}.weight" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
