"""What the user wishes to see, in the form that a model takes it: prompts, classes by number or name, captions.

Legend: F caption feature.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arra.config import TextEncoderSection
from arra.encoders.text import load_text_encoder
from arra.encoders.text_cleaning import caption_text
from arra.errors import ArraError
from arra.models import CausalLM, Decoder, Painter

LABEL_NUMBERS = re.compile(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*")


@dataclass(frozen=True)
class Wishes:
    """What to paint, one entry each."""

    texts: list[str]
    """In words, for people."""
    facts: list[dict[str, Any]]
    """What is noted beside the picture."""
    labels: list[int] | None = None
    captions: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def inputs(self, places: Sequence[int]) -> dict[str, Any]:
        """Some of the wishes as `generate` takes them."""
        if self.labels is not None:
            return {"labels": [self.labels[place] for place in places]}
        if self.captions is not None:
            features, mask = self.captions
            return {"captions": (features[list(places)], mask[list(places)])}
        return {"prompts": [self.texts[place] for place in places]}


def read_asked(prompts: Sequence[str], file: Path | None, labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts (of the command line, then of a file) and classes, of which one kind is empty.

    Raises:
        ArraError: none at all, both kinds, or a prompt that is none.
    """
    if labels and (prompts or file is not None):
        raise ArraError("generate: --label and --prompt do not go together; a model takes one of them")
    return ([], list(labels)) if labels else (read_prompts(prompts, file), [])


def make_wishes(
    model: Painter,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    section: TextEncoderSection | None = None,
    folder: Path | None = None,
) -> Wishes:
    """The wishes of what `read_asked` found.

    Raises:
        ArraError: the model cannot paint one.
    """
    if labels:
        return label_wishes(model, labels)
    return prompt_wishes(model, prompts, section=section, folder=folder)


def prompt_wishes(
    model: Painter, prompts: Sequence[str], *, section: TextEncoderSection | None = None, folder: Path | None = None
) -> Wishes:
    """Wishes of prompts; a model that is given caption features has them made by its text encoder, found in `folder`.

    Raises:
        ArraError: the model takes no prompts, one does not fit, or the text encoder is missing or another one.
    """
    if isinstance(model, Decoder) and model.settings.condition == "class":
        raise ArraError(f"--prompt: this model paints classes; give --label, one of {_range(model)}")
    facts = [{"prompt": prompt} for prompt in prompts]
    if folder is not None and model.settings.condition == "text":
        raise ArraError("--text-encoder: this model reads its prompts itself; leave it out")
    if isinstance(model, CausalLM):  # it says itself what does not fit
        return Wishes(list(prompts), facts)
    if model.settings.condition == "text":
        check_prompts(model, prompts)
        return Wishes(list(prompts), facts)
    trained = model.about.get("text_encoder")
    trained = trained if isinstance(trained, dict) else {}
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
    clean = bool(trained.get("clean", section.clean))
    said = encoder.encode([caption_text(prompt, clean=clean) for prompt in prompts])
    for prompt, count in zip(prompts, said.num_tokens, strict=True):
        if count > said.mask.shape[1]:
            raise ArraError(
                f"--prompt: {count} tokens, {name} reads {said.mask.shape[1]}; shorten it: {shortened(prompt)}"
            )
    slots = model.settings.condition_length
    if int(said.mask.sum(1).max()) > slots:
        raise ArraError(f"--prompt: longer than the {slots} vectors that this model takes; shorten it")
    return Wishes(list(prompts), facts, captions=(said.features[:, :slots], said.mask[:, :slots]))


def label_wishes(model: Painter, asked: Sequence[str]) -> Wishes:
    """Wishes of classes, each a number, a range of numbers as 0-9, or a name.

    Raises:
        ArraError: the model has no classes, or no such class.
    """
    if isinstance(model, CausalLM) or model.settings.condition != "class":
        raise ArraError(f"--label: this model is conditioned on {model.settings.condition}; give --prompt")
    names = model.about.get("class_names")
    count = model.settings.num_classes
    known = names if isinstance(names, list) and len(names) == count else None
    labels = [label for text in asked for label in _labels(text, known, count)]
    words = [str(label) if known is None else str(known[label]) for label in labels]
    facts: list[dict[str, Any]] = [{"label": label} for label in labels]
    if known is not None:
        facts = [fact | {"class": word} for fact, word in zip(facts, words, strict=True)]
    return Wishes(words, facts, labels=labels)


def _labels(text: str, names: list[str] | None, count: int) -> list[int]:
    if numbers := LABEL_NUMBERS.fullmatch(text):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if not first <= last < count:
            raise ArraError(f"--label {text}: expected classes of 0..{count - 1}, as in 7 or 0-9")
        return list(range(first, last + 1))
    wanted = text.strip().casefold()
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
    """The prompts of the command line, then of a file with one per line.

    Raises:
        ArraError: none at all, an empty one, or a file that cannot be read.
    """
    texts = list(given)
    for text in texts:
        if not text.strip():
            raise ArraError("--prompt: empty; say what to paint")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ArraError(
                f"{file}: cannot be read ({reason}); expected a text file with one prompt per line"
            ) from error
        if not lines:
            raise ArraError(f"{file}: empty; expected one prompt per line")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ArraError(f"{file}: line {number} is empty; expected one prompt per line, remove it")
        texts += lines
    if not texts:
        raise ArraError("generate: no prompt; give --prompt TEXT or --prompts FILE, or --label of a model of classes")
    return texts
