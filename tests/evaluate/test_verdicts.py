"""Verdicts on a paper's numbers and differences: closed cases, the same rules for whoever is expected to win."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from arra.errors import ArraError
from arra.evaluate.card import ASKED, PIXELS, Card, Evaluation, measure, measure_row, row_values, values_key
from arra.evaluate.compare import holm, student_t_quantile
from arra.evaluate.lab import Resampled, measure_tables
from arra.evaluate.measured import Measured
from arra.evaluate.paper import TableRow
from arra.evaluate.verdicts import Cell, Judged, Reached, RowResult, Scale, TableResult, Verdict, table_rows, tally

COLUMNS = {"fd": "FID", "ms_ssim": "MS-SSIM", "clip_score": "CLIP-Score"}
XRV, DINO = "xrv-densenet121", "rad-dino"
NEAR = (0.0, 0.01, -0.01)
"""What three seeds add to a number."""


def run_card(shift: float, *, noise: int = 0, seed: int = 0) -> Evaluation:
    """A run's card: Fréchet distances of about 5 shift^2, in the caption judge's space of half as much."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(noise)
    values: dict[str, torch.Tensor] = {}
    rows = []
    for judge, part in (("", 1.0), ("caption_", math.sqrt(0.5))):
        seen = torch.randn(20, 5, generator=shared)
        moved = seen + part * shift + 0.02 * torch.randn(20, 5, generator=own)
        values[f"novel/reference/{judge}reconstructions"] = seen
        values[values_key(f"{judge}features", split="novel", cfg_scale=2.0)] = moved
        metric, reference = f"{judge}frechet", "reconstructions"
        rows.append(measure(values, metric=metric, split="novel", cfg_scale=2.0, reference=reference, num_resamples=3))
    return Evaluation(card=Card(run="run", protocol={"seed": seed}, results=tuple(rows)), values=values)


def set_card(
    numbers: Mapping[tuple[str, str], float],
    *,
    count: int = 1000,
    protocol: str | None = "mimic-cxr",
    asked: str | None = "same",
    spread: float = 1e-6,
    teachers: Sequence[str] = (),
) -> Evaluation:
    """A set's card of (metric, network): number; per-picture values differ by `spread`, the same for all cards."""
    rows, values = [], dict[str, torch.Tensor]()
    for (metric, network), number in numbers.items():
        per_picture = number + spread * np.linspace(-1, 1, count)
        found = Measured(value=float(per_picture.mean()), per_picture=per_picture)
        row = measure_row(
            found, metric=metric, split="test", space=network, is_teachers=network in teachers, num_resamples=2
        )
        rows.append(row)
        values |= row_values(row, found)
    about = {"protocol": protocol, "num_images": count}
    return Evaluation(card=Card(run="set", protocol=about, results=tuple(rows), about={ASKED: asked}), values=values)


def by_seed(value: float, *, key: tuple[str, str] = ("fd", XRV), **more: Any) -> dict[int, Evaluation]:
    """Three seeds of one number."""
    return {seed: set_card({key: value + add}, **more) for seed, add in enumerate(NEAR)}


def judged(
    rows: Mapping[str, Reached], *, scale: Scale = "full", columns: Mapping[str, str] = COLUMNS
) -> dict[str, RowResult]:
    found = table_rows(rows, columns=columns, scale=scale, judge_is_related=True, resampled=Resampled(num_resamples=20))
    assert [row.name for row in found] == list(rows)
    return {row.name: row for row in found}


def facts(fd: float | None = None, *, against: str | None = None, **more: Any) -> TableRow:
    expect = {} if fd is None else {"fd": fd}
    return TableRow(**{"expect": expect, "against": against} | more)


def effect_of(base: Reached, row: Reached, *, scale: Scale = "full") -> Judged | None:
    cell = judged({"base": base, "row": row}, scale=scale)["row"].speaking("fd")
    assert cell is not None
    return cell.effect


