"""Laws of tokenizer training: every term is what it says, an interruption leaves no trace, frozen codes stay."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arra.tokenizers import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from arra.train.interrupt import TrainingInterrupted
from arra.train.perceptual import PerceptualDistance
from arra.train.pictures import HeldPictures
from arra.train.settings import AdversarialSettings, PerceptualSettings, TokenizerTrainSettings
from arra.train.tokenizer import TokenizerStep, TokenizerTrainer, psnr_db, rate_factor, train_tokenizer

TINY_VQ = VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, num_codes=32, code_dim=4)
ADVERSARIAL = AdversarialSettings(start_step=3, num_layers=1, channels=8, adaptive=True)
BASE: dict[str, Any] = {
    "steps": 8,
    "batch_size": 2,
    "warmup_steps": 2,
    "restart_every_steps": 3,
    "checkpoint_every_steps": 2,
    "entropy_weight": 0.01,
    "augment": 0.5,
}
VQ_TRAIN = TokenizerTrainSettings(**BASE)
GAN_TRAIN = TokenizerTrainSettings(**BASE, adversarial=ADVERSARIAL)
DECODER_TRAIN = TokenizerTrainSettings(**BASE, part="decoder", adversarial=ADVERSARIAL)


def tiny_model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(TINY_VQ)


def some_pictures(number: int = 5, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=generator)


def held(settings: TokenizerTrainSettings, pictures: Tensor | None = None) -> HeldPictures:
    return HeldPictures(some_pictures() if pictures is None else pictures, settings.batch_size, settings.augment)


def run_training(
    folder: Path, settings: TokenizerTrainSettings, *, die_after: int | None = None, signal_after: int | None = None
) -> TokenizerTrainer:
    def report(trainer: TokenizerTrainer, step: TokenizerStep) -> None:
        assert math.isfinite(step.loss)
        torch.rand(3)  # no global randomness in the steps
        if step.step == die_after:
            raise SystemExit
        if step.step == signal_after:
            os.kill(os.getpid(), signal.SIGTERM)

    return train_tokenizer(tiny_model(), held(settings), settings, folder=folder, report=report)


def whole_state(trainer: TokenizerTrainer) -> dict[str, Tensor]:
    state = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    state |= {f"average.{name}": value for name, value in trainer.average.items()}
    networks: list[tuple[str, nn.Module, torch.optim.Optimizer]] = [("model", trainer.model, trainer.optimizer)]
    if trainer.discriminator is not None:
        state |= {f"discriminator.{name}": value for name, value in trainer.discriminator.state_dict().items()}
        networks.append(("discriminator", trainer.discriminator, trainer.discriminator_optimizer))
    for kind, network, optimizer in networks:
        for name, parameter in network.named_parameters():
            state |= {f"{kind}.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state | {"last_used": trainer.last_used}


@pytest.mark.parametrize("settings", [VQ_TRAIN, GAN_TRAIN, DECODER_TRAIN], ids=["plain", "adversarial", "decoder"])
def test_an_interrupted_training_continues_bit_for_bit(settings: TokenizerTrainSettings, tmp_path: Path) -> None:
    whole = run_training(tmp_path / "whole", settings)
    assert whole.step == 8
    with pytest.raises(SystemExit):
        run_training(tmp_path / "killed", settings, die_after=5)  # with the discriminator begun, between two restarts
    with pytest.raises(TrainingInterrupted, match="interrupted at step 6, saved"):
        run_training(tmp_path / "killed", settings, signal_after=6)
    one, other = whole_state(whole), whole_state(run_training(tmp_path / "killed", settings))
    assert set(one) == set(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    rows = one["model.quantize.embedding.weight"]
    assert torch.equal(rows, tiny_model().quantize.embedding.weight) == (settings.part == "decoder")


def test_a_tokenizer_learns_its_pictures() -> None:
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for i in range(4):
        pictures[i, i % 3, :, 4 * i :] = 255
    settings = TokenizerTrainSettings(steps=30, batch_size=4, warmup_steps=5, augment=0.0, learning_rate=3e-3)
    trainer = TokenizerTrainer(tiny_model(), settings)
    steps = [trainer.train_step(held(settings, pictures)) for _ in range(30)]
    assert steps[-1].psnr_db > steps[0].psnr_db + 4
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_revived_codes_have_the_length_of_encoder_vectors_where_codes_are_not_normalised() -> None:
    torch.manual_seed(0)
    model = VQModel(TINY_VQ.model_copy(update={"normalize": False}))
    model.quant_conv.weight.data *= 100
    settings = VQ_TRAIN.model_copy(update={"restart_every_steps": 2, "entropy_weight": 0.0})
    trainer = TokenizerTrainer(model, settings)
    before = model.quantize.embedding.weight.detach().clone()
    trainer.train_step(held(settings))
    trainer.train_step(held(settings))
    rows = model.quantize.embedding.weight.detach()
    moved = (rows - before).norm(dim=1) > 1
    assert moved.sum() > 10
    lengths = trainer.model.latents(some_pictures().float() / 127.5 - 1).norm(dim=1)
    assert (rows[moved].norm(dim=1) > 0.5 * lengths.min()).all()
    assert (rows[moved].norm(dim=1) < 2 * lengths.max()).all()


def test_dead_codes_come_back_to_life() -> None:
    settings = VQ_TRAIN.model_copy(update={"restart_every_steps": 2})
    trainer = TokenizerTrainer(tiny_model(), settings)
    before = trainer.model.quantize.embedding.weight.detach().clone()
    trainer.train_step(held(settings))
    trainer.train_step(held(settings))
    dead = trainer.last_used == 0
    assert dead.sum() > 10
    after = trainer.model.quantize.embedding.weight.detach()
    moved = (after - before).norm(dim=1) > 0.1
    assert moved.sum() > 10
    assert not (moved & ~dead).any()
    averaged = trainer.average["quantize.embedding.weight"]
    torch.testing.assert_close(averaged[moved], after[moved])
    torch.testing.assert_close(after[moved].norm(dim=1), torch.ones(int(moved.sum())))
    never = TokenizerTrainer(tiny_model(), settings.model_copy(update={"restart_every_steps": None}))
    for _ in range(2):
        never.train_step(held(settings))
    assert (never.model.quantize.embedding.weight.detach() - before).norm(dim=1).max() < 0.1


def test_the_use_of_the_codebook_forgets_what_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arra.train.tokenizer.USE_WINDOW_CODES", 3 * 2 * 16)  # three steps of two 4 x 4 grids
    trainer = TokenizerTrainer(tiny_model(), VQ_TRAIN)
    assert trainer.code_use() == 0
    seen: list[set[int]] = []
    quantize = trainer.model.quantize.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = quantize(*args, **kwargs)
        seen.append(set(found.codes.flatten().tolist()))
        return found

    monkeypatch.setattr(trainer.model.quantize, "forward", watched)
    for _ in range(6):
        trainer.train_step(held(VQ_TRAIN, some_pictures(side=16)))
        assert trainer.code_use() == pytest.approx(len(set().union(*seen[-3:])) / 32)


@pytest.mark.parametrize("warmup", [True, False])
def test_averaged_weights_follow_their_formula(warmup: bool) -> None:
    settings = VQ_TRAIN.model_copy(update={"ema_decay": 0.5, "ema_warmup": warmup, "restart_every_steps": None})
    trainer = TokenizerTrainer(tiny_model(), settings)
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for step in range(1, 4):
        trainer.train_step(held(settings))
        decay = min(0.5, (1 + step) / (10 + step)) if warmup else 0.5
        for name, value in trainer.model.state_dict().items():
            expected[name] = expected[name] * decay + value * (1 - decay)
    for name, value in trainer.averaged_model().state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_before_its_start_the_discriminator_is_neither_run_nor_trained() -> None:
    trainer, plain = TokenizerTrainer(tiny_model(), GAN_TRAIN), TokenizerTrainer(tiny_model(), VQ_TRAIN)
    discriminator = trainer.discriminator
    assert discriminator is not None
    first = {name: value.clone() for name, value in discriminator.state_dict().items()}
    for _ in range(ADVERSARIAL.start_step):
        step, other = trainer.train_step(held(GAN_TRAIN)), plain.train_step(held(VQ_TRAIN))
        assert step == other
        assert "discriminator" not in step.terms
    assert all(torch.equal(value, first[name]) for name, value in discriminator.state_dict().items())  # statistics too
    assert not trainer.discriminator_optimizer.state
    step, other = trainer.train_step(held(GAN_TRAIN)), plain.train_step(held(VQ_TRAIN))
    assert step.terms["discriminator"] > 0
    assert step.loss == pytest.approx(other.loss + step.terms["adversarial"], rel=1e-5)
    weights = {name: value for name, value in discriminator.named_parameters() if value.dim() > 1}
    assert all(not torch.equal(value, first[name]) for name, value in weights.items())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_the_two_sides_do_not_train_each_other() -> None:
    """The discriminator's step leaves the tokenizer alone, and the tokenizer's loss the discriminator."""
    trainer = TokenizerTrainer(tiny_model(), GAN_TRAIN.model_copy(update={"adversarial": AdversarialSettings(
        start_step=0, num_layers=1, channels=8)}))  # fmt: skip
    assert trainer.discriminator is not None
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = trainer.model.decode_vectors(torch.randn(2, 4, 4, 4))
    terms = trainer._terms(images, output, F.mse_loss(output, images), trainer._quantized(images)[1])
    terms["adversarial"].backward()
    assert trainer.model.decoder.conv_out.weight.grad is not None
    assert trainer.model.decoder.conv_out.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in trainer.discriminator.parameters())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._train_discriminator(images, output.detach(), 1.0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_the_weight_of_the_adversary_counts_on_both_sides() -> None:
    """LlamaGen multiplies the discriminator's loss too, before its gradient is clipped."""
    found = []
    for weight in (1.0, 0.25):
        adversarial = AdversarialSettings(start_step=0, num_layers=1, channels=8, weight=weight, clip_norm=1e9)
        trainer = TokenizerTrainer(tiny_model(), VQ_TRAIN.model_copy(update={"adversarial": adversarial}))
        terms = trainer.train_step(held(VQ_TRAIN)).terms
        assert trainer.discriminator is not None
        gradients = [p.grad.flatten() for p in trainer.discriminator.parameters() if p.grad is not None]
        found.append((terms["adversarial"], terms["discriminator"], torch.cat(gradients)))
    (whole, loss, gradient), (quarter, same, small) = found
    assert quarter == pytest.approx(whole / 4, rel=1e-4)
    assert same == loss
    torch.testing.assert_close(small, gradient / 4, rtol=1e-4, atol=1e-8)


