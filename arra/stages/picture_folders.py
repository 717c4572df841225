"""Pictures in files, to be measured: a folder of them, or one that `arra generate` has filled.

    folder --names--> FolderPictures --read: decode in threads, fit--> uint8 pictures --> arra.evaluate

Nothing is left out in silence: a file that cannot be read ends the measurement and is named.

Legend: N pictures, H W pixels.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arra.data.folder import METADATA, OTHER_SUFFIXES, SUFFIXES, FolderSource
from arra.data.images import FORMATS, Grey16
from arra.data.lines import SPLITS, one_line, parse_json, read_lines, split_name
from arra.data.records import BROKEN_PICTURE, Record, decode_image, inside, read_file
from arra.errors import ArraError
from arra.evaluate.sets import Filter, chosen_rows
from arra.stages.samples import GRID_FILE, LIST_FILE, LISTS, PICTURE, REQUEST_FILE

READERS = min(8, os.cpu_count() or 1)
"""Threads that decode: Pillow and zlib let others run meanwhile."""
MAX_SIDE = 4096
"""Pixels a side that pictures are brought to at most: greater ones, many at a time, would fill the memory."""
LOSSY = frozenset((".jpg", ".jpeg", ".jpe", ".jfif"))
OWN_FACTS = frozenset(("file", "seed", "prompt", "label", "class", "id"))
"""What `samples.jsonl` says of one picture; all else it says of how the set was made."""

Given = TypeVar("Given")
Got = TypeVar("Got")


@dataclass(frozen=True)
class Fit:
    """How pictures are brought to one size."""

    size: int | None = None
    """Pixels a side: the shorter side is resized to it, the middle square is kept. None leaves pictures alone."""
    filter: str = "bicubic"
    """One of `Filter`, Pillow's."""

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= MAX_SIDE:
            raise ArraError(f"--image-size {self.size}: expected pixels, 1 to {MAX_SIDE:,}")
        if self.filter not in get_args(Filter):
            raise ArraError(f"--filter {self.filter}: unknown; expected one of {', '.join(get_args(Filter))}")

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        """The RGB picture at that size."""
        size = self.size
        if size is None or image.size == (size, size):
            return np.asarray(image)
        scale = size / min(image.size)
        across, down = (max(size, round(side * scale)) for side in image.size)
        if (across, down) != image.size:
            image = image.resize((across, down), Image.Resampling[self.filter.upper()])
        left, top = (across - size) // 2, (down - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))

    def told(self, sizes: Iterable[tuple[int, int]]) -> str:
        """What is done to pictures of these sides, for a card: `none`, `384 -> 256 bicubic (Pillow)`, ..."""
        size, others = self.size, sorted({sides for sides in sizes if sides != (self.size, self.size)})
        if size is None or not others:
            return "none"
        if all(size in sides and min(sides) == size for sides in others):
            return f"middle square of {size}"
        (across, down), *more = others
        first = "several sizes" if more else str(across) if across == down else f"{across} x {down}"
        square = "" if all(across == down for across, down in others) else ", middle square"
        return f"{first} -> {size} {self.filter} (Pillow){square}"


