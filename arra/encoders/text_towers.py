"""The text half of a CLIP: prompts become vectors that lie where the vectors of its pictures do.

    prompts --tokenizer--> ids (cut at the context) --tower--> last state --one token, projected--> vectors

Towers are the classes of `transformers`, filled from the same weights as the picture half. OpenAI's CLIPs read 77
tokens and take the state at the end token; BioMedCLIP's is a BERT that reads 256 and takes the first token, with a
projection of two layers, as open_clip makes it. Of a configuration the sizes are taken and nothing else, the tokenizer
is a file of plain data; nothing in a folder can run.

Legend: B prompts, T tokens, F feature, E projected feature.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arra.encoders.base import require_package
from arra.encoders.files import CONFIG_FILE, located, main_file, read_json, weights_hash
from arra.encoders.specs import KNOWN
from arra.encoders.transformers_vision import ACTIVATIONS, MOST, MOST_LAYERS, filled_network
from arra.errors import ArraError
from arra.models.weights import read_weights

BIOMEDCLIP_CONTEXT = 256
"""Tokens, as its configuration and its name have it; its positions go to 512."""
HEAD_WIDTH = 64
"""Of every BERT of the usual sizes."""
SIZES = {
    "vocab_size": 2**20,
    "hidden_size": MOST,
    "intermediate_size": MOST,
    "projection_dim": MOST,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": MOST,
    "max_position_embeddings": MOST,
    "bos_token_id": 2**20,
    "eos_token_id": 2**20,
    "pad_token_id": 2**20,
}
"""Fields of a CLIP's text part, and the most that any can be."""
PORTED = (
    (r"text_model\.embeddings\.(token_type|position)_embedding\.", r"embeddings.\1_embeddings."),
    (r"text_model\.embeddings\.token_embedding\.", "embeddings.word_embeddings."),
    (r"text_model\.embeddings\.layer_norm\.", "embeddings.LayerNorm."),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.k_proj\.", r"encoder.layer.\1.attention.self.key."),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.", r"encoder.layer.\1.attention.self.query."),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.v_proj\.", r"encoder.layer.\1.attention.self.value."),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"text_model\.encoder\.layers\.(\d+)\.layer_norm1\.", r"encoder.layer.\1.attention.output.LayerNorm."),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"text_model\.encoder\.layers\.(\d+)\.layer_norm2\.", r"encoder.layer.\1.output.LayerNorm."),
    (r"text_projection\.fc1\.", "proj.0."),
    (r"text_projection\.fc2\.", "proj.2."),
)
"""Names of BioMedCLIP's Hugging Face port, and those of BERT and of open_clip's projection.

Source: HealthX-Lab/MedCLIP-SAMv2, saliency_maps/model/convert.py.
"""
TOWER_NAMES = tuple(name for name, known in KNOWN.items() if known.kind in ("clip", "biomedclip"))
"""Encoders whose text half can be had."""


class BertTower(nn.Module):
    """A BERT whose first state is projected, as open_clip's HFTextEncoder with its `mlp` projection."""

    def __init__(self, bert: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.bert, self.proj = bert, projection

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) -> (B, E)."""
        projected: Tensor = self.proj(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])
        return projected


class ClipTower(nn.Module):
    """CLIP's text transformer with its projection."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) -> (B, E)."""
        projected: Tensor = self.clip(input_ids=ids, attention_mask=mask).text_embeds
        return projected


class TextTower:
    """A frozen text half of a CLIP, with its tokenizer."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        tokenizer: Any,
        *,
        context: int,
        pad_id: int,
        weights_hash: str,
        clean: Callable[[str], str] = str,
    ) -> None:
        self.name, self.network = name, network.eval().requires_grad_(False)
        self.tokenizer, self.context, self.pad_id, self.clean = tokenizer, context, pad_id, clean
        self.weights_hash = weights_hash

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The length of each prompt, with its first and its end token; above `context` it is cut."""
        return [len(ids) for ids in self._ids(prompts)]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 64) -> Float[Tensor, "B E"]:
        """Float32 vectors of prompts, not normalised, where the network lies; long ones keep their end token.

        Raises:
            ArraError: one prompt in place of several, or none.
        """
        if isinstance(prompts, str) or not prompts:  # a text is a sequence too, of letters
            raise ArraError(f"prompts: expected a list of texts, got {prompts[:20]!r}; write [{prompts[:20]!r}]")
        ids = [each if len(each) <= self.context else [*each[: self.context - 1], each[-1]]
               for each in self._ids(prompts)]  # fmt: skip
        found = []
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            width = max(map(len, part))
            padded = torch.tensor([each + [self.pad_id] * (width - len(each)) for each in part])
            mask = torch.arange(width) < torch.tensor([len(each) for each in part])[:, None]
            found.append(self.network(padded.to(self.device), mask.long().to(self.device)).float())
        return torch.cat(found)

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch([*map(self.clean, prompts)])]


