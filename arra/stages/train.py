"""From a store to a trained run: `arra train`.

Legend: N records, P image positions, F feature.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arra.config import Recipe, dump_recipe
from arra.data.batches import Batches, HeldOutBatches, TrainBatch
from arra.data.language import LayoutWriter, MixedBatches
from arra.data.loading import default_workers
from arra.data.records import source_names
from arra.data.store import Store
from arra.distributed import choose_device, set_threads
from arra.encoders import SPECS, encoder_spec
from arra.errors import ArraError
from arra.models import Decoder, Painter, save_model
from arra.models.adapters import load_bitsandbytes
from arra.models.causal import CausalLM
from arra.models.language_folder import CARD_FILE as LANGUAGE_CARD
from arra.models.language_folder import LanguageCard
from arra.report.grids import png_bytes, strip
from arra.runs import Run, atomic_write
from arra.sample.generate import generate
from arra.stages.captions import check_caption_lengths
from arra.stages.conditions import asked_of, caption_width, condition_facts, num_classes, open_conditions
from arra.stages.language import (
    check_sequences,
    finish_language_model,
    first_language_model,
    held_out_batches,
    is_hugging_face,
    language_card,
    language_folder,
    prompt_conditions,
    shapes_of,
    text_hash,
    text_rows,
)
from arra.stages.makers import center_variant, crop_of, used_choices
from arra.stages.model import (
    WEIGHTS_NAMES,
    build_model,
    decoder_settings,
    text_tokenizer_of,
    tokenizer_network,
    weights_hash,
)
from arra.stages.origin import columns_of, note_store
from arra.stages.pictures import (
    OnlinePictures,
    StoredPictures,
    feature_sample,
    held_out_codes,
    open_pictures,
    require_columns,
    tokenizer_if_given,
)
from arra.stages.process import Progress, locked, silent
from arra.stages.tokenizer import tokenizer_folder
from arra.stages.watch import open_watcher
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.image import CARD_FILE, WEIGHTS_FILE
from arra.tokenizers.text import TextTokenizer
from arra.train.alignment import build_alignment, check_features, count_parameters
from arra.train.loop import Trainer

NUM_PREVIEWS = 8
MODEL_FILES = (LANGUAGE_CARD, "config.json", *WEIGHTS_NAMES, WEIGHTS_FILE)
"""What a folder of a model or a tokenizer has, and a run not before its end."""
MAX_TEXT_ROWS, TEXT_ROWS_AT_A_TIME = 256, 16
"""Of held-out text on which a language model is watched."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, read from a store after checking that the recipe fits it."""

    store: Store
    tokenizer: ImageTokenizer | None
    """None where the codes were imported and nobody gave the tokenizer's weights: training needs none."""
    text: TextTokenizer | None
    pictures: StoredPictures | OnlinePictures
    batches: Batches | MixedBatches
    validation: Sequence[TrainBatch]
    validation_rows: np.ndarray
    asked: Callable[[Sequence[int]], dict[str, Any]]
    """What a model is asked for some of the validation records."""
    features: Mapping[str, Tensor] | None
    """Every teacher's, of a sample of the training pictures, to fit the target spaces on."""
    card: LanguageCard | None = None
    """Of a language model."""
    text_validation: Sequence[TrainBatch] = ()


def training_data(
    recipe: Recipe, store: Store, tokenizer: ImageTokenizer | None, *, device: torch.device | None = None
) -> TrainingData:
    """Batches of the training split and the validation batches.

    Raises:
        ArraError: a column is missing or damaged, or a condition does not fit the model.
    """
    columns = columns_of(recipe)
    train, validation = store.rows("train", columns=columns), store.rows("validation", columns=columns)
    workers = default_workers()
    pictures = open_pictures(recipe, store, tokenizer, train, workers=workers, device=device or torch.device("cpu"))
    features = None
    if recipe.align is not None:
        features = feature_sample(pictures, center_variant(recipe), crop_of(recipe).num_variants)
        for where, term in recipe.align_terms():
            check_features(term, tuple(features[term.encoder].shape[1:]), where=where)
    told: dict[str, Any] = {
        "pictures": pictures,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
        "counts": store.source_counts(train),
        "groups": store.group_sizes(train),
        "window": store.window(columns),
        "weights": source_weights(recipe, store),
    }
    open_data = decoder_data if recipe.model.llm is None else language_data
    return TrainingData(
        store=store,
        tokenizer=tokenizer,
        pictures=pictures,
        validation_rows=validation,
        features=features,
        **open_data(recipe, store, tokenizer, train=train, validation=validation, told=told),
    )


