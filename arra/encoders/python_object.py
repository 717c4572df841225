"""A network of one's own as an encoder: `python:MODULE:NAME` in a recipe, `CallableEncoder(function)` in Python.

What NAME may be, in a module that Python finds from the working folder or among the installed ones:

    an encoder      an object with `spec`, `weights_hash` and `encode` (`arra.encoders.Encoder`): taken as it is
    a class         made first: NAME(), or NAME(PATH) where the recipe names weights; what comes out is another of these
    a callable      a function, or a torch module: float32 pictures (B, 3, S, S) in [-1, 1] to (B, F), one vector each,
                    or to (B, P, F), the patches of a square grid in raster order; no class token among them

S is the recipe's `image_size`, else the callable's attribute `image_size`, else 224; F and P are found by showing it a
grey picture. A vector per picture is output `mean`, patches are `patches` and `mean`. Pictures that are no square are
cut to their middle square. It is called without gradients; a torch module is frozen and put into evaluation.

Its identity is the hash of the source file that defines it (and of MODULE's), of the structure and tensors of a torch
module, and of the weights. What it imports from elsewhere or has captured is not seen: give it a new name when that
changes.

Modules of Python's own library are refused: a recipe is often somebody else's file, and it should not call them.

Legend: B batch, H W pixels, S pixels it sees, P patches, F feature.
"""

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arra.encoders.base import Encoder, EncoderSpec, EncoderStates, VisionEncoder
from arra.encoders.files import located, weights_hash
from arra.encoders.settings import Output
from arra.errors import ArraError
from arra.runs import file_hash

PREFIX = "python:"
IMAGE_SIZE = 224


class CallableEncoder(VisionEncoder):
    """A function or torch module of the user, shown square pictures in [-1, 1]."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        name: str | None = None,
        image_size: int | None = None,
        device: str | torch.device = "cpu",
        identity: str | None = None,
    ) -> None:
        """An encoder around `function`; `identity` is told where its source cannot be read.

        Raises:
            ArraError: what it gives is neither (B, F) nor (B, P, F) with P a square number, or it has no identity.
        """
        name = name or f"{PREFIX}{getattr(function, '__name__', type(function).__name__)}"
        side: int = image_size if image_size is not None else getattr(function, "image_size", IMAGE_SIZE)
        spec = EncoderSpec(
            name=name,
            feature_size=1,
            image_size=side,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            weights_sha256="",
            family=f"{name}, the user's own",
            licence="the user's own",
            source="code of the user",
            fit="crop",
        )
        network = _Called(function).to(device)
        super().__init__(spec, network, weights_hash=identity or _identity(function, name))
        with torch.no_grad():
            states = self.states_of(torch.zeros(1, 3, side, side, device=device), ())[-1]
        patches = states.mean is None
        self.spec = replace(
            spec,
            feature_size=states.patches.shape[2],
            weights_sha256=self.weights_hash,
            output="patches" if patches else "mean",
            outputs=("patches", "mean") if patches else ("mean",),
        )

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """See `VisionEncoder.states_of`; there are no layers.

        Raises:
            ArraError: the callable gave something else than vectors or patches, or not one for every picture.
        """
        said = self.network(pixels)
        shape = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        if not isinstance(said, Tensor) or said.ndim not in (2, 3) or said.shape[0] != pixels.shape[0]:
            raise ArraError(
                f"encoder {self.spec.name}: of {pixels.shape[0]} pictures it gave {shape}; expected a tensor "
                f"({pixels.shape[0]}, F) or ({pixels.shape[0]}, P, F)"
            )
        if not said.is_floating_point():
            raise ArraError(f"encoder {self.spec.name}: it gave {said.dtype}; expected floating numbers")
        if said.ndim == 2:
            return [EncoderStates(said[:, None], (1, 1), mean=said)]
        side = math.isqrt(said.shape[1])
        if side * side != said.shape[1]:
            raise ArraError(
                f"encoder {self.spec.name}: its {said.shape[1]} patches fill no square; leave class and register "
                "tokens out"
            )
        return [EncoderStates(said, (side, side))]


class _Called(nn.Module):
    """A callable as a module; one that is a module already is a part of it, and moves with it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, pixels: Tensor) -> Any:
        """What the callable says."""
        return self.function(pixels)


