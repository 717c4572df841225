"""The alignment term as an object: it names the layer to capture and turns captured states into one loss.

Legend: B batch, T sequence, D model, F encoder feature, N images.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from arra.align.losses import cosine_loss
from arra.align.projector import Projector
from arra.align.targets import TargetSpace

Target = Literal["hybnext", "at"]


class Alignment(nn.Module):
    """`weight` * distance between projected hidden states of `layer` and the image's feature.

    `layer` 0 is the embeddings, k the residual stream after the k-th block. `target` names the positions: "hybnext"
    every one whose state predicts an image code, "at" every one that holds one. The projector is the only part with
    parameters.
    """

    target_mean: Tensor
    target_axes: Tensor | None

    def __init__(
        self,
        *,
        hidden_size: int,
        feature_size: int,
        layer: int = 1,
        target: Target = "hybnext",
        loss: Literal["cosine"] = "cosine",
        weight: float = 1.0,
        inner_size: int | None = None,
        space: TargetSpace | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if target not in get_args(Target) or loss != "cosine":
            raise ValueError(f"target {target!r} with loss {loss!r}: 'hybnext' or 'at', with 'cosine', are built")
        self.layer, self.weight, self.target = layer, weight, target
        space = space or TargetSpace(torch.zeros(feature_size))
        # buffers, so that the space moves to a device with the projector; never saved
        self.register_buffer("target_mean", space.mean, persistent=False)
        self.register_buffer("target_axes", space.axes, persistent=False)
        self.projector = Projector(hidden_size, space.size, inner_size=inner_size, seed=seed)

    @property
    def space(self) -> TargetSpace:
        """The target space, on this module's device."""
        return TargetSpace(self.target_mean, self.target_axes)

    def forward(
        self, hidden: Float[Tensor, "B T D"], features: Float[Tensor, "B F"], positions: Bool[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """The unweighted loss at the target's positions, in [0, 2]; the feature gets no gradient."""
        hidden = hidden.to(self.projector.first.weight.dtype)  # frozen parts of a model may be narrower
        return cosine_loss(self.projector(hidden), self.space(features).detach(), positions)
