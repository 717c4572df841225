"""Models ready to paint, each with its image tokenizer, from a finished run or a folder that holds a model alone.

runs/NAME, or a folder of `arra import` or `arra init` --> LoadedDecoder --> arra.stages.paint, evaluate, report
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from arra.config import Recipe, TextEncoderSection, parse_recipe
from arra.data.store import Store
from arra.distributed import choose_device
from arra.errors import ArraError
from arra.models import CausalLM, Painter, load_model
from arra.models.chameleon import is_chameleon
from arra.runs import Run
from arra.sample.chosen import read_chosen
from arra.sample.logits import SamplingSettings
from arra.sample.presets import own_sampling
from arra.stages.language import is_hugging_face
from arra.stages.origin import columns_of, find_store, noted
from arra.tokenizers import ImageTokenizer, load_tokenizer
from arra.tokenizers.image import ANY_SIZE, EMBEDDED, PUBLISHED

Loaded = TypeVar("Loaded", bound="LoadedDecoder")


@dataclass(frozen=True)
class LoadedDecoder:
    """A model ready to paint."""

    path: Path
    model: Painter
    tokenizer: ImageTokenizer
    sampling: SamplingSettings
    """How it paints unless told otherwise."""
    text_encoder: TextEncoderSection | None
    """Of a model that is given caption features."""

    def on(self: Loaded, device: str | torch.device) -> Loaded:
        """The same, with its networks on a device.

        Raises:
            ArraError: there is no such device.
        """
        place = choose_device(device) if isinstance(device, str) else device
        self.model.to(place)
        self.tokenizer.model.to(place)
        return self


@dataclass(frozen=True)
class LoadedRun(LoadedDecoder):
    """A finished run, ready to paint."""

    run: Run
    recipe: Recipe
    store: Store | None


def load_painter(folder: Path, *, tokenizer: str | None = None, tokenizer_weights: Path | None = None) -> LoadedDecoder:
    """Model and tokenizer of a finished run, or of a folder that holds a decoder alone.

    Raises:
        ArraError: neither of the two, an unfinished run, or no tokenizer that fits.
    """
    if not any((folder / name).is_file() for name in ("recipe.yaml", "model.json")):
        _refuse_raw(folder)
    if (folder / "recipe.yaml").is_file() or not (folder / "model.json").is_file():
        return load_run(folder, tokenizer=tokenizer, tokenizer_weights=tokenizer_weights)
    model = load_model(folder)
    codes_of = model.about.get("codes_of")
    if tokenizer is None and (folder / "tokenizer").is_dir():
        tokenizer = str(folder / "tokenizer")
    if tokenizer is None and isinstance(codes_of, dict) and codes_of.get("tokenizer") == EMBEDDED:
        tokenizer = EMBEDDED
    if tokenizer is None:
        raise ArraError(
            f"{folder}: a model without an image tokenizer; name one, as in --tokenizer {_example_tokenizer(model)}"
        )
    own = _given_tokenizer(
        model, tokenizer, tokenizer_weights, codes_of=codes_of if isinstance(codes_of, dict) else None
    )
    return LoadedDecoder(folder, model, own, own_sampling(model), None)


def _refuse_unused(name: str, weights: Path) -> None:
    """Nothing; weights are given for a tokenizer that takes some."""
    if name not in (*PUBLISHED, *ANY_SIZE):
        raise ArraError(f"--tokenizer-weights {weights}: the tokenizer {name} has its own; leave the option out")


def _refuse_raw(folder: Path) -> None:
    """Nothing; a folder of others' weights is told what makes a model of it."""
    if is_chameleon(folder):
        raise ArraError(f"{folder}: others' weights as they are; make a model of them: arra import {folder} OUT")
    if is_hugging_face(folder):
        raise ArraError(
            f"{folder}: a language model that knows no pictures; make it a painter, and train it: "
            f"arra init OUT --llm {folder} --tokenizer NAME"
        )


def _example_tokenizer(model: Painter) -> str:
    if isinstance(model, CausalLM) and model.layout.family in ("lumina", "chameleon"):
        return "chameleon --tokenizer-weights vqgan.ckpt"
    return "llamagen-vq16 --tokenizer-weights vq_ds16_c2i.pt"


