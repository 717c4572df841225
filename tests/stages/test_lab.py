"""The lab: rows at equal compute, nothing done twice, a table that follows from the cards, failures that are told."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import arra.stages.lab
import arra.stages.tasks
from arra.config import load_recipe, row_names
from arra.data.store import Store
from arra.display import Display
from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.evaluate.lab import VALIDATION
from arra.report.lab_page import interval_meaning, short_count
from arra.runs import Run, file_hash
from arra.stages.compute import Phase, steps_within, total_flops
from arra.stages.evaluate import evaluate
from arra.stages.lab import (
    LabDone,
    LabOptions,
    command_of,
    equal_compute,
    prepare_store,
    read_rows,
    row_overrides,
    run_lab,
)
from arra.stages.train import train

ROWS = ("baseline", "hybnext", "patch")
STEPS = 24


@pytest.fixture(scope="session")
def lab_settings(pipeline: Any, toy_settings: tuple[str, ...]) -> tuple[str, ...]:
    """What makes the lab's recipe toy-sized: the toy pictures, 4 x 4 codes and as many patches."""
    return (
        "data.source=auto",
        f"data.path={pipeline.pictures}",
        "evaluate.splits=[heldout]",
        *toy_settings,
        "encoder.others.patches.image_size=64",
        "train.preview_every_steps=null",
    )


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


