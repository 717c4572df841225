"""The training loop. Everything random is a function of (seed, position in the data), so a resumed run ends in the same
weights, and neither ranks nor micro-batches change them but for rounding.

    position -> batch -> passes -> sums over all ranks -> trouble? -> update -> averages -> looks, saves

Two models trained from one seed see the same pictures in the same order, start from the same weights and drop the same
units, whether they are aligned or not: the projector has its own generator, its own gradient clipping, and draws
nothing in the forward pass.
Legend: B batch, P image positions.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arra.align import Alignments, Balance, WeightSchedule
from arra.align.alignment import MAIN
from arra.data.batches import TrainBatch, mix
from arra.distributed import ALONE, Ranks
from arra.models import Painter
from arra.runs import Run
from arra.train.average import Averages
from arra.train.checkpoints import Checkpoints, SavedStep
from arra.train.heartbeat import Doing, Heartbeat
from arra.train.interrupt import TrainingInterrupted, interruptible
from arra.train.meters import Meters
from arra.train.optimizer import gradient_norm, make_optimizers, scale_gradients
from arra.train.optimizer_state import optimizer_space, optimizer_tensors, restore_optimizer
from arra.train.parallel import Engine
from arra.train.passes import Ahead, Passed, Passes, Steps, validation_loss
from arra.train.schedule import learning_rate
from arra.train.settings import TrainSettings
from arra.train.trouble import LossWatch, Reason, Skipped, Survived
from arra.train.trouble_record import Trouble, record_trouble, stop_error, trouble_line

T = TypeVar("T")


@dataclass(frozen=True)
class Totals:
    """Numbers of a step over the whole batch, each a mean: over labelled tokens, the alignment over images."""

    loss: float
    ntp: float
    z: float
    aligned: Mapping[str, float]
    grad_norm: float
    asked_to_stop: bool
    save_failed: bool


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
    """Called with every row of the metrics, on rank zero."""
    watcher: Callable[[Painter, Alignments | None, int], list[dict[str, Any]]] | None = None
    """Called as watcher(model, alignment, step); measures what the states have in common with the teachers' features,
    and must leave all as it is."""
    quality: Callable[[Painter, int], dict[str, float]] | None = None
    """Called as quality(model, step); measures what the model paints, and must leave all as it is."""
    text_validation: Sequence[TrainBatch] = ()
    """Rows of text on which it is watched whether a language model keeps its language."""
    ranks: Ranks = ALONE
    device: torch.device | None = None
    """Where it trains; None is where the model is."""
    name_records: Callable[[Sequence[int]], Sequence[str]] | None = None
    """The ids of records of these numbers, for what is written down of trouble; None writes the numbers."""
    warn: Callable[[str], None] | None = None
    """Called on rank zero with a line that somebody should read."""

    def __post_init__(self) -> None:
        self.step, self.seconds, self.best = 0, 0.0, math.inf
        self.settings = s = self.settings.resolved(None)
        self.weights: Mapping[str, float] = {}
        """Of the alignment's terms, in the step that was made last."""
        self.place: torch.device = self.device or self.model.device
        self.engine = Engine(self.model, self.alignment, s, ranks=self.ranks, device=self.place)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        saved = self.model.state_dict().keys()
        self.constants = {name: value for name, value in self.model.named_buffers() if name in saved}
        """What is saved with the model and not trained: the null caption."""
        self.projector = dict(self.alignment.named_parameters()) if self.alignment is not None else {}
        self.names: dict[nn.Parameter, str] = {p: f"model.{n}" for n, p in self.parameters.items()}
        self.names |= {p: f"align.{n}" for n, p in self.projector.items()}
        parts: list[nn.Module] = [self.model] if self.alignment is None else [self.model, self.alignment]
        self.optimizers = make_optimizers({name: p for p, name in self.names.items()}, s, modules=parts)
        self.averages = Averages(self.parameters, s.ema_decays, warmup=s.ema_warmup, offload=s.ema_offload)
        self.meters = Meters(self.model, device=self.place, precision=s.precision, ranks=self.ranks)
        self.losses_seen = LossWatch(s.trouble)
        self.passes = Passes(self.engine)
        self.ahead = Ahead(self.batches, self.ranks, threaded=self.place.type == "cuda")

    # What touches the run folder is made when it is first needed: looking at a step needs none of it.

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Where the state is kept."""
        s = self.settings
        return Checkpoints(
            self.run.path / "checkpoints",
            ranks=self.ranks,
            keep_last=s.keep_checkpoints,
            keep_every=s.keep_every_steps,
            keep_best=s.keep_best,
            in_background=s.checkpoint_in_background,
        )

    @cached_property
    def skipped(self) -> Skipped:
        """What is left out of the data order."""
        return Skipped(self.run.path, self.ranks)

    @cached_property
    def heartbeat(self) -> Heartbeat:
        """By which a rank that hangs is named."""
        return Heartbeat(self.run.path, self.ranks, hang_seconds=self.settings.trouble.hang_seconds)

    def train(self) -> None:
        """Runs to the last step, resuming where checkpoints are found.

        Raises:
            TrainingInterrupted: a signal asked to stop; everything is saved.
            ArraError: training went wrong and the settings say to stop, or a checkpoint cannot be written.
        """
        with interruptible() as asked, self.heartbeat, self.ahead:
            self.resume()
            while self.step < self.settings.steps:
                totals = self.train_step(asked())
                if totals is None:
                    continue
                self.after_step(totals)
                # what one of several ranks is asked after the sums of a step, all learn in the next one
                stops = totals.asked_to_stop or (self.ranks.size == 1 and asked())
                if stops and self.step < self.settings.steps:
                    self.save()
                    self.checkpoints.wait()
                    raise TrainingInterrupted(f"{self.run.path}: interrupted at step {self.step}, saved")
            self.checkpoints.wait()

    def train_step(self, asked_to_stop: bool = False) -> Totals | None:
        """One update; None where trouble kept it from being made."""
        s, started = self.settings, time.perf_counter()
        position = self.skipped.position(self.step)
        self.heartbeat.beat(self.step, "data")
        batch = self.ahead.take(position, then=self.skipped.position(self.step + 1))
        self.meters.waited(time.perf_counter() - started)
        self.heartbeat.beat(self.step, "forward")
        self.model.train()
        # what models draw by themselves (attention's dropout); all else follows from the rows' own numbers
        purpose = "dropout" if self.ranks.is_first else f"dropout-{self.ranks.rank}"
        torch.manual_seed(mix(s.seed, purpose, position))
        self.forget_gradients()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, s)
        passed = self.passes.gradients(batch, step=self.step)
        self.weights = passed.weights
        model_norm = gradient_norm(list(self.parameters.values()))
        projector_norm = gradient_norm(list(self.projector.values()))
        totals, squares = self.summed(
            passed, model_norm=model_norm, projector_norm=projector_norm, asked_to_stop=asked_to_stop
        )
        if totals.save_failed:
            self.checkpoints.wait()
        reason = self.losses_seen.judge(totals.loss, totals.grad_norm)
        if reason is not None:
            self.in_trouble(reason, position=position, batch=batch, totals=totals)
            return None
        self.heartbeat.beat(self.step, "update")
        self.losses_seen.accept(totals.loss)
        self.balance(squares)
        scale_gradients(list(self.parameters.values()), model_norm, most=s.clip_norm)
        scale_gradients(list(self.projector.values()), projector_norm, most=s.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.averages.update(self.step)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        counts = passed.counts
        self.meters.step(
            tokens=counts.tokens, length=counts.length, images=counts.images, labelled=counts.labelled, seconds=seconds
        )
        return totals

    def summed(
        self, passed: Passed, *, model_norm: Tensor, projector_norm: Tensor, asked_to_stop: bool
    ) -> tuple[Totals, dict[str, list[float]]]:
        """What this rank found, added up over all ranks: the one place of a step that waits for the device."""
        losses, squares = passed.losses, passed.squares
        own = [losses.total, losses.ntp, losses.z, *losses.aligned.values()]
        flat = [
            each.detach().to(self.place).double().reshape(-1)
            for each in (*own, *squares.values(), model_norm, projector_norm)
        ]
        *parts, norm, aside = torch.cat(flat).tolist()
        flags = [float(asked_to_stop), float(self.checkpoints.failed)]
        *sums, stop, failed = self.ranks.sum([*parts, *flags])
        count = 3 + len(losses.aligned)
        total, ntp, z, *aligned = sums[:count]
        pairs = {name: sums[count + 2 * place : count + 2 * place + 2] for place, name in enumerate(squares)}
        # a projector that has lost its way counts, though it is clipped apart
        grad_norm = norm if math.isfinite(aside) else aside
        named = dict(zip(losses.aligned, aligned, strict=True))
        return Totals(total, ntp, z, named, grad_norm, stop > 0, failed > 0), pairs

    def forget_gradients(self) -> None:
        """Nothing; until the next step their memory is there for something else."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def balance(self, squares: Mapping[str, Sequence[float]]) -> None:
        """Nothing; what a step's gradients say of the balances is taken in."""
        for name, balance in self.balances().items():
            if name in squares:
                aligned, other = squares[name]
                balance.update(aligned=aligned, other=other)

    def in_trouble(self, reason: Reason, *, position: int, batch: TrainBatch, totals: Totals) -> None:
        """Nothing; what is known of it is written down, and the batch is left out if the settings say so.

        No weight has moved in this step.
        Raises:
            ArraError: they say to stop, or it was the last time that they allow.
        """
        s = self.settings.trouble
        action = self.skipped.action(reason, s)
        losses = {"loss": totals.loss, "ntp_loss": totals.ntp, "z_loss": totals.z}
        trouble = Trouble(
            step=self.step,
            position=position,
            reason=reason,
            action=action,
            losses=losses | {f"gva_loss.{name}": value for name, value in totals.aligned.items()},
            grad_norm=totals.grad_norm,
            learning_rate=learning_rate(self.step, self.settings),
            recent=self.losses_seen.recent,
        )
        record = record_trouble(
            trouble,
            self.run.path,
            ranks=self.ranks,
            parameters={name: parameter for parameter, name in self.names.items()},
            rows=batch.rows,
            ids=self.name_records,
            states=self.passes.states(batch),
        )
        self.forget_gradients()
        saved = self.checkpoints.newest()
        if action == "stop":
            raise stop_error(
                trouble,
                record,
                run=self.run.path,
                checkpoint=None if saved is None else saved.step,
                settings=s,
                survived=len(self.skipped.survived),
            )
        since = saved.step if saved is not None else 0
        left_out = self.skipped.plan(action, step=self.step, since=since, batches=s.skip_batches)
        self.skipped.add(Survived(self.step, reason, action, left_out))
        if self.warn is not None and self.ranks.is_first:
            back = f", back to step {since}" if action == "rewind" else ""
            self.warn(f"{trouble_line(trouble, record, run=self.run.path)}; left out{back}")
        if action == "rewind":
            self.resume()

    def after_step(self, totals: Totals) -> None:
        """Logs, validates, looks and saves when it is time to; never changes what is trained."""
        s, last = self.settings, self.step == self.settings.steps

        def due(every: int | None) -> bool:
            return every is not None and (self.step % every == 0 or last)

        if due(s.log_every_steps) or self.step == 1:
            self.log(
                {
                    "kind": "train",
                    "step": self.step,
                    "images": self.step * s.batch_size,
                    "seconds": round(self.seconds, 3),
                    "loss": totals.loss,
                    "ntp_loss": totals.ntp,
                    "gva_loss": totals.aligned.get(MAIN),
                    **self.further_terms(totals),
                    "z_loss": totals.z,
                    "lr": learning_rate(self.step - 1, s),
                    "grad_norm": totals.grad_norm,
                    **self.meters.row(),
                }
            )
        score = None
        if self.validation and due(s.validate_every_steps):
            score = self.validate()
        watcher, preview, quality = self.watcher, self.preview, self.quality
        if watcher is not None and due(s.watch_every_steps):
            for row in self.look("watch", lambda: watcher(self.model, self.alignment, self.step)) or ():
                self.log({"kind": "watch", "step": self.step, **row})
        if preview is not None and due(s.preview_every_steps):
            self.look("preview", lambda: preview(self.model, self.step))
        if quality is not None and due(s.evaluate_every_steps):
            found = self.look("evaluate", lambda: quality(self.model, self.step))
            self.log({"kind": "quality", "step": self.step, **(found or {})})
        is_best = score is not None and s.keep_best > 0 and score < self.best
        if score is not None:
            self.best = min(self.best, score)
        if due(s.checkpoint_every_steps) or due(s.keep_every_steps) or is_best:
            self.save(score)

    def validate(self) -> float:
        """The validation loss of the averaged weights, if there are any, in nats per code; it is logged."""
        self.heartbeat.beat(self.step, "validate")
        self.forget_gradients()
        row = {"kind": "validation", "step": self.step, "seconds": round(self.seconds, 3)}
        with self.averaged(), self.engine.looking():
            row["ntp_loss"] = score = validation_loss(self.model, self.validation, ranks=self.ranks)
            if self.text_validation:
                row["text_loss"] = validation_loss(self.model, self.text_validation, ranks=self.ranks)
        self.log(row)
        return score

    def look(self, doing: Doing, at: Callable[[], T]) -> T | None:
        """What `at` finds with the averaged weights; None on ranks that are not needed for it."""
        self.heartbeat.beat(self.step, doing)
        self.forget_gradients()
        found = None
        if self.engine.is_sharded or self.ranks.is_first:
            with self.averaged(), self.engine.looking(whole=True):
                found = at()
        self.ranks.barrier()
        return found

    def averaged(self, which: int = 0) -> AbstractContextManager[None]:
        """A block in which the model holds the averaged weights, if there are any."""
        return self.averages.in_place_of(self.parameters, which)

    def further_terms(self, totals: Totals) -> dict[str, float]:
        """What is logged of terms beside the main one, and of weights that change."""
        if self.alignment is None:
            return {}
        found = {f"gva_loss.{name}": each for name, each in totals.aligned.items() if name != MAIN}
        for name, term in self.alignment.items():
            if term.balance is not None or term.schedule != WeightSchedule():
                found["align_weight" + ("" if name == MAIN else f".{name}")] = self.weights[name]
        return found

    def log(self, row: dict[str, Any]) -> None:
        """Nothing; the row is in the run's metrics, and whoever watches has seen it."""
        if not self.ranks.is_first:
            return
        self.run.append_metrics(row)
        if self.watch is not None:
            self.watch(row)

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed training needs, by dotted name; the alignment's projectors are apart from the model."""
        tensors = {name: parameter.detach() for parameter, name in self.names.items()}
        tensors |= {f"model.{name}": value for name, value in self.constants.items()}
        for optimizer in self.optimizers:
            tensors |= optimizer_tensors(optimizer, self.names)
        tensors |= self.averages.tensors()
        tensors |= {
            f"balance.{name}": torch.tensor([balance.ratio, float(balance.steps)], dtype=torch.float64)
            for name, balance in self.balances().items()
        }
        return tensors | {"losses": self.losses_seen.tensor()}

    def save(self, score: float | None = None) -> None:
        """Nothing; the newest checkpoint is this step's, or will be once it is written."""
        self.heartbeat.beat(self.step, "save")
        best = None if math.isinf(self.best) else self.best
        self.checkpoints.save(self.step, self.tensors(), card={"seconds": self.seconds, "best": best}, score=score)

    def resume(self) -> None:
        """Nothing; the state is the newest whole checkpoint's, or the beginning's, and later metrics are gone."""
        self.heartbeat.beat(self.step, "start")
        saved = self.checkpoints.newest()
        if self.ranks.is_first:
            self.run.truncate_metrics(saved.step if saved else 0)
        self.ranks.barrier()
        if saved is not None:
            self.restore(saved)
        elif "rewind" in (self.settings.trouble.nonfinite, self.settings.trouble.spike):
            self.save()  # what there is to go back to

    def restore(self, saved: SavedStep) -> None:
        """Nothing; the state is that of a checkpoint."""
        tensors = {name: value for name, value in self.tensors().items() if not name.startswith("optimizer.")}
        for optimizer in self.optimizers:
            tensors |= optimizer_space(optimizer, self.names, saved=saved)
        self.checkpoints.load(saved, tensors)
        for optimizer in self.optimizers:
            restore_optimizer(optimizer, self.names, tensors=tensors)
        for name, balance in self.balances().items():
            balance.ratio, steps = tensors[f"balance.{name}"].tolist()
            balance.steps = int(steps)
        self.losses_seen.restore(tensors["losses"])
        best = saved.card["best"]
        self.step, self.seconds, self.best = saved.step, saved.card["seconds"], math.inf if best is None else best

    def balances(self) -> dict[str, Balance]:
        """Of the alignment's terms that have one."""
        if self.alignment is None:
            return {}
        return {name: term.balance for name, term in self.alignment.items() if term.balance is not None}
