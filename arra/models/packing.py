"""Matrices of layers that the code of others calls, computed from oneDNN's layout while pictures are painted.

`products.py` does it where our own decoder multiplies; here the layers of a `transformers` network are given another
`forward` for as long. They stay in their places, so that who listens to them hears them and state dicts are the same.
Letters: I input width, O output width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arra.models.products import free_bytes, pack, packed_product, uses_onednn


@contextmanager
def packed_calls(layers: Iterable[nn.Module]) -> Iterator[bool]:
    """A block in which calls of the layers that are plain products are computed by oneDNN, from packed weights.

    It says whether there are such copies: not where they would take more than half of the memory that is free; then the
    weights are taken as they lie, for the same bits. Other layers are left alone (quantised, sharded, wrapped, listened
    to, of other types, not on a CPU), and with gradients or under autocast all compute as ever. Weights must not change
    in the block.
    """
    found = {layer: matrix for layer in layers if (matrix := _matrix(layer)) is not None}
    fits = 4 * sum(matrix.numel() for matrix in found.values()) < free_bytes() / 2
    try:
        for layer, matrix in found.items():
            layer.__dict__["forward"] = partial(_call, layer, pack(matrix) if fits else matrix)
        yield bool(found) and fits
    finally:
        for layer in found:
            layer.__dict__.pop("forward", None)


def _matrix(layer: nn.Module) -> Float[Tensor, "O I"] | None:
    """The weight, if calling the layer is a product with it and at most a sum with a bias."""
    kind = type(layer)
    turned = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"  # GPT-2's linear layer
    if not (kind is nn.Linear or turned) or "forward" in layer.__dict__:
        return None
    weight = layer.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or not uses_onednn(weight) or not weight.numel():
        return None
    bias = layer.bias
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != torch.float32):
        return None
    return weight.detach().T if turned else weight.detach()


def _call(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """`layer(x)` from its packed weight where no gradients are wanted."""
    if (
        torch.is_grad_enabled()
        or not uses_onednn(x)
        or x.dim() < 2
        or not x.numel()
        or torch.is_autocast_enabled("cpu")
    ):
        found: Tensor = type(layer).forward(layer, x)
        return found
    return packed_product(x, weight, layer.bias)  # type: ignore[arg-type]
