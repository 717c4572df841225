"""A painting language model on disk: an ordinary Hugging Face folder, and our card `model.json` beside its files.

`transformers` reads the folder as it is; the card says which tokens are codes and how a picture is laid out.
"""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.causal import CausalLM, LanguageSettings
from arra.models.narrow import quiet_torchao
from arra.models.weights import DAMAGE, read_weights, shard_files
from arra.runs import atomic_write, let_others_read, writing
from arra.tokenizers.prompts import PromptTokenizer, load_prompt_tokenizer

KIND, CARD_FILE = "causal-lm", "model.json"
CONFIG_FILE, TOKENIZER_FILE, ADAPTER_FILE = "config.json", "tokenizer.json", "adapter_config.json"
TOKENIZER_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What Hugging Face keeps beside tokenizer.json; carried along as it is."""
MAX_SHARD_SIZE = "50GB"
MOST_LAYERS = 4096
"""More are no model's, and `transformers` would build them one by one before it looks at the weights."""
LAYER_FIELDS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
INDICES = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
"""The names that `transformers` knows for weights in one file, and for the list of several."""
BROKEN = (*DAMAGE, ImportError, ArithmeticError, pickle.UnpicklingError, safetensors.SafetensorError,
          StrictDataclassError)  # fmt: skip
"""What `transformers` raises of files that it cannot read."""


def save_language_model(model: CausalLM, folder: Path) -> None:
    """Nothing; the folder holds the model, its tokenizer, and the card, which comes last.

    Raises: ArraError when the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        with writing(folder):
            write_files(model, place, _plain_state(model), max_shard_size=MAX_SHARD_SIZE)
            let_others_read(place)
            for file in sorted(place.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    write_card(model, folder)


def write_card(model: CausalLM, folder: Path) -> None:
    """Nothing; the folder says which tokens are codes and how a picture is laid out."""
    card = {"kind": KIND, "settings": model.settings.model_dump(mode="json"), "about": model.about}
    atomic_write(folder / CARD_FILE, json.dumps(card, indent=2) + "\n")


def write_files(model: CausalLM, folder: Path, state: Mapping[str, Tensor], *, max_shard_size: str) -> None:
    """Nothing; the folder holds these weights, the configuration and the tokenizer as Hugging Face has them."""
    with quiet():  # it takes the dict apart
        model.lm.save_pretrained(folder, state_dict=dict(state), max_shard_size=max_shard_size)  # type: ignore[operator]
    for name, text in model.companions.items():
        atomic_write(folder / name, text)
    if model.text_tokenizer is not None:
        model.text_tokenizer.save(folder / TOKENIZER_FILE)


def _plain_state(model: CausalLM) -> dict[str, Tensor]:
    """The state dict in `transformers`' own names and shapes."""
    state = dict(model.lm.state_dict())
    if model.settings.head_norm_rows is not None:
        from arra.models.chameleon import expand_head_norms

        state = expand_head_norms(state, model.lm.config)
    return state


@dataclass(frozen=True)
class LanguageCard:
    """What a folder says of its model before the weights are read."""

    settings: LanguageSettings
    text: PromptTokenizer
    about: dict[str, Any]


