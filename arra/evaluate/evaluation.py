"""One evaluation of one model: paint every held-out prompt, let the judge look, write the card.

Every number stands beside the tokenizer's own ceiling: the same measure on held-out pictures passed through it.
Distances are taken to those reconstructions (what a perfect model would paint) and to the raw pictures (where the
tokenizer's blur weighs more than the model). The caption judge's picture space gives the same distances
(`caption_frechet`) without an encoder that resembles the teacher.
Legend: N pictures of a split, F judge features, h w code grid.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from arra.encoders import Encoder
from arra.encoders.dual import DualEncoder, picture_embeddings, picture_features
from arra.evaluate.card import Card, Evaluation, Result, measure, measure_row, values_key, values_statistic
from arra.evaluate.coherence import MEASURES, Standard, is_drawn, measure_coherence, open_standard
from arra.evaluate.likelihood import Asked, likelihoods
from arra.evaluate.retrieval import caption_ranks, class_ranks, retrieval_ranks
from arra.evaluate.settings import EvaluateSettings
from arra.models import Painter
from arra.sample.generate import Engine, sampling_settings
from arra.tokenizers import ImageTokenizer

RECALL_AT = (1, 10)


@dataclass(frozen=True)
class HeldOutSplit:
    """A held-out split, ready to be compared with; the same for every model evaluated on it."""

    name: str
    prompts: list[str]
    """What the model is asked for, in words: captions or names of classes."""
    codes: Int[Tensor, "N h w"]
    groups: Int[Tensor, " N"]
    reconstructions: UInt8[Tensor, "N H W 3"]
    reconstruction_features: Float[Tensor, "N F"]
    raw: UInt8[Tensor, "N H W 3"] | None
    """The pictures at the tokenizer's size; None where the store holds codes without pictures."""
    raw_features: Float[Tensor, "N F"] | None
    """Of the pictures at the encoder's size."""
    captions: Float[Tensor, "N E"] | None = None
    """The caption judge's vectors of the prompts, where there is such a judge."""
    labels: Int[Tensor, " N"] | None = None
    """Classes, for models that are asked for classes."""
    ask: Asked | None = None
    """What the model is told of the pictures; None tells the prompts."""

    def asked(self, places: Sequence[int]) -> dict[str, Any]:
        """What the model is told of some pictures, as `generate` and `Decoder.logits` take it."""
        return {"prompts": [self.prompts[place] for place in places]} if self.ask is None else self.ask(places)

    @property
    def has_classes(self) -> bool:
        """Whether there are classes to tell apart."""
        return self.labels is not None and len(self.labels.unique()) > 1


