"""Networks that predict the next token, opened by name or folder and saved with what is needed to open them again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from arra.errors import ArraError
from arra.models.decoder import Condition, Decoder, DecoderSettings, ModelOutput
from arra.models.fitting import Fitting
from arra.models.llamagen import SIZES, build_decoder, decoder_settings, infer_settings, told_settings
from arra.models.weights import Entry, Weights, read_weights
from arra.runs import atomic_file, atomic_write

__all__ = ["Condition", "Decoder", "DecoderSettings", "ModelOutput", "load_model", "open_weights", "save_model"]

WEIGHTS_FILE, CARD_FILE, TOKENIZER_FILE = "model.safetensors", "model.json", "tokenizer.json"


def load_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    entry: Entry = "model",
    dtype: torch.dtype | None = torch.float32,
    ignore: Sequence[str] = (),
    init_missing: Sequence[str] = (),
    **settings: Any,
) -> Decoder:
    """A decoder in eval mode.

    `name` is "llamagen-b" (l, xl, xxl, xxxl, 1b, 3b, 7b), "llamagen" (every size from the weights, `num_heads=` and
    `grid=` as arguments where nothing tells them) or a folder: a run, a saved model, or LlamaGen's own (config.json
    and weights). `weights` is a checkpoint and `entry` which of its state dicts to take; without one the model is
    freshly initialised. `dtype=None` keeps the file's. Keys that match `ignore` are left out, missing ones that match
    `init_missing` get initial weights. Other arguments are fields of `DecoderSettings`.
    Raises: ArraError for an unknown name, unreadable or unfitting weights, and settings that make no model.
    """
    how = Fitting(dtype, tuple(ignore), tuple(init_missing))
    folder = Path(name)
    if folder.is_dir() and not (folder / CARD_FILE).is_file() and (folder / "config.json").is_file():
        return open_weights(read_weights(folder, entry=entry), known=settings, how=how)
    if folder.is_dir():
        if weights is not None or settings or how.ignore or how.init_missing:
            raise ArraError(f"{folder}: a model folder brings its own weights and settings; drop the other arguments")
        return _load_folder(folder, how)
    family, _, size = str(name).partition("-")
    if family != "llamagen" or (size and size not in SIZES):
        known = ", ".join(["llamagen", *(f"llamagen-{known}" for known in SIZES)])
        raise ArraError(
            f"{name}: neither a folder nor a known model; known are {known} (a hub's repository: "
            "Decoder.from_pretrained)"
        )
    shape = dict(SIZES[size]) if size else {}
    if weights is None:
        if not size and "hidden_size" not in settings:
            raise ArraError("llamagen: without weights= there is nothing to read sizes from; name one as llamagen-b")
        model = Decoder(decoder_settings(str(name), {**shape, **settings})).eval()
        return model if dtype is None else model.to(dtype)
    return open_weights(read_weights(weights, entry=entry), known={**shape, **settings}, how=how)


def open_weights(weights: Weights, *, known: dict[str, Any], how: Fitting) -> Decoder:
    """A decoder in eval mode from weights in LlamaGen's names; `about` says where they and its settings come from.

    Raises: ArraError when they are no decoder's or do not fit the settings.
    """
    source = str(weights.source)
    told = told_settings(weights)
    fields = infer_settings(
        weights.state, source=source, known={**{field: value for field, (value, _) in told.items()}, **known}
    )
    model, left = build_decoder(weights, decoder_settings(source, fields), how)
    who = {field: _told_by(field, known, told) for field in told.keys() | known.keys()}
    model.about["origin"] = weights.facts() | {"told": who} | left.facts()
    return model


def _told_by(field: str, known: dict[str, Any], told: dict[str, tuple[Any, str]]) -> str:
    """Who said so, and who says otherwise."""
    if field not in known:
        return told[field][1]
    value, who = told.get(field, (known[field], ""))
    same = value == (tuple(known[field]) if isinstance(known[field], list) else known[field])
    return "given" if same else f"given, against {value} by {who}"


def save_model(model: Decoder, folder: str | Path) -> Path:
    """The folder, now holding model.safetensors, model.json and, for text, tokenizer.json.

    Each file appears whole or not at all; the card comes last. Raises: ArraError when the folder cannot be written.
    """
    folder = Path(folder)
    tokenizer = TOKENIZER_FILE if model.text_tokenizer is not None else None
    card = {"kind": "llamagen", "settings": model.settings.model_dump(mode="json"), "text_tokenizer": tokenizer}
    card["about"] = model.about
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        try:
            safetensors.torch.save_file(state, temporary)
        except safetensors.SafetensorError as error:  # how the library tells a full disk
            raise ArraError(
                f"{folder / WEIGHTS_FILE}: cannot be written ({error}); free space and try again"
            ) from error
    if model.text_tokenizer is not None:
        model.text_tokenizer.save(folder / TOKENIZER_FILE)
    atomic_write(folder / CARD_FILE, json.dumps(card, indent=2) + "\n")
    return folder


def _load_folder(folder: Path, how: Fitting) -> Decoder:
    card_path, weights_path = folder / CARD_FILE, folder / WEIGHTS_FILE
    for path in (card_path, weights_path):
        if not path.is_file():
            raise ArraError(
                f"{folder}: no {path.name} in it; expected a finished run, a folder made by save_model or by `arra "
                "import`, or one with LlamaGen's config.json"
            )
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArraError(f"{card_path}: not valid JSON ({error}); save the model again") from error
    if not isinstance(card, dict) or card.get("kind") != "llamagen" or not isinstance(card.get("settings"), dict):
        raise ArraError(f'{card_path}: expected {{"kind": "llamagen", "settings": {{...}}}}; save the model again')
    about, tokenizer = card.get("about") or {}, card.get("text_tokenizer")
    if not isinstance(about, dict) or tokenizer not in (None, TOKENIZER_FILE):
        raise ArraError(f"{card_path}: expected about {{...}} and text_tokenizer null or {TOKENIZER_FILE!r}")
    model, _ = build_decoder(read_weights(weights_path), decoder_settings(str(card_path), card["settings"]), how)
    model.about = about
    if tokenizer:
        from arra.tokenizers.text import load_text_tokenizer

        model.text_tokenizer = load_text_tokenizer(folder / TOKENIZER_FILE)
    return model
