"""The main job: prepare, train a baseline and an aligned model side by side, paint, evaluate, report.

Every stage leaves whole files or none and is skipped when its files are there, so an interrupted demo continues where
it stopped and ends in the same weights. Trainings and evaluations are processes of their own, as many at a time as
there are cores for, one thread each: on few cores that is the fastest way, and each model's result is its own.
"""

import json
import math
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arra.config import Recipe, load_recipe, recipes_folder, row_names
from arra.data.store import Store
from arra.display import Display
from arra.distributed import set_threads
from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE, Evaluation
from arra.evaluate.compare import Difference, SeedDifference
from arra.runs import Run, atomic_write, writing
from arra.stages.captions import caption_lengths
from arra.stages.evaluate import held_out_splits, prepare_caption_judge
from arra.stages.painters import load_run
from arra.stages.prepare import prepare
from arra.stages.report import compare_rows, report
from arra.stages.tasks import Places, Task, evaluate_tasks, finished, train_tasks
from arra.stages.training_data import epoch_length

DEMO_RECIPE = recipes_folder() / "demo.yaml"
"""By its path: the name alone would find a folder `demo` in the working folder."""
BASELINE, ALIGNED, SHUFFLED = "baseline", "aligned", "shuffled"
METRIC_NAMES = {"caption_retrieval_at_1": "caption found", "caption_retrieval_at_10": "caption in top 10"} | {
    "retrieval_at_1": "picture found",
    "retrieval_at_10": "picture in top 10",
    "kid_x1000": "kernel distance",
    "frechet": "Frechet distance",
    "caption_kid_x1000": "caption kernel",
    "caption_frechet": "caption Frechet",
}
"""Short names of the summary's measures."""
EXAMPLE = "a red heart on fire"
FOLDER_TOKENIZER_STEPS = 800
"""Training of the packaged tokenizer on a user's own pictures, before codes are made."""
SECONDS_BESIDE_TRAINING = 150
"""What `--minutes` sets aside for everything that is no training."""
PROBE_STEPS = 20
MIN_RECORDS = 40
MAX_PREFIX_LENGTH = 128
"""A caption that needs more text positions than this is told, not trained on: it would slow every step."""


@dataclass(frozen=True)
class DemoOptions:
    """What a demo folder was started with; it continues with the same only."""

    seeds: int = 1
    minutes: float | None = None
    data: str | None = None
    fresh_tokenizer: bool = False
    shuffled: bool = False
    overrides: tuple[str, ...] = ()


