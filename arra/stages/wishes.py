"""What the user wishes to see, in the form that a model takes it: prompts, classes by number or name, captions.

Features of captions are made when they are asked for, a few prompts at a time.
Legend: N prompts, C positions of a caption, F caption feature.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arra.config import TextEncoderSection
from arra.encoders import TextEncoder
from arra.encoders.text import load_text_encoder
from arra.encoders.text_cleaning import caption_text
from arra.errors import ArraError
from arra.models import CausalLM, Decoder, Painter
from arra.stages.prompt_files import read_prompt_file

ALL = "all"
"""In place of a class: every one."""
PROMPTS_TOGETHER = 256
"""Looked at together, before anything is painted."""
LABEL_NUMBERS = re.compile(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*")


@dataclass(frozen=True)
class Wishes:
    """What to paint, one entry each."""

    texts: list[str]
    """In words, for people."""
    facts: list[dict[str, Any]]
    """What is noted beside the picture."""
    labels: list[int] | None = None
    captions: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]] | None = None
    """Features (N, C, F) and mask (N, C) of some of them, the same whichever are asked for together."""
    captions_by: str | None = None
    """Whose features those are: a hash."""
    positions: int | None = None
    """That the longest of them takes; None where the model's settings tell."""
    of_records: bool = False
    """Each is what a record of a split says."""

    def __len__(self) -> int:
        return len(self.texts)

    def inputs(self, places: Sequence[int]) -> dict[str, Any]:
        """Some of the wishes as `generate` takes them."""
        if self.labels is not None:
            return {"labels": [self.labels[place] for place in places]}
        if self.captions is not None:
            distinct = list(dict.fromkeys(places))
            features, mask = self.captions(distinct)
            numbers = {place: number for number, place in enumerate(distinct)}
            rows = [numbers[place] for place in places]
            return {"captions": (features[rows], mask[rows])}
        return {"prompts": [self.texts[place] for place in places]}


@dataclass(frozen=True)
class Asked:
    """What the command line asks for: one of the three kinds."""

    prompts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    split: str | None = None
    """What the records of this split are asked for."""
    store: str | None = None
    """Whose split; None is the store that the run was trained on."""


def read_asked(
    prompts: Sequence[str],
    file: Path | None,
    labels: Sequence[str],
    *,
    split: str | None = None,
    store: str | None = None,
) -> Asked:
    """Prompts (of the command line, then of a file), classes, or a split.

    Raises:
        ArraError: none at all, two kinds, or a prompt that is none.
    """
    if labels and (prompts or file is not None):
        raise ArraError("generate: --label and --prompt do not go together; a model takes one of them")
    if store is not None and split is None:
        raise ArraError("--store: belongs to --split NAME; give that, or leave it out")
    if split is not None:
        if labels or prompts or file is not None:
            raise ArraError("generate: --split says what to paint; leave out --prompt, --prompts and --label")
        return Asked(split=split, store=store)
    return Asked(labels=tuple(labels)) if labels else Asked(prompts=tuple(read_prompts(prompts, file)))


def prompt_wishes(
    model: Painter,
    prompts: Sequence[str],
    *,
    section: TextEncoderSection | None = None,
    folder: Path | None = None,
    grid: tuple[int, int] | None = None,
) -> Wishes:
    """Wishes of prompts; a model that is given caption features has them made by its text encoder, found in `folder`.

    Raises:
        ArraError: the model takes no prompts, one does not fit, or the text encoder is missing or another one.
    """
    if isinstance(model, Decoder) and model.settings.condition == "class":
        raise ArraError(f"--prompt: this model paints classes; give --label, one of {_range(model)}")
    facts: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if folder is not None and model.settings.condition == "text":
        raise ArraError("--text-encoder: this model reads its prompts itself; leave it out")
    if isinstance(model, CausalLM):  # it says itself what does not fit
        positions = 0
        for first in range(0, len(prompts), PROMPTS_TOGETHER):
            read = model.condition(prompts=prompts[first : first + PROMPTS_TOGETHER], grid=grid)
            positions = max(positions, read.tokens.shape[1])
        return Wishes(list(prompts), facts, positions=positions)
    if model.settings.condition == "text":
        check_prompts(model, prompts)
        return Wishes(list(prompts), facts)
    return _caption_wishes(model, prompts, section, folder)