@pytest.mark.parametrize(
    ("ours", "papers", "verdict", "why"),
    [
        (4.0, 4.15, "reproduced", "better, as in the paper"),
        (6.0, 5.95, "reproduced", "worse, as in the paper"),
        (4.0, 5.95, "not reproduced", "better, where the paper's is worse"),
        (6.0, 4.15, "not reproduced", "worse, where the paper's is better"),
        (5.001, 4.15, "unclear", "no clear difference"),
        (4.0, 5.10, "not comparable", "the paper has no difference"),
    ],
)
def test_of_a_difference_the_direction_is_looked_for(ours: float, papers: float, verdict: Verdict, why: str):
    base = Reached(facts=facts(5.10), evaluations=by_seed(5.0))
    jitter = {seed: set_card({("fd", XRV): ours + add}) for seed, add in enumerate((0.01, -0.01, 0.0))}
    found = effect_of(base, Reached(facts=facts(papers, against="base"), evaluations=jitter))
    assert found is not None
    assert found.verdict == verdict
    assert found.why.startswith(why)


def test_a_measure_where_more_is_better_follows_the_papers_quality():
    """The caption judge's and the paper's directions are of quality, not of numbers."""
    key = ("clip_score", "biomedclip")
    base = Reached(facts=TableRow(expect={"clip_score": 0.44}), evaluations=by_seed(0.40, key=key))
    for ours, papers, verdict in ((0.9, 0.45, "reproduced"), (0.9, 0.43, "not reproduced")):
        row = Reached(facts=TableRow(expect={"clip_score": papers}, against="base"), evaluations=by_seed(ours, key=key))
        cell = judged({"base": base, "row": row})["row"].speaking("clip_score")
        assert cell is not None
        assert cell.effect is not None
        assert cell.effect.verdict == verdict


def test_embedded_rows_are_judged_by_stand_ins_outside_the_teachers_space_first():
    base = Reached(
        facts=facts(5.10), evaluations={seed: run_card(1 + add, noise=seed) for seed, add in enumerate(NEAR)}
    )
    row = Reached(
        facts=TableRow(expect={"fd": 4.15, "ms_ssim": 0.422}, against="base"),
        evaluations={seed: run_card(0.5 + add, noise=9 + seed) for seed, add in enumerate(NEAR)},
        validation={0: 2.0},
    )
    found = judged({"base": base, "row": row}, scale="embedded")["row"]
    assert [(cell.measure.metric, cell.column) for cell in found.cells] == [
        ("caption_frechet", "fd"), ("frechet", "fd"), ("validation_nll", None),
    ]  # fmt: skip
    first, second, last = found.cells
    assert found.speaking("fd") is first
    assert found.speaking("ms_ssim") is None
    assert first.measure.space == "independent"
    for cell in (first, second):
        assert cell.paper == 4.15
        assert cell.paper_difference == pytest.approx(-0.95)
        assert cell.effect is not None
        assert cell.effect.verdict == "reproduced"
        assert cell.number == Judged(verdict="not comparable", why="embedded data and a small model")
    assert (last.paper, last.number, last.effect, last.difference) == (None, None, None, None)


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (Reached(facts=facts(5.1, label="UniXGen", external=True)), "UniXGen is another system's"),
        (Reached(facts=facts(5.1), missing="training failed"), "base: training failed"),
        (Reached(facts=facts(5.1)), "base: not evaluated"),
        (Reached(facts=facts(5.1), evaluations={7: set_card({("fd", XRV): 5.0})}), "no training seed in common"),
        (Reached(facts=facts(5.1), evaluations=by_seed(5.0, count=900)), "evaluated differently: num_images"),
    ],
)
def test_without_a_row_to_be_held_against_the_difference_is_not_comparable(base: Reached, why: str):
    row = Reached(facts=facts(4.15, against="base"), evaluations=by_seed(4.15))
    cell = judged({"base": base, "row": row})["row"].speaking("fd")
    assert cell is not None
    assert cell.difference is None
    assert cell.effect is not None
    assert cell.effect.verdict == "not comparable"
    assert why in cell.effect.why
    assert cell.ours.value == pytest.approx(4.15, abs=1e-6)  # the row's own number is told all the same
    assert cell.number is not None
    assert cell.number.verdict == "reproduced"


def test_one_seed_decides_nothing():
    one = {0: set_card({("fd", XRV): 4.15}, spread=0.1)}
    found = judged(
        {
            "base": Reached(facts=facts(5.10), evaluations=by_seed(5.0, spread=0.1)),
            "row": Reached(facts=facts(4.15, against="base"), evaluations=one),
        }
    )
    cell = found["row"].speaking("fd")
    assert cell is not None
    assert cell.difference is not None
    for one_judged in (cell.number, cell.effect):
        assert one_judged is not None
        assert one_judged.verdict == "unclear"
        assert one_judged.why.startswith("one seed")


