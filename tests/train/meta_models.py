"""Models of odd shapes on the meta device, for tests that count bytes."""

from typing import Any

import torch
from torch import Tensor

from arra.data.layout import ImageLayout
from arra.models import CausalLM, Decoder
from arra.models.decoder import DecoderSettings
from arra.train.settings import TrainSettings
from tests.models.toy_lms import toy_lm

ODD: dict[str, Any] = {"num_layers": 3, "num_heads": 3, "hidden_size": 36, "ffn_hidden_size": 75, "num_codes": 17,
                       "grid": (4, 4), "num_classes": 4}  # fmt: skip
"""Sides that two ranks do not divide."""


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 10, **changes})


def decoder(*, empty: bool = True, **changes: Any) -> Decoder:
    with torch.device("meta" if empty else "cpu"):
        return Decoder(DecoderSettings(**{**ODD, **changes})).train()


def painter(family: str = "llama", *, empty: bool = True, **changes: Any) -> CausalLM:
    written = ImageLayout(family="generic", begin_image=40, end_image=41, first_code=42, num_codes=16)
    with torch.device("meta" if empty else "cpu"):
        model = CausalLM(toy_lm(family, rows=58, **changes), layout=written, grid=(4, 4))
    model.lm.requires_grad_(True)
    return model.train()


def tokens(rows: int, length: int, *, device: str = "meta") -> dict[str, Tensor]:
    return {"tokens": torch.zeros(rows, length, dtype=torch.int64, device=device)}
