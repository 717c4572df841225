"""The space in which hidden states meet the encoder's features: raw, centred, whitened, or narrowed to principal axes.

Raw pooled features share one large direction, so any two images have a high cosine and the loss tells little; the
training mean removed, it tells images apart. Narrowing keeps a small model's projector small.
Legend: N images, F encoder feature, G target feature, P patches, Q positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SHRINKAGE = 1e-3
"""Of the largest variance, added to all before whitening divides by them: directions of noise alone stay small."""


@dataclass(frozen=True)
class TargetSpace:
    """An affine map fitted on the training split: subtract `mean`, then project on `axes` where there are any."""

    mean: Float[Tensor, " F"]
    axes: Float[Tensor, "F G"] | None = None

    @classmethod
    def fit(
        cls,
        features: Float[Tensor, "N F"],
        *,
        center: bool = True,
        components: int | None = None,
        whiten: bool = False,
    ) -> "TargetSpace":
        """The space of these features; `components` principal axes, or all dimensions as they are.

        Whitened, all principal axes have about the same variance (those of the least variance less).

        Raises:
            ValueError: more components than dimensions, or whitening without centring.
        """
        if whiten and not center:
            raise ValueError("whitening is of centred features")
        mean = features.mean(0) if center else torch.zeros(features.shape[1])
        if components is None and not whiten:
            return cls(mean)
        if components is not None and components > features.shape[1]:
            raise ValueError(f"{components} components of {features.shape[1]} dimensions")
        shifted = (features - mean).double()
        values, vectors = torch.linalg.eigh(shifted.T @ shifted / len(features))  # ascending eigenvalues
        axes = vectors.flip(1)[:, :components]
        # a sign convention, so that the same features always give the same axes
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        if whiten:
            variances = values.flip(0)[:components].clamp(min=0)
            deviations = (variances + SHRINKAGE * variances[0]).sqrt()
            axes = axes / torch.where(deviations > 0, deviations, 1.0)  # 0 where all features are the same
        return cls(mean, axes.float())

    @property
    def size(self) -> int:
        return len(self.mean) if self.axes is None else self.axes.shape[1]

    def __call__(self, features: Float[Tensor, "*any F"]) -> Float[Tensor, "*any G"]:
        shifted = features - self.mean
        if self.axes is None:
            return shifted
        with torch.autocast(shifted.device.type, enabled=False):  # targets are the same in every precision of training
            return shifted @ self.axes

    def explained(self, features: Float[Tensor, "N F"]) -> float:
        """Share of the centred features' squared length that an orthonormal space keeps."""
        whole = (features - self.mean).square().sum()
        return float(self(features).square().sum() / whole)


def spatially_normalized(patches: Float[Tensor, "N P F"], alpha: float) -> Float[Tensor, "N P F"]:
    """Patches with `alpha` times their picture's mean taken out and divided by its deviation, channel by channel.

    What all patches of a picture share says little about where things are.
    Source: iREPA (arXiv 2512.10794), alpha 0.6.
    """
    mean, deviation = patches.mean(1, keepdim=True), patches.std(1, correction=0, keepdim=True)
    return (patches - alpha * mean) / (deviation + 1e-6)


def on_grid(patches: Float[Tensor, "N P F"], grid: tuple[int, int]) -> Float[Tensor, "N Q F"]:
    """Patches of a square map at the places of another grid, in raster order: interpolated, antialiased when fewer.

    Raises:
        ValueError: the patches make no square.
    """
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches make no square")
    if grid == (side, side):
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    maps = F.interpolate(maps, size=grid, mode="bilinear", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)
