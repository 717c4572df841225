"""The REP token in sequences and batches: right before every answered image, and nowhere else."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from arra.data.batches import Batches, InMemory, text_batch
from arra.data.language import LayoutWriter, MixedBatches, PromptConditions, TextRows, joined, padded_batch
from arra.data.layout import BOI, NO_LABEL, PAD, Grid, ImageLayout
from arra.errors import ArraError
from arra.sample.grammar import image_state, unconditional_context

REP = 40
BASE: dict[str, Any] = {"begin_image": 2, "end_image": 3, "first_code": 10, "num_codes": 8, "rep": REP}
LUMINA = ImageLayout(
    family="lumina", bos=0, separator=1, new_line=4, first_size=20, num_sizes=6, size_step=2, closing=(1,), **BASE
)
CHAMELEON = ImageLayout(family="chameleon", bos=0, separator=1, **BASE)
GENERIC = ImageLayout(
    family="generic", bos=0, closing=(5,), new_line=4, first_size=19, num_sizes=12, unconditional="empty_prompt", **BASE
)
LAYOUTS: dict[str, ImageLayout] = {layout.family: layout for layout in (LUMINA, CHAMELEON, GENERIC)}
PROMPTS = st.none() | st.lists(st.integers(100, 120), max_size=5)
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda sides: (2 * sides[0], 2 * sides[1]))


def without(layout: ImageLayout) -> ImageLayout:
    return layout.model_copy(update={"rep": None})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*LAYOUTS]), PROMPTS, GRIDS)
def test_one_token_more_and_nothing_else(family: str, prompt: list[int] | None, grid: Grid) -> None:
    """Right before begin-image in every form, also the one without a prompt; it carries loss, and is no code."""
    layout, plain = LAYOUTS[family], without(LAYOUTS[family])
    codes = np.arange(grid[0] * grid[1]).reshape(grid) % 8
    written, expected = layout.sequence(prompt, codes), plain.sequence(prompt, codes)
    place = expected.tokens.tolist().index(2)
    assert written.tokens.tolist() == np.insert(expected.tokens, place, REP).tolist()
    assert written.labels.tolist() == np.insert(expected.labels, place, REP).tolist()
    assert written.code_mask.tolist() == np.insert(expected.code_mask, place, False).tolist()
    assert written.rep_mask is not None
    assert np.flatnonzero(written.rep_mask).tolist() == [place]
    assert expected.rep_mask is None
    assert layout.prefix(prompt, grid) == written.tokens[: place + 1 + len(layout.opening(grid))].tolist()
    assert layout.length(None if prompt is None else len(prompt), grid) == len(written.tokens)
    assert (layout.image(grid), layout.opening(grid)) == (plain.image(grid), plain.opening(grid))
    assert (layout.read_image(written.tokens.tolist(), grid=grid) == codes).all()
    assert (layout.read_image(written.tokens[place + 1 :].tolist(), grid=grid) == codes).all()


def test_a_small_image_in_full() -> None:
    codes = np.array([[0, 7], [3, 4]])
    assert GENERIC.sequence([100], codes).tokens.tolist() == [0, 100, REP, 2, 21, 21, 10, 17, 4, 13, 14, 4, 3, 5]
    assert GENERIC.prefix(None, (2, 2)) == [0, REP, 2, 21, 21]
    assert LUMINA.prefix(None, (2, 2)) == [REP, 2, 21, 21]
    assert CHAMELEON.prefix([100], (2, 2)) == [0, 100, 1, REP, 2]


def test_images_that_are_asked_about_have_none() -> None:
    codes = np.zeros((1, 2), np.int64)
    written = CHAMELEON.write([[[100], codes], [codes, [101], codes]])
    image = [2, 10, 10, 3]
    assert written.tokens.tolist() == [0, 100, *image, 1, REP, *image, 101, REP, *image]
    assert written.rep_mask is not None
    assert np.flatnonzero(written.rep_mask).tolist() == [7, 13]


def test_what_is_reserved_and_trained() -> None:
    """Text can never become it; where a row of embeddings is trained for every sign of images, so is its."""
    known = without(LUMINA).model_copy(update={"rep_id": REP})
    for layout, written in ((LUMINA, True), (known, False), (without(LUMINA), False)):
        assert (REP in layout.image_ids()) == written
        assert (REP in layout.reserved()) == (layout.rep_id == REP or written)
    assert without(LUMINA).reserved() == LUMINA.reserved() - {REP}


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("id 12 is both a code and rep", {"rep": 12}),
        ("id 2 is both begin_image and rep", {"rep": None, "rep_id": 2}),
        ("id 1 is both rep and bos, separator or closing", {"rep": 1}),
        ("'rep' is 40, but 'rep_id' says that 41 is the REP token", {"rep_id": 41}),
    ],
)
def test_ids_mean_one_thing(fault: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=fault):
        ImageLayout(**{**LUMINA.model_dump(), **changes})


def test_an_image_after_another_token_is_not_read() -> None:
    written = LUMINA.sequence([], np.zeros((2, 2), np.int64)).tokens.tolist()
    tokens = [100 if token == REP else token for token in written]
    with pytest.raises(ArraError, match="lumina image: token 100 before begin-image; expected REP, 40"):
        LUMINA.read_image(tokens)
    assert without(LUMINA).read_image(tokens).shape == (2, 2)


def test_positions_count_it() -> None:
    length = len(LUMINA.sequence([100], np.zeros((2, 2), np.int64)).tokens)
    tight = LUMINA.model_copy(update={"max_positions": length - 1})
    without(tight).check_fits(1, (2, 2), where="here")
    with pytest.raises(ArraError, match=f"here: {length} tokens do not fit the model's {length - 1} positions"):
        tight.check_fits(1, (2, 2), where="here")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*LAYOUTS]), PROMPTS.filter(lambda prompt: prompt is not None), GRIDS, st.integers(0, 2))
def test_the_grammar_is_the_layout(family: str, prompt: list[int], grid: Grid, begun: int) -> None:
    """From a bare prompt, from REP, and from begin-image on, what is forced is what training writes."""
    layout = LAYOUTS[family]
    codes = np.arange(grid[0] * grid[1]).reshape(grid) % 8
    expected = layout.sequence(prompt, codes).tokens.tolist()
    tokens = expected[: expected.index(REP) + begun]
    prompt_length, waiting = len(tokens), iter(codes.ravel().tolist())
    while (state := image_state(layout, tokens, grid=grid, prompt_length=prompt_length)).forced or state.codes_only:
        if state.guided:
            null = layout.sequence(None, codes).tokens.tolist()
            beside = unconditional_context(layout, tokens, state)
            assert beside == null[: len(beside)]
        tokens.append(10 + next(waiting) if state.forced is None else state.forced)
    assert tokens == expected


def test_an_image_begins_behind_it_whoever_wrote_it() -> None:
    assert image_state(LUMINA, [0, 100, 1]).forced is None
    assert image_state(LUMINA, [0, 100, 1, REP]).forced == 2
    assert image_state(without(LUMINA), [0, 100, 1, REP]).forced is None


def test_an_image_in_the_prompt_is_not_the_one_that_is_asked_for() -> None:
    shown = GENERIC.write([[np.zeros((1, 2), np.int64)]]).tokens.tolist()
    told: dict[str, Any] = {"grid": (1, 1), "prompt_length": len(shown)}
    assert image_state(GENERIC, shown, **told).forced == REP
    assert image_state(GENERIC, [*shown, REP], **told).forced == 2


def language_batches(layout: ImageLayout) -> Batches:
    """Records of two grids, each with a prompt of a length of its own."""
    grids: tuple[Grid, ...] = ((2, 4), (4, 2))
    captions = tuple([[[100 + number] * (row + 1)] for row in range(8)] for number in range(2))
    numbers = np.arange(8) % 2
    features = {"teacher": torch.randn(8, 3), "patches": torch.randn(8, 4, 5)}
    return Batches(
        conditions=PromptConditions(captions, grids, numbers, dropout=0.3),
        pictures=InMemory(torch.arange(64).view(8, 8) % 8, features),
        batch_size=3,
        seed=0,
        buckets=numbers,
        write=LayoutWriter(layout),
    )


@pytest.mark.parametrize("family", LAYOUTS)
def test_batches_of_grids(family: str) -> None:
    """Each batch says its own, and where REP stands in rows of any prompt and padding."""
    seen = set()
    for step in range(8):
        batch = language_batches(LAYOUTS[family]).batch(step)
        seen.add(batch.grid)
        assert batch.rep_mask is not None
        assert torch.equal(batch.rep_mask, batch.tokens == REP)
        assert batch.rep_mask.sum(1).tolist() == [1] * len(batch.tokens)
        assert (batch.tokens.roll(-1, 1)[batch.rep_mask] == 2).all()
        plain = language_batches(without(LAYOUTS[family])).batch(step)
        assert plain.rep_mask is None
        assert (plain.tokens != REP).all()
        if batch.grid == (2, 4) and LAYOUTS[family].new_line is not None:
            assert (batch.tokens == 4).sum(1).tolist() == [2] * len(batch.tokens)
    assert seen == {(2, 4), (4, 2)}


def test_text_beside_pictures_has_none() -> None:
    text = TextRows(torch.randint(100, 120, (5, 30)))
    pictures = language_batches(GENERIC)
    for step in range(3):
        images, batch = pictures.batch(step), MixedBatches(pictures, text, 2).batch(step)
        count, width = images.tokens.shape
        assert batch.rep_mask is not None
        assert images.rep_mask is not None
        assert images.features is not None
        assert batch.features is not None
        assert batch.rep_mask.shape == batch.tokens.shape == batch.code_mask.shape
        assert torch.equal(batch.rep_mask[:count, :width], images.rep_mask)
        assert not batch.rep_mask[count:].any()
        assert not batch.rep_mask[:, width:].any()
        assert batch.grid == images.grid
        for name, value in images.features.items():
            assert torch.equal(batch.features[name][:count], value)
            assert batch.features[name].shape == (len(batch.tokens), *value.shape[1:])
            assert (batch.features[name][count:] == 0).all()
    plain = joined(language_batches(without(GENERIC)).batch(0), text.batch(torch.tensor([0])))
    assert plain.rep_mask is None


def test_sequences_with_and_without() -> None:
    """A batch may hold both; rows without it have no such place."""
    codes = np.zeros((2, 2), np.int64)
    batch = padded_batch([GENERIC.sequence([100], codes), without(GENERIC).sequence([], codes)])
    assert batch.rep_mask is not None
    assert batch.rep_mask.nonzero().tolist() == [[0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(2, 40), max_size=6), min_size=1, max_size=5),
    num_codes=st.integers(1, 9),
    spare=st.integers(0, 4),
)
def test_layout_of_any_decoder_batch(prompts: list[list[int]], num_codes: int, spare: int) -> None:
    """The batch without it, and one real position right before the codes; its state predicts the first of them."""
    length = max(map(len, prompts)) + 1 + spare
    codes = torch.arange(len(prompts) * num_codes).view(len(prompts), num_codes)
    plain = text_batch(prompts, codes, prefix_length=length)
    batch = text_batch(prompts, codes, prefix_length=length, rep_token=True)
    assert torch.equal(torch.cat([batch.tokens[:, :length], batch.tokens[:, length + 1 :]], 1), plain.tokens)
    assert (batch.tokens[:, length] == PAD).all()
    assert (batch.tokens[:, length - 1] == BOI).all()
    assert (batch.labels[:, : length + 1] == NO_LABEL).all()
    assert batch.prefix_mask is not None
    assert plain.prefix_mask is not None
    assert torch.equal(batch.prefix_mask[:, :-1], plain.prefix_mask)
    assert batch.prefix_mask[:, -1].all()
    assert batch.rep_mask is not None
    assert batch.rep_mask.nonzero()[:, 1].tolist() == [length] * len(prompts)
    assert torch.equal(batch.rep_mask[:, :-1], batch.predicting & ~batch.code_mask[:, :-1])
    assert plain.rep_mask is None
