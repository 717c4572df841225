"""A user's folder of pictures: every item comes out once, and a line that is wrong spoils no other."""

import csv
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import arra.data.lines as lines_module
from arra.data.folder import ClassFolderSource, FolderSource
from arra.data.lines import parse_json, read_lines, split_name
from arra.data.reading import ImageReader
from arra.data.records import Failure, Found, Record, Skipped
from arra.errors import ArraError

Row = dict[str, Any]


def caption(number: int) -> str:
    return f"picture number {number}"


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve tiny pictures, without any text yet."""
    for number in range(12):
        picture(tmp_path / "mine" / f"{number:02}.png")
    return tmp_path / "mine"


def rows(count: int = 12) -> list[Row]:
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


def changed(number: int, **fields: Any) -> list[Row]:
    table = rows()
    table[number] = {**table[number], **fields}
    return table


def scan(folder: Path, **settings: Any) -> list[Found]:
    return list(FolderSource(path=str(folder), **settings).scan())


def records(found: list[Found]) -> list[Record]:
    return [item for item in found if isinstance(item, Record)]


def told(found: list[Found]) -> dict[str, str]:
    """What was told of items that are no records, by 'file: line N' without folders."""
    items = [item for item in found if not isinstance(item, Record)]
    assert all("\n" not in item.reason for item in items)
    return {os.path.basename(item.where): item.reason for item in items}


def fault(folder: Path, line: int, **settings: Any) -> str:
    """The reason of the one failure, which is that of the line; the other records are all there."""
    found = scan(folder, **settings)
    [failure] = [item for item in found if isinstance(item, Failure)]
    assert failure.where.endswith(f"line {line}")
    assert len(records(found)) == 11
    return failure.reason


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_txt])
def test_three_layouts_say_the_same(folder: Path, write: Callable[[Path, list[Row]], None]) -> None:
    write(folder, rows())
    found = scan(folder)
    assert [(r.id, r.prompt, r.split) for r in records(found)] == [(f"{n:02}.png", caption(n), "") for n in range(12)]
    assert len(found) == 12
    image = records(found)[7].image
    assert image is not None
    assert ImageReader().read(image) == (folder / "07.png").read_bytes()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_every_item_comes_out_once(tmp_path: Path, seed: int, name: str) -> None:
    """A random mix of good and bad lines: in = records + failures + skipped, and every good id is there, in order."""
    chance = random.Random(seed)
    kinds = [chance.choice(["good", "unlisted", "missing", "outside", "no text", "not UTF-8"]) for _ in range(60)]
    lines, good = [b"file_name,text"] if name.endswith("csv") else [], []
    for number, kind in enumerate(kinds):
        own = f"{number}.png" if kind != "outside" else "../x.png"
        if kind != "missing":
            picture(tmp_path / "mine" / own)
        if kind == "good":
            good.append(own)
        text = {"no text": b"", "not UTF-8": b"\xff\xfe"}.get(kind, f"text {number}".encode())
        as_csv, as_json = b'%s,"%s"', b'{"file_name": "%s", "text": "%s"}' if text else b'{"file_name": "%s"%s}'
        if kind != "unlisted":
            lines.append((as_csv if name.endswith("csv") else as_json) % (own.encode(), text))
    (tmp_path / "mine" / name).write_bytes(b"\n".join(lines))
    found = scan(tmp_path / "mine")
    written = [r for r in records(found) if r.prompt]  # a blank CSV cell is a blank caption, which the index refuses
    unread = sum(kind == "not UTF-8" for kind in kinds)  # their lines name no picture, so those are told too
    assert [record.id for record in written] == good
    assert len(found) == len(kinds) + unread
    assert sum(isinstance(item, Skipped) for item in found) == kinds.count("unlisted") + unread
    assert [repr(item) for item in scan(tmp_path / "mine")] == [repr(item) for item in found]


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_text_columns(folder: Path, column: str) -> None:
    write_jsonl(folder, [{"file_name": row["file_name"], column: row["text"]} for row in rows()])
    assert records(scan(folder))[3].prompt == caption(3)


def test_the_first_filled_column_or_the_chosen_one(folder: Path) -> None:
    write_csv(folder, [{**row, "text": "", "caption": "c", "title": "t"} for row in rows()])
    assert records(scan(folder))[0].prompt == "c"
    assert records(scan(folder, caption_column="title"))[0].prompt == "t"
    assert set(told(scan(folder, caption_column="gone")).values()) == {
        "expected 'file_name' and gone, found file_name, caption, title"
    }


def test_captions_are_stripped_at_the_ends_only(folder: Path) -> None:
    write_jsonl(folder, changed(5, text=" a  red\tcat \n"))
    assert records(scan(folder))[5].prompt == "a  red\tcat"


def test_named_splits_and_labels(folder: Path) -> None:
    names = ["train", "val", "validation", "dev", "valid", "VAL", "test", "Fold-1", None, "", "train", "train"]
    write_jsonl(folder, [{**row, "split": name, "label": 7} for row, name in zip(rows(), names, strict=True)])
    expected = ["train", *["validation"] * 5, "test", "Fold-1", "", "", "train", "train"]
    assert [record.split for record in records(scan(folder))] == expected
    assert {record.label for record in records(scan(folder))} == {7}
    (folder / "metadata.jsonl").unlink()
    write_csv(folder, [{"file_name": row["file_name"], "label": n} for n, row in enumerate(rows())])
    assert [(r.label, r.prompt) for r in records(scan(folder))] == [(number, "") for number in range(12)]
    assert split_name("Train") == "Train"


def test_split_folders_and_metadata_below(tmp_path: Path) -> None:
    for name in ("train/a.png", "train/deep/b.png", "val/c.png", "other/test/d.png", "test.png"):
        picture(tmp_path / name)
    write_jsonl(tmp_path / "train", [{"file_name": "a.png", "text": "a"}, {"file_name": "deep/b.png", "text": "b"}])
    write_txt(tmp_path, [{"file_name": name, "text": "t"} for name in ("val/c.png", "other/test/d.png", "test.png")])
    assert {r.id: r.split for r in records(scan(tmp_path))} == {
        "train/a.png": "train", "train/deep/b.png": "train", "val/c.png": "validation", "other/test/d.png": "",
        "test.png": "",
    }  # fmt: skip


def test_metadata_files_above_and_below_add_up(tmp_path: Path) -> None:
    for name in ("sub/a.png", "sub/b.png", "sub/c.png"):
        picture(tmp_path / name)
    write_jsonl(tmp_path, [{"file_name": "sub/a.png", "text": "above"}])
    write_csv(tmp_path / "sub", [{"file_name": "b.png", "text": "below"}])
    found = scan(tmp_path)
    assert [(r.id, r.prompt) for r in records(found)] == [("sub/a.png", "above"), ("sub/b.png", "below")]
    assert [item.id for item in found if isinstance(item, Skipped)] == ["sub/c.png"]


def test_a_column_goes_before_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    write_jsonl(tmp_path, [{"file_name": "train/a.png", "text": "a", "split": "test"}])
    assert records(scan(tmp_path))[0].split == "test"


def test_other_line_separators_inside_text(folder: Path) -> None:
    """U+2028 and its like end no line of JSON, and a byte order mark is no part of the first."""
    write_jsonl(folder, changed(5, text="a\u2028red\x85heart"))
    path = folder / "metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n\n")
    assert len(scan(folder)) == 12
    assert records(scan(folder))[5].prompt == "a\u2028red\x85heart"


def test_csv_with_quoted_commas_lines_and_an_index(folder: Path) -> None:
    write_csv(folder, [{"": number, **row} for number, row in enumerate(changed(5, text='a red, round\nball, "new"'))])
    assert records(scan(folder))[5].prompt == 'a red, round\nball, "new"'


def test_csv_with_unquoted_commas_is_not_cut_short(folder: Path) -> None:
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows())]
    lines[7] = "06.png,a red, round ball"
    (folder / "metadata.csv").write_text("\n".join(lines))
    assert "more fields than the first line names; put quotes" in fault(folder, 8)


def test_csv_line_numbers_count_lines_not_rows(folder: Path) -> None:
    table = changed(5, text="two\nlines")
    table[9]["file_name"] = ""
    write_csv(folder, table)
    assert fault(folder, 12) == "expected 'file_name' and one of text, prompt, caption, found text"


@pytest.mark.parametrize("field", ["x" * (csv.field_size_limit() + 1), 'an "open" quote'])
def test_csv_that_the_reader_refuses(folder: Path, field: str) -> None:
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows())]
    lines[6] = f'05.png,"{field}"' if '"' in field else f"05.png,{field}"
    (folder / "metadata.csv").write_text("\n".join(lines))
    assert "not CSV (" in fault(folder, 7)


def test_a_quote_left_open_loses_no_line_in_silence(folder: Path) -> None:
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows())]
    lines[10] = '09.png,"an open quote'
    (folder / "metadata.csv").write_text("\n".join(lines))
    found = scan(folder)
    assert "unexpected end of data); is a quote left open?" in told(found)["metadata.csv: lines 11 to 13"]
    assert [item.id for item in found if isinstance(item, Skipped)] == ["09.png", "10.png", "11.png"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "gone.png"}, "picture 'gone.png' does not exist"),
        ({"file_name": "../x.png"}, "picture '../x.png' leaves "),
        ({"file_name": "/etc/hostname"}, "picture '/etc/hostname' leaves "),
        ({"file_name": "link.png"}, "picture 'link.png' leaves "),
        ({"file_name": "a\0b.png"}, "'a\\x00b.png' is no file name"),
        ({"file_name": "x" * 5000}, "is no file name"),
        ({"file_name": "\ud800.png"}, "'\\ud800.png' is no file name"),
        ({"file_name": "."}, "picture '.' does not exist"),
        ({"file_name": None}, "expected 'file_name' and one of text, prompt, caption, found text"),
        ({"file_name": 5}, "file_name is 5; expected a text"),
        ({"file_name": 0}, "file_name is 0; expected a text"),
        ({"text": None}, "expected 'file_name' and one of text, prompt, caption, found file_name"),
        ({"text": ["a cat", "two cats"]}, "text is ['a cat', 'two cats']; expected a text"),
        ({"text": False}, "text is False; expected a text"),
        ({"split": 3}, "split is 3; expected a text"),
        ({"label": "cat"}, "label is 'cat'; expected a class number"),
        ({"label": -1}, "label is -1; expected a class number"),
        ({"label": True}, "label is True; expected a class number"),
        ({"label": 1.5}, "label is 1.5; expected a class number"),
    ],
)
def test_a_line_that_is_wrong(folder: Path, row: Row, message: str) -> None:
    picture(folder.parent / "x.png")
    (folder / "link.png").symlink_to(folder.parent / "x.png")
    text = "".join(json.dumps(line) + "\n" for line in changed(5, **row))
    (folder / "metadata.jsonl").write_text(text)
    assert message in fault(folder, 6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "02.png", "text": ', "not JSON (Expecting value"),
        (b'{"file_name": "02.png", "text": "\xe9"}', "not UTF-8 text (byte 34"),
        (b'["02.png"]', "expected an object with 'file_name' and 'text'"),
        (b"{}", "expected 'file_name' and one of text, prompt, caption, found "),
        (b"[" * 100_000, "not JSON ("),
        (b"9" * 5000, "not JSON ("),
    ],
)
def test_a_broken_line_is_told_by_number(folder: Path, line: bytes, message: str) -> None:
    write_jsonl(folder, rows())
    path = folder / "metadata.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    assert message in fault(folder, 3)


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 1000 + b"\n" + b"[%s]\n" % (b"1" * 97) + b"y" * 350)
    lines = list(read_lines(path))
    assert [(number, len(line)) for number, line in lines] == [(1, 9), (2, 101), (3, 100), (4, 101)]
    assert parse_json(lines[0][1]) == {"a": 1}
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        parse_json(lines[1][1])


def test_a_subfolder_and_a_link_inside_are_fine(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "05.png").rename(folder / "sub" / "05.png")
    (folder / "06.png").unlink()
    (folder / "06.png").symlink_to(folder / "sub" / "05.png")
    table = changed(5, file_name="sub/../sub/05.png")
    table[7]["file_name"] = "./07.png"
    table[8]["file_name"] = str(folder / "08.png")
    write_jsonl(folder, table)
    found = scan(folder)
    assert [r.id for r in records(found)][5:9] == ["sub/05.png", "06.png", "07.png", "08.png"]
    assert len(found) == 12


def test_captions_beside_pictures(folder: Path) -> None:
    write_txt(folder, rows())
    (folder / "03.txt").write_text(" \n")  # a blank caption, which the index refuses
    (folder / "04.txt").write_bytes(b"caf\xe9")
    (folder / "05.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    (folder / "06.txt").write_bytes(b"x" * 2**21)
    (folder / "07.txt").unlink()
    (folder / "08.txt").unlink()
    (folder / "08.txt").symlink_to("/etc/hostname")
    (folder / "09.png").rename(folder / "09.heic")
    (folder / "README.txt").write_text("about")
    (folder / "._00.png").write_bytes(b"of another system")
    found = scan(folder)
    assert [record.id for record in records(found)] == [f"{n:02}.png" for n in (0, 1, 2, 3, 5, 10, 11)]
    assert (records(found)[3].prompt, records(found)[4].prompt) == ("", "caf\u00e9")
    reasons = told(found)
    assert "not UTF-8 text (byte 4" in reasons["04.txt"]
    assert "longer than 1048576 bytes" in reasons["06.txt"]
    assert "no caption; expected 07.txt beside it, or a metadata.jsonl in" in reasons["07.png"]
    assert "picture '08.txt' leaves" in reasons["08.png"]
    assert reasons["09.heic"] == "format .heic is not read; convert it to PNG or JPEG"
    assert reasons["README.txt"] == "no picture of this name beside it"
    assert reasons["._00.png"] == "hidden"
    assert sum(isinstance(item, Skipped) for item in found) == 2


def test_metadata_decides_for_all_below(folder: Path) -> None:
    """What no line names is left out by rule, whatever it is; folders that cannot be entered are failures."""
    picture(folder / "sub" / "a.png")
    picture(folder / "sub" / "b.heic")
    (folder / "sub" / "a.txt").write_text("a")
    picture(folder.parent / "away" / "x.png")
    (folder / "away").symlink_to(folder.parent / "away")
    (folder / "again").symlink_to("sub")
    write_jsonl(folder, rows(11))
    found = scan(folder)
    skipped = {item.id: item.reason for item in found if isinstance(item, Skipped)}
    assert skipped == {
        **dict.fromkeys(("11.png", "sub/a.png", "sub/b.heic"), "no line of the metadata names it"),
        "again": "a link to a folder inside; its pictures are read there",
    }
    [failure] = [item for item in found if isinstance(item, Failure)]
    assert "folder 'away' is a link that leaves" in failure.reason
    assert len(found) == 11 + 4 + 1


def test_one_metadata_file_a_folder(folder: Path) -> None:
    write_jsonl(folder, rows())
    write_csv(folder, changed(0, text="other"))
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    found = scan(folder)
    assert len(records(found)) == 12
    assert told(found) == dict.fromkeys(
        ("metadata.csv", "metadata.parquet"), "not read, metadata.jsonl beside it is; keep one"
    )


def test_metadata_that_cannot_be_read(folder: Path) -> None:
    (folder / "metadata.jsonl").symlink_to("/etc/hostname")
    found = scan(folder)
    assert "leaves" in told(found)["metadata.jsonl"]
    assert sum(isinstance(item, Skipped) for item in found) == 12


def test_odd_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nothing.png")
    (folder / "folder.png").mkdir()
    picture(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")))
    write_txt(folder, rows())
    found = scan(folder)
    assert len(records(found)) == 12
    assert set(told(found)) == {"pipe.png", "loop.png", "gone.png", "caf\\udce9.png"}
    assert not any(isinstance(item, Skipped) for item in found)


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such folder"), (folder / "00.png", "no such folder")):
        with pytest.raises(ArraError, match=message):
            scan(path)
    with pytest.raises(ArraError, match=r"no pictures; expected metadata.jsonl, metadata.csv or pictures with .txt"):
        scan(tmp_path / "empty")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes; the last is in no other split but validation."""
    for name in ("train/n02/b.JPEG", "train/n02/a.JPEG", "train/n01_big_cat/x.png", "val/n02/c.png", "val/n03/d.png"):
        picture(tmp_path / "tree" / name)
    return tmp_path / "tree"


