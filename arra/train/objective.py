"""The training objective: loss = next-token + weight * alignment + z_weight * z, as one object between model and loop.

Every term is a sum divided by a count, so that parts of a batch add up to the batch when they are told its counts.
Legend: B batch, T sequence, N labelled tokens of a batch, D model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from arra.align import Alignment
from arra.data.batches import TrainBatch
from arra.models import Painter
from arra.models.head import head_loss


@dataclass(frozen=True)
class Losses:
    """Scalars of one batch, each a mean: over labelled tokens, the alignment over images."""

    total: Float[Tensor, ""]
    ntp: Float[Tensor, ""]
    z: Float[Tensor, ""]
    gva: Float[Tensor, ""] | None


def compute_losses(
    model: Painter,
    batch: TrainBatch,
    alignment: Alignment | None,
    *,
    z_weight: float = 0.0,
    num_tokens: int | None = None,
    num_images: int | None = None,
) -> Losses:
    """All terms of a batch; gradients flow from `total`, and from `gva` where it is trained on.

    `num_tokens` and `num_images` are how many labelled tokens, and rows with codes, the whole batch has that this is a
    part of: the terms of its parts, and their gradients, then add up to the whole's. With an alignment of weight 0 the
    term is measured and sends no gradient.
    """
    capture = (alignment.layer,) if alignment is not None else ()
    output = model(batch.tokens[:, :-1], **batch.inputs(), capture=capture)
    total, ntp, z = _next_token(model, output.last_hidden, batch, z_weight, num_tokens)
    if alignment is None or batch.features is None:
        return Losses(total, ntp, z, None)
    with torch.set_grad_enabled(torch.is_grad_enabled() and alignment.weight > 0):
        positions = batch.predicting if alignment.target == "hybnext" else batch.holding
        gva = alignment(output.captured[alignment.layer], batch.features, positions)
        if num_images is not None:  # the alignment divides by the images that are here
            gva = gva * (positions.any(1).sum() / max(1, num_images))
    return Losses(total + alignment.weight * gva if alignment.weight else total, ntp, z, gva)


def _next_token(
    model: Painter, last_hidden: Float[Tensor, "B T D"], batch: TrainBatch, z_weight: float, num_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss to train on, its next-token part and its z; computed where tokens are labelled and nowhere else."""
    hidden, labels = last_hidden[batch.labelled], batch.labels[:, 1:][batch.labelled]
    count = len(labels) if num_tokens is None else num_tokens
    shares = torch.full((len(labels),), 1 / max(1, count), device=hidden.device)
    return head_loss(hidden, model.lm_head, labels, shares=shares, z_weight=z_weight)
