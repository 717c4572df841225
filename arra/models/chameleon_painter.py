"""A checkpoint of Chameleon's family as a painter: the network, its text tokenizer, and the layout of its pictures.

    Chameleon, Lumina-mGPT, ARRA, Meta's files --> open_chameleon --> CausalLM

`load_model("chameleon", weights=...)` and `arra import` come through here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from arra.data.layout import Grid, ImageLayout
from arra.errors import ArraError
from arra.models.causal import CausalLM
from arra.models.chameleon import ReadChameleon, find_text_tokenizer, read_chameleon, zero_image_head
from arra.models.language_folder import TOKENIZER_FILE, read_companions
from arra.models.weights import Entry
from arra.settings import Settings
from arra.tokenizers.prompts import load_prompt_tokenizer
from arra.tokenizers.vocabulary import LUMINA_TEMPLATE, SEPARATOR, chameleon_layout, lumina_layout, read_vocabulary

LayoutName = Literal["lumina", "chameleon"]
PIXELS = 512
"""Of Chameleon's pictures, and of the checkpoint that ARRA starts from."""
PIXELS_IN_NAME = re.compile(r"(?<![0-9a-zA-Z])(256|512|768|1024)(?![0-9a-zA-Z])")  # Lumina-mGPT-7B-768
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False,
}  # fmt: skip
"""Beside a tokenizer of Meta's, so that transformers opens it as it is."""


class ChameleonOptions(Settings):
    """What a user may say about an import; null: decided by the source."""

    text_tokenizer: Path | None = None
    zero_image_head: bool | None = None
    layout: str | None = None
    template: str | None = None
    grid: Grid | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class OpenedChameleon:
    """A painter, and what became of its files."""

    model: CausalLM
    read: ReadChameleon
    text_file: Path
    told_grid: str
    """Who says which grid."""
    zeroed: bool
    """Whether the head's rows of the codes were set to nought."""
    code_rows: float
    """How large their numbers were, as a multiple of the others'."""


def open_chameleon(
    source: Path,
    *,
    options: ChameleonOptions,
    dtype: torch.dtype | None = None,
    entry: Entry = "model",
    ignore: tuple[str, ...] = (),
) -> OpenedChameleon:
    """The painter of a folder or file; `dtype=None` keeps the files' type.

    Raises:
        ArraError: files are missing, damaged or unsafe, do not fit each other, or no text tokenizer is there.
    """
    if options.layout not in (None, *get_args(LayoutName)):
        raise ArraError(f"--layout {options.layout}: unknown; expected {' or '.join(get_args(LayoutName))}")
    if not source.exists():
        raise ArraError(f"{source}: no such file or folder; expected Chameleon's, Lumina-mGPT's or ARRA's weights")
    text_file = options.text_tokenizer or find_text_tokenizer(source)
    if text_file is None:
        raise ArraError(
            f"{source}: no text tokenizer beside the weights; pass --text-tokenizer FILE, Meta's text_tokenizer.json "
            "or the tokenizer.json of a Hugging Face folder"
        )
    vocabulary = read_vocabulary(text_file)
    read = read_chameleon(source, dtype=dtype, entry=entry, ignore=ignore, vocabulary=vocabulary)
    _check_vocabularies(read.vocabulary, vocabulary, source=source, text_file=text_file)
    zeroed = read.layout_kind != "shared" if options.zero_image_head is None else options.zero_image_head
    layout = _layout(read, vocabulary, options, zeroed=zeroed, source=text_file)
    grid, told_grid = _grid(source, layout, options)
    layout.check_grid(grid)
    layout.check_fits(0, grid, where=str(source))
    if (highest := max(layout.reserved())) >= read.settings.vocab_size:
        raise ArraError(
            f"{text_file}: token {highest} is outside the model's vocabulary of {read.settings.vocab_size}; pass the "
            "text tokenizer that the model was trained with"
        )
    ratio = _code_rows(read.lm, layout)
    if zeroed:
        zero_image_head(read.lm, layout.code_ids())
    _name_ends(read.lm, vocabulary)
    model = CausalLM(
        read.lm,
        layout=layout,
        grid=grid,
        head_norm_rows=read.head_norm_rows,
        text_tokenizer=load_prompt_tokenizer(text_file, reserved=layout.reserved()),
        about={
            "origin": {**read.facts, **read.left.facts(), "weights_layout": read.layout_kind},
            "zeroed_image_head": zeroed,
        },
    )
    model.companions = _companions(text_file)
    return OpenedChameleon(model.eval(), read, text_file, told_grid, zeroed, ratio)


