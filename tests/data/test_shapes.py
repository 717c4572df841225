"""The drawn shapes: captions say what is drawn, both ways; splits hold out what they say; the recipe can name them."""

import io
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from arra.config import load_recipe
from arra.data.reading import ImageReader
from arra.data.records import ImageRef
from arra.data.shapes import (
    APART,
    COLOURS,
    EMBEDDED_NAME,
    HELD_OUT,
    PLACES,
    SHAPES,
    Asked,
    Kind,
    Placed,
    Relation,
    ShapesSource,
    arrange,
    coverage,
    draw,
    find_request,
    holds,
    read_caption,
    write_caption,
)
from arra.errors import ArraError

RED, BLUE = Kind("red", "circle"), Kind("blue", "cross")
CAPTIONS = {
    "a red circle in the top left corner": Asked(kinds=(RED,), counts=(1,), place="in the top left corner"),
    "one blue cross": Asked(kinds=(BLUE,), counts=(1,)),
    "three blue crosses": Asked(kinds=(BLUE,), counts=(3,)),
    "two red circles and one blue cross": Asked(kinds=(RED, BLUE), counts=(2, 1)),
    "a red circle left of a blue cross": Asked(kinds=(RED, BLUE), counts=(1, 1), relation="left of"),
    "a red circle, mirrored left to right": Asked(kinds=(RED,), counts=(1,), mirrored=True),
    "a red circle below a blue cross, mirrored left to right": Asked(
        kinds=(RED, BLUE), counts=(1, 1), relation="below", mirrored=True
    ),
}


@pytest.mark.parametrize(("caption", "asked"), CAPTIONS.items())
def test_captions_are_read_and_written(caption: str, asked: Asked) -> None:
    assert read_caption(caption) == asked
    assert write_caption(asked) == caption


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "red circle",
        "a red circle",
        "a pink circle on the left",
        "two red circle",
        "one red circles",
        "three red crosss",
        "two red circles on the left",
        "three red circles and two blue crosses",
        "one red circle and one red circle",
        "a red circle left of a red circle",
        "a red circle left of two blue crosses",
        "a red circle left of a blue cross, mirrored left to right",
        "two red circles, mirrored left to right",
        "a red circle on the left, mirrored left to right",
        " one red circle",
    ],
)
def test_other_texts_are_refused(caption: str) -> None:
    assert find_request(caption) is None
    with pytest.raises(
        ArraError, match="not of the drawn shapes; expected one as 'two red circles and one blue square'"
    ):
        read_caption(caption)


def test_splits_hold_out_kinds_and_nothing_else() -> None:
    records = list(ShapesSource(num_images=1000).scan())
    assert Counter(record.split for record in records) == {
        "train": 800, "validation": 50, "test": 50, "composed": 100,
    }  # fmt: skip
    assert len({record.id for record in records}) == len(records)
    for record in records:
        asked = read_caption(record.prompt)
        names_rare = any(kind in HELD_OUT for kind in asked.kinds)
        assert names_rare == (record.split == "composed"), record
        assert record.group == record.prompt
    words = {
        split: {w for r in records if r.split == split for w in r.prompt.split()} for split in ("train", "composed")
    }
    assert words["composed"] <= words["train"]
    forms = [read_caption(record.prompt) for record in records]
    assert {each.place for each in forms} == {None, *PLACES}
    assert {len(each.shapes) for each in forms} == {1, 2, 3, 4}


@pytest.mark.parametrize("classes", [False, True])
def test_a_seed_is_a_set_and_a_larger_set_begins_like_a_smaller_one(classes: bool) -> None:
    first = list(ShapesSource(num_images=40, classes=classes).scan())
    assert first == list(ShapesSource(num_images=60, classes=classes).scan())[:40]
    other = list(ShapesSource(num_images=40, seed=1, classes=classes).scan())
    assert [a.prompt for a in first] != [b.prompt for b in other]


def test_a_class_is_a_kind_that_its_name_says_and_every_split_shows_as_often() -> None:
    source = ShapesSource(num_images=960, classes=True)
    records, names = list(source.scan()), source.class_names()
    assert len(set(names)) == len(COLOURS) * len(SHAPES)
    assert Counter(record.split for record in records) == {"train": 864, "validation": 48, "test": 48}
    for split, count in {"train": 36, "validation": 2, "test": 2}.items():
        found = Counter(record.label for record in records if record.split == split)
        assert found == dict.fromkeys(range(len(names)), count)
    for record in records:
        assert record.label is not None
        assert record.image is not None
        assert record.prompt == record.image.column == names[record.label]
        asked = read_caption(record.prompt)
        assert (len(asked.shapes), asked.place, asked.mirrored) == (1, None, False)
        assert not record.group  # pictures of a class are no variants of each other
    assert {kind for name in names for kind in read_caption(name).kinds} >= HELD_OUT
    assert len({(record.image.column, record.image.place) for record in records if record.image}) == len(records)
    following = Counter(
        (b.label - a.label) % 24 for a, b in pairwise(records) if a.label is not None and b.label is not None
    )
    assert max(following.values()) < len(records) / 8  # neighbours tell nothing of each other
    assert ShapesSource().class_names() == ()


