"""What preparation makes of crops: one maker for each column of the store. Tokenizers give codes, encoders features.

What it makes of captions stands in `arra/stages/caption_features.py`.
Legend: B pictures, V variants of each, H W pixels, h w code grid, P patches, F feature.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from arra.config import Recipe
from arra.data.columns import ColumnEntry, Shape
from arra.data.crops import Crop, CropSettings, describe
from arra.data.images import Grey16
from arra.data.loading import DIGEST_BYTES, Loaded, View
from arra.data.store import Store
from arra.encoders import SPECS, Encoder, EncoderChoice, EncoderSpec, encoder_weights_hash, open_encoder
from arra.encoders.base import at_size
from arra.errors import ArraError
from arra.stages.caption_features import caption_columns
from arra.stages.caption_features import caption_features_made_by as caption_features_made_by
from arra.stages.caption_features import caption_features_name as caption_features_name
from arra.tokenizers import ImageTokenizer

PICTURES, SIZES, PIXELS, CODES = "pictures", "sizes", "pixels", "codes"
CROP, LARGE, CENTER = "crop", "large", "center"
"""Views: what the tokenizer sees, the same crop at an encoder's size (its name ends in that: `large-224`), the plain
centre square for evaluation."""
GREY = 128
"""What stands where a picture's lower bands are hidden: the middle of black and white, near any encoder's mean."""


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
    """The features that a frozen encoder has of every variant: a vector, one a patch, or one a band."""

    encoder: Encoder
    choice: EncoderChoice
    variants: int
    made_by: dict[str, Any]
    device: torch.device
    batch_size: int
    name: str
    views: tuple[str, ...]
    dtype: str = "float32"

    @cached_property
    def shape(self) -> Shape:
        """(F,), (P, F) or (bands, F); what the encoder says of a grey picture has it."""
        side = self.encoder.spec.image_size
        return tuple(self.encode(torch.full((1, side, side, 3), GREY, dtype=torch.uint8)).shape[1:])

    def encode(
        self, images: UInt8[Tensor, "B H W 3"]
    ) -> Float[Tensor, "B F"] | Float[Tensor, "B P F"] | Float[Tensor, "B bands F"]:
        """Features of some pictures, on the CPU."""
        images, choice = images.to(self.device), self.choice
        if choice.bands is None:
            return self._encode(images).cpu()
        shown = (above(images, band + 1, choice.bands) for band in range(choice.bands))
        return torch.stack([self._encode(each).cpu() for each in shown], 1)

    def _encode(self, images: Tensor) -> Tensor:
        choice = self.choice
        return self.encoder.encode(images, aggregate=choice.output, layers=choice.layers, grid=choice.grid)

    def make(self, loaded: Loaded) -> Sequence[np.ndarray]:
        def encode(images: Tensor) -> Tensor:
            return torch.cat([self._stored(self.encode(part)) for part in images.split(self.batch_size)])

        (view,) = self.views
        return on_all(encode, loaded.views[view])

    def _stored(self, features: Tensor) -> Tensor:
        stored = features.to(getattr(torch, self.dtype))
        if not stored.isfinite().all():
            odd = "no finite numbers" if not features.isfinite().all() else f"values beyond {self.dtype}"
            advice = "check its weights" if odd.startswith("no") else "set data.features_dtype: float32"
            raise ArraError(f"{self.name}: the encoder gives {odd}; {advice}")
        return stored


def above(images: UInt8[Tensor, "B H W 3"], band: int, bands: int) -> UInt8[Tensor, "B H W 3"]:
    """The pictures with all but the first `band` of so many horizontal bands grey."""
    height = images.shape[1]
    first = (2 * height * band + bands) // (2 * bands)  # rows, the half rounded up
    return torch.cat([images[:, :first], torch.full_like(images[:, first:], GREY)], 1)


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


def views_of(recipe: Recipe, names: Iterable[str]) -> dict[str, View]:
    """The views of these names, as makers ask for them."""
    crop, size, views = recipe.data.crop, recipe.data.image_size, {}
    for name in sorted(set(names)):
        if name == CENTER:
            views[name] = View(CropSettings(grey16=crop.grey16), size, size)
        else:
            views[name] = View(crop, size, size if name == CROP else int(name.removeprefix(f"{LARGE}-")))
    return views


def center_variant(recipe: Recipe) -> int:
    """Which variant shows the middle of the picture: what held-out pictures are measured by."""
    return 4 if recipe.data.crop.kind == "ten_crop" else 0


def feature_choices(recipe: Recipe) -> dict[str, EncoderChoice]:
    """The encoders whose features preparation makes, by their names in the recipe: every teacher, used or not.

    So rows that differ in the alignment, or have none, share a store.
    """
    return recipe.encoder.choices()


def used_choices(recipe: Recipe) -> dict[str, EncoderChoice]:
    """The encoders that the recipe's alignment trains on, by their names in the recipe; none without alignment."""
    named = dict.fromkeys(term.encoder for _, term in recipe.align_terms())
    return {name: recipe.encoder.choice(name) for name in named}


