"""Sequences and labels as the processors of ARRA and Lumina-mGPT wrote them, and ids derived from their rule."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arra.data.conversations import read_conversation
from arra.data.crops import choose_bucket, crop_sizes
from arra.data.layout import NO_LABEL, ImageLayout, Piece
from arra.errors import ArraError
from arra.tokenizers.vocabulary import chameleon_code_name, chameleon_layout, lumina_layout

GOLD: dict[str, Any] = json.loads((Path(__file__).parent / "arra" / "layout.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLD["cases"]}
WRITTEN = [name for name, case in CASES.items() if "input_ids" in case]
IMAGE, SPACE = 65536, 9000
"""Ids of the fake tokenizer that stand for an image, and for a blank."""


def real_vocabulary(order: list[int] | None = None) -> dict[str, int]:
    """Chameleon's names at their ids; entry i of the order is the code whose id is 4 + i."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    names |= {f"<reserved{number:05d}>": number + 4 for number in range(8194, 8994)}
    return names | {chameleon_code_name(code): 4 + place for place, code in enumerate(order or range(8192))}


VOCABULARIES = {"identity": real_vocabulary(), "permuted": real_vocabulary(GOLD["permuted_vocab_id_to_code"])}
LAYOUTS = {name: lumina_layout(vocabulary, max_positions=4096) for name, vocabulary in VOCABULARIES.items()}


def turns_of(case: dict[str, Any]) -> list[list[Piece]]:
    """The text ids of a case with its codes in their places."""
    images = [np.array(image["codes"]).reshape(image["latent_h_w"]) for image in case["images"]]
    turns = [ids for ids in case["text_ids"] if ids is not None]
    if images and not any(IMAGE in ids for ids in turns):
        turns[0] = [IMAGE, SPACE, *turns[0]]  # the reference moves a picture without a place before the first turn
    waiting, written = iter(images), []
    for ids in turns:
        pieces: list[Piece] = [[]]
        for token in ids:
            if token == IMAGE:
                pieces += [next(waiting), []]
            else:
                pieces[-1].append(token)  # type: ignore[union-attr]
        written.append(pieces)
    return written


def test_names_and_ids() -> None:
    known = {**GOLD["special_ids"], **GOLD["example_names"]}
    assert {name: VOCABULARIES["identity"].get(name, IMAGE) for name in known} == known
    assert (LAYOUTS["identity"].first_code, LAYOUTS["identity"].code_order) == (4, None)
    assert LAYOUTS["permuted"].code_order is not None


@pytest.mark.parametrize("name", WRITTEN)
def test_ids_and_labels(name: str) -> None:
    case = CASES[name]
    written = LAYOUTS[case["vocab"]].write(turns_of(case))
    assert written.tokens.tolist() == case["input_ids"]
    assert len(written.tokens) == case["length"]
    if case["labels"] is not None:
        assert written.labels.tolist() == case["labels"]


@pytest.mark.parametrize("name", [name for name in WRITTEN if name.startswith("t2i")])
def test_prompt_and_image(name: str) -> None:
    """The short way to write what training takes, its length, and what sampling starts from."""
    case, layout = CASES[name], LAYOUTS[CASES[name]["vocab"]]
    (prompt, _), image = case["text_ids"], case["images"][0]
    grid = (image["latent_h_w"][0], image["latent_h_w"][1])
    written = layout.sequence(prompt, np.array(image["codes"]).reshape(grid))
    assert written.tokens.tolist() == case["input_ids"]
    assert written.labels.tolist() == case["labels"]
    assert layout.length(len(prompt), grid) == case["length"]
    start = len(prompt) + 5
    assert layout.prefix(prompt, grid) == case["input_ids"][:start]
    assert (written.labels != NO_LABEL).sum() == grid[0] * (grid[1] + 1) + 5
    asked = CASES["prompt_only"]["input_ids"]
    if prompt == CASES["prompt_only"]["text_ids"][0]:
        assert layout.prefix(prompt, grid)[:-3] == asked


