"""Several trained rows, each with several training seeds, held against one of them on the same pictures.

Place in the pipeline: reads evaluation cards like `evaluate/compare.py`, whose checks and statistics it shares;
`arra lab` prints what comes back.

What an interval says. A row's number is its mean over training seeds. It would be another one with other seeds, and
with other held-out pictures: the two errors are independent, so their squares add up. The first is the spread over
seeds, s / sqrt(S), with Student's t for S - 1 degrees of freedom; the second is the deviation of the mean over seeds
when pictures are drawn again (whole groups of them), with the normal distribution. Differences are paired: the same
seed, the same drawn pictures. Resampling three seeds would make intervals far too narrow (it knows ten draws);
Student's t makes them wide, and rightly so. With one seed there is nothing to say of others: intervals are of pictures
alone, and no difference is called clear.

Letters: N pictures, R resamples, S training seeds.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from arra.errors import ArraError
from arra.evaluate.card import ASKED, PIXELS, Better, Evaluation, Result
from arra.evaluate.compare import checked_statistic, groups_of, holm, require_same_protocol, student_t_quantile
from arra.evaluate.distances import LEVEL, NUM_RESAMPLES, draw_counts
from arra.evaluate.spread import Pooled, SeedSpread

Space = Literal["no judge", "independent", "teacher's family", "other encoder"]
"""Whose features a measure looks at: nobody's; the caption judge's, which was trained from random weights on the
training split alone; an encoder of the teacher's family; an encoder of another family."""
Verdict = Literal["better", "worse", "unclear"]
VALIDATION = "validation_nll"
BISECTIONS = 40
RUNS = "held-out records"
"""What pictures of runs were asked for: cards of runs do not say, and it is the same of all that compare."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured of every row."""

    metric: str
    split: str
    cfg_scale: float | None
    reference: str | None
    better: Better
    unit: str
    space: Space
    num_images: int | None
    """None where only the mean over pictures is known."""
    network: str | None = None
    """Whose vectors they are, where the card names it: `inception`, `rad-dino`; cards of sets do."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its interval."""

    value: float
    low: float | None
    high: float | None
    """None where there is neither a second seed nor a value for each picture."""
    seed_error: float | None
    """Standard error over training seeds; None with one seed."""
    picture_error: float | None
    """Standard error over pictures; None where only means over pictures are known."""
    degrees: int | None = None
    """Degrees of freedom of `seed_error`."""


@dataclass(frozen=True, kw_only=True)
class RowEstimate:
    """One row in one measure."""

    row: str
    per_seed: Mapping[int, float]
    mean: Estimate
    difference: Estimate | None
    """To the baseline, over the seeds that both have; None for the baseline itself, or where they share no seed."""
    p: float | None
    """Of the difference: 1 minus the level at which its interval begins to hold zero."""
    p_corrected: float | None
    """After Holm, for as many comparisons as this measure has rows beside the baseline."""
    verdict: Verdict | None


@dataclass(frozen=True, kw_only=True)
class MeasureTable:
    """All rows in one measure, the baseline first."""

    measure: Measure
    rows: tuple[RowEstimate, ...]


@dataclass(frozen=True)
class Drawn:
    """A measure of one run: its value, and what it is on each resample of the pictures."""

    value: float
    resampled: Float[np.ndarray, " R"] | None


