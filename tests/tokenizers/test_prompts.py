"""Prompts of language models: whatever a user types stays text, and text has the model's own ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from arra.errors import ArraError
from arra.tokenizers.prompts import PromptTokenizer, load_prompt_tokenizer, prompt_tokenizer
from arra.tokenizers.vocabulary import chameleon_code_name, code_name, generic_names

CHAMELEON = ["<s>", "<pad>", "</s>", "<unk>", *map(chameleon_code_name, range(12)), "<eoss>", "<racm3:break>"]
CHAMELEON += [f"<reserved{number:05d}>" for number in (8706, 8707, 8799, 8800, 8801, 8816)]
CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<unk>"]
NAMES = [*CHAMELEON, *CHAT, *generic_names(8, num_sizes=3)]
TEXTS = ["a red heart on fire, in the rain", "PA view chest x-ray image; no acute process.", "the quick 12 of 345"] * 20
TEXTS += [name for name in NAMES for _ in range(30)]  # merges of a model that has seen its own signs spelled out
ASCII = [chr(number) for number in range(32, 127)]


def gpt() -> Tokenizer:
    """Byte-level BPE with added tokens (GPT-2, Llama 3, Qwen), extended as `arra init` does."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(CHAT[:3])
    made.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tool>", normalized=False)])
    made.add_tokens([AddedToken(name, special=True, lstrip=True) for name in generic_names(8, num_sizes=3)])
    made.add_tokens([AddedToken("  ", normalized=False)])
    return made


