"""Measurements of several runs as Markdown, LaTeX and CSV, beside the report's page.

Place in the pipeline: `report/page.py` writes them with the page, from the tables that it shows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from arra.evaluate.compare import Difference, SeedDifference
from arra.report.markup import LATEX_PREAMBLE, csv_text, latex_row, latex_text, markdown_row, markdown_text

CSV_COLUMNS = (
    "baseline_label", "candidate_label", "metric", "split", "cfg_scale", "reference", "space", "better", "unit",
    "num_images", "baseline", "candidate", "difference", "low", "high", "interval_over", "verdict", "seed",
)  # fmt: skip
"""Of `comparisons_csv`; `seed` is empty for means over several seeds, else their number in order."""

Judged = Difference | SeedDifference
View = Mapping[str, Any]
"""A table as the page's template has it."""


def comparisons_markdown(views: Iterable[View], *, title: str) -> str:
    """The page's measurement tables as Markdown."""
    lines = [f"# {markdown_text(title)}", ""]
    for view in views:
        heads = ["measure", *map(markdown_text, view["labels"]), "difference", f"{markdown_text(view['candidate'])} is"]
        lines += [f"## {markdown_text(_heading(view))}", ""]
        for section in view["sections"]:
            lines += [f"{markdown_text(section['split'].capitalize())} captions:", "", markdown_row(heads)]
            lines += [markdown_row(["---", *["---:"] * (len(heads) - 2), "---"])]
            lines += [markdown_row(map(markdown_text, _cells(row))) for row in section["rows"]]
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def comparisons_latex(views: Iterable[View]) -> str:
    """The same as LaTeX floats; they need the packages that the first lines name, and no other."""
    return LATEX_PREAMBLE + "\n".join("\n".join(_latex_table(view)) + "\n" for view in views)


def comparisons_csv(comparisons: Iterable[tuple[str, str, Sequence[Judged]]]) -> str:
    """All numbers of (baseline, candidate, what was judged): a line for each, and one for each seed of a mean."""
    return csv_text(CSV_COLUMNS, (line for each in comparisons for one in each[2] for line in _csv_lines(each, one)))


def _heading(view: View) -> str:
    return f"{view['candidate']} against {view['baseline']}"


def _cells(row: View) -> Iterator[str]:
    """Measure, value with interval of every label, difference with interval, verdict."""
    told = [row["aim"], row["guidance"], row["unit"]]
    yield ", ".join([row["name"], *(text for text in told if text)])
    for cell in row["cells"]:
        yield cell["value"] + (f" [{cell['interval']}]" if cell["interval"] else "")
    yield f"{row['difference']} [{row['interval']}]"
    yield row["verdict"] + (f" ({row['over_seeds']})" if row["over_seeds"] else "")


def _latex_table(view: View) -> Iterator[str]:
    heads = ["", *view["labels"], "difference", f"{view['candidate']} is"]
    yield r"\begin{table}"
    yield r"\centering\small"
    yield rf"\caption{{{latex_text(_heading(view))}: means and 95 \% intervals.}}"
    yield rf"\begin{{tabular}}{{l{'r' * (len(heads) - 2)}l}}"
    yield r"\toprule"
    yield latex_row(map(latex_text, heads))
    for section in view["sections"]:
        yield r"\midrule"
        yield rf"\multicolumn{{{len(heads)}}}{{l}}{{\textit{{{latex_text(section['split'])}}}}} \\"
        for row in section["rows"]:
            yield latex_row(map(latex_text, _cells(row)))
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _csv_lines(labels: tuple[str, str, Sequence[Judged]], one: Judged) -> Iterator[list[Any]]:
    seeds = one.per_seed if isinstance(one, SeedDifference) else ()
    over = "pictures" if isinstance(one, Difference) else "seeds"
    yield [*labels[:2], *_csv_values(one), over if one.low is not None else None, one.verdict, None]
    for number, each in enumerate(seeds):
        yield [*labels[:2], *_csv_values(each), "pictures", each.verdict, number]


def _csv_values(one: Judged) -> list[Any]:
    return [
        one.metric,
        one.split,
        one.cfg_scale,
        one.reference,
        one.space,
        one.better,
        one.unit,
        one.num_images,
        one.baseline,
        one.candidate,
        one.difference,
        one.low,
        one.high,
    ]
