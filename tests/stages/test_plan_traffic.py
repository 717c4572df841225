"""What lets steps wait less for traffic, and that it is told only where they do."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from arra.config import Recipe, load_recipe
from arra.stages.plan import MachinePlan, plan
from arra.stages.plan_machines import parse_machine
from arra.stages.plan_traffic import LEAST_GAIN
from arra.stages.planned_model import planned_model

SHARDED = ("train.batch_size=256", "train.micro_batch_size=1", "train.parallel.kind=fsdp", "train.steps=3600",
           "train.preview_every_steps=null")  # fmt: skip


def recipe(*changes: str) -> Recipe:
    return load_recipe("llamagen_c2i", row="b", overrides=[*SHARDED, *changes])


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of one and two blocks, in half the time: here all blocks are alike."""
    monkeypatch.setattr("arra.train.activations.TRACED_BLOCKS", (1, 2))


planned = cache(lambda: planned_model(recipe()))


def found(*changes: str, machine: str = "4xl4") -> MachinePlan:
    return plan(recipe(*changes), machines=[parse_machine(machine)], planned=planned()).machines[0]


def test_what_is_faster_is_so_when_it_is_done() -> None:
    """Fastest first; each as the plan of the recipe with it, which fits; the micro-batch no larger than it must be."""
    slow = found()
    assert slow.fits
    assert slow.time is not None
    assert slow.time.traffic > 1.5 * slow.time.compute
    assert [each.seconds for each in slow.faster] == sorted(each.seconds for each in slow.faster)
    for faster in slow.faster:
        done = found(*faster.what.split(", "))
        assert done.time is not None
        assert (done.time.seconds, done.hours, done.needed, done.fits) == (
            faster.seconds, faster.hours, faster.needed, True
        )  # fmt: skip
        assert faster.seconds < (1 - LEAST_GAIN) * slow.time.seconds
    alone = {each.what for each in slow.faster if "," not in each.what}
    rows = next(int(what.split("=")[1]) for what in alone if "micro_batch_size" in what)
    assert alone == {f"train.micro_batch_size={rows}", "train.parallel.reshard=false", "train.parallel.kind=ddp"}
    enough, fewer = (found(f"train.micro_batch_size={count}").time for count in (rows, rows - 1))
    assert enough is not None
    assert fewer is not None
    assert enough.traffic <= enough.compute
    assert fewer.traffic > fewer.compute
    assert rows < 64  # of a card


@pytest.mark.parametrize(
    ("changes", "machine"),
    [
        (("train.parallel.kind=ddp",), "4xl4"),  # once a step, however large the micro-batches
        (("train.micro_batch_size=64",), "4xl4"),
        ((), "4x24"),  # of which only the memory is known
    ],
)
def test_nothing_is_told_where_nothing_waits(changes: tuple[str, ...], machine: str) -> None:
    assert found(*changes, machine=machine).faster == ()


def test_what_does_not_fit_is_not_told() -> None:
    """Where not all weights fit a card, and not the most rows: shards and fewer of them."""
    whole = found()
    (most,) = {each.needed for each in whole.faster if each.what == "train.parallel.kind=ddp"}
    machine = replace(parse_machine("4xl4"), bytes_each=most - 2**20)
    tight = plan(recipe(), machines=[machine], planned=planned()).machines[0]
    assert tight.faster
    assert not any("ddp" in each.what for each in tight.faster)
    assert all(each.needed <= machine.bytes_each for each in tight.faster)


def test_on_the_screen(run_arra: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    path.write_text(
        "base: llamagen_c2i\nname: paper\n"
        "model: {size: null, num_layers: 2, num_heads: 2, hidden_size: 64}\nalign: null\n"
        "train: {steps: 3600, batch_size: 64, micro_batch_size: 1, parallel: {kind: fsdp}}\n"
        "table: {title: Table 0, about: Weights, columns: {fd: FID}, protocol: imagenet-256}\n"
        "rows: {one: {}, two: {train: {learning_rate: 0.1}}}\n"
    )
    single = run_arra("plan", str(path), "--row", "one", "--gpu", "4xl4").out.splitlines()
    place = next(number for number, line in enumerate(single) if line.startswith("4xl4: steps wait for traffic, "))
    assert single[place + 1].startswith("  train.")
    assert " s a step, " in single[place + 1]
    answer = run_arra("plan", str(path), "--gpu", "4xl4")
    assert "every row: waits for traffic; " in answer.out
    assert " times as fast with train." in answer.out
