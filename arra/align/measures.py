"""How alike two sets of vectors of the same pictures are, and what can be read linearly from one of the other.

Training and `arra probe` look through these at hidden states beside an encoder's features. Nothing here is trained on.
Everything is computed in float64 and returned as Python numbers or float32 weights.
Legend: N pictures (or rows), A B D widths of vectors, F target's width, C classes, k neighbours.
Source: Kornblith et al. 2019 (linear CKA); Song et al. 2012, equation 5 (the unbiased HSIC); Huh et al. 2024 (CKNNA).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MIN_PICTURES = 4
"""What the unbiased HSIC needs."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Of the ridge, as multiples of the mean squared length that the states have along a direction they can have."""
STILL = 1e-6
"""States whose spread is this small beside their length are rounding, and tell nothing apart."""


def linear_cka(first: Float[Tensor, "N A"], second: Float[Tensor, "N B"]) -> float:
    """Unbiased linear CKA: 1 for vectors that are turned and scaled copies, about 0 for unrelated ones; in [-1, 1].

    It compares how pictures lie to each other, so it is free of rotation, scale and shift. The plain estimate grows
    with width over pictures, also between unrelated vectors; this one does not. 0 where one side does not vary.

    Raises:
        ValueError: fewer than four pictures.
    """
    _same_pictures(first, second, MIN_PICTURES)
    one, two = _centred(first), _centred(second)
    if one is None or two is None:
        return 0.0
    gram, other = one @ one.T, two @ two.T
    return _ratio(hsic_unbiased(gram, other), hsic_unbiased(gram, gram), hsic_unbiased(other, other))


def cknna(first: Float[Tensor, "N A"], second: Float[Tensor, "N B"], *, k: int = 10) -> float:
    """CKA on the k nearest neighbours that both sides agree on: 1 for the same neighbourhoods, about k / N by chance.

    Neighbours are by cosine, as published, so vectors with a large common direction still have theirs. With
    k = N - 1 it is the unbiased CKA of the directions. 0 where one side does not vary.

    Source: minyoungg/platonic-rep, metrics.py (`cknna`, unbiased), on rows of length one as its `measure_alignment`
    gives them; REPA uses k = 10.
    Raises:
        ValueError: fewer than four pictures, or k outside 2..N-1.
    """
    _same_pictures(first, second, MIN_PICTURES)
    count = len(first)
    if not 2 <= k < count:
        raise ValueError(f"k: {k} is outside 2..{count - 1} for {count} pictures")
    one, two = (F.normalize(each.double(), dim=1) for each in (first, second))
    if _centred(one) is None or _centred(two) is None:
        return 0.0
    gram, other = one @ one.T, two @ two.T
    near, near_other = _neighbours(gram, k), _neighbours(other, k)
    both = near * near_other
    return _ratio(
        hsic_unbiased(both * gram, both * other),
        hsic_unbiased(near * gram, near * gram),
        hsic_unbiased(near_other * other, near_other * other),
    )


def hsic_unbiased(first: Float[Tensor, "N N"], second: Float[Tensor, "N N"]) -> float:
    """The Hilbert-Schmidt independence criterion of two kernels, estimated without bias; their diagonals do not count.

    Source: Song et al. 2012, equation 5.
    """
    count = len(first)
    one, two = (each.clone().fill_diagonal_(0) for each in (first, second))
    products = (one * two.T).sum() + one.sum() * two.sum() / ((count - 1) * (count - 2))
    # the sum over a product of matrices, without making it
    crossed = one.sum(0) @ two.sum(1)
    return float((products - 2 * crossed / (count - 2)) / (count * (count - 3)))


def _neighbours(gram: Float[Tensor, "N N"], k: int) -> Float[Tensor, "N N"]:
    """1 where the column's picture is one of the row's k nearest."""
    others = gram.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(gram).scatter_(1, others.topk(k, dim=1).indices, 1.0)


def _centred(vectors: Float[Tensor, "N D"]) -> Float[Tensor, "N D"] | None:
    """The vectors around their mean; None where they are all the same up to rounding."""
    wide = vectors.double()
    centred = wide - wide.mean(0)
    return centred if float(centred.abs().max()) > STILL * float(wide.abs().max()) else None


def _ratio(shared: float, own: float, other: float) -> float:
    # a kernel cut to neighbours is not symmetric, and its estimate can then fall to nought or below
    return 0.0 if min(own, other) <= 0 else shared / (own * other) ** 0.5


def _same_pictures(first: Tensor, second: Tensor, least: int) -> None:
    if len(first) != len(second) or len(first) < least:
        raise ValueError(f"{len(first)} and {len(second)} pictures; expected the same ones, at least {least}")


@dataclass(frozen=True)
class Ridge:
    """An affine map fitted by ridge regression."""

    weight: Float[Tensor, "D F"]
    bias: Float[Tensor, " F"]
    strength: float
    """The chosen one of `STRENGTHS`."""

    def __call__(self, states: Float[Tensor, "*any D"]) -> Float[Tensor, "*any F"]:
        """What the map reads from states, in the targets' units."""
        return states @ self.weight.to(states) + self.bias.to(states)