@pytest.mark.parametrize(
    ("distance", "verdict", "why"),
    [(0.99, "reproduced", "lies in ["), (1.01, "not reproduced", "above"), (-1.01, "not reproduced", "below")],
)
def test_the_papers_number_is_held_against_one_more_run(distance: float, verdict: Verdict, why: str):
    """Half of the interval: Student's t times the spread of seeds, times sqrt(1 + 1/S)."""
    values = np.array([4.0, 4.1, 4.3])
    half = student_t_quantile(0.95, degrees=2) * values.std(ddof=1) * math.sqrt(1 + 1 / 3)
    paper = float(values.mean() + distance * half)
    row = Reached(facts=facts(paper), evaluations={s: set_card({("fd", XRV): v}) for s, v in enumerate(values)})
    cell = judged({"row": row})["row"].speaking("fd")
    assert cell is not None
    assert cell.number is not None
    assert cell.number.verdict == verdict
    assert why in cell.number.why


def test_pictures_count_twice_for_the_papers_are_others():
    wide = {seed: set_card({("fd", XRV): 5.0}, spread=1.0) for seed in range(3)}
    ours = judged({"row": Reached(facts=facts(5.0), evaluations=wide)})["row"].cells[0].ours
    assert ours.seed_error == 0
    assert ours.picture_error is not None
    for times, verdict in ((1.41, "reproduced"), (1.42, "not reproduced")):
        paper = ours.value + times * 1.959964 * ours.picture_error
        cell = judged({"row": Reached(facts=facts(paper), evaluations=wide)})["row"].cells[0]
        assert cell.number is not None
        assert cell.number.verdict == verdict


def test_an_interval_that_holds_anything_says_nothing():
    wide = {seed: set_card({("fd", XRV): value}) for seed, value in enumerate((3.0, 6.0))}
    for paper, verdict in ((4.0, "unclear"), (900.0, "not reproduced")):
        cell = judged({"row": Reached(facts=facts(paper), evaluations=wide)})["row"].cells[0]
        assert cell.number is not None
        assert cell.number.verdict == verdict


def number_of(row: Reached, column: str = "fd") -> Judged:
    cell = judged({"row": row})["row"].speaking(column)
    assert cell is not None
    assert cell.number is not None
    return cell.number


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (Reached(facts=facts(4.15), evaluations=by_seed(4.15), not_comparable={"fd": "other data"}), "other data"),
        (
            Reached(facts=facts(4.15), evaluations=by_seed(4.15, key=("fd", DINO))),
            "fd in rad-dino, where the paper has fd in xrv-densenet121",
        ),
        (
            Reached(facts=facts(4.15), evaluations=by_seed(4.15, key=("kid_x1000", XRV))),
            "kid_x1000 in xrv-densenet121, where the paper has fd in xrv-densenet121",
        ),
        (
            Reached(facts=facts(4.15), evaluations=by_seed(4.15, count=900)),
            "900 pictures, the paper's are 1,000, and fd depends on their number",
        ),
        (Reached(facts=facts(4.15), evaluations=by_seed(4.15, protocol=None)), "not measured by a protocol that has"),
        (Reached(facts=facts(4.15), evaluations=by_seed(4.15, protocol="laion-coco")), "not measured by a protocol"),
    ],
)
def test_numbers_of_something_else_are_not_comparable(row: Reached, why: str):
    assert number_of(row).verdict == "not comparable"
    assert why in number_of(row).why


def test_a_protocol_of_no_paper_measures_all_that_it_names():
    """So a table of somebody's own is judged, in the space that the protocol names."""
    own, pixels = by_seed(4.15, key=("fd", "dinov2-l14"), protocol="general"), by_seed(4.15, protocol="general")
    assert number_of(Reached(facts=facts(4.15), evaluations=own)).verdict == "reproduced"
    assert number_of(Reached(facts=facts(9.0), evaluations=own)).verdict == "not reproduced"
    assert "where the paper has fd in dinov2-l14" in number_of(Reached(facts=facts(4.15), evaluations=pixels)).why


def test_means_over_pictures_compare_at_any_number_of_them():
    few = by_seed(0.41, key=("ms_ssim", PIXELS), count=900)
    assert number_of(Reached(facts=TableRow(expect={"ms_ssim": 0.41}), evaluations=few), "ms_ssim").verdict == (
        "reproduced"
    )