class InProcess:
    """Stands in for the processes of a lab: the same commands run here, one after the other."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.fails: str | None = None

    def start(self, arguments: list[str], log: Path, **where: object) -> Ended:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        what, place = arguments[0], arguments[1 if arguments[0] == "evaluate" else arguments.index("--out") + 1]
        name = "/".join(Path(place).parts[-2:])
        self.begun.append(f"{what} {name}")
        if name == self.fails:
            log.write_text("error: no luck; try another seed\n")
            return Ended(2)
        if what == "evaluate":
            evaluate(Path(place), threads=1)
        else:
            given = [text for flag, text in pairwise(arguments) if flag == "--set"]
            recipe = load_recipe(arguments[1], row=arguments[arguments.index("--row") + 1], overrides=given)
            train(recipe, Store.open(Path(arguments[arguments.index("--store") + 1])), Path(place))
        return Ended(0)


def begin(options: LabOptions, out: Path, monkeypatch: pytest.MonkeyPatch, fails: str | None = None) -> Any:
    """The finished lab, what was begun for it, and what it printed."""
    processes, printed = InProcess(), io.StringIO()
    processes.fails = fails
    with monkeypatch.context() as patch:
        patch.setattr(arra.stages.tasks, "start", processes.start)
        patch.setattr(arra.stages.tasks.time, "sleep", lambda seconds: None)
        done = run_lab(options, out, console=Console(file=printed, width=100))
    return done, processes.begun, printed.getvalue()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, lab_settings: tuple[str, ...]) -> tuple[Path, LabOptions, LabDone]:
    """A lab of three rows and two seeds, one of whose runs has failed."""
    out = tmp_path_factory.mktemp("lab") / "out"
    options = LabOptions(rows=ROWS, seeds=2, steps=STEPS, overrides=lab_settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        done, begun, printed = begin(options, out, monkeypatch, fails="patch/seed-1")
    assert begun[:6] == [f"train {row}/seed-{seed}" for seed in (0, 1) for row in ROWS]
    assert begun[6:] == [f"evaluate {row}/seed-{seed}" for seed in (0, 1) for row in ROWS][:5]
    assert "patch 1: training failed: no luck; try another seed" in printed
    return out, options, done


def test_every_row_trains_at_equal_compute(lab: Any):
    out, _, done = lab
    base, *others = done.budgets
    assert (base.row, base.steps, base.teacher_flops) == ("baseline", STEPS, 0)
    assert base.total_flops == STEPS * base.step_flops
    for one in others:
        assert one.step_flops > base.step_flops
        assert one.steps == base.total_flops // one.step_flops < STEPS
        assert 0 <= base.total_flops - one.total_flops < one.step_flops  # within one step
        assert one.teacher_flops > 0
        run = Run(out / one.row / "seed-0")
        recipe = load_recipe(run.recipe_path)
        assert recipe.train.steps == one.steps == run.read_metrics()[-1]["step"]
    # what differs between rows is the alignment and, by it, the steps
    first, second = (load_recipe(out / row / "seed-0" / "recipe.yaml").model_dump() for row in ROWS[:2])
    assert {key for key in first if first[key] != second[key]} == {"row", "align", "train"}
    assert {key for key in first["train"] if first["train"][key] != second["train"][key]} == {"steps"}


def test_seeds_change_weights_and_order_alone(lab: Any):
    out, _, _ = lab
    first, second = (load_recipe(out / "hybnext" / f"seed-{seed}" / "recipe.yaml") for seed in (0, 1))
    assert (second.train.seed, second.model.seed) == (first.train.seed + 1, first.model.seed + 1)
    assert second.align == first.align


def test_a_failed_run_is_told_and_the_others_are_in_the_table(lab: Any):
    out, _, done = lab
    assert [(each.task.label, each.why) for each in done.failures] == [("patch 1", "no luck; try another seed")]
    content = json.loads((out / "lab.json").read_text())
    assert content["failures"] == [{"row": "patch", "seed": 1, "what": "training", "why": "no luck; try another seed"}]
    seeds = {row["row"]: sorted(row["per_seed"]) for row in content["measures"][0]["rows"]}
    assert seeds == {"baseline": ["0", "1"], "hybnext": ["0", "1"], "patch": ["0"]}
    for name in ("lab.md", "lab.html"):
        assert "no luck; try another seed" in (out / name).read_text()


def test_the_numbers_are_those_of_the_cards(lab: Any):
    out, _, done = lab
    cards = {(row, seed): Evaluation.load(out / row / f"seed-{seed}").card for row in ROWS[:2] for seed in (0, 1)}
    found = set()
    for table in done.tables:
        one = table.measure
        for row in table.rows[:2]:
            if one.metric == VALIDATION:
                each = [Run(out / row.row / f"seed-{s}").read_metrics()[-1]["ntp_loss"] for s in (0, 1)]
            else:
                key = (one.metric, one.split, one.cfg_scale, one.reference, "model", None)
                each = [next(r.value for r in cards[row.row, s].results if r.key == key) for s in (0, 1)]
            assert list(row.per_seed.values()) == each
            assert row.mean.value == pytest.approx(np.mean(each))
            assert row.mean.low <= row.mean.value <= row.mean.high
        assert table.rows[1].difference.value == pytest.approx(table.rows[1].mean.value - table.rows[0].mean.value)
        found.add((one.metric, one.space))
    assert {
        (VALIDATION, "no judge"), ("nll", "no judge"), ("kid_x1000", "teacher's family"),
        ("caption_frechet", "independent"), ("caption_kid_x1000", "independent"),
        ("caption_retrieval_at_1", "independent"),
    } <= found  # fmt: skip
    told = json.loads((out / "lab.json").read_text())["measures"]
    assert [table["rows"][1]["mean"]["value"] for table in told] == [t.rows[1].mean.value for t in done.tables]


def test_the_markdown_says_how_it_was_made(lab: Any):
    out, options, done = lab
    text = (out / "lab.md").read_text()
    assert text.startswith(f"`{command_of(options, out)}`\n")
    assert "training seeds 0, 1" in text
    for one in done.budgets:
        assert f"| {one.row} | {short_count(one.step_flops)} | {one.steps} |" in text
    assert "**independent**" in text
    assert interval_meaning(2) in text
    assert "torch " in text


def test_running_again_does_nothing_twice(lab: Any, monkeypatch: pytest.MonkeyPatch):
    out, options, _ = lab
    kept = {path: file_hash(path) for row in ROWS for path in (out / row).rglob("*") if path.is_file()}
    done, begun, _ = begin(options, out, monkeypatch)
    assert begun == ["train patch/seed-1", "evaluate patch/seed-1"]  # it failed before
    assert done.failures == []
    assert {path: file_hash(path) for path in kept} == kept
    tables = [(out / name).read_text() for name in ("lab.json", "lab.md")]
    done, begun, _ = begin(options, out, monkeypatch)
    assert begun == []
    assert [(out / name).read_text() for name in ("lab.json", "lab.md")] == tables


def test_other_settings_are_refused(lab: Any, lab_settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    out, _, _ = lab
    more = LabOptions(rows=ROWS[:1], seeds=1, steps=STEPS + 1, overrides=lab_settings)
    with pytest.raises(ArraError) as error:
        begin(more, out, monkeypatch)
    assert str(error.value) == (
        f"{out}/baseline/seed-0: begun with train.steps {STEPS}, now {STEPS + 1}; use another folder (--out) or delete "
        "this one"
    )


def test_a_charged_teacher_costs_steps(lab: Any, lab_settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    out, _, _ = lab
    options = LabOptions(rows=ROWS, seeds=1, steps=STEPS, charge_teacher=True, overrides=lab_settings)
    with pytest.raises(ArraError, match=r"^--rows hybnext: the baseline's 24 steps cost .* do not pay for a step"):
        begin(options, out, monkeypatch)  # a teacher costs more than training a toy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "baseline,hybnex"], "alignment_lab: no row 'hybnex'; did you mean 'hybnext'?"),
        (["--rows", "baseline,at,at"], "--rows: 'at' is named twice; name each row once"),
        (["--rows", ","], "--rows: names no row"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--processes", "-1"], "--processes -1: expected 1 or more"),
        (["nothing"], "nothing: no such file"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: Sequence[str], message: str, run_arra: Callable[..., Any], tmp_path: Path
):
    assert run_arra("lab", *arguments, "--out", tmp_path / "lab").error.startswith(message)
    assert not (tmp_path / "lab").exists()


def test_a_row_without_alignment_takes_no_key_of_it():
    given = ("align.weight=2", "train.batch_size=4")
    assert row_overrides("alignment_lab", "baseline", given) == ("train.batch_size=4",)
    assert row_overrides("alignment_lab", "hybnext", given) == given
    _, recipes = read_rows(LabOptions(steps=7, overrides=given))
    assert recipes["baseline"].align is None
    assert recipes["both"].align is not None
    assert (recipes["both"].align.weight, recipes["both"].train.steps) == (2, 7)


@pytest.mark.parametrize(
    "phases", [[Phase(0, 5)], [Phase(0, 7), Phase(10, 5)], [Phase(0, 9), Phase(3, 7), Phase(6, 5)]]
)
def test_the_most_steps_that_a_budget_pays_for(phases: list[Phase]):
    for budget in range(200):
        steps = steps_within(phases, budget)
        assert total_flops(phases, steps) <= budget < total_flops(phases, steps + 1)
    for steps in range(20):
        price = [max((p for p in phases if p.start <= step), key=lambda p: p.start).flops for step in range(steps)]
        assert total_flops(phases, steps) == sum(price)


def test_the_page_works_offline_and_shows_no_foreign_markup(lab: Any):
    out, _, _ = lab
    page = (out / "lab.html").read_text()
    assert "<script" not in page
    assert "http" not in page.split("<pre>")[0].split("<main>")[1]
    assert page.count("<img") >= 2
    assert "caption judge, trained from random weights" in page


@pytest.mark.slow
def test_every_row_of_the_recipe_takes_a_step(
    lab: Any, lab_settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The choices that no default row makes: losses, projectors, spaces, layers, schedules, published windows."""
    # the same few teachers, read anew for every row; what they cost is asked of three rows above
    monkeypatch.setattr(arra.stages.lab, "teacher_flops", lambda recipe, store, known: 0)
    shutil.copytree(lab[0] / "store", tmp_path / "store")
    rows = tuple(row_names("alignment_lab"))
    _, recipes = read_rows(LabOptions(rows=rows, steps=1600, overrides=(*lab_settings, "model.num_layers=4")))
    with Display(Console(file=io.StringIO())) as display:
        store = prepare_store(recipes, tmp_path / "store", display)
        budgets = equal_compute(recipes, store, charge_teacher=False, display=display)
    assert [one.row for one in budgets] == list(rows)
    steps = {one.row: one.steps for one in budgets}
    assert steps["baseline"] == 1600
    assert all(0 < steps[row] < 1600 for row in rows[1:])
    assert steps["hybnext"] < steps["stopped"]  # it becomes cheaper, so it gets more steps
    assert steps["both"] < steps["hybnext"]


@pytest.mark.slow
def test_the_smoke_command_runs(lab: Any, lab_settings: tuple[str, ...], tmp_path: Path):
    """With real processes, over a store that is there."""
    shutil.copytree(lab[0] / "store", tmp_path / "lab" / "store")
    command = ["arra", "lab", "--steps", "20", "--seeds", "1", "--rows", "baseline", "--out", "lab"]
    chosen = [part for text in lab_settings for part in ("--set", text)]
    found = subprocess.run(
        [sys.executable, "-m", *command, *chosen], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "lab" / "lab.html").is_file()
    assert "One training seed" in found.stdout
