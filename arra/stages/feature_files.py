"""Features that the original ARRA extraction made, taken into the store: `arra extract RECIPE --from FOLDER`.

    FOLDER/x_visual_feature.pt                        as its scripts write them, all in one folder
    FOLDER/p19/visual_features/x_visual_feature.pt    as its training reads them: p19 is three folders above the picture

One `torch.save` of a tensor (1, F) or (F,) for each picture, as a rule from a CUDA device. Which picture a file is of
is told by its name alone: the scripts cut the picture's name at its first dot, the training at its last one.
Source: ARRA `pre_tokenize/pre_biomedclip_feature.py`, `pre_medsam_feature.py`, `modeling_xllmx_chameleon_align.py`.
Legend: F feature.
"""

import os
import pickle
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from arra.config import Recipe
from arra.data.columns import ColumnWriter
from arra.data.records import ImageRef, Source
from arra.data.store import Store
from arra.encoders import SPECS, EncoderChoice
from arra.errors import ArraError
from arra.models.weights import DAMAGE
from arra.stages.imports import import_column
from arra.stages.makers import IMPORTED, known_size, require_one_variant
from arra.stages.process import Progress

SUFFIX, LAYOUT_FOLDER = "_visual_feature.pt", "visual_features"
ARRA_OUTPUTS = {"biomedclip": "projected", "medsam": "mean", "medsam-wanglab": "mean"}
"""What the released scripts take of a picture."""
MAX_BYTES, MAX_VALUES = 2**22, 2**16
"""Of one file and of one vector: a released file has a few thousand bytes."""
SAMPLED_FILES = 64
"""Read first where nothing else tells how many values a vector has."""


def import_feature_files(
    recipe: Recipe,
    store: Store,
    choice: EncoderChoice,
    folder: Path,
    shards: Sequence[int],
    progress: Progress,
    *,
    replace: bool = False,
    retry_failed: bool = False,
) -> ColumnWriter | None:
    """The written column of an encoder's features, read from a folder of feature files; None if the store has it.

    With `retry_failed` a column that is there is completed by the records that had no file, or a bad one.

    Raises:
        ArraError: the folder has no such files, or none of the store's records; the encoder's choice or the recipe's
            crop asks for more than a vector of each picture; the store's column was made otherwise.
    """
    name = choice.column
    output = _require_whole_pictures(choice)
    require_one_variant(recipe, name)
    files = FeatureFiles.find(folder)
    places = files.of_records(store)
    if not any(isinstance(place, Path) for place in places):
        raise ArraError(
            f"{folder}: its {len(files)} files are named as no picture of {store.path}, the first as "
            f"{next(iter(files))!r}; name the folder that was made from these pictures"
        )
    size = known_size(choice) or _usual_size(place for place in places if isinstance(place, Path))
    dtype = recipe.data.features_dtype

    def read(source: Source, record: str, row: int) -> np.ndarray:
        place = places[row]
        if not isinstance(place, Path):
            raise ValueError(place)
        features = read_feature_file(place)
        if len(features) != size:
            raise ValueError(f"{place}: {len(features)} values, expected {size} of {choice.name} ({output})")
        with np.errstate(over="ignore"):  # told just below
            stored = features.astype(dtype)[None]  # (1, F)
        if not np.isfinite(stored).all():
            raise ValueError(f"{place}: values beyond {dtype}; set data.features_dtype: float32")
        return stored

    writer = import_column(
        store,
        name,
        {
            "encoder": choice.name,
            "weights": None,
            "aggregate": output,
            "input": "the whole picture, through the encoder's own preprocessing",
            "dtype": dtype,
            "imported": IMPORTED,
        },
        shape=(size,),
        variants=1,
        dtype=dtype,
        sources=recipe.data.all_sources,
        read=read,
        shards=shards,
        progress=progress,
        replace=replace,
        retry_failed=retry_failed,
    )
    taken = len({place for place in places if isinstance(place, Path)})
    if taken < files.count:
        progress(f"importing {name}", len(store), len(store), f"{files.count - taken} files are of no single record")
    return writer


def _require_whole_pictures(choice: EncoderChoice) -> str:
    """The output that the files hold.

    Raises:
        ArraError: the choice asks for something that they do not hold.
    """
    for key in ("layers", "image_size", "grid", "bands"):
        if getattr(choice, key) is not None:
            raise ArraError(
                f"--from: the files hold one vector of each picture at the encoder's own size, '{choice.name}' has "
                f"'{key}' in the recipe; leave it out, or make these features here"
            )
    output = choice.output or (SPECS[choice.name].output if choice.name in SPECS else "cls")
    held = ARRA_OUTPUTS.get(choice.name, output)
    if output != held or output == "patches":
        raise ArraError(
            f"--from: the files of {choice.name} hold its output '{held if held != 'patches' else 'cls'}', the recipe "
            f"takes '{output}'; set output: {held if held != 'patches' else 'cls'}"
        )
    return output


