"""LlamaGen's published tokenizer files, read safely into our VQ network.

Source: FoundationVision/LlamaGen, tokenizer/tokenizer_image (key names, file layout).
"""

from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.llamagen import read_checkpoint
from arra.tokenizers.vq import VQModel

STRAY = "quantize.codebook_used"  # LlamaGen's usage window: a statistic, not a weight


def read_vq_checkpoint(path: str | Path, *, entry: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """The tokenizer's state dict inside a checkpoint file, without the usage window."""
    state = read_checkpoint(path, entry=entry)
    state.pop(STRAY, None)
    return state


def infer_vq_settings(state: Mapping[str, Tensor], *, source: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `VQSettings`: what the tensor shapes tell, overruled by what is known already.

    Raises:
        ArraError: the file has none of a VQ tokenizer's tensors.
    """
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight")
    if missing := [key for key in needed if key not in state]:
        raise ArraError(f"{source}: no VQ tokenizer inside, {', '.join(missing)} missing; pass a LlamaGen VQ file")
    channels = state["encoder.conv_in.weight"].shape[0]
    first = "encoder.conv_blocks.{}.res.0.conv1.weight"
    widths = [state[first.format(i)].shape[0] for i in takewhile(lambda i: first.format(i) in state, count())]
    if not widths:
        raise ArraError(f"{source}: a VQ tokenizer of another kind (no encoder.conv_blocks); pass a LlamaGen VQ file")
    blocks = sum(k.startswith("encoder.conv_blocks.0.res.") and k.endswith(".conv1.weight") for k in state)
    num_codes, code_dim = state["quantize.embedding.weight"].shape
    told = {
        "channels": channels,
        "ch_mult": tuple(width // channels for width in widths),
        "num_res_blocks": blocks,
        "z_channels": state["encoder.conv_out.weight"].shape[0],
        "num_codes": num_codes,
        "code_dim": code_dim,
    }
    return {**told, **known}


def load_vq_weights(model: VQModel, state: Mapping[str, Tensor], *, source: str) -> None:
    """Nothing; the model holds the weights.

    Raises:
        ArraError: keys are missing, unexpected or of another shape; all of them are named.
    """
    own = model.state_dict()
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in own]
    faults += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        raise ArraError(f"{source}: does not fit the tokenizer settings: {'; '.join(faults)}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
