"""Runs as processes of their own: `arra demo` and `arra lab` train and evaluate several models side by side.

One thread each, as many at a time as there are cores: on few cores that is the fastest way, and each model's result is
its own. What a process finds wrong comes back as one line; an interrupted process saves first.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from arra.config import Recipe, dump_recipe, load_recipe
from arra.display import Display
from arra.errors import ArraError
from arra.runs import Run, writing
from arra.stages.live import is_finished
from arra.stages.process import PARENT, SECONDS_FOR_ORPHANS

EVALUATE = "evaluate"
MAX_PROCESSES = 8


@dataclass(frozen=True)
class Task:
    """One run: a row of a recipe with one training seed, and where it lies."""

    row: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    label: str
    """What the display calls it."""
    source: Path
    """The recipe's file; a name alone would find a folder of that name in the working folder."""
    records: int | None = None
    """Training pictures of an epoch, where durations may be in epochs."""

    @cached_property
    def recipe(self) -> Recipe:
        """The task's resolved recipe."""
        return load_recipe(self.source, row=self.row, overrides=self.overrides).resolved(self.records)

    @property
    def log(self) -> Path:
        """What its process prints, while it runs."""
        return self.folder.parent / f".{self.folder.name}.log"


@dataclass(frozen=True)
class Failure:
    """A task whose process ended badly, and why, in one line."""

    task: Task
    what: str
    """"training" or "evaluating"."""
    why: str


def num_parallel() -> int:
    """Processes at a time: one per core that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, MAX_PROCESSES))


def finished(task: Task) -> bool:
    """Whether a run reached its last step under the task's recipe."""
    run = Run(task.folder)
    same = run.recipe_path.is_file() and yaml.safe_load(run.recipe_yaml()) == yaml.safe_load(dump_recipe(task.recipe))
    return same and is_finished(run, task.recipe)


def train_tasks(
    tasks: Sequence[Task], store: Path, display: Display, *, processes: int | None = None, keep_going: bool = False
) -> list[Failure]:
    """What failed, as `run_processes` has it; every other task's run is finished."""
    commands = [
        (
            task,
            ["train", str(task.source), "--row", task.row, "--store", str(store), "--out", str(task.folder)]
            + [part for override in task.overrides for part in ("--set", override)],
        )
        for task in tasks
        if not finished(task)
    ]
    return run_processes(commands, display, "training", processes=processes, keep_going=keep_going)


def evaluate_tasks(
    tasks: Sequence[Task], display: Display, *, processes: int | None = None, keep_going: bool = False
) -> list[Failure]:
    """What failed, as `run_processes` has it; every other task's run has a current evaluation card."""
    commands = [(task, [EVALUATE, str(task.folder), "--threads", "1"]) for task in tasks]
    return run_processes(commands, display, "evaluating", processes=processes, keep_going=keep_going)


def run_processes(
    commands: Sequence[tuple[Task, list[str]]],
    display: Display,
    what: str,
    *,
    processes: int | None = None,
    keep_going: bool = False,
) -> list[Failure]:
    """The tasks whose process failed; every other command has ended well. At most `processes` run at a time.

    Without `keep_going` the first failure stops the others and is raised. With it the others go on; the log of a
    process that ended in a bug stays where its line says.

    Raises:
        ArraError: one of them found something the user can mend; the others are stopped.
        KeyboardInterrupt: the processes have saved and left.
    """
    waiting, running = list(commands), dict[subprocess.Popen[bytes], Task]()
    failures: list[Failure] = []
    try:
        while waiting or running:
            while waiting and len(running) < (processes or num_parallel()):
                task, arguments = waiting.pop(0)
                running[start(arguments, task.log)] = task
            for process in list(running):
                task = running[process]
                code = process.poll()
                watch(task, task.log, display, what)
                if code is None:
                    continue
                del running[process]
                try:
                    check(code, task, task.log, what)  # of a bug the log stays
                except (ArraError, RuntimeError) as error:
                    if not keep_going:
                        raise
                    first, *rest = str(error).splitlines()
                    why = first.removesuffix(":") + (f" ({rest[-1].strip()})" if rest else "")
                    failures.append(Failure(task, what, why))
                    line = f"{task.label}: {what} failed: {why}"
                    display.console.print(line, highlight=False, markup=False, soft_wrap=True)
                else:
                    task.log.unlink(missing_ok=True)
            time.sleep(0.3 if what != "training" else 1.0)
    except BaseException:
        if running:
            display.console.print(f"stopping; what is {what} saves first", highlight=False)
        stop(running)
        raise
    return failures


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A process of this program with one thread, which leaves when this one does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", PARENT: str(os.getpid())}
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    with file:
        # -P: a file called like a package in the user's folder must not be imported in its place
        command = [sys.executable, "-P", "-m", "arra", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def watch(task: Task, log: Path, display: Display, what: str) -> None:
    """Nothing; the display shows the run's newest metrics, or what its process said last."""
    if what != "training":
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(f"{EVALUATE}: ")]
        display.show(task.label, said[-1].removeprefix(f"{EVALUATE}: ") if said else what, 0, 1)
        return
    rows = [row for row in Run(task.folder).read_metrics() if row["kind"] == "train"]
    if not rows:
        display.show(task.label, "starting", 0, 1)
        return
    row = rows[-1]
    note = f"loss {row['ntp_loss']:.3f}"
    note += f" align {row['gva_loss']:.3f}" if row["gva_loss"] is not None else ""
    note += f"  {row['images_per_second']:.0f} images/s"
    display.show(task.label, what, row["step"], task.recipe.train.steps, note)


def check(code: int, task: Task, log: Path, what: str) -> None:
    """Nothing, if a process ended well.

    Raises:
        ArraError: it did not; it said why, or was killed.
        RuntimeError: it ended in a bug.
        KeyboardInterrupt: it was asked to stop.
    """
    if code == 0:
        return
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    if code in (130, -signal.SIGINT):
        log.unlink()
        raise KeyboardInterrupt
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == 2 and told:
        log.unlink()
        raise ArraError(told[-1])
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        raise ArraError(
            f"{task.folder}: {what} was killed from outside ({signal.Signals(-code).name}), by lack of memory perhaps; "
            "run the same command again to continue"
        )
    raise RuntimeError(f"{what} {task.label} ended with code {code}; the log is {log}:\n" + "\n".join(lines[-30:]))


def stop(running: dict[subprocess.Popen[bytes], Task]) -> None:
    """Nothing; the processes have been asked to save, and have left."""
    for process in running:
        with suppress(ProcessLookupError):
            process.terminate()
    for process, task in running.items():
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_FOR_ORPHANS)
        process.kill()
        task.log.unlink(missing_ok=True)
