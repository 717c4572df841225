"""What travels with an encoder's weights, and the one interface that every frozen encoder has.

Legend: B batch, H W pixels, F feature.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True)
class EncoderSpec:
    """Preprocessing, origin and identity of an encoder."""

    name: str
    feature_size: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights_sha256: str
    family: str
    """Architecture and training data; a judge of the teacher's family is said to be one."""
    licence: str
    source: str


@runtime_checkable
class Encoder(Protocol):
    """A frozen network that turns pictures into vectors."""

    spec: EncoderSpec

    def encode(
        self, images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"], *, aggregate: str = "mean"
    ) -> Float[Tensor, "B F"]:
        """One float32 vector per picture, uint8 or float in [-1, 1] of any size."""
        ...


def preprocessed(
    images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"], spec: EncoderSpec
) -> Float[Tensor, "B 3 S S"]:
    """Pictures resized (bicubic, antialiased when shrinking), with mean and deviation taken out."""
    x = images.permute(0, 3, 1, 2).float() / 255 if images.dtype == torch.uint8 else (images + 1) / 2  # [0, 1]
    if x.shape[2:] != (spec.image_size, spec.image_size):
        x = F.interpolate(x, size=(spec.image_size, spec.image_size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    return (x - mean) / std
