"""The entropy loss of a VQ codebook, in pieces: all codes of many vectors are never in memory at once.

Legend: N vectors, E code dimension, K codes; p (N, K) is the softmax of negative squared distances over temperature.
Source: LlamaGen `tokenizer/tokenizer_image/vq_model.py`, `compute_entropy_loss` (its two 1e-5 terms included).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NUMBERS_AT_A_TIME = 2**24
"""Vectors times codes of one piece: 64 MiB in float32."""


def code_entropy_loss(
    z: Float[Tensor, "N E"],
    rows: Float[Tensor, "K E"],
    *,
    temperature: float = 0.01,
    piece: int | None = None,
) -> Float[Tensor, ""]:
    """Mean entropy of each assignment minus entropy of the mean assignment: low when choices are sharp and varied.

    `piece` is the number of vectors that are looked at together; it changes rounding alone.
    """
    piece = piece or max(1, NUMBERS_AT_A_TIME // len(rows))
    return _CodeEntropy.apply(z, rows, temperature, piece)


def _affinity(z: Tensor, rows: Tensor, temperature: float) -> Tensor:
    distance = (z**2).sum(1, keepdim=True) + (rows**2).sum(1) - 2 * z @ rows.T
    return -distance / temperature


def _sum_of_entropies(affinity: Tensor, p: Tensor) -> Tensor:
    return -(p * (affinity + 1e-5).log_softmax(1)).sum()


class _CodeEntropy(torch.autograd.Function):
    """Both passes look at a piece at a time; the second one computes its affinities again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: Tensor, temperature: float, piece: int) -> Tensor:
        total, mean_p = z.new_zeros(()), z.new_zeros(len(rows))
        for part in z.split(piece):
            affinity = _affinity(part, rows, temperature)
            p = affinity.softmax(1)
            total += _sum_of_entropies(affinity, p) / len(z)
            mean_p += p.sum(0) / len(z)
        ctx.save_for_backward(z, rows, mean_p)
        ctx.temperature, ctx.piece = temperature, piece
        return total + (mean_p * (mean_p + 1e-5).log()).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, rows, mean_p = ctx.saved_tensors
        of_mean = (mean_p + 1e-5).log() + mean_p / (mean_p + 1e-5)  # derivative of the second term by mean_p
        of_z, of_rows = [], torch.zeros_like(rows)
        for part in z.split(ctx.piece):
            with torch.enable_grad():
                part, own_rows = part.detach().requires_grad_(), rows.detach().requires_grad_()
                affinity = _affinity(part, own_rows, ctx.temperature)
                p = affinity.softmax(1)
                loss = (_sum_of_entropies(affinity, p) + (p @ of_mean).sum()) / len(z)
                found = torch.autograd.grad(loss, (part, own_rows))
            of_z.append(found[0])
            of_rows += found[1]
        return grad * torch.cat(of_z), grad * of_rows, None, None
