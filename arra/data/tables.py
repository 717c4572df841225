"""Tables as sources: CSV and TSV files that name pictures, Parquet files that name or hold them.

First stage of the pipeline, between the user's tables and the index. Rows are streamed; of a Parquet file only the text
columns are read, the pictures later and one row group at a time, by `ParquetCells`.
"""

import glob
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from arra.data.lines import one_line, read_rows, split_name
from arra.data.records import MAX_IMAGE_BYTES, Failure, Found, ImageRef, Record, Source, inside, read_file
from arra.errors import ArraError

USUAL_COLUMNS = {
    "image": ("image", "image_path", "file_name", "path", "filepath"),
    "caption": ("text", "prompt", "caption"),
    "id": ("id", "key"),
    "split": ("split",),
    "label": ("label", "class"),
}
"""Columns taken where none is named, by what they are used for."""
MAX_CLASSES = 100_000
"""More distinct labels are no classes."""
MAX_GROUP_BYTES = 256 * 2**20
"""Row groups up to this size are kept whole while pictures are read; larger ones pass by in pieces of this size."""
NO_LABEL = (None, "", -1, "-1")
"""Cells that mean there is no label."""
BROKEN_TABLE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)
"""What pyarrow raises on broken files."""

Cells = Mapping[str, Any]


class TabularSource(Source):
    """Base of sources whose items are rows: which column holds what. An empty text uses no column."""

    image_column: str | None = None
    """Column of the pictures; null takes the first of image, image_path, file_name, path, filepath."""
    caption_column: str | None = None
    """Column of the captions; null takes the first of text, prompt, caption."""
    id_column: str | None = None
    """Column of the records' ids; null takes the first of id, key. Without one, pictures go by file name or row."""
    split_column: str | None = None
    """Column of the splits; null takes split."""
    label_column: str | None = None
    """Column of the classes, numbers or names; null takes the first of label, class. -1 and nothing mean no label."""

    def columns(self, names: Iterable[str]) -> dict[str, str]:
        """The column for each use (image, caption, id, split, label) that has one.

        Raises:
            ValueError: two columns of one name, a named column is missing, no picture, or neither caption nor label.
        """
        names, chosen = list(names), {}
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"column {doubled[0]!r} stands twice; rename one")
        for use, usual in USUAL_COLUMNS.items():
            named = getattr(self, f"{use}_column")
            if named and named not in names:
                raise ValueError(f"no column {named!r} for {use}_column; it has {_listed(names)}")
            matches = (name for wanted in usual for name in names if name.lower() == wanted)
            if column := next(matches, "") if named is None else named:
                chosen[use] = column
        if "image" not in chosen:
            raise ValueError(f"no column of pictures; name it in image_column, it has {_listed(names)}")
        if not {"caption", "label"} & set(chosen):
            raise ValueError(f"no column of captions or labels; name it in caption_column, it has {_listed(names)}")
        return chosen

    def record(
        self, cells: Cells, image: ImageRef, *, name: str, split: str = "", where: str, classes: Mapping[str, int]
    ) -> Record:
        """The record of one row, its cells by use; `name` and `split` stand in for missing columns.

        Raises:
            ValueError: a cell is not UTF-8 text, or its label is no class.
        """
        texts = read_text(cells.get("caption"), "caption")
        prompt, *others = (texts or [""]) if isinstance(texts, list) else [texts]
        label = _label(read_text(cells.get("label"), "label"), classes)
        if label is not None and "caption" not in cells:
            prompt = str(read_text(cells["label"], "label"))
            prompt = "" if prompt.isdecimal() else prompt
        own_id = read_text(cells.get("id"), "id")
        return Record(
            id=name if own_id in (None, "") else str(own_id),
            image=image,
            prompt=prompt or "",
            split=split_name(read_text(cells.get("split"), "split") or split),
            label=label,
            alternatives=tuple(text or "" for text in others),
            where=where,
        )


