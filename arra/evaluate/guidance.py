"""A search over sampling settings: how many pictures each is tried on, which go on, what may be said of the winner.

    settings, rounds --halve--> PaintsAndJudges (paints what is missing) --> per-picture values --> Trial of each

Every setting paints the same prompts with the same seeds, and a round's pictures are those of the round before and some
more: differences are paired, and no picture is painted twice. Nothing in here knows a model.
Source: successive halving, Jamieson and Talwalkar 2016 (arXiv 1502.07943), with a third kept.
Legend: N pictures, M references, F features, R resamples.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import NormalDist
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.card import values_key, values_statistic
from arra.evaluate.distances import LEVEL, NUM_RESAMPLES, FrechetStatistic, draw_counts
from arra.sample.logits import SamplingSettings

REFERENCE = "reconstructions"
"""What distances are taken to: held-out pictures through the tokenizer, which is what a perfect model would paint."""
KEPT_SHARE = 3
"""Of so many settings one goes on to the next round, on as many times more pictures: rounds cost about the same."""
FEWEST_IMAGES = 24
"""Of a round: with fewer the order of settings is mostly noise."""
FINALISTS = 4
"""At least as many are tried on all pictures."""

Role = Literal["winner", "before", "no guidance"]
"""`before` is how the recipe says that the run paints."""


@runtime_checkable
class PaintsAndJudges(Protocol):
    """Called as judge(settings, N)."""

    def __call__(self, settings: SamplingSettings, num_images: int) -> Mapping[str, Tensor]:
        """Of the first N pictures of these settings, by `values_key`: features, ranks, groups; and all M references
        (M >= N), the first of which are of the same prompts, with `reference_groups`.
        """
        ...


@dataclass(frozen=True)
class Round:
    """So many settings, each tried on the first so many pictures."""

    num_settings: int
    num_images: int


@dataclass(frozen=True)
class Trial:
    """What came of one of the settings."""

    settings: SamplingSettings
    num_images: int
    """On which it was judged: all, or those of the round that it was dropped in."""
    values: Mapping[str, float]
    """Of every measure, on those pictures."""
    score: float
    """What the search makes small, on those pictures."""
    difference: float = 0.0
    """Its score minus the winner's on the same pictures."""
    margin: float = 0.0
    """Half the width of the difference's interval, which holds for all settings together."""
    roles: tuple[Role, ...] = ()

    @property
    def is_within_noise(self) -> bool:
        """Whether these pictures leave open which of the two is better; true of the winner itself."""
        return self.difference <= self.margin


@dataclass(frozen=True)
class Objective:
    """What is made small: the mean over metrics, each as a share of what it is without guidance; one alone is itself.

    Metrics where more is better enter with a minus.
    """

    metrics: tuple[str, ...]
    split: str
    num_components: int | None
    scales: tuple[float, ...] = field(default=())
    """What each is divided by; empty for one metric."""

    def scaled(self, plain: Mapping[str, float]) -> "Objective":
        """The same, with the scales that follow from the values without guidance."""
        if len(self.metrics) == 1:
            return self
        return dataclasses.replace(self, scales=tuple(abs(plain[metric]) or 1.0 for metric in self.metrics))

    def score(self, values: Mapping[str, float]) -> float:
        """The score of values by metric."""
        scales = self.scales or (1.0,) * len(self.metrics)
        parts = [direction(name) * values[name] / scale for name, scale in zip(self.metrics, scales, strict=True)]
        return sum(parts) / len(parts)

    def resampled(self, values: Mapping[str, Tensor], *, num_resamples: int, seed: int) -> Float[np.ndarray, " R"]:
        """The score on resamples of pictures and references: the same ones for the same numbers of them and seed."""
        statistics = {metric: self._statistic(values, metric) for metric in self.metrics}
        groups = values[values_key("groups", split=self.split)]
        num_references = len(values[values_key("reference_groups", split=self.split)])
        how: dict[str, Any] = {"num_resamples": num_resamples}
        draws = draw_counts(len(groups), **how, seed=seed, groups=groups if len(groups.unique()) > 1 else None)
        others = draw_counts(num_references, **how, seed=seed + 1)
        return np.array(
            [
                self.score({name: each(counts, references) for name, each in statistics.items()})
                for counts, references in zip(draws, others, strict=True)
            ]
        )

    def measured(self, values: Mapping[str, Tensor], metrics: Sequence[str]) -> dict[str, float]:
        """Every named measure of the pictures."""
        num_images = len(values[values_key("groups", split=self.split)])
        num_references = len(values[values_key("reference_groups", split=self.split)])
        ones, others = np.ones(num_images), np.ones(num_references)
        return {metric: float(self._statistic(values, metric)(ones, others)) for metric in metrics}

    def _statistic(self, values: Mapping[str, Tensor], metric: str) -> Callable[[np.ndarray, np.ndarray], float]:
        distance = re.fullmatch(r"(.+_)?(frechet|kid_x1000)", metric)
        if distance is None:
            mean = values_statistic(values, metric=metric, split=self.split)
            return lambda counts, _: mean(counts)
        prefix = distance[1] or ""
        seen = values[values_key(f"{prefix}features", split=self.split)].float()
        references = values[values_key(f"reference/{prefix}{REFERENCE}", split=self.split)].float()
        if distance[2] == "frechet":
            return FrechetStatistic(seen, references, num_components=self.num_components)
        return StrangersKernel(seen, references)


