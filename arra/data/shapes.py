"""The embedded set of drawn shapes: pictures of which everything that their captions say can be read back.

First stage of the pipeline, beside `openmoji`: a source of the recipe (`data.source: shapes`). It measures global
coherence: counts, which colour goes with which shape, places, relations and mirror symmetry need the whole picture,
and `arra.evaluate.drawings` reads them from the pixels exactly. Nothing is stored: a picture is drawn from its caption
and a seed when it is read.

Captions are a grammar that `write_caption` and `read_caption` know both ways:

    a red circle in the top left corner                     one of nine places
    three blue squares                                      one to four
    two red circles and one blue square                     two kinds, four shapes at most
    a red circle left of a blue square                      left of, right of, above, below
    a red circle, mirrored left to right                    a shape and its mirror image
    a red circle above a blue square, mirrored left to right

Splits: `train`, `validation` and `test` are drawn alike (a caption of `test` may be one of training, its picture is
another); in `composed` every caption names one of the `HELD_OUT` pairs of colour and shape, which no other split shows.

With `classes: true` the pictures are of 24 classes, for models that are asked for a class: each shows one shape, its
colour and form are its class, called as its caption (`one red circle`), so that it can be read back as well; it stands
anywhere. A model cannot compose classes that it never saw, so no pair is held out, and there is no `composed`.

Coordinates are shares of a side: x to the right, y down, (0, 0) the top left corner.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from pydantic import Field

from arra.data.records import ImageRef, Record, Source
from arra.errors import ArraError

EMBEDDED_NAME = "shapes-1"
"""How stores name these pictures; another number whenever drawing, wording or splitting changes."""
DRAWN_SIZE = 128
"""Pixels per side of a picture."""

Colour = Literal["red", "yellow", "green", "blue", "purple", "black"]
Shape = Literal["circle", "square", "triangle", "cross"]
Relation = Literal["left of", "right of", "above", "below"]
Place = Literal[
    "in the top left corner", "at the top", "in the top right corner",
    "on the left", "in the middle", "on the right",
    "in the bottom left corner", "at the bottom", "in the bottom right corner",
]  # fmt: skip

COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (240, 200, 30),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (150, 50, 180),
    "black": (25, 25, 25),
}
SHAPES: tuple[Shape, ...] = get_args(Shape)
PLACES: tuple[Place, ...] = get_args(Place)
"""Row by row, as the nine cells of the picture."""
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
RADIUS = 0.105
"""Of the circle; every other shape has the circle's area, so that size tells nothing."""
MARGIN = 0.15
"""Centres keep this distance from the border."""
APART = 0.33
"""Least distance of two centres: at 32 pixels a pixel of white stays between any two shapes."""
_SQUARE = math.sqrt(math.pi) / 2
_TRIANGLE = math.sqrt(math.pi / 3**0.5)  # half of the base; the height is sqrt(3) times that
_CROSS = math.sqrt(math.pi * 9 / 20)  # half of an arm's length; an arm is a third as wide as long

_ITEM = rf"(?P<n{{0}}>a|{'|'.join(NUMBERS)}) (?P<c{{0}}>{'|'.join(COLOURS)}) (?P<s{{0}}>{'|'.join(SHAPES)})(?:e?s)?"
_CAPTION = re.compile(
    _ITEM.format(0)
    + rf"(?: (?P<place>{'|'.join(PLACES)})|(?: (?P<joined>and|{'|'.join(get_args(Relation))}) {_ITEM.format(1)})?"
    + r"(?P<mirrored>, mirrored left to right)?)"
)


@dataclass(frozen=True)
class Kind:
    """A colour on a shape."""

    colour: Colour
    shape: Shape

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