def test_the_papers_own_measure_speaks_before_those_that_stand_for_it():
    numbers = {("fd", DINO): 90.0, ("kid_x1000", XRV): 1.0, ("copied", DINO): 0.1, ("fd", XRV): 4.15}
    cells = judged({"row": Reached(facts=facts(4.15), evaluations={0: set_card(numbers)})})["row"].cells
    assert [(cell.measure.metric, cell.measure.network, cell.column) for cell in cells] == [
        ("fd", XRV, "fd"), ("kid_x1000", XRV, "fd"), ("fd", DINO, "fd"), ("copied", DINO, None),
    ]  # fmt: skip


def test_a_row_stands_in_the_column_that_it_has_a_number_for():
    """Two data sets under one heading: distances of X-rays and of retinas."""
    evaluations = {0: run_card(1.0)}
    columns = {"fd": "FID", "fid": "FID"}
    for own in columns:
        row = Reached(facts=TableRow(expect={own: 4.0}), evaluations=evaluations)
        found = judged({"row": row}, scale="embedded", columns=columns)["row"]
        assert [cell.column for cell in found.cells] == [own, own]


def three_rows() -> dict[str, Reached]:
    return {
        "a": Reached(facts=facts(5.1), evaluations=by_seed(5.0)),
        "a-aligned": Reached(
            facts=facts(4.1, against="a"),
            evaluations={seed: set_card({("fd", XRV): 4.93 - add}) for seed, add in enumerate(NEAR)},
        ),
        "b": Reached(facts=facts(7.1), evaluations=by_seed(7.0, count=999)),
        "b-aligned": Reached(
            facts=facts(5.3, against="b"),
            evaluations={seed: set_card({("fd", XRV): 6.96 - add}, count=999) for seed, add in enumerate(NEAR)},
        ),
    }


def test_differences_are_corrected_for_all_rows_of_the_table():
    together = judged(three_rows())
    names = ("a-aligned", "b-aligned")
    alone = {
        name: judged({each: row for each, row in three_rows().items() if name.startswith(each)})[name].cells[0]
        for name in names
    }
    p = [alone[name].p_corrected for name in names]
    assert all(each is not None and 1e-9 < each < 0.5 for each in p)
    assert [together[name].cells[0].p_corrected for name in names] == pytest.approx(holm([each or 0 for each in p]))
    assert together["a"].cells[0].p_corrected is None
    assert together["a"].cells[0].difference is None


def test_without_numbers_of_the_paper_there_is_nothing_to_judge():
    row = Reached(facts=facts(against="base"), evaluations=by_seed(4.0), validation={0: 2.0, 1: 2.1})
    base = Reached(facts=facts(5.1), evaluations=by_seed(5.0), validation={0: 3.0, 1: 3.2})
    for cell in judged({"base": base, "row": row})["row"].cells:
        assert (cell.paper, cell.number, cell.effect) == (None, None, None)
        assert cell.difference is not None
        assert cell.difference.value == pytest.approx(-1.05 if cell.measure.metric == "validation_nll" else -1.0)


def test_facts_of_a_row_come_through():
    external = judged({"x": Reached(facts=facts(9.0, label="UniXGen", external=True, group="MIMIC", note="theirs"))})
    assert (external["x"].label, external["x"].group, external["x"].note) == ("UniXGen", "MIMIC", "theirs")
    assert external["x"].external
    assert external["x"].cells == ()
    told = judged(
        {"y": Reached(facts=facts(), evaluations=by_seed(5.0), steps=7, train_seconds=1.5, teacher_seconds=0.5)}
    )["y"]
    assert (told.label, told.seeds, told.steps, told.train_seconds, told.teacher_seconds) == (
        "y", (0, 1, 2), 7, 1.5, 0.5,
    )  # fmt: skip


