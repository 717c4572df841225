"""Prompts from files, for `arra generate RUN --prompts FILE`: text, JSON lines, or a table with a column of prompts.

prompts.txt    one prompt per line
prompts.jsonl  one object per line, {"prompt": ...}
prompts.tsv    (or .csv) with a heading, of which one column is called prompt or caption, as PartiPrompts has it
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from arra.errors import ArraError

NAMES = ("prompt", "caption")
"""Columns and keys that hold prompts, in any case of letters; the first one that is there."""
KINDS = {
    ".jsonl": 'a file of JSON lines, each {"prompt": ...}',
    ".tsv": "a table with a heading and a column 'prompt' or 'caption'",
    ".csv": "a table with a heading and a column 'prompt' or 'caption'",
}
PLAIN = "a text file with one prompt per line"


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a file, in its order; what it is made of follows from its ending.

    Raises:
        ArraError: it cannot be read, holds no prompt, or one of them is empty.
    """
    kind = path.suffix.lower()
    expected = KINDS.get(kind, PLAIN)
    if kind == ".json":
        raise ArraError(f"{path}: JSON lines are read, one object each; save it as such, and call it .jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ArraError(f"{path}: cannot be read ({reason}); expected {expected}") from error
    found: Iterable[tuple[int, str]]
    if kind == ".jsonl":
        found = _json_lines(path, text)
    elif kind in KINDS:
        found = _table(path, text, delimiter="\t" if kind == ".tsv" else ",")
    else:
        found = enumerate(text.splitlines(), start=1)
    prompts = []
    for number, prompt in found:
        if not prompt.strip():
            what = "is empty" if kind not in KINDS else "has an empty prompt"
            raise ArraError(f"{path}: line {number} {what}; expected one prompt per line, remove it")
        prompts.append(prompt)
    if not prompts:
        raise ArraError(f"{path}: empty; expected {'one prompt per line' if kind not in KINDS else expected}")
    return prompts


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, str]]:
    # not `splitlines`: JSON strings may hold U+2028 and its like as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        names = {} if not isinstance(row, dict) else {str(key).casefold(): key for key in reversed(row)}
        name = next((names[name] for name in NAMES if name in names), None)
        if not isinstance(row, dict) or name is None or not isinstance(row[name], str):
            raise ArraError(f'{path}: line {number}: expected an object with a text, as {{"prompt": "a red bar"}}')
        yield number, row[name]


def _table(path: Path, text: str, *, delimiter: str) -> Iterator[tuple[int, str]]:
    # strict: a quote that is not closed would make one prompt of all lines behind it
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        heading = [name.strip().casefold() for name in next(reader, [])]
        place = next((heading.index(name) for name in NAMES if name in heading), None)
        if place is None:
            told = ", ".join(name or "''" for name in heading[:8]) or "nothing"
            raise ArraError(f"{path}: line 1: no column 'prompt' or 'caption', found {told}; name one of them so")
        for row in reader:
            if row:
                yield reader.line_num, row[place] if place < len(row) else ""
    except csv.Error as error:
        raise ArraError(f"{path}: line {reader.line_num}: {error}; mend it, or give a text file") from error
