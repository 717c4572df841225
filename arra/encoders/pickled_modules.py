"""Tensors out of files that hold a whole network and not its weights alone, none of their code run.

    torch.save(model), zipped or as before torch 1.6; torch.jit.save(model) --pickle that makes nothing--> state dict

torchxrayvision publishes the first, OpenAI's CLIP is the last. `torch.load` would make the classes that the file names,
`torch.jit.load` would compile and keep its code, and `weights_only=True` refuses both. Here every class that a caller
expects becomes an empty object, tensors become tensors, and any other name ends the reading.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.weights import DAMAGE

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}
SCRIPTED = "__torch__."
"""Classes of an archive's own code have names under this one."""
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
MOST_MODULES, LONGEST_NAME = 100_000, 1000
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""How a file of `torch.save` before 1.6 begins."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of `torch.jit.save`."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def torchscript_state(path: Path) -> dict[str, Tensor]:
    """The state dict of the network in an archive of `torch.jit.save`.

    Raises:
        ArraError: damaged, or holding anything but modules of tensors and plain values.
    """
    state = module_state(path, classes=(SCRIPTED,))
    if state is None:
        raise ArraError(f"{path}: no network in it; expected an archive of torch.jit.save")
    return state


def module_state(path: Path, *, classes: Collection[str]) -> dict[str, Tensor] | None:
    """The state dict of the network that a file holds; None where it holds something else, such as a state dict.

    `classes` are the full names of its modules' classes; one that ends in a dot allows all below it.

    Raises:
        ArraError: damaged, or naming anything else.
    """
    try:
        content = _zipped(path, classes) if zipfile.is_zipfile(path) else _legacy(path, classes)
        return _gathered(content) if isinstance(content, _Module) else None
    except _Refused as error:
        raise ArraError(
            f"{path}: refused: {error}, which is no part of such a network, and opening it could run code; get it from "
            "its publisher"
        ) from error
    except (*DAMAGE, pickle.UnpicklingError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ArraError(f"{path}: not a readable file of a network ({reason}); fetch it again") from error


class _Refused(Exception):
    """A name that no such network has."""


class _Module:
    """What stands for a module of any class: its attributes alone."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}


class _Names(dict[str, Any]):
    """What stands for an OrderedDict."""

    def __setstate__(self, state: Any) -> None:
        pass


class _TensorsAlone(pickle.Unpickler):
    """Makes tensors, plain values and empty modules."""

    def __init__(
        self, file: io.BufferedReader | io.BytesIO, classes: Collection[str], storage: Callable[[Sequence[Any]], Tensor]
    ) -> None:
        super().__init__(file)
        self.classes, self.storage = classes, storage

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of the pickle."""
        full = f"{module}.{name}"
        if any(full == each or (each.endswith(".") and full.startswith(each)) for each in self.classes):
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name in LISTS:
            return _first
        known = STAND_INS.get(full)
        if known is None:
            raise _Refused(f"it names {full}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """The flat tensor of a storage, or the class beside whose source it was saved."""
        return pid[1] if pid[0] == "module" else self.storage(pid)


def _first(value: Any, *_: Any) -> Any:
    return value


def _nothing(*_: Any) -> None:
    return None


def _rebuilt(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    if torch.Size(size).numel() > storage.numel():
        raise ValueError("a tensor is larger than its storage")
    return torch.as_strided(storage, size, stride, offset)


STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Names,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_parameter": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.nn.backends.thnn._get_thnn_function_backend": _nothing,  # in modules of torch before 1.3
}


def _zipped(path: Path, classes: Collection[str]) -> Any:
    with zipfile.ZipFile(path) as archive:

        def part(name: str) -> bytes:
            if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its {name} is compressed, which torch never does")
            return archive.read(name)

        (pickled,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        read: dict[str, Tensor] = {}

        def storage(pid: Sequence[Any]) -> Tensor:
            _, dtype, key, _, count, *_ = pid
            if key not in read:
                content = bytearray(part(f"{pickled.removesuffix('.pkl')}/{key}"))
                read[key] = (torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype))[:count]
            return read[key]

        return _TensorsAlone(io.BytesIO(part(pickled)), classes, storage).load()


def _legacy(path: Path, classes: Collection[str]) -> Any:
    """Pickles one after the other: what it is, the network, the keys of its storages; then their bytes."""
    made: dict[str, Tensor] = {}
    size = path.stat().st_size

    def storage(pid: Sequence[Any]) -> Tensor:
        _, dtype, key, _, count, view = pid
        if key not in made:
            if not 0 <= count * dtype.itemsize <= size:
                raise ValueError("a tensor is larger than the file")
            made[key] = torch.empty(count, dtype=dtype)
        if view is None:
            return made[key]
        _, offset, length = view
        return made[key][offset : offset + length]

    with path.open("rb") as file:

        def following() -> Any:
            return _TensorsAlone(file, classes, storage).load()

        if following() != MAGIC or following() != PROTOCOL:
            raise ValueError("no file of torch.save")
        following()  # byte order and sizes of the machine that wrote it
        content, keys = following(), following()
        for key in keys:
            flat = made[key]
            (count,) = struct.unpack("<q", file.read(8))
            data = bytearray(file.read(flat.numel() * flat.element_size()))
            if count != flat.numel() or len(data) != flat.numel() * flat.element_size():
                raise ValueError("it ends too early")
            if data:
                flat.copy_(torch.frombuffer(data, dtype=flat.dtype))
    return content


def _gathered(network: _Module) -> dict[str, Tensor]:
    """The tensors of a module and of those below it, under their names in a state dict."""
    state: dict[str, Tensor] = {}
    waiting, visits = [("", network)], 0
    while waiting:
        prefix, module = waiting.pop()
        visits += 1
        if visits > MOST_MODULES or len(prefix) > LONGEST_NAME:
            raise ValueError("it holds itself, or the same modules again and again")  # and would never end
        inside = getattr(module, "attributes", {})
        # a scripted module keeps its parts as attributes, another in three dictionaries
        kinds = [inside.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
        for kind in kinds if any(isinstance(each, Mapping) for each in kinds) else [inside]:
            for name, value in kind.items() if isinstance(kind, Mapping) else ():
                if isinstance(value, Tensor):
                    state[f"{prefix}{name}"] = value
                elif isinstance(value, _Module):
                    waiting.append((f"{prefix}{name}.", value))
    return state
