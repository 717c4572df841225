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
from arra.runs import Run, atomic_file, atomic_write, file_hash, writing
from arra.sample.generate import generate
from arra.stages.origin import columns_of, find_store, noted
from arra.tokenizers import ImageTokenizer, load_tokenizer

MAX_SEED = 2**63 - 1
"""What torch's generators take."""
MAX_SEEDS = 10_000
"""More in one range is a slip of the keyboard."""


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
        store_path = noted(folder).get("at_first", "STORE")
        raise ArraError(
            f"{folder}: training has not finished; run the command that began it again, or: "
            f"arra train {folder / 'recipe.yaml'} --store {store_path} --out {folder}"
        )
    manifest = run.manifest()
    if missing := [key for key in ("tokenizer", "tokenizer_sha256", "store_sha256") if key not in manifest]:
        raise ArraError(f"{folder}: manifest.json has no {missing[0]}; made by another program, train again")
    own = folder / "tokenizer"
    tokenizer = load_tokenizer(own if own.is_dir() else manifest["tokenizer"])
    if tokenizer.weights_hash != manifest["tokenizer_sha256"]:
        raise ArraError(
            f"{folder}: trained on codes of {manifest['tokenizer']} {str(manifest['tokenizer_sha256'])[:12]}, found "
            f"{str(tokenizer.weights_hash)[:12]}; install the version of arra that trained it, or train again"
        )
    store = find_store(folder, columns_of(recipe), manifest["store_sha256"])
    try:
        model = load_model(folder)
    except ArraError as error:
        raise ArraError(
            f"{str(error).rpartition(';')[0]}; delete {folder / 'model.json'} and run the training again: it continues "
            "from its checkpoint"
        ) from error
    return LoadedRun(run, recipe, model, tokenizer, store)


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
    check_prompts(loaded, prompts)
    settings = {**loaded.recipe.sample.model_dump(), **{k: v for k, v in overrides.items() if v is not None}}
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    model_hash = file_hash(loaded.run.path / "model.safetensors")
    result = generate(
        loaded.model,
        loaded.tokenizer,
        prompts=[prompt for prompt, _ in pairs],
        seeds=[seed for _, seed in pairs],
        batch_size=batch_size,
        **settings,
    )
    assert result.images is not None
    _remove_listed(out)
    written, lines = [], []
    for number, ((prompt, seed), image) in enumerate(zip(pairs, result.images.numpy(), strict=True)):
        row = {"file": f"{number:06d}.png", "prompt": prompt, "seed": seed, **settings, "model_sha256": model_hash}
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
    column = GridColumn(label=loaded.run.path.resolve().name, images=images)
    atomic_write(out / "grid.png", png_bytes(sample_grid([column], captions=list(prompts))))
    return [*written, out / "grid.png"]


def check_prompts(loaded: LoadedRun, prompts: Sequence[str]) -> None:
    """Nothing.

    Raises:
        ArraError: a prompt has no word in it, or more tokens than the model has room for.
    """
    text, room = loaded.model.text_tokenizer, loaded.model.settings.prefix_length - 1
    if text is None:
        return
    for prompt in prompts:
        count = len(text.encode(prompt))
        shown = prompt if len(prompt) <= 40 else prompt[:37] + "..."
        if count == 0:
            raise ArraError(f"prompt '{shown}': no word in it; say what to paint")
        if count > room:
            raise ArraError(
                f"prompt '{shown}': {count} tokens, this model has room for {room}; shorten it (common words are one "
                "token each), or train with a larger model.prefix_length"
            )


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
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MAX_SEED or last - first >= MAX_SEEDS:
            raise ArraError(f"--seeds {text}: expected at most {MAX_SEEDS} seeds, none above {MAX_SEED}")
        seeds += range(first, last + 1)
    return seeds