def _check_vocabularies(
    config: Mapping[str, int] | None, text: Mapping[str, int], *, source: Path, text_file: Path
) -> None:
    """Raises ArraError where the model's configuration and its text tokenizer disagree about a token."""
    wrong = [name for name, token in (config or {}).items() if name in text and text[name] != token]
    if wrong:
        name, count = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ArraError(
            f"{text_file}: {name} is token {text[name]}, but {(config or {})[name]} in config.json of {source}{count}; "
            "pass the text tokenizer that the model was trained with"
        )


def _layout(
    read: ReadChameleon, vocabulary: Mapping[str, int], options: ChameleonOptions, *, zeroed: bool, source: Path
) -> ImageLayout:
    """As asked for; else Lumina's, with which ARRA trains all of the family, but Meta's for a head that paints so."""
    plain = read.layout_kind != "shared" and not zeroed
    name = options.layout or ("chameleon" if plain else "lumina")
    projector = any(key.startswith("adaptor.") for key in read.left.ignored)
    lumina = read.layout_kind == "shared" and not projector and name == "lumina"
    build = lumina_layout if name == "lumina" else chameleon_layout
    return build(
        vocabulary,
        num_codes=read.settings.vq_config.num_embeddings,
        template=options.template or (LUMINA_TEMPLATE if lumina else "{prompt}"),
        max_positions=read.settings.max_position_embeddings,
        source=str(source),
    )


def _grid(source: Path, layout: ImageLayout, options: ChameleonOptions) -> tuple[Grid, str]:
    """Height and width in codes, and who says so."""
    if options.grid is not None and options.image_size is not None:
        raise ArraError("--grid and --image-size say the same thing; drop one of them")
    if options.grid is not None:
        return options.grid, "given"
    named = PIXELS_IN_NAME.search(source.resolve().name)
    pixels = (int(named[1]) if named else PIXELS) if options.image_size is None else options.image_size
    side, rest = divmod(pixels, layout.pixels_per_code)
    if rest or side < 1:
        raise ArraError(f"--image-size {pixels}: no multiple of {layout.pixels_per_code}, the pixels per code")
    if options.image_size is not None:
        return (side, side), "given"
    return (side, side), "by the source's name" if named else "Chameleon's size; --image-size"


def _name_ends(lm: Any, vocabulary: Mapping[str, int]) -> None:
    """`transformers`' own generation stops where a turn ends; published files name no such token."""
    ends = [vocabulary[name] for name in (SEPARATOR, "</s>") if name in vocabulary]
    lm.generation_config.bos_token_id = vocabulary.get("<s>", lm.generation_config.bos_token_id)
    lm.generation_config.pad_token_id = vocabulary.get("<pad>")
    lm.generation_config.eos_token_id = ends


def _companions(text_file: Path) -> dict[str, str]:
    """The tokenizer's smaller files; where there are none, what tells `transformers` to take it as it is."""
    found = read_companions(text_file.parent) if text_file.name == TOKENIZER_FILE else {}
    return found or {"tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"}


@torch.no_grad()
def _code_rows(lm: Any, layout: ImageLayout) -> float:
    """How large numbers of the head's code rows are, as a multiple of all the others'."""
    sizes = torch.cat([rows.float().square().mean(1) for rows in lm.get_output_embeddings().weight.split(4096)])
    codes = torch.zeros(len(sizes), dtype=torch.bool)
    codes[layout.code_ids()] = True
    return float((sizes[codes].mean() / sizes[~codes].mean()).sqrt())
