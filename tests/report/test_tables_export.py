"""What is exported is read back as it was: every number in CSV, every text in Markdown and LaTeX."""

import csv
import io
import re

import pytest

from arra.evaluate.verdicts import TableResult
from arra.report.markup import csv_text, latex_text, markdown_text
from arra.report.tables_export import CSV_COLUMNS, tables_csv, tables_latex, tables_markdown
from tests.report.toy_tables import EVIL, JUDGED, row, table

UNTEX = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\textquotedbl{}": '"', r"\textminus{}": "−", r"\{": "{", r"\}": "}",
    r"\$": "$", r"\&": "&", r"\#": "#", r"\_": "_", r"\%": "%", "{[}": "[", "{]}": "]", "{*}": "*",
}  # fmt: skip


def untex(text: str) -> str:
    return re.sub("|".join(map(re.escape, UNTEX)), lambda found: UNTEX[found.group()], text)


def unmark(text: str) -> str:
    return re.sub(r"\\([\\`*_{}\[\]<>|~#$])", r"\1", text).replace("&amp;", "&")


def lines_of(tables: list[TableResult]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(tables_csv(tables))))


def test_csv_has_every_number_exactly() -> None:
    lines = lines_of([table()])
    for one in table().rows:
        own = [line for line in lines if line["row"] == one.name]
        for cell, line in zip(one.cells, own, strict=False):
            assert (line["column"], line["metric"]) == (cell.column or "", cell.measure.metric)
            assert float(line["ours"]) == cell.ours.value
            assert float(line["ours_low"]) == cell.ours.low
            assert float(line["ours_seed_error"]) == cell.ours.seed_error
            assert line["ours_picture_error"] == ""
            assert line["difference"] == ("" if cell.difference is None else repr(cell.difference.value))
            assert line["effect_verdict"] == ("" if cell.effect is None else cell.effect.verdict)
            assert line["p_corrected"] == ("" if cell.p_corrected is None else "0.0123")
        for column, value in one.expect.items():
            assert {float(line["paper"]) for line in own if line["column"] == column} == {value}
    assert [line["label"] for line in lines if line["external"] == "True"] == [EVIL]


def test_csv_has_a_line_for_what_nothing_stands_for_and_for_what_is_missing() -> None:
    lines = lines_of([table(), table(recipe="empty", rows=(row("alone", missing="not trained"),))])
    ours = [line for line in lines if line["row"] == "aligned"]
    assert [line["paper"] for line in ours if line["metric"] == ""] == ["0.4"]  # MS-SSIM
    (alone,) = [line for line in lines if line["recipe"] == "empty"]
    assert (alone["missing"], alone["paper"], alone["seeds"]) == ("not trained", "", "0 1")
    assert all(len(line) == len(CSV_COLUMNS) and None not in line for line in lines)


def test_csv_text_keeps_line_breaks_quotes_and_digits() -> None:
    text = csv_text(("a", "b"), [('x"\n,y', 0.1 + 0.2), (None, 1)])
    assert list(csv.reader(io.StringIO(text))) == [["a", "b"], ['x"\n,y', "0.30000000000000004"], ["", "1"]]


def test_markdown_is_read_back() -> None:
    text = tables_markdown([table()])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [
        [unmark(one) for one in re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))] for line in lines
    ]
    assert {len(row) for row in cells} == {7}
    assert [one.partition("<br>")[0] for one in (row[0] for row in cells)] == [
        "row", "---", "**ARRA**", "plain", "<REP>", "later", "**Others**", EVIL
    ]  # fmt: skip
    found = {row[0].partition("<br>")[0]: row for row in cells}
    assert found["<REP>"][1:3] == [
        "4.85<br>−0.35", "40.0 [39.7, 40.3]<br>−2.0 [−2.5, −1.5]<br>✓ reproduced: better, p = 0.012"
    ]  # fmt: skip
    assert found[EVIL][1:] == ["9.10", "", "", "", "", ""]
    assert "- It says so twice." in text


def test_latex_is_read_back() -> None:
    text = tables_latex([table()])
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [line.removesuffix(r" \\") for line in body.splitlines() if " & " in line]
    cells = [[untex(one) for one in line.split(" & ")] for line in rows]
    assert [row[0] for row in cells] == ["plain", "<REP>", "later", EVIL]
    assert cells[1][1] == "4.85"
    stack = r"\shortstack[r]{40.0 [39.7, 40.3] \\ −2.0 [−2.5, −1.5] \\ \(\surd\) reproduced}"
    assert cells[1][2] == stack
    assert [len(row) for row in cells] == [7] * 4
    assert r"\multicolumn{3}{c}{FID} & \multicolumn{1}{c}{MS-SSIM} & \multicolumn{2}{c}{CLIP-Score} \\" in text
    assert r"\cmidrule(lr){2-4}\cmidrule(lr){5-5}\cmidrule(lr){6-7}" in text
    for opened in ("table", "tabular"):
        assert text.count(rf"\begin{{{opened}}}") == text.count(rf"\end{{{opened}}}") == 1


@pytest.mark.parametrize("text", [EVIL, "a\nb | c", "~^#*[x]", JUDGED.metric, "&amp; \\_"])
def test_text_survives_as_one_plain_line(text: str) -> None:
    told = " ".join(text.split())
    assert untex(latex_text(text)) == told
    assert not re.search(r"(?<!\\)[&%$#_^~]", latex_text(text).replace(r"\(", "").replace(r"\)", ""))
    assert not re.search(r"(?<!\{)[\[\]*]", latex_text(text))  # after \\ they would be its arguments
    assert unmark(markdown_text(text)) == told.replace("&amp;", "&amp;amp;").replace("&amp;amp;", "&amp;")
    assert not re.search(r"(?<!\\)[|<>`]", markdown_text(text))
