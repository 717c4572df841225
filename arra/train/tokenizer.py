"""Training the VQ image tokenizer: reconstruct pixels, keep the codebook in use; or its decoder alone.

Loss = L2 + L1 (in [-1, 1]) + LPIPS + adversarial + codebook + commitment + entropy, each with its weight; a term of
weight 0, or whose network is not there, is not computed. Codes that nobody chose for a while restart at a random
encoder vector, so a small codebook stays in use without a long burn-in.
Legend: B batch, H W pixels, h w latent grid, E code dimension, K codes.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from arra.distributed import ALONE
from arra.tokenizers.vq import Quantized, VQModel
from arra.train.checkpoints import Checkpoints, read_tensors
from arra.train.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from arra.train.interrupt import TrainingInterrupted, interruptible
from arra.train.optimizer_state import optimizer_tensors, restore_optimizer
from arra.train.perceptual import PerceptualDistance
from arra.train.pictures import Pictures
from arra.train.settings import TokenizerTrainSettings

USE_WINDOW_CODES = 65_536
"""Codes that the reported use of the codebook looks back on, as many as LlamaGen's."""


@dataclass(frozen=True)
class TokenizerStep:
    """What one step reports."""

    step: int
    loss: float
    """Of the tokenizer, all terms together."""
    psnr_db: float
    """Of the step's batch, from its mean squared error."""
    learning_rate: float
    terms: dict[str, float]
    """Parts of the loss, weighted; and `discriminator`, which is the other side's own."""


