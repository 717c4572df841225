"""LlamaGen's lists and code folders: what its scripts wrote is read as they numbered it, or told why not."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arra.data.llamagen_lists import LlamaGenCodesSource, LlamaGenListSource
from arra.data.records import Failure, Found, Record, Skipped
from arra.errors import ArraError

TEXTS = ["a cat", "A cat. It sits.", "A cat."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lists").mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    return tmp_path


def line(folder: Path, number: int, text: object = TEXTS) -> dict[str, object]:
    return {"image_path": str(folder / f"{number}.png"), "text": text}


def write(path: Path, lines: list[object]) -> None:
    path.write_text("".join(f"{json.dumps(item)}\n" for item in lines))


def scan(folder: Path, **settings: Any) -> list[Found]:
    chosen = {"path": str(folder / "lists"), "image_root": str(folder)} | settings
    return list(LlamaGenListSource(**chosen).scan())


def test_ids_are_the_numbers_of_the_features(folder: Path) -> None:
    """Lists in the order of their names, lines from 0, also past a line that is blank."""
    write(folder / "lists" / "b.jsonl", [line(folder, 2)])
    write(folder / "lists" / "a.jsonl", [line(folder, 0)])
    with (folder / "lists" / "a.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(line(folder, 1))}")
    (folder / "lists" / "notes.txt").write_text("no list")
    found = scan(folder)
    assert [item.id for item in found] == ["a/0", "a/2", "b/0"]
    assert [item.where for item in found][1] == f"{folder / 'lists' / 'a.jsonl'}: line 3"
    assert [item.id for item in scan(folder, path=str(folder / "lists" / "b.jsonl"))] == ["b/0"]


@pytest.mark.parametrize(
    ("settings", "prompt", "alternatives"),
    [
        ({}, "A cat. It sits.", ()),
        ({"caption": "blip"}, "a cat", ()),
        ({"caption": "llava_first"}, "A cat.", ()),
        ({"use_alternatives": True}, "A cat. It sits.", ("a cat", "A cat.")),
        ({"use_alternatives": True, "trunc_caption": True}, "A cat", ("a cat",)),
    ],
)
def test_captions(folder: Path, settings: dict[str, Any], prompt: str, alternatives: tuple[str, ...]) -> None:
    write(folder / "lists" / "a.jsonl", [line(folder, 0)])
    [record] = scan(folder, **settings)
    assert isinstance(record, Record)
    assert (record.prompt, record.alternatives) == (prompt, alternatives)


def test_blank_texts_are_no_alternatives(folder: Path) -> None:
    write(folder / "lists" / "a.jsonl", [line(folder, 0, [" ", "llava", None]), line(folder, 1, ["x", "x", "x"])])
    assert [r.alternatives for r in scan(folder, use_alternatives=True) if isinstance(r, Record)] == [(), ()]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image_path": "0.png", "text": "a cat"}, "expected {'image_path': path, 'text': [blip, llava, llava_first]}"),
        ({"image_path": "0.png", "text": ["a", "b"]}, "expected {'image_path'"),
        ({"image_path": 5, "text": TEXTS}, "expected {'image_path'"),
        ({"text": TEXTS}, "expected {'image_path'"),
        ([], "expected {'image_path'"),
        ({"image_path": "0.png", "text": ["a", 5, "c"]}, "text is ['a', 5, 'c']; expected three texts"),
        ({"image_path": "0.png", "text": ["a", None, "c"]}, "no text llava; choose another caption"),
        ({"image_path": "gone.png", "text": TEXTS}, "picture 'gone.png' does not exist"),
        ({"image_path": "/etc/hostname", "text": TEXTS}, "or set image_root to the folder that holds the pictures"),
    ],
)
def test_a_line_that_is_wrong(folder: Path, item: object, message: str) -> None:
    write(folder / "lists" / "a.jsonl", [line(folder, 0), item, line(folder, 1)])
    first, failure, last = scan(folder)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(failure, Failure)
    assert (failure.id, failure.where) == ("a/1", f"{folder / 'lists' / 'a.jsonl'}: line 2")
    assert message in failure.reason


@pytest.mark.parametrize("seed", range(5))
def test_every_line_comes_out_once(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    bad = [b"{", b"\xff", b"[1]", json.dumps(line(folder, 99)).encode()]
    good = json.dumps(line(folder, 0)).encode()
    lines = [good if chance.random() < 0.5 else chance.choice(bad) for _ in range(60)]
    (folder / "lists" / "a.jsonl").write_bytes(b"\n".join(lines))
    found = scan(folder)
    assert [item.id for item in found] == [f"a/{number}" for number in range(60)]
    assert [isinstance(item, Record) for item in found] == [item == good for item in lines]


def test_caption_features(folder: Path) -> None:
    write(folder / "lists" / "a.jsonl", [line(folder, 0)])
    (folder / "t5" / "a").mkdir(parents=True)
    np.save(folder / "t5" / "a" / "0.npy", np.zeros((1, 3, 2048), dtype=np.float32))
    source = LlamaGenListSource(path=str(folder / "lists"), caption_features=str(folder / "t5"))
    assert source.caption_feature_path("a/0") == folder / "t5" / "a" / "0.npy"
    assert source.caption_feature_path("a/0").is_file()
    short = LlamaGenListSource(path=str(folder / "lists"), short_caption_features=str(folder / "t5"))
    assert short.caption_feature_path("a/0", short=True) == folder / "t5" / "a" / "0.npy"
    for name in ("caption_features", "short_caption_features"):
        with pytest.raises(ArraError, match=f" {name} is not set"):
            LlamaGenListSource(path="x").caption_feature_path("a/0", short=name.startswith("short"))
        with pytest.raises(ArraError, match=rf" {name} .* is no folder"):
            scan(folder, **{name: str(folder / "none")})


def test_lists_that_cannot_be_used(folder: Path) -> None:
    for path in (folder / "lists", folder / "none", folder / "0.png"):
        with pytest.raises(ArraError, match=r"no .jsonl list; expected such a file, or a folder of them"):
            scan(folder, path=str(path))
    write(folder / "lists" / "a.jsonl", [])
    with pytest.raises(ArraError, match=r"image_root .* is no folder"):
        scan(folder, image_root=str(folder / "none"))


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    """Twelve ten-crop code files as `extract_codes_c2i.py` names them, and their labels."""
    for number in range(12):
        save(tmp_path, number, np.arange(90).reshape(1, 10, 9) + number, label=number % 5)
    return tmp_path


def save(folder: Path, number: object, codes: np.ndarray, *, label: int) -> None:
    for kind, array in (("codes", codes), ("labels", np.array([label]))):
        path = folder / f"imagenet48_{kind}" / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, array)


def codes(folder: Path, **settings: Any) -> LlamaGenCodesSource:
    return LlamaGenCodesSource(path=str(folder / "imagenet48_codes"), **settings)


def test_codes_come_out_as_they_went_in(extracted: Path) -> None:
    source = codes(extracted, num_classes=5)
    found = list(source.scan())
    assert [(r.id, r.label, r.image, r.prompt) for r in found if isinstance(r, Record)] == [
        (str(number), number % 5, None, "") for number in range(12)
    ]
    assert len(found) == 12
    for number in (0, 10):
        read = source.read_codes(str(number))
        assert read.dtype == np.int32
        assert np.array_equal(read, np.arange(90).reshape(10, 9) + number)
    assert source.class_names() == ("0", "1", "2", "3", "4")


def test_the_folder_of_the_other_range_lies_beside(tmp_path: Path) -> None:
    """As LlamaGen finds it: `ten_crop/` becomes `ten_crop_105/` in the path."""
    first, second = (tmp_path / f"c2i_flip_{name}" / "imagenet48_codes" for name in ("ten_crop", "ten_crop_105"))
    for path in (first, second, tmp_path / "other_codes"):
        path.mkdir(parents=True)
    source = LlamaGenCodesSource(path=str(first))
    assert source.folders((1.1,)) == (first,)
    assert source.folders((1.1, 1.05)) == (first, second)
    named = LlamaGenCodesSource(path=str(first), second=str(tmp_path / "other_codes"))
    assert named.folders((1.1, 1.2)) == (first, tmp_path / "other_codes")
    np.save(first / "0.npy", np.array([[1, 2, 3, 4]]))
    np.save(second / "0.npy", np.array([[5, 6, 7, 8]]))
    assert source.read_codes("0").tolist() == [[1, 2, 3, 4]]
    assert source.read_codes("0", folder=second).tolist() == [[5, 6, 7, 8]]


def test_other_ranges_that_have_no_folder(extracted: Path, tmp_path: Path) -> None:
    source = codes(extracted)
    for ranges, message in (
        ((1.1, 1.05), "no folder above it ends in ten_crop, so none of range 1.05 lies beside; name it as 'second'"),
        ((1.1, 1.2), "second code folder is of range 1.05, data.crop.range says 1.2; name the folder"),
        ((1.1, 1.05, 1.2), "data.crop.range has 3 numbers, code folders are of one or two"),
    ):
        with pytest.raises(ArraError, match=message):
            source.folders(ranges)
    with pytest.raises(ArraError, match=r"'second' names a second code folder, data.crop.range has one number"):
        codes(extracted, second=str(extracted)).folders((1.1,))
    with pytest.raises(ArraError, match=r"no folder .*none, for the codes of range 1.2; name it as 'second'"):
        codes(extracted, second=str(extracted / "none")).folders((1.1, 1.2))
    (tmp_path / "ten_crop" / "x_codes").mkdir(parents=True)
    with pytest.raises(ArraError, match=r"no folder .*ten_crop_105/x_codes, for the codes of range 1.05"):
        LlamaGenCodesSource(path=str(tmp_path / "ten_crop" / "x_codes")).folders((1.1, 1.05))


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint16, ">i4"])
def test_one_variant_and_any_integer(extracted: Path, dtype: Any) -> None:
    save(extracted, 0, np.array([[1, 2, 3, 4]], dtype=dtype), label=0)
    assert codes(extracted).read_codes("0").tolist() == [[1, 2, 3, 4]]
    save(extracted, 0, np.asfortranarray(np.arange(12, dtype=dtype).reshape(1, 2, 6)), label=0)
    assert codes(extracted, grid=(2, 3)).read_codes("0").tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_gaps_and_strangers_are_told(extracted: Path) -> None:
    for name in ("codes/0.npy", "codes/3.npy", "codes/4.npy", "labels/7.npy", "codes/11.npy"):
        (extracted / f"imagenet48_{name}").unlink()
    for name in ("007.npy", "x.npy", "1.txt", "\u0663.npy", f"{10**30}.npy"):
        (extracted / "imagenet48_codes" / name).write_bytes(b"")
    save(extracted, 8, np.zeros((1, 9), dtype=int), label=5)
    np.save(extracted / "imagenet48_labels" / "9.npy", np.array([[1]]))
    np.save(extracted / "imagenet48_labels" / "10.npy", np.array([1.0]))
    found = list(codes(extracted, num_classes=5).scan())
    assert [item.id for item in found if isinstance(item, Record)] == ["1", "2", "5", "6"]
    skipped = {item.id: item.reason for item in found if isinstance(item, Skipped)}
    strangers = ["007.npy", "1.txt", f"{10**30}.npy", "x.npy", "\u0663.npy"]
    assert list(skipped) == [*strangers, "0", "3 to 4", "11"]
    assert skipped["3 to 4"] == "no code file of number 3 to 4; extract again if a picture is missing"
    failed = {item.id: item.reason for item in found if isinstance(item, Failure)}
    assert "picture '7.npy' does not exist" in failed["7"]
    assert "label 5; expected 0 to 4" in failed["8"]
    assert "label of shape (1, 1); expected (1,)" in failed["9"]
    assert "holds float64; expected integers" in failed["10"]


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (np.zeros((1, 2, 9)), {}, "holds float64; expected integers"),
        (np.zeros((1, 9), dtype=bool), {}, "holds bool; expected integers"),
        (np.array([[{}]]), {}, "no .npy file of integers"),
        (np.zeros(9, dtype=int), {}, r"shape \(9,\); expected \(1, variants, codes\) or \(1, codes\)"),
        (np.zeros((2, 9), dtype=int), {}, r"shape \(2, 9\); expected"),
        (np.zeros((2, 3, 9), dtype=int), {}, r"shape \(2, 3, 9\); expected"),
        (np.zeros((1, 1, 3, 3), dtype=int), {}, r"shape \(1, 1, 3, 3\); expected"),
        (np.zeros((1, 0, 9), dtype=int), {}, "no .npy file of integers|shape"),
        (np.zeros((1, 8), dtype=int), {}, "8 codes are no square; set grid to their rows and columns"),
        (np.zeros((1, 9), dtype=int), {"grid": (2, 3)}, "9 codes; expected 2 x 3 as grid says"),
        (np.full((1, 9), 16384), {}, "codes from 16384 to 16384; expected 0 to 16383"),
        (np.full((1, 9), -1), {}, "codes from -1 to -1; expected 0 to 16383"),
        (np.full((1, 9), 100), {"num_codes": 100}, "expected 0 to 99"),
        (np.full((1, 9), 2**64 - 1, dtype=np.uint64), {"num_codes": 2**31}, "codes from 18446744073709551615"),
    ],
)
def test_codes_that_cannot_be_used(extracted: Path, array: np.ndarray, settings: dict[str, Any], message: str) -> None:
    save(extracted, 3, array, label=0)
    with pytest.raises(ValueError, match=message) as caught:
        codes(extracted, **settings).read_codes("3")
    assert "\n" not in str(caught.value)


def test_hostile_code_files(extracted: Path) -> None:
    """Cut, changed at random, empty, or with a header that claims a terabyte: always one line, never a crash."""
    path = extracted / "imagenet48_codes" / "0.npy"
    good, chance = path.read_bytes(), random.Random(0)
    huge = good[:128].replace(b"(1, 10, 9), }" + b" " * 11, b"(1, 1000000, 999999), }".ljust(24)) + good[128:]
    broken = [b"", good[:5], good[:100], good[:-1], b"PK\x03\x04" + good, huge]
    for _ in range(500):
        changed = bytearray(good)
        for _ in range(chance.choice([1, 3])):
            changed[chance.randrange(128)] = chance.randrange(256)
        broken.append(bytes(changed))
    told: list[str] = []
    for content in broken:
        path.write_bytes(content)
        try:
            codes(extracted).read_codes("0")
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 300
    assert not any("\n" in line for line in told)
    for name in ("99", "../imagenet48_labels/0", "x\0"):
        with pytest.raises(ValueError, match=r"does not exist|leaves|no file name"):
            codes(extracted).read_codes(name)


def test_code_folders_that_cannot_be_used(extracted: Path) -> None:
    with pytest.raises(ArraError, match="no such folder; expected extracted codes"):
        list(LlamaGenCodesSource(path=str(extracted / "none_codes")).scan())
    (extracted / "empty_codes").mkdir()
    with pytest.raises(ArraError, match=r"no label folder .*empty_labels; set labels to it"):
        list(LlamaGenCodesSource(path=str(extracted / "empty_codes")).scan())
    (extracted / "empty_labels").mkdir()
    with pytest.raises(ArraError, match=r"no codes; expected 0.npy, 1.npy"):
        list(LlamaGenCodesSource(path=str(extracted / "empty_codes")).scan())
    (extracted / "imagenet48_codes").rename(extracted / "other")
    with pytest.raises(ArraError, match="does not end in _codes; set labels to the folder of labels"):
        list(LlamaGenCodesSource(path=str(extracted / "other")).scan())
    labels = str(extracted / "imagenet48_labels")
    assert len(list(LlamaGenCodesSource(path=str(extracted / "other"), labels=labels).scan())) == 12
