"""WebDataset tars as a source: each sample once, pictures by their place in the tar, and broken tars told."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from arra.data.reading import ImageReader
from arra.data.records import Failure, Found, Record, Skipped
from arra.data.webdataset import MAX_TEXT_BYTES, WebDatasetSource
from arra.errors import ArraError

Member = tuple[str, bytes] | tarfile.TarInfo


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int) -> list[Member]:
    return [(f"{number:03}.png", png(number)), (f"{number:03}.txt", f"caption {number}\n".encode())]


def write_tar(path: Path, members: Sequence[Member], mode: str = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def scan(path: Path, **fields: Any) -> list[Found]:
    return list(WebDatasetSource(path=str(path), **fields).scan())


def records(items: list[Found]) -> list[Record]:
    assert all(isinstance(item, Record) for item in items), items
    return [item for item in items if isinstance(item, Record)]


def only_failure(items: list[Found]) -> Failure:
    failures = [item for item in items if isinstance(item, Failure)]
    assert len(failures) == 1, items
    assert "\n" not in failures[0].reason
    return failures[0]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_become_records(tmp_path: Path, form: int) -> None:
    long = "folder.v1/" + "x" * 150
    if form == tarfile.USTAR_FORMAT:
        long = "folder.v1/x"
    caption = b'{"caption": " kept "}'
    members = [("./README", b"no sample"), *pair(0), (f"{long}.JPEG", png(9)), (f"{long}.json", caption), *pair(1)]
    tar = write_tar(tmp_path / "shard-0.tar", members, format=form)
    skipped, *items = scan(tar)
    assert isinstance(skipped, Skipped)
    assert [(r.id, r.prompt) for r in records(items)] == [
        ("shard-0/000", "caption 0"),
        (f"shard-0/{long}", " kept "),
        ("shard-0/001", "caption 1"),
    ]
    assert records(items)[0].where == f"{tar}: 000"
    reader = ImageReader()
    assert [reader.read(r.image) for r in reversed(records(items)) if r.image] == [png(1), png(9), png(0)]


def test_captions_in_json(tmp_path: Path) -> None:
    values = {"text": "first", "long": "second"}
    tar = write_tar(
        tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"plain"), ("a.json", json.dumps(values).encode())]
    )
    assert [r.prompt for r in records(scan(tar))] == ["plain"]
    assert [r.prompt for r in records(scan(tar, caption_key="long"))] == ["second"]
    assert "no caption" in only_failure(scan(tar, caption_key="none")).reason


def test_picture_suffix(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.jpg", png(1)), ("a.seg.png", png(2)), ("a.txt", b"t")])
    assert "more than one picture (png, jpg)" in only_failure(scan(tar)).reason
    for suffix, number in [("jpg", 1), (".seg.png", 2)]:
        image = records(scan(tar, image_suffix=suffix))[0].image
        assert image is not None
        assert ImageReader().read(image) == png(number)


def test_class_numbers(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.cls", b"3\n"), ("b.png", png(1)), ("b.cls", b"x")])
    source = WebDatasetSource(path=str(tar))
    items = list(source.scan())
    assert source.class_names() == ("0", "1", "2", "3")
    assert isinstance(items[0], Record)
    assert (items[0].label, items[0].prompt) == (3, "")
    assert "expected a class number" in only_failure(items).reason
    tar = write_tar(tmp_path / "b.tar", [*pair(0), ("b.png", png(1)), ("b.cls", b"1")])
    assert WebDatasetSource(path=str(tar)).class_names() == ()
    assert "first sample has none" in only_failure(scan(tar)).reason


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.txt", b"t")], "no picture"),
        ([("x.png", b"p")], "no caption; expected a .txt or .json member, found .png"),
        ([("x.png", b"p"), ("x.txt", b"caf\xe9")], ".txt member is not UTF-8"),
        ([("x.png", b"p"), ("x.json", b"{")], ".json member is not JSON"),
        ([("x.png", b"p"), ("x.json", b"[" * 100_000)], ".json member is not JSON"),
        ([("x.png", b"p"), ("x.json", b'{"text": ["a"]}')], "expected a text"),
        ([("x.png", b"p"), ("x.json", b"[1]")], "no caption"),
        ([("x.png", b"p"), ("x.txt", b"t" * (MAX_TEXT_BYTES + 1))], "at most"),
        ([("x.png", b"p"), ("x.png", b"q"), ("x.txt", b"t")], "two .png members"),
        ([link("x.png"), ("x.txt", b"t")], "no regular file"),
        ([link("x.png", tarfile.LNKTYPE), ("x.txt", b"t")], "no regular file"),
        ([link("x.png", tarfile.CHRTYPE), ("x.txt", b"t")], "no regular file"),
        ([("x.png", b"p"), link("x.txt")], "no regular file"),
    ],
)
def test_a_wrong_sample_costs_only_itself(tmp_path: Path, members: list[Member], reason: str) -> None:
    items = scan(write_tar(tmp_path / "a.tar", [*pair(0), *members, *pair(1)]))
    assert reason in only_failure(items).reason
    assert [item.id for item in items] == ["a/000", "a/x", "a/001"]


def test_names_that_would_escape_are_only_names(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("../../x.png", png(5)), ("../../x.txt", b"t")])
    image = records(scan(tar))[0].image
    assert image is not None
    assert (image.path, ImageReader().read(image)) == (str(tar), png(5))


def test_every_cut_of_a_tar_is_told(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [*pair(0), *pair(1)]).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(1, end + 512, 37):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        if length < 512:
            with pytest.raises(ArraError, match="not a tar"):
                scan(tmp_path / "a.tar")
            continue
        items = scan(tmp_path / "a.tar")
        assert isinstance(items[-1], Failure), (length, items)
        assert "a.tar" in items[-1].id
        assert "at byte" in items[-1].reason
        if "ends inside" in items[-1].reason:  # the sample that was cut is told once
            records(items[:-1])
        for record in items[:-1]:
            if isinstance(record, Record):
                assert record.image is not None
                assert ImageReader().read(record.image) == png(int(record.id[-3:]))
    assert len(items) == 3


@pytest.mark.parametrize("damage", ["header", "joined", "negative"])
def test_what_lies_behind_a_broken_place_is_told(tmp_path: Path, damage: str) -> None:
    content = bytearray(write_tar(tmp_path / "a.tar", [*pair(0), *pair(1)]).read_bytes())
    if damage == "joined":
        content += bytes(content)
    else:
        place = 512 * 4  # the third header: two members of 512 bytes lie before it
        header = bytearray(content[place : place + 512])
        if damage == "negative":
            header[124:136] = b"\xff" * 10 + b"\xfc\0"  # -1024: the place of an earlier header
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        else:
            header[148:156] = b"7" * 8
        content[place : place + 512] = header
    (tmp_path / "a.tar").write_bytes(content)
    items = scan(tmp_path / "a.tar")
    assert "broken" in only_failure(items).reason
    expected = ["a/000", "a/001"] if damage == "joined" else ["a/000"]
    assert [item.id for item in items if isinstance(item, Record)] == expected


def test_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for number in (0, 2):
        write_tar(tmp_path / f"s-{number:03}.tar", pair(number))
    write_tar(tmp_path / "sub" / "t.tar.gz", pair(3), "w:gz")
    items = scan(tmp_path)
    assert [item.id for item in items] == ["s-000/000", "s-002/002", str(tmp_path / "sub" / "t.tar.gz")]
    assert "decompress it first" in only_failure(items).reason
    items = scan(tmp_path / "s-{000..002}.tar")
    assert [item.id for item in items] == ["s-000/000", str(tmp_path / "s-001.tar"), "s-002/002"]
    assert "no such file" in only_failure(items).reason


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_one_compressed_tar_is_refused(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ArraError, match=r"a\.tar: compressed with .*; decompress it first"):
        scan(write_tar(tmp_path / "a.tar", pair(0), mode))


def test_wrong_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1024)
    with pytest.raises(ArraError, match=r"a\.tar: not a tar"):
        scan(tmp_path / "a.tar")
    for name in ("none.tar", "{3..1}.tar", "{0..99999999}.tar", "{0..2}.tar"):
        with pytest.raises(ArraError, match=r"no tars|expected it to rise"):
            scan(tmp_path / name)