def _caption_wishes(
    model: Decoder, prompts: Sequence[str], section: TextEncoderSection | None, folder: Path | None
) -> Wishes:
    trained = model.about.get("text_encoder")
    trained = trained if isinstance(trained, dict) else {}
    encoder = _text_encoder(model, trained, section, folder)
    clean = bool(trained.get("clean", section is not None and section.clean))
    slots = model.settings.condition_length
    tokens = encoder.tokenize([caption_text(prompt, clean=clean) for prompt in prompts])
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) > encoder.spec.num_slots:
            raise ArraError(
                f"--prompt: {len(ids)} tokens, {encoder.spec.name} reads {encoder.spec.num_slots}; shorten it: "
                f"{shortened(prompt)}"
            )
        if len(ids) > slots:
            raise ArraError(f"--prompt: longer than the {slots} vectors that this model takes; shorten it")

    def captions(places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        # one at a time: beside others it would round otherwise, and a picture depends on its own prompt alone
        said = encoder.encode([caption_text(prompts[place], clean=clean) for place in places], batch_size=1)
        return said.features[:, :slots], said.mask[:, :slots]

    return Wishes(
        list(prompts), [{"prompt": prompt} for prompt in prompts], captions=captions, captions_by=encoder.weights_hash
    )


def _text_encoder(
    model: Decoder, trained: dict[str, Any], section: TextEncoderSection | None, folder: Path | None
) -> TextEncoder:
    """The text encoder that a model was trained with."""
    untold, section = section is None, section or TextEncoderSection()
    name = trained.get("name", section.name)
    weights = folder or (section.weights if section.name == name else None)
    if weights is None:
        raise ArraError(f"--prompt: this model reads captions through {name}; give its folder with --text-encoder")
    # a CPU without bfloat16 units is many times slower at it
    dtype = "float32" if untold and model.device.type == "cpu" else section.dtype
    encoder = load_text_encoder(name, weights=weights, device=model.device, dtype=dtype)
    if encoder.spec.feature_size != model.settings.caption_dim:
        raise ArraError(
            f"--text-encoder {weights}: its vectors are {encoder.spec.feature_size} wide, the model takes "
            f"{model.settings.caption_dim}; give the folder of the encoder that it was trained with"
        )
    expected = trained.get("sha256")
    if expected is not None and encoder.weights_hash != expected:
        raise ArraError(
            f"--text-encoder {weights}: its weights are {encoder.weights_hash[:12]}, the model was trained with "
            f"{name} {str(expected)[:12]}; give that folder"
        )
    return encoder


def label_wishes(model: Painter, asked: Sequence[str]) -> Wishes:
    """Wishes of classes, each a number, a range of numbers as 0-9, a name, or `all`.

    Raises:
        ArraError: the model has no classes, or no such class.
    """
    if isinstance(model, CausalLM) or model.settings.condition != "class":
        raise ArraError(f"--label: this model is conditioned on {model.settings.condition}; give --prompt")
    known, count = class_names_of(model), model.settings.num_classes
    labels = [label for text in asked for label in _labels(text, known, count)]
    return number_wishes(model, labels)


def number_wishes(model: Decoder, labels: Sequence[int]) -> Wishes:
    """Wishes of classes by their numbers."""
    known = class_names_of(model)
    words = [str(label) if known is None else str(known[label]) for label in labels]
    facts: list[dict[str, Any]] = [{"label": label} for label in labels]
    if known is not None:
        facts = [fact | {"class": word} for fact, word in zip(facts, words, strict=True)]
    return Wishes(words, facts, labels=list(labels))


def class_names_of(model: Decoder) -> list[str] | None:
    """The names of a model's classes, if it knows them all."""
    names = model.about.get("class_names")
    return names if isinstance(names, list) and len(names) == model.settings.num_classes else None


def _labels(text: str, names: list[str] | None, count: int) -> list[int]:
    if numbers := LABEL_NUMBERS.fullmatch(text):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if not first <= last < count:
            raise ArraError(f"--label {text}: expected classes of 0..{count - 1}, as in 7 or 0-9")
        return list(range(first, last + 1))
    wanted = text.strip().casefold()
    if wanted == ALL:
        return list(range(count))
    if names is None:
        raise ArraError(f"--label {text}: this model does not know the names of its classes; give 0..{count - 1}")
    # ImageNet's names are synonyms with commas between
    spoken = [{name.casefold(), *(part.strip().casefold() for part in str(name).split(","))} for name in names]
    found = [label for label, known in enumerate(spoken) if wanted in known]
    if len(found) > 1:
        raise ArraError(f"--label {text}: several classes are called so: {', '.join(map(str, found))}; give the number")
    if not found:
        near = difflib.get_close_matches(wanted, sorted(set().union(*spoken)), n=1, cutoff=0.6)
        listed = f" or one of {', '.join(names)}" if count <= 10 else ""
        hint = f"; did you mean '{near[0]}'?" if near else f"; give a number of 0..{count - 1}{listed}"
        raise ArraError(f"--label {text}: no such class{hint}")
    return found


def _range(model: Decoder) -> str:
    return f"0..{model.settings.num_classes - 1}"


def check_prompts(model: Decoder, prompts: Sequence[str]) -> None:
    """Nothing.

    Raises:
        ArraError: a prompt has no word in it, or more tokens than the model has room for.
    """
    text, room = model.text_tokenizer, model.settings.condition_length - 1
    if text is None:
        return
    for prompt in prompts:
        count = len(text.encode(prompt))
        shown = shortened(prompt)
        if count == 0:
            raise ArraError(f"prompt '{shown}': no word in it; say what to paint")
        if count > room:
            raise ArraError(
                f"prompt '{shown}': {count} tokens, this model has room for {room}; shorten it (common words are one "
                "token each), or train with a larger model.prefix_length"
            )


def shortened(prompt: str) -> str:
    """The beginning of a prompt, for a line of text."""
    return prompt if len(prompt) <= 40 else prompt[:37] + "..."


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then of a file.

    Raises:
        ArraError: none at all, an empty one, or a file that cannot be read.
    """
    texts = list(given)
    for text in texts:
        if not text.strip():
            raise ArraError("--prompt: empty; say what to paint")
    if file is not None:
        texts += read_prompt_file(file)
    if not texts:
        raise ArraError("generate: no prompt; give --prompt TEXT or --prompts FILE, or --label or --split NAME")
    return texts
