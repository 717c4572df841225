"""The passes of a step: this rank's part of a batch, in micro-batches, forward and backward.

    data order -> Ahead -> a rank's rows -> parts -> Engine -> gradients and losses of the whole batch
Legend: B batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from arra.align import Target
from arra.data.batches import NOTHING, TrainBatch
from arra.distributed import ALONE, Ranks
from arra.models import Decoder, Painter
from arra.models.head import head_losses
from arra.train.objective import Losses, located
from arra.train.parallel import Engine


@runtime_checkable
class Steps(Protocol):
    """The training data: a batch for every position."""

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        """A rank's part of the batch at a position, counted from 0."""
        ...


@dataclass(frozen=True)
class Counts:
    """Of a batch."""

    tokens: int
    """Positions that are fed, padding included."""
    length: int
    """Of its rows."""
    labelled: int
    """Positions that carry next-token loss."""
    images: int
    parts: int
    """Micro-batches of each rank."""


@dataclass(frozen=True)
class Passed:
    """What the passes of a step found."""

    counts: Counts
    """Of the whole batch."""
    losses: Losses
    """This rank's part of them: added up over ranks they are the whole batch's."""
    squares: Mapping[str, Float[Tensor, "2"]]
    """By balanced term, this rank's part of the squared norms of its gradient and of all other."""
    weights: Mapping[str, float]
    """Of the alignment's terms, in this step."""


@dataclass(frozen=True)
class Passes:
    """Makes the passes of one rank; all ranks make as many, since gathering weights takes all of them."""

    engine: Engine

    def gradients(self, batch: TrainBatch, *, step: int) -> Passed:
        """What the passes of a step found; parameters hold the gradients of the whole batch's mean losses.

        In these every label and picture counts once, whatever the ranks and parts. `batch` is this rank's part of it.
        """
        counts = self.count(batch)
        pictures, weights, targets = batch.predicting.any(1), dict[str, float](), set[Target]()
        candidates = None
        if self.engine.alignment is not None:
            weights = self.engine.alignment.weights_at(step, steps=self.engine.settings.steps)
            targets = {term.target for _, term in self.engine.alignment.items()}
            wanted = {term.encoder for _, term in self.engine.alignment.items() if term.contrasts_pictures}
            if batch.features is not None and wanted and counts.parts * self.engine.ranks.size > 1:
                everywhere = self.engine.ranks.gather({name: batch.features[name][pictures] for name in wanted})
                candidates = {
                    name: torch.cat([each[name] for each in everywhere]).to(self.engine.device) for name in wanted
                }
        names: list[str] = []
        sums, squares = [], dict[str, Tensor]()
        for number, part in enumerate(self.parts(batch, counts.parts)):
            part = move(located(part, targets), self.engine.model, device=self.engine.device)
            with self.engine.part(is_last=number == counts.parts - 1):
                losses = self.engine.losses(
                    part,
                    z_weight=self.engine.settings.z_weight,
                    weights=weights or None,
                    candidates=candidates,
                    num_tokens=counts.labelled,
                    num_images=counts.images,
                )
                losses.total.backward()
            for name, gradient in losses.gradients.items():
                both = torch.stack(gradient.squares())
                squares[name] = squares[name] + both if name in squares else both
            names = list(losses.aligned)
            sums.append(torch.stack([losses.total, losses.ntp, losses.z, *losses.aligned.values()]).detach())
        total, ntp, z, *aligned = torch.stack(sums).sum(0)
        return Passed(counts, Losses(total, ntp, z, dict(zip(names, aligned, strict=True))), squares, weights)

    def count(self, batch: TrainBatch) -> Counts:
        """What the whole batch has that this is a rank's part of."""
        rows = len(batch.tokens)
        parts = math.ceil(rows / (self.engine.settings.micro_batch_size or rows))
        fed = batch.tokens[:, 1:]
        own = Counts(fed.numel(), fed.shape[1], int(batch.labelled.sum()), int(batch.predicting.any(1).sum()), parts)
        tokens, length, labelled, images, most = zip(*map(astuple, self.engine.ranks.gather(own)), strict=True)
        return Counts(sum(tokens), max(length), sum(labelled), sum(images), max(most))

    def parts(self, batch: TrainBatch, count: int, *, size: int | None = None) -> Iterator[TrainBatch]:
        """The batch in so many micro-batches; those beyond its end are blank.

        All ranks make as many passes, since gathering weights takes all of them.
        """
        rows = len(batch.tokens)
        size = size or self.engine.settings.micro_batch_size or rows
        for start in range(0, count * size, size):
            yield select(batch, slice(start, start + size)) if start < rows else blank(batch)

    @torch.no_grad()
    def states(self, batch: TrainBatch) -> Iterator[dict[int, Tensor]]:
        """What the layers make of the batch's rows, one by one."""
        layers = tuple(range(len(self.engine.model.blocks) + 1))
        with self.engine.looking():
            for part in self.parts(batch, max(self.engine.ranks.gather(len(batch.tokens))), size=1):
                part = move(part, self.engine.model, device=self.engine.device)
                found: dict[int, Tensor] = self.engine.model(
                    part.tokens[:, :-1], **part.inputs(), capture=layers
                ).captured
                yield found