class StrangersKernel:
    """The kernel distance x1000 as a function of counts, without the pairs of a picture and its own reference.

    Picture i and reference i (of M >= N) share a prompt and are more alike than pictures that were drawn apart: with
    these pairs N pictures would be nearer to the references than any number of others, the more so the fewer they are.
    Source: Binkowski et al. 2018 (KID).
    """

    def __init__(self, pictures: Float[Tensor, "N F"], references: Float[Tensor, "M F"]) -> None:
        x, y = pictures.double().numpy(), references.double().numpy()
        self.within, self.across, self.among = _kernel(x, x), _kernel(x, y), _kernel(y, y)
        self.others = np.ones_like(self.across)
        np.fill_diagonal(self.others, 0.0)
        for matrix in (self.within, self.across, self.among):
            np.fill_diagonal(matrix, 0.0)

    def __call__(self, counts: Float[np.ndarray, " N"], reference_counts: Float[np.ndarray, " M"]) -> float:
        """The distance on a resample; pairs of a picture with its own copy are left out."""
        across = counts @ self.across @ reference_counts / (counts @ self.others @ reference_counts)
        within = counts @ self.within @ counts / _num_pairs(counts)
        among = reference_counts @ self.among @ reference_counts / _num_pairs(reference_counts)
        return float(1000 * (within + among - 2 * across))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    product: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return product


def _num_pairs(counts: np.ndarray) -> float:
    return float(counts.sum() ** 2 - (counts**2).sum())


def direction(metric: str) -> int:
    """1 for distances, where less is better; -1 for shares of hits."""
    return 1 if metric.endswith(("frechet", "kid_x1000")) else -1


def plan_rounds(num_settings: int, *, num_images: int, num_kept: int = 0, budget: int | None = None) -> list[Round]:
    """The rounds of a search that ends with `num_images` pictures of each finalist; `num_kept` settings are in all.

    With a budget, in pictures, the finalists get as many as it allows, and no more than `num_images`.

    Raises:
        ArraError: the budget is too small for so many settings.
    """
    if budget is None:
        return _rounds(num_settings, num_images, num_kept)
    fewest = min(FEWEST_IMAGES, num_images)
    for images in range(num_images, fewest - 1, -1):
        rounds = _rounds(num_settings, images, num_kept)
        if num_pictures(rounds) <= budget:
            return rounds
    least = num_pictures(_rounds(num_settings, fewest, num_kept))
    raise ArraError(
        f"--budget: {num_settings} settings need at least {least} pictures, the budget has {budget}; raise it, or try "
        "fewer settings (--cfg, --schedule, --top-k, --temperature)"
    )


def _rounds(num_settings: int, num_images: int, num_kept: int) -> list[Round]:
    tried, images = [num_settings], [num_images]
    while images[0] // KEPT_SHARE >= FEWEST_IMAGES and tried[-1] > FINALISTS + num_kept:
        best = max(FINALISTS, ceil(num_settings / KEPT_SHARE ** len(tried)))
        tried.append(min(tried[-1], best + num_kept))
        images.insert(0, images[0] // KEPT_SHARE)
    return [Round(*each) for each in zip(tried, images, strict=True)]


def num_pictures(rounds: Sequence[Round]) -> int:
    """How many pictures the rounds paint; those of the round before count once."""
    before = [0, *(each.num_images for each in rounds)]
    return sum(each.num_settings * (each.num_images - had) for each, had in zip(rounds, before, strict=False))


def halve(
    settings: Mapping[SamplingSettings, tuple[Role, ...]],
    rounds: Sequence[Round],
    judge: PaintsAndJudges,
    *,
    objective: Objective,
    metrics: Sequence[str],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    told: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """A trial for each of the settings, the winner first, then finalists, then those dropped last; by score.

    Settings with a role stay in to the end; the one of `no guidance` must be there, metrics that are joined are shares
    of its values. The interval of a difference is normal, from paired resamples of whole groups, and Bonferroni's: all
    of them hold together.
    """
    plain = next(each for each, roles in settings.items() if "no guidance" in roles)
    left, trials = list(settings), list[Trial]()
    for number, (this, after) in enumerate(pairwise([*rounds, Round(0, 0)])):
        told(f"round {number + 1} of {len(rounds)}: {len(left)} settings, {this.num_images} pictures each")
        found = {each: objective.measured(judge(each, this.num_images), metrics) for each in left}
        scaled = objective.scaled(found[plain])
        tried = [Trial(each, this.num_images, found[each], scaled.score(found[each])) for each in left]
        tried.sort(key=lambda trial: trial.score)
        kept = [trial.settings for trial in tried if settings[trial.settings]]
        best = [trial.settings for trial in tried if not settings[trial.settings]]
        left = kept + best[: max(0, after.num_settings - len(kept))] if after.num_settings else []
        trials = [trial for trial in tried if trial.settings not in left] + trials
    told("comparing")
    winner = trials[0].settings
    z = NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * max(1, len(trials) - 1)))
    of_winner, compared = {}, []
    for trial in trials:
        roles: tuple[Role, ...] = (*(("winner",) if trial.settings == winner else ()), *settings[trial.settings])
        n = trial.num_images
        same = objective.scaled(objective.measured(judge(plain, n), objective.metrics))
        if n not in of_winner:
            values = judge(winner, n)
            score = same.score(objective.measured(values, objective.metrics))
            of_winner[n] = score, same.resampled(values, num_resamples=num_resamples, seed=seed)
        score, resampled = of_winner[n]
        spread = same.resampled(judge(trial.settings, n), num_resamples=num_resamples, seed=seed) - resampled
        compared.append(
            dataclasses.replace(trial, difference=trial.score - score, margin=z * float(spread.std()), roles=roles)
        )
    return compared
