"""What a picture of drawn shapes shows, read from its pixels, and how often that is what its caption asks for.

Place in the pipeline: painted pictures of the captions of `arra.data.shapes` become exact shares of right counts,
colours, shapes, places and symmetries: no judge network, hence no teacher that it could resemble. The same reader on
held-out pictures that only went through the tokenizer says what a perfect model could reach.

How it reads: connected pixels that are more ink than paper are a component; its colour is the one that most of its
inner pixels are nearest to, its shape the one whose drawing at the same centre and area overlaps most. So a reading
bears blur and noise, and what looks like no shape or has no one colour is said to have none, which is never right.

Legend: N pictures, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from arra.data.shapes import (
    COLOURS,
    PLACES,
    SHAPES,
    Asked,
    Colour,
    Kind,
    Place,
    Shape,
    coverage,
    holds,
    read_caption,
)
from arra.errors import ArraError
from arra.evaluate.measured import Measured

MAX_SIZE = 64
"""Larger pictures are reduced to this many pixels a side before they are read."""
INK = 105
"""Fall of the darkest channel below white from which a pixel is ink: half of what the palest colour has."""
LEAST_AREA = 0.008
"""Smaller components (a quarter of a shape) are specks and are passed over."""
LEAST_COLOUR_SHARE = 0.6
"""Share of a component's inner pixels that its colour must have."""
LEAST_OVERLAP = 0.8
"""Overlap with the best shape below which a component is none."""
MIRROR_TOLERANCE = 0.05
"""How far from its mirrored place a shape may stand, in sides of the picture: 1.6 of 32 pixels."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """A connected patch of ink; its centre of mass as shares of the sides, x to the right, y down."""

    colour: Colour | None
    """None where no colour has most of it."""
    shape: Shape | None
    """None where it looks like no shape."""
    x: float
    y: float

    @property
    def kind(self) -> Kind | None:
        """Colour and shape, where it has both."""
        return None if self.colour is None or self.shape is None else Kind(self.colour, self.shape)

    @property
    def place(self) -> Place:
        """Which of the nine cells its centre lies in."""
        row, column = (min(int(3 * each), 2) for each in (self.y, self.x))
        return PLACES[3 * row + column]


@dataclass(frozen=True)
class Drawing:
    """What a picture shows, in reading order."""

    components: tuple[Component, ...]

    @property
    def is_mirrored(self) -> bool:
        """Whether every component has its mirror image, left to right, within `MIRROR_TOLERANCE`; false of none.

        An image has the same colour, and no other shape where both look like one.
        """

        def is_image(a: Component, b: Component) -> bool:
            apart = max(abs(a.x + b.x - 1), abs(a.y - b.y))
            return a.colour == b.colour and len({a.shape, b.shape} - {None}) < 2 and apart <= MIRROR_TOLERANCE

        return bool(self.components) and all(any(is_image(a, b) for b in self.components) for a in self.components)


def attributes_of(image: UInt8[np.ndarray, "H W 3"]) -> Drawing:
    """What a square picture shows.

    Raises:
        ArraError: it is not square, or smaller than 16 pixels a side.
    """
    height, width = image.shape[:2]
    if height != width or height < 16:
        raise ArraError(f"picture of {width} x {height} pixels: expected a square one of 16 pixels or more a side")
    if height > MAX_SIZE:
        image = np.asarray(Image.fromarray(image).resize((MAX_SIZE, MAX_SIZE), Image.Resampling.BOX))
    fall = 255.0 - image
    numbers = _connected(fall.max(-1) > INK)
    found = []
    for number in np.unique(numbers[numbers >= 0]):  # numbered by their first pixel: in reading order
        pixels = numbers == number
        if pixels.mean() >= LEAST_AREA:
            found.append(_component(pixels, fall))
    return Drawing(tuple(found))


def _connected(ink: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """The number of its component at every pixel of ink, -1 elsewhere; pixels connect along their edges."""
    numbers = np.where(ink, np.arange(ink.size).reshape(ink.shape), ink.size)
    while True:
        padded = np.pad(numbers, 1, constant_values=ink.size)
        least = np.minimum.reduce([numbers, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        least = np.where(ink, least, ink.size)
        if np.array_equal(least, numbers):
            return np.where(ink, numbers, -1)
        numbers = least


def _component(pixels: Bool[np.ndarray, "H W"], fall: Float[np.ndarray, "H W 3"]) -> Component:
    strength = np.where(pixels, fall.max(-1), 0.0)
    inner = fall[strength >= 0.8 * strength.max()]  # at the edge, black on white is grey and near to any colour
    falls = 255.0 - np.array(list(COLOURS.values()), dtype=np.float64)
    nearest = ((inner[:, None] - falls) ** 2).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(falls))
    best = int(counts.argmax())
    colour = list(COLOURS)[best] if counts[best] >= LEAST_COLOUR_SHARE * len(inner) else None

    size = len(pixels)
    padded = np.pad(pixels, 1)
    around = np.logical_or.reduce(
        [padded[i : i + size, j : j + size] for i in range(3) for j in range(3)]
    )  # the edge, where ink is thin, belongs to it
    ink = np.where(around, fall @ falls[best] / (falls[best] @ falls[best]), 0.0).clip(0, 1)
    area, places = ink.sum(), (np.arange(size) + 0.5) / size
    x, y = float(ink.sum(0) @ places / area), float(ink.sum(1) @ places / area)
    overlaps = {}
    for shape in SHAPES:
        drawn = coverage(shape, x=x, y=y, size=size, radius=(area / np.pi) ** 0.5 / size)
        overlaps[shape] = 1 - abs(ink - drawn).sum() / (2 * area)
    likest = max(overlaps, key=lambda shape: overlaps[shape])
    return Component(colour=colour, shape=likest if overlaps[likest] >= LEAST_OVERLAP else None, x=x, y=y)


def attribute_accuracy(images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, Measured]:
    """The share of pictures (uint8, (H, W, 3)) that show what their captions ask for, by attribute.

    `count`: as many shapes. `colour`, `shape`, `kind`: the colours asked for and no others, the shapes, their pairs.
    `position`: at the place, or in the relation, told by colour alone (by shape where the colours are equal), so that
    ragged shapes hide no layout; `symmetry`: `Drawing.is_mirrored`; both of the pictures whose captions ask for it (the
    per-picture values of the others are the share itself). `all`: every shape asked for with its kind and no other,
    where it was asked for. An attribute that no caption asks for is left out.

    Raises:
        ArraError: a caption is not of the drawn shapes, or there is not one for each picture.
    """
    if len(images) != len(captions) or not len(images):
        raise ArraError(f"{len(images)} pictures and {len(captions)} captions: expected one caption each")
    asked = [read_caption(caption) for caption in captions]
    shown = [attributes_of(np.asarray(image)) for image in images]
    found = {}
    for name, (applies, is_right) in _ATTRIBUTES.items():
        asks = np.array([applies(each) for each in asked])
        if asks.any():
            hits = np.array([is_right(*pair) for pair in zip(shown, asked, strict=True)], dtype=np.float64)
            share = hits[asks].mean()
            # a ratio of two means, asked and right over asked: linearised, so that it is one mean over all pictures
            per_picture = share + asks * (hits - share) / asks.mean()
            found[name] = Measured(value=float(share), per_picture=per_picture)
    return found


def _has_position(asked: Asked) -> bool:
    return asked.place is not None or asked.relation is not None


def _position_right(shown: Drawing, asked: Asked) -> bool:
    by_shape = len(asked.kinds) > 1 and asked.kinds[0].colour == asked.kinds[1].colour
    of_kind = [
        [each for each in shown.components if (each.shape == kind.shape if by_shape else each.colour == kind.colour)]
        for kind in asked.kinds
    ]
    if not _has_position(asked) or not all(of_kind):
        return not _has_position(asked)
    if asked.relation is None:
        return {each.place for each in of_kind[0]} == {asked.place}
    return all(holds(asked.relation, first=(a.x, a.y), second=(b.x, b.y)) for a in of_kind[0] for b in of_kind[1])


def _all_right(shown: Drawing, asked: Asked) -> bool:
    kinds = sorted(str(each.kind) for each in shown.components)
    same = kinds == sorted(map(str, asked.shapes))
    return same and _position_right(shown, asked) and (shown.is_mirrored or not asked.mirrored)


_ATTRIBUTES: dict[str, tuple[Callable[[Asked], bool], Callable[[Drawing, Asked], bool]]] = {
    "count": (lambda asked: True, lambda shown, asked: len(shown.components) == len(asked.shapes)),
    "colour": (
        lambda asked: True,
        lambda shown, asked: {each.colour for each in shown.components} == {kind.colour for kind in asked.kinds},
    ),
    "shape": (
        lambda asked: True,
        lambda shown, asked: {each.shape for each in shown.components} == {kind.shape for kind in asked.kinds},
    ),
    "kind": (
        lambda asked: True,
        lambda shown, asked: {each.kind for each in shown.components} == set(asked.kinds),
    ),
    "position": (_has_position, _position_right),
    "symmetry": (lambda asked: asked.mirrored, lambda shown, asked: shown.is_mirrored),
    "all": (lambda asked: True, _all_right),
}
