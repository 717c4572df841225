"""Training steps that keep little and compute fast: what is cheap to make again is made again in the backward pass.

Autograd keeps every intermediate of a norm, a gate, a dropout and a softmax: about 30 tensors of the model's width for
each position of a block. These functions keep 12 of the width: the residual stream before the attention and before the
feed-forward, queries, keys, values and what attention gave, the two branches of the gate, and dropout masks of one
byte. No matrix product is done twice. Results are those of the plain formulas in `blocks.py`, which serve wherever
`usable` says no. The loss on the logits is `head.py`'s.
Letters: B batch, N positions (batch times sequence), S sequence, H heads, E head size, D model width, I inner width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arra.models.dropout import keep_mask, scale
from arra.models.products import inferred, is_plain, product


def usable(x: Tensor, *layers: nn.Module) -> bool:
    """Whether these functions may stand in: float32, gradients wanted, and layers that are plain matrix products."""
    return (
        x.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and all(map(is_plain, layers))
    )


def linear(x: Float[Tensor, "*any I"], layer: nn.Module) -> Float[Tensor, "*any O"]:
    """`layer(x)` for a layer without bias; with gradients where they are wanted."""
    if usable(x, layer):
        return _Linear.apply(x.flatten(0, -2), layer.weight).unflatten(0, x.shape[:-1])
    if torch.is_grad_enabled():
        found: Tensor = layer(x)
        return found
    return inferred(x, layer)


def multiplied(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "N O"]:
    """x w^T of float32 matrices, with gradients."""
    found: Tensor = _Linear.apply(x, weight)
    return found


class _Linear(torch.autograd.Function):
    """x w^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return product(grad, weight), grad.T @ x


def norm_heads(
    x: Float[Tensor, "B S D"],
    norm: Float[Tensor, " D"],
    weight: Float[Tensor, "O D"],
    table: Float[Tensor, "S E2 2"],
    turning: int,
    eps: float,
) -> Float[Tensor, "B S H E"]:
    """linear(norm(x)) as heads, the first `turning` of them turned on interleaved pairs by (cos, sin)."""
    return _NormHeads.apply(x, norm, weight, table, turning, eps)


def norm_swiglu(x: Float[Tensor, "N D"], norm: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, eps: float) -> Tensor:
    """w2(silu(w1 norm(x)) * w3 norm(x))."""
    return _NormSwiGLU.apply(x, norm, w1, w3, w2, eps)


def rms(x: Float[Tensor, "*any D"], eps: float) -> Float[Tensor, "*any 1"]:
    """One over the root mean square, in one pass over x."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(length.new_full((), eps), length, length, value=1 / x.shape[-1]).rsqrt_()


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a norm's input and weight; overwrites `grad`."""
    unit = x * scale
    grad_weight = torch.linalg.vecdot(grad, unit, dim=0)
    grad.mul_(weight)
    along = torch.linalg.vecdot(grad, unit, dim=-1)[:, None].div_(x.shape[-1])
    return grad.sub_(unit.mul_(along)).mul_(scale), grad_weight


class _NormHeads(torch.autograd.Function):
    """Keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, table: Tensor, turning: int, eps: float) -> Tensor:
        flat, head_dim = x.flatten(0, 1), 2 * table.shape[1]
        scale = rms(flat, eps)
        ctx.save_for_backward(flat, norm, weight, scale)
        ctx.table, ctx.turning = table, turning
        heads = product((flat * scale).mul_(norm), weight.T).view(*x.shape[:2], -1, head_dim)
        turn_heads(heads, table, turning)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, weight, scale = ctx.saved_tensors
        shape = grad.shape[:2]
        grad = grad.clone(memory_format=torch.contiguous_format)  # as given it may be somebody else's
        turn_heads(grad, ctx.table, ctx.turning, back=True)
        grad = grad.view(len(x), -1)
        grad_weight = grad.T @ (x * scale).mul_(norm)
        grad_x, grad_norm = _norm_backward(product(grad, weight), x, norm, scale)
        return grad_x.view(*shape, -1), grad_norm, grad_weight, None, None, None


class _NormSwiGLU(torch.autograd.Function):
    """Keeps x and the two branches of the gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, eps: float) -> Tensor:
        scale = rms(x, eps)
        normed = (x * scale).mul_(norm)
        gate, value = product(normed, w1.T), product(normed, w3.T)
        ctx.save_for_backward(x, norm, w1, w3, w2, scale, gate, value)
        return product(F.silu(gate).mul_(value), w2.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, w1, w3, w2, scale, gate, value = ctx.saved_tensors
        opened = F.silu(gate)
        grad_w2 = grad.T @ (opened * value)
        inner = product(grad, w2)
        grad_value = opened.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(value), gate)
        del inner
        normed = (x * scale).mul_(norm)
        grad_w1, grad_w3 = grad_gate.T @ normed, grad_value.T @ normed
        del normed
        grad_normed = product(grad_gate, w1).add_(product(grad_value, w3))
        grad_x, grad_norm = _norm_backward(grad_normed, x, norm, scale)
        return grad_x, grad_norm, grad_w1, grad_w3, grad_w2, None


def turn_heads(
    heads: Float[Tensor, "B S H E"], table: Float[Tensor, "S E2 2"], turning: int, *, back: bool = False
) -> None:
    """Nothing; the first `turning` heads are overwritten, turned forth or back."""
    turns = torch.view_as_complex(table)[:, None]  # (S, 1, E/2)
    torch.view_as_complex(heads[:, :, :turning].unflatten(-1, (-1, 2))).mul_(turns.conj() if back else turns)


def drop_add(
    x: Float[Tensor, "B *any"], y: Float[Tensor, "B *any"], p: float, seeds: Int64[Tensor, " B"], *, site: int
) -> Float[Tensor, "B *any"]:
    """x + dropout(y), with the mask of `dropout.dropped`."""
    return _DropAdd.apply(x, y, keep_mask(seeds, y.shape[1:], site=site, p=p), scale(p)) if p else x + y


class _DropAdd(torch.autograd.Function):
    """Keeps one byte for each element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.addcmul(x, y, kept.to(y.dtype), value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return grad, (grad * kept).mul_(ctx.scale), None, None