class Resampled:
    """Numbers of cards on resamples of their pictures, each worked out once, however many tables it stands in.

    Pictures that were asked for the same are drawn together, as in `compare`; those of other sets on their own.
    """

    def __init__(self, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> None:
        self.num_resamples, self.seed = num_resamples, seed
        self._asked: list[object] = []
        self._drawn: dict[tuple[int, tuple[object, ...]], Drawn] = {}
        self._evaluations: dict[int, Evaluation] = {}

    def of(self, result: Result, evaluation: Evaluation) -> Drawn:
        """The number that a card has for this measurement, and its resamples.

        Raises: ArraError when the card's values do not give its number.
        """
        place = id(evaluation)
        self._evaluations[place] = evaluation  # as long as it lives, no other one has its id
        if (place, result.key) not in self._drawn:
            own = next(row for row in evaluation.card.results if row.key == result.key)
            statistic = checked_statistic(own, evaluation)
            draws = draw_counts(
                statistic.num_images,
                num_resamples=self.num_resamples,
                seed=self.seed + (0 if own.of == "reference" else self._set_of(evaluation)),
                groups=groups_of(own, statistic, evaluation),
            )
            self._drawn[place, result.key] = Drawn(own.value, np.array([statistic(counts) for counts in draws]))
        return self._drawn[place, result.key]

    def _set_of(self, evaluation: Evaluation) -> int:
        """A number for what the pictures were asked for; where that is not known, of this evaluation alone."""
        asked = evaluation.card.about.get(ASKED, RUNS)
        name = id(evaluation) if asked is None else asked
        if name not in self._asked:
            self._asked.append(name)
        return self._asked.index(name)


def lab_tables(
    evaluations: Mapping[str, Mapping[int, Evaluation]],
    *,
    judge_is_related: bool,
    validation: Mapping[str, Mapping[int, float]] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> list[MeasureTable]:
    """A table for each measure of the cards, by row and training seed; the first row is the baseline.

    Distances to raw pictures are left out: they measure the tokenizer more than the model. `judge_is_related` says that
    the first judge is of a teacher's family. `validation` is the next-token loss on the validation split after
    training, where only the mean over pictures is known.

    Raises: ArraError when no row is evaluated, or cards cannot be compared, as `compare`.
    """
    resampled = Resampled(num_resamples=num_resamples, seed=seed)
    return measure_tables(
        evaluations, judge_is_related=judge_is_related, validation=validation, resampled=resampled, level=level
    )


def measure_tables(
    evaluations: Mapping[str, Mapping[int, Evaluation]],
    *,
    judge_is_related: bool,
    resampled: Resampled,
    validation: Mapping[str, Mapping[int, float]] | None = None,
    level: float = LEVEL,
    spread: SeedSpread | None = None,
) -> list[MeasureTable]:
    """As `lab_tables`, with resamples that are kept for other tables.

    With `spread` the error over seeds is that of all rows measured alike, in place of each row's own.

    Raises: ArraError as `lab_tables`.
    """
    cards = [each for by_seed in evaluations.values() for each in by_seed.values()]
    if not cards:
        raise ArraError("no evaluated run to compare; look at why they failed, and run again")
    for other in cards[1:]:
        require_same_protocol(cards[0], other)
    tables = []
    if validation:
        measure = Measure(
            metric=VALIDATION,
            split="validation",
            cfg_scale=None,
            reference=None,
            better="lower",
            unit="nats/token",
            space="no judge",
            num_images=None,
        )
        named = {row: {s: Drawn(value, None) for s, value in found.items()} for row, found in validation.items()}
        tables.append(_table(measure, named, level=level, pooled=_pooled(spread, cards[0], VALIDATION)))
    teachers = {row.key for each in cards for row in each.card.results if row.is_teachers}
    for result in cards[0].card.results:
        if result.subject != "model" or result.reference == "raw":
            continue
        values = {
            row: {s: resampled.of(result, each) for s, each in by_seed.items()} for row, by_seed in evaluations.items()
        }
        own = replace(result, is_teachers=result.key in teachers)  # a row without a teacher does not know
        pooled = _pooled(spread, cards[0], result.key)
        tables.append(_table(_measure_of(own, judge_is_related), values, level=level, pooled=pooled))
    return tables


def space_of(metric: str, *, judge_is_related: bool) -> Space:
    """Whose features a measure of a card looks at."""
    if metric.startswith("caption_") and metric != "caption_gain":
        return "independent"
    if metric in ("frechet", "kid_x1000") or "retrieval_at" in metric:
        return "teacher's family" if judge_is_related else "other encoder"
    return "no judge"


@dataclass(frozen=True)
class _Spreads:
    """Pooled over rows; None where each row has its own."""

    numbers: Pooled | None = None
    differences: Pooled | None = None


def _pooled(spread: SeedSpread | None, evaluation: Evaluation, measure: Hashable) -> _Spreads:
    if spread is None:
        return _Spreads()
    return _Spreads(spread.of_numbers(evaluation, measure), spread.of_differences(evaluation, measure))


def half_width(*, level: float, seed_error: float | None, degrees: int | None, picture_error: float | None) -> float:
    """Half an interval of this level: the two errors, each with its own quantile, added as squares.

    `degrees` are those of freedom of the error over seeds.
    """
    squares = 0.0
    if seed_error and degrees:
        squares += (student_t_quantile(level, degrees=degrees) * seed_error) ** 2
    if picture_error:
        squares += (NormalDist().inv_cdf((1 + level) / 2) * picture_error) ** 2
    return math.sqrt(squares)


def _measure_of(result: Result, judge_is_related: bool) -> Measure:
    space: Space = space_of(result.metric, judge_is_related=judge_is_related)
    if result.space is not None:  # the card itself says what it was measured in
        space = "teacher's family" if result.is_teachers else "no judge" if result.space == PIXELS else "other encoder"
    return Measure(
        metric=result.metric,
        split=result.split,
        cfg_scale=result.cfg_scale,
        reference=result.reference,
        better=result.better,
        unit=result.unit,
        space=space,
        num_images=result.num_images,
        network=result.space,
    )


def _table(
    measure: Measure, values: Mapping[str, Mapping[int, Drawn]], *, level: float, pooled: _Spreads
) -> MeasureTable:
    baseline, *others = values
    told: dict[str, Any] = {"measure": measure, "level": level, "pooled": pooled}
    rows = [_row(baseline, values[baseline], None, **told)]
    rows += [_row(row, values[row], values[baseline], **told) for row in others if values[row]]
    return MeasureTable(measure=measure, rows=tuple(_corrected(rows, measure.better, level=level)))


def _row(
    row: str,
    own: Mapping[int, Drawn],
    baseline: Mapping[int, Drawn] | None,
    *,
    measure: Measure,
    level: float,
    pooled: _Spreads,
) -> RowEstimate:
    shared = [seed for seed in own if baseline is not None and seed in baseline]
    difference = p = None
    if baseline is not None and shared:
        gaps = [
            Drawn(
                own[seed].value - baseline[seed].value,
                None if measure.num_images is None else _drawn(own[seed]) - _drawn(baseline[seed]),
            )
            for seed in shared
        ]
        difference = _estimate(gaps, level=level, pooled=pooled.differences)
        p = _p_value(difference) if len(shared) > 1 else None
    return RowEstimate(
        row=row,
        per_seed={seed: each.value for seed, each in own.items()},
        mean=_estimate(list(own.values()), level=level, pooled=pooled.numbers),
        difference=difference,
        p=p,
        p_corrected=None,
        verdict=None if difference is None else "unclear",
    )


def _drawn(values: Drawn) -> np.ndarray:
    assert values.resampled is not None
    return values.resampled


def _estimate(values: Sequence[Drawn], *, level: float, pooled: Pooled | None) -> Estimate:
    each, count = np.array([one.value for one in values]), len(values)
    mean = float(each.mean())
    own = pooled or Pooled(float(each.std(ddof=1)), count - 1) if count > 1 else None
    seed_error, degrees = (None, None) if own is None else (own.deviation / math.sqrt(count), own.degrees)
    drawn = [one.resampled for one in values if one.resampled is not None]
    picture_error = float(np.mean(drawn, axis=0).std(ddof=1)) if drawn else None
    if seed_error is None and picture_error is None:
        return Estimate(value=mean, low=None, high=None, seed_error=None, picture_error=None)
    half = half_width(level=level, seed_error=seed_error, degrees=degrees, picture_error=picture_error)
    return Estimate(
        value=mean,
        low=mean - half,
        high=mean + half,
        seed_error=seed_error,
        picture_error=picture_error,
        degrees=degrees,
    )


def _p_value(difference: Estimate) -> float:
    """1 minus the highest level whose interval leaves out zero, by bisection."""

    def leaves_out_zero(level: float) -> bool:
        half = half_width(
            level=level,
            seed_error=difference.seed_error,
            degrees=difference.degrees,
            picture_error=difference.picture_error,
        )
        return abs(difference.value) > half

    low, high = 0.0, 1 - 1e-9
    if leaves_out_zero(high):
        return 1e-9
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if leaves_out_zero(middle) else (low, middle)
    return 1 - low


def _corrected(rows: Sequence[RowEstimate], better: Better, *, level: float) -> Iterator[RowEstimate]:
    """The rows with corrected p-values and verdicts."""
    told = [(row, row.p) for row in rows if row.p is not None]
    corrected = dict(zip((row.row for row, _ in told), holm([p for _, p in told]), strict=True))
    for row in rows:
        p = corrected.get(row.row)
        verdict = row.verdict
        if p is not None and p <= 1 - level and row.difference is not None:
            verdict = "better" if (row.difference.value < 0) == (better == "lower") else "worse"
        yield replace(row, p_corrected=p, verdict=verdict)
