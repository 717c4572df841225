"""Which hidden states a target aligns: the paper's two, the patch-wise one, and the windows of two releases.

Legend: B batch, T sequence, S = T - 1 positions that a model is fed, N images that have positions, M positions of all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
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


@dataclass(frozen=True)
class Places:
    """The true places of a mask, as numbers: found on the CPU, where that makes nobody wait for an accelerator."""

    at: Int64[Tensor, " M"]
    """Row times T plus position, in their order."""
    image: Int64[Tensor, " M"]
    """The row of each."""
    rows: Int64[Tensor, " N"]
    """Those that have any."""
    counts: tuple[int, ...]
    """How many each of them has."""
    shape: tuple[int, int]
    """(B, T) of the mask."""

    @classmethod
    def of(cls, mask: "Bool[Tensor, 'B T'] | Places") -> "Places":
        """Those of a mask, on its device."""
        if isinstance(mask, Places):
            return mask
        image = mask.nonzero()[:, 0]
        per_row = mask.sum(1)
        rows = per_row.nonzero()[:, 0]
        return cls(
            at=mask.flatten().nonzero()[:, 0],
            image=image,
            rows=rows,
            counts=tuple(per_row[rows].tolist()),
            shape=(mask.shape[0], mask.shape[1]),
        )

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Places":
        """The same with every tensor changed, as by a move to a device."""
        return replace(self, at=change(self.at), image=change(self.image), rows=change(self.rows))

    def of_states(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "M D"]:
        """The states at the places.

        Raises:
            ValueError: the places are of a mask of another shape.
        """
        if tuple(states.shape[:2]) != self.shape:
            raise ValueError(f"places of {self.shape} for states of {tuple(states.shape[:2])}")
        return states.flatten(0, 1).index_select(0, self.at)


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
