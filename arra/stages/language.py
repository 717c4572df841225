"""A language model in a recipe: its folder's card, a store's prompts as it reads them, its text, its first weights.

Legend: N records of a split, h w code grid.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from arra.config import LanguageSection, Recipe, TextSection
from arra.data.batches import HeldOutBatches, TrainBatch
from arra.data.language import Grid, LayoutWriter, PromptConditions, TextRows
from arra.data.layout import ImageLayout
from arra.data.lines import parse_json, read_lines
from arra.data.store import Store
from arra.errors import ArraError
from arra.models.adapters import LoraSettings, add_lora, merge_adapters, quantize, save_adapter, train_head_rows
from arra.models.causal import CausalLM
from arra.models.language_folder import CARD_FILE, CONFIG_FILE, LanguageCard, load_language_model, read_language_card
from arra.runs import file_hash
from arra.stages.captions import CAPTIONS_AT_A_TIME, Encodes, StoreCaptions
from arra.stages.makers import CODES
from arra.stages.model import WEIGHTS_NAMES, square, tokenizer_network
from arra.tokenizers import ImageTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Worded:
    """A text tokenizer that reads a prompt in the words of the layout's template."""

    text: Encodes
    layout: ImageLayout
    grid: Grid

    def encode(self, prompt: str) -> list[int]:
        """Ids of the filled template."""
        return self.text.encode(self.layout.text(prompt, self.grid))


@dataclass(frozen=True)
class Shapes:
    """The grids in codes of some records."""

    grids: tuple[Grid, ...]
    numbers: np.ndarray | None = None
    """(N,) which of the grids each record has; None where there is one."""

    def groups(self, count: int) -> Iterator[tuple[Grid, np.ndarray]]:
        """Each grid with the places of its records."""
        for number, grid in enumerate(self.grids):
            places = np.arange(count) if self.numbers is None else np.flatnonzero(self.numbers == number)
            if len(places):
                yield grid, places


def language_section(recipe: Recipe) -> LanguageSection:
    """The recipe's language model.

    Raises:
        ArraError: it has none.
    """
    if recipe.model.llm is None:
        raise ArraError("model.llm: missing; name the folder of a language model")
    return recipe.model.llm


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a model of `transformers`, one that paints or not."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def language_folder(recipe: Recipe) -> str:
    """The folder of the recipe's language model.

    Raises:
        ArraError: it is not there, or holds no painting language model.
    """
    folder = Path(language_section(recipe).folder)
    if not folder.is_dir():
        missing = "no such folder"
    elif not (folder / CARD_FILE).is_file():
        missing = f"no {CARD_FILE} in it"
    elif not any((folder / name).is_file() for name in WEIGHTS_NAMES):
        missing = "no weights in it"
    else:
        return language_section(recipe).folder
    raise ArraError(
        f"model.llm.folder: {folder}: {missing}; expected one made by arra init or arra import, or a finished run of a "
        "language model"
    )


def language_card(recipe: Recipe, tokenizer: ImageTokenizer | None = None) -> LanguageCard:
    """What the language model's folder says, in the recipe's words where it has its own.

    Raises:
        ArraError: no such folder, or its codes are those of another image tokenizer.
    """
    section = language_section(recipe)
    card = read_language_card(Path(section.folder))
    layout = card.settings.layout
    changes: dict[str, Any] = {"rep": _rep_token(recipe, layout)}
    if section.template is not None:
        changes["template"] = section.template
    layout = ImageLayout(**{**layout.model_dump(), **changes})
    downsampling = tokenizer_network(recipe).downsampling if tokenizer is None else tokenizer.downsampling
    num_codes = tokenizer_network(recipe).num_codes if tokenizer is None else tokenizer.num_codes
    if (num_codes, downsampling) != (layout.num_codes, layout.pixels_per_code):
        raise ArraError(
            f"tokenizer.name: {recipe.tokenizer.name} has {num_codes} codes of {downsampling} pixels, {section.folder} "
            f"paints {layout.num_codes} of {layout.pixels_per_code}; name the tokenizer that it was made for"
        )
    codes_of = card.about.get("codes_of")
    if tokenizer is not None and isinstance(codes_of, dict) and codes_of != tokenizer.codes_of:
        theirs, ours = (f"{of.get('tokenizer')} {str(of.get('weights'))[:12]}" for of in (codes_of, tokenizer.codes_of))
        raise ArraError(f"tokenizer.name: {section.folder} was made for codes of {theirs}, the recipe has {ours}")
    grid = None if recipe.data.crop.kind == "buckets" else square(recipe, downsampling)
    if grid is None and not says_shape(layout):
        raise ArraError(
            f"data.crop.kind: buckets, but {section.folder} writes neither sides nor ends of rows, so no picture could "
            "say its shape; use center, or a model with them (arra init --rows, --layout lumina)"
        )
    settings = card.settings.model_copy(update={"layout": layout, "grid": grid or card.settings.grid})
    layout.check_grid(settings.grid)
    return replace(card, settings=settings)


