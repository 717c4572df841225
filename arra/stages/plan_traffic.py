"""What to change where steps wait for traffic between devices: settings that train the same model, sooner.

    MachinePlan whose traffic takes longer than its passes --> changes --> those that fit and are faster

Shards are gathered and their gradients summed once for every micro-batch, so larger ones cost less of both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from arra.stages.plan_machines import Machine
from arra.stages.plan_speed import StepTime, traffic_seconds
from arra.stages.planned_model import PlannedModel
from arra.train.memory import Sharing
from arra.train.savings import rows_of
from arra.train.settings import TrainSettings

LEAST_GAIN = 0.02
"""Share of a step's seconds that a change must save to be worth telling."""


@dataclass(frozen=True)
class Faster:
    """A change that leaves the training as it is but for rounding, and what becomes of it."""

    what: str
    """As `--set` takes it."""
    needed: int
    """Bytes of each device."""
    seconds: float
    """Of a step."""
    hours: float | None
    """Of the training; None where its steps are not known."""


def waits_for_traffic(time: StepTime | None, sharing: Sharing) -> bool:
    """Whether steps of sharded weights last as long as their traffic does, and not as their passes."""
    return time is not None and sharing.is_sharded and time.traffic > time.compute


def changes_of_traffic(
    planned: PlannedModel,
    settings: TrainSettings,
    *,
    machine: Machine,
    sharing: Sharing,
    compute: float,
    largest: int,
) -> Iterator[Mapping[str, Any]]:
    """Changes by dotted keys that send fewer bytes in a step; whether they fit is not looked at.

    `compute` are the seconds of the passes, which traffic need not be shorter than; `largest` is the largest
    micro-batch that fits.
    """
    rows = _enough_rows(planned, settings, machine=machine, sharing=sharing, compute=compute, largest=largest)
    larger = {"train.micro_batch_size": rows} if rows else {}
    if larger:
        yield larger
    if settings.parallel.reshard:
        kept = {"train.parallel.reshard": False}
        yield kept
        if larger:
            yield {**larger, **kept}
    if sharing.kind == "fsdp" and not settings.parallel.offload:
        yield {"train.parallel.kind": "ddp"}
        if larger:
            yield {**larger, "train.parallel.kind": "ddp"}


def _enough_rows(
    planned: PlannedModel,
    settings: TrainSettings,
    *,
    machine: Machine,
    sharing: Sharing,
    compute: float,
    largest: int,
) -> int | None:
    """The fewest rows of which traffic lasts no longer than the passes, else the most; None where no more fit."""
    share, rows = -(-settings.batch_size // sharing.ranks), rows_of(settings, ranks=sharing.ranks)
    sizes = sorted({-(-share // parts) for parts in range(1, -(-share // rows))})
    fitting = [size for size in sizes if rows < size <= largest]
    for size in fitting:
        changed = settings.model_copy(update={"micro_batch_size": size})
        if traffic_seconds(planned, changed, machine=machine, sharing=sharing) <= compute:
            return size
    return fitting[-1] if fitting else None