class TokenizerTrainer:
    """Networks, averaged weights and optimisers of a tokenizer in training; state is a function of (seed, step)."""

    def __init__(
        self, model: VQModel, settings: TokenizerTrainSettings, *, perceptual: PerceptualDistance | None = None
    ) -> None:
        self.model, self.settings, self.step = model.train(), settings, 0
        self.device = model.post_quant_conv.weight.device
        self.perceptual = None if perceptual is None else perceptual.to(self.device)
        if settings.part == "decoder":
            for frozen in (model.encoder, model.quant_conv, model.quantize):
                frozen.requires_grad_(False)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.last_used = torch.zeros(model.settings.num_codes, dtype=torch.int64, device=self.device)
        """The step that last chose each code, from 1; 0 is never."""
        self.codes_per_step = 0
        self.discriminator: PatchDiscriminator | None = None
        if (a := settings.adversarial) is not None:
            self.discriminator = PatchDiscriminator(
                num_layers=a.num_layers, channels=a.channels, seed=settings.seed
            ).to(self.device)
            parameters = self.discriminator.parameters()
            self.discriminator_optimizer = torch.optim.Adam(parameters, a.learning_rate, a.betas)

    def train_step(self, pictures: Pictures) -> TokenizerStep:
        """Runs one step on the pictures of (seed, step).

        Raises:
            FloatingPointError: a loss is not finite; the weights of the step before are untouched.
        """
        s, generator = self.settings, torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        images = pictures.draw(self.step, generator).to(self.device)
        factor = rate_factor(self.step, s)
        vectors, quantized = self._quantized(images)
        with self._mixed():
            output = self.model.decode_vectors(quantized.vectors)
        output = output.float()
        mse = F.mse_loss(output, images)
        terms = self._terms(images, output, mse, quantized)
        loss = sum(terms.values(), mse.new_zeros(()))
        self._descend(self.optimizer, loss, rate=s.learning_rate * factor, clip_norm=s.clip_norm)
        if self._adversary() is not None:
            terms["discriminator"] = self._train_discriminator(images, output.detach(), factor)
        self.step += 1
        self.last_used[quantized.codes.flatten()] = self.step
        self.codes_per_step = quantized.codes.numel()
        self._restart_codes(vectors, generator)
        decay = min(s.ema_decay, (1 + self.step) / (10 + self.step)) if s.ema_warmup else s.ema_decay
        with torch.no_grad():
            now = self.model.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [now[name] for name in self.average], 1 - decay)
        numbers = torch.stack([loss.detach(), mse.detach(), *(term.detach() for term in terms.values())]).tolist()
        named = dict(zip(terms, numbers[2:], strict=True))
        return TokenizerStep(self.step, numbers[0], psnr_db(numbers[1]), s.learning_rate * factor, named)

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _quantized(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B E h w"], Quantized]:
        """Encoder vectors without gradient, and what becomes of them; of a frozen encoder codes alone."""
        s = self.settings
        if s.part == "decoder":
            with torch.no_grad():
                vectors = self.model.latents(images)  # in full precision: the codes are those of the tokenizer in use
                return vectors, self.model.quantize(vectors)
        with self._mixed():
            vectors = self.model.latents(images)
        vectors = vectors.float()
        return vectors.detach(), self.model.quantize(vectors, commitment=s.commitment, entropy_weight=s.entropy_weight)

    def _terms(self, images: Tensor, output: Tensor, mse: Tensor, quantized: Quantized) -> dict[str, Tensor]:
        """The weighted parts of the tokenizer's loss, by name."""
        s, terms = self.settings, {}
        if s.l2_weight:
            terms["l2"] = s.l2_weight * mse
        if s.l1_weight:
            terms["l1"] = s.l1_weight * F.l1_loss(output, images)
        if self.perceptual is not None and s.perceptual is not None and s.perceptual.weight:
            with self._mixed():
                distance = self.perceptual(images, output)
            terms["perceptual"] = s.perceptual.weight * distance.float().mean()
        adversary, a = self._adversary(), s.adversarial
        if adversary is not None and a is not None:
            adversary.requires_grad_(False)
            with self._mixed():
                logits = adversary(output)
            adversary.requires_grad_(True)
            adversarial = generator_loss(logits.float(), kind=a.loss)
            if a.adaptive:
                reconstruction = sum(terms.values(), mse.new_zeros(()))
                last_layer = self.model.decoder.conv_out.weight
                adversarial = adversarial * adaptive_weight(reconstruction, adversarial, last_layer)
            terms["adversarial"] = a.weight * adversarial
        if s.part == "all":
            terms["codebook"] = s.codebook_weight * quantized.codebook_loss
            terms["commitment"] = quantized.commitment_loss
            if s.entropy_weight:
                terms["entropy"] = quantized.entropy_loss
        return terms

    def _adversary(self) -> PatchDiscriminator | None:
        """The discriminator, once it has its say."""
        a = self.settings.adversarial
        return self.discriminator if a is not None and a.weight and self.step >= a.start_step else None

    def _train_discriminator(self, images: Tensor, output: Tensor, factor: float) -> Tensor:
        """What the discriminator lost before it learned from these pictures and their reconstructions."""
        a, discriminator = self.settings.adversarial, self.discriminator
        assert a is not None
        assert discriminator is not None
        with self._mixed():
            real, fake = discriminator(images), discriminator(output)
        loss = discriminator_loss(real.float(), fake.float(), kind=a.loss)
        rate = a.learning_rate * factor
        # weighted as LlamaGen has it: Adam does not feel the factor, clipping does
        self._descend(self.discriminator_optimizer, a.weight * loss, rate=rate, clip_norm=a.clip_norm)
        return loss

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor, *, rate: float, clip_norm: float) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {self.step + 1}")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()

    def code_use(self) -> float:
        """Share of the codebook that was chosen at least once among the last 65,536 codes (in whole steps)."""
        window = max(1, math.ceil(USE_WINDOW_CODES / max(1, self.codes_per_step)))
        return float((self.last_used > max(0, self.step - window)).float().mean())

    def averaged_model(self) -> VQModel:
        """The averaged weights as a network of their own, on the CPU."""
        model = VQModel(self.model.settings)
        model.load_state_dict(self.average)
        return model

    def save(self, folder: Path) -> None:
        """Nothing; the newest checkpoint is this step's."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {"last_used": self.last_used}
        tensors |= optimizer_tensors(self.optimizer, self._names())
        if self.discriminator is not None:
            tensors |= {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
            tensors |= optimizer_tensors(self.discriminator_optimizer, self._discriminator_names())
        self.checkpoints(folder).save(self.step, tensors, card={})

    def resume(self, folder: Path) -> None:
        """Nothing; the state is the newest whole checkpoint's, or the beginning's."""
        saved = self.checkpoints(folder).newest()
        if saved is None:
            return
        tensors, self.step = read_tensors(saved, saved.tensors), saved.step
        self.last_used.copy_(tensors["last_used"])
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, value in self.average.items():
            value.copy_(tensors[f"average.{name}"])
        restore_optimizer(self.optimizer, self._names(), tensors=tensors)
        if self.discriminator is not None:
            names = self.discriminator.state_dict()
            self.discriminator.load_state_dict({name: tensors[f"discriminator.{name}"] for name in names})
            restore_optimizer(self.discriminator_optimizer, self._discriminator_names(), tensors=tensors)

    def checkpoints(self, folder: Path) -> Checkpoints:
        """Where the newest step is kept."""
        return Checkpoints(folder, ranks=ALONE, keep_last=1, in_background=False)

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.trained.items()}

    def _discriminator_names(self) -> dict[nn.Parameter, str]:
        assert self.discriminator is not None
        return {parameter: f"discriminator.{name}" for name, parameter in self.discriminator.named_parameters()}

    def _restart_codes(self, vectors: Float[Tensor, "B E h w"], generator: torch.Generator) -> None:
        """Nothing; every so many steps, codes not used since then lie beside encoder vectors of this batch."""
        s = self.settings
        every = s.restart_every_steps
        if s.part == "decoder" or every is None or self.step % every or self.step > s.steps // 2:
            return
        dead = (self.last_used <= self.step - every).nonzero()[:, 0]
        flat = vectors.permute(0, 2, 3, 1).flatten(0, 2)
        picked = flat[torch.randint(len(flat), (len(dead),), generator=generator).to(flat.device)]
        noise = 0.05 * torch.randn(picked.shape, generator=generator).to(flat.device)
        rows = self.model.quantize.beside(picked, noise)
        self.model.quantize.embedding.weight.data[dead] = rows
        self.average["quantize.embedding.weight"][dead] = rows


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio for a mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4.0 / mse) if mse else math.inf


def rate_factor(step: int, settings: TokenizerTrainSettings) -> float:
    """Factor on the learning rates: linear up, then as it is, or a cosine to zero at the last step."""
    s = settings
    if step < s.warmup_steps:
        return (step + 1) / s.warmup_steps
    if s.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)))


def train_tokenizer(
    model: VQModel,
    pictures: Pictures,
    settings: TokenizerTrainSettings,
    *,
    folder: Path,
    report: Callable[[TokenizerTrainer, TokenizerStep], None],
    perceptual: PerceptualDistance | None = None,
) -> TokenizerTrainer:
    """Trains to the last step, saving checkpoints in `folder` and resuming from them; `report` hears of every step.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM asked to stop; the state is saved.
        FloatingPointError: the training diverged.
    """
    trainer = TokenizerTrainer(model, settings, perceptual=perceptual)
    trainer.resume(folder)
    with interruptible() as stopped, closing(pictures):
        while trainer.step < settings.steps:
            report(trainer, trainer.train_step(pictures))
            if trainer.step % settings.checkpoint_every_steps == 0 or stopped():
                trainer.save(folder)
            if stopped() and trainer.step < settings.steps:
                raise TrainingInterrupted(f"{folder}: interrupted at step {trainer.step}, saved")
    return trainer