def _rep_token(recipe: Recipe, layout: ImageLayout) -> int | None:
    """The token that is written before pictures so that target `rep` has a state to align; None where none is.

    Raises:
        ArraError: one is wanted, and the model's vocabulary has none.
    """
    if not recipe.has_rep:
        return None
    token = layout.rep if layout.rep_id is None else layout.rep_id
    if token is None:
        wants = next(where for where, term in recipe.align_terms() if term.target == "rep")
        made = "arra init ... --rep-token" if layout.family == "generic" else "arra import"
        raise ArraError(
            f"{wants}.target: rep, but {language_section(recipe).folder} knows no REP token; make the folder anew with "
            f"{made}"
        )
    return token


def says_shape(layout: ImageLayout) -> bool:
    """Whether a sequence tells the shape of its picture, so that a model can paint more than one."""
    told = layout.first_size is not None or layout.new_line is not None
    return told or ("{width}" in layout.template and "{height}" in layout.template)


def shapes_of(recipe: Recipe, store: Store, rows: np.ndarray, card: LanguageCard) -> Shapes:
    """The grids of some records: one for all, or each its own where pictures are cropped at their own aspect.

    Raises:
        ArraError: the layout cannot write one of them.
    """
    if recipe.data.crop.kind != "buckets":
        return Shapes((card.settings.grid,))
    grids, numbers = np.unique(store.reader(CODES).shapes()[rows], axis=0, return_inverse=True)
    found = tuple((int(height), int(width)) for height, width in grids)
    for grid in found:
        card.settings.layout.check_grid(grid)
    return Shapes(found, numbers.reshape(-1))


def prompt_conditions(
    recipe: Recipe, store: Store, rows: np.ndarray, card: LanguageCard, shapes: Shapes
) -> PromptConditions:
    """The prompts of some records, dropped and replaced as the recipe says when training asks for them."""
    layout = card.settings.layout
    return PromptConditions(
        tuple(StoreCaptions(store, rows, Worded(card.text, layout, grid)) for grid in shapes.grids),
        shapes.grids,
        shapes.numbers,
        dropout=recipe.train.condition_dropout,
        alternative_share=recipe.train.alternative_share,
    )


def check_sequences(store: Store, rows: np.ndarray, card: LanguageCard, shapes: Shapes) -> None:
    """Nothing.

    Raises:
        ArraError: a record's prompt and picture do not fit the model's positions; the first such record is named.
    """
    layout, table = card.settings.layout, store.table(["id", "prompt", "alternatives"])
    if layout.max_positions is None:
        return
    for grid, places in shapes.groups(len(rows)):
        words = Worded(card.text, layout, grid)
        for start in range(0, len(places), CAPTIONS_AT_A_TIME):
            part = table.take(pa.array(rows[places[start : start + CAPTIONS_AT_A_TIME]])).to_pylist()
            for row in part:
                longest = max(len(words.encode(each)) for each in (row["prompt"], *row["alternatives"]))
                layout.check_fits(longest, grid, where=f"{store.path}: record '{row['id']}'")


def held_out_batches(
    recipe: Recipe, store: Store, rows: np.ndarray, card: LanguageCard, shapes: Shapes, codes: torch.Tensor | None
) -> list[TrainBatch] | HeldOutBatches:
    """Validation batches of pictures; `codes` (N, h*w) where all have one grid, else they are read from the store."""
    conditions, write = prompt_conditions(recipe, store, rows, card, shapes), LayoutWriter(card.settings.layout)
    if codes is not None:
        return HeldOutBatches(conditions, codes, write=write)
    batches: list[TrainBatch] = []
    for _, places in shapes.groups(len(rows)):
        mine = Shapes(shapes.grids, None if shapes.numbers is None else shapes.numbers[places])
        own = np.stack(store.reader(CODES).take_ragged(rows[places])).astype(np.int64)
        group = prompt_conditions(recipe, store, rows[places], card, mine)
        batches += HeldOutBatches(group, torch.from_numpy(own).flatten(1), write=write)
    return batches


