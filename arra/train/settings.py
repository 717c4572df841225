"""Settings of training: the loop's, the optimiser's, the objective's and the alignment's."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from arra.data.crops import CropSettings
from arra.settings import Settings
from arra.train.durations import Duration, Interval, Length, in_steps, to_steps

# as in `arra.align`, which recipes must not need: whoever paints reads recipes too (a test compares them)
Target = Literal["hybnext", "at", "rep", "patch", "causal", "legacy-2025-11", "legacy-2025-03"]
Loss = Literal["cosine", "mse", "nt-xent", "relational"]
ProjectorKind = Literal["mlp", "linear", "max-pool", "avg-pool", "conv"]
Decay = Literal["none", "linear", "cosine"]
ON_GRID: tuple[Target, ...] = ("hybnext", "patch", "causal")
CONTRASTING: tuple[Loss, ...] = ("nt-xent", "relational")
MAIN = "main"
EmaDecay = Annotated[float, Field(ge=0, lt=1)]


class AlignTerm(Settings):
    """One alignment term: which states are pulled towards which features, and how hard."""

    layer: int = Field(1, ge=0)
    """0 = embeddings, k = residual stream after the k-th block; the paper uses 1."""
    target: Target = "hybnext"
    """hybnext: every position whose state predicts an image code, the paper's; at: every position that holds one; rep:
    a token before the image, which sampling then writes too; patch: as hybnext, each position to the patch that its
    code paints; causal: as hybnext, each to the picture down to its band; legacy-2025-11, legacy-2025-03: the windows
    of the published releases."""
    encoder: str = "teacher"
    """Whose features: the recipe's `encoder.teacher`, or one of `encoder.others` by name."""
    loss: Loss = "cosine"
    """cosine (the paper's), mse, nt-xent (contrastive over the batch, or over a picture's patches), relational."""
    temperature: float = Field(0.1, gt=0)
    """With `loss: nt-xent`."""
    weight: float = Field(1.0, ge=0)
    """Lambda, the factor beside the next-token loss; 0 measures the term without training on it."""
    projector: ProjectorKind = "mlp"
    """mlp (the paper's two layers), linear, max-pool and avg-pool (without parameters), conv (3 x 3 over the grid)."""
    inner_size: int | None = Field(None, gt=0)
    """Inner width of the two-layer projector; null is the target's width."""
    center: bool = True
    """Take the training mean out of the features, which share a large common direction."""
    whiten: bool = False
    """Give all principal axes of the features about the same variance."""
    components: int | None = Field(None, gt=0)
    """Principal components of the features to align with; null keeps all dimensions."""
    spatial_norm: float | None = Field(None, ge=0, le=1)
    """With `target: patch`: take this share of a picture's mean patch out and divide by the deviation (iREPA: 0.6)."""
    position_power: float = Field(0.0, ge=0)
    """Weights of an image's positions rise as place ** this: early tokens have seen little; 0 weighs all the same."""
    warmup_steps: Duration = 0
    """Steps over which the weight rises from 0."""
    decay: Decay = "none"
    """Whether the weight falls to 0 from the warm-up to the stop, or the end: none, linear, cosine."""
    stop_step: Interval | None = None
    """From this step on the term is left out."""
    balance: float | None = Field(None, gt=0)
    """Multiply the weight so that the term's gradient, where it enters the states, has this share of all other
    gradient's norm there; null leaves the weight as it is."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "AlignTerm":
        if self.projector == "conv" and self.target not in ON_GRID:
            raise ValueError(f"projector: conv needs a state for every code; use it with {', '.join(ON_GRID)}")
        if self.projector != "mlp" and self.inner_size is not None:
            raise ValueError(f"inner_size: projector '{self.projector}' has no inner layer; leave it out")
        if self.loss in CONTRASTING and self.target == "causal":
            raise ValueError(f"loss: {self.loss} compares whole pictures or patches; use cosine or mse with causal")
        if self.spatial_norm is not None and self.target != "patch":
            raise ValueError(f"spatial_norm: is of patches, and target '{self.target}' has none; leave it out")
        if self.whiten and not self.center:
            raise ValueError("whiten: is of centred features; set center: true")
        return self

    def resolved(self, *, batch_size: int, records: int | None, steps: int) -> "AlignTerm":
        """The term with every duration in steps.

        Raises:
            ValueError: one is in epochs, and `records`, the pictures of an epoch, is None.
        """
        return in_steps(self, batch_size=batch_size, records=records, steps=steps)


class AlignSettings(AlignTerm):
    """The alignment; `align: null` in a recipe trains without it."""

    shuffle_targets: bool = False
    """Control: give every picture the features of another one, fixed for the whole training."""
    more: dict[str, AlignTerm] = {}
    """Further terms beside this one, by names of your own."""

    @model_validator(mode="after")
    def _names_fit(self) -> "AlignSettings":
        for name in self.more:
            if name == MAIN or not name.isidentifier():
                raise ValueError(f"more: '{name}' is no name for a term; use letters and digits, and not '{MAIN}'")
        return self

    def terms(self) -> dict[str, AlignTerm]:
        """All terms by name, this one first."""
        return {MAIN: self, **self.more}

    def resolved(self, *, batch_size: int, records: int | None, steps: int) -> "AlignSettings":
        """The alignment with every duration of every term in steps; raises as `AlignTerm.resolved`."""
        known: dict[str, Any] = {"batch_size": batch_size, "records": records, "steps": steps}
        more = {name: term.resolved(**known) for name, term in self.more.items()}
        return in_steps(self, **known).model_copy(update={"more": more})


class ParallelSettings(Settings):
    """How several processes (torchrun) train one model. The result is the same up to rounding."""

    kind: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every rank has all weights. fsdp: weights, gradients and optimiser are shared out over all ranks. hsdp:
    shared out within groups of ranks, the same in each group. auto: ddp, or fsdp where offload is wanted or the state
    of training takes more than half of a device."""
    replicas: int | None = Field(None, gt=0)
    """hsdp: number of groups; null is one for each node."""
    reshard: bool = True
    """fsdp, hsdp: let go of a block's gathered weights after the forward pass and gather them again for the backward
    pass: less memory, more traffic."""
    offload: bool = False
    """fsdp, hsdp: weights, gradients and optimiser lie in the CPU's memory and come to the device block by block."""


