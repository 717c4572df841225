"""What is read from drawn shapes: exactly what was drawn, also after blur and noise, and never what was not."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from arra.data.shapes import COLOURS, PLACES, SHAPES, Kind, Placed, ShapesSource, arrange, draw, read_caption
from arra.errors import ArraError
from arra.evaluate.drawings import attribute_accuracy, attributes_of

RECORDS = list(ShapesSource(num_images=80, seed=3).scan())


def resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def square(kind: Kind, *at: tuple[float, float]) -> np.ndarray:
    return draw([Placed(kind, x, y) for x, y in at], size=48)


@pytest.mark.parametrize("size", [32, 64])
def test_drawings_are_read_exactly(size: int) -> None:
    images, captions = [], []
    for record in RECORDS[::4]:
        asked, seed = read_caption(record.prompt), record.image.place  # type: ignore[union-attr]
        placed = arrange(asked, seed=seed)
        image = resized(draw(placed), size)
        shown = attributes_of(image)
        assert Counter(each.kind for each in shown.components) == Counter(asked.shapes), record.prompt
        for each in shown.components:
            assert min(np.hypot(each.x - at.x, each.y - at.y) for at in placed if at.kind == each.kind) < 0.02
        images.append(image)
        captions.append(record.prompt)
    found = attribute_accuracy(images, captions)
    assert list(found) == ["count", "colour", "shape", "kind", "position", "symmetry", "all"]
    assert {measured.value for measured in found.values()} == {1.0}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blur_and_noise_are_borne(colour: str, shape: str) -> None:
    kind = Kind(colour, shape)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    blurred = np.asarray(Image.fromarray(square(kind, (0.3, 0.4), (0.7, 0.7))).filter(ImageFilter.GaussianBlur(0.7)))
    noisy = (blurred + generator.normal(0, 12, blurred.shape)).clip(0, 255).astype(np.uint8)
    assert [each.kind for each in attributes_of(noisy).components] == [kind, kind]


def test_what_is_no_shape_of_one_colour_is_none() -> None:
    kind = Kind("green", "square")
    half = square(kind, (0.5, 0.5))
    half[:, 24:][half[:, 24:, 0] < 60] = COLOURS["red"]
    (component,) = attributes_of(half).components
    assert (component.colour, component.shape, component.kind) == (None, "square", None)
    bar = np.full((48, 48, 3), 255, np.uint8)
    bar[22:25, 4:44] = COLOURS["blue"]
    (component,) = attributes_of(bar).components
    assert (component.colour, component.shape, component.kind) == ("blue", None, None)
    bar[:] = 255
    bar[5:8, 5:8] = 0  # a speck
    assert attributes_of(bar).components == ()


def test_places_and_mirrors() -> None:
    kind = Kind("purple", "triangle")
    for number, place in enumerate(PLACES):
        row, column = divmod(number, 3)
        (component,) = attributes_of(square(kind, (0.2 + 0.3 * column, 0.2 + 0.3 * row))).components
        assert component.place == place
    assert attributes_of(square(kind, (0.2, 0.3), (0.8, 0.3))).is_mirrored
    assert attributes_of(square(kind, (0.5, 0.3))).is_mirrored
    assert not attributes_of(square(kind, (0.2, 0.3), (0.8, 0.4))).is_mirrored
    assert not attributes_of(square(kind, (0.2, 0.3), (0.7, 0.3))).is_mirrored
    assert not attributes_of(square(kind, (0.2, 0.3), (0.8, 0.3), (0.3, 0.8))).is_mirrored
    assert not attributes_of(np.full((32, 32, 3), 255, np.uint8)).is_mirrored
    for other in (Kind("red", "triangle"), Kind("purple", "circle")):
        image = draw([Placed(kind, 0.2, 0.3), Placed(other, 0.8, 0.3)], size=48)
        assert not attributes_of(image).is_mirrored
    ragged = np.full((48, 48, 3), 255, np.uint8)
    ragged[20:23, 4:20] = ragged[20:23, 28:44] = COLOURS["purple"]
    assert [each.shape for each in attributes_of(ragged).components].count(None) == 2
    assert attributes_of(ragged).is_mirrored


RED, BLUE = Kind("red", "square"), Kind("blue", "square")
LEFT = [Placed(RED, 0.2, 0.5), Placed(BLUE, 0.8, 0.5)]
WRONG = {
    # attributes that are right, picture, caption
    "all": ("count colour shape kind position all", LEFT, "a red square left of a blue square"),
    "order": ("count colour shape kind", LEFT, "a red square right of a blue square"),
    "binding": ("count colour", LEFT, "one red circle and one blue circle"),
    "swapped": (
        "count colour shape",
        [Placed(Kind("red", "circle"), 0.2, 0.5), Placed(BLUE, 0.8, 0.5)],
        "one red square and one blue circle",
    ),
    "count": ("colour shape kind", LEFT, "two red squares and one blue square"),
    "multiset": (
        "count colour shape kind",
        [*LEFT, Placed(RED, 0.2, 0.9)],
        "one red square and two blue squares",
    ),
    "colour": ("count shape", LEFT, "one red square and one green square"),
    "place": ("count colour shape kind", [LEFT[0]], "a red square in the middle"),
    "ragged": (
        "count colour position",
        [Placed(Kind("red", "circle"), 0.2, 0.5), Placed(Kind("blue", "circle"), 0.8, 0.5)],
        "a red square left of a blue square",
    ),
    "one colour": (
        "count colour shape kind",
        [Placed(Kind("red", "circle"), 0.2, 0.5), Placed(RED, 0.8, 0.5)],
        "a red square left of a red circle",
    ),
    "place of two": ("colour shape kind", [LEFT[0], Placed(RED, 0.8, 0.5)], "a red square on the left"),
    "no mirror": (
        "count colour shape kind",
        [LEFT[0], Placed(RED, 0.7, 0.5)],
        "a red square, mirrored left to right",
    ),
    "mirror": (
        "count colour shape kind symmetry all",
        [LEFT[0], Placed(RED, 0.8, 0.5)],
        "a red square, mirrored left to right",
    ),
    "nothing": ("", [], "a red square left of a blue square"),
}


@pytest.mark.parametrize(("right", "placed", "caption"), WRONG.values(), ids=WRONG)
def test_each_attribute_sees_its_own_mistake(right: str, placed: list[Placed], caption: str) -> None:
    found = attribute_accuracy([draw(placed, size=48)], [caption])
    assert {name for name, measured in found.items() if measured.value == 1} == set(right.split())
    assert {name for name, measured in found.items() if measured.value not in (0, 1)} == set()


def test_shares_are_of_the_pictures_that_are_asked_for_it() -> None:
    captions = ["two red squares", "a red square on the left", "a red square on the left", "a red square on the right"]
    image = square(RED, (0.2, 0.5))
    found = attribute_accuracy([image] * 4, captions)
    position = found["position"]
    assert position.value == pytest.approx(2 / 3)
    np.testing.assert_allclose(position.per_picture, [2 / 3, 10 / 9, 10 / 9, -2 / 9])
    assert position.per_picture.mean() == pytest.approx(position.value)
    np.testing.assert_array_equal(found["count"].per_picture, [0, 1, 1, 1])
    assert "symmetry" not in found


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ArraError, match="picture of 40 x 32 pixels: expected a square one of 16 pixels or more a side"):
        attributes_of(np.zeros((32, 40, 3), np.uint8))
    with pytest.raises(ArraError, match="1 pictures and 2 captions: expected one caption each"):
        attribute_accuracy([square(RED, (0.5, 0.5))], ["one red square"] * 2)
    with pytest.raises(ArraError, match="caption 'a cat': not of the drawn shapes"):
        attribute_accuracy([square(RED, (0.5, 0.5))], ["a cat"])
