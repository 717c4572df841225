"""Chameleon, Lumina-mGPT and ARRA checkpoints as `transformers`' own network, whichever layout their files have.

    a Hugging Face folder, Lumina's or ARRA's, Meta's own files --> read_chameleon --> ReadChameleon{lm, ...}

The network is made on the meta device and filled, or left empty; whatever does not fit is named. Nothing in a file can
run.
Source: Alpha-VLLM/Lumina-mGPT and xiexing0916/ARRA (names, shared q/k norms, the projector's `adaptor.*`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.chameleon_meta import PARAMS_FILE, MetaFiles, meta_state, read_meta
from arra.models.chameleon_network import (
    CHAMELEON_SIZES,
    TOKENIZER_PREFIX,
    ChameleonSettings,
    SharedHeadNorm,
    build_chameleon,
    chameleon_settings,
    expand_head_norms,
    export_state,
    require_transformers,
    share_head_norms,
    size_name,
    zero_image_head,
)
from arra.models.fitting import Fitted, Fitting, fit
from arra.models.weights import Entry, Weights, read_weights

__all__ = [
    "CHAMELEON_SIZES",
    "ReadChameleon",
    "SharedHeadNorm",
    "build_chameleon",
    "chameleon_settings",
    "expand_head_norms",
    "export_state",
    "find_text_tokenizer",
    "is_chameleon",
    "read_chameleon",
    "share_head_norms",
    "size_name",
    "zero_image_head",
]

LayoutKind = Literal["hf", "shared", "meta"]
CONFIG_FILE = "config.json"
PROJECTOR = "adaptor.*"
"""ARRA's released checkpoint holds the projector of its alignment; nothing after training needs it."""
STRAY = re.compile(r"rotary_emb\.inv_freq$")
TOKENIZER_FILES = ("tokenizer.json", "text_tokenizer.json", "original_tokenizers/text_tokenizer.json")
META_TOKENIZER = "../../tokenizer/text_tokenizer.json"
"""Where Meta's download puts it: models/7b and tokenizer lie side by side."""


@dataclass(frozen=True)
class ReadChameleon:
    """A language model and what its files tell."""

    lm: Any
    """`transformers`' ChameleonForConditionalGeneration, in eval mode."""
    settings: ChameleonSettings
    layout_kind: LayoutKind
    """q/k norms of one row a head, of shared rows, or Meta's own files."""
    head_norm_rows: int | None
    """Rows that q/k norms share; null: one a head."""
    vocabulary: dict[str, int] | None
    """Names of tokens, where the configuration holds them."""
    tokenizer_file: Path | None
    """The text tokenizer beside the weights."""
    files: tuple[Path, ...]
    """Files of weights that were read."""
    left: Fitted
    facts: dict[str, Any]
    """What is worth keeping of where the weights came from."""


