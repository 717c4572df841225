"""MIMIC-CXR and DeepEyeNet in their official layouts, with the selection of the ARRA paper.

First stage of the pipeline, between the folders that PhysioNet and the DeepEyeNet authors hand out and the index.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from arra.data.lines import one_line, read_rows, split_name
from arra.data.records import Failure, Found, ImageRef, Record, Skipped, Source, inside
from arra.errors import ArraError

MAX_REPORT_BYTES = 2**20
"""Reports larger than this are refused unread; the official ones have a few thousand bytes."""
SUBJECT = STUDY = re.compile(r"[0-9]{8}")
DICOM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")
"""The official ids; nothing else becomes part of a path."""
IMPRESSION = re.compile(r"^[ \t]*IMPRESSION[ \t]*:", re.IGNORECASE | re.MULTILINE)
HEADING = re.compile(r"^[ \t]*(?:[A-Z][A-Z ()/,-]*:|FINAL (?:REPORT|ADDENDUM)[ \t]*$)", re.MULTILINE)
"""What ends a section: the next heading in capitals, or the title of the next part of the report."""
SPLIT_FILE = "mimic-cxr-2.0.0-split.csv"
SECTIONS = ("study", "impression")
PLACEHOLDERS = ("", "nan", "none", "null", "n/a", "na", "unknown", "-", ".")
"""Descriptions that say nothing, in lower case."""


class MimicCxrSource(Source):
    """MIMIC-CXR-JPG: pictures of three views, each with its view and the impression of its study as prompt.

    The prompt is `{view} view chest x-ray image, {impression}`; pictures without an impression and of other views are
    skipped. The paper has 221,238 pairs for training and 1,000 for testing and does not tell which 1,000: here they are
    those with the smallest hashes of their ids, so the test set is the same for everyone but not the paper's.

    Source: paper, appendix 3; MIT-LCP/mimic-cxr `create_section_files.py` (the last section of a name counts).
    """

    kind: Literal["mimic-cxr"] = "mimic-cxr"
    path: str
    """The MIMIC-CXR-JPG folder: `files/` and mimic-cxr-2.0.0-metadata.csv and -split.csv, gzipped or not."""
    reports: str | None = None
    """Folder of the reports (`mimic-cxr-reports`, its `files`, or the MIMIC-CXR folder), or mimic_cxr_sectioned.csv;
    null takes the first in `path` of mimic-cxr-reports/files, mimic_cxr_sectioned.csv, reports beside the pictures."""
    views: tuple[str, ...] = ("AP", "PA", "LATERAL")
    """View positions that are kept."""
    max_test: int | None = Field(1000, ge=0)
    """Pairs of the test split that are kept; null keeps all."""

    def scan(self) -> Iterator[Found]:
        problems: list[Failure] = []
        splits = _official_map(Path(self.path), SPLIT_FILE, ("dicom_id", "split"), problems)
        splits = {dicom: "validation" if split == "validate" else split_name(split) for dicom, split in splits.items()}
        place = self._reports()
        impressions = place if place.is_dir() else _official_map(place.parent, place.name, SECTIONS, problems)
        yield from problems
        chosen: set[str] | None = None
        if self.max_test is not None:
            tests = (line for line in self._metadata() if _is_test(line[1], splits))
            found = (self._found(where, row, splits, impressions) for where, row in tests)
            chosen = _smallest((item.id for item in found if isinstance(item, Record)), self.max_test)
        for where, row in self._metadata():
            item = self._found(where, row, splits, impressions)
            if isinstance(item, Record) and item.split == "test" and chosen is not None and item.id not in chosen:
                item = Skipped(item.id, item.where, f"not among the {self.max_test} test pairs that max_test keeps")
            yield item

    def _metadata(self) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
        columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
        return _official_rows(Path(self.path), "mimic-cxr-2.0.0-metadata.csv", columns)

    def _reports(self) -> Path:
        """The folder of the reports, or the table of their sections."""
        root = Path(self.path)
        given = [root / "mimic-cxr-reports" / "files", root / "mimic_cxr_sectioned.csv", root / "files"]
        if self.reports is not None:
            folder = Path(self.reports)
            given = [folder / "mimic-cxr-reports" / "files", folder / "files", folder]
        place = next((path for path in given if path.is_dir() or (path.is_file() and ".csv" in path.name)), None)
        if place is None:
            raise ArraError(
                f"{self.reports or root}: no reports; expected mimic-cxr-reports or mimic_cxr_sectioned.csv"
            )
        return place

    def _found(
        self,
        where: str,
        row: dict[str, str] | ValueError,
        splits: dict[str, str],
        impressions: Path | dict[str, str],
    ) -> Found:
        if isinstance(row, ValueError):
            return Failure(where, where, str(row))
        dicom, subject, study, view = (row[k] for k in ("dicom_id", "subject_id", "study_id", "ViewPosition"))
        if not (DICOM.fullmatch(dicom) and SUBJECT.fullmatch(subject) and STUDY.fullmatch(study)):
            return Failure(where, where, f"{dicom[:50]!r}, {subject[:12]!r}, {study[:12]!r} are no MIMIC-CXR ids")
        if view not in self.views:
            return Skipped(dicom, where, f"view {view[:40]!r} is not among {', '.join(self.views)}")
        folder = f"p{subject[:2]}/p{subject}/s{study}"
        try:
            if dicom not in splits:
                raise ValueError("the split file has no line for it; use both files of one release")
            impression = _impression(impressions, folder)
            picture = inside(Path(self.path) / "files", f"{folder}/{dicom}.jpg") if impression else None
        except (OSError, ValueError) as error:
            return Failure(dicom, where, one_line(error))
        if picture is None:
            return Skipped(
                dicom, where, "no report of its study" if impression is None else "no impression in its report"
            )
        return Record(
            id=dicom,
            image=ImageRef("file", str(picture)),
            prompt=f"{view} view chest x-ray image, {impression}",
            split=splits[dicom],
            group=f"s{study}",
            where=where,
        )


class DeepEyeNetSource(Source):
    """DeepEyeNet: retinal pictures with their clinical descriptions as prompts.

    The paper selects 7,190 of the official training pairs and 1,089 of the test pairs and does not tell how: here those
    with a description are taken, and of these the ones with the smallest hashes of their names. The official validation
    pairs, of which the paper says nothing, are kept as such.

    Source: paper, appendix 3; layout of Jhhuangkay/DeepOpht.
    """

    kind: Literal["deepeyenet"] = "deepeyenet"
    path: str
    """The folder with DeepEyeNet_train.json, _valid.json, _test.json and the pictures in `eyenet0420/`."""
    use_keywords: bool = False
    """Whether the keywords of a picture become another text of it."""
    max_train: int | None = Field(7190, ge=0)
    """Pairs of the training split that are kept; null keeps all."""
    max_test: int | None = Field(1089, ge=0)
    """Pairs of the test split that are kept; null keeps all."""

    def scan(self) -> Iterator[Found]:
        files = [Path(self.path) / f"DeepEyeNet_{name}.json" for name in ("train", "valid", "test")]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ArraError(f"{self.path}: {', '.join(missing)} not found; expected the official DeepEyeNet folder")
        for file, split, most in zip(
            files, ("train", "validation", "test"), (self.max_train, None, self.max_test), strict=True
        ):
            items = [self._found(f"{file}: item {n}", item, split) for n, item in enumerate(_json_list(file), start=1)]
            ids = [item.id for item in items if isinstance(item, Record)]
            chosen = set(ids) if most is None else _smallest(ids, most)
            for item in items:
                if isinstance(item, Record) and item.id not in chosen:
                    item = Skipped(item.id, item.where, f"not among the {most} pairs that max_{split} keeps")
                yield item

    def _found(self, where: str, item: Any, split: str) -> Found:
        try:
            if not isinstance(item, dict) or len(item) != 1:
                raise ValueError("expected an object with one key, the picture's name")
            ((name, texts),) = item.items()
            if not isinstance(texts, dict):
                raise ValueError(
                    f"{name[:80]!r} has no object of texts; expected 'clinical-description' and 'keywords'"
                )
            description, keywords = (texts.get(key) or "" for key in ("clinical-description", "keywords"))
            if not isinstance(description, str) or not isinstance(keywords, str):
                raise ValueError(f"the texts of {name[:80]!r} are {type(description).__name__}; expected text")
            if any("\udc80" <= character <= "\udcff" for character in name + description + keywords):
                raise ValueError("not UTF-8 text; save the file as UTF-8")
            if _says_nothing(description):
                return Skipped(name, where, "no clinical description")
            picture = inside(Path(self.path), name)
        except ValueError as error:
            return Failure(where, where, str(error))
        others = (keywords,) if self.use_keywords and not _says_nothing(keywords) else ()
        image = ImageRef("file", str(picture))
        return Record(id=name, image=image, prompt=description, split=split, alternatives=others, where=where)


def find_impression(report: str) -> str:
    """The text of the report's last `IMPRESSION:` section on one line; empty if it has none.

    Other names of a section, such as CONCLUSION, are not taken for it. Spaces inside a line stay as they are.
    """
    starts = [match.end() for match in IMPRESSION.finditer(report)]
    if not starts:
        return ""
    end = HEADING.search(report, starts[-1])
    return _join_lines(report[starts[-1] : end.start() if end else None])


def _join_lines(text: str) -> str:
    return " ".join(line for line in map(str.strip, text.splitlines()) if line)


def _impression(impressions: Path | dict[str, str], folder: str) -> str | None:
    """The impression of a study; nothing if it has no report, empty if its report has no impression.

    Raises:
        OSError, ValueError: the report is unreadable, too large, leaves its folder or is not UTF-8.
    """
    if isinstance(impressions, dict):
        found = impressions.get(folder.rsplit("/", 1)[1])
        return None if found is None else _join_lines(found)
    if not (impressions / f"{folder}.txt").exists():
        return None
    file = inside(impressions, f"{folder}.txt")
    if file.stat().st_size > MAX_REPORT_BYTES:
        raise ValueError(f"report {file} has more than {MAX_REPORT_BYTES} bytes")
    try:
        return find_impression(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"report {file} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from error


def _official_map(root: Path, name: str, columns: tuple[str, str], problems: list[Failure]) -> dict[str, str]:
    """The second column of an official CSV file by the first; rows that are wrong go into `problems`."""
    found = {}
    for where, row in _official_rows(root, name, columns):
        if isinstance(row, ValueError):
            problems.append(Failure(where, where, str(row)))
        else:
            found[row[columns[0]]] = row[columns[1]]
    return found


def _is_test(row: dict[str, str] | ValueError, splits: dict[str, str]) -> bool:
    return isinstance(row, dict) and splits.get(row["dicom_id"]) == "test"


def _official_rows(
    root: Path, name: str, columns: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
    """File and line of each row of an official CSV file, gzipped or not, and the cells of `columns` or what is wrong.

    Raises:
        ArraError: there is no such file, or it lacks a column.
    """
    path = next((file for file in (root / name, root / f"{name}.gz") if file.is_file()), None)
    if path is None:
        raise ArraError(f"{root}: no {name} or {name}.gz; expected the official MIMIC-CXR-JPG folder")
    rows = read_rows(path)
    _, header = next(rows, ("", []))
    if isinstance(header, ValueError) or any(column not in header for column in columns):
        raise ArraError(f"{path}: line 1: expected the columns {', '.join(columns)}; get the official file")
    for lines, row in rows:
        if isinstance(row, list) and len(row) != len(header):
            row = ValueError(f"{len(row)} fields, {len(header)} expected; get the official file")
        if isinstance(row, list):
            cells = {column: row[header.index(column)] for column in columns}
            broken = any("\udc80" <= character <= "\udcff" for text in cells.values() for character in text)
            yield f"{path}: {lines}", ValueError("not UTF-8 text; get the official file") if broken else cells
        else:
            yield f"{path}: {lines}", row


def _json_list(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArraError(f"{path}: not JSON ({one_line(error)}); expected a list of one-key objects") from error
    if not isinstance(found, list):
        raise ArraError(f"{path}: holds {type(found).__name__}; expected a list of one-key objects")
    return found


def _smallest(ids: Iterator[str] | list[str], count: int) -> set[str]:
    """The `count` ids with the smallest hashes."""
    return set(sorted(ids, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())[:count])


def _says_nothing(text: str) -> bool:
    return text.strip().lower() in PLACEHOLDERS