@dataclass(frozen=True)
class FeatureFiles:
    """The feature files of a folder."""

    folder: Path
    by_stem: dict[str, list[Path]]
    """By the name of their picture, as it was cut."""

    @classmethod
    def find(cls, folder: Path) -> "FeatureFiles":
        """Those of a folder and the folders in it.

        Raises:
            ArraError: there is no such folder, or no such file.
        """
        if not folder.is_dir():
            raise ArraError(f"--from {folder}: no such folder; expected files NAME{SUFFIX} in it")
        by_stem: dict[str, list[Path]] = {}
        for here, below, names in os.walk(folder):
            below.sort()
            for name in sorted(names):
                if name.endswith(SUFFIX):
                    by_stem.setdefault(name.removesuffix(SUFFIX), []).append(Path(here, name))
        if not by_stem:
            raise ArraError(f"--from {folder}: no files NAME{SUFFIX} in it, as ARRA's extraction writes them")
        return cls(folder, by_stem)

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_stem)

    def __len__(self) -> int:
        return len(self.by_stem)

    @property
    def count(self) -> int:
        """How many files there are."""
        return sum(map(len, self.by_stem.values()))

    def of_records(self, store: Store) -> list[Path | str]:
        """Each record's file, or why it has none: missing, or its name tells two files or two records apart no more."""
        found: list[Path | str] = []
        for shard in range(store.num_shards):
            for record in store.records_of(shard).select(["id", "image"]).to_pylist():
                found.append(self._of(record["id"], record["image"]))
        uses = Counter(place for place in found if isinstance(place, Path))
        return [
            f"{place}: {uses[place]} records have pictures of this name, and it cannot be of all; rename the pictures"
            if isinstance(place, Path) and uses[place] > 1
            else place
            for place in found
        ]

    def _of(self, record: str, image: str | None) -> Path | str:
        ref = ImageRef.parse(image) if image else None
        is_file = ref is not None and ref.kind == "file"
        path = PurePosixPath(Path(ref.path).as_posix() if ref is not None and is_file else record)
        stems = [path.stem, path.name.partition(".")[0]]  # as the training cuts, as the extraction does
        for stem in stems if is_file else [path.name, *stems]:
            places = self.by_stem.get(stem, [])
            # three folders above the picture: p10/p10000032/s50414267/x.jpg
            own = [place for place in places if place.parts[-3:-1] == (_above(path), LAYOUT_FOLDER)]
            if len(own or places) == 1:
                return (own or places)[0]
            if places:
                return f"{places[0]}: another file has this name, {places[1]}; keep one of them"
        return f"{self.folder}: no file {stems[0]}{SUFFIX}"


def _above(path: PurePosixPath) -> str:
    """Name of the folder three above a picture; empty where there is none."""
    return path.parts[-4] if len(path.parts) > 3 else ""


def read_feature_file(path: Path) -> Float32[np.ndarray, " F"]:
    """The vector in a feature file; nothing in the file is run, and it needs no GPU.

    Raises:
        ValueError: it is no such file, holds something else, or numbers that are not finite.
    """
    tensor = _load(path)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: holds a {type(tensor).__name__}, expected a tensor of floats")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise ValueError(f"{path}: holds a tensor of {tensor.dtype} ({tensor.layout}), expected a tensor of floats")
    shape = tuple(tensor.shape)
    if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)) or not 0 < tensor.numel() <= MAX_VALUES:
        raise ValueError(f"{path}: a tensor of {' x '.join(map(str, shape)) or 'one value'}, expected 1 x F or F")
    features: np.ndarray = tensor.detach().reshape(-1).float().numpy()
    if not np.isfinite(features).all():
        raise ValueError(f"{path}: holds numbers that are not finite")
    return features


def _load(path: Path) -> object:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
            raise ValueError(f"no plain file of up to {MAX_BYTES / 2**20:g} MiB")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("parts of it are compressed, which torch.save never does")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the kind of tensor, which is refused
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: not a plain tensor, and opening it could run code") from None
    except DAMAGE as error:
        reason = str(error).splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable file of torch.save ({reason})") from None
    return content


def _usual_size(places: Iterator[Path]) -> int:
    """How many values most of the first files have."""
    sizes: Counter[int] = Counter()
    for place, _ in zip(places, range(SAMPLED_FILES), strict=False):
        try:
            sizes[len(read_feature_file(place))] += 1
        except ValueError:  # told when it is read for its record
            continue
    return sizes.most_common(1)[0][0] if sizes else 1
