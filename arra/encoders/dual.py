"""A small dual encoder of captions and pictures: the judge that shares nothing with the teacher.

It is trained on the training split alone (`arra/train/dual.py`), from random weights, and asked of every painted
picture which of the held-out captions it shows. It never teaches.
Legend: B batch, H W pixels, L text ids, E embedding.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from arra.errors import ArraError
from arra.runs import atomic_write, file_hash
from arra.settings import Settings

WEIGHTS_FILE, CARD_FILE = "judge.safetensors", "judge.json"
PAD = 0


class DualSettings(Settings):
    """Shape of a dual encoder."""

    text_vocab_size: int = Field(gt=1)
    channels: int = Field(32, gt=0, multiple_of=8)
    embedding_size: int = Field(96, gt=0)


class DualEncoder(nn.Module):
    """Unit vectors of pictures and of captions whose product says how well they fit."""

    def __init__(self, settings: DualSettings) -> None:
        super().__init__()
        self.settings = settings
        c, e = settings.channels, settings.embedding_size
        widths = [3, c, 2 * c, 4 * c, 4 * c]
        blocks: list[nn.Module] = []
        for before, after in pairwise(widths):
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.picture = nn.Sequential(
            *blocks,
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * widths[-1], 2 * e),
            nn.SiLU(),
            nn.Linear(2 * e, e),
        )
        self.words = nn.Embedding(settings.text_vocab_size, e, padding_idx=PAD)
        self.caption = nn.Sequential(nn.Linear(e, 2 * e), nn.SiLU(), nn.Linear(2 * e, e))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def embed_pictures(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        """Of pictures in [-1, 1]."""
        return F.normalize(self.picture(images), dim=1)

    def embed_captions(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """Of captions as text ids, padded with 0."""
        real = (ids != PAD).unsqueeze(2)
        mean = (self.words(ids) * real).sum(1) / real.sum(1).clamp(min=1)
        return F.normalize(self.caption(mean), dim=1)


@torch.no_grad()
def picture_embeddings(
    encoder: DualEncoder, images: UInt8[Tensor, "B H W 3"], *, batch_size: int = 128
) -> Float[Tensor, "B E"]:
    """Embeddings of uint8 pictures."""
    parts = images.split(batch_size)
    return torch.cat([encoder.embed_pictures(p.permute(0, 3, 1, 2).float() / 127.5 - 1) for p in parts])


@torch.no_grad()
def picture_features(encoder: DualEncoder, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B E"]:
    """Embeddings of uint8 pictures with a root mean square of 1: a space to measure distances in.

    The product of two over E, which the kernel distance takes, is then their cosine.
    """
    return picture_embeddings(encoder, images) * encoder.settings.embedding_size**0.5


def padded_ids(captions: list[list[int]]) -> Int[Tensor, "B L"]:
    """Text ids as one tensor, 0 after the end."""
    width = max(1, *(len(ids) for ids in captions))
    return torch.tensor([ids + [PAD] * (width - len(ids)) for ids in captions])


def save_dual_encoder(encoder: DualEncoder, folder: Path, *, about: dict[str, Any]) -> None:
    """Nothing; the folder holds weights and card."""
    atomic_write(folder / WEIGHTS_FILE, safetensors.torch.save(dict(encoder.state_dict())))
    card = {"settings": encoder.settings.model_dump(), "sha256": file_hash(folder / WEIGHTS_FILE), "about": about}
    atomic_write(folder / CARD_FILE, json.dumps(card, indent=2) + "\n")


def load_dual_encoder(folder: Path, *, about: dict[str, Any] | None = None) -> tuple[DualEncoder, str] | None:
    """The encoder and its weights' hash; None if there is none, or none made as `about` says.

    Raises:
        ArraError: the weights are not the card's.
    """
    if not (folder / CARD_FILE).is_file():
        return None
    card = json.loads((folder / CARD_FILE).read_text())
    if about is not None and card["about"] != json.loads(json.dumps(about)):
        return None
    found = file_hash(folder / WEIGHTS_FILE)
    if found != card["sha256"]:
        raise ArraError(f"{folder / WEIGHTS_FILE}: damaged, its hash is not the card's; delete the folder {folder}")
    encoder = DualEncoder(DualSettings(**card["settings"]))
    encoder.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    return encoder.eval().requires_grad_(False), found