def test_every_statement_counts_once():
    base = TableRow(expect={"fd": 5.1, "ms_ssim": 0.4})
    row = TableRow(expect={"fd": 4.1, "ms_ssim": 0.5, "clip_score": 0.4}, against="base")
    numbers = {("fd", XRV): 4.1, ("fd", DINO): 90.0}
    found = table_rows(
        {
            "base": Reached(facts=base, evaluations=by_seed(9.0)),
            "row": Reached(
                facts=row, evaluations={s: set_card({key: v + add for key, v in numbers.items()}) for s, add in
                                        enumerate(NEAR)},
            ),
            "x": Reached(facts=facts(1.0, external=True)),
            "later": Reached(facts=facts(1.0, against="base"), missing="not trained"),
        },
        columns=COLUMNS,
        scale="full",
        judge_is_related=False,
        resampled=Resampled(num_resamples=5),
    )  # fmt: skip
    table = TableResult(
        recipe="t", title="T", about="", scale="full", columns=COLUMNS, notes=(), rows=found
    )  # fmt: skip
    counted = tally([table, table])
    # numbers: fd twice; ms_ssim and clip_score have nothing of ours. differences: cards of other measures do not fit
    assert counted["number"] == {"reproduced": 2, "not reproduced": 2, "unclear": 0, "not comparable": 6}
    assert counted["effect"] == {"reproduced": 0, "not reproduced": 0, "unclear": 0, "not comparable": 4}


# Cards of sets in the lab's tables


def test_networks_and_teachers_of_sets_are_told_apart():
    keys = (("fd", XRV), ("fd", DINO), ("ms_ssim", PIXELS), ("clip_score", "biomedclip"))
    evaluations = {
        "base": {0: set_card(dict.fromkeys(keys, 1.0))},
        "aligned": {0: set_card(dict.fromkeys(keys, 1.0), teachers=["biomedclip"])},
    }
    tables = measure_tables(evaluations, judge_is_related=True, resampled=Resampled(num_resamples=5))
    assert [(table.measure.network, table.measure.space) for table in tables] == [
        (XRV, "other encoder"), (DINO, "other encoder"), (PIXELS, "no judge"), ("biomedclip", "teacher's family"),
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "is_paired"), [("same", True), ("other", False), (None, False)])
def test_sets_are_paired_where_they_were_asked_for_the_same(asked: str | None, is_paired: bool):
    cards = [set_card({("fd", XRV): 5.0}, spread=1.0), set_card({("fd", XRV): 6.0}, spread=1.0, asked=asked)]
    evaluations = {name: {0: card} for name, card in zip("ab", cards, strict=True)}
    (table,) = measure_tables(evaluations, judge_is_related=True, resampled=Resampled(num_resamples=20))
    difference = table.rows[1].difference
    assert difference is not None
    assert difference.value == pytest.approx(1.0)
    assert difference.picture_error is not None
    assert (difference.picture_error < 1e-6) == is_paired


def test_values_of_reference_pictures_and_of_pairs_are_drawn_by_their_own_number():
    rows, values = [], dict[str, torch.Tensor]()
    for metric, network, of, count in (("recall", DINO, "reference", 30), ("ms_ssim_within", PIXELS, "generated", 15)):
        found = Measured(value=0.5, per_picture=np.resize([0.0, 1.0, 0.5], count), of=of)  # type: ignore[arg-type]
        row = measure_row(found, metric=metric, split="test", space=network, num_images=40, num_resamples=2)
        rows.append(dataclasses.replace(row, num_images=40))
        values |= row_values(row, found)
    values["test/groups"] = torch.arange(40) // 2
    card = Card(run="set", protocol={}, results=tuple(rows), about={ASKED: "x"})
    tables = measure_tables(
        {"a": {0: Evaluation(card=card, values=values)}}, judge_is_related=True, resampled=Resampled(num_resamples=50)
    )
    for table, count in zip(tables, (30, 15), strict=True):
        error = table.rows[0].mean.picture_error
        assert error == pytest.approx(math.sqrt(1 / 6 / count), rel=0.3)


def test_a_run_is_worked_out_once():
    card, resampled = run_card(1.0), Resampled(num_resamples=5)
    found = resampled.of(card.card.results[0], card)
    assert resampled.of(run_card(2.0).card.results[0], card) is found
    assert resampled.of(card.card.results[1], card) is not found
    assert resampled.of(card.card.results[0], run_card(1.0)) is not found


def test_seeds_of_a_row_that_were_measured_differently_are_refused():
    mixed = {0: set_card({("fd", XRV): 5.0}), 1: set_card({("fd", XRV): 5.0}, count=900)}
    with pytest.raises(ArraError, match="were evaluated differently: num_images"):
        judged({"row": Reached(facts=facts(5.0), evaluations=mixed)})


def test_cells_are_complete():
    """Every cell beside a number of the paper is judged."""
    for row in judged(three_rows()).values():
        for cell in row.cells:
            assert isinstance(cell, Cell)
            assert (cell.number is None) == (cell.paper is None)
            assert (cell.effect is None) == (cell.paper_difference is None)