def labels(found: list[Found]) -> dict[str, int | None]:
    return {record.id: record.label for record in records(found)}


def classes(tree: Path, **settings: Any) -> list[Found]:
    return list(ClassFolderSource(path=str(tree), **settings).scan())


def test_classes_over_the_union_of_splits(tree: Path) -> None:
    assert ClassFolderSource(path=str(tree)).class_names() == ("n01 big cat", "n02", "n03")
    found = classes(tree)
    assert [(r.id, r.label, r.prompt, r.split) for r in records(found)] == [
        ("train/n01_big_cat/x.png", 0, "n01 big cat", "train"),
        ("train/n02/a.JPEG", 1, "n02", "train"),
        ("train/n02/b.JPEG", 1, "n02", "train"),
        ("val/n02/c.png", 1, "n02", "validation"),
        ("val/n03/d.png", 2, "n03", "validation"),
    ]
    assert len(found) == 5
    assert labels(classes(tree / "train")) == {"n01_big_cat/x.png": 0, "n02/a.JPEG": 1, "n02/b.JPEG": 1}


def test_classes_without_splits_and_below_them(tmp_path: Path) -> None:
    """A class may be called 'train', and hold folders of its own."""
    for name in ("boat/x.png", "train/y.png", "zebra/deep/z.png"):
        picture(tmp_path / name)
    assert labels(classes(tmp_path)) == {"boat/x.png": 0, "train/y.png": 1, "zebra/deep/z.png": 2}
    assert {record.split for record in records(classes(tmp_path))} == {""}