def decoder_data(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    *,
    train: np.ndarray,
    validation: np.ndarray,
    told: dict[str, Any],
) -> dict[str, Any]:
    """What a decoder of fixed prefix is trained on, as fields of `TrainingData`."""
    text = text_tokenizer_of(recipe, store)
    if text is not None:
        check_caption_lengths(store, np.concatenate([train, validation]), text, recipe.model.prefix_length)
    conditions = open_conditions(recipe, store, validation, text)
    codes = held_out_codes(recipe, store, tokenizer, validation).flatten(1)
    return {
        "text": text,
        "batches": Batches(conditions=open_conditions(recipe, store, train, text), **told),
        "validation": HeldOutBatches(conditions, codes),
        "asked": asked_of(conditions, store, validation),
    }


def language_data(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    *,
    train: np.ndarray,
    validation: np.ndarray,
    told: dict[str, Any],
) -> dict[str, Any]:
    """What a language model is trained on, as fields of `TrainingData`.

    Raises:
        ArraError: a sequence does not fit the model's positions, or its text cannot be read.
    """
    card = language_card(recipe, tokenizer)
    shapes, held = (shapes_of(recipe, store, rows, card) for rows in (train, validation))
    for rows, grids in ((train, shapes), (validation, held)):
        check_sequences(store, rows, card, grids)
    batches = Batches(
        conditions=prompt_conditions(recipe, store, train, card, shapes),
        buckets=shapes.numbers,
        write=LayoutWriter(card.settings.layout),
        **told,
    )
    codes = held_out_codes(recipe, store, tokenizer, validation).flatten(1) if held.numbers is None else None
    mixed: Batches | MixedBatches = batches
    text_validation: list[TrainBatch] = []
    llm = recipe.model.llm
    if llm is not None and llm.text is not None:
        own, watched = text_rows(llm.text, card)
        places = torch.arange(len(watched))[:MAX_TEXT_ROWS]
        text_validation = [watched.batch(part) for part in places.split(TEXT_ROWS_AT_A_TIME)]
        if llm.text.rows:
            mixed = MixedBatches(batches, own, llm.text.rows)
    return {
        "text": None,
        "card": card,
        "batches": mixed,
        "validation": held_out_batches(recipe, store, validation, card, held, codes),
        "asked": asked_of(batches.conditions, store, validation),
        "text_validation": text_validation,
    }


def source_weights(recipe: Recipe, store: Store) -> tuple[float, ...] | None:
    """How often an epoch visits the records of each of the store's sources; None where all count once.

    Raises:
        ArraError: the recipe weighs other sources than the store was made from.
    """
    if recipe.data.sources is None or all(source.weight == 1 for source in recipe.data.sources):
        return None
    sources = recipe.data.all_sources
    ours, theirs = source_names(sources), [each["name"] for each in store.about["sources"]]
    if ours != theirs:
        raise ArraError(
            f"{store.path}: made from the sources {', '.join(theirs)}, the recipe weighs {', '.join(ours)}; name the "
            "same ones in the same order, or leave the weights out"
        )
    return tuple(source.weight for source in sources)