@pytest.mark.parametrize(("caption", "asked"), CAPTIONS.items())
def test_what_is_asked_for_is_arranged(caption: str, asked: Asked) -> None:
    for seed in range(10):
        placed = arrange(asked, seed=seed)
        assert Counter(each.kind for each in placed) == Counter(asked.shapes)
        at = np.array([(each.x, each.y) for each in placed])
        gaps = np.linalg.norm(at[:, None] - at[None], axis=-1) + np.eye(len(at))
        assert gaps.min() >= APART - 1e-9
        if asked.place is not None:
            row, column = divmod(PLACES.index(asked.place), 3)
            assert (np.floor(at[0] * 3) == (column, row)).all()
        if asked.relation is not None:
            assert holds(asked.relation, first=tuple(at[0]), second=tuple(at[1]))
        if asked.mirrored:
            half = len(at) // 2
            np.testing.assert_allclose(at[:half] * (-1, 1) + (1, 0), at[half:])
    assert arrange(asked, seed=0) == arrange(asked, seed=0) != arrange(asked, seed=1)


def test_relations_are_what_they_say() -> None:
    relations: dict[Relation, tuple[float, float]] = {
        "left of": (0.2, 0.5), "right of": (0.8, 0.5), "above": (0.5, 0.2), "below": (0.5, 0.8),
    }  # fmt: skip
    for said in relations:
        for true, first in relations.items():
            assert holds(said, first=first, second=(0.5, 0.5)) == (said == true)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_circles_area_and_their_centre_of_mass_where_it_is_said(shape: str) -> None:
    ink = coverage(shape, x=0.4, y=0.6, size=128, radius=0.2)  # type: ignore[arg-type]
    places = (np.arange(128) + 0.5) / 128
    assert ink.mean() == pytest.approx(np.pi * 0.2**2, rel=1e-2)
    assert ink.sum(0) @ places / ink.sum() == pytest.approx(0.4, abs=2e-3)
    assert ink.sum(1) @ places / ink.sum() == pytest.approx(0.6, abs=2e-3)
    np.testing.assert_allclose(coverage(shape, x=0.5, y=0.5, size=32), coverage(shape, x=0.5, y=0.5, size=32)[:, ::-1])  # type: ignore[arg-type]


def test_a_shape_over_the_border_is_cut() -> None:
    ink = coverage("square", x=0.0, y=1.0, size=32)
    assert ink[-1, 0] == 1
    assert ink.sum() == pytest.approx(coverage("square", x=0.5, y=0.5, size=32).sum() / 4, rel=0.05)
    assert coverage("square", x=5.0, y=0.5, size=32).sum() == 0


def test_a_picture_has_its_colours_on_white() -> None:
    image = draw(
        [Placed(Kind(colour, "square"), 0.2 + 0.3 * (i % 3), 0.3 + 0.4 * (i // 3)) for i, colour in enumerate(COLOURS)]
    )
    assert image.shape == (128, 128, 3)
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    assert {tuple(each) for each in colours[counts > 300].tolist()} == {*COLOURS.values(), (255, 255, 255)}


def test_pictures_are_drawn_when_they_are_read() -> None:
    record = next(ShapesSource().scan())
    assert record.image is not None
    content = ImageReader().read(ImageRef.parse(record.image.text()))
    with Image.open(io.BytesIO(content)) as image:
        expected = draw(arrange(read_caption(record.prompt), seed=record.image.place))
        np.testing.assert_array_equal(np.asarray(image), expected)
    with pytest.raises(ValueError, match=f"shapes-0 is not drawn here, {EMBEDDED_NAME} is; prepare the store again"):
        ImageReader().read(ImageRef("embedded", "shapes-0", 1, column=record.prompt))


def test_a_recipe_names_them() -> None:
    recipe = load_recipe("demo", row="aligned", overrides=["data.source=shapes"])
    assert recipe.data.all_sources == (ShapesSource(),)
    with pytest.raises(ArraError, match="'source: shapes' and 'path' go together; give both or neither"):
        load_recipe("demo", row="aligned", overrides=["data.source=shapes", "data.path=x"])
