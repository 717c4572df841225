"""Real steps of a planned training on the device that is here: `arra plan demo --gpu cpu --probe`.

    a model on the meta device --> random weights, random batches --> Trainer.train_step --> seconds, peak memory

No weights and no store are read. What does not fit the device is tried with fewer blocks, at two depths: further blocks
take as much as those between.
Letters: B rows of a micro-batch, T positions of a sequence, F feature.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arra.config import Recipe
from arra.data.batches import NOTHING, TrainBatch
from arra.distributed import own_device, set_threads
from arra.errors import ArraError
from arra.runs import Run
from arra.stages.makers import feature_sizes, used_choices
from arra.stages.plan_machines import GIB, memory_here
from arra.stages.planned_model import FEATURE_SIZE, PlannedModel, cut_to
from arra.train.alignment import build_alignment
from arra.train.allocations import allocations
from arra.train.loop import Trainer
from arra.train.settings import AlignSettings

T = TypeVar("T", bound=nn.Module)

STEPS = 20
"""Of a probe, after those whose memory is watched."""
WATCHED_STEPS = 2
"""The first makes the optimiser's moments, the second has them."""
DEPTHS = (2, 4)
"""Blocks of a model whose whole does not fit."""
SAMPLE = 256
"""Feature vectors on which target spaces are fitted."""
DEVIATION = 0.02
"""Of random weights."""
PATCHES = 196
"""Of a teacher whose patches nobody has counted."""
ROOM = 0.8
"""Share of the device's memory that a probe may need by the plan."""


@dataclass(frozen=True)
class Probe:
    """What real steps took."""

    device: str
    blocks: tuple[int, ...]
    """Depths that were tried; several where the whole does not fit."""
    seconds: float
    """Of a step of the whole model, the median."""
    peak: int
    """Bytes of tensors at the most, of the whole model; on a CPU of what torch's allocator gave."""
    predicted: int
    """The same by the plan, without its reserve."""

    @property
    def error(self) -> float:
        """How much more the plan says than was measured, as a share of the latter."""
        return self.predicted / self.peak - 1


@dataclass(frozen=True)
class RandomBatches:
    """Batches of random codes, one like the other, as a training reads them."""

    planned: PlannedModel
    features: Mapping[str, tuple[int, ...]]
    """Shape of a picture's features, by teacher."""
    rows: int

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        """The same whatever the rank."""
        planned, rows = self.planned, self.rows
        generator = torch.Generator().manual_seed(step)
        length, codes = planned.length + 1, planned.sequences.aligned
        first, count = planned.code_ids
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        tokens[:, -codes:] = first + torch.randint(count, (rows, codes), generator=generator)
        mask, rep = torch.zeros(2, rows, length, dtype=torch.bool)
        mask[:, -codes:] = True
        rep[:, -codes - 1] = True
        labels = torch.full_like(tokens, NOTHING)
        labels[:, -planned.sequences.labelled :] = tokens[:, -planned.sequences.labelled :]
        given = {name: torch.zeros_like(value, device="cpu") for name, value in planned.inputs(rows).items()}
        if "prefix_mask" in given:
            given["prefix_mask"].fill_(True)
        return TrainBatch(
            tokens=tokens,
            labels=labels,
            code_mask=mask,
            prefix_mask=given.get("prefix_mask"),
            features={name: torch.randn(rows, *shape, generator=generator) for name, shape in self.features.items()},
            rows=torch.arange(rows),
            caption=given.get("caption"),
            null_caption=given.get("null_caption"),
            rep_mask=rep,
            grid=planned.grid,
            dropout_seeds=torch.randint(2**31, (rows,), generator=generator),
        )


def probe(recipe: Recipe, planned: PlannedModel, *, peak_of: Callable[[PlannedModel], int]) -> Probe:
    """Seconds and peak memory of steps on the device of `train.device`, alone; of two depths if the whole does not fit.

    `peak_of` is the plan's number for a model on one such device, without the reserve. A batch has the rows that one
    device would take of the recipe's: `train.batch_size` of them.

    Raises:
        ArraError: weights in four bits, or not even a few blocks fit.
    """
    if planned.four_bit:
        raise ArraError("--probe: random weights are not made in four bits; try it with model.llm.four_bit=false")
    set_threads(recipe.train.threads)
    device = own_device(recipe.train.device)
    room, depth = ROOM * memory_here(device), len(planned.model.blocks)
    whole = peak_of(planned)
    depths = DEPTHS if whole > room and depth > DEPTHS[1] else (depth,)
    models = [planned if count == depth else cut_to(planned, count, settings=recipe.train) for count in depths]
    if (needed := peak_of(models[-1])) > room:
        raise ArraError(
            f"--probe: {needed / GIB:.1f} GiB with {depths[-1]} blocks do not fit the {room / GIB:.1f} GiB that a "
            f"probe may take of {device}; lower train.micro_batch_size"
        )
    found = [measured(recipe, model, device=device) for model in models]
    return Probe(
        device=str(device),
        blocks=depths,
        seconds=_deeper([each.seconds for each in found], depth),
        peak=int(_deeper([float(each.peak) for each in found], depth)),
        predicted=whole,
    )


