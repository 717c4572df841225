"""Training a part of a language model: LoRA, also over 4-bit weights, and the rows of the image tokens alone.

The adapters are `peft`'s, put into the network in place, so that it keeps its class, its names and its listeners; the
4-bit layers are `bitsandbytes`'. Both are optional (extras `llm` and `lean`). What is trained is float32 and lies in
tensors of its own: of embeddings and head the rows of the trained tokens, so that no other row moves, whatever the
optimiser does.
Source: Hu et al. 2021 (LoRA); Dettmers et al. 2023 (QLoRA: NF4, double quantisation); Anole (head rows alone).
"""

import copy
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.extend import head_layer, is_tied
from arra.runs import atomic_file, atomic_write
from arra.settings import Settings

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What `PeftModel` puts before the names of the network it wraps, and expects in its files."""
ADAPTER = "default"


class LoraSettings(Settings):
    """Low-rank updates beside frozen matrices."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of layers ("q_proj", "v_proj"), or every matrix but the head."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead, which lets high ranks learn as fast."""


def add_lora(lm: nn.Module, settings: LoraSettings, *, rows: Sequence[int], seed: int) -> None:
    """Nothing; LoRA, and these tokens' rows of embeddings and head, are what is left to train of the model.

    Where they start is a function of the seed; torch's own random numbers are as before.
    Raises: ArraError for targets that the model has not.
    """
    peft = _peft()
    names = [_name_of(lm, lm.get_input_embeddings())]  # type: ignore[operator]
    if not is_tied(lm):
        names.append(_name_of(lm, head_layer(lm)))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        use_rslora=settings.rank_stabilized,
        trainable_token_indices={name: [int(row) for row in rows] for name in names} if rows else None,
        bias="none",
    )
    if not isinstance(settings.targets, str):
        _check_targets(lm, settings.targets)
    _put_in(lm, config, seed)


def train_head_rows(lm: nn.Module, rows: Sequence[int]) -> None:
    """Nothing; these tokens' rows of the head are what is left to train, and of the embeddings where those are one.

    The cheap baseline, Anole's: it learns to write image tokens with the states that are there.
    """
    peft = _peft()
    layer = lm.get_input_embeddings() if is_tied(lm) else head_layer(lm)  # type: ignore[operator]
    indices = [int(row) for row in rows]
    _put_in(lm, peft.TrainableTokensConfig(target_modules=[_name_of(lm, layer)], token_indices=indices), 0)


def _put_in(lm: nn.Module, config: Any, seed: int) -> None:
    """Nothing; the adapter is in the model, started from random numbers of its own."""
    device, tied = next(lm.parameters()).device, is_tied(lm)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # it is set
        # rows that are trained it does tie; checked below
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        _peft().inject_adapter_in_model(config, lm, ADAPTER)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if tied and not _same_rows(lm):
        raise ArraError(
            f"{type(lm).__name__}: embeddings and head are one matrix and would not stay so; use train: all"
        )


def quantize(lm: nn.Module, *, compute_dtype: torch.dtype = torch.float32) -> None:
    """Nothing; every linear layer but the head holds its weights in 4 bits (NF4) and is frozen.

    Products are computed in `compute_dtype`. To train the model, add LoRA afterwards.
    """
    bitsandbytes = load_bitsandbytes("model.llm.four_bit")
    head = head_layer(lm)
    names = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    for name in names:  # one by one, so that each layer's own weights are gone before the next is narrowed
        layer: Any = lm.get_submodule(name)
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        small.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
        )
        small.bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)
        # it would take another layout at the first look in eval mode, and send no gradients through it from then on
        small.support_avx512bf16_for_cpu = False
        _replace(lm, name, small.to(layer.weight.device))  # moving is what quantises
    lm.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks


def merge_adapters(lm: nn.Module) -> None:
    """Nothing; the model is an ordinary one again, its weights those that were trained, at full width."""
    for name, module in list(lm.named_modules()):
        if _is_rows(module):
            module.merge()
            _replace(lm, name.removesuffix(".token_adapter"), module.base_layer)
        elif hasattr(module, "get_delta_weight"):
            base = _widened(module.get_base_layer())
            delta = module.get_delta_weight(ADAPTER)
            base.weight.data = (base.weight.data.float() + delta.float()).to(base.weight.dtype)
            _replace(lm, name, base)
    for name, module in list(lm.named_modules()):
        _replace(lm, name, _widened(module))
    for mark in ("peft_config", "is_loaded_in_4bit"):
        lm.__dict__.pop(mark, None)
    lm.requires_grad_(True)


def save_adapter(lm: nn.Module, folder: Path, *, base: str) -> Path:
    """The folder, now with the adapter alone, as `PeftModel.from_pretrained(MODEL, folder)` reads it.

    `base` is the name or folder of the model that it was trained on.
    Raises: ArraError when the folder cannot be written.
    """
    state: dict[str, Tensor] = _peft().get_peft_model_state_dict(lm, adapter_name=ADAPTER, save_embedding_layers=False)
    with atomic_file(folder / WEIGHTS_FILE) as path:
        named = {PREFIX + name: value.detach().cpu().clone() for name, value in state.items()}
        safetensors.torch.save_file(named, path, metadata={"format": "pt"})
    config: Any = copy.copy(lm.peft_config[ADAPTER])  # type: ignore[index]
    config.inference_mode, config.base_model_name_or_path = True, base
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    atomic_write(folder / CONFIG_FILE, json.dumps(told, indent=2, sort_keys=True) + "\n")
    return folder


def _is_rows(module: nn.Module) -> bool:
    """Whether it is `peft`'s layer that lays trained rows over a frozen matrix."""
    return hasattr(module, "get_merged_weights") and hasattr(module, "base_layer")


