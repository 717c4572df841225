"""Runs as processes of their own: `arra demo`, `arra lab` and `arra reproduce` train and evaluate models side by side.

One thread each, as many at a time as there are cores: on few cores that is the fastest way, and each model's result is
its own; or each on accelerators of its own. What a process finds wrong comes back as one line; an interrupted process
saves first.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from arra.config import Recipe, load_recipe, parse_recipe
from arra.data.remote import open_store
from arra.display import Display
from arra.errors import ArraError
from arra.runs import Run, writing
from arra.stages.begun import fixed_settings
from arra.stages.live import is_finished
from arra.stages.process import PARENT, SECONDS_FOR_ORPHANS
from arra.stages.set_options import SetOptions

EVALUATE, VISIBLE = "evaluate", "CUDA_VISIBLE_DEVICES"
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
    store: Path | None = None
    """That it trains on, where tasks have several."""

    @cached_property
    def recipe(self) -> Recipe:
        """The task's resolved recipe."""
        return load_recipe(self.source, row=self.row, overrides=self.overrides).resolved(self.records)

    @property
    def log(self) -> Path:
        """What its process prints, while it runs."""
        return self.folder.parent / f".{self.folder.name}.log"


@dataclass(frozen=True)
class Places:
    """Where processes run, and how many at a time."""

    processes: int | None = None
    """At a time, one thread each; None takes one for each accelerator or, where there is none, for each core; 0 none,
    all is done in this process. With a number they share the first accelerator."""
    devices: tuple[str, ...] = ()
    """Accelerators by the numbers that CUDA_VISIBLE_DEVICES takes; each run has `ranks` of them for itself."""
    ranks: int = 1
    """Processes of every training, started by torchrun."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 0:
            raise ArraError(f"--processes {self.processes}: expected 0 (all in this process) or more")
        if self.ranks < 1 or (self.ranks > 1 and self.processes == 0):
            raise ArraError(f"--ranks {self.ranks}: expected 1 or more, each in a process of its own")
        if self.devices and (self.processes is not None or len(self.devices) % self.ranks):
            raise ArraError(
                f"--devices {','.join(self.devices)}: expected a multiple of --ranks ({self.ranks}) devices, and no "
                "--processes"
            )

    @property
    def slots(self) -> list[dict[str, str]]:
        """What the environment of each process says, for as many as run at a time.

        Raises:
            ArraError: there are fewer accelerators than a run has ranks.
        """
        devices = self.devices or (visible_devices() if self.processes is None else ())
        if not devices:
            return [{} for _ in range(self.processes or max(1, num_parallel() // self.ranks))]
        if len(devices) < self.ranks:
            raise ArraError(
                f"--ranks {self.ranks}: {len(devices)} accelerator{'s are' if len(devices) > 1 else ' is'} here; take "
                "fewer ranks, or say how many runs share what is here with --processes"
            )
        cuts = range(0, len(devices) - self.ranks + 1, self.ranks)
        return [{VISIBLE: ",".join(devices[cut : cut + self.ranks])} for cut in cuts]

    def require(self) -> None:
        """Nothing, if this machine has the devices that are named.

        Raises:
            ArraError: it has not.
        """
        there = visible_devices()
        if self.devices and not there:
            raise ArraError(f"--devices {','.join(self.devices)}: torch sees no accelerator here; leave it out")
        if VISIBLE not in os.environ and (
            odd := [name for name in self.devices if name.isdigit() and name not in there]
        ):
            raise ArraError(f"--devices {odd[0]}: torch sees {', '.join(there)} here; name some of these")

    @property
    def is_here(self) -> bool:
        """Whether no process is started."""
        return self.processes == 0


@dataclass(frozen=True)
class Failure:
    """A task whose process ended badly, and why, in one line."""

    task: Task
    what: str
    """"training" or "evaluating"."""
    why: str


def visible_devices() -> tuple[str, ...]:
    """The accelerators that a process may use here, by the names that CUDA_VISIBLE_DEVICES takes."""
    if not torch.cuda.is_available():
        return ()
    named = tuple(name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip())
    return named or tuple(map(str, range(torch.cuda.device_count())))


def num_parallel() -> int:
    """Processes at a time: one per core that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, MAX_PROCESSES))


