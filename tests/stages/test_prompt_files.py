"""Prompts from files: text, JSON lines, tables."""

from pathlib import Path

import pytest

from arra.errors import ArraError
from arra.stages.wishes import read_prompts


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "red circle\r\nblue bar\n", ["red circle", "blue bar"]),
        ("a", '{"prompt": "as it is"}\n', ['{"prompt": "as it is"}']),
        (
            "a.jsonl",
            '{"prompt": "red\\ncircle", "id": 3}\n\n{"Caption": "blue\u2028bar"}',
            ["red\ncircle", "blue\u2028bar"],
        ),
        ("a.JSONL", '{"caption": "other", "prompt": "this"}\n', ["this"]),
        ("parti.tsv", 'Prompt\tCategory\tNote\nbond\tAbstract\t\na "cat", red\tx\ty\n', ["bond", 'a "cat", red']),
        ("a.csv", 'id,caption\n1,"a red, round ""O"""\n\n2,"two\nlines"\n', ['a red, round "O"', "two\nlines"]),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str, prompts: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_prompts(["first"], path) == ["first", *prompts]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"red\n\nblue\n", "line 2 is empty; expected one prompt per line, remove it"),
        ("a.txt", b"", "empty; expected one prompt per line"),
        ("a.txt", b"\xff\xfe", "cannot be read (not UTF-8); expected a text file with one prompt per line"),
        ("a.jsonl", b"", 'empty; expected a file of JSON lines, each {"prompt": ...}'),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]', 'line 2: expected an object with a text, as {"prompt": "a red bar"}'),
        ("a.jsonl", b'{"prompt": 3}', 'line 1: expected an object with a text, as {"prompt": "a red bar"}'),
        ("a.jsonl", b'{"prompt": " "}', "line 1 has an empty prompt; expected one prompt per line, remove it"),
        ("a.jsonl", b'{"prompt"', 'line 1: expected an object with a text, as {"prompt": "a red bar"}'),
        (
            "a.tsv",
            b"Text\tNote\na\tb\n",
            "line 1: no column 'prompt' or 'caption', found text, note; name one of them so",
        ),
        ("a.tsv", b"note\tPrompt\na\tb\nc\n", "line 3 has an empty prompt; expected one prompt per line, remove it"),
        ("a.csv", b"prompt\n", "empty; expected a table with a heading and a column 'prompt' or 'caption'"),
        ("a.csv", b'prompt,note\n"red,x\nblue,y\n', "line 3: unexpected end of data; mend it, or give a text file"),
        ("a.json", b'["red"]', "JSON lines are read, one object each; save it as such, and call it .jsonl"),
        ("a.csv", b"", "line 1: no column 'prompt' or 'caption', found nothing; name one of them so"),
    ],
)
def test_prompt_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ArraError) as caught:
        read_prompts([], path)
    assert str(caught.value) == f"{path}: {message}"
