"""Networks that predict the next token, opened by name or folder and saved with what is needed to open them again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from arra.errors import ArraError
from arra.models.causal import CausalLM
from arra.models.decoder import Condition, Decoder, DecoderSettings, ModelOutput
from arra.models.fitting import Fitting
from arra.models.language_folder import CARD_FILE, load_language_model, save_language_model
from arra.models.language_folder import KIND as LANGUAGE_KIND
from arra.models.llamagen import SIZES, build_decoder, decoder_settings, infer_settings, told_settings
from arra.models.narrow import refuse_narrowed
from arra.models.weights import Entry, Weights, read_weights
from arra.runs import atomic_file, atomic_write

__all__ = [
    "CausalLM",
    "Condition",
    "Decoder",
    "DecoderSettings",
    "ModelOutput",
    "Painter",
    "load_decoder",
    "load_model",
    "load_outline",
    "open_weights",
    "save_model",
    "save_outline",
]

CHAMELEONS = ("chameleon", "lumina-mgpt")
Painter = Decoder | CausalLM
"""A network that predicts image codes after a condition."""
WEIGHTS_FILE, TOKENIZER_FILE = "model.safetensors", "tokenizer.json"


def load_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    entry: Entry = "model",
    dtype: torch.dtype | None = torch.float32,
    ignore: Sequence[str] = (),
    init_missing: Sequence[str] = (),
    **settings: Any,
) -> Painter:
    """A model in eval mode.

    `name` is "llamagen-b" (l, xl, xxl, xxxl, 1b, 3b, 7b), "llamagen" (every size from the weights, `num_heads=` and
    `grid=` as arguments where nothing tells them) or a folder: a run, a saved model, a language model of `arra init`
    or `arra import`, or LlamaGen's own (config.json and weights). `weights` is a checkpoint and `entry` which of its
    state dicts to take; without one the model is freshly initialised. `dtype=None` keeps the file's. Keys that match
    `ignore` are left out, missing ones that match `init_missing` get initial weights. Other arguments are fields of
    `DecoderSettings`; for "chameleon" and "lumina-mgpt" those of `ChameleonOptions`: text_tokenizer=, layout=, ...
    Raises: ArraError for an unknown name, unreadable or unfitting weights, and settings that make no model.
    """
    how = Fitting(dtype, tuple(ignore), tuple(init_missing))
    folder = Path(name)
    if folder.is_dir() and not (folder / CARD_FILE).is_file() and (folder / "config.json").is_file():
        _refuse_unprepared(folder)
        return open_weights(read_weights(folder, entry=entry), known=settings, how=how)
    if folder.is_dir():
        if weights is not None or settings or how.ignore or how.init_missing:
            raise ArraError(f"{folder}: a model folder brings its own weights and settings; drop the other arguments")
        return _load_folder(folder, how)
    if str(name) in CHAMELEONS:
        return _open_chameleon(str(name), weights, how, entry, settings)
    family, _, size = str(name).partition("-")
    if family != "llamagen" or (size and size not in SIZES):
        known = ", ".join(["llamagen", *(f"llamagen-{known}" for known in SIZES), *CHAMELEONS])
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


def _refuse_unprepared(folder: Path) -> None:
    """Nothing.

    Raises: ArraError for a folder of `transformers`, which lacks what a painter must know beside its weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # told where weights are read
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind in (None, "c2i", "t2i"):  # LlamaGen's own
        return
    how = f"arra import, or load_model('chameleon', weights={str(folder)!r})" if kind == "chameleon" else "arra init"
    raise ArraError(f"{folder}: a language model of transformers ({str(kind)[:40]}), no painter yet; see {how}")


def _open_chameleon(
    name: str, weights: str | Path | None, how: Fitting, entry: Entry, options: dict[str, Any]
) -> CausalLM:
    from arra.models.chameleon_painter import ChameleonOptions, open_chameleon

    if weights is None:
        raise ArraError(f"{name}: its weights do not come with the package; give the folder as weights=PATH")
    known = [*ChameleonOptions.model_fields]
    if odd := [option for option in options if option not in known]:
        raise ArraError(f"{name}: {odd[0]}: unknown; expected {', '.join(known)}")
    if how.init_missing:
        raise ArraError(f"{name}: init_missing: its files hold all weights; drop it")
    try:
        told = ChameleonOptions(**options)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ArraError(f"{name}: {where}: {fault['msg']}; got {fault['input']!r}") from error
    return open_chameleon(Path(weights), options=told, dtype=how.dtype, entry=entry, ignore=how.ignore).model


