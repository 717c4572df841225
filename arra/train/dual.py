"""Training the dual encoder that judges which caption a picture shows, on the training split alone.

Half of the pictures it sees went through the tokenizer, since what it will judge comes out of the tokenizer.
Legend: N pictures, B batch, L text ids, H W pixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from arra.data.batches import generator
from arra.encoders.dual import DualEncoder, DualSettings, padded_ids
from arra.train.settings import DualTrainSettings


def train_dual_encoder(
    pictures: UInt8[Tensor, "N H W 3"],
    reconstructions: UInt8[Tensor, "N H W 3"],
    captions: Sequence[Sequence[Sequence[int]]],
    settings: DualTrainSettings,
    *,
    text_vocab_size: int,
    progress: Callable[[int], None],
) -> DualEncoder:
    """A dual encoder trained by the symmetric contrastive loss; `captions` are each picture's names as text ids.

    Pictures of one caption in a batch are all right answers for it.
    """
    torch.manual_seed(settings.seed)
    encoder = DualEncoder(DualSettings(text_vocab_size=text_vocab_size))
    optimizer = torch.optim.AdamW(encoder.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    for step in range(settings.steps):
        chance = generator(settings.seed, "dual", step)
        rows = torch.randint(len(pictures), (settings.batch_size,), generator=chance)
        raw = torch.rand(settings.batch_size, generator=chance) < 0.5
        images = torch.where(raw[:, None, None, None], pictures[rows], reconstructions[rows])
        names = [captions[int(row)] for row in rows]
        which = torch.rand(settings.batch_size, generator=chance).tolist()
        ids = padded_ids([list(each[int(share * len(each))]) for each, share in zip(names, which, strict=True)])
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _warmup_cosine(step, settings.steps)
        shown = shifted(images.permute(0, 3, 1, 2).float() / 127.5 - 1, chance)
        scores = encoder.log_scale.exp() * encoder.embed_pictures(shown) @ encoder.embed_captions(ids).T
        same = (ids[:, None] == ids[None]).all(2).float()
        right = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1)
    return encoder.eval().requires_grad_(False)


def _warmup_cosine(step: int, steps: int, warmup_steps: int = 50) -> float:
    """The share of the learning rate at a step: up linearly, then down a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def shifted(images: Float[Tensor, "B 3 H W"], chance: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """Pictures moved together by up to two pixels on white, with a little noise each."""
    padded = F.pad(images, (2, 2, 2, 2), value=1.0)
    top, left = torch.randint(5, (2,), generator=chance).tolist()
    height, width = images.shape[2:]
    moved = padded[:, :, top : top + height, left : left + width]
    return moved + 0.05 * torch.randn(moved.shape, generator=chance)
