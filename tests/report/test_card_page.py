"""The pages of a card and of two: what must stand beside a number stands there, and no text is trusted."""

import dataclasses
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from arra.evaluate.card import ASKED, CLASS_BALANCE, WARNINGS, Card, Result
from arra.evaluate.compare import SMALLEST_P, Difference
from arra.report.card_page import TELLING, Nearest, card_page, headline_rows, interval_text, plain, value_text
from arra.report.comparison_page import comparison_page, differing_facts, p_text, tally
from arra.report.measure_words import MEASURES, measure_name

EVIL = "<script>alert('x')</script> & <img src=https://example.org/x.png>"


class Page(HTMLParser):
    """Start tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html.partition("</style>")[2])
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += " " + data


def result(metric: str, space: str | None, value: float, **changes: Any) -> Result:
    fields: dict[str, Any] = {"better": "lower", "unit": "feature units", "num_images": 1000, "split": "test"}
    fields |= {"low": value * 0.9, "high": value * 1.1}
    return Result(metric=metric, space=space, value=value, **{**fields, **changes})


def card(name: str = "sets/a", /, **about: Any) -> Card:
    rows = (
        result("clip_score", "biomedclip", 0.4512, better="higher", unit="cosine", is_teachers=True),
        result("fd", "rad-dino", 41.5),
        result("kid_x1000", "rad-dino", 3.21),
        result("recall", "rad-dino", 0.625, better="higher", unit="fraction", of="reference"),
        result("ms_ssim", None, 0.3141, better="higher", unit="similarity", note="with the real picture"),
    )
    protocol = {"protocol": "mimic-cxr", "reference_sha256": "abc", "model_sha256": name}
    return Card(run=name, protocol=protocol, results=rows, about={ASKED: None, **about})


def test_numbers_intervals_marks_and_facts_are_shown() -> None:
    known: dict[str, Any] = {CLASS_BALANCE: {"a": 5, "b": 5}, WARNINGS: ["JPEG files"]}
    told = card(cfg_scale=2.0, sampling={"top_k": 0}, **known)
    page = Page(card_page(told, title="Set A"))
    for words in (
        *("41.50", "37.35 to 45.65", "0.4512", "62.5 %", "0.3141", "with the real picture", "JPEG files"),
        *("biased upwards: 1,000 pictures, under 5,000", "the teacher's own space", "are biased upwards"),
        *("mimic-cxr", "abc", "cfg scale 2", "top k 0", "2 classes, 5 pictures each"),
    ):
        assert words in page.text, words


def test_pages_load_nothing_run_nothing_and_trust_no_text() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    evil = dataclasses.replace(card(EVIL), protocol={"protocol": EVIL}, about={EVIL: EVIL, WARNINGS: [EVIL]})
    pages = [
        card_page(
            evil,
            title=EVIL,
            unpicked=[(EVIL, picture)],
            nearest=[Nearest(picture, picture, EVIL)],
        ),
        comparison_page(evil, card(), [difference(space=EVIL, marks=(EVIL,))], title=EVIL),
    ]
    for html in pages:
        page = Page(html)
        assert "alert('x')" in page.text
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
        assert all(values["src"].startswith("data:image/png") for tag, values in page.tags if tag == "img")
        assert "default-src 'none'" in html
    assert sum(tag == "img" for tag, _ in Page(pages[0]).tags) == 3


def test_headlines_begin_outside_the_teachers_space() -> None:
    assert [row.metric for row in headline_rows(card())] == ["fd", "kid_x1000", "clip_score", "ms_ssim"]
    swapped = tuple(dataclasses.replace(row, is_teachers=row.space == "rad-dino") for row in card().results)
    assert headline_rows(dataclasses.replace(card(), results=swapped))[0].metric == "clip_score"
    teachers = dataclasses.replace(card(), results=card().results[:1])
    assert [row.metric for row in headline_rows(teachers)] == ["clip_score"]
    assert (
        "Every space of this card (biomedclip) is the alignment teacher's own"
        in Page(card_page(teachers, title="x")).text
    )


def test_a_biased_distance_has_the_kernel_distance_of_its_own_space_beside_it() -> None:
    other = result("kid_x1000", "inception", 9.0)
    found = headline_rows(dataclasses.replace(card(), results=(other, *card().results)))
    assert [(row.metric, row.space) for row in found[:2]] == [("fd", "rad-dino"), ("kid_x1000", "rad-dino")]


def test_every_telling_measure_has_words() -> None:
    assert set(TELLING) <= set(MEASURES)
    assert measure_name("findings_auroc.Pleural_Effusion") == "Findings, AUROC: Pleural Effusion"
    assert measure_name("shininess_at_3") == "shininess at 3"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.45123, "cosine", "0.4512"),
        (0.4512, "fraction", "45.1 %"),
        (2.18, "feature units", "2.180"),
        (-1234.5, "feature units", "−1,234"),
        (-0.00001, "x1000", "0.000"),
    ],
)
def test_numbers_have_the_digits_of_their_unit(value: float, unit: str, text: str) -> None:
    assert value_text(value, unit=unit) == text


def test_facts_read_plainly() -> None:
    assert interval_text(None, 1.0, unit="", scale=1.0) == ""
    assert plain([1, 2]) == "1, 2"
    assert plain({"top_k": 0, "is_new": True}) == "top k 0, is new yes"
    assert plain(list(range(50))).endswith("11 ... 50 in all")
    assert (plain(None), plain([]), plain(2.50)) == ("not known", "none", "2.5")


def difference(**changes: Any) -> Difference:
    fields: dict[str, Any] = {
        "metric": "fid", "split": "test", "cfg_scale": None, "reference": None, "baseline": 12.0, "candidate": 10.0,
        "difference": -2.0, "low": -3.0, "high": -1.0, "better": "lower", "verdict": "better", "unit": "feature units",
        "num_images": 1000, "space": "inception", "p": 0.001, "p_corrected": 0.002,
    }  # fmt: skip
    return Difference(**{**fields, **changes})


def test_a_verdict_that_correction_undoes_stands_in_brackets() -> None:
    rows = [difference(), difference(metric="fd", space="rad-dino", p=0.03, p_corrected=0.09, is_paired=False)]
    text = Page(comparison_page(card("a"), card("b"), rows, title="a and b")).text
    assert "corrected for their number, B is better in 1 and worse in 0; 1 shows no clear difference" in text
    assert text.count("(better)") == 1
    assert "different pictures, drawn apart" in text
    assert "−2.00" in text
    assert "0.030" in text


def test_better_and_worse_are_counted_by_direction() -> None:
    rows = [
        difference(difference=2.0),
        difference(better="higher", difference=2.0),
        difference(better="higher", difference=-2.0),
        difference(p_corrected=0.2),
    ]
    assert tally(rows) == (
        "Of 4 measures, corrected for their number, B is better in 1 and worse in 2; 1 shows no clear difference."
    )


def test_facts_that_differ_are_listed_and_others_are_not() -> None:
    assert differing_facts(card("a", cfg_scale=1.0, seed=0), card("b", cfg_scale=2.0, seed=0)) == [
        ("model sha256", "a", "b"),
        ("cfg scale", "1", "2"),
    ]


@pytest.mark.parametrize(
    ("p", "text"), [(1.0, "1.00"), (0.042, "0.042"), (0.00042, "0.00042"), (3e-5, "3e-05"), (SMALLEST_P, "< 1e-06")]
)
def test_p_is_never_zero(p: float, text: str) -> None:
    assert p_text(p) == text
