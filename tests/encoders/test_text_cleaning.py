"""Cleaning of captions: examples of every rule, nothing left to clean, and no caption that takes for ever."""

import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.encoders import caption_text, clean_caption, first_sentence
from arra.errors import ArraError


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Red  Heart\non Fire ", "a red heart on fire"),
        ("a heart https://example.io/a?b=c&d=e on fire", "a heart on fire"),
        ("a heart www.shop.co.uk/item?id=1 on fire", "a heart on fire"),
        ("buy at foo.com, now", "buy at , now"),
        ("<p>a <b>red</b> heart</p><!-- no -->", "a red heart"),
        ("<script>alert(1)</script>a heart<style>p {}</style>", "a heart"),
        ("rock &amp; roll &lt;3 caf&eacute;", "rock roll <3 café"),
        ("i <3 you, 2 < 3", "i <3 you, 2 < 3"),
        ("<person> with a hat", "person with a hat"),
        ("a cat by @some_body1 here", "a cat by here"),
        ("cat 猫 and dog 犬㐀", "cat and dog"),
        ("ねこ and 고양이", "ねこ and 고양이"),
        ("night—time – here", "night-time - here"),
        ("“big” «cat» it’s ´s", '"big" "cat" it\'s "s'),
        ("server 192.168.100.1 room", "server room"),
        ("news #12 and #12345 but #1234", "news and but 1234"),
        ("lot 12345678 of 12345", "lot of 12345"),
        ("photo DSC_0123.JPG of a dog", "photo of a dog"),
        ("a dog png images", "a dog"),
        ('"""sold"""', "sold"),
        ("wait... what", "wait what"),
        ("***SALE*** [new] {x} (y) a|b ~", "sale new x y a b"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("this_is_it", "this_is_it"),
        ("bag jc6640 and jc6640vc and 66vc231", "bag and and"),
        ("key j2d1a2a here", "key here"),
        ("shoes, worldwide free shipping!", "shoes, !"),
        ("wallpaper free download 1920x1080", "wallpaper"),
        ("a bird click for more page 12", "a bird"),
        ("size : large,red", "size: large, red"),
        ("'quoted all over'", "quoted all over"),
        ("-- a cat:", "a cat"),
        (".gitignore", ""),
        ("a+b %21 100%", "a b ! 100%"),
        ("Ã© is mended", "ã is mended"),
        ("&#x27;tis &amp;amp; more", "tis more"),
        ("", ""),
        ("   ", ""),
        ("漢字", ""),
    ],
)
def test_examples(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "a red heart on fire",
        "a photo of a cat, sitting on a mat. it is 3.5 years old",
        "new york, ny",
        "t-shirt $5.00 for 2 people",
        "the world's best dog",
    ],
)
def test_plain_captions_stay_as_they_are(caption: str) -> None:
    assert clean_caption(caption) == caption


SNIPPETS = st.sampled_from(
    ["&amp;", "&quot;", "<b>", "</b>", "http://a.com/b", "a.com", "@x", "#123", "...", "--", "_", "'", '"', "1x2",
     "x1y", "jc66", "a.png", "page 1", ": ", " .", ",a", "%41", "+", "漢", "—", "12:30", "\\n", "½", "ÃƒÂ©",
     "free download"]
)  # fmt: skip
TEXTS = st.lists(st.one_of(SNIPPETS, st.text(max_size=8), st.sampled_from([" ", "a", "b1"])), max_size=12).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_a_clean_caption_is_clean(caption: str) -> None:
    once = clean_caption(caption)
    assert clean_caption(once) == once
    assert once == once.strip()
    assert "  " not in once
    assert once == once.lower()


@pytest.mark.parametrize(
    "caption",
    ["a", ".", " ", "a-", "1", "a1", "<a", "<!--", "'\"", "%25", "1.", "a.com", "&amp;", "@", "f.pn", "free ", "a1b1_",
     "1.1x", "<script>", "a . ", "a, b ", "#1", "(", "http:", "1" * 9 + "_", "\n", "&quot"]
)  # fmt: skip
def test_no_caption_takes_for_ever(caption: str) -> None:
    """200,000 characters of anything; a rule that looks twice at a long run would need minutes."""
    started = time.perf_counter()
    clean_caption(caption * (200_000 // len(caption)))
    assert time.perf_counter() - started < 5


def test_first_sentence() -> None:
    assert first_sentence("A cat. It sits") == "A cat"
    assert first_sentence("no full stop") == "no full stop"
    assert first_sentence(".hidden") == ""
    assert caption_text("A CAT. It sits", clean=True, short=True) == "a cat"
    assert caption_text("A CAT. It sits", clean=False) == "A CAT. It sits"


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ArraError, match=r"'ftfy' is missing; pip install 'arra\[text\]'"):
        clean_caption("x")
    assert caption_text("x", clean=False) == "x"
