"""The projector from hidden states to the target space; thrown away after training.

Legend: D model, H inner width, G target feature.
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Projector(nn.Module):
    """A two-layer MLP, Linear - GELU - Linear, as in the paper.

    Its first weights come from a generator of its own, so that a model trains the same with or without it.
    """

    def __init__(self, hidden_size: int, target_size: int, *, inner_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        inner = inner_size or target_size
        self.first = nn.utils.skip_init(nn.Linear, hidden_size, inner)
        self.second = nn.utils.skip_init(nn.Linear, inner, target_size)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features), generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any G"]:
        return cast(Tensor, self.second(nn.functional.gelu(self.first(hidden))))
