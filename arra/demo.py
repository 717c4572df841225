"""The main job: prepare, train a baseline and an aligned model side by side, paint, evaluate, report.

Every stage leaves whole files or none and is skipped when its files are there, so an interrupted demo continues where
it stopped and ends in the same weights. Trainings and evaluations are processes of their own, as many at a time as
there are cores for, one thread each: on few cores that is the fastest way, and each model's result is its own.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from arra.config import Recipe, load_recipe, row_names
from arra.display import Display
from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.evaluate.compare import Difference, SeedDifference
from arra.runs import Run, atomic_write
from arra.stages.evaluate import held_out_splits
from arra.stages.paint import load_run
from arra.stages.prepare import prepare
from arra.stages.report import compare_rows, report
from arra.stages.train import is_finished

BASELINE, ALIGNED, SHUFFLED = "baseline", "aligned", "shuffled"
FOLDER_TOKENIZER_STEPS = 800
"""Training of the packaged tokenizer on a user's own pictures, before codes are made."""
SECONDS_BESIDE_TRAINING = 150
"""What `--minutes` sets aside for everything that is no training."""
PROBE_STEPS = 20


@dataclass(frozen=True)
class DemoOptions:
    """What a demo folder was started with; it continues with the same only."""

    seeds: int = 1
    minutes: float | None = None
    data: str | None = None
    fresh_tokenizer: bool = False
    shuffled: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One run of the demo."""

    row: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.row if self.folder.name == self.row else f"{self.row} {self.seed}"


def run_demo(options: DemoOptions, out: Path, *, console: Console) -> Path:
    """The report's path, after all stages.

    Raises:
        ArraError: the folder holds a demo with other options, or a stage says what the user can mend.
        KeyboardInterrupt: after the trainings have saved.
    """
    started = time.monotonic()
    overrides = (*recipe_overrides(options), *options.overrides)
    recipe = load_recipe("demo", row=ALIGNED, overrides=overrides)
    remember_options(options, out)
    clock = Clock(out / "timings.json")
    with Display(console) as display:

        def progress(what: str, done: int, total: int) -> None:
            display.show("data", what, done, total)

        with clock.stage("prepare"):
            store = prepare(recipe, out / "store", progress=progress)
        console.print(split_line(store.manifest()["records"]["splits"]), highlight=False)
        tasks = list(plan_tasks(options, out, (*overrides, *budget(options, recipe, out, display))))
        with clock.stage("train"):
            train_all(tasks, out / "store", display)
        with clock.stage("evaluate"):
            display.show("judge", "held-out pictures", 0, 1)
            held_out_splits(load_run(tasks[0].folder))
            display.show("judge", "held-out pictures", 1, 1)
            run_processes(
                [(task, ["evaluate", str(task.folder), "--threads", "1"]) for task in tasks], display, "evaluating"
            )
        with clock.stage("report"):
            display.show("report", "writing", 0, 1)
            page = report([task.folder for task in tasks], out, title="arra demo", timings=clock.times())
            display.show("report", "written", 1, 1)
    print_summary(tasks, page, console, seconds=time.monotonic() - started)
    return page


def recipe_overrides(options: DemoOptions) -> Iterator[str]:
    """The `--set` arguments that options stand for."""
    if options.data is not None:
        yield "data.source=folder"
        yield f"data.path={json.dumps(str(Path(options.data).resolve()))}"
        yield "evaluate.splits=[heldout]"
    if options.fresh_tokenizer:
        network = load_recipe("tokenizer").tokenizer
        assert network.network is not None
        assert network.train is not None
        yield f"tokenizer.network={network.network.model_dump_json()}"
        yield f"tokenizer.train={network.train.model_dump_json()}"
    elif options.data is not None:
        yield f"tokenizer.train={{steps: {FOLDER_TOKENIZER_STEPS}, learning_rate: 3.0e-4}}"


def remember_options(options: DemoOptions, out: Path) -> None:
    """Nothing; the folder holds these options.

    Raises:
        ArraError: it holds others.
    """
    path, now = out / "demo.json", json.loads(json.dumps(asdict(options)))
    if not path.exists():
        atomic_write(path, json.dumps(now, indent=2) + "\n")
        return
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ArraError(f"{path}: not JSON ({error}); delete the folder or use another with --out") from error
    for key in now:
        if kept.get(key) != now[key]:
            name = key.replace("_", "-")
            raise ArraError(
                f"{out}: started with --{name} {kept.get(key)!r}, now {now[key]!r}; use another folder (--out) or "
                "delete this one"
            )


def plan_tasks(options: DemoOptions, out: Path, overrides: Sequence[str]) -> Iterator[Task]:
    """The runs, baseline first; a folder level for training seeds only where there are several."""
    rows = [BASELINE, ALIGNED] + ([SHUFFLED] if options.shuffled else [])
    assert set(rows) <= set(row_names("demo"))
    for seed in range(options.seeds):
        for row in rows:
            folder = out / row if options.seeds == 1 else out / f"seed-{seed}" / row
            yield Task(row, seed, folder, (*overrides, f"train.seed={seed}", f"model.seed={seed}"))


def budget(options: DemoOptions, recipe: Recipe, out: Path, display: Display) -> Iterator[str]:
    """The number of steps that fits into `--minutes`, measured once per folder and kept in `steps.json`."""
    if options.minutes is None:
        return
    path = out / "steps.json"
    if not path.exists():
        display.show("train", "measuring the speed of this machine", 0, 1)
        tasks = list(plan_tasks(options, out / "probe", (*options.overrides, *recipe_overrides(options))))
        probed = [
            Task(
                t.row, t.seed, t.folder, (*t.overrides, f"train.steps={PROBE_STEPS}", "train.preview_every_steps=null")
            )
            for t in tasks[: num_parallel()]
        ]
        train_all(probed, out / "store", display)
        seconds = max(last_train_row(task)["seconds"] for task in probed) / PROBE_STEPS
        rounds = -(-len(tasks) // num_parallel())
        steps = int((options.minutes * 60 - SECONDS_BESIDE_TRAINING) / (seconds * rounds))
        if steps < 2 * recipe.train.warmup_steps:
            raise ArraError(
                f"--minutes {options.minutes:g}: leaves {max(steps, 0)} steps on this machine ({seconds:.2f} s each), "
                f"too few to learn anything; give at least "
                f"{(SECONDS_BESIDE_TRAINING + 500 * seconds * rounds) / 60:.0f} minutes"
            )
        atomic_write(path, json.dumps({"steps": steps, "seconds_per_step": seconds}) + "\n")
    yield f"train.steps={json.loads(path.read_text())['steps']}"


def last_train_row(task: Task) -> dict[str, float]:
    """The newest row of a run's training metrics."""
    return [row for row in Run(task.folder).read_metrics() if row["kind"] == "train"][-1]


