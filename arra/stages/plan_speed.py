"""How long a planned training takes on a machine, from operations, bytes moved and what cards can do.

    a model on the meta device, sharing, Machine --> StepTime{compute, traffic, update} --> images/s, MFU, hours

Operations are counted on the module graph (`arra.train.activations`). What share of a card's peak is reached is
assumed, or measured by `arra plan demo --gpu cpu --probe`.
Letters: R ranks that share one set of weights, N weights, w bytes of a number in products, M N sides of a matrix.
"""

from dataclasses import dataclass
from math import ceil, prod

from torch import Tensor

from arra.stages.plan_machines import Machine
from arra.stages.planned_model import PlannedModel
from arra.train.memory import WIDE, Held, Sharing, local_elements, output_layer
from arra.train.meters import model_flops
from arra.train.optimizer import NEWTON_SCHULZ_STEPS
from arra.train.savings import rows_of
from arra.train.settings import TrainSettings

COMPUTE_SHARE = {
    ("cuda", "bfloat16"): 0.40,
    ("cuda", "float32"): 0.60,
    ("cpu", "float32"): 0.60,
    ("cpu", "bfloat16"): 0.20,
}
"""Of a device's peak that passes reach: assumed. LlamaGen-B reaches 0.7 in float32 on a CPU (benchmarks/train.py)."""
LINK_SHARE, BANDWIDTH_SHARE = 0.7, 0.8
"""Of a link's and of a memory's nominal rate: assumed."""
ADAMW_BYTES, ADAMW8BIT_BYTES, MUON_BYTES = 28, 18, 36
"""Moved for each weight in an update: weight, gradient and moments read, weight and moments written; of Muon its
matrices are read and written in five steps besides, which is counted as operations."""
NORM_BYTES, AVERAGE_BYTES = 4, 12
"""Gradients are read once more for their norm; each average is read and written beside the weight."""


@dataclass(frozen=True)
class StepTime:
    """What a step takes of each device."""

    flops: int
    """Operations of the passes, what is computed again included."""
    useful_flops: float
    """Those that the model needs, as MFU counts them."""
    compute: float
    """Seconds of the passes, at the assumed or measured share of the peak."""
    traffic: float
    """Seconds of gradients and weights on their way between devices."""
    update: float
    """Seconds of the optimiser and of averages."""
    share: float
    """Of the peak, that `compute` assumes."""
    peak: float
    """Operations a second of the device."""
    images: int
    """Of the step, over all devices."""
    length: int
    """Positions of a picture's row."""

    @property
    def seconds(self) -> float:
        """Of the step: traffic hides behind the passes, as far as they last."""
        return max(self.compute, self.traffic) + self.update

    @property
    def images_per_second(self) -> float:
        """Over all devices."""
        return self.images / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Over all devices, fed positions."""
        return self.images_per_second * self.length

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations reach."""
        return self.useful_flops / self.seconds / self.peak


