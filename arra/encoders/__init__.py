"""Networks that give vectors, frozen: teachers of alignment, judges of evaluation, readers of captions.

An encoder is asked for by name: one of `SPECS`, `timm:ARCHITECTURE`, `open_clip:ARCHITECTURE`, or `python:MODULE:NAME`
for a network of one's own. Which file beside this one loads it is written here; its library is imported when it does.
"""

from pathlib import Path

import torch

from arra.encoders.base import Encoder, EncoderSpec, VisionEncoder
from arra.encoders.efficientnet_lite import load_efficientnet_lite, weights_file
from arra.encoders.files import located, weights_hash
from arra.encoders.python_object import CallableEncoder
from arra.encoders.settings import EncoderChoice, Output
from arra.encoders.specs import KNOWN, SPECS
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
    "PREFIXES",
    "SPECS",
    "TEXT_SPECS",
    "CallableEncoder",
    "CaptionFeatures",
    "Encoder",
    "EncoderChoice",
    "EncoderSpec",
    "Output",
    "TextEncoder",
    "TextEncoderSpec",
    "VisionEncoder",
    "caption_text",
    "check_encoder_name",
    "clean_caption",
    "encoder_spec",
    "encoder_weights_hash",
    "first_sentence",
    "load_encoder",
    "load_text_encoder",
    "open_encoder",
    "text_encoder_hash",
    "text_encoder_spec",
]

PREFIXES = {"timm": "timm:ARCHITECTURE", "open_clip": "open_clip:ARCHITECTURE", "python": "python:MODULE:NAME"}
"""First words of names that are no names of the table, and how they go on."""


def check_encoder_name(name: str) -> None:
    """Nothing.

    Raises:
        ArraError: a name that means no encoder, the likeliest ones told.
    """
    prefix, colon, rest = name.partition(":")
    if name in KNOWN or (colon and rest and prefix in PREFIXES):
        return
    first = prefix.split("-")[0].lower()
    near = [known for known in SPECS if first and known.startswith(first)] or list(SPECS)[:3]
    raise ArraError(
        f"encoder '{name}': unknown; known are {', '.join(near)} and more (arra list encoders), or "
        f"{', '.join(PREFIXES.values())}"
    )


def encoder_spec(name: str) -> EncoderSpec:
    """The spec of a named encoder, at the published sizes.

    Raises:
        ArraError: an unknown name, or one whose spec is known once it is loaded.
    """
    check_encoder_name(name)
    if name not in SPECS:
        raise ArraError(f"encoder {name}: what it is like is known once it is loaded; load it and ask for its spec")
    return SPECS[name]


def load_encoder(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> Encoder:
    """A frozen encoder by name, on a device.

    `weights` is a file, a folder, or a repository of the hub as ORG/NAME[@REVISION]; without it, what the name stands
    for: the packaged file, or the repository of its spec, which is fetched once.

    Raises:
        ArraError: an unknown name, a missing package, weights that are missing or not its own, or a size that it
            cannot see.
    """
    check_encoder_name(name)
    kind = KNOWN[name].kind if name in KNOWN else name.partition(":")[0]
    if kind == "efficientnet-lite":
        return load_efficientnet_lite(name, weights=weights, device=device, image_size=image_size)
    if kind == "timm":
        from arra.encoders.timm_vision import load_timm

        return load_timm(name, weights=weights, device=device, image_size=image_size)
    if kind == "open_clip":
        from arra.encoders.open_clip_vision import load_open_clip

        return load_open_clip(name, weights=weights, device=device, image_size=image_size)
    if kind == "biomedclip":
        from arra.encoders.open_clip_vision import load_biomedclip

        return load_biomedclip(name, weights=weights, device=device, image_size=image_size)
    if kind == "xrv":
        from arra.encoders.xrv import load_xrv

        return load_xrv(name, weights=weights, device=device, image_size=image_size)
    if kind == "python":
        from arra.encoders.python_object import load_python

        return load_python(name, weights=weights, device=device, image_size=image_size)
    from arra.encoders.transformers_vision import load_transformers_vision

    return load_transformers_vision(name, weights=weights, device=device, image_size=image_size)


def open_encoder(choice: EncoderChoice | str, *, device: str | torch.device = "cpu") -> Encoder:
    """The encoder that a recipe means, at its input size.

    Raises:
        ArraError: as `load_encoder`.
    """
    choice = EncoderChoice(name=choice) if isinstance(choice, str) else choice
    return load_encoder(choice.name, weights=choice.weights, device=device, image_size=choice.image_size)


def encoder_weights_hash(choice: EncoderChoice | str) -> str:
    """SHA-256 of the weights that a recipe means, the same as the `weights_hash` of the loaded encoder.

    Weights that the recipe or the table places are read, once in a process, and neither loaded nor fetched; what other
    names stand for their loader alone knows, and is asked.

    Raises:
        ArraError: an unknown name, or weights that are not here.
    """
    choice = EncoderChoice(name=choice) if isinstance(choice, str) else choice
    check_encoder_name(choice.name)
    known = KNOWN.get(choice.name)
    if known is not None and known.kind == "efficientnet-lite":
        return weights_hash(weights_file(choice.name, choice.weights))
    place = choice.weights if choice.weights is not None or known is None else known.repository
    if place is None or choice.name.startswith("python:") or (known is not None and known.kind == "xrv"):
        return open_encoder(choice).weights_hash
    return weights_hash(located(place, name=choice.name, fetch=False))
