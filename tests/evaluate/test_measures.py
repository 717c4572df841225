"""From what was seen to numbers: what each metric needs to be seen, and which pictures it compares."""

from dataclasses import replace

import numpy as np
import pytest

from arra.errors import ArraError
from arra.evaluate.collecting import Seen
from arra.evaluate.kernels import kid
from arra.evaluate.measures import HowMeasured, SetMeasures, outputs_of
from arra.evaluate.moments import FrechetTo, MomentSums, frechet, frechet_infinity
from arra.evaluate.neighbours import prdc
from arra.evaluate.protocols import PROTOCOLS, Measure
from arra.evaluate.sets import Collected, chosen_rows

KEY = "toy.features"


def seen(features: np.ndarray, *, keep: int | None = None) -> Seen:
    sums = MomentSums(features.shape[1])
    sums.add(features)
    rows = chosen_rows(len(features), keep)
    one = Collected(moments=sums.finish(), features=features[rows], rows=rows)
    return Seen(count=len(features), outputs={KEY: one}, digests=np.zeros((len(features), 16), np.uint8), shapes={})


def drawn(count: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, 6)) + shift).astype(np.float32)


def toy(metric: str) -> Measure:
    return Measure(metric=metric, space="toy")


@pytest.mark.parametrize("metric", ["fd", "fd_infinity", "kid_x1000", "cmmd", "precision", "coverage"])
def test_a_metric_alone_finds_all_it_needs(metric: str) -> None:
    sets = []
    for features, is_reference in ((drawn(80, seed=0, shift=0.3), False), (drawn(70, seed=1), True)):
        outputs, distributions = outputs_of([toy(metric)], "toy", of_reference=is_reference)
        assert outputs == ("features",)
        whole = seen(features)
        one = whole.outputs[KEY]
        sets.append(replace(whole, outputs={KEY: one if distributions else replace(one, moments=None)}))
    found = SetMeasures(sets[0], sets[1]).measured(toy(metric))
    assert found is not None
    assert found.per_picture.mean() == pytest.approx(found.value)


def test_every_metric_of_sets_of_every_protocol_is_measured() -> None:
    generated, reference = seen(drawn(80, seed=0, shift=0.3)), seen(drawn(70, seed=1))
    with pytest.raises(ArraError, match="metric 'shine': not one of whole sets"):
        SetMeasures(generated, reference).measured(toy("shine"))
    for measure in (each for protocol in PROTOCOLS.values() for each in protocol.measures):
        outputs, _ = outputs_of([measure], str(measure.space), of_reference=False)
        assert measure.space is None or len(outputs) == 1


def test_distances_are_to_published_statistics_where_there_are_some() -> None:
    generated, reference = seen(drawn(80, seed=0)), seen(drawn(70, seed=1))
    published = seen(drawn(90, seed=2, shift=1)).outputs[KEY].moments
    moments = generated.outputs[KEY].moments
    assert published is not None
    assert moments is not None
    measures = SetMeasures(generated, reference, {KEY: published})
    found, extrapolated = (measures.measured(toy(metric)) for metric in ("fd", "fd_infinity"))
    assert found is not None
    assert found.value == pytest.approx(frechet(moments, published))
    beyond = frechet_infinity(FrechetTo(published), generated.outputs[KEY].features)
    assert extrapolated is not None
    assert beyond is not None
    assert extrapolated.value == pytest.approx(beyond.value)


def test_some_of_the_reference_are_compared_one_by_one_and_partners_follow() -> None:
    x, y = drawn(40, seed=0, shift=0.3), drawn(50, seed=1)
    generated, reference = seen(x, keep=30), seen(y, keep=45)
    rows, others = generated.outputs[KEY].rows, reference.outputs[KEY].rows[chosen_rows(45, 20)]
    partners = np.random.default_rng(3).permutation(50)[:40]
    measures = SetMeasures(generated, reference, how=HowMeasured(num_reference=20, k=4), partners=partners.tolist())
    places = {row: place for place, row in enumerate(others.tolist())}
    own = np.array([places.get(row, -1) for row in partners[rows].tolist()])
    assert (own < 0).any()
    assert (own >= 0).any()
    found = measures.measured(toy("kid_x1000"))
    assert found is not None
    assert found.value == kid(x[rows], y[others], partners=own).generated.value
    recall = measures.measured(toy("recall"))
    assert recall is not None
    np.testing.assert_array_equal(recall.per_picture, prdc(x[rows], y[others], k=4).recall.per_picture)
