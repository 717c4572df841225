"""What a training would take of some devices, before anything is bought, rented or started: `arra plan`.

    recipe, devices --> the model on the meta device --> arra.train.memory --> a table, and what to change

No store is read and no weights; where the recipe's language model is not there yet, published sizes stand in for it.
Letters: B rows of a micro-batch, S positions of a row, R devices.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from arra.config import Recipe
from arra.data.layout import ImageLayout
from arra.distributed import Ranks
from arra.encoders import SPECS, encoder_spec
from arra.errors import ArraError
from arra.models import CausalLM, Painter
from arra.models.chameleon import CHAMELEON_SIZES, build_chameleon, chameleon_settings
from arra.models.language_folder import CARD_FILE
from arra.stages.language import DTYPES, first_language_model, language_card, language_section, prepare_language_model
from arra.stages.makers import used_choices
from arra.stages.model import build_model, decoder_settings, square, tokenizer_network
from arra.train.memory import (
    Memory,
    Parts,
    Sequences,
    Sharing,
    largest_rows,
    local_elements,
    parts_of,
    projectors_of,
    training_memory,
)
from arra.train.parallel import SHARDED, chosen_kind
from arra.train.settings import TrainSettings

GIB = 2**30
GPUS = {
    "a10": 24, "a100": 80, "a40": 48, "a6000": 48, "b200": 180, "h100": 80, "h200": 141, "l4": 24, "l40s": 48,
    "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "t4": 16, "v100": 32,
}  # fmt: skip
"""Memory of devices by name, GiB."""
WRITTEN = re.compile(r"(\d{1,6})\s*x\s*(\d+(?:\.\d+)?|[a-z]+\d+[a-z]*)", re.IGNORECASE)
PROMPT_TOKENS = 128
"""Of a language model's prompt, where nobody looked at the data: a chest X-ray's findings."""
FEATURE_SIZE = 1024
"""Of a teacher whose features nobody has seen."""
MOST_DEVICES = 1024
"""Up to which it is looked how many devices would do."""
CHAMELEON_LAYOUT = {
    "family": "lumina", "bos": 0, "separator": 8710, "begin_image": 8197, "end_image": 8196, "new_line": 8803,
    "first_size": 8804, "size_step": 2, "num_sizes": 64, "closing": (8710,), "rep_id": 8799, "first_code": 4,
    "num_codes": 8192, "max_positions": 4096,
}  # fmt: skip
"""Lumina-mGPT's layout, with which ARRA trains; ids of codes are in another order, which takes no memory."""
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
class PlannedModel:
    """What is trained, on the meta device."""

    name: str
    model: Painter
    parts: Parts
    sequences: Sequences
    projectors: tuple[Any, ...]
    four_bit: bool
    length: int
    """Positions S of a row."""
    notes: tuple[str, ...]
    """What was assumed."""


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
    return Plan(recipe, planned, tuple(plan_machine(recipe, planned, machine) for machine in machines))


