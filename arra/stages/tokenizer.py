"""The image tokenizer of a recipe: a known one, or one trained into the store before the codes are made.

sources -> store's records -> pictures, from memory or read while training -> `store/tokenizer` -> codes
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from arra.config import Recipe
from arra.data.columns import folder_lock
from arra.data.store import Store
from arra.errors import ArraError
from arra.runs import atomic_write, file_hash
from arra.stages.process import Progress, silent
from arra.tokenizers import EMBEDDED, ImageTokenizer, load_tokenizer
from arra.tokenizers.image import CARD_FILE
from arra.tokenizers.vq import NO_DECODER, VQModel, VQSettings
from arra.train.discriminator import refuse_small_images
from arra.train.settings import TokenizerTrainSettings

NOT_THE_RESULT = {"device", "workers", "log_every_steps", "checkpoint_every_steps"}
"""Settings of training that say nothing of what comes out (but for rounding)."""


def prepare_tokenizer(
    recipe: Recipe, store: Store, *, replace: bool = False, progress: Progress = silent
) -> ImageTokenizer:
    """The recipe's tokenizer, trained into `store/tokenizer` first if the recipe says so and it is not there yet.

    Raises:
        TrainingInterrupted: a signal asked to stop; the tokenizer's state is saved.
        ArraError: the settings do not fit the pictures or the store's codes, or the training diverged.
    """
    section = recipe.tokenizer
    if section.train is None:
        return load_named(recipe)
    folder = store.path / "tokenizer"
    if Path(section.name).is_dir() and folder.is_dir() and folder.samefile(section.name):
        raise ArraError(f"tokenizer.name: {section.name} is where the trained tokenizer goes; copy it elsewhere first")
    start = load_named(recipe) if section.network is None else None
    network = section.network if start is None else start.model.settings
    assert network is not None
    _refuse_misfits(section.train, network, recipe.data.image_size)
    made_from = _made_from(recipe, store, start)
    with folder_lock(folder):  # of several processes one trains, the others wait and find it
        if (folder / CARD_FILE).is_file():
            tokenizer = load_tokenizer(folder)
            if _is_same(tokenizer.about.get("made_from"), made_from):
                return tokenizer
            if not replace and not _keeps_codes(store, section.train, start):
                raise ArraError(
                    f"{folder}: the store's codes are of a tokenizer that was trained otherwise than the recipe says; "
                    "use another store, or make both anew with --replace"
                )
        _forget_other_training(folder, made_from)
        if start is not None:
            model = start.model
        else:
            torch.manual_seed(section.train.seed)
            model = VQModel(network)
        # What trains brings torch's distributed checkpoints, a second's import that no one who paints should wait for.
        from arra.stages.tokenizer_training import TokenizerTraining

        TokenizerTraining(recipe, store, model, folder, progress).run(made_from, start)
    return load_tokenizer(folder)


def load_named(recipe: Recipe) -> ImageTokenizer:
    """The tokenizer that the recipe names, with the weights file it gives."""
    section = recipe.tokenizer
    return load_tokenizer(section.name, weights=section.weights, entry=section.entry)


def _refuse_misfits(train: TokenizerTrainSettings, network: VQSettings, image_size: int) -> None:
    if image_size % network.downsampling:
        raise ArraError(
            f"data.image_size: {image_size} is no multiple of {network.downsampling}, the pixels per code of this "
            "tokenizer; change it"
        )
    if not network.has_decoder:
        raise ArraError(f"tokenizer: {NO_DECODER}")
    if train.part == "all" and train.entropy_weight and not network.normalize:
        raise ArraError(
            "tokenizer.train.entropy_weight: made for normalised codes, this tokenizer's are not; set it to 0"
        )
    if train.adversarial is not None:
        refuse_small_images(image_size, num_layers=train.adversarial.num_layers)


def _made_from(recipe: Recipe, store: Store, start: ImageTokenizer | None) -> dict[str, Any]:
    """All that the trained weights depend on, as plain data."""
    section, train = recipe.tokenizer, recipe.tokenizer.train
    assert train is not None
    made_from = {
        "start": "fresh" if start is None else start.name,
        "start_sha256": None if start is None else start.weights_hash,
        "network": None if section.network is None else section.network.model_dump(mode="json"),
        "train": _result_settings(train),
        "image_size": recipe.data.image_size,
        "records": store.about["sha256"],
    }
    if start is not None and section.entry != "model":
        made_from["start_entry"] = section.entry
    if train.perceptual is not None:
        if missing := [file for file in train.perceptual.files if not Path(file).is_file()]:
            raise ArraError(
                f"tokenizer.train.perceptual.files: {missing[0]}: no such file; fetch it, or leave LPIPS out"
            )
        made_from["perceptual_sha256"] = [file_hash(file) for file in train.perceptual.files]
    plain: dict[str, Any] = json.loads(json.dumps(made_from))
    return plain


def _result_settings(train: TokenizerTrainSettings) -> dict[str, Any]:
    settings = train.model_dump(mode="json", exclude=NOT_THE_RESULT)
    if settings["perceptual"] is not None:
        del settings["perceptual"]["files"]  # their content counts
    return settings


def _is_same(kept: object, made_from: Mapping[str, Any]) -> bool:
    """Whether two trainings give the same; what an older card does not tell is what it was by default."""
    if not isinstance(kept, dict) or not isinstance(kept.get("train"), dict):
        return False
    told = {key: value for key, value in kept["train"].items() if key not in NOT_THE_RESULT}
    train, network = _result_settings(TokenizerTrainSettings()) | told, kept.get("network")
    if isinstance(network, dict):
        network = VQSettings().model_dump(mode="json") | network
    return kept | {"train": train, "network": network} == made_from


def _keeps_codes(store: Store, train: TokenizerTrainSettings, start: ImageTokenizer | None) -> bool:
    """Whether the store's codes, if any, are the ones that the tokenizer to be trained gives too."""
    codes = store.entry("codes")
    if codes is None:
        return True
    named = {key: codes.made_by.get(key) for key in ("tokenizer", "weights")}
    return train.part == "decoder" and start is not None and named == start.codes_of


def _forget_other_training(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Nothing; the folder's checkpoints, if any, are of this training: others must not be resumed from."""
    begun = folder / "training.json"
    try:
        same = _is_same(json.loads(begun.read_text()), made_from)
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        for old in (folder / CARD_FILE, folder / "metrics.jsonl"):
            old.unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        atomic_write(begun, json.dumps(made_from))


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
