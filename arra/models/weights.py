"""Weights read out of files that others made: nothing in a file can run, nothing in it is dropped in silence.

`read_weights` opens a file or folder, and `fitting.fit` puts what it holds into a network; the loaders of decoders and
tokenizers, `arra import` and the hub all come through here.
Source: FoundationVision/LlamaGen, autoregressive/train and tokenizer/tokenizer_image (layouts of the files).
"""

import argparse
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.fitting import name_keys

Entry = Literal["model", "ema"]

# where trainers (DDP, DeepSpeed, Lightning) put the state dict; FSDP's consolidated file is one itself
ENTRIES: dict[str, tuple[str, ...]] = {"model": ("model", "module", "state_dict"), "ema": ("ema",)}
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, recomputation
OUTER_WRAPPERS = ("module.", "model.")  # DDP, Lightning: only where every key begins with it
# what a folder may hold, in the order of looking: FSDP, then the layouts of huggingface_hub's mixin
FOLDER_FILES = (
    "consolidated.pth",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# what torch.load raises on damaged files, found by flipping bytes
DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, AssertionError,
    MemoryError, OverflowError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A state dict and what its file says about it."""

    state: dict[str, Tensor]
    source: Path
    """The file or folder that was asked for."""
    files: tuple[Path, ...] = ()
    """The files read."""
    entry: str = ""
    """Name of the state dict in the file; empty where the file is one itself."""
    left_out: tuple[str, ...] = ()
    """Other names at the top of the file."""
    stripped: tuple[str, ...] = ()
    """Prefixes of wrappers taken off the keys."""
    steps: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the training script: numbers and words, no paths."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json beside the weights."""

    def facts(self) -> dict[str, Any]:
        """What is worth keeping of where the weights came from: names, entry, steps, arguments."""
        return {
            "source": self.source.name,
            "files": [path.name for path in self.files],
            "entry": self.entry,
            "left_out": list(self.left_out),
            "stripped": list(self.stripped),
            "steps": self.steps,
            "args": self.args,
        }


def read_weights(path: str | Path, *, entry: Entry = "model") -> Weights:
    """The weights in a checkpoint file or folder, mapped from the disk where the file allows it.

    A folder holds FSDP's consolidated.pth, one file or shards as huggingface_hub's mixin writes them, or one
    checkpoint. Only tensors and plain data are unpickled (and the training script's argparse.Namespace).
    Raises: ArraError when something is missing, broken, unsafe, or does not hold the entry.
    """
    source = Path(path)
    main = _file_in(source) if source.is_dir() else source
    if not main.is_file():
        raise ArraError(f"{source}: no such checkpoint file; pass a .pt, .pth or .safetensors file, or its folder")
    files = shard_files(main) if main.name.endswith(".index.json") else (main,)
    content: dict[Any, Any] = {}
    for file in files:
        part = _read_file(file)
        if not isinstance(part, Mapping):
            raise ArraError(f"{file}: holds a {type(part).__name__}, expected a state dict or a training checkpoint")
        content.update(part)
    name, state, left_out = _split(content, main, entry)
    state, stripped = _without_wrappers(_only_tensors(state, main), main)
    return Weights(
        state=state,
        source=source,
        files=files,
        entry=name,
        left_out=left_out,
        stripped=stripped,
        steps=_steps(content, main),
        args=_plain(vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}),
        config=_config(main.parent) if source.is_dir() else {},
    )


def read_checkpoint(path: str | Path, *, entry: Entry = "model") -> dict[str, Tensor]:
    """The state dict that `read_weights` finds."""
    return read_weights(path, entry=entry).state


def _file_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in CHECKPOINT_SUFFIXES and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise ArraError(f"{folder}: several checkpoints: {', '.join(path.name for path in found)}; name one of them")
    raise ArraError(f"{folder}: no checkpoint in it; expected one of {', '.join(FOLDER_FILES)} or a .pt file")