def fit_ridge(
    states: Float[Tensor, "N D"], targets: Float[Tensor, "N F"], *, strengths: Sequence[float] = STRENGTHS
) -> Ridge:
    """The ridge map from states to targets whose leave-one-out error is smallest; rows must be independent pictures.

    Leaving out is exact and in closed form. States that do not vary give the targets' mean.
    """
    _same_pictures(states, targets, 2)
    mean, target_mean = states.double().mean(0), targets.double().mean(0)
    centred, wanted = _centred(states), targets.double() - target_mean
    if centred is None:
        zero = torch.zeros(states.shape[1], targets.shape[1], device=states.device)
        return Ridge(zero, target_mean.float(), max(strengths))
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    squares, inside = values.square(), left.T @ wanted
    unit = float(squares.sum()) / min(centred.shape)
    best, least = max(strengths), float("inf")
    for strength in sorted(strengths, reverse=True):  # of equals the stronger
        kept = squares / (squares + strength * unit)
        leverage = 1 / len(centred) + left.square() @ kept
        residuals = (wanted - left @ (kept[:, None] * inside)) / (1 - leverage).clamp(min=1e-9)[:, None]
        error = float(residuals.square().sum())
        if error < least:
            best, least = strength, error
    weight = right.T @ ((values / (squares + best * unit))[:, None] * inside)
    return Ridge(weight.float(), (target_mean - mean @ weight).float(), best)


@dataclass
class Moments:
    """Sums over many rows of states and targets, which a ridge can be fitted from without keeping the rows."""

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """x (D), y (F), xx (D, D), xy (D, F), yy (F)."""

    def add(self, states: Float[Tensor, "N D"], targets: Float[Tensor, "N F"]) -> None:
        """Nothing; the rows are counted in."""
        x, y = states.double(), targets.double()
        found = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y, "yy": y.square().sum(0)}
        self.count += len(x)
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def joined(self, other: "Moments") -> "Moments":
        """Of the rows of both."""
        return Moments(self.count + other.count, {name: value + other.sums[name] for name, value in self.sums.items()})

    def ridge(self, strength: float) -> Ridge:
        """The ridge map of these rows."""
        mean, target_mean = self.sums["x"] / self.count, self.sums["y"] / self.count
        scatter = self.sums["xx"] - self.count * torch.outer(mean, mean)
        shared = self.sums["xy"] - self.count * torch.outer(mean, target_mean)
        size = len(mean)
        unit = float(scatter.trace()) / min(size, max(1, self.count - 1))
        if unit <= STILL**2 * float(self.sums["xx"].trace()) / size:
            weight = torch.zeros_like(shared)
        else:
            eye = torch.eye(size, dtype=scatter.dtype, device=scatter.device)
            weight = torch.cholesky_solve(shared, torch.linalg.cholesky(scatter + strength * unit * eye))
        return Ridge(weight.float(), (target_mean - mean @ weight).float(), strength)

    def error(self, ridge: Ridge) -> float:
        """Sum of the map's squared errors on these rows."""
        s, weight, bias = self.sums, ridge.weight.double(), ridge.bias.double()
        predicted = (weight * (s["xx"] @ weight)).sum() + 2 * bias @ (s["x"] @ weight) + self.count * bias @ bias
        crossed = (weight * s["xy"]).sum() + bias @ s["y"]
        return float(s["yy"].sum() + predicted - 2 * crossed)


def fit_shared_ridge(first: Moments, second: Moments, *, strengths: Sequence[float] = STRENGTHS) -> Ridge:
    """The ridge map of all rows, its strength the one with which each part reads the other best.

    For rows that are not independent (positions of one picture): no picture may be in both parts.
    """
    errors = {
        strength: second.error(first.ridge(strength)) + first.error(second.ridge(strength)) for strength in strengths
    }
    best = min(sorted(errors, reverse=True), key=lambda strength: errors[strength])
    return first.joined(second).ridge(best)


@dataclass(frozen=True)
class Reading:
    """How well targets were read from states that the map was not fitted on."""

    cosine: float
    """Mean cosine of what is read with the target, both around the mean that was known before; in [-1, 1]."""
    r2: float
    """Share of the targets' squared distance to that mean that is explained; 1 is all, 0 none, below 0 is worse."""


def reading(predicted: Float[Tensor, "N F"], targets: Float[Tensor, "N F"], *, mean: Float[Tensor, " F"]) -> Reading:
    """The score of predictions; `mean` is that of the targets which the map was fitted on."""
    found, wanted = predicted.double() - mean.double(), targets.double() - mean.double()
    total = float(wanted.square().sum())
    r2 = 1 - float((found - wanted).square().sum()) / total if total > 0 else 0.0
    return Reading(float(F.cosine_similarity(found, wanted, dim=1).mean()), r2)


def classified(
    states: Float[Tensor, "N D"],
    classes: Int[Tensor, " N"],
    held_out: Float[Tensor, "M D"],
    held_out_classes: Int[Tensor, " M"],
) -> tuple[float, float]:
    """Accuracy on held-out pictures of a linear classifier (ridge to class indicators), and of the majority guess."""
    count = int(classes.max()) + 1
    indicators = F.one_hot(classes, count).float()
    guessed = fit_ridge(states, indicators)(held_out).argmax(1)
    majority = int(classes.bincount().argmax())
    accuracy = float((guessed == held_out_classes).double().mean())
    return accuracy, float((held_out_classes == majority).double().mean())
