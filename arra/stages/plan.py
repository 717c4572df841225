"""What a training would take of some machines, before anything is bought, rented or started: `arra plan`.

    recipe, machines --> the model on the meta device --> memory, seconds of a step, hours, bytes on the disk

No weights are read, of a store only how many pictures it has. `plan_report.py` shows what comes back.
Letters: B rows of a micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch

from arra.config import Recipe
from arra.data.store import Store
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.settings import Settings
from arra.stages.plan_data import DataPlan, data_plan
from arra.stages.plan_machines import CPU, Machine, device_kind_here
from arra.stages.plan_painting import Painting, plan_painting
from arra.stages.plan_probe import Probe, probe
from arra.stages.plan_speed import COMPUTE_SHARE, StepTime, step_time
from arra.stages.plan_traffic import LEAST_GAIN, Faster, changes_of_traffic, waits_for_traffic
from arra.stages.planned_model import KnownPasses, PlannedModel, planned_model, with_known_passes
from arra.train.durations import to_steps
from arra.train.memory import Memory, Sharing, largest_rows, local_elements
from arra.train.parallel import SHARDED, chosen_kind, count_groups
from arra.train.savings import Saving, rows_of, savings
from arra.train.settings import TrainSettings

S = TypeVar("S", bound=Settings)
MOST_DEVICES = 1024
"""Up to which it is looked how many devices would do."""


@dataclass(frozen=True)
class Remedy:
    """A change, and what it would take of each device."""

    what: str
    needed: int
    """Bytes, for training and for painting in between."""
    fits: bool
    steps_fit: bool
    """Whether it would without painting in between."""


@dataclass(frozen=True)
class MachinePlan:
    """The training on one machine."""

    machine: Machine
    sharing: Sharing
    rows: int
    """Of a micro-batch B."""
    memory: Memory
    largest: int
    """The largest micro_batch_size that fits; 0 where none does."""
    remedies: tuple[Remedy, ...]
    """Where the steps do not fit."""
    faster: tuple[Faster, ...]
    """Where it fits and steps wait for traffic: what lets them wait less, the fastest first."""
    painting: Painting
    """With the largest batch that the run paints."""
    time: StepTime | None
    """None where nothing but the devices' memory is known."""
    steps: int | None
    """Of the training; None where its length is in epochs and nobody knows the pictures."""
    data: DataPlan

    @property
    def fits(self) -> bool:
        """Whether it fits as the recipe says; on a CPU with the copy of a checkpoint that is being written."""
        return self.needed <= self.machine.bytes_each

    @property
    def needed(self) -> int:
        """Bytes of each device, for training and for painting in between."""
        return needed_bytes(self.memory, self.painting, self.machine)

    @property
    def hours(self) -> float | None:
        """Of the training; None where steps or their time are not known."""
        return None if self.time is None or self.steps is None else self.steps * self.time.seconds / 3600

    @property
    def preparing_hours(self) -> float | None:
        """Of codes and features of an epoch's pictures, on all devices."""
        data, time = self.data, self.time
        if time is None or data.records is None or data.flops is None:
            return None
        peak = self.machine.peak("float32")
        assert peak is not None
        share = COMPUTE_SHARE[self.machine.device_type, "float32"]
        return data.records * data.flops / (share * peak) / self.machine.count / 3600

    @property
    def painting_hours(self) -> float | None:
        """Of an evaluation's pictures, on one device; None where it paints whole splits."""
        return self.painting.hours


def needed_bytes(memory: Memory, painting: Painting, machine: Machine) -> int:
    """Bytes of each device, for training and for painting in between; a CPU also holds what a checkpoint copies."""
    idle = memory.state - memory.let_go + memory.reserve
    painted = idle + painting.beside if painting.between else 0
    return max(memory.total, painted) + (memory.host if machine.name == CPU else 0)


