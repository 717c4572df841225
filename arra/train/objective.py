"""The training objective: loss = next-token + weight * alignment + z_weight * z, as one object between model and loop.

Every term is a sum divided by a count, so that parts of a batch add up to the batch when they are told its counts.
Legend: B batch, T sequence, S = T - 1 fed positions, N labelled tokens of a batch, D model, F encoder feature.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from arra.align import Alignment, Alignments, Places, Target
from arra.align.alignment import MAIN
from arra.align.positions import LEGACY_LAST, legacy_window
from arra.data.batches import Features, TrainBatch
from arra.models import Painter
from arra.models.head import head_loss

LABELLED = "labelled"
"""Name of the places that carry next-token loss, beside those of targets."""


@dataclass(frozen=True)
class StateGradient:
    """What a term's balance is measured by: the gradient that it sends into the states it is taken from."""

    states: Float[Tensor, "B T D"]
    """They keep the gradient of the whole loss."""
    own: Float[Tensor, "B T D"]
    """Of the unweighted term."""
    weight: float

    def squares(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Squared norms, after the backward pass: of the unweighted term, and of everything else."""
        whole, own = self.states.grad, self.own.float()
        other = own.new_zeros(()) if whole is None else (whole - self.weight * own).float().square().sum()
        return own.square().sum(), other


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
    measured and sends no gradient; one whose schedule says 0 is left out. A batch that is `located` makes nobody wait
    for an accelerator. Where nothing is labelled, or there are no pictures, a term is 0 and its gradients are zeros.
    """
    terms = Alignments.of(alignment)
    named = {} if terms is None or batch.features is None else dict(terms.items())
    weights = {name: term.weight for name, term in named.items()} if weights is None else weights
    named = {name: term for name, term in named.items() if weights[name] or not term.weight}
    targets = {term.target for term in named.values()}
    if batch.places is None or not targets <= batch.places.keys():
        batch = located(batch, targets)
    assert batch.places is not None
    whole = LEGACY_LAST in batch.places
    tokens = batch.tokens if whole else batch.tokens[:, :-1]
    output = model(tokens, **batch.inputs(), capture=tuple(sorted({term.layer for term in named.values()})))
    last_hidden = output.last_hidden[:, :-1] if whole else output.last_hidden
    total, ntp, z = _next_token(model, last_hidden, batch, z_weight, num_tokens)
    aligned, gradients = {}, {}
    for name, term in named.items():
        states, weight = output.captured[term.layer], weights[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            places = batch.places[term.target]
            assert isinstance(places, Places)
            assert batch.features is not None
            gva = term(
                states,
                batch.features[term.encoder],
                places,
                grid=batch.grid or model.settings.grid,
                candidates=candidates[term.encoder] if candidates and term.contrasts_pictures else None,
            )
            if num_images is not None:  # the alignment divides by the images that are here
                gva = gva * (len(places.counts) / max(1, num_images))
        aligned[name] = gva
        if weight:
            total = total + weight * gva
            if term.balance is not None and states.requires_grad:
                (own,) = torch.autograd.grad(gva, states, retain_graph=True)
                gradients[name] = StateGradient(states, own, weight)
    for gradient in gradients.values():  # not before: what is asked of one term would be kept as well
        gradient.states.retain_grad()
    return Losses(total, ntp, z, aligned, gradients)


def located(batch: TrainBatch, targets: Collection[Target]) -> TrainBatch:
    """The batch with the places that its losses look at: cheap on the CPU, while an accelerator would be waited for.

    Micro-batches are cut before, and it goes to the device afterwards (`TrainBatch.changed`).

    Raises:
        ValueError: target `rep` and sequences without its token.
    """
    fed = batch.tokens.shape[1] - (LEGACY_LAST not in targets)
    masks: dict[str, Tensor] = {target: positions_of(batch, target)[:, :fed] for target in targets}
    masks[LABELLED] = batch.labelled
    places = {name: Places.of(mask) for name, mask in masks.items()}
    if batch.tokens.is_pinned():  # so are they, or their move would wait
        places = {name: each.changed(Tensor.pin_memory) for name, each in places.items()}
    return replace(batch, places=places)


def positions_of(batch: TrainBatch, target: Target) -> Bool[Tensor, "B T"]:
    """Which states a target aligns, of the whole sequences of rows that have codes.

    Raises:
        ValueError: target `rep` and sequences without its token.
    """
    if target in ("legacy-2025-11", "legacy-2025-03"):
        window = legacy_window(target, (batch.tokens.shape[0], batch.tokens.shape[1]), device=batch.tokens.device)
        return window & batch.code_mask.any(1, keepdim=True)
    if target == "rep":
        if batch.rep_mask is not None:
            return batch.rep_mask & batch.code_mask.any(1, keepdim=True)
        if bool(batch.code_mask.any()):
            raise ValueError("target 'rep' needs sequences with its token; the model was made without it")
        return batch.code_mask  # text alone, of whatever model
    return batch.code_mask if target == "at" else F.pad(batch.predicting, (0, 1))


def _next_token(
    model: Painter, last_hidden: Float[Tensor, "B T D"], batch: TrainBatch, z_weight: float, num_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss to train on, its next-token part and its z; computed where tokens are labelled and nowhere else."""
    assert batch.places is not None
    places = batch.places[LABELLED]
    assert isinstance(places, Places)
    hidden = places.of_states(last_hidden)
    if not places.counts:  # the head is asked for no state, so that all it takes part in has gradients
        nothing = model.lm_head(hidden).sum()
        return nothing, nothing.detach(), nothing.detach()
    labels = batch.labels[:, 1:].flatten().index_select(0, places.at)
    count = len(labels) if num_tokens is None else num_tokens
    return head_loss(hidden, model.lm_head, labels, shares=1 / max(1, count), z_weight=z_weight)
