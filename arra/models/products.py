"""Matrix products of the decoder on a CPU, by the faster of the two libraries that torch carries.

torch multiplies float32 matrices with MKL. oneDNN, which it uses for convolutions, was 5 to 15 % faster at a decoder's
training shapes and three times at the few rows of decoding, most of it with weights in its own packed layout
(`benchmarks/decoder.py`, `benchmarks/sample.py`). With torch 2.14, from two rows on, its result for a row is the same
bits at any number of rows and packed or not (with 2.11 up to rounding); MKL's is not below four rows, and changes with
threads. On other devices and for other types torch does as always.
Letters: N rows, I input width, O output width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

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
    if uses_onednn(a) and b.dtype == torch.float32 and a.numel() and b.numel():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return found
    return a @ b


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is its matrix product and nothing else.

    No bias, no wrapper (LoRA), no listener, and weights that lie in memory as they are (torchao's do not).
    """
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not hasattr(layer.weight, "__tensor_flatten__")
        and is_unheard(layer)
    )


def is_unheard(module: nn.Module) -> bool:
    """Whether nobody listens to the module's calls, so that it need not be called for its result."""
    return not module._forward_hooks and not module._forward_pre_hooks


def inferred(x: Float[Tensor, "*any I"], layer: nn.Module) -> Float[Tensor, "*any O"]:
    """`layer(x)` where no gradients are wanted, from the packed weights where there are any.

    On a CPU a row's result is the same bits whatever rows stand beside it.
    """
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    count = len(rows)
    if x.device.type == "cpu" and 0 < count < MIN_ROWS and _ALONE not in layer.__dict__:
        rows = F.pad(rows, (0, 0, 0, MIN_ROWS - count))
    if is_plain(layer) and uses_onednn(rows) and layer.weight.dtype == torch.float32 and count:
        packed = layer.__dict__.get(_PACKED)
        weight = layer.weight if packed is None else packed
        found = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    else:
        found = layer(rows)
    if len(rows) > count:
        found = found[:count]
    return found if x.dim() == 2 else found.unflatten(0, x.shape[:-1])


@contextmanager
def packed_layers(model: nn.Module) -> Iterator[None]:
    """A block in which the matrices also lie in oneDNN's layout, where that pays and memory allows.

    For a model whose linear layers are all called by `inferred`. The copy takes as much memory as the weights. It must
    not be trained in the block.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not _is_packed(layer)]
    weights = [layer.weight for layer in layers]
    sound = all(map(is_plain, layers)) and all(uses_onednn(weight) and weight.numel() for weight in weights)
    if not sound or 4 * sum(weight.numel() for weight in weights) > free_bytes() / 2:
        yield
        return
    asked = [pair for module in model.modules() if (pair := getattr(module, "side_by_side", None)) is not None]
    partner: dict[nn.Module, nn.Linear] = {
        first: second for first, second in asked if is_plain(first) and is_plain(second)
    }
    seconds, together = set(partner.values()), torch.empty(0)
    try:
        for layer in layers:
            if layer in partner:  # one piece of memory for all: pieces that are given back leave holes
                torch.cat([layer.weight.detach(), partner[layer].weight.detach()], out=together)
                layer.__dict__[_PACKED_PAIR] = pack(together)
            elif layer not in seconds:
                layer.__dict__[_PACKED] = pack(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop(_PACKED, None)
            layer.__dict__.pop(_PACKED_PAIR, None)


def _is_packed(layer: nn.Module) -> bool:
    return _PACKED in layer.__dict__ or _PACKED_PAIR in layer.__dict__


def packed_product(
    x: Float[Tensor, "*any I"], weight: Tensor, bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*any O"]:
    """The rows times a packed weight, without gradients; a row's result is the same bits whatever stands beside it."""
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    count = len(rows)
    if count < MIN_ROWS:
        rows = F.pad(rows, (0, 0, 0, MIN_ROWS - count))
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    if count < MIN_ROWS:
        found = found[:count]
    return found if x.dim() == 2 else found.unflatten(0, x.shape[:-1])


def packed_whole(x: Float[Tensor, "R I"], weight: Tensor) -> Float[Tensor, "R O"]:
    """`packed_product` of at least `MIN_ROWS` rows."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return found


def packed_sum(x: Float[Tensor, "R O"], inner: Float[Tensor, "R I"], weight: Tensor) -> Float[Tensor, "R O"]:
    """x plus the product of `inner` and a packed weight, for at least `MIN_ROWS` rows."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inner, x, weight, None, "add")
    return found


def packed_of(layer: nn.Module, *, pair: bool = False) -> Tensor | None:
    """A layer's packed weight, alone or with that of the layer by its side; None where it is not packed so."""
    found: Tensor | None = layer.__dict__.get(_PACKED_PAIR if pair else _PACKED)
    return found


def inferred_pair(x: Float[Tensor, "N I"], first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """What two layers of one width give for the same rows; from weights packed side by side it is one product."""
    packed = first.__dict__.get(_PACKED_PAIR)
    if packed is None or len(x) < MIN_ROWS or not is_plain(first):
        return inferred(x, first), inferred(x, second)
    both: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    left, right = both.split(first.out_features, dim=1)
    return left, right


def pack(weight: Float[Tensor, "O I"]) -> Tensor:
    """The weight in oneDNN's layout, as `packed_product` takes it."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
    return found


def compute_rows_alone(layer: nn.Module) -> None:
    """Nothing; the layer is known to compute each row by itself, so that few rows need no company."""
    layer.__dict__[_ALONE] = True


_PACKED, _PACKED_PAIR, _ALONE = "_arra_packed", "_arra_packed_pair", "_arra_rows_alone"
"""Keys in a layer's own dict: no buffers, so that state dicts and moves do not see them."""


def uses_onednn(x: Tensor) -> bool:
    """Whether its products are oneDNN's: float32 on a CPU, not while a compiler looks on."""
    return _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def free_bytes() -> float:
    """Memory that can be had; no bound where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")