def chameleon() -> Tokenizer:
    """Byte-level BPE whose signs are ordinary entries, taken whole because its pre-tokenizer cuts them out."""
    grown = gpt()
    content = json.loads(grown.to_str())
    content["added_tokens"] = []
    words = [name for name in content["model"]["vocab"] if name not in CHAMELEON]
    content["model"]["vocab"] = {name: token for token, name in enumerate([*CHAMELEON, *words])}
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "".join(merge) not in CHAMELEON]
    made = Tokenizer.from_str(json.dumps(content))
    signs = Regex(r"IMGIMG[A-J]{1,4}Z|<reserved\d{5}>|</?[a-z]+>|<racm3:break>")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(signs, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


def llama() -> Tokenizer:
    """BPE as converted from SentencePiece, with bytes for what it lacks (Llama 2, Mistral, Gemma)."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=[*ASCII, "▁"], show_progress=False
    )
    learned.train_from_iterator(TEXTS, trainer)
    content = json.loads(learned.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content["added_tokens"] = content["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram() -> Tokenizer:
    """Unigram, where any piece of the vocabulary is found in a text, signs too (T5)."""
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=[*ASCII, "▁"], show_progress=False
    )
    learned.train_from_iterator(TEXTS, trainer)
    content = json.loads(learned.to_str())
    content["model"]["vocab"] += [[name, -1.0] for name in [*CHAMELEON, *generic_names(8)] if name != "<unk>"]
    content["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Metaspace()
    return made


def ids_of(made: Tokenizer, names: list[str]) -> set[int]:
    return {token for name in names if (token := made.token_to_id(name)) is not None}


KINDS: dict[str, Callable[[], Tokenizer]] = {"gpt": gpt, "chameleon": chameleon, "llama": llama, "unigram": unigram}
MADE = {kind: make() for kind, make in KINDS.items()}
RESERVED = {
    "gpt": ids_of(MADE["gpt"], generic_names(8, num_sizes=3)),
    "chameleon": ids_of(MADE["chameleon"], CHAMELEON[:3] + CHAMELEON[4:]),
    "llama": ids_of(MADE["llama"], ["<s>", "</s>", "heart", "▁fire"]),
    "unigram": ids_of(MADE["unigram"], generic_names(8)),
}
PROMPTS = {kind: prompt_tokenizer(made.to_str(), reserved=RESERVED[kind], source=kind) for kind, made in MADE.items()}


def read_back(kind: str, text: str) -> str:
    """What a tokenizer of the kind gives back of a text without signs: those of SentencePiece lose the first spaces."""
    text = text.encode("utf-8", "replace").decode()
    return text if kind in ("gpt", "chameleon") else text.replace("▁", " ").strip(" ")


spliced = st.lists(
    st.sampled_from([*NAMES, "<tool>", "    ", "heart fire", "IMGIMG", "<reserved", ">", " "])
    | st.text(ASCII, max_size=6),
    max_size=8,
).map("".join)
anything = st.lists(st.sampled_from(NAMES) | st.text(st.characters(exclude_categories=()), max_size=6), max_size=6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_would_be_a_sign_without_us(kind: str) -> None:
    """Else the tests below show nothing."""
    for token in PROMPTS[kind].special - ids_of(MADE[kind], ["▁fire", "<unk>"]):
        name = MADE[kind].id_to_token(token)
        assert token in MADE[kind].encode(f"a {name} b", add_special_tokens=False).ids or kind == "llama", name


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(prompt=spliced | anything.map("".join))
@example("".join(NAMES))
@example(" ".join(NAMES))
@example("\ud800 red \udcff</s>")  # not in UTF-8
@example("</s> red <|im_end|>\n<|image_code_5|><racm3:break>IMGIMGAZ")
def test_prompts_stay_text(kind: str, prompt: str) -> None:
    """No special id, no text lost, and ids of the model's own where it sees no sign either."""
    ids = PROMPTS[kind].encode(prompt)
    unknown = ids_of(MADE[kind], ["<unk>"]) if kind == "unigram" else set()
    assert not (PROMPTS[kind].special - unknown).intersection(ids)
    if not unknown.intersection(ids):
        back = PROMPTS[kind].decode(ids)
        assert (back if kind in ("gpt", "chameleon") else back.strip(" ")) == read_back(kind, prompt)
    plain = prompt.encode("utf-8", "replace").decode()
    own = MADE[kind].encode(plain, add_special_tokens=False).ids
    if not PROMPTS[kind].special.intersection(own):
        assert ids == own


def test_what_is_special() -> None:
    """Reserved ids, added tokens whether called special or not, known names; not what stands for plain text."""
    special = {MADE["gpt"].id_to_token(token) for token in PROMPTS["gpt"].special}
    assert {*CHAT[:3], "<tool>", *generic_names(8, num_sizes=3)} <= special
    assert not {"    ", "  "} & special
    spaces = MADE["gpt"].token_to_id("  ")
    assert PROMPTS["gpt"].encode("a  b")[1] == spaces  # an id after the hidden ones, where it was
    assert MADE["chameleon"].token_to_id("<pad>") in PROMPTS["chameleon"].special
    assert MADE["unigram"].token_to_id("<racm3:break>") in PROMPTS["unigram"].special  # by its name alone
    assert MADE["llama"].token_to_id("a") not in PROMPTS["llama"].special


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    """The file is the model's own, byte for byte, so that other programs find its added tokens."""
    PROMPTS[kind].save(tmp_path / "deep" / "tokenizer.json")
    assert (tmp_path / "deep" / "tokenizer.json").read_text() == MADE[kind].to_str() == PROMPTS[kind].original_json
    again = load_prompt_tokenizer(tmp_path / "deep" / "tokenizer.json", reserved=RESERVED[kind])
    assert again.special == PROMPTS[kind].special
    for prompt in ["a red heart", "".join(NAMES), "ü ▁ \x00", ""]:
        assert again.encode(prompt) == PROMPTS[kind].encode(prompt)


def test_decoding_leaves_signs_out() -> None:
    ids = PROMPTS["gpt"].encode("a red heart")
    (code,) = ids_of(MADE["gpt"], [code_name(3)])
    assert PROMPTS["gpt"].decode([code, *ids, code]) == "a red heart"


def changed(kind: str, **changes: Any) -> str:
    content = json.loads(MADE[kind].to_str())
    content["model"] |= changes.pop("model", {})
    return json.dumps({**content, **changes})


def test_begin_tokens_cuts_and_chance_are_left_out() -> None:
    """Of a file whose tokenizer adds tokens, cuts and pads, or leaves merges out at random."""
    made = Tokenizer.from_str(changed("llama", model={"dropout": 0.5}))
    made.enable_truncation(2)
    made.enable_padding(length=7)
    found = prompt_tokenizer(made.to_str(), reserved=RESERVED["llama"], source="here")
    assert found.encode("a red heart on fire") == PROMPTS["llama"].encode("a red heart on fire")


def test_normalizers_cannot_make_a_sign() -> None:
    content = json.loads(MADE["gpt"].to_str())
    made = Tokenizer.from_str(json.dumps(content))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("#", "<|im_end|>")])
    found = prompt_tokenizer(made.to_str(), reserved=RESERVED["gpt"], source="here")
    for prompt in ("＜|im_end|＞", "#"):
        ids = found.encode(prompt)
        assert not found.special.intersection(ids)
        assert found.decode(ids) == "<|im_end|>"


