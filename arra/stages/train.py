"""From a store to a trained run: `arra train`.

Legend: N records, P image positions, F feature.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from arra.config import Recipe, dump_recipe
from arra.data.batches import Batches, HeldOutBatches, TrainBatch
from arra.data.language import LayoutWriter, MixedBatches
from arra.data.loading import default_workers
from arra.data.order import Order
from arra.data.records import source_names
from arra.data.store import Store
from arra.distributed import Ranks, joined_ranks, own_device, set_threads
from arra.encoders import SPECS, encoder_spec
from arra.errors import ArraError
from arra.models import Decoder, Painter, save_model, save_outline
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
from arra.stages.live import live_page, training_note
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
from arra.stages.quality import open_quality
from arra.stages.tokenizer import tokenizer_folder
from arra.stages.watch import open_watcher
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.image import CARD_FILE, WEIGHTS_FILE
from arra.tokenizers.text import TextTokenizer
from arra.train.alignment import build_alignment, check_features, count_parameters
from arra.train.loop import Trainer
from arra.train.out_of_memory import out_of_memory_told
from arra.train.parallel import SHARDED, can_be_cut, chosen_kind, memory_of, state_bytes
from arra.train.trackers import open_trackers, require_package
from arra.train.watch import Watcher

NUM_PREVIEWS = 8
MODEL_FILES = (LANGUAGE_CARD, "config.json", *WEIGHTS_NAMES, WEIGHTS_FILE)
"""What a folder of a model or a tokenizer has, and a run not before its end."""
MAX_TEXT_ROWS, TEXT_ROWS_AT_A_TIME = 256, 16
"""Of held-out text on which a language model is watched."""
FREE = tuple(
    f"train.{name}"
    for name in (
        "checkpoint_every_steps",
        "checkpoint_in_background",
        "compile",
        "device",
        "ema_offload",
        "keep_best",
        "keep_checkpoints",
        "keep_every_steps",
        "micro_batch_size",
        "parallel",
        "recompute",
        "threads",
        "trackers",
        "trouble.hang_seconds",
        "trouble.most",
        "trouble.nonfinite",
        "trouble.skip_batches",
        "trouble.spike",
        "trouble.spike_deviations",
    )
)
"""What may change from one start of a run to the next: it leaves what is computed as it is, but for rounding."""


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


def epoch_length(recipe: Recipe, store: Store) -> int:
    """Pictures of an epoch: every training record as often as its source's weight says.

    Raises:
        ArraError: the recipe weighs other sources than the store was made from.
    """
    counts = store.source_counts(store.rows("train", columns=columns_of(recipe)))
    return Order(counts, source_weights(recipe, store) or (1.0,) * len(counts), recipe.train.seed).epoch_length


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
    """The finished run: trained to the last step, resuming if it was begun; under torchrun on all its processes.

    Raises:
        ArraError: the folder holds another recipe's run, the store does not fit the recipe, or training went wrong.
        TrainingInterrupted: a signal asked to stop; run again to continue.
    """
    if recipe.data.crop.kind == "buckets" and recipe.model.llm is None:
        raise ArraError(
            f"data.crop: '{recipe.data.crop.kind}' gives pictures of many shapes, this model paints one grid; "
            "use center, flip, ten_crop or random"
        )
    set_threads(recipe.train.threads)
    torch.set_flush_denormal(True)  # optimiser states of rare words decay into denormals, which are slow
    device = own_device(recipe.train.device)
    parallel = recipe.train.parallel
    with joined_ranks(device, even_alone=parallel.kind in SHARDED or parallel.offload) as ranks:
        if ranks.size > recipe.train.batch_size:
            raise ArraError(
                f"train.batch_size: {recipe.train.batch_size} pictures cannot be shared by {ranks.size} processes; "
                "raise it, or start fewer"
            )
        recipe = recipe.resolved(epoch_length(recipe, store))
        work = Work(recipe, store, folder, ranks, device, previews, progress if ranks.is_first else silent)
        llm = recipe.model.llm
        trained, four_bit = (None, False) if llm is None else (llm.train, llm.four_bit)
        with out_of_memory_told(recipe.train, ranks, where=str(folder), language_model=trained, four_bit=four_bit):
            return work.run()


@dataclass(frozen=True)
class Work:
    """One training, seen from one of its processes."""

    recipe: Recipe
    store: Store
    folder: Path
    ranks: Ranks
    device: torch.device
    previews: bool
    progress: Progress

    def run(self) -> Run:
        """The finished run, as of `train`."""
        recipe, store, folder, ranks = self.recipe, self.store, self.folder, self.ranks
        tokenizer = tokenizer_if_given(recipe, store)
        require_columns(recipe, store, tokenizer, columns_of(recipe))
        start = given_weights(recipe)
        manifest = self.manifest(tokenizer, start)
        begun = ranks.share((folder / "recipe.yaml").is_file())
        if not begun:
            refuse_models_folder(folder)
            if recipe.train.optimizer == "adamw8bit":  # a missing library leaves no run behind either
                load_bitsandbytes("train.optimizer: adamw8bit")
            for name in recipe.train.trackers:
                require_package(name)
        else:
            run = ranks.by_first(lambda: self.opened(manifest))
            if ranks.share(is_finished(run, recipe)):
                if ranks.is_first:
                    with suppress(ArraError):  # it may lie on a read-only disk
                        note_store(folder, store)
                return run
        # first: a recipe that does not fit its data leaves no run behind
        data = training_data(recipe, store, tokenizer, device=self.device)
        model = self.first_model(data)
        watcher, quality = self.watcher(data, model), self.quality(data)
        if start is not None:
            model.about["started_from"] = {"weights": start, "sha256": manifest["weights_sha256"]}
        if isinstance(model, CausalLM) and tokenizer is not None:  # an imported one did not say
            model.about["codes_of"] = tokenizer.codes_of
        run = ranks.by_first(lambda: self.opened(manifest))
        with ExitStack() as stack:
            ranks.by_first(lambda: stack.enter_context(locked(run)))
            if ranks.share(is_finished(run, recipe)):
                return run
            if ranks.is_first:
                note_store(folder, store)
                keep_tokenizer(recipe, store, folder)
                if isinstance(model, Decoder):  # what weights of checkpoints are of, long before there is a model
                    save_outline(model, folder / "checkpoints")
            alignment = None
            if recipe.align is not None and data.features is not None:
                alignment = build_alignment(
                    recipe.align, data.features, hidden_size=model.hidden_size, seed=recipe.train.seed
                ).to(self.device)
            desk = stack.enter_context(Desk(run, recipe, self.progress)) if ranks.is_first else None
            trainer = Trainer(
                model=model,
                alignment=alignment,
                batches=data.batches,
                validation=data.validation,
                settings=recipe.train,
                run=run,
                preview=self.previewer(data, run, desk) if self.previews else None,
                watch=None if desk is None else desk.take,
                watcher=watcher,
                quality=quality,
                text_validation=data.text_validation,
                ranks=ranks,
                device=self.device,
                name_records=lambda rows: record_names(store, data.pictures.rows[np.asarray(rows)]),
                warn=None if desk is None else desk.warn,
            )
            try:
                trainer.train()
            finally:
                data.pictures.close()
            self.save_models(trainer, data)
        return run

    def manifest(self, tokenizer: ImageTokenizer | None, start: str | None) -> dict[str, Any]:
        """What must not change from one start of a run to the next."""
        recipe, store = self.recipe, self.store
        facts = {
            "store_sha256": store.manifest_hash(*columns_of(recipe)),
            "tokenizer": recipe.tokenizer.name if tokenizer is None else tokenizer.name,
            "tokenizer_sha256": None if tokenizer is None else tokenizer.weights_hash,
            "codes_of": None if tokenizer is None else tokenizer.codes_of,
            "seed": recipe.train.seed,
        }
        if start is not None:
            facts["weights_sha256"] = weights_hash(start)
        if recipe.model.llm is not None and recipe.model.llm.text is not None:
            facts["text_sha256"] = text_hash(recipe.model.llm.text)
        return facts

    def opened(self, manifest: dict[str, Any]) -> Run:
        """The run folder, new or as it was begun."""
        noted = {"threads": torch.get_num_threads(), "ranks": self.ranks.size, "device": str(self.device)}
        return Run.create(self.folder, dump_recipe(self.recipe), manifest, free=FREE, noted=noted)

    def first_model(self, data: TrainingData) -> Painter:
        """The model before its first step; where weights will be sharded, empty on all ranks but the first."""
        recipe, ranks = self.recipe, self.ranks
        four_bit = recipe.model.llm is not None and recipe.model.llm.four_bit
        kind: str = recipe.train.parallel.kind
        if kind == "auto" and ranks.size > 1 and not four_bit:
            empty = first_model(recipe, data, empty=True)
            kind = chosen_kind(
                recipe.train,
                ranks=ranks,
                state_bytes=state_bytes(empty),
                device_bytes=memory_of(self.device),
                may_shard=can_be_cut(empty),
            )
        if kind in SHARDED:
            return first_model(recipe, data, empty=not ranks.is_first)
        return first_model(recipe, data).to(self.device)

    def watcher(self, data: TrainingData, model: Painter) -> Watcher | None:
        """What looks at the states while training, if it is wanted."""
        recipe = self.recipe
        if recipe.train.watch_every_steps is None:
            return None
        return open_watcher(
            recipe,
            self.store,
            data.tokenizer,
            used_choices(recipe) or {"teacher": recipe.encoder.choice("teacher")},
            hidden_size=model.hidden_size,
            text=data.text,
            card=data.card,
            images=recipe.train.watch_images,
            device=self.device,
            progress=self.progress,
        )

    def quality(self, data: TrainingData) -> Callable[[Painter, int], dict[str, float]] | None:
        """What measures pictures painted while training, if it is wanted."""
        if self.recipe.train.evaluate_every_steps is None:
            return None
        return open_quality(self.recipe, self.store, data.tokenizer, device=self.device, progress=self.progress)

    def previewer(self, data: TrainingData, run: Run, desk: "Desk | None") -> Callable[[Painter, int], None] | None:
        """What paints some held-out prompts from fixed seeds; rank zero keeps the pictures."""
        if data.tokenizer is None:
            return None
        tokenizer, count = data.tokenizer, len(data.validation_rows)
        spaced = range(0, count, max(1, count // NUM_PREVIEWS))[:NUM_PREVIEWS]
        asked = data.asked(spaced)

        def preview(model: Painter, step: int) -> None:
            tokenizer.model.to(model.device)
            result = generate(model, tokenizer, seeds=list(range(len(spaced))), **asked)
            assert result.images is not None
            if desk is not None:
                desk.preview(png_bytes(strip(result.images.numpy())), step)

        return preview

    def save_models(self, trainer: Trainer, data: TrainingData) -> None:
        """Nothing; the trained model is in the run folder, averages of other decays below it.

        The projector stays behind in the checkpoints.
        """
        others = trainer.averages.decays[1:]
        for place, decay in reversed([*enumerate(others, start=1), (0, None)]):
            folder = self.folder if decay is None else self.folder / f"ema-{decay}"
            with trainer.averaged(place):
                model = self.whole_model(trainer, data)
                if model is None:
                    continue
                if isinstance(model, CausalLM):
                    finish_language_model(self.recipe, model, folder)
                save_model(model, folder)
        self.ranks.barrier()

    def whole_model(self, trainer: Trainer, data: TrainingData) -> Painter | None:
        """The trained model in one piece, on rank zero."""
        if not trainer.engine.is_sharded:
            return trainer.model if self.ranks.is_first else None
        state = trainer.engine.whole_state()
        if not self.ranks.is_first:
            return None
        model = first_model(self.recipe, data, empty=True)
        model.load_state_dict(state, assign=True)
        model.about = trainer.model.about
        return model


class Desk:
    """Where a training's news arrive on rank zero: the display, trackers, the page of the run so far."""

    def __init__(self, run: Run, recipe: Recipe, progress: Progress) -> None:
        self.run, self.steps, self.progress = run, recipe.train.steps, progress
        self.trackers = open_trackers(
            recipe.train.trackers, run_folder=run.path, name=run.path.name, config=recipe.model_dump(mode="json")
        )

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        for tracker in self.trackers:
            tracker.close()

    def take(self, row: dict[str, Any]) -> None:
        """Nothing; a row of the metrics is shown and passed on."""
        for tracker in self.trackers:
            tracker.log(row)
        if row["kind"] in ("train", "validation"):
            self.progress("step", row["step"], self.steps, training_note(row))
        if row["kind"] in ("validation", "quality"):
            self.refresh()

    def refresh(self) -> None:
        """Nothing; the page is as far as the run."""
        with suppress(ArraError):  # no room for a page is no reason to end a training
            live_page(self.run.path)

    def warn(self, line: str) -> None:
        """Nothing; a line that somebody should read is on the error output."""
        print(f"warning: {line}", file=sys.stderr, flush=True)

    def preview(self, png: bytes, step: int) -> None:
        """Nothing; the pictures are kept and passed on."""
        atomic_write(self.run.path / "previews" / f"step-{step:06d}.png", png)
        for tracker in self.trackers:
            tracker.image("preview", png, step)
        self.refresh()