def load_text_tower(name: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu") -> TextTower:
    """The text half of an encoder of `TOWER_NAMES`, from the folder, file or repository of its picture half.

    Raises:
        ArraError: a name that has none, a missing package, no weights or tokenizer, or those of another network.
    """
    if name not in TOWER_NAMES:
        raise ArraError(f"text tower of '{name}': there is none; choose of {', '.join(TOWER_NAMES)}")
    require_package(name, "transformers")
    path = located(weights if weights is not None else str(KNOWN[name].repository), name=name)
    main = main_file(path)
    state = read_weights(main).state
    clean: Callable[[str], str] = str
    if KNOWN[name].kind == "biomedclip":
        require_package(name, "open_clip", package="open_clip_torch")
        from open_clip.tokenizer import get_clean_fn

        network, rows, context = _biomedclip(state, main)
        tokenizer, pad_id = _tokenizer("BertTokenizer", main.parent, rows), 0
        clean = get_clean_fn("whitespace")  # as open_clip's own tokenizer does: mended encodings, no entities
    else:
        network, rows, context = _clip(state, main, name)
        tokenizer = _tokenizer("CLIPTokenizer", main.parent, rows)
        pad_id = tokenizer.encode("").ids[-1]  # what lies after the first end token is not looked at
    return TextTower(
        name,
        network.to(device),
        tokenizer,
        context=context,
        pad_id=pad_id,
        weights_hash=weights_hash(path),
        clean=clean,
    )


def _clip(state: Mapping[str, Tensor], main: Path, name: str) -> tuple[nn.Module, int, int]:
    """Network, size of the vocabulary and context."""
    place = main.parent / CONFIG_FILE
    config = read_json(place)
    text = config.get("text_config")
    if config.get("model_type") != "clip" or not isinstance(text, dict):
        raise ArraError(f"{place}: expected a whole CLIP (model_type 'clip' with text_config) for {name}'s text half")
    if "projection_dim" in config:
        text = {**text, "projection_dim": config["projection_dim"]}
    numbers = {field: text[field] for field in (*SIZES, "hidden_act", "layer_norm_eps") if text.get(field) is not None}
    for field, value in numbers.items():
        if field == "hidden_act":
            right, expected = value in ACTIVATIONS, " or ".join(ACTIVATIONS)
        elif field == "layer_norm_eps":
            right, expected = type(value) is float and 0 < value < 1, "a small number"
        else:
            least = 0 if field.endswith("_id") else 1
            right = type(value) is int and least <= value <= SIZES[field]
            expected = f"an integer from {least} to {SIZES[field]}"
        if not right:
            raise ArraError(f"{place}: text_config.{field} is {str(value)[:60]!r}, expected {expected}; fetch it again")
    own = {
        key: value.clone()
        for key, value in state.items()
        if key.startswith(("text_model.", "text_projection.")) and not key.endswith(".position_ids")
    }
    if not own:
        raise ArraError(f"{main}: no tensors text_model.* in it; expected a whole {name}, with its text half")
    network: Any = filled_network(
        "CLIPTextModelWithProjection", "CLIPTextConfig", numbers=numbers, state=own, source=main
    )
    return ClipTower(network), network.config.vocab_size, network.config.max_position_embeddings


def _biomedclip(state: Mapping[str, Tensor], main: Path) -> tuple[nn.Module, int, int]:
    """Network, size of the vocabulary and context; the sizes are read off the tensors."""
    own = {key: value.clone() for key, value in _bert_names(state).items() if not key.endswith(".position_ids")}
    bert = {key: value for key, value in own.items() if not key.startswith("proj.")}
    try:
        words, types = own["embeddings.word_embeddings.weight"], own["embeddings.token_type_embeddings.weight"]
        numbers = {
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "type_vocab_size": types.shape[0],
            "max_position_embeddings": own["embeddings.position_embeddings.weight"].shape[0],
            "intermediate_size": own["encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": len({key.split(".")[2] for key in bert if key.startswith("encoder.layer.")}),
            "num_attention_heads": max(1, words.shape[1] // HEAD_WIDTH),
        }
        first, last = own["proj.0.weight"], own["proj.2.weight"]
        projection = nn.Sequential(
            nn.Linear(first.shape[1], first.shape[0], bias=False),
            nn.GELU(),
            nn.Linear(last.shape[1], last.shape[0], bias=False),
        )
        projection.load_state_dict({"0.weight": first.float(), "2.weight": last.float()})
    except KeyError as error:
        raise ArraError(
            f"{main}: no text tensor {error.args[0]} in it; expected the whole BioMedCLIP, with its text half"
        ) from error
    except (RuntimeError, IndexError) as error:
        raise ArraError(f"{main}: its text tensors have no shapes of BioMedCLIP; fetch it again") from error
    network = filled_network(
        "BertModel", "BertConfig", numbers=numbers, state=bert, source=main, add_pooling_layer=False
    )
    context = min(BIOMEDCLIP_CONTEXT, numbers["max_position_embeddings"])
    return BertTower(network, projection), numbers["vocab_size"], context


def _bert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tensors of open_clip's file or of the port, under BERT's names and `proj.`."""
    named = {}
    for key, value in state.items():
        if key.startswith("text."):
            named[key.removeprefix("text.").removeprefix("transformer.")] = value
            continue
        for theirs, ours in PORTED:
            if found := re.match(theirs, key):
                named[found.expand(ours) + key[found.end() :]] = value
    return named


def _tokenizer(class_name: str, folder: Path, rows: int) -> Any:
    """The tokenizer in a folder, which neither cuts nor pads."""
    import transformers

    from arra.models.language_folder import quiet

    what = f"tokenizer.json of a {class_name.removesuffix('Tokenizer')}"
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ArraError(f"{folder}: no tokenizer in it; fetch the {what} that is published with the weights")
    try:
        with quiet():
            loaded = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what the tokenizers library raises of a broken file has no class of its own
        reason = " ".join(str(error).split())[:160]
        raise ArraError(f"{folder}: its tokenizer cannot be read ({reason}); fetch its {what} again") from error
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    ids, nothing = backend.get_vocab().values(), backend.encode("").ids
    # of a file that is not its own, transformers makes a vocabulary of a few signs and says nothing
    if not rows / 2 < len(ids) <= rows or max(ids) >= rows or len(nothing) != 2:
        raise ArraError(
            f"{folder}: its tokenizer is not that of its network ({len(ids)} tokens for {rows} embeddings, the empty "
            f"text becomes {nothing[:5]}, expected two tokens); fetch its {what} again"
        )
    return backend
