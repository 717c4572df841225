"""Laws of training: a comparison is true, an interruption leaves no trace, and looking changes nothing."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from arra.data.batches import Batches, InMemory, text_batch
from arra.data.conditions import TextConditions
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, Painter
from arra.runs import Run
from arra.sample.generate import generate
from arra.train.alignment import build_alignment
from arra.train.checkpoints import newest_checkpoint, restore_optimizer, save_checkpoint
from arra.train.interrupt import TrainingInterrupted, interruptible
from arra.train.loop import Steps, Trainer, validation_loss
from arra.train.optimizer import learning_rate
from arra.train.settings import AlignSettings, TrainSettings

ALIGN = AlignSettings(layer=1, components=4)
STEPS = 12
TIMES = ("seconds", "images_per_second")
RECORDS = 14


class Letters:
    """A text tokenizer for tests: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 18 for letter in prompt]

    def save(self, path: Path) -> None:
        raise NotImplementedError


def make_model(dropout: float) -> Decoder:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "num_codes": 16, "grid": (2, 3)}
    fields |= {"condition": "text", "prefix_length": 5, "text_vocab_size": 20, "multiple_of": 8}
    fields |= {"token_dropout": dropout, "resid_dropout": dropout, "ffn_dropout": dropout}
    model = Decoder(DecoderSettings(**fields))
    model.text_tokenizer = Letters()
    return model


def make_batches(batch_size: int = 6, features: Tensor | None = None) -> Batches:
    generator = torch.Generator().manual_seed(7)
    if features is None:
        features = torch.randn(RECORDS, 8, generator=generator)
    captions = [[[2 + row], [3, 2 + row]] for row in range(RECORDS)]
    return Batches(
        conditions=TextConditions(captions, 5, dropout=0.2, alternative_share=0.3),
        pictures=InMemory(torch.randint(0, 16, (RECORDS, 6), generator=generator), {"teacher": features}),
        batch_size=batch_size,
        seed=1,
    )


def held(batches: Steps) -> InMemory:
    assert isinstance(batches, Batches)
    assert isinstance(batches.pictures, InMemory)
    return batches.pictures


def make_trainer(
    path: Path,
    *,
    align: AlignSettings | None = ALIGN,
    preview: Callable[[Painter, int], None] | None = None,
    validate: bool = True,
    dropout: float = 0.1,
    features: Tensor | None = None,
    **changes: Any,
) -> Trainer:
    fields: dict[str, Any] = {"steps": STEPS, "batch_size": 6, "warmup_steps": 3, "log_every_steps": 2, "seed": 1}
    fields |= {"validate_every_steps": 4, "checkpoint_every_steps": 5, "preview_every_steps": 1 if preview else None}
    train_settings = TrainSettings(**{**fields, **changes})
    batches = make_batches(train_settings.batch_size, features)
    pictures = held(batches)
    assert pictures.features is not None
    held_out = text_batch([[2], [3, 4], []], pictures.codes[:3], prefix_length=5)
    alignment = None if align is None else build_alignment(align, pictures.features, hidden_size=32, seed=1)
    return Trainer(
        model=make_model(dropout),
        alignment=alignment,
        batches=batches,
        validation=[held_out] if validate else [],
        settings=train_settings,
        run=Run.create(path, "name: tiny\n", {"seed": 1}),
        preview=preview,
    )


def trained(path: Path, **options: Any) -> Trainer:
    trainer = make_trainer(path, **options)
    trainer.train()
    return trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    state = {name: parameter.detach().clone() for parameter, name in trainer.names.items()}
    for optimizer in trainer.optimizers:
        for parameter, name in trainer.names.items():
            state |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    state |= {f"average.{name}": value for name, value in (trainer.average or {}).items()}
    return state


def model_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in state_of(trainer).items() if not name.startswith("align.")}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def rows_of(trainer: Trainer, *without: str) -> list[dict[str, Any]]:
    dropped = {*TIMES, *without}
    return [{key: value for key, value in row.items() if key not in dropped} for row in trainer.run.read_metrics()]


OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "averaged": {"ema_decay": 0.9},
    "micro": {"micro_batch_size": 4, "z_weight": 1e-3, "schedule": "constant"},
}


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
    """Losses and gradients; the parts differ in size. (Dropout is off: it draws by the shape of a part.)"""
    options: dict[str, Any] = {"dropout": 0.0, "z_weight": 0.1}
    whole, parts = (
        make_trainer(tmp_path / "a", **options),
        make_trainer(tmp_path / "b", micro_batch_size=size, **options),
    )
    for trainer in (whole, parts):
        assert isinstance(trainer.model, Decoder)
        nn.init.normal_(trainer.model.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    losses = [trainer.accumulate(trainer.batches.batch(0)) for trainer in (whole, parts)]
    for name in ("total", "ntp", "z", "gva"):
        torch.testing.assert_close(getattr(losses[1], name), getattr(losses[0], name), atol=1e-5, rtol=1e-5)
    for (name, one), other in zip(
        {**whole.parameters, **whole.projector}.items(),
        [*parts.parameters.values(), *parts.projector.values()],
        strict=True,
    ):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-4, msg=name)


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


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_start_continues(kind: str, number: int, tmp_path: Path) -> None:
    options = OPTIONS[kind]
    whole = trained(tmp_path / "whole", **options)
    for step in (1, 7):
        stopped = make_trainer(tmp_path / "stopped", preview=signal_at(step, number), **options)
        with pytest.raises(TrainingInterrupted, match=f"interrupted at step {step}, saved"):
            stopped.train()
        checkpoint = newest_checkpoint(stopped.run.path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == step
    again = trained(tmp_path / "stopped", **options)
    assert again.step == STEPS
    assert different(state_of(whole), state_of(again)) == []
    assert rows_of(whole) == rows_of(again)


@pytest.mark.parametrize("step", [1, 5, 8, 10, 12])
def test_a_kill_loses_only_time(step: int, tmp_path: Path) -> None:
    """Before the first checkpoint, in the middle, while one is due, and at the very end."""
    options = OPTIONS["averaged"]
    whole = trained(tmp_path / "whole", **options)
    killed = make_trainer(tmp_path / "killed", preview=die_at(step), **options)
    with pytest.raises(SystemExit):
        killed.train()
    with killed.run.metrics_path.open("a") as file:
        file.write('{"kind": "train", "step": 9')  # a torn line
    again = make_trainer(tmp_path / "killed", **options)
    again.resume()
    assert again.step == (step - 1) // 5 * 5
    again.train()
    assert different(state_of(whole), state_of(again)) == []
    assert rows_of(whole) == rows_of(again)
    assert again.seconds > 0


def test_a_finished_training_stays_as_it_is(tmp_path: Path) -> None:
    done = trained(tmp_path / "run")
    rows = done.run.read_metrics()
    again = trained(tmp_path / "run")
    assert different(state_of(done), state_of(again)) == []
    assert again.run.read_metrics() == rows


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, 1000),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text("[1]"),
        lambda path: path.with_suffix(".json").write_text('{"step": 10}'),
    ],
    ids=["flipped", "cut", "gone", "broken-card", "no-card", "half-card"],
)
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    killed = make_trainer(tmp_path / "killed", preview=die_at(12))
    with pytest.raises(SystemExit):
        killed.train()
    damage(killed.run.path / "checkpoints" / "step-0000010.safetensors")
    again = make_trainer(tmp_path / "killed")
    with pytest.warns(UserWarning, match=r"step-0000010\.safetensors: damaged .*; using the checkpoint before it"):
        again.train()
    assert different(state_of(whole), state_of(again)) == []
    assert rows_of(whole) == rows_of(again)


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
    assert trainer.average is not None
    wanted = {name: value.clone() for name, value in trainer.average.items()}
    for step in range(1, 9):
        trainer.train_step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in trainer.parameters.items():
            wanted[name] = decay * wanted[name] + (1 - decay) * parameter.detach()
    for name, value in trainer.average.items():
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
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan, gradient norm"):
        trainer.train_step()
    assert trainer.step == 3
    assert different(before, state_of(trainer)) == []


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train_step()
    before = {name: value.clone() for name, value in state_of(trainer).items()}
    trainer.parameters["norm.weight"].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"gradient norm (nan|inf)"):
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
    assert {value.dtype for value in state_of(trainer).values()} == {torch.float32}
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
        _, norm = trainer.train_step()
        for part in (trainer.parameters, trainer.projector):
            squares = [p.grad.square().sum() for p in part.values() if p.grad is not None]
            assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.01, rel=1e-3)
        found.append((norm, {name: value.detach().clone() for name, value in trainer.parameters.items()}))
    assert found[0][0] == found[1][0] > 0.01
    assert different(found[0][1], found[1][1]) == []


def test_checkpoints_beyond_the_wanted_number_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step=step, seconds=1.5 * step, tensors={"x": torch.full((2,), step)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-000000{step}.{kind}" for step in (4, 5) for kind in ("json", "safetensors")
    ]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.seconds, found.tensors["x"].tolist()) == (5, 7.5, [5, 5])
    assert newest_checkpoint(tmp_path / "none") is None


def test_the_optimisers_state_returns_to_the_device_of_its_weights() -> None:
    weight = nn.Parameter(torch.zeros(2, 3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    saved = {f"optimizer.w.{key}": torch.ones(2, 3) for key in ("exp_avg", "exp_avg_sq")}
    restore_optimizer(optimizer, {weight: "w"}, saved | {"optimizer.w.step": torch.tensor(5.0)})
    devices = {key: value.device.type for key, value in optimizer.state[weight].items()}
    assert devices == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": "cpu"}


def test_a_kill_between_weights_and_card_leaves_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=1, seconds=1.0, tensors={"x": torch.ones(2)}, keep=2)
    save_checkpoint(tmp_path, step=2, seconds=2.0, tensors={"x": torch.ones(2)}, keep=2)
    (tmp_path / "step-0000002.json").unlink()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, step=1, seconds=1.0, tensors={"x": torch.ones(2)}, keep=1)

    def full(*given: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ArraError, match=r"step-0000002\.safetensors: cannot be written .*; free space and try again"):
        save_checkpoint(tmp_path, step=2, seconds=2.0, tensors={"x": torch.ones(2)}, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_only_set_a_flag_inside_the_block(number: int) -> None:
    kept = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == kept
