"""Meta's own Chameleon files as a state dict in Hugging Face's names, q/k norms with one row per file.

    params.json, consolidate_params.json, consolidated.pth | consolidated.00.pth .. --> MetaFiles --> meta_state

One file per model-parallel rank. Meta turns neighbouring numbers of a head together where `transformers` turns halves,
so rows of wq and wk and numbers of q/k norms change their order.
Source: facebookresearch/chameleon `chameleon/inference/{loader,transformer}.py`; huggingface/transformers
`models/chameleon/convert_chameleon_weights_to_hf.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.chameleon_network import ChameleonSettings, chameleon_settings
from arra.models.fitting import find_faults
from arra.models.weights import Weights, read_weights

PARAMS_FILE, CONSOLIDATE_FILE = "params.json", "consolidate_params.json"
IGNORED = "rope.freqs"
"""A table, no weights."""
FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "swin_norm": "swin_norm",
}
"""Fields of params.json, and what `config.json` calls them."""


@dataclass(frozen=True)
class MetaFiles:
    """A network's files, each holding a rank's share of every tensor."""

    settings: ChameleonSettings
    ranks: tuple[Weights, ...]

    @property
    def source(self) -> str:
        """The folder, for messages."""
        return str(self.ranks[0].source.parent)


def read_meta(folder: Path, *, vocabulary: Mapping[str, int] | None) -> MetaFiles:
    """The files of a folder with params.json, mapped from the disk and checked against it.

    Raises:
        ArraError: a file is missing, unreadable or unsafe, or tensors are not those that params.json tells of.
    """
    params = _read_json(folder / PARAMS_FILE)
    if isinstance(params.get("model"), dict):
        params |= params["model"]
    if (folder / CONSOLIDATE_FILE).is_file():
        params |= _read_json(folder / CONSOLIDATE_FILE)
    ranks = tuple(read_weights(path) for path in _rank_files(folder, params.get("model_parallel_size")))
    settings = _settings(folder, params, ranks, vocabulary)
    for weights in ranks:
        held = {key: value for key, value in weights.state.items() if key != IGNORED}
        if faults := find_faults(_expected(settings, held, len(ranks)), held):
            raise ArraError(
                f"{weights.source}: not the tensors that {PARAMS_FILE} tells of: {'; '.join(faults)}; fetch it again"
            )
    return MetaFiles(settings, ranks)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArraError(f"{path}: not readable JSON ({reason}); fetch it again") from error
    if not isinstance(found, dict):
        raise ArraError(f"{path}: holds a {type(found).__name__}, expected an object; fetch it again")
    return found


def _rank_files(folder: Path, told: Any) -> list[Path]:
    """The file of every rank, in order."""
    numbered = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    files = [folder / "consolidated.pth"] if (folder / "consolidated.pth").is_file() else numbered
    if not files:
        raise ArraError(f"{folder}: no consolidated.pth or consolidated.00.pth beside {PARAMS_FILE}; fetch it too")
    count = told if isinstance(told, int) and not isinstance(told, bool) and 0 < told <= 100 else 1
    if files == numbered:
        count = max(count, 1 + int(numbered[-1].name.split(".")[1]))
    absent = [
        name for name in (f"consolidated.{rank:02d}.pth" for rank in range(count)) if not (folder / name).is_file()
    ]
    if len(files) != count:
        raise ArraError(f"{folder}: of the files of {count} ranks {', '.join(absent)} missing; fetch them too")
    return files


def _settings(
    folder: Path, params: Mapping[str, Any], ranks: tuple[Weights, ...], vocabulary: Mapping[str, int] | None
) -> ChameleonSettings:
    """What params.json tells, widths of the vocabulary and the feed-forward from the tensors' shapes."""
    source, first = str(folder / PARAMS_FILE), ranks[0]
    fields = {ours: params[theirs] for theirs, ours in FIELDS.items() if params.get(theirs) is not None}
    shapes = {}
    for key, place in (("output.weight", 0), ("layers.0.feed_forward.w2.weight", 1)):
        if key not in first.state or first.state[key].dim() != 2:
            raise ArraError(f"{first.source}: no matrix {key} in it; expected Chameleon's language model by Meta")
        shapes[key] = first.state[key].shape[place] * len(ranks)
    fields |= {"vocab_size": shapes["output.weight"], "model_parallel_size": len(ranks)}
    fields["intermediate_size"] = shapes["layers.0.feed_forward.w2.weight"]
    theta = fields.get("rope_theta")
    # what transformers' converter gives them
    fields["max_position_embeddings"] = 16384 if isinstance(theta, int | float) and theta > 10000 else 4096
    settings = chameleon_settings(source, fields | {"vocabulary_map": vocabulary})
    if settings.num_key_value_heads % len(ranks):
        raise ArraError(
            f"{source}: {settings.num_key_value_heads} key-value heads do not divide among the files of {len(ranks)} "
            "ranks; fetch both again"
        )
    if settings.num_hidden_layers > len(first.state):
        raise ArraError(
            f"{source}: {settings.num_hidden_layers} layers, but {first.source.name} holds {len(first.state)} tensors; "
            "fetch both again"
        )
    return settings