class TroubleSettings(Settings):
    """What is done when training goes wrong."""

    nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When loss or gradient is no finite number: stop; leave the batch out; or go back to the newest checkpoint and
    leave the batch out when it comes again. The update is never made."""
    spike: Literal["ignore", "stop", "skip", "rewind"] = "ignore"
    """The same when the loss rises far above what it was lately."""
    spike_deviations: float = Field(6.0, gt=0)
    """Standard deviations above the mean of the last `spike_window` steps that make a spike."""
    spike_window: int = Field(64, ge=8)
    skip_batches: int = Field(1, gt=0)
    """How many batches are left out each time: the one that made the trouble and those before it (rewind), if any."""
    most: int = Field(16, gt=0)
    """Times that training may go on after trouble; then it stops."""
    hang_seconds: float | None = Field(900.0, gt=0)
    """A rank that does not get on for so long is named and the job ends (torchrun may start it again); a single process
    is only told so. null waits."""


class TrainSettings(Settings):
    """The training loop. Durations are steps, or text: "300 epochs", "10_000_000 images", "3 percent" (of `steps`)."""

    steps: Length
    batch_size: int = Field(32, gt=0)
    """Pictures of one update, over all ranks."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Rows per forward pass of a rank; null is all that the rank has. The result is the same up to rounding."""
    parallel: ParallelSettings = ParallelSettings()
    compile: bool = False
    """Compile every block (torch.compile): minutes at the start, then faster on accelerators."""
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    """muon: orthogonalised momentum for the matrices inside the blocks, AdamW for everything else; adamw8bit: AdamW
    whose two moments take a byte each (extra 'lean')."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: Duration = 50
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After the warm-up: as it is; down along a half cosine or a line; or wsd: as it is, then down over the last
    `decay_steps`."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Where the rate ends, but for `constant`."""
    decay_steps: Interval = "20 percent"  # type: ignore[assignment]  # resolved to steps before training
    """wsd: the steps of the decay at the end."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """wsd: how it falls; sqrt is 1 - the square root of the share done (arXiv 2405.18392)."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    """On tensors with two or more dimensions; norms and biases have none."""
    decay_embeddings: bool = True
    """Whether tables of token, class and position embeddings are among them."""
    clip_norm: float = Field(1.0, gt=0)
    z_weight: float = Field(0.0, ge=0)
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of conditions replaced by the empty prompt, the null class or the null caption, so that guidance has its
    unconditional model."""
    alternative_share: float = Field(0.3, ge=0, le=1)
    """Share of prompts replaced by another text of the same picture, where it has one; of captions by the short one."""
    word_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a prompt's text ids left out, each on its own: words must count singly, not captions as a whole."""
    ema_decay: EmaDecay | tuple[EmaDecay, ...] | None = None
    """Decay of averaged weights; when set, these are validated and saved as the model. Of several decays the first is
    the model's; the others are saved beside it, as ema-DECAY/."""
    ema_warmup: bool = True
    """Average over fewer steps at first; false is a constant decay, as LlamaGen has it."""
    ema_offload: bool = False
    """Keep averages in the CPU's memory."""
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, gt=0)
    """CPU threads of the process; null leaves torch's choice. Another number may round differently."""
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; what is trained, its optimiser and its averages stay float32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """full: keep only what enters each block and compute the rest again in the backward pass: a third more time, a
    fraction of the memory. selective: keep what matrix products and attention gave as well, and compute only what is
    cheap again."""
    log_every_steps: Interval = 10
    validate_every_steps: Interval = 100
    preview_every_steps: Interval | None = None
    evaluate_every_steps: Interval | None = None
    """How often held-out prompts are painted and measured, as `arra evaluate` does at the end; null never."""
    evaluate_images: int = Field(64, ge=8)
    """Pictures that are painted for it."""
    watch_every_steps: Interval | None = None
    """How often it is measured, at every layer and position, what the states have in common with the teachers'
    features; null never. `arra probe` does it afterwards."""
    watch_images: int = Field(256, ge=16)
    """Held-out pictures that are watched."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where metrics are sent beside metrics.jsonl (extra 'track')."""
    checkpoint_every_steps: Interval = 100
    keep_checkpoints: int = Field(2, gt=0)
    """How many of the newest are kept."""
    keep_every_steps: Interval | None = None
    """Checkpoints of these steps are kept for ever."""
    keep_best: int = Field(0, ge=0)
    """How many of the lowest validation loss are kept as well; a step that is best so far is saved."""
    checkpoint_in_background: bool = True
    """Write while training goes on; a checkpoint costs a copy of the state in memory for that time."""
    trouble: TroubleSettings = TroubleSettings()

    @model_validator(mode="after")
    def _averages_differ(self) -> "TrainSettings":
        if self.ema_decay == () or len({*self.ema_decays}) < len(self.ema_decays):
            raise ValueError(
                f"ema_decay: expected decays that differ, found {list(self.ema_decays)}; null averages none"
            )
        return self

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of all averages, the model's first; none where nothing is averaged."""
        decays = self.ema_decay
        return () if decays is None else decays if isinstance(decays, tuple) else (decays,)

    @model_validator(mode="after")
    def _trackers_differ(self) -> "TrainSettings":
        if len({*self.trackers}) < len(self.trackers):
            raise ValueError(f"trackers: expected each once, found {', '.join(self.trackers)}")
        return self

    def resolved(self, records: int | None) -> "TrainSettings":
        """The settings with every duration in steps; `records` are the pictures of an epoch, None if not known.

        Raises:
            ValueError: a duration is in epochs, and `records` is None.
        """
        whole = to_steps(self.steps, batch_size=self.batch_size, records=records, steps=None)
        return in_steps(self, batch_size=self.batch_size, records=records, steps=whole)


AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]


class AdversarialSettings(Settings):
    """The patch discriminator beside a tokenizer, and its loss. The defaults are LlamaGen's."""

    loss: AdversarialLoss = "hinge"
    """vanilla: cross-entropy, the tokenizer minimises log(1 - p); non_saturating: it minimises -log p."""
    start_step: int = Field(20_000, ge=0)
    """Steps without it at first: neither run nor trained. LlamaGen fine-tunes with 0."""
    weight: float = Field(0.5, ge=0)
    """Factor beside the tokenizer's other losses; and of the discriminator's own, where it counts in clipping alone."""
    adaptive: bool = False
    """Also multiply by the ratio of gradient norms at the decoder's last layer, reconstruction over adversarial."""
    num_layers: int = Field(3, gt=0, le=6)
    """Strided convolutions; pictures must have 3 * 2^num_layers pixels a side, so 24 with 3."""
    channels: int = Field(64, gt=0)
    """Of the first convolution."""
    learning_rate: float = Field(1e-4, gt=0)
    """Follows the schedule of the tokenizer's."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0)


class PerceptualSettings(Settings):
    """LPIPS with VGG16, whose weights are files of the user's."""

    files: tuple[str, ...] = Field(min_length=1, max_length=2)
    """torchvision's vgg16-397923af.pth, and vgg.pth of LPIPS 0.1; the second may be left out beside torchmetrics."""
    weight: float = Field(1.0, ge=0)
    """Factor beside the other losses; LlamaGen's is 1."""