def test_rep_before_the_image() -> None:
    """ARRA's first commented-out place of REP, at the start of the answer, is ours: it carries a label there."""
    case, layout = CASES["rep_before_boi"], LAYOUTS["identity"]
    assert layout.rep_id == 8799 == VOCABULARIES["identity"]["<reserved08795>"]
    assert layout.rep is None
    layout = layout.model_copy(update={"rep": layout.rep_id})
    (prompt, answer), image = case["text_ids"], case["images"][0]
    assert answer == [8799, IMAGE]
    grid = (image["latent_h_w"][0], image["latent_h_w"][1])
    codes = np.array(image["codes"]).reshape(grid)
    for written in (layout.sequence(prompt, codes), layout.write([[prompt], [codes]])):
        assert written.tokens.tolist() == case["input_ids"]
        assert written.labels.tolist() == case["labels"]
        assert written.rep_mask is not None
        assert np.flatnonzero(written.rep_mask).tolist() == [len(prompt) + 2]
        assert written.tokens[len(prompt) + 3] == 8197
    assert layout.length(len(prompt), grid) == case["length"]
    assert layout.prefix(prompt, grid) == case["input_ids"][: len(prompt) + 6]
    assert (layout.read_image(case["input_ids"]) == codes).all()


def test_rep_behind_the_prompt() -> None:
    """The second place, a blank and REP at the end of what is asked, carries no label; it is text of the prompt."""
    case, first = CASES["rep_after_prompt"], CASES["rep_before_boi"]
    prompt = case["text_ids"][0]
    assert prompt == [*first["text_ids"][0], SPACE, 8799]
    place = case["input_ids"].index(8799)
    assert place == first["input_ids"].index(8799)
    assert (case["labels"][place], first["labels"][place]) == (NO_LABEL, 8799)
    assert case["input_ids"][place + 1] == VOCABULARIES["identity"]["<reserved08706>"]
    assert (np.array(first["labels"]) != NO_LABEL).sum() == 1062


@pytest.mark.parametrize("name", [name for name in WRITTEN if "decode_image" in CASES[name]])
def test_codes_are_found_again(name: str) -> None:
    """Also where the reference's second inverse, two sorted lists, is wrong: in a permuted vocabulary."""
    case, layout = CASES[name], LAYOUTS[CASES[name]["vocab"]]
    tokens = case["input_ids"]
    starts = [place for place, token in enumerate(tokens) if token == 8197]
    for start, image in zip(starts, case["images"], strict=True):
        codes = layout.read_image(tokens[start : tokens.index(8196, start) + 1])
        assert codes.ravel().tolist() == image["codes"]
        assert list(codes.shape) == [case["decode_image"]["h"], case["decode_image"]["w"]] == image["latent_h_w"]


def test_two_images_for_one_symbol() -> None:
    case = CASES["two_images_one_symbol_error"]
    with pytest.raises(ValueError, match=r"1 <\|image\|> but 2 in 'image'; the numbers must be equal"):
        read_conversation({"conversations": case["conversations"], "image": ["a.png", "b.png"]})


@pytest.mark.parametrize("target", [256, 512, 768, 1024])
def test_crops(target: int) -> None:
    sizes = crop_sizes(target)
    assert [list(size) for size in sizes] == GOLD["crop_size_lists"][str(target)]
    for picture in GOLD["chosen_crops"]:
        assert list(choose_bucket(picture["image_w_h"][0], picture["image_w_h"][1], sizes)) == picture[str(target)]


