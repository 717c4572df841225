"""Options of the whole suite, and the tiny pipeline that tests of stages, commands and the demo share."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple")
SHAPES = ("circle", "square", "bar", "frame")
PLACES = ("left", "right", "middle")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write our own golden files anew instead of comparing")


@pytest.fixture
def regenerate(request: pytest.FixtureRequest) -> bool:
    """Whether golden files that we made ourselves are to be written anew."""
    return bool(request.config.getoption("--regenerate"))


@dataclass(frozen=True)
class Pipeline:
    """A finished pipeline of toy size: 60 pictures of 16 pixels, one layer, both judges."""

    root: Path

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def store(self) -> Path:
        return self.root / "runs" / "store"

    @property
    def baseline(self) -> Path:
        return self.root / "runs" / "baseline"

    @property
    def aligned(self) -> Path:
        return self.root / "runs" / "aligned"

    @property
    def page(self) -> Path:
        return self.root / "runs" / "report.html"


@pytest.fixture(scope="session")
def toy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Trains in processes of their own, as `tests.train.toy_training.serve` is asked, and gives the exit code."""
    from tests.train import toy_training

    command = [sys.executable, toy_training.__file__, "serve"]
    said = tmp_path_factory.mktemp("toy_server") / "stderr"
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as server,
    ):
        asking, answers = server.stdin, server.stdout
        assert asking is not None
        assert answers is not None

        def ask(**arguments: Any) -> int:
            print(json.dumps(arguments, default=str), file=asking, flush=True)
            code = int(answers.readline())
            if code == 1:  # a mistake in it
                pytest.fail(said.read_text()[-4000:])
            return code

        yield ask
        asking.close()


@pytest.fixture
def interrupt_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A context in which Ctrl-C comes at the writing of a shard, after so many that survive; it must come."""
    from arra.data.columns import ColumnWriter

    write = ColumnWriter.write

    @contextmanager
    def interrupted(survive: int) -> Iterator[None]:
        left = survive

        def stop(self: ColumnWriter, *arguments: Any, **options: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            write(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(ColumnWriter, "write", stop)
            with pytest.raises(KeyboardInterrupt):
                yield

    return interrupted


@pytest.fixture(scope="session")
def draw_pictures() -> Callable[[Path], Path]:
    """Draws the toy data set, 60 captioned shapes, into a folder."""

    def draw(folder: Path) -> Path:
        folder.mkdir(parents=True)
        lines = []
        for number in range(len(COLORS) * len(SHAPES) * len(PLACES)):
            color, rest = COLORS[number % 5], number // 5
            shape, place = SHAPES[rest % 4], PLACES[rest // 4]
            image = Image.new("RGB", (48, 48), "white")
            left = {"left": 4, "right": 24, "middle": 14}[place]
            box = (left, 14, left + 19, 33)
            pen = ImageDraw.Draw(image)
            if shape == "circle":
                pen.ellipse(box, fill=color)
            elif shape == "bar":
                pen.rectangle((left, 21, left + 19, 26), fill=color)
            else:
                pen.rectangle(box, fill=color if shape == "square" else None, outline=color, width=3)
            image.save(folder / f"{number:03d}.png")
            lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"{color} {shape} {place}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return draw


@pytest.fixture(scope="session")
def toy_settings() -> tuple[str, ...]:
    """What makes the demo's recipe toy-sized, as `--set` takes it; the pictures are named apart."""
    return (
        "data.image_size=16",
        "data.encoder_image_size=48",
        "tokenizer.train=null",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.hidden_size=32",
        "model.prefix_length=8",
        "model.text_vocab_size=300",
        "align.components=8",
        "caption_judge.steps=2",
        "caption_judge.batch_size=8",
        "train.steps=40",
        "train.batch_size=8",
        "train.warmup_steps=2",
        "train.log_every_steps=1",
        "train.validate_every_steps=20",
        "train.preview_every_steps=20",
        "train.checkpoint_every_steps=10",
        "evaluate.num_resamples=10",
        "evaluate.frechet_components=2",
        "evaluate.grid_prompts=2",
        "evaluate.grid_seeds=2",
    )


@pytest.fixture(scope="session")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory,
    draw_pictures: Callable[[Path], Path],
    toy_settings: tuple[str, ...],
) -> Pipeline:
    """A finished toy pipeline, made once for all worker processes; read it, change only a copy."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root = base / "toy-pipeline"
    with (base / ".toy-pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "runs" / "report.html").is_file():
            shutil.rmtree(root, ignore_errors=True)
            _make_pipeline(Pipeline(root), draw_pictures, toy_settings)
    return Pipeline(root)


def _make_pipeline(toy: Pipeline, draw: Callable[[Path], Path], settings: tuple[str, ...]) -> None:
    from arra.config import load_recipe
    from arra.stages.evaluate import evaluate
    from arra.stages.prepare import prepare
    from arra.stages.report import report
    from arra.stages.train import train

    own = ["data.source=auto", f"data.path={draw(toy.pictures)}", "evaluate.splits=[heldout]"]
    for folder in (toy.baseline, toy.aligned):
        chosen = [text for text in settings if folder.name == "aligned" or not text.startswith("align.")]
        recipe = load_recipe("demo", row=folder.name, overrides=[*own, *chosen])
        train(recipe, prepare(recipe, toy.store).checked(), folder)
        evaluate(folder, threads=1)
    report([toy.baseline, toy.aligned], toy.page.parent, title="toy")


@pytest.fixture
def toy_copy(pipeline: Pipeline, tmp_path: Path) -> Pipeline:
    """The toy pipeline in a folder of the test's own, as if it had been moved; its pictures stay where they are."""
    shutil.copytree(pipeline.root / "runs", tmp_path / "toy" / "runs")
    return Pipeline(tmp_path / "toy")


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user's mistake is told in."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0].removeprefix("error: ")


@pytest.fixture
def run_arra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a command in this process, as `arra ARGUMENTS` would in a shell."""

    def run(*arguments: object) -> Answer:
        from arra.cli import main

        monkeypatch.setattr(sys, "argv", ["arra", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        printed = capsys.readouterr()
        code = leaving.value.code
        return Answer(code if isinstance(code, int) else 0 if code is None else 1, printed.out, printed.err)

    return run
