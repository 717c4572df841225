"""Hugging Face data sets as a source: saved on disk, loaded by name or folder, or streamed.

First stage of the pipeline, between `datasets` and the index. Only text columns are read in the scan; pictures are read
later, still encoded, from the memory-mapped table or from the stream. No code of a data set is ever run.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from arra.data.lines import one_line
from arra.data.records import MAX_IMAGE_BYTES, Failure, Found, ImageRef, inside
from arra.data.tables import (
    Cells,
    TabularSource,
    check_columns,
    is_picture,
    number_classes,
    picture_bytes,
    read_cells,
    read_text,
)
from arra.errors import ArraError

SAVED_FILES = ("dataset_dict.json", "state.json")
"""One of them lies in every folder that `save_to_disk` made."""
ROWS_AT_A_TIME = 1000


class HuggingFaceSource(TabularSource):
    """A Hugging Face data set. Without an id column, records are called `split/row`, rows counted from 0."""

    kind: Literal["huggingface"] = "huggingface"
    path: str
    """A folder that `save_to_disk` made, another folder that `load_dataset` understands, or a name on the hub."""
    config: str | None = Field(None, min_length=1)
    """Configuration of the data set, where it has several."""
    revision: str | None = Field(None, min_length=1)
    """Commit, tag or branch on the hub; a commit makes the run repeatable."""
    data_split: str | None = Field(None, min_length=1)
    """Split to read; null reads all."""
    streaming: bool = False
    """Whether to read over the network as needed, without a copy on disk. Folders made by `save_to_disk` never are."""

    def scan(self) -> Iterator[Found]:
        for split, data in self._splits.items():
            uses, row, problem = self._uses(split, data), 0, ""
            named = self._is_named(data, uses["image"])
            ref = ImageRef("stream" if _is_streamed(data) else "dataset", self._spec(split), column=uses["image"])
            data = data.select_columns([column for use, column in uses.items() if use != "image" or named])
            for batch_size in (ROWS_AT_A_TIME, 1):  # again one by one, for the rows before the one that failed
                try:
                    for cells in _rows(data.skip(row), uses, batch_size):
                        yield self._found(split, row, cells, None if named else ref)
                        row += 1
                    problem = ""
                    break
                except _network_errors() as error:
                    raise ArraError(f"{self.path}: the network failed at row {row} ({_one_line(error)})") from error
                except _broken_data() as error:
                    problem = _one_line(error)
            if problem:
                where = f"{self.path}: {split} row {row}"
                yield Failure(where, where, f"cannot be read from here on: {problem}")

    def _found(self, split: str, row: int, cells: Cells, ref: ImageRef | None) -> Found:
        """What a row tells; `ref` without its place, or nothing where the cell names a file."""
        name, where = (
            (f"{split}/{row}", f"{self.path}: {split} row {row}") if split else (f"{row}", f"{self.path}: row {row}")
        )
        try:
            if ref is not None:
                image = ImageRef(ref.kind, ref.path, place=row, column=ref.column)
            elif cells["image"] is None:
                raise ValueError("no picture: the cell is null; fill it or remove the row")
            else:
                image = ImageRef("file", str(inside(Path(self.path), read_text(cells["image"], "picture"))))
            return self.record(cells, image, name=name, split=split, where=where, classes=self._class_numbers)
        except ValueError as error:
            return Failure(name, where, str(error))

    def class_names(self) -> tuple[str, ...]:
        """The names of the class label; else the labels, in sorted order unless they are class numbers."""
        return self._classes[0]

    @cached_property
    def _splits(self) -> dict[str, Any]:
        return _load(self._spec(self.data_split))

    def _spec(self, split: str | None) -> str:
        """What another process needs to open the split."""
        path = os.path.abspath(self.path) if os.path.exists(self.path) else self.path
        about = {"path": path, "config": self.config, "revision": self.revision, "split": split}
        return json.dumps({**about, "streaming": self.streaming})

    def _uses(self, split: str, data: Any) -> dict[str, str]:
        try:
            if data.features is None:
                raise ValueError("the columns are not known while streaming; set streaming to false")
            uses = self.columns(data.features)
            check_columns(uses, data.features.arrow_schema)
        except ValueError as error:
            raise ArraError(f"{self.path}: {f'split {split!r}: ' if split else ''}{error}") from error
        return uses

    def _is_named(self, data: Any, column: str) -> bool:
        """Whether cells name pictures, rather than hold them."""
        named = not is_picture(data.features.arrow_schema.field(column).type)
        if named and not Path(self.path).is_dir():
            raise ArraError(f"{self.path}: column {column!r} only names pictures, and there is no folder of them")
        return named

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        """Class numbers by what the cells hold."""
        names, by_number = self._classes
        return {str(number) if by_number else name: number for number, name in enumerate(names)}

    @cached_property
    def _classes(self) -> tuple[tuple[str, ...], bool]:
        """The classes' names, and whether cells number them rather than name them."""
        columns = {split: self._uses(split, data).get("label") for split, data in self._splits.items()}
        features = [self._splits[split].features[column] for split, column in columns.items() if column]
        named = {tuple(feature.names) if hasattr(feature, "names") else None for feature in features}
        if len(named) > 1:
            raise ArraError(f"{self.path}: its splits have different classes; name one in data_split")
        if names := next(iter(named), None):
            return names, True
        values = (
            value for split, column in columns.items() if column for value in _column(self._splits[split], column)
        )
        return number_classes(values, self.path), False


