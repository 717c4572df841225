"""The training objective: loss = next-token + weight * alignment + z_weight * z, as one object between model and loop.

Every term is a sum divided by a count, so that parts of a batch add up to the batch when they are told its counts.
Legend: B batch, T sequence, S = T - 1 fed positions, N labelled tokens of a batch, D model, F encoder feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from arra.align import Alignment, Alignments, Target
from arra.align.alignment import MAIN
from arra.align.positions import LEGACY_LAST, legacy_window
from arra.data.batches import Features, TrainBatch
from arra.models import Painter
from arra.models.head import head_loss


@dataclass(frozen=True)
class StateGradient:
    """What a term's balance is measured by: the gradient that it sends into the states it is taken from."""

    states: Float[Tensor, "B T D"]
    """They keep the gradient of the whole loss."""
    own: Float[Tensor, "B T D"]
    """Of the unweighted term."""
    weight: float

    def squares(self) -> tuple[float, float]:
        """Squared norms, after the backward pass: of the unweighted term, and of everything else."""
        whole = self.states.grad
        other = self.own.new_zeros(()) if whole is None else (whole - self.weight * self.own).float().square().sum()
        return self.own.float().square().sum().item(), other.item()


@dataclass(frozen=True)
class Losses:
    """Scalars of one batch, each a mean: over labelled tokens, the alignment over images."""

    total: Float[Tensor, ""]
    ntp: Float[Tensor, ""]
    z: Float[Tensor, ""]
    aligned: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """The unweighted terms of the alignment that were computed, by name."""
    gradients: Mapping[str, StateGradient] = field(default_factory=dict)
    """Of the terms whose weight is balanced."""

    @property
    def gva(self) -> Float[Tensor, ""] | None:
        """The main term of the alignment."""
        return self.aligned.get(MAIN)


def compute_losses(
    model: Painter,
    batch: TrainBatch,
    alignment: Alignments | Alignment | None,
    *,
    z_weight: float = 0.0,
    weights: Mapping[str, float] | None = None,
    num_tokens: int | None = None,
    num_images: int | None = None,
    candidates: Features | None = None,
) -> Losses:
    """All terms of a batch; gradients flow from `total`, and from an aligned term where it is trained on.

    `num_tokens` and `num_images` are how many labelled tokens, and rows with codes, the whole batch has that this is a
    part of, `candidates` the features of all its pictures: the terms of its parts, and their gradients, then add up to
    the whole's. `weights` are the terms' at this step, None their first. A term whose weight is 0 by its settings is
    measured and sends no gradient; one whose schedule says 0 is left out.
    """
    terms = Alignments.of(alignment)
    named = {} if terms is None or batch.features is None else dict(terms.items())
    weights = {name: term.weight for name, term in named.items()} if weights is None else weights
    named = {name: term for name, term in named.items() if weights[name] or not term.weight}
    whole = any(term.target == LEGACY_LAST for term in named.values())
    tokens = batch.tokens if whole else batch.tokens[:, :-1]
    output = model(tokens, **batch.inputs(), capture=tuple(sorted({term.layer for term in named.values()})))
    last_hidden = output.last_hidden[:, :-1] if whole else output.last_hidden
    total, ntp, z = _next_token(model, last_hidden, batch, z_weight, num_tokens)
    aligned, gradients = {}, {}
    for name, term in named.items():
        states, weight = output.captured[term.layer], weights[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            positions = positions_of(batch, term.target)[:, : states.shape[1]]
            assert batch.features is not None
            gva = term(
                states,
                batch.features[term.encoder],
                positions,
                grid=batch.grid or model.settings.grid,
                candidates=candidates[term.encoder] if candidates and term.contrasts_pictures else None,
            )
            if num_images is not None:  # the alignment divides by the images that are here
                gva = gva * (positions.any(1).sum() / max(1, num_images))
        aligned[name] = gva
        if weight:
            total = total + weight * gva
            if term.balance is not None and states.requires_grad:
                (own,) = torch.autograd.grad(gva, states, retain_graph=True)
                gradients[name] = StateGradient(states, own, weight)
    for gradient in gradients.values():  # not before: what is asked of one term would be kept as well
        gradient.states.retain_grad()
    return Losses(total, ntp, z, aligned, gradients)


def positions_of(batch: TrainBatch, target: Target) -> Bool[Tensor, "B T"]:
    """Which states a target aligns, of the whole sequences of rows that have codes.

    Raises:
        ValueError: target `rep` and sequences without its token.
    """
    if target in ("legacy-2025-11", "legacy-2025-03"):
        window = legacy_window(target, (batch.tokens.shape[0], batch.tokens.shape[1]), device=batch.tokens.device)
        return window & batch.code_mask.any(1, keepdim=True)
    if target == "rep":
        if batch.rep_mask is None:
            raise ValueError("target 'rep' needs sequences with its token; the model was made without it")
        return batch.rep_mask
    return batch.code_mask if target == "at" else F.pad(batch.predicting, (0, 1))


def _next_token(
    model: Painter, last_hidden: Float[Tensor, "B T D"], batch: TrainBatch, z_weight: float, num_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss to train on, its next-token part and its z; computed where tokens are labelled and nowhere else."""
    hidden, labels = last_hidden[batch.labelled], batch.labels[:, 1:][batch.labelled]
    count = len(labels) if num_tokens is None else num_tokens
    shares = torch.full((len(labels),), 1 / max(1, count), device=hidden.device)
    return head_loss(hidden, model.lm_head, labels, shares=shares, z_weight=z_weight)
