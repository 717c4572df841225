"""Hugging Face data sets as a source: saved, loaded and streamed give the same records and the same bytes."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from arra.data.huggingface import HuggingFaceSource
from arra.data.reading import ImageReader
from arra.data.records import Failure, Found, ImageRef, Record
from arra.errors import ArraError

SEVERAL = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (4, 4), (number, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def table(first: int, last: int) -> Dataset:
    numbers = range(first, last)
    columns = {
        "image": [{"bytes": png(n), "path": None} for n in numbers],
        "text": [f"t{n}" for n in numbers],
        "label": [n % 2 for n in numbers],
    }
    return Dataset.from_dict(columns, features=SEVERAL)


def scan(path: Path | str, **fields: Any) -> list[Found]:
    return list(HuggingFaceSource(path=str(path), **fields).scan())


def records(items: list[Found]) -> list[Record]:
    assert all(isinstance(item, Record) for item in items), items
    return [item for item in items if isinstance(item, Record)]


def read(record: Record, reader: ImageReader | None = None) -> bytes:
    assert record.image is not None
    return (reader or ImageReader()).read(ImageRef.parse(record.image.text()))


def refused(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ArraError) as caught:
        scan(path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    DatasetDict({"train": table(0, 20), "validation": table(20, 30)}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    (tmp_path / "parquet").mkdir()
    table(0, 20).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    table(20, 30).to_parquet(str(tmp_path / "parquet" / "valid.parquet"))
    return tmp_path / "parquet"


@pytest.mark.parametrize(
    ("kind", "streaming"), [("saved", False), ("saved", True), ("parquet", False), ("parquet", True)]
)
def test_rows_become_records_with_their_bytes(kind: str, streaming: bool, request: pytest.FixtureRequest) -> None:
    source = HuggingFaceSource(path=str(request.getfixturevalue(kind)), streaming=streaming)
    found = records(list(source.scan()))
    assert [r.prompt for r in found] == [f"t{n}" for n in range(30)]
    assert [r.id for r in found] == [f"train/{n}" for n in range(20)] + [f"validation/{n}" for n in range(10)]
    assert [(r.split, r.label) for r in found][19:21] == [("train", 1), ("validation", 0)]
    assert source.class_names() == ("zebra", "ant")
    reader = ImageReader()
    for number in [*random.Random(1).sample(range(30), 30), *range(30)]:
        assert read(found[number], reader) == png(number)


def test_one_split_and_a_single_data_set(saved: Path, parquet: Path, tmp_path: Path) -> None:
    for path in (saved, parquet):
        for streaming in (False, True):
            found = records(scan(path, data_split="validation", streaming=streaming))
            assert [r.id for r in found] == [f"validation/{n}" for n in range(10)]
            assert [read(found[n]) for n in (3, 0)] == [png(23), png(20)]
    table(0, 2).save_to_disk(str(tmp_path / "single"))
    assert [r.id for r in records(scan(tmp_path / "single"))] == ["0", "1"]


def test_the_scan_decodes_no_picture(saved: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "decode_example", decode)
    found = [scan(path, streaming=streaming) for path in (saved, parquet) for streaming in (False, True)]
    assert [read(records(items)[3]) for items in found] == [png(3)] * 4


def test_a_reference_opens_in_another_process(saved: Path) -> None:
    image = records(scan(saved))[25].image
    assert image is not None
    code = (
        "import sys; from arra.data.reading import ImageReader; from arra.data.records import ImageRef\n"
        "sys.stdout.buffer.write(ImageReader().read(ImageRef.parse(sys.argv[1])))"
    )
    answer = subprocess.run([sys.executable, "-c", code, image.text()], capture_output=True, check=True)
    assert answer.stdout == png(25)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_folder(tmp_path: Path, streaming: bool) -> None:
    root = tmp_path / "folder" / "train"
    root.mkdir(parents=True)
    for number in range(5):
        (root / f"{number}.png").write_bytes(png(number))
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"t{n}"}) for n in range(5)]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    found = records(scan(tmp_path / "folder", streaming=streaming))
    assert [r.prompt for r in found] == [f"t{n}" for n in range(5)]
    assert [read(found[n]) for n in (4, 0, 2)] == [png(4), png(0), png(2)]


def test_names_of_pictures_and_class_names_as_text(tmp_path: Path) -> None:
    root = tmp_path / "named"
    root.mkdir()
    (root / "0.png").write_bytes(png(0))
    (root / "data.jsonl").write_text(
        "".join(
            json.dumps({"image": name, "label": label}) + "\n" for name, label in [("0.png", "b"), ("../0.png", "a")]
        )
    )
    source = HuggingFaceSource(path=str(root))
    first, second = source.scan()
    assert isinstance(first, Record)
    assert (first.label, first.prompt, read(first)) == (1, "b", png(0))
    assert isinstance(second, Failure)
    assert "leaves" in second.reason


def test_cells_without_a_picture_are_told(tmp_path: Path) -> None:
    cells: list[dict[str, Any] | None] = [
        None,
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": "https://127.0.0.1/x.png"},
    ]
    cells.append({"bytes": png(3), "path": "x.png"})
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")})
    Dataset.from_dict({"image": cells, "text": list("abcd")}, features=features).save_to_disk(str(tmp_path / "set"))
    found, reader = records(scan(tmp_path / "set")), ImageReader()
    for number, reason in enumerate(["null", "leaves", "does not exist"]):
        with pytest.raises(ValueError, match=reason):
            read(found[number], reader)
    assert read(found[3], reader) == png(3)
    assert found[0].image is not None
    with pytest.raises(ValueError, match="no row 9"):
        reader.read(ImageRef("dataset", found[0].image.path, place=9, column="image"))


def test_items_behind_the_end_of_a_stream_are_told(parquet: Path) -> None:
    found, reader = records(scan(parquet, streaming=True)), ImageReader()
    assert found[0].image is not None
    with pytest.raises(ValueError, match="no item 20; the stream ended"):
        reader.read(ImageRef("stream", found[0].image.path, place=20, column="image"))
    assert read(found[7], reader) == png(7)


def test_a_stream_that_breaks_tells_what_came_before(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        table(10 * number, 10 * number + 10).to_parquet(str(tmp_path / "set" / f"train-{number}.parquet"))
    (tmp_path / "set" / "train-1.parquet").write_bytes(b"PAR1 nonsense PAR1")
    *before, last = scan(tmp_path / "set", streaming=True)
    assert [r.id for r in records(before)] == [f"train/{n}" for n in range(10)]
    assert isinstance(last, Failure)
    assert "cannot be read from here on" in last.reason
    assert "not a data set that can be read" in refused(tmp_path / "set")
    image = records(before)[0].image
    assert image is not None
    with pytest.raises(ValueError, match="item 15 cannot be read"):
        ImageReader().read(ImageRef("stream", image.path, place=15, column="image"))


def test_what_cannot_be_loaded_is_refused(saved: Path, parquet: Path, tmp_path: Path) -> None:
    assert "no split 'test'; it has train, validation" in refused(saved, data_split="test")
    assert "Unknown split" in refused(parquet, data_split="test")
    assert "not a data set that can be read" in refused(parquet, config="other")
    assert "no column 'words' for caption_column" in refused(saved, caption_column="words")
    (saved / "train" / "dataset_info.json").write_text("{")
    assert "not a data set that can be read" in refused(saved)
    assert str(tmp_path / "none") in refused(tmp_path / "none")


def test_code_and_pickles_are_never_run(tmp_path: Path) -> None:
    (tmp_path / "coded").mkdir()
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "coded" / "coded.py").write_text(trap)
    assert "needs code of its own" in refused(tmp_path / "coded")
    assert "pickle" in refused("pandas")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "data.pkl").write_bytes(b"cbuiltins\nexec\n(S" + repr(trap).encode() + b"\ntR.")
    assert str(tmp_path / "pickled") in refused(tmp_path / "pickled")
    assert not (tmp_path / "ran").exists()


def test_a_missing_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    for streaming in (False, True):
        assert "check the name and the network" in refused("someone/something", streaming=streaming)