class TableSource(TabularSource):
    """A CSV or TSV file, also gzipped, whose first line names the columns. Pictures go by their names as ids."""

    kind: Literal["csv"] = "csv"
    delimiter: str | None = Field(None, pattern=r'^[^"\r\n]$')
    """Character between fields; null takes a tab for .tsv files, else a comma."""
    quotes: bool = True
    """Whether double quotes enclose fields; false reads them as any other character."""
    image_root: str | None = None
    """Folder that pictures are named from, and must lie in; null takes the table's folder."""

    def scan(self) -> Iterator[Found]:
        header, rows = self._open()
        places = self._places(header)
        classes = {name: number for number, name in enumerate(self.class_names())}
        root = Path(self.image_root) if self.image_root is not None else Path(self.path).parent
        if not root.is_dir():
            raise ArraError(f"{root}: no such folder; image_root must name the folder of the pictures")
        for lines, row in rows:
            where = f"{self.path}: {lines}"
            try:
                cells = _row_cells(row, header, places)
                file = inside(root, cells["image"])
                image = ImageRef("file", str(file))
                found: Found = self.record(cells, image, name=cells["image"], where=where, classes=classes)
            except ValueError as error:
                found = Failure(where, where, str(error))
            yield found

    def class_names(self) -> tuple[str, ...]:
        """The labels as they stand if they are class numbers, else in sorted order."""
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        header, rows = self._open()
        places = self._places(header)
        if "label" not in places:
            return ()
        labels = (row[places["label"]] for _, row in rows if isinstance(row, list) and len(row) == len(header))
        return number_classes(labels, self.path)

    def _open(self) -> tuple[list[str], Iterator[tuple[str, list[str] | ValueError]]]:
        path = Path(self.path)
        if not path.is_file():
            raise ArraError(f"{path}: no such file; expected a CSV or TSV file with a line of column names")
        rows = read_rows(path, delimiter=self.delimiter, quotes=self.quotes)
        _, header = next(rows, ("", []))
        if isinstance(header, ValueError) or not header:
            raise ArraError(f"{path}: line 1: {header or 'empty'}; expected the names of the columns")
        if not _is_unicode(header):
            raise ArraError(f"{path}: line 1: not UTF-8 text; save the table as UTF-8")
        return header, rows

    def _places(self, header: list[str]) -> dict[str, int]:
        try:
            return {use: header.index(column) for use, column in self.columns(header).items()}
        except ValueError as error:
            raise ArraError(f"{self.path}: {error}") from error


class ParquetSource(TabularSource):
    """Parquet files that hold pictures (bytes, or the Hugging Face struct of bytes and path), or name them.

    Without an id column, records are called `file/row`, rows counted from 0.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    """One file, a folder of .parquet files, or a pattern with `*`."""
    image_root: str | None = None
    """Folder that named pictures lie in; null takes the Parquet file's folder."""

    def scan(self) -> Iterator[Found]:
        files = self._files()
        classes = self._class_numbers
        for name, file in files:
            problem = ""
            try:
                with pq.ParquetFile(file, buffer_size=2**20) as parquet:
                    yield from self._rows(name, file, parquet, classes)
            except BROKEN_TABLE as error:
                problem = one_line(error)
            if problem and len(files) == 1:
                raise ArraError(f"{file}: {problem}; expected a sound Parquet file")
            if problem:
                yield Failure(str(file), str(file), f"the whole file is left out: {problem}")

    def class_names(self) -> tuple[str, ...]:
        """The names that Hugging Face wrote into the file; else the labels, in sorted order unless class numbers."""
        return self._classes[0]

    def _files(self) -> list[tuple[str, Path]]:
        """The files, sorted, each after what its rows are called."""
        root = Path(self.path)
        if root.is_file():
            return [(root.stem, root)]
        if root.is_dir():
            found = sorted(path for path in root.rglob("*.parquet") if path.is_file())
        else:
            found = sorted(Path(name) for name in glob.glob(self.path, recursive=True) if os.path.isfile(name))
            root = Path(os.path.commonpath([path.parent for path in found])) if found else root
        if not found:
            raise ArraError(f"{self.path}: no Parquet files; expected a file, a folder of .parquet files or a pattern")
        return [(path.relative_to(root).with_suffix("").as_posix(), path) for path in found]

    def _rows(self, name: str, file: Path, parquet: pq.ParquetFile, classes: Mapping[str, int]) -> Iterator[Found]:
        uses = self.columns(parquet.schema_arrow.names)
        check_columns(uses, parquet.schema_arrow)
        picture = parquet.schema_arrow.field(uses["image"]).type
        named = not is_picture(picture)
        has_path = pa.types.is_struct(picture) and picture.get_field_index("path") >= 0
        read = [column for use, column in uses.items() if use != "image" or named]
        if has_path:
            read.append(f"{uses['image']}.path")  # tells which pictures are null, and is small
        root = file.parent if self.image_root is None else Path(self.image_root)
        first, groups = 0, parquet.metadata.num_row_groups
        for group in range(groups):
            count, row, problem = parquet.metadata.row_group(group).num_rows, first, ""
            try:
                for batch in parquet.iter_batches(4096, row_groups=[group], columns=read):
                    for cells in read_cells(batch, uses):
                        where = f"{file}: row {row}"
                        found: Found
                        try:
                            image = self._image(cells, file, row, uses["image"], root if named else None)
                            found = self.record(cells, image, name=f"{name}/{row}", where=where, classes=classes)
                        except ValueError as error:
                            found = Failure(f"{name}/{row}", where, str(error))
                        row += 1
                        yield found
            except BROKEN_TABLE as error:
                problem = one_line(error)
            first += count
            if problem or row != first:
                where = f"{file}: rows {row} to {first - 1}"
                yield Failure(where, where, f"cannot be read: {problem or 'fewer rows than the file says'}")

    def _image(self, cells: Cells, file: Path, row: int, column: str, root: Path | None) -> ImageRef:
        if "image" in cells and cells["image"] is None:
            raise ValueError("no picture: the cell is null; fill it or remove the row")
        if root is not None:
            return ImageRef("file", str(inside(root, read_text(cells["image"], "picture"))))
        return ImageRef("parquet", str(file), place=row, column=column)

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        names, by_number = self._classes
        return {str(number) if by_number else name: number for number, name in enumerate(names)}

    @cached_property
    def _classes(self) -> tuple[tuple[str, ...], bool]:
        """The classes' names, and whether cells number them rather than name them."""
        named: list[tuple[str, ...]] = []
        names = number_classes(self._labels(named), self.path)
        return (named[0], True) if named else (names, False)

    def _labels(self, named: list[tuple[str, ...]]) -> Iterator[Any]:
        """The labels of all files that can be read; ends once a file names the classes, which go into `named`."""
        for _, file in self._files():
            try:
                with pq.ParquetFile(file) as parquet:
                    uses = self.columns(parquet.schema_arrow.names)
                    check_columns(uses, parquet.schema_arrow)
                    if "label" not in uses:
                        continue
                    if names := _feature_names(parquet.schema_arrow.metadata, uses["label"]):
                        named.append(names)
                        return
                    for batch in parquet.iter_batches(columns=[uses["label"]]):
                        yield from (read_text(cells["label"], "label") for cells in read_cells(batch, uses))
            except BROKEN_TABLE:
                continue  # scan tells it