@dataclass(frozen=True)
class Plan:
    """What `arra plan` found."""

    recipe: Recipe
    planned: PlannedModel
    machines: tuple[MachinePlan, ...]
    probe: Probe | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits one of the machines."""
        return any(each.fits for each in self.machines)


def plan(
    recipe: Recipe,
    *,
    machines: Sequence[Machine],
    stand_in: str | None = None,
    store: Store | None = None,
    probing: bool = False,
    planned: PlannedModel | None = None,
) -> Plan:
    """What the recipe's training takes on each machine.

    `stand_in` ("chameleon-7b", "chameleon-34b") takes the place of a language model whose folder is not there; of a
    recipe with Chameleon's tokenizer the 7B does so unasked. `planned` is the recipe's model where somebody has it.
    `store` tells how many pictures there are. With `probing` real steps are made here, and the share of the peak that
    they reach holds for machines of this kind.

    Raises:
        ArraError: the recipe fits no model, its language model is not there, its parallelism does not fit the machine,
            or a probe does not fit this one.
    """
    planned = planned or planned_model(recipe, stand_in)
    found = probe(recipe, planned, peak_of=lambda model: alone(recipe, model)) if probing else None
    told: dict[str, Any] = {"data": data_plan(recipe, planned, store=store)}
    plans = [
        plan_machine(recipe, planned, machine=machine, share=_measured_share(recipe, planned, found, machine), **told)
        for machine in machines
    ]
    return Plan(recipe, planned, tuple(plans), found)


def alone(recipe: Recipe, planned: PlannedModel, *, device_type: str | None = None) -> int:
    """Bytes of tensors that steps take at most on one device, this one's kind unless told; nothing is validated."""
    rows, kind = rows_of(recipe.train, ranks=1), device_type or device_kind_here(recipe.train.device)
    memory = planned.memory(recipe.train, sharing=Sharing(), rows=rows, device_type=kind, validates=False)
    return memory.total - memory.reserve


def _measured_share(recipe: Recipe, planned: PlannedModel, found: Probe | None, machine: Machine) -> float | None:
    """The share of the peak that a probe's passes reached, where the machine has such devices as it ran on."""
    if found is None or not machine.has_devices_like(torch.device(found.device)):
        return None
    assumed = step_time(planned, recipe.train, machine=replace(machine, count=1), sharing=Sharing())
    if assumed is None:
        return None
    passes = max(found.seconds - assumed.update, found.seconds / 2)  # an update is never most of a step
    return assumed.flops / passes / assumed.peak


def plan_machine(
    recipe: Recipe, planned: PlannedModel, *, machine: Machine, data: DataPlan | None = None, share: float | None = None
) -> MachinePlan:
    """The training of a model on one machine, and what to change where it does not fit or waits for traffic.

    `share` of the peak is what passes reach, assumed where nobody measured it.

    Raises:
        ArraError: settings of parallelism that do not fit each other or the machine.
    """
    found = _plan_as_it_is(recipe, planned, machine=machine, data=data or data_plan(recipe, planned), share=share)
    if found.memory.total > machine.bytes_each:
        remedies = list(_remedies(recipe, planned, machine=machine, sharing=found.sharing))
        if found.largest:
            memory = _memory_with(planned, recipe.train, found.sharing, machine)(found.largest)
            needed = needed_bytes(memory, found.painting, machine)
            what = f"train.micro_batch_size={found.largest}"
            remedies.insert(0, Remedy(what, needed, needed <= machine.bytes_each, steps_fit=True))
        return replace(found, remedies=tuple(remedies))
    if found.fits and waits_for_traffic(found.time, found.sharing):
        faster = _faster(recipe, planned, found, share=share)
        return replace(found, faster=tuple(sorted(faster, key=lambda each: each.seconds)))
    return found


