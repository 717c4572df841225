"""Layouts of images: sequences, masks, labels and the way back agree with each other, whatever the layout."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from arra.data.layout import CODE, NO_LABEL, Grid, ImageLayout
from arra.errors import ArraError

BASE: dict[str, Any] = {"begin_image": 2, "end_image": 3, "first_code": 10, "num_codes": 8}
LUMINA = ImageLayout(
    family="lumina", bos=0, separator=1, new_line=4, first_size=20, num_sizes=6, size_step=2, closing=(1,), **BASE
)
CHAMELEON = ImageLayout(family="chameleon", bos=0, separator=1, **BASE)
GENERIC = ImageLayout(
    family="generic", bos=0, closing=(5,), new_line=4, first_size=19, num_sizes=12, unconditional="empty_prompt", **BASE
)
TEXT = st.lists(st.integers(100, 120), max_size=7)


@st.composite
def any_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Those of any layout: ids in any order, parts there or left out, some ids shared where they may be."""
    num_codes, num_sizes = draw(st.integers(1, 9)), draw(st.integers(0, 8))
    first = draw(st.integers(0, 60))
    taken = set(range(first + 1, first + 1 + num_sizes))
    others = st.integers(0, 99).filter(lambda token: token not in taken)
    ids = draw(st.lists(others, min_size=num_codes + 7, max_size=num_codes + 7, unique=True))
    begin, end, row, bos, separator, close, rep, *codes = ids
    optional = st.sampled_from([True, False])
    return dict(
        family=draw(st.sampled_from(["lumina", "chameleon", "generic"])),
        bos=bos if draw(optional) else None,
        separator=draw(st.sampled_from([None, separator, bos])),
        begin_image=begin,
        end_image=end,
        new_line=row if draw(optional) else None,
        first_size=first if num_sizes else None,
        num_sizes=num_sizes,
        size_step=draw(st.integers(1, 2)),
        closing=draw(st.sampled_from([(), (close,), (separator,), (close, bos)])),
        first_code=min(codes),
        num_codes=num_codes,
        code_order=tuple(codes),
        unconditional=draw(st.sampled_from(["image_only", "empty_prompt"])),
        rep=rep if draw(optional) else None,
    )


def codes_for(layout: ImageLayout, data: st.DataObject) -> np.ndarray:
    """An image that the layout can write."""
    step, most = (layout.size_step, layout.num_sizes) if layout.num_sizes else (1, 4)
    sides = st.integers(1, min(most, 4)).map(lambda steps: steps * step)
    elements = st.integers(0, layout.num_codes - 1)
    drawn: np.ndarray = data.draw(arrays.arrays(np.int64, st.tuples(sides, sides), elements=elements))
    return drawn


@settings(max_examples=60, deadline=None)
@given(any_fields(), st.none() | TEXT, st.data())
def test_the_code_mask_marks_the_predictors(
    fields: dict[str, Any], prompt: list[int] | None, data: st.DataObject
) -> None:
    layout = ImageLayout(**fields)
    codes = codes_for(layout, data)
    written = layout.sequence(prompt, codes)
    ids = set(layout.code_ids().tolist())
    marked = {place - 1 for place in np.flatnonzero(written.code_mask)}
    assert marked == {place for place in range(len(written.tokens) - 1) if written.tokens[place + 1] in ids}
    assert len(marked) == codes.size
    assert -1 not in marked  # there is something before the first code


@settings(max_examples=60, deadline=None)
@given(any_fields(), st.none() | TEXT, st.data())
def test_sampling_writes_what_training_writes(
    fields: dict[str, Any], prompt: list[int] | None, data: st.DataObject
) -> None:
    """The prefix, then each code with what must follow it, is the sequence; and so is the image in its frame."""
    layout = ImageLayout(**fields)
    codes = codes_for(layout, data)
    grid = (codes.shape[0], codes.shape[1])
    written, ids = layout.sequence(prompt, codes), layout.code_ids().tolist()
    prefix = layout.prefix(prompt, grid)
    painted = list(prefix)
    for index, code in enumerate(codes.ravel().tolist()):
        painted += [ids[code], *layout.after(index, grid)]
    assert painted == written.tokens.tolist()
    assert layout.length(None if prompt is None else len(prompt), grid) == len(painted)
    image = layout.image(grid)
    assert image[: len(layout.opening(grid))] == layout.opening(grid)
    waiting = iter(codes.ravel().tolist())
    filled = [ids[next(waiting)] if token == CODE else token for token in image]
    assert filled == painted[len(painted) - len(image) - len(layout.closing) : len(painted) - len(layout.closing)]


