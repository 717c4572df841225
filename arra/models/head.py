"""The last step of a language model, from states to logits, and the loss on them without all logits at once.

Logits are `softcap * tanh(scale * (h w^T + b) / softcap)`: Cohere and Granite scale, Gemma caps, most do neither. While
training they exist a slice at a time, and their gradients are made while the slice is there: at 4,096 positions of a
vocabulary of 65,536 the plain way holds several gibibytes (`benchmarks/objective.py`). Products run in the type of
states and weights (autocast's where it is on); their results, the loss and the sums of gradients are float32 or wider.
On CUDA Liger's kernel does it where it is installed and all positions count the same (`liger.py`).
Letters: N positions, D model width, V vocabulary, K chosen rows of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from arra.models import lean, liger
from arra.models.products import MIN_ROWS, is_unheard, pack, packed_product, product, uses_onednn

HEAD_BYTES = 2**25
"""Logits that exist at one time: 128 positions of 65,536 tokens. Half as many cost 7 percent of the loss's speed."""
CUDA_HEAD_BYTES = 2**28
"""The same on a GPU, which is done with fewer before its host has launched the kernels of the next slice."""
CALLED_ROWS = 128
"""Positions at a time of a head that is called, whose width is not known before."""
BLOCK_BYTES = 2**25
"""Weights or their gradients that are converted at one time, where products need another type than they have."""


@dataclass(frozen=True)
class Head:
    """A head that is its weights and nothing else."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """Logits in float32. Without gradients a row's are the same bits on a CPU whatever rows stand beside it."""
        rows = hidden.flatten(0, -2)
        return _bent(_raw_logits(rows, self), self).float().unflatten(0, hidden.shape[:-1])

    def rows(self, ids: Int[Tensor, " K"]) -> "Head":
        """The head over these tokens alone; a copy of their weights."""
        ids = ids.to(self.weight.device)
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])


