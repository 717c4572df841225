"""The card's rows of drawn shapes: what pictures show, beside what the tokenizer allows."""

import numpy as np
import torch

from arra.data.shapes import ShapesSource, arrange, draw, read_caption
from arra.evaluate.card import values_key
from arra.evaluate.coherence import measure_coherence, open_standard
from arra.evaluate.evaluation import HeldOutSplit, ceiling, model_rows
from arra.evaluate.settings import EvaluateSettings


def test_coherence_stands_on_the_card_beside_its_ceiling() -> None:
    records = list(ShapesSource(num_images=20).scan())
    captions = [record.prompt for record in records]
    images = np.stack([draw(arrange(read_caption(r.prompt), seed=r.image.place), size=16) for r in records])  # type: ignore[union-attr]
    codes = (images[:, ::4, ::4].min(-1) < 200).astype(np.int64)
    settings = EvaluateSettings(cfg_scales=(2.0,), num_resamples=10, frechet_components=2)

    def encode(pictures: np.ndarray) -> np.ndarray:
        return pictures[:, ::4, ::4].reshape(len(pictures), -1).astype(np.float32)

    standard = open_standard(images, codes, captions=captions, encode=encode)
    pictures, features = torch.from_numpy(images), torch.from_numpy(encode(images))
    split = HeldOutSplit(
        name="test",
        prompts=captions,
        codes=torch.from_numpy(codes),
        groups=torch.arange(20),
        reconstructions=pictures,
        reconstruction_features=features,
        raw=pictures,
        raw_features=features,
    )
    found = measure_coherence(images, codes, captions=captions, encode=encode, standard=standard)
    values = {values_key("nll", split="test"): torch.zeros(20), values_key("groups", split="test"): split.groups}
    for metric, measured in found.items():
        values[values_key(metric, split="test", cfg_scale=2.0)] = torch.from_numpy(measured.per_picture).float()
    rows = {row.metric: row for row in model_rows(values, "test", settings)}
    ceilings = {row.metric: row for row in ceiling(split, settings, None, standard)}
    for metric in found:
        assert (rows[metric].cfg_scale, ceilings[metric].cfg_scale) == (2.0, None)
        assert (rows[metric].subject, ceilings[metric].subject) == ("model", "tokenizer")
        assert rows[metric].unit == ceilings[metric].unit
    assert rows["accuracy.count"].value == ceilings["accuracy.count"].value
    assert not {"accuracy.count", "shuffle_auroc"} & {row.metric for row in ceiling(split, settings)}