class DatasetCells:
    """Pictures of one column of a memory-mapped data set by row number, never decoded."""

    def __init__(self, path: str, column: str) -> None:
        self._root, self._data = _open_column(path, column)
        self._column = column

    def __call__(self, row: int) -> bytes:
        """The encoded picture.

        Raises:
            OSError, ValueError: no such row, or the cell is null or holds no picture.
        """
        if not 0 <= row < len(self._data):
            raise ValueError(f"no row {row}; the data set has {len(self._data)}")
        try:
            cell = self._data[row][self._column]
        except _broken_data() as error:
            raise ValueError(f"row {row} cannot be read ({_one_line(error)})") from error
        return _cell_bytes(cell, self._root)


class StreamedCells:
    """Pictures of one column of a streamed data set by item number; going back opens the stream anew."""

    def __init__(self, path: str, column: str) -> None:
        self._root, self._data = _open_column(path, column)
        self._column = column
        self._items: Iterator[dict[str, Any]] = iter(self._data)
        self._next = 0

    def __call__(self, place: int) -> bytes:
        """The encoded picture.

        Raises:
            OSError, ValueError: no such item, the cell is null or holds no picture, or the network failed.
        """
        if place < self._next:
            self._items, self._next = iter(self._data.skip(place)), place
        try:
            item = next(islice(self._items, place - self._next, None), None)
        except (*_network_errors(), *_broken_data()) as error:
            self._items, self._next = iter(self._data), 0
            raise ValueError(f"item {place} cannot be read ({_one_line(error)})") from error
        if item is None:
            self._items, self._next = iter(self._data), 0
            raise ValueError(f"no item {place}; the stream ended before")
        self._next = place + 1
        return _cell_bytes(item[self._column], self._root)


