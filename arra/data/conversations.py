"""Conversation files of ARRA and Lumina-mGPT as a source, and the YAML file that gathers several of them.

First stage of the pipeline. A data point is a dialogue in which `<|image|>` says where each picture stands. A record is
the dialogue that asks for one picture and gets it: a human turn with the prompt, an answer that is `<|image|>`.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from arra.data.folder import inside_image_root
from arra.data.lines import parse_json, read_lines, split_name
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source
from arra.errors import ArraError

IMAGE = "<|image|>"
ANSWERS = ("gpt", "assistant")
META_KEYS = ("path", "type", "ratio")
MAX_RATIO = 1_000_000
"""Ratios from here on are slips of the pen."""


class ConversationsSource(Source):
    """A file of conversations: `.json` (one list) or `.jsonl` (a data point a line).

    Source: the README of ARRA; `xllmx/data/item_processor_new.py`, which drops what breaks a rule.
    """

    kind: Literal["conversations"] = "conversations"
    path: str
    """The file."""
    image_root: str | None = None
    """Folder that paths of pictures start from and must stay in; null takes the folder of the file."""
    text_only: Literal["refuse", "skip"] = "refuse"
    """Whether a conversation without a picture is a failure or is left out."""

    def scan(self) -> Iterator[Found]:
        path = Path(self.path)
        root = Path(self.image_root) if self.image_root is not None else path.parent
        if path.suffix not in (".json", ".jsonl") or not path.is_file():
            raise ArraError(f"{path}: no such conversation file; expected a file that ends in .json or .jsonl")
        if not root.is_dir():
            raise ArraError(f"{path}: image_root {root} is no folder; name the folder that holds the pictures")
        for where, point in _points_of_list(path) if path.suffix == ".json" else _points_of_lines(path):
            yield self._found(root, where, point)

    def _found(self, root: Path, where: str, point: object) -> Found:
        name = where
        try:
            if isinstance(point, ValueError):
                raise point
            conversation = read_conversation(point)
            name = conversation.id or where
            if not conversation.images and self.text_only == "skip":
                return Skipped(name, where, "no picture in this conversation")
            prompt, image = _question_and_answer(conversation)
            file = inside_image_root(root, image)
        except ValueError as error:
            return Failure(name, where, str(error))
        return Record(name, ImageRef("file", str(file)), prompt, conversation.split, where=where)


class MetaSource(Source):
    """Several conversation files, gathered by YAML: `META: [{path, type, ratio}]`, as the reference gathers records."""

    kind: Literal["meta"] = "meta"
    path: str
    """The YAML file; paths in it start from its folder."""
    image_root: str | None = None
    """As for `conversations`, for all files; null takes the folder of each."""
    text_only: Literal["refuse", "skip"] = "refuse"
    """As for `conversations`."""

    def expand(self) -> list[ConversationsSource]:
        """A source per file, in the order of the YAML; its weight is its ratio times the weight of this source.

        Raises:
            ArraError: the YAML cannot be read, or an entry says what is not known.
        """
        place = Path(self.path)
        found: list[ConversationsSource] = []
        for number, entry in enumerate(_read_meta(place), start=1):
            path, ratio = _read_entry(f"{place}: META entry {number}", entry)
            source = ConversationsSource(
                path=str(place.parent / path),
                image_root=self.image_root,
                text_only=self.text_only,
                split=self.split,
                weight=self.weight * ratio,
            )
            if source.path in [other.path for other in found]:
                raise ArraError(f"{place}: META entry {number}: {path!r} is listed twice; keep one and raise its ratio")
            found.append(source)
        return found

    def scan(self) -> Iterator[Found]:
        for source in self.expand():
            yield from source.scan()


@dataclass(frozen=True)
class Conversation:
    """A data point that keeps every rule of the format."""

    turns: list[str]
    """Human first, then in turns."""
    images: list[str]
    """Paths as written; one per `<|image|>` of the turns."""
    id: str
    """The point's own id, else the first path, else ''."""
    split: str


def read_conversation(point: object) -> Conversation:
    """What a data point says.

    Raises:
        ValueError: it breaks a rule of the format; one line that says which.
    """
    if not isinstance(point, dict):
        raise ValueError(f"a {type(point).__name__}; expected a dictionary with 'conversations' and 'image'")
    if "conversations" not in point:
        hint = " (a record of tokenised files; name the conversations it was made from)" if "file" in point else ""
        raise ValueError(f"no key 'conversations'{hint}; every data point needs one")
    turns = point["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("'conversations' is not a list of turns; expected {'from', 'value'}, a human turn first")
    values = [_value(number, turn) for number, turn in enumerate(turns)]
    images = point.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"'image' is {repr(images)[:80]}; expected a path or a list of paths, or no such key")
    marks = sum(value.count(IMAGE) for value in values)
    if images and not marks:
        raise ValueError(
            f"{len(images)} in 'image' but no {IMAGE} in any turn; the reference silently moves the picture into the "
            f"prompt; write {IMAGE} where it belongs"
        )
    if marks and "image" not in point:
        raise ValueError(f"{marks} {IMAGE} but no key 'image'; it may be left out only where no picture is meant")
    if marks != len(images):
        raise ValueError(f"{marks} {IMAGE} but {len(images)} in 'image'; the numbers must be equal")
    split = point.get("split") or ""
    if not isinstance(split, str):
        raise ValueError(f"split is {repr(split)[:80]}; expected a text")
    return Conversation(values, images, _id(point) or (images[0] if images else ""), split_name(split))


