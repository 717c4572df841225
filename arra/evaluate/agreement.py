"""How well pictures agree with their prompts: CLIP-Score, the cosine between a picture's vector and its prompt's.

    pictures --Agreement.space--> vectors --.
    prompts --Agreement.prompt_vectors------+--> cosines (N,) --clip_measures--> clip_score, clip_score_x100

The raw cosine is what the paper reports (about 0.25 for CLIP and 0.45 for BioMedCLIP); others report 100 times it, with
negative cosines as 0. Both halves are of one model and one set of weights: the picture half is a space like any other,
so that one pass over the pictures serves it and distances alike.

Three things differ between tools, so a card says them: the model; what is written in front of each prompt ("A photo
depicts " of CLIPScore's authors and of GigaGAN's evaluation, nothing in torchmetrics and here by default); and what
becomes of a prompt that is too long, which here keeps its end token, whose state CLIP compares, as `transformers` cuts
it. Not through torchmetrics 1.9: it cuts that token off, clamps the mean at 0 and not each picture, has no BioMedCLIP,
and does not run with transformers 5.

Source: Hessel et al. 2021, CLIPScore (equation 1, there with 2.5 in place of 100).

Legend: B batch, N pictures, H W pixels, E projected feature.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from arra.encoders import load_encoder
from arra.encoders.text_towers import TOWER_NAMES, TextTower, load_text_tower
from arra.errors import ArraError
from arra.evaluate.measured import Measured
from arra.evaluate.spaces import EncoderSpace


class Agreement:
    """Both halves of a CLIP."""

    def __init__(self, space: EncoderSpace, tower: TextTower, *, prefix: str = "") -> None:
        self.space, self.tower, self.prefix = space, tower, prefix
        self.name = space.name
        self.family = space.family
        self.weights_sha256 = space.weights_sha256
        self.context = tower.context
        """Tokens of a prompt that are read."""

    def num_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than what is read of them."""
        return sum(count > self.context for count in self.tower.num_tokens(self._told(prompts)))

    def prompt_vectors(self, prompts: Sequence[str]) -> Float[Tensor, "B E"]:
        """One float32 vector for each prompt, not normalised; equal prompts are read once."""
        told = self._told(prompts)
        different = list(dict.fromkeys(told))
        places = {prompt: place for place, prompt in enumerate(different)}
        vectors = self.tower.encode(different)
        return vectors[torch.tensor([places[prompt] for prompt in told], device=vectors.device)]

    def scores_of(self, features: Float[Tensor, "B E"], prompts: Sequence[str]) -> Float64[Tensor, "B"]:
        """The cosine of each picture with its prompt, told from vectors of `space`; on the CPU.

        Raises:
            ArraError: not as many prompts as pictures.
        """
        if len(features) != len(prompts):
            raise ArraError(
                f"agreement {self.name}: {len(features)} pictures and {len(prompts)} prompts; give one prompt each"
            )
        vectors = self.prompt_vectors(prompts)
        return F.cosine_similarity(features.cpu().double(), vectors.cpu().double())

    def scores(self, images: UInt8[Tensor, "B H W 3"], prompts: Sequence[str]) -> Float64[Tensor, "B"]:
        """The cosine of each picture with its prompt.

        Raises:
            ArraError: not as many prompts as pictures.
        """
        return self.scores_of(self.space.encode(images)["features"], prompts)

    def _told(self, prompts: Sequence[str]) -> list[str]:
        return [f"{self.prefix}{prompt}" for prompt in prompts]


def open_agreement(
    name: str, *, weights: str | Path | None = None, prefix: str = "", device: torch.device | str = "cpu"
) -> Agreement:
    """Both halves of `clip-b32`, `clip-b16`, `clip-l14`, `clip-l14-336` or `biomedclip`.

    `weights` is a folder, or a repository, with both halves and the tokenizer; None is the published repository.

    Raises:
        ArraError: a name without a text half, a missing package, no weights or tokenizer, or those of another network.
    """
    if name not in TOWER_NAMES:
        raise ArraError(f"agreement '{name}': no text half is known for it; choose of {', '.join(TOWER_NAMES)}")
    encoder = load_encoder(name, weights=weights, device=device)
    if encoder.spec.output != "projected" or "projected" not in encoder.spec.outputs:
        raise ArraError(f"agreement {name}: {weights} has no projection of pictures; name a folder of the whole model")
    space = EncoderSpace(encoder, name=name, output=None, device=torch.device(device))
    tower = load_text_tower(name, weights=weights, device=device)
    return Agreement(space, tower, prefix=prefix)


def clip_measures(cosines: Float64[np.ndarray, "N"]) -> dict[str, Measured]:
    """`clip_score`, the mean cosine, and `clip_score_x100`, the mean of 100 times it with negative ones as 0."""
    scaled = 100 * np.maximum(cosines, 0)
    return {
        "clip_score": Measured(value=float(cosines.mean()), per_picture=cosines),
        "clip_score_x100": Measured(value=float(scaled.mean()), per_picture=scaled),
    }
