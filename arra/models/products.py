"""Matrix products of the decoder on a CPU, by the faster of the two libraries that torch carries.

torch multiplies float32 matrices with MKL. oneDNN, which it uses for convolutions, was 5 to 15 % faster at a decoder's
training shapes and three times at the few rows of decoding, most of it with weights in its own packed layout
(`benchmarks/decoder.py`). From two rows on its result for a row is the same bits at any number of rows and packed or
not; MKL's is not below four rows, and changes with threads. On other devices and for other types torch does as always.
Letters: N rows, I input width, O output width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
PACKED_ROWS = 16
"""Rows that weights are packed for; the layout was as good for 4 to 64."""
MIN_ROWS = 4
"""Fewer rows are padded to these: both libraries round otherwise below, and neither is faster."""


def product(a: Float[Tensor, "N I"], b: Float[Tensor, "I O"]) -> Float[Tensor, "N O"]:
    """The matrix product."""
    if _uses_onednn(a) and b.dtype == torch.float32 and a.numel() and b.numel():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return found
    return a @ b


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is its matrix product and nothing else: no bias, no wrapper (LoRA), no listener."""
    return type(layer) is nn.Linear and layer.bias is None and not layer._forward_hooks and not layer._forward_pre_hooks


def inferred(x: Float[Tensor, "*any I"], layer: nn.Linear) -> Float[Tensor, "*any O"]:
    """`layer(x)` where no gradients are wanted, from the packed weights where there are any.

    On a CPU a row's result is the same bits whatever rows stand beside it.
    """
    rows = x.flatten(0, -2)
    count = len(rows)
    if x.device.type == "cpu" and 0 < count < MIN_ROWS:
        rows = F.pad(rows, (0, 0, 0, MIN_ROWS - count))
    if is_plain(layer) and _uses_onednn(rows) and layer.weight.dtype == torch.float32 and count:
        packed = layer.__dict__.get(_PACKED)
        weight = layer.weight if packed is None else packed
        found = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    else:
        found = layer(rows)
    return found[:count].unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """A block in which the model's matrices also lie in oneDNN's layout, where that pays and memory allows.

    The copy takes as much memory as the weights. It must not be trained in the block.
    """
    layers = [layer for layer in model.modules() if is_plain(layer) and _PACKED not in layer.__dict__]
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    wanted = sum(weight.numel() * 4 for weight in weights)
    usable = [weight for weight in weights if _uses_onednn(weight) and weight.numel()]
    if len(usable) < len(weights) or wanted > _free_bytes() / 2:
        yield
        return
    try:
        for layer, weight in zip(layers, weights, strict=True):
            layer.__dict__[_PACKED] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop(_PACKED, None)


_PACKED = "_arra_packed"
"""Key in a layer's own dict: no buffer, so that state dicts and moves do not see it."""


def _uses_onednn(x: Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _free_bytes() -> float:
    """Memory that can be had; no bound where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")
