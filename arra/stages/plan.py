"""What a training would take of some devices, before anything is bought, rented or started: `arra plan`.

    recipe, devices --> the model on the meta device --> arra.train.memory --> a table, and what to change

No store is read and no weights.
Letters: B rows of a micro-batch.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arra.config import Recipe
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.settings import Settings
from arra.stages.planned_model import PlannedModel, planned_model
from arra.train.memory import Memory, Sharing, largest_rows, local_elements, training_memory
from arra.train.parallel import SHARDED, chosen_kind, count_groups
from arra.train.savings import Saving, rows_of, savings
from arra.train.settings import TrainSettings

S = TypeVar("S", bound=Settings)
GIB = 2**30
GPUS = {
    "a10": 24, "a100": 80, "a40": 48, "a6000": 48, "b200": 180, "h100": 80, "h200": 141, "l4": 24, "l40s": 48,
    "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "t4": 16, "v100": 32,
}  # fmt: skip
"""Memory of devices by name, GiB."""
WRITTEN = re.compile(r"(\d{1,6})\s*x\s*(\d+(?:\.\d+)?|[a-z]+\d+[a-z]*)", re.IGNORECASE)
MOST_DEVICES = 1024
"""Up to which it is looked how many devices would do."""
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "moments of the optimiser",
    "averages": "averaged weights",
    "projector": "projector, its gradients and moments",
    "gathered": "gathered from shards, one after another",
    "activations": "activations of a micro-batch",
    "head": "loss: logits in slices, the head's gradient",
    "reserve": "reserve for driver, NCCL, gaps (assumed)",
}
"""Fields of `Memory`, as they are shown."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind that train together."""

    written: str
    count: int
    bytes_each: int


@dataclass(frozen=True)
class Remedy:
    """A change, and what it would take of each device."""

    what: str
    total: int
    fits: bool


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

    @property
    def fits(self) -> bool:
        """Whether it fits as the recipe says."""
        return self.memory.total <= self.machine.bytes_each


@dataclass(frozen=True)
class Plan:
    """What `arra plan` found."""

    recipe: Recipe
    planned: PlannedModel
    machines: tuple[MachinePlan, ...]

    @property
    def fits(self) -> bool:
        """Whether it fits one of the machines."""
        return any(each.fits for each in self.machines)


def parse_machine(written: str) -> Machine:
    """Devices as the command line names them: "4x48" (GiB each), "8xh100".

    Raises:
        ArraError: it says neither.
    """
    found = WRITTEN.fullmatch(written.strip())
    expected = "expected how many and how large, as in 4x48 (GiB), or their name, as in 8xh100"
    if found is None or not int(found[1]):
        raise ArraError(f"--gpus {written}: {expected}")
    size = found[2].lower()
    if size[0].isalpha() and size not in GPUS:
        raise ArraError(f"--gpus {written}: '{found[2]}' is unknown; known are {', '.join(GPUS)}; or write its GiB")
    gib = GPUS[size] if size in GPUS else float(size)
    if not gib:
        raise ArraError(f"--gpus {written}: {expected}")
    return Machine(written.strip(), int(found[1]), int(gib * GIB))


def plan(recipe: Recipe, *, machines: Sequence[Machine], stand_in: str | None = None) -> Plan:
    """What the recipe's training takes on each machine.

    `stand_in` ("chameleon-7b", "chameleon-34b") takes the place of a language model whose folder is not there; of a
    recipe with Chameleon's tokenizer the 7B does so unasked.

    Raises:
        ArraError: the recipe fits no model, its language model is not there, or its parallelism not the machine.
    """
    planned = planned_model(recipe, stand_in)
    return Plan(recipe, planned, tuple(plan_machine(recipe, planned, machine=machine) for machine in machines))