def feature_sizes(recipe: Recipe) -> dict[str, int | None]:
    """Widths of the features that the recipe's alignment trains on; None where one is not known before it is loaded."""
    return {
        name: SPECS[choice.name].feature_size
        if choice.name in SPECS and choice.output is None and choice.layers is None
        else None
        for name, choice in used_choices(recipe).items()
    }


def about_encoder(choice: EncoderChoice) -> tuple[EncoderSpec, str]:
    """The spec of an encoder at its input size, and the hash of its weights.

    An encoder is loaded (and fetched, if it is not here) only where nothing else tells: of weights that somebody names,
    or of a name that no list has.

    Raises:
        ArraError: its weights or a package are missing.
    """
    spec = SPECS.get(choice.name)
    if spec is not None and choice.weights is None:
        if spec.weights_sha256:
            return at_size(spec, choice.image_size), spec.weights_sha256
        with suppress(ArraError):  # not fetched yet
            return at_size(spec, choice.image_size), encoder_weights_hash(choice)
    encoder = open_encoder(choice)
    return encoder.spec, encoder.weights_hash


def teacher_made_by(
    recipe: Recipe, choice: EncoderChoice, store: Store | None = None, *, encoder: Encoder | None = None
) -> dict[str, Any]:
    """What the store says of an encoder's features; `encoder` is the loaded one, where there is one.

    A column that `store` has and that serves as well is wanted as it is: feature files that were imported, and features
    made elsewhere by an encoder whose weights, or package, are not on this machine.

    Raises:
        ArraError: the encoder's weights or package are needed and not here, or imported features are not those that the
            recipe asks for.
    """
    entry = None if store is None else store.entry(choice.column)
    if entry is not None and "imported" in entry.made_by:
        _require_imported(recipe, choice, entry)
        return entry.made_by
    if entry is not None:
        output, side, sha256 = _as_before(choice, entry.made_by)
    else:
        spec, sha256 = about_encoder(choice) if encoder is None else (encoder.spec, encoder.weights_hash)
        output, side = choice.output or spec.output, spec.image_size
    made_by = {
        "encoder": choice.name,
        "weights": sha256,
        "aggregate": output,
        "crop": describe(recipe.data.crop, recipe.data.image_size, at=recipe.data.encoder_image_size or side),
        "input": side,
        "dtype": recipe.data.features_dtype,
    }
    more = {"layers": choice.layers and list(choice.layers), "grid": choice.grid, "bands": choice.bands}
    made_by |= {key: value for key, value in more.items() if value is not None}
    return made_by if choice.bands is None else {**made_by, "grey": GREY}