HELD_OUT = frozenset(
    [Kind("red", "cross"), Kind("yellow", "triangle"), Kind("blue", "circle"), Kind("black", "square")]
)
"""Kinds that only `composed` shows; each of these colours and shapes is seen in training with others."""
_KINDS = [Kind(colour, shape) for colour in COLOURS for shape in SHAPES]
CLASS_NAMES = tuple(f"one {kind}" for kind in _KINDS)
"""By label, of a set with classes."""
_RARE, _USUAL = ([kind for kind in _KINDS if (kind in HELD_OUT) == rare] for rare in (True, False))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a caption asks for."""

    kinds: tuple[Kind, ...]
    """One, or two different ones."""
    counts: tuple[int, ...]
    """How many of each; of a mirrored drawing, in its left half."""
    place: Place | None = None
    relation: Relation | None = None
    """Of the first kind to the second."""
    mirrored: bool = False

    @property
    def shapes(self) -> list[Kind]:
        """The kind of every shape in the picture."""
        copies = 2 if self.mirrored else 1
        return [kind for kind, count in zip(self.kinds, self.counts, strict=True) for _ in range(copies * count)]


@dataclass(frozen=True)
class Placed:
    """A shape in a picture."""

    kind: Kind
    x: float
    y: float


class ShapesSource(Source):
    """The embedded drawn shapes. Pictures of one caption are a group."""

    kind: Literal["shapes"] = "shapes"
    path: str = ""
    num_images: int = Field(4000, ge=20)
    seed: int = Field(0, ge=0)
    """Other numbers give other pictures of the same kind."""
    classes: bool = False
    """Whether every picture shows one shape, whose colour and form are its class."""

    def scan(self) -> Iterator[Record]:
        """The drawings by number; of 20 in a row 16 are for training, 1 for validation, 1 is test, 2 are composed.

        With classes those two are for training as well, and every split shows its classes equally often.
        """
        return self._of_classes() if self.classes else self._of_captions()

    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES if self.classes else ()

    def _of_captions(self) -> Iterator[Record]:
        for number in range(self.num_images):
            split = {16: "validation", 17: "test", 18: "composed", 19: "composed"}.get(number % 20, "train")
            generator = _generator(f"{self.seed} {number}")
            caption = write_caption(draw_request(generator, held_out=split == "composed"))
            yield replace(self._record(number, caption, generator), split=split, group=caption)

    def _of_classes(self) -> Iterator[Record]:
        left: dict[str, list[int]] = {}
        for number in range(self.num_images):
            split = {16: "validation", 17: "test"}.get(number % 20, "train")
            generator = _generator(f"{self.seed} classes {number}")
            if not left.get(split):  # a round of all classes in an order of its own
                left[split] = generator.permutation(len(CLASS_NAMES)).tolist()
            label = left[split].pop()
            yield replace(self._record(number, CLASS_NAMES[label], generator), split=split, label=label)

    def _record(self, number: int, caption: str, generator: np.random.Generator) -> Record:
        seed = int(generator.integers(2**31))
        image = ImageRef("embedded", EMBEDDED_NAME, seed, column=caption)
        return Record(f"{number:06d}", image, caption, where=f"{self.name}: drawing {number}")

    @property
    def name(self) -> str:
        return f"{EMBEDDED_NAME}-classes" if self.classes else EMBEDDED_NAME


def read_drawing(ref: ImageRef) -> bytes:
    """The PNG that a reference of this source stands for.

    Raises:
        ValueError: the reference is of another edition of the set.
    """
    if ref.path != EMBEDDED_NAME:
        raise ValueError(f"{ref.path} is not drawn here, {EMBEDDED_NAME} is; prepare the store again")
    buffer = io.BytesIO()
    Image.fromarray(draw(arrange(read_caption(ref.column), seed=ref.place))).save(buffer, "PNG")
    return buffer.getvalue()


def write_caption(asked: Asked) -> str:
    """The caption that asks for it."""
    alone = asked.place is not None or asked.relation is not None or asked.mirrored
    parts = [_write_item(*item, alone=alone) for item in zip(asked.kinds, asked.counts, strict=True)]
    text = f" {asked.relation or 'and'} ".join(parts)
    return text + (f" {asked.place}" if asked.place else "") + (", mirrored left to right" if asked.mirrored else "")


def _write_item(kind: Kind, count: int, *, alone: bool) -> str:
    if alone:
        return f"a {kind}"
    plural = "" if count == 1 else "es" if kind.shape == "cross" else "s"
    return f"{list(NUMBERS)[count - 1]} {kind}{plural}"


def read_caption(caption: str) -> Asked:
    """What a caption asks for; the inverse of `write_caption`.

    Raises:
        ArraError: it is not of the grammar.
    """
    if (asked := find_request(caption)) is None:
        raise ArraError(
            f"caption {caption[:80]!r}: not of the drawn shapes; expected one as 'two red circles and one blue square' "
            "or 'a red circle left of a blue square'"
        )
    return asked


def find_request(caption: str) -> Asked | None:
    """What a caption asks for, or None for a caption of anything else."""
    found = _CAPTION.fullmatch(caption)
    if found is None:
        return None
    numbers = [number for number in (0, 1) if found[f"n{number}"]]
    joined = found["joined"]
    asked = Asked(
        kinds=tuple(Kind(found[f"c{number}"], found[f"s{number}"]) for number in numbers),  # type: ignore[arg-type]
        counts=tuple(NUMBERS.get(found[f"n{number}"], 1) for number in numbers),
        place=found["place"],  # type: ignore[arg-type]
        relation=None if joined in (None, "and") else joined,  # type: ignore[arg-type]
        mirrored=found["mirrored"] is not None,
    )
    fits = sum(asked.counts) <= 4 and len(set(asked.kinds)) == len(asked.kinds)
    fits = fits and not (asked.mirrored and len(asked.kinds) > 1 and asked.relation not in ("above", "below"))
    return asked if fits and write_caption(asked) == caption else None


def draw_request(generator: np.random.Generator, *, held_out: bool) -> Asked:
    """Something to ask for by chance; with `held_out` it names one of the `HELD_OUT` kinds, else none of them."""
    form = generator.choice(["place", "count", "counts", "relation", "mirror", "mirrored pair"])
    first = (_RARE if held_out else _USUAL)[generator.integers(len(_RARE if held_out else _USUAL))]
    others = [kind for kind in _USUAL if kind != first]
    kinds = [first, others[generator.integers(len(others))]]
    generator.shuffle(kinds)
    if form in ("place", "count", "mirror"):
        count = int(generator.integers(1, 5)) if form == "count" else 1
        place = PLACES[generator.integers(len(PLACES))] if form == "place" else None
        return Asked(kinds=(first,), counts=(count,), place=place, mirrored=form == "mirror")
    if form == "counts":
        pairs = [(i, j) for i in range(1, 4) for j in range(1, 5 - i)]
        return Asked(kinds=tuple(kinds), counts=pairs[generator.integers(len(pairs))])
    relations: tuple[Relation, ...] = get_args(Relation) if form == "relation" else ("above", "below")
    relation = relations[generator.integers(len(relations))]
    return Asked(kinds=tuple(kinds), counts=(1, 1), relation=relation, mirrored=form == "mirrored pair")


def arrange(asked: Asked, *, seed: int) -> list[Placed]:
    """Where the shapes of a picture stand; the same seed gives the same picture."""
    generator = _generator(f"{write_caption(asked)}\n{seed}")
    kinds = [kind for kind, count in zip(asked.kinds, asked.counts, strict=True) for _ in range(count)]
    while True:
        at = generator.uniform(MARGIN, 1 - MARGIN, (len(kinds), 2))
        if asked.place is not None:
            row, column = divmod(PLACES.index(asked.place), 3)
            at = np.array([[0.2 + 0.3 * column, 0.2 + 0.3 * row]]) + generator.uniform(-0.05, 0.05, (1, 2))
        if asked.mirrored:
            at[:, 0] = generator.uniform(MARGIN, 0.5 - APART / 2, len(kinds))
        if asked.relation is not None:
            axis, sign = _direction(asked.relation)
            if sign * (at[1, axis] - at[0, axis]) < APART or abs(at[1, 1 - axis] - at[0, 1 - axis]) > APART / 2:
                continue
        if all(math.dist(a, b) >= APART for a, b in combinations(at.tolist(), 2)):
            break
    placed = [Placed(kind, x, y) for kind, (x, y) in zip(kinds, at.tolist(), strict=True)]
    return placed + ([Placed(each.kind, 1 - each.x, each.y) for each in placed] if asked.mirrored else [])


def _direction(relation: Relation) -> tuple[int, int]:
    """The axis along which the first kind comes before the second (1) or after it (-1)."""
    return {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]


def holds(relation: Relation, *, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether a shape at `first` stands so to one at `second`: clearly, by the radius of a circle or more."""
    axis, sign = _direction(relation)
    return bool(sign * (second[axis] - first[axis]) >= RADIUS)


