"""Distances between projected hidden states and what they are aligned with.

Legend: B batch, T sequence, M positions of all images, C candidates, G target feature.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Loss = Literal["cosine", "mse", "nt-xent", "relational"]
"""cosine: 1 - cos (the paper's). mse: mean squared difference over the feature's dimensions (the paper's other).
nt-xent: cross-entropy of finding one's own feature among the candidates. relational: squared difference between the
cosines that the projected state, and its target, have with the candidates."""
CONTRASTING: tuple[Loss, ...] = ("nt-xent", "relational")
"""They look at other features than a state's own."""


def distances(
    projected: Float[Tensor, "M G"],
    target: Float[Tensor, "M G"],
    *,
    loss: Loss = "cosine",
    candidates: Float[Tensor, "C G"] | None = None,
    same: Bool[Tensor, "M C"] | None = None,
    temperature: float = 0.1,
) -> Float[Tensor, " M"]:
    """How far each state is from its target: in [0, 2] for cosine, [0, 4] for relational, at least 0 for all.

    Candidates are the features of the batch's pictures, or of a picture's patches; one that equals the target is no
    negative (`same` says which do, None compares them). Features are constants, so a state's distance is the same in
    any part of the batch.
    Source: cosine and mse, ARRA's ablation; nt-xent, SimCLR (arXiv 2002.05709) equation 1, states against features;
    relational, relations to anchors as in relative representations (arXiv 2209.15430), matched as in relational
    distillation (arXiv 1904.05068).
    """
    wide = torch.promote_types(projected.dtype, torch.float32)  # autocast narrows the projector on a CPU
    projected, target = projected.to(wide), target.to(wide)
    if loss == "mse":
        return (projected - target).square().mean(1)
    if loss == "cosine":
        return 1 - F.cosine_similarity(projected, target, dim=1)
    assert candidates is not None
    state, own, others = (F.normalize(x, dim=1) for x in (projected, target, candidates.to(wide)))
    with torch.autocast(state.device.type, enabled=False):  # three digits of a cosine are too few over a temperature
        of_state, of_target = state @ others.T, own @ others.T  # (M, C)
    if loss == "relational":
        return (of_state - of_target).square().mean(1)
    positive = (state * own).sum(1, keepdim=True)
    if same is None:
        same = same_rows(target, candidates)
    logits = torch.cat([positive, of_state.masked_fill(same, -torch.inf)], 1) / temperature
    return logits.logsumexp(1) - logits[:, 0]


def same_rows(first: Float[Tensor, "M G"], second: Float[Tensor, "C G"]) -> Bool[Tensor, "M C"]:
    """Which rows are equal, number for number."""
    wide = torch.promote_types(first.dtype, torch.float32)
    # a product of matrices would leave a rest between equal rows
    return torch.cdist(first.to(wide), second.to(wide), compute_mode="donot_use_mm_for_euclid_dist") == 0


def image_means(
    each: Float[Tensor, " M"], image: Int[Tensor, " M"], shares: Float[Tensor, " M"], num_images: int
) -> Float[Tensor, " B"]:
    """Every image's mean over its positions, weighed by their shares; 0 for one that has none."""
    sums, weights = (each.new_zeros(num_images).index_add(0, image, x.to(each.dtype)) for x in (each * shares, shares))
    return sums / weights.clamp(min=torch.finfo(each.dtype).tiny)