@dataclass(frozen=True)
class PackedHead:
    """A head whose weights lie in oneDNN's layout and nowhere else, for painting on a CPU."""

    packed: Tensor
    """Not an array: see `arra/models/products.py`."""
    bias: Float[Tensor, " V"] | None
    scale: float
    softcap: float | None

    def __call__(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """Logits in float32; a row's are the same bits whatever rows stand beside it."""
        return _bent(packed_product(hidden.float(), self.packed, self.bias), self)


@dataclass(frozen=True)
class CalledHead:
    """A head that must be called: somebody listens to it, or adapters or quantised weights stand in its place."""

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    chosen: Int[Tensor, " K"] | None = None

    def __call__(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any V"]:
        """Logits in float32."""
        logits: Tensor = self.layer(hidden)
        return _bent((logits if self.chosen is None else logits[..., self.chosen]).float(), self)

    def rows(self, ids: Int[Tensor, " K"]) -> "CalledHead":
        """The head over these tokens alone; all are still computed."""
        return replace(self, chosen=ids if self.chosen is None else self.chosen[ids])


def head_of(layer: nn.Module, *, scale: float = 1.0, softcap: float | None = None) -> Head | CalledHead:
    """The head that a model's last layer is now; ask again for each use, since layers get wrapped and listened to."""
    if type(layer) is nn.Linear and is_unheard(layer):
        return Head(layer.weight, layer.bias, scale, softcap)
    rows = getattr(layer, "token_adapter", layer)
    if hasattr(rows, "get_merged_weights") and is_unheard(layer):  # peft's trained rows over a frozen matrix
        base: nn.Linear = rows.base_layer  # type: ignore[assignment]
        return Head(rows.get_merged_weights(rows.active_adapters), base.bias, scale, softcap)  # type: ignore[operator]
    return CalledHead(layer, scale, softcap)


def packed_head(head: Head | CalledHead) -> PackedHead | Head | CalledHead:
    """The head for logits without gradients, packed where that is faster; it does not follow its weights any more."""
    if isinstance(head, CalledHead) or not uses_onednn(head.weight):
        return head
    return PackedHead(pack(head.weight), head.bias, head.scale, head.softcap)


def head_loss(
    hidden: Float[Tensor, "N D"],
    head: Head | CalledHead,
    labels: Int[Tensor, " N"],
    *,
    shares: Float[Tensor, " N"] | float,
    z_weight: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums of next-token loss + z_weight * z, of the loss, and of z (squared log-partition), weighed by `shares`.

    One number is the share of every position, which a tensor of equal ones cannot tell without looking at it. The first
    sum carries gradients, computed at once while each slice of the logits is there, for what needs them.
    """
    if isinstance(shares, float):
        if isinstance(head, Head) and torch.is_grad_enabled():
            kind = _kind(hidden, head.weight)
            if liger.fits(hidden, kind=kind, softcap=head.softcap):
                return _fused_loss(hidden, head, labels, shares, z_weight, kind)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shares = torch.full((len(labels),), shares, dtype=wide, device=hidden.device)
    if isinstance(head, CalledHead):
        total, ntp, z = _called_loss(hidden, head, labels, shares, z_weight)
    elif torch.is_grad_enabled():
        total, ntp, z = _HeadLoss.apply(hidden, head.weight, head.bias, labels, shares, z_weight, head)
    else:
        ntp_each, z_each = head_losses(hidden, head, labels)
        ntp, z = (shares * ntp_each).sum(), (shares * z_each).sum()
        total = ntp + z_weight * z
    return total, ntp.detach(), z.detach()


@torch.no_grad()
def head_losses(
    hidden: Float[Tensor, "N D"], head: Head | CalledHead, labels: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Next-token loss (nats) and squared log-partition of every position, without gradients."""
    ntp, z = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
    head = _narrowed(head, _kind(hidden, head.weight)) if isinstance(head, Head) else head
    for part in _slices(hidden, head):
        ntp[part], z[part] = _position_losses(head(hidden[part]), labels[part])
    return ntp, z


def _position_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_partition = logits.logsumexp(1)
    return log_partition - logits.gather(1, labels[:, None])[:, 0], log_partition.square()


def _slices(hidden: Tensor, head: Head | CalledHead) -> Iterator[slice]:
    """Runs of positions whose logits may exist together."""
    most = CUDA_HEAD_BYTES if hidden.is_cuda else HEAD_BYTES
    size = CALLED_ROWS if isinstance(head, CalledHead) else max(1, most // (4 * head.weight.shape[0]))
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def _fused_loss(
    hidden: Tensor, head: Head, labels: Tensor, share: float, z_weight: float, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss` by Liger's kernel, which knows no scale: it is the states' and the bias's."""
    bias = head.bias
    if head.scale != 1:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    total, ntp, z = liger.fused_loss(hidden, head.weight, bias, labels, z_weight=z_weight, kind=kind)
    return share * total, share * ntp.detach(), share * z.detach()


def _called_loss(hidden: Tensor, head: CalledHead, labels: Tensor, shares: Tensor, z_weight: float) -> list[Tensor]:
    """`head_loss` by calling the layer for each slice, and once more in the backward pass."""

    def sums(hidden: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        ntp, z = _position_losses(head(hidden), labels)
        return (shares * ntp).sum(), (shares * z).sum()

    ntp, z = (torch.zeros((), device=hidden.device) for _ in range(2))
    for part in _slices(hidden, head):
        ntp_part, z_part = checkpoint(sums, hidden[part], labels[part], shares[part], use_reentrant=False)
        ntp, z = ntp + ntp_part, z + z_part
    return [ntp + z_weight * z, ntp, z]


class _HeadLoss(torch.autograd.Function):
    """Keeps the gradients themselves, which the loss's own gradient scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shares: Tensor,
        z_weight: float,
        head: Head,
    ) -> tuple[Tensor, ...]:
        kind = _kind(hidden, weight)
        wide = torch.promote_types(kind, torch.float32)
        grads: list[Tensor | None] = [
            torch.zeros_like(x, dtype=wide) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        ntp, z = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        head = _narrowed(head, kind)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(hidden, head):
                rows, wanted, share = hidden[part], labels[part, None], shares[part, None].to(wide)
                logits = _bent(_raw_product(rows, head, kind), head)
                chosen, bend = logits.gather(1, wanted), _bend(logits, head)
                # the exponentials serve loss and slope, where the logits were: another copy would cost a tenth more
                most = logits.amax(1, keepdim=True)
                slope = logits.sub_(most).exp_()
                partition = slope.sum(1, keepdim=True)
                log_partition = most + partition.log()
                ntp += (share * (log_partition - chosen)).sum()
                z += (share * log_partition.square()).sum()
                slope.mul_(share * (1 + 2 * z_weight * log_partition) / partition).scatter_add_(1, wanted, -share)
                if bend is not None:
                    slope.mul_(bend)
                _add_gradients(grads, slope, rows, part, head.weight, kind)
                del logits, slope  # or two slices would exist while the next one is made
        ctx.gradients, ctx.types = grads, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(ntp, z)
        return ntp + z_weight * z, ntp, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients are made once; run the forward pass again")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            # comparing would wait for an accelerator, and multiplying costs it little
            if gradient is not None and (grad.device.type != "cpu" or grad != 1):
                gradient.mul_(grad)
        typed = [None if g is None else g.to(kind) for g, kind in zip(gradients, ctx.types, strict=True)]
        return *typed, None, None, None, None


def _add_gradients(
    grads: list[Tensor | None], slope: Tensor, rows: Tensor, part: slice, weight: Tensor, kind: torch.dtype
) -> None:
    """Nothing; what a slice of the raw logits' gradient means for states, weight and bias is added to theirs."""
    grad_hidden, grad_weight, grad_bias = grads
    if grad_bias is not None:
        grad_bias += slope.sum(0)
    if kind == torch.float16:
        kind = torch.float32  # it cannot hold slopes times shares
    slope, rows = slope.to(kind), rows.to(kind)
    if grad_hidden is not None:
        for block in _blocks(weight, kind):
            grad_hidden[part] += _product(slope[:, block], weight[block], kind)
    if grad_weight is None:
        return
    if kind == grad_weight.dtype:
        grad_weight.addmm_(slope.T, rows)
    elif slope.is_cuda:
        torch.addmm(grad_weight, slope.T, rows, out_dtype=grad_weight.dtype, out=grad_weight)
    else:
        for block in _runs(weight):
            grad_weight[block] += _product(slope[:, block].T, rows, kind)


def _raw_logits(rows: Tensor, head: Head) -> Tensor:
    """h w^T + b, with gradients where they are wanted."""
    kind = _kind(rows, head.weight)
    if not torch.is_grad_enabled():
        count = len(rows)
        few = rows.device.type == "cpu" and 0 < count < MIN_ROWS
        with torch.autocast(rows.device.type, enabled=False):
            return _raw_product(F.pad(rows, (0, 0, 0, MIN_ROWS - count)) if few else rows, head, kind)[:count]
    if kind == torch.float32 == rows.dtype == head.weight.dtype and not torch.compiler.is_compiling():
        found = lean.multiplied(rows, head.weight)
    else:
        wide = torch.promote_types(kind, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            found = F.linear(rows.to(kind).to(wide), head.weight.to(kind).to(wide))
    return found if head.bias is None else found + head.bias


def _raw_product(rows: Tensor, head: Head, kind: torch.dtype) -> Tensor:
    """h w^T + b, without gradients."""
    parts = [_product(rows, head.weight[block].T, kind) for block in _blocks(head.weight, kind)]
    found = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return found if head.bias is None else found.add_(head.bias)


def _bent(logits: Tensor, head: Head | CalledHead | PackedHead) -> Tensor:
    """The logits that raw ones become by scale and cap."""
    logits = logits if head.scale == 1 else logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def _bend(logits: Tensor, head: Head) -> Tensor | float | None:
    """How fast logits move with raw ones; None where they are the same."""
    if head.softcap is None:
        return None if head.scale == 1 else head.scale
    return (logits / head.softcap).square_().neg_().add_(1).mul_(head.scale)


def _narrowed(head: Head, kind: torch.dtype) -> Head:
    """The head with weights in the products' type where that is smaller: rounded once, not for every slice."""
    return replace(head, weight=head.weight.to(kind)) if kind.itemsize < head.weight.dtype.itemsize else head


def _kind(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type that products of states and weights run in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """The product of operands rounded to `kind`, in float32 or wider."""
    a, b = a.to(kind), b.to(kind)
    if kind.itemsize >= 4:
        return product(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())


def _blocks(weight: Tensor, kind: torch.dtype) -> list[slice]:
    """Runs of rows that may be converted together for a product; all rows where nothing is converted."""
    as_it_is = weight.dtype == kind and (weight.is_cuda or kind.itemsize >= 4)
    return [slice(0, len(weight))] if as_it_is else _runs(weight)


def _runs(weight: Tensor) -> list[slice]:
    size = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight), size)]
