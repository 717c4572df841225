"""Laws of training: a comparison is true, an interruption leaves no trace, and looking changes nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from arra.data.batches import text_batch
from arra.errors import ArraError
from arra.models import Decoder, Painter
from arra.sample.generate import generate
from arra.train.checkpoints import steps_in
from arra.train.interrupt import TrainingInterrupted, interruptible
from arra.train.loop import Trainer
from arra.train.optimizer_state import restore_optimizer
from arra.train.passes import validation_loss
from arra.train.schedule import learning_rate
from arra.train.settings import AlignSettings, TrainSettings
from arra.train.shards import Shards
from tests.train import toy_training
from tests.train.toy_training import (
    STEPS,
    different,
    disturbed,
    held,
    make_trainer,
    model_of,
    rows_of,
    state_of,
    trained,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "averaged": {"ema_decay": 0.9},
    "micro": {"micro_batch_size": 4, "z_weight": 1e-3, "schedule": "constant"},
}


Undisturbed = tuple[dict[str, Tensor], list[dict[str, Any]]]
"""State at the end, and metrics, of a training that nothing happened to."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """By the name of its options, made once."""

    @cache
    def of(kind: str) -> Undisturbed:
        trainer = trained(tmp_path_factory.mktemp("undisturbed") / kind, **OPTIONS[kind])
        return state_of(trainer), rows_of(trainer)

    return of


def assert_undisturbed(again: Trainer, expected: Undisturbed) -> None:
    state, rows = expected
    assert different(state, state_of(again)) == []
    assert rows_of(again) == rows


@pytest.mark.parametrize("kind", OPTIONS)
def test_no_alignment_and_weight_zero_train_the_same_model(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout on; the weight alone makes the difference."""
    options = OPTIONS[kind]
    plain = trained(tmp_path / "null", align=None, **options)
    for layer in (0, 2):
        zero = trained(tmp_path / f"zero{layer}", align=AlignSettings(layer=layer, weight=0.0), **options)
        assert different(model_of(plain), model_of(zero)) == []
        assert rows_of(plain, "gva_loss") == rows_of(zero, "gva_loss")
    aligned = trained(tmp_path / "aligned", **options)
    assert len(different(model_of(plain), model_of(aligned))) > len(model_of(plain)) / 2
    first = [rows_of(run)[0] for run in (plain, zero, aligned)]
    assert {row["ntp_loss"] for row in first} == {first[0]["ntp_loss"]}  # same weights, pictures, dropout
    assert first[0]["gva_loss"] is None
    assert 0 <= first[1]["gva_loss"] <= 2
    assert first[2]["loss"] == pytest.approx(first[2]["ntp_loss"] + first[2]["gva_loss"], abs=1e-2)


def test_dropout_is_on(tmp_path: Path) -> None:
    """Otherwise the law above would be weaker than it says."""
    on, off = trained(tmp_path / "on", align=None), trained(tmp_path / "off", align=None, dropout=0.0)
    assert different(model_of(on), model_of(off))


def test_the_z_loss_leaves_the_alignment_loss_unchanged(tmp_path: Path) -> None:
    rows = [rows_of(trained(tmp_path / str(z), z_weight=z, steps=2, log_every_steps=1)) for z in (0.0, 1.0)]
    assert rows[0][0]["gva_loss"] == rows[1][0]["gva_loss"]
    assert rows[0][0]["z_loss"] == rows[1][0]["z_loss"]
    assert rows[0][0]["loss"] != rows[1][0]["loss"]