def keep_tokenizer(recipe: Recipe, store: Store, folder: Path) -> None:
    """Nothing; a tokenizer of the store's own is in the run as well."""
    own = tokenizer_folder(recipe, store)
    if own is not None:
        for name in (WEIGHTS_FILE, CARD_FILE):  # the card last: a folder with a card is a tokenizer
            atomic_write(folder / "tokenizer" / name, (own / name).read_bytes())


def record_names(store: Store, rows: np.ndarray) -> list[str]:
    """The ids of some records."""
    found: list[str] = store.table(["id"]).take(pa.array(rows)).column("id").to_pylist()
    return found


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


def first_model(recipe: Recipe, data: TrainingData, *, empty: bool = False) -> Painter:
    """The model before its first step, with what it must know of its conditions to be asked again.

    An empty one has no weights and takes no memory (device meta).
    """
    if data.card is not None:
        return first_language_model(recipe, data.card, empty=empty)
    network = tokenizer_network(recipe) if data.tokenizer is None else data.tokenizer.model.settings
    settings = decoder_settings(
        recipe,
        num_codes=network.num_codes,
        downsampling=network.downsampling,
        num_classes=num_classes(recipe, data.store) if recipe.model.condition == "class" else None,
        caption_dim=caption_width(recipe, data.store),
    )
    model = build_model(recipe, settings, text=data.text, empty=empty)
    model.about |= condition_facts(recipe, data.store)
    return model


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Whether the run's last step is done and its model saved."""
    saved = all((run.path / name).is_file() for name in ("model.safetensors", "model.json"))
    return saved and any(row["step"] == recipe.train.steps for row in run.read_metrics()[-3:])