def is_chameleon(path: Path) -> bool:
    """Whether a folder, or the folder of a file, is a Chameleon's: by model_type, or by Meta's params.json.

    Raises: ArraError when a folder's config.json is unreadable.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG_FILE).is_file():
        try:
            return _config(folder).get("model_type") == "chameleon"
        except ArraError:  # beside a file it may be anyone's
            if path.is_dir():
                raise
    return (folder / PARAMS_FILE).is_file() and (path.is_dir() or path.name.startswith("consolidated."))


def read_chameleon(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    entry: Entry = "model",
    ignore: tuple[str, ...] = (),
    vocabulary: Mapping[str, int] | None = None,
    head_norm_rows: int | None = None,
    empty: bool = False,
) -> ReadChameleon:
    """The language model of a folder, or of a file beside its config.json or params.json.

    `dtype=None` keeps the files' type. `vocabulary` names tokens where the configuration does not. ARRA's projector and
    keys that match `ignore` are left out. The image tokenizer's encoder (`model.vqmodel`) is there, frozen, where the
    files hold it. With `head_norm_rows`, q/k norms that are written out for every head share so many rows again, if the
    heads agree. `empty` reads no weights beyond names, shapes and types: the model is on the meta device.
    Raises: ArraError when files are missing, damaged or unsafe, no Chameleon's, or do not fit.
    """
    require_transformers()
    source = Path(path)
    folder = source if source.is_dir() else source.parent
    if not source.exists():
        raise ArraError(f"{source}: no such file or folder; expected Chameleon's, Lumina-mGPT's or ARRA's weights")
    if (folder / CONFIG_FILE).is_file():
        how = Fitting(dtype, (PROJECTOR, *ignore), empty=empty)
        return _read_hugging_face(source, folder, how, entry, vocabulary, head_norm_rows)
    if (folder / PARAMS_FILE).is_file():
        return _read_meta(folder, Fitting(dtype, owned=True, empty=empty), vocabulary)
    raise ArraError(
        f"{folder}: neither {CONFIG_FILE} nor {PARAMS_FILE} in it, and tensors alone do not tell the heads; put the "
        "one that its publisher has beside the weights"
    )


def _read_hugging_face(
    source: Path,
    folder: Path,
    how: Fitting,
    entry: Entry,
    vocabulary: Mapping[str, int] | None,
    shared_rows: int | None,
) -> ReadChameleon:
    config = _config(folder)
    if config.get("model_type") != "chameleon":
        raise ArraError(
            f"{folder / CONFIG_FILE}: model_type is {config.get('model_type')!r}, expected 'chameleon'; other language "
            "models become painters with arra init"
        )
    if not isinstance(config.get("vocabulary_map"), Mapping) or not config["vocabulary_map"]:
        config["vocabulary_map"] = vocabulary
    settings = chameleon_settings(str(folder / CONFIG_FILE), config)
    weights = read_weights(source, entry=entry)
    rows = _norm_rows(weights, settings)
    lm, left = _filled(weights.state, settings, rows=rows, how=how, source=str(source))
    if shared_rows is not None:
        share_head_norms(lm, shared_rows, state=weights.state if how.empty else None)
    return ReadChameleon(
        lm=lm,
        settings=settings,
        layout_kind="hf" if rows is None else "shared",
        head_norm_rows=rows,
        vocabulary=settings.vocabulary_map,
        tokenizer_file=find_text_tokenizer(folder),
        files=weights.files,
        left=left,
        facts=weights.facts(),
    )


def _read_meta(folder: Path, how: Fitting, vocabulary: Mapping[str, int] | None) -> ReadChameleon:
    files = read_meta(folder, vocabulary=_with_image_token(vocabulary))
    rows = len(files.ranks)
    state = meta_state(_without_numbers(files) if how.empty else files, dtype=how.dtype)
    lm, left = _filled(state, files.settings, rows=rows, how=how, source=str(folder))
    paths = tuple(path for weights in files.ranks for path in weights.files)
    return ReadChameleon(
        lm=lm,
        settings=files.settings,
        layout_kind="meta",
        head_norm_rows=rows,
        vocabulary=None,
        tokenizer_file=find_text_tokenizer(folder),
        files=paths,
        left=left,
        facts={"source": folder.name, "files": [path.name for path in paths]},
    )


def _without_numbers(files: MetaFiles) -> MetaFiles:
    """The same tensors on the meta device."""
    ranks = [replace(one, state={key: value.to("meta") for key, value in one.state.items()}) for one in files.ranks]
    return replace(files, ranks=tuple(ranks))


def _with_image_token(vocabulary: Mapping[str, int] | None) -> dict[str, int] | None:
    """The vocabulary as `transformers` has it: an unused token is the place of a picture in a prompt."""
    if vocabulary is None:
        return None
    return {"<image>" if name == "<reserved08707>" else name: token for name, token in vocabulary.items()}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArraError(f"{path}: not readable JSON ({reason}); fetch it again") from error
    if not isinstance(config, dict):
        raise ArraError(f"{path}: holds a {type(config).__name__}, expected an object; fetch it again")
    return config


def find_text_tokenizer(path: Path) -> Path | None:
    """The text tokenizer that lies beside weights; of Meta's also where their download puts it."""
    folder = path if path.is_dir() else path.parent
    names = TOKENIZER_FILES if (folder / CONFIG_FILE).is_file() else (*TOKENIZER_FILES, META_TOKENIZER)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _norm_rows(weights: Weights, settings: ChameleonSettings) -> int | None:
    """Rows that q/k norms share, by the shape of the first ones; None: one a head.

    Raises:
        ArraError: there are none, or they are of neither layout.
    """
    if settings.num_hidden_layers > len(weights.state):
        raise ArraError(
            f"{weights.source}: {len(weights.state)} tensors for the {settings.num_hidden_layers} layers of its "
            f"{CONFIG_FILE}; not its file"
        )
    keys = [f"model.layers.0.self_attn.{which}_norm.weight" for which in "qk"]
    if absent := [key for key in keys if key not in weights.state]:
        roots = ", ".join(sorted({key.partition(".")[0] for key in weights.state})[:6])
        raise ArraError(
            f"{weights.source}: {absent[0]} missing (keys begin with {roots}); expected Chameleon's language model"
        )
    shapes = [tuple(weights.state[key].shape) for key in keys]
    heads = settings.num_attention_heads, settings.num_key_value_heads
    if shapes == [(count, settings.head_dim) for count in heads]:
        return None
    rows = shapes[0][0] if shapes[0] else 0
    if shapes != [(rows, settings.head_dim)] * 2 or rows < 1 or any(count % rows for count in heads):
        raise ArraError(
            f"{weights.source}: q/k norms of shapes {shapes[0]} and {shapes[1]}; expected {heads[0]} and {heads[1]} "
            f"rows of {settings.head_dim} (Hugging Face), or as many rows in both that divide the heads (Lumina, ARRA)"
        )
    return rows


def _filled(
    state: Mapping[str, Tensor], settings: ChameleonSettings, *, rows: int | None, how: Fitting, source: str
) -> tuple[Any, Fitted]:
    """The network with these weights, and what was left over of them."""
    parts: dict[str, Any] = {"rows": rows, "image_tokenizer": any(key.startswith(TOKENIZER_PREFIX) for key in state)}
    with torch.device("meta"):
        lm = build_chameleon(settings, **parts)

    def fresh() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_chameleon(settings, **parts)

    left = fit(lm, state, source=source, fresh=fresh, stray=STRAY, how=how)
    if not how.empty:  # its tables are no weights: made anew, off the meta device
        rotary = lm.model.rotary_emb
        lm.model.rotary_emb = type(rotary)(config=lm.config)
    return lm.eval(), left