def num_parallel() -> int:
    """Processes at a time: one per core, at most as many as a demo has rows."""
    return max(1, min(os.cpu_count() or 1, 8))


def train_all(tasks: Sequence[Task], store: Path, display: Display) -> None:
    """Nothing; every task's run is finished."""
    waiting = [task for task in tasks if not (task.folder / "recipe.yaml").exists() or not finished(task)]
    commands = [
        (
            task,
            ["train", "demo", "--row", task.row, "--store", str(store), "--out", str(task.folder)]
            + [part for override in task.overrides for part in ("--set", override)],
        )
        for task in waiting
    ]
    run_processes(commands, display, "training")


def finished(task: Task) -> bool:
    """Whether a run reached its last step under the task's recipe."""
    recipe = load_recipe("demo", row=task.row, overrides=task.overrides)
    return is_finished(Run(task.folder), recipe)


def run_processes(commands: Sequence[tuple[Task, list[str]]], display: Display, what: str) -> None:
    """Nothing; every command has ended well, as many at a time as there are cores.

    Raises:
        ArraError: one of them found something the user can mend; the others are stopped.
        KeyboardInterrupt: the processes have saved and left.
    """
    waiting, running = list(commands), dict[subprocess.Popen[bytes], tuple[Task, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < num_parallel():
                task, arguments = waiting.pop(0)
                log = task.folder.parent / f".{task.folder.name}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                running[start(arguments, log)] = (task, log)
            for process in list(running):
                task, log = running[process]
                watch(task, display, what)
                if process.poll() is not None:
                    del running[process]
                    check(process.returncode, task, log, what)
                    log.unlink(missing_ok=True)
            time.sleep(0.3)
    except BaseException:
        stop(running)
        raise


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A process of this program with one thread, which leaves when this one does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARRA_PARENT": str(os.getpid())}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "arra", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def watch(task: Task, display: Display, what: str) -> None:
    """Nothing; the display shows the run's newest metrics."""
    if what != "training":
        display.show(task.label, what, 0, 1)
        return
    if not (task.folder / "metrics.jsonl").exists():
        display.show(task.label, "starting", 0, 1)
        return
    rows = [row for row in Run(task.folder).read_metrics() if row["kind"] == "train"]
    if rows:
        row, steps = rows[-1], planned_steps(task)
        note = f"loss {row['ntp_loss']:.3f}"
        note += f" align {row['gva_loss']:.3f}" if row["gva_loss"] is not None else ""
        display.show(task.label, what, row["step"], steps, f"{note}  {row['images_per_second']:.0f} images/s")


def planned_steps(task: Task) -> int:
    """Steps of a task's recipe."""
    return load_recipe("demo", row=task.row, overrides=task.overrides).train.steps


def check(code: int, task: Task, log: Path, what: str) -> None:
    """Nothing, if a process ended well.

    Raises:
        ArraError: it did not; its last line says why.
    """
    if code == 0:
        return
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code == 2:
        raise ArraError(lines[-1].removeprefix("error: "))
    raise RuntimeError(f"{what} {task.label} ended with code {code}; the log is {log}:\n" + "\n".join(lines[-30:]))


def stop(running: dict[subprocess.Popen[bytes], tuple[Task, Path]]) -> None:
    """Nothing; the processes have been asked to save, and have left."""
    for process in running:
        with suppress(ProcessLookupError):
            process.terminate()
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()


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


def print_summary(tasks: Sequence[Task], page: Path, console: Console, *, seconds: float) -> None:
    """Nothing; the console shows the comparison and what to do next."""
    by_label: dict[str, dict[int, Evaluation]] = {}
    for task in tasks:
        by_label.setdefault(task.row, {})[task.seed] = Evaluation.load(task.folder)
    settings = load_run(tasks[0].folder).recipe.evaluate
    for row in [row for row in by_label if row != BASELINE]:
        comparison = compare_rows(BASELINE, row, by_label, num_resamples=settings.num_resamples, seed=settings.seed)
        table = Table(title=f"{row} against {BASELINE}, held-out pictures, 95 % intervals", title_justify="left")
        for column in ("measure", "split", "guidance", BASELINE, row, "difference", "interval", "verdict"):
            table.add_column(column, justify="left" if column in ("measure", "split", "verdict") else "right")
        for one in comparison.judged:
            table.add_row(*summary_cells(one))
        console.print(table)
    console.print(f"report    {page}", highlight=False)
    console.print(f"took      {seconds / 60:.1f} minutes", highlight=False)
    console.print(f'try next  arra generate {tasks[1].folder} --prompt "a red heart on fire"', highlight=False)


def summary_cells(one: Difference | SeedDifference) -> Iterator[str]:
    """The cells of one comparison."""
    yield one.metric + (f" ({one.reference})" if one.reference else "")
    yield one.split
    yield "" if one.cfg_scale is None else "off" if one.cfg_scale == 1 else f"{one.cfg_scale:g}"
    yield f"{one.baseline:.3f}"
    yield f"{one.candidate:.3f}"
    yield f"{one.difference:+.3f}"
    yield "" if one.low is None or one.high is None else f"{one.low:+.3f} to {one.high:+.3f}"
    yield one.verdict