def train(recipe: Recipe, store: Store, folder: Path, *, previews: bool = True, progress: Progress = silent) -> Run:
    """The finished run: trained to the last step, resuming if it was begun.

    Raises:
        ArraError: the folder holds another recipe's run, the store does not fit the recipe, or torchrun started many.
        TrainingInterrupted: a signal asked to stop; run again to continue.
    """
    if recipe.data.crop.kind == "buckets" and recipe.model.llm is None:
        raise ArraError(
            f"data.crop: '{recipe.data.crop.kind}' gives pictures of many shapes, this model paints one grid; "
            "use center, flip, ten_crop or random"
        )
    if (ranks := os.environ.get("WORLD_SIZE", "")) not in ("", "1"):
        raise ArraError(f"train: started as one of {ranks} processes (WORLD_SIZE), trains with one; start it by itself")
    set_threads(recipe.train.threads)
    torch.set_flush_denormal(True)  # optimiser states of rare words decay into denormals, which are slow
    tokenizer = tokenizer_if_given(recipe, store)
    require_columns(recipe, store, tokenizer, columns_of(recipe))
    manifest = {
        "store_sha256": store.manifest_hash(*columns_of(recipe)),
        "tokenizer": recipe.tokenizer.name if tokenizer is None else tokenizer.name,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.weights_hash,
        "codes_of": None if tokenizer is None else tokenizer.codes_of,
        "seed": recipe.train.seed,
        "threads": torch.get_num_threads(),
    }
    start = given_weights(recipe)
    if start is not None:
        manifest["weights_sha256"] = weights_hash(start)
    if recipe.model.llm is not None and recipe.model.llm.text is not None:
        manifest["text_sha256"] = text_hash(recipe.model.llm.text)
    begun = (folder / "recipe.yaml").is_file()
    if not begun:
        refuse_models_folder(folder)
        if recipe.train.optimizer == "adamw8bit":  # a missing library leaves no run behind either
            load_bitsandbytes("train.optimizer: adamw8bit")
    if begun and is_finished(run := Run.create(folder, dump_recipe(recipe), manifest), recipe):
        with suppress(ArraError):  # it may lie on a read-only disk
            note_store(folder, store)
        return run
    device = choose_device(recipe.train.device)
    data = training_data(
        recipe, store, tokenizer, device=device
    )  # first: a recipe that does not fit its data leaves no run behind
    model = first_model(recipe, data).to(device)
    watcher = None
    if recipe.train.watch_every_steps is not None:
        watcher = open_watcher(
            recipe,
            store,
            tokenizer,
            used_choices(recipe) or {"teacher": recipe.encoder.choice("teacher")},
            hidden_size=model.hidden_size,
            text=data.text,
            card=data.card,
            images=recipe.train.watch_images,
            device=device,
            progress=progress,
        )
    if start is not None:
        model.about["started_from"] = {"weights": start, "sha256": manifest["weights_sha256"]}
    if isinstance(model, CausalLM) and tokenizer is not None:  # an imported one did not say
        model.about["codes_of"] = tokenizer.codes_of
    run = Run.create(folder, dump_recipe(recipe), manifest)
    with locked(run):
        if is_finished(run, recipe):
            return run
        note_store(folder, store)
        own = tokenizer_folder(recipe, store)
        if own is not None:
            for name in (WEIGHTS_FILE, CARD_FILE):  # the card last: a folder with a card is a tokenizer
                atomic_write(folder / "tokenizer" / name, (own / name).read_bytes())
        alignment = None
        if recipe.align is not None and data.features is not None:
            alignment = build_alignment(
                recipe.align, data.features, hidden_size=model.hidden_size, seed=recipe.train.seed
            )
            alignment = alignment.to(device)
        trainer = Trainer(
            model=model,
            alignment=alignment,
            batches=data.batches,
            validation=data.validation,
            settings=recipe.train,
            run=run,
            preview=_previewer(data, run) if previews else None,
            watch=_watch(progress, recipe.train.steps),
            watcher=watcher,
            text_validation=data.text_validation,
        )
        try:
            trainer.train()
        except FloatingPointError as error:
            raise ArraError(
                f"{folder}: training diverged at {error}; lower train.learning_rate or lengthen train.warmup_steps"
            ) from error
        finally:
            data.pictures.close()
        with trainer.averaged():  # the projector stays behind in the checkpoints
            if isinstance(model, CausalLM):
                finish_language_model(recipe, model, folder)
            save_model(model, folder)
    return run


def given_weights(recipe: Recipe) -> str | None:
    """What training starts from; None begins afresh.

    Raises:
        ArraError: a language model where the decoder's weights are named, or none where one is.
    """
    if recipe.model.llm is not None:
        return language_folder(recipe)
    weights = recipe.model.weights
    if weights is not None and is_hugging_face(Path(weights)):
        raise ArraError(
            f"model.weights: {weights} is a language model, no decoder; name it as model.llm.folder instead"
        )
    return weights


def refuse_models_folder(folder: Path) -> None:
    """Nothing.

    Raises:
        ArraError: a folder that is no run holds a model or a tokenizer, which training would write over.
    """
    if found := [name for name in MODEL_FILES if (folder / name).exists()]:
        raise ArraError(
            f"{folder}: holds a model already ({found[0]}), which training would write over; name a new folder with "
            "--out"
        )


def first_model(recipe: Recipe, data: TrainingData) -> Painter:
    """The model before its first step, with what it must know of its conditions to be asked again."""
    if data.card is not None:
        return first_language_model(recipe, data.card)
    network = tokenizer_network(recipe) if data.tokenizer is None else data.tokenizer.model.settings
    settings = decoder_settings(
        recipe,
        num_codes=network.num_codes,
        downsampling=network.downsampling,
        num_classes=num_classes(recipe, data.store) if recipe.model.condition == "class" else None,
        caption_dim=caption_width(recipe, data.store),
    )
    model = build_model(recipe, settings, text=data.text)
    model.about |= condition_facts(recipe, data.store)
    model.recompute = recipe.train.recompute
    return model


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Whether the run's last step is done and its model saved."""
    saved = all((run.path / name).is_file() for name in ("model.safetensors", "model.json"))
    return saved and any(row["step"] == recipe.train.steps for row in run.read_metrics()[-3:])


