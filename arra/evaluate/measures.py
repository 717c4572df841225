"""From what was seen of two sets of pictures to the numbers of a card.

    protocol's Measures --needs--> what to look at --collect--> Seen, Seen --measured--> Number --> card.measure_row

Which outputs of which space a metric needs, of which set, is told by one table. Legend: N pictures, M of the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from arra.errors import ArraError
from arra.evaluate.collecting import Seen
from arra.evaluate.kernels import cmmd, kid
from arra.evaluate.measured import Measured
from arra.evaluate.moments import FrechetTo, Moments, frechet_infinity
from arra.evaluate.neighbours import Neighbours, prdc
from arra.evaluate.protocols import Measure
from arra.evaluate.scores import inception_score
from arra.evaluate.sets import chosen_rows

FRECHET, INFINITY = ("fid", "fd", "sfid"), ("fid_infinity", "fd_infinity")
NEIGHBOURS = ("precision", "recall", "density", "coverage")
OF_VECTORS = (*FRECHET, *INFINITY, *NEIGHBOURS, "kid_x1000", "cmmd", "inception_score")
"""Metrics of whole sets in one space; the others are of single pictures, of pairs, or of training pictures."""


def output_of(metric: str) -> str:
    """Which output of its space a metric reads."""
    return {"sfid": "spatial", "inception_score": "logits", "findings_auroc": "findings"}.get(metric, "features")


def outputs_of(
    measures: Sequence[Measure], space: str, *, of_reference: bool
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The outputs of a space that some measures need of a set, and those whose distribution is needed."""
    wanted = [each.metric for each in measures if each.space == space]
    if of_reference:
        wanted = [metric for metric in wanted if metric in (*OF_VECTORS, "copied") and metric != "inception_score"]
    outputs = tuple(dict.fromkeys(output_of(metric) for metric in wanted))
    fitted = (*FRECHET, *INFINITY) if of_reference else FRECHET  # an extrapolation fits its own to parts of the set
    return outputs, frozenset(output_of(metric) for metric in wanted if metric in fitted)


@dataclass(frozen=True)
class HowMeasured:
    """What a protocol says of its measures."""

    k: int = 5
    """Nearest neighbours of precision, recall, density and coverage."""
    is_split: int | None = None
    """Pictures in each split of the Inception Score; None takes all together."""
    num_reference: int | None = None
    """Reference pictures of everything that compares vectors one by one; None takes all that are kept."""
    seed: int = 0


@dataclass
class SetMeasures:
    """Measures of one set against a reference, each worked out when it is asked for, what they share once."""

    generated: Seen
    reference: Seen | None
    statistics: Mapping[str, Moments] = field(default_factory=dict)
    """Published means and covariances, by `SPACE.OUTPUT`; they stand in place of the reference's own."""
    how: HowMeasured = HowMeasured()
    partners: Sequence[int] | None = None
    """For each picture the row of the reference that shows the same prompt; None where they are no pairs."""
    _frechet: dict[str, FrechetTo] = field(default_factory=dict)
    _neighbours: dict[str, Neighbours] = field(default_factory=dict)

    def measured(self, measure: Measure) -> Measured | None:
        """The number; None where there are too few pictures for it to mean anything.

        Raises:
            ArraError: vectors that are not finite, or sets that do not fit.
        """
        metric, key = measure.metric, f"{measure.space}.{output_of(measure.metric)}"
        seen = self.generated.outputs[key]
        if metric in FRECHET:
            assert seen.moments is not None
            return self._to(key).measured(seen.moments, seen.features)
        if metric in INFINITY:
            return frechet_infinity(self._to(key), seen.features, seed=self.how.seed)
        if metric == "inception_score":
            if self.how.is_split is None:
                return inception_score(seen.features, num_splits=1)
            return inception_score(seen.features, split_size=self.how.is_split)
        if metric == "kid_x1000":
            return kid(seen.features, self._reference(key), partners=self._partners(key)).generated
        if metric == "cmmd":
            return cmmd(seen.features, self._reference(key)).generated
        if metric in NEIGHBOURS:
            if key not in self._neighbours:
                self._neighbours[key] = prdc(seen.features, self._reference(key), k=self.how.k)
            found: Measured = getattr(self._neighbours[key], metric)
            return found
        raise ArraError(f"metric '{metric}': not one of whole sets; known are {', '.join(OF_VECTORS)}")

    def _to(self, key: str) -> FrechetTo:
        if key not in self._frechet:
            moments = self.statistics.get(key)
            if moments is None:
                assert self.reference is not None
                moments = self.reference.outputs[key].moments
            assert moments is not None
            self._frechet[key] = FrechetTo(moments)
        return self._frechet[key]

    def _reference(self, key: str) -> np.ndarray:
        assert self.reference is not None
        features = self.reference.outputs[key].features
        chosen = self._chosen(key)
        return features if len(chosen) == len(features) else np.ascontiguousarray(features[chosen])

    def _chosen(self, key: str) -> Int[np.ndarray, "K"]:
        """Which of the reference's kept vectors are compared with one by one."""
        assert self.reference is not None
        return chosen_rows(len(self.reference.outputs[key].features), self.how.num_reference)

    def _partners(self, key: str) -> Int[np.ndarray, "N"] | None:
        """For each kept picture the row of its partner in what `_reference` gives; -1 where it is not in there."""
        if self.partners is None:
            return None
        assert self.reference is not None
        places = np.full(self.reference.count, -1)
        rows = self.reference.outputs[key].rows[self._chosen(key)]
        places[rows] = np.arange(len(rows))
        return places[np.asarray(self.partners)[self.generated.outputs[key].rows]]
