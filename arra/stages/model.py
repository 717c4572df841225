"""The decoder of a recipe: its settings with what the data decide, and its first weights, fresh or given."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from arra.config import Recipe
from arra.data.layout import Grid
from arra.data.store import Store
from arra.encoders.text import text_encoder_spec
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, load_decoder
from arra.runs import file_hash
from arra.stages.captions import store_text_tokenizer
from arra.stages.tokenizer import load_named
from arra.tokenizers.image import PUBLISHED
from arra.tokenizers.text import TextTokenizer, load_text_tokenizer
from arra.tokenizers.vq import VQSettings

CLASSES = "cls_embedding.embedding_table.weight"
IMAGENET_CLASSES = 1000
WEIGHTS_NAMES = ("model.safetensors", "consolidated.pth", "model.safetensors.index.json")
"""In a folder: ours, FSDP's, and the list of a large model's parts."""
SAME = (
    "condition", "num_layers", "num_heads", "kv_heads", "hidden_size", "ffn_width", "num_codes", "condition_length",
    "prefix_rotary", "text_vocab_size", "rope_base", "norm_eps",
)  # fmt: skip
"""Settings that given weights and the recipe must agree on; the grid is free: no weight depends on it."""
REP = "rep_embedding.weight"


def tokenizer_network(recipe: Recipe) -> VQSettings:
    """The shape of the recipe's image tokenizer; published ones are known without their weights."""
    section = recipe.tokenizer
    if section.network is not None:
        return section.network
    if section.name in PUBLISHED:
        return VQSettings(**PUBLISHED[section.name])
    return load_named(recipe).model.settings


def square(recipe: Recipe, downsampling: int) -> Grid:
    """The grid of the recipe's squares.

    Raises:
        ArraError: codes do not fill them.
    """
    side, rest = divmod(recipe.data.image_size, downsampling)
    if rest:
        raise ArraError(
            f"data.image_size: {recipe.data.image_size} is no multiple of {downsampling}, the pixels per code of "
            f"{recipe.tokenizer.name}; change it"
        )
    return side, side


def decoder_settings(
    recipe: Recipe, *, num_codes: int, downsampling: int, num_classes: int | None = None, caption_dim: int | None = None
) -> DecoderSettings:
    """The decoder's settings, with what follows from the tokenizer and the data filled in.

    Where the data are not known yet, classes are taken to be ImageNet's, caption features as wide as the recipe's text
    encoder makes them.
    """
    m, grid = recipe.model, square(recipe, downsampling)
    told: dict[str, Any] = {}
    if m.condition == "class":
        told["num_classes"] = num_classes or m.num_classes or IMAGENET_CLASSES
    elif m.condition == "caption":
        assert recipe.text_encoder is not None
        told["caption_dim"] = caption_dim or text_encoder_spec(recipe.text_encoder.name).feature_size
    else:
        told["text_vocab_size"] = m.text_vocab_size
    return DecoderSettings(
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        multiple_of=m.multiple_of,
        num_codes=num_codes,
        grid=grid,
        condition=m.condition,
        prefix_length=m.prefix_length + recipe.has_rep,
        rep_token=recipe.has_rep,
        token_dropout=m.token_dropout,
        resid_dropout=m.resid_dropout,
        ffn_dropout=m.ffn_dropout,
        attn_dropout=m.attn_dropout,
        drop_path=m.drop_path,
        initializer_range=m.initializer_range,
        **told,
    )


def build_model(
    recipe: Recipe, settings: DecoderSettings, *, text: TextTokenizer | None, empty: bool = False
) -> Decoder:
    """The decoder before its first step; fresh weights are a function of `model.seed`.

    `empty` makes the same network on the meta device, for one that gets its weights from elsewhere, and reads none.

    Raises:
        ArraError: the given weights are of another model.
    """
    torch.manual_seed(recipe.model.seed)
    with torch.device("meta") if empty else nullcontext():
        model = Decoder(settings)
    if recipe.model.weights is not None and not empty:
        start_from(model, recipe.model.weights)
    model.text_tokenizer = text
    return model


def start_from(model: Decoder, weights: str) -> None:
    """Nothing; the model has the given weights, and a fresh class table where the classes are others.

    A model with the REP token takes weights without it, and keeps its own first vector.

    Raises:
        ArraError: they cannot be read, or are of a model of another shape.
    """
    settings = model.settings
    if (Path(weights) / "model.json").is_file():
        given = load_decoder(weights)
    else:
        given = load_decoder("llamagen", weights=weights, num_heads=settings.num_heads, grid=settings.grid)
    named = "caption_dim" if settings.condition == "caption" else None
    for name in (*SAME, *([named] if named else [])):
        theirs, ours = getattr(given.settings, name), getattr(settings, name)
        if theirs != ours:
            said = "prefix_length" if name == "condition_length" else name  # as recipes count, without REP
            raise ArraError(
                f"model.weights: {weights} has {said} {theirs}, the recipe's model {ours}; make the model section say "
                "what the weights are, or train from fresh ones"
            )
    if given.settings.rep_token and not settings.rep_token:
        raise ArraError(
            f"model.weights: {weights} was trained with the REP token before the codes, and no term of align has "
            "target rep; add one, or start from weights without it"
        )
    state = given.state_dict()
    if settings.rep_token and not given.settings.rep_token:
        state[REP] = model.state_dict()[REP]
    if settings.num_classes != given.settings.num_classes:
        table = model.state_dict()[CLASSES].clone()
        table[-1] = state[CLASSES][-1]  # the null class means the same
        state[CLASSES] = table
    model.load_state_dict(state)


def told_to_painters(recipe: Recipe, codes_of: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a model's card says to whoever paints with the folder alone: how, and with whose codes, where known."""
    facts: dict[str, Any] = {"sampling": recipe.sample.model_dump(mode="json")}
    return facts if codes_of is None else facts | {"codes_of": dict(codes_of)}


def weights_hash(weights: str) -> str:
    """The SHA-256 of given weights; of weights in parts that of all parts' hashes.

    Raises:
        ArraError: there are none.
    """
    for path in (Path(weights), *(Path(weights) / name for name in WEIGHTS_NAMES)):
        if path.is_file() and path.name.endswith(".index.json"):
            parts = "".join(file_hash(part) for part in sorted(path.parent.glob("model-*.safetensors")))
            return hashlib.sha256(parts.encode()).hexdigest()
        if path.is_file():
            return file_hash(path)
    raise ArraError(
        f"{weights}: no weights there; expected a checkpoint file, a folder of arra import, or a finished run"
    )


def text_tokenizer_of(recipe: Recipe, store: Store) -> TextTokenizer | None:
    """The tokenizer of prompts: of the given weights, else trained on the store; None for models that read no text."""
    if recipe.model.condition != "text":
        return None
    if recipe.model.weights is None:
        return store_text_tokenizer(recipe, store)
    path = Path(recipe.model.weights) / "tokenizer.json"
    if not path.is_file():
        raise ArraError(
            f"model.weights: {recipe.model.weights}: no tokenizer.json in it, which gives the ids of words their "
            "meaning; name the folder of a finished run"
        )
    return load_text_tokenizer(path)
