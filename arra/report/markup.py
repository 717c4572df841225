"""Text for Markdown and LaTeX tables that survives whatever a recipe, a caption or a label holds.

Place in the pipeline: below the exports of this room.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence

LATEX_PREAMBLE = r"""% \usepackage[T1]{fontenc}
% \usepackage{textcomp,booktabs}
"""
"""What tables of this room need, as comments at their head."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#$])")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": r"\textminus{}", "–": "--", "…": r"\ldots{}",
    "✓": r"\(\surd\)", "✗": r"\(\times\)", "≥": r"\(\geq\)", "≤": r"\(\leq\)", "×": r"\(\times\)", "λ": r"\(\lambda\)",
    '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "*": "{*}",  # after \\ these three would be its arguments
}  # fmt: skip
_LATEX_LETTER = re.compile("|".join(map(re.escape, _LATEX)))


def markdown_text(text: str) -> str:
    """The text on one line, every letter that Markdown or HTML would take for itself made plain."""
    return _MARKDOWN.sub(r"\\\1", _one_line(text)).replace("&", "&amp;")


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a table; the cells are Markdown already."""
    return "| " + " | ".join(cells) + " |"


def latex_text(text: str) -> str:
    """The text on one line as LaTeX prints it, with nothing of it taken for a command."""
    return _LATEX_LETTER.sub(lambda found: _LATEX[found.group()], _one_line(text))


def latex_row(cells: Iterable[str]) -> str:
    """A line of a table; the cells are LaTeX already."""
    return " & ".join(cells) + r" \\"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of values, floats in the digits that give the same number again, None as nothing."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if one is None else repr(one) if isinstance(one, float) else one for one in row])
    return buffer.getvalue()


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
