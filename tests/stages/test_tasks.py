"""Runs as processes: interrupted ones save first, failed ones are told, and the others go on where they may."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.main import get_command

import arra.stages.tasks
from arra.cli import app
from arra.config import dump_recipe, find_recipe
from arra.display import Display
from arra.errors import ArraError
from arra.stages.set_options import SetOptions, parse_set_options
from arra.stages.tasks import (
    Failure,
    Places,
    Task,
    check,
    evaluate_tasks,
    finished,
    run_processes,
    train_tasks,
)


def task(name: str, folder: Path) -> Task:
    return Task(name, 0, folder, (), name, Path("demo.yaml"))


SAVES_WHEN_ASKED = """
import signal, sys, time
def save(number, frame):
    open(sys.argv[1], "w").write("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1], "w").write("running")
time.sleep(60)
"""


def test_an_interruption_waits_for_the_trainings_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def begin(arguments: list[str], log: Path, **where: object) -> subprocess.Popen[bytes]:
        log.write_text("")
        return subprocess.Popen([sys.executable, "-c", SAVES_WHEN_ASKED, *arguments])

    def look(task: Task, log: Path, display: Display, what: str) -> None:
        if all((tmp_path / name).exists() and (tmp_path / name).read_text() == "running" for name in "ab"):
            raise KeyboardInterrupt

    monkeypatch.setattr(arra.stages.tasks, "start", begin)
    monkeypatch.setattr(arra.stages.tasks, "watch", look)
    monkeypatch.setattr(arra.stages.tasks, "num_parallel", lambda: 2)
    printed = io.StringIO()
    commands = [(task(name, tmp_path / name), [str(tmp_path / name)]) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        run_processes(commands, Display(Console(file=printed)), "training")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["saved", "saved"]
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".*.log"))
    assert printed.getvalue() == "stopping; what is training saves first\n"


def test_how_a_process_ended_is_told(tmp_path: Path):
    one, log = task("aligned", Path("runs/demo/aligned")), tmp_path / "log"
    log.write_text("something\nerror: runs/x: full; free space\nafterwards\n")
    check(0, one, log, "training")
    with pytest.raises(RuntimeError, match=r"training aligned ended with code 1; the log is .*\nsomething"):
        check(1, one, log, "training")
    with pytest.raises(ArraError, match=r"^runs/x: full; free space$"):
        check(2, one, log, "training")
    log.write_text("")
    with pytest.raises(KeyboardInterrupt):
        check(130, one, log, "training")
    log.write_text("")
    with pytest.raises(ArraError, match=r"^runs/demo/aligned: training was killed from outside \(SIGKILL\)"):
        check(-signal.SIGKILL, one, log, "training")


def test_of_several_ranks_torchruns_code_says_nothing(tmp_path: Path):
    """It ends with 1 whatever its ranks said, and with a frame of its own below."""
    one, log = task("aligned", Path("runs/demo/aligned")), tmp_path / "log"
    log.write_text("error: runs/x: full; free space\nerror: runs/x: full; free space\n======\n rank 0 failed\n======\n")
    with pytest.raises(ArraError, match=r"^runs/x: full; free space$"):
        check(1, one, log, "training", ranks=2)
    log.write_text("Traceback\nKeyError: 'x'\n======\n")
    with pytest.raises(RuntimeError, match="KeyError"):
        check(1, one, log, "training", ranks=2)


def test_each_accelerator_takes_one_run(monkeypatch: pytest.MonkeyPatch):
    def at(places: Places) -> list[str | None]:
        return [slot.get("CUDA_VISIBLE_DEVICES") for slot in places.slots]

    monkeypatch.setattr(arra.stages.tasks, "num_parallel", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert at(Places()) == [None] * 3
    with pytest.raises(ArraError, match=r"^--devices 0: torch sees no accelerator here; leave it out$"):
        Places(devices=("0",)).require()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert at(Places()) == ["0", "1", "2", "3", "4"]
    assert at(Places(ranks=2)) == ["0,1", "2,3"]
    assert at(Places(processes=2)) == [None] * 2
    assert at(Places(devices=("4", "1"))) == ["4", "1"]
    with pytest.raises(ArraError, match=r"^--ranks 8: 5 accelerators are here; take fewer ranks"):
        _ = Places(ranks=8).slots
    Places(devices=("4", "MIG-x")).require()
    with pytest.raises(ArraError, match=r"^--devices 7: torch sees 0, 1, 2, 3, 4 here"):
        Places(devices=("4", "7")).require()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, 7")
    assert at(Places()) == ["6", "7"]
    Places(devices=("7",)).require()


ENDS = """
import sys
text, code = sys.argv[1:]
print(text)
sys.exit(int(code))
"""


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun: list[str] = []

    def begin(arguments: list[str], log: Path, **where: object) -> subprocess.Popen[bytes]:
        begun.append(log.name)
        with log.open("wb") as file:
            return subprocess.Popen([sys.executable, "-c", ENDS, *arguments], stdout=file)

    monkeypatch.setattr(arra.stages.tasks, "start", begin)
    monkeypatch.setattr(arra.stages.tasks, "watch", lambda *arguments: None)
    ends = {"a": ("error: no space", "2"), "b": ("Traceback\nKeyError: 'x'", "1"), "c": ("fine", "0")}
    commands = [(task(name, tmp_path / name), list(end)) for name, end in ends.items()]
    printed = io.StringIO()
    display = Display(Console(file=printed))
    failures = run_processes(commands, display, "evaluating", places=Places(1), keep_going=True)
    assert begun == [".a.log", ".b.log", ".c.log"]
    log = tmp_path / ".b.log"
    bug = f"evaluating b ended with code 1; the log is {log} (KeyError: 'x')"
    assert [(each.task.label, each.what, each.why) for each in failures] == [
        ("a", "evaluating", "no space"),
        ("b", "evaluating", bug),
    ]
    assert isinstance(failures[0], Failure)
    assert printed.getvalue().splitlines() == ["a: evaluating failed: no space", f"b: evaluating failed: {bug}"]
    assert [path.name for path in tmp_path.glob(".*.log")] == [log.name]  # of a bug the log stays
    with pytest.raises(ArraError, match=r"^no space$"):
        run_processes(commands, display, "evaluating", places=Places(1))
    assert begun[3:] == [".a.log"]


def test_processes_are_asked_what_the_commands_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun: list[tuple[list[tuple[Task, list[str]]], Places]] = []

    def note(commands: list[tuple[Task, list[str]]], *_: object, places: Places, **__: object) -> list[Failure]:
        begun.append((commands, places))
        return []

    monkeypatch.setattr(arra.stages.tasks, "run_processes", note)
    one = Task("arra", 0, tmp_path / "run", ("train.seed=0", "model.seed=0"), "one", find_recipe("embedded"))
    asked = SetOptions(
        protocol="mimic-cxr",
        out=tmp_path / "card",
        reference="real",
        without=("rad-dino", "copied"),
        weights={"inception": "a.pth", "biomedclip": "b"},
    )
    display, places = Display(Console(file=io.StringIO())), Places(devices=("0", "1"), ranks=2)
    train_tasks([one], tmp_path / "store", display, places=places)
    evaluate_tasks([one], display, places=places)
    evaluate_tasks([one], display, places=places, sets=lambda task: asked)
    told = []
    for commands, at in begun:
        ((_, words),) = commands
        context = get_command(app).commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
        told.append((context.params, at.ranks))
    (train, train_ranks), (plain, plain_ranks), (of_set, _) = told
    assert (train_ranks, plain_ranks) == (2, 1)
    assert (train["row"], train["out"], train["overrides"]) == ("arra", tmp_path / "run", list(one.overrides))
    assert (plain["subjects"], plain["threads"], plain["protocol"], plain["out"]) == ([tmp_path / "run"], 1, None, None)
    given = {name: of_set[name] for name in ("weights", "inception", "reference", "protocol", "out")}
    assert parse_set_options(**given, without=tuple(of_set["without"])) == asked


def test_a_damaged_run_is_not_finished_and_its_training_tells_why(tmp_path: Path):
    one = Task("arra", 0, tmp_path / "run", (), "one", find_recipe("embedded"))
    assert not finished(one)
    one.folder.mkdir()
    for damage in (b"name: [", b"\xff\xfe", b"", b"name: x\n"):
        (one.folder / "recipe.yaml").write_bytes(damage)
        assert not finished(one)
    (one.folder / "recipe.yaml").write_text(dump_recipe(one.recipe))
    for name in ("model.safetensors", "model.json"):
        (one.folder / name).touch()
    last = {"step": one.recipe.train.steps, "kind": "train"}
    (one.folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    assert finished(one)
    faster = Task("arra", 0, one.folder, ("train.micro_batch_size=1",), "one", one.source)
    assert finished(faster)  # what it computes is the same
    assert not finished(Task("arra", 0, one.folder, ("train.seed=1",), "one", one.source))
    (one.folder / "metrics.jsonl").write_text("half of \n" + json.dumps(last) + "\n")
    assert not finished(one)
    arra.stages.tasks.watch(one, tmp_path / "log", Display(Console(file=io.StringIO())), "training")