class AdoptedEncoder(VisionEncoder):
    """An encoder of the user, which does everything itself."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        super().__init__(encoder.spec, nn.Identity(), weights_hash=encoder.weights_hash)

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """Nothing to be had: this encoder is asked by `encode` alone."""
        raise ArraError(f"encoder {self.spec.name}: is an object of its own, asked by encode() alone")

    def encode(
        self,
        images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"],
        *,
        aggregate: Output | None = None,
        layers: Sequence[int] | None = None,
        grid: int | None = None,
    ) -> Float[Tensor, "B F"] | Float[Tensor, "B P F"]:
        """See `Encoder.encode`."""
        return self.encoder.encode(images, aggregate=aggregate, layers=layers, grid=grid)


def load_python(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> VisionEncoder:
    """The encoder of `python:MODULE:NAME`; see the module's docstring for what NAME may be.

    Errors that the user's own code raises keep their traceback.

    Raises:
        ArraError: no such module or name, nothing that can be asked, weights for something that takes none, or a size
            for an encoder that has its own.
    """
    module_name, _, attribute = name.removeprefix(PREFIX).partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise ArraError(f"encoder {name}: expected python:MODULE:NAME, as python:my_encoders:colours")
    module = _imported(name, module_name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
            raise ArraError(
                f"encoder {name}: {module_name} has no '{attribute}'; it has {', '.join(there[:8]) or 'no callable'}"
            )
        found = getattr(found, part)
        _refuse_pythons(name, found)
    path = None if weights is None else located(weights, name=name)
    identity = _identity(found, name, module)
    if inspect.isclass(found):
        maker: Callable[..., Any] = found
        found = maker() if path is None else maker(path)
    elif path is not None:
        raise ArraError(f"encoder {name}: weights are handed to a class; {attribute} is none, leave weights out")
    if isinstance(found, VisionEncoder | Encoder):
        if image_size not in (None, found.spec.image_size):
            raise ArraError(
                f"encoder {name}: sees {found.spec.image_size} pixels a side, as its own spec says, not {image_size}"
            )
        return found if isinstance(found, VisionEncoder) else AdoptedEncoder(found)
    if not callable(found):
        raise ArraError(
            f"encoder {name}: a {type(found).__name__} is neither an encoder nor a callable of pictures; expected "
            "(B, 3, S, S) -> (B, F) or (B, P, F)"
        )
    parts = [identity, *_tensors_identity(found), *([weights_hash(path)] if path is not None else [])]
    return CallableEncoder(found, name=name, image_size=image_size, device=device, identity=_joined(parts))


def _imported(name: str, module_name: str) -> Any:
    """A module as Python finds it, the working folder first."""
    if _is_pythons(module_name):
        raise ArraError(
            f"encoder {name}: {module_name} is a module of Python itself; name one of your own, in the working folder"
        )
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a package that the module itself wants is another matter than the module
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise ArraError(
            f"encoder {name}: no module '{module_name}' in {folder} or among the installed ones; run where the file "
            f"{module_name.replace('.', '/')}.py is, or install it"
        ) from None


def _refuse_pythons(name: str, found: Any) -> None:
    """Nothing.

    Raises:
        ArraError: a part of Python's own library, which any module hands on that imports it.
    """
    if inspect.ismodule(found):
        home: Any = found.__name__
    else:
        home = getattr(found, "__module__", None) if inspect.isclass(found) or inspect.isroutine(found) else None
    if isinstance(home, str) and _is_pythons(home):
        raise ArraError(f"encoder {name}: names a part of Python itself ({home}); name an encoder of your own")


def _is_pythons(module_name: str) -> bool:
    """Whether a module is of Python's own library."""
    return module_name.split(".")[0] in sys.stdlib_module_names


def _identity(found: Any, name: str, module: Any = None) -> str:
    """Hash of the source that defines an object, of its module's, and of its tensors."""
    kind = found if inspect.isclass(found) or inspect.isroutine(found) else type(found)
    files = set()
    for each in (kind, module):
        if _is_pythons(getattr(each, "__module__", None) or ""):  # functools.partial says nothing of what it calls
            continue
        try:
            file = None if each is None else inspect.getsourcefile(each)
        except TypeError:  # of a compiled part there is none
            file = None
        if file is not None and Path(file).is_file():
            files.add(file)
    if not files:
        raise ArraError(
            f"encoder {name}: the file that defines it cannot be read, so nothing tells when it changes; write it into "
            "a file, or pass identity= to CallableEncoder"
        )
    # by content alone: the same files elsewhere are the same encoder
    return _joined([getattr(kind, "__qualname__", ""), *sorted(map(file_hash, files)), *_tensors_identity(found)])


def _tensors_identity(found: Any) -> list[str]:
    """Hash of a torch module's structure and tensors, nothing for another object."""
    if not isinstance(found, nn.Module):
        return []
    told = hashlib.sha256(repr(found).encode())
    for key, value in sorted(found.state_dict().items()):
        told.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        told.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return [told.hexdigest()]


def _joined(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