def load_decoder(name: str | Path, **options: Any) -> Decoder:
    """What `load_model` gives, where it is a decoder.

    Raises: ArraError as there, and for a language model.
    """
    model = load_model(name, **options)
    if not isinstance(model, Decoder):
        raise ArraError(f"{name}: a language model; expected a decoder of LlamaGen's kind")
    return model


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


def _require(path: Path) -> None:
    if not path.is_file():
        raise ArraError(
            f"{path.parent}: no {path.name} in it; expected a finished run, a folder made by save_model, `arra import` "
            "or `arra init`, or one with LlamaGen's config.json"
        )


def _told_by(field: str, known: dict[str, Any], told: dict[str, tuple[Any, str]]) -> str:
    """Who said so, and who says otherwise."""
    if field not in known:
        return told[field][1]
    value, who = told.get(field, (known[field], ""))
    same = value == (tuple(known[field]) if isinstance(known[field], list) else known[field])
    return "given" if same else f"given, against {value} by {who}"


def save_model(model: Painter, folder: str | Path) -> Path:
    """The folder, now holding model.safetensors, model.json and, for text, tokenizer.json.

    Of a language model it is a Hugging Face folder besides. Each file appears whole or not at all; the card comes last.
    Raises: ArraError when the folder cannot be written, or for a model that was narrowed to paint.
    """
    refuse_narrowed(model)
    folder = Path(folder)
    if isinstance(model, CausalLM):
        save_language_model(model, folder)
        return folder
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        safetensors.torch.save_file(state, temporary)
    save_outline(model, folder)
    return folder


def save_outline(model: Decoder, folder: Path) -> None:
    """Nothing; the folder holds all of a decoder but its weights: what it is, and how it reads text."""
    tokenizer = TOKENIZER_FILE if model.text_tokenizer is not None else None
    card = {"kind": "llamagen", "settings": model.settings.model_dump(mode="json"), "text_tokenizer": tokenizer}
    card["about"] = model.about
    if model.text_tokenizer is not None:
        model.text_tokenizer.save(folder / TOKENIZER_FILE)
    atomic_write(folder / CARD_FILE, json.dumps(card, indent=2) + "\n")


def load_outline(folder: Path, *, weights: Mapping[str, Tensor]) -> Decoder:
    """The decoder of a folder with the given weights in place of its own.

    Raises: ArraError when the folder has no outline, or the weights do not fit it.
    """
    return cast(Decoder, _load_folder(folder, Fitting(), weights=weights))


def _load_folder(folder: Path, how: Fitting, *, weights: Mapping[str, Tensor] | None = None) -> Painter:
    card_path, weights_path = folder / CARD_FILE, folder / WEIGHTS_FILE
    _require(card_path)
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArraError(f"{card_path}: not valid JSON ({error}); save the model again") from error
    kind = card.get("kind") if isinstance(card, dict) else None
    if kind not in ("llamagen", LANGUAGE_KIND) or not isinstance(card.get("settings"), dict):
        raise ArraError(f'{card_path}: expected {{"kind": "llamagen", "settings": {{...}}}}; save the model again')
    if kind == LANGUAGE_KIND:
        return load_language_model(folder, dtype=how.dtype)
    if weights is None:
        _require(weights_path)
    about, tokenizer = card.get("about") or {}, card.get("text_tokenizer")
    if not isinstance(about, dict) or tokenizer not in (None, TOKENIZER_FILE):
        raise ArraError(f"{card_path}: expected about {{...}} and text_tokenizer null or {TOKENIZER_FILE!r}")
    found = read_weights(weights_path) if weights is None else Weights(dict(weights), folder)
    model, _ = build_decoder(found, decoder_settings(str(card_path), card["settings"]), how)
    model.about = about
    if tokenizer:
        from arra.tokenizers.text import load_text_tokenizer

        model.text_tokenizer = load_text_tokenizer(folder / TOKENIZER_FILE)
    return model
