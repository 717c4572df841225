"""What travels with an encoder's weights, and the one interface that every frozen encoder has.

    pictures --preprocessed--> pixels --states_of--> EncoderStates --aggregated--> vectors

A family of encoders (a file beside this one) says how a network turns pixels into `EncoderStates`; everything else is
here. Legend: B batch, H W pixels, S pixels the encoder sees, P patches, F feature, E projected feature.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arra.encoders.settings import Output
from arra.errors import ArraError

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EncoderSpec:
    """Preprocessing, origin and identity of an encoder."""

    name: str
    feature_size: int
    """Of the default output."""
    image_size: int
    """Pixels a side that it sees."""
    mean: Triple
    std: Triple
    weights_sha256: str
    """Empty where any weights of the architecture may be given; the loaded encoder knows those it has."""
    family: str
    """Architecture and training data; a judge of the teacher's family is said to be one."""
    licence: str
    source: str
    output: Output = "mean"
    """The default output."""
    outputs: tuple[Output, ...] = ("mean",)
    """Those that it has."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["squash", "crop", "pad"] = "squash"
    """How a picture that is no square becomes one: both sides to S; the shorter side to S and the middle square of it;
    the longer side to S with zeros (after mean and deviation) behind."""
    num_layers: int | None = None
    """Blocks that `layers` may name; None where only the end of the network can be taken."""
    patch_size: int | None = None
    """Pixels a side of a patch; other input sizes are multiples of it. None: this encoder sees one size."""


@dataclass(frozen=True)
class EncoderStates:
    """What a network says of pictures at one place: its end, or one of its blocks."""

    patches: Float[Tensor, "B P F"]
    """In raster order."""
    grid: tuple[int, int]
    """Rows and columns of the patches."""
    cls: Float[Tensor, "B F"] | None = None
    projected: Float[Tensor, "B E"] | None = None
    mean: Float[Tensor, "B F"] | None = None
    """Where the network has its own; else the patches are averaged."""


@runtime_checkable
class Encoder(Protocol):
    """A frozen network that turns pictures into vectors."""

    spec: EncoderSpec

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights it has."""
        ...

    def encode(
        self,
        images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"],
        *,
        aggregate: Output | None = None,
        layers: Sequence[int] | None = None,
        grid: int | None = None,
    ) -> Float[Tensor, "B F"] | Float[Tensor, "B P F"]:
        """Float32 vectors of pictures, uint8 or float in [-1, 1] of any size: one each, or with `patches` one a patch.

        `aggregate` is an output of the spec, None its default; `layers` are blocks counted from 1, whose vectors are
        laid one after the other; `grid` averages the patches to as many per side.

        Raises:
            ArraError: this encoder has no such output, or no such layer.
        """
        ...


class VisionEncoder(ABC):
    """An encoder around a network of some library; a family says what `states_of` does."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, *, weights_hash: str) -> None:
        self.spec, self.network = spec, network.eval().requires_grad_(False)
        self._weights_hash = weights_hash

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights it has."""
        return self._weights_hash

    @abstractmethod
    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """States of preprocessed pixels after each of the blocks, and last those at the end of the network.

        The end is what the home library gives (after its final norm); a block's are as they leave it.
        """

    @torch.no_grad()
    def encode(
        self,
        images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"],
        *,
        aggregate: Output | None = None,
        layers: Sequence[int] | None = None,
        grid: int | None = None,
    ) -> Float[Tensor, "B F"] | Float[Tensor, "B P F"]:
        """See `Encoder.encode`."""
        output = aggregate or self.spec.output
        self._check(output, layers)
        states = self.states_of(preprocessed(images, self.spec), layers or ())
        taken = states[:-1] if layers else states
        if output == "patches" and grid is None and len({each.grid for each in taken}) > 1:
            raise ArraError(
                f"encoder {self.spec.name}: these layers' maps differ in size; set grid to bring them together"
            )
        return torch.cat([aggregated(each, output, grid=grid).float() for each in taken], dim=-1)

    def _check(self, output: Output, layers: Sequence[int] | None) -> None:
        if output not in self.spec.outputs:
            raise ArraError(
                f"encoder {self.spec.name}: has no output '{output}'; it has {', '.join(self.spec.outputs)}"
            )
        if not layers:
            return
        if output == "projected":
            raise ArraError(f"encoder {self.spec.name}: its projection is of the end of the network; leave layers out")
        if self.spec.num_layers is None:
            raise ArraError(f"encoder {self.spec.name}: only the end of the network can be taken; leave layers out")
        if outside := [layer for layer in layers if not 1 <= layer <= self.spec.num_layers]:
            raise ArraError(f"encoder {self.spec.name}: layer {outside[0]} is outside 1..{self.spec.num_layers}")


