"""Networks that predict the next token, opened by name or folder and saved with what is needed to open them again."""

import json
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError

from arra.errors import ArraError
from arra.models.decoder import Condition, Decoder, DecoderSettings, ModelOutput
from arra.models.llamagen import SIZES, infer_settings, load_weights, read_checkpoint
from arra.runs import atomic_file, atomic_write

__all__ = ["Condition", "Decoder", "DecoderSettings", "ModelOutput", "load_model", "save_model"]

WEIGHTS_FILE, CARD_FILE, TOKENIZER_FILE = "model.safetensors", "model.json", "tokenizer.json"


def load_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    entry: Literal["model", "ema"] = "model",
    **settings: Any,
) -> Decoder:
    """A decoder in eval mode.

    `name` is "llamagen-b" (l, xl, xxl, xxxl, 1b, 3b, 7b), "llamagen" (every size from the weights, `num_heads=` and
    `grid=` as arguments) or a run or model folder. `weights` is a checkpoint file and `entry` which of its state
    dicts to take; without a file the model is freshly initialised. Other arguments are fields of `DecoderSettings`.
    Raises: ArraError for an unknown name, unreadable or unfitting weights, and settings that make no model.
    """
    folder = Path(name)
    if folder.is_dir():
        if weights is not None or settings:
            raise ArraError(f"{folder}: a model folder brings its own weights and settings; drop the other arguments")
        return _load_folder(folder)
    family, _, size = str(name).partition("-")
    if family != "llamagen" or (size and size not in SIZES):
        known = ", ".join(["llamagen", *(f"llamagen-{known}" for known in SIZES)])
        raise ArraError(f"{name}: neither a folder nor a known model; known are {known}")
    shape = dict(SIZES[size]) if size else {}
    if weights is None:
        if not size and "hidden_size" not in settings:
            raise ArraError("llamagen: without weights= there is nothing to read sizes from; name one as llamagen-b")
        return Decoder(_settings(str(name), {**shape, **settings})).eval()
    state = read_checkpoint(weights, entry=entry)
    decoder_settings = _settings(str(weights), infer_settings(state, source=str(weights), known={**shape, **settings}))
    with torch.device("meta"):
        model = Decoder(decoder_settings)
    return load_weights(model.to_empty(device="cpu"), state, source=str(weights)).eval()


def save_model(model: Decoder, folder: str | Path) -> Path:
    """The folder, now holding model.safetensors, model.json and, for text, tokenizer.json.

    Each file appears whole or not at all; the card comes last. Raises: ArraError when the folder cannot be written.
    """
    folder = Path(folder)
    tokenizer = TOKENIZER_FILE if model.text_tokenizer is not None else None
    card = {"kind": "llamagen", "settings": model.settings.model_dump(mode="json"), "text_tokenizer": tokenizer}
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


def _load_folder(folder: Path) -> Decoder:
    card_path, weights_path = folder / CARD_FILE, folder / WEIGHTS_FILE
    for path in (card_path, weights_path):
        if not path.is_file():
            raise ArraError(f"{folder}: no {path.name} in it; expected a finished run or a folder made by save_model")
    try:
        card = json.loads(card_path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArraError(f"{card_path}: not valid JSON ({error}); save the model again") from error
    if not isinstance(card, dict) or card.get("kind") != "llamagen" or not isinstance(card.get("settings"), dict):
        raise ArraError(f'{card_path}: expected {{"kind": "llamagen", "settings": {{...}}}}; save the model again')
    with torch.device("meta"):
        model = Decoder(_settings(str(card_path), card["settings"]))
    load_weights(model.to_empty(device="cpu"), read_checkpoint(weights_path), source=str(weights_path))
    if card.get("text_tokenizer"):
        from arra.tokenizers.text import load_text_tokenizer

        model.text_tokenizer = load_text_tokenizer(folder / card["text_tokenizer"])
    return model.eval()


def _settings(source: str, fields: dict[str, Any]) -> DecoderSettings:
    try:
        return DecoderSettings(**fields)
    except ValidationError as error:
        faults = [".".join(map(str, fault["loc"])) + f" {fault['msg']}" for fault in error.errors()]
        raise ArraError(f"{source}: settings make no model: {'; '.join(fault.strip() for fault in faults)}") from error
