"""From a finished run to pictures: `arra generate`. Nothing here knows how the run was trained.

Legend: N pictures, H W pixels.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from arra.config import Recipe, parse_recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.models import Decoder, load_model
from arra.report.grids import GridColumn, png_bytes, sample_grid
from arra.runs import Run, atomic_file, atomic_write
from arra.sample.generate import generate
from arra.stages.evaluate import protocol_of
from arra.tokenizers import ImageTokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to paint."""

    run: Run
    recipe: Recipe
    model: Decoder
    tokenizer: ImageTokenizer
    store: Store | None


def load_run(folder: Path) -> LoadedRun:
    """Model, tokenizer and recipe of a finished run.

    Raises:
        ArraError: no run, an unfinished run, or a missing tokenizer.
    """
    run = Run.open(folder)
    recipe = parse_recipe(run.recipe_yaml(), Recipe, source=str(run.recipe_path))
    if not (folder / "model.json").is_file():
        raise ArraError(f"{folder}: training has not finished; run: arra train {folder / 'recipe.yaml'} --out {folder}")
    manifest = run.manifest()
    own = folder / "tokenizer"
    tokenizer = load_tokenizer(own if own.is_dir() else manifest["tokenizer"])
    if tokenizer.weights_hash != manifest["tokenizer_sha256"] and not own.is_dir():
        raise ArraError(
            f"{folder}: trained on codes of {manifest['tokenizer']} {str(manifest['tokenizer_sha256'])[:12]}, found "
            f"{str(tokenizer.weights_hash)[:12]}; install the version of arra that trained it, or train again"
        )
    store = Path(manifest["store"])
    found = Store.open(store) if (store / "manifest.json").is_file() else None
    return LoadedRun(run, recipe, load_model(folder), tokenizer, found)


def paint_prompts(
    loaded: LoadedRun,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    overrides: dict[str, Any],
    batch_size: int = 16,
) -> list[Path]:
    """The files written: NNNNNN.png for every prompt with every seed, samples.jsonl, and grid.png with all of them.

    Raises:
        ArraError: an empty prompt, a prompt that does not fit, or a folder that cannot be written.
    """
    settings = {**loaded.recipe.sample.model_dump(), **{k: v for k, v in overrides.items() if v is not None}}
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    manifest_hash = protocol_of(loaded)["model_sha256"]
    result = generate(
        loaded.model,
        loaded.tokenizer,
        prompts=[prompt for prompt, _ in pairs],
        seeds=[seed for _, seed in pairs],
        batch_size=batch_size,
        **settings,
    )
    assert result.images is not None
    written, lines = [], []
    for number, ((prompt, seed), image) in enumerate(zip(pairs, result.images.numpy(), strict=True)):
        row = {"file": f"{number:06d}.png", "prompt": prompt, "seed": seed, **settings, "model_sha256": manifest_hash}
        info = PngInfo()
        for key, value in row.items():
            info.add_itxt(f"arra:{key}", str(value))
        path = out / f"{number:06d}.png"
        with atomic_file(path) as temporary:
            Image.fromarray(image).save(temporary, "PNG", pnginfo=info)
        written.append(path)
        lines.append(json.dumps(row, ensure_ascii=False))
    atomic_write(out / "samples.jsonl", "\n".join(lines) + "\n")
    images = result.images.numpy().reshape(len(prompts), len(seeds), *result.images.shape[1:])
    column = GridColumn(label=loaded.run.path.name, images=images)
    atomic_write(out / "grid.png", png_bytes(sample_grid([column], captions=list(prompts))))
    return [*written, out / "grid.png"]


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
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArraError(
                f"{file}: cannot be read ({error}); expected a text file with one prompt per line"
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ArraError(f"{file}: line {number} is empty; expected one prompt per line, remove it")
        texts += lines
    if not texts:
        raise ArraError("generate: no prompt; give --prompt TEXT or --prompts FILE")
    return texts


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
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds
