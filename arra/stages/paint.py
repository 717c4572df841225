"""From a trained model to pictures: `arra generate`. Nothing here knows how the model was trained.

Legend: N pictures, H W pixels.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from arra.config import Recipe, TextEncoderSection, parse_recipe
from arra.data.store import Store
from arra.distributed import choose_device
from arra.errors import ArraError
from arra.models import CausalLM, Painter, load_model
from arra.models.chameleon import is_chameleon
from arra.report.grids import GridColumn, png_bytes, sample_grid
from arra.runs import Run, atomic_file, atomic_write, writing
from arra.sample.generate import generate
from arra.sample.logits import SamplingSettings
from arra.stages.language import is_hugging_face, says_shape
from arra.stages.model import weights_hash
from arra.stages.origin import columns_of, find_store, noted
from arra.stages.wishes import Wishes, prompt_wishes
from arra.tokenizers import ImageTokenizer, load_tokenizer
from arra.tokenizers.image import EMBEDDED, PUBLISHED

MAX_SEED = 2**63 - 1
"""What torch's generators take."""
MAX_SEEDS = 10_000
"""More in one range is a slip of the keyboard."""
BATCHES_AT_A_TIME = 8
"""Painted before their pictures are written."""
GRID_ROWS, GRID_COLUMNS = 64, 16
"""Of grid.png, at most."""


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

    def on(self: Loaded, device: str) -> Loaded:
        """The same, with its networks on a device.

        Raises:
            ArraError: there is no such device.
        """
        place = choose_device(device)
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
    return LoadedDecoder(folder, model, own, _own_sampling(model), None)


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


def _own_sampling(model: Painter) -> SamplingSettings:
    """How a model paints that no recipe speaks for: as its card says, if it does."""
    told = model.about.get("sampling")
    try:
        return SamplingSettings(**told) if isinstance(told, dict) else SamplingSettings()
    except ValidationError as error:
        raise ArraError(
            f"model.json: about.sampling: {error.errors()[0]['msg']}; mend it or save the model again"
        ) from error


