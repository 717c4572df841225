"""What painting takes while a planned training looks at itself and when it is evaluated: memory and seconds.

    planned model, sampling settings, Machine --> PaintingMemory (arra.sample.memory), seconds of a batch

Decoding reads all weights and the cache for every token, which is what it waits for.
Letters: R rows, P codes of a picture.
"""

from dataclasses import dataclass, replace

import torch

from arra.config import Recipe
from arra.models import CausalLM
from arra.sample.memory import PaintingMemory, painting_memory
from arra.stages.plan_machines import Machine
from arra.stages.plan_speed import COMPUTE_SHARE
from arra.stages.planned_model import PROMPT_TOKENS, PlannedModel
from arra.stages.train import NUM_PREVIEWS
from arra.train.memory import WIDE, Sharing

BANDWIDTH_SHARE = 0.6
"""Of a memory's nominal rate that decoding reaches: assumed."""


@dataclass(frozen=True)
class Painting:
    """What painting takes of a device."""

    batch_size: int
    """Pictures painted together."""
    memory: PaintingMemory
    whole_weights: int
    """Bytes of weights that shards are gathered to meanwhile."""
    seconds: float | None
    """Of a batch; None where nothing but the device's memory is known."""
    between: bool
    """Whether the run paints between its steps."""
    pictures: int | None
    """That an evaluation paints; None where it takes whole splits."""

    @property
    def beside(self) -> int:
        """Bytes beside what stays from step to step."""
        return self.memory.passing + self.memory.copies + self.whole_weights

    @property
    def hours(self) -> float | None:
        """Of an evaluation's pictures on one device."""
        if self.seconds is None or self.pictures is None:
            return None
        return self.seconds * self.pictures / self.batch_size / 3600


def plan_painting(recipe: Recipe, planned: PlannedModel, *, machine: Machine, sharing: Sharing) -> Painting:
    """What the largest batch takes that the run paints: of an evaluation, or of a preview where none is made."""
    looks = recipe.train.evaluate_every_steps is not None
    batch = min(recipe.evaluate.batch_size, recipe.train.evaluate_images) if looks else NUM_PREVIEWS
    memory = painting_memory(
        planned.model,
        batch_size=batch,
        settings=recipe.sample,
        grid=planned.grid,
        prefix_length=PROMPT_TOKENS if isinstance(planned.model, CausalLM) else None,
        device=torch.device(machine.device_type),
    )
    narrow = 2 if recipe.train.precision == "bfloat16" else WIDE
    if sharing.is_sharded:  # what is gathered has the products' type, and so has the memory of attention
        told = {name: getattr(memory, name) * narrow // WIDE for name in ("copies", "cache", "prefixes", "reading")}
        memory = replace(memory, **told)
    count = sum(parameter.numel() for parameter in planned.model.parameters())
    chosen, most = recipe.evaluate, recipe.evaluate.max_images
    pictures = None if most is None else most * len(chosen.splits) * len(chosen.cfg_scales)
    return Painting(
        batch_size=batch,
        memory=memory,
        whole_weights=narrow * count if sharing.is_sharded else 0,
        seconds=decoding_seconds(recipe, planned, machine=machine, memory=memory, batch_size=batch),
        between=looks or recipe.train.preview_every_steps is not None,
        pictures=pictures,
    )


def decoding_seconds(
    recipe: Recipe, planned: PlannedModel, *, machine: Machine, memory: PaintingMemory, batch_size: int
) -> float | None:
    """Seconds of a batch's codes, one after another; None where nothing but the device's memory is known.

    Each reads all weights and, on average, half the cache; rows that are many compute longer than that takes.
    """
    bandwidth, peak = machine.bandwidth, machine.peak(recipe.train.precision)
    if bandwidth is None or peak is None:
        return None
    codes, narrow = planned.grid[0] * planned.grid[1], 2 if recipe.train.precision == "bfloat16" else WIDE
    count = sum(parameter.numel() for parameter in planned.model.parameters())
    guided = any(scale != 1 for scale in recipe.sample.cfg_scales(codes))
    read = (narrow * count + memory.cache / 2) / (BANDWIDTH_SHARE * bandwidth)
    share = COMPUTE_SHARE[machine.device_type, recipe.train.precision]
    computed = 2 * count * batch_size * (1 + guided) / (share * peak)
    return codes * max(read, computed)