def _widened(layer: nn.Module) -> Any:
    """The layer, or the ordinary one that a 4-bit layer stands for."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None:
        return layer
    weight: Tensor = load_bitsandbytes("model.llm.four_bit").functional.dequantize_4bit(layer.weight.data, state)
    wide = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    wide.weight = nn.Parameter(weight)
    wide.bias = layer.bias  # type: ignore[assignment]
    return wide


def _replace(lm: nn.Module, name: str, module: nn.Module) -> None:
    if name:
        parent, _, child = name.rpartition(".")
        setattr(lm.get_submodule(parent), child, module)


def _name_of(lm: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in lm.named_modules() if module is wanted)


def _same_rows(lm: nn.Module) -> bool:
    """Whether what is trained of the embeddings is what is trained of the head."""
    layers = (lm.get_input_embeddings(), head_layer(lm))  # type: ignore[operator]
    rows = [getattr(getattr(layer, "token_adapter", layer), "trainable_tokens_delta", None) for layer in layers]
    return rows[0] is rows[1]


def _check_targets(lm: nn.Module, targets: Sequence[str]) -> None:
    head = head_layer(lm)  # its rows are trained as they are
    kinds = ("Conv1D",)  # what GPT-2 has for a linear layer
    layers = {
        name
        for name, module in lm.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ in kinds) and module is not head
    }
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ArraError(f"model.llm.lora.targets: {type(lm).__name__} has no layer '{target}'; it has {known}")


def _peft() -> ModuleType:
    with suppress(ArraError):
        load_bitsandbytes("")  # peft does so too, and lets it chatter
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ArraError(
            "LoRA, training of single rows: the package 'peft' is missing; pip install 'arra[llm]' -c constraints.txt"
        ) from error
    return peft


def load_bitsandbytes(purpose: str) -> ModuleType:
    """The library of 4-bit weights and 8-bit optimisers.

    Raises: ArraError when it is not installed.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # on a CPU it misses a kernel for inference, which training does not use
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise ArraError(
            f"{purpose}: the package 'bitsandbytes' is missing; pip install 'arra[lean]' -c constraints.txt"
        ) from error
    finally:
        logger.setLevel(level)
    return bitsandbytes
