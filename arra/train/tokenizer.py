"""Training the VQ image tokenizer: reconstruct pixels, keep the codebook in use.

Loss = L2 + `l1_weight` * L1 (in [-1, 1]) + codebook + commitment (+ entropy). Codes that nobody chose for a while
restart at a random encoder vector, so a small codebook stays in use without a long burn-in.
Legend: B batch, H W pixels, h w latent grid, E code dimension, K codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from arra.tokenizers.vq import VQModel
from arra.train.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from arra.train.interrupt import TrainingInterrupted, interruptible
from arra.train.settings import TokenizerTrainSettings


@dataclass(frozen=True)
class TokenizerStep:
    """What one step reports."""

    step: int
    loss: float
    psnr_db: float
    """Of the step's batch, from its mean squared error."""
    learning_rate: float


class TokenizerTrainer:
    """Model, averaged weights and optimiser of a tokenizer in training; state is a function of (seed, step)."""

    def __init__(self, model: VQModel, settings: TokenizerTrainSettings) -> None:
        self.model, self.settings, self.step = model, settings, 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.used = torch.zeros(model.settings.num_codes, dtype=torch.bool)

    def train_step(self, pictures: UInt8[Tensor, "N 3 S S"]) -> TokenizerStep:
        """Runs one step on pictures drawn by (seed, step); `pictures` are twice the tokenizer's size."""
        s, generator = self.settings, torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(pictures), (s.batch_size,), generator=generator)
        images = augmented(pictures[chosen], share=s.augment, generator=generator)
        rate = s.learning_rate * warmup_cosine(self.step, s.steps, s.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        vectors = self.model.latents(images)
        quantized = self.model.quantize(vectors, commitment=s.commitment, entropy_weight=s.entropy_weight)
        output = self.model.decode_vectors(quantized.vectors)
        mse = F.mse_loss(output, images)
        loss = mse + s.l1_weight * F.l1_loss(output, images)
        loss = loss + quantized.codebook_loss + quantized.commitment_loss + quantized.entropy_loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._restart_codes(quantized.codes, vectors.detach(), generator)
        decay = min(s.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return TokenizerStep(self.step, loss.item(), psnr_db(mse.item()), rate)

    def save(self, folder: Path) -> None:
        """Nothing; the newest checkpoint is this step's."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {"used": self.used} | optimizer_tensors(self.optimizer, self._names())
        save_checkpoint(folder, step=self.step, seconds=0.0, tensors=tensors, keep=1)

    def resume(self, folder: Path) -> None:
        """Nothing; the state is the newest whole checkpoint's, or the beginning's."""
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            return
        self.step, self.used = checkpoint.step, checkpoint.tensors["used"]
        self.model.load_state_dict({name: checkpoint.tensors[f"model.{name}"] for name in self.model.state_dict()})
        self.average = {name: checkpoint.tensors[f"average.{name}"] for name in self.average}
        restore_optimizer(self.optimizer, self._names(), checkpoint.tensors)

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _restart_codes(
        self, codes: Int[Tensor, "B h w"], vectors: Float[Tensor, "B E h w"], generator: torch.Generator
    ) -> None:
        self.used[codes.unique()] = True
        if self.step % self.settings.restart_every_steps:
            return
        if self.step <= self.settings.steps // 2:
            dead = (~self.used).nonzero()[:, 0]
            flat = vectors.permute(0, 2, 3, 1).flatten(0, 2)
            picked = flat[torch.randint(len(flat), (len(dead),), generator=generator)]
            noise = 0.05 * torch.randn(picked.shape, generator=generator)
            rows = F.normalize(F.normalize(picked, dim=1) + noise, dim=1)
            self.model.quantize.embedding.weight.data[dead] = rows
            self.average["quantize.embedding.weight"][dead] = rows
        self.used.zero_()


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio for a mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4.0 / mse)


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate: linear up, then a cosine to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def augmented(
    pictures: UInt8[Tensor, "B 3 S S"], *, share: float, generator: torch.Generator
) -> Float[Tensor, "B 3 S/2 S/2"]:
    """Pictures at half their size in [-1, 1], half of them mirrored; a share scaled, shifted and recoloured."""
    x = pictures.float() / 127.5 - 1
    count = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    changed = (uniform(0.0, 1.0) < share).float()
    mirror = 1 - 2 * (uniform(0.0, 1.0) < 0.5).float()
    scale = 1 + changed * uniform(-0.3, 0.3)
    shift = changed[:, None] * torch.stack([uniform(-0.2, 0.2), uniform(-0.2, 0.2)], 1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = mirror * scale, scale, shift
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1  # white outside
    order = torch.rand(count, 3, generator=generator).argsort(1)
    recolour = (changed * uniform(0.0, 1.0) > 0.5)[:, None, None, None]
    x = torch.where(recolour, x.gather(1, order[:, :, None, None].expand_as(x)), x)
    return F.avg_pool2d(x, 2)


def train_tokenizer(
    model: VQModel,
    pictures: UInt8[Tensor, "N 3 S S"],
    settings: TokenizerTrainSettings,
    *,
    folder: Path,
    report: Callable[[TokenizerTrainer, TokenizerStep], None],
) -> TokenizerTrainer:
    """Trains to the last step, saving checkpoints in `folder` and resuming from them; `report` hears of every step.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM asked to stop; the state is saved.
    """
    trainer = TokenizerTrainer(model, settings)
    trainer.resume(folder)
    with interruptible() as stopped:
        while trainer.step < settings.steps:
            report(trainer, trainer.train_step(pictures))
            if trainer.step % settings.checkpoint_every_steps == 0 or stopped():
                trainer.save(folder)
            if stopped() and trainer.step < settings.steps:
                raise TrainingInterrupted(f"{folder}: interrupted at step {trainer.step}, saved")
    return trainer
