"""What needs no judge: how well a model predicts held-out codes, and how much of that it owes to its condition.

Legend: N pictures, P image positions, K codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.models import Painter

Asked = Callable[[Sequence[int]], dict[str, Any]]
"""From places of pictures to what the model is told of them: keyword arguments of `Decoder.logits` and `generate`."""


@dataclass(frozen=True)
class Likelihoods:
    """Per picture, in nats per code."""

    nll: Float[Tensor, " N"]
    gain: Float[Tensor, " N"] | None
    """NLL under another picture's condition minus NLL under its own: what the right one is worth."""

    @property
    def bits_per_token(self) -> Float[Tensor, " N"]:
        """The NLL in bits per code: what an arithmetic coder with this model would spend, log2 K if it knows nothing.

        Of codes alone: the condition, and tokens that a layout writes between them, cost nothing.
        """
        return self.nll / math.log(2)


@torch.no_grad()
def likelihoods(
    model: Painter,
    codes: Int[Tensor, "N P"],
    asked: Asked,
    *,
    labels: Int[Tensor, " N"] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Likelihoods:
    """NLL and gain of held-out pictures; wrong conditions are those of the next picture in a shuffled order.

    Of `labels`, where given, it is the next picture of another class; with one class there is no gain.
    """
    model.eval()
    own = nll_per_picture(model, codes, asked, places=range(len(codes)), batch_size=batch_size)
    wrong = wrong_places(len(codes), labels, seed=seed)
    if wrong is None:
        return Likelihoods(nll=own, gain=None)
    other = nll_per_picture(model, codes, asked, places=wrong, batch_size=batch_size)
    return Likelihoods(nll=own, gain=other - own)


def wrong_places(count: int, labels: Int[Tensor, " N"] | None, *, seed: int) -> list[int] | None:
    """For every picture the one whose condition is wrong for it; None where all are of one class."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = list(range(count)) if labels is None else labels.tolist()
    if labels is not None and len(set(kinds)) == 1:
        return None
    wrong = [0] * count
    for number, here in enumerate(order):
        following = (order[(number + step) % count] for step in range(1, count + 1))
        wrong[here] = next(there for there in following if kinds[there] != kinds[here] or count == 1)
    return wrong


@torch.no_grad()
def nll_per_picture(
    model: Painter, codes: Int[Tensor, "N P"], asked: Asked, *, places: Sequence[int], batch_size: int = 64
) -> Float[Tensor, " N"]:
    """Mean negative log-likelihood of each picture's codes under the conditions of `places`, nats per code.

    Among the codes alone, also where a model's vocabulary holds words too; in float32, whatever the model computes in.
    """
    parts = []
    for start in range(0, len(codes), batch_size):
        part = codes[start : start + batch_size].to(model.device)
        logits = model.logits(part, **asked(places[start : start + batch_size]))
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part.flatten(), reduction="none")
        parts.append(losses.view(part.shape).double().mean(1).float().cpu())
    return torch.cat(parts)
