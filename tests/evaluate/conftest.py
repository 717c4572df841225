"""Made-up evaluations for the tests of cards and comparisons."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from arra.evaluate.card import Card, Evaluation, ProtocolValue, Result, measure
from arra.evaluate.retrieval import retrieval_ranks

MakeEvaluation = Callable[..., Evaluation]


@pytest.fixture(scope="session")
def make_evaluation() -> MakeEvaluation:
    """Makes a made-up model: the higher its `quality`, the better every number; `seed` draws its own noise."""

    def make(name: str, *, quality: float, seed: int, num_images: int = 40, split: str = "composed") -> Evaluation:
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        raw = torch.randn(num_images, 12, generator=shared)
        reconstructions = 0.8 * raw
        difficulty = torch.randn(num_images, generator=shared)
        features = reconstructions + (2.0 - quality) * torch.randn(num_images, 12, generator=own)
        values = {
            f"{split}/reference/raw": raw,
            f"{split}/reference/reconstructions": reconstructions,
            f"{split}/nll": 2 - 0.1 * quality + difficulty + 0.01 * torch.randn(num_images, generator=own),
            f"{split}/caption_gain": 1 + quality + 0.1 * torch.randn(num_images, generator=own),
            f"{split}/cfg1/features": features,
            f"{split}/cfg1/ranks": retrieval_ranks(features, reconstructions),
        }
        layout = [
            ("nll", None, None),
            ("caption_gain", None, None),
            ("retrieval_at_10", 1.0, "reconstructions"),
            ("frechet", 1.0, "reconstructions"),
            ("frechet", 1.0, "raw"),
            ("kid_x1000", 1.0, "reconstructions"),
        ]
        rows = [
            measure(
                values,
                metric=metric,
                split=split,
                cfg_scale=cfg_scale,
                reference=reference,
                num_components=8,
                num_resamples=50,
            )
            for metric, cfg_scale, reference in layout
        ]
        ceiling = Result(
            metric="psnr_db",
            split=split,
            value=25.3,
            num_images=num_images,
            better="higher",
            unit="dB",
            subject="tokenizer",
        )
        protocol: dict[str, ProtocolValue] = {"judge": "judge-1", "frechet_components": 8, "model_sha256": name}
        return Evaluation(card=Card(run=f"runs/{name}", protocol=protocol, results=(*rows, ceiling)), values=values)

    return make


@pytest.fixture
def with_protocol() -> Callable[..., Evaluation]:
    """The evaluation with protocol entries changed."""

    def change(evaluation: Evaluation, **entries: str | int) -> Evaluation:
        card = dataclasses.replace(evaluation.card, protocol={**evaluation.card.protocol, **entries})
        return dataclasses.replace(evaluation, card=card)

    return change