@settings(max_examples=60, deadline=None)
@given(any_fields(), st.none() | TEXT, st.data())
def test_codes_are_read_back(fields: dict[str, Any], prompt: list[int] | None, data: st.DataObject) -> None:
    layout = ImageLayout(**fields)
    codes = codes_for(layout, data)
    written = layout.sequence(prompt, codes)
    grid = (codes.shape[0], codes.shape[1])
    assert (layout.read_image(written.tokens.tolist(), grid=grid) == codes).all()
    if layout.num_sizes or layout.new_line is not None or codes.shape[0] == codes.shape[1]:
        assert (layout.read_image(written.tokens.tolist()) == codes).all()


@settings(max_examples=60, deadline=None)
@given(any_fields(), st.none() | TEXT, st.data())
def test_labels_are_the_images_turn(fields: dict[str, Any], prompt: list[int] | None, data: st.DataObject) -> None:
    layout = ImageLayout(**fields)
    codes = codes_for(layout, data)
    written = layout.sequence(prompt, codes)
    own = len(layout.image((codes.shape[0], codes.shape[1]))) + len(layout.closing) + (layout.rep is not None)
    asked = len(written.tokens) - own
    assert (written.labels[:asked] == NO_LABEL).all()
    assert (written.labels[asked:] == written.tokens[asked:]).all()
    assert written.tokens[asked] == (layout.begin_image if layout.rep is None else layout.rep)


@settings(max_examples=60, deadline=None)
@given(any_fields(), TEXT, st.data())
def test_without_a_condition(fields: dict[str, Any], prompt: list[int], data: st.DataObject) -> None:
    """What training writes when it drops the prompt is what guidance's null row begins with."""
    layout = ImageLayout(**fields)
    codes = codes_for(layout, data)
    grid = (codes.shape[0], codes.shape[1])
    full, dropped = layout.sequence(prompt, codes).tokens.tolist(), layout.sequence(None, codes).tokens.tolist()
    assert dropped[: len(layout.prefix(None, grid))] == layout.prefix(None, grid)
    if layout.unconditional == "image_only":
        first = [] if layout.rep is None else [layout.rep]
        assert dropped == full[full.index((*first, layout.begin_image)[0]) :]
        assert layout.prefix(None, grid) == [*first, *layout.opening(grid)]
    else:
        assert dropped == layout.sequence([], codes).tokens.tolist()


@settings(max_examples=60, deadline=None)
@given(any_fields(), st.data())
def test_conversations(fields: dict[str, Any], data: st.DataObject) -> None:
    """Images in questions and answers, any number: each is read back; those that are asked about carry no loss."""
    layout = ImageLayout(**fields)
    images = [codes_for(layout, data) for _ in range(data.draw(st.integers(0, 3)))]
    shown = [codes_for(layout, data) for _ in range(data.draw(st.integers(0, 2)))]
    texts = [data.draw(TEXT) for _ in range(4)]
    written = layout.write([[texts[0], *shown], [texts[1]], [texts[2]], [*images, texts[3]]])
    tokens, labels = written.tokens.tolist(), written.labels.tolist()
    starts = [place for place, token in enumerate(tokens) if token == layout.begin_image]
    for start, image in zip(starts, [*shown, *images], strict=True):
        segment = tokens[start : tokens.index(layout.end_image, start) + 1]
        assert (layout.read_image(segment, grid=(image.shape[0], image.shape[1])) == image).all()
    assert written.code_mask.sum() == sum(image.size for image in images)
    spoken = [label for label in labels if label >= 100]
    assert spoken == texts[1] + texts[3]
    assert all(label in (NO_LABEL, token) for label, token in zip(labels, tokens, strict=True))
    last = [token for token in tokens if token >= 100 or token in layout.reserved()]
    assert last == tokens  # nothing stands there but text and what is reserved


@settings(max_examples=60, deadline=None)
@given(any_fields(), TEXT, st.data())
def test_a_question_and_its_image_are_a_conversation(
    fields: dict[str, Any], prompt: list[int], data: st.DataObject
) -> None:
    layout = ImageLayout(**fields)
    codes = codes_for(layout, data)
    long, short = layout.write([[prompt], [codes]]), layout.sequence(prompt, codes)
    assert long.tokens.tolist() == short.tokens.tolist()
    assert long.labels.tolist() == short.labels.tolist()
    assert (long.code_mask == short.code_mask).all()


@settings(max_examples=60, deadline=None)
@given(any_fields())
def test_a_layout_survives_its_card(fields: dict[str, Any]) -> None:
    layout = ImageLayout(**fields)
    again = ImageLayout.model_validate_json(layout.model_dump_json())
    assert again == layout
    assert hash(again) == hash(layout)
    assert (again.code_ids() == layout.code_ids()).all()


