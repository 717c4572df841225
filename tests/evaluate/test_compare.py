"""Laws of the comparison: it favours nobody, and refuses what cannot be compared."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.evaluate.compare import compare, compare_seeds, decide, student_t_quantile
from arra.evaluate.distances import Interval

MakeEvaluation = Callable[..., Evaluation]


def test_identical_runs_differ_by_exactly_nothing(make_evaluation: MakeEvaluation) -> None:
    one = make_evaluation("a", quality=0.0, seed=1)
    for row in compare(one, make_evaluation("b", quality=0.0, seed=1)):
        assert (row.difference, row.low, row.high) == (0.0, 0.0, 0.0)
        assert row.verdict == "no clear difference"


def test_a_better_model_is_called_better(make_evaluation: MakeEvaluation) -> None:
    worse, better = make_evaluation("a", quality=0.0, seed=1), make_evaluation("b", quality=1.5, seed=2)
    rows = compare(worse, better, num_resamples=200)
    assert [row.metric for row in rows] == [
        *("nll", "caption_gain", "retrieval_at_10", "frechet", "frechet", "kid_x1000")  # no row of the tokenizer
    ]
    assert {row.verdict for row in rows} == {"better"}
    for row in rows:
        assert row.difference == pytest.approx(row.candidate - row.baseline)
        assert row.low <= row.difference <= row.high


def test_swapping_flips_signs_and_verdicts(make_evaluation: MakeEvaluation) -> None:
    one, other = make_evaluation("a", quality=0.0, seed=1), make_evaluation("b", quality=0.04, seed=2)
    flipped = {"better": "worse", "worse": "better", "no clear difference": "no clear difference"}
    there, back = compare(one, other, num_resamples=100), compare(other, one, num_resamples=100)
    for row, reverse in zip(there, back, strict=True):
        assert row.difference == -reverse.difference
        assert (row.low, row.high) == pytest.approx((-reverse.high, -reverse.low), abs=1e-9)
        assert row.verdict == flipped[reverse.verdict]
    assert len({row.verdict for row in there}) > 1


def test_pairing_sees_what_the_difficulty_of_pictures_would_hide(make_evaluation: MakeEvaluation) -> None:
    one, other = make_evaluation("a", quality=0.0, seed=1), make_evaluation("b", quality=1.0, seed=2)
    nll = compare(one, other, num_resamples=100)[0]
    own = next(row for row in one.card.results if row.metric == "nll")
    assert own.low is not None
    assert own.high is not None
    assert nll.high - nll.low < (own.high - own.low) / 10


def test_no_difference_is_found_among_equals_more_often_than_promised(make_evaluation: MakeEvaluation) -> None:
    verdicts = []
    for seed in range(12):
        pair = (make_evaluation("a", quality=0.5, seed=100 + seed), make_evaluation("b", quality=0.5, seed=200 + seed))
        verdicts += [row.verdict for row in compare(*pair, num_resamples=100)]
    assert np.mean([verdict != "no clear difference" for verdict in verdicts]) < 0.15


def test_groups_widen_the_interval(make_evaluation: MakeEvaluation) -> None:
    one, other = make_evaluation("a", quality=0.0, seed=1), make_evaluation("b", quality=0.0, seed=2)
    order = torch.argsort(other.values["composed/nll"] - one.values["composed/nll"])
    groups = torch.empty(40, dtype=torch.int64)
    groups[order] = torch.arange(40) // 4  # alike differences in one group

    def grouped(evaluation: Evaluation) -> Evaluation:
        return dataclasses.replace(evaluation, values={**evaluation.values, "composed/groups": groups})

    apart, together = compare(one, other)[0], compare(grouped(one), grouped(other))[0]
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_other_protocols_are_refused_by_name(
    make_evaluation: MakeEvaluation, with_protocol: Callable[..., Evaluation]
) -> None:
    one, other = make_evaluation("a", quality=0.0, seed=1), make_evaluation("b", quality=0.0, seed=2)
    with pytest.raises(ArraError, match=r"judge \('judge-1' and 'judge-2'\), temperature \('nothing' and 1\)"):
        compare(one, with_protocol(other, judge="judge-2", temperature=1))
    compare(one, with_protocol(other, run="elsewhere", model_step=7), num_resamples=2)  # these name the model


def test_other_rows_pictures_and_references_are_refused(make_evaluation: MakeEvaluation) -> None:
    one = make_evaluation("a", quality=0.0, seed=1)
    fewer = dataclasses.replace(one, card=dataclasses.replace(one.card, results=one.card.results[1:]))
    with pytest.raises(ArraError, match="only one of them has nll composed"):
        compare(one, fewer)
    with pytest.raises(ArraError, match="covers 40"):
        compare(one, make_evaluation("b", quality=0.0, seed=1, num_images=30))
    moved = {**one.values, "composed/reference/raw": one.values["composed/reference/raw"] + 1}
    with pytest.raises(ArraError, match="composed/reference/raw differs"):
        compare(one, dataclasses.replace(one, values=moved))


def test_values_that_do_not_give_the_number_are_refused(make_evaluation: MakeEvaluation) -> None:
    one = make_evaluation("a", quality=0.0, seed=1)
    mixed = dataclasses.replace(one, values={**one.values, "composed/nll": one.values["composed/nll"] + 1})
    with pytest.raises(ArraError, match="runs/a: nll composed: the card says"):
        compare(one, mixed)
    missing = dataclasses.replace(one, values={k: v for k, v in one.values.items() if k != "composed/nll"})
    with pytest.raises(ArraError, match="nll composed: no per-picture values composed/nll"):
        compare(missing, one)


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (-2.0, -1.0, "lower", "better"),
        (-2.0, -1.0, "higher", "worse"),
        (1.0, 2.0, "lower", "worse"),
        (1.0, 2.0, "higher", "better"),
        (-1.0, 1.0, "lower", "no clear difference"),
        (0.0, 1.0, "lower", "no clear difference"),
        (0.0, 0.0, "higher", "no clear difference"),
    ],
)
def test_the_verdict_comes_from_the_interval_alone(low: float, high: float, better: str, verdict: str) -> None:
    assert decide(Interval(value=0.0, low=low, high=high), better=better) == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 30, 200])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_t_quantile_is_scipys(degrees: int, level: float) -> None:
    expected = scipy.stats.t.ppf((1 + level) / 2, degrees)
    assert student_t_quantile(level, degrees=degrees) == pytest.approx(expected, rel=1e-7)


def test_seeds_give_a_t_interval_beside_each_seed(make_evaluation: MakeEvaluation) -> None:
    pairs = [
        (make_evaluation("a", quality=0.0, seed=seed), make_evaluation("b", quality=1.0, seed=10 + seed))
        for seed in range(3)
    ]
    row = compare_seeds(pairs, num_resamples=50)[0]
    gaps = [one.difference for one in row.per_seed]
    expected = scipy.stats.t.interval(0.95, 2, np.mean(gaps), scipy.stats.sem(gaps))
    assert (row.low, row.high) == pytest.approx(expected)
    assert row.difference == pytest.approx(np.mean(gaps))
    assert row.num_better == 3
    assert row.verdict == "better"


def test_one_seed_says_nothing_of_seeds(make_evaluation: MakeEvaluation) -> None:
    pair = (make_evaluation("a", quality=0.0, seed=1), make_evaluation("b", quality=1.0, seed=2))
    row = compare_seeds([pair], num_resamples=20)[0]
    assert row.low is None
    assert row.high is None
    assert row.verdict == "no clear difference"
    with pytest.raises(ArraError, match="no pair"):
        compare_seeds([])
