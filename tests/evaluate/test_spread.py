"""Spread over seeds, pooled: what it estimates, what does not count, and how sure it makes a table."""

import math

import numpy as np
import pytest

from arra.evaluate.card import Card, Evaluation, ProtocolValue, Result
from arra.evaluate.compare import student_t_quantile
from arra.evaluate.spread import SeedSpread, measured_as


def evaluation(value: float, *, seed: int = 0, data: str = "a") -> Evaluation:
    result = Result(metric="frechet", split="test", value=value, num_images=8, better="lower", unit="feature units")
    protocol: dict[str, ProtocolValue] = {"model": f"run-{seed}", "model_seed": seed, "store": data}
    return Evaluation(card=Card(run=f"run-{seed}", protocol=protocol, results=(result,)), values={})


KEY = evaluation(0.0).card.results[0].key


def spread_of(rows: np.ndarray, *, data: str = "a") -> SeedSpread:
    found = SeedSpread()
    for row in rows:
        found.add(
            {s: evaluation(float(v), seed=s, data=data) for s, v in enumerate(row)},
            others={"loss": dict(enumerate(row.tolist()))},
        )
    return found


def test_it_is_the_deviation_that_numbers_were_drawn_with():
    rng = np.random.default_rng(0)
    rows = rng.normal(5, 1, (1, 3)) + rng.normal(0, 10, (400, 1)) + rng.normal(0, 2, (400, 3))
    found = spread_of(rows)
    numbers, differences = found.of_numbers(evaluation(0.0), KEY), found.of_differences(evaluation(0.0), KEY)
    assert numbers is not None
    assert differences is not None
    assert differences.deviation == pytest.approx(2 * math.sqrt(2), rel=0.05)
    assert (numbers.degrees, differences.degrees) == (400 * 2, 399 * 2)
    assert found.of_numbers(evaluation(0.0), "loss") == numbers


def test_what_a_seed_does_to_all_rows_does_not_count_in_differences():
    rows = np.array([[1.0, 2.0, 4.0], [2.0, 3.5, 5.0], [0.0, 1.0, 3.5]])
    shifted = rows + np.array([[100.0, -50.0, 7.0]])
    first, second = (spread_of(each).of_differences(evaluation(0.0), KEY) for each in (rows, shifted))
    assert first is not None
    assert second is not None
    assert second.deviation == pytest.approx(first.deviation)
    assert spread_of(shifted).of_numbers(evaluation(0.0), KEY) != spread_of(rows).of_numbers(evaluation(0.0), KEY)


def test_of_two_rows_it_is_the_paired_deviation():
    rows = np.array([[1.0, 2.0, 4.0], [2.0, 3.5, 4.5]])
    found = spread_of(rows).of_differences(evaluation(0.0), KEY)
    assert found is not None
    assert found.deviation == pytest.approx((rows[1] - rows[0]).std(ddof=1))
    assert found.degrees == 2


def test_rows_measured_otherwise_do_not_count():
    found = spread_of(np.array([[1.0, 2.0], [2.0, 4.0]]))
    found.add({s: evaluation(100.0 * s, seed=s, data="b") for s in range(2)}, others={})
    assert found.of_numbers(evaluation(0.0), KEY) == spread_of(np.array([[1.0, 2.0], [2.0, 4.0]])).of_numbers(
        evaluation(0.0), KEY
    )
    assert found.of_differences(evaluation(0.0, data="b"), KEY) is None  # one row alone
    assert (
        measured_as(evaluation(0.0, seed=1))
        == measured_as(evaluation(3.0, seed=2))
        != measured_as(evaluation(0.0, data="b"))
    )


def test_one_seed_says_nothing():
    found = spread_of(np.array([[1.0], [2.0]]))
    assert found.of_numbers(evaluation(0.0), KEY) is None
    assert found.of_differences(evaluation(0.0), KEY) is None


def test_intervals_of_a_control_and_many_rows_cover_as_they_say():
    """Differences to one control, three seeds, no true difference: about 95 % of the intervals hold zero."""
    rng, held = np.random.default_rng(1), []
    for _ in range(300):
        rows = rng.normal(0, 1, (8, 3)) + rng.normal(0, 3, (1, 3))
        found = spread_of(rows).of_differences(evaluation(0.0), KEY)
        assert found is not None
        half = student_t_quantile(0.95, degrees=found.degrees) * found.deviation / math.sqrt(3)
        held += list(np.abs(rows[1:].mean(1) - rows[0].mean()) <= half)
    assert 0.93 < np.mean(held) < 0.97
