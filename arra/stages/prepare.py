"""From pictures to the store: `arra prepare`.

Legend: N records, h w code grid, F feature.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arra.config import Recipe
from arra.data.folder import load_folder
from arra.data.images import center_crop
from arra.data.openmoji import load_openmoji
from arra.data.records import RecordSet, load_image
from arra.data.store import Store
from arra.encoders import encoder_spec, load_encoder
from arra.errors import ArraError
from arra.evaluate.evaluation import encode_all
from arra.runs import atomic_write
from arra.stages.process import Progress, silent
from arra.tokenizers import EMBEDDED, ImageTokenizer, load_tokenizer
from arra.tokenizers.image import CARD_FILE
from arra.tokenizers.vq import VQModel
from arra.train.tokenizer import TokenizerStep, TokenizerTrainer, train_tokenizer

CHUNK = 128
"""Pictures held in memory at a time."""


def load_records(recipe: Recipe) -> RecordSet:
    """The record set that the recipe names.

    Raises:
        ArraError: the pictures are not as they should be, or the cache cannot be written.
    """
    if recipe.data.source == "openmoji":
        try:
            return load_openmoji()
        except ArraError as error:
            if isinstance(error.__cause__, OSError):  # --out, which other failed writes advise, is no help here
                raise ArraError(f"{str(error).partition(';')[0]}; set ARRA_CACHE to another folder") from error
            raise
    return load_folder(Path(str(recipe.data.path)))


def prepare(recipe: Recipe, folder: Path, *, progress: Progress = silent) -> Store:
    """The store of the recipe: pixels, codes and teacher features of every record; columns that are there stay.

    The tokenizer is trained first where the recipe says so; it then lies in `folder/tokenizer`.
    """
    progress("reading pictures", 0, 1)
    records = load_records(recipe)
    store = Store.create(folder, records)
    size, large = recipe.data.image_size, recipe.data.encoder_image_size
    wanted = {"pixels": {"crop": crop_text(size)}}
    teacher = f"features.{recipe.encoder.teacher}"
    wanted[teacher] = teacher_made_by(recipe)
    missing = [name for name, made_by in wanted.items() if not store.has(name, made_by)]
    if missing:
        _pixels_and_features(recipe, records, store, {name: wanted[name] for name in missing}, size, large, progress)
    tokenizer = prepare_tokenizer(recipe, store, records, progress=progress)
    made_by = codes_made_by(recipe, tokenizer)
    if not store.has("codes", made_by):
        pixels = torch.from_numpy(store.column("pixels"))
        parts = []
        for start in range(0, len(pixels), CHUNK):
            progress("pictures to codes", start, len(pixels))
            parts.append(tokenizer.encode(pixels[start : start + CHUNK]))
        store.write("codes", torch.cat(parts).numpy().astype(np.int32), made_by)
    progress("store ready", 1, 1)
    return store


def crop_text(size: int) -> str:
    """The crop as the manifest names it."""
    return f"center_crop({size})"


def teacher_made_by(recipe: Recipe) -> dict[str, Any]:
    """What the manifest says of the teacher's features."""
    spec = encoder_spec(recipe.encoder.teacher)
    return {
        "encoder": spec.name,
        "weights": spec.weights_sha256,
        "aggregate": "mean",
        "crop": crop_text(recipe.data.encoder_image_size),
        "input": spec.image_size,
    }


