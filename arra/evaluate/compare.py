"""What differs between two evaluated models, on the same pictures, and what an interval allows to say about it.

Place in the pipeline: reads two evaluations (`evaluate/card.py`); `report/` prints what comes back. Nothing in here
knows which model is expected to win: swapping the two flips every sign and every verdict.

Letters: N pictures, F features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from arra.errors import ArraError
from arra.evaluate.card import Better, Evaluation, Result, describe, values_key, values_statistic
from arra.evaluate.distances import (
    LEVEL,
    NUM_RESAMPLES,
    Interval,
    MeanStatistic,
    Statistic,
    draw_counts,
    percentile_interval,
)

Verdict = Literal["better", "worse", "no clear difference"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One measurement of both models; `difference` is candidate minus baseline, `low` and `high` its interval."""

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
    """One `Difference` per model row of the cards, in their order, by a bootstrap paired over pictures.

    Both models are evaluated on the same resamples, so what is hard or easy about a picture cancels. The interval tells
    what other held-out pictures would change; another training seed is another matter, see `compare_seeds`. Where the
    models disagree on fewer than about six pictures, the interval of a retrieval difference is too narrow.

    Raises: ArraError when the cards cannot be compared: other protocol, rows or references, or values that are missing
    or do not give the number on the card.
    """
    require_same_protocol(baseline, candidate)
    others = {row.key: row for row in candidate.card.results}
    differences = []
    for row in baseline.card.results:
        if row.subject != "model":
            continue
        other = others[row.key]
        first, second = checked_statistic(row, baseline), checked_statistic(other, candidate)
        groups = baseline.values.get(values_key("groups", split=row.split))
        draws = draw_counts(row.num_images, num_resamples=num_resamples, seed=seed, groups=groups)
        resampled = np.array([second(counts) - first(counts) for counts in draws])
        center = not isinstance(first, MeanStatistic)
        interval = percentile_interval(other.value - row.value, resampled, center=center, level=level)
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
            )
        )
    return differences


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
        statistic = values_statistic(
            evaluation.values,
            metric=row.metric,
            split=row.split,
            cfg_scale=row.cfg_scale,
            reference=row.reference,
            num_components=evaluation.num_components,
        )
    except ArraError as error:
        raise ArraError(f"{where}: {error}") from error
    if statistic.num_images != row.num_images:
        raise ArraError(
            f"{where}: the card says {row.num_images} pictures, its values have {statistic.num_images}; "
            "run `arra evaluate` again"
        )
    recomputed = statistic(np.ones(row.num_images))
    # Values are stored as float32, so the number comes back to about 1e-5 of its size; anything more is a mix-up.
    if not math.isclose(recomputed, row.value, rel_tol=1e-3, abs_tol=1e-3):
        raise ArraError(
            f"{where}: the card says {row.value:.6g}, its values {recomputed:.6g}; run `arra evaluate` again"
        )
    return statistic


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
    )


def _row_of(one: Difference) -> tuple[str, str, float | None, str | None]:
    return (one.metric, one.split, one.cfg_scale, one.reference)


def _names_model(key: str) -> bool:
    return key == "run" or key.startswith("model")


def require_same_protocol(baseline: Evaluation, candidate: Evaluation) -> None:
    """Nothing, if two cards measured the same things in the same way on the same pictures.

    Raises: ArraError that names what differs.
    """
    first, second = baseline.card, candidate.card
    between = f"{first.run} and {second.run}"
    names = sorted(name for name in first.protocol.keys() | second.protocol.keys() if not _names_model(name))
    missing = "nothing"
    gaps = [
        f"{name} ({first.protocol.get(name, missing)!r} and {second.protocol.get(name, missing)!r})"
        for name in names
        if first.protocol.get(name, missing) != second.protocol.get(name, missing)
    ]
    if gaps:
        raise ArraError(
            f"{between} were evaluated differently: {', '.join(gaps)}; evaluate both with the same settings"
        )
    rows = [{row.key: row for row in card.results if row.subject == "model"} for card in (first, second)]
    if unmatched := sorted(
        describe(row) for key, row in (rows[0] | rows[1]).items() if (key in rows[0]) != (key in rows[1])
    ):
        raise ArraError(f"{between}: only one of them has {', '.join(unmatched)}; evaluate both again")
    for key, row in rows[0].items():
        other = rows[1][key]
        if (row.num_images, row.better) != (other.num_images, other.better):
            raise ArraError(
                f"{between}: {describe(row)} covers {row.num_images} ({row.better} is better) and {other.num_images} "
                f"pictures ({other.better} is better); evaluate both again"
            )
    for name in sorted(baseline.values.keys() & candidate.values.keys()):
        is_shared = "/reference/" in name or name.endswith("/groups")
        if is_shared and not torch.equal(baseline.values[name], candidate.values[name]):
            raise ArraError(f"{between}: {name} differs, so they saw other pictures; evaluate both again")