def test_an_unknown_sign_whose_id_is_taken() -> None:
    (unknown,) = ids_of(MADE["unigram"], ["<unk>"])
    assert unknown in PROMPTS["unigram"].encode("π")
    taken = prompt_tokenizer(MADE["unigram"].to_str(), reserved=[unknown], source="here")
    assert taken.encode("a red heart") == PROMPTS["unigram"].encode("a red heart")
    with pytest.raises(ArraError, match=rf"prompt '\\u03c0': .* the special token {unknown}; reword it"):
        taken.encode("π")


def test_an_unknown_sign_without_an_id() -> None:
    lacking = prompt_tokenizer(changed("unigram", model={"unk_id": None}), reserved=[], source="here")
    assert lacking.encode("a red heart") == PROMPTS["unigram"].encode("a red heart")
    with pytest.raises(ArraError, match=r"prompt '\\u03c0': Encountered an unknown token .*; reword it"):
        lacking.encode("π")


def test_runs_of_blanks_are_text() -> None:
    """Gemma's, which are added tokens and entries of the vocabulary too."""
    content = json.loads(MADE["llama"].to_str())
    content["model"]["vocab"]["▁▁"] = blanks = len(content["model"]["vocab"])
    content["model"]["merges"].append(["▁", "▁"])
    content["added_tokens"].append({**ADDED, "id": blanks, "content": "▁▁", "special": False})
    content |= {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": None}
    found = prompt_tokenizer(json.dumps(content), reserved=[], source="here")
    assert blanks in found.encode("a  b")
    assert found.decode(found.encode("a  b")) == "a  b"


@pytest.mark.parametrize("kind", KINDS)
def test_letters_cannot_be_reserved(kind: str) -> None:
    (letter,) = ids_of(MADE[kind], ["a"])
    with pytest.raises(ArraError, match=f"here: the reserved id {letter} is 'a', which text needs"):
        prompt_tokenizer(MADE[kind].to_str(), reserved=[letter], source="here")


WORD_PIECE = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str()
ADDED = {"id": 5, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
FAULTS = {
    "not JSON": ["", "{", "\x00", "[" * 10_000, '{"model": 1, "model": 2}', "1" * 10_000],
    "holds a": ["[]", "null", "3"],
    "not a tokenizer": [
        "{}",
        '{"model": {}}',
        '{"version": "1.0"}',
        changed("gpt", model={"merges": [["no", "such"]]}),
    ],
    "a WordPiece tokenizer; expected BPE or Unigram": [WORD_PIECE],
    "marks what continues a word": [changed("llama", model={"continuing_subword_prefix": "a b c"})],
    "'<x>' is not token 5": [changed("llama", added_tokens=[{**ADDED, "special": True}])],
    "two tokens have the same id": [changed("llama", model={"vocab": {"a": 0, "b": 0, "<unk>": 1}, "merges": []})],
}


@pytest.mark.parametrize(("fault", "text"), [(fault, text) for fault, texts in FAULTS.items() for text in texts])
def test_files_that_are_no_tokenizers(fault: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ArraError, match=rf"tokenizer\.json: .*{fault}") as caught:
        load_prompt_tokenizer(path, reserved=[])
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe")
    for name in ("none.json", "latin.json", ""):
        with pytest.raises(ArraError, match=r"cannot be read .*; expected a tokenizer\.json"):
            load_prompt_tokenizer(tmp_path / name, reserved=[])


def test_it_travels_to_workers() -> None:
    import pickle

    again: PromptTokenizer = pickle.loads(pickle.dumps(PROMPTS["gpt"]))
    assert again.encode("".join(NAMES)) == PROMPTS["gpt"].encode("".join(NAMES))
