"""The image tokenizer of a recipe: a known one, or one trained into the store before the codes are made.

Legend: N pictures, H W pixels.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from arra.config import Recipe
from arra.data.columns import folder_lock
from arra.data.crops import CropSettings
from arra.data.loading import Loader, Task, View, default_workers, load_tasks
from arra.data.store import Store
from arra.errors import ArraError
from arra.runs import atomic_write
from arra.stages.process import Progress, silent
from arra.tokenizers import EMBEDDED, ImageTokenizer, load_tokenizer
from arra.tokenizers.image import CARD_FILE
from arra.tokenizers.vq import VQModel
from arra.train.tokenizer import TokenizerStep, TokenizerTrainer, train_tokenizer

PICTURES_AT_A_TIME = 64


def prepare_tokenizer(
    recipe: Recipe, store: Store, *, replace: bool = False, progress: Progress = silent
) -> ImageTokenizer:
    """The recipe's tokenizer, trained into `store/tokenizer` first if the recipe says so and it is not there yet.

    Raises:
        TrainingInterrupted: a signal asked to stop; the tokenizer's state is saved.
    """
    section = recipe.tokenizer
    if section.train is None:
        return load_named(recipe)
    folder = store.path / "tokenizer"
    start = load_named(recipe) if section.network is None else None
    made_from = {
        "start": "fresh" if start is None else start.name,
        "start_sha256": None if start is None else start.weights_hash,
        "network": None if section.network is None else section.network.model_dump(mode="json"),
        "train": section.train.model_dump(mode="json"),
        "image_size": recipe.data.image_size,
        "records": store.about["sha256"],
    }
    made_from = json.loads(json.dumps(made_from))
    with folder_lock(folder):  # of several processes one trains, the others wait and find it
        if (folder / CARD_FILE).is_file():
            tokenizer = load_tokenizer(folder)
            if tokenizer.about.get("made_from") == made_from:
                return tokenizer
            if store.entry("codes") is not None and not replace:
                raise ArraError(
                    f"{folder}: the store's codes are of a tokenizer that was trained otherwise than the recipe says; "
                    "use another store, or make both anew with --replace"
                )
        _forget_other_training(folder, made_from)
        if start is not None:
            model = start.model.train()
        else:
            assert section.network is not None
            torch.manual_seed(section.train.seed)
            model = VQModel(section.network)
        trained, psnr = _train(recipe, store, model, folder, progress)
        credit, name = store.about["attribution"], store.about["name"]
        about = {"made_from": made_from, "validation_psnr_db": psnr, "data": name, "credit": credit}
        full_name = f"{name}-vq{trained.settings.downsampling}"
        ImageTokenizer(trained, name=full_name, weights_hash=None, about=about).save(folder, half=True)
    return load_tokenizer(folder)


def load_named(recipe: Recipe) -> ImageTokenizer:
    """The tokenizer that the recipe names, with the weights file it gives."""
    section = recipe.tokenizer
    return load_tokenizer(section.name, weights=section.weights)


def _forget_other_training(folder: Path, made_from: dict[str, object]) -> None:
    """Nothing; the folder's checkpoints, if any, are of this training: others must not be resumed from."""
    begun = folder / "training.json"
    if not begun.is_file() or begun.read_text() != json.dumps(made_from):
        for old in (folder / CARD_FILE, *folder.glob("checkpoints/step-*")):
            old.unlink(missing_ok=True)
        atomic_write(begun, json.dumps(made_from))


def _train(recipe: Recipe, store: Store, model: VQModel, folder: Path, progress: Progress) -> tuple[VQModel, float]:
    settings = recipe.tokenizer.train
    assert settings is not None

    def report(trainer: TokenizerTrainer, step: TokenizerStep) -> None:
        progress(f"training the tokenizer, {step.psnr_db:.1f} dB", step.step, settings.steps)

    torch.set_flush_denormal(True)  # optimiser states of dead codes decay into denormals, which are slow

    def pictures(split: str, pixels: int) -> Tensor:
        def reading(done: int, total: int) -> None:
            progress(f"reading {split} pictures", done, total)

        return center_pictures(recipe, store, rows=store.rows(split), pixels=pixels, may_fail=True, progress=reading)

    train = pictures("train", 2 * recipe.data.image_size)
    channels_first = train.permute(0, 3, 1, 2).contiguous()
    trainer = train_tokenizer(model, channels_first, settings, folder=folder / "checkpoints", report=report)
    trained = VQModel(model.settings)
    trained.load_state_dict(trainer.average)
    held_out = pictures("validation", recipe.data.image_size)
    tokenizer = ImageTokenizer(trained, name="in training", weights_hash=None)
    mse = (tokenizer.decode(tokenizer.encode(held_out)).double() - held_out.double()).div(255).square().mean((1, 2, 3))
    return trained, round(float((-10 * mse.log10()).mean()), 3)


def center_pictures(
    recipe: Recipe,
    store: Store,
    *,
    rows: np.ndarray,
    pixels: int | None = None,
    may_fail: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UInt8[Tensor, "N H W 3"]:
    """Middle squares of some records' pictures, of `pixels` (else the recipe's size) a side.

    Raises:
        ArraError: a picture cannot be read (all of them, where some `may_fail`).
    """
    size = pixels or recipe.data.image_size
    starts = np.array(store.shard_starts)
    tasks = list(_tasks(rows, np.searchsorted(starts, rows, side="right") - 1, starts))
    loader = Loader(store.path, {"x": View(CropSettings(), size, size)}, grey16=recipe.data.crop.grey16)
    images: list[np.ndarray] = []
    for number, loaded in enumerate(load_tasks(tasks, loader, workers=default_workers() if len(tasks) > 1 else 0)):
        progress(number, len(tasks))
        if loaded.failures and not may_fail:
            failure = loaded.failures[0]
            raise ArraError(f"{failure.where}: picture of record '{failure.id}': {failure.reason}")
        images += [each[0] for each in loaded.views["x"]]
    if not images:
        raise ArraError(f"{store.path}: none of {len(rows)} pictures can be read; see arra data check")
    return torch.from_numpy(np.stack(images))


def _tasks(rows: np.ndarray, shards: np.ndarray, starts: np.ndarray) -> Iterator[Task]:
    """Tasks that cover the rows, runs of neighbours together."""
    begin = 0
    for place in range(1, len(rows) + 1):
        ends = place == len(rows) or rows[place] != rows[place - 1] + 1 or shards[place] != shards[begin]
        if ends or place - begin == PICTURES_AT_A_TIME:
            first, last = int(rows[begin] - starts[shards[begin]]), int(rows[place - 1] - starts[shards[begin]])
            yield Task(int(shards[begin]), first, last + 1)
            begin = place


def recipe_tokenizer(recipe: Recipe, store: Store) -> ImageTokenizer:
    """The tokenizer a recipe uses: its named one, or the one trained into the store.

    Raises:
        ArraError: there is none in the store.
    """
    if recipe.tokenizer.train is None:
        return load_named(recipe)
    if not (store.path / "tokenizer" / CARD_FILE).is_file():
        raise ArraError(f"{store.path}: its tokenizer is not trained yet; run: arra prepare RECIPE")
    return load_tokenizer(store.path / "tokenizer")


def tokenizer_folder(recipe: Recipe, store: Store) -> Path | None:
    """The folder of a tokenizer that does not come with the package."""
    if recipe.tokenizer.train is not None:
        return store.path / "tokenizer"
    named = Path(recipe.tokenizer.name)
    return named if named.is_dir() and recipe.tokenizer.name != EMBEDDED else None
