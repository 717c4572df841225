"""Runs as processes: interrupted ones save first, failed ones are told, and the others go on where they may."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command

import arra.stages.tasks
from arra.cli import app
from arra.config import find_recipe
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
