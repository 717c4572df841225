"""The conversation format of ARRA: every rule is checked, and what breaks one is told, never dropped or mended."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from arra.data.conversations import ConversationsSource, MetaSource
from arra.data.records import Failure, Found, Record, Skipped
from arra.errors import ArraError

Point = dict[str, Any]
PROMPT = "AP view chest x-ray image, No acute cardiopulmonary process.  No evidence of free air beneath the diaphragms."


def turn(whom: str, value: object) -> dict[str, object]:
    return {"from": whom, "value": value}


def point(number: int = 0, **changes: Any) -> Point:
    """A data point as in the paper's README."""
    good = {
        "conversations": [turn("human", f"{PROMPT} {number}"), turn("gpt", "<|image|>")],
        "image": [f"{number}.png"],
    }
    return good | changes


def without(key: str) -> Point:
    found = point()
    del found[key]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder: Path, points: list[Any], name: str = "data.json") -> Path:
    lines = [json.dumps(item, ensure_ascii=False) for item in points]
    text = "\n".join(lines) + "\n" if name.endswith("l") else f"[{', '.join(lines)}]"
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    return folder / name


def scan(path: Path, **settings: Any) -> list[Found]:
    return list(ConversationsSource(path=str(path), **settings).scan())


def reason(folder: Path, item: Any, **settings: Any) -> str:
    """Why the middle one of three data points fails; the others do not."""
    first, failure, last = scan(write(folder, [point(1), item, point(2)]), **settings)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(failure, Failure)
    assert failure.where == f"{folder / 'data.json'}: item 2"
    assert "\n" not in failure.reason
    return failure.reason


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_the_example_of_the_paper(folder: Path, name: str) -> None:
    path = write(folder, [point(0), point(1)], name)
    found = scan(path)
    assert found == [
        Record(id=f"{number}.png", image=found[number].image, prompt=f"{PROMPT} {number}")  # type: ignore[union-attr]
        for number in range(2)
    ]
    assert isinstance(found[1], Record)
    assert found[1].image is not None
    assert Path(found[1].image.path) == folder / "1.png"
    assert found[1].where == f"{path}: {'item' if name == 'data.json' else 'line'} 2"


def test_what_may_differ(folder: Path) -> None:
    points = [
        point(0, image="0.png", id=7, split="val"),
        point(1, id="one", split="test", extra=[1]),
        point(2, conversations=[turn("Human", " two \n"), turn("Assistant", " <|image|>\n")]),
        point(3, id=None, split=None, conversations=[turn("HUMAN", "three") | {"note": 1}, turn("GPT", "<|image|>")]),
    ]
    found = scan(write(folder, points))
    assert [(r.id, r.prompt, r.split) for r in found if isinstance(r, Record)] == [
        ("7", f"{PROMPT} 0", "validation"),
        ("one", f"{PROMPT} 1", "test"),
        ("2.png", " two \n", ""),
        ("3.png", "three", ""),
    ]


