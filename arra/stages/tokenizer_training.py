"""The training of an image tokenizer into a store: pictures, from memory or read meanwhile -> weights -> card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.config import Recipe
from arra.data.loading import Loader, default_workers
from arra.data.store import Store
from arra.distributed import choose_device
from arra.errors import ArraError
from arra.runs import Run
from arra.stages.judging import judge_tokenizer
from arra.stages.process import Progress
from arra.stages.squares import center_pictures, spaced
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.vq import VQModel
from arra.train.perceptual import PerceptualDistance, load_perceptual
from arra.train.pictures import HeldPictures, Pictures, ReadPictures, random_views
from arra.train.settings import TokenizerTrainSettings
from arra.train.tokenizer import TokenizerStep, TokenizerTrainer, train_tokenizer

MOST_HELD_GIB = 8
MOST_JUDGED = 2000
"""Validation pictures, evenly spaced, that a trained tokenizer's card tells of."""


@dataclass
class TokenizerTraining:
    """One training into a folder, from pictures to card."""

    recipe: Recipe
    store: Store
    model: VQModel
    folder: Path
    progress: Progress
    has_logged: bool = False

    def run(self, made_from: dict[str, Any], start: ImageTokenizer | None) -> None:
        """Nothing; the folder holds the trained tokenizer."""
        train = self.recipe.tokenizer.train
        assert train is not None
        torch.set_flush_denormal(True)  # optimiser states of dead codes decay into denormals, which are slow
        perceptual = None if train.perceptual is None else load_perceptual(train.perceptual.files)
        device = choose_device(train.device)
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            trainer = train_tokenizer(
                self.model.to(device),
                self._pictures(train),
                train,
                folder=self.folder / "checkpoints",
                report=self._report,
                perceptual=perceptual,
            )
        except FloatingPointError as error:
            raise ArraError(
                f"{self.folder}: training diverged at {error}; lower tokenizer.train.learning_rate, lengthen "
                "warmup_steps or start the discriminator later"
            ) from error
        trained = trainer.averaged_model()
        name = self.store.about["name"]
        about = {"made_from": made_from, "data": name, "credit": self.store.about["attribution"]}
        full_name = f"{name}-vq{trained.settings.downsampling}"
        half = train.part == "all"
        if half:
            trained.half().float()  # as it will be saved: what the card tells is of these weights
        else:
            assert start is not None
            _require_same_codes(before, trained)
            about["codes_of"] = start.codes_of
            full_name = f"{start.name}-for-{name}"
        tokenizer = ImageTokenizer(trained, name=full_name, weights_hash=None, about=about)
        about["validation"] = self._validation(tokenizer, device, perceptual)
        tokenizer.model.cpu()
        tokenizer.save(self.folder, half=half)

    def _pictures(self, train: TokenizerTrainSettings) -> Pictures:
        recipe, store = self.recipe, self.store
        size = recipe.data.image_size
        if train.crop is not None:
            known = ["pictures"] if store.entry("pictures") is not None else []
            loader = Loader(store.path, random_views(train.crop, size), grey16=recipe.data.crop.grey16)
            return ReadPictures(
                loader,
                store.rows("train", columns=known),
                batch_size=train.batch_size,
                steps=train.steps,
                seed=train.seed,
                workers=default_workers() if train.workers is None else train.workers,
            )
        rows = store.rows("train")
        gib = len(rows) * 3 * (2 * size) ** 2 / 2**30
        if gib > MOST_HELD_GIB:
            raise ArraError(
                f"tokenizer.train: {len(rows):,} pictures at twice {size} pixels a side need {gib:.0f} GiB of memory; "
                "read them while training: set tokenizer.train.crop to {kind: random}"
            )
        held = center_pictures(
            recipe,
            store,
            rows=rows,
            pixels=2 * size,
            may_fail=True,
            progress=lambda done, total: self.progress("reading train pictures", done, total),
        )
        return HeldPictures(held.permute(0, 3, 1, 2).contiguous(), train.batch_size, train.augment)

    def _report(self, trainer: TokenizerTrainer, step: TokenizerStep) -> None:
        settings = trainer.settings
        self.progress("training the tokenizer", step.step, settings.steps, f"{step.psnr_db:.1f} dB")
        if step.step % settings.log_every_steps == 0 or step.step == settings.steps:
            run = Run(self.folder)
            if not self.has_logged:  # a training before this one may have been killed after its last checkpoint
                run.truncate_metrics(step.step - 1)
                self.has_logged = True
            row = {"step": step.step, "loss": step.loss, "psnr_db": step.psnr_db, "learning_rate": step.learning_rate}
            run.append_metrics(row | step.terms | {"code_use": trainer.code_use()})

    def _validation(
        self, tokenizer: ImageTokenizer, device: torch.device, perceptual: PerceptualDistance | None
    ) -> dict[str, Any] | None:
        """What the card tells of held-out pictures; None where there are none to measure by."""
        if self.store.about["splits"].get("validation", 0) < 2:
            return None
        rows = spaced(self.store.rows("validation"), MOST_JUDGED)
        judged = judge_tokenizer(
            tokenizer,
            self.store,
            rows,
            image_size=self.recipe.data.image_size,
            judge=self.recipe.encoder.choice("judge"),
            device=device,
            grey16=self.recipe.data.crop.grey16,
            perceptual=perceptual,
            workers=None,
            progress=lambda done, total: self.progress("judging reconstructions", done, total),
        )
        bound = {"split": "validation", "at_most_images": MOST_JUDGED, "image_size": self.recipe.data.image_size}
        return bound | judged.reconstruction.as_json()


def _require_same_codes(before: Mapping[str, Tensor], trained: VQModel) -> None:
    """Nothing; all that codes depend on has the bits it had."""
    for name, value in trained.state_dict().items():
        if not name.startswith(("decoder.", "post_quant_conv.")) and not torch.equal(value, before[name].cpu()):
            raise RuntimeError(f"training the decoder alone changed {name}")