def test_training_learns(tmp_path: Path) -> None:
    rows = rows_of(trained(tmp_path / "run", steps=60, dropout=0.0, learning_rate=1e-2))
    train = [row for row in rows if row["kind"] == "train"]
    assert train[0]["ntp_loss"] == pytest.approx(math.log(16), abs=1e-4)  # the head starts at zero
    assert train[-1]["ntp_loss"] < 0.6 * train[0]["ntp_loss"]
    assert train[-1]["gva_loss"] < 0.6 * train[0]["gva_loss"]


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_micro_batches_are_the_whole_batch(size: int, tmp_path: Path) -> None:
    """Losses and gradients, with dropout on; the parts differ in size."""
    options: dict[str, Any] = {"dropout": 0.3, "z_weight": 0.1}
    whole, parts = (
        make_trainer(tmp_path / "a", **options),
        make_trainer(tmp_path / "b", micro_batch_size=size, **options),
    )
    for trainer in (whole, parts):
        assert isinstance(trainer.model, Decoder)
        nn.init.normal_(trainer.model.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    losses = [trainer.passes.gradients(trainer.batches.batch(0), step=0).losses for trainer in (whole, parts)]
    for name in ("total", "ntp", "z", "gva"):
        torch.testing.assert_close(getattr(losses[1], name), getattr(losses[0], name), atol=1e-5, rtol=1e-5)
    for (name, one), other in zip(
        {**whole.parameters, **whole.projector}.items(),
        [*parts.parameters.values(), *parts.projector.values()],
        strict=True,
    ):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputing_changes_no_bit(precision: str, tmp_path: Path) -> None:
    """With dropout on, whose masks are not drawn again but follow from the rows."""
    options: dict[str, Any] = {"dropout": 0.3, "precision": precision, "steps": 4}
    kept = state_of(trained(tmp_path / "none", **options))
    for how in ("selective", "full"):
        assert different(kept, state_of(trained(tmp_path / how, recompute=how, **options))) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_blocks_train_the_same_model(tmp_path: Path) -> None:
    """In a process without the tests' type checks, which a compiler stumbles over."""
    options: dict[str, Any] = {"dropout": 0.3, "steps": 4}
    cases = {how: {**options, "compile": True, "recompute": how} for how in ("none", "full")}
    command = [sys.executable, str(Path(toy_training.__file__)), str(tmp_path), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = state_of(trained(tmp_path / "plain", **options))
    for how in cases:
        compiled = safetensors.torch.load_file(tmp_path / how / "state.safetensors")
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, atol=2e-5, rtol=1e-3, equal_nan=True, msg=name)


def test_bfloat16_products_leave_everything_kept_in_float32(tmp_path: Path) -> None:
    narrow, wide = (trained(tmp_path / kind, precision=kind, ema_decay=0.9) for kind in ("bfloat16", "float32"))
    kinds = {value.dtype for name, value in state_of(narrow).items() if name != "losses"}
    assert kinds == {torch.float32}
    assert different(model_of(narrow), model_of(wide)) != []
    losses = [[row["ntp_loss"] for row in rows_of(each) if row["kind"] == "train"] for each in (narrow, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def signal_at(step: int, number: int) -> Callable[[Painter, int], None]:
    def preview(model: Painter, now: int) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return preview


def die_at(step: int) -> Callable[[Painter, int], None]:
    """The end without any saving, as by kill -9: the metrics of the step are written, its checkpoint is not."""

    def preview(model: Painter, now: int) -> None:
        if now == step:
            raise SystemExit

    return preview


@pytest.mark.parametrize(("kind", "number"), [("adamw", signal.SIGINT), *((kind, signal.SIGTERM) for kind in OPTIONS)])
def test_a_signal_saves_and_the_next_start_continues(
    kind: str, number: int, undisturbed: Callable[[str], Undisturbed], tmp_path: Path
) -> None:
    options = OPTIONS[kind]
    for step in (1, 7):
        stopped = make_trainer(tmp_path / "stopped", preview=signal_at(step, number), **options)
        with pytest.raises(TrainingInterrupted, match=f"interrupted at step {step}, saved"):
            stopped.train()
        saved = stopped.checkpoints.newest()
        assert saved is not None
        assert saved.step == step
    again = trained(tmp_path / "stopped", **options)
    assert again.step == STEPS
    assert_undisturbed(again, undisturbed(kind))


@pytest.mark.parametrize("step", [1, 5, 8, 10, 12])
def test_a_kill_loses_only_time(step: int, undisturbed: Callable[[str], Undisturbed], tmp_path: Path) -> None:
    """Before the first checkpoint, in the middle, while one is due, and at the very end."""
    options = OPTIONS["averaged"]
    killed = make_trainer(tmp_path / "killed", preview=die_at(step), **options)
    with pytest.raises(SystemExit):
        killed.train()
    killed.checkpoints.wait()  # this process lives on, and so does its save
    with killed.run.metrics_path.open("a") as file:
        file.write('{"kind": "train", "step": 9')  # a torn line
    again = make_trainer(tmp_path / "killed", **options)
    again.resume()
    assert again.step == (step - 1) // 5 * 5
    again.train()
    assert_undisturbed(again, undisturbed("averaged"))
    assert again.seconds > 0


def test_a_finished_training_stays_as_it_is(tmp_path: Path) -> None:
    done = trained(tmp_path / "run")
    rows = done.run.read_metrics()
    again = trained(tmp_path / "run")
    assert different(state_of(done), state_of(again)) == []
    assert again.run.read_metrics() == rows


@pytest.mark.parametrize("signal_at", [None, 6])
def test_a_training_ends_when_its_last_checkpoint_is_on_the_disk(
    signal_at: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes in the background."""
    write = Shards.write

    def slow(shards: Shards, *told: Any) -> BaseException | None:
        time.sleep(0.3)
        return write(shards, *told)

    monkeypatch.setattr(Shards, "write", slow)
    trainer = make_trainer(tmp_path)
    if signal_at is not None:
        disturbed(trainer, signal_at, signal.SIGTERM)
    with suppress(TrainingInterrupted):
        trainer.train()
    assert trainer.step == (STEPS if signal_at is None else signal_at + 1)
    assert steps_in(tmp_path / "checkpoints")[-1] == trainer.step


def test_the_best_so_far_is_known_after_a_new_start(tmp_path: Path) -> None:
    """So that a worse step is not saved as a better one, and times go on."""
    first = trained(tmp_path, keep_best=1, steps=10)
    second = make_trainer(tmp_path, keep_best=1, steps=10)
    second.resume()
    assert second.best == min(row["ntp_loss"] for row in first.run.read_metrics() if row["kind"] == "validation")
    assert second.seconds == first.seconds > 0


def test_a_damaged_checkpoint_is_passed_over(undisturbed: Callable[[str], Undisturbed], tmp_path: Path) -> None:
    killed = make_trainer(tmp_path / "killed", preview=die_at(12))
    with pytest.raises(SystemExit):
        killed.train()
    killed.checkpoints.wait()  # this process lives on, and so does its save
    shard = next((killed.run.path / "checkpoints" / "step-0000010").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-50] ^= 1
    shard.write_bytes(content)
    again = make_trainer(tmp_path / "killed")
    with pytest.warns(UserWarning, match=r"step-0000010: damaged .*; using the checkpoint before it"):
        again.train()
    assert_undisturbed(again, undisturbed("adamw"))


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Validating, logging, painting and saving at every step, on averaged weights, trains the same model as none."""
    painted: list[int] = []

    def preview(model: Painter, step: int) -> None:
        painted.append(step)
        generate(model, prompts=["ab"], seeds=[0])
        torch.rand(5)  # even this is no matter: every step seeds its own

    often: dict[str, Any] = {"log_every_steps": 1, "validate_every_steps": 1, "checkpoint_every_steps": 1}
    watched = trained(tmp_path / "watched", preview=preview, ema_decay=0.9, **often)
    alone = trained(tmp_path / "alone", validate=False, ema_decay=0.9)
    assert painted == list(range(1, STEPS + 1))
    assert different(state_of(watched), state_of(alone)) == []
    assert watched.model.training
    found = {row["step"]: row for row in rows_of(watched) if row["kind"] == "train"}
    assert all(found[row["step"]] == row for row in rows_of(alone))


def test_validation_sees_the_averaged_weights_and_no_dropout(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", ema_decay=0.9)
    last = rows_of(trainer)[-1]
    assert (last["kind"], last["step"]) == ("validation", STEPS)
    own = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    plain = validation_loss(trainer.model, trainer.validation)
    with trainer.averaged():
        averaged = validation_loss(trainer.model, trainer.validation)
    assert averaged == last["ntp_loss"] != plain
    assert all(torch.equal(parameter, own[name]) for name, parameter in trainer.parameters.items())
    # nats per code, whatever the batches: three rows together are as one by one
    batch = trainer.validation[0]
    codes = batch.tokens[:, 5:]
    single = [text_batch([ids], codes[i : i + 1], prefix_length=5) for i, ids in enumerate([[2], [3, 4], []])]
    assert validation_loss(trainer.model, single) == pytest.approx(plain, abs=1e-6)


def test_averaged_weights_follow_their_formula(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", ema_decay=0.5)
    wanted = {name: value.clone() for name, value in trainer.averages.tensors().items()}
    for step in range(1, 9):
        trainer.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in trainer.parameters.items():
            name = f"average.{name}"
            wanted[name] = decay * wanted[name] + (1 - decay) * parameter.detach()
    for name, value in trainer.averages.tensors().items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("micro", [None, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(micro: int | None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", micro_batch_size=micro)
    for _ in range(3):
        trainer.train_step()
    before = state_of(trainer)
    before = {name: value.clone() for name, value in before.items()}
    features = held(trainer.batches).features
    assert features is not None
    features["teacher"][:] = math.inf
    with pytest.raises(
        ArraError, match=r"step 3: loss is nan, of gva_loss.main \(batch 3, records .*first non-finite .* in trouble"
    ):
        trainer.train_step()
    assert trainer.step == 3
    assert different(before, state_of(trainer)) == []


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train_step()
    before = {name: value.clone() for name, value in state_of(trainer).items()}
    trainer.parameters["norm.weight"].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ArraError, match=r"gradient norm is (nan|inf)"):
        trainer.train_step()
    assert different(before, state_of(trainer)) == []


def test_the_learning_rate() -> None:
    base: dict[str, Any] = {"steps": 110, "warmup_steps": 10, "learning_rate": 2.0, "final_learning_rate": 0.5}
    cosine, constant = TrainSettings(**base), TrainSettings(**base, schedule="constant")
    for s in (cosine, constant):
        assert [learning_rate(step, s) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(60, cosine) == pytest.approx(1.25)
    assert learning_rate(35, cosine) == pytest.approx(0.5 + 1.5 * (0.5 + math.sqrt(0.5) / 2))
    assert learning_rate(110, cosine) == pytest.approx(0.5)
    assert learning_rate(109, constant) == 2.0
    rates = [learning_rate(step, cosine) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(0, TrainSettings(steps=1, warmup_steps=0, learning_rate=3.0)) == 3.0


def test_a_steps_rate_and_torchs_draws_are_functions_of_its_number(tmp_path: Path) -> None:
    """The rate in the optimiser; the seed of what is drawn within a kernel (attention's dropout)."""
    found = []
    for name in ("one", "other"):
        trainer, seeds = make_trainer(tmp_path / name), []
        for step in range(4):
            trainer.train_step()
            rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
            assert rates == {learning_rate(step, trainer.settings)}
            seeds.append(torch.initial_seed())
        assert len({*seeds}) == 4
        found.append(seeds)
    assert found[0] == found[1]


def test_the_rate_of_a_row_is_the_one_of_its_step(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", log_every_steps=1)
    rows = [row for row in rows_of(trainer) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["lr"] for row in rows] == [learning_rate(step, trainer.settings) for step in range(STEPS)]
    assert [row["images"] for row in rows] == [6 * step for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_is_for_matrices(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", optimizer=kind, weight_decay=0.25)
    decays: dict[str, float] = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert trainer.names[parameter] not in decays, "in two groups"
                decays[trainer.names[parameter]] = group["weight_decay"]
    assert set(decays) == set(trainer.names.values())
    for parameter, name in trainer.names.items():
        assert decays[name] == (0.25 if parameter.dim() >= 2 else 0), name
    undecayed = {name for name, decay in decays.items() if not decay}
    assert undecayed == {name for name in decays if "norm" in name or name.endswith("bias")}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_small_step_moves_a_weight(kind: str, tmp_path: Path) -> None:
    """2e-5 on 0.02 is lost in bfloat16; weights and optimiser states are float32, so it is not lost here."""
    assert torch.tensor(0.02).bfloat16() - 2e-5 == torch.tensor(0.02).bfloat16()
    trainer = make_trainer(
        tmp_path / "run", optimizer=kind, learning_rate=2e-5, warmup_steps=0, schedule="constant", weight_decay=0.0
    )
    assert isinstance(trainer.model, Decoder)
    nn.init.constant_(trainer.model.output.weight, 0.02)
    nn.init.normal_(trainer.model.output.weight[:4], std=0.02)  # so that a gradient flows back
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.train_step()
    assert {value.dtype for name, value in state_of(trainer).items() if name != "losses"} == {torch.float32}
    moved = (trainer.model.output.weight - before["output.weight"]).abs()
    torch.testing.assert_close(moved.median(), torch.tensor(2e-5), atol=2e-8, rtol=0.05)
    for name, parameter in trainer.parameters.items():
        assert not torch.equal(parameter, before[name]), name


def test_the_projectors_gradient_is_clipped_alone(tmp_path: Path) -> None:
    """A large gradient in the projector neither shortens the model's step nor goes unclipped."""
    found = []
    for scale in (1.0, 1000.0):
        trainer = make_trainer(tmp_path / str(scale), dropout=0.0, clip_norm=0.01)
        for parameter in trainer.projector.values():
            parameter.register_hook(lambda gradient, scale=scale: gradient * scale)
        totals = trainer.train_step()
        assert totals is not None
        for part in (trainer.parameters, trainer.projector):
            squares = [p.grad.square().sum() for p in part.values() if p.grad is not None]
            assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.01, rel=1e-3)
        found.append((totals.grad_norm, {name: value.detach().clone() for name, value in trainer.parameters.items()}))
    assert found[0][0] == found[1][0] > 0.01
    assert different(found[0][1], found[1][1]) == []


def test_the_optimisers_state_returns_to_the_device_of_its_weights() -> None:
    weight = nn.Parameter(torch.zeros(2, 3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    saved = {f"optimizer.w.{key}": torch.ones(2, 3) for key in ("exp_avg", "exp_avg_sq")}
    restore_optimizer(optimizer, {weight: "w"}, tensors=saved | {"optimizer.w.step": torch.tensor(5.0)})
    devices = {key: value.device.type for key, value in optimizer.state[weight].items()}
    assert devices == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": "cpu"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_only_set_a_flag_inside_the_block(number: int) -> None:
    kept = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == kept
