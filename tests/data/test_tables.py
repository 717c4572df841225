"""CSV, TSV and Parquet as sources: every row is told once, and every reference gives the row's own bytes."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arra.data import lines, tables
from arra.data.reading import ImageReader
from arra.data.records import Failure, Found, Record
from arra.data.tables import ParquetCells, ParquetSource, TableSource
from arra.errors import ArraError


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def csv_items(root: Path, content: str | bytes, name: str = "table.csv", **fields: Any) -> list[Found]:
    data = content.encode() if isinstance(content, str) else content
    (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return list(TableSource(path=str(root / name), **fields).scan())


def records(items: list[Found]) -> list[Record]:
    assert all(isinstance(item, Record) for item in items), items
    return [item for item in items if isinstance(item, Record)]


def only_failure(items: list[Found]) -> Failure:
    failures = [item for item in items if isinstance(item, Failure)]
    assert len(failures) == 1, items
    assert "\n" not in failures[0].reason
    return failures[0]


TABLE = 'image,text,split,id\n0.png,"a ""red"" cat, \nsitting ",val,x\n1.png, dog ,train,y\n\n2.png,bird,other,\n'


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_csv_rows_become_records(root: Path, name: str) -> None:
    found = records(csv_items(root, "\ufeff" + TABLE, name))
    assert [record.prompt for record in found] == ['a "red" cat, \nsitting ', " dog ", "bird"]
    assert [record.id for record in found] == ["x", "y", "2.png"]
    assert [record.split for record in found] == ["validation", "train", "other"]
    assert [record.where.rsplit(": ", 1)[1] for record in found] == ["lines 2 to 3", "line 4", "line 6"]
    assert [ImageReader().read(record.image) for record in found if record.image] == [png(0), png(1), png(2)]


def test_tsv_with_plain_quotes(root: Path) -> None:
    found = records(csv_items(root, 'File_Name\tcaption\n0.png\t"hello, said\n', "table.tsv", quotes=False))
    assert found[0].prompt == '"hello, said'


def test_delimiter_columns_and_root(root: Path) -> None:
    (root / "lists").mkdir()
    fields = {"delimiter": ";", "image_column": "pic", "caption_column": "words", "id_column": ""}
    text = "id;pic;words\n7;0.png;cat\n"
    assert [r.id for r in records(csv_items(root / "lists", text, image_root=str(root), **fields))] == ["0.png"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1.png", "1 fields, 2 expected"),
        (b"1.png,a,b", "3 fields, 2 expected"),
        (b"1.png,caf\xe9", "not UTF-8"),
        (b"none.png,a", "does not exist"),
        (b"../../etc/passwd,a", "leaves"),
        (b"/etc/passwd,a", "leaves"),
        (b"1\0.png,a", "is no file name"),
        (b",a", "does not exist"),
        (b'1.png,"a"b', "not CSV"),
        (b"1.png," + b"a" * 200_000, "field larger than field limit"),
    ],
)
def test_a_wrong_row_costs_only_itself(root: Path, row: bytes, reason: str) -> None:
    items = csv_items(root, b"image,text\n0.png,first\n" + row + b"\n2.png,last\n")
    assert reason in only_failure(items).reason
    assert only_failure(items).where == f"{root / 'table.csv'}: line 3"
    assert [item.prompt for item in items if isinstance(item, Record)] == ["first", "last"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_an_open_quote_never_becomes_a_caption(root: Path, end: str) -> None:
    items = csv_items(root, f'image,text\n0.png,first\n1.png,"second\n2.png,third{end}')
    assert "quote" in only_failure(items).reason
    assert only_failure(items).where.endswith("lines 3 to 4")
    assert len(items) == 2


def test_a_line_without_end_does_not_fill_the_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 50)
    items = csv_items(root, "image,text\n0.png,first\n1.png," + "a" * 1000 + "\n2.png,last\n")
    assert "more than 50 characters" in only_failure(items).reason
    assert len(items) == 3


def test_a_cut_gzip_tells_what_came_before(root: Path) -> None:
    lines = "".join(f"{n % 4}.png,{random.Random(n).random()}\n" for n in range(5000))
    content = gzip.compress(("image,text\n" + lines).encode())
    (root / "t.csv.gz").write_bytes(content[: len(content) // 2])
    items = list(TableSource(path=str(root / "t.csv.gz")).scan())
    assert "cannot be read from here on" in only_failure(items).reason
    assert isinstance(items[-1], Failure)
    assert len(items) > 100


def test_labels(root: Path) -> None:
    names = TableSource(path=str(root / "table.csv"))
    found = csv_items(root, "image,label\n0.png,zebra\n1.png,ant\n2.png,\n")
    assert names.class_names() == ("ant", "zebra")
    assert [(r.label, r.prompt) for r in records(found)] == [(1, "zebra"), (0, "ant"), (None, "")]
    found = csv_items(root, "image,label,text\n0.png,3,a\n1.png,0,b\n2.png,-1,c\n")
    assert TableSource(path=str(root / "table.csv")).class_names() == ("0", "1", "2", "3")
    assert [(r.label, r.prompt) for r in records(found)] == [(3, "a"), (0, "b"), (None, "c")]


def test_too_many_labels_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_CLASSES", 2)
    with pytest.raises(ArraError, match="more than 2 different labels"):
        csv_items(root, "image,label\n0.png,a\n1.png,b\n2.png,c\n")


@pytest.mark.parametrize(
    ("content", "fields", "reason"),
    [
        (b"", {}, "line 1: empty"),
        (b"image,text,text\n", {}, "stands twice"),
        (b"url,text\n", {}, "no column of pictures"),
        (b"image,words\n", {}, "no column of captions"),
        (b"image,text\n", {"split_column": "part"}, "no column 'part' for split_column"),
        ("image,text\n".encode("utf-16"), {}, "not UTF-8"),
        (b"image,text\n", {"image_root": "/nowhere"}, "no such folder"),
    ],
)
def test_a_wrong_table_is_refused(root: Path, content: bytes, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArraError, match=reason) as caught:
        csv_items(root, content, **fields)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_refused(root: Path) -> None:
    for source in (TableSource(path=str(root / "none.csv")), ParquetSource(path=str(root / "none.parquet"))):
        with pytest.raises(ArraError, match=r"no such file|no Parquet files"):
            list(source.scan())


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture_columns(count: int) -> dict[str, pa.Array]:
    """The three ways a column holds pictures, by kind."""
    return {
        "bytes": pa.array([png(n) for n in range(count)], pa.large_binary()),
        "struct": pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in range(count)], STRUCT),
        "path": pa.array([f"{n % 4}.png" for n in range(count)]).dictionary_encode(),
    }


def write(path: Path, *, group: int = 4, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_in_any_order_gives_each_row_its_bytes(root: Path, kind: str) -> None:
    path = write(
        root / "set.parquet", image=picture_columns(30)[kind], text=[f"t{n}" for n in range(30)], key=range(30)
    )
    found = records(list(ParquetSource(path=str(path)).scan()))
    assert [(r.id, r.prompt) for r in found] == [(str(n), f"t{n}") for n in range(30)]
    assert {r.where for r in found} == {f"{path}: row {n}" for n in range(30)}
    order, reader = random.Random(3).sample(range(30), 30), ImageReader()
    for number in [*order, *range(30)]:
        image = found[number].image
        assert image is not None
        assert reader.read(image) == png(number % 4 if kind == "path" else number)


def test_parquet_scan_reads_no_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = pq.ParquetFile.iter_batches

    def watched(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        read.extend(kwargs["columns"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    path = write(root / "set.parquet", image=picture_columns(3)["struct"], text=["a", "b", "c"])
    records(list(ParquetSource(path=str(path)).scan()))
    assert sorted(set(read)) == ["image.path", "text"]


def test_large_row_groups_pass_in_pieces(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(root / "set.parquet", group=20, image=picture_columns(40)["struct"], text=["t"] * 40)
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 500)
    cells = ParquetCells(str(path), "image")
    for number in [0, 1, 5, 19, 20, 39, 3, 3, 25, 24]:
        assert cells(number) == png(number)
        assert cells._batch is not None
        assert cells._batch.num_rows < 20


def test_folders_patterns_and_one_broken_file(root: Path) -> None:
    for number in range(3):
        write(root / "sub" / f"{number}.parquet", image=picture_columns(1)["bytes"], text=["t"])
    (root / "sub" / "1.parquet").write_bytes(b"PAR1 nonsense PAR1")
    for path in (root / "sub", root / "sub" / "*.parquet"):
        items = list(ParquetSource(path=str(path)).scan())
        assert [item.id for item in items] == ["0/0", str(root / "sub" / "1.parquet"), "2/0"]
        assert "whole file" in only_failure(items).reason
    with pytest.raises(ArraError, match=r"1\.parquet: .*expected a sound Parquet file"):
        list(ParquetSource(path=str(root / "sub" / "1.parquet")).scan())


def test_broken_pages_cost_their_row_group(root: Path) -> None:
    text = [random.Random(n).randbytes(400).hex() for n in range(8)]
    path = write(root / "set.parquet", image=picture_columns(8)["bytes"], text=text)
    about = pq.read_metadata(path).row_group(0).column(1)
    start = about.dictionary_page_offset or about.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + about.total_compressed_size] = b"\xff" * about.total_compressed_size
    path.write_bytes(content)
    items = list(ParquetSource(path=str(path)).scan())
    assert only_failure(items).where == f"{path}: rows 0 to 3"
    assert [item.id for item in items if isinstance(item, Record)] == [f"set/{n}" for n in range(4, 8)]


def test_null_pictures_and_texts_that_are_not_utf8(root: Path) -> None:
    bad = pa.array([b"fine", b"caf\xe9", b"good"]).view(pa.string())
    path = write(root / "a.parquet", image=pa.array([{"bytes": png(0), "path": None}, None, None], STRUCT), text=bad)
    items = list(ParquetSource(path=str(path)).scan())
    assert [type(item) for item in items] == [Record, Failure, Failure]
    path = write(root / "b.parquet", image=picture_columns(3)["bytes"], text=bad)
    assert "not UTF-8" in only_failure(list(ParquetSource(path=str(path)).scan())).reason


def test_cells_without_a_picture_are_told(root: Path) -> None:
    values = [
        {"bytes": None, "path": "1.png"},
        {"bytes": None, "path": "../x.png"},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": None},
        None,
    ]
    path = write(root / "set.parquet", image=pa.array(values, STRUCT), text=list("abcde"))
    cells = ParquetCells(str(path), "image")
    assert cells(0) == png(1)
    for row, reason in [(1, "leaves"), (2, "leaves"), (3, "null"), (4, "null"), (5, "no row 5"), (-1, "no row -1")]:
        with pytest.raises(ValueError, match=reason):
            cells(row)
    with pytest.raises(ValueError, match="holds str"):
        ParquetCells(str(path), "text")(0)
    with pytest.raises(ValueError, match="row 0"):
        ParquetCells(str(path), "none")(0)
    (root / "not.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"not\.parquet"):
        ParquetCells(str(root / "not.parquet"), "image")


def test_several_captions_and_class_names(root: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": picture_columns(2)["bytes"], "caption": [["one", "two"], []], "label": [1, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), root / "a.parquet")
    source = ParquetSource(path=str(root / "a.parquet"))
    first, second = records(list(source.scan()))
    assert (first.prompt, first.alternatives, first.label, second.label) == ("one", ("two",), 1, 0)
    assert source.class_names() == ("zebra", "ant")
    assert source.class_names() is source.class_names()  # found once


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": [1.5], "text": ["a"]}, "column 'image' holds double; expected pictures"),
        ({"image": ["0.png"], "text": [3]}, "column 'text' holds int64; expected text"),
        ({"image": ["0.png"], "label": [0.5]}, "column 'label' holds double; expected integers or text"),
        ({"image": ["0.png"]}, "no column of captions"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(root: Path, columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArraError, match=reason):
        list(ParquetSource(path=str(write(root / "set.parquet", **columns))).scan())