def step_time(
    planned: PlannedModel, settings: TrainSettings, *, machine: Machine, sharing: Sharing, share: float | None = None
) -> StepTime | None:
    """What a step takes on the machine; None where nothing but its memory is known.

    `share` of the peak is assumed where it is not given.
    """
    peak, bandwidth = machine.peak(settings.precision), machine.bandwidth
    if peak is None or bandwidth is None:
        return None
    images = -(-settings.batch_size // sharing.ranks)
    share = share or COMPUTE_SHARE[machine.device_type, settings.precision]
    flops = step_flops(planned, settings, ranks=sharing.ranks, sharded=sharing.is_sharded)
    useful = model_flops(planned.model).of(
        positions=images * planned.length,
        length=planned.length,
        labelled=images * planned.sequences.labelled,
        images=images,
    )
    wide = machine.peak("float32")
    assert wide is not None
    moved = update_bytes(planned, settings, sharing=sharing)
    return StepTime(
        flops=flops,
        useful_flops=useful,
        compute=flops / (share * peak),
        traffic=traffic_seconds(planned, settings, machine=machine, sharing=sharing),
        update=moved / (BANDWIDTH_SHARE * bandwidth)
        + muon_flops(planned.parts.all) / (COMPUTE_SHARE[machine.device_type, "float32"] * wide),
        share=share,
        peak=peak,
        images=settings.batch_size,
        length=planned.length,
    )


def step_flops(planned: PlannedModel, settings: TrainSettings, *, ranks: int, sharded: bool) -> int:
    """Operations of a step's passes on each device: blocks, head, projectors of the alignment."""
    images = -(-settings.batch_size // ranks)
    rows = rows_of(settings, ranks=ranks)
    per_part = planned.traced(settings, rows=rows, sharded=sharded).flops
    aside = head_flops(planned) + projector_flops(planned)
    return round(per_part * images / rows) + images * aside


def head_flops(planned: PlannedModel) -> int:
    """Of a picture's labels: logits, the states' gradients and, where it is trained, the head's."""
    layer = output_layer(planned.model)
    rows = getattr(layer, "token_adapter", layer)
    weight: Tensor = getattr(rows, "base_layer", rows).weight  # type: ignore[assignment]
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return int(2 * (2 + trained) * planned.sequences.labelled * weight.numel())


def projector_flops(planned: PlannedModel) -> int:
    """Of a picture's aligned states: each matrix forward, for the states' gradients and for its own."""
    matrices = [p.numel() for one in planned.projectors for p in one.parameters() if p.dim() > 1]
    return 6 * planned.sequences.aligned * sum(matrices)


def muon_flops(held: tuple[Held, ...]) -> int:
    """Of orthogonalising its matrices (M, N), M <= N: five steps of 4 M^2 N + 2 M^3; every rank makes all."""
    shapes = [sorted(each.shape) for each in held if each.orthogonalised]
    return sum(NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3) for m, n in shapes)


def traffic_seconds(planned: PlannedModel, settings: TrainSettings, *, machine: Machine, sharing: Sharing) -> float:
    """Of a step's traffic between the devices of a machine whose link is known."""
    assert machine.link is not None, f"{machine.written}: no link is known"
    return traffic_bytes(planned, settings, sharing=sharing) / (LINK_SHARE * machine.link)


def traffic_bytes(planned: PlannedModel, settings: TrainSettings, *, sharing: Sharing) -> float:
    """Bytes that each device sends in a step.

    ddp: 2 (R - 1) / R float32 gradients, once. fsdp: for each micro-batch (R - 1) / R weights of w bytes, twice where
    they are let go between the passes, and as many float32 gradients. hsdp: that within groups, and between them the
    gradients of a shard once.
    """
    if sharing.ranks == 1:
        return 0.0
    held = planned.parts.all
    whole, trained = (sum(prod(each.shape) for each in held if each.trained or every) for every in (True, False))
    trained += sum(p.numel() for one in planned.projectors for p in one.parameters())
    ranks = sharing.ranks
    if not sharing.is_sharded:
        return 2 * (ranks - 1) / ranks * WIDE * trained
    w, shards = (2 if settings.precision == "bfloat16" else WIDE), sharing.shards
    parts = ceil(ceil(settings.batch_size / ranks) / rows_of(settings, ranks=ranks))
    gathers = 2 if settings.parallel.reshard else 1
    within = parts * (shards - 1) / shards * (gathers * w * whole + WIDE * trained)
    between = 2 * (sharing.replicas - 1) / sharing.replicas * WIDE * trained / shards
    return within + between


def update_bytes(planned: PlannedModel, settings: TrainSettings, *, sharing: Sharing) -> int:
    """Bytes that an update moves in each device's memory."""
    usual = ADAMW8BIT_BYTES if settings.optimizer == "adamw8bit" else ADAMW_BYTES
    aside = NORM_BYTES + AVERAGE_BYTES * len(settings.ema_decays)
    local = [(local_elements(held.shape, sharing.shards), held) for held in planned.parts.all if held.trained]
    moved = sum(count * (aside + (MUON_BYTES if held.orthogonalised else usual)) for count, held in local)
    aligning = sum(p.numel() for one in planned.projectors for p in one.parameters())
    return moved + aligning * (usual + NORM_BYTES)