def in_threads(call: Callable[[Given], Got], items: Sequence[Given]) -> Iterator[Got]:
    """What a call gives for each, in order; a few hundred are under way at most."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(items), 256):
            yield from pool.map(call, items[start : start + 256])


def class_balance(labels: Sequence[int]) -> str:
    """How many pictures each class has, in words: `50 each of 1000 classes`, `48 to 52 each of 10 classes`."""
    counts = Counter(labels)
    least, most = min(counts.values()), max(counts.values())
    each = str(least) if least == most else f"{least} to {most}"
    return f"{each} each of {len(counts)} class{'' if len(counts) == 1 else 'es'}"


@dataclass
class FolderPictures:
    """Files of a folder as a `arra.evaluate.sets.PictureSet`."""

    root: Path
    ids: Sequence[str]
    """Paths below the folder."""
    fit: Fit
    grey16: Grey16 = "full"
    prompts: Sequence[str] | None = None
    labels: Sequence[int] | None = None
    records: Sequence[str] | None = None
    """Which record of a store each was painted for: the id of the real picture of the same prompt."""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = str(self.root)
        self.resize = "none" if self.fit.size is None else self.fit.told(set(in_threads(self._sides, self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Some pictures, in the order asked for.

        Raises:
            ArraError: one cannot be read; the line names it.
        """
        return list(in_threads(self._decoded, [self.ids[row] for row in rows]))

    def content_hash(self) -> str:
        """SHA-256 of the files in their order and of what is done to their pictures, not of names."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        told = hashlib.sha256(f"files, {self.fit}, {self.grey16}\n".encode())
        for digest in in_threads(lambda name: hashlib.sha256(self._bytes(name)).digest(), self.ids):
            told.update(digest)
        return told.hexdigest()

    def _bytes(self, name: str) -> bytes:
        try:
            inside(self.root, name)
            return read_file(str(self.root / name))
        except (OSError, ValueError) as error:
            raise self._fault(name, error) from error

    def _decoded(self, name: str) -> UInt8[np.ndarray, "H W 3"]:
        content = self._bytes(name)
        try:
            return self.fit(decode_image(content, grey16=self.grey16))
        except ValueError as error:
            raise self._fault(name, error) from error

    def _sides(self, name: str) -> tuple[int, int]:
        """Width and height as the file says, without decoding."""
        try:
            with Image.open(self.root / name, formats=FORMATS) as image:
                return image.size
        except BROKEN_PICTURE as error:
            raise self._fault(name, error) from error

    def _fault(self, name: str, error: BaseException) -> ArraError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        return ArraError(f"{self.root / name}: {reason}; replace the file or move it away, sets are measured whole")


def open_folder(
    folder: Path, *, fit: Fit, max_images: int | None = None, split: str | None = None, grey16: Grey16 = "full"
) -> FolderPictures:
    """The pictures of a folder and of those below it, by their names.

    Class folders (`CLASS/x.png`) give labels; metadata files and texts beside pictures give prompts, where all have
    one. `split` takes the pictures of the first folder of that name.

    Raises:
        ArraError: none are there, or one is in a format that is not read or a link that leaves the folder.
    """
    names, texts = _listed(folder)
    about: dict[str, Any] = {}
    if GRID_FILE in names and any(PICTURE.fullmatch(name) for name in names):  # copied from a folder of arra generate
        names.remove(GRID_FILE)
        about["left_out"] = GRID_FILE
    if split is not None:
        wanted = split_name(split)
        names = [name for name in names if _first_split(name) == wanted]
    if not names:
        where = f"{folder}: no pictures" if split is None else f"{folder}: no pictures in a folder of split '{split}'"
        raise ArraError(f"{where}; expected files as {', '.join(SUFFIXES[:3])}, in folders or not")
    total = len(names)
    names = [names[row] for row in chosen_rows(total, max_images)]
    if len(names) < total:
        about["chosen"] = f"{len(names)} of {total}, at random (the same for every set of {total})"
    if jpeg := sum(os.path.splitext(name)[1].lower() in LOSSY for name in names):
        about["jpeg_files"] = jpeg
    prompts, labels = _captions(folder, names) if texts else (None, None)
    if labels is None:
        labels = _class_labels(names)
    if labels is not None:
        about["class_balance"] = class_balance(labels)
    return FolderPictures(folder, names, fit, grey16=grey16, prompts=prompts, labels=labels, about=about)


def open_samples(folder: Path, *, fit: Fit, max_images: int | None = None) -> FolderPictures:
    """The pictures that `arra generate` has painted, with what it noted of each.

    `about` has what all were made with (guidance, sampling, hashes of model and tokenizer), what was asked for, how
    classes are balanced, and how many pictures were made by a condition and a seed that another one has too.

    Raises:
        ArraError: they are not all there, or the list of them is damaged.
    """
    request = _read_request(folder)
    rows = _read_samples(folder)
    asked = request.get("num_images")
    if isinstance(asked, int) and len(rows) < asked:
        raise ArraError(
            f"{folder}: {len(rows)} of {asked} pictures are painted; run the arra generate that began it again"
        )
    if not rows:
        raise ArraError(f"{folder / LIST_FILE}: lists no pictures; run the arra generate that began it again")
    total = len(rows)
    about = {key: value for key, value in rows[0].items() if key not in OWN_FACTS}
    about = {key: value for key, value in about.items() if all(row.get(key) == value for row in rows)}
    about |= {key: request[key] for key in ("seeds", "order", "image_size", "conditions", "conditions_sha256") if
              key in request}  # fmt: skip
    made = Counter(tuple(str(row.get(key)) for key in ("prompt", "label", "id", "seed")) for row in rows)
    if twice := total - len(made):
        about["same_condition_and_seed"] = twice
    rows = [rows[row] for row in chosen_rows(total, max_images)]
    if len(rows) < total:
        about["chosen"] = f"{len(rows)} of {total}, at random (the same for every set of {total})"
    labels = _every(rows, "label", int)
    if labels is not None:
        about["class_balance"] = class_balance(labels)
    return FolderPictures(
        folder,
        [row["file"] for row in rows],
        fit,
        prompts=_every(rows, "prompt", str),
        labels=labels,
        records=_every(rows, "id", str),
        about=about,
    )


def _listed(folder: Path) -> tuple[list[str], bool]:
    """The pictures below a folder, sorted, and whether there are texts about them."""
    if not folder.is_dir():
        raise ArraError(f"{folder}: no such folder; expected a folder of pictures")
    names, texts = [], False

    def told(error: OSError) -> None:
        raise ArraError(f"{error.filename}: folder cannot be read ({error.strerror}); change its permissions")

    for above, folders, files in os.walk(folder, onerror=told):
        folders[:] = [name for name in folders if not (name.startswith(".") or name == "__MACOSX")]
        if outside := [name for name in folders if not _stays(folder, Path(above, name))]:
            raise ArraError(f"{Path(above, outside[0])}: a link that leaves {folder}; measure its target by itself")
        for name in files:
            suffix, path = os.path.splitext(name)[1].lower(), Path(above, name)
            texts = texts or name in METADATA or suffix == ".txt"
            if name.startswith("."):
                continue
            if suffix in OTHER_SUFFIXES:
                raise ArraError(f"{path}: format {suffix} is not read; convert it to PNG, or move it away")
            if suffix in SUFFIXES:
                names.append(path.relative_to(folder).as_posix())
    return sorted(names), texts


def _stays(root: Path, folder: Path) -> bool:
    """Whether a folder is where its name says, or a link to another one inside (whose pictures are found there)."""
    return not folder.is_symlink() or folder.resolve().is_relative_to(root.resolve())


def _first_split(name: str) -> str | None:
    """The split that the first folder of a name means; of folders that are none, their name."""
    first, slash, _ = name.partition("/")
    return SPLITS.get(first.lower(), first) if slash else None


def _captions(folder: Path, names: Sequence[str]) -> tuple[list[str] | None, list[int] | None]:
    """Prompts and labels of all the pictures, each None unless all have one."""
    found = {item.id: item for item in FolderSource(path=str(folder)).scan() if isinstance(item, Record)}
    records = [found.get(name) for name in names]
    prompts = [record.prompt for record in records if record is not None and record.prompt]
    labels = [record.label for record in records if record is not None and record.label is not None]
    return (prompts if len(prompts) == len(names) else None), (labels if len(labels) == len(names) else None)


def _class_labels(names: Sequence[str]) -> list[int] | None:
    """Ranks of class folders, where all pictures lie in one each and these are no splits."""
    folders = [name.rpartition("/")[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2 or "" in classes or any("/" in name or name.lower() in SPLITS for name in classes):
        return None
    rank = {name: number for number, name in enumerate(classes)}
    return [rank[name] for name in folders]


def _read_request(folder: Path) -> dict[str, Any]:
    """What request.json says; empty where there is none."""
    try:
        content = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArraError(f"{folder / REQUEST_FILE}: damaged ({one_line(error)}); paint the set again") from error
    return content if isinstance(content, dict) else {}


def _read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl, by number of the picture."""
    path = folder / LIST_FILE
    others = [each.name for each in folder.glob("samples.*") if LISTS.fullmatch(each.name) and each.name != LIST_FILE]
    if not path.is_file() or others:
        state = f"{len(others)} lists of parts are not merged yet" if others else f"no {LIST_FILE} yet"
        raise ArraError(f"{folder}: not painted to the end ({state}); run the arra generate that began it again")
    rows = []
    for number, line in read_lines(path):
        try:
            row = parse_json(line)
            name = row.get("file") if isinstance(row, dict) else None
            if not isinstance(name, str) or not PICTURE.fullmatch(name):
                raise ValueError("names no picture")
            inside(folder, name)
        except ValueError as error:
            raise ArraError(f"{path}: line {number}: {one_line(error)}; run the arra generate again") from error
        rows.append(row)
    return sorted(rows, key=lambda row: int(row["file"].removesuffix(".png")))


Kind = TypeVar("Kind", str, int)


def _every(rows: Sequence[Mapping[str, Any]], key: str, kind: type[Kind]) -> list[Kind] | None:
    """What every row says of a key; None unless all do."""
    found = [row.get(key) for row in rows]
    told = [value for value in found if isinstance(value, kind) and not isinstance(value, bool)]
    return told if len(told) == len(rows) else None
