"""A plan on the screen: what is trained, memory by part, seconds and hours, the disk, what to change.

Plan (`plan.py`) --> report --> a group of lines and tables for a console
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arra.stages.plan import MachinePlan, Plan
from arra.stages.plan_machines import CPU, GIB
from arra.stages.planned_model import PlannedModel
from arra.train.memory import local_elements

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "moments of the optimiser",
    "averages": "averaged weights",
    "projector": "projector, its gradients and moments",
    "gathered": "gathered from shards, one after another",
    "activations": "activations of a micro-batch",
    "head": "logits in slices, the head's gradient",
    "update": "the optimiser's update",
    "looking": "activations of a validation batch",
    "apart": "less what is not there at the same moment",
    "reserve": "reserve for driver, NCCL, gaps (assumed)",
}
"""Fields of `Memory`, as they are shown."""
UNKNOWN = "-"


def report(found: Plan) -> Group:
    """The plan for a console: the model, how it is shared, memory, time, the disk, what to change."""
    planned, settings = found.planned, found.recipe.train
    title = found.recipe.name + (f", row {found.recipe.row}" if found.recipe.row else "")
    lines = [f"{title}: {planned.name}", *_model_lines(planned)]
    how = f"products in {settings.precision}, recompute: {settings.recompute}, optimizer: {settings.optimizer}"
    lines.append(f"rows of {planned.length:,} positions; {how}")
    lines += [f"assumed: {note}" for note in planned.notes]
    lines += [f"{each.machine.written}: {_sharing_line(planned, each)}" for each in found.machines]
    tables = [memory_table(found), painting_table(found)]
    if any(each.time is not None for each in found.machines):
        tables.append(time_table(found))
    return Group(_lines(lines), *tables, _lines([*_data_lines(found), *_probe_lines(found), *_advice(found)]))


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


def _empty_table(first: str, found: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first)
    for each in found.machines:
        table.add_column(each.machine.written, justify="right")
    return table


def memory_table(found: Plan) -> Table:
    """GiB on each device, part by part."""
    table = _empty_table("GiB on each device", found)
    for field, name in PARTS.items():
        values = [getattr(each.memory, field) for each in found.machines]
        if any(values):
            table.add_row(name, *(("-" if field == "apart" and value else "") + gib(value) for value in values))
    table.add_section()
    table.add_row("together", *(gib(each.memory.total) for each in found.machines))
    table.add_row("of", *(gib(each.machine.bytes_each) for each in found.machines))
    table.add_row("fits", *("yes" if each.fits else "no" for each in found.machines))
    table.add_row("largest micro_batch_size", *(str(each.largest or "none") for each in found.machines))
    if any(each.memory.host for each in found.machines):
        table.add_section()
        hosts = (gib(each.memory.host * each.machine.count) for each in found.machines)
        table.add_row("in the machine's own memory", *hosts)
    return table


def painting_table(found: Plan) -> Table:
    """GiB on each device while the run paints between its steps."""
    table = _empty_table("painting between steps", found)
    table.add_row("pictures together", *(str(each.painting.batch_size) for each in found.machines))
    table.add_row("cache of keys and values", *(gib(each.painting.memory.cache) for each in found.machines))
    if any(each.painting.whole_weights for each in found.machines):
        table.add_row("weights, gathered whole", *(gib(each.painting.whole_weights) for each in found.machines))
    table.add_row("together, beside what stays", *(gib(each.painting.beside) for each in found.machines))
    return table


def time_table(found: Plan) -> Table:
    """Seconds of a step and what follows from them."""
    table = _empty_table("time", found)

    def row(name: str, value: Callable[[MachinePlan], float | None], form: str = "") -> None:
        values = [value(each) for each in found.machines]
        shown = (UNKNOWN if one is None else format(one, form) if form else number(one) for one in values)
        table.add_row(name, *shown)

    def of_step(name: str) -> Callable[[MachinePlan], float | None]:
        return lambda each: None if each.time is None else float(getattr(each.time, name))

    row("seconds of a step", of_step("seconds"))
    row("  passes", of_step("compute"))
    row("  traffic between devices, behind them", of_step("traffic"))
    row("  update", of_step("update"))
    row("share of the peak in passes", of_step("share"), ".0%")
    row("MFU", of_step("mfu"), ".0%")
    row("images a second", of_step("images_per_second"))
    row("tokens a second", of_step("tokens_per_second"))
    row("hours of training", lambda each: each.hours)
    row("hours times devices", lambda each: None if each.hours is None else each.hours * each.machine.count)
    row("hours of preparing codes and features", lambda each: each.preparing_hours)
    row("hours of painting for an evaluation", lambda each: each.painting_hours)
    return table


def _data_lines(found: Plan) -> Iterator[str]:
    data, settings = found.machines[0].data, found.recipe.train
    steps = found.machines[0].steps
    length = f"{steps:,} steps" if steps is not None else str(settings.steps)
    if data.records is None:
        yield f"{length} of {settings.batch_size} pictures; how many there are is not known: {data.told_by}"
    else:
        epochs = "" if steps is None else f", {steps * settings.batch_size / data.records:,.1f} epochs"
        yield f"{length} of {settings.batch_size} pictures{epochs}; an epoch has {data.records:,} ({data.told_by})"
        yield f"store: {size(data.store_bytes * data.records)} for them before compression"
    yield (
        f"store: {data.store_bytes:,} bytes a picture, {data.variants} crop{'s' if data.variants > 1 else ''}; "
        f"checkpoints: {data.checkpoints} of {size(data.checkpoint_bytes)}; trained model: {size(data.model_bytes)}"
    )


def _probe_lines(found: Plan) -> Iterator[str]:
    probe = found.probe
    if probe is None:
        if any(each.time is None for each in found.machines):
            yield "time: only cards with a name have one, as in 8xa6000-48g"
        return
    how = "" if len(probe.blocks) == 1 else f", of {' and '.join(map(str, probe.blocks))} blocks, reckoned up to all"
    yield (
        f"probe on {probe.device}{how}: {probe.seconds:.3g} s a step of the whole batch on one device; peak "
        f"{size(probe.peak)}, the plan says {size(probe.predicted)} ({probe.error:+.1%})"
    )


def gib(count: int) -> str:
    """Bytes in GiB, with one place; of less than one two that say something."""
    return f"{count / GIB:.1f}" if count >= 0.95 * GIB or not count else f"{count / GIB:.2g}"


def number(value: float) -> str:
    """Three places that say something, and all before the point."""
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:.3g}"


def span(hours: float) -> str:
    """A length of time in hours, minutes or seconds, the largest of which there is one."""
    for seconds, unit in ((3600, "h"), (60, "min")):
        if hours * 3600 >= seconds:
            return f"{number(hours * 3600 / seconds)} {unit}"
    return f"{number(hours * 3600)} s"


def size(count: int) -> str:
    """Bytes in the largest binary unit of which there is one."""
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.1f} KiB"


def _meanwhile(found: Plan, each: MachinePlan) -> str:
    """What needs more than the steps do, and what to change."""
    if each.machine.name == CPU and each.memory.host:
        return "with a checkpoint that is being written do not: train.checkpoint_in_background=false"
    if found.recipe.train.evaluate_every_steps is not None:
        return "with painting do not: lower evaluate.batch_size"
    return "with painting do not: train.preview_every_steps=null, and paint when it is trained"


def _advice(found: Plan) -> Iterator[str]:
    for each in found.machines:
        where = each.machine.written
        if each.fits:
            yield from _faster_lines(each)
            continue
        if each.memory.total <= each.machine.bytes_each:
            yield f"{where}: the steps fit; {gib(each.needed)} GiB {_meanwhile(found, each)}"
            continue
        yield f"{where}: {gib(each.memory.total)} GiB do not fit. Each of these alone:"
        for remedy in sorted(each.remedies, key=lambda remedy: not remedy.fits):
            said = f"{gib(remedy.needed)} GiB, {'fits' if remedy.fits else 'does not fit either'}"
            if remedy.steps_fit and not remedy.fits:
                said = f"the steps fit; {gib(remedy.needed)} GiB {_meanwhile(found, each)}"
            yield f"  {remedy.what}: {said}"


def _faster_lines(each: MachinePlan) -> Iterator[str]:
    if each.time is None or not each.faster:
        return
    traffic, passes = number(each.time.traffic), number(each.time.compute)
    yield (
        f"{each.machine.written}: steps wait for traffic, {traffic} s where the passes take {passes} s. Each of these "
        "alone trains the same:"
    )
    for faster in each.faster:
        length = "" if faster.hours is None else f", {number(faster.hours)} hours"
        yield f"  {faster.what}: {number(faster.seconds)} s a step{length}, {gib(faster.needed)} GiB"


def in_short(found: Plan) -> str | None:
    """What to change on the first machine, in a line without its name; None where nothing."""
    each = found.machines[0]
    if each.fits:
        if each.time is None or not each.faster:
            return None
        best = each.faster[0]
        return f"waits for traffic; {each.time.seconds / best.seconds:.1f} times as fast with {best.what}"
    if each.memory.total <= each.machine.bytes_each:
        return f"steps fit, but {_meanwhile(found, each)}"
    fitting = next((remedy.what for remedy in each.remedies if remedy.fits), None)
    return "does not fit, whatever is changed" if fitting is None else f"fits with {fitting}"