@pytest.mark.parametrize("name", [name for name in WRITTEN if CASES[name]["processor"] == "lumina"])
def test_a_picture_gets_its_grid(name: str) -> None:
    case = CASES[name]
    for picture, image in zip(case["image_sizes"], case["images"], strict=True):
        width, height = choose_bucket(picture[0], picture[1], crop_sizes(case["target_size"]))
        assert [height // 16, width // 16] == image["latent_h_w"]


TINY_NAMES = ["<s>", "<pad>", "</s>", "<unk>", *map(chameleon_code_name, range(10)), "<eoss>", "<racm3:break>"]
TINY_NAMES += ["<reserved08706>", "<reserved08707>", *(f"<reserved{8799 + n:05d}>" for n in range(66)), "text"]
TINY = {name: token for token, name in enumerate(TINY_NAMES)}
BEGIN, END, SEPARATOR, NEW_LINE, SIDE, TEXT = 15, 14, 16, 18, 19, 84
SIZES = [
    # width, height in pixels; height, width in steps of 32; tokens of the image
    (256, 256, 8, 8, 276),
    (512, 128, 4, 16, 268),
    (128, 512, 16, 4, 292),
    (512, 512, 16, 16, 1060),
    (448, 576, 18, 14, 1048),
    (256, 1024, 32, 8, 1092),
    (768, 768, 24, 24, 2356),
    (1536, 384, 12, 48, 2332),
    (384, 1536, 48, 12, 2404),
    (1024, 1024, 32, 32, 4164),
    (2048, 512, 16, 64, 4132),
    (512, 2048, 64, 16, 4228),
]


@pytest.fixture(scope="module")
def tiny() -> ImageLayout:
    return lumina_layout(TINY, num_codes=10, max_positions=4096)


def test_a_small_image_in_full(tiny: ImageLayout) -> None:
    """64 pixels high, 32 wide."""
    codes = np.array([[0, 9], [1, 8], [2, 7], [3, 6]])
    assert tiny.sequence([TEXT, TEXT], codes).tokens.tolist() == [
        *(0, TEXT, TEXT, 16),
        *(15, 21, 20),
        *(4, 13, 18),
        *(5, 12, 18),
        *(6, 11, 18),
        *(7, 10, 18),
        *(14, 16),
    ]
    meta = chameleon_layout(TINY, num_codes=10)
    assert meta.sequence([TEXT], codes[:2]).tokens.tolist() == [0, TEXT, 16, 15, 4, 13, 5, 12, 14]


@pytest.mark.parametrize(("width", "height", "down", "across", "length"), SIZES)
def test_sizes_and_aspects(tiny: ImageLayout, width: int, height: int, down: int, across: int, length: int) -> None:
    """By the rule: index of row r, column c is begin + 3 + r (w + 1) + c; a new line after every row."""
    rows, columns = height // 16, width // 16
    codes = np.random.default_rng(0).integers(0, 10, (rows, columns))
    expected = [0, TEXT, SEPARATOR, BEGIN, SIDE + down, SIDE + across]
    for row in codes.tolist():
        expected += [4 + code for code in row] + [NEW_LINE]
    expected += [END, SEPARATOR]
    written = tiny.sequence([TEXT], codes)
    assert written.tokens.tolist() == expected
    assert len(expected) == length + 4 == tiny.length(1, (rows, columns))
    assert written.labels.tolist() == [NO_LABEL] * 3 + expected[3:]
    assert written.code_mask.sum() == rows * columns
    assert (tiny.read_image(expected) == codes).all()


@pytest.mark.parametrize(("target", "longest"), [(256, 292), (512, 1092), (768, 2404), (1024, 4228)])
def test_longest_images(tiny: ImageLayout, target: int, longest: int) -> None:
    """Of all crops of a target the longest is no square."""
    lengths = {size: len(tiny.image((size[1] // 16, size[0] // 16))) for size in crop_sizes(target)}
    assert max(lengths.values()) == longest > lengths[target, target]


def test_what_does_not_fit_is_said_before_training(tiny: ImageLayout) -> None:
    tiny.check_fits(4096 - 2359, (48, 48), where="here")
    with pytest.raises(ArraError, match=r"here: 4097 tokens do not fit the model's 4096 .* or shorten the prompt"):
        tiny.check_fits(4096 - 2358, (48, 48), where="here")
    with pytest.raises(ArraError) as caught:
        tiny.check_fits(None, (64, 64), where="recipe.yaml")
    assert str(caught.value) == (
        "recipe.yaml: 4165 tokens do not fit the model's 4096 positions (the prompt has 0, the image of 1024 x 1024 "
        "pixels 4164); choose a smaller image size"
    )