def _deeper(values: Sequence[float], depth: int) -> float:
    """What a model of this depth takes, by what two shallower ones do; of one model its own."""
    if len(values) == 1:
        return values[0]
    shallow, deep = DEPTHS
    return values[1] + (values[1] - values[0]) * (depth - deep) / (deep - shallow)


@dataclass(frozen=True)
class Measured:
    """Of real steps."""

    seconds: float
    """The median."""
    peak: int
    """Bytes of tensors at the most."""


def measured(recipe: Recipe, planned: PlannedModel, *, device: torch.device, steps: int = STEPS) -> Measured:
    """Seconds and peak memory of steps of this model as it is, with random weights and batches."""
    with TemporaryDirectory() as folder:
        trainer = random_trainer(recipe, planned, run=Path(folder), device=device)
        standing = standing_bytes(trainer)  # target spaces are fitted before, on the CPU and once
        with allocations(device) as allocated:
            for _ in range(WATCHED_STEPS):
                trainer.train_step()
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            trainer.train_step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return Measured(statistics.median(times), standing + allocated.peak)


def standing_bytes(trainer: Trainer) -> int:
    """Of the weights, buffers and averages that a training has before its first step, each once."""
    parts = [trainer.model] if trainer.alignment is None else [trainer.model, trainer.alignment]
    held = [value for part in parts for value in (*part.parameters(), *part.buffers())]
    unique = {value.untyped_storage().data_ptr(): value for value in (*held, *trainer.tensors().values())}
    return sum(value.untyped_storage().nbytes() for value in unique.values())


def random_trainer(
    recipe: Recipe, planned: PlannedModel, *, run: Path, device: torch.device, steps: int = WATCHED_STEPS + STEPS
) -> Trainer:
    """A training of so many steps with random weights and batches, on one device; nothing is validated or painted."""
    records = recipe.train.batch_size  # durations in epochs do not change what a step takes
    settings = recipe.resolved(records).train.model_copy(update={"steps": steps})
    torch.manual_seed(0)
    model = materialised(planned.model, device=device)
    alignment, shapes = None, feature_shapes(recipe, planned)
    if recipe.align is not None:
        sample = {name: torch.randn(SAMPLE, *shape) for name, shape in shapes.items()}
        terms = recipe.resolved(records).align
        assert terms is not None
        terms = _within(terms, len(model.blocks))
        alignment = build_alignment(terms, sample, hidden_size=model.hidden_size, seed=settings.seed).to(device)
    return Trainer(
        model=model,
        alignment=alignment,
        batches=RandomBatches(planned, shapes, settings.batch_size),
        validation=(),
        settings=settings,
        run=Run(run),
        device=device,
    )


def _within(align: AlignSettings, depth: int) -> AlignSettings:
    """The alignment with layers that a model of this depth has: where states are taken makes hardly a difference."""
    more = {name: term.model_copy(update={"layer": min(term.layer, depth)}) for name, term in align.more.items()}
    return align.model_copy(update={"layer": min(align.layer, depth), "more": more})


def feature_shapes(recipe: Recipe, planned: PlannedModel) -> dict[str, tuple[int, ...]]:
    """Shape of a picture's features by teacher: (F,), or (P, F) of patches or bands."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, choice in used_choices(recipe).items():
        size = feature_sizes(recipe)[name] or FEATURE_SIZE
        codes = planned.sequences.aligned
        patches = codes if isqrt(codes) ** 2 == codes else PATCHES
        count = choice.bands or (patches if choice.output == "patches" else None)
        shapes[name] = (size,) if count is None else (count, size)
    return shapes


def materialised(model: T, *, device: torch.device) -> T:
    """A copy of a model on the meta device with small random numbers for weights; what was shared still is."""
    copy, made = deepcopy(model), dict[Tensor, Tensor]()

    def real(value: Tensor) -> Tensor:
        found = torch.zeros(value.shape, dtype=value.dtype, device=device)
        return found.normal_(std=DEVIATION) if value.is_floating_point() else found

    for part in copy.modules():
        groups: list[dict[str, Any]] = [part._parameters, part._buffers]
        for held in groups:
            for name, value in held.items():
                if value is None:
                    continue
                if value not in made:
                    own = real(value)
                    is_weight = isinstance(value, nn.Parameter)
                    made[value] = nn.Parameter(own, requires_grad=value.requires_grad) if is_weight else own
                held[name] = made[value]
    return copy
