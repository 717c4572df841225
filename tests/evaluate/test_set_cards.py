"""Cards of sets of pictures: rows with a space of their own, what must stand beside them, and how two are compared."""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from arra.errors import ArraError
from arra.evaluate.card import (
    ASKED,
    CARD_FILE,
    CLASS_BALANCE,
    DUPLICATES,
    WARNINGS,
    Card,
    Evaluation,
    Result,
    asked_hash,
    describe,
    measure_row,
    row_values,
    warnings_of,
)
from arra.evaluate.compare import SMALLEST_P, compare, holm, noise_probability
from arra.evaluate.measured import Measured

HARD = np.random.default_rng(0).normal(size=400)
"""How hard each prompt is: what pairing takes away."""


def measured(values: np.ndarray, **changes: Any) -> Measured:
    return Measured(value=float(values.mean()), per_picture=values.astype(np.float64), **changes)


def set_card(
    name: str, *, shift: float = 0.0, seed: int = 1, num_images: int = 400, asked: str | None = "same", **about: Any
) -> Evaluation:
    """An evaluated set: the higher `shift`, the better; `seed` is of its own noise."""
    rng = np.random.default_rng(seed)
    score = HARD[:num_images] + shift + 0.05 * rng.normal(size=num_images)
    found = [
        ("fid", "inception", measured(40 - score)),
        ("kid_x1000", "inception", measured(5 - 0.1 * score)),
        ("clip_score", "biomedclip", measured(0.4 + 0.01 * score)),
        ("recall", "inception", measured((rng.random(50) < 0.5 + 0.1 * shift).astype(float), of="reference")),
    ]
    rows, values = list[Result](), dict[str, torch.Tensor]()
    for metric, space, one in found:
        teachers = space == "biomedclip"
        row = measure_row(
            one,
            metric=metric,
            space=space,
            split="test",
            num_images=num_images,
            is_teachers=teachers,
            num_resamples=60,
        )
        rows.append(row)
        values |= row_values(row, one)
    card = Card(
        run=name,
        protocol={"protocol": "mimic-cxr", "reference_sha256": "abc"},
        results=tuple(rows),
        about={ASKED: asked, **about},
    )
    return Evaluation(card=card, values=values)


def row_of(card: Card, metric: str) -> Result:
    return next(row for row in card.results if row.metric == metric)


def test_a_row_is_the_mean_with_an_interval_of_the_means_spread() -> None:
    values = np.random.default_rng(3).normal(7, 2, size=2000)
    row = measure_row(measured(values), metric="fid", space="inception", split="test", num_resamples=500)
    assert row.value == values.mean()
    assert row.low is not None
    assert row.high is not None
    assert row.low < row.value < row.high
    half = scipy.stats.norm.ppf(0.975) * scipy.stats.sem(values)
    assert (row.high - row.low) / 2 == pytest.approx(half, rel=0.15)
    assert (row.better, row.unit, row.num_images) == ("lower", "feature units", 2000)


def test_groups_are_resampled_whole_but_not_in_the_reference() -> None:
    values = np.repeat(np.random.default_rng(3).normal(size=20), 10)
    groups = torch.arange(20).repeat_interleave(10)
    apart, together = (
        measure_row(measured(values), metric="clip_score", space="x", split="test", groups=each)
        for each in (None, groups)
    )
    assert together.high - together.low > 2 * (apart.high - apart.low)  # type: ignore[operator]
    of_reference = measured(values[:7], of="reference")
    row = measure_row(of_reference, metric="recall", space="x", split="test", groups=groups, num_images=200)
    assert (row.num_images, row.of) == (200, "reference")
    with pytest.raises(ValueError, match="say `num_images`"):
        measure_row(of_reference, metric="recall", space="x", split="test")


def test_one_picture_has_a_value_and_no_interval() -> None:
    row = measure_row(measured(np.array([0.5])), metric="clip_score", space="x", split="test")
    assert (row.value, row.low, row.high) == (0.5, None, None)


def test_values_have_names_of_their_own() -> None:
    one = Result(metric="fid", split="test", value=1.0, num_images=9, better="lower", unit="", space="inception")
    assert one.values_name == "test/inception.fid"
    assert dataclasses.replace(one, cfg_scale=1.5).values_name == "test/cfg1.5/inception.fid"
    assert dataclasses.replace(one, of="reference").values_name == "test/of_reference/inception.fid"
    assert dataclasses.replace(one, reference="train").values_name == "test/inception.fid.train"
    assert dataclasses.replace(one, space=None).values_name == "test/fid"
    assert one.key != dataclasses.replace(one, space="rad-dino").key
    assert describe(one) == "fid (inception) test"


