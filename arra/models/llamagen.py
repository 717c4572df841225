"""LlamaGen's published models: their sizes, their files as our decoder, and our decoder as a file of theirs.

Source: FoundationVision/LlamaGen, autoregressive/models/gpt.py (sizes, names) and autoregressive/train (files).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from arra.errors import ArraError
from arra.models.decoder import Decoder, DecoderSettings
from arra.models.fitting import Fitted, Fitting, fit
from arra.models.hub import Description, origin_facts
from arra.models.weights import Weights, read_checkpoint

__all__ = ["SIZES", "build_decoder", "decoder_settings", "infer_settings", "launch_hint", "read_checkpoint"]

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
DOWNSAMPLING = 16
"""Pixels per code of the tokenizer that the published decoders were trained on."""

REP = "rep_embedding.weight"
"""Of our own decoders alone, in their checkpoints."""
# left behind by LlamaGen's attributes and by its generate(): never weights
STRAY = re.compile(r"(^|\.)(freqs_cis|causal_mask|kv_cache\.(k_cache|v_cache))$")
PIXELS_IN_NAME = re.compile(r"(?<![0-9a-zA-Z])(256|384|512)(?![0-9a-zA-Z])")  # c2i_L_384.pt
# fields of LlamaGen's ModelArgs that tensor shapes do not tell, as its Hugging Face mixin writes them
CONFIG_FIELDS = {
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "rope_base": "rope_base",
    "norm_eps": "norm_eps",
    "initializer_range": "initializer_range",
    "token_dropout_p": "token_dropout",
    "resid_dropout_p": "resid_dropout",
    "ffn_dropout_p": "ffn_dropout",
    "attn_dropout_p": "attn_dropout",
    "drop_path_rate": "drop_path",
}


def decoder_settings(source: str, fields: dict[str, Any]) -> DecoderSettings:
    """The settings of these fields. Raises: ArraError naming every field that does not do."""
    try:
        return DecoderSettings(**fields)
    except ValidationError as error:
        faults = [".".join(map(str, fault["loc"])) + f" {fault['msg']}" for fault in error.errors()]
        raise ArraError(f"{source}: settings make no model: {'; '.join(fault.strip() for fault in faults)}") from error


def build_decoder(weights: Weights, settings: DecoderSettings, how: Fitting) -> tuple[Decoder, Fitted]:
    """A decoder in eval mode with these weights, and what was left over of them.

    Raises: ArraError when they do not fit.
    """
    if settings.num_layers > len(weights.state):  # a card may claim more layers than can be built
        raise ArraError(
            f"{weights.source}: {len(weights.state)} tensors for {settings.num_layers} layers; not its file"
        )
    with torch.device("meta"):
        model = Decoder(settings)
    left = fit(
        model, weights.state, source=str(weights.source), fresh=lambda: fresh_decoder(settings), stray=STRAY, how=how
    )
    return model.eval(), left


def fresh_decoder(settings: DecoderSettings) -> Decoder:
    """A decoder with initial weights that are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(settings)