def plan_machine(recipe: Recipe, planned: PlannedModel, machine: Machine) -> MachinePlan:
    """The training of a model on one machine.

    Raises:
        ArraError: settings of parallelism that do not fit each other or the machine.
    """
    settings = recipe.train
    sharing = sharing_on(planned, settings, machine)
    rows = rows_on(settings, machine)
    memory_of = _memory_of(planned, settings, sharing)
    memory, share = memory_of(rows), -(-settings.batch_size // machine.count)
    largest = largest_rows(memory_of, machine.bytes_each, most=share)
    remedies: tuple[Remedy, ...] = ()
    if memory.total > machine.bytes_each:
        told = _remedies(recipe, planned, machine, sharing, rows)
        if largest:
            smaller = Remedy(f"train.micro_batch_size={largest}", memory_of(largest).total, fits=True)
            remedies = (smaller,)
        remedies += tuple(told)
    return MachinePlan(machine, sharing, rows, memory, largest, remedies)


def _memory_of(planned: PlannedModel, settings: TrainSettings, sharing: Sharing) -> Callable[[int], Memory]:
    @cache
    def memory_of(rows: int) -> Memory:
        return training_memory(
            planned.model,
            settings,
            sharing=sharing,
            sequences=planned.sequences,
            rows=rows,
            projectors=planned.projectors,
            four_bit=planned.four_bit,
        )

    return memory_of


def rows_on(settings: TrainSettings, machine: Machine) -> int:
    """Rows of a micro-batch: as the settings say, never more than a device's part of the batch."""
    share = -(-settings.batch_size // machine.count)
    return min(share, settings.micro_batch_size or share)


def sharing_on(planned: PlannedModel, settings: TrainSettings, machine: Machine) -> Sharing:
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
    replicas = (parallel.replicas or 1) if kind == "hsdp" else 1
    return Sharing(kind, machine.count, replicas)


def _remedies(recipe: Recipe, planned: PlannedModel, machine: Machine, sharing: Sharing, rows: int) -> Iterator[Remedy]:
    """What would take less: settings, each alone and some together, more devices, fewer weights that are trained."""
    settings, more = recipe.train, machine.count

    def tried(what: str, changed: TrainSettings, how: Sharing, count: int, of: PlannedModel = planned) -> Remedy:
        total = _memory_of(of, changed, how)(count).total
        return Remedy(what, total, total <= machine.bytes_each)

    def with_parallel(**changes: Any) -> TrainSettings:
        return settings.model_copy(update={"parallel": settings.parallel.model_copy(update=changes)})

    sharded = Sharing("fsdp", machine.count)
    if settings.recompute != "full":
        yield tried("train.recompute=full", settings.model_copy(update={"recompute": "full"}), sharing, rows)
    if not sharing.is_sharded and machine.count > 1 and not planned.four_bit:
        yield tried("train.parallel.kind=fsdp", with_parallel(kind="fsdp"), sharded, rows)
    if not settings.parallel.offload and not planned.four_bit:
        how = sharing if sharing.kind == "fsdp" else sharded
        yield tried(
            "train.parallel.kind=fsdp, train.parallel.offload=true", with_parallel(kind="fsdp", offload=True), how, rows
        )
    if settings.optimizer == "adamw" and not sharing.is_sharded:
        yield tried("train.optimizer=adamw8bit", settings.model_copy(update={"optimizer": "adamw8bit"}), sharing, rows)
    least = settings.model_copy(update={"recompute": "full"})
    if (settings.recompute != "full" or rows > 1) and machine.count > 1 and not planned.four_bit:
        together = "train.recompute=full, train.micro_batch_size=1, train.parallel.kind=fsdp"
        yield tried(together, least, sharded, 1)
    while sharing.is_sharded and more < min(MOST_DEVICES, settings.batch_size):
        more = min(2 * more, MOST_DEVICES)
        found = tried(f"{more} such devices", settings, Sharing("fsdp", more), rows)
        if found.fits:
            yield found
            break
    llm = recipe.model.llm
    if llm is not None and not planned.four_bit:
        changes: dict[str, Any] = {"train": "lora", "frozen_dtype": "bfloat16"}
        for four_bit in (True,) if llm.train == "lora" else (False, True):
            what = "model.llm.train=lora, frozen_dtype=bfloat16" + (", four_bit=true" if four_bit else "")
            section = llm.model_copy(update={**changes, "four_bit": four_bit})
            model = recipe.model.model_copy(update={"llm": section})
            lean = planned_model(recipe.model_copy(update={"model": model}), planned.name)
            yield tried(what, settings, Sharing("ddp", machine.count), rows, lean)


def planned_model(recipe: Recipe, stand_in: str | None = None) -> PlannedModel:
    """The recipe's model and its sequences, without weights or data.

    Raises:
        ArraError: the recipe fits no model, or its language model is not there and nothing stands in.
    """
    if recipe.model.llm is None:
        if stand_in is not None:
            raise ArraError(f"--model {stand_in}: stands in for a language model, and the recipe trains a decoder")
        name, model, sequences, length, notes = _planned_decoder(recipe)
    else:
        name, model, sequences, length, notes = _planned_language_model(recipe, stand_in)
    projectors: tuple[Any, ...] = ()
    if recipe.align is not None:
        sizes, unknown = feature_sizes(recipe)
        projectors = projectors_of(recipe.align, sizes, hidden_size=model.hidden_size)
        notes += [f"features of '{name}' taken to be {FEATURE_SIZE} wide" for name in unknown]
    four_bit = recipe.model.llm is not None and recipe.model.llm.four_bit
    parts = parts_of(model, recipe.train, four_bit=four_bit)
    return PlannedModel(name, model, parts, sequences, projectors, four_bit, length, tuple(notes))


Described = tuple[str, Painter, Sequences, int, list[str]]


def _planned_decoder(recipe: Recipe) -> Described:
    network = tokenizer_network(recipe)
    settings = decoder_settings(recipe, num_codes=network.num_codes, downsampling=network.downsampling)
    model = build_model(recipe, settings, text=None, empty=True)
    length = settings.prefix_length + settings.num_positions - 1

    def inputs(rows: int) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            found: dict[str, Tensor] = {"tokens": torch.empty(rows, length, dtype=torch.int64)}
            if settings.condition != "class":
                found["prefix_mask"] = torch.empty(rows, settings.prefix_length, dtype=torch.bool)
            if settings.condition == "caption":
                found["caption"] = torch.empty(rows, settings.condition_length, settings.caption_dim)
                found["null_caption"] = torch.empty(rows, dtype=torch.bool)
        return found

    aligned = settings.num_positions
    name = f"llamagen-{recipe.model.size}" if recipe.model.size else "decoder"
    notes = []
    if recipe.model.condition == "class" and recipe.model.num_classes is None:
        notes.append(f"{settings.num_classes} classes taken")
    return name, model, Sequences(inputs, settings.num_positions, aligned), length, notes


def _planned_language_model(recipe: Recipe, stand_in: str | None) -> Described:
    section = language_section(recipe)
    folder = Path(section.folder)
    notes = [f"prompts taken to have {PROMPT_TOKENS} tokens"]
    wide = section.model_copy(update={"four_bit": False})  # counted as four bits later
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"llm": wide})})
    if (folder / CARD_FILE).is_file() and stand_in in (None, str(folder)):
        name, card = str(folder), language_card(recipe)
        model, layout, grid = first_language_model(recipe, card, empty=True), card.settings.layout, card.settings.grid
    else:
        name = _stand_in(recipe, stand_in)
        if stand_in is None:
            notes.insert(0, f"{folder} is not there; {name} of published sizes stands in for it")
        model = _empty_chameleon(recipe, name)
        layout, grid = model.layout, model.settings.grid
    length = min(layout.length(PROMPT_TOKENS, grid), layout.max_positions or 2**31) - 1

    def inputs(rows: int) -> Mapping[str, Tensor]:
        return {"tokens": torch.empty(rows, length, dtype=torch.int64, device="meta")}

    labelled = len(layout.image(grid)) + len(layout.closing)
    return name, model, Sequences(inputs, labelled, grid[0] * grid[1]), length, notes