def test_parts_of_a_measure_are_as_the_whole_and_strangers_are_refused() -> None:
    one = measured(np.array([0.5, 0.7]))
    assert measure_row(one, metric="findings_auroc.Effusion", split="test").better == "higher"
    assert measure_row(one, metric="kid_x1000", space="x", split="test").better == "lower"
    with pytest.raises(ValueError, match="'shininess' is not known"):
        measure_row(one, metric="shininess", split="test")
    assert measure_row(one, metric="shininess", split="test", better="lower", unit="").unit == ""


def test_a_set_card_comes_back_with_all_its_facts(tmp_path: Path) -> None:
    written = set_card("sets/a", cfg_scale=2.0, seeds=[0, 1], sampling={"top_k": 0})
    written.save(tmp_path)
    read = Evaluation.load(tmp_path)
    assert read.card == written.card
    assert read.values.keys() == written.values.keys()


def test_cards_of_before_still_load() -> None:
    content = json.loads(set_card("sets/a").card.to_json())
    del content["about"]
    for row in content["results"]:
        for name in ("space", "of", "is_teachers", "note"):
            del row[name]
    card = Card.from_json(json.dumps(content))
    assert card.about == {}
    assert (card.results[0].space, card.results[0].of, card.results[0].note) == (None, "generated", None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("space", 3, "space: 3 is not text"),
        ("of", "training", "of: 'training' is not one of generated, reference"),
        ("is_teachers", "yes", "is_teachers: 'yes' is not true or false"),
        ("num_images", 2.5, "num_images: 2.5 is not a number of pictures"),
    ],
)
def test_broken_rows_are_named(name: str, value: object, message: str) -> None:
    content = json.loads(set_card("sets/a").card.to_json())
    content["results"][1][name] = value
    with pytest.raises(ArraError, match=rf"card: results\[1\]: {re.escape(message)}"):
        Card.from_json(json.dumps(content), where="card")


@pytest.mark.parametrize(("num_images", "is_biased"), [(4999, True), (5000, False)])
def test_frechet_distances_of_few_pictures_are_marked(num_images: int, is_biased: bool) -> None:
    few = Result(
        metric="fid", split="test", value=1.0, num_images=num_images, better="lower", unit="", space="inception"
    )
    assert few.is_biased == is_biased
    assert bool(few.marks) == is_biased
    assert not dataclasses.replace(few, metric="kid_x1000").is_biased
    told = warnings_of(Card(run="x", protocol={}, results=(few,)))
    assert any("No kernel distance stands beside" in line for line in told) == is_biased
    both = (few, dataclasses.replace(few, metric="kid_x1000"))
    assert len(warnings_of(Card(run="x", protocol={}, results=both))) == (1 if is_biased else 0)


def test_the_teachers_space_alone_is_a_warning() -> None:
    card = set_card("sets/a").card
    assert "the teacher's own space" in row_of(card, "clip_score").marks
    assert not any("teacher" in line for line in warnings_of(card))
    alone = dataclasses.replace(card, results=(row_of(card, "clip_score"),))
    assert "Every space of this card (biomedclip) is the alignment teacher's own" in warnings_of(alone)[0]


def test_what_moves_numbers_is_told() -> None:
    unequal: dict[str, Any] = {DUPLICATES: 3, CLASS_BALANCE: {"cat": 5, "dog": 9}}
    equal: dict[str, Any] = {CLASS_BALANCE: {"cat": 5, "dog": 5}}
    told = warnings_of(set_card("a", **unequal).card)
    assert any(line.startswith("3 pictures are exact copies") for line in told)
    assert any("5 to 9 pictures per class" in line for line in told)
    assert not any("class" in line for line in warnings_of(set_card("a", **equal).card))


def test_what_was_asked_for_is_hashed_in_order() -> None:
    assert asked_hash(None, None) is None
    assert asked_hash(["a", "b"], None) != asked_hash(["b", "a"], None)
    assert asked_hash(None, [1, 2]) == asked_hash(None, (1, 2)) != asked_hash(None, [2, 1])
    assert asked_hash(["a"], [1]) == asked_hash(["a"], None)


def by_metric(rows: Sequence[Any]) -> dict[str, Any]:
    return {row.metric: row for row in rows}


