"""The encoder half of a FLAN-T5 folder in Hugging Face layout, read without running anything that lies in it.

    config.json  model.safetensors (or shards and their index, or pytorch_model.bin) --> the network's own tensors

Of `config.json` the numbers of the architecture are taken and nothing else; weights come from safetensors, or from
PyTorch files through `weights_only`. The decoder's half is never read from the disk.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arra.errors import ArraError

SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
OPTIONAL = {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu"}
"""Those that old files may lack, with the values that T5 had then."""
FEED_FORWARDS = ("gated-gelu", "relu")
MOST = 2**20
"""A size above this is no T5's: it is refused before anything of that size is made."""
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""Two names of one matrix; files hold either or both."""
HASHED_VALUES = 1024


def read_architecture(folder: Path) -> dict[str, Any]:
    """The numbers that make the network, from `config.json`.

    Raises:
        ArraError: no such folder, or no T5 in it.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        found = "no config.json in it" if folder.is_dir() else "no such folder"
        raise ArraError(f"{folder}: {found}; expected FLAN-T5 as Hugging Face lays it out") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArraError(f"{path}: unreadable ({_line(error)}); fetch the folder again") from None
    if not isinstance(config, dict) or config.get("model_type") != "t5":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise ArraError(f"{path}: model_type is {kind!r}, expected 't5'; name a folder of FLAN-T5")
    taken: dict[str, Any] = {name: config.get(name, OPTIONAL.get(name)) for name in (*SIZES, *OPTIONAL)}
    for name in (*SIZES, "relative_attention_max_distance"):
        if type(taken[name]) is not int or not 0 < taken[name] < MOST:
            raise ArraError(f"{path}: {name} is {taken[name]!r}, expected an integer from 1 on; fetch the file again")
    epsilon = taken["layer_norm_epsilon"]
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise ArraError(f"{path}: layer_norm_epsilon is {epsilon!r}, expected a small number; fetch the file again")
    if taken["feed_forward_proj"] not in FEED_FORWARDS:
        raise ArraError(
            f"{path}: feed_forward_proj is {taken['feed_forward_proj']!r}, expected {' or '.join(FEED_FORWARDS)}"
        )
    return taken


@contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, Any]]:
    """A block in which the encoder's tensors can be read: by name something that `read_tensor` takes.

    Raises:
        ArraError: no weights, files that are missing or unreadable, or a pickle that holds more than tensors.
    """
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in _weight_files(folder):
            if path.suffix == ".safetensors":
                try:
                    file = stack.enter_context(safe_open(path, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ArraError(f"{path}: no whole safetensors file ({_line(error)}); fetch it again") from None
                found |= {name: (file, name) for name in file.keys() if _is_wanted(name)}  # noqa: SIM118  no dict
            else:
                found |= {name: (value, None) for name, value in _read_pickle(path).items() if _is_wanted(name)}
        yield found


def read_tensor(place: tuple[Any, str | None]) -> Tensor:
    """A tensor of `open_weights`, mapped and not yet read where the file allows it."""
    file, name = place
    tensor: Tensor = file if name is None else file.get_tensor(name)
    return tensor


def load_weights(network: torch.nn.Module, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Nothing; the network, made on `meta`, has the folder's weights.

    Raises:
        ArraError: a tensor is missing, too much, or of another shape than the folder's configuration says.
    """
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    with open_weights(folder) as found:
        for one, other in (EMBEDDINGS, EMBEDDINGS[::-1]):
            if one not in found and other in found:
                found[one] = found[other]
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        for names, what in ((missing, "is missing"), (extra, "does not belong to this configuration")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ArraError(f"{folder}: weight {names[0]} {what}{more}; fetch the folder again")
        state = {}
        for name, shape in wanted.items():
            tensor = read_tensor(found[name])
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ArraError(
                    f"{folder}: weight {name} is {tensor.dtype} {list(tensor.shape)}, expected floats {list(shape)} as "
                    "config.json says; fetch the folder again"
                )
            state[name] = tensor.to(device, dtype, copy=True)  # not the file's own pages, which may change
        state[EMBEDDINGS[1]] = state[EMBEDDINGS[0]]
        network.load_state_dict(state, strict=True, assign=True)


def weights_identity(folder: Path) -> str:
    """A hash that tells the folder's encoder from any other, whatever files hold it; it takes no time.

    Over the architecture and, of every tensor, shape and the first and last values: a training changes them all. That
    a file is whole is not its concern.

    Raises:
        ArraError: as `read_architecture` and `open_weights`.
    """
    digest = hashlib.sha256(json.dumps(read_architecture(folder), sort_keys=True).encode())
    with open_weights(folder) as found:
        embedding = next((found[name] for name in EMBEDDINGS if name in found), None)
        rest = {name: place for name, place in found.items() if name not in EMBEDDINGS}
        for name, place in sorted(rest.items()) + ([] if embedding is None else [(EMBEDDINGS[0], embedding)]):
            tensor = read_tensor(place)
            flat = tensor.flatten()
            ends = torch.cat([flat[:HASHED_VALUES], flat[-HASHED_VALUES:]]).float()
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(ends.numpy().tobytes())
    return digest.hexdigest()


def _is_wanted(name: str) -> bool:
    return name == EMBEDDINGS[0] or name.startswith("encoder.")


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return [_beside(index, name) for name in _indexed(index)]
        if (folder / whole).is_file():
            return [folder / whole]
    raise ArraError(f"{folder}: no model.safetensors and no model.safetensors.index.json in it; fetch the weights")


def _indexed(index: Path) -> list[str]:
    """The files that hold tensors of the encoder."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(file) for name, file in places.items() if _is_wanted(name)})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArraError(f"{index}: no index of weights ({_line(error)}); fetch it again") from None


def _beside(index: Path, name: str) -> Path:
    path = index.parent / name
    if Path(name).name != name or path.suffix not in (".safetensors", ".bin") or "\0" in name or not path.is_file():
        raise ArraError(f"{index}: names {name[:100]!r}, which is no weight file beside it; fetch the folder again")
    return path


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ArraError(
            f"{path}: not read, as it is damaged, of an old format, or holds more than tensors ({_line(error)[:120]}); "
            "fetch the safetensors files instead"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(each, Tensor) for each in content.values()):
        raise ArraError(f"{path}: expected names with tensors, found {type(content).__name__}; fetch the folder again")
    return content


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