def run_demo(options: DemoOptions, out: Path, *, console: Console) -> Path:
    """The report's path, after all stages.

    Raises:
        ArraError: the folder holds a demo with other options, or a stage says what the user can mend.
        KeyboardInterrupt: after the trainings have saved.
    """
    if options.data is not None:
        options = replace(options, data=str(Path(options.data).resolve()))
        if out.resolve().is_relative_to(str(options.data)):
            raise ArraError(f"--out {out}: lies inside --data {options.data}; choose a folder outside of it with --out")
    recipe = load_recipe(DEMO_RECIPE, row=ALIGNED, overrides=(*recipe_overrides(options), *options.overrides))
    refuse_other_options(options, out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with Run(out).lock(), Display(console) as display:  # one demo at a time
        atomic_write(out / "demo.json", json.dumps(asdict(options), indent=2) + "\n")
        return run_stages(options, recipe, out, display)


def run_stages(options: DemoOptions, recipe: Recipe, out: Path, display: Display) -> Path:
    """The report's path, after all stages that are not done yet."""
    clock, console, page = Clock(out / "timings.json"), display.console, out / "report.html"
    set_threads(1)  # on a few shared cores a second thread of one process waits more than it works

    with nullcontext() if page.is_file() else clock.stage("prepare"):
        found = prepare(
            recipe,
            out / "store",
            accept=lambda records: check_splits(records, recipe),
            progress=display.row("data"),
        )
        store = found.checked()
    console.print(split_line(store.manifest()["records"]["splits"]), highlight=False)
    derived = [*recipe_overrides(options), *store_overrides(options, recipe, store)]
    records = epoch_length(recipe, store)
    derived += budget(options, derived, out, display, records=records)
    tasks = list(plan_tasks(options, out, (*derived, *options.overrides), records=records))
    if not is_current(tasks, page):
        if not all(finished(task) for task in tasks):
            folders = ", ".join(str(task.folder / "previews") for task in tasks)
            console.print(f"previews on the way: {folders}", highlight=False, markup=False, soft_wrap=True)
        with clock.stage("train"):
            train_tasks(tasks, out / "store", display)
        with clock.stage("evaluate"):
            first = load_run(tasks[0].folder)
            judging = display.row("judges")
            prepare_caption_judge(first, progress=judging)
            held_out_splits(first, progress=judging)
            judging("ready", 1, 1)
            evaluate_tasks(tasks, display)
        with clock.stage("report"):
            display.show("report", "writing", 0, 1)
            page = report([task.folder for task in tasks], out, title="arra demo", timings=clock.times())
            display.show("report", "written", 1, 1)
    prompt = EXAMPLE if options.data is None else store.prompts()[store.rows(tasks[0].recipe.evaluate.splits[0])[0]]
    print_summary(tasks, page, console, seconds=sum(seconds for _, seconds in clock.times()), prompt=prompt)
    return page


def check_splits(store: Store, recipe: Recipe) -> None:
    """Nothing.

    Raises:
        ArraError: the pictures are too few, or a split that the demo needs has none.
    """
    name, splits = recipe.data.path or recipe.data.source, store.about["splits"]
    if len(store) < MIN_RECORDS:
        raise ArraError(f"{name}: {len(store)} captioned pictures; at least {MIN_RECORDS} are needed for three splits")
    for split in ("train", "validation"):
        if split not in splits:
            raise ArraError(
                f"{name}: no record in split '{split}'; it has {', '.join(splits)}; name some '{split}' in the "
                "metadata's split column"
            )
    if len(splits) < 3:
        raise ArraError(f"{name}: no held-out split besides validation; name one 'heldout' in the split column")


def recipe_overrides(options: DemoOptions) -> Iterator[str]:
    """The `--set` arguments that options stand for."""
    if options.data is not None:
        yield "data.source=auto"
        yield f"data.path={json.dumps(options.data)}"
    if options.fresh_tokenizer:
        network = load_recipe(recipes_folder() / "tokenizer.yaml").tokenizer
        assert network.network is not None
        assert network.train is not None
        yield f"tokenizer.network={network.network.model_dump_json()}"
        yield f"tokenizer.train={network.train.model_dump_json()}"
    elif options.data is not None:
        yield f"tokenizer.train={{steps: {FOLDER_TOKENIZER_STEPS}, learning_rate: 3.0e-4}}"


def refuse_other_options(options: DemoOptions, out: Path) -> None:
    """Nothing, if the folder's runs were begun with these options, or these only ask for more runs.

    A folder without a run binds to nothing: an option that an error asked to change can be changed.

    Raises:
        ArraError: they were begun with others.
    """
    path = out / "demo.json"
    if not path.is_file() or not any([*out.glob("*/recipe.yaml"), *out.glob("seed-*/*/recipe.yaml")]):
        return
    try:
        content = json.loads(path.read_text())
        kept = DemoOptions(**{**content, "overrides": tuple(content["overrides"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ArraError(f"{path}: unreadable ({error}); delete the folder or use another with --out") from error
    if options.shuffled and not kept.shuffled:
        kept = replace(kept, shuffled=True)
    if options.seeds > kept.seeds > 1:
        kept = replace(kept, seeds=options.seeds)
    before, now = json.loads(json.dumps(asdict(kept))), json.loads(json.dumps(asdict(options)))
    for key in now:
        if before[key] != now[key]:
            name = "--set" if key == "overrides" else "--" + key.replace("_", "-")
            raise ArraError(
                f"{out}: started with {name} {shown(before[key])}, now {shown(now[key])}; use another folder (--out) "
                "or delete this one"
            )


def shown(value: object) -> str:
    """An option's value in words."""
    if isinstance(value, list):
        return " ".join(value) or "nothing"
    if isinstance(value, bool):
        return "given" if value else "not given"
    return "nothing" if value is None else str(value)


def plan_tasks(
    options: DemoOptions, out: Path, overrides: Sequence[str], *, records: int | None = None
) -> Iterator[Task]:
    """The runs, baseline first; a folder level for training seeds only where there are several."""
    rows = [BASELINE, ALIGNED] + ([SHUFFLED] if options.shuffled else [])
    assert set(rows) <= set(row_names(DEMO_RECIPE))
    recipe = load_recipe(DEMO_RECIPE, row=ALIGNED, overrides=overrides)
    for number in range(options.seeds):
        seed = recipe.train.seed + number
        seeds = (f"train.seed={seed}", f"model.seed={recipe.model.seed + number}")
        for row in rows:
            # a key below `align` would bring the term back that the baseline is without
            own = [text for text in overrides if row != BASELINE or text.partition("=")[0].split(".")[0] != "align"]
            folder, label = (out / row, row) if options.seeds == 1 else (out / f"seed-{seed}" / row, f"{row} {seed}")
            yield Task(row, seed, folder, (*own, *seeds), label, DEMO_RECIPE, records)


def store_overrides(options: DemoOptions, recipe: Recipe, store: Store) -> Iterator[str]:
    """What a user's own pictures ask for: their own held-out splits, and room for the longest caption."""
    if options.data is None:
        return
    held_out = [name for name in store.manifest()["records"]["splits"] if name not in ("train", "validation")]
    yield f"evaluate.splits={json.dumps(held_out)}"
    longest = max(caption_lengths(recipe, store)) + 1
    if recipe.model.prefix_length < longest <= MAX_PREFIX_LENGTH:
        yield f"model.prefix_length={longest}"


def budget(
    options: DemoOptions, derived: Sequence[str], out: Path, display: Display, *, records: int | None = None
) -> Iterator[str]:
    """The number of steps that fits into `--minutes`, measured once per folder and kept in `steps.json`.

    Raises:
        ArraError: too few fit.
    """
    if options.minutes is None or any(text.replace(" ", "").startswith("train.steps=") for text in options.overrides):
        return
    path = out / "steps.json"
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        kept = {}
    if kept.get("minutes") != options.minutes:
        display.show("train", "measuring the speed of this machine", 0, 1)
        shutil.rmtree(out / "probe", ignore_errors=True)
        short = (*derived, *options.overrides, f"train.steps={PROBE_STEPS}", "train.preview_every_steps=null")
        tasks = list(plan_tasks(options, out / "probe", short, records=records))
        probed = tasks[: len(Places().slots)]
        train_tasks(probed, out / "store", display)
        seconds = max(last_train_row(task)["seconds"] for task in probed) / PROBE_STEPS
        shutil.rmtree(out / "probe", ignore_errors=True)
        rounds = -(-len(tasks) // len(Places().slots))
        steps = int((options.minutes * 60 - SECONDS_BESIDE_TRAINING) / (seconds * rounds))
        if steps < 2 * tasks[0].recipe.train.warmup_steps:
            raise ArraError(
                f"--minutes {options.minutes:g}: leaves {max(steps, 0)} steps on this machine ({seconds:.2f} s each), "
                f"too few to learn anything; give at least "
                f"{math.ceil((SECONDS_BESIDE_TRAINING + 500 * seconds * rounds) / 60)} minutes"
            )
        kept = {"minutes": options.minutes, "steps": steps, "seconds_per_step": seconds}
        atomic_write(path, json.dumps(kept) + "\n")
    yield f"train.steps={kept['steps']}"


def last_train_row(task: Task) -> dict[str, Any]:
    """The newest row of a run's training metrics."""
    return [row for row in Run(task.folder).read_metrics() if row["kind"] == "train"][-1]


def is_current(tasks: Sequence[Task], page: Path) -> bool:
    """Whether every run is finished and evaluated, and the page was written after that."""
    try:
        cards = [(task.folder / CARD_FILE).stat().st_mtime_ns for task in tasks]
        models = [(task.folder / "model.safetensors").stat().st_mtime_ns for task in tasks]
        written = page.stat().st_mtime_ns
    except FileNotFoundError:
        return False
    fresh = all(model <= card <= written for model, card in zip(models, cards, strict=True))
    return fresh and all(finished(task) for task in tasks)


class Clock:
    """Seconds spent in each stage, over all starts of the demo."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def times(self) -> list[tuple[str, float]]:
        """(stage, seconds) so far."""
        try:
            return [(stage, float(seconds)) for stage, seconds in json.loads(self.path.read_text()).items()]
        except (FileNotFoundError, ValueError):
            return []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block whose seconds are added to a stage."""
        started, before = time.monotonic(), dict(self.times())
        try:
            yield
        finally:
            before[name] = round(before.get(name, 0.0) + time.monotonic() - started, 1)
            with suppress(ArraError):
                atomic_write(self.path, json.dumps(before) + "\n")


def split_line(splits: dict[str, int]) -> str:
    """The sizes of the splits in words."""
    return "pictures: " + ", ".join(f"{count} {name}" for name, count in splits.items())


def print_summary(tasks: Sequence[Task], page: Path, console: Console, *, seconds: float, prompt: str) -> None:
    """Nothing; the console shows the comparison and what to do next."""
    by_label: dict[str, dict[int, Evaluation]] = {}
    for task in tasks:
        by_label.setdefault(task.row, {})[task.seed] = Evaluation.load(task.folder)
    settings = tasks[0].recipe.evaluate
    for row in [row for row in by_label if row != BASELINE]:
        comparison = compare_rows(BASELINE, row, by_label, num_resamples=settings.num_resamples, seed=settings.seed)
        # no box and narrow gaps: it fits a terminal of 80 columns
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("", "cfg", BASELINE, row, "difference [interval]", "verdict"):
            table.add_column(column, justify="right" if column in (BASELINE, row, "cfg") else "left", no_wrap=True)
        last = ""
        for one in comparison.judged:
            if one.reference == "raw":  # distances to raw pictures measure the tokenizer; the report has them
                continue
            if one.split != last:
                table.add_row(Text(f"{one.split} pictures", style="bold"))
                last = one.split
            table.add_row(*summary_cells(one))
        console.print(f"\n{row} against {BASELINE} on held-out pictures, 95 % intervals", highlight=False)
        console.print(table)
    console.print()
    for line in (
        f"report    {page}",
        f"took      {seconds / 60:.1f} minutes",
        f"try next  arra generate {shlex.quote(str(tasks[1].folder))} --prompt {shlex.quote(prompt)}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary_cells(one: Difference | SeedDifference) -> Iterator[str]:
    """The cells of one comparison, the split left out."""
    digits = 1 if one.metric.endswith(("frechet", "kid_x1000")) else 3
    yield METRIC_NAMES.get(one.metric, one.metric.replace("_", " "))
    yield "" if one.cfg_scale is None else f"{one.cfg_scale:g}"
    yield f"{one.baseline:.{digits}f}"
    yield f"{one.candidate:.{digits}f}"
    interval = "" if one.low is None or one.high is None else f" [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
    yield escape(f"{one.difference:+.{digits}f}{interval}")
    yield "unclear" if one.verdict == "no clear difference" else one.verdict
