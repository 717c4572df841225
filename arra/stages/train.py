"""From a store to a trained run: `arra train`.

Legend: N records, P image positions, F feature.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arra.config import Recipe, dump_recipe
from arra.data.batches import Batches, TrainBatch, text_batch
from arra.data.loading import default_workers
from arra.data.records import source_names
from arra.data.store import Store
from arra.distributed import choose_device, set_threads
from arra.encoders import encoder_spec
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, save_model
from arra.report.grids import png_bytes, strip
from arra.runs import Run, atomic_write
from arra.sample.generate import generate
from arra.stages.captions import StoreCaptions, check_caption_lengths, store_text_tokenizer
from arra.stages.makers import center_variant, crop_of, wanted_columns
from arra.stages.origin import columns_of, note_store
from arra.stages.pictures import OnlinePictures, StoredPictures, feature_sample, held_out_codes, open_pictures
from arra.stages.process import locked
from arra.stages.tokenizer import recipe_tokenizer, tokenizer_folder
from arra.tokenizers import ImageTokenizer, load_tokenizer
from arra.tokenizers.image import CARD_FILE, WEIGHTS_FILE
from arra.tokenizers.text import TextTokenizer
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer

NUM_PREVIEWS = 8


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, read from a store after checking that the recipe fits it."""

    store: Store
    tokenizer: ImageTokenizer
    text: TextTokenizer
    pictures: StoredPictures | OnlinePictures
    batches: Batches
    validation: list[TrainBatch]
    features: Tensor | None
    """Of a sample of the training pictures, to fit the target space on."""


