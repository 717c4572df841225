"""Networks that give vectors, frozen: the teachers of alignment and the judges of evaluation."""

from pathlib import Path

import torch

from arra.encoders.base import Encoder, EncoderSpec
from arra.encoders.efficientnet_lite import SPECS, load_efficientnet_lite
from arra.errors import ArraError

__all__ = ["SPECS", "Encoder", "EncoderSpec", "encoder_spec", "load_encoder"]


def encoder_spec(name: str) -> EncoderSpec:
    """The spec of a named encoder.

    Raises:
        ArraError: an unknown name.
    """
    if name not in SPECS:
        raise ArraError(f"encoder '{name}': unknown; known are {', '.join(SPECS)}")
    return SPECS[name]


def load_encoder(name: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Encoder:
    """A frozen encoder by name, on a device; `weights` in place of the packaged file.

    Raises:
        ArraError: an unknown name, a missing package, or other weights than the known ones.
    """
    encoder_spec(name)
    return load_efficientnet_lite(name, weights=weights, device=device)
