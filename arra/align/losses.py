"""Distances between projected hidden states and the target feature.

Legend: B batch, T sequence, G target feature.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def cosine_loss(
    projected: Float[Tensor, "B T G"], target: Float[Tensor, "B G"], positions: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - cosine, mean over each image's positions, then over images that have any: in [0, 2], free of either's scale.

    Source: the released ARRA code normalises both sides and averages in this order.
    """
    wide = torch.promote_types(projected.dtype, torch.float32)  # autocast narrows the projector on a CPU
    cosine = F.cosine_similarity(projected.to(wide), target[:, None].to(wide), dim=2)  # (B, T)
    counts = positions.sum(1)
    per_image = (cosine * positions).sum(1) / counts.clamp(min=1)
    present = counts > 0
    return ((1 - per_image) * present).sum() / present.sum().clamp(min=1)
