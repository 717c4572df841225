"""The loss on the logits by Liger's fused kernel, on CUDA where the package `liger-kernel` is installed (extra 'fast').

`head_loss` asks here first. As in its own slices, logits exist for some positions at a time and their gradients are
made at once, but one kernel makes loss and gradients of a slice, where torch passes over it ten times. What differs
from the slices: logits are rounded to the type of the products (bfloat16 under autocast), and so are the gradients,
after their sums in float32; the host waits for the device once forward and once backward.
Letters: N positions, D model width, V vocabulary.
Source: linkedin/Liger-Kernel 0.8.5, ops/fused_linear_cross_entropy.py and ops/cross_entropy.py.
"""

import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

DEVICES = ("cuda",)
OLDEST = (0, 8)
TYPES = (torch.float32, torch.bfloat16)
"""Of products: in float16 logits overflow where float32's do not."""
UNWEIGHTED = 2.0**-40
"""Weight of z where it is 0: the kernel gives weighted z alone. It changes no bit of loss or gradient in float32."""


@cache
def is_usable() -> bool:
    """Whether the package is installed and new enough."""
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) >= OLDEST


def fits(hidden: Float[Tensor, "N D"], *, kind: torch.dtype, softcap: float | None) -> bool:
    """Whether the kernel can make the loss of these states, with products in type `kind`.

    It makes gradients only if the states want them, divides by the number of positions, and its capped logits are not
    known to be right: Triton's interpreter, by which all else is tested without a GPU, cannot run them.
    """
    return (
        hidden.device.type in DEVICES
        and kind in TYPES
        and softcap is None
        and hidden.requires_grad
        and len(hidden) > 0
        and is_usable()
    )


def fused_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    labels: Int[Tensor, " N"],
    *,
    z_weight: float,
    kind: torch.dtype,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Sums over positions of next-token loss + z_weight * z, of the loss, and of z, in float32.

    The first carries gradients, which are made at once. z of bfloat16 states is itself rounded to bfloat16.
    """
    scale = z_weight or UNWEIGHTED
    with torch.autocast(hidden.device.type, enabled=False):
        found = _kernel()(
            hidden.to(kind),
            weight.to(kind),  # here, once; under autocast the kernel would do it for every slice
            labels,
            bias=None if bias is None else bias.to(kind),
            lse_square_scale=scale,
            reduction="sum",
            return_z_loss=True,
            accum_dtype=torch.float32,
        )
    weighted_z = found.z_loss.float()
    return found.loss, found.loss - weighted_z, weighted_z / scale


def _kernel() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    kernel: Callable[..., Any] = liger_fused_linear_cross_entropy
    return kernel
