"""Projectors from hidden states to the target space; thrown away after training.

Legend: D model, H inner width, G target feature, N images, h w grid.
"""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ProjectorKind = Literal["mlp", "linear", "max-pool", "avg-pool", "conv"]
"""mlp: Linear - GELU - Linear, the paper's. linear: one layer. max-pool, avg-pool: adaptive pooling over the channels,
which has no parameters (the paper's ablation, and the other one in its code). conv: a 3 x 3 convolution over the
image's grid (iREPA)."""


class Projector(nn.Module):
    """Maps states to the target space; its first weights come from a generator of its own.

    So a model trains the same with or without it. `conv` sees the states around a position, later ones too, which is
    possible in training alone.
    Source: two layers, ARRA section 3.3; pooling, its ablation of alignment heads and the released code's remains of
    it; convolution, iREPA (arXiv 2512.10794).
    """

    def __init__(
        self,
        hidden_size: int,
        target_size: int,
        *,
        kind: ProjectorKind = "mlp",
        inner_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.target_size = kind, target_size
        inner = inner_size or target_size
        self.first: nn.Linear | nn.Conv2d | None = None
        self.second: nn.Linear | None = None
        if kind == "mlp":
            self.first = nn.utils.skip_init(nn.Linear, hidden_size, inner)
            self.second = nn.utils.skip_init(nn.Linear, inner, target_size)
        elif kind == "linear":
            self.first = nn.utils.skip_init(nn.Linear, hidden_size, target_size)
        elif kind == "conv":
            self.first = nn.utils.skip_init(nn.Conv2d, hidden_size, target_size, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.first, self.second):
            if layer is not None:
                fan_in = layer.weight[0].numel()
                nn.init.normal_(layer.weight, std=1 / math.sqrt(fan_in), generator=generator)
                nn.init.zeros_(cast(Tensor, layer.bias))

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its weights; None where it has none."""
        return None if self.first is None else self.first.weight.dtype

    def forward(
        self, hidden: Float[Tensor, "*any D"], *, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "*any G"]:
        """The states in the target space; for `conv` they are (N h*w D), in raster order of `grid`."""
        if self.kind in ("max-pool", "avg-pool"):
            pool = F.adaptive_max_pool1d if self.kind == "max-pool" else F.adaptive_avg_pool1d
            return pool(hidden.flatten(0, -2), self.target_size).unflatten(0, hidden.shape[:-1])
        assert self.first is not None
        if self.kind == "conv":
            assert grid is not None
            found: Tensor = self.first(hidden.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            return found
        inner: Tensor = self.first(hidden)
        return inner if self.second is None else self.second(F.gelu(inner))