def test_every_term_has_its_weight() -> None:
    """Each weight scales its own term alone, and the loss is their sum."""
    weights = {"l2_weight": "l2", "l1_weight": "l1", "codebook_weight": "codebook", "commitment": "commitment"}
    weights |= {"entropy_weight": "entropy"}

    def terms(**changes: float) -> dict[str, float]:
        trainer = TokenizerTrainer(tiny_model(), VQ_TRAIN.model_copy(update=changes))
        step = trainer.train_step(held(VQ_TRAIN))
        assert step.loss == pytest.approx(sum(step.terms.values()), rel=1e-5)
        return step.terms

    usual = terms()
    assert set(usual) == set(weights.values())
    for field, name in weights.items():
        changed = terms(**{field: 3 * getattr(VQ_TRAIN, field)})
        assert changed == pytest.approx(usual | {name: 3 * usual[name]}, rel=1e-5)
    assert set(terms(l2_weight=0.0, entropy_weight=0.0)) == {"l1", "codebook", "commitment"}


def test_terms_of_a_batch_are_the_plain_formulas() -> None:
    trainer = TokenizerTrainer(tiny_model(), VQ_TRAIN)
    settings = VQ_TRAIN.model_copy(update={"entropy_weight": 0.0})
    generator = torch.Generator().manual_seed(0)
    images = held(settings).draw(0, generator)
    with torch.no_grad():
        z = F.normalize(trainer.model.latents(images), dim=1)
        output = trainer.model.decode(trainer.model.encode(images))
        nearest = trainer.model.quantize.rows(trainer.model.encode(images))
        distance = ((z - nearest) ** 2).mean()
    step = TokenizerTrainer(tiny_model(), settings).train_step(held(settings))
    assert step.terms["l2"] == pytest.approx(((output - images) ** 2).mean().item(), rel=1e-4)
    assert step.terms["l1"] == pytest.approx(0.1 * (output - images).abs().mean().item(), rel=1e-4)
    assert step.terms["codebook"] == pytest.approx(distance.item(), rel=1e-4)
    assert step.terms["commitment"] == pytest.approx(0.25 * distance.item(), rel=1e-4)
    assert step.psnr_db == pytest.approx(psnr_db(step.terms["l2"]), rel=1e-5)


