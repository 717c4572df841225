"""`arra train` and `arra generate` under torchrun: one command, several processes, the run of one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arra.runs import Run
from tests.whole import commands

PAINTING = ("--split", "heldout", "--num-images", "9", "--batch-size", "2", "--npz")


@dataclass(frozen=True)
class Launched:
    """What two processes made and said, that torchrun started for three commands: train, generate and a mistake."""

    root: Path
    done: subprocess.CompletedProcess[str]

    @property
    def run(self) -> Path:
        """The pipeline's aligned run, trained with shards."""
        return self.root / "aligned"

    @property
    def painted(self) -> Path:
        return self.root / "painted"

    @property
    def refused(self) -> Path:
        return self.root / "refused"


@pytest.fixture(scope="module")
def launched(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    root = tmp_path_factory.mktemp("torchrun")
    training = ["train", pipeline.aligned / "recipe.yaml", "--store", pipeline.store]
    each = [
        [*training, "--out", root / "aligned", "--set", "train.parallel.kind=fsdp"],
        ["generate", pipeline.aligned, *PAINTING, "--out", root / "painted"],
        [*training, "--out", root / "refused", "--set", "train.batch_size=1"],
    ]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", commands.__file__]
    done = subprocess.run(
        [*start, *(json.dumps([str(part) for part in one]) for one in each)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Launched(root, done)


def test_two_processes_leave_the_run_of_one(pipeline, launched: Launched) -> None:
    assert launched.run.is_dir(), launched.done.stderr[-4000:]
    assert launched.done.stdout.count(str(launched.run)) == 1  # the first process talks
    ours, alone = load_file(launched.run / "model.safetensors"), load_file(pipeline.aligned / "model.safetensors")
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=1e-2, msg=name)
    rows, expected = Run.open(launched.run).read_metrics(), Run.open(pipeline.aligned).read_metrics()
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["ntp_loss"] == pytest.approx(other["ntp_loss"], rel=1e-3)
    names = {path.name for path in pipeline.aligned.iterdir()} - {"metrics.json", "evaluation.safetensors", "samples"}
    assert names - {path.name for path in launched.run.iterdir()} <= {".lock"}
    previews = [path.name for path in sorted((launched.run / "previews").iterdir())]
    assert previews == [path.name for path in sorted((pipeline.aligned / "previews").iterdir())]


def test_one_process_reads_and_repeats_it(pipeline, launched: Launched) -> None:
    """With another kind of parallelism, which is no part of what a run is."""
    from arra.config import load_recipe
    from arra.data.store import Store
    from arra.stages.painters import load_run
    from arra.stages.train import train

    before = Run.open(launched.run).read_metrics()
    recipe = load_recipe(pipeline.aligned / "recipe.yaml")
    assert train(recipe, Store.open(pipeline.store), launched.run).read_metrics() == before
    assert load_run(launched.run).model.settings == load_run(pipeline.aligned).model.settings


def test_what_a_user_can_fix_is_said_once(launched: Launched) -> None:
    assert launched.done.returncode != 0
    lines = re.findall("^.*error: .*$", launched.done.stderr, re.MULTILINE)
    assert lines == ["error: train.batch_size: 1 pictures cannot be shared by 2 processes; raise it, or start fewer"]
    assert not launched.refused.exists()


def test_two_processes_paint_what_one_paints(pipeline, launched: Launched, tmp_path: Path, run_arra) -> None:
    one, two = tmp_path / "one", launched.painted
    assert run_arra("generate", pipeline.aligned, *PAINTING, "--out", one).code == 0
    said = f"9 pictures in {two} (9 painted now, "
    assert launched.done.stdout.count(said) == 1, launched.done.stderr[-4000:]  # the first process talks
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(two.iterdir())) == len(list(one.iterdir()))