def finished(task: Task) -> bool:
    """Whether a run reached its last step under the task's recipe; what is wrong with a damaged one, training tells."""
    run = Run(task.folder)
    if not run.recipe_path.is_file():
        return False
    try:
        own = parse_recipe(run.recipe_yaml(), Recipe, source=str(run.recipe_path))
    except (ArraError, UnicodeDecodeError):
        return False
    try:
        return fixed_settings(own) == fixed_settings(task.recipe) and is_finished(run, task.recipe)
    except ArraError:
        return False


def train_tasks(
    tasks: Sequence[Task],
    store: Path | None,
    display: Display,
    *,
    places: Places | None = None,
    keep_going: bool = False,
) -> list[Failure]:
    """What failed, as `run_processes` has it; every other task's run is finished.

    `store` is of tasks that name none.
    """
    places = places or Places()
    waiting = [task for task in tasks if not finished(task)]
    if places.is_here:
        return _run_here(
            waiting, lambda task: _train_here(task, task.store or store, display), display, "training", keep_going
        )
    commands = [
        (
            task,
            [
                "train",
                str(task.source),
                "--row",
                task.row,
                "--store",
                str(task.store or store),
                "--out",
                str(task.folder),
            ]
            + [part for override in task.overrides for part in ("--set", override)],
        )
        for task in waiting
    ]
    return run_processes(commands, display, "training", places=places, keep_going=keep_going)


def evaluate_tasks(
    tasks: Sequence[Task],
    display: Display,
    *,
    places: Places | None = None,
    keep_going: bool = False,
    sets: Callable[[Task], SetOptions | None] = lambda task: None,
) -> list[Failure]:
    """What failed, as `run_processes` has it; every other task's run has a current evaluation card.

    `sets` says how a run's pictures are measured as a set; None measures the run as its recipe says.
    """
    places = places or Places()
    if places.is_here:
        return _run_here(tasks, lambda task: _evaluate_here(task, sets(task)), display, "evaluating", keep_going)
    alone = replace(places, ranks=1)
    commands = [(task, [EVALUATE, str(task.folder), "--threads", "1", *words_of(sets(task))]) for task in tasks]
    return run_processes(commands, display, "evaluating", places=alone, keep_going=keep_going)


def words_of(options: SetOptions | None) -> list[str]:
    """The options as `arra evaluate` takes them."""
    if options is None:
        return []
    single = {"--protocol": options.protocol, "--reference": options.reference, "--out": options.out}
    words = [word for name, value in single.items() if value is not None for word in (name, str(value))]
    words += [word for name in options.without for word in ("--without", name)]
    return words + [word for space, place in options.weights.items() for word in ("--weights", f"{space}={place}")]


def _run_here(
    tasks: Sequence[Task], run: Callable[[Task], object], display: Display, what: str, keep_going: bool
) -> list[Failure]:
    """The same in this process, one after another."""
    failures = []
    for task in tasks:
        try:
            run(task)
        except ArraError as error:
            if not keep_going:
                raise
            failures.append(tell_failure(Failure(task, what, str(error)), display))
    return failures


def _train_here(task: Task, store: Path | None, display: Display) -> None:
    from arra.stages.train import train  # trains in this process alone where it is asked for

    recipe = load_recipe(task.source, row=task.row, overrides=task.overrides)
    train(recipe, open_store(str(store)), task.folder, progress=display.row(task.label))