def test_the_same_prompts_are_paired_and_others_are_not() -> None:
    one, other = set_card("a"), set_card("b", shift=0.1, seed=2)
    strange = set_card("b", shift=0.1, seed=2, asked="other")
    unknown = set_card("b", shift=0.1, seed=2, asked=None)
    paired = by_metric(compare(one, other, num_resamples=200))
    assert paired["fid"].is_paired
    assert paired["fid"].verdict == "better"
    assert paired["fid"].space == "inception"
    for apart in (compare(one, strange, num_resamples=200), compare(unknown, unknown, num_resamples=200)):
        rows = by_metric(apart)
        assert not rows["fid"].is_paired
        assert rows["recall"].is_paired  # the reference is one
        assert rows["fid"].verdict == "no clear difference"
        assert rows["fid"].high - rows["fid"].low > 5 * (paired["fid"].high - paired["fid"].low)
    spread = np.sqrt(2 / 400) * HARD.std()
    width = by_metric(compare(one, strange, num_resamples=400))["fid"]
    assert (width.high - width.low) / (2 * 1.96) == pytest.approx(spread, rel=0.15)


def test_identical_sets_differ_by_nothing() -> None:
    for row in compare(set_card("a"), set_card("b"), num_resamples=20):
        assert (row.difference, row.low, row.high, row.p, row.p_corrected) == (0, 0, 0, 1, 1)


def test_noise_is_called_noise_and_corrected_for_the_rows() -> None:
    rows = compare(set_card("a"), set_card("b", shift=0.1, seed=2), num_resamples=200)
    assert by_metric(rows)["fid"].p == SMALLEST_P
    assert [row.p_corrected for row in rows] == holm([row.p for row in rows])
    assert by_metric(rows)["recall"].p > 0.05
    assert by_metric(rows)["clip_score"].marks == ("the teacher's own space",)


def test_p_is_the_normal_tail_of_the_spread() -> None:
    drawn = np.random.default_rng(0).normal(0.3, 0.2, size=5000)
    expected = 2 * scipy.stats.norm.sf(0.3 / drawn.std(ddof=1))
    assert noise_probability(0.3, drawn) == noise_probability(-0.3, drawn) == pytest.approx(expected)
    assert noise_probability(9.0, drawn) == SMALLEST_P
    assert noise_probability(0.1, np.full(9, 0.1)) == SMALLEST_P
    assert noise_probability(0.0, np.zeros(9)) == 1


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_of_equals_is_uniform() -> None:
    """Two sets of one distribution: small p-values come as often as they say."""
    found = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        gaps = rng.normal(size=60)
        counts = rng.multinomial(60, np.full(60, 1 / 60), size=100)
        found.append(noise_probability(float(gaps.mean()), counts @ gaps / 60))
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.11
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)


def test_unequal_numbers_are_refused_where_the_number_matters() -> None:
    one, fewer = set_card("a"), set_card("b", num_images=300, asked=None)
    with pytest.raises(ArraError, match=r"fid \(inception\) test covers 400 .* and 300 pictures"):
        compare(one, fewer)

    def only(evaluation: Evaluation, *metrics: str) -> Evaluation:
        rows = tuple(row for row in evaluation.card.results if row.metric in metrics)
        return dataclasses.replace(evaluation, card=dataclasses.replace(evaluation.card, results=rows))

    rows = compare(only(one, "kid_x1000", "clip_score"), only(fewer, "kid_x1000", "clip_score"), num_resamples=20)
    assert [row.is_paired for row in rows] == [False, False]
    with pytest.raises(ArraError, match=r"recall \(inception\) test covers"):
        compare(only(one, "recall"), only(fewer, "recall"))


def test_facts_need_not_match_but_protocols_must() -> None:
    one, other = set_card("a", cfg_scale=1.0), set_card("b", cfg_scale=4.0)
    assert compare(one, other, num_resamples=20)
    card = dataclasses.replace(other.card, protocol={**other.card.protocol, "reference_sha256": "def"})
    with pytest.raises(ArraError, match=r"a and b were evaluated differently: reference_sha256 \('abc' and 'def'\)"):
        compare(one, dataclasses.replace(other, card=card))


def test_values_that_are_of_another_set_are_refused() -> None:
    one = set_card("a")
    shorter = {**one.values, "test/inception.fid": one.values["test/inception.fid"][:-1]}
    with pytest.raises(ArraError, match="the card says 400 pictures, its values have 399"):
        compare(dataclasses.replace(one, values=shorter), one)
    missing = {name: value for name, value in one.values.items() if "recall" not in name}
    with pytest.raises(ArraError, match=r"recall \(inception\) test: no per-picture values test/of_reference/incep"):
        compare(dataclasses.replace(one, values=missing), one)


