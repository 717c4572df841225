"""Tokenizer files as our VQ network: what their shapes tell, and LlamaGen's format both ways.

Meta's format is in `arra.tokenizers.chameleon`.
Source: FoundationVision/LlamaGen, tokenizer/tokenizer_image (key names, file layout).
"""

import re
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.fitting import Fitted, Fitting, fit
from arra.models.hub import Description, origin_facts
from arra.models.weights import Weights
from arra.tokenizers.vq import VQModel, VQSettings

STRAY = "quantize.codebook_used"  # LlamaGen's statistic of the last codes, in its state dict but no weight
USAGE_WINDOW_SIZE = 65536


def infer_vq_settings(
    state: Mapping[str, Tensor],
    *,
    source: str,
    known: Mapping[str, Any],
    level: str = "conv_blocks",
    block: str = "res",
    wanted: str = "a LlamaGen VQ file",
) -> dict[str, Any]:
    """Fields of `VQSettings`: what the tensor shapes tell, overruled by what is known already.

    `level` and `block` are the file's words for the encoder's levels and the residual blocks in them.

    Raises:
        ArraError: the file has none of a VQ tokenizer's tensors.
    """
    needed = {"encoder.conv_in.weight": 4, "encoder.conv_out.weight": 4, "quantize.embedding.weight": 2}
    if missing := [key for key in needed if key not in state]:
        raise ArraError(f"{source}: no VQ tokenizer inside, {', '.join(missing)} missing; pass {wanted}")
    first = f"encoder.{level}.{{}}.{block}.0.conv1.weight"
    levels = [first.format(i) for i in takewhile(lambda i: first.format(i) in state, count())]
    if odd := [key for key in (*needed, *levels) if state[key].dim() != needed.get(key, 4)]:
        raise ArraError(f"{source}: no VQ tokenizer inside: {odd[0]} is {tuple(state[odd[0]].shape)}")
    channels = state["encoder.conv_in.weight"].shape[0]
    if not levels or not channels:
        raise ArraError(f"{source}: a VQ tokenizer of another kind (no encoder.{level}); pass {wanted}")
    begin = f"encoder.{level}.0.{block}."
    blocks = sum(key.startswith(begin) and key.endswith(".conv1.weight") for key in state)
    num_codes, code_dim = state["quantize.embedding.weight"].shape
    told = {
        "channels": channels,
        "ch_mult": tuple(state[key].shape[0] // channels for key in levels),
        "num_res_blocks": blocks,
        "z_channels": state["encoder.conv_out.weight"].shape[0],
        "num_codes": num_codes,
        "code_dim": code_dim,
    }
    return {**told, **known}


def vq_settings(source: str, fields: dict[str, Any]) -> VQSettings:
    """The settings of these fields.

    Raises:
        ArraError: a field does not do.
    """
    try:
        return VQSettings(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        told = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))
        raise ArraError(f"{source}: tokenizer settings: {told}") from error


def as_it_is(model: VQModel) -> nn.Module:
    """The network itself: its names are LlamaGen's."""
    return model


def build_vq(
    weights: Weights,
    settings: VQSettings,
    how: Fitting,
    *,
    named: Callable[[VQModel], nn.Module] = as_it_is,
    stray: str = re.escape(STRAY),
) -> tuple[VQModel, Fitted]:
    """A network in eval mode with these weights, and what was left over of them.

    `named` gives its layers the names that the weights have, `stray` is a pattern of keys that are no weights.

    Raises:
        ArraError: keys are missing, unexpected or of another shape; all of them are named.
    """
    with torch.device("meta"):
        model = VQModel(settings)
    left = fit(
        named(model),
        weights.state,
        source=str(weights.source),
        fresh=lambda: named(_fresh(settings)),
        stray=re.compile(stray),
        how=how,
        what="tokenizer",
    )
    return model.eval(), left


def _fresh(settings: VQSettings) -> VQModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VQModel(settings)


def original_vq_state(model: VQModel, dtype: torch.dtype, *, source: str) -> dict[str, Tensor]:
    """The state dict as LlamaGen's own class has it, its usage window empty.

    Raises:
        ArraError: LlamaGen's configuration has no word for the network.
    """
    settings = model.settings
    lacks = []
    if settings.channels != 128:
        lacks.append(f"{settings.channels} base channels, LlamaGen's configuration has 128 only")
    if settings.num_res_blocks != 2:
        lacks.append(f"{settings.num_res_blocks} residual blocks per level, LlamaGen's configuration has 2 only")
    if not settings.normalize:
        lacks.append("codes that are not normalised, LlamaGen's scripts normalise them")
    if settings.attended != (len(settings.ch_mult) - 1,):
        places = ", ".join(map(str, settings.attended)) or "no"
        lacks.append(f"attention in {places} levels, LlamaGen's configuration has it in the last alone")
    if not settings.has_decoder:
        lacks.append("no decoder, LlamaGen's configuration always has one")
    if lacks:
        raise ArraError(f"{source}: LlamaGen cannot build this tokenizer: {'; '.join(lacks)}; keep it in arra's format")
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    return {STRAY: torch.zeros(USAGE_WINDOW_SIZE), **state}


def vq_launch_hint(settings: VQSettings, *, file: str) -> str:
    """What LlamaGen's scripts must be told to run a tokenizer exported to `file`."""
    names = {(1, 1, 2, 2, 4): "VQ-16", (1, 2, 2, 4): "VQ-8"}
    if settings.ch_mult in names and settings.z_channels == 256:
        sizes = f"--codebook-size {settings.num_codes} --codebook-embed-dim {settings.code_dim}"
        return f"--vq-ckpt {file} --vq-model {names[settings.ch_mult]} {sizes}"
    fields = {
        "encoder_ch_mult": list(settings.ch_mult),
        "decoder_ch_mult": list(settings.ch_mult),
        "z_channels": settings.z_channels,
        "codebook_size": settings.num_codes,
        "codebook_embed_dim": settings.code_dim,
    }
    told = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"{file} is of no model of LlamaGen's scripts; in Python: VQModel(ModelArgs({told}))"


def describe_tokenizer(model: VQModel, name: str, about: dict[str, Any]) -> Description:
    """The model card of a tokenizer."""
    settings, licence = model.settings, about.get("licence")
    facts = [
        ("parameters", f"{model.num_parameters():,}"),
        ("pixels per code", f"{settings.downsampling} x {settings.downsampling}"),
        ("codebook", f"{settings.num_codes} codes of {settings.code_dim} dimensions"),
        *([] if settings.has_decoder else [("decoder", "none: pictures become codes, codes no pictures")]),
        *origin_facts(about),
    ]
    return Description(
        kind="vq",
        title=f"Image tokenizer {name}",
        pipeline_tag="image-feature-extraction",
        facts=facts,
        usage='from arra.tokenizers import ImageTokenizer\n\ntokenizer = ImageTokenizer.from_pretrained("{repo}")',
        licence=licence if isinstance(licence, str) else None,
    )