def _expected(settings: ChameleonSettings, held: Mapping[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """A rank's tensors, empty ones of the right shapes; matrices are fused or apart as the file has them."""
    width, inner = settings.hidden_size, settings.intermediate_size // ranks
    queries = width // ranks
    keys = settings.num_key_value_heads * settings.head_dim // ranks
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (settings.vocab_size, width // ranks),
        "norm.weight": (width,),
        "output.weight": (settings.vocab_size // ranks, width),
    }
    for number in range(settings.num_hidden_layers):
        here = f"layers.{number}."
        if f"{here}attention.wqkv.weight" in held:
            shapes[f"{here}attention.wqkv.weight"] = (queries + 2 * keys, width)
        else:
            shapes |= {f"{here}attention.{name}.weight": (rows, width) for name, rows in
                       (("wq", queries), ("wk", keys), ("wv", keys))}  # fmt: skip
        if f"{here}feed_forward.w13.weight" in held:
            shapes[f"{here}feed_forward.w13.weight"] = (2 * inner, width)
        else:
            shapes |= {f"{here}feed_forward.{name}.weight": (inner, width) for name in ("w1", "w3")}
        shapes |= {f"{here}attention.wo.weight": (width, queries), f"{here}feed_forward.w2.weight": (width, inner)}
        shapes |= {f"{here}{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
        shapes |= {f"{here}attention.{which}_normalization.{part}": (settings.head_dim,) for which in "qk"
                   for part in ("weight", "bias")}  # fmt: skip
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def meta_state(files: MetaFiles, *, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in Hugging Face's names, in memory of their own; q/k norms have a row for every file."""
    settings = files.settings
    states = [weights.state for weights in files.ranks]
    head, width = settings.head_dim, settings.hidden_size
    keys = settings.num_key_value_heads * head // len(states)
    queries = width // len(states)

    def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
        parts = [part if dtype is None else part.to(dtype) for part in parts]
        return torch.cat(parts, dim).contiguous() if len(parts) > 1 else parts[0].clone()

    def mean(key: str) -> Tensor:
        """Of tensors that every rank holds whole."""
        parts = torch.stack([state[key].float() for state in states])
        return parts.mean(0).to(dtype or states[0][key].dtype)

    ready = {
        "model.embed_tokens.weight": joined([state["tok_embeddings.weight"] for state in states], 1),
        "model.norm.weight": mean("norm.weight"),
        "lm_head.weight": joined([state["output.weight"] for state in states]),
    }
    for number in range(settings.num_hidden_layers):
        here, there = f"layers.{number}.", f"model.layers.{number}."
        split = [_unfused(state, here, [queries, keys, keys]) for state in states]
        for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
            whole = joined([parts[place] for parts in split])
            ready[f"{there}self_attn.{name}.weight"] = whole if name == "v_proj" else to_halves(whole, head)
        for which in "qk":
            for part in ("weight", "bias"):
                rows = joined([state[f"{here}attention.{which}_normalization.{part}"] for state in states])
                ready[f"{there}self_attn.{which}_norm.{part}"] = to_halves(rows, head).view(len(states), head)
        ready[f"{there}self_attn.o_proj.weight"] = joined([state[f"{here}attention.wo.weight"] for state in states], 1)
        ready[f"{there}mlp.gate_proj.weight"] = joined([parts[3] for parts in split])
        ready[f"{there}mlp.up_proj.weight"] = joined([parts[4] for parts in split])
        ready[f"{there}mlp.down_proj.weight"] = joined([state[f"{here}feed_forward.w2.weight"] for state in states], 1)
        ready[f"{there}input_layernorm.weight"] = mean(f"{here}attention_norm.weight")
        ready[f"{there}post_attention_layernorm.weight"] = mean(f"{here}ffn_norm.weight")
    return ready


def _unfused(state: Mapping[str, Tensor], here: str, sizes: list[int]) -> list[Tensor]:
    """wq, wk, wv, w1 and w3 of a layer."""
    attention, inner = f"{here}attention.", f"{here}feed_forward."
    if (fused := state.get(f"{attention}wqkv.weight")) is not None:
        first = list(fused.split(sizes))
    else:
        first = [state[f"{attention}{name}.weight"] for name in ("wq", "wk", "wv")]
    if (fused := state.get(f"{inner}w13.weight")) is not None:
        return first + list(fused.chunk(2))
    return first + [state[f"{inner}{name}.weight"] for name in ("w1", "w3")]


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows in the order of `transformers`: of each head first those that Meta has at even places, then the odd ones."""
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))  # (H, d / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)
