"""The one crop of a recipe: which pixels tokenizer and encoder see, and the text that names them in manifests.

After `arra.data.images`, before the networks. A `Crop` is bound to the tokenizer's image size; asked for another size
it gives the same regions of the picture at that resolution. Nothing here is random: random crops take their numbers
from outside as a `Draw`.

Legend: V views, H W pixels.
"""

import math
from dataclasses import astuple, dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import Field, model_validator

from arra.data.images import Grey16, center_crop, cover, cover_size, middle
from arra.errors import ArraError
from arra.settings import Settings

OWN_FIELDS = {
    "range": "ten_crop",
    "min_fraction": "random",
    "flip_share": "random",
    "patch": "buckets",
    "max_ratio": "buckets",
}
"""Fields that one kind alone reads, and that kind."""
CropRange = Annotated[float, Field(ge=1, le=4)]


class CropSettings(Settings):
    """How pictures are cropped, for tokenizer and encoder alike."""

    kind: Literal["center", "flip", "ten_crop", "random", "buckets"] = "center"
    """The middle square; it and its mirror image; corners and middle, mirrored too (LlamaGen); another square each
    time (ADM, for online use); the middle at nearly the picture's own aspect ratio (Lumina)."""
    range: CropRange | Annotated[tuple[CropRange, ...], Field(min_length=1, max_length=8)] = 1.0
    """Ten-crop: the middle square is brought to `range` times the size first. A list gives ten crops of each, chosen
    equally often; LlamaGen's published models were trained on [1.1, 1.05]."""
    min_fraction: float = Field(0.8, ge=0.1, le=1)
    """Random: least share of the short side that a crop shows; the greatest is 1."""
    flip_share: float = Field(0.5, ge=0, le=1)
    """Random: share of crops that are mirrored."""
    patch: int = Field(32, gt=0)
    """Buckets: sides are multiples of this many pixels."""
    max_ratio: float = Field(4.0, ge=1, allow_inf_nan=False)
    """Buckets: greatest ratio of the sides."""
    grey16: Grey16 = "full"
    """Greys of more than 8 bits: scaled by all that the format holds, or each picture by its own least and greatest
    value (`range`, for 12-bit data in 16-bit files, as DICOM exports are)."""

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> "CropSettings":
        for name, kind in OWN_FIELDS.items():
            if kind != self.kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' belongs to 'kind: {kind}', the kind is '{self.kind}'; remove it")
        if len(set(self.ranges)) < len(self.ranges):
            raise ValueError(f"'range' names {', '.join(map(_short, self.ranges))}; name each number once")
        return self

    @property
    def ranges(self) -> tuple[float, ...]:
        """Ten-crop: the numbers of `range`, also where there is one."""
        return self.range if isinstance(self.range, tuple) else (self.range,)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one crop, each in [0, 1)."""

    zoom: float
    x: float
    y: float
    flip: float

    def __post_init__(self) -> None:
        if not all(0 <= number < 1 for number in astuple(self)):
            raise ValueError(f"{self}: numbers must lie in [0, 1)")


def describe(settings: CropSettings, size: int, *, at: int | None = None) -> str:
    """The crop in one line, with all that changes pixels: equal lines mean equal pixels of equal pictures.

    `at` is the resolution where it is not the crop's own `size`, as for an encoder beside the tokenizer.
    """
    grey = "" if settings.grey16 == "full" else f", grey16={settings.grey16}"
    if settings.kind in ("center", "flip"):
        center = f"center_crop({size if at is None else at}{grey})"
        return center if settings.kind == "center" else f"flip({center})"
    own = {
        "ten_crop": f"range={'+'.join(map(_short, settings.ranges))}",
        "random": f"fraction={_short(settings.min_fraction)}..1, flip={_short(settings.flip_share)}",
        "buckets": f"patch={settings.patch}, ratio<={_short(settings.max_ratio)}",
    }[settings.kind]
    name = "random_crop" if settings.kind == "random" else settings.kind
    return f"{name}({size}, {own}{grey})" + ("" if at in (None, size) else f" at {at}")


def _short(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def crop_sizes(size: int, *, patch: int = 32, max_ratio: float = 4.0) -> list[tuple[int, int]]:
    """(width, height) of every bucket, widest first: at most as many patches as the square of `size` has.

    For each width the greatest height that fits, and the heights between it and that of the next wider bucket.

    Source: Lumina-mGPT `lumina_mgpt/data/item_processor.py`, same order.
    """
    count = (size // patch) ** 2
    return [
        (patch * across, patch * down)
        for across in range(count, 0, -1)
        for down in range(max(count // (across + 1), 1), count // across + 1)
        if max(across, down) <= max_ratio * min(across, down)
    ]


def choose_bucket(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket that cuts the least off a picture of these sides; of equally good ones the wider.

    Source: Lumina-mGPT `lumina_mgpt/data/item_processor.py` with `random_top_k` 1.
    """

    def kept(sides: tuple[int, int]) -> float:
        across, down = sides[0] / width, sides[1] / height
        return min(across, down) / max(across, down)

    return max(sizes, key=lambda sides: (kept(sides), sides))


