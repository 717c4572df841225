"""From a store to a trained run: `arra train`."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from arra.config import Recipe, dump_recipe
from arra.data.store import Store
from arra.distributed import Ranks, joined_ranks, own_device, set_threads
from arra.errors import ArraError
from arra.models import Decoder, Painter, save_model, save_outline
from arra.models.adapters import load_bitsandbytes
from arra.models.causal import CausalLM
from arra.models.language_folder import CARD_FILE as LANGUAGE_CARD
from arra.report.grids import png_bytes, strip
from arra.runs import Run, atomic_write
from arra.sample.generate import generate
from arra.stages.begun import FREE
from arra.stages.conditions import caption_width, condition_facts, num_classes
from arra.stages.desk import Desk
from arra.stages.language import (
    finish_language_model,
    first_language_model,
    is_hugging_face,
    language_folder,
    text_hash,
)
from arra.stages.live import is_finished
from arra.stages.makers import used_choices
from arra.stages.model import (
    WEIGHTS_NAMES,
    build_model,
    decoder_settings,
    tokenizer_network,
    told_to_painters,
    weights_hash,
)
from arra.stages.origin import columns_of, note_store
from arra.stages.pictures import require_columns, tokenizer_if_given
from arra.stages.process import Progress, locked, silent
from arra.stages.quality import open_quality
from arra.stages.tables import START
from arra.stages.tokenizer import tokenizer_folder
from arra.stages.training_data import TrainingData, epoch_length, training_data
from arra.stages.watch import open_watcher
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.image import CARD_FILE, WEIGHTS_FILE
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer
from arra.train.out_of_memory import out_of_memory_told
from arra.train.parallel import SHARDED, fill, kind_for
from arra.train.trackers import require_package
from arra.train.watch import Watcher

NUM_PREVIEWS = 8
MODEL_FILES = (LANGUAGE_CARD, "config.json", *WEIGHTS_NAMES, WEIGHTS_FILE)
"""What a folder of a model or a tokenizer has, and a run not before its end."""


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
        kind_for(model, recipe.train, ranks=ranks, device=self.device)  # what does not fit the ranks is told now
        watcher, quality = self.watcher(data, model), self.quality(data)
        if start is not None:
            model.about["started_from"] = {"weights": start, "sha256": manifest["weights_sha256"]}
        model.about |= told_to_painters(recipe, manifest["codes_of"])
        run = ranks.by_first(lambda: self.opened(manifest))
        with ExitStack() as stack:
            ranks.by_first(lambda: stack.enter_context(locked(run)))
            if ranks.share(is_finished(run, recipe)):
                return run
            if ranks.is_first:
                run.take_recipe(dump_recipe(recipe))
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
                name_records=lambda rows: record_names(store, data.pictures.rows[np.asarray(rows, np.int64)]),
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
            kind = kind_for(empty, recipe.train, ranks=ranks, device=self.device)
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

    def previewer(self, data: TrainingData, run: Run, desk: Desk | None) -> Callable[[Painter, int], None] | None:
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
                if decay is not None:  # the run's own folder has it already
                    keep_tokenizer(self.recipe, self.store, folder)
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
        fill(model, state)
        model.about = trainer.model.about
        return model


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
    if weights is not None and weights.startswith(START):
        raise ArraError(
            f"model.weights: '{weights}' is the finished run of another row, which arra reproduce trains first; name a "
            "run, as in --set model.weights=runs/general"
        )
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
