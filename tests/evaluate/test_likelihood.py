"""The gain of a condition is measured against one that is wrong."""

import pytest
import torch

from arra.evaluate.likelihood import likelihoods, wrong_places
from arra.models import Decoder, DecoderSettings


@pytest.mark.parametrize("count", [2, 3, 20])
def test_every_picture_is_given_another_ones_condition(count: int) -> None:
    wrong = wrong_places(count, None, seed=0)
    assert wrong is not None
    assert sorted(wrong) == list(range(count))
    assert all(here != there for here, there in enumerate(wrong))
    assert wrong_places(1, None, seed=0) == [0]


def test_of_classes_it_is_another_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 2, 0])
    wrong = wrong_places(len(labels), labels, seed=0)
    assert wrong is not None
    assert (labels != labels[wrong]).all()
    assert wrong_places(3, torch.zeros(3, dtype=torch.int64), seed=0) is None


def test_gain_of_classes_is_what_the_right_class_is_worth() -> None:
    """A model that paints the class's own code: with the right class it is sure, with another it is surely wrong."""
    settings = DecoderSettings(num_layers=1, num_heads=1, hidden_size=8, num_codes=4, grid=(1, 2), num_classes=4)
    model = Decoder(settings)

    def asked(places):
        return {"labels": [place % 4 for place in places]}

    codes = torch.arange(8)[:, None].expand(8, 2) % 4
    fresh = likelihoods(model, codes, asked, labels=torch.arange(8) % 4, batch_size=3)
    assert fresh.gain is not None
    assert fresh.nll.tolist() == pytest.approx([torch.log(torch.tensor(4.0)).item()] * 8)
    assert fresh.gain.abs().max() < 1e-6
    assert fresh.bits_per_token.tolist() == pytest.approx([2.0] * 8)  # four codes, nothing known
    with torch.no_grad():
        table = model.get_parameter("cls_embedding.embedding_table.weight")
        table.zero_()
        table[:4, :4] = torch.eye(4)
        model.tok_embeddings.weight.zero_()
        model.tok_embeddings.weight[:, :4] = torch.eye(4)
        model.output.weight.zero_()
        model.output.weight[:, :4] = 10 * torch.eye(4)
        for name, value in model.layers.named_parameters():
            if "norm" not in name:
                value.zero_()
    sure = likelihoods(model, codes, asked, labels=torch.arange(8) % 4, batch_size=3)
    assert sure.gain is not None
    assert sure.nll.max() < 1e-3
    assert sure.gain.min() > 5
    assert likelihoods(model, codes, asked, labels=torch.zeros(8, dtype=torch.int64)).gain is None