def text_rows(section: TextSection, card: LanguageCard) -> tuple[TextRows, TextRows]:
    """Rows of plain text to train on, and held-out ones to watch the model's language by.

    Raises:
        ArraError: the file cannot be read, or has too little text.
    """
    layout = card.settings.layout
    if layout.max_positions is not None and section.length > layout.max_positions:
        raise ArraError(
            f"model.llm.text.length: {section.length} is more than the model's {layout.max_positions} positions; "
            "lower it"
        )
    documents = [card.text.encode(text) for text in read_texts(Path(section.path))]
    ends = [token for token in (*layout.closing, layout.separator, layout.bos) if token is not None][:1]
    try:
        rows = TextRows.cut(documents, length=section.length, between=ends)
    except ValueError as error:
        raise ArraError(
            f"{section.path}: {error} tokens; give more text, or a smaller model.llm.text.length"
        ) from error
    if len(rows) < 2:
        raise ArraError(
            f"{section.path}: one row of {section.length} tokens; two are needed, one of them to measure on"
        )
    return rows.split(section.held_out_share)


def text_hash(section: TextSection) -> str:
    """The SHA-256 of the text that is read beside pictures.

    Raises:
        ArraError: the file cannot be read.
    """
    try:
        return file_hash(section.path)
    except OSError as error:
        raise ArraError(f"model.llm.text.path: {section.path}: cannot be read ({error.strerror})") from error


def read_texts(path: Path) -> list[str]:
    """The documents of a file: of .jsonl each line's "text", of any other the whole file.

    Raises:
        ArraError: it cannot be read, or a line has no text.
    """
    try:
        if path.suffix == ".jsonl":
            return [_text_of(line, where=f"{path}: line {number}") for number, line in read_lines(path)]
        return [path.read_text(encoding="utf-8")]
    except OSError as error:
        raise ArraError(f"{path}: cannot be read ({error.strerror}); expected a text file, or .jsonl") from error
    except UnicodeDecodeError as error:
        raise ArraError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _text_of(line: bytes, *, where: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ArraError(f'{where}: {error}; expected {{"text": "..."}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ArraError(f'{where}: expected {{"text": "..."}}')
    return str(row["text"])


def first_language_model(recipe: Recipe, card: LanguageCard, *, empty: bool = False) -> CausalLM:
    """The model before its first step: read, with what is not trained frozen, and adapters where they are wanted.

    `empty` makes the same network on the meta device, for one that gets its weights from elsewhere, and reads none.

    Raises:
        ArraError: the folder cannot be read, a needed library is missing, or an empty model should be quantised.
    """
    section = language_section(recipe)
    if empty and section.four_bit:
        raise ArraError(
            "model.llm.four_bit: weights in four bits cannot be shared out over ranks; set train.parallel.kind: ddp, "
            "or four_bit: false"
        )
    dtype = DTYPES[section.frozen_dtype]
    model = load_language_model(Path(section.folder), dtype=dtype, empty=empty)
    model.settings = card.settings
    with torch.device("meta") if empty else nullcontext():
        return prepare_language_model(recipe, model)


def prepare_language_model(recipe: Recipe, model: CausalLM) -> CausalLM:
    """The model, made ready to train: what is not trained is frozen, and adapters are there where they are wanted.

    Raises:
        ArraError: a layer that is aligned, or one to adapt, is none of the model's.
    """
    section = language_section(recipe)
    for where, term in recipe.align_terms():
        if term.layer > model.num_layers:
            raise ArraError(
                f"{where}.layer: {term.layer} is outside 0..{model.num_layers} of {section.folder}; the paper uses 1"
            )
    if section.dropout:
        model.drop_residuals(section.dropout)
    rows = sorted(model.layout.image_ids())
    if section.four_bit:
        quantize(model.lm, compute_dtype=DTYPES[section.frozen_dtype])
    if section.train == "lora":
        add_lora(model.lm, section.lora or LoraSettings(), rows=rows, seed=recipe.model.seed)
    elif section.train == "head":
        train_head_rows(model.lm, rows)
    else:
        model.lm.requires_grad_(True)
        if hasattr(model.base, "vqmodel"):  # Chameleon's image tokenizer is none of the language model
            model.base.vqmodel.requires_grad_(False)
    return model


def finish_language_model(recipe: Recipe, model: CausalLM, folder: Path) -> None:
    """Nothing; the model is an ordinary one again, and what adapters learnt also stands alone in `folder`/adapter."""
    section = language_section(recipe)
    if section.train == "all":
        return
    save_adapter(model.lm, folder / "adapter", base=section.folder)
    merge_adapters(model.lm)