QUESTION, ANSWER = turn("human", "a cat"), turn("gpt", "<|image|>")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (["a cat"], "a list; expected a dictionary with 'conversations' and 'image'"),
        (without("conversations"), "no key 'conversations'; every data point needs one"),
        ({"file": "0.pkl", "len": 9}, "(a record of tokenised files; name the conversations it was made from)"),
        (point(conversations="a cat"), "'conversations' is not a list of turns"),
        (point(conversations=[]), "'conversations' is not a list of turns"),
        (point(conversations=["a cat"]), "turn 1 is 'a cat'; expected {'from', 'value'}, both texts"),
        (point(conversations=[QUESTION, {"from": "gpt"}]), "turn 2 is {'from': 'gpt'}; expected {'from', 'value'}"),
        (point(conversations=[turn("human", 5), ANSWER]), "turn 1 is {'from': 'human', 'value': 5}"),
        (point(conversations=[ANSWER, QUESTION]), "turn 1 is from 'gpt', expected human; turns go human, gpt"),
        (
            point(conversations=[QUESTION, turn("human", "<|image|>")]),
            "turn 2 is from 'human', expected gpt or assistant",
        ),
        (point(conversations=[QUESTION, ANSWER, ANSWER]), "turn 3 is from 'gpt', expected human"),
        (point(conversations=[turn("user", "a cat"), ANSWER]), "turn 1 is from 'user', expected human"),
        (point(image=5), "'image' is 5; expected a path or a list of paths"),
        (point(image=None), "'image' is None; expected a path or a list of paths, or no such key"),
        (point(image=["0.png", 5]), "'image' is ['0.png', 5]; expected"),
        (without("image"), "1 <|image|> but no key 'image'; it may be left out only where no picture is meant"),
        (point(image=[]), "1 <|image|> but 0 in 'image'; the numbers must be equal"),
        (point(image=["0.png", "1.png"]), "1 <|image|> but 2 in 'image'; the numbers must be equal"),
        (point(conversations=[QUESTION, turn("gpt", "<|image|><|image|>")]), "2 <|image|> but 1 in 'image'"),
        (
            point(conversations=[QUESTION, turn("gpt", "here")]),
            "1 in 'image' but no <|image|> in any turn; the reference silently moves the picture into the prompt",
        ),
        (
            point(conversations=[turn("human", "<|image|><|image|> mix"), ANSWER], image=["0.png", "1.png", "2.png"]),
            "3 pictures; expected one, the answer to one prompt",
        ),
        (
            point(conversations=[turn("human", "<|image|> what?"), turn("gpt", "a cat")]),
            "the picture is in a human turn; expected <|image|> as the answer",
        ),
        (point(conversations=[turn("human", "<|image|>")]), "the picture is in a human turn"),
        (point(conversations=[QUESTION, ANSWER, QUESTION]), "3 turns; expected two, a prompt and its picture"),
        (
            point(conversations=[QUESTION, turn("gpt", "Here: <|image|>")]),
            "text beside the picture in the answer; expected <|image|> alone",
        ),
        (point(id=1.5), "id is 1.5; expected a text or a whole number, or no such key"),
        (point(id=True), "id is True; expected"),
        (point(id=""), "id is ''; expected"),
        (point(split=["train"]), "split is ['train']; expected a text"),
        (point(image="gone.png"), "picture 'gone.png' does not exist"),
        (point(image="../x.png"), "leaves"),
        (point(image="/etc/hostname"), "; or set image_root to the folder that holds the pictures"),
        (point(image="a\0.png"), "'a\\x00.png' is no file name"),
    ],
)
def test_a_rule_that_is_broken(folder: Path, item: Any, message: str) -> None:
    assert message in reason(folder, item)


def test_conversations_without_pictures(folder: Path) -> None:
    talk = {"conversations": [turn("human", "hello"), turn("gpt", "hi")]}
    for item in (talk, talk | {"image": []}):
        assert "no picture in this conversation; set text_only to skip" in reason(folder, item)
        found = scan(write(folder, [item, point()]), text_only="skip")
        assert [type(each) for each in found] == [Skipped, Record]
    assert "turn 1 is from 'gpt'" in reason(folder, {"conversations": [turn("gpt", "hi")]}, text_only="skip")


