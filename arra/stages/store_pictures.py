"""A split of a store, to be measured or compared with: its pictures through the crop of training, in evaluation's form.

Legend: H W pixels.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from arra.config import Recipe, parse_recipe
from arra.data.crops import CropSettings, describe
from arra.data.images import Grey16
from arra.data.loading import Loader, View
from arra.data.reading import ImageReader
from arra.data.records import ImageRef
from arra.data.remote import RemoteStore, open_store
from arra.data.store import Store
from arra.errors import ArraError
from arra.evaluate.sets import chosen_rows
from arra.runs import Run
from arra.stages.makers import CODES, PICTURES
from arra.stages.origin import columns_of, find_store, noted
from arra.stages.picture_folders import READERS, class_balance, in_threads

CROPPED = re.compile(r"\w+\((\d+)")
"""Of the text that names a crop: its size."""


@dataclass
class StorePictures:
    """Records of a split as a `arra.evaluate.sets.PictureSet`: middle squares, prompts, labels."""

    store: Store
    split: str
    rows: np.ndarray = field(repr=False)
    """Of the store."""
    size: int
    """Pixels a side."""
    grey16: Grey16
    ids: Sequence[str] = field(repr=False)
    groups: Sequence[str] = field(repr=False)
    """Pictures of one group are resampled together."""
    prompts: Sequence[str] | None = field(default=None, repr=False)
    labels: Sequence[int] | None = field(default=None, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"{self.store.place} ({self.split})"
        self.records: Sequence[str] | None = self.ids
        crop = describe(CropSettings(grey16=self.grey16), self.size)
        self.resize = f"{crop}, as in training (Pillow: box, bicubic)"
        self._loaders: SimpleQueue[Loader] = SimpleQueue()
        for _ in range(READERS):  # each has its own open files
            view = View(CropSettings(), self.size, self.size)
            self._loaders.put(Loader(self.store.path, {"x": view}, grey16=self.grey16))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Some pictures, in the order asked for.

        Raises:
            ArraError: one cannot be read or is not the one that the store was made from; the line names it.
        """
        parts = [part for part in np.array_split(self.rows[np.asarray(rows, dtype=np.int64)], READERS) if len(part)]
        with ThreadPoolExecutor(READERS) as pool:
            return [image for images in pool.map(self._load, parts) for image in images]

    def content_hash(self) -> str:
        """SHA-256 of the encoded pictures and of the crop; where a store noted their digests, nothing is read."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        told = hashlib.sha256(f"records, {self.resize}\n".encode())
        if self.store.entry(PICTURES) is not None:
            told.update(np.ascontiguousarray(self.store.reader(PICTURES).take(self.rows)).data)
        else:
            for digest in in_threads(self._digest, self.rows.tolist()):
                told.update(digest)
        return told.hexdigest()

    def _load(self, rows: np.ndarray) -> list[np.ndarray]:
        loader = self._loaders.get()
        try:
            loaded = loader.load_rows(rows.tolist())
        finally:
            self._loaders.put(loader)
        if loaded.failures:
            failure = loaded.failures[0]
            raise ArraError(
                f"{failure.where}: picture of record '{failure.id}': {failure.reason}; restore it, sets are measured "
                "whole"
            )
        return [views[0] for views in loaded.views["x"]]

    def _digest(self, row: int) -> bytes:
        name, text = self.store.fields(row, "id", "image")
        try:
            return hashlib.sha256(ImageReader().read(ImageRef.parse(text))).digest()
        except (OSError, ValueError) as error:
            raise ArraError(f"picture of record '{name}': {error}; restore it, sets are measured whole") from error


def open_records(
    place: Path | str,
    *,
    split: str | None,
    image_size: int | None = None,
    max_images: int | None = None,
    grey16: Grey16 = "full",
) -> StorePictures:
    """The pictures of a store's split at `image_size`, else at the size that its codes were made at.

    Raises:
        ArraError: no store, no such split, or none of pictures.
    """
    return _records(open_store(place), split=split, image_size=image_size, max_images=max_images, grey16=grey16)


def open_run_records(
    folder: Path, *, split: str | None, image_size: int | None = None, max_images: int | None = None
) -> StorePictures:
    """The pictures of a split of the store that a run was trained on, at the run's size.

    Raises:
        ArraError: no run, or its store is gone or has changed.
    """
    run = Run.open(folder)
    recipe = parse_recipe(run.recipe_yaml(), Recipe, source=str(run.recipe_path))
    store = find_store(folder, columns_of(recipe), str(run.manifest().get("store_sha256", "")))
    if store is None:
        there = noted(folder).get("at_first", "STORE")
        raise ArraError(
            f"{folder}: the store it was trained on is gone or has changed, it was {there}; make it again: "
            f"arra prepare {run.recipe_path} --store {there}"
        )
    return _records(
        store,
        split=split,
        image_size=image_size or recipe.data.image_size,
        max_images=max_images,
        grey16=recipe.data.crop.grey16,
    )


def _records(
    store: Store, *, split: str | None, image_size: int | None, max_images: int | None, grey16: Grey16
) -> StorePictures:
    if isinstance(store, RemoteStore):
        raise ArraError(
            f"{store.place}: an export holds no pictures; name the store it was made of, or a folder of pictures"
        )
    if split is None:
        raise ArraError(
            f"{store.place}: a store; say which of its splits, as in --split {sorted(store.about['splits'])[0]}"
        )
    size = image_size or _size_of(store)
    columns = [PICTURES] if store.entry(PICTURES) is not None else []
    everything = len(store.rows(split))
    rows = store.rows(split, columns=columns)
    about: dict[str, Any] = {"store": store.about["name"], "split": split}
    if everything > len(rows):
        about["failed_records"] = everything - len(rows)
    chosen = rows[chosen_rows(len(rows), max_images)]
    if len(chosen) < len(rows):
        about["chosen"] = f"{len(chosen)} of {len(rows)}, at random (the same for every set of {len(rows)})"
    table = store.table(["id", "prompt", "label", "group", "image"]).take(pa.array(chosen))
    if "" in table.column("image").to_pylist():
        raise ArraError(
            f"{store.place}: its records have codes and no pictures; compare with a folder of the pictures, or with "
            "published statistics"
        )
    prompts, labels = table.column("prompt").to_pylist(), table.column("label").to_pylist()
    has_labels = None not in labels
    if has_labels:
        about["class_balance"] = class_balance(labels)
    return StorePictures(
        store,
        split,
        chosen,
        size,
        grey16,
        ids=table.column("id").to_pylist(),
        groups=table.column("group").to_pylist(),
        prompts=prompts if all(prompts) else None,
        labels=labels if has_labels else None,
        about=about,
    )


def _size_of(store: Store) -> int:
    """Pixels a side at which the store's codes were made."""
    entry = store.entry(CODES)
    match = None if entry is None else CROPPED.search(str(entry.made_by.get("crop", "")))
    if match is None:
        raise ArraError(f"{store.place}: does not say how large its pictures are measured; give --image-size, as 256")
    return int(match[1])
