"""What differs between two evaluated models or sets of pictures, and what an interval allows to say about it.

Place in the pipeline: reads two evaluations (`evaluate/card.py`); `report/` prints what comes back. Nothing in here
knows which one is expected to win: swapping the two flips every sign and every verdict.

Pairs. Pictures that were asked for the same thing are drawn together, so what is hard or easy about it cancels: of two
runs always (they see the same held-out records), of two sets where both were asked for the same prompts or classes in
the same order (`asked_hash`), of recall and coverage always (the reference is one). Sets of different pictures are
drawn apart.

Letters: N pictures, R resamples, S statistics.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.card import (
    ASKED,
    NEEDS_EQUAL_NUMBERS,
    Better,
    Evaluation,
    Result,
    describe,
    row_statistic,
    values_key,
)
from arra.evaluate.collecting import KEPT_VECTORS
from arra.evaluate.distances import (
    LEVEL,
    NUM_RESAMPLES,
    Interval,
    MeanStatistic,
    Statistic,
    draw_counts,
    percentile_interval,
)

MOST_GAPS = 6
"""Of two protocols, named in one message."""
Verdict = Literal["better", "worse", "no clear difference"]

OF_PAIRS = frozenset({"ms_ssim_within"})
"""Metrics whose values are of pairs of pictures, so of fewer than there are pictures."""

SMALLEST_P = 1e-6
"""Nothing below is told: so far out, a normal approximation from some hundred resamples says nothing."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One measurement of both; `difference` is candidate minus baseline, `low` and `high` its interval."""

    metric: str
    split: str
    cfg_scale: float | None
    reference: str | None
    baseline: float
    candidate: float
    difference: float
    low: float
    high: float
    better: Better
    verdict: Verdict
    unit: str
    num_images: int
    """Of the baseline."""
    space: str | None = None
    is_paired: bool = True
    """Whether pictures of both were drawn together."""
    p: float = 1.0
    """Probability of a difference at least so large, either way, if it were noise: see `noise_probability`."""
    p_corrected: float = 1.0
    """The same after Holm, for as many rows as were compared."""
    marks: tuple[str, ...] = ()
    """What must stand beside the numbers, of either card."""


@dataclass(frozen=True, kw_only=True)
class SeedDifference:
    """One measurement over several training seeds: means over seeds, and a t-interval of the paired differences.

    `low`, `high` are None and the verdict is "no clear difference" with a single seed: it says nothing of other seeds.
    """

    metric: str
    split: str
    cfg_scale: float | None
    reference: str | None
    baseline: float
    candidate: float
    difference: float
    low: float | None
    high: float | None
    better: Better
    verdict: Verdict
    unit: str
    num_images: int
    per_seed: tuple[Difference, ...]
    space: str | None = None

    @property
    def num_better(self) -> int:
        """Seeds whose difference points to the candidate, whatever its size."""
        return sum(one.difference < 0 if self.better == "lower" else one.difference > 0 for one in self.per_seed)


def compare(
    baseline: Evaluation,
    candidate: Evaluation,
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Difference]:
    """One `Difference` per model row of the cards, in their order, by a bootstrap over pictures, paired where they are.

    Paired rows are evaluated on the same resamples, so what is hard or easy about a picture cancels. The interval tells
    what other pictures would change; another training seed is another matter, see `compare_seeds`. Verdicts are of one
    row alone; with many rows read `p_corrected`. Where the two disagree on fewer than about six pictures, the interval
    of a retrieval difference is too narrow.

    Raises: ArraError when the cards cannot be compared: other protocol, rows, numbers of pictures or references, or
    values that are missing or do not give the number on the card.
    """
    require_same_protocol(baseline, candidate)
    others = {row.key: row for row in candidate.card.results}
    rows = [row for row in baseline.card.results if row.subject == "model"]
    matched = [others[row.key] for row in rows]
    first = [checked_statistic(row, baseline) for row in rows]
    second = [checked_statistic(row, candidate) for row in matched]
    same_pictures = _same_pictures(baseline, candidate)
    paired = [
        (same_pictures or row.of == "reference") and one.num_images == other.num_images
        for row, one, other in zip(rows, first, second, strict=True)
    ]
    groups = [groups_of(row, one, baseline) for row, one in zip(rows, first, strict=True)]
    others_groups = [groups_of(row, one, candidate) for row, one in zip(matched, second, strict=True)]
    for place in np.flatnonzero(paired).tolist():  # drawn together, so grouped alike: also where one card says less
        groups[place] = others_groups[place] = others_groups[place] if groups[place] is None else groups[place]
    seeds = [seed if is_paired else seed + 1 for is_paired in paired]
    drawn_first = _resampled(first, groups, num_resamples=num_resamples, seeds=[seed] * len(rows))
    drawn_second = _resampled(second, others_groups, num_resamples=num_resamples, seeds=seeds)
    differences = []
    for place, (row, other) in enumerate(zip(rows, matched, strict=True)):
        gaps = drawn_second[:, place] - drawn_first[:, place]
        center = not isinstance(first[place], MeanStatistic)
        interval = percentile_interval(other.value - row.value, gaps, center=center, level=level)
        differences.append(
            Difference(
                metric=row.metric,
                split=row.split,
                cfg_scale=row.cfg_scale,
                reference=row.reference,
                baseline=row.value,
                candidate=other.value,
                difference=interval.value,
                low=interval.low,
                high=interval.high,
                better=row.better,
                verdict=decide(interval, better=row.better),
                unit=row.unit,
                num_images=row.num_images,
                space=row.space,
                is_paired=paired[place],
                p=noise_probability(interval.value, gaps),
                marks=tuple(dict.fromkeys((*row.marks, *other.marks))),
            )
        )
    corrected = holm([one.p for one in differences])
    return [replace(one, p_corrected=p) for one, p in zip(differences, corrected, strict=True)]


