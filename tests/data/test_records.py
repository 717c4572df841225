"""References lead to exactly the bytes they name, no name leaves its folder, and hostile bytes are one error."""

import io
import os
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arra.data import records
from arra.data.reading import ImageReader
from arra.data.records import ImageRef, Record, Source, decode_image, inside


def png(color: str = "red", size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "ref",
    [
        ImageRef("file", "/a b/ü\n\"'.png"),
        ImageRef("slice", "x.tar", place=2**40, size=12),
        ImageRef("parquet", "x.parquet", place=7, column="image\tcolumn"),
    ],
)
def test_a_reference_is_one_line_of_text(ref: ImageRef) -> None:
    assert "\n" not in ref.text()
    assert ImageRef.parse(ref.text()) == ref
    assert {field.name for field in fields(ImageRef)} == {"kind", "path", "place", "size", "column"}


def test_references_lead_to_the_bytes_they_name(tmp_path: Path) -> None:
    pictures = [png(color) for color in ("red", "green", "blue", "white", "black", "orange")]
    (tmp_path / "whole.png").write_bytes(pictures[0])
    (tmp_path / "many").write_bytes(b"before" + pictures[1] + b"after")
    reader = ImageReader()
    assert reader.read(ImageRef("file", str(tmp_path / "whole.png"))) == pictures[0]
    assert reader.read(ImageRef("slice", str(tmp_path / "many"), 6, len(pictures[1]))) == pictures[1]
    for number in range(6):  # more tables than a reader keeps open
        table = pa.table({"image": [{"bytes": each, "path": None} for each in pictures], "n": range(6)})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    for row in (5, 0, 3, 3):
        for number in range(6):
            ref = ImageRef("parquet", str(tmp_path / f"{number}.parquet"), row, column="image")
            assert reader.read(ref) == pictures[row]


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    reader = ImageReader()
    with pytest.raises(FileNotFoundError):
        reader.read(ImageRef("file", str(tmp_path / "gone")))
    with pytest.raises(OSError, match="directory"):
        reader.read(ImageRef("file", str(tmp_path)))
    with pytest.raises(OSError, match="not a regular file"):  # it would be waited for without end
        reader.read(ImageRef("file", str(tmp_path / "pipe")))
    with pytest.raises(ValueError, match="ends after 2 of 9 bytes"):
        reader.read(ImageRef("slice", str(tmp_path / "short"), 3, 9))
    monkeypatch.setattr(records, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(ValueError, match="5 bytes are more than 4"):
        reader.read(ImageRef("file", str(tmp_path / "short")))
    assert reader.read(ImageRef("slice", str(tmp_path / "short"), 1, 4)) == b"2345"


def test_names_stay_inside(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a.png").write_bytes(b"")
    secret.write_bytes(b"")
    (root / "link.png").symlink_to(secret)
    (root / "fine.png").symlink_to(root / "deep" / "a.png")
    (root / "loop").symlink_to(root / "loop")
    for name in ("deep/a.png", "deep/../deep/a.png", "fine.png", str(root / "deep" / "a.png")):
        assert inside(root, name).resolve() == (root / "deep" / "a.png").resolve()
    for name in ("../secret.png", str(secret), "link.png", "deep/../../secret.png", "/etc/passwd"):
        with pytest.raises(ValueError, match=r"leaves .*; pictures must lie inside it"):
            inside(root, name)
    for name in ("b.png", "deep", "", "deep/a.png/b"):
        with pytest.raises(ValueError, match=r"does not exist in|is no file name"):
            inside(root, name)
    for name in ("a\0b", "x" * 5000, "loop"):
        with pytest.raises(ValueError, match=r"is no file name|does not exist") as error:
            inside(root, name)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600


def test_pictures_are_decoded_whatever_their_mode() -> None:
    image = decode_image(png("red", (5, 3)))
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert np.asarray(image).reshape(-1, 3).tolist() == [[255, 0, 0]] * 15


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"zero bytes"),
        (b"no picture", r"no picture of a known format"),
        (png()[:40], r"not a readable image \("),
        (png(size=(20_000, 1)), r"20000x1: one side is more than"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a known format"),
    ],
    ids=["empty", "text", "cut", "long", "program"],
)
def test_what_is_no_picture_is_one_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        decode_image(content)
    assert str(error.value).startswith("not a readable image (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raised", [zlib.error("bad"), KeyError("x"), MemoryError(), RuntimeError("a\nb"), OSError(5, "io")]
)
def test_whatever_a_decoder_raises_is_one_reason(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> None:
        raise raised

    monkeypatch.setattr(records, "to_rgb", broken)
    with pytest.raises(ValueError, match=r"^not a readable image \(.+\)$"):
        decode_image(png())


def test_where_is_no_part_of_a_record() -> None:
    assert Record("a", None, "x", where="a: line 1") == Record("a", None, "x", where="b: line 9")


def test_a_source_is_called_by_its_file(tmp_path: Path) -> None:
    assert Source(path=str(tmp_path / "birds.jsonl")).name == "birds"
    assert Source(path=str(tmp_path / "birds")).class_names() == ()
    for weight in (0, -1):
        with pytest.raises(ValueError, match="greater than 0"):
            Source(path="x", weight=weight)