def describe_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the numbers that follow from it as comments."""
    if recipe.model.llm is not None:
        return dump_recipe(recipe) + "".join(f"# {line}\n" for line in describe_language_model(recipe))
    network, model = tokenizer_network(recipe), recipe.model
    settings = decoder_settings(recipe, num_codes=network.num_codes, downsampling=network.downsampling)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(settings).parameters())
    length = settings.prefix_length + settings.num_positions
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
        describe_length(recipe, tokens=length),
    ]
    if model.condition == "class" and model.num_classes is None:
        lines.insert(2, f"classes: the store's; {settings.num_classes} assumed here")
    if model.weights is not None:
        lines.append(f"first weights: {model.weights}")
    if recipe.align is not None:
        lines += describe_projectors(recipe)
    return dump_recipe(recipe) + "".join(f"# {line}\n" for line in lines)


def describe_length(recipe: Recipe, *, tokens: int | None = None) -> str:
    """How much is trained on, in a line; `tokens` are those of a picture, None where they differ."""
    written: int | str = recipe.train.steps
    if isinstance(written, str):  # the store will say how many steps that is
        return f"training: {written}"
    images = written * recipe.train.batch_size
    return f"training: {images:,} images" + ("" if tokens is None else f", {images * tokens:,} tokens")


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
    lines = [
        f"layout: {layout.family}, read as {layout.template!r}",
        f"image: {settings.num_positions} codes ({grid[0]} x {grid[1]}) of {settings.num_codes}",
        f"sequence: the prompt + {layout.length(0, grid)} tokens",
        describe_length(recipe),
    ]
    if llm.text is not None:
        lines.append(
            f"text: {llm.text.rows} rows of {llm.text.length} tokens beside every {recipe.train.batch_size} images"
        )
    return lines
