"""A decoder goes on from given weights only as the model that they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from arra.config import load_recipe
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, save_model
from arra.stages.model import decoder_settings, start_from

TINY: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "num_codes": 16, "grid": (2, 2)}


def decoder(**changes: Any) -> Decoder:
    model = Decoder(DecoderSettings(**{**TINY, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def test_another_grid_and_other_dropout_are_no_other_model(tmp_path: Path) -> None:
    given = decoder()
    save_model(given, tmp_path / "given")
    model = decoder(grid=(4, 4), token_dropout=0.3, drop_path=0.2)
    start_from(model, str(tmp_path / "given"))
    for key, value in given.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    "change",
    [
        {"rope_base": 5e5},  # neither leaves a trace in the weights
        {"norm_eps": 1e-6},
        {"num_heads": 2},
        {"num_codes": 17},
        {"ffn_hidden_size": 64},
    ],
)
def test_what_the_recipe_does_not_say_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_model(decoder(**change), tmp_path / "given")
    with pytest.raises(ArraError, match=r"given has \w+ [\w.e-]+, the recipe's model"):
        start_from(decoder(), str(tmp_path / "given"))


def test_pictures_are_whole_codes() -> None:
    recipe = load_recipe("llamagen_c2i", row="b", overrides=["data.image_size=100"])
    with pytest.raises(ArraError, match=r"data\.image_size: 100 is no multiple of 16, the pixels per code of"):
        decoder_settings(recipe, num_codes=16384, downsampling=16)
    assert decoder_settings(recipe, num_codes=16384, downsampling=4).grid == (25, 25)