def draw(placed: list[Placed], *, size: int = DRAWN_SIZE) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of some shapes on white, (size, size, 3), with smooth edges."""
    canvas = np.full((size, size, 3), 255.0)
    for each in placed:
        ink = coverage(each.kind.shape, x=each.x, y=each.y, size=size)[..., None]
        canvas += ink * (np.array(COLOURS[each.kind.colour]) - canvas)
    return canvas.round().astype(np.uint8)


def coverage(
    shape: Shape, *, x: float, y: float, size: int, radius: float = RADIUS, samples: int = 4
) -> Float[np.ndarray, "H W"]:
    """The share of every pixel of a square picture that a shape covers, from `samples` x `samples` points in each.

    (x, y) is the shape's centre of mass, `radius` that of the circle of equal area.
    """
    covered = np.zeros((size, size))
    spans = []
    for at in (y, x):  # no shape reaches farther than 1.6 of its radius
        first, last = (min(max(int((at + side * 1.6 * radius) * size), 0), size) for side in (-1, 1))
        spans.append((first, min(last + 1, size)))
    (top, bottom), (left, right) = spans
    if top < bottom and left < right:
        rows, columns = ((np.arange(start * samples, stop * samples) + 0.5) / (size * samples) for start, stop in spans)
        inside = covers(shape, (columns[None] - x) / radius, (rows[:, None] - y) / radius)
        blocks = inside.reshape(bottom - top, samples, right - left, samples)
        covered[top:bottom, left:right] = blocks.mean((1, 3))
    return covered


def covers(
    shape: Shape, x: Float[np.ndarray, "#rows #columns"], y: Float[np.ndarray, "#rows #columns"]
) -> Bool[np.ndarray, "rows columns"]:
    """Whether points lie on a shape of area pi around its centre of mass (0, 0)."""
    across, down = abs(x), abs(y)
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(across, down) <= _SQUARE
    if shape == "triangle":  # the centre of mass lies at two thirds of the height
        height = math.sqrt(3) * _TRIANGLE
        return (y <= height / 3) & (across <= (y + 2 * height / 3) / math.sqrt(3))
    return (np.maximum(across, down) <= _CROSS) & (np.minimum(across, down) <= _CROSS / 3)


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