def test_labels_are_those_of_torchvision(tree: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    (tree / "train" / "n015").mkdir()
    theirs = datasets.ImageFolder(str(tree / "train"), allow_empty=True).samples
    ours = {str(tree / "train" / name): label for name, label in labels(classes(tree / "train")).items()}
    assert list(ours.items()) == theirs


def test_nothing_beside_the_classes_is_lost(tree: Path) -> None:
    (tree / "train" / "n00").mkdir()
    picture(tree / "stray.png")
    picture(tree / "val" / "stray.png")
    picture(tree / "bbox" / "x.png")
    picture(tree / "train" / "n02" / ".hidden.png")
    picture(tree / "train" / "n02" / "x.heic")
    picture(tree.parent / "x.png")
    (tree / "train" / "n02" / "link.png").symlink_to(tree.parent / "x.png")
    (tree / "train" / "n04").symlink_to(tree / "train" / "n02")
    found = classes(tree)
    assert labels(found)["val/n03/d.png"] == 3
    reasons = {item.id: (type(item), item.reason) for item in found if not isinstance(item, Record)}
    stray = (Failure, "lies in no class folder; move it into the folder of its class")
    assert reasons.pop("train/n02/link.png")[1].startswith("picture 'train/n02/link.png' leaves")
    assert reasons == {
        "train/n00": (Skipped, "no pictures; the class keeps label 0"),
        "stray.png": stray,
        "val/stray.png": stray,
        "bbox": (Skipped, "lies beside split folders, is none, and is not read"),
        "train/n02/.hidden.png": (Skipped, "hidden"),
        "train/n02/x.heic": (Failure, "format .heic is not read; convert it to PNG or JPEG"),
        "train/n04": (Skipped, "a link to a folder inside; its pictures are read there"),
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.json", '{"n02": "tench, Tinca_tinca", "n01_big_cat": "big cat", "n03": "crane", "n99": "unused"}'),
        ("names.txt", "n02 tench, Tinca tinca\nn01_big_cat\tbig cat\r\n\nn03 crane\n"),
    ],
)
def test_readable_names(tree: Path, name: str, text: str) -> None:
    (tree / name).write_text(text)
    source = ClassFolderSource(path=str(tree), class_names_file=str(tree / name))
    assert source.class_names() == ("big cat", "tench, Tinca tinca", "crane")
    assert [record.prompt for record in records(list(source.scan()))][1] == "tench, Tinca tinca"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.json", '{"n02": "tench"}', r"no name for class folder 'n01_big_cat' \(2 of 3 lack one\)"),
        ("names.txt", "n02 tench\nn03 crane\nn01_big_cat", "no name for class folder 'n01_big_cat'"),
        ("names.json", '{"n02": ["tench"]}', "expected a JSON object"),
        ("names.json", '["tench"]', "expected a JSON object"),
        ("names.json", "{", "class names cannot be read"),
        ("names.txt", "n02 caf\udce9", "class names cannot be read"),
    ],
)
def test_names_that_cannot_be_used(tree: Path, name: str, text: str, message: str) -> None:
    (tree / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ArraError, match=message):
        classes(tree, class_names_file=str(tree / name))
    with pytest.raises(ArraError, match="class names cannot be read"):
        classes(tree, class_names_file=str(tree / "none.txt"))


def test_trees_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ArraError, match="no such folder"):
        classes(tmp_path / "none")
    picture(tmp_path / "train" / "x.png")
    picture(tmp_path / "test" / "y.png")
    with pytest.raises(ArraError, match=r"no class folders; expected CLASS/x.jpg, or train/CLASS/x.jpg"):
        classes(tmp_path)
