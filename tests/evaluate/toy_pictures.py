"""Sets of drawn pictures and a space of a few numbers, so that passes can be tested without networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class ToyPictures:
    """Pictures in memory that count how often they are read."""

    images: list[np.ndarray]
    name: str = "toy"
    prompts: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    records: Sequence[str] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    resize: str = "none"
    content: str = "one"
    num_read: int = 0

    def __post_init__(self) -> None:
        self.ids: Sequence[str] = [f"{row:03d}" for row in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int]) -> list[np.ndarray]:
        self.num_read += len(rows)
        return [self.images[row] for row in rows]

    def content_hash(self) -> str:
        return self.content


def drawn(count: int, *, seed: int = 0, sides: Sequence[tuple[int, int]] = ((8, 8),)) -> list[np.ndarray]:
    """Noise of several sizes in turn."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*sides[row % len(sides)], 3), dtype=np.uint8) for row in range(count)]


class ToySpace:
    """Twelve numbers a picture, and three "logits"."""

    def __init__(self, *, name: str = "toy", weights: str = "w1", resize: str = "as it is") -> None:
        self.name, self.weights_sha256, self.family, self.resize = name, weights, "toy", resize
        self.sizes: Mapping[str, int] = {"features": 12, "logits": 3}

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        x = images.float().permute(0, 3, 1, 2) / 255
        features = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return {"features": features, "logits": features[:, :3]}
