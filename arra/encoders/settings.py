"""Which encoder a recipe means, and what of it: name, weights, output, layers."""

import re
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from arra.settings import Settings

Output = Literal["cls", "projected", "mean", "concat", "patches"]
"""What is taken of a picture: the CLS token; the CLS token through the encoder's own projection (what CLIP compares);
the mean of the patches; CLS and mean, one after the other; every patch."""


class EncoderChoice(Settings):
    """An encoder and what is taken of it; a recipe may also write the name alone."""

    name: str = Field(min_length=1)
    """A name of `arra list encoders`, or `timm:ARCHITECTURE`, `open_clip:ARCHITECTURE`, `python:MODULE:NAME`."""
    weights: str | None = None
    """Its file or folder, or a Hugging Face repository as ORG/NAME or ORG/NAME@REVISION; null: where the name says."""
    output: Output | None = None
    """What is taken of a picture; null is the encoder's own default, as `arra list encoders` tells it."""
    layers: tuple[PositiveInt, ...] | None = None
    """Blocks, counted from 1, whose outputs are taken and laid one after the other; null is the end of the network."""
    image_size: PositiveInt | None = None
    """Pixels a side that it sees, where it can see several sizes; null is its own."""
    grid: PositiveInt | None = None
    """With `output: patches`: averaged to this many per side before they are stored; null keeps the encoder's own."""
    bands: PositiveInt | None = None
    """As many features per picture: feature b is of the picture with all but its top b + 1 of these bands grey. What
    target `causal` is trained on."""

    @model_validator(mode="after")
    def _fits_together(self) -> "EncoderChoice":
        if self.grid is not None and self.output != "patches":
            raise ValueError("'grid' is of patches; set output: patches, or leave it out")
        if self.bands is not None and self.output == "patches":
            raise ValueError("'bands' is of one vector for a picture; choose output: cls, projected, mean or concat")
        return self

    @property
    def column(self) -> str:
        """Name of the store's column: `features.NAME`, and what differs from the encoder's default."""
        parts = [re.sub(r"[^A-Za-z0-9_-]+", "-", self.name)]
        parts += [self.output] if self.output is not None else []
        parts += ["layers-" + "-".join(map(str, self.layers))] if self.layers is not None else []
        for word, number in (("px", self.image_size), ("grid", self.grid), ("bands", self.bands)):
            parts += [f"{word}{number}"] if number is not None else []
        return "features." + ".".join(parts)
