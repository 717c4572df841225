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
from arra.models import Decoder, lean


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
    """All terms of a batch; gradients flow from `total`, and from `gva` where it is trained on.

    With an alignment of weight 0 the term is measured and sends no gradient.
    """
    capture = (alignment.layer,) if alignment is not None else ()
    output = model(batch.tokens[:, :-1], **batch.inputs(), capture=capture)
    total, ntp, z = _next_token(model, output.last_hidden, batch, z_weight)
    if alignment is None or batch.features is None:
        return Losses(total, ntp, z, None)
    with torch.set_grad_enabled(torch.is_grad_enabled() and alignment.weight > 0):
        positions = batch.predicting if alignment.target == "hybnext" else batch.holding
        gva = alignment(output.captured[alignment.layer], batch.features, positions)
    return Losses(total + alignment.weight * gva if alignment.weight else total, ntp, z, gva)


def _next_token(
    model: Decoder, last_hidden: Float[Tensor, "B T D"], batch: TrainBatch, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss to train on, its next-token part and its z; slice by slice where the logits need not all exist."""
    if lean.usable(last_hidden, model.output):
        hidden, labels = last_hidden[batch.predicting], batch.labels[:, 1:][batch.predicting]
        shares = hidden.new_full((len(labels),), 1 / max(1, len(labels)))
        return lean.head_loss(hidden, model.output.weight, labels, shares=shares, z_weight=z_weight)
    ntp_each, z_each = next_token_losses(model, last_hidden, batch)
    ntp, z = ntp_each.mean(), z_each.mean()
    return ntp + z_weight * z if z_weight else ntp, ntp.detach(), z.detach()