def test_the_perceptual_term_is_lpips_of_the_reconstructions() -> None:
    torch.manual_seed(3)
    perceptual = PerceptualDistance()
    settings = VQ_TRAIN.model_copy(update={"perceptual": PerceptualSettings(files=("unread",), weight=0.5)})
    trainer = TokenizerTrainer(tiny_model(), settings, perceptual=perceptual)
    pictures = held(settings, some_pictures(side=32))
    images = pictures.draw(0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = trainer.model.decode(trainer.model.encode(images))
        expected = 0.5 * perceptual(images, output).mean().item()
    before = {name: value.clone() for name, value in perceptual.state_dict().items()}
    assert trainer.train_step(pictures).terms["perceptual"] == pytest.approx(expected, rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in perceptual.state_dict().items())
    assert trainer.train_step(pictures).terms["perceptual"] > 0


def test_training_the_decoder_alone_keeps_every_code() -> None:
    settings = DECODER_TRAIN.model_copy(update={"learning_rate": 1e-2, "steps": 6})
    model = tiny_model()
    images = some_pictures(8, 8).permute(0, 2, 3, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes = ImageTokenizer(model, name="before", weights_hash=None).encode(images)
    trainer = TokenizerTrainer(model, settings)
    for _ in range(6):
        step = trainer.train_step(held(settings))
        assert set(step.terms) <= {"l2", "l1", "adversarial", "discriminator"}
    frozen = [name for name in before if name.startswith(("encoder.", "quant_conv.", "quantize."))]
    trained = [name for name in before if name.startswith(("decoder.", "post_quant_conv."))]
    assert len(frozen) + len(trained) == len(before)
    parameters = dict(model.named_parameters())
    for state in (model.state_dict(), trainer.average):
        assert all(torch.equal(state[name], before[name]) for name in frozen)
        assert all(not torch.equal(state[name], before[name]) for name in trained if "weight" in name)
    assert all(parameters[name].grad is None for name in frozen)
    assert not any(parameters[name] in trainer.optimizer.state for name in frozen)
    averaged = ImageTokenizer(trainer.averaged_model(), name="after", weights_hash=None)
    assert torch.equal(averaged.encode(images), codes)
    assert not torch.equal(
        averaged.decode(codes), ImageTokenizer(tiny_model(), name="", weights_hash=None).decode(codes)
    )


def test_the_frozen_encoder_runs_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forward, recorded = model.encoder.forward, []

    def watched(x: Tensor) -> Tensor:
        recorded.append(torch.is_grad_enabled())
        return forward(x)

    monkeypatch.setattr(model.encoder, "forward", watched)
    TokenizerTrainer(model, DECODER_TRAIN).train_step(held(DECODER_TRAIN))
    assert recorded == [False]


def test_half_precision_trains_and_leaves_codes_in_full_precision() -> None:
    settings = GAN_TRAIN.model_copy(update={"precision": "bfloat16", "steps": 5})
    trainer = TokenizerTrainer(tiny_model(), settings)
    steps = [trainer.train_step(held(settings)) for _ in range(5)]
    assert all(math.isfinite(step.loss) for step in steps)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    full = TokenizerTrainer(tiny_model(), GAN_TRAIN).train_step(held(GAN_TRAIN))
    assert steps[0].loss == pytest.approx(full.loss, rel=0.1)
    assert steps[0].loss != full.loss
    model = tiny_model()
    vectors, quantized = TokenizerTrainer(
        model, DECODER_TRAIN.model_copy(update={"precision": "bfloat16"})
    )._quantized(torch.rand(2, 3, 8, 8))  # fmt: skip
    assert vectors.dtype == torch.float32
    assert torch.equal(quantized.vectors.detach(), model.quantize(vectors).vectors.detach())


def test_a_loss_that_is_not_finite_stops_before_it_spreads() -> None:
    trainer = TokenizerTrainer(tiny_model(), VQ_TRAIN)
    trainer.train_step(held(VQ_TRAIN))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.settings = VQ_TRAIN.model_copy(update={"l2_weight": math.inf})
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.train_step(held(VQ_TRAIN))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_the_learning_rate_rises_then_falls_or_stays() -> None:
    rates = [rate_factor(step, VQ_TRAIN) for step in range(8)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rate_factor(8, VQ_TRAIN) == pytest.approx(0)
    constant = VQ_TRAIN.model_copy(update={"schedule": "constant"})
    assert [rate_factor(step, constant) for step in range(8)] == [0.5] + 7 * [1.0]
    trainer = TokenizerTrainer(tiny_model(), GAN_TRAIN.model_copy(update={"adversarial": ADVERSARIAL.model_copy(
        update={"start_step": 0})}))  # fmt: skip
    trainer.train_step(held(GAN_TRAIN))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5e-3
    assert trainer.discriminator_optimizer.param_groups[0]["lr"] == 0.5e-4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"l2_weight": 0, "l1_weight": 0}, "nothing asks for the picture back"),
        ({"crop": {"kind": "center"}}, "expected kind 'random', found 'center'"),
        ({"adversarial": {"loss": "wasserstein"}}, "'hinge', 'vanilla' or 'non_saturating'"),
        ({"perceptual": {"files": []}}, "at least 1 item"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TokenizerTrainSettings(**change)