def _stand_in(recipe: Recipe, asked: str | None) -> str:
    """The name of the model that stands in.

    Raises:
        ArraError: none does.
    """
    known = [f"chameleon-{size}" for size in CHAMELEON_SIZES]
    if asked is not None and asked not in known:
        raise ArraError(f"--model {asked}: unknown; known are {', '.join(known)}")
    if asked is None and recipe.tokenizer.name != "chameleon":
        raise ArraError(
            f"model.llm.folder: {language_section(recipe).folder}: no painting language model there; make it with arra "
            f"init or arra import, or let one of published sizes stand in: --model {known[0]}"
        )
    return asked or known[0]


def _empty_chameleon(recipe: Recipe, name: str) -> CausalLM:
    """Chameleon of a published size, ready to train, on the meta device; it paints the recipe's squares."""
    settings = chameleon_settings(name, CHAMELEON_SIZES[name.removeprefix("chameleon-")])
    layout = ImageLayout(**CHAMELEON_LAYOUT, pixels_per_code=tokenizer_network(recipe).downsampling)
    if recipe.has_rep:
        layout = layout.model_copy(update={"rep": layout.rep_id})
    with torch.device("meta"):
        lm = build_chameleon(settings, rows=settings.model_parallel_size, image_tokenizer=False)
        model = CausalLM(
            lm.to(DTYPES[language_section(recipe).frozen_dtype]),
            layout=layout,
            grid=square(recipe, layout.pixels_per_code),
            head_norm_rows=settings.model_parallel_size,
        )
        return prepare_language_model(recipe, model)


def feature_sizes(recipe: Recipe) -> tuple[dict[str, int], list[str]]:
    """Widths of the teachers' features, and the names of those that are not known before they are loaded."""
    sizes, unknown = {}, []
    for name, choice in used_choices(recipe).items():
        if choice.name in SPECS:
            sizes[name] = encoder_spec(choice.name).feature_size
        else:
            sizes[name] = FEATURE_SIZE
            unknown.append(name)
    return sizes, unknown


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
