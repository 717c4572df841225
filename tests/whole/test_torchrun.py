"""`arra train` and `arra generate` under torchrun: one command, several processes, the run of one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arra.runs import Run


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc-per-node 2 -m arra ...` leaves and says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "arra"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def sharded(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's aligned run, trained by two processes with shards."""
    folder = tmp_path_factory.mktemp("torchrun") / "aligned"
    done = torchrun(
        *("train", str(pipeline.aligned / "recipe.yaml"), "--store", str(pipeline.store), "--out", str(folder)),
        *("--set", "train.parallel.kind=fsdp"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(str(folder)) == 1  # the first process talks
    return folder


def test_two_processes_leave_the_run_of_one(pipeline, sharded: Path) -> None:
    ours, alone = load_file(sharded / "model.safetensors"), load_file(pipeline.aligned / "model.safetensors")
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, atol=2e-3, rtol=1e-2, msg=name)
    rows, expected = Run.open(sharded).read_metrics(), Run.open(pipeline.aligned).read_metrics()
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["ntp_loss"] == pytest.approx(other["ntp_loss"], rel=1e-3)
    names = {path.name for path in pipeline.aligned.iterdir()} - {"metrics.json", "evaluation.safetensors", "samples"}
    assert names - {path.name for path in sharded.iterdir()} <= {".lock"}
    previews = [path.name for path in sorted((sharded / "previews").iterdir())]
    assert previews == [path.name for path in sorted((pipeline.aligned / "previews").iterdir())]


def test_one_process_reads_and_repeats_it(pipeline, sharded: Path) -> None:
    """With another kind of parallelism, which is no part of what a run is."""
    from arra.config import load_recipe
    from arra.data.store import Store
    from arra.stages.painters import load_run
    from arra.stages.train import train

    before = Run.open(sharded).read_metrics()
    recipe = load_recipe(pipeline.aligned / "recipe.yaml")
    assert train(recipe, Store.open(pipeline.store), sharded).read_metrics() == before
    assert load_run(sharded).model.settings == load_run(pipeline.aligned).model.settings


def test_what_a_user_can_fix_is_said_once(pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    told = ("train", str(pipeline.aligned / "recipe.yaml"), "--store", str(pipeline.store), "--out", str(folder))
    done = torchrun(*told, "--set", "train.batch_size=1")
    assert done.returncode != 0
    lines = re.findall("^.*error: .*$", done.stderr, re.MULTILINE)
    assert lines == ["error: train.batch_size: 1 pictures cannot be shared by 2 processes; raise it, or start fewer"]
    assert not folder.exists()


def test_two_processes_paint_what_one_paints(pipeline, tmp_path: Path, run_arra) -> None:
    asked = ("generate", str(pipeline.aligned), "--split", "heldout", "--num-images", "9", "--batch-size", "2", "--npz")
    assert run_arra(*asked, "--out", tmp_path / "one").code == 0
    two = tmp_path / "two"
    done = torchrun(*asked, "--out", str(two))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"9 pictures in {two} (9 painted now, ") == 1  # the first process talks
    for path in (tmp_path / "one").iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(two.iterdir())) == len(list((tmp_path / "one").iterdir()))
