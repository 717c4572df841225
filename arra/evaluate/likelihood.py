"""What needs no judge: how well a model predicts held-out codes, and how much of that it owes to the caption.

Legend: N pictures, P image positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.models import Decoder


@dataclass(frozen=True)
class Likelihoods:
    """Per picture, in nats per code."""

    nll: Float[Tensor, " N"]
    caption_gain: Float[Tensor, " N"]
    """NLL under another picture's caption minus NLL under its own: what the right caption is worth."""


@torch.no_grad()
def likelihoods(
    model: Decoder, codes: Int[Tensor, "N P"], prompts: list[str], *, batch_size: int = 64, seed: int = 0
) -> Likelihoods:
    """NLL and caption gain of held-out pictures; wrong captions come from a fixed cyclic shift of a shuffled order."""
    model.eval()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    wrong = [""] * len(prompts)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        wrong[here] = prompts[there]
    own = nll_per_picture(model, codes, prompts, batch_size=batch_size)
    other = nll_per_picture(model, codes, wrong, batch_size=batch_size)
    return Likelihoods(nll=own, caption_gain=other - own)


@torch.no_grad()
def nll_per_picture(
    model: Decoder, codes: Int[Tensor, "N P"], prompts: list[str], *, batch_size: int = 64
) -> Float[Tensor, " N"]:
    """Mean negative log-likelihood of each picture's codes, nats per code."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = codes[start : start + batch_size].to(model.device)
        logits = model.logits(part, prompts=prompts[start : start + batch_size])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="none")
        parts.append(losses.view(part.shape).double().mean(1).float().cpu())
    return torch.cat(parts)
