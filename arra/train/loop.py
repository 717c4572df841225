"""The training loop. Everything random is a function of (seed, step), so a resumed run ends in the same weights.

Two models trained from one seed see the same pictures in the same order, start from the same weights and drop the same
units, whether they are aligned or not: the projector has its own generator, its own gradient clipping, and draws
nothing in the forward pass.
Legend: B batch, P image positions.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from arra.align import Alignments, Balance, WeightSchedule
from arra.align.alignment import MAIN
from arra.data.batches import TrainBatch, mix
from arra.models import Decoder, Painter
from arra.models.head import head_losses
from arra.runs import Run
from arra.train.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from arra.train.interrupt import TrainingInterrupted, interruptible
from arra.train.objective import Losses, compute_losses
from arra.train.optimizer import clip_gradients, learning_rate, make_optimizers
from arra.train.settings import TrainSettings


@runtime_checkable
class Steps(Protocol):
    """The training data: a batch for every step."""

    def batch(self, step: int) -> TrainBatch:
        """The batch of a step, counted from 0."""
        ...


@dataclass
class Trainer:
    """Model, optimiser and position of one run; what of the model does not require gradients stays as it is."""

    model: Painter
    alignment: Alignments | None
    batches: Steps
    validation: Sequence[TrainBatch]
    settings: TrainSettings
    run: Run
    preview: Callable[[Painter, int], None] | None = None
    """Called as preview(model, step); must leave model and random state as they are."""
    watch: Callable[[dict[str, Any]], None] | None = None
    """Called with every row of the metrics."""
    watcher: Callable[[Painter, Alignments | None, int], list[dict[str, Any]]] | None = None
    """Called as watcher(model, alignment, step); measures what the states have in common with the teachers' features,
    and must leave all as it is."""
    text_validation: Sequence[TrainBatch] = ()
    """Rows of text on which it is watched whether a language model keeps its language."""

    def __post_init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.weights: dict[str, float] = {}
        """Of the alignment's terms, in the step that was made last."""
        self.device = self.model.device
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        saved = self.model.state_dict().keys()
        self.constants = {name: value for name, value in self.model.named_buffers() if name in saved}
        """What is saved with the model and not trained: the null caption."""
        self.projector = dict(self.alignment.named_parameters()) if self.alignment is not None else {}
        self.names: dict[nn.Parameter, str] = {p: f"model.{n}" for n, p in self.parameters.items()}
        self.names |= {p: f"align.{n}" for n, p in self.projector.items()}
        self.optimizers = make_optimizers({name: p for p, name in self.names.items()}, self.settings)
        decay = self.settings.ema_decay
        self.average = None if decay is None else {n: p.detach().clone() for n, p in self.parameters.items()}

    def train(self) -> None:
        """Runs to the last step, resuming where checkpoints are found.

        Raises:
            TrainingInterrupted: a signal asked to stop; everything is saved.
            FloatingPointError: the loss is not finite; the weights of the step before are untouched.
        """
        self.resume()
        with interruptible() as stopped:
            while self.step < self.settings.steps:
                started = time.perf_counter()
                losses, grad_norm = self.train_step()
                self.seconds += time.perf_counter() - started
                self.after_step(losses, grad_norm)
                if stopped() and self.step < self.settings.steps:
                    self.save()
                    raise TrainingInterrupted(f"{self.run.path}: interrupted at step {self.step}, saved")

    def train_step(self) -> tuple[Losses, float]:
        """One update; the losses are means over the whole batch."""
        s = self.settings
        self.model.train()
        torch.manual_seed(mix(s.seed, "dropout", self.step))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, s)
        losses = self.accumulate(self.batches.batch(self.step))
        grad_norm = clip_gradients(list(self.parameters.values()), s.clip_norm)
        if self.projector:
            clip_gradients(list(self.projector.values()), s.clip_norm)
        if not (math.isfinite(losses.total.item()) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"step {self.step}: loss {losses.total.item()}, gradient norm {grad_norm}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.average is not None and s.ema_decay is not None:
            decay = min(s.ema_decay, (1 + self.step) / (10 + self.step)) if s.ema_warmup else s.ema_decay
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return losses, grad_norm

    def accumulate(self, batch: TrainBatch) -> Losses:
        """Gradients of the batch's mean losses, in which every label and picture counts once, in any micro-batch."""
        size, rows = self.settings.micro_batch_size or len(batch.tokens), len(batch.tokens)
        pictures = batch.predicting.any(1)
        counts = {"num_tokens": int(batch.labelled.sum()), "num_images": int(pictures.sum())}
        candidates, weights = None, None
        if self.alignment is not None:
            weights = self.weights = self.alignment.weights_at(self.step, steps=self.settings.steps)
            wanted = {term.encoder for _, term in self.alignment.items() if term.contrasts_pictures}
            if batch.features is not None and size < rows:
                candidates = {name: batch.features[name][pictures].to(self.device) for name in wanted}
        names: list[str] = []
        sums, squares = [], dict[str, list[tuple[float, float]]]()
        for start in range(0, rows, size):
            part = move(select(batch, slice(start, start + size)), self.model)
            with self.narrowed():
                losses = compute_losses(
                    self.model,
                    part,
                    self.alignment,
                    z_weight=self.settings.z_weight,
                    weights=weights,
                    candidates=candidates,
                    **counts,
                )
            losses.total.backward()
            for name, gradient in losses.gradients.items():
                squares.setdefault(name, []).append(gradient.squares())
            names = list(losses.aligned)
            sums.append(torch.stack([losses.total, losses.ntp, losses.z, *losses.aligned.values()]).detach())
        if self.alignment is not None:
            for name, term in self.alignment.items():
                if term.balance is not None and name in squares:
                    aligned, other = (sum(each) for each in zip(*squares[name], strict=True))
                    term.balance.update(aligned=aligned, other=other)
        total, ntp, z, *aligned_sums = torch.stack(sums).sum(0)
        return Losses(total, ntp, z, dict(zip(names, aligned_sums, strict=True)))

    def narrowed(self) -> AbstractContextManager[object]:
        """A block in which products are computed in the type that the settings ask for."""
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def after_step(self, losses: Losses, grad_norm: float) -> None:
        """Logs, validates, previews and saves when it is time to; never changes what is trained."""
        s, last = self.settings, self.step == self.settings.steps
        if self.step % s.log_every_steps == 0 or last or self.step == 1:
            self.log(
                {
                    "kind": "train",
                    "step": self.step,
                    "images": self.step * s.batch_size,
                    "seconds": round(self.seconds, 3),
                    "loss": losses.total.item(),
                    "ntp_loss": losses.ntp.item(),
                    "gva_loss": None if losses.gva is None else losses.gva.item(),
                    **self.further_terms(losses),
                    "z_loss": losses.z.item(),
                    "lr": learning_rate(self.step - 1, s),
                    "grad_norm": grad_norm,
                    "images_per_second": round(self.step * s.batch_size / self.seconds, 2),
                }
            )
        if self.validation and (self.step % s.validate_every_steps == 0 or last):
            row = {"kind": "validation", "step": self.step, "seconds": round(self.seconds, 3)}
            with self.averaged(), self.narrowed():
                row["ntp_loss"] = validation_loss(self.model, self.validation)
                if self.text_validation:
                    row["text_loss"] = validation_loss(self.model, self.text_validation)
            self.log(row)
        if self.watcher and s.watch_every_steps and (self.step % s.watch_every_steps == 0 or last):
            with self.averaged():
                for row in self.watcher(self.model, self.alignment, self.step):
                    self.log({"kind": "watch", "step": self.step, **row})
        if self.preview and s.preview_every_steps and (self.step % s.preview_every_steps == 0 or last):
            with self.averaged():
                self.preview(self.model, self.step)
        if self.step % s.checkpoint_every_steps == 0 or last:
            self.save()

    def further_terms(self, losses: Losses) -> dict[str, float]:
        """What is logged of terms beside the main one, and of weights that change."""
        if self.alignment is None:
            return {}
        found = {f"gva_loss.{name}": each.item() for name, each in losses.aligned.items() if name != MAIN}
        for name, term in self.alignment.items():
            if term.balance is not None or term.schedule != WeightSchedule():
                found["align_weight" + ("" if name == MAIN else f".{name}")] = self.weights[name]
        return found

    def log(self, row: dict[str, Any]) -> None:
        """Nothing; the row is in the run's metrics, and whoever watches has seen it."""
        self.run.append_metrics(row)
        if self.watch is not None:
            self.watch(row)

    def save(self) -> None:
        """Nothing; the newest checkpoint is this step's."""
        tensors = {name: parameter.detach() for parameter, name in self.names.items()}
        tensors |= {f"model.{name}": value for name, value in self.constants.items()}
        for optimizer in self.optimizers:
            tensors |= optimizer_tensors(optimizer, self.names)
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {
            f"balance.{name}": torch.tensor([balance.ratio, float(balance.steps)], dtype=torch.float64)
            for name, balance in self.balances().items()
        }
        save_checkpoint(
            self.run.path / "checkpoints",
            step=self.step,
            seconds=self.seconds,
            tensors=tensors,
            keep=self.settings.keep_checkpoints,
        )

    def resume(self) -> None:
        """Nothing; the state is the newest whole checkpoint's, or the beginning's, and later metrics are gone."""
        checkpoint = newest_checkpoint(self.run.path / "checkpoints")
        self.run.truncate_metrics(checkpoint.step if checkpoint else 0)
        if checkpoint is None:
            return
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(checkpoint.tensors[name])
            for name, value in self.constants.items():
                value.copy_(checkpoint.tensors[f"model.{name}"])
            for name, value in (self.average or {}).items():
                value.copy_(checkpoint.tensors[f"average.{name}"])
        for name, balance in self.balances().items():
            balance.ratio, steps = checkpoint.tensors[f"balance.{name}"].tolist()
            balance.steps = int(steps)
        for optimizer in self.optimizers:
            restore_optimizer(optimizer, self.names, checkpoint.tensors)

    def balances(self) -> dict[str, Balance]:
        """Of the alignment's terms that have one."""
        if self.alignment is None:
            return {}
        return {name: term.balance for name, term in self.alignment.items() if term.balance is not None}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the model holds the averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
            try:
                yield
            finally:
                for name, parameter in self.parameters.items():
                    parameter.copy_(kept[name])


@torch.no_grad()
def validation_loss(model: Painter, batches: Sequence[TrainBatch]) -> float:
    """Nats per code, or per token of text, over all batches, each counted once; the model's mode is left as it was."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = move(batch, model)
        hidden = model(batch.tokens[:, :-1], **batch.inputs()).last_hidden
        counted = batch.predicting if bool(batch.predicting.any()) else batch.labelled
        losses, _ = head_losses(hidden[counted], model.lm_head, batch.labels[:, 1:][counted])
        total, count = total + losses.double().sum().item(), count + len(losses)
    model.train(training)
    return total / count


def select(batch: TrainBatch, rows: slice) -> TrainBatch:
    """The batch of some rows."""
    return on_each_part(batch, lambda part: part[rows])


def move(batch: TrainBatch, model: Painter) -> TrainBatch:
    """The batch where the model is, caption features in the model's type."""
    moved = on_each_part(batch, lambda part: part.to(model.device))
    if moved.caption is None or not isinstance(model, Decoder):
        return moved
    return replace(moved, caption=moved.caption.to(model.norm.weight.dtype))


def on_each_part(batch: TrainBatch, change: Callable[[Tensor], Tensor]) -> TrainBatch:
    """The batch with every tensor changed."""

    def changed(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part)
        return {name: change(each) for name, each in part.items()} if isinstance(part, Mapping) else part

    return TrainBatch(**{field.name: changed(getattr(batch, field.name)) for field in fields(batch)})