class Crop:
    """A recipe's crop at the tokenizer's image size.

    Raises:
        ArraError: buckets whose image size is no multiple of the patch.
    """

    def __init__(self, settings: CropSettings, size: int) -> None:
        self.settings = settings
        self.size = size
        self.buckets = [(size, size)]
        if settings.kind == "buckets":
            if size % settings.patch:
                raise ArraError(f"crop: image size {size} is no multiple of patch {settings.patch}; change one of them")
            self.buckets = crop_sizes(size, patch=settings.patch, max_ratio=settings.max_ratio)

    @property
    def num_variants(self) -> int:
        """Views of one picture: 10 of a ten-crop for each of its ranges, 2 with the mirror image, else 1."""
        return {"flip": 2, "ten_crop": 10 * len(self.settings.ranges)}.get(self.settings.kind, 1)

    def sides(self, width: int, height: int, *, size: int | None = None) -> tuple[int, int]:
        """(width, height) of the views of a picture of `width` x `height` pixels.

        At another `size` both sides are scaled alike, so a bucket's area follows the square of `size`.
        """
        across, down = choose_bucket(width, height, self.buckets) if len(self.buckets) > 1 else self.buckets[0]
        if size is None:
            return across, down
        return round(across * size / self.size), round(down * size / self.size)

    def views(
        self, image: Image.Image, *, size: int | None = None, draw: Draw | None = None
    ) -> UInt8[np.ndarray, "views height width 3"]:
        """The views of an RGB picture, in this order:

        - flip: the middle square, its mirror image;
        - ten_crop: top left, top right, bottom left, bottom right, middle, then the same five of the mirror image; all
          ten of the first range, then those of the next;
        - else one view; `random` alone needs a `draw` and alone heeds it.

        Height and width are those of `sides`: `size` both, or the picture's bucket. At another `size` than the crop's
        own the same regions are shown, to a pixel's rounding.

        Source: LlamaGen `autoregressive/train/extract_codes_c2i.py` (flip, ten-crop); torchvision's order of ten crops;
        ADM `random_crop_arr` (random).
        """
        width, height = self.sides(*image.size, size=size)
        kind = self.settings.kind
        if kind == "ten_crop":
            return np.concatenate([self._ten(image, width, each) for each in self.settings.ranges])
        if kind == "random":
            if draw is None:
                raise ValueError("a random crop needs a draw")
            return np.stack([self._random(image, width, draw)])
        view = middle(image, width=width, height=height)
        return np.stack([view, view[:, ::-1]] if kind == "flip" else [view])

    def _ten(self, image: Image.Image, side: int, zoom: float) -> UInt8[np.ndarray, "10 side side 3"]:
        whole = center_crop(image, round(int(self.size * zoom) * side / self.size))
        far = whole.shape[0] - side
        half = round(far / 2)  # a half goes to the even number, as in torchvision
        corners = [(0, 0), (0, far), (far, 0), (far, far), (half, half)]
        return np.stack(
            [
                pixels[top : top + side, left : left + side]
                for pixels in (whole, whole[:, ::-1])
                for top, left in corners
            ]
        )

    def _random(self, image: Image.Image, side: int, draw: Draw) -> UInt8[np.ndarray, "side side 3"]:
        choices = math.ceil(self.size / self.settings.min_fraction) - self.size + 1
        short = self.size + int(draw.zoom * choices)
        across, down = cover_size(image.size, width=short, height=short)
        left, top = int(draw.x * (across - self.size + 1)), int(draw.y * (down - self.size + 1))
        ratio = side / self.size
        whole = cover(image, width=round(short * ratio), height=round(short * ratio))
        left, top = min(round(left * ratio), whole.width - side), min(round(top * ratio), whole.height - side)
        view = np.asarray(whole.crop((left, top, left + side, top + side)))
        return view[:, ::-1] if draw.flip < self.settings.flip_share else view