class Ahead:
    """Batches, the next one made while a step computes: on a thread, where the step leaves the CPU alone."""

    def __init__(self, batches: Steps, ranks: Ranks, *, threaded: bool) -> None:
        self.batches, self.ranks = batches, ranks
        self.pool = ThreadPoolExecutor(1) if threaded else None
        self.next: tuple[int, Future[TrainBatch]] | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def take(self, position: int, *, then: int) -> TrainBatch:
        """The batch at a position; the one at `then` is begun."""
        if self.pool is None:
            return self._made(position)
        begun = self.next[1] if self.next is not None and self.next[0] == position else None
        batch = self._made(position) if begun is None else begun.result()
        self.next = (then, self.pool.submit(self._made, then))
        return batch

    def _made(self, position: int) -> TrainBatch:
        batch = self.batches.batch(position, rank=self.ranks.rank, num_ranks=self.ranks.size)
        if not len(batch.tokens):  # the last batch of a shape may have fewer rows than there are ranks
            batch = blank(self.batches.batch(position))
        return batch.changed(Tensor.pin_memory) if self.pool is not None else batch


@torch.no_grad()
def validation_loss(model: Painter, batches: Sequence[TrainBatch], *, ranks: Ranks = ALONE) -> float:
    """Nats per code, or per token of text, over all batches, each counted once; the model's mode is left as it was.

    Ranks share the batches out, and all make as many passes, which sharded weights need.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(batches), ranks.size):
        own = first + ranks.rank
        batch = move(batches[min(own, len(batches) - 1)], model)
        hidden = model(batch.tokens[:, :-1], **batch.inputs()).last_hidden
        counted = batch.predicting if bool(batch.predicting.any()) else batch.labelled
        losses, _ = head_losses(hidden[counted], model.lm_head, batch.labels[:, 1:][counted])
        if own < len(batches):
            total, count = total + losses.double().sum().item(), count + len(losses)
    model.train(training)
    total, number = ranks.sum([total, float(count)])
    return total / number


def select(batch: TrainBatch, rows: slice) -> TrainBatch:
    """The batch of some rows."""
    return batch.changed(lambda part: part[rows])


def blank(batch: TrainBatch) -> TrainBatch:
    """A row in which nothing is learnt."""
    row = select(batch, slice(0, 1))
    return replace(row, labels=torch.full_like(row.labels, NOTHING), code_mask=torch.zeros_like(row.code_mask))


def move(batch: TrainBatch, model: Painter, *, device: torch.device | None = None) -> TrainBatch:
    """The batch on a device, the model's unless told; caption features in the model's type."""
    device = device or model.device
    moved = batch.changed(lambda part: part.to(device, non_blocking=True))
    if moved.caption is None or not isinstance(model, Decoder):
        return moved
    return replace(moved, caption=moved.caption.to(model.norm.weight.dtype))