def load_run(folder: Path, *, tokenizer: str | None = None, tokenizer_weights: Path | None = None) -> LoadedRun:
    """Model, tokenizer and recipe of a finished run.

    Raises:
        ArraError: no run, an unfinished run, or a missing tokenizer.
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
    return LoadedRun(folder, model, own, recipe.sample, recipe.text_encoder, run, recipe, store)


def _own_tokenizer(folder: Path, recipe: Recipe, manifest: dict[str, Any], weights: Path | None) -> ImageTokenizer:
    """The tokenizer that a run was trained with."""
    inside, name, expected = folder / "tokenizer", manifest["tokenizer"], manifest["tokenizer_sha256"]
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


def paint_prompts(
    loaded: LoadedDecoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    overrides: dict[str, Any],
    batch_size: int = 16,
) -> list[Path]:
    """The files written, as `paint` does it, for prompts.

    Raises:
        ArraError: an empty prompt, a prompt that does not fit, or a folder that cannot be written.
    """
    wishes = prompt_wishes(loaded.model, prompts, section=loaded.text_encoder)
    return paint(loaded, wishes, seeds, out, overrides=overrides, batch_size=batch_size)


def paint(
    loaded: LoadedDecoder,
    wishes: Wishes,
    seeds: Sequence[int],
    out: Path,
    *,
    overrides: dict[str, Any],
    batch_size: int = 16,
    grid: tuple[int, int] | None = None,
) -> list[Path]:
    """The files written: NNNNNN.png for every wish with every seed, samples.jsonl, and grid.png with the first ones.

    `grid` is the height and width in codes, for models that have the choice.

    Raises:
        ArraError: a folder that cannot be written.
    """
    settings = {**loaded.sampling.model_dump(), **{k: v for k, v in overrides.items() if v is not None}}
    model_hash = weights_hash(str(loaded.path))
    pairs = list(product(range(len(wishes)), seeds))
    written: list[Path] = []
    lines: list[str] = []
    shown: np.ndarray = np.empty(0)
    for start in range(0, len(pairs), batch_size * BATCHES_AT_A_TIME):
        part = pairs[start : start + batch_size * BATCHES_AT_A_TIME]
        result = generate(
            loaded.model,
            loaded.tokenizer,
            seeds=[seed for _, seed in part],
            batch_size=batch_size,
            grid=grid,
            **wishes.inputs([place for place, _ in part]),
            **settings,
        )
        assert result.images is not None
        images = result.images.cpu().numpy()
        if not written:
            _remove_listed(out)
            shown = np.zeros((min(len(wishes), GRID_ROWS), min(len(seeds), GRID_COLUMNS), *images.shape[1:]), np.uint8)
        for number, ((place, seed), image) in enumerate(zip(part, images, strict=True), start=start):
            row = {"file": f"{number:06d}.png", **wishes.facts[place], "seed": seed, **settings}
            row["model_sha256"] = model_hash
            written.append(_write_picture(out / row["file"], image, row))
            lines.append(json.dumps(row, ensure_ascii=False))
            if place < shown.shape[0] and number % len(seeds) < shown.shape[1]:
                shown[place, number % len(seeds)] = image
    atomic_write(out / "samples.jsonl", "\n".join(lines) + "\n")
    column = GridColumn(label=loaded.path.resolve().name, images=shown)
    atomic_write(out / "grid.png", png_bytes(sample_grid([column], captions=wishes.texts[: len(shown)])))
    return [*written, out / "grid.png"]


def _write_picture(path: Path, image: np.ndarray, about: dict[str, Any]) -> Path:
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(f"arra:{key}", str(value))
    with atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)
    return path


def _remove_listed(out: Path) -> None:
    """Nothing; the pictures of an earlier samples.jsonl are gone, so none stands beside a grid it is not in."""
    lines = out / "samples.jsonl"
    if not lines.is_file():
        return
    names = re.findall(r'^\{"file": "(\d{6,}\.png)"', lines.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    with writing(out):
        for name in names:
            (out / name).unlink(missing_ok=True)
        lines.unlink()


def parse_seeds(text: str) -> list[int]:
    """Seeds from a text such as 0-7 or 1,5,9.

    Raises:
        ArraError: it is no such text.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ArraError(f"--seeds {text}: expected numbers as in 0-7 or 1,5,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MAX_SEED or last - first >= MAX_SEEDS:
            raise ArraError(f"--seeds {text}: expected at most {MAX_SEEDS} seeds, none above {MAX_SEED}")
        seeds += range(first, last + 1)
    return seeds


def parse_grid(model: Painter, text: str | None) -> tuple[int, int] | None:
    """Height and width in codes of an image size in pixels, as 512 or 768x512 (width x height); None of None.

    Raises:
        ArraError: it is no such text, or the model cannot paint it.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,5})(?:\s*[xX]\s*(\d{1,5}))?\s*", text)
    if match is None:
        raise ArraError(f"--image-size {text}: expected pixels, as 512, or width x height, as 768x512")
    if not isinstance(model, CausalLM):
        raise ArraError("--image-size: this model paints pictures of one size; leave it out")
    width, height = int(match[1]), int(match[2] or match[1])
    step = model.layout.pixels_per_code
    if width % step or height % step:
        raise ArraError(f"--image-size {text}: sides must be multiples of {step} pixels, those of one code")
    grid = (height // step, width // step)
    if grid != model.settings.grid and not says_shape(model.layout):
        own = " x ".join(str(side * step) for side in reversed(model.settings.grid))
        raise ArraError(f"--image-size {text}: this model's pictures do not say their shape; it paints {own} alone")
    try:
        model.layout.check_grid(grid)
    except ArraError as error:
        raise ArraError(f"--image-size {text}: {error}") from error
    model.layout.check_fits(0, grid, where=f"--image-size {text}")
    return grid
