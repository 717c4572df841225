"""A user's folder of captioned pictures: read whole, or refused with the line that is wrong."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from arra.data.folder import MIN_RECORDS, load_folder
from arra.data.records import RecordSet
from arra.errors import ArraError

Row = dict[str, Any]


def caption(number: int) -> str:
    return f"picture number {number}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty tiny pictures, without any text yet."""
    path = tmp_path / "mine"
    path.mkdir()
    for number in range(60):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path / f"{number:02}.png")
    return path


def rows(count: int = 60) -> list[Row]:
    return [{"file_name": f"{number:02}.png", "text": caption(number)} for number in range(count)]


def write_jsonl(folder: Path, table: list[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def write_csv(folder: Path, table: list[Row]) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def write_txt(folder: Path, table: list[Row]) -> None:
    for row in table:
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")


def fault(folder: Path) -> str:
    with pytest.raises(ArraError) as caught:
        load_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(number: int, **fields: Any) -> list[Row]:
    table = rows()
    table[number] = {**table[number], **fields}
    return table


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_txt])
def test_three_layouts_say_the_same(folder: Path, write: Callable[[Path, list[Row]], None]) -> None:
    write(folder, rows())
    found = load_folder(folder)
    assert found.name == "mine"
    assert [record.id for record in found.records] == [f"{number:02}.png" for number in range(60)]
    assert [record.prompt for record in found.records] == [caption(number) for number in range(60)]
    assert set(found.splits()) == {"train", "validation", "heldout"}


def test_all_layouts_give_the_same_identity(folder: Path) -> None:
    hashes = set()
    for write in (write_txt, write_jsonl):  # metadata goes before captions in files of their own
        write(folder, rows())
        hashes.add(load_folder(folder).content_hash())
    (folder / "metadata.jsonl").unlink()
    write_csv(folder, rows())
    hashes.add(load_folder(folder).content_hash())
    assert len(hashes) == 1


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_text_columns(folder: Path, column: str) -> None:
    write_jsonl(folder, [{"file_name": row["file_name"], column: row["text"]} for row in rows()])
    assert load_folder(folder).records[3].prompt == caption(3)


def test_named_splits(folder: Path) -> None:
    names = ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
    write_csv(folder, [{**row, "split": name} for row, name in zip(rows(), names, strict=True)])
    assert load_folder(folder).splits() == {"train": 40, "validation": 10, "test": 10}
    write_csv(folder, [{**row, "split": ""} for row in rows()])
    assert load_folder(folder).splits() == {"train": 54, "validation": 3, "heldout": 3}


def split_of(found: RecordSet) -> dict[str, str]:
    return {record.prompt: record.split for record in found.records}


def test_splits_do_not_depend_on_order(folder: Path) -> None:
    write_jsonl(folder, rows())
    before = split_of(load_folder(folder))
    table = rows()
    random.Random(0).shuffle(table)
    write_jsonl(folder, table)
    assert split_of(load_folder(folder)) == before


def test_equal_captions_never_straddle_a_split(folder: Path) -> None:
    texts = ["a cat", "A  Cat ", "a\tcat", "A CAT"]
    table = [{**row, "text": texts[n % 4] if n % 2 else row["text"]} for n, row in enumerate(rows())]
    write_jsonl(folder, table)
    splits = {r.split for r in load_folder(folder).records if r.prompt.lower() == "a cat"}
    assert len(splits) == 1


@pytest.mark.parametrize("count", [MIN_RECORDS, 47, 60])
def test_small_folders_have_all_splits(folder: Path, count: int) -> None:
    """Whatever the captions' hashes: a user with few pictures is not refused by chance."""
    for salt in range(20):
        write_jsonl(folder, [{**row, "text": f"{row['text']} {salt}"} for row in rows(count)])
        splits = load_folder(folder).splits()
        assert splits["validation"] == splits["heldout"] == (2 if count <= 40 else 3)


def test_other_line_separators_inside_text(folder: Path) -> None:
    """U+2028 and its like end no line of JSON, and a byte order mark is no part of the first."""
    text = "a\u2028red\x85heart"
    write_jsonl(folder, changed(5, text=text))
    path = folder / "metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    assert load_folder(folder).records[5].prompt == "a red heart"


def test_csv_with_quoted_commas_and_lines(folder: Path) -> None:
    write_csv(folder, changed(5, text='a red, round\nball, "new"'))
    assert load_folder(folder).records[5].prompt == 'a red, round ball, "new"'


def test_csv_with_unquoted_commas_is_not_cut_short(folder: Path) -> None:
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows())]
    lines[7] = "06.png,a red, round ball"
    (folder / "metadata.csv").write_text("\n".join(lines))
    assert "metadata.csv: line 8: more fields than the first line names; put quotes" in fault(folder)


