"""How a prompt or a caption becomes the prefix of a sequence: training, sampling, evaluation write it with this code.

Legend: B captions, C prefix positions, F caption feature.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from arra.errors import ArraError

PAD = 0
BOI = 1


def text_prefix(ids: Sequence[int], prefix_length: int) -> tuple[list[int], list[bool]]:
    """Tokens and mask (True = real) of a prefix: padding on the left, then the ids, then the begin-of-image token.

    Raises: ArraError when the ids and the begin-of-image token do not fit.
    """
    if len(ids) + 1 > prefix_length:
        raise ArraError(
            f"prompt: {len(ids)} tokens and the begin-of-image token do not fit the {prefix_length} prefix positions; "
            "shorten the prompt or train with a longer prefix"
        )
    padding = prefix_length - len(ids) - 1
    return [PAD] * padding + [*ids, BOI], [False] * padding + [True] * (len(ids) + 1)


def caption_prefix(
    features: Sequence[Float[np.ndarray, "_ F"]], prefix_length: int, *, width: int
) -> tuple[Float[Tensor, "B C F"], Bool[Tensor, "B C"]]:
    """Caption features of their own lengths as one array, in their type: zeros on the left, where the mask is False.

    Raises: ArraError when there are more vectors than positions.
    """
    longest = max(map(len, features), default=0)
    if longest > prefix_length:
        raise ArraError(
            f"caption features: {longest} vectors do not fit the {prefix_length} prefix positions; raise "
            "model.prefix_length, or make them with fewer"
        )
    dtype = features[0].dtype if features else np.dtype(np.float32)
    padded = np.zeros((len(features), prefix_length, width), dtype)
    mask = np.zeros(padded.shape[:2], dtype=bool)
    for place, value in enumerate(features):
        padded[place, prefix_length - len(value) :] = value
        mask[place, prefix_length - len(value) :] = True
    return torch.from_numpy(padded), torch.from_numpy(mask)
