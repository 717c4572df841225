"""Text files of sources, a line or a row at a time: what is not text, JSON or CSV is told with its line, never lost.

First stage of the pipeline, below the sources.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
"""Names of split folders, and the split each means."""
MAX_LINE_BYTES = 64 * 2**20
"""Longer lines are refused: such a file has no lines."""
MAX_LINE = 2**22
"""Characters of a line; longer ones are cut and refused, so that a file without line ends does not fill the memory."""


def split_name(text: str) -> str:
    """The split a data set means: aliases of validation become `validation`, others stay as they are."""
    return "validation" if SPLITS.get(text.lower()) == "validation" else text


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of each line that is not blank; a line too long comes cut, and `parse_json` refuses it.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        number, line = 1, file.readline(MAX_LINE_BYTES + 1)
        while line:
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            rest = line
            while not rest.endswith(b"\n") and rest:
                rest = file.readline(MAX_LINE_BYTES)
            number, line = number + 1, file.readline(MAX_LINE_BYTES + 1)


def parse_json(line: bytes) -> Any:
    """What a line of JSON says.

    Raises:
        ValueError: it is no JSON in UTF-8; one line that says why.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes; write one JSON object a line")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1}: {error.reason}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise ValueError(f"not JSON ({str(error)[:80]})") from error


def read_rows(
    path: Path, *, delimiter: str | None = None, quotes: bool = True
) -> Iterator[tuple[str, list[str] | ValueError]]:
    """The lines and the fields of each row that is not blank, or in place of fields the error that says what is wrong.

    Bytes that are not UTF-8 become lone surrogates.
    """
    name, end = path.name.lower(), 0
    opener: Any = gzip.open if name.endswith(".gz") else open
    options: Any = {
        "delimiter": delimiter or ("\t" if name.removesuffix(".gz").endswith(".tsv") else ","),
        "quoting": csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        "strict": True,  # else a quote left open at the end swallows the last rows into one caption
    }
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _Lines(file)
            reader = csv.reader(lines, **options)
            while True:
                start, lines.was_cut = end + 1, False
                row, end = _next_row(reader), lines.count
                if row is None:
                    return
                if lines.was_cut:
                    row = ValueError(f"a line has more than {MAX_LINE} characters")
                if row != []:
                    yield (f"line {start}" if start == end else f"lines {start} to {end}"), row
    except (OSError, EOFError, zlib.error) as error:
        yield f"line {end + 1}", ValueError(f"cannot be read from here on ({one_line(error)})")


def _next_row(reader: Iterator[list[str]]) -> list[str] | ValueError | None:
    """The next row, what is wrong with it, or nothing at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return ValueError(f"not CSV ({error}); is a quote left open?")


class _Lines:
    """Lines of a text file, those longer than `MAX_LINE` cut."""

    def __init__(self, file: TextIOWrapper) -> None:
        self._file = file
        self.count = 0
        self.was_cut = False

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE):
            rest = line
            while len(rest) == MAX_LINE and not rest.endswith(("\n", "\r")):
                self.was_cut = True
                rest = self._file.readline(MAX_LINE)
            self.count += 1
            yield line


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