def compare_seeds(
    pairs: Sequence[tuple[Evaluation, Evaluation]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> list[SeedDifference]:
    """One `SeedDifference` per model row, from (baseline, candidate) pairs that share a training seed each.

    The t-interval takes the pictures as given and tells what other training seeds would change; the intervals in
    `per_seed` do the opposite. With two or three seeds it is very wide, and rightly so.

    Raises: ArraError as `compare`, also between seeds.
    """
    if not pairs:
        raise ArraError("no pair of runs to compare; name at least one baseline and one candidate")
    for pair in pairs[1:]:
        require_same_protocol(pairs[0][0], pair[0])
    tables = [compare(*pair, num_resamples=num_resamples, level=level, seed=seed) for pair in pairs]
    by_key = [{_row_of(one): one for one in table} for table in tables]
    return [_over_seeds(tuple(table[_row_of(one)] for table in by_key), level=level) for one in tables[0]]


def decide(interval: Interval, *, better: Better) -> Verdict:
    """What an interval of (candidate - baseline) says, and nothing but the interval."""
    if interval.low <= 0 <= interval.high:
        return "no clear difference"
    return "better" if (interval.high < 0) == (better == "lower") else "worse"


def noise_probability(difference: float, resampled: Float[np.ndarray, "R"]) -> float:
    """The two-sided p-value of a difference, from its spread over resamples: 2 P(Z > |difference| / spread), Z normal.

    Not a count of resamples beyond zero: that is never below 1 / (R + 1), too coarse to correct for many rows. It is at
    least `SMALLEST_P`, and 1 where both are the same on every resample.
    """
    if difference == 0:
        return 1.0
    spread = float(resampled.std(ddof=1))
    tail = NormalDist().cdf(-abs(difference) / spread) if spread > 0 else 0.0
    return max(2 * tail, SMALLEST_P)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: none is smaller than before, and their order stays.

    Source: Holm 1979, the step-down correction; it needs no independence.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def student_t_quantile(level: float, *, degrees: int) -> float:
    """The t with P(|T| <= t) = `level` for Student's distribution, to about 1e-9.

    With T = sqrt(degrees) tan(angle) the density becomes cos(angle)^(degrees - 1), bounded on a bounded range; the core
    has no other use for scipy.
    """
    half_pi = math.pi / 2
    nodes, weights = _legendre()

    def mass(angle: float) -> float:
        return float(weights @ np.cos((nodes + 1) / 2 * angle) ** (degrees - 1) * angle / 2)

    total, low, high = mass(half_pi), 0.0, half_pi
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < level * total else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


@lru_cache(maxsize=1)
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a quadrature on [-1, 1]; a p-value asks for them dozens of times."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return nodes, weights


def checked_statistic(row: Result, evaluation: Evaluation) -> Statistic:
    """The statistic behind a row of a card.

    Raises: ArraError when the values do not give the row's number.
    """
    where = f"{evaluation.card.run}: {describe(row)}"
    try:
        statistic = row_statistic(row, evaluation.values, num_components=evaluation.num_components)
    except ArraError as error:
        raise ArraError(f"{where}: {error}") from error
    is_of_some = row.metric in OF_PAIRS or row.num_images > KEPT_VECTORS
    may_be_fewer = is_of_some and statistic.num_images < row.num_images
    if row.of == "generated" and statistic.num_images != row.num_images and not may_be_fewer:
        raise ArraError(
            f"{where}: the card says {row.num_images} pictures, its values have {statistic.num_images}; "
            "run `arra evaluate` again"
        )
    recomputed = statistic(np.ones(statistic.num_images))
    # Values are stored as float32, so the number comes back to about 1e-5 of its size; anything more is a mix-up.
    if not math.isclose(recomputed, row.value, rel_tol=1e-3, abs_tol=1e-3):
        raise ArraError(
            f"{where}: the card says {row.value:.6g}, its values {recomputed:.6g}; run `arra evaluate` again"
        )
    return statistic


def _same_pictures(baseline: Evaluation, candidate: Evaluation) -> bool:
    """Whether picture i of both was asked for the same thing; cards of runs, which do not say, always were."""
    first, second = (each.card.about for each in (baseline, candidate))
    if ASKED not in first and ASKED not in second:
        return True
    return first.get(ASKED) is not None and first.get(ASKED) == second.get(ASKED)


def groups_of(row: Result, statistic: Statistic, evaluation: Evaluation) -> Int[Tensor, " N"] | None:
    """Which pictures of a row are drawn together; None where each is drawn alone."""
    groups = evaluation.values.get(values_key("groups", split=row.split))
    if row.of == "reference" or groups is None or groups.shape != (statistic.num_images,):
        return None
    return groups


def _resampled(
    statistics: Sequence[Statistic],
    groups: Sequence[Tensor | None],
    *,
    num_resamples: int,
    seeds: Sequence[int],
) -> Float[np.ndarray, "R S"]:
    """Every statistic on its resamples. Those of the same pictures share their draws: drawing costs the most."""
    drawn = np.empty((num_resamples, len(statistics)))
    sharing: dict[tuple[int, int, int], list[int]] = {}
    for place, statistic in enumerate(statistics):
        key = (statistic.num_images, id(groups[place]), seeds[place])
        sharing.setdefault(key, []).append(place)
    for (num_images, _, seed), places in sharing.items():
        draws = draw_counts(num_images, num_resamples=num_resamples, seed=seed, groups=groups[places[0]])
        for resample, counts in enumerate(draws):
            drawn[resample, places] = [statistics[place](counts) for place in places]
    return drawn


def _over_seeds(per_seed: tuple[Difference, ...], *, level: float) -> SeedDifference:
    first, num_seeds = per_seed[0], len(per_seed)
    gaps = np.array([one.difference for one in per_seed])
    mean = float(gaps.mean())
    low = high = None
    verdict: Verdict = "no clear difference"
    if num_seeds > 1:
        half = student_t_quantile(level, degrees=num_seeds - 1) * float(gaps.std(ddof=1)) / math.sqrt(num_seeds)
        low, high = mean - half, mean + half
        verdict = decide(Interval(value=mean, low=low, high=high), better=first.better)
    return SeedDifference(
        metric=first.metric,
        split=first.split,
        cfg_scale=first.cfg_scale,
        reference=first.reference,
        baseline=float(np.mean([one.baseline for one in per_seed])),
        candidate=float(np.mean([one.candidate for one in per_seed])),
        difference=mean,
        low=low,
        high=high,
        better=first.better,
        verdict=verdict,
        unit=first.unit,
        num_images=first.num_images,
        per_seed=per_seed,
        space=first.space,
    )


def _row_of(one: Difference) -> tuple[str, str, float | None, str | None, str | None]:
    return (one.metric, one.split, one.cfg_scale, one.reference, one.space)


def names_model(key: str) -> bool:
    """Whether a key of a card's protocol says which model was measured, and not how."""
    return key == "run" or key.startswith("model")


def _short(value: object) -> str:
    """A setting in a message; of hashes the first digits tell them apart."""
    return repr(value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value)


def require_same_protocol(baseline: Evaluation, candidate: Evaluation) -> None:
    """Nothing, if two cards measured the same things in the same way on the same pictures.

    Raises: ArraError that names what differs.
    """
    first, second = baseline.card, candidate.card
    between = f"{first.run} and {second.run}"
    names = sorted(name for name in first.protocol.keys() | second.protocol.keys() if not names_model(name))
    missing = "nothing"
    gaps = [
        f"{name} ({_short(first.protocol.get(name, missing))} and {_short(second.protocol.get(name, missing))})"
        for name in names
        if first.protocol.get(name, missing) != second.protocol.get(name, missing)
    ]
    if len(gaps) > MOST_GAPS:
        gaps = [*gaps[:MOST_GAPS], f"and {len(gaps) - MOST_GAPS} more"]
    if gaps:
        raise ArraError(
            f"{between} were evaluated differently: {', '.join(gaps)}; evaluate both with the same settings"
        )
    rows = [{row.key: row for row in card.results if row.subject == "model"} for card in (first, second)]
    if unmatched := sorted(
        describe(row) for key, row in (rows[0] | rows[1]).items() if (key in rows[0]) != (key in rows[1])
    ):
        raise ArraError(f"{between}: only one of them has {', '.join(unmatched)}; evaluate both again")
    is_of_sets = ASKED in first.about or ASKED in second.about
    for key, row in rows[0].items():
        other = rows[1][key]
        may_differ = is_of_sets and row.metric not in NEEDS_EQUAL_NUMBERS
        if (row.num_images != other.num_images and not may_differ) or row.better != other.better:
            raise ArraError(
                f"{between}: {describe(row)} covers {row.num_images} ({row.better} is better) and {other.num_images} "
                f"pictures ({other.better} is better); evaluate both again, on equally many"
            )
    if not _same_pictures(baseline, candidate):
        return
    for name in sorted(baseline.values.keys() & candidate.values.keys()):
        is_shared = "/reference/" in name or (name.endswith("/groups") and not is_of_sets)
        if is_shared and not torch.equal(baseline.values[name], candidate.values[name]):
            raise ArraError(f"{between}: {name} differs, so they saw other pictures; evaluate both again")
