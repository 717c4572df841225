"""Networks that give vectors, frozen: teachers of alignment, judges of evaluation, readers of captions."""

from pathlib import Path

import torch

from arra.encoders.base import Encoder, EncoderSpec
from arra.encoders.efficientnet_lite import SPECS, load_efficientnet_lite
from arra.encoders.text import (
    TEXT_SPECS,
    CaptionFeatures,
    TextEncoder,
    TextEncoderSpec,
    load_text_encoder,
    text_encoder_hash,
    text_encoder_spec,
)
from arra.encoders.text_cleaning import caption_text, clean_caption, first_sentence
from arra.errors import ArraError

__all__ = [
    "SPECS",
    "TEXT_SPECS",
    "CaptionFeatures",
    "Encoder",
    "EncoderSpec",
    "TextEncoder",
    "TextEncoderSpec",
    "caption_text",
    "clean_caption",
    "encoder_spec",
    "first_sentence",
    "load_encoder",
    "load_text_encoder",
    "text_encoder_hash",
    "text_encoder_spec",
]


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
