"""From a place that a user names to pictures that are measured: one call for folders, archives, stores and runs.

    PLACE --open_set--> PictureSet            a set that is measured
          --open_reference--> Reference       what it is compared with: pictures, published statistics, or both

| place | what it is |
|---|---|
| FOLDER | pictures, in class folders or not, captioned or not |
| FOLDER of `arra generate` | pictures with what made each |
| FILE.npz | pictures of ADM's evaluation, statistics, or both |
| STORE and a split | the pictures of its records |
| RUN and a split | those of the store that it was trained on |
"""

from dataclasses import dataclass
from pathlib import Path

from arra.data.images import Grey16
from arra.data.remote import COLUMNS_FILE, remote_text
from arra.data.store import RECORDS
from arra.errors import ArraError
from arra.evaluate.sets import PictureSet
from arra.stages.npz_pictures import ReferenceStatistics, open_npz, read_statistics
from arra.stages.picture_folders import Fit, open_folder, open_samples
from arra.stages.samples import LIST_FILE, REQUEST_FILE
from arra.stages.store_pictures import open_records, open_run_records


@dataclass(frozen=True)
class Reference:
    """What a set is compared with; one of the two is there at least."""

    pictures: PictureSet | None
    statistics: ReferenceStatistics | None

    @property
    def name(self) -> str:
        """Where it lies."""
        found = self.pictures or self.statistics
        assert found is not None
        return found.name


def open_set(
    place: Path | str,
    *,
    image_size: int | None = None,
    filter: str = "bicubic",
    max_images: int | None = None,
    split: str | None = None,
    grey16: Grey16 = "full",
) -> PictureSet:
    """The pictures at a place; none is decoded before it is asked for.

    `image_size` brings all to squares of so many pixels: the shorter side is resized with Pillow's `filter`, the middle
    is kept. A store's pictures always are squares, cropped as in training. `max_images` takes that many at random,
    the same ones of every set of the same size. `split` is needed for stores and runs, and names a first folder of
    others; what `arra generate` and an .npz hold has no splits. `grey16`: how greys of more than 8 bits are scaled.

    Raises:
        ArraError: nothing that can be read is there, it is not finished, or it holds statistics alone.
    """
    if max_images is not None and max_images < 1:
        raise ArraError(f"--max-images {max_images}: expected 1 at least")
    path, fit = Path(place), Fit(image_size, filter)
    if remote_text(place) is not None or _is_store(path):
        return open_records(place, split=split, image_size=image_size, max_images=max_images, grey16=grey16)
    if (path / "recipe.yaml").is_file():
        return open_run_records(path, split=split, image_size=image_size, max_images=max_images)
    if _is_generated(path) or path.suffix == ".npz":
        if split is not None:
            raise ArraError(f"{path}: --split {split}: of stores and runs, this has none; leave it out")
        if path.suffix != ".npz" or path.is_dir():
            return open_samples(path, fit=fit, max_images=max_images)
        found = open_npz(path, fit=fit, max_images=max_images)
        if found is None:
            raise ArraError(f"{path}: holds statistics and no pictures; it can be a reference alone")
        return found
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise ArraError(f"{path}: {state}; expected a folder of pictures or of arra generate, an .npz, a store, a run")
    return open_folder(path, fit=fit, max_images=max_images, split=split, grey16=grey16)


def open_reference(
    place: Path | str,
    *,
    image_size: int | None = None,
    filter: str = "bicubic",
    max_images: int | None = None,
    split: str | None = None,
    grey16: Grey16 = "full",
) -> Reference:
    """What a set is compared with; an .npz may hold statistics of more pictures than it holds itself.

    Raises:
        ArraError: as `open_set`, and for statistics that are no mean and covariance.
    """
    path = Path(place)
    if path.suffix != ".npz" or path.is_dir():
        found = open_set(place, image_size=image_size, filter=filter, max_images=max_images, split=split, grey16=grey16)
        return Reference(found, None)
    if split is not None:
        raise ArraError(f"{path}: --split {split}: of stores and runs, this has none; leave it out")
    pictures = open_npz(path, fit=Fit(image_size, filter), max_images=max_images)
    return Reference(pictures, read_statistics(path))


def _is_store(path: Path) -> bool:
    return (path / COLUMNS_FILE).is_file() or ((path / "manifest.json").is_file() and (path / RECORDS).is_dir())


def _is_generated(path: Path) -> bool:
    return (path / LIST_FILE).is_file() or (path / REQUEST_FILE).is_file()
