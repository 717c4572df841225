"""One evaluation of one model: paint every held-out prompt, let the judge look, write the card.

Every number stands beside the tokenizer's own ceiling: the same measure on held-out pictures passed through it.
Distances are taken to those reconstructions (what a perfect model would paint) and to the raw pictures (where the
tokenizer's blur weighs more than the model).
Legend: N pictures of a split, F judge features, h w code grid.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from arra.encoders import Encoder
from arra.encoders.dual import DualEncoder, picture_embeddings
from arra.evaluate.card import Card, Evaluation, Result, measure, values_key
from arra.evaluate.likelihood import likelihoods
from arra.evaluate.retrieval import caption_ranks, retrieval_ranks
from arra.evaluate.settings import EvaluateSettings
from arra.models import Decoder
from arra.sample.generate import generate
from arra.tokenizers import ImageTokenizer

RECALL_AT = (1, 10)


@dataclass(frozen=True)
class HeldOutSplit:
    """A held-out split, ready to be compared with; the same for every model evaluated on it."""

    name: str
    prompts: list[str]
    codes: Int[Tensor, "N h w"]
    groups: Int[Tensor, " N"]
    reconstructions: UInt8[Tensor, "N H W 3"]
    reconstruction_features: Float[Tensor, "N F"]
    raw: UInt8[Tensor, "N H W 3"]
    """The pictures at the tokenizer's size."""
    raw_features: Float[Tensor, "N F"]
    """Of the pictures at the encoder's size."""
    captions: Float[Tensor, "N E"] | None = None
    """The caption judge's vectors of the prompts, where there is such a judge."""


def evaluate_model(
    model: Decoder,
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
    for split in splits:
        progress(f"{split.name}: likelihood")
        found = likelihoods(
            model, split.codes.flatten(1), split.prompts, batch_size=settings.batch_size, seed=settings.seed
        )
        values |= _split_values(split) | {
            values_key("nll", split=split.name): found.nll,
            values_key("caption_gain", split=split.name): found.caption_gain,
        }
        for scale in settings.cfg_scales:
            progress(f"{split.name}: painting {len(split.prompts)} prompts, guidance {scale:g}")
            result = generate(
                model,
                tokenizer,
                prompts=split.prompts,
                seeds=[settings.seed + i for i in range(len(split.prompts))],
                cfg_scale=scale,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
            )
            assert result.images is not None
            progress(f"{split.name}: judging, guidance {scale:g}")
            features = encode_all(judge, result.images)
            pictures[values_key("images", split=split.name, cfg_scale=scale)] = result.images
            values[values_key("features", split=split.name, cfg_scale=scale)] = features
            ranks = retrieval_ranks(features, split.reconstruction_features)
            values[values_key("ranks", split=split.name, cfg_scale=scale)] = ranks
            if caption_judge is not None and split.captions is not None:
                seen = picture_embeddings(caption_judge, result.images)
                ranks = caption_ranks(seen, split.captions)
                values[values_key("caption_ranks", split=split.name, cfg_scale=scale)] = ranks
    progress("intervals")
    rows = [row for split in splits for row in model_rows(values, split.name, settings)]
    rows += [row for split in splits for row in ceiling(split, settings, caption_judge)]
    return Evaluation(card=Card(run=run, protocol=protocol, results=tuple(rows)), values=values), pictures


def encode_all(judge: Encoder, images: UInt8[Tensor, "N H W 3"], *, batch_size: int = 32) -> Float[Tensor, "N F"]:
    """The judge's features of all pictures."""
    return torch.cat([judge.encode(part) for part in images.split(batch_size)])


def model_rows(values: Mapping[str, Tensor], split: str, settings: EvaluateSettings) -> Iterator[Result]:
    """Every measure of a split, with intervals that resample whole groups."""

    def row(metric: str, cfg_scale: float | None = None, reference: str | None = None) -> Result:
        return _measured(values, settings, metric=metric, split=split, cfg_scale=cfg_scale, reference=reference)

    yield row("nll")
    yield row("caption_gain")
    for scale in settings.cfg_scales:
        for k in RECALL_AT:
            yield row(f"retrieval_at_{k}", scale)
            if values_key("caption_ranks", split=split, cfg_scale=scale) in values:
                yield row(f"caption_retrieval_at_{k}", scale)
        for reference in ("reconstructions", "raw"):
            yield row("frechet", scale, reference)
            yield row("kid_x1000", scale, reference)


def ceiling(
    split: HeldOutSplit, settings: EvaluateSettings, caption_judge: DualEncoder | None = None
) -> Iterator[Result]:
    """What the tokenizer alone allows: PSNR of its reconstructions, and the distances and ranks they reach."""
    mse = (split.reconstructions.double() - split.raw.double()).div(255).square().mean((1, 2, 3)).clamp(min=1e-10)
    values = {
        values_key("psnr_db", split=split.name): (-10 * mse.log10()).float(),
        values_key("features", split=split.name): split.reconstruction_features,
        values_key("ranks", split=split.name): retrieval_ranks(split.reconstruction_features, split.raw_features),
        values_key("reference/raw", split=split.name): split.raw_features,
        values_key("groups", split=split.name): split.groups,
    }
    measures: list[tuple[str, str | None]] = [("psnr_db", None), ("frechet", "raw"), ("kid_x1000", "raw")]
    measures += [(f"retrieval_at_{k}", None) for k in RECALL_AT]
    if caption_judge is not None and split.captions is not None:
        ranks = caption_ranks(picture_embeddings(caption_judge, split.reconstructions), split.captions)
        values[values_key("caption_ranks", split=split.name)] = ranks
        measures += [(f"caption_retrieval_at_{k}", None) for k in RECALL_AT]
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


def _split_values(split: HeldOutSplit) -> dict[str, Tensor]:
    return {
        values_key("groups", split=split.name): split.groups,
        values_key("reference/reconstructions", split=split.name): split.reconstruction_features,
        values_key("reference/raw", split=split.name): split.raw_features,
    }