def codes_made_by(recipe: Recipe, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What the manifest says of the codes."""
    return {
        "tokenizer": tokenizer.name,
        "weights": tokenizer.weights_hash,
        "num_codes": tokenizer.num_codes,
        "crop": crop_text(recipe.data.image_size),
    }


def _pixels_and_features(
    recipe: Recipe,
    records: RecordSet,
    store: Store,
    wanted: dict[str, dict[str, Any]],
    size: int,
    large: int,
    progress: Progress,
) -> None:
    """One pass over the pictures: decoded once, cropped once, seen by every maker."""
    encoder = load_encoder(recipe.encoder.teacher) if any(name != "pixels" for name in wanted) else None
    small, features = [], []
    for start in range(0, len(records), CHUNK):
        progress("pictures to teacher features", start, len(records))
        images = [load_image(record) for record in records.records[start : start + CHUNK]]
        small.append(np.stack([center_crop(image, size) for image in images]))
        if encoder is not None:
            big = torch.from_numpy(np.stack([center_crop(image, large) for image in images]))
            features.append(encode_all(encoder, big).numpy())
    for name, made_by in wanted.items():
        store.write(name, np.concatenate(small if name == "pixels" else features), made_by)


def prepare_tokenizer(
    recipe: Recipe, store: Store, records: RecordSet, *, progress: Progress = silent
) -> ImageTokenizer:
    """The recipe's tokenizer, trained into `store/tokenizer` first if the recipe says so and it is not there yet.

    Raises:
        TrainingInterrupted: a signal asked to stop; the tokenizer's state is saved.
    """
    section = recipe.tokenizer
    if section.train is None:
        return load_tokenizer(section.name)
    folder = store.path / "tokenizer"
    start = load_tokenizer(section.name) if section.network is None else None
    made_from = {
        "start": "fresh" if start is None else start.name,
        "start_sha256": None if start is None else start.weights_hash,
        "network": None if section.network is None else section.network.model_dump(mode="json"),
        "train": section.train.model_dump(mode="json"),
        "image_size": recipe.data.image_size,
        "records": store.manifest()["records"]["sha256"],
    }
    made_from = json.loads(json.dumps(made_from))
    if (folder / CARD_FILE).is_file():
        tokenizer = load_tokenizer(folder)
        if tokenizer.about.get("made_from") == made_from:
            return tokenizer
    _forget_other_training(folder, made_from)
    if start is not None:
        model = start.model.train()
    else:
        assert section.network is not None
        torch.manual_seed(section.train.seed)
        model = VQModel(section.network)
    trained, psnr = _train_tokenizer(recipe, records, model, folder, progress)
    about = {"made_from": made_from, "validation_psnr_db": psnr, "data": records.name, "credit": records.attribution}
    ImageTokenizer(
        trained, name=f"{records.name}-vq{trained.settings.downsampling}", weights_hash=None, about=about
    ).save(folder, half=True)
    return load_tokenizer(folder)


def _forget_other_training(folder: Path, made_from: dict[str, Any]) -> None:
    """Nothing; the folder's checkpoints, if any, are of this training: others must not be resumed from."""
    begun = folder / "training.json"
    if not begun.is_file() or begun.read_text() != json.dumps(made_from):
        for old in (folder / CARD_FILE, *folder.glob("checkpoints/step-*")):
            old.unlink(missing_ok=True)
        atomic_write(begun, json.dumps(made_from))


def _train_tokenizer(
    recipe: Recipe, records: RecordSet, model: VQModel, folder: Path, progress: Progress
) -> tuple[VQModel, float]:
    settings = recipe.tokenizer.train
    assert settings is not None
    size = 2 * recipe.data.image_size

    def pictures(split: str, pixels: int) -> Tensor:
        rows = [center_crop(load_image(records.records[i]), pixels) for i in records.split_indices(split)]
        return torch.from_numpy(np.stack(rows))

    def report(trainer: TokenizerTrainer, step: TokenizerStep) -> None:
        progress(f"training the tokenizer, {step.psnr_db:.1f} dB", step.step, settings.steps)

    torch.set_flush_denormal(True)  # optimiser states of dead codes decay into denormals, which are slow
    train = pictures("train", size).permute(0, 3, 1, 2).contiguous()
    trainer = train_tokenizer(model, train, settings, folder=folder / "checkpoints", report=report)
    trained = VQModel(model.settings)
    trained.load_state_dict(trainer.average)
    held_out = pictures("validation", recipe.data.image_size)
    tokenizer = ImageTokenizer(trained, name="in training", weights_hash=None)
    mse = (tokenizer.decode(tokenizer.encode(held_out)).double() - held_out.double()).div(255).square().mean((1, 2, 3))
    return trained, round(float((-10 * mse.log10()).mean()), 3)


def recipe_tokenizer(recipe: Recipe, store: Store) -> ImageTokenizer:
    """The tokenizer a recipe uses: its named one, or the one trained into the store.

    Raises:
        ArraError: there is none in the store.
    """
    folder = tokenizer_folder(recipe, store)
    if recipe.tokenizer.train is not None and not (store.path / "tokenizer" / CARD_FILE).is_file():
        raise ArraError(f"{store.path}: its tokenizer is not trained yet; run: arra prepare RECIPE")
    return load_tokenizer(folder or recipe.tokenizer.name)


def tokenizer_folder(recipe: Recipe, store: Store) -> Path | None:
    """The folder of a tokenizer that does not come with the package."""
    if recipe.tokenizer.train is not None:
        return store.path / "tokenizer"
    named = Path(recipe.tokenizer.name)
    return named if named.is_dir() and recipe.tokenizer.name != EMBEDDED else None
