"""What a path looks like is what it is; kinds, their schema and their errors go together."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from arra.config import load_recipe
from arra.data.records import Record, Source
from arra.data.sources import DESCRIPTIONS, AnySource, SourceKind, detect_kind, expand_sources, source_of
from arra.errors import ArraError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def in_metadata(root: Path) -> None:
    picture(root / "a.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "red"}) + "\n")


def in_deeper_metadata(root: Path) -> None:
    picture(root / "train" / "a.png")
    (root / "train" / "metadata.csv").write_text("file_name,text\na.png,red\n")


def in_texts(root: Path) -> None:
    picture(root / "deep" / "a.png")
    (root / "deep" / "a.txt").write_text("red")


def in_classes(root: Path) -> None:
    picture(root / "n01" / "a.png")
    picture(root / "n02" / "b.JPEG")


def in_conversations(root: Path) -> None:
    picture(root.parent / "a.png")
    turns = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "<|image|>"}]
    root.write_text(json.dumps([{"id": "a", "image": ["a.png"], "conversations": turns}]))


def in_parquet(root: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": png(), "path": None}], "text": ["red"]}), root)


def in_parquets(root: Path) -> None:
    root.mkdir()
    in_parquet(root / "part-0.parquet")


def in_csv(root: Path) -> None:
    picture(root.parent / "a.png")
    root.write_text("image,caption\na.png,red\n")


def in_tar(root: Path) -> None:
    with tarfile.open(root, "w") as tar:
        for name, content in (("a.png", png()), ("a.txt", b"red")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def in_tars(root: Path) -> None:
    root.mkdir()
    in_tar(root / "0.tar")


def in_codes(root: Path) -> None:
    root.mkdir()
    np.save(root / "0.npy", np.zeros((1, 10, 256), np.int64))


def in_list(root: Path) -> None:
    root.mkdir()
    picture(root / "a.png")
    (root / "0.jsonl").write_text(
        json.dumps({"image_path": str(root / "a.png"), "text": ["red", "a red thing", "red"]}) + "\n"
    )


def named(name: str) -> Any:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("{}")

    return make


SHAPES: dict[str, tuple[str, str, Any]] = {
    "metadata": ("folder", "x", in_metadata),
    "deeper metadata": ("folder", "x", in_deeper_metadata),
    "texts": ("folder", "x", in_texts),
    "classes": ("classes", "x", in_classes),
    "json": ("conversations", "x.json", in_conversations),
    "jsonl": ("conversations", "x.jsonl", lambda path: path.write_text('{"id": "a", "conversations": []}\n')),
    "yaml": ("meta", "x.yaml", lambda path: path.write_text("META: []\n")),
    "csv": ("csv", "x.csv", in_csv),
    "packed tsv": ("csv", "x.TSV.gz", lambda path: path.write_bytes(b"")),
    "parquet": ("parquet", "x.parquet", in_parquet),
    "parquets": ("parquet", "x", in_parquets),
    "tar": ("webdataset", "x.tar", in_tar),
    "tars": ("webdataset", "x", in_tars),
    "saved data set": ("huggingface", "x", named("dataset_info.json")),
    "several splits": ("huggingface", "x", named("dataset_dict.json")),
    "code folder": ("llamagen-codes", "x", in_codes),
    "list folder": ("llamagen-list", "x", in_list),
    "list file": ("llamagen-list", "x.jsonl", lambda path: path.write_text('{"image_path": "a", "text": "b"}\n')),
    "mimic": ("mimic-cxr", "x", named("mimic-cxr-2.0.0-metadata.csv.gz")),
    "deepeyenet": ("deepeyenet", "x", named("DeepEyeNet_train.json")),
}


@pytest.mark.parametrize(("kind", "name", "make"), SHAPES.values(), ids=SHAPES)
def test_what_a_path_looks_like(kind: str, name: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / name)
    assert detect_kind(tmp_path / name) == kind


SCANNED = ("metadata", "deeper metadata", "texts", "classes", "json", "csv", "parquet", "parquets", "tar", "tars")


@pytest.mark.parametrize("shape", [*SCANNED, "list folder"])
def test_what_is_detected_yields_its_records(shape: str, tmp_path: Path) -> None:
    kind, name, make = SHAPES[shape]
    make(tmp_path / name)
    source = source_of("auto", str(tmp_path / name))
    assert source == source_of(kind, str(tmp_path / name))
    found = list(source.scan())
    assert found
    assert all(isinstance(item, Record) for item in found), found


def test_what_looks_like_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    for name in ("empty", "notes.docx"):
        with pytest.raises(
            ArraError, match=rf"{name}: looks like no known source; name its kind \(data\.source\), one"
        ):
            detect_kind(tmp_path / name)
    with pytest.raises(ArraError, match=r"gone: no such file or folder; name the pictures' folder, or a record file$"):
        detect_kind(tmp_path / "gone")


def test_every_kind_is_described_and_can_be_named() -> None:
    kinds = set(get_args(SourceKind))
    assert set(DESCRIPTIONS) == kinds
    schema = TypeAdapter(AnySource).json_schema()
    assert set(schema["discriminator"]["mapping"]) == kinds - {"auto"}
    for kind in sorted(kinds - {"auto", "openmoji"}):
        source = source_of(kind, "/nowhere")
        assert isinstance(source, Source)
        assert (source.path, source.weight, source.split) == ("/nowhere", 1.0, None)
    assert source_of("openmoji", None).name.startswith("openmoji-")


def test_a_meta_file_stands_for_the_files_it_gathers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text("[]")
    lines = [f"  - {{path: {tmp_path / name}.json, ratio: {ratio}}}" for name, ratio in (("a", 0.5), ("b", 1.0))]
    (tmp_path / "meta.yaml").write_text("\n".join(["META:", *lines]) + "\n")
    (tmp_path / "c").mkdir()
    others = [source_of("folder", str(tmp_path / "c")), source_of("meta", str(tmp_path / "meta.yaml"))]
    found = expand_sources(others)
    assert [(Path(source.path).name, source.weight) for source in found] == [
        ("c", 1.0),
        ("a.json", 0.5),
        ("b.json", 1.0),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data.sources=[]", "'sources' is empty; name at least one"),
        ("data.sources=[{path: x}]", r"data.sources.0.kind: .*'folder'"),
        (
            "data.sources=[{kind: foldr, path: x}]",
            r"data.sources.0.kind: expected .*found 'foldr'; did you mean 'folder'",
        ),
        ("data.sources=[{kind: folder}]", r"data.sources.0.path: missing; expected text"),
        ("data.sources=[{kind: folder, path: x, weight: 0}]", "data.sources.0.weight: expected a number > 0, found 0"),
        ("data.sources=[{kind: folder, path: x, wieght: 2}]", "wieght: unknown key; did you mean 'weight'"),
        ("data.sources=[{kind: folder, path: x, split: ''}]", "data.sources.0.split: expected text that is not empty"),
        ("data.source=foldr", "data.source: expected .*found 'foldr'; did you mean 'folder'"),
        ("data.source=folder", "'source: folder' and 'path' go together; give both or neither"),
        ("data.path=x", "'source: openmoji' and 'path' go together; give both or neither"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(settings: str, message: str) -> None:
    with pytest.raises(ArraError, match=message) as error:
        load_recipe("demo", row="aligned", overrides=[settings])
    assert "\n" not in str(error.value)


def test_sources_and_source_exclude_each_other() -> None:
    with pytest.raises(ArraError, match="'sources' stands in place of 'source' and 'path'; give one or the other"):
        load_recipe(
            "demo",
            overrides=["data.source=folder", "data.path=x", "data.sources=[{kind: folder, path: y}]"],
            row="aligned",
        )
    both = load_recipe(
        "demo", row="aligned", overrides=["data.sources=[{kind: folder, path: y}, {kind: csv, path: z}]"]
    )
    assert [(type(each).__name__, each.path) for each in both.data.all_sources] == [
        ("FolderSource", "y"),
        ("TableSource", "z"),
    ]
    with pytest.raises(ValidationError):
        both.data.all_sources[0].path = "elsewhere"  # type: ignore[misc]
