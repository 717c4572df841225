"""Settings of training: the loop's, the optimiser's, the objective's and the alignment's."""

from typing import Literal

from pydantic import Field

from arra.settings import Settings


class AlignSettings(Settings):
    """The alignment term; `align: null` in a recipe trains without it."""

    layer: int = Field(1, ge=0)
    """0 = embeddings, k = residual stream after the k-th block; the paper uses 1."""
    target: Literal["hybnext"] = "hybnext"
    """hybnext: every position whose state predicts an image code."""
    loss: Literal["cosine"] = "cosine"
    weight: float = Field(1.0, ge=0)
    """Lambda, the factor beside the next-token loss; 0 measures the term without training on it."""
    inner_size: int | None = Field(None, gt=0)
    """Inner width of the projector; null is the target's width."""
    center: bool = True
    """Take the training mean out of the features, which share a large common direction."""
    components: int | None = Field(None, gt=0)
    """Principal components of the features to align with; null keeps all dimensions."""
    shuffle_targets: bool = False
    """Control: give every picture the feature of another one, fixed for the whole training."""


class TrainSettings(Settings):
    """The training loop."""

    steps: int = Field(gt=0)
    batch_size: int = Field(32, gt=0)
    micro_batch_size: int | None = Field(None, gt=0)
    """Rows per forward pass; null is the whole batch. The result is the same up to rounding."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices inside the blocks, AdamW for everything else."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    final_learning_rate: float = Field(0.0, ge=0)
    """Where the cosine ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    """On tensors with two or more dimensions; norms have none."""
    clip_norm: float = Field(1.0, gt=0)
    z_weight: float = Field(0.0, ge=0)
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts replaced by the empty one, so that guidance has its unconditional model."""
    alternative_share: float = Field(0.3, ge=0, le=1)
    """Share of prompts replaced by another name of the same picture, where it has one."""
    word_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a prompt's text ids left out, each on its own: words must count singly, not captions as a whole."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay of averaged weights; when set, these are validated and saved as the model."""
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, gt=0)
    """CPU threads of the process; null leaves torch's choice. Another number may round differently."""
    device: str = "auto"
    log_every_steps: int = Field(10, gt=0)
    validate_every_steps: int = Field(100, gt=0)
    preview_every_steps: int | None = Field(None, gt=0)
    checkpoint_every_steps: int = Field(100, gt=0)
    keep_checkpoints: int = Field(2, gt=0)


class TokenizerTrainSettings(Settings):
    """How a tokenizer is trained."""

    steps: int = Field(10_000, gt=0)
    batch_size: int = Field(16, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    l1_weight: float = Field(0.1, ge=0)
    commitment: float = Field(0.25, ge=0)
    entropy_weight: float = Field(0.0, ge=0)
    restart_every_steps: int = Field(100, gt=0)
    """Codes unused over this many steps restart, during the first half of training."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is saved."""
    augment: float = Field(0.3, ge=0, le=1)
    """Share of pictures that are scaled, shifted and recoloured; the others are seen as they are (or mirrored)."""
    checkpoint_every_steps: int = Field(200, gt=0)
    seed: int = Field(0, ge=0)


class DualTrainSettings(Settings):
    """How the dual encoder that judges captions is trained."""

    steps: int = Field(800, gt=0)
    batch_size: int = Field(128, gt=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    seed: int = Field(0, ge=0)