def _evaluate_here(task: Task, options: SetOptions | None) -> None:
    from arra.stages.evaluate import evaluate
    from arra.stages.evaluate_set import evaluate_set

    if options is None:
        evaluate(task.folder, threads=1)
    else:
        evaluate_set(task.folder, replace(options, threads=1))


def tell_failure(failure: Failure, display: Display) -> Failure:
    """The failure, after the console has its line."""
    line = f"{failure.task.label}: {failure.what} failed: {failure.why}"
    display.console.print(line, highlight=False, markup=False, soft_wrap=True)
    return failure


def run_processes(
    commands: Sequence[tuple[Task, list[str]]],
    display: Display,
    what: str,
    *,
    places: Places | None = None,
    keep_going: bool = False,
) -> list[Failure]:
    """The tasks whose process failed; every other command has ended well. As many run at a time as there are places.

    Without `keep_going` the first failure stops the others and is raised. With it the others go on; the log of a
    process that ended in a bug stays where its line says.

    Raises:
        ArraError: one of them found something the user can mend; the others are stopped.
        KeyboardInterrupt: the processes have saved and left.
    """
    places = places or Places()
    waiting, running, free = list(commands), dict[subprocess.Popen[bytes], Task](), places.slots
    taken: dict[subprocess.Popen[bytes], dict[str, str]] = {}
    failures: list[Failure] = []
    try:
        while waiting or running:
            while waiting and free:
                task, arguments = waiting.pop(0)
                slot = free.pop(0)
                process = start(arguments, task.log, environment=slot, ranks=places.ranks)
                running[process], taken[process] = task, slot
            for process in list(running):
                task = running[process]
                code = process.poll()
                watch(task, task.log, display, what)
                if code is None:
                    continue
                del running[process]
                free.append(taken.pop(process))
                try:
                    check(code, task, task.log, what, ranks=places.ranks)  # of a bug the log stays
                except (ArraError, RuntimeError) as error:
                    if not keep_going:
                        raise
                    first, *rest = str(error).splitlines()
                    why = first.removesuffix(":") + (f" ({rest[-1].strip()})" if rest else "")
                    failures.append(tell_failure(Failure(task, what, why), display))
                else:
                    task.log.unlink(missing_ok=True)
            time.sleep(0.3 if what != "training" else 1.0)
    except BaseException:
        if running:
            display.console.print(f"stopping; what is {what} saves first", highlight=False)
        stop(running)
        raise
    return failures


def start(
    arguments: list[str], log: Path, *, environment: Mapping[str, str] | None = None, ranks: int = 1
) -> subprocess.Popen[bytes]:
    """A process of this program with one thread, which leaves when this one does; of several ranks, torchrun's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", PARENT: str(os.getpid())} | dict(environment or {})
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    with file:
        # -P: a file called like a package in the user's folder must not be imported in its place
        runner = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, "-P", *runner, "-m", "arra", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def watch(task: Task, log: Path, display: Display, what: str) -> None:
    """Nothing; the display shows the run's newest metrics, or what its process said last."""
    if what != "training":
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(f"{EVALUATE}: ")]
        display.show(task.label, said[-1].removeprefix(f"{EVALUATE}: ") if said else what, 0, 1)
        return
    try:
        rows = [row for row in Run(task.folder).read_metrics() if row["kind"] == "train"]
    except ArraError:  # what is wrong its own process tells
        rows = []
    if not rows:
        display.show(task.label, "starting", 0, 1)
        return
    row = rows[-1]
    note = f"loss {row['ntp_loss']:.3f}"
    note += f" align {row['gva_loss']:.3f}" if row["gva_loss"] is not None else ""
    note += f"  {row['images_per_second']:.0f} images/s"
    display.show(task.label, what, row["step"], task.recipe.train.steps, note)


def check(code: int, task: Task, log: Path, what: str, *, ranks: int = 1) -> None:
    """Nothing, if a process ended well; of several ranks torchrun's own code says nothing of theirs.

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
    if told and (code == 2 or ranks > 1):
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