def with_row(card: Evaluation, metric: str, values: np.ndarray, *, num_images: int) -> Evaluation:
    """The card with one more row, whose values are not one for each picture."""
    one = measured(values)
    row = dataclasses.replace(
        measure_row(one, metric=metric, space="pixels", split="test", num_resamples=60), num_images=num_images
    )
    results = (*card.card.results, row)
    return Evaluation(
        card=dataclasses.replace(card.card, results=results), values={**card.values, **row_values(row, one)}
    )


def test_values_of_pairs_and_of_some_of_very_many_pictures_are_compared() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.random(200)
    one, other = (
        with_row(set_card(name), "ms_ssim_within", pairs + shift, num_images=400)
        for name, shift in (("a", 0), ("b", 0.1))
    )
    found = compare(one, other)[-1]
    assert (found.metric, found.verdict, found.num_images) == ("ms_ssim_within", "worse", 400)
    groups = {"test/groups": torch.arange(400) // 20}  # of pictures, not of pairs
    grouped = [Evaluation(card=each.card, values={**each.values, **groups}) for each in (one, other)]
    assert compare(*grouped)[-1].low == found.low
    some = [with_row(set_card(name), "clip_score", pairs, num_images=50_001) for name in "ab"]
    assert compare(*some)[-1].difference == 0
    with pytest.raises(ArraError, match="the card says 100 pictures, its values have 200"):
        compare(*(with_row(set_card(name), "ms_ssim_within", pairs, num_images=100) for name in "ab"))
    with pytest.raises(ArraError, match="the card says 50000 pictures, its values have 200"):
        compare(*(with_row(set_card(name), "clip_score", pairs, num_images=50_000) for name in "ab"))


def test_pictures_of_one_group_are_drawn_together_also_where_one_card_says_less() -> None:
    one, other = set_card("a"), set_card("b", seed=2, shift=0.01)
    groups = {"test/groups": torch.arange(400) // 20}
    grouped = [Evaluation(card=each.card, values={**each.values, **groups}) for each in (one, other)]
    told = [compare(*pair) for pair in (grouped, (one, grouped[1]), (grouped[0], other))]
    assert told[0] == told[1] == told[2]
    alone = compare(one, other)
    assert alone[0].low != told[0][0].low
    assert alone[3] == told[0][3]  # recall: of the reference's pictures
    renamed = Evaluation(card=other.card, values={**other.values, "test/groups": torch.arange(400) // 40})
    assert compare(grouped[0], renamed)  # prompts that are told by record in one and by words in the other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": {WARNINGS: 5}}, "about.warnings must be a list"),
        ({"about": {DUPLICATES: "many"}}, "must count pictures"),
        ({"about": {CLASS_BALANCE: [1, 2]}}, "must count pictures"),
        ({"about": {CLASS_BALANCE: {"0": "x"}}}, "must count pictures"),
        ({"protocol": {"k": [3]}}, "protocol.k must be one plain value"),
        ({"value": 10**400}, "value: 1000"),
        ({"num_images": True}, "num_images: True is not"),
    ],
)
def test_what_a_card_says_is_checked_before_it_is_shown(change: dict[str, Any], message: str) -> None:
    content = json.loads(set_card("a").card.to_json())
    for key, value in change.items():
        (content if key in content else content["results"][0])[key] = value
    with pytest.raises(ArraError, match=message):
        Card.from_json(json.dumps(content))
    with pytest.raises(ArraError, match="not JSON"):
        Card.from_json("[" * 100_000)


def test_values_that_are_not_one_number_a_picture_are_refused() -> None:
    one = set_card("a")
    other = Evaluation(card=one.card, values={**one.values, "test/inception.fid": torch.ones(400, 2)})
    with pytest.raises(ArraError, match=r"has shape \(400, 2\), expected one number a picture"):
        compare(one, other)
    axes = dataclasses.replace(one.card, protocol={"frechet_components": "x"})
    with pytest.raises(ArraError, match="frechet_components: 'x' is no number of axes"):
        _ = Evaluation(card=axes, values={}).num_components


def test_no_older_card_stands_beside_newer_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_card("a").save(tmp_path)
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == CARD_FILE:
            raise OSError(errno.ENOSPC, "no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArraError, match="cannot write the evaluation"):
        set_card("b", seed=5).save(tmp_path)
    with pytest.raises(ArraError, match=r"metrics\.json: missing"):
        Evaluation.load(tmp_path)