class ParquetCells:
    """Pictures of one Parquet column by row number. Keeps the row group last read, or a piece of a large one."""

    def __init__(self, path: str, column: str) -> None:
        self._path, self._column = path, column
        try:
            self._file = pq.ParquetFile(path, buffer_size=2**20)
            about = self._file.metadata
            counts = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        except BROKEN_TABLE as error:
            raise ValueError(f"{path}: {one_line(error)}") from error
        self._starts = [0, *accumulate(counts)]
        self._group, self._first = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None

    def __call__(self, row: int) -> bytes:
        """The encoded picture.

        Raises:
            OSError, ValueError: no such row, the cell is null or holds no picture, or the file is broken.
        """
        if not 0 <= row < self._starts[-1]:
            raise ValueError(f"{self._path}: no row {row}; it has {self._starts[-1]}")
        try:
            cell = self._cell(row)
        except BROKEN_TABLE as error:
            self._group, self._batch = -1, None
            raise ValueError(f"{self._path}: row {row}: {one_line(error)}") from error
        return picture_bytes(cell, Path(self._path).parent)

    def _cell(self, row: int) -> Any:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._batches, self._batch = self._open(group), None
            self._group, self._first = group, self._starts[group]
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows if self._batch is not None else 0
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise ValueError("fewer rows than the file says")
        return self._batch.column(self._column)[row - self._first].as_py()

    def _open(self, group: int) -> Iterator[pa.RecordBatch]:
        about = self._file.metadata.row_group(group)
        size = sum(
            about.column(number).total_uncompressed_size
            for number in range(about.num_columns)
            if about.column(number).path_in_schema.split(".")[0] == self._column.split(".")[0]
        )
        rows = max(1, about.num_rows * MAX_GROUP_BYTES // max(size, MAX_GROUP_BYTES))
        batches: Iterator[pa.RecordBatch] = self._file.iter_batches(rows, row_groups=[group], columns=[self._column])
        return batches


def picture_bytes(cell: Any, root: Path) -> bytes:
    """The encoded picture of a cell: its bytes, or those of the file below `root` that it names.

    Raises:
        OSError, ValueError: the cell is null or holds no picture, or the file cannot be read.
    """
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if content is None and isinstance(path, str):
        return read_file(str(inside(root, path)))
    if content is None:
        raise ValueError("no picture: the cell is null; fill it or remove the row")
    if not isinstance(content, bytes):
        raise ValueError(f"the cell holds {type(content).__name__}; expected the bytes of a picture")
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"{len(content)} bytes are more than {MAX_IMAGE_BYTES}")
    return content


