"""All kinds of sources under one name: what a recipe may call, what a path looks like, how mixtures are weighed."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from arra.data.conversations import ConversationsSource, MetaSource
from arra.data.folder import SUFFIXES, ClassFolderSource, FolderSource
from arra.data.huggingface import HuggingFaceSource
from arra.data.llamagen_lists import LlamaGenCodesSource, LlamaGenListSource
from arra.data.medical import DeepEyeNetSource, MimicCxrSource
from arra.data.openmoji import OpenMojiSource
from arra.data.records import Source
from arra.data.shapes import ShapesSource
from arra.data.tables import ParquetSource, TableSource
from arra.data.webdataset import WebDatasetSource
from arra.errors import ArraError

AnySource = Annotated[
    ConversationsSource
    | MetaSource
    | FolderSource
    | ClassFolderSource
    | TableSource
    | ParquetSource
    | WebDatasetSource
    | HuggingFaceSource
    | LlamaGenListSource
    | LlamaGenCodesSource
    | MimicCxrSource
    | DeepEyeNetSource
    | OpenMojiSource
    | ShapesSource,
    Field(discriminator="kind"),
]
SourceKind = Literal[
    "openmoji",
    "auto",
    "folder",
    "classes",
    "conversations",
    "meta",
    "csv",
    "parquet",
    "webdataset",
    "huggingface",
    "llamagen-list",
    "llamagen-codes",
    "mimic-cxr",
    "deepeyenet",
    "shapes",
]
DESCRIPTIONS = {
    "openmoji": "the embedded set of about 4,000 named drawings",
    "auto": "whatever the path looks like",
    "folder": "pictures with metadata.jsonl or metadata.csv (imagefolder convention), or a .txt beside each",
    "classes": "one folder of pictures per class (ImageNet tree)",
    "conversations": "ARRA / Lumina conversation file, .json or .jsonl",
    "meta": "YAML that gathers conversation files: META: [{path, ratio}]",
    "csv": "table of picture paths and captions, .csv or .tsv",
    "parquet": "one or many Parquet files, pictures inside or named by path",
    "webdataset": "tar files of samples",
    "huggingface": "a data set on disk (save_to_disk) or by name, streamed if wanted",
    "llamagen-list": "LlamaGen's t2i lists, folder of .jsonl with image_path and text",
    "llamagen-codes": "LlamaGen's extracted codes, folders of .npy",
    "mimic-cxr": "MIMIC-CXR-JPG as published, prompts from view and impression",
    "deepeyenet": "DeepEyeNet as published, prompts from clinical descriptions",
    "shapes": "an embedded set of drawn shapes whose captions can be read back from the pixels",
}
EMBEDDED_KINDS = ("openmoji", "shapes")
"""Kinds that need no path."""
_ADAPTER: TypeAdapter[Source] = TypeAdapter(AnySource)


def source_of(kind: str, path: str | None) -> Source:
    """The source of a kind at a path, with the kind's own defaults.

    Raises:
        ArraError: `auto` cannot tell what the path is.
    """
    kind = detect_kind(Path(str(path))) if kind == "auto" else kind
    try:
        return _ADAPTER.validate_python({"kind": kind} | ({} if path is None else {"path": path}))
    except ValidationError as error:
        first = error.errors()[0]
        raise ArraError(f"{path}: source '{kind}': {'.'.join(map(str, first['loc'][1:]))}: {first['msg']}") from error


def expand_sources(sources: Iterable[Source]) -> tuple[Source, ...]:
    """The sources with every meta file replaced by the record files it gathers."""
    found: list[Source] = []
    for source in sources:
        found += source.expand() if isinstance(source, MetaSource) else [source]
    return tuple(found)


def detect_kind(path: Path) -> str:
    """The kind of source that a file or folder looks like.

    Raises:
        ArraError: it does not exist, or looks like none.
    """
    if path.is_file():
        kind = _kind_of_file(path)
    elif path.is_dir():
        kind = _kind_of_folder(path)
    else:
        raise ArraError(f"{path}: no such file or folder; name the pictures' folder, or a record file")
    if kind is None:
        kinds = ", ".join(get_args(SourceKind))
        raise ArraError(f"{path}: looks like no known source; name its kind (data.source), one of: {kinds}")
    return kind


def _kind_of_file(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last in (".yaml", ".yml"):
        return "meta"
    if ".csv" in suffixes[-2:] or ".tsv" in suffixes[-2:]:
        return "csv"
    if last == ".jsonl":
        return "llamagen-list" if "image_path" in _first_keys(path) else "conversations"
    return {".json": "conversations", ".parquet": "parquet", ".tar": "webdataset"}.get(last)


def _kind_of_folder(path: Path) -> str | None:
    marks = {
        "dataset_info.json": "huggingface",
        "dataset_dict.json": "huggingface",
        "state.json": "huggingface",
        "DeepEyeNet_train.json": "deepeyenet",
        "mimic-cxr-2.0.0-metadata.csv": "mimic-cxr",
        "mimic-cxr-2.0.0-metadata.csv.gz": "mimic-cxr",
        "metadata.jsonl": "folder",
        "metadata.csv": "folder",
    }
    for name, kind in marks.items():
        if (path / name).is_file():
            return kind
    for pattern, kind in (("*.tar", "webdataset"), ("*.parquet", "parquet"), ("*.npy", "llamagen-codes")):
        if next(path.glob(pattern), None) is not None:
            return kind
    lists = sorted(path.glob("*.jsonl"))
    if lists and "image_path" in _first_keys(lists[0]):
        return "llamagen-list"
    return _kind_of_pictures(path)


def _kind_of_pictures(path: Path) -> str | None:
    """`folder` where captions or metadata are found among the first files, `classes` where only sub-folders are."""
    deeper = False
    for found in islice(path.rglob("*"), 20_000):
        if found.name in ("metadata.jsonl", "metadata.csv"):
            return "folder"
        if found.suffix.lower() in SUFFIXES:
            if found.with_suffix(".txt").is_file() or found.parent == path:
                return "folder"
            deeper = True
    return "classes" if deeper else None


def _first_keys(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return []
    return list(row) if isinstance(row, dict) else []
