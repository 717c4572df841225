"""Data of LlamaGen as sources: its text-to-image lists, and the code folders that its extraction writes.

First stage of the pipeline. Source: LlamaGen, `language/extract_t5_feature.py` and `extract_codes_c2i.py`.
Legend: N files, L codes of a picture, V variants of it (crops, flips), 2048 the width of T5 features.
"""

import math
import os
import warnings
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int32, Int64, Integer
from numpy.lib.format import open_memmap
from pydantic import Field

from arra.data.folder import inside_image_root
from arra.data.lines import parse_json, read_lines
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source, inside
from arra.errors import ArraError

CAPTIONS = ("blip", "llava", "llava_first")
"""What the three texts of a line are, in their order."""
BROKEN_HEADER = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError, TokenError,
)  # fmt: skip
"""What numpy's parsing of a hostile `.npy` header may raise."""


class LlamaGenListSource(Source):
    """Lists of captioned pictures: a line is `{"image_path": path, "text": [blip, llava, llava_first]}`."""

    kind: Literal["llamagen-list"] = "llamagen-list"
    path: str
    """A `.jsonl` file, or a folder whose `.jsonl` files are read in the order of their names."""
    caption: Literal["blip", "llava", "llava_first"] = "llava"
    """Which of the three texts is the prompt."""
    use_alternatives: bool = False
    """Whether the other texts become alternatives."""
    trunc_caption: bool = False
    """Whether texts end before their first '.'."""
    image_root: str | None = None
    """Folder that must hold the pictures; null takes the folder of the lists."""
    caption_features: str | None = None
    """Folder of T5 features, `{list}/{line}.npy`, float32 (1, up to 120, 2048); made from the same caption."""
    short_caption_features: str | None = None
    """The same of short captions, which LlamaGen takes for 30 % of the pictures."""

    def scan(self) -> Iterator[Found]:
        lists = self._lists()
        root = Path(self.image_root) if self.image_root is not None else lists[0].parent
        if not root.is_dir():
            raise ArraError(f"{self.path}: image_root {root} is no folder; name the folder that holds the pictures")
        for name in ("caption_features", "short_caption_features"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise ArraError(f"{self.path}: {name} {folder} is no folder; expected T5 features")
        for path in lists:
            try:
                for number, line in read_lines(path):
                    yield self._found(root, f"{path.stem}/{number - 1}", f"{path}: line {number}", line)
            except OSError as error:
                yield Failure(str(path), str(path), f"cannot be read ({error.strerror})")

    def caption_feature_path(self, record_id: str, *, short: bool = False) -> Path:
        """Where the T5 features of a record's caption, or of its short one, lie.

        Raises:
            ArraError: the folder is not set.
        """
        name = "short_caption_features" if short else "caption_features"
        folder = getattr(self, name)
        if folder is None:
            raise ArraError(f"{self.path}: {name} is not set; name the folder of T5 features")
        return Path(folder) / f"{record_id}.npy"

    def _lists(self) -> list[Path]:
        path = Path(self.path)
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not all(file.is_file() and file.suffix == ".jsonl" for file in found):
            raise ArraError(f"{path}: no .jsonl list; expected such a file, or a folder of them")
        return found

    def _found(self, root: Path, name: str, where: str, line: bytes) -> Record | Failure:
        try:
            row = parse_json(line)
            image = row.get("image_path") if isinstance(row, dict) else None
            texts = row.get("text") if isinstance(row, dict) else None
            if not isinstance(image, str) or not isinstance(texts, list) or len(texts) != len(CAPTIONS):
                raise ValueError(f"expected {{'image_path': path, 'text': [{', '.join(CAPTIONS)}]}}")
            if not all(isinstance(text, str | None) for text in texts):
                raise ValueError(f"text is {repr(texts)[:80]}; expected three texts: {', '.join(CAPTIONS)}")
            chosen = texts[CAPTIONS.index(self.caption)]
            if chosen is None:
                raise ValueError(f"no text {self.caption}; choose another caption or remove the line")
            file = inside_image_root(root, image)
        except ValueError as error:
            return Failure(name, where, str(error))
        prompt = self._cut(chosen)
        others = dict.fromkeys(self._cut(text) for text in texts if text is not None and text.strip())
        alternatives = tuple(text for text in others if text.strip() and text != prompt)
        return Record(
            id=name,
            image=ImageRef("file", str(file)),
            prompt=prompt,
            alternatives=alternatives if self.use_alternatives else (),
            where=where,
        )

    def _cut(self, text: str) -> str:
        return text.partition(".")[0] if self.trunc_caption else text


class LlamaGenCodesSource(Source):
    """Extracted codes in place of pictures: `{i}.npy` in a code folder, the class in `{i}.npy` of a label folder."""

    kind: Literal["llamagen-codes"] = "llamagen-codes"
    path: str
    """The code folder, as `imagenet256_codes`; integers (1, V, L) or (1, L)."""
    second: str | None = None
    """The code folder of the same pictures at the second of two crop ranges; null takes the folder beside, as LlamaGen
    names it: `..._ten_crop_105/imagenet256_codes` for `..._ten_crop/imagenet256_codes`."""
    labels: str | None = None
    """The label folder, integers (1,); null takes the code folder's name with `_labels` in place of `_codes`."""
    num_classes: int = Field(1000, gt=0)
    """Labels are below this."""
    tokenizer: str = Field("llamagen-vq16", min_length=1)
    """Who made the codes; they are of no use to another tokenizer."""
    num_codes: int = Field(16384, gt=0, le=2**31)
    """Codes are below this."""
    grid: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    """Rows and columns of codes; null takes a square."""

    def scan(self) -> Iterator[Found]:
        root, labels = Path(self.path), self._labels()
        numbers, others = _numbered_files(root)
        for name in others:
            yield Skipped(name, str(root / name), "no code file; those are called 0.npy, 1.npy, ...")
        if not len(numbers):
            raise ArraError(f"{root}: no codes; expected 0.npy, 1.npy, ... as LlamaGen extracts them")
        last = int(max(numbers[-1], _numbered_files(labels)[0].max(initial=0)))
        expected = 0
        for number in map(int, numbers):
            if number > expected:
                yield self._gap(expected, number - 1)
            yield self._found(number, labels)
            expected = number + 1
        if expected <= last:
            yield self._gap(expected, last)

    def class_names(self) -> tuple[str, ...]:
        """The numbers of the classes: code folders hold no names."""
        return tuple(str(label) for label in range(self.num_classes))

    def folders(self, ranges: Sequence[float]) -> tuple[Path, ...]:
        """The code folder of each range of a ten-crop.

        Raises:
            ArraError: there is none for one of them, or one too many is named.
        """
        first = Path(self.path)
        if len(ranges) == 1:
            if self.second is not None:
                raise ArraError(
                    f"{first}: 'second' names a second code folder, data.crop.range has one number; set [1.1, 1.05]"
                )
            return (first,)
        if len(ranges) > 2:
            raise ArraError(f"{first}: data.crop.range has {len(ranges)} numbers, code folders are of one or two")
        if self.second is None and ranges[1] != 1.05:
            raise ArraError(
                f"{first}: LlamaGen's second code folder is of range 1.05, data.crop.range says {ranges[1]:g}; name "
                "the folder of that range as 'second'"
            )
        second = self._beside() if self.second is None else Path(self.second)
        if not second.is_dir():
            raise ArraError(f"{first}: no folder {second}, for the codes of range {ranges[1]:g}; name it as 'second'")
        return first, second

    def read_codes(self, record_id: str, *, folder: Path | None = None) -> Int32[np.ndarray, "V L"]:
        """The codes of all variants of a picture, from the source's own folder or another one like it.

        Raises:
            ValueError: no such file, no integers, another shape, or codes out of range; one line that says which.
        """
        path = inside(folder or Path(self.path), f"{record_id}.npy")
        codes = _read_integers(path)
        shape, codes = codes.shape, codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
        if codes.ndim != 2 or codes.size == 0 or (len(shape) == 2 and len(codes) != 1):
            raise ValueError(f"{path}: shape {shape}; expected (1, variants, codes) or (1, codes)")
        length = codes.shape[1]
        if self.grid is None and math.isqrt(length) ** 2 != length:
            raise ValueError(f"{path}: {length} codes are no square; set grid to their rows and columns")
        if self.grid is not None and math.prod(self.grid) != length:
            raise ValueError(f"{path}: {length} codes; expected {self.grid[0]} x {self.grid[1]} as grid says")
        if codes.min() < 0 or codes.max() >= self.num_codes:
            raise ValueError(f"{path}: codes from {codes.min()} to {codes.max()}; expected 0 to {self.num_codes - 1}")
        return codes.astype(np.int32)

    def _found(self, number: int, labels: Path) -> Record | Failure:
        name, where = str(number), str(Path(self.path) / f"{number}.npy")
        try:
            inside(Path(self.path), f"{number}.npy")
            path = inside(labels, f"{number}.npy")
            label = _read_integers(path)
            if label.shape != (1,):
                raise ValueError(f"{path}: label of shape {label.shape}; expected (1,)")
            if not 0 <= label[0] < self.num_classes:
                raise ValueError(f"{path}: label {label[0]}; expected 0 to {self.num_classes - 1}")
        except ValueError as error:
            return Failure(name, where, str(error))
        return Record(id=name, image=None, label=int(label[0]), where=where)

    def _beside(self) -> Path:
        """Where LlamaGen looks for the codes of the other range: the last folder above that ends in `ten_crop`."""
        parts = list(Path(self.path).absolute().parts)
        for place in range(len(parts) - 2, 0, -1):
            if parts[place].endswith("ten_crop"):
                return Path(*parts[:place], f"{parts[place]}_105", *parts[place + 1 :])
        raise ArraError(
            f"{self.path}: no folder above it ends in ten_crop, so none of range 1.05 lies beside; name it as 'second'"
        )

    def _gap(self, first: int, last: int) -> Skipped:
        numbers = f"{first}" if first == last else f"{first} to {last}"
        return Skipped(numbers, self.path, f"no code file of number {numbers}; extract again if a picture is missing")

    def _labels(self) -> Path:
        root = Path(self.path)
        if not root.is_dir():
            raise ArraError(f"{root}: no such folder; expected extracted codes, as imagenet256_codes")
        name = root.resolve().name
        if self.labels is None and not name.endswith("_codes"):
            raise ArraError(f"{root}: its name does not end in _codes; set labels to the folder of labels")
        labels = Path(self.labels or root.resolve().with_name(f"{name.removesuffix('_codes')}_labels"))
        if not labels.is_dir():
            raise ArraError(f"{root}: no label folder {labels}; set labels to it")
        return labels


def _numbered_files(folder: Path) -> tuple[Int64[np.ndarray, "N"], list[str]]:
    """The numbers of `{i}.npy` in order, and the other names."""
    numbers, others = array("q"), []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix == ".npy" and len(stem) < 18 and stem.isascii() and stem.isdigit() and str(int(stem)) == stem:
                numbers.append(int(stem))
            else:
                others.append(entry.name.encode("utf-8", "backslashreplace").decode())
    return np.sort(np.array(numbers, dtype=np.int64)), sorted(others)


def _read_integers(path: Path) -> Integer[np.ndarray, "..."]:
    """The array of a `.npy` file, mapped: a header that claims more than the file holds allocates nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's advice on headers that Python 2 wrote
            values = open_memmap(path, mode="r")
    except BROKEN_HEADER as error:
        raise ValueError(f"{path}: no .npy file of integers ({' '.join(str(error).split())[:200]})") from error
    if values.dtype.kind not in "iu":
        raise ValueError(f"{path}: holds {values.dtype}; expected integers")
    return np.asarray(values)
