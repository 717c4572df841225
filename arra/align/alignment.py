"""The alignment term as an object: it names the layer to capture and turns captured states into one loss.

Legend: B batch, T sequence, D model, F encoder feature, G target feature, N images that have positions, P positions of
an image, M of all images, C candidates.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from arra.align.losses import CONTRASTING, Loss, distances, image_means, same_rows
from arra.align.positions import BY_POSITION, ON_GRID, Places, Target
from arra.align.projector import Projector, ProjectorKind
from arra.align.schedule import Balance, WeightSchedule, position_shares
from arra.align.targets import TargetSpace, on_grid, spatially_normalized

MAIN = "main"
"""Name of the one term that there always is."""


class Alignment(nn.Module):
    """`weight` * distance between projected hidden states of `layer` and the image's feature.

    `layer` 0 is the embeddings, k the residual stream after the k-th block. `target` names the positions: "hybnext"
    every one whose state predicts an image code, "at" every one that holds one, and more (`positions.Target`).
    `encoder` says which of several teachers' features it wants. The projector is the only part with parameters.
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
        loss: Loss = "cosine",
        weight: float = 1.0,
        projector: ProjectorKind = "mlp",
        inner_size: int | None = None,
        space: TargetSpace | None = None,
        encoder: str = "teacher",
        temperature: float = 0.1,
        spatial_norm: float | None = None,
        position_power: float = 0.0,
        schedule: WeightSchedule | None = None,
        balance: Balance | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for word, value, known in (
            ("target", target, Target),
            ("loss", loss, Loss),
            ("projector", projector, ProjectorKind),
        ):
            if value not in get_args(known):
                raise ValueError(f"{word} {value!r}: expected one of {', '.join(get_args(known))}")
        if projector == "conv" and target not in ON_GRID:
            raise ValueError(f"a convolution needs a state for every code of the grid; target {target!r} has not")
        if loss in CONTRASTING and target == "causal":
            raise ValueError(f"loss {loss!r} compares whole pictures or patches, which target 'causal' has not")
        if spatial_norm is not None and target != "patch":
            raise ValueError(f"spatial_norm is of patches; target {target!r} has none")
        self.layer, self.weight, self.target, self.loss = layer, weight, target, loss
        self.encoder, self.temperature, self.spatial_norm = encoder, temperature, spatial_norm
        self.position_power, self.balance = position_power, balance
        self.schedule = schedule or WeightSchedule()
        space = space or TargetSpace(torch.zeros(feature_size))
        # buffers, so that the space moves to a device with the projector; never saved
        self.register_buffer("target_mean", space.mean, persistent=False)
        self.register_buffer("target_axes", space.axes, persistent=False)
        self.projector = Projector(hidden_size, space.size, kind=projector, inner_size=inner_size, seed=seed)

    @property
    def contrasts_pictures(self) -> bool:
        """Whether a state's loss depends on the features of other pictures of the batch."""
        return self.loss in CONTRASTING and self.target not in BY_POSITION

    @property
    def space(self) -> TargetSpace:
        """The target space, on this module's device."""
        return TargetSpace(self.target_mean, self.target_axes)

    def weight_at(self, step: int, *, steps: int) -> float:
        """Its weight at a step counted from 0, schedule and balance taken in."""
        factor = self.schedule.factor(step, steps=steps)
        return self.weight * factor * (1.0 if self.balance is None else self.balance.factor)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        features: Float[Tensor, "B F"] | Float[Tensor, "B P F"],
        positions: Bool[Tensor, "B T"] | Places,
        *,
        grid: tuple[int, int] | None = None,
        candidates: Float[Tensor, "C F"] | None = None,
    ) -> Float[Tensor, ""]:
        """The unweighted loss, mean over each image's positions, then over images that have any.

        Features get no gradient. `grid` is needed by what knows where a position lies: target "patch" and the
        convolution. `candidates` are the features of the whole batch, of which this may be a part; None takes these.
        Without any position it is 0, and gradients are zeros.
        Source: the released ARRA code averages in this order.
        """
        places = Places.of(positions)
        each = self._each(hidden, features, places, grid, candidates)
        per_image = image_means(each, places.image, self._shares(places), len(hidden))
        return per_image.sum() / max(1, len(places.counts))

    def each(
        self,
        hidden: Float[Tensor, "B T D"],
        features: Float[Tensor, "B F"] | Float[Tensor, "B P F"],
        positions: Bool[Tensor, "B T"] | Places,
        *,
        grid: tuple[int, int] | None = None,
        candidates: Float[Tensor, "C F"] | None = None,
    ) -> Float[Tensor, "N Q"]:
        """The distance at every position, for the images that have any (all as many)."""
        places = Places.of(positions)
        return self._each(hidden, features, places, grid, candidates).unflatten(0, (len(places.counts), -1))

    def _each(
        self,
        hidden: Tensor,
        features: Tensor,
        places: Places,
        grid: tuple[int, int] | None,
        candidates: Tensor | None,
    ) -> Float[Tensor, " M"]:
        """Distances."""
        # frozen parts of a model may be narrower, and autocast narrows what it likes
        states = places.of_states(hidden).to(self.projector.dtype or self.target_mean.dtype)
        count, rows, image = len(places.counts), places.rows, places.image
        if self.projector.kind == "conv":
            assert grid is not None
            projected = self.projector(states.unflatten(0, (count, grid[0] * grid[1])), grid=grid).flatten(0, 1)
        else:
            projected = self.projector(states)
        if not count:  # what is left out of a step would have no gradient instead of none: parameters and states
            return projected.sum(1)
        if self.target not in BY_POSITION:
            whole = self.space(features).detach()
            others = same = None
            if self.loss in CONTRASTING:
                pictures = (
                    features.index_select(0, rows) if candidates is None else candidates
                )  # of text there are none
                others = self.space(pictures).detach()
                # told by the features themselves: their space may round a row otherwise in another batch
                same = same_rows(features, pictures)[image]
            return self._distances(projected, whole[image], others, same)
        own = features.index_select(0, rows)
        targets = self.space(self._by_position(own, places.counts[0], grid)).detach()
        if self.loss in CONTRASTING:
            parts = zip(projected.unflatten(0, targets.shape[:2]), targets, strict=True)
            return torch.cat([self._distances(one, each, each) for one, each in parts])
        return self._distances(projected, targets.flatten(0, 1), None)

    def _distances(
        self, projected: Tensor, target: Tensor, candidates: Tensor | None, same: Tensor | None = None
    ) -> Tensor:
        return distances(
            projected, target, loss=self.loss, candidates=candidates, same=same, temperature=self.temperature
        )

    def _by_position(self, features: Tensor, count: int, grid: tuple[int, int] | None) -> Float[Tensor, "N P F"]:
        """What each position is aligned with, of `count` positions."""
        if self.target == "patch":
            assert grid is not None
            return patch_targets(features, grid, self.spatial_norm)
        bands = features.shape[1]
        return features[:, torch.arange(count, device=features.device) * bands // count]

    def _shares(self, places: Places) -> Float[Tensor, " M"]:
        """The weight of every position within its image."""
        device = places.image.device
        if not self.position_power or not places.counts:
            return torch.ones_like(places.image, dtype=torch.float32)
        return torch.cat([_shares(count, self.position_power, device) for count in places.counts])


class Alignments(nn.Module):
    """Several alignment terms of one model, by name; the first is `main`."""

    def __init__(self, terms: Mapping[str, Alignment]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)

    @classmethod
    def of(cls, alignment: "Alignment | Alignments | None") -> "Alignments | None":
        """The terms; one alone becomes `main`."""
        return cls({MAIN: alignment}) if isinstance(alignment, Alignment) else alignment

    def __getitem__(self, name: str) -> Alignment:
        return cast(Alignment, self.terms[name])

    def items(self) -> list[tuple[str, Alignment]]:
        """Names and terms."""
        return [(name, cast(Alignment, term)) for name, term in self.terms.items()]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to capture, each once."""
        return tuple(sorted({term.layer for _, term in self.items()}))

    def weights_at(self, step: int, *, steps: int) -> dict[str, float]:
        """Every term's weight at a step counted from 0."""
        return {name: term.weight_at(step, steps=steps) for name, term in self.items()}


def patch_targets(
    patches: Float[Tensor, "N P F"], grid: tuple[int, int], spatial_norm: float | None
) -> Float[Tensor, "N Q F"]:
    """The features of patches at the places of the codes."""
    if spatial_norm is not None:
        patches = spatially_normalized(patches, spatial_norm)
    return on_grid(patches, grid)


@lru_cache(maxsize=16)
def _shares(count: int, power: float, device: torch.device) -> Float[Tensor, " P"]:
    return torch.tensor(position_shares(count, power), device=device)