def evaluate_model(
    model: Painter,
    tokenizer: ImageTokenizer,
    judge: Encoder,
    splits: list[HeldOutSplit],
    settings: EvaluateSettings,
    *,
    run: str,
    protocol: Mapping[str, str | int | float | bool | None],
    caption_judge: DualEncoder | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Evaluation, dict[str, UInt8[Tensor, "N H W 3"]]]:
    """The evaluation, and the painted pictures by `values_key('images', ...)`."""
    values: dict[str, Tensor] = {}
    pictures: dict[str, Tensor] = {}
    standards: dict[str, Standard] = {}

    def encode(images: np.ndarray) -> np.ndarray:
        return encode_all(judge, torch.from_numpy(images)).cpu().numpy()

    for split in splits:
        if is_drawn(split.prompts):
            standards[split.name] = open_standard(
                split.reconstructions.numpy(),
                split.codes.numpy(),
                captions=split.prompts,
                encode=encode,
                seed=settings.seed,
            )
        progress(f"{split.name}: likelihood")
        found = likelihoods(
            model,
            split.codes.flatten(1),
            split.asked,
            labels=split.labels,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        values |= _split_values(split, caption_judge)
        values[values_key("nll", split=split.name)] = found.nll
        values[values_key("bits_per_token", split=split.name)] = found.bits_per_token
        if found.gain is not None:
            kind = "caption_gain" if split.labels is None else "class_gain"
            values[values_key(kind, split=split.name)] = found.gain
        for scale in settings.cfg_scales:
            progress(f"{split.name}: painting {len(split.prompts)} pictures, guidance {scale:g}")
            places = range(len(split.prompts))
            images = paint_split(
                model, tokenizer, split, settings, places, [settings.seed + i for i in places], cfg_scale=scale
            )
            progress(f"{split.name}: judging, guidance {scale:g}")
            features = encode_all(judge, images)
            pictures[values_key("images", split=split.name, cfg_scale=scale)] = images
            values[values_key("features", split=split.name, cfg_scale=scale)] = features
            values |= _ranks(split, features, split.reconstruction_features, cfg_scale=scale)
            if split.name in standards:
                found_of = measure_coherence(
                    images.numpy(),
                    tokenizer.encode(images).cpu().numpy(),
                    captions=split.prompts,
                    encode=encode,
                    standard=standards[split.name],
                )
                for metric, measured in found_of.items():
                    key = values_key(metric, split=split.name, cfg_scale=scale)
                    values[key] = torch.from_numpy(measured.per_picture).float()
            if caption_judge is not None and split.captions is not None:
                ranks = caption_ranks(picture_embeddings(caption_judge, images), split.captions)
                values[values_key("caption_ranks", split=split.name, cfg_scale=scale)] = ranks
                seen = picture_features(caption_judge, images)
                values[values_key("caption_features", split=split.name, cfg_scale=scale)] = seen
    progress("intervals")
    rows = [row for split in splits for row in model_rows(values, split.name, settings)]
    rows += [row for split in splits for row in ceiling(split, settings, caption_judge, standards.get(split.name))]
    return Evaluation(card=Card(run=run, protocol=protocol, results=tuple(rows)), values=values), pictures


def quick_measures(
    model: Painter,
    tokenizer: ImageTokenizer,
    judge: Encoder,
    split: HeldOutSplit,
    settings: EvaluateSettings,
    *,
    cfg_scale: float,
) -> dict[str, float]:
    """What `evaluate_model` measures of painted pictures by one judge, without intervals: retrieval, and the distances
    to reconstructions.
    """
    name, places = split.name, range(len(split.prompts))
    images = paint_split(
        model, tokenizer, split, settings, places, [settings.seed + i for i in places], cfg_scale=cfg_scale
    )
    features = encode_all(judge, images).cpu()
    values = {
        values_key("features", split=name, cfg_scale=cfg_scale): features,
        values_key("reference/reconstructions", split=name): split.reconstruction_features,
        **_ranks(split, features, split.reconstruction_features, cfg_scale=cfg_scale),
    }
    found = {}
    for metric in ("frechet", "kid_x1000", *_retrievals(values, name, cfg_scale)):
        statistic = values_statistic(
            values,
            metric=metric,
            split=name,
            cfg_scale=cfg_scale,
            reference="reconstructions",
            num_components=settings.frechet_components,
        )
        found[metric] = float(statistic(np.ones(statistic.num_images)))
    return found


def paint_split(
    model: Painter,
    tokenizer: ImageTokenizer,
    split: HeldOutSplit,
    settings: EvaluateSettings,
    places: Sequence[int],
    seeds: Sequence[int],
    *,
    cfg_scale: float,
) -> UInt8[Tensor, "N H W 3"]:
    """Pictures of what some places of a split ask for, each with its seed; conditions are read batch by batch."""
    parts, sampling = [], sampling_settings(cfg_scale=cfg_scale, temperature=settings.temperature)
    with Engine(model, tokenizer, settings=sampling, batch_size=settings.batch_size) as engine:
        for start in range(0, len(places), settings.batch_size):
            stop = start + settings.batch_size
            result = engine.generate(seeds=seeds[start:stop], **split.asked(places[start:stop]))
            assert result.images is not None
            parts.append(result.images.cpu())
    return torch.cat(parts)


def encode_all(judge: Encoder, images: UInt8[Tensor, "N H W 3"], *, batch_size: int = 32) -> Float[Tensor, "N F"]:
    """The judge's features of all pictures."""
    return torch.cat([judge.encode(part) for part in images.split(batch_size)])


def _ranks(
    split: HeldOutSplit, features: Tensor, references: Tensor, *, cfg_scale: float | None = None
) -> dict[str, Tensor]:
    """Of models that are asked for captions, which reference is theirs; of classes, which class."""
    if split.labels is None:
        ranks = retrieval_ranks(features, references)
        return {values_key("ranks", split=split.name, cfg_scale=cfg_scale): ranks}
    if not split.has_classes:
        return {}
    ranks = class_ranks(features, references, split.labels)
    return {values_key("class_ranks", split=split.name, cfg_scale=cfg_scale): ranks}


def model_rows(values: Mapping[str, Tensor], split: str, settings: EvaluateSettings) -> Iterator[Result]:
    """Every measure of a split, with intervals that resample whole groups."""

    def row(metric: str, cfg_scale: float | None = None, reference: str | None = None) -> Result:
        return _measured(values, settings, metric=metric, split=split, cfg_scale=cfg_scale, reference=reference)

    for metric in ("nll", "bits_per_token", "caption_gain", "class_gain"):
        if values_key(metric, split=split) in values:
            yield row(metric)
    for scale in settings.cfg_scales:
        yield from (row(metric, scale) for metric in _retrievals(values, split, scale))
        start = values_key("", split=split, cfg_scale=scale)
        names = [key.removeprefix(start) for key in values if key.startswith(start)]
        yield from (row(name, scale) for name in names if name.partition(".")[0] in MEASURES)
        for reference in ("reconstructions", "raw"):
            for judge in ("", "caption_"):
                if values_key(f"reference/{judge}{reference}", split=split) in values:
                    yield row(f"{judge}frechet", scale, reference)
                    yield row(f"{judge}kid_x1000", scale, reference)


def _retrievals(values: Mapping[str, Tensor], split: str, cfg_scale: float | None) -> Iterator[str]:
    """The retrieval metrics whose ranks there are, in the order of a card."""

    def has(name: str) -> bool:
        return values_key(name, split=split, cfg_scale=cfg_scale) in values

    for k in RECALL_AT:
        if has("ranks"):
            yield f"retrieval_at_{k}"
        if has("caption_ranks"):
            yield f"caption_retrieval_at_{k}"
    if has("class_ranks"):
        yield "class_retrieval_at_1"


def ceiling(
    split: HeldOutSplit,
    settings: EvaluateSettings,
    caption_judge: DualEncoder | None = None,
    standard: Standard | None = None,
) -> Iterator[Result]:
    """What the tokenizer alone allows: PSNR of its reconstructions, and the distances and ranks they reach."""
    for metric, measured in ({} if standard is None else standard.ceiling).items():
        row = measure_row(
            measured, metric=metric, split=split.name, num_resamples=settings.num_resamples, seed=settings.seed
        )
        yield dataclasses.replace(row, subject="tokenizer")
    if split.raw is None or split.raw_features is None:
        return
    mse = (split.reconstructions.double() - split.raw.double()).div(255).square().mean((1, 2, 3)).clamp(min=1e-10)
    values = {
        values_key("psnr_db", split=split.name): (-10 * mse.log10()).float(),
        values_key("features", split=split.name): split.reconstruction_features,
        **_ranks(split, split.reconstruction_features, split.raw_features),
        values_key("reference/raw", split=split.name): split.raw_features,
        values_key("groups", split=split.name): split.groups,
    }
    measures: list[tuple[str, str | None]] = [("psnr_db", None), ("frechet", "raw"), ("kid_x1000", "raw")]
    measures += [(metric, None) for metric in _retrievals(values, split.name, None)]
    if caption_judge is not None and split.captions is not None:
        ranks = caption_ranks(picture_embeddings(caption_judge, split.reconstructions), split.captions)
        values[values_key("caption_ranks", split=split.name)] = ranks
        measures += [(f"caption_retrieval_at_{k}", None) for k in RECALL_AT]
        values[values_key("caption_features", split=split.name)] = picture_features(
            caption_judge, split.reconstructions
        )
        values[values_key("reference/caption_raw", split=split.name)] = picture_features(caption_judge, split.raw)
        measures += [("caption_frechet", "raw"), ("caption_kid_x1000", "raw")]
    for metric, reference in measures:
        row = _measured(values, settings, metric=metric, split=split.name, cfg_scale=None, reference=reference)
        yield dataclasses.replace(row, subject="tokenizer")


def _measured(
    values: Mapping[str, Tensor],
    settings: EvaluateSettings,
    *,
    metric: str,
    split: str,
    cfg_scale: float | None,
    reference: str | None,
) -> Result:
    return measure(
        values,
        metric=metric,
        split=split,
        cfg_scale=cfg_scale,
        reference=reference,
        num_components=settings.frechet_components,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )


def _split_values(split: HeldOutSplit, caption_judge: DualEncoder | None) -> dict[str, Tensor]:
    values = {
        values_key("groups", split=split.name): split.groups,
        values_key("reference/reconstructions", split=split.name): split.reconstruction_features,
    }
    if split.raw_features is not None:
        values[values_key("reference/raw", split=split.name)] = split.raw_features
    if caption_judge is not None and split.captions is not None:
        for name, images in (("reconstructions", split.reconstructions), ("raw", split.raw)):
            if images is not None:
                seen = picture_features(caption_judge, images)
                values[values_key(f"reference/caption_{name}", split=split.name)] = seen
    return values
