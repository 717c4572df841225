"""What a model paints, measured while it trains: held-out prompts, fixed seeds, the judge of `arra evaluate`.

    validation split -> evaluate_images prompts -> pictures -> judge -> distances to what the tokenizer makes of the
    held-out pictures, and retrieval among them

With so few pictures the Fréchet distance is far above its value over many: its course counts, not its height.
"""

from dataclasses import dataclass

import torch

from arra.config import Recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.evaluate.evaluation import HeldOutSplit, encode_all, quick_measures
from arra.evaluate.settings import EvaluateSettings
from arra.models import Painter
from arra.stages.evaluate import wanted_of
from arra.stages.judging import Judge
from arra.stages.origin import judged_columns
from arra.stages.pictures import held_out_codes, require_columns
from arra.stages.process import Progress, silent
from arra.stages.squares import spaced
from arra.tokenizers import ImageTokenizer

SPLIT = "validation"
FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Quality:
    """Called as quality(model, step); model, mode and random state stay as they are."""

    split: HeldOutSplit
    tokenizer: ImageTokenizer
    judge: Judge
    settings: EvaluateSettings

    def __call__(self, model: Painter, step: int) -> dict[str, float]:
        """Columns of a metrics row: frechet, kid_x1000, and retrieval, with the recipe's first guidance."""
        self.tokenizer.model.to(model.device)
        scale = self.settings.cfg_scales[0]
        return quick_measures(model, self.tokenizer, self.judge, self.split, self.settings, cfg_scale=scale)


def open_quality(
    recipe: Recipe,
    store: Store,
    tokenizer: ImageTokenizer | None,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Quality:
    """What measures a model of the recipe while it trains; the judge lies on `device` (the CPU unless told).

    Raises:
        ArraError: there is no tokenizer that paints, no judge, or there are too few held-out pictures.
    """
    if recipe.data.crop.kind == "buckets":
        raise ArraError(
            "train.evaluate_every_steps: pictures of many shapes (data.crop: buckets) are not measured yet; set it to "
            "null"
        )
    if tokenizer is None or not tokenizer.model.settings.has_decoder:
        raise ArraError(
            f"train.evaluate_every_steps: nothing here turns codes of {recipe.tokenizer.name} into pictures; give the "
            "weights as tokenizer.weights, or set it to null"
        )
    place, columns = device or torch.device("cpu"), judged_columns(recipe)
    require_columns(recipe, store, tokenizer, columns)
    rows = spaced(store.rows(SPLIT, columns=columns), recipe.train.evaluate_images)
    if len(rows) < FEWEST_IMAGES:
        raise ArraError(
            f"{store.path}: {len(rows)} pictures of split '{SPLIT}', train.evaluate_every_steps needs {FEWEST_IMAGES} "
            "or more; take more pictures, or set it to null"
        )
    judge = Judge(recipe.encoder.choice("judge"), device=place)
    progress("judging held-out pictures", 0, 1)
    codes = held_out_codes(recipe, store, tokenizer, rows)
    reconstructions = tokenizer.decode(codes).cpu()
    wanted = wanted_of(recipe, store, rows)
    split = HeldOutSplit(
        name=SPLIT,
        prompts=wanted.prompts,
        codes=codes,
        groups=wanted.groups,
        reconstructions=reconstructions,
        reconstruction_features=encode_all(judge, reconstructions).cpu(),
        raw=None,
        raw_features=None,
        labels=wanted.labels,
        ask=wanted.ask,
    )
    return Quality(split, tokenizer, judge, recipe.evaluate)