def check_columns(uses: Mapping[str, str], schema: pa.Schema) -> None:
    """Nothing, if every used column is of a type that can serve.

    Raises:
        ValueError: one is not; one line that names it.
    """
    for use, column in uses.items():
        kind = schema.field(column).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        fits = _is_text(plain)
        if use == "image":
            fits = fits or is_picture(plain)
        elif use == "caption":
            fits = fits or ((pa.types.is_list(plain) or pa.types.is_large_list(plain)) and _is_text(plain.value_type))
        elif use in ("id", "label"):
            fits = fits or pa.types.is_integer(plain)
        if not fits:
            expected = {"image": "pictures or their names", "caption": "text", "split": "text"}
            raise ValueError(f"column {column!r} holds {kind}; expected {expected.get(use, 'integers or text')}")


def is_picture(kind: pa.DataType) -> bool:
    """Whether cells of this type hold encoded pictures: bytes, or a struct with bytes."""
    if pa.types.is_struct(kind):
        return any(
            kind.field(number).name == "bytes" and is_picture(kind.field(number).type)
            for number in range(kind.num_fields)
        )
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def read_cells(table: pa.Table | pa.RecordBatch, uses: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The cells of each row by use, texts still as bytes; columns that the table lacks are left out.

    Of a struct it only tells whether it is there.
    """
    columns = {use: table.column(name) for use, name in uses.items() if name in table.schema.names}
    values = [
        [None if null else True for null in column.is_null().to_pylist()]
        if pa.types.is_struct(column.type)
        else column.cast(_as_bytes(column.type)).to_pylist()
        for column in columns.values()
    ]
    for row in zip(*values, strict=True):
        yield dict(zip(columns, row, strict=True))


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type that holds the same with texts as bytes: pyarrow gives up a whole column for one that is not UTF-8."""
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    return pa.large_binary() if _is_text(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def read_text(value: Any, use: str) -> Any:
    """The cell with its bytes as text."""
    if isinstance(value, list):
        return [read_text(part, use) for part in value]
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(f"the {use} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from error


def _row_cells(row: list[str] | ValueError, header: list[str], places: Mapping[str, int]) -> dict[str, str]:
    if isinstance(row, ValueError):
        raise row
    if len(row) != len(header):
        raise ValueError(f"{len(row)} fields, {len(header)} expected; put double quotes around text with delimiters")
    if not _is_unicode(row):
        raise ValueError("not UTF-8 text; save the table as UTF-8")
    return {use: row[place] for use, place in places.items()}


def _is_unicode(texts: Iterable[str]) -> bool:
    return not any("\udc80" <= character <= "\udcff" for text in texts if not text.isascii() for character in text)


def _label(value: Any, classes: Mapping[str, int]) -> int | None:
    if value in NO_LABEL:
        return None
    if str(value) not in classes:
        raise ValueError(f"label {str(value)[:80]!r} is none of the {len(classes)} classes")
    return classes[str(value)]


def number_classes(labels: Iterable[Any], path: str) -> tuple[str, ...]:
    """Names of classes by number: `0` to the largest if all are such numbers, else sorted."""
    found: set[str] = set()
    for label in labels:
        if label not in NO_LABEL:
            found.add(str(label))
        if len(found) > MAX_CLASSES:
            raise ArraError(
                f"{path}: more than {MAX_CLASSES} different labels; name another label_column, or '' for none"
            )
    numbers = [int(name) for name in found if name.isascii() and name.isdecimal() and len(name) < 6]
    if found and {str(number) for number in numbers} == found:
        return tuple(str(number) for number in range(max(numbers) + 1))
    return tuple(sorted(found))


def _feature_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """The names of a class label that `datasets` wrote into a schema; none if it did not."""
    try:
        feature = json.loads((metadata or {}).get(b"huggingface", b""))["info"]["features"][column]
        return tuple(str(name) for name in feature["names"]) if feature["_type"] == "ClassLabel" else ()
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return ()


def _listed(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:20]) or "none"