def told_settings(weights: Weights) -> dict[str, tuple[Any, str]]:
    """Settings that tensor shapes do not tell but the file's surroundings do: field -> (value, who says so).

    Raises: ArraError for a model that was trained without a null class, whose last class would be taken for it.
    """
    if weights.config.get("class_dropout_prob") == 0 and "cls_embedding.embedding_table.weight" in weights.state:
        raise ArraError(
            f"{weights.source}: class_dropout_prob is 0 in its config.json: the class table has no null class, which "
            "decoders here end with; train it with a class_dropout_prob above 0"
        )
    told: dict[str, tuple[Any, str]] = {}
    if name := PIXELS_IN_NAME.search(weights.source.stem):
        side = int(name[1]) // DOWNSAMPLING
        told["grid"] = ((side, side), "the file's name")
    pixels, step = (weights.args.get(key) for key in ("image_size", "downsample_size"))
    if isinstance(pixels, int) and isinstance(step, int) and step > 0 and pixels >= step:
        told["grid"] = ((pixels // step, pixels // step), "the training script's arguments")
    for theirs, ours in CONFIG_FIELDS.items():
        if isinstance(value := weights.config.get(theirs), int | float):
            told[ours] = (value, "config.json")
    block = weights.config.get("block_size")
    if isinstance(block, int) and block > 0 and math.isqrt(block) ** 2 == block:
        told["grid"] = ((math.isqrt(block), math.isqrt(block)), "config.json")
    table = weights.state.get("freqs_cis")
    if table is not None and table.dim() == 3:
        told |= {field: (value, "the stray rotary table") for field, value in _from_rotary_table(weights.state).items()}
    return told


def infer_settings(state: Mapping[str, Tensor], *, source: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DecoderSettings`: what the tensor shapes tell, overruled by what is known already.

    The number of heads and the grid leave no trace in the weights (unless a stray rotary table came along): heads are
    then looked up by width and depth among the published sizes, the grid is 16 x 16.
    Raises: ArraError when the heads cannot be told.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    needed = {"tok_embeddings.weight": 2, "layers.0.attention.wqkv.weight": 2, "layers.0.feed_forward.w1.weight": 2}
    if absent := [key for key in needed if key not in shapes]:
        raise ArraError(f"{source}: not a LlamaGen decoder: {', '.join(absent)} missing")
    if flat := [key for key, dims in needed.items() if len(shapes[key]) != dims]:
        raise ArraError(f"{source}: not a LlamaGen decoder: {flat[0]} is {shapes[flat[0]]}, expected a matrix")
    num_codes, hidden_size = shapes["tok_embeddings.weight"]
    blocks = [match[1] for key in shapes if (match := re.match(r"layers\.(\d{1,4})\.", key))]
    inferred: dict[str, Any] = {
        "num_layers": 1 + max(map(int, blocks)),
        "hidden_size": hidden_size,
        "num_codes": num_codes,
        "ffn_hidden_size": shapes["layers.0.feed_forward.w1.weight"][0],
        **_condition_shape(shapes, source, rep_token=bool(known.get("rep_token", REP in shapes))),
        **_from_rotary_table(state),
    }
    for size in SIZES.values():
        if size["num_layers"] == inferred["num_layers"] and size["hidden_size"] == hidden_size:
            inferred.setdefault("num_heads", size["num_heads"])
    settings = {**inferred, **known}
    if "num_heads" not in settings:
        raise ArraError(
            f"{source}: tensor shapes do not tell the number of heads (and {settings['num_layers']} layers of "
            f"{hidden_size} is no published size); pass num_heads= (and grid=, which is (16, 16) unless given), on the "
            "command line --num-heads and --grid"
        )
    heads = settings["num_heads"]
    head_dim = hidden_size // heads if isinstance(heads, int) and heads > 0 else 0
    spare = shapes["layers.0.attention.wqkv.weight"][0] - hidden_size
    if head_dim and 0 < spare < 2 * hidden_size and spare % (2 * head_dim) == 0:
        settings.setdefault("num_kv_heads", spare // (2 * head_dim))
    return settings


def _condition_shape(shapes: Mapping[str, tuple[int, ...]], source: str, *, rep_token: bool) -> dict[str, Any]:
    prefix, rep = "cls_embedding.", {"rep_token": True} if rep_token else {}
    if len(classes := shapes.get(f"{prefix}embedding_table.weight", ())) == 2:
        return {"condition": "class", "num_classes": classes[0] - 1, "prefix_length": 1 + rep_token, **rep}
    if len(uncond := shapes.get(f"{prefix}uncond_embedding", ())) == 2:
        return {"condition": "caption", "prefix_length": uncond[0] + rep_token, "caption_dim": uncond[1], **rep}
    text, slots = (shapes.get(f"{prefix}{table}_table.weight", ()) for table in ("text", "position"))
    if len(text) == len(slots) == 2:
        return {"condition": "text", "text_vocab_size": text[0], "prefix_length": slots[0] + rep_token, **rep}
    raise ArraError(f"{source}: no class, caption or text embedding under {prefix}*: not a LlamaGen decoder")


def _from_rotary_table(state: Mapping[str, Tensor]) -> dict[str, Any]:
    table = state.get("freqs_cis")
    if table is None or table.dim() != 3 or not table.shape[1]:
        return {}
    hidden_size = state["tok_embeddings.weight"].shape[-1] if "tok_embeddings.weight" in state else 0
    uncond = state.get("cls_embedding.uncond_embedding")
    positions = table.shape[0] - (1 if uncond is None else uncond.shape[0])
    side = math.isqrt(max(positions, 0))
    square = side * side == positions and side > 0
    return {"num_heads": hidden_size // (2 * table.shape[1])} | ({"grid": (side, side)} if square else {})


def refuse_what_llamagen_lacks(settings: DecoderSettings, source: str) -> None:
    """Nothing, if LlamaGen's own code can run a decoder of these settings.

    Raises: ArraError naming everything that it has no word for.
    """
    lacks = []
    if settings.rep_token:
        lacks.append("it was trained with the REP token before the codes")
    if settings.condition == "text":
        lacks.append("its condition is text tokens, LlamaGen knows classes and caption features")
    if settings.prefix_rotary != "zero":
        lacks.append("its condition positions are rotated (prefix_rotary), LlamaGen's are zero")
    if settings.condition == "caption" and settings.condition_length != 120:
        lacks.append(f"{settings.condition_length} caption positions, LlamaGen has 120")
    if settings.grid[0] != settings.grid[1]:
        lacks.append(f"a grid of {settings.grid[0]} x {settings.grid[1]}, LlamaGen's are square")
    if settings.kv_heads != settings.num_heads:
        lacks.append(
            f"{settings.kv_heads} key-value heads for {settings.num_heads}, LlamaGen cannot generate with that"
        )
    rule = DecoderSettings.model_validate({**settings.model_dump(), "ffn_hidden_size": None}).ffn_width
    if settings.ffn_width != rule:
        lacks.append(f"a feed-forward of {settings.ffn_width}, LlamaGen's rule gives {rule}")
    if lacks:
        raise ArraError(f"{source}: LlamaGen cannot run this decoder: {'; '.join(lacks)}; keep it in arra's own format")


def size_name(settings: DecoderSettings) -> str | None:
    """The published size of these settings, as in "b"; None for another."""
    shape = {"num_layers": settings.num_layers, "num_heads": settings.num_heads, "hidden_size": settings.hidden_size}
    return next((name for name, size in SIZES.items() if size == shape), None)


def launch_hint(settings: DecoderSettings, *, file: str, bare: bool) -> str:
    """What LlamaGen's scripts must be told to run a decoder exported to `file`."""
    size, side = size_name(settings), settings.grid[0]
    kind = "c2i" if settings.condition == "class" else "t2i"
    usual = DecoderSettings(**SIZES[size]) if size else None
    traits = ("rope_base", "norm_eps", "ffn_width")
    if size is None or any(getattr(settings, trait) != getattr(usual, trait) for trait in traits):
        fields = {
            "n_layer": settings.num_layers, "n_head": settings.num_heads, "dim": settings.hidden_size,
            "vocab_size": settings.num_codes, "block_size": side * side, "num_classes": settings.num_classes,
            "caption_dim": settings.caption_dim, "cls_token_num": settings.prefix_length, "model_type": kind,
            "multiple_of": settings.multiple_of, "rope_base": settings.rope_base, "norm_eps": settings.norm_eps,
        }  # fmt: skip
        told = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        return f"{file} is of no size of LlamaGen's scripts; in Python: Transformer(ModelArgs({told}))"
    words = {
        "--gpt-ckpt": file,
        "--gpt-model": f"GPT-{size.upper()}",
        "--gpt-type": kind,
        "--image-size": side * DOWNSAMPLING,
        "--downsample-size": DOWNSAMPLING,
        "--cls-token-num": settings.prefix_length,
    }
    hint = " ".join(f"{word} {value}" for word, value in words.items()) + (" --from-fsdp" if bare else "")
    if kind == "c2i" and settings.num_classes != 1000:
        hint += f" --num-classes {settings.num_classes}"
    odd = [f"vocab_size={settings.num_codes}"] if settings.num_codes != 16384 else []
    odd += [f"caption_dim={settings.caption_dim}"] if kind == "t2i" and settings.caption_dim != 2048 else []
    if odd:
        hint += f" (and {', '.join(odd)} in GPT_models[...](...): not every script has an option for it)"
    return hint


def original_state(model: Decoder, dtype: torch.dtype, *, source: str) -> dict[str, Tensor]:
    """The state dict as LlamaGen's own class has it; the projector of a run is no part of it.

    Raises: ArraError when LlamaGen's code could not run the decoder.
    """
    refuse_what_llamagen_lacks(model.settings, source)
    return {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}


def describe_decoder(model: Decoder) -> Description:
    """The model card of a decoder."""
    settings, size = model.settings, size_name(model.settings)
    count = sum(parameter.numel() for parameter in model.parameters())
    condition = {
        "class": f"{settings.num_classes} classes",
        "caption": f"captions, {settings.condition_length} features of {settings.caption_dim}",
        "text": f"text, {settings.condition_length} tokens of {settings.text_vocab_size}",
    }[settings.condition] + (", then the REP token" if settings.rep_token else "")
    encoder = model.about.get("text_encoder")
    facts = [
        ("parameters", f"{count:,}"),
        ("layers x width, heads", f"{settings.num_layers} x {settings.hidden_size}, {settings.num_heads}"),
        ("condition", condition),
        *([("text encoder", str(encoder.get("name")))] if isinstance(encoder, dict) else []),
        ("image", f"{settings.grid[0]} x {settings.grid[1]} codes out of {settings.num_codes}"),
        *origin_facts(model.about),
    ]
    licence = model.about.get("licence")
    return Description(
        kind="llamagen",
        title=f"LlamaGen-style decoder{f', size {size.upper()}' if size else ''}",
        pipeline_tag="unconditional-image-generation" if settings.condition == "class" else "text-to-image",
        facts=facts,
        usage='from arra.models import Decoder\n\nmodel = Decoder.from_pretrained("{repo}")',
        licence=licence if isinstance(licence, str) else None,
    )
