"""How much numbers differ between training seeds, pooled over all rows that were measured alike.

Place in the pipeline: `arra.evaluate.lab` takes it for intervals and p-values where there are many rows with few seeds
each; `arra reproduce` collects it over all its tables.

Three seeds of one row say little of how much a fourth would differ: Student's t with two degrees of freedom is 4.3
standard errors wide, and 19 after Holm over 18 rows. Rows of one experiment are trained alike but for one setting, and
their spread over seeds is taken to be one (the assumption of every analysis of variance, and of Dunnett's comparisons
with a control). Numbers of single rows vary with their seed as the squares about each row's mean say, R (S - 1) degrees
of freedom. Differences of rows that are paired by seed vary as what is left when every row's and every seed's mean is
taken out, (R - 1) (S - 1) degrees of freedom: what a seed does to all rows alike does not count.

Letters: R rows, S training seeds.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arra.evaluate.card import Evaluation
from arra.evaluate.compare import names_model

Key = tuple[str, Hashable]
"""What was measured alike, and the measure."""


@dataclass(frozen=True)
class Pooled:
    """A standard deviation, and how surely it is known."""

    deviation: float
    degrees: int


class SeedSpread:
    """Spread over training seeds by what was measured, pooled over rows."""

    def __init__(self) -> None:
        self._rows: dict[Key, list[Mapping[int, float]]] = {}

    def add(self, evaluations: Mapping[int, Evaluation], *, others: Mapping[str, Mapping[int, float]]) -> None:
        """Nothing; the numbers of a row, by training seed, count. `others` are numbers that its cards do not have."""
        if not evaluations:
            return
        first = next(iter(evaluations.values()))
        for result in first.card.results:
            found = {
                seed: row.value
                for seed, each in evaluations.items()
                for row in each.card.results
                if row.key == result.key
            }
            self._rows.setdefault((measured_as(first), result.key), []).append(found)
        for name, values in others.items():
            self._rows.setdefault((measured_as(first), name), []).append(values)

    def of_numbers(self, evaluation: Evaluation, measure: Hashable) -> Pooled | None:
        """Standard deviation of a row's number between seeds; None where no row has two."""
        rows = [list(row.values()) for row in self._of(evaluation, measure) if len(row) > 1]
        if not rows:
            return None
        degrees = sum(len(row) - 1 for row in rows)
        squares = sum(float(np.square(np.array(row) - np.mean(row)).sum()) for row in rows)
        return Pooled(float(np.sqrt(squares / degrees)), degrees)

    def of_differences(self, evaluation: Evaluation, measure: Hashable) -> Pooled | None:
        """Standard deviation, between seeds, of the difference of two rows of one seed.

        None where not even two rows share two seeds. Of rows with other seeds than most, the shared ones count.
        """
        rows = [row for row in self._of(evaluation, measure) if len(row) > 1]
        shared = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
        if len(rows) < 2 or len(shared) < 2:
            return None
        table = np.array([[row[seed] for seed in shared] for row in rows])  # (R, S)
        left = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
        degrees = (len(rows) - 1) * (len(shared) - 1)
        return Pooled(float(np.sqrt(2 * np.square(left).sum() / degrees)), degrees)

    def _of(self, evaluation: Evaluation, measure: Hashable) -> Sequence[Mapping[int, float]]:
        return self._rows.get((measured_as(evaluation), measure), ())


def measured_as(evaluation: Evaluation) -> str:
    """What two evaluations have in common when they measured the same pictures in the same way."""
    protocol = evaluation.card.protocol
    return repr(sorted((name, value) for name, value in protocol.items() if not names_model(name)))