def _watch(progress: Progress, steps: int) -> Callable[[dict[str, Any]], None]:
    def watch(row: dict[str, Any]) -> None:
        if row["kind"] == "watch":
            return
        note = f"validation {row['ntp_loss']:.3f}" + (f", text {row['text_loss']:.3f}" if "text_loss" in row else "")
        if row["kind"] == "train":
            aligned = "" if row["gva_loss"] is None else f", gva {row['gva_loss']:.3f}"
            note = f"ntp {row['ntp_loss']:.3f}{aligned}, {row['images_per_second']:.1f} pictures/s"
        progress("step", row["step"], steps, note)

    return watch


def _previewer(data: TrainingData, run: Run) -> Callable[[Painter, int], None] | None:
    if data.tokenizer is None:
        return None
    tokenizer, count = data.tokenizer, len(data.validation_rows)
    spaced = range(0, count, max(1, count // NUM_PREVIEWS))[:NUM_PREVIEWS]
    asked = data.asked(spaced)

    def preview(model: Painter, step: int) -> None:
        result = generate(model, tokenizer, seeds=list(range(len(spaced))), **asked)
        assert result.images is not None
        path = run.path / "previews" / f"step-{step:06d}.png"
        atomic_write(path, png_bytes(strip(result.images.numpy())))

    return preview


def describe_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the numbers that follow from it as comments."""
    if recipe.model.llm is not None:
        return dump_recipe(recipe) + "".join(f"# {line}\n" for line in describe_language_model(recipe))
    network, model = tokenizer_network(recipe), recipe.model
    settings = decoder_settings(recipe, num_codes=network.num_codes, downsampling=network.downsampling)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(settings).parameters())
    length = settings.prefix_length + settings.num_positions
    images = recipe.train.steps * recipe.train.batch_size
    before = {
        "text": f"{settings.condition_length} text positions",
        "class": "1 class",
        "caption": f"{settings.condition_length} vectors of a caption",
    }
    rep = " + the REP token" if settings.rep_token else ""
    lines = [
        f"image: {settings.num_positions} codes ({settings.grid[0]} x {settings.grid[1]}) of {settings.num_codes}",
        f"sequence: {before[model.condition]}{rep} + {settings.num_positions} codes",
        f"decoder: {parameters:,} parameters",
        f"training: {images:,} images, {images * length:,} tokens",
    ]
    if model.condition == "class" and model.num_classes is None:
        lines.insert(2, f"classes: the store's; {settings.num_classes} assumed here")
    if model.weights is not None:
        lines.append(f"first weights: {model.weights}")
    if recipe.align is not None:
        lines += describe_projectors(recipe)
    return dump_recipe(recipe) + "".join(f"# {line}\n" for line in lines)


def describe_projectors(recipe: Recipe) -> list[str]:
    """How many parameters the projectors have, in a line; nothing where a teacher's features are not known yet."""
    assert recipe.align is not None
    sizes = {}
    for name, choice in used_choices(recipe).items():
        if choice.name not in SPECS or choice.output is not None or choice.layers is not None:
            return []
        sizes[name] = encoder_spec(choice.name).feature_size
    count = count_parameters(recipe.align, sizes, hidden_size=recipe.model.hidden_size)
    return [f"projector: {count:,} parameters, thrown away after training"]


def describe_language_model(recipe: Recipe) -> list[str]:
    """What follows from a recipe of a language model, in lines; nothing where its folder is not made yet."""
    llm = recipe.model.llm
    if llm is None or not (Path(llm.folder) / LANGUAGE_CARD).is_file():
        return [] if llm is None else [f"model: {llm.folder} is not there yet; arra init or arra import makes it"]
    settings = language_card(recipe).settings
    layout, grid = settings.layout, settings.grid
    images = recipe.train.steps * recipe.train.batch_size
    lines = [
        f"layout: {layout.family}, read as {layout.template!r}",
        f"image: {settings.num_positions} codes ({grid[0]} x {grid[1]}) of {settings.num_codes}",
        f"sequence: the prompt + {layout.length(0, grid)} tokens",
        f"training: {images:,} images",
    ]
    if llm.text is not None:
        lines.append(
            f"text: {llm.text.rows} rows of {llm.text.length} tokens beside every {recipe.train.batch_size} images"
        )
    return lines