def test_pictures_elsewhere(folder: Path) -> None:
    """Absolute paths, as in the paper's example, are fine below `image_root`, and the id stays as written."""
    lists = folder / "lists"
    lists.mkdir()
    path = write(lists, [point(0), point(image=[str(folder / "1.png")])])
    assert [type(item) for item in scan(path)] == [Failure, Failure]
    found = scan(path, image_root=str(folder))
    assert [item.id for item in found if isinstance(item, Record)] == ["0.png", str(folder / "1.png")]
    with pytest.raises(ArraError, match=r"image_root .* is no folder"):
        scan(path, image_root=str(folder / "none"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_every_item_comes_out_once(folder: Path, seed: int, name: str) -> None:
    chance = random.Random(seed)
    bad = [without("image"), {"conversations": [QUESTION]}, 5, point(image="gone.png"), point(9, split="\udcff")]
    items = [point(number % 10, id=number) if chance.random() < 0.5 else chance.choice(bad) for number in range(80)]
    path = write(folder, items, name)
    path.write_bytes(path.read_bytes().replace(b"\xed\xb3\xbf", b"\xff"))  # a byte that is no UTF-8
    found = scan(path, text_only="skip")
    assert len(found) == len(items)
    good = [str(item["id"]) for item in items if isinstance(item, dict) and "id" in item]
    assert [item.id for item in found if isinstance(item, Record)] == good
    assert sum(isinstance(item, Skipped) for item in found) == items.count({"conversations": [QUESTION]})
    assert sum("not UTF-8 text" in item.reason for item in found if isinstance(item, Failure)) == items.count(bad[-1])


def test_lines_that_are_no_json(folder: Path) -> None:
    path = write(folder, [point(0), point(1)], "data.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'\n \n{"conversations": [\n')
    first, second, failure = scan(path)
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert failure == Failure(f"{path}: line 5", f"{path}: line 5", "not JSON (Expecting value, column 1)")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.json", '{"a": 1}\n{"a": 2}', r"line 2: not JSON \(Extra data, column 1\); .* belong in a .jsonl"),
        ("data.json", "[{]", "line 1: not JSON"),
        ("data.json", "[" * 100_000, "not JSON"),
        ("data.json", '{"conversations": []}', "holds a dict; expected a list of data points"),
        ("data.txt", "[]", "no such conversation file; expected a file that ends in .json or .jsonl"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ArraError, match=message):
        scan(folder / name)
    with pytest.raises(ArraError, match="no such conversation file"):
        scan(folder / "none.json")


def meta(folder: Path, text: str, **settings: Any) -> MetaSource:
    (folder / "data.yaml").write_text(text)
    return MetaSource(path=str(folder / "data.yaml"), **settings)


def test_a_meta_file_expands(folder: Path) -> None:
    (folder / "deep").mkdir()
    write(folder, [point(0)])
    write(folder / "deep", [point(1)], "more.jsonl")
    text = f"META:\n- path: data.json\n- {{path: {folder}/deep/more.jsonl, type: default, ratio: 0.5}}\n"
    source = meta(folder, text, weight=3.0, split="train", image_root=str(folder), text_only="skip")
    common: dict[str, Any] = {"split": "train", "image_root": str(folder), "text_only": "skip"}
    assert source.expand() == [
        ConversationsSource(path=str(folder / "data.json"), weight=3.0, **common),
        ConversationsSource(path=str(folder / "deep" / "more.jsonl"), weight=1.5, **common),
    ]
    assert [item.id for item in source.scan()] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("META: [{path: a.pkl}]", r"META entry 1: pickle is not read \('a.pkl'\); name the .json or .jsonl"),
        ("META: [{path: a.json}, {path: a.pth}]", "META entry 2: pickle is not read"),
        ("META: [{path: a.csv}]", "'a.csv' is of no known kind; expected a .json or .jsonl file"),
        ("META: [{path: a.json, type: tex}]", "type 'tex' is unknown; expected 'default'"),
        ("META: [{path: a.json, ration: 1}]", "unknown key 'ration'; did you mean 'ratio'?"),
        ("META: [{path: a.json, shuffle: 1}]", "unknown key 'shuffle'; expected path, type, ratio"),
        ("META: [{path: a.json, ratio: 0}]", "ratio is 0; expected a number above 0"),
        ("META: [{path: a.json, ratio: -1}]", "ratio is -1; expected a number above 0"),
        ("META: [{path: a.json, ratio: .nan}]", "ratio is nan; expected a number above 0"),
        ("META: [{path: a.json, ratio: .inf}]", "ratio is inf; expected a number above 0"),
        ("META: [{path: a.json, ratio: half}]", "ratio is 'half'; expected a number above 0"),
        ("META: [{path: a.json, ratio: true}]", "ratio is True; expected a number above 0"),
        ("META: [{path: a.json}, {path: ./a.json}]", "META entry 2: './a.json' is listed twice; keep one"),
        ("META: [a.json]", "META entry 1: no path; expected {path: train.json"),
        ("META: [{ratio: 1}]", "META entry 1: no path"),
        ("META: []", r"no list META; expected META: \[{path: train.json, ratio: 1.0}\]"),
        ("META: {path: a.json}", "no list META"),
        ("[{path: a.json}]", "no list META"),
        ("meta: [{path: a.json}]", "no list META"),
        ("META: [{path: a.json}]\nmore: 1", "unknown key 'more'; expected META"),
        ("META: [", "not YAML"),
        ("META: !!python/object/apply:os.system ['false']", "not YAML"),
        ("META: !!bool maybe", "not YAML"),
    ],
)
def test_meta_files_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ArraError, match=message) as caught:
        meta(folder, text).expand()
    assert "\n" not in str(caught.value)
    with pytest.raises(ArraError, match=r"none.yaml: cannot be read \(No such file or directory\)"):
        MetaSource(path=str(folder / "none.yaml")).expand()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="text_only"):
        ConversationsSource.model_validate({"path": "a.json", "text_only": "drop"})
