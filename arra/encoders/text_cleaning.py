"""What becomes of a caption before a text encoder sees it: cut to its first sentence, cleaned as LlamaGen cleans.

Web captions carry addresses, prices of shops, file names and markup that no picture shows. LlamaGen's published
text-conditional models were trained on captions without them, so their prompts must be cleaned alike.
"""

import html
import re
from collections.abc import Callable
from urllib.parse import unquote_plus

from arra.errors import ArraError

MOST_PASSES = 10
FILES = r"(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
DOMAINS = r"(?:com|co|ru|net|org|edu|gov|it)"
DASHES = "\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
DASHES += "\uff0d"
IDEOGRAPHS = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u4dff\u4e00-\u9fff"
"""Strokes, small kana, enclosed and compatible forms, hexagrams, and the Chinese characters themselves."""
ORNAMENTS = "#®•©™&@·º½¾¿¡§~()\\[\\]{}|\\\\/*"

# Each rule is (what is found, what takes its place), used in this order on lower-case text whose white space is single
# blanks. No rule may look twice at a long run of characters: captions may be hostile. Hence the anchors `(?<!...)` at
# the beginnings of runs, and `++`, which gives nothing back.
MARKUP = [
    (r"<person>", "person"),
    (r"(?<![\w.\-])https?:[^\s]\S*+", ""),
    (rf"(?<![\w.\-])[a-z0-9][a-z0-9.\-]*\.{DOMAINS}[\w/\-]*+(?:\.[a-z]{{2}}\b[\w/\-]*+)?(?:[?#]\S*+)?(?!@)", ""),
    (r"<!--.*?(?:-->|$)", ""),
    (r"<(script|style)\b[^<>]*+>.*?(?:</\1\s*+>|$)", ""),
    (r"</?[a-z!?][^<>]*+>", ""),
]
SIGNS = [
    (r"@\w++", ""),
    (f"[{IDEOGRAPHS}]++", ""),
    (f"[-{DASHES}]++", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp;?", ""),
]
IDENTIFIERS = [
    (r"(?<!\d)\d{1,3}(?:\.\d{1,3}){3}", " "),
    (r"\d:\d\d $", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}+\b", ""),
    (r"\b\d{6,}+\b", ""),
    (rf"(?<!\S)\S+\.{FILES}", ""),
]
PUNCTUATION = [
    (r"[\"']{2,}+", '"'),
    (r"\.{2,}+", " "),
    (f"[{ORNAMENTS}]++", " "),
    (r"\s++\.\s++", " "),
]
SHOP_TALK = [
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-z]++\d++[a-z]++\b", ""),
    (r"\b\d++[a-z]++\d++\b", ""),
    (r"(?:worldwide )?(?:free )?shipping", ""),
    (r"(?:free )?download(?: free)?", ""),
    (r"\bclick (?:for|on) \w++", ""),
    (rf"\b{FILES}(?: images?)?", ""),
    (r"\bpage \d++\b", ""),
    (r"\b\d*+[a-z]++\d++[a-z]++\d++[a-z\d]*+\b", " "),
    (r"\b\d++(?:\.\d*+)?[xх×]\d++(?:\.\d++)?\b", ""),
]
SPACING = [
    (r"\b : ", ": "),
    (r"(\D[,./])\b", r"\1 "),
]
EDGES = [
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S++$", ""),
]
Rules = list[tuple[re.Pattern[str], str]]


def _compiled(*groups: list[tuple[str, str]]) -> Rules:
    return [(re.compile(found, re.DOTALL), instead) for group in groups for found, instead in group]


BEFORE_ENTITIES, AFTER_MARKUP = _compiled(MARKUP), _compiled(SIGNS, IDENTIFIERS, PUNCTUATION)
AFTER_REPAIR, AT_THE_END = _compiled(SHOP_TALK, SPACING), _compiled(EDGES)
JOINT = re.compile("[-_]")


def caption_text(caption: str, *, clean: bool, short: bool = False) -> str:
    """The text that a text encoder is given for a caption."""
    text = first_sentence(caption) if short else caption
    return clean_caption(text) if clean else text


def first_sentence(caption: str) -> str:
    """The caption up to its first full stop, which is left out (LlamaGen's `--trunc-caption`)."""
    return caption.partition(".")[0]


def clean_caption(caption: str) -> str:
    """A caption in lower case without what no picture shows, in single blanks.

    - Gone: web addresses, HTML (its entities are decoded), @names, Chinese characters, IP addresses, `#123`, numbers of
      six digits and more, article numbers (`jc6640vc`), file names and their endings, sizes (`1920x1080`), `page 3`,
      "free shipping", "free download", "click on ..."; a pair of quotes around all of it.
    - Made one: kinds of dashes, of double and of single quotes; runs of dots, quotes and ornaments (`*#|~[]{}` ...).
    - `words-joined_like-this_here` (more than three joints) become words; broken encodings are mended (ftfy); a blank
      follows a comma or a full stop.

    This is done until nothing changes any more (ten times at most), so a clean caption stays as it is. LlamaGen does it
    twice, which is nearly always the same.

    Raises:
        ArraError: the package ftfy is not installed.
    Source: LlamaGen `language/t5.py`, after DeepFloyd IF and PixArt; rules and their order, not their code.
    """
    for _ in range(MOST_PASSES):
        before, caption = caption, _cleaned_once(caption)
        if caption == before:
            break
    return caption


def _cleaned_once(text: str) -> str:
    fix_text = _mender()
    text = _blanks(unquote_plus(text).lower())
    text = _blanks(html.unescape(_apply(BEFORE_ENTITIES, text)))
    text = _blanks(_apply(AFTER_MARKUP, text))
    if len(JOINT.findall(text)) > 3:
        text = JOINT.sub(" ", text)
    text = _blanks(html.unescape(html.unescape(fix_text(text))))
    text = _blanks(_apply(AFTER_REPAIR, text))
    return _apply(AT_THE_END, text).strip()


def _apply(rules: Rules, text: str) -> str:
    for found, instead in rules:
        text = found.sub(instead, text)
    return text


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _mender() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        raise ArraError(
            "text_encoder.clean: the package 'ftfy' is missing; pip install 'arra[text]' -c constraints.txt"
        ) from None
    mend: Callable[[str], str] = fix_text
    return mend