def _value(number: int, turn: object) -> str:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise ValueError(f"turn {number + 1} is {repr(turn)[:80]}; expected {{'from', 'value'}}, both texts")
    expected = ANSWERS if number % 2 else ("human",)
    if turn["from"].lower() not in expected:
        whom = f"{turn['from'][:80]!r}, expected {' or '.join(expected)}"
        raise ValueError(f"turn {number + 1} is from {whom}; turns go human, gpt, human, gpt")
    return str(turn["value"])


def _id(point: dict[str, Any]) -> str:
    found = point.get("id")
    if isinstance(found, bool) or not isinstance(found, str | int | None) or found == "":
        raise ValueError(f"id is {repr(found)[:80]}; expected a text or a whole number, or no such key")
    return "" if found is None else str(found)


def _question_and_answer(conversation: Conversation) -> tuple[str, str]:
    """The prompt and the picture's path.

    Raises:
        ValueError: the conversation is sound, but not a prompt that is answered by a picture.
    """
    turns, images = conversation.turns, conversation.images
    if not images:
        raise ValueError("no picture in this conversation; set text_only to skip to leave such conversations out")
    if len(images) > 1:
        raise ValueError(f"{len(images)} pictures; expected one, the answer to one prompt")
    if any(IMAGE in value for value in turns[::2]):
        raise ValueError(f"the picture is in a human turn; expected {IMAGE} as the answer")
    if len(turns) > 2:
        raise ValueError(f"{len(turns)} turns; expected two, a prompt and its picture")
    if turns[1].strip() != IMAGE:
        raise ValueError(f"text beside the picture in the answer; expected {IMAGE} alone")
    return turns[0], images[0]


def _points_of_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(where, data point or the error it gave) of each line."""
    try:
        for number, line in read_lines(path):
            try:
                point = parse_json(line)
            except ValueError as error:
                point = error
            yield f"{path}: line {number}", point
    except OSError as error:
        raise ArraError(f"{path}: cannot be read ({error.strerror})") from error


def _points_of_list(path: Path) -> Iterator[tuple[str, object]]:
    """(where, data point or the error it gave) of each item of a list; items are counted from 1."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        points = json.loads(text)
    except OSError as error:
        raise ArraError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        hint = "; data points without a list around them belong in a .jsonl" if error.msg == "Extra data" else ""
        raise ArraError(f"{path}: line {error.lineno}: not JSON ({error.msg}, column {error.colno}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise ArraError(f"{path}: not JSON ({str(error)[:80]})") from error
    if not isinstance(points, list):
        raise ArraError(f"{path}: holds a {type(points).__name__}; expected a list of data points")
    is_sound = _is_utf8(text)
    del text
    for number, point in enumerate(points, start=1):
        if not is_sound and not _is_utf8(json.dumps(point, ensure_ascii=False)):
            point = ValueError("not UTF-8 text; save the file as UTF-8")
        yield f"{path}: item {number}", point


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_meta(path: Path) -> list[Any]:
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArraError(f"{path}: cannot be read ({error.strerror}); expected a YAML file with META") from error
    except (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:  # odd tags
        raise ArraError(f"{path}: not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("META"), list) or not meta["META"]:
        raise ArraError(f"{path}: no list META; expected META: [{{path: train.json, ratio: 1.0}}]")
    _refuse_unknown(str(path), meta, ("META",))
    return meta["META"]


def _read_entry(where: str, entry: object) -> tuple[str, float]:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise ArraError(f"{where}: no path; expected {{path: train.json, type: default, ratio: 1.0}}")
    _refuse_unknown(where, entry, META_KEYS)
    suffix = Path(entry["path"]).suffix
    if suffix in (".pkl", ".pickle", ".pth", ".pt"):
        raise ArraError(f"{where}: pickle is not read ({entry['path']!r}); name the .json or .jsonl conversations")
    if suffix not in (".json", ".jsonl"):
        raise ArraError(f"{where}: {entry['path']!r} is of no known kind; expected a .json or .jsonl file")
    if entry.get("type", "default") != "default":
        raise ArraError(f"{where}: type {entry['type']!r} is unknown; expected 'default', or leave it out")
    ratio = entry.get("ratio", 1.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < MAX_RATIO:
        raise ArraError(f"{where}: ratio is {ratio!r}; expected a number above 0, below {MAX_RATIO}")
    return entry["path"], float(ratio)


def _refuse_unknown(where: str, found: dict[Any, Any], known: Iterable[str]) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise ArraError(f"{where}: unknown key {key!r}; {hint}")
