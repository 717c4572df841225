"""The page of the paper's tables says what was judged, row by row, loads nothing, and trusts no text."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from arra.evaluate.verdicts import Judged
from arra.report.table_view import blocks, cost_text, paper_text, shared_reason, tally_line
from arra.report.tables_page import tables_html
from tests.report.toy_tables import EMBEDDED, EVIL, FAMILY, JUDGED, RETRIEVAL, cell, measure, page, row, table

VOID = {"meta", "img", "br", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Start tags with their attributes, the text, and whether every tag is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html.partition("</style>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:  # head and style were cut away
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_loads_nothing_and_trusts_no_text() -> None:
    evil = table(title=EVIL, about=EVIL, notes=(EVIL,), columns={"fd": EVIL})
    rows = (*evil.rows, row(EVIL, label=EVIL, group=EVIL, note=EVIL, missing=EVIL, against=EVIL))
    html = tables_html(
        page(
            title=EVIL, command=EVIL, versions={EVIL: EVIL}, tables=(replace(evil, rows=rows),), failures=(EVIL,),
            protocol={EVIL: EVIL}, notes=(EVIL,), attribution=EVIL,
            runs=tuple(replace(run, recipe=f"a: {number}\n'{EVIL[:8]}': {number}") for number, run in
                       enumerate(page().runs)),
        )
    )  # fmt: skip
    found = Page(html)
    assert not found.open
    for tag, values in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in values.items():
            assert not name.startswith("on")
            assert name != "src" or value.startswith("data:image/")
            assert name != "href" or value == "#t0"
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert "<script" not in html


def test_rows_stand_in_the_papers_order_with_numbers_and_verdicts() -> None:
    text = Page(tables_html(page())).text
    main = text[text.index("Embedded scale") : text.index("It says so twice")]
    places = [main.index(name) for name in ("ARRA", "plain", "<REP>", "later", "Others", "another system's numbers")]
    assert places == sorted(places)
    for told in (
        "against plain 2 seeds, 600 steps, 2 min 5 s + 12 s of its teachers Layer 30 of 32.",
        "4.85 −0.35",
        "40.0 [39.7, 40.3] −2.0 [−2.5, −1.5] ✓ reproduced better, p = 0.012",
        "61.0 [60.7, 61.3] +1.0 [0.5, 1.5] ✗ not reproduced worse, p = 0.012",
        "not trained yet",
    ):
        assert told in main
    assert "70.1" not in main  # another split of a measure that is shown
    assert "unclear no difference" in text  # and stands below


def test_the_summary_counts_each_statement_once() -> None:
    assert tally_line([table()]) == (
        "3 differences of the paper: 1 reproduced, 0 not reproduced, 1 unclear, 1 not comparable; 6 numbers of the "
        "paper: 0 reproduced, 0 not reproduced, 0 unclear, 6 not comparable."
    )
    assert tally_line([table(rows=table().rows[2:])]) == ""
    assert "nothing of ours yet" in Page(tables_html(page(tables=(table(rows=table().rows[2:]),)))).text


def test_a_reason_that_all_numbers_share_is_told_once() -> None:
    assert shared_reason(table()) == EMBEDDED
    assert Page(tables_html(page())).text.count(f"Numbers are not comparable: {EMBEDDED}.") == 1
    assert all(
        mark.statement == "effect" for block in blocks(table()) for cells in block.cells for one in cells
        for ours in one.ours if ours for mark in ours.marks
    )  # fmt: skip
    plain, *others = table().rows
    first = replace(plain.cells[0], number=Judged(verdict="reproduced", why="5.2 lies in [5, 6]"))
    mixed = table(rows=(replace(plain, cells=(first, *plain.cells[1:])), *others))
    assert shared_reason(mixed) is None
    text = Page(tables_html(page(tables=(mixed,)))).text
    assert "✓ number reproduced 5.2 lies in [5, 6]" in text
    assert f"– number not comparable {EMBEDDED}" in text


def test_blocks_begin_where_other_measures_do() -> None:
    (one,) = blocks(table())
    assert [(column.key, len(column.measures)) for column in one.columns] == [
        ("fd", 2), ("ms_ssim", 0), ("clip_score", 1)
    ]  # fmt: skip
    assert [each.metric for each in one.columns[0].measures] == [JUDGED.metric, FAMILY.metric]
    elsewhere = row("shapes", group="Shapes", cells=(cell(measure("accuracy.all"), 0.9, column="clip_score"),))
    again = row("again", group="Again", cells=(cell(RETRIEVAL, 0.5, column="clip_score"),))
    found = blocks(table(rows=(table().rows[3], *table().rows, elsewhere, again)))
    assert [[each.name for each in block.rows] for block in found] == [
        ["other", "plain", "aligned", "later", "other"], ["shapes"], ["again"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "sign", "text"),
    [("fd", 5.2, False, "5.20"), ("fd", -0.35, True, "−0.35"), ("ms_ssim", 0.4, False, "0.40"), ("fd", None, True, "")],
)
def test_the_papers_numbers_keep_the_digits_of_their_column(
    column: str, value: float | None, sign: bool, text: str
) -> None:
    assert paper_text(table(), column, value, sign=sign) == text


def test_costs_are_said_as_far_as_they_are_known() -> None:
    assert cost_text(row("a", seeds=(0,), train_seconds=None)) == "1 seed, 600 steps"
    assert cost_text(row("a", seeds=(), steps=None, train_seconds=None)) == ""


def test_bars_favour_the_row_to_the_right_on_one_scale() -> None:
    html = tables_html(page())
    bars = [
        (values["aria-label"], float(at["cx"]) - 150)
        for (tag, values), (_, _), (_, _), (kind, at) in zip(
            Page(html).tags, Page(html).tags[1:], Page(html).tags[2:], Page(html).tags[3:], strict=False
        )
        if tag == "svg" and values.get("class") == "bar" and kind == "circle"
    ]
    found = {label.partition(" ")[0]: place for label, place in bars}
    assert found["−2.0"] > 0 > found["+1.0"]  # lower is better
    assert abs(found["−2.0"]) == pytest.approx(150 * 2.0 / (2.5 * 1.08), abs=0.1)


def test_the_papers_difference_is_drawn_where_its_unit_is_ours() -> None:
    assert 'class="paper" cx' not in tables_html(page())
    assert 'class="paper" cx' in tables_html(page(tables=(table(scale="full"),)))


def test_curves_pictures_and_settings_are_of_the_rows() -> None:
    found = Page(tables_html(page()))
    labels = [values["aria-label"] for tag, values in found.tags if "aria-label" in values and tag == "svg"]
    assert [label for label in labels if "by" in label] == [
        "Validation NLL by step, by step", "Validation NLL by time, seconds, by seconds",
        "Fréchet distance by step, by step", "Fréchet distance by time, seconds, by seconds",
        "Retrieval, top ten by step, by step", "Retrieval, top ten by time, seconds, by seconds",
    ]  # fmt: skip
    assert "align null …" in found.text  # one has no alignment, the other a whole section
    assert "align.layer" not in found.text
    assert "train.seed" not in found.text
    assert [values["alt"] for tag, values in found.tags if tag == "img"] == [
        f"tokenizer: {EVIL}",
        f"ARRA <REP>: {EVIL}",
    ]


def test_many_runs_stay_small() -> None:
    long = tuple({"kind": "validation", "step": step, "seconds": step, "ntp_loss": 2.0} for step in range(0, 5000, 10))
    runs = tuple(replace(run, seed=seed, metrics=long) for run in page().runs for seed in range(10))
    assert len(tables_html(page(runs=runs))) < 100_000