def test_a_changed_copy_forgets_what_it_was() -> None:
    LUMINA.code_ids()
    moved = LUMINA.model_copy(update={"first_code": 50})
    assert moved.code_ids().tolist() == list(range(50, 58))
    assert moved != LUMINA


def test_sequences_in_full() -> None:
    codes = np.array([[0, 1], [2, 3]], np.uint16)
    image = [2, 21, 21, 10, 11, 4, 12, 13, 4, 3]
    assert LUMINA.sequence([100], codes).tokens.tolist() == [0, 100, 1, *image, 1]
    assert LUMINA.sequence(None, codes).tokens.tolist() == [*image, 1]
    assert CHAMELEON.sequence([100], codes).tokens.tolist() == [0, 100, 1, 2, 10, 11, 12, 13, 3]
    generic = [2, 21, 21, 10, 11, 4, 12, 13, 4, 3, 5]
    assert GENERIC.sequence([100], codes).tokens.tolist() == [0, 100, *generic]
    assert GENERIC.sequence(None, codes).tokens.tolist() == [0, *generic]
    assert GENERIC.prefix(None, (1, 2)) == [0, 2, 20, 21]


def test_turns_end() -> None:
    """An answer with `closing`; where there is none, with the separator if another turn follows."""
    turns = [[[100]], [[101]], [[102]], [[103]]]
    assert LUMINA.write(turns).tokens.tolist() == [0, 100, 1, 101, 1, 102, 1, 103, 1]
    assert LUMINA.write(turns).labels.tolist() == [-100, -100, -100, 101, 1, -100, -100, 103, 1]
    assert CHAMELEON.write(turns).tokens.tolist() == [0, 100, 1, 101, 1, 102, 1, 103]
    assert CHAMELEON.write(turns[:3]).tokens.tolist() == [0, 100, 1, 101, 1, 102, 1]
    assert GENERIC.write(turns).tokens.tolist() == [0, 100, 101, 5, 102, 103, 5]
    assert GENERIC.write([]).tokens.tolist() == [0]


def test_reserved_ids() -> None:
    assert LUMINA.reserved() == {0, 1, 2, 3, 4, *range(10, 18), *range(21, 27)}
    assert CHAMELEON.reserved() == {0, 1, 2, 3, *range(10, 18)}
    assert GENERIC.reserved() == {0, 2, 3, 4, 5, *range(10, 18), *range(20, 32)}


def test_templates_are_filled_once() -> None:
    layout = LUMINA.model_copy(update={"template": "{width}x{height}: {prompt}"})
    assert layout.text("a {height} {prompt} {x}", (4, 6)) == "96x64: a {height} {prompt} {x}"
    assert LUMINA.text("a red heart", (4, 6)) == "a red heart"


@pytest.mark.parametrize("grid", [(0, 2), (2, 0), (-2, 2), (3, 2), (2, 5), (14, 2), (2, 14)])
def test_grids_that_cannot_be_written(grid: Grid) -> None:
    for call in (LUMINA.opening, LUMINA.image, LUMINA.check_grid, lambda grid: LUMINA.prefix([], grid)):
        with pytest.raises(ArraError, match=rf"lumina layout: .*{grid[0]} x {grid[1]} codes"):
            call(grid)
    if min(grid) > 0:
        assert len(CHAMELEON.image(grid)) == grid[0] * grid[1] + 2
        with pytest.raises(ArraError, match=r"multiples of 2 \(32 pixels\) up to 12; choose another size"):
            LUMINA.sequence([], np.zeros(grid, np.int64))


def test_codes_of_another_tokenizer() -> None:
    for wrong in (-1, 8):
        with pytest.raises(ArraError, match=rf"lumina layout: codes .*{wrong}.*, the model has 0\.\.7; prepare"):
            LUMINA.sequence([], np.array([[0, wrong], [1, 2]]))


def test_codes_beyond_the_image() -> None:
    for index in (-1, 4):
        with pytest.raises(ValueError, match=f"code {index} of a grid of 2 x 2"):
            LUMINA.after(index, (2, 2))


def test_what_fits() -> None:
    layout = LUMINA.model_copy(update={"max_positions": 14})
    layout.check_fits(1, (2, 2), where="here")
    LUMINA.check_fits(10**6, (2, 2), where="here")
    with pytest.raises(ArraError, match=r"a.yaml: 15 tokens do not fit the model's 14 positions .* or shorten"):
        layout.check_fits(2, (2, 2), where="a.yaml")