def load_run(folder: Path, *, tokenizer: str | None = None, tokenizer_weights: Path | None = None) -> LoadedRun:
    """Model, tokenizer and recipe of a finished run.

    Raises:
        ArraError: no run, an unfinished run, a missing tokenizer, or weights for one that has its own.
    """
    run = Run.open(folder)
    recipe = parse_recipe(run.recipe_yaml(), Recipe, source=str(run.recipe_path))
    if not (folder / "model.json").is_file():
        store_path = noted(folder).get("at_first", "STORE")
        saved = any((folder / "checkpoints").glob("step-*"))
        way = f"; what is saved paints too: arra checkpoint {folder} --out MODEL" if saved else ""
        raise ArraError(
            f"{folder}: training has not finished; run the command that began it again, or: "
            f"arra train {folder / 'recipe.yaml'} --store {store_path} --out {folder}{way}"
        )
    manifest = run.manifest()
    if missing := [key for key in ("tokenizer", "tokenizer_sha256", "store_sha256") if key not in manifest]:
        raise ArraError(f"{folder}: manifest.json has no {missing[0]}; made by another program, train again")
    own = None if tokenizer is not None else _own_tokenizer(folder, recipe, manifest, tokenizer_weights)
    store = find_store(folder, columns_of(recipe), manifest["store_sha256"])
    try:
        model = load_model(folder)
    except ArraError as error:
        raise ArraError(
            f"{str(error).rpartition(';')[0]}; delete {folder / 'model.json'} and run the training again: it continues "
            "from its checkpoint"
        ) from error
    if own is None:
        assert tokenizer is not None
        own = _given_tokenizer(model, tokenizer, tokenizer_weights, codes_of=manifest.get("codes_of"))
    sampling = read_chosen(folder, steps=recipe.train.steps) or recipe.sample
    return LoadedRun(folder, model, own, sampling, recipe.text_encoder, run, recipe, store)


def _own_tokenizer(folder: Path, recipe: Recipe, manifest: dict[str, Any], weights: Path | None) -> ImageTokenizer:
    """The tokenizer that a run was trained with."""
    inside, name, expected = folder / "tokenizer", manifest["tokenizer"], manifest["tokenizer_sha256"]
    if weights is not None:
        _refuse_unused(str(inside) if inside.is_dir() else name, weights)
    file = weights or recipe.tokenizer.weights
    if not inside.is_dir() and name in PUBLISHED and file is None:
        raise ArraError(f"{folder}: trained on codes of {name}; give its weights: --tokenizer-weights FILE")
    tokenizer = (
        load_tokenizer(inside) if inside.is_dir() else load_tokenizer(name, weights=file, entry=recipe.tokenizer.entry)
    )
    if expected is not None and tokenizer.weights_hash != expected:
        advice = "give that file" if file is not None else "install the version of arra that trained it"
        raise ArraError(
            f"{folder}: trained on codes of {name} {str(expected)[:12]}, found {str(tokenizer.weights_hash)[:12]}; "
            f"{advice}, or train again"
        )
    return tokenizer


def _given_tokenizer(
    model: Painter, name: str, weights: Path | None, *, codes_of: dict[str, Any] | None = None
) -> ImageTokenizer:
    """A tokenizer whose codes mean what the model's do; `codes_of` says whose those are, where that is known."""
    if weights is not None:
        _refuse_unused(name, weights)
    tokenizer = load_tokenizer(name, weights=weights)
    if codes_of is not None and tokenizer.codes_of != codes_of:
        theirs, ours = (f"{of['tokenizer']} {str(of['weights'])[:12]}" for of in (tokenizer.codes_of, codes_of))
        raise ArraError(
            f"--tokenizer {name}: its codes are those of {theirs}, the run was trained on codes of {ours}; name that "
            "one, or one whose decoder alone was fine-tuned from it"
        )
    if tokenizer.num_codes != model.settings.num_codes:
        raise ArraError(
            f"--tokenizer {name}: it has {tokenizer.num_codes} codes, the model paints {model.settings.num_codes}; "
            "name the one whose codes it was trained on"
        )
    pixels: Any = model.about
    for key in ("origin", "args", "downsample_size"):
        pixels = pixels.get(key) if isinstance(pixels, dict) else None
    if isinstance(pixels, int) and pixels != tokenizer.model.settings.downsampling:
        raise ArraError(
            f"--tokenizer {name}: {tokenizer.model.settings.downsampling} pixels per code, the model was trained with "
            f"{pixels} (the arguments in its checkpoint); name that one"
        )
    return tokenizer