def read_language_card(folder: Path) -> LanguageCard:
    """Layout, grid and text tokenizer of a folder.

    Raises: ArraError when it is not a folder of a painting language model.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise ArraError(
            f"{folder}: no {CARD_FILE} in it; expected a folder made by `arra init`, `arra import` or a run of a "
            "language model"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArraError(f"{path}: not valid JSON ({error}); save the model again") from error
    if not isinstance(card, dict) or card.get("kind") != KIND or not isinstance(card.get("settings"), dict):
        raise ArraError(f'{path}: no language model\'s card; expected {{"kind": "{KIND}", "settings": {{...}}}}')
    about = card.get("about") or {}
    if not isinstance(about, dict):
        raise ArraError(f"{path}: expected about {{...}}; save the model again")
    try:
        settings = LanguageSettings(**card["settings"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArraError(f"{path}: settings.{where}: {first['msg']}; save the model again") from error
    text = load_prompt_tokenizer(folder / TOKENIZER_FILE, reserved=settings.layout.reserved())
    return LanguageCard(settings, text, about)


def load_language_model(folder: Path, *, dtype: torch.dtype | None, empty: bool = False) -> CausalLM:
    """The model of a folder in eval mode; `empty` as in `read_language_model`.

    Raises: ArraError when files are missing or damaged, or do not fit together.
    """
    card = read_language_card(folder)
    settings = card.settings
    lm = read_language_model(folder, dtype=dtype, head_norm_rows=settings.head_norm_rows, empty=empty)
    model = CausalLM(
        lm,
        layout=settings.layout,
        grid=settings.grid,
        head_norm_rows=settings.head_norm_rows,
        text_tokenizer=card.text,
        about=card.about,
    )
    highest = max(token for token in card.text.backend.get_vocab().values() if token not in card.text.special)
    if highest >= model.config.vocab_size:
        raise ArraError(
            f"{folder / TOKENIZER_FILE}: text goes up to token {highest}, the model has {model.config.vocab_size}; put "
            "back the tokenizer that belongs to it"
        )
    model.companions = read_companions(folder)
    return model.eval()


def read_companions(folder: Path) -> dict[str, str]:
    """The texts of the tokenizer's smaller files, by name."""
    try:
        return {
            name: (folder / name).read_text(encoding="utf-8")
            for name in TOKENIZER_COMPANIONS
            if (folder / name).is_file()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise ArraError(f"{folder}: its tokenizer files cannot be read ({error}); fetch them again") from error


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which `transformers` shows no bars and warns of nothing."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_torchao():  # it is imported there where it is installed
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_language_model(
    folder: Path, *, dtype: torch.dtype | None, head_norm_rows: int | None = None, empty: bool = False
) -> nn.Module:
    """A causal LM of `transformers` in eval mode; nothing in the folder can run, nothing outside is read.

    `empty` reads no weights: the same network on the meta device, all tensors with their names, shapes and types, ties
    and whether they are trained, for one that gets its weights from elsewhere.

    Raises: ArraError when it cannot be read, or lacks weights.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ArraError(
            "language models: the package 'transformers' is missing; pip install 'arra[llm]' -c constraints.txt"
        ) from error
    _check_folder(folder)
    told = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **told)
        config._attn_implementation = None  # it may name a repository whose code would be fetched and run
        if config.model_type == "chameleon":
            from arra.models.chameleon import read_chameleon

            found: nn.Module = read_chameleon(folder, dtype=dtype, head_norm_rows=head_norm_rows, empty=empty).lm
            return found.eval()
        if empty:
            return _empty_language_model(folder, config, dtype)
        with quiet():  # what it would warn of is refused below
            lm, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True if any(folder.glob("*.safetensors")) else None,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
                **told,
            )
    except BROKEN as error:
        pickled = isinstance(error, pickle.UnpicklingError)
        told_so = (
            "a pickle that is damaged or holds more than tensors" if pickled else f"{type(error).__name__}: {error}"
        )
        raise ArraError(
            f"{folder}: no causal language model that can be read ({' '.join(told_so.split())[:200]}); check name and "
            "files"
        ) from error
    absent = sorted([*info["missing_keys"], *(str(each[0]) for each in info["mismatched_keys"])])
    if absent:
        raise ArraError(
            f"{folder}: weights missing or of another shape than config.json says: {', '.join(absent[:4])}"
            f"{f' and {len(absent) - 4} more' if len(absent) > 4 else ''}; fetch the folder again"
        )
    lists = tuple(f"{name}." for name, module in lm.named_modules() if isinstance(module, nn.ModuleList))
    if beyond := sorted(key for key in info["unexpected_keys"] if key.startswith(lists)):
        raise ArraError(
            f"{folder}: weights that the network of config.json has no place for: {', '.join(beyond[:4])}"
            f"{f' and {len(beyond) - 4} more' if len(beyond) > 4 else ''}; fetch the folder again"
        )
    loaded: nn.Module = lm.eval()
    return loaded


def _empty_language_model(folder: Path, config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The network of a configuration on the meta device; without a `dtype` of the type that the folder names."""
    from transformers import AutoModelForCausalLM

    kind = dtype or getattr(config, "dtype", None) or _stored_type(folder)
    with quiet(), torch.device("meta"):
        lm: nn.Module = AutoModelForCausalLM.from_config(config, dtype=kind)
    return lm.eval()


def _stored_type(folder: Path) -> torch.dtype:
    """The type of the first numbers in a folder's weights, which `transformers` goes by where nothing else tells."""
    state = read_weights(folder).state
    return next(value.dtype for value in state.values() if value.is_floating_point())


def _check_folder(folder: Path) -> None:
    """Nothing.

    Raises: ArraError where `transformers` would read what is outside the folder, or make another network of it.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ArraError(f"{folder}: no {CONFIG_FILE} in it; expected a language model's folder in Hugging Face layout")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArraError(f"{path}: not readable JSON ({reason}); fetch it again") from error
    for part in [config, *config.values()] if isinstance(config, dict) else []:
        if not isinstance(part, dict):
            continue
        if (narrow := part.get("quantization_config")) is not None:
            method = narrow.get("quant_method") if isinstance(narrow, dict) else narrow
            raise ArraError(f"{folder}: its weights are quantised ({str(method)[:40]}); name a folder of full weights")
        if many := [name for name in LAYER_FIELDS if isinstance(part.get(name), int) and part[name] > MOST_LAYERS]:
            raise ArraError(f"{path}: {many[0]} is {part[many[0]]}, expected at most {MOST_LAYERS}; fetch it again")
    if (folder / ADAPTER_FILE).is_file():
        raise ArraError(f"{folder}: {ADAPTER_FILE} beside the weights; merge the adapter, or move it out of the folder")
    for whole, index in INDICES.items():
        if (folder / index).is_file() and not (folder / whole).is_file():
            shard_files(folder / index)
