"""From a reference to the bytes of a picture, wherever it lies: a file, a tar, a table, a data set, a stream."""

from typing import Any

from arra.data.huggingface import DatasetCells, StreamedCells
from arra.data.openmoji import EMBEDDED_NAME, openmoji_file
from arra.data.records import ImageRef, read_file
from arra.data.shapes import read_drawing
from arra.data.tables import ParquetCells


class ImageReader:
    """Reads the bytes behind references; keeps open what the next references are likely to need. One per process."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str], Any] = {}

    def read(self, ref: ImageRef) -> bytes:
        """The encoded picture.

        Raises:
            OSError, ValueError: the file is missing, unreadable, too large, or the cell holds no picture.
        """
        if ref.kind == "file":
            return read_file(ref.path)
        if ref.kind == "slice":
            return read_file(ref.path, start=ref.place, size=ref.size)
        if ref.kind == "embedded" and ref.path != EMBEDDED_NAME:
            return read_drawing(ref)
        if ref.kind in ("parquet", "embedded"):

            def cells() -> ParquetCells:
                return ParquetCells(ref.path if ref.kind == "parquet" else str(openmoji_file()), ref.column)

            return self._kept((ref.kind, f"{ref.path}\n{ref.column}"), cells)(ref.place)
        kind = DatasetCells if ref.kind == "dataset" else StreamedCells
        return self._kept((ref.kind, f"{ref.path}\n{ref.column}"), lambda: kind(ref.path, ref.column))(ref.place)

    def _kept(self, key: tuple[str, str], open_it: Any) -> Any:
        if key not in self._tables:
            while len(self._tables) >= 4:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = open_it()
        return self._tables[key]
