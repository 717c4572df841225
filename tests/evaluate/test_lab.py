"""The lab's intervals and verdicts: paired, joined from two errors, corrected for the rows, blind to who should win."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from arra.errors import ArraError
from arra.evaluate.card import Card, Evaluation, ProtocolValue, measure, values_key
from arra.evaluate.compare import compare_seeds, holm
from arra.evaluate.distances import draw_counts
from arra.evaluate.lab import MeasureTable, RowEstimate, half_width, lab_tables, space_of

NUM_IMAGES, RESAMPLES = 40, 60
PROTOCOL: dict[str, ProtocolValue] = {"splits": "novel", "frechet_components": 3}


def evaluation(name: str, *, shift: float, noise: int, features: bool = False) -> Evaluation:
    """A card of one split: NLL of pictures that all runs share, moved by `shift`, with a little noise of the run's."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(noise)
    nll = torch.randn(NUM_IMAGES, generator=shared) + shift + 0.01 * torch.randn(NUM_IMAGES, generator=own)
    values = {"novel/nll": nll, "novel/groups": torch.arange(NUM_IMAGES) // 2}
    asked: list[tuple[str, float | None, str | None]] = [("nll", None, None)]
    if features:
        for judge in ("", "caption_"):
            seen = torch.randn(NUM_IMAGES, 5, generator=shared)
            values[f"novel/reference/{judge}reconstructions"] = seen
            values[f"novel/reference/{judge}raw"] = seen + 1
            values[values_key(f"{judge}features", split="novel", cfg_scale=2.0)] = seen + shift
            asked += [(f"{judge}frechet", 2.0, "reconstructions"), (f"{judge}kid_x1000", 2.0, "raw")]
    rows = [
        measure(
            values, metric=metric, split="novel", cfg_scale=scale, reference=reference, num_components=3,
            num_resamples=5,
        )
        for metric, scale, reference in asked
    ]  # fmt: skip
    return Evaluation(card=Card(run=name, protocol=PROTOCOL, results=tuple(rows)), values=values)


SHIFTS = {"baseline": (0.0, 0.02, 0.01), "good": (-0.5, -0.51, -0.49), "same": (0.01, 0.0, 0.02)}
EVALUATIONS = {
    row: {seed: evaluation(f"{row}/{seed}", shift=shift, noise=10 * n + seed) for seed, shift in enumerate(shifts)}
    for n, (row, shifts) in enumerate(SHIFTS.items())
}


def tables(evaluations: Mapping[str, Mapping[int, Evaluation]] = EVALUATIONS, **more: object) -> list[MeasureTable]:
    return lab_tables(evaluations, judge_is_related=True, num_resamples=RESAMPLES, **more)  # type: ignore[arg-type]


def row_of(table: MeasureTable, name: str) -> RowEstimate:
    return next(row for row in table.rows if row.row == name)


def test_what_is_far_is_clear_and_what_is_near_is_not():
    (table,) = tables()
    assert [(row.row, row.verdict) for row in table.rows] == [
        ("baseline", None), ("good", "better"), ("same", "unclear"),
    ]  # fmt: skip
    good = row_of(table, "good")
    values = {seed: one.card.results[0].value for seed, one in EVALUATIONS["good"].items()}
    assert good.per_seed == values
    assert good.mean.value == pytest.approx(np.mean(list(values.values())))


def test_who_is_the_baseline_turns_every_sign():
    (table,) = tables()
    (turned,) = tables({name: EVALUATIONS[name] for name in ("good", "baseline")})
    there, back = row_of(table, "good").difference, row_of(turned, "baseline").difference
    assert there is not None
    assert back is not None
    assert back.low is not None
    assert there.high is not None
    assert back.value == pytest.approx(-there.value)
    assert back.low == pytest.approx(-there.high)
    assert row_of(turned, "baseline").verdict == "worse"


def test_the_two_errors_are_those_of_seeds_and_of_pictures():
    (table,) = tables()
    difference = row_of(table, "good").difference
    assert difference is not None
    pairs = [(EVALUATIONS["baseline"][seed], EVALUATIONS["good"][seed]) for seed in range(3)]
    (over_seeds,) = compare_seeds(pairs, num_resamples=5)
    assert over_seeds.high is not None
    of_seeds = over_seeds.high - over_seeds.difference  # Student's t, as `arra report` has it
    gaps = torch.stack([b.values["novel/nll"] - a.values["novel/nll"] for a, b in pairs]).mean(0).double().numpy()
    groups = EVALUATIONS["good"][0].values["novel/groups"]
    drawn = [c @ gaps / c.sum() for c in draw_counts(NUM_IMAGES, num_resamples=RESAMPLES, groups=groups)]
    of_pictures = 1.959964 * np.std(drawn, ddof=1)
    assert difference.value == pytest.approx(over_seeds.difference, rel=1e-5)
    assert difference.high is not None
    assert difference.high - difference.value == pytest.approx(math.hypot(of_seeds, of_pictures), rel=1e-4)


def test_p_is_where_the_interval_begins_to_hold_zero():
    (table,) = tables()
    for name in ("good", "same"):
        row = row_of(table, name)
        assert row.difference is not None
        assert row.p is not None
        half = half_width(
            level=1 - row.p, seed_error=row.difference.seed_error, degrees=2,
            picture_error=row.difference.picture_error,
        )  # fmt: skip
        assert half == pytest.approx(abs(row.difference.value), rel=1e-3)
        assert row.p_corrected is not None
        assert row.p_corrected >= row.p


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_one_seed_decides_nothing():
    (table,) = tables({row: {0: seeds[0]} for row, seeds in EVALUATIONS.items()})
    good = row_of(table, "good")
    assert good.verdict == "unclear"
    assert good.p is None
    assert good.difference is not None
    assert good.difference.seed_error is None
    assert good.difference.low is not None  # pictures alone


def test_differences_are_of_the_seeds_that_both_have():
    some = {"baseline": EVALUATIONS["baseline"], "good": {2: EVALUATIONS["good"][2], 7: EVALUATIONS["good"][0]}}
    good = row_of(tables(some)[0], "good")
    assert good.difference is not None
    assert good.difference.value == pytest.approx(good.per_seed[2] - row_of(tables(some)[0], "baseline").per_seed[2])
    alone = row_of(tables({**some, "good": {7: EVALUATIONS["good"][0]}})[0], "good")
    assert alone.difference is None


def test_the_validation_loss_has_an_interval_over_seeds_alone():
    found = tables(validation={"baseline": {0: 3.0, 1: 3.2}, "good": {0: 2.0, 1: 2.3}})[0]
    assert found.measure.metric == "validation_nll"
    good = row_of(found, "good")
    assert good.difference is not None
    assert good.difference.value == pytest.approx(-0.95)
    assert good.difference.picture_error is None
    half = 12.7062 * np.std([-1.0, -0.9], ddof=1) / math.sqrt(2)
    assert good.difference.high == pytest.approx(-0.95 + half, rel=1e-4)


def test_spaces_are_told_and_raw_pictures_left_out():
    evaluations = {"baseline": {0: evaluation("a", shift=0.0, noise=1, features=True)}}
    found = {table.measure.metric: table.measure.space for table in tables(evaluations)}
    assert found == {"nll": "no judge", "frechet": "teacher's family", "caption_frechet": "independent"}
    assert space_of("caption_gain", judge_is_related=True) == "no judge"
    assert space_of("caption_retrieval_at_10", judge_is_related=True) == "independent"
    assert space_of("kid_x1000", judge_is_related=False) == "other encoder"


def test_what_was_measured_differently_is_refused():
    other = Evaluation(
        card=Card(run="x", protocol={**PROTOCOL, "seed": 1}, results=EVALUATIONS["good"][0].card.results),
        values=EVALUATIONS["good"][0].values,
    )
    with pytest.raises(ArraError, match="were evaluated differently: seed"):
        tables({"baseline": EVALUATIONS["baseline"], "good": {0: other}})
    with pytest.raises(ArraError, match=r"^no evaluated run to compare"):
        tables({})