def test_csv_line_numbers_count_lines_not_rows(folder: Path) -> None:
    table = changed(5, text="two\nlines")
    table[9]["text"] = ""
    write_csv(folder, table)
    assert "metadata.csv: line 12: expected 'file_name' and one of text, prompt, caption" in fault(folder)


def test_csv_that_the_reader_refuses(folder: Path) -> None:
    write_csv(folder, changed(5, text="x" * (csv.field_size_limit() + 1)))
    assert "metadata.csv: line 7: not CSV (field larger than field limit" in fault(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "gone.png"}, "line 6: picture 'gone.png' does not exist; add it or remove the line"),
        ({"file_name": "../x.png"}, "line 6: '../x.png' leaves the folder"),
        ({"file_name": "/etc/hostname"}, "line 6: '/etc/hostname' leaves the folder"),
        ({"file_name": "link.png"}, "line 6: 'link.png' leaves the folder"),
        ({"file_name": "a\0b.png"}, "line 6: 'a\\x00b.png' is no file name"),
        ({"file_name": "x" * 5000}, "is no file name"),
        ({"file_name": "."}, "line 6: picture '.' does not exist"),
        ({"file_name": None}, "line 6: expected 'file_name' and one of text, prompt, caption, found file_name, text"),
        ({"file_name": 5}, "line 6: file_name is 5; expected a text"),
        ({"text": ""}, "line 6: expected 'file_name' and one of"),
        ({"text": " \t"}, "line 6: text is blank; write a caption or remove the line"),
        ({"text": ["a cat", "two cats"]}, "line 6: text is ['a cat', 'two cats']; expected a text"),
        ({"split": 3}, "line 6: split is 3; expected a text"),
        ({"file_name": "04.png"}, "'04.png' is listed twice; keep one line"),
        ({"file_name": "./04.png"}, "'04.png' is listed twice; keep one line"),
        ({"file_name": "notes.txt"}, "notes.txt: not a readable image"),
    ],
)
def test_a_line_that_is_wrong(folder: Path, row: Row, message: str) -> None:
    Image.new("RGB", (4, 4)).save(folder.parent / "x.png")
    (folder / "link.png").symlink_to(folder.parent / "x.png")
    (folder / "notes.txt").write_text("no picture")
    write_jsonl(folder, changed(5, **row))
    assert message in fault(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "02.png", "text": ', "metadata.jsonl: line 3: not JSON (Expecting value"),
        ('["02.png"]', "metadata.jsonl: line 3: expected an object with 'file_name' and 'text'"),
        ("{}", "metadata.jsonl: line 3: expected 'file_name' and one of text, prompt, caption, found "),
    ],
)
def test_a_broken_line_is_told_by_number(folder: Path, line: str, message: str) -> None:
    write_jsonl(folder, rows())
    path = folder / "metadata.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    assert message in fault(folder)


def test_a_subfolder_and_a_link_inside_are_fine(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "05.png").rename(folder / "sub" / "05.png")
    (folder / "06.png").unlink()
    (folder / "06.png").symlink_to(folder / "sub" / "05.png")
    write_jsonl(folder, changed(5, file_name="sub/05.png"))
    assert [record.id for record in load_folder(folder).records][5:7] == ["sub/05.png", "06.png"]


def test_captions_beside_pictures(folder: Path) -> None:
    write_txt(folder, rows())
    (folder / "07.txt").unlink()
    assert "07.png: no caption; expected 07.txt beside it, or a metadata.jsonl in" in fault(folder)
    (folder / "07.txt").write_text(" \n")
    assert "07.txt: empty; write a caption or remove the picture" in fault(folder)


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    assert "no such folder; expected pictures with metadata.jsonl" in fault(tmp_path / "none")
    assert "no such folder" in fault(folder / "00.png")
    write_jsonl(folder, rows())
    write_csv(folder, rows())
    assert "both metadata.jsonl and metadata.csv; keep one" in fault(folder)
    (folder / "metadata.csv").unlink()
    write_jsonl(folder, rows(MIN_RECORDS - 1))
    assert f"39 captioned pictures; at least {MIN_RECORDS} are needed" in fault(folder)
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "metadata.jsonl: cannot be read as UTF-8 text" in fault(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train"], "no record in split 'validation'; it has train; name some 'validation' in the metadata's split"),
        (["validation", "heldout"], "no record in split 'train'"),
        (["train", "validation"], "no held-out split besides validation; name one 'heldout' in the split column"),
    ],
)
def test_named_splits_that_cannot_work(folder: Path, names: list[str], message: str) -> None:
    write_jsonl(folder, [{**row, "split": names[n % len(names)]} for n, row in enumerate(rows())])
    assert message in fault(folder)


def test_a_broken_picture_is_named(folder: Path) -> None:
    write_jsonl(folder, rows())
    (folder / "11.png").write_bytes((folder / "11.png").read_bytes()[:40])
    assert "11.png: not a readable image" in fault(folder)