GOOD = LUMINA.sequence([100], np.array([[0, 1], [2, 3]])).tokens.tolist()
BROKEN = {
    "0 begin-image tokens; expected one image": GOOD[:3],
    "2 begin-image tokens; expected one image": GOOD + GOOD,
    "the image has no end; it was cut off after 5 tokens": GOOD[:8],
    "the image has no end; it was cut off after 6 tokens": [3, 100, *GOOD[3:9]],
    r"\[10, 11\] after begin-image; expected height and width": [2, 10, 11, 4, 12, 13, 4, 3],
    r"\[3\] after begin-image; expected height and width": [2, 3],
    "9 tokens for 2 x 2 codes; expected 10": [2, 21, 21, 10, 11, 4, 12, 4, 3],
    "10 tokens for 4 x 2 codes; expected 16": [2, 22, 21, 10, 11, 4, 12, 13, 4, 3],
    "token 4 at place 4 of the image; expected a code": [2, 21, 21, 10, 4, 11, 12, 13, 4, 3],
    "token 13 at place 5 of the image; expected 4": [2, 21, 21, 10, 11, 13, 12, 13, 4, 3],
    "token 100 at place 3 of the image; expected a code": [2, 21, 21, 100, 11, 4, 12, 13, 4, 3],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_images_are_not_read(fault: str) -> None:
    with pytest.raises(ArraError, match=f"lumina image: {fault}"):
        LUMINA.read_image(BROKEN[fault])


def test_images_without_sides() -> None:
    tokens = CHAMELEON.sequence([], np.arange(6).reshape(2, 3)).tokens.tolist()
    assert CHAMELEON.read_image(tokens, grid=(3, 2)).shape == (3, 2)
    with pytest.raises(ArraError, match="chameleon image: 8 tokens for 3 x 3 codes; expected 11"):
        CHAMELEON.read_image(tokens, grid=(3, 3))
    five = [2, 10, 11, 12, 13, 14, 3]
    with pytest.raises(ArraError, match="chameleon image: 5 codes make no grid of 2 rows; name the grid"):
        CHAMELEON.read_image(five)
    with pytest.raises(ArraError, match="chameleon image: 0 codes make no grid of 0 rows; name the grid"):
        CHAMELEON.read_image([2, 3])


@settings(max_examples=60, deadline=None)
@given(st.data())
@example(data=None)
def test_one_wrong_token_is_seen(data: st.DataObject | None) -> None:
    """A token of an image replaced, left out or doubled: an error or other codes, never the same image in silence."""
    if data is None:
        return
    codes = codes_for(LUMINA, data)
    tokens = LUMINA.image((codes.shape[0], codes.shape[1]))
    tokens = LUMINA.sequence(None, codes).tokens.tolist()[: len(tokens)]
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.lists(st.integers(0, 30), max_size=2))
    assume(other != [tokens[place]])
    broken = tokens[:place] + other + tokens[place + 1 :]
    assume(broken[: len(tokens)] != tokens)  # what stands behind the end is not the image's
    try:
        found = LUMINA.read_image(broken)
    except ArraError:
        return
    assert found.shape != codes.shape or (found != codes).any()


FIELDS = LUMINA.model_dump()
ORDER = tuple(range(10, 18))


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("id 2 is both begin_image and end_image", {"end_image": 2}),
        ("id 2 is both begin_image and new_line", {"new_line": 2}),
        ("id 21 is both new_line and a side", {"new_line": 21}),
        ("id 17 is both a side and a code", {"first_size": 16}),
        ("id 12 is both a code and bos, separator or closing", {"bos": 12}),
        ("id 4 is both new_line and bos, separator or closing", {"closing": (4,)}),
        ("'first_size' and 'num_sizes'", {"num_sizes": 0}),
        ("'first_size' and 'num_sizes'", {"first_size": None}),
        ("side tokens would have negative ids", {"first_size": -2}),
        ("'code_order' must name 8 ids, each once", {"code_order": ORDER[:-1]}),
        ("'code_order' must name 8 ids, each once", {"code_order": (*ORDER[:-1], 10)}),
        ("'first_code' is 10, the least id of 'code_order' another", {"code_order": (*ORDER[1:], 30)}),
        ("'template' must hold {prompt} once", {"template": "a picture"}),
        ("'template' must hold {prompt} once", {"template": "{prompt}{prompt}"}),
        ("greater than or equal to 0", {"begin_image": -1}),
        ("greater than 0", {"num_codes": 0}),
        ("greater than 0", {"size_step": 0}),
        ("Extra inputs", {"end": 3}),
    ],
)
def test_layouts_that_mean_two_things(fault: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=fault):
        ImageLayout(**{**FIELDS, **changes})