def aggregated(
    states: EncoderStates, output: Output, *, grid: int | None = None
) -> Float[Tensor, "B F"] | Float[Tensor, "B P F"]:
    """The wanted output of some states."""
    if output == "patches":
        return states.patches if grid is None else pooled_patches(states.patches, states.grid, (grid, grid))
    mean = states.patches.mean(1) if states.mean is None else states.mean
    if output == "mean":
        return mean
    if output == "projected":
        assert states.projected is not None
        return states.projected
    assert states.cls is not None
    return states.cls if output == "cls" else torch.cat([states.cls, mean], 1)


def pooled_patches(
    patches: Float[Tensor, "B P F"], grid: tuple[int, int], wanted: tuple[int, int]
) -> Float[Tensor, "B Q F"]:
    """The patches averaged to (or, where there are fewer, repeated on) another grid."""
    maps = patches.transpose(1, 2).unflatten(2, grid)
    return F.adaptive_avg_pool2d(maps, wanted).flatten(2).transpose(1, 2)


def preprocessed(
    images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"], spec: EncoderSpec
) -> Float[Tensor, "B 3 S S"]:
    """Pictures at the encoder's size (antialiased when shrinking), with mean and deviation taken out."""
    x = images.permute(0, 3, 1, 2).float() / 255 if images.dtype == torch.uint8 else (images + 1) / 2  # [0, 1]
    side, (height, width) = spec.image_size, x.shape[2:]
    size = (side, side)
    if spec.fit == "crop":  # rounding as `transformers` and torchvision do it
        size = (height * side // min(height, width), width * side // min(height, width))
    elif spec.fit == "pad":  # and as SAM does
        edge = max(height, width)
        size = (max(1, int(height * side / edge + 0.5)), max(1, int(width * side / edge + 0.5)))
    if (height, width) != size:
        x = F.interpolate(x, size=size, mode=spec.interpolation, antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    x = (x - mean) / std
    if spec.fit == "crop":
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        return x[:, :, top : top + side, left : left + side]
    return F.pad(x, (0, side - size[1], 0, side - size[0]))


def require_package(name: str, module: str, *, package: str | None = None) -> None:
    """Nothing; `module` can be imported. `package` is what pip calls it, where that is another word.

    Raises:
        ArraError: it is not installed; the line says how to get it.
    """
    try:
        importlib.import_module(module)
    except ImportError:
        raise ArraError(
            f"encoder {name}: the package '{package or module}' is missing; pip install 'arra[encoders]' -c "
            "constraints.txt"
        ) from None


def at_size(spec: EncoderSpec, image_size: int | None) -> EncoderSpec:
    """The spec with another input size.

    Raises:
        ArraError: this encoder sees one size, or patches do not fill the wanted one.
    """
    if image_size is None or image_size == spec.image_size:
        return spec
    if spec.patch_size is None:
        raise ArraError(f"encoder {spec.name}: sees {spec.image_size} pixels a side and nothing else, not {image_size}")
    if image_size % spec.patch_size:
        raise ArraError(
            f"encoder {spec.name}: {image_size} pixels are no multiple of its patches' {spec.patch_size}; choose "
            f"{max(1, round(image_size / spec.patch_size)) * spec.patch_size}"
        )
    return replace(spec, image_size=image_size)
