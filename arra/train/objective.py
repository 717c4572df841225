"""The training objective: loss = next-token + weight * alignment + z_weight * z, as one object between model and loop.

Legend: B batch, T sequence, N predicted codes of a batch, D model, K codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from arra.align import Alignment
from arra.data.batches import TrainBatch
from arra.models import Decoder


@dataclass(frozen=True)
class Losses:
    """Scalars of one batch, each a mean: over predicted codes, the alignment over images."""

    total: Float[Tensor, ""]
    ntp: Float[Tensor, ""]
    z: Float[Tensor, ""]
    gva: Float[Tensor, ""] | None


def next_token_losses(
    model: Decoder, last_hidden: Float[Tensor, "B T D"], batch: TrainBatch
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Cross-entropy (nats) and squared log-partition of every predicted code, in batch order.

    The head is computed where codes are predicted and nowhere else.
    """
    labels: Int[Tensor, " N"] = batch.labels[:, 1:][batch.predicting]
    logits = model.head(last_hidden[batch.predicting])
    return F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(1).square()


def compute_losses(model: Decoder, batch: TrainBatch, alignment: Alignment | None, *, z_weight: float = 0.0) -> Losses:
    """All terms of a batch. With an alignment of weight 0 the term is measured and sends no gradient."""
    capture = (alignment.layer,) if alignment is not None else ()
    output = model(batch.tokens[:, :-1], prefix_mask=batch.prefix_mask, capture=capture)
    ntp_each, z_each = next_token_losses(model, output.last_hidden, batch)
    ntp, z = ntp_each.mean(), z_each.mean()
    total = ntp + z_weight * z if z_weight else ntp
    if alignment is None or batch.features is None:
        return Losses(total, ntp, z, None)
    with torch.set_grad_enabled(torch.is_grad_enabled() and alignment.weight > 0):
        gva = alignment(output.captured[alignment.layer], batch.features, batch.predicting)
    return Losses(total + alignment.weight * gva if alignment.weight else total, ntp, z, gva)
