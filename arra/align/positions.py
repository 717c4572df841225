"""Which hidden states a target aligns: the paper's two, the patch-wise one, and the windows of two releases.

Legend: B batch, T sequence, S = T - 1 positions that a model is fed.
"""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

Target = Literal["hybnext", "at", "rep", "patch", "causal", "legacy-2025-11", "legacy-2025-03"]
"""hybnext: every position whose state predicts an image code (the paper's). at: every position that holds one. rep: the
token before the image (the paper's other). patch: as hybnext, each position to the feature of the patch that its code
paints. causal: as hybnext, each position to the feature of the picture down to the band it is painting. legacy-*: the
windows of the two published releases, counted from the end of the padded batch."""

BY_POSITION: tuple[Target, ...] = ("patch", "causal")
"""Every position has a target of its own."""
ON_GRID: tuple[Target, ...] = ("hybnext", "patch", "causal")
"""The states stand for the codes of the grid, one each."""
LEGACY_START, LEGACY_LAST = -1025, "legacy-2025-03"
"""The slice [-1025:-1] of the release of November 2025; the target whose one state is that of the very last token."""


def legacy_window(
    target: Target, shape: tuple[int, int], *, start: int = LEGACY_START, device: torch.device | None = None
) -> Bool[Tensor, "B T"]:
    """The states that a release aligned, of whole sequences in a padded batch.

    2025-11: hidden_states[:, -1025:-1], which starts at the sequence's beginning where that is shorter, and covers
    padding. 2025-03: the last one.
    Source: arra/model/modeling_xllmx_chameleon_align.py of both releases.
    """
    window = torch.zeros(shape, dtype=torch.bool, device=device)
    if target == LEGACY_LAST:
        window[:, -1] = True
    else:
        window[:, max(0, shape[1] + start) : -1] = True
    return window