class TokenizerTrainSettings(Settings):
    """How a tokenizer is trained. Where LlamaGen's value is another, it is named."""

    part: Literal["all", "decoder"] = "all"
    """decoder: all that codes depend on stays as it is, bit for bit; it needs a tokenizer to start from."""
    steps: int = Field(10_000, gt=0)
    batch_size: int = Field(16, gt=0)
    """LlamaGen: 128."""
    learning_rate: float = Field(1e-3, gt=0)
    """LlamaGen: 1e-4."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero at the last step, or as it is (LlamaGen)."""
    warmup_steps: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    """LlamaGen: 0 (its paper says 0.05)."""
    clip_norm: float = Field(1.0, gt=0)
    l2_weight: float = Field(1.0, ge=0)
    l1_weight: float = Field(0.1, ge=0)
    """LlamaGen: 0."""
    perceptual: PerceptualSettings | None = None
    adversarial: AdversarialSettings | None = None
    codebook_weight: float = Field(1.0, ge=0)
    commitment: float = Field(0.25, ge=0)
    entropy_weight: float = Field(0.0, ge=0)
    restart_every_steps: int | None = Field(100, gt=0)
    """Codes unused over this many steps restart, during the first half of training; null never (LlamaGen)."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is saved; LlamaGen: 0.9999."""
    ema_warmup: bool = True
    """Average over fewer steps at first; false is a constant decay, as LlamaGen has it."""
    crop: CropSettings | None = None
    """Read pictures while training, in this crop (`kind: random`, LlamaGen); null holds all in memory, as follows."""
    augment: float = Field(0.3, ge=0, le=1)
    """Share of pictures in memory that are scaled, shifted and recoloured; the others are seen as they are (or
    mirrored)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision outside the quantiser and the losses."""
    device: str = "auto"
    workers: int | None = Field(None, ge=0)
    """Processes that read pictures; null takes the cores but one."""
    log_every_steps: int = Field(100, gt=0)
    checkpoint_every_steps: int = Field(200, gt=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "TokenizerTrainSettings":
        perceptual = 0.0 if self.perceptual is None else self.perceptual.weight
        if not self.l2_weight + self.l1_weight + perceptual:
            raise ValueError("l2_weight and l1_weight are 0: nothing asks for the picture back; raise one of them")
        if self.crop is not None and self.crop.kind != "random":
            raise ValueError(f"crop: expected kind 'random', found '{self.crop.kind}'; null takes the middle square")
        return self


class DualTrainSettings(Settings):
    """How the dual encoder that judges captions is trained."""

    steps: int = Field(800, gt=0)
    batch_size: int = Field(128, gt=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    seed: int = Field(0, ge=0)