def shard_files(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names, all beside it.

    Raises: ArraError when it cannot be read, names others, or some are missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name and name not in ("", "..") for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArraError(f"{index}: not a readable index of shards ({_first_line(error)}); fetch it again") from error
    if not plain or not names:
        raise ArraError(f"{index}: expected the names of files beside it; fetch it again from its publisher")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise ArraError(f"{index.parent}: shards missing: {', '.join(absent)}; fetch them too")
    return tuple(index.parent / name for name in names)


def _read_file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ArraError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if head.startswith(b"version https://git-lfs"):
        raise ArraError(f"{path}: a Git LFS pointer, not the weights; run: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ArraError(f"{path}: a web page, not weights; download the file itself")
    if path.suffix == ".safetensors" or head[8:9] == b"{":  # after the length of the header
        return _read_safetensors(path)
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ArraError(f"{path}: not a readable safetensors file ({_first_line(error)}); fetch it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("parts of it are compressed, which torch.save never does")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about the pickle protocol; the refusal that follows says it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|function|class|type) ([\w.]+\.[\w.]+)", str(error))
        raise ArraError(
            f"{path}: refused: not a checkpoint of plain tensors{f' ({named[1]} in it)' if named else ''}, and opening "
            "it could run code; get the weights as safetensors or from their publisher"
        ) from error
    except DAMAGE as error:
        reason = "no archive of torch.save" if isinstance(error, KeyError) else _first_line(error)
        raise ArraError(f"{path}: not a readable checkpoint ({reason}); fetch it again") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _split(content: Mapping[Any, Any], path: Path, entry: str) -> tuple[str, Mapping[Any, Any], tuple[str, ...]]:
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    for name in ENTRIES[entry]:
        if name in nested:
            return name, nested[name], tuple(str(key) for key in content if key != name)
    if entry == "model" and content and all(isinstance(value, Tensor) for value in content.values()):
        return "", content, ()
    other = [name for name, keys in ENTRIES.items() if name != entry and any(key in nested for key in keys)]
    advice = f"; pass --entry {other[0]} (entry='{other[0]}')" if other else "; pass a file of weights"
    raise ArraError(f"{path}: no {entry!r} weights inside; it holds {_listed(content)}{advice}")


def _listed(content: Mapping[Any, Any]) -> str:
    names = [str(key) for key in content]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _only_tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    odd = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise ArraError(f"{path}: entries that are no tensors: {name_keys(odd)}; expected a state dict")
    # a pickle can claim any shape over a few bytes, or place a tensor nowhere
    hollow = [key for key, value in state.items() if not _is_whole(value)]
    if hollow:
        raise ArraError(f"{path}: tensors without their data: {name_keys(hollow)}; fetch the file again")
    return dict(state)


def _is_whole(value: Tensor) -> bool:
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _without_wrappers(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    stripped = [wrapper for wrapper in WRAPPERS if any(wrapper in key for key in state)]
    names = {key: re.sub("|".join(map(re.escape, WRAPPERS)), "", key) for key in state}
    while outer := [wrapper for wrapper in OUTER_WRAPPERS if all(key.startswith(wrapper) for key in names.values())]:
        if not names:
            break
        stripped += outer
        names = {key: name.removeprefix(outer[0]) for key, name in names.items()}
    plain = {name: state[key] for key, name in names.items()}
    if len(plain) < len(state):
        raise ArraError(f"{path}: the same keys with and without {' and '.join(stripped)}; take one of them out")
    return plain, tuple(stripped)


def _steps(content: Mapping[Any, Any], path: Path) -> int | None:
    told = content.get("steps")
    if isinstance(told, int) and not isinstance(told, bool):
        return told
    try:  # FSDP's trainer writes it beside the weights; the others' fallback is the file's name
        text = (path.parent / "resume_step.txt").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        text = ""
    if not text:
        text = path.name.partition(".")[0]
    return int(text) if text.isdecimal() and len(text) < 12 else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What can be kept in a card: scalars, and no string that may be a path of somebody's machine."""
    kinds = (bool, int, float, str)
    return {
        str(key): value
        for key, value in values.items()
        if type(value) in kinds and not (isinstance(value, str) and (len(value) > 80 or re.search(r"[/\\]", value)))
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArraError(f"{path}: not valid JSON ({_first_line(error)}); fetch it again") from error
    if not isinstance(config, dict):
        raise ArraError(f"{path}: holds a {type(config).__name__}, expected an object; fetch it again")
    nested = config.get("config")
    return {**config, **nested} if isinstance(nested, dict) else config
