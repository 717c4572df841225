"""What a plan says of steps is what real steps take: bytes of tensors, operations, bytes in checkpoints."""

from functools import cache
from pathlib import Path

import pytest
import torch

from arra.config import Recipe, load_recipe
from arra.data.sources import source_of
from arra.errors import ArraError
from arra.stages.plan import alone, plan
from arra.stages.plan_data import data_plan, embedded_records
from arra.stages.plan_machines import parse_machine
from arra.stages.plan_probe import Probe, materialised, measured, probe, random_trainer
from arra.stages.plan_speed import COMPUTE_SHARE, step_flops
from arra.stages.planned_model import PlannedModel, cut_to, planned_model
from arra.train.flops import count_flops

CPU = torch.device("cpu")
SMALL = ("train.batch_size=4", "train.steps=9", "model.num_layers=3", "align={center: true}", "train.threads=1")


@cache
def small(*overrides: str) -> tuple[Recipe, PlannedModel]:
    recipe = load_recipe("demo", overrides=[*SMALL, *overrides]).resolved(100)
    return recipe, planned_model(recipe)


def test_memory_is_what_real_steps_take() -> None:
    """Tracked allocations of an aligned training with Muon: within 10 %."""
    recipe, planned = small()
    found = measured(recipe, planned, device=CPU, steps=2)
    assert alone(recipe, planned) == pytest.approx(found.peak, rel=0.10)
    assert found.seconds > 0


@pytest.mark.parametrize("how", ["none", "full"])
def test_operations_are_those_of_real_passes(how: str, tmp_path: Path) -> None:
    """Blocks, head and projector: as `count_flops` sees them run, micro-batches and recomputation included."""
    recipe, planned = small(f"train.recompute={how}", "train.micro_batch_size=2")
    trainer = random_trainer(recipe, planned, run=tmp_path, device=CPU)
    batch = trainer.batches.batch(0)
    real = count_flops(lambda: trainer.passes.gradients(batch, step=0))
    assert step_flops(planned, recipe.train, ranks=1, sharded=False) == pytest.approx(real, rel=0.01)


def test_checkpoints_are_as_large_as_said(tmp_path: Path) -> None:
    recipe, planned = small()
    trainer = random_trainer(recipe, planned, run=tmp_path, device=CPU)
    trainer.train_step()
    saved = sum(value.nbytes for name, value in trainer.tensors().items())
    assert data_plan(recipe, planned).checkpoint_bytes == pytest.approx(saved, rel=0.01)


def test_no_gradients_are_there_while_a_run_looks_at_itself(tmp_path: Path) -> None:
    """Which is what the plan says, and it changes no step: they are made anew in each."""
    recipe, planned = small()
    trainer = random_trainer(recipe, planned, run=tmp_path, device=CPU)
    assert trainer.alignment is not None
    trainer.train_step()
    weights = [*trainer.model.parameters(), *trainer.alignment.parameters()]
    assert all(weight.grad is not None for weight in weights if weight.requires_grad)
    assert trainer.look("preview", lambda: [weight.grad for weight in weights]) == [None] * len(weights)


def test_a_probe_of_few_blocks_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole does not fit, two depths are tried, and the plan still holds within 10 %."""
    deep = "align={center: true, layer: 6, more: {second: {target: rep, layer: 5}}}"
    recipe, planned = small("model.num_layers=6", deep, "train.optimizer=adamw", "train.batch_size=2")
    whole, most = alone(recipe, planned), alone(recipe, cut_to(planned, 4, settings=recipe.train))
    monkeypatch.setattr("arra.stages.plan_probe.memory_here", lambda device: int((whole + most) / 2 / 0.8))
    monkeypatch.setattr("arra.stages.plan_probe.STEPS", 1)
    found = probe(recipe, planned, peak_of=lambda model: alone(recipe, model))
    assert (found.blocks, found.predicted) == ((2, 4), whole)
    assert abs(found.error) < 0.10
    monkeypatch.setattr("arra.stages.plan_probe.memory_here", lambda device: 2**20)
    with pytest.raises(ArraError, match=r"--probe: 0\.\d GiB with 4 blocks do not fit the 0\.0 GiB"):
        probe(recipe, planned, peak_of=lambda model: alone(recipe, model))


def test_a_language_model_is_cut_with_all_that_counts_its_blocks() -> None:
    recipe = load_recipe("arra_mimic", row="arra-adapt")
    whole = planned_model(recipe)
    few = cut_to(whole, 4, settings=recipe.train)
    assert (len(few.model.blocks), few.model.num_layers, len(few.parts.blocks)) == (4, 4, 4)
    assert (len(whole.model.blocks), whole.model.num_layers, len(whole.parts.blocks)) == (32, 32, 32)
    assert all(any(block is part for part in few.model.modules()) for block in few.model.blocks)


def test_hours_follow_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes what the probe took, the update in it once, on machines of its kind alone."""
    recipe, planned = small()
    measured_here = Probe(device="cpu", blocks=(3,), seconds=2.5, peak=1, predicted=1)
    monkeypatch.setattr("arra.stages.plan.probe", lambda *_, **__: measured_here)
    machines = [parse_machine("cpu-8g"), parse_machine("1xl4")]
    here, there = plan(recipe, machines=machines, probing=True, planned=planned).machines
    assert here.time is not None
    assert there.time is not None
    assert here.time.seconds == pytest.approx(2.5)
    assert here.hours == pytest.approx(9 * 2.5 / 3600)
    assert there.time.share == COMPUTE_SHARE["cuda", "float32"]


def test_a_probe_says_nothing_of_other_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, planned = small()
    measured_here = Probe(device="cuda:0", blocks=(3,), seconds=2.5, peak=1, predicted=1)
    monkeypatch.setattr("arra.stages.plan.probe", lambda *_, **__: measured_here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    machines = [parse_machine(written) for written in ("rtx4090", "2xrtx4090", "h100", "v100", "cpu-8g")]
    times = [each.time for each in plan(recipe, machines=machines, probing=True, planned=planned).machines]
    assert times[0] is not None
    assert times[0].seconds == pytest.approx(2.5)
    assert [time is not None and time.share == times[0].share for time in times] == [True, True, False, False, False]


def test_random_models_are_the_planned_ones() -> None:
    _, planned = small()
    real = materialised(planned.model, device=CPU)
    shapes = {name: (value.shape, value.requires_grad) for name, value in planned.model.named_parameters()}
    assert {name: (value.shape, value.requires_grad) for name, value in real.named_parameters()} == shapes
    assert all(value.isfinite().all() for value in real.state_dict().values())
    assert all(value.is_meta for value in planned.model.parameters())


def test_embedded_sets_are_counted() -> None:
    assert embedded_records(source_of("shapes", None)) == 3200
    recipe, planned = small("data.source=shapes", "data.max_train_records=100")
    assert data_plan(recipe, planned).records == 100
    for sources, told in (
        ("[{kind: shapes, num_images: 1000}]", 800),
        ("[{kind: shapes, num_images: 1000}, {kind: shapes, num_images: 40, seed: 1}]", 832),
        ("[{kind: shapes, weight: 2}]", None),  # how often a picture comes is not counted
        ("[{kind: shapes}, {kind: folder, path: not-there-yet}]", None),
    ):
        recipe, planned = small(f"data.sources={sources}")
        assert data_plan(recipe, planned).records == told