def _as_before(choice: EncoderChoice, made_by: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Output, input size and weights' hash that a column should say; what this machine cannot tell is as it says."""
    spec = SPECS.get(choice.name)
    output = choice.output or (made_by.get("aggregate") if spec is None else spec.output)
    # other weights may be of another size than the published ones: their own configuration said so
    side = choice.image_size or (made_by.get("input") if spec is None or choice.weights else spec.image_size)
    sha256 = made_by.get("weights")
    if spec is not None and spec.weights_sha256:
        sha256 = spec.weights_sha256
    elif spec is not None or choice.weights is not None:
        with suppress(ArraError):  # not on this machine
            sha256 = encoder_weights_hash(choice)
    return output, side, sha256


IMPORTED = "ARRA feature files"
"""What `made_by` says of features that the original ARRA extraction made."""


def _require_imported(recipe: Recipe, choice: EncoderChoice, entry: ColumnEntry) -> None:
    """Nothing.

    Raises:
        ArraError: the imported features are of another encoder, of another size, or too few for the recipe's crops.
    """
    name, made_by = choice.column, entry.made_by
    if made_by.get("encoder") != choice.name:
        raise ArraError(
            f"column '{name}' was imported as features of {made_by.get('encoder')!r}, the recipe's encoder is "
            f"{choice.name!r}; name that one, or use another store"
        )
    expected = known_size(choice)
    if expected is not None and entry.shape != (expected,):
        raise ArraError(
            f"column '{name}': imported features of {entry.shape[-1]} values, {choice.name} gives {expected}; say "
            "encoder.teacher.output, or import those of the right encoder"
        )
    require_one_variant(recipe, name)


def known_size(choice: EncoderChoice) -> int | None:
    """Values of an encoder's vector, where that is told without loading it."""
    spec = SPECS.get(choice.name)
    if spec is None or choice.layers is not None or choice.output not in (None, spec.output):
        return None
    return spec.feature_size


def require_one_variant(recipe: Recipe, name: str) -> None:
    """Nothing.

    Raises:
        ArraError: the recipe's crop gives several variants of a picture, which imported features do not have.
    """
    count = crop_of(recipe).num_variants
    if count > 1 or recipe.data.crop.kind == "random":
        raise ArraError(
            f"column '{name}': imported features are one of each picture, data.crop: {recipe.data.crop.kind} shows "
            "several; set data.crop.kind: center, or make the features here"
        )


def codes_made_by(recipe: Recipe, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """What the store says of the codes."""
    return {
        **tokenizer.codes_of,
        "num_codes": tokenizer.num_codes,
        "crop": describe(recipe.data.crop, recipe.data.image_size),
    }


def wanted_columns(
    recipe: Recipe,
    tokenizer: ImageTokenizer | None,
    store: Store | None = None,
    only: Collection[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every column that the recipe asks for, with what the store will say of it; without a tokenizer no codes.

    `only` names some of them, or the first part of their names; encoders of others need not be on this machine.
    Of features that `store` has, see `teacher_made_by` and `caption_features_made_by`.
    """
    captions = caption_columns(recipe, store=store) if recipe.model.condition == "caption" else {}
    wanted = {**picture_columns(recipe, tokenizer, store, only), **captions}
    return {name: made_by for name, made_by in wanted.items() if is_named(name, only)}


def is_named(column: str, only: Collection[str] | None) -> bool:
    """Whether a column is among those that are named whole or by the first part of their names; None names all."""
    return only is None or column in only or column.partition(".")[0] in only


def picture_columns(
    recipe: Recipe,
    tokenizer: ImageTokenizer | None,
    store: Store | None = None,
    only: Collection[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The columns that are made of pictures.

    Where codes and features are made online, a pass still reads every picture, so that bad ones are known.
    """
    wanted = {PICTURES: PicturesMaker().made_by, SIZES: SizesMaker().made_by}
    if recipe.data.keeps_pixels:
        wanted[PIXELS] = PixelsMaker(recipe.data.image_size, recipe.data.crop.grey16).made_by
    if recipe.data.mode == "cached":
        if tokenizer is not None:
            wanted[CODES] = codes_made_by(recipe, tokenizer)
        for choice in feature_choices(recipe).values():
            if is_named(choice.column, only):
                wanted[choice.column] = teacher_made_by(recipe, choice, store)
    return {name: made_by for name, made_by in wanted.items() if is_named(name, only)}


def build_makers(
    recipe: Recipe, names: Sequence[str], tokenizer: ImageTokenizer | None, *, device: torch.device, batch_size: int
) -> list[Maker]:
    """Makers of the named columns, in their order; networks that none of them needs are not loaded, none twice.

    Raises:
        ArraError: an encoder's weights or package are missing, no encoder of the recipe has a named column, or one sees
            too little of pictures that are no squares.
    """
    makers: list[Maker] = []
    crop = crop_of(recipe)
    choices = {choice.column: choice for choice in feature_choices(recipe).values()}
    opened: dict[tuple[str, str | None, int | None], Encoder] = {}
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
        elif name not in choices:
            raise ArraError(f"column '{name}': no encoder of the recipe makes it; it has {', '.join(choices)}")
        else:
            choice = choices[name]
            network = (choice.name, choice.weights, choice.image_size)
            if network not in opened:
                opened[network] = open_encoder(choice, device=device)
            encoder = opened[network]
            _require_whole_view(recipe, choice, encoder.spec)
            side = recipe.data.encoder_image_size or encoder.spec.image_size
            view = f"{LARGE}-{side}"
            makers.append(
                FeaturesMaker(
                    encoder,
                    choice,
                    crop.num_variants,
                    teacher_made_by(recipe, choice, encoder=encoder),
                    device,
                    batch_size,
                    name,
                    (view,),
                    recipe.data.features_dtype,
                )
            )
    return makers


def _require_whole_view(recipe: Recipe, choice: EncoderChoice, spec: EncoderSpec) -> None:
    """Nothing.

    Raises:
        ArraError: patches or bands of pictures that are no squares, by an encoder that sees them cut or padded: they
            would not lie where the codes do.
    """
    placed = choice.output == "patches" or choice.bands is not None
    if placed and recipe.data.crop.kind == "buckets" and spec.fit != "squash":
        seen = "the middle square" if spec.fit == "crop" else "a padded square"
        what = "patches" if choice.bands is None else "bands"
        raise ArraError(
            f"column '{choice.column}': data.crop.kind: buckets gives pictures of many shapes, of which {choice.name} "
            f"sees {seen}, so its {what} do not lie where the codes do; set data.crop.kind: center"
        )
