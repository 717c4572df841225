"""Decoders of toy size with weights that are all random, so that no two tensors of a file are alike."""

from typing import Any

import torch

from arra.models.decoder import Decoder, DecoderSettings


def toy_decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    fields = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "num_codes": 16, "grid": (2, 2), **changes}
    model = Decoder(DecoderSettings(**fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model
