"""Layouts from token names: every id is read off its name, and what does not fit is refused in one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arra.errors import ArraError
from arra.tokenizers.vocabulary import (
    IMAGE_END,
    IMAGE_ROW,
    IMAGE_START,
    chameleon_code_name,
    chameleon_layout,
    code_name,
    generic_layout,
    generic_names,
    is_special_name,
    lumina_layout,
    read_vocabulary,
    side_name,
)

NUM_CODES = 20
NAMES = ["<s>", "<pad>", "</s>", "<unk>", *map(chameleon_code_name, range(NUM_CODES)), "<eoss>", "<racm3:break>"]
NAMES += ["<reserved08706>", "<reserved08707>", *(f"<reserved{8799 + n:05d}>" for n in range(8)), "a", "b"]
CHAMELEON = {name: token for token, name in enumerate(NAMES)}
GENERIC = {name: 50 + token for token, name in enumerate(generic_names(NUM_CODES, num_sizes=6))}


def test_names_of_codes() -> None:
    """As the golden vocabulary has them."""
    names = {0: "IMGIMGAZ", 1: "IMGIMGBZ", 9: "IMGIMGJZ", 10: "IMGIMGBAZ", 8191: "IMGIMGIBJBZ"}
    assert {code: chameleon_code_name(code) for code in names} == names


def test_lumina() -> None:
    layout = lumina_layout(CHAMELEON, num_codes=NUM_CODES)
    assert (layout.bos, layout.separator, layout.closing) == (0, CHAMELEON["<reserved08706>"], (layout.separator,))
    assert layout.begin_image == CHAMELEON["<racm3:break>"]
    assert layout.end_image == CHAMELEON["<eoss>"]
    assert layout.new_line == CHAMELEON["<reserved08799>"]
    assert layout.first_size == CHAMELEON["<reserved08800>"]
    assert (layout.num_sizes, layout.size_step) == (6, 2)  # 8801..8806 are there
    assert (layout.first_code, layout.code_order) == (4, None)
    assert layout.unconditional == "image_only"


def test_chameleon() -> None:
    layout = chameleon_layout(CHAMELEON, num_codes=NUM_CODES)
    assert (layout.new_line, layout.first_size, layout.closing) == (None, None, ())
    assert layout.code_ids().tolist() == list(range(4, 4 + NUM_CODES))


@pytest.mark.parametrize("family", ["chameleon", "generic"])
def test_permuted_codes(family: str) -> None:
    """Code k is the token named k wherever it stands."""
    named = chameleon_code_name if family == "chameleon" else code_name
    vocabulary = dict(CHAMELEON if family == "chameleon" else GENERIC)
    order = [vocabulary[named(code)] for code in range(NUM_CODES)]
    random.Random(0).shuffle(order)
    vocabulary |= {named(code): token for code, token in enumerate(order)}
    make: Callable[..., Any] = lumina_layout if family == "chameleon" else generic_layout
    layout = make(vocabulary, num_codes=NUM_CODES)
    assert layout.code_ids().tolist() == order
    assert layout.code_order == tuple(order)
    assert layout.first_code == min(order)
    assert type(layout).model_validate_json(layout.model_dump_json()) == layout


def test_generic() -> None:
    layout = generic_layout(GENERIC, num_codes=NUM_CODES, bos=1, closing=(2,), template="Draw: {prompt}")
    assert (layout.begin_image, layout.end_image, layout.new_line) == (50, 51, 52)
    assert layout.prefix([7], (3, 6)) == [1, 7, 50, GENERIC[side_name(3)], GENERIC[side_name(6)]]
    assert layout.first_code == GENERIC[code_name(0)] == 50 + 3 + 6
    assert layout.unconditional == "empty_prompt"
    assert layout.reserved() == {1, 2, *GENERIC.values()}


def test_generic_without_rows_and_sides() -> None:
    names = generic_names(4, rows=False)
    assert names == [IMAGE_START, IMAGE_END, *map(code_name, range(4))]
    layout = generic_layout({name: token for token, name in enumerate(names)}, num_codes=4)
    assert (layout.new_line, layout.first_size, layout.bos) == (None, None, None)
    assert layout.image((1, 2)) == [0, -1, -1, 1]


def test_names_that_are_signs() -> None:
    assert all(map(is_special_name, [*NAMES[:-2], *generic_names(3, num_sizes=2), "<image>"]))
    for name in ("a", "IMGIMG", "IMGIMGZ", "IMGIMGKZ", "<reserved1>", "<|image_code_|>", "<|image_code_1|> ", "<x>"):
        assert not is_special_name(name)


CODE_3 = chameleon_code_name(3)
FAULTS: list[tuple[str, dict[str, int | None]]] = [
    ("no token <s>", {"<s>": None}),
    ("no token <reserved08706>", {"<reserved08706>": None}),
    ("no token <racm3:break>", {"<racm3:break>": None}),
    ("no token <reserved08799>", {"<reserved08799>": None}),
    ("no token for a side of 1 step", {"<reserved08801>": None}),
    ("the side of 2 steps has the id 2, expected ", {"<reserved08802>": 2}),
    ("19 tokens name codes, expected one for each of 20; code 3 has none", {CODE_3: None}),
    ("20 tokens name codes, expected one for each of 20; code 3 has none", {CODE_3: None, "IMGIMGCAZ": 99}),
    ("21 tokens name codes, expected one for each of 20; code 20 is beyond", {"IMGIMGCAZ": 99}),
    ("two tokens name code 3", {"IMGIMGADZ": 99}),
    ("two codes have the same id", {CODE_3: 4}),
    ("id 4 is both a code and bos, separator or closing", {"<s>": 4}),
    ("id 0 is both end_image and bos, separator or closing", {"<eoss>": 0}),
]


@pytest.mark.parametrize(("fault", "changes"), FAULTS)
def test_vocabularies_that_do_not_fit(fault: str, changes: dict[str, int | None]) -> None:
    vocabulary = {name: token for name, token in {**CHAMELEON, **changes}.items() if token is not None}
    with pytest.raises(ArraError, match=f"here: {fault}") as caught:
        lumina_layout(vocabulary, num_codes=NUM_CODES, source="here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (r"no token <\|image_end\|>", {IMAGE_END: None}),
        ("code 5 has none", {code_name(5): None}),
        ("two tokens name code 5", {"<|image_code_05|>": 200}),
        ("the side of 3 steps has the id None", {side_name(3): None}),
        ("the side of 2 steps has the id 7", {side_name(2): 7}),
        ("no token for a side of 1 step", {side_name(1): None}),
        ("id 53 is both new_line and a side", {IMAGE_ROW: 53}),
    ],
)
def test_extended_vocabularies_that_do_not_fit(fault: str, changes: dict[str, int | None]) -> None:
    vocabulary = {name: token for name, token in {**GENERIC, **changes}.items() if token is not None}
    with pytest.raises(ArraError, match=f"here: .*{fault}"):
        generic_layout(vocabulary, num_codes=NUM_CODES, source="here")


def added(name: str, token: int) -> dict[str, Any]:
    return {"content": name, "id": token}


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"vocab": CHAMELEON}},
        {"model": {"vocab": dict(list(CHAMELEON.items())[4:])}, "added_tokens": [added(NAMES[i], i) for i in range(6)]},
        {"model": {"vocab": [[name, 0.0] for name in NAMES]}},
        {"model_type": "chameleon", "vocabulary_map": CHAMELEON},
    ],
    ids=["BPE", "added tokens", "Unigram", "config"],
)
def test_files_of_vocabularies(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    assert read_vocabulary(path) == CHAMELEON


def test_hugging_faces_name_of_an_image() -> None:
    """Its map has `<image>` where Meta's has `<reserved08707>`; no layout needs either."""
    renamed = {("<image>" if name == "<reserved08707>" else name): token for name, token in CHAMELEON.items()}
    assert lumina_layout(renamed, num_codes=NUM_CODES) == lumina_layout(CHAMELEON, num_codes=NUM_CODES)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("no vocabulary", "{}"),
        ("no vocabulary", '{"model": {"vocab": {}}}'),
        ("no vocabulary", '{"model": [], "vocabulary_map": 3}'),
        ("'a' has the id '-1'", '{"vocabulary_map": {"a": -1}}'),
        ("'a' has the id 'True'", '{"vocabulary_map": {"a": true}}'),
        ("'a' has the id '1.5'", '{"model": {"vocab": {"a": 1.5}}}'),
        ("'a' stands twice", '{"vocabulary_map": {"a": 1, "b": 2, "a": 3}}'),
        ("contradicts the vocabulary", '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": "a", "id": 2}]}'),
        ("contradicts the vocabulary", '{"model": {"vocab": {"a": 1}}, "added_tokens": [3]}'),
        ("contradicts the vocabulary", '{"model": {"vocab": {"a": 1}}, "added_tokens": true}'),
        ("'c' has the id 'None'", '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": "c"}]}'),
        ("not JSON", "{"),
        ("holds a list", "[1]"),
    ],
)
def test_files_without_a_vocabulary(fault: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ArraError, match=rf"some\.json: .*{fault}") as caught:
        read_vocabulary(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArraError, match="cannot be read"):
        read_vocabulary(tmp_path / "none.json")