def plan_machine(recipe: Recipe, planned: PlannedModel, *, machine: Machine) -> MachinePlan:
    """The training of a model on one machine, and what to change where it does not fit.

    Raises:
        ArraError: settings of parallelism that do not fit each other or the machine.
    """
    sharing, rows = sharing_on(machine, recipe.train, planned=planned), rows_of(recipe.train, ranks=machine.count)
    memory_with = _memory_with(planned, recipe.train, sharing)
    memory, share = memory_with(rows), -(-recipe.train.batch_size // machine.count)
    largest = largest_rows(memory_with, machine.bytes_each, most=share)
    remedies: tuple[Remedy, ...] = ()
    if memory.total > machine.bytes_each:
        remedies = tuple(_remedies(recipe, planned, machine=machine, sharing=sharing))
        if largest:
            fewer = Remedy(f"train.micro_batch_size={largest}", memory_with(largest).total, fits=True)
            remedies = (fewer, *remedies)
    return MachinePlan(machine, sharing, rows, memory, largest, remedies)


def _memory_with(planned: PlannedModel, settings: TrainSettings, sharing: Sharing) -> Callable[[int], Memory]:
    @cache
    def memory_with(rows: int) -> Memory:
        return training_memory(
            planned.model,
            settings,
            sharing=sharing,
            passes=planned.passes(settings, rows=rows, sharded=sharing.is_sharded),
            sequences=planned.sequences,
            rows=rows,
            projectors=planned.projectors,
            four_bit=planned.four_bit,
        )

    return memory_with


def sharing_on(machine: Machine, settings: TrainSettings, *, planned: PlannedModel) -> Sharing:
    """How the machine's devices share the training, chosen as `arra train` chooses.

    Raises:
        ArraError: settings that do not fit each other or the machine, or shards of weights in four bits.
    """
    parallel = settings.parallel
    ranks = Ranks(size=machine.count, local_size=machine.count)
    everything = planned.parts.all
    whole = sum(int((held.bytes_each + 12 * held.trained) * local_elements(held.shape, 1)) for held in everything)
    kind = chosen_kind(
        settings,
        ranks=ranks,
        state_bytes=whole,
        device_bytes=machine.bytes_each,
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

    def tried(what: str, changes: Mapping[str, Any], count: int = machine.count) -> Remedy:
        changed, devices = _changed(recipe, changes), replace(machine, count=count)
        other = any(key.startswith("model.") for key in changes)
        model = planned_model(changed, planned.name) if other else planned
        how, rows = sharing_on(devices, changed.train, planned=model), rows_of(changed.train, ranks=count)
        total = _memory_with(model, changed.train, how)(rows).total
        return Remedy(what, total, total <= machine.bytes_each)

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


def report(found: Plan) -> Group:
    """The plan for a console: the model, how it is shared, the table of memory, what to change."""
    planned, settings = found.planned, found.recipe.train
    title = found.recipe.name + (f", row {found.recipe.row}" if found.recipe.row else "")
    lines = [f"{title}: {planned.name}", *_model_lines(planned)]
    how = f"products in {settings.precision}, recompute: {settings.recompute}, optimizer: {settings.optimizer}"
    lines.append(f"rows of {planned.length:,} positions; {how}")
    lines += [f"assumed: {note}" for note in planned.notes]
    lines += [f"{each.machine.written}: {_sharing_line(planned, each)}" for each in found.machines]
    return Group(_lines(lines), _table(found), _lines(list(_advice(found))))


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), no_wrap=True, overflow="ignore")  # each is one line, however wide the screen


def _model_lines(planned: PlannedModel) -> list[str]:
    def count(group: Sequence[Any]) -> int:
        return sum(local_elements(held.shape, 1) for held in group)

    everything = planned.parts.all
    trained = count([held for held in everything if held.trained])
    sizes = [count(block) for block in planned.parts.blocks]
    size = f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    outside = f"{count(planned.parts.root):,} outside of them (embeddings, last norm, head)"
    lines = [
        f"{count(everything):,} parameters, {trained:,} of them trained",
        f"{len(sizes)} blocks of {size}; {outside}",
    ]
    if planned.projectors:
        aside = sum(parameter.numel() for one in planned.projectors for parameter in one.parameters())
        lines.append(f"projector: {aside:,}, thrown away after training")
    return lines


def _sharing_line(planned: PlannedModel, found: MachinePlan) -> str:
    sharing = found.sharing
    rows = f"micro-batches of {found.rows} row{'s' if found.rows > 1 else ''}"
    if not sharing.is_sharded:
        devices = f"ddp, all weights on each of {sharing.ranks} devices" if sharing.ranks > 1 else "one device"
        return f"{devices}; {rows}"
    local = sum(local_elements(held.shape, sharing.shards) for held in planned.parts.all)
    groups = f" in {sharing.replicas} groups" if sharing.kind == "hsdp" else ""
    gathers = len(planned.parts.blocks) + 1
    return f"{sharing.kind}{groups}, {gathers} gathers, {local:,} parameters on each of {sharing.ranks} devices; {rows}"


def _table(found: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("GiB on each device")
    for each in found.machines:
        table.add_column(each.machine.written, justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    for field, name in PARTS.items():
        values = [getattr(each.memory, field) for each in found.machines]
        if any(values):
            row(name, [gib(value) for value in values])
    table.add_section()
    row("together", [gib(each.memory.total) for each in found.machines])
    row("of", [gib(each.machine.bytes_each) for each in found.machines])
    row("fits", ["yes" if each.fits else "no" for each in found.machines])
    row("largest micro_batch_size", [str(each.largest or "none") for each in found.machines])
    if any(each.memory.host for each in found.machines):
        table.add_section()
        row("in the machine's own memory", [gib(each.memory.host * each.machine.count) for each in found.machines])
    return table


def gib(count: int) -> str:
    """Bytes in GiB, with one place."""
    return f"{count / GIB:.1f}" if count >= 0.05 * GIB or not count else "<0.1"


def _advice(found: Plan) -> Iterator[str]:
    for each in found.machines:
        if each.fits:
            continue
        yield f"{each.machine.written}: {gib(each.memory.total)} GiB do not fit. Each of these alone:"
        for remedy in sorted(each.remedies, key=lambda remedy: not remedy.fits):
            yield f"  {remedy.what}: {gib(remedy.total)} GiB, {'fits' if remedy.fits else 'does not fit either'}"
