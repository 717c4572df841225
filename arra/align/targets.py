"""The space in which hidden states meet the encoder's features: raw, centred, or narrowed to principal axes.

Raw pooled features share one large direction, so any two images have a high cosine and the loss tells little; the
training mean removed, it tells images apart. Narrowing keeps a small model's projector small.
Legend: N images, F encoder feature, G target feature.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TargetSpace:
    """An affine map fitted on the training split: subtract `mean`, then project on `axes` where there are any."""

    mean: Float[Tensor, " F"]
    axes: Float[Tensor, "F G"] | None = None

    @classmethod
    def fit(
        cls, features: Float[Tensor, "N F"], *, center: bool = True, components: int | None = None
    ) -> "TargetSpace":
        """The space of these features; `components` principal axes, or all dimensions as they are.

        Raises:
            ValueError: more components than dimensions.
        """
        mean = features.mean(0) if center else torch.zeros(features.shape[1])
        if components is None:
            return cls(mean)
        if components > features.shape[1]:
            raise ValueError(f"{components} components of {features.shape[1]} dimensions")
        shifted = (features - mean).double()
        _, vectors = torch.linalg.eigh(shifted.T @ shifted)  # ascending eigenvalues
        axes = vectors.flip(1)[:, :components]
        # a sign convention, so that the same features always give the same axes
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        return cls(mean, axes.float())

    @property
    def size(self) -> int:
        return len(self.mean) if self.axes is None else self.axes.shape[1]

    def __call__(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B G"]:
        shifted = features - self.mean
        return shifted if self.axes is None else shifted @ self.axes

    def explained(self, features: Float[Tensor, "N F"]) -> float:
        """Share of the centred features' squared length that the space keeps."""
        whole = (features - self.mean).square().sum()
        return float(self(features).square().sum() / whole)
