"""LPIPS: how different two pictures look, by the features of a VGG16. A loss of tokenizer training, and a measure.

The weights are not in the package: torchvision's VGG16 and the five linear heads of LPIPS 0.1, as files of the user's.
Legend: B batch, H W pixels, C channels.
Source: Zhang et al. 2018; key names of torchvision (`features.N`) and of the heads' published file (`linN.model.1`).
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.weights import read_checkpoint

LEAST_IMAGE_SIZE = 16
"""Pixels per side: four poolings leave one."""
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions between poolings; a picture is compared after each stage."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS' own normalisation of pictures in [-1, 1]."""
PACKAGED_HEADS = "functional/image/lpips_models/vgg.pth"
"""Where torchmetrics has the heads: the file that LlamaGen fetches, byte for byte."""


class PerceptualDistance(nn.Module):
    """LPIPS with VGG16, frozen; its parameters have the names that the published files give them."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        channels, place = 3, 0
        for widths in STAGES:
            for width in widths:
                self.features[str(place)] = nn.Conv2d(channels, width, 3, padding=1)
                channels, place = width, place + 2  # a convolution and its ReLU
            place += 1  # the pooling
        self.heads = nn.ParameterList(torch.ones(widths[-1]) for widths in STAGES)
        self.requires_grad_(False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """The distance of each pair; pictures in [-1, 1], at least 16 pixels a side."""
        total = images.new_zeros(len(images))
        pair = (torch.cat([images, others]) - self.shift) / self.scale
        layers, first = list(self.features.values()), 0
        for stage, (widths, head) in enumerate(zip(STAGES, self.heads, strict=True)):
            pair = F.max_pool2d(pair, 2) if stage else pair
            for layer in layers[first : first + len(widths)]:
                pair = F.relu(layer(pair))
            first += len(widths)
            a, b = (pair / (pair.square().sum(1, keepdim=True) + 1e-8).sqrt()).chunk(2)
            total = total + torch.einsum("bchw,c->bhw", (a - b).square(), head).mean((1, 2))
        return total


def load_perceptual(files: Sequence[str | Path]) -> PerceptualDistance:
    """LPIPS with the weights in `files`: VGG16's in one, the heads' in another or in the same.

    Without the heads' file, those inside torchmetrics are taken.

    Raises:
        ArraError: a file is missing, unsafe or of another network; or there are no heads.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        found = _own_names(read_checkpoint(file))
        if not found:
            raise ArraError(
                f"{file}: neither VGG16 (features.N.weight) nor LPIPS heads (linN.model.1.weight) inside; "
                "expected torchvision's vgg16-397923af.pth, or vgg.pth of LPIPS 0.1"
            )
        state |= found
    where = ", ".join(map(str, files))
    if not any(name.startswith("heads.") for name in state):
        state |= _packaged_heads(where)
    network = PerceptualDistance()
    own = network.state_dict()
    faults = [f"missing {name}" for name in own if name not in state]
    faults += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        raise ArraError(f"{where}: not the weights of LPIPS with VGG16: {'; '.join(faults[:4])}; give both files")
    network.load_state_dict({name: state[name].float() for name in own})
    return network


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that LPIPS needs, by our names; VGG16's classifier stays behind."""
    found = {}
    for name, value in state.items():
        if re.fullmatch(r"features\.\d+\.(weight|bias)", name):
            found[name] = value
        elif match := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            found[f"heads.{match[1]}"] = value.flatten()  # (1, C, 1, 1)
    return found


def _packaged_heads(where: str) -> dict[str, Tensor]:
    spec = find_spec("torchmetrics")
    places = [] if spec is None else [Path(place) / PACKAGED_HEADS for place in spec.submodule_search_locations or ()]
    for path in places:
        if path.is_file():
            return _own_names(read_checkpoint(path))
    raise ArraError(
        f"{where}: no LPIPS heads (linN.model.1.weight) inside; name their file (vgg.pth of LPIPS 0.1) too, or install "
        "torchmetrics, which has them: pip install 'arra[metrics]' -c constraints.txt"
    )
