"""Text tokenizers: whatever a user types becomes ids of ordinary text, the same ones for the same training captions."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.data.layout import BOI, PAD
from arra.errors import ArraError
from arra.tokenizers.text import SPECIAL, TextTokenizer, load_text_tokenizer, tokenizer_from_json, train_text_tokenizer

PROMPTS = [
    f"{colour} {thing}{where}"
    for colour in ("red", "green", "sky-blue", "o'clock")
    for thing in ("heart", "cat", "car", "woman firefighter", "naïve café")
    for where in ("", " on fire", " in the rain", ": medium-dark skin tone")
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_text_tokenizer(PROMPTS, vocab_size=400)


def test_frequent_words_are_whole(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size <= 400
    assert len(tokenizer.encode("red heart")) == 2
    assert len(tokenizer.encode("green woman firefighter")) == 3
    assert len(tokenizer.encode("zyzzyva")) > 1


@pytest.mark.parametrize(
    ("prompt", "read_as"),
    [
        ("red heart", "red heart"),
        ("  RED,   heart!\n", "red heart"),
        ("A red heart, on the fire.", "red heart on fire"),
        ("an apple and a the-end x-a a's", "apple and the-end x-a a's"),
        ("Ａ ｒｅｄ heart", "red heart"),  # full-width letters
        ("naïve café", "naïve café"),
        ("nai\u0308ve", "naïve"),  # letter and accent apart
        ("हिन्दी", "हिन्दी"),  # vowel signs are no punctuation
        ("ใจ", "ใจ"),
        ("5 o'clock sky-blue", "5 o'clock sky-blue"),
        ("red ❤️ 5️⃣", "red 5"),
        ("", ""),
        ("the", ""),
        ("?!", ""),
    ],
)
def test_prompts_are_read_as_written(tokenizer: TextTokenizer, prompt: str, read_as: str) -> None:
    ids = tokenizer.encode(prompt)
    assert tokenizer.decode(ids) == read_as
    assert ids == tokenizer.encode(read_as)
    assert bool(ids) == bool(read_as)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.from_regex(r"\A[b-z0-9]{2,9}\Z"), max_size=6))
def test_round_trip(tokenizer: TextTokenizer, words: list[str]) -> None:
    text = " ".join(word for word in words if word not in ("an", "the"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(f"The {text.upper()}!")) == text


HOSTILE = [
    "<pad>",
    "<image>",
    "<pad><image>",
    " <pad> red <image> heart",
    "<PAD>",
    "< pad >",
    "＜pad＞",
    "\x00\x01\x1f",
    "\ud800 red",
    "😀" * 50,
    "\u202e\u200b\ufeff",
    "Ġ<pad>",
    "x" * 20_000,
]


@pytest.mark.parametrize("prompt", HOSTILE, ids=ascii)
def test_hostile_prompts_are_plain_text(tokenizer: TextTokenizer, prompt: str) -> None:
    ids = tokenizer.encode(prompt)
    assert not {PAD, BOI} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert "<" not in tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=())) | st.lists(st.sampled_from(HOSTILE[:7]), max_size=4).map("".join))
def test_no_prompt_becomes_a_special_token(tokenizer: TextTokenizer, prompt: str) -> None:
    assert all(2 <= i < tokenizer.vocab_size for i in tokenizer.encode(prompt))


def test_captions_that_name_the_special_tokens() -> None:
    """Training on them neither merges pieces into them nor breaks the ids."""
    learned = train_text_tokenizer(["<pad> <image>"] * 50 + PROMPTS, vocab_size=400)
    assert [learned.tokenizer.id_to_token(i) for i in (PAD, BOI)] == list(SPECIAL)
    assert all(i >= 2 for prompt in HOSTILE for i in learned.encode(prompt))


def test_the_same_captions_give_the_same_ids() -> None:
    shuffled = [*PROMPTS]
    random.Random(0).shuffle(shuffled)
    one, other = (train_text_tokenizer(prompts, vocab_size=350) for prompts in (PROMPTS, iter(shuffled)))
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    assert one.tokenizer.get_vocab() != train_text_tokenizer(PROMPTS[:20], vocab_size=350).tokenizer.get_vocab()


def test_the_smallest_vocabulary_still_says_everything() -> None:
    smallest = train_text_tokenizer(PROMPTS, vocab_size=1)
    assert smallest.vocab_size == 256 + len(SPECIAL)
    assert smallest.decode(smallest.encode("हिन्दी red")) == "हिन्दी red"


def test_save_and_load(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    again = load_text_tokenizer(tmp_path / "deep" / "tokenizer.json")
    assert again.tokenizer.to_str() == tokenizer.tokenizer.to_str()
    for prompt in [*PROMPTS, *HOSTILE]:
        assert again.encode(prompt) == tokenizer.encode(prompt)


def described(tokenizer: TextTokenizer, **changes: Any) -> str:
    content = json.loads(tokenizer.tokenizer.to_str())
    content["model"] |= changes.pop("model", {})
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '{"model": {}}', '{"model": {"type": "BPE"}}', "\x00", '{"version": "1.0"}'],
)
def test_files_that_are_no_tokenizers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ArraError, match=r"tokenizer\.json: not a tokenizer .*; save the model again") as caught:
        load_text_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_tokenizers_of_other_programs_are_refused(tokenizer: TextTokenizer) -> None:
    """Among them one in which a prompt could name a special token."""
    added = {"id": 0, "content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "special": True}
    with pytest.raises(ArraError, match="here: has added tokens, which a prompt could name; made by another program"):
        tokenizer_from_json(described(tokenizer, added_tokens=[added]), source="here")
    with pytest.raises(ArraError, match="here: ids 0 and 1 are not <pad> and <image>; made by another program"):
        tokenizer_from_json(described(tokenizer, model={"vocab": {"a": 0, "b": 1}, "merges": []}), source="here")
    with pytest.raises(ArraError, match="here: not a tokenizer"):
        tokenizer_from_json(described(tokenizer, model={"merges": [["nowhere", "found"]]}), source="here")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe")
    for name in ("none.json", "latin.json", ""):
        with pytest.raises(ArraError, match=r"cannot be read .*; expected a tokenizer\.json"):
            load_text_tokenizer(tmp_path / name)