def _plan_as_it_is(
    recipe: Recipe, planned: PlannedModel, *, machine: Machine, data: DataPlan, share: float | None
) -> MachinePlan:
    """The training on one machine, without advice."""
    settings = recipe.train
    sharing, rows = sharing_on(machine, settings, planned=planned), rows_of(settings, ranks=machine.count)
    memory_with = _memory_with(planned, settings, sharing, machine)
    share_of_batch = -(-settings.batch_size // machine.count)
    return MachinePlan(
        machine=machine,
        sharing=sharing,
        rows=rows,
        memory=memory_with(rows),
        largest=largest_rows(memory_with, machine.bytes_each, most=share_of_batch),
        remedies=(),
        faster=(),
        painting=plan_painting(recipe, planned, machine=machine, sharing=sharing),
        time=step_time(planned, settings, machine=machine, sharing=sharing, share=share),
        steps=_steps(settings, data.records),
        data=data,
    )


def _faster(recipe: Recipe, planned: PlannedModel, found: MachinePlan, *, share: float | None) -> Iterator[Faster]:
    """What fits as well and waits less for traffic."""
    machine, time = found.machine, found.time
    assert time is not None
    told: dict[str, Any] = {"machine": machine, "sharing": found.sharing}
    for changes in changes_of_traffic(planned, recipe.train, **told, compute=time.compute, largest=found.largest):
        changed = _changed(recipe, changes)
        other = _plan_as_it_is(changed, planned, machine=machine, data=found.data, share=share)
        assert other.time is not None
        if other.fits and other.time.seconds < (1 - LEAST_GAIN) * time.seconds:
            what = Saving(changes, same=True).written
            yield Faster(what, other.needed, other.time.seconds, other.hours)


def _steps(settings: TrainSettings, records: int | None) -> int | None:
    """The training's steps; None where they are in epochs and nobody knows the pictures."""
    if isinstance(settings.steps, int):
        return settings.steps
    try:
        return to_steps(settings.steps, batch_size=settings.batch_size, records=records, steps=None)
    except ValueError:
        return None


def _memory_with(
    planned: PlannedModel, settings: TrainSettings, sharing: Sharing, machine: Machine
) -> Callable[[int], Memory]:
    @cache
    def memory_with(rows: int) -> Memory:
        return planned.memory(settings, sharing=sharing, rows=rows, device_type=machine.device_type)

    return memory_with


def sharing_on(machine: Machine, settings: TrainSettings, *, planned: PlannedModel) -> Sharing:
    """How the machine's devices share the training, chosen as `arra train` chooses.

    Raises:
        ArraError: settings that do not fit each other or the machine, or shards of weights in four bits.
    """
    parallel = settings.parallel
    if machine.count > settings.batch_size:
        raise ArraError(
            f"train.batch_size: {settings.batch_size} pictures cannot be shared by {machine.count} devices; raise it, "
            "or take fewer"
        )
    ranks = Ranks(size=machine.count, local_size=machine.count)
    everything = planned.parts.all
    whole = sum(int((held.bytes_each + 12 * held.trained) * local_elements(held.shape, 1)) for held in everything)
    kind = chosen_kind(
        settings,
        ranks=ranks,
        state_bytes=whole,
        device_bytes=None if machine.name == CPU else machine.bytes_each,
        may_shard=not planned.four_bit,
    )
    if kind in SHARDED and planned.four_bit:
        raise ArraError(
            f"train.parallel.kind: {kind}: weights in four bits cannot be sharded; use ddp, or "
            "model.llm.four_bit: false"
        )
    return Sharing(kind, machine.count, count_groups(parallel, ranks) if kind == "hsdp" else 1)


def _remedies(recipe: Recipe, planned: PlannedModel, *, machine: Machine, sharing: Sharing) -> Iterator[Remedy]:
    """What would take less: settings, each alone and some together, or more devices."""
    known: KnownPasses = {}

    def tried(what: str, changes: Mapping[str, Any], count: int = machine.count) -> Remedy:
        changed, devices = _changed(recipe, changes), replace(machine, count=count)
        other = any(key.startswith("model.") for key in changes)
        model = with_known_passes(planned_model(changed, planned.name), changed, known=known) if other else planned
        how, rows = sharing_on(devices, changed.train, planned=model), rows_of(changed.train, ranks=count)
        painting = plan_painting(changed, model, machine=devices, sharing=how)
        memory = _memory_with(model, changed.train, how, devices)(rows)
        needed, most = needed_bytes(memory, painting, devices), machine.bytes_each
        return Remedy(what, needed, needed <= most, steps_fit=memory.total <= most)

    llm = recipe.model.llm
    found = savings(
        recipe.train,
        ranks=machine.count,
        sharded=sharing.is_sharded,
        language_model=None if llm is None else llm.train,
        four_bit=planned.four_bit,
    )
    together: dict[str, Any] = {}
    for each in found:
        if "train.micro_batch_size" in each.changes:  # alone it is told with the most that fits
            together["train.micro_batch_size"] = 1
            continue
        yield tried(each.written, each.changes)
        if each.same and "train.parallel.offload" not in each.changes:
            together |= each.changes
    if len(together) > 1:
        yield tried(Saving(together, same=True).written, together)
    more = 2 * machine.count
    while sharing.is_sharded and more <= min(MOST_DEVICES, recipe.train.batch_size):
        grown = tried(f"{more} such devices", {}, more)
        if grown.fits:
            yield grown
            break
        more *= 2


def _changed(settings: S, changes: Mapping[str, Any]) -> S:
    """The settings with some values, by dotted keys, replaced; not checked anew."""
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        inner = _changed(getattr(settings, name), {rest: value}) if rest else value
        settings = settings.model_copy(update={name: inner})
    return settings
