"""Published weights in and ours out: `arra import` and `arra export`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arra.config import check_template
from arra.errors import ArraError
from arra.models import load_decoder, open_weights, save_model
from arra.models.chameleon import is_chameleon
from arra.models.chameleon_painter import ChameleonOptions
from arra.models.fitting import Fitting, name_keys
from arra.models.llamagen import SIZES, launch_hint, original_state, size_name, told_settings
from arra.models.weights import Entry, Weights, read_weights
from arra.runs import atomic_file, atomic_write, file_hash
from arra.stages.chexgenbench import export_set
from arra.stages.decoder_weights import decoder_hint, export_decoder
from arra.stages.language_weights import (
    export_language_model,
    import_chameleon,
    is_language_model,
    reader_hint,
)
from arra.stages.picture_sets import open_set
from arra.tokenizers.chameleon import original_vqgan_state, original_vqgan_yaml
from arra.tokenizers.image import WEIGHTS_FILE, load_tokenizer, open_vq_weights
from arra.tokenizers.weights import original_vq_state, vq_launch_hint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PIXELS = "16x16 (256 pixels), 24x24 (384) or 32x32 (512)"
# one key of each kind suffices: what else is missing is then named
SIGNS = {
    "decoder": ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight"),
    "tokenizer": ("quantize.embedding.weight", "encoder.conv_in.weight", "post_quant_conv.weight"),
}


@dataclass(frozen=True)
class Done:
    """What was written, in words."""

    path: Path
    rows: list[tuple[str, str]]
    hint: str = ""

    def summary(self) -> str:
        """The rows that say something, one a line."""
        rows = [(what, value) for what, value in self.rows if value]
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"{what:<{width}}  {value}" for what, value in rows)


def import_weights(
    source: Path,
    out: Path,
    *,
    entry: Entry = "model",
    size: str | None = None,
    num_heads: int | None = None,
    grid: str | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    init_missing: Sequence[str] = (),
    text_tokenizer: Path | None = None,
    zero_image_head: bool | None = None,
    layout: str | None = None,
    template: str | None = None,
    image_size: int | None = None,
) -> Done:
    """A folder in our format, made of a checkpoint of LlamaGen's or of Chameleon's family.

    The last five options are of language models.

    Raises:
        ArraError: the source is unreadable, of no known kind, does not fit, or does not tell its grid.
    """
    if (source / "model.json").is_file() or (source / WEIGHTS_FILE).is_file():
        raise ArraError(f"{source}: in arra's format already; use it as it is")
    _refuse_used(out)
    read_template(template)
    of_language = {
        "--text-tokenizer": text_tokenizer, "--zero-image-head": zero_image_head, "--layout": layout,
        "--template": template, "--image-size": image_size,
    }  # fmt: skip
    if is_chameleon(source):
        of_decoders = {"--size": size, "--num-heads": num_heads, "--init-missing": init_missing or None}
        _refuse_options(of_decoders, f"{source}: a language model, whose files tell everything")
        options = ChameleonOptions(
            text_tokenizer=text_tokenizer,
            zero_image_head=zero_image_head,
            layout=layout,
            template=template,
            grid=None if grid is None else parse_grid(grid),
            image_size=image_size,
        )
        rows = import_chameleon(source, out, options=options, dtype=_dtype(dtype), entry=entry, ignore=tuple(ignore))
        return Done(out, rows)
    _refuse_options(of_language, f"{source}: neither config.json of a Chameleon nor params.json of Meta's beside it")
    how = Fitting(_dtype(dtype), tuple(ignore), tuple(init_missing))
    weights = read_weights(source, entry=entry)
    known = _known(size, num_heads, grid)
    if kind_of(weights) == "tokenizer":
        if known:
            raise ArraError(f"{source}: a VQ tokenizer, whose shapes tell everything; drop --size, --num-heads, --grid")
        return _import_tokenizer(weights, out, how)
    return _import_decoder(weights, out, known, how)


def read_template(text: str | None) -> None:
    """Nothing.

    Raises:
        ArraError: `--template` has no place for the prompt, or one that nothing fills.
    """
    try:
        check_template("{prompt}" if text is None else text)
    except ValueError as error:
        raise ArraError(f"--template: {error}") from error


def _refuse_options(options: Mapping[str, Any], because: str) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise ArraError(f"{because}; drop {', '.join(given)}")


def _import_decoder(weights: Weights, out: Path, known: dict[str, Any], how: Fitting) -> Done:
    if "grid" not in known and "grid" not in told_settings(weights):
        raise ArraError(
            f"{weights.source}: nothing in it tells the grid of codes, and a wrong one paints noise; pass --grid, as "
            f"{PIXELS}"
        )
    model = open_weights(weights, known=known, how=how)
    settings, origin = model.settings, model.about["origin"]
    hashes = origin["sha256"] = _hashes(weights)
    if settings.condition == "caption" and settings.caption_dim == 2048:  # what LlamaGen's own scripts feed it
        model.about["text_encoder"] = {"name": "flan-t5-xl", "clean": True}
    save_model(model, out)
    size = size_name(settings)
    shape = f"{settings.num_layers} layers of {settings.hidden_size}, {settings.num_heads} heads"
    condition = {
        "class": f"{settings.num_classes} classes",
        "caption": f"{settings.condition_length} caption features of {settings.caption_dim}",
        "text": f"{settings.condition_length} text tokens",
    }[settings.condition]
    rows = [
        ("kind", f"decoder, {f'size {size.upper()} ({shape})' if size else shape}"),
        ("parameters", _count(model)),
        ("condition", condition),
        ("grid", f"{settings.grid[0]} x {settings.grid[1]} codes out of {settings.num_codes}"),
        ("told by", ", ".join(f"{field}: {who}" for field, who in sorted(origin["told"].items()))),
    ]
    return Done(out, [*rows, *_origin_rows(weights, origin, hashes)])


def _import_tokenizer(weights: Weights, out: Path, how: Fitting) -> Done:
    tokenizer = open_vq_weights(weights, known={}, how=how)
    origin, settings = tokenizer.about["origin"], tokenizer.model.settings
    hashes = origin["sha256"] = _hashes(weights)
    tokenizer.about["codes_of"] = tokenizer.codes_of  # stores made with the file itself stay valid
    tokenizer.save(out)
    rows = [
        ("kind", f"VQ tokenizer {tokenizer.name}, {settings.downsampling} pixels per code"),
        ("parameters", _count(tokenizer.model)),
        ("codebook", f"{settings.num_codes} codes of {settings.code_dim} dimensions"),
    ]
    return Done(out, [*rows, *_origin_rows(weights, origin, hashes)])


def _origin_rows(weights: Weights, origin: Mapping[str, Any], hashes: Mapping[str, str]) -> list[tuple[str, str]]:
    also = " (the file holds ema weights too: --entry ema)" if "ema" in weights.left_out else ""
    args = ", ".join(f"{name}={value}" for name, value in sorted(weights.args.items()))
    return [
        ("weights", f"{weights.entry or 'a bare state dict'}{also}"),
        ("left out", ", ".join(weights.left_out)),
        ("steps", "" if weights.steps is None else f"{weights.steps:,}"),
        ("arguments", args),
        ("prefixes", ", ".join(f"{prefix} taken off" for prefix in weights.stripped)),
        ("dropped", f"{origin['dropped']} (no weights)" if origin["dropped"] else ""),
        ("ignored", origin["ignored"]),
        ("initialised", origin["initialised"]),
        *((f"sha256 {name}", value) for name, value in hashes.items()),
    ]


def kind_of(weights: Weights) -> str:
    """Which of our networks these weights belong to: "decoder" or "tokenizer".

    Raises:
        ArraError: neither.
    """
    for kind, keys in SIGNS.items():
        if any(key in weights.state for key in keys[:2]):
            return kind
    if "model.embed_tokens.weight" in weights.state or "embed_tokens.weight" in weights.state:
        raise ArraError(
            f"{weights.source}: a language model, but no config.json of a Chameleon beside it; others become painters "
            "with arra init --llm FOLDER"
        )
    roots = sorted({key.partition(".")[0] for key in weights.state})
    listed = name_keys(roots[:8]) or "nothing"
    expected = "; ".join(f"a {kind} has {', '.join(keys)}" for kind, keys in SIGNS.items())
    raise ArraError(f"{weights.source}: weights of neither kind, keys begin with {listed}; {expected}")


def export_weights(
    folder: Path, out: Path, *, to: str | None = None, dtype: str | None = None, layout: str = "train"
) -> Done:
    """What others' code loads, and how: `transformers` ("hf", the default for a language model), LlamaGen's scripts
    ("llamagen", the default for others), Lumina-mGPT's, of a language model ("lumina") or its tokenizer ("chameleon");
    of painted pictures CheXGenBench's scripts ("chexgenbench").

    Layout "train" is {"model": state dict}, "fsdp" the bare state dict (LlamaGen alone). Without a dtype folders for
    `transformers` and Lumina-mGPT keep the model's own, other files are float32.

    Raises:
        ArraError: the other code could not run the model, or there is none in the folder.
    """
    if not folder.is_dir():
        raise ArraError(f"{folder}: no such folder; expected a run, or a folder of a decoder or a tokenizer")
    if to == "chexgenbench":
        painted = export_set(open_set(folder), out)
        return Done(out, painted.rows, painted.hint)
    if is_language_model(folder):
        if layout != "train":
            raise ArraError(f"--layout {layout}: of LlamaGen's checkpoints, {folder} is a language model; leave it out")
        to = to or "hf"
        rows, model_type = export_language_model(folder, out, to=to, dtype=_dtype(dtype))
        return Done(out, rows, reader_hint(out, to=to, model_type=model_type))
    if to == "hf":
        if layout != "train":
            raise ArraError(f"--layout {layout}: of LlamaGen's checkpoints, --to hf writes a folder; leave it out")
        if (folder / WEIGHTS_FILE).is_file():
            raise ArraError(
                f"{folder}: an image tokenizer, which transformers has no class for; use llamagen or chameleon"
            )
        return Done(out, export_decoder(folder, out, dtype=_dtype(dtype)), decoder_hint(out))
    dtype = dtype or "float32"
    if to == "chameleon":
        return _export_vqgan(folder, out, dtype)
    if to == "lumina":
        raise ArraError(
            f"--to {to}: writes a language model, and {folder} is none of arra's; use hf, llamagen or chameleon"
        )
    if to not in (None, "llamagen"):
        raise ArraError(
            f"--to {to}: unknown; expected hf, for a decoder or a tokenizer llamagen, for a language model lumina, for "
            "Chameleon's tokenizer chameleon"
        )
    if layout not in ("train", "fsdp"):
        raise ArraError(f"--layout {layout}: unknown; expected train or fsdp")
    if out.is_dir() or not out.suffix:
        out = out / ("consolidated.pth" if layout == "fsdp" else "model.pt")
    if out.exists():
        raise ArraError(f"{out}: exists already; name another file or delete it")
    wide = _dtype(dtype)
    assert wide is not None
    state, hint = _original(folder, out, dtype=wide, bare=layout == "fsdp")
    _save(state if layout == "fsdp" else {"model": state}, out)
    rows = [
        ("tensors", f"{len(state)}, {dtype}"),
        ("layout", "a bare state dict" if layout == "fsdp" else '{"model": state dict}'),
        ("sha256", file_hash(out)),
    ]
    return Done(out, rows, f"for LlamaGen: {hint}")


def _export_vqgan(folder: Path, out: Path, dtype: str) -> Done:
    """A tokenizer as Meta's `vqgan.ckpt`, and its yaml beside it."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise ArraError(f"{folder}: no image tokenizer in it; --to chameleon writes Chameleon's vqgan.ckpt")
    out = out / "vqgan.ckpt" if out.is_dir() or not out.suffix else out
    config = out.with_suffix(".yaml")
    for path in (out, config):
        if path.exists():
            raise ArraError(f"{path}: exists already; name another file or delete it")
    wide = _dtype(dtype)
    assert wide is not None
    network = load_tokenizer(folder).model
    state = original_vqgan_state(network, wide, source=str(folder))
    _save({"state_dict": state}, out)
    atomic_write(config, original_vqgan_yaml(network.settings))
    rows = [("tensors", f"{len(state)}, {dtype}"), ("configuration", str(config)), ("sha256", file_hash(out))]
    return Done(out, rows, f"for Lumina-mGPT: its ckpts/chameleon/tokenizer/ takes {out.name} and {config.name}")