def training_data(
    recipe: Recipe, store: Store, tokenizer: ImageTokenizer, *, device: torch.device | None = None
) -> TrainingData:
    """Batches of the training split and the validation batches.

    Raises:
        ArraError: a column is missing or damaged, or a caption does not fit the prefix.
    """
    columns = columns_of(recipe)
    train, validation = store.rows("train", columns=columns), store.rows("validation", columns=columns)
    text = store_text_tokenizer(recipe, store)
    length = recipe.model.prefix_length
    check_caption_lengths(store, np.concatenate([train, validation]), text, length)
    workers = default_workers()
    pictures = open_pictures(recipe, store, tokenizer, train, workers=workers, device=device or torch.device("cpu"))
    features = None
    if recipe.align is not None:
        features = feature_sample(pictures, center_variant(recipe), crop_of(recipe).num_variants)
    batches = Batches(
        captions=StoreCaptions(store, train, text),
        pictures=pictures,
        prefix_length=length,
        batch_size=recipe.train.batch_size,
        condition_dropout=recipe.train.condition_dropout,
        alternative_share=recipe.train.alternative_share,
        word_dropout=recipe.train.word_dropout,
        seed=recipe.train.seed,
        counts=store.source_counts(train),
        groups=store.group_sizes(train),
        window=store.window(columns),
        weights=source_weights(recipe, store),
    )
    codes = held_out_codes(recipe, store, tokenizer, validation).flatten(1)
    prompts = [store.fields(int(row), "prompt")[0] for row in validation]
    held_out = [
        text_batch([text.encode(prompts[place]) for place in part], codes[torch.from_numpy(part)], prefix_length=length)
        for part in np.array_split(np.arange(len(validation)), max(1, len(validation) // 64))
    ]
    return TrainingData(store, tokenizer, text, pictures, batches, held_out, features)


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


def build_model(recipe: Recipe, text: TextTokenizer, tokenizer: ImageTokenizer) -> Decoder:
    """A fresh decoder of the recipe; its first weights are a function of `model.seed`."""
    torch.manual_seed(recipe.model.seed)
    model = Decoder(decoder_settings(recipe, num_codes=tokenizer.num_codes, downsampling=tokenizer.downsampling))
    model.text_tokenizer = text
    return model


def decoder_settings(recipe: Recipe, *, num_codes: int, downsampling: int) -> DecoderSettings:
    """The decoder's settings, with what follows from the tokenizer filled in."""
    m, side = recipe.model, recipe.data.image_size // downsampling
    return DecoderSettings(
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        multiple_of=32,
        num_codes=num_codes,
        grid=(side, side),
        condition="text",
        prefix_length=m.prefix_length,
        text_vocab_size=m.text_vocab_size,
        token_dropout=m.token_dropout,
        resid_dropout=m.resid_dropout,
        ffn_dropout=m.ffn_dropout,
    )


def train(recipe: Recipe, store: Store, folder: Path, *, previews: bool = True) -> Run:
    """The finished run: trained to the last step, resuming if it was begun.

    Raises:
        ArraError: the folder holds another recipe's run, or the store does not fit the recipe.
        TrainingInterrupted: a signal asked to stop; run again to continue.
    """
    if recipe.data.crop.kind == "buckets":
        raise ArraError(
            f"data.crop: '{recipe.data.crop.kind}' gives pictures of many shapes, this model paints one grid; "
            "use center, flip, ten_crop or random"
        )
    set_threads(recipe.train.threads)
    torch.set_flush_denormal(True)  # optimiser states of rare words decay into denormals, which are slow
    tokenizer = recipe_tokenizer(recipe, store)
    require_columns(recipe, store, tokenizer)
    manifest = {
        "store_sha256": store.manifest_hash(*columns_of(recipe)),
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.weights_hash,
        "seed": recipe.train.seed,
        "threads": torch.get_num_threads(),
    }
    begun = (folder / "recipe.yaml").is_file()
    if begun and is_finished(run := Run.create(folder, dump_recipe(recipe), manifest), recipe):
        with suppress(ArraError):  # it may lie on a read-only disk
            note_store(folder, store)
        return run
    device = choose_device(recipe.train.device)
    data = training_data(
        recipe, store, tokenizer, device=device
    )  # first: a recipe that does not fit its data leaves no run behind
    run = Run.create(folder, dump_recipe(recipe), manifest)
    with locked(run):
        if is_finished(run, recipe):
            return run
        note_store(folder, store)
        own = tokenizer_folder(recipe, store)
        if own is not None:
            for name in (WEIGHTS_FILE, CARD_FILE):  # the card last: a folder with a card is a tokenizer
                atomic_write(folder / "tokenizer" / name, (own / name).read_bytes())
        model = build_model(recipe, data.text, tokenizer).to(device)
        alignment = None
        if recipe.align is not None and data.features is not None:
            width = recipe.model.hidden_size
            alignment = build_alignment(recipe.align, data.features, hidden_size=width, seed=recipe.train.seed)
            alignment = alignment.to(device)
        trainer = Trainer(
            model=model,
            alignment=alignment,
            batches=data.batches,
            validation=data.validation,
            settings=recipe.train,
            run=run,
            preview=_previewer(recipe, data, run) if previews else None,
        )
        try:
            trainer.train()
        except FloatingPointError as error:
            raise ArraError(
                f"{folder}: training diverged at {error}; lower train.learning_rate or lengthen train.warmup_steps"
            ) from error
        finally:
            data.pictures.close()
        with trainer.averaged():
            save_model(model, folder)  # the projector stays behind in the checkpoints
    return run


def require_columns(recipe: Recipe, store: Store, tokenizer: ImageTokenizer) -> None:
    """Nothing.

    Raises:
        ArraError: the store's columns are missing or were not made as the recipe says.
    """
    wanted = wanted_columns(recipe, tokenizer)
    for name in columns_of(recipe):
        store.require(name, wanted[name])


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Whether the run's last step is done and its model saved."""
    saved = all((run.path / name).is_file() for name in ("model.safetensors", "model.json"))
    return saved and any(row["step"] == recipe.train.steps for row in run.read_metrics()[-3:])


def _previewer(recipe: Recipe, data: TrainingData, run: Run) -> Callable[[Decoder, int], None]:
    rows = data.store.rows("validation")
    spaced = rows[:: max(1, len(rows) // NUM_PREVIEWS)][:NUM_PREVIEWS]
    chosen = [data.store.fields(int(row), "prompt")[0] for row in spaced]

    def preview(model: Decoder, step: int) -> None:
        result = generate(model, data.tokenizer, prompts=chosen, seeds=list(range(len(chosen))))
        assert result.images is not None
        path = run.path / "previews" / f"step-{step:06d}.png"
        atomic_write(path, png_bytes(strip(result.images.numpy())))

    return preview


def describe_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the numbers that follow from it as comments."""
    tokenizer = None if recipe.tokenizer.train else load_tokenizer(recipe.tokenizer.name)
    network = recipe.tokenizer.network or (tokenizer or load_tokenizer(recipe.tokenizer.name)).model.settings
    settings = decoder_settings(recipe, num_codes=network.num_codes, downsampling=network.downsampling)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(settings).parameters())
    tokens = recipe.train.batch_size * (settings.prefix_length + settings.num_positions)
    lines = [
        f"image: {settings.num_positions} codes ({settings.grid[0]} x {settings.grid[1]}) of {settings.num_codes}",
        f"sequence: {settings.prefix_length} text positions + {settings.num_positions} codes",
        f"decoder: {parameters:,} parameters",
        f"training: {recipe.train.steps * recipe.train.batch_size:,} images, {recipe.train.steps * tokens:,} tokens",
    ]
    if recipe.align is not None:
        target = recipe.align.components or encoder_spec(recipe.encoder.teacher).feature_size
        inner = recipe.align.inner_size or target
        count = (recipe.model.hidden_size + 1) * inner + (inner + 1) * target
        lines.append(f"projector: {count:,} parameters, thrown away after training")
    return dump_recipe(recipe) + "".join(f"# {line}\n" for line in lines)
