"""What preparation makes of crops: one maker for each column of the store. Tokenizers give codes, encoders features.

What it makes of captions stands in `arra/stages/caption_features.py`.
Legend: B pictures, V variants of each, H W pixels, h w code grid, F feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from arra.config import Recipe
from arra.data.columns import Shape
from arra.data.crops import Crop, CropSettings, describe
from arra.data.images import Grey16
from arra.data.loading import DIGEST_BYTES, Loaded, View
from arra.data.store import Store
from arra.encoders import Encoder, encoder_spec, load_encoder
from arra.stages.caption_features import caption_columns
from arra.stages.caption_features import caption_features_made_by as caption_features_made_by
from arra.stages.caption_features import caption_features_name as caption_features_name
from arra.tokenizers import ImageTokenizer

PICTURES, SIZES, PIXELS, CODES = "pictures", "sizes", "pixels", "codes"
CROP, LARGE, CENTER = "crop", "large", "center"
"""Views: what the tokenizer sees, the same crop at the encoder's size, the plain centre square for evaluation."""


@runtime_checkable
class Maker(Protocol):
    """Makes one column."""

    @property
    def name(self) -> str: ...
    @property
    def made_by(self) -> dict[str, Any]: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def variants(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def views(self) -> tuple[str, ...]: ...

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        """The value (V, *shape) of every loaded record."""
        ...


@dataclass
class PicturesMaker:
    """Digests of the encoded pictures: whoever adds a column later must see the same ones."""

    name: str = PICTURES
    shape: Shape = (DIGEST_BYTES,)
    variants: int = 1
    dtype: str = "uint8"
    views: tuple[str, ...] = ()

    @property
    def made_by(self) -> dict[str, Any]:
        return {"digest": f"blake2b, {DIGEST_BYTES} bytes, of the encoded picture"}

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        return [np.frombuffer(digest, np.uint8)[None] for digest in loaded.digests]


@dataclass
class SizesMaker:
    """Width and height of the pictures, upright."""

    name: str = SIZES
    shape: Shape = (2,)
    variants: int = 1
    dtype: str = "int32"
    views: tuple[str, ...] = ()

    @property
    def made_by(self) -> dict[str, Any]:
        return {"size": "width and height in pixels, upright, before the crop"}

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        return [np.array([size], np.int32) for size in loaded.sizes]


@dataclass
class PixelsMaker:
    """The centre square as small uint8 pictures: what evaluation and the second judge look at."""

    size: int
    grey16: Grey16 = "full"
    name: str = PIXELS
    variants: int = 1
    dtype: str = "uint8"
    views: tuple[str, ...] = (CENTER,)

    @property
    def shape(self) -> Shape:
        return (self.size, self.size, 3)

    @property
    def made_by(self) -> dict[str, Any]:
        return {"crop": describe(CropSettings(grey16=self.grey16), self.size)}

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        return loaded.views[CENTER]


@dataclass
class CodesMaker:
    """Codes of every variant, in the smallest unsigned type that holds them."""

    tokenizer: ImageTokenizer
    crop: Crop
    made_by: dict[str, Any]
    device: torch.device
    batch_size: int
    name: str = CODES
    views: tuple[str, ...] = (CROP,)

    @property
    def variants(self) -> int:
        return self.crop.num_variants

    @property
    def shape(self) -> Shape:
        if self.crop.settings.kind == "buckets":
            return (None, None)
        side = self.crop.size // self.tokenizer.downsampling
        return (side, side)

    @property
    def dtype(self) -> str:
        return smallest_unsigned(self.tokenizer.num_codes)

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        def encode(images: Tensor) -> Tensor:
            return self.tokenizer.encode(images.to(self.device), batch_size=self.batch_size)

        return [part.astype(self.dtype) for part in on_all(encode, loaded.views[CROP])]


@dataclass
class FeaturesMaker:
    """The features that a frozen encoder has of every variant."""

    encoder: Encoder
    variants: int
    made_by: dict[str, Any]
    device: torch.device
    batch_size: int
    name: str
    dtype: str = "float32"
    views: tuple[str, ...] = (LARGE,)

    @property
    def shape(self) -> Shape:
        return (self.encoder.spec.feature_size,)

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        def encode(images: Tensor) -> Tensor:
            parts = images.to(self.device).split(self.batch_size)
            return torch.cat([self.encoder.encode(part) for part in parts])

        return [part.astype(self.dtype) for part in on_all(encode, loaded.views[LARGE])]


def on_all(network: Any, images: Sequence[UInt8[np.ndarray, "_ _ _ 3"]]) -> list[np.ndarray]:
    """What a network says of every picture's variants; pictures of one size go through it together."""
    found: list[np.ndarray] = [np.empty(0)] * len(images)
    for size in sorted({image.shape for image in images}):
        places = [place for place, image in enumerate(images) if image.shape == size]
        said = network(torch.from_numpy(np.concatenate([images[place] for place in places]))).cpu().numpy()
        for place, part in zip(places, np.split(said, len(places)), strict=True):
            found[place] = part
    return found


def smallest_unsigned(num_codes: int) -> str:
    """The numpy type that holds 0..num_codes-1 in the fewest bytes."""
    return np.min_scalar_type(num_codes - 1).name


def crop_of(recipe: Recipe) -> Crop:
    """The crop that tokenizer and encoder share."""
    return Crop(recipe.data.crop, recipe.data.image_size)


def views_of(recipe: Recipe) -> dict[str, View]:
    """The sizes at which the crop is wanted, by name."""
    crop, size = recipe.data.crop, recipe.data.image_size
    return {
        CROP: View(crop, size, size),
        LARGE: View(crop, size, recipe.data.encoder_image_size),
        CENTER: View(CropSettings(grey16=crop.grey16), size, size),
    }


def center_variant(recipe: Recipe) -> int:
    """Which variant shows the middle of the picture: what held-out pictures are measured by."""
    return 4 if recipe.data.crop.kind == "ten_crop" else 0


def features_name(recipe: Recipe) -> str:
    """The column of the teacher's features."""
    return f"features.{recipe.encoder.teacher}"


def teacher_made_by(recipe: Recipe) -> dict[str, Any]:
    """What the store says of the teacher's features."""
    spec = encoder_spec(recipe.encoder.teacher)
    return {
        "encoder": spec.name,
        "weights": spec.weights_sha256,
        "aggregate": "mean",
        "crop": describe(recipe.data.crop, recipe.data.image_size, at=recipe.data.encoder_image_size),
        "input": spec.image_size,
        "dtype": recipe.data.features_dtype,
    }


def codes_made_by(recipe: Recipe, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What the store says of the codes."""
    return {
        **tokenizer.codes_of,
        "num_codes": tokenizer.num_codes,
        "crop": describe(recipe.data.crop, recipe.data.image_size),
    }


def wanted_columns(
    recipe: Recipe, tokenizer: ImageTokenizer | None, store: Store | None = None
) -> dict[str, dict[str, Any]]:
    """Every column that the recipe asks for, with what the store will say of it; without a tokenizer no codes.

    Of caption features that `store` has, see `caption_features_made_by`.
    """
    captions = caption_columns(recipe, store=store) if recipe.model.condition == "caption" else {}
    return {**picture_columns(recipe, tokenizer), **captions}


def picture_columns(recipe: Recipe, tokenizer: ImageTokenizer | None) -> dict[str, dict[str, Any]]:
    """The columns that are made of pictures.

    Where codes and features are made online, a pass still reads every picture, so that bad ones are known.
    """
    wanted = {PICTURES: PicturesMaker().made_by, SIZES: SizesMaker().made_by}
    if recipe.data.keeps_pixels:
        wanted[PIXELS] = PixelsMaker(recipe.data.image_size, recipe.data.crop.grey16).made_by
    if recipe.data.mode == "cached":
        if tokenizer is not None:
            wanted[CODES] = codes_made_by(recipe, tokenizer)
        wanted[features_name(recipe)] = teacher_made_by(recipe)
    return wanted


def build_makers(
    recipe: Recipe, names: Sequence[str], tokenizer: ImageTokenizer | None, *, device: torch.device, batch_size: int
) -> list[Maker]:
    """Makers of the named columns; networks that none of them needs are not loaded."""
    makers: list[Maker] = []
    crop = crop_of(recipe)
    for name in names:
        if name == PICTURES:
            makers.append(PicturesMaker())
        elif name == SIZES:
            makers.append(SizesMaker())
        elif name == PIXELS:
            makers.append(PixelsMaker(recipe.data.image_size, recipe.data.crop.grey16))
        elif name == CODES:
            assert tokenizer is not None
            tokenizer.model.to(device)
            makers.append(CodesMaker(tokenizer, crop, codes_made_by(recipe, tokenizer), device, batch_size))
        else:
            encoder = load_encoder(recipe.encoder.teacher, device=device)
            made_by, dtype = teacher_made_by(recipe), recipe.data.features_dtype
            makers.append(FeaturesMaker(encoder, crop.num_variants, made_by, device, batch_size, name, dtype))
    return makers
