"""LlamaGen's published models: their sizes, and their checkpoint files read safely into our decoder.

Source: FoundationVision/LlamaGen, autoregressive/models/gpt.py (sizes) and autoregressive/train (file layouts).
"""

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.decoder import Decoder

SIZES: dict[str, dict[str, int]] = {
    "b": {"num_layers": 12, "num_heads": 12, "hidden_size": 768},
    "l": {"num_layers": 24, "num_heads": 16, "hidden_size": 1024},
    "xl": {"num_layers": 36, "num_heads": 20, "hidden_size": 1280},
    "xxl": {"num_layers": 48, "num_heads": 24, "hidden_size": 1536},
    "xxxl": {"num_layers": 48, "num_heads": 40, "hidden_size": 2560},
    "1b": {"num_layers": 22, "num_heads": 32, "hidden_size": 2048},
    "3b": {"num_layers": 24, "num_heads": 32, "hidden_size": 3200},
    "7b": {"num_layers": 32, "num_heads": 32, "hidden_size": 4096},
}

# left behind by LlamaGen's attributes and by its generate(): never weights
STRAY = re.compile(r"(^|\.)(freqs_cis|causal_mask|kv_cache\.(k_cache|v_cache))$")
# where trainers (DDP, DeepSpeed, Lightning) put the state dict; FSDP's consolidated file is one itself
ENTRIES = {"model": ("model", "module", "state_dict"), "ema": ("ema",)}


def read_checkpoint(path: str | Path, *, entry: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """The state dict inside a checkpoint file, or inside the consolidated.pth of an FSDP folder.

    Only tensors and plain data are unpickled (and the training script's argparse.Namespace), so no file can run code.
    Raises: ArraError when the file is missing, broken, unsafe, or does not hold the entry.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "consolidated.pth"
    if not path.is_file():
        raise ArraError(f"{path}: no such checkpoint file; pass a .pt, .pth or .safetensors file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ArraError(f"{path}: holds a {type(content).__name__}, expected a state dict or a training checkpoint")
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    for name in ENTRIES[entry]:
        if name in nested:
            return _only_tensors(nested[name], path)
    if entry == "model" and all(isinstance(value, Tensor) for value in content.values()):
        return _only_tensors(content, path)
    raise ArraError(f"{path}: no {entry!r} weights inside; it holds {', '.join(map(str, content)) or 'nothing'}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArraError(f"{path}: not a readable safetensors file ({_first_line(error)}); fetch it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the refusal that follows says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArraError(
            f"{path}: refused: not a checkpoint of plain tensors, and opening it could run code; get the weights as "
            "safetensors or from their publisher"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ArraError(f"{path}: not a readable checkpoint ({_first_line(error)}); fetch it again") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _only_tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    odd = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise ArraError(f"{path}: entries that are no tensors: {', '.join(odd)}; expected a state dict")
    return dict(state)


def infer_settings(state: Mapping[str, Tensor], *, source: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DecoderSettings`: what the tensor shapes tell, overruled by what is known already.

    The number of heads and the grid leave no trace in the weights (unless a stray rotary table came along): heads are
    then looked up by width and depth among the published sizes, the grid is 16 x 16.
    Raises: ArraError when the heads cannot be told.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    needed = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    if absent := [key for key in needed if key not in shapes]:
        raise ArraError(f"{source}: not a LlamaGen decoder: {', '.join(absent)} missing")
    num_codes, hidden_size = shapes["tok_embeddings.weight"]
    blocks = [match[1] for key in shapes if (match := re.match(r"layers\.(\d+)\.", key))]
    inferred: dict[str, Any] = {
        "num_layers": 1 + max(map(int, blocks)),
        "hidden_size": hidden_size,
        "num_codes": num_codes,
        "ffn_hidden_size": shapes["layers.0.feed_forward.w1.weight"][0],
        **_condition_shape(shapes, source),
    }
    prefix_length = inferred["prefix_length"]
    inferred.update(_from_rotary_table(shapes.get("freqs_cis"), hidden_size, prefix_length))
    for size in SIZES.values():
        if size["num_layers"] == inferred["num_layers"] and size["hidden_size"] == hidden_size:
            inferred.setdefault("num_heads", size["num_heads"])
    settings = {**inferred, **known}
    if "num_heads" not in settings:
        raise ArraError(
            f"{source}: tensor shapes do not tell the number of heads (and {settings['num_layers']} layers of "
            f"{hidden_size} is no published size); pass num_heads= (and grid=, which is (16, 16) unless given)"
        )
    head_dim = hidden_size // settings["num_heads"]
    spare = shapes["layers.0.attention.wqkv.weight"][0] - hidden_size
    if head_dim and 0 < spare < 2 * hidden_size and spare % (2 * head_dim) == 0:
        settings.setdefault("num_kv_heads", spare // (2 * head_dim))
    return settings


def _condition_shape(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, Any]:
    if classes := shapes.get("cls_embedding.embedding_table.weight"):
        return {"condition": "class", "num_classes": classes[0] - 1, "prefix_length": 1}
    if uncond := shapes.get("cls_embedding.uncond_embedding"):
        return {"condition": "caption", "prefix_length": uncond[0], "caption_dim": uncond[1]}
    text, slots = (shapes.get(f"cls_embedding.{table}_table.weight") for table in ("text", "position"))
    if text and slots:
        return {"condition": "text", "text_vocab_size": text[0], "prefix_length": slots[0]}
    raise ArraError(f"{source}: no class, caption or text embedding under cls_embedding.*: not a LlamaGen decoder")


def _from_rotary_table(shape: tuple[int, ...] | None, hidden_size: int, prefix_length: int) -> dict[str, Any]:
    if shape is None or len(shape) != 3:
        return {}
    side = math.isqrt(max(shape[0] - prefix_length, 0))
    square = side * side == shape[0] - prefix_length and side > 0
    return {"num_heads": hidden_size // (2 * shape[1])} | ({"grid": (side, side)} if square else {})


def load_weights(model: Decoder, state: Mapping[str, Tensor], *, source: str) -> Decoder:
    """The same model with every weight taken from the state dict; stray rotary tables and caches are ignored.

    Raises: ArraError naming every missing, unexpected and differently shaped tensor.
    """
    weights = {key: value for key, value in state.items() if not STRAY.search(key)}
    expected = model.state_dict()
    faults = []
    if missing := [key for key in expected if key not in weights]:
        faults.append(f"missing {', '.join(missing)}")
    if unexpected := [key for key in weights if key not in expected]:
        faults.append(f"unexpected {', '.join(unexpected)}")
    faults += [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if faults:
        raise ArraError(f"{source}: does not fit the model: {'; '.join(faults)}; check the model's name and settings")
    model.load_state_dict(weights)
    return model
