"""The caption judge: it learns, it is the same every time, and its file says when it is damaged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arra.encoders.dual import (
    DualEncoder,
    load_dual_encoder,
    padded_ids,
    picture_embeddings,
    save_dual_encoder,
)
from arra.errors import ArraError
from arra.evaluate.retrieval import caption_ranks
from arra.train.dual import train_dual_encoder
from arra.train.settings import DualTrainSettings

COLORS = torch.tensor([[255, 0, 0], [0, 160, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [200, 0, 200]])


def data() -> tuple[Tensor, list[list[list[int]]]]:
    pictures = torch.full((6, 32, 32, 3), 255, dtype=torch.uint8)
    for i, color in enumerate(COLORS):
        pictures[i, 8:24, 8:24] = color.to(torch.uint8)
    return pictures, [[[2 + i], [2 + i, 9]] for i in range(6)]


def trained(steps: int = 40) -> DualEncoder:
    pictures, captions = data()
    settings = DualTrainSettings(steps=steps, batch_size=16)
    return train_dual_encoder(pictures, pictures, captions, settings, text_vocab_size=10, progress=lambda step: None)


def test_it_learns_and_repeats(tmp_path: Path) -> None:
    pictures, captions = data()
    encoder = trained()
    texts = encoder.embed_captions(padded_ids([each[0] for each in captions]))
    assert caption_ranks(picture_embeddings(encoder, pictures), texts).tolist() == [0] * 6
    again = trained()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    save_dual_encoder(encoder, tmp_path, about={"x": 1})
    loaded = load_dual_encoder(tmp_path, about={"x": 1})
    assert loaded is not None
    assert torch.equal(picture_embeddings(loaded[0], pictures), picture_embeddings(encoder, pictures))
    assert load_dual_encoder(tmp_path, about={"x": 2}) is None
    assert load_dual_encoder(tmp_path / "elsewhere") is None
    (tmp_path / "judge.safetensors").write_bytes(b"other")
    with pytest.raises(ArraError, match="damaged"):
        load_dual_encoder(tmp_path, about={"x": 1})


def test_padding_and_order_of_words_change_nothing() -> None:
    encoder = trained(steps=1)
    short = encoder.embed_captions(torch.tensor([[3, 4]]))
    assert torch.allclose(encoder.embed_captions(torch.tensor([[4, 3, 0, 0]])), short, atol=1e-6)
    assert encoder.embed_captions(torch.tensor([[0]])).isfinite().all()


def test_caption_ranks_count_better_captions() -> None:
    captions = torch.eye(4)
    assert caption_ranks(captions, captions).tolist() == [0, 0, 0, 0]
    pictures = torch.tensor([[0.2, 0.9, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.0, 0.9], [0.5, 0.5, 0.5, 0.5]])
    # ties count against the picture: the last one fits every caption alike
    assert caption_ranks(pictures, captions).tolist() == [2, 0, 3, 3]
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert caption_ranks(same, same).tolist() == [0, 0, 0]  # equal captions are not rivals