def _load(spec: str) -> dict[str, Any]:
    """The data set's splits by name; the name is empty if it has none.

    Raises:
        ArraError: it cannot be found, reached or read, or it needs code of its own.
    """
    import datasets

    about = json.loads(spec)
    path, split = about["path"], about["split"] or None
    if os.path.isabs(path) and not os.path.exists(path):  # never a name to ask the hub for
        raise ArraError(f"{path}: no such data set; it has moved, prepare again with its new place")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of features that are to go, and of files that datasets leaves open
            if any((Path(path) / name).is_file() for name in SAVED_FILES):
                found = _saved(path, split)
            else:
                options = {"name": about["config"], "revision": about["revision"]}
                if path == "pandas" or datasets.load_dataset_builder(path, **options).name == "pandas":
                    raise ValueError("holds pickle files, which may run code; write it as Parquet")
                found = datasets.load_dataset(path, split=split, streaming=about["streaming"], **options)
    except _network_errors() as error:
        reason = f"cannot be reached ({_one_line(error)}); check the name and the network, or save the data set on disk"
        raise ArraError(f"{path}: {reason}") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ArraError(f"{path}: needs code of its own, which is never run; write it as Parquet or images") from error
    except _broken_data() as error:
        raise ArraError(f"{path}: not a data set that can be read ({_one_line(error)})") from error
    return dict(found) if isinstance(found, dict) else {split or str(found.split or ""): found}


def _saved(path: str, split: str | None) -> Any:
    """A data set that `save_to_disk` made, or one split of it."""
    from datasets import load_from_disk

    found = load_from_disk(path, keep_in_memory=False)
    if split is None:
        return found
    splits = found if isinstance(found, dict) else {str(found.split or ""): found}
    if split not in splits:
        raise ValueError(f"no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _open_column(path: str, column: str) -> tuple[Path | None, Any]:
    """The local folder, if it is one, and the data set of a reference with this column alone, not decoded."""
    from datasets import Image

    data = next(iter(_load(path).values()))
    if column not in data.features:
        raise ValueError(f"{json.loads(path)['path']}: no column {column!r}")
    data = data.select_columns([column]).with_format(None)
    if isinstance(data.features[column], Image):
        data = data.cast_column(column, Image(decode=False))
    root = Path(json.loads(path)["path"])
    return root if root.is_dir() else None, data


def _cell_bytes(cell: Any, root: Path | None) -> bytes:
    """The encoded picture of a cell: its bytes, or those of the file it names in the data set or the hub's cache."""
    from datasets import config
    from datasets.utils.file_utils import xopen

    path = cell.get("path") if isinstance(cell, Mapping) and cell.get("bytes") is None else None
    if path is None:
        return picture_bytes(cell, root or Path())
    *archives, last = path.split("::")
    if any(not link.startswith("zip://") for link in archives) or len(archives) > 1:
        raise ValueError(f"picture {path[:200]!r}: expected a file, or a member of one zip file")
    if not last.startswith("hf://datasets/"):
        roots = [*([root] if root else []), *map(Path, (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE))]
        home = next((folder for folder in roots if Path(last).resolve().is_relative_to(folder.resolve())), roots[0])
        last = str(inside(home.resolve(), last))
    with xopen("::".join([*archives, last]), "rb") as file:
        content: bytes = file.read(MAX_IMAGE_BYTES + 1)
    return picture_bytes(content, Path())


def _rows(data: Any, uses: Mapping[str, str], batch_size: int) -> Iterator[dict[str, Any]]:
    for batch in data.with_format("arrow").iter(batch_size=batch_size):
        yield from read_cells(batch, uses)


def _column(data: Any, column: str) -> Iterator[Any]:
    """The cells of one column; those that cannot be read are left to the scan."""
    with suppress(*_broken_data()):
        for cells in _rows(data.select_columns([column]), {"label": column}, ROWS_AT_A_TIME):
            with suppress(ValueError):
                yield read_text(cells["label"], "label")


def _is_streamed(data: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(data, IterableDataset)


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HTTPError

    return (ConnectionError, TimeoutError, HTTPError)


def _broken_data() -> tuple[type[Exception], ...]:
    """What `datasets` raises on what is missing or broken."""
    from datasets.exceptions import DatasetsError

    return (DatasetsError, pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def _one_line(error: BaseException) -> str:
    """What went wrong; `datasets` hides it behind a line that says only that something did."""
    return one_line(error.__cause__ if "while generating" in str(error) and error.__cause__ else error)
