"""The model of a plan: what a recipe trains, without weights or data.

No store is read; where the recipe's language model is not there yet, published sizes stand in for it.
Letters: B rows of a micro-batch, S positions of a row.
"""

from collections.abc import Callable, Hashable, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arra.config import Recipe
from arra.data.layout import Grid, ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, Painter
from arra.models.chameleon import CHAMELEON_SIZES, build_chameleon, chameleon_settings
from arra.models.language_folder import CARD_FILE
from arra.stages.language import DTYPES, first_language_model, language_card, language_section, prepare_language_model
from arra.stages.makers import feature_sizes
from arra.stages.model import build_model, decoder_settings, square, tokenizer_network
from arra.train.activations import Traced, looking_bytes, traced_passes
from arra.train.alignment import empty_projectors
from arra.train.memory import LOOKING_ROWS, Memory, Parts, Sequences, Sharing, parts_of, training_memory
from arra.train.settings import TrainSettings

PROMPT_TOKENS = 128
"""Of a language model's prompt, where nobody looked at the data: a chest X-ray's findings."""
FEATURE_SIZE = 1024
"""Of a teacher whose features nobody has seen."""
CHAMELEON_LAYOUT = {
    "family": "lumina", "bos": 0, "separator": 8710, "begin_image": 8197, "end_image": 8196, "new_line": 8803,
    "first_size": 8804, "size_step": 2, "num_sizes": 64, "closing": (8710,), "rep_id": 8799, "first_code": 4,
    "num_codes": 8192, "max_positions": 4096,
}  # fmt: skip
"""Lumina-mGPT's layout, with which ARRA trains; ids of codes are in another order, which takes no memory."""


@dataclass(frozen=True)
class PlannedModel:
    """What is trained, on the meta device."""

    name: str
    model: Painter
    inputs: Callable[[int], Mapping[str, Tensor]]
    """What it is called with for so many rows, on the meta device."""
    parts: Parts
    sequences: Sequences
    projectors: tuple[Any, ...]
    four_bit: bool
    length: int
    """Positions S of a row."""
    grid: Grid
    """Codes of a picture, down and across."""
    code_ids: tuple[int, int]
    """The first id of a code among the model's tokens, and how many codes there are."""
    notes: tuple[str, ...]
    """What was assumed."""
    made: dict[tuple[object, ...], Traced] = field(default_factory=dict)
    """Passes by what they follow from: they take seconds, and many plans have the same."""
    looked: dict[tuple[object, ...], int] = field(default_factory=dict)

    def traced(self, settings: TrainSettings, *, rows: int, sharded: bool) -> Traced:
        """What the passes over so many rows take and compute."""
        narrow = settings.precision == "bfloat16"
        key = rows, settings.precision, settings.recompute, settings.compile, sharded and narrow
        if key not in self.made:
            self.made[key] = traced_passes(self.model, settings, inputs=self.inputs(rows), sharded=sharded)
        return self.made[key]

    def looking(self, settings: TrainSettings, *, sharded: bool) -> int:
        """Bytes that a validation batch takes."""
        key = settings.precision, sharded and settings.precision == "bfloat16"
        if key not in self.looked:
            inputs = self.inputs(LOOKING_ROWS)
            self.looked[key] = looking_bytes(self.model, settings, inputs=inputs, sharded=sharded)
        return self.looked[key]

    def memory(
        self,
        settings: TrainSettings,
        *,
        sharing: Sharing,
        rows: int,
        device_type: str = "cuda",
        validates: bool = True,
    ) -> Memory:
        """What a training with micro-batches of so many rows takes of each device."""
        share = -(-settings.batch_size // sharing.ranks)
        return training_memory(
            self.model,
            settings,
            sharing=sharing,
            passes=self.traced(settings, rows=rows, sharded=sharing.is_sharded).memory,
            sequences=self.sequences,
            rows=rows,
            parts_of_batch=-(-share // rows),
            looking=self.looking(settings, sharded=sharing.is_sharded) if validates else 0,
            projectors=self.projectors,
            four_bit=self.four_bit,
            device_type=device_type,
        )


KnownPasses = MutableMapping[Hashable, PlannedModel]
"""Models whose passes were made, by what these follow from."""


def with_known_passes(planned: PlannedModel, recipe: Recipe, *, known: KnownPasses) -> PlannedModel:
    """The recipe's model with the passes of one in `known` that makes the same; if none does, it is noted there."""
    shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in planned.model.named_parameters())
    # where it starts from makes no difference, and four bits are counted later
    own = recipe.model.model_dump(exclude={"weights": True, "seed": True, "llm": {"folder", "four_bit"}})
    like = known.setdefault((shapes, planned.length, planned.grid, repr(own)), planned)
    return replace(planned, made=like.made, looked=like.looked)


def planned_model(recipe: Recipe, stand_in: str | None = None) -> PlannedModel:
    """The recipe's model and its sequences, without weights or data.

    Raises:
        ArraError: the recipe fits no model, or its language model is not there and nothing stands in.
    """
    if recipe.model.llm is None:
        if stand_in is not None:
            raise ArraError(f"--model {stand_in}: stands in for a language model, and the recipe trains a decoder")
        found = _planned_decoder(recipe)
    else:
        found = _planned_language_model(recipe, stand_in)
    model, notes = found.model, found.notes
    projectors: tuple[Any, ...] = ()
    if recipe.align is not None:
        sizes = feature_sizes(recipe)
        known = {name: size or FEATURE_SIZE for name, size in sizes.items()}
        projectors = empty_projectors(recipe.align, known, hidden_size=model.hidden_size)
        notes += [f"features of '{name}' taken to be {FEATURE_SIZE} wide" for name, size in sizes.items() if not size]
    four_bit = recipe.model.llm is not None and recipe.model.llm.four_bit
    parts = parts_of(model, recipe.train, four_bit=four_bit)
    return PlannedModel(
        name=found.name,
        model=model,
        inputs=found.inputs,
        parts=parts,
        sequences=found.sequences,
        projectors=projectors,
        four_bit=four_bit,
        length=found.length,
        grid=found.grid,
        code_ids=found.code_ids,
        notes=tuple(notes),
    )


def cut_to(planned: PlannedModel, depth: int, *, settings: TrainSettings) -> PlannedModel:
    """The same with its first blocks alone; the given one stays as it is."""
    model = deepcopy(planned.model)
    first = model.blocks[0]
    listed = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and first in part)
    del listed[depth:]
    if isinstance(model, CausalLM):
        model.keep_blocks(depth)
    parts = parts_of(model, settings, four_bit=planned.four_bit)
    return replace(planned, model=model, parts=parts, made={})


class _Described(NamedTuple):
    name: str
    model: Painter
    inputs: Callable[[int], Mapping[str, Tensor]]
    sequences: Sequences
    length: int
    grid: Grid
    code_ids: tuple[int, int]
    notes: list[str]


def _planned_decoder(recipe: Recipe) -> _Described:
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
    sequences, ids = Sequences(settings.num_positions, aligned), (0, settings.num_codes)
    return _Described(name, model, inputs, sequences, length, settings.grid, ids, notes)


def _planned_language_model(recipe: Recipe, stand_in: str | None) -> _Described:
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
    sequences, ids = Sequences(labelled, grid[0] * grid[1]), (layout.first_code, layout.num_codes)
    return _Described(name, model, inputs, sequences, length, grid, ids, notes)


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
