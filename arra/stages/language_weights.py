"""Published painting language models in, and ours out: `arra import` and `arra export` of Chameleon's family.

Chameleon, Lumina-mGPT, ARRA, Meta's files --> import_chameleon --> a folder (Hugging Face's, with our card)
a folder --> export_language_model --> --to hf: a folder for transformers; --to lumina: for Lumina-mGPT's code
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from arra.errors import ArraError
from arra.models.causal import CausalLM
from arra.models.chameleon import ReadChameleon, export_state, size_name
from arra.models.chameleon_painter import ChameleonOptions, open_chameleon
from arra.models.language_folder import (
    CARD_FILE,
    KIND,
    load_language_model,
    save_language_model,
    write_card,
    write_files,
)
from arra.models.weights import Entry
from arra.runs import atomic_write, file_hash, let_others_read, writing

Rows = list[tuple[str, str]]
KINDS = {
    "hf": "Chameleon, q/k norms of one row a head (Hugging Face)",
    "shared": "Chameleon, shared q/k norms (Lumina-mGPT, ARRA)",
    "meta": "Chameleon, Meta's own files",
}
SHARD_SIZE = "5GB"


def import_chameleon(
    source: Path,
    out: Path,
    *,
    options: ChameleonOptions,
    dtype: torch.dtype | None = None,
    entry: Entry = "model",
    ignore: tuple[str, ...] = (),
) -> Rows:
    """What was done, in words; `out` is the model's folder now.

    Raises:
        ArraError: files are missing, damaged or unsafe, do not fit each other, or no text tokenizer is there.
    """
    opened = open_chameleon(source, options=options, dtype=dtype, entry=entry, ignore=ignore)
    read, layout, grid = opened.read, opened.model.layout, opened.model.settings.grid
    hashes = {path.name: file_hash(path) for path in (*read.files, opened.text_file)}
    opened.model.about["origin"]["sha256"] = hashes
    save_language_model(opened.model, out)
    return [
        *_network_rows(read),
        ("q/k norms", _norms(read)),
        ("image tokenizer", "its encoder is kept, frozen" if hasattr(read.lm.model, "vqmodel") else ""),
        ("layout", f"{layout.family}, {layout.num_codes} codes"),
        ("prompt", repr(layout.template)),
        ("grid", f"{grid[0]} x {grid[1]} codes, {opened.told_grid}"),
        ("image head", _head_words(opened.zeroed, options, ratio=opened.code_rows)),
        ("left out", read.left.facts()["ignored"]),
        ("dropped", f"{dropped} (no weights)" if (dropped := read.left.facts()["dropped"]) else ""),
        ("text tokenizer", str(opened.text_file)),
        *((f"sha256 {name}", value) for name, value in hashes.items()),
    ]


def _network_rows(read: ReadChameleon) -> Rows:
    settings, parameters = read.settings, list(read.lm.parameters())
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    heads = f"{settings.num_attention_heads} heads"
    if settings.num_key_value_heads != settings.num_attention_heads:
        heads += f" ({settings.num_key_value_heads} key-value)"
    name = size_name(settings)
    size = f"{name.upper()}, " if name else ""
    swin = ", norms behind each half of a block" if settings.swin_norm else ""
    return [
        ("kind", KINDS[read.layout_kind]),
        ("parameters", f"{sum(parameter.numel() for parameter in parameters):,} ({', '.join(kinds)})"),
        ("network", f"{size}{settings.num_hidden_layers} layers of {settings.hidden_size}, {heads}{swin}"),
    ]


def _norms(read: ReadChameleon) -> str:
    if read.head_norm_rows is None:
        return "one row a head"
    rows = f"{read.head_norm_rows} row{'s' if read.head_norm_rows > 1 else ''}"
    return f"{rows} shared by all heads in training, written out for every head in the folder"


def _head_words(zeroed: bool, options: ChameleonOptions, *, ratio: float) -> str:
    what = f"rows of codes {'zeroed' if zeroed else 'kept'} (their numbers {ratio:.2f} times as large as others')"
    if options.zero_image_head is not None:
        return f"{what}, as asked"
    if zeroed:
        return f"{what}: as published they paint nothing; --keep-image-head for a model that paints (Anole)"
    return f"{what}: a model of this kind paints; --zero-image-head starts them anew"


def is_language_model(folder: Path) -> bool:
    """Whether a folder's card is a language model's."""
    path = folder / CARD_FILE
    if not path.is_file():
        return False
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArraError(
            f"{path}: not valid JSON ({' '.join(str(error).split())[:120]}); save the model again"
        ) from error
    return isinstance(card, dict) and card.get("kind") == KIND


def export_language_model(folder: Path, out: Path, *, to: str, dtype: torch.dtype | None = None) -> tuple[Rows, str]:
    """What was written, in words, and the model's type.

    `out` is a new folder that `transformers` ("hf") or Lumina-mGPT's code ("lumina") reads.

    Raises:
        ArraError: no such model, one that the format cannot hold, or `out` is in use.
    """
    if to not in ("hf", "lumina"):
        raise ArraError(f"--to {to}: unknown for a language model; expected hf or lumina")
    refuse_existing(out)
    model = load_language_model(folder, dtype=dtype)
    kind = str(model.lm.config.model_type)  # type: ignore[union-attr]
    chameleon = kind == "chameleon"
    if to == "lumina" and not chameleon:
        raise ArraError(f"{folder}: a {kind}, which Lumina-mGPT's code cannot hold; export it with --to hf")
    if to == "lumina" and model.layout.rep is not None:
        raise ArraError(
            f"{folder}: was trained with the REP token before every picture, which Lumina-mGPT's code does not write; "
            "export it with --to hf"
        )
    state = dict(model.lm.state_dict())
    if chameleon:
        state = export_state(model.lm, "lumina" if to == "lumina" else "hf", source=str(folder))
    with new_folder(out) as place:
        write_files(model, place, state, max_shard_size=SHARD_SIZE)
        if to == "lumina":
            atomic_write(place / "config.json", json.dumps(_lumina_config(model, state), indent=2) + "\n")
        else:
            copy_image_tokenizer(folder, place)
            write_card(model, place)
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    hashes = [(f"sha256 {path.name}", file_hash(path)) for path in sorted(out.glob("*.safetensors"))]
    return [("tensors", f"{len(state)}, {', '.join(kinds)}"), *hashes], kind


def refuse_existing(out: Path) -> None:
    """Nothing.

    Raises: ArraError where something is there already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArraError(f"{out}: exists already; name a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to be written, which becomes `out` at the end, whole; after an error there is none.

    Raises: ArraError when it cannot be written.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with writing(out):
            yield place
            let_others_read(place)
            place.chmod(0o755)  # mkdtemp's folder is its owner's alone
            os.replace(place, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def copy_image_tokenizer(folder: Path, out: Path) -> bool:
    """Whether the model's folder has an image tokenizer in it, which the other then has too."""
    files = sorted((folder / "tokenizer").glob("*"))
    for file in files:
        atomic_write(out / "tokenizer" / file.name, file.read_bytes())
    return bool(files)


def reader_hint(out: Path, *, to: str, model_type: str) -> str:
    """How others open an exported folder."""
    if to == "lumina":
        return f"Lumina-mGPT: ChameleonForConditionalGeneration.from_pretrained('{out}')"
    kind = "ChameleonForConditionalGeneration" if model_type == "chameleon" else "AutoModelForCausalLM"
    return f"transformers: {kind}.from_pretrained('{out}')"


def _lumina_config(model: CausalLM, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """config.json under the names that Lumina-mGPT's code knows; logits of codes are not masked."""
    config = model.lm.config.to_dict()  # type: ignore[union-attr,operator]
    rope = dict(config["rope_parameters"])
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "attention_bias", "attention_dropout", "mlp_bias", "swin_norm", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "vocabulary_map",
    )  # fmt: skip
    shape = {name: config["vq_config"][name] for name in config["vq_config"] if not name.startswith("_")}
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        **{name: config[name] for name in kept},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "model_parallel_size": len(state["model.layers.0.self_attn.q_norm.weight"]),
        "vq_config": shape,
        "mask_image_logits": False,
        "torch_dtype": str(state["lm_head.weight"].dtype).removeprefix("torch."),
    }