def _original(folder: Path, out: Path, *, dtype: torch.dtype, bare: bool) -> tuple[dict[str, Tensor], str]:
    if (folder / WEIGHTS_FILE).is_file():
        network = load_tokenizer(folder).model
        state = original_vq_state(network, dtype, source=str(folder))
        return state, vq_launch_hint(network.settings, file=str(out))
    model = load_decoder(folder, dtype=None)
    state = original_state(model, dtype, source=str(folder))
    return state, launch_hint(model.settings, file=str(out), bare=bare)


def _save(content: dict[str, Any], out: Path) -> None:
    with atomic_file(out) as temporary:
        try:
            with temporary.open("wb") as file:  # by handle: the archive inside is not named after the temporary file
                torch.save(content, file)
        except RuntimeError as error:  # how torch tells a full disk
            raise ArraError(f"{out}: cannot be written ({error}); free space and try again") from error


def _refuse_used(out: Path) -> None:
    if out.is_file():
        raise ArraError(f"{out}: is a file, expected a folder to write; name another")
    if out.is_dir() and any(out.iterdir()):
        raise ArraError(f"{out}: not empty; name a new folder")


def _known(size: str | None, num_heads: int | None, grid: str | None) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if size is not None:
        if size.lower() not in SIZES:
            raise ArraError(f"--size {size}: unknown; expected one of {', '.join(SIZES)}")
        known |= SIZES[size.lower()]
    if num_heads is not None:
        known["num_heads"] = num_heads
    if grid is not None:
        known["grid"] = parse_grid(grid)
    return known


def parse_grid(text: str) -> tuple[int, int]:
    """Height and width of "24x24".

    Raises:
        ArraError: it is no such thing.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and 0 < int(height) <= 4096 and 0 < int(width) <= 4096):
        raise ArraError(f"--grid {text}: expected rows x columns of codes, as {PIXELS}")
    return int(height), int(width)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ArraError(f"--dtype {name}: unknown; expected one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def _count(model: nn.Module) -> str:
    parameters = list(model.parameters())
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return f"{sum(parameter.numel() for parameter in parameters):,} ({', '.join(kinds)})"


def _hashes(weights: Weights) -> dict[str, str]:
    return {path.name: file_hash(path) for path in weights.files}
