"""A doctor for data: `arra data check`. What is wrong with a set of captioned pictures, before anything is trained.

sources -> index in a scratch folder, by the rules of preparation -> one pass over the records, one over the pictures
        -> sections of findings -> table, check.json, check.html, failures.jsonl, duplicates.jsonl

No store is made or needed. Memory holds numbers of every record, never its text or pixels.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Group
from rich.table import Table
from rich.text import Text

from arra.config import Recipe, find_recipe, load_recipe, recipes_folder
from arra.data.columns import FAILURES_FILE
from arra.data.crops import CropSettings, choose_bucket, crop_sizes
from arra.data.duplicates import (
    VIEW_SIDE,
    Fingerprints,
    find_copies,
    num_repeats,
    num_straddling,
    shared_with,
    small_copy,
)
from arra.data.index import SKIPPED_FILE, Indexed, build_index
from arra.data.llamagen_lists import LlamaGenCodesSource
from arra.data.loading import Loaded, Loader, Task, View, default_workers, load_tasks
from arra.data.reading import ImageReader
from arra.data.records import BROKEN_PICTURE, Failure, ImageRef, Skipped, decode_image
from arra.data.sources import SourceKind, detect_kind
from arra.data.store import RECORDS, Store
from arra.distributed import choose_device
from arra.encoders import Encoder
from arra.errors import ArraError
from arra.evaluate.distances import frechet_distance
from arra.report.check_page import PAGE_FILE, SHOWN_SIDE, Figure, Level, Problem, Section, check_page, ranked
from arra.runs import atomic_write, writing
from arra.stages.captions import store_text_tokenizer
from arra.stages.judging import Judge
from arra.stages.makers import CROP, on_all
from arra.stages.process import Progress, silent
from arra.stages.tokenizer import load_named
from arra.tokenizers import PUBLISHED, ImageTokenizer

DUPLICATES_FILE = "duplicates.jsonl"
SMALL = "small"
PICTURES_AT_A_TIME = 32
MOST_LISTED = 100
"""Examples of one kind on the page and in check.json."""
MOST_SHOWN = 12
"""Figures of one kind on the page."""
ALMOST_ALL = 1 - 1e-9
"""Share of items that may fail: all of them failing still tells why, and one good record makes an index."""
UNBIASED_PICTURES = 5000
"""From about here on the upward bias of a Frechet distance is small."""
POOR_PSNR_DB = 18.0
"""LlamaGen's VQ-16 reaches 20.8 dB on ImageNet at 256 pixels; clearly less is a poor ceiling for any model."""
MUCH_CUT = 0.25
UNEVEN_CLASSES = 10
"""Ratio of the largest class to the smallest from which on it is told."""
SPECIAL_TEXT = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|mask|image|img|sep|cls)>|<reserved\d+>|<racm3:break>|<eoss>"
    r"|\[/?INST\]|\[(?:PAD|MASK|SEP|CLS|UNK)\]",
    re.IGNORECASE,
)
"""What other trainers' tokenizers take for special tokens."""


@dataclass(frozen=True)
class Checked:
    """What was found."""

    path: str
    sections: list[Section]
    out: Path

    @property
    def problems(self) -> list[Problem]:
        """What to know and to do, errors first."""
        return ranked(self.sections)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(problem.level == "error" for problem in self.problems)

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = Counter(problem.level for problem in self.problems)
        told = [f"{counts[level]} {level}{'s' if counts[level] > 1 else ''}" for level in counts]
        if not told:
            return "Nothing is wrong with this data."
        return f"{'No error' if self.ok else 'Not fit for training yet'}: {', '.join(told)}."


def check_data(
    path: str,
    *,
    out: Path,
    kind: str | None = None,
    overrides: Sequence[str] = (),
    tokenizer: str | None = None,
    encoder: str | None = None,
    max_images: int = 1000,
    workers: int | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Checked:
    """The findings on a data path or a recipe's sources, written to `out` too.

    `tokenizer` and `encoder` stand in for the recipe's tokenizer and judge; at most `max_images` evenly spaced pictures
    pass through them.

    Raises:
        ArraError: there is no such path or recipe, a source is not of its kind, or it has no items at all.
    """
    named = {"tokenizer.name": tokenizer, "encoder.judge": encoder}
    given = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    recipe = recipe_of(path, kind, [*overrides, *given])
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        scratch_folder = TemporaryDirectory(dir=out, prefix=".check-")
    with scratch_folder as scratch, (out / "failures.jsonl").open("w", encoding="utf-8") as file:
        found = _Examination(recipe, Path(scratch), FailureLog(file), out)
        sections = found.run(max_images, default_workers() if workers is None else workers, device, progress)
        attribution = "" if found.store is None else found.store.about["attribution"]
    checked = Checked(path, sections, out)
    title = f"Data check: {Path(path).name or path}"
    page = check_page(sections, title=title, verdict=checked.verdict, attribution=attribution)
    atomic_write(out / PAGE_FILE, page)
    numbers = {section.name: section.numbers for section in sections}
    content = {"path": path, "ok": checked.ok, "problems": [asdict(each) for each in checked.problems]} | numbers
    atomic_write(out / "check.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return checked


def recipe_of(path: str, kind: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe that `path` names, or the demo's with the data at `path` in place of its own.

    Raises:
        ArraError: neither a recipe nor data of a known kind.
    """
    if kind is None and _names_recipe(Path(path)):
        return load_recipe(path, overrides=overrides)
    if kind is not None and kind not in get_args(SourceKind):
        raise ArraError(f"--kind {kind}: expected one of {', '.join(get_args(SourceKind))}")
    data = [f"data.source={kind or detect_kind(Path(path))}", f"data.path={json.dumps(path)}"]
    return load_recipe("demo", overrides=[*data, *overrides])


def _names_recipe(path: Path) -> bool:
    if path.is_dir():
        return False
    if path.is_file():
        is_yaml = path.suffix.lower() in (".yaml", ".yml")
        return is_yaml and "\nMETA:" not in "\n" + path.read_text(encoding="utf-8", errors="replace")
    try:
        find_recipe(path)
    except ArraError:
        known = ", ".join(sorted(file.stem for file in recipes_folder().glob("*.yaml")))
        raise ArraError(f"{path}: no such file or folder, and no built-in recipe; those are {known}") from None
    return True


# What is remembered of the items


class FailureLog:
    """Failed or skipped items: all of them in a file, a count of each kind and the first ones in memory."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self.kinds: Counter[str] = Counter()
        self.first: list[str] = []

    def add(self, item: Failure | Skipped) -> None:
        """Nothing; the item is counted, listed and written."""
        self.kinds[re.sub(r"'[^']*'|\"[^\"]*\"|(?<![-\w])\d+", "…", item.reason)] += 1
        if len(self.first) < MOST_LISTED:
            self.first.append(f"{item.where or item.id}: {item.reason}")
        if self.file is not None:
            self.file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")

    @property
    def count(self) -> int:
        return self.kinds.total()


class _Texts:
    """Numbers of every record: split, class, caption."""

    def __init__(self, store: Store) -> None:
        count = len(store)
        self.names = sorted(store.about["splits"])
        self.splits = np.zeros(count, dtype=np.int16)
        self.labels = np.full(count, -1, dtype=np.int32)
        self.keys = np.zeros(count, dtype=np.uint64)
        """Of the caption, without case and white space; 0 where it is blank."""
        self.chars, self.words, self.ids, self.longest = (np.zeros(count, dtype=np.int32) for _ in range(4))
        """Of the caption: characters, words, text ids, and text ids of the longest of it and its alternatives."""
        self.special: Counter[str] = Counter()
        self.special_rows: list[int] = []

    def of(self, split: str) -> np.ndarray:
        """Which records are of a split."""
        return self.splits == (self.names.index(split) if split in self.names else -1)

    def add(self, row: int, record: dict[str, Any], encode: Any) -> None:
        prompt = record["prompt"]
        self.splits[row] = self.names.index(record["split"])
        if record["label"] is not None:
            self.labels[row] = record["label"]
        words = prompt.lower().split()
        if words:
            self.keys[row] = int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big")
        self.chars[row], self.words[row] = len(prompt), len(words)
        if encode is not None:
            lengths = [len(encode(text)) for text in (prompt, *record["alternatives"])]
            self.ids[row], self.longest[row] = lengths[0], max(lengths)
        marks = SPECIAL_TEXT.findall(prompt)
        if marks:
            self.special.update(marks)
            if len(self.special_rows) < MOST_LISTED:
                self.special_rows.append(row)


class CheckLoader(Loader):
    """Loads the small copy of every picture, and the tokenizer's crop of chosen rows alone."""

    def __init__(self, store: Path, crop: View | None, chosen: frozenset[int], grey16: Any) -> None:
        views = {SMALL: View(CropSettings(), VIEW_SIDE, VIEW_SIDE)} | ({} if crop is None else {CROP: crop})
        super().__init__(store, views, grey16=grey16)
        self.chosen = chosen

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckLoader, (self.path, self.views.get(CROP), self.chosen, self.grey16)

    def load_rows(self, rows: Sequence[int], draws: Any = None, *, task: Task | None = None) -> Loaded:
        loaded = super().load_rows(rows, draws, task=task)
        loaded.views[SMALL] = [small_copy(views[0]) for views in loaded.views[SMALL]]
        if CROP in loaded.views:
            nothing = np.empty((0, 0, 0, 3), np.uint8)
            crops = zip(loaded.places, loaded.views[CROP], strict=True)
            loaded.views[CROP] = [crop if rows[place] in self.chosen else nothing for place, crop in crops]
        return loaded


@dataclass
class Reconstructions:
    """Pictures through the tokenizer and back, a batch at a time; the worst are kept."""

    tokenizer: ImageTokenizer
    encoder: Encoder
    device: torch.device
    psnr: list[float] = field(default_factory=list)
    features: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Of every picture, and of what comes back."""
    worst: list[tuple[float, int, np.ndarray, np.ndarray]] = field(default_factory=list)
    """(PSNR, row, crop, what comes back), worst first."""
    waiting: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def add(self, row: int, crop: UInt8[np.ndarray, "1 H W 3"]) -> None:
        self.waiting.append((row, crop))
        if len(self.waiting) == PICTURES_AT_A_TIME:
            self.flush()

    def flush(self) -> None:
        """Nothing; what waits has been through the networks."""
        rows, crops = [row for row, _ in self.waiting], [crop for _, crop in self.waiting]
        self.waiting = []
        back = on_all(lambda images: self.tokenizer.decode(self.tokenizer.encode(images.to(self.device))), crops)
        of_crops, of_back = (
            on_all(lambda images: self.encoder.encode(images.to(self.device)), each) for each in (crops, back)
        )
        self.features += [(one[0], other[0]) for one, other in zip(of_crops, of_back, strict=True)]
        for row, crop, image in zip(rows, crops, back, strict=True):
            error = np.square((crop.astype(np.float64) - image) / 255).mean()
            self.psnr.append(float(-10 * np.log10(max(error, 1e-10))))
            self.worst.append((self.psnr[-1], row, crop[0], image[0]))
        self.worst = sorted(self.worst, key=lambda each: each[:2])[:MOST_SHOWN]


# The examination


class _Examination:
    """All that is asked of a set; `run` gives the sections in the order of the page."""

    def __init__(self, recipe: Recipe, scratch: Path, failures: FailureLog, out: Path) -> None:
        self.recipe, self.scratch, self.failures, self.out = recipe, scratch, failures, out
        self.broken_pictures, self.skipped = FailureLog(failures.file), FailureLog()
        self.sources = recipe.data.all_sources
        self.store: Store | None = None

    def run(self, max_images: int, workers: int, device: str, progress: Progress) -> list[Section]:
        indexed = build_index(
            self.sources,
            self.scratch,
            max_failed_fraction=ALMOST_ALL,
            progress=lambda count: progress("reading records", count, 0),
        )
        for line in _lines(self.scratch / ("" if indexed.store is None else RECORDS) / FAILURES_FILE):
            self.failures.add(Failure(line["id"], line["where"], line["reason"]))
        for line in _lines(self.scratch / SKIPPED_FILE):
            self.skipped.add(Skipped(**line))
        self.store = indexed.store
        sections = [self._items(indexed)]
        if self.store is None:
            return sections
        self._read_texts(self.store, progress)
        sections += [self._splits(), *self._captions()]
        if all(isinstance(source, LlamaGenCodesSource) for source in self.sources):
            return [*sections, Section("pictures", "Pictures", "The source gives codes in place of pictures.")]
        self._read_pictures(self.store, max_images, workers, device, progress)
        progress("comparing pictures", 0, 0)
        self.copies = find_copies(self.prints)
        sections[1:1] = [self._pictures(), self._duplicates()]
        progress("done", 1, 1)
        return [*sections, self._tokenizer()]

    def _read_texts(self, store: Store, progress: Progress) -> None:
        self.texts, row = _Texts(store), 0
        self.text_tokenizer = None
        if "train" in self.texts.names:
            progress("training the text tokenizer", 0, 0)
            self.text_tokenizer = store_text_tokenizer(self.recipe, store)
        encode = None if self.text_tokenizer is None else self.text_tokenizer.encode
        for shard in range(store.num_shards):
            columns = ["prompt", "alternatives", "label", "split"]
            for record in store.records_of(shard).select(columns).to_pylist():
                self.texts.add(row, record, encode)
                row += 1
            progress("reading captions", row, len(store))
        self.train = self.texts.of("train")
        self.held_out = ~self.train

    def _read_pictures(self, store: Store, max_images: int, workers: int, device: str, progress: Progress) -> None:
        count, size = len(store), self.recipe.data.image_size
        self.prints = Fingerprints(count, self.scratch / "small")
        self.sides = np.zeros((count, 2), dtype=np.int32)
        self.max_images = max_images
        tokenizer, self.no_tokenizer = _usable_tokenizer(self.recipe) if max_images else (None, "not asked for")
        self.through: Reconstructions | None = None
        crop = None
        if tokenizer is not None:
            where = choose_device(device)
            tokenizer.model.to(where)
            judge = Judge(self.recipe.encoder.choice("judge"), device=where)
            self.through = Reconstructions(tokenizer, judge, where)
            settings, grey16 = self.recipe.data.crop, self.recipe.data.crop.grey16
            crop = View(settings if settings.kind == "buckets" else CropSettings(grey16=grey16), size, size)
        chosen = np.linspace(0, count - 1, min(count, max_images)).round().astype(np.int64)
        loader = CheckLoader(store.path, crop, frozenset(chosen.tolist()), self.recipe.data.crop.grey16)
        tasks = list(_all_tasks(store))
        for loaded in load_tasks(tasks, loader, workers=workers):
            first = store.shard_starts[loaded.task.shard] + loaded.task.start
            self._take(loaded, first)
            progress("reading pictures", first + loaded.task.stop - loaded.task.start, count)
        if self.through is not None and self.through.waiting:
            self.through.flush()

    def _take(self, loaded: Loaded, first: int) -> None:
        for failure in loaded.failures:
            self.broken_pictures.add(failure)
        if not loaded.places:
            return
        rows = np.array(loaded.places) + first
        self.sides[rows] = loaded.sizes
        self.prints.add(rows, loaded.digests, np.stack(loaded.views[SMALL]))
        if self.through is not None:
            for row, crop in zip(rows.tolist(), loaded.views[CROP], strict=True):
                if crop.size:
                    self.through.add(row, crop)

    # Sections

    def _items(self, indexed: Indexed) -> Section:
        section = Section("records", "Records", listed=self.failures.first)
        section.rows = [
            ("items in the sources", f"{indexed.items:,}"),
            ("records", f"{indexed.records:,}"),
            ("broken items", f"{indexed.failed:,}"),
            ("left out by a rule of the source", f"{indexed.skipped:,}"),
            *((f"broken: {kind}", f"{count:,}") for kind, count in self.failures.kinds.most_common(8)),
            *((f"left out: {kind}", f"{count:,}") for kind, count in self.skipped.kinds.most_common(8)),
        ]
        section.numbers = {
            "items": indexed.items,
            "records": indexed.records,
            "failed": indexed.failed,
            "skipped": indexed.skipped,
            "failed_by_reason": dict(self.failures.kinds.most_common(MOST_LISTED)),
            "skipped_by_reason": dict(self.skipped.kinds.most_common(MOST_LISTED)),
            "examples": self.failures.first,
            "skipped_examples": self.skipped.first,
        }
        if indexed.failed:
            what = f"items that make no record: {_share(indexed.failed, indexed.items - indexed.skipped)}, the first: "
            _tell(section, "error", what + self.failures.first[0], f"mend what {self.out / 'failures.jsonl'} lists")
        if indexed.skipped:
            what = f"items left out by a rule of the source: {indexed.skipped:,}, the first: {self.skipped.first[0]}"
            _tell(section, "note", what, "look whether that is meant")
        return section

    def _pictures(self) -> Section:
        read = self.prints.read
        section = Section("pictures", "Pictures", listed=self.broken_pictures.first)
        section.numbers = {"read": int(read.sum()), "unreadable": self.broken_pictures.count}
        section.numbers["examples"] = self.broken_pictures.first
        section.rows = [("pictures read", f"{read.sum():,}"), ("unreadable", f"{self.broken_pictures.count:,}")]
        if self.broken_pictures.count:
            what = f"unreadable pictures: {self.broken_pictures.count:,}, the first: {self.broken_pictures.first[0]}"
            advice = f"replace them or remove their lines; {self.out / 'failures.jsonl'} lists all"
            _tell(section, "error", what, advice)
        if read.any():
            self._resolutions(section, self.sides[read])
        return section

    def _resolutions(self, section: Section, sides: np.ndarray) -> None:
        size, count = self.recipe.data.image_size, len(sides)
        short, long = sides.min(1), sides.max(1)
        ratio, cut = sides[:, 0] / sides[:, 1], 1 - short / long
        small = int((short < size).sum())
        for name, values in (("width", sides[:, 0]), ("height", sides[:, 1])):
            section.rows.append((f"{name}, least / median / greatest", _three(values)))
            section.numbers[name] = [int(values.min()), float(np.median(values)), int(values.max())]
        section.rows += [
            ("width / height, least / median / greatest", _three(ratio, digits=2)),
            (f"smaller than {size} px, would be enlarged", _share(small, count)),
            ("the centre square cuts away, on average", f"{100 * cut.mean():.1f} % of a picture"),
        ]
        section.numbers |= {
            "aspect": [float(ratio.min()), float(np.median(ratio)), float(ratio.max())],
            "image_size": size,
            "smaller_than_image_size": small,
            "mean_cut_by_center_crop": float(cut.mean()),
        }
        self._buckets(section, sides)
        if small:
            what = f"pictures smaller than data.image_size {size}, which get enlarged: {_share(small, count)}"
            _tell(section, "warning" if small > count / 10 else "note", what, "leave them out or choose a smaller size")
        if cut.mean() > MUCH_CUT:
            what = f"the centre square cuts away {100 * cut.mean():.0f} % of a picture on average"
            _tell(section, "note", what, "what captions name may lie outside; data.crop.kind=buckets keeps the shape")
        rows = np.nonzero(self.prints.read)[0]
        for row in rows[np.argsort(short, kind="stable")[: min(4, small)]].tolist():
            self._show(section, "among the smallest", row)
        much = int((cut > 0.5).sum())
        for row in rows[np.argsort(-cut, kind="stable")[: min(4, much)]].tolist():
            self._show(section, "cut the most by a centre square", row)

    def _buckets(self, section: Section, sides: np.ndarray) -> None:
        size = self.recipe.data.image_size
        size = size if size >= 256 and size % 32 == 0 else 256
        some = sides[np.linspace(0, len(sides) - 1, min(len(sides), 10_000)).astype(int)]
        kinds, counts = np.unique(some, axis=0, return_counts=True)
        buckets, chosen = crop_sizes(size), Counter[str]()
        for (width, height), number in zip(kinds.tolist(), counts.tolist(), strict=True):
            across, down = choose_bucket(width, height, buckets)
            chosen[f"{across}x{down}"] += number
        name, number = chosen.most_common(1)[0]
        text = f"{name} for {_share(number, len(some))}; buckets in use: {len(chosen)}"
        section.rows.append((f"Lumina bucket at {size} px that fits most", text))
        section.numbers["buckets"] = {"size": size, "of_pictures": len(some), "chosen": dict(chosen.most_common())}

    def _duplicates(self) -> Section:
        section = Section(
            "copies",
            "Copies",
            "Equal files, and pictures whose 32-pixel copies of the centre square hardly differ (re-encoded or "
            "resized ones; cropped, mirrored or recoloured ones are other pictures).",
        )
        read, copies, splits = self.prints.read, self.copies, self.texts.splits
        exact = shared_with(copies.exact, self.held_out & read, self.train & read)
        near = shared_with(copies.near, self.held_out & read, self.train & read) & ~exact
        others = self.held_out & read
        straddling = num_straddling(copies.near[others], splits[others])
        section.numbers = {"held_out_in_train": int(exact.sum()), "held_out_like_train": int(near.sum())}
        section.numbers["alike_across_held_out_splits"] = straddling
        section.rows = [
            ("held-out pictures that training has too", f"{exact.sum():,}"),
            ("held-out pictures that look like one of training", f"{near.sum():,}"),
            ("pictures that two held-out splits share", f"{straddling:,}"),
        ]
        section.numbers["within"] = {}
        for number, name in enumerate(self.texts.names):
            inside = read & (splits == number)
            same, alike = num_repeats(copies.exact[inside]), num_repeats(copies.near[inside])
            section.rows.append((f"in {name}: equal files, look-alikes", f"{same:,}, {alike - same:,}"))
            section.numbers["within"][name] = {"exact": same, "near": alike - same}
        listed = str(self.out / DUPLICATES_FILE)
        self._leaks(section, int(exact.sum()), int(near.sum()), straddling, listed)
        for caption, rows in self._write_clusters():
            self._show(section, caption, *rows)
        return section

    def _leaks(self, section: Section, exact: int, near: int, straddling: int, listed: str) -> None:
        count = int(self.held_out.sum())
        if exact:
            what = f"held-out pictures that are in train too, file for file: {_share(exact, count)}"
            _tell(section, "error", what, f"take each out of one of the splits; {listed} names them")
        if near:
            what = f"held-out pictures that look like one of train: {_share(near, count)}"
            _tell(section, "warning", what, f"look at them below; {listed} names them")
        if straddling:
            what = f"pictures that two held-out splits share: {straddling:,}"
            _tell(section, "warning", what, f"choices made on one then favour the other; {listed} names them")
        within = section.numbers["within"].values()
        same, alike = (sum(each[key] for each in within) for key in ("exact", "near"))
        if same:
            what = f"further copies of pictures within their split: {_share(same, len(self.texts.splits))}"
            _tell(section, "warning", what, f"training sees them more often; {listed} names them")
        if alike:
            what = f"pictures that look like another of their split: {_share(alike, len(self.texts.splits))}"
            _tell(section, "note", what, f"{listed} names them")

    def _write_clusters(self) -> list[tuple[str, tuple[int, ...]]]:
        """What to show of the clusters, now listed in a file: (caption, rows), those that leak from train first."""
        shown: list[list[tuple[str, tuple[int, ...]]]] = [[], [], [], []]
        with (self.out / DUPLICATES_FILE).open("w", encoding="utf-8") as file:
            for kind, numbers in (("exact", self.copies.exact), ("near", self.copies.near)):
                for rows in _clusters(numbers):
                    if kind == "near" and len(np.unique(self.copies.exact[rows])) == 1:
                        continue
                    ids: dict[str, list[str]] = {}
                    for name, split, _ in map(self._fields, rows.tolist()):
                        ids.setdefault(split, []).append(name)
                    file.write(json.dumps({"kind": kind, "ids": ids}, ensure_ascii=False) + "\n")
                    leaks = self.train[rows].any() and self.held_out[rows].any()
                    pair = (rows[self.train[rows]][0], rows[self.held_out[rows]][0]) if leaks else rows[:2]
                    place = (0 if leaks else 2) + (kind == "near")
                    if len(shown[place]) < MOST_SHOWN:
                        what = ("equal files" if kind == "exact" else "look alike") + (
                            ", across splits" if leaks else ""
                        )
                        more = f"; {len(rows)} in all" if len(rows) > 2 else ""
                        shown[place].append((what + more, tuple(int(row) for row in pair)))
        return [each for part in shown for each in part][: 2 * MOST_SHOWN]

    def _splits(self) -> Section:
        texts, section = self.texts, Section("splits", "Splits and classes")
        counts = {name: int(texts.of(name).sum()) for name in texts.names}
        section.rows = [(f"records in {name}", f"{count:,}") for name, count in counts.items()]
        section.numbers = {"splits": counts}
        for name in ("train", "validation"):
            if name not in counts:
                what = f"no record is in split '{name}', which training needs"
                advice = f"name it in the source, set its split to {name}, or to 'hash' to hold a share out"
                _tell(section, "error", what, advice)
        held_out = [name for name in counts if name not in ("train", "validation")]
        if not held_out:
            what = "no held-out split beside train and validation: nothing to evaluate on"
            _tell(section, "warning", what, "give some records a split of another name, such as 'test'")
        elif missing := [name for name in self.recipe.evaluate.splits if name not in counts]:
            what = f"evaluate.splits names {', '.join(missing)}, which no record is in"
            _tell(section, "note", what, f"for this data: --set evaluate.splits=[{', '.join(held_out)}]")
        if (texts.labels >= 0).any():
            self._classes(section)
        return section

    def _classes(self, section: Section) -> None:
        assert self.store is not None
        names = self.store.about["classes"]
        labels = self.texts.labels[self.texts.labels >= 0]
        counts = np.bincount(labels, minlength=len(names))
        in_train = np.bincount(self.texts.labels[self.train & (self.texts.labels >= 0)], minlength=len(counts))
        name = [names[i] if i < len(names) else str(i) for i in range(len(counts))]
        least, most = int(counts.argmin()), int(counts.argmax())
        section.rows += [
            ("classes", f"{len(counts):,}"),
            ("records per class, least / median / greatest", _three(counts)),
            ("least class, greatest class", f"{name[least]}, {name[most]}"),
        ]
        section.numbers["classes"] = {name[i]: int(count) for i, count in enumerate(counts)}
        missing = [name[i] for i in np.nonzero((in_train == 0) & (counts > 0))[0]]
        if missing:
            _tell(
                section,
                "warning",
                f"classes without a picture in train: {_few(missing)}",
                "mend the split",
            )
        empty = [name[i] for i in np.nonzero(counts == 0)[0]]
        if empty:
            _tell(section, "note", f"classes without a record: {_few(empty)}", "they cannot be learnt")
        if counts.max() > UNEVEN_CLASSES * max(1, counts[counts > 0].min()):
            what = f"classes are uneven: {_three(counts)} records (least / median / greatest)"
            _tell(section, "note", what, "rare classes are seen as rarely in training")

    def _captions(self) -> list[Section]:
        if not self.texts.keys.any():
            return [Section("captions", "Captions", "There are none; the records have classes alone.")]
        return [self._shared_prompts(), self._lengths()]

    def _shared_prompts(self) -> Section:
        texts = self.texts
        section = Section(
            "prompts", "Prompts across splits", "Compared without case and white space; class names are not counted."
        )
        asked = (texts.keys != 0) & (texts.labels < 0)
        shared = shared_with(texts.keys, self.held_out & asked, self.train & asked)
        count = int((self.held_out & asked).sum())
        section.rows = [("held-out records whose prompt is in train too", _share(int(shared.sum()), count))]
        section.numbers = {"held_out_prompts_in_train": int(shared.sum()), "held_out_prompts": count, "repeats": {}}
        for number, name in enumerate(texts.names):
            inside = texts.keys[asked & (texts.splits == number)]
            repeats = num_repeats(inside)
            section.rows.append((f"prompts that repeat within {name}", _share(repeats, len(inside))))
            section.numbers["repeats"][name] = repeats
        some = np.nonzero(shared)[0][:MOST_LISTED].tolist()
        section.listed = [f"{split}: {name}: {prompt[:200]}" for name, split, prompt in map(self._fields, some)]
        section.numbers["examples"] = section.listed
        if shared.any():
            what = f"held-out records whose prompt is in train too: {_share(int(shared.sum()), count)}"
            advice = "move equal prompts into one split, as the hash does for records without a split"
            _tell(section, "warning", what, f"{advice}; the first: {section.listed[0]}")
        return section

    def _lengths(self) -> Section:
        texts, section = self.texts, Section("captions", "Captions")
        has = texts.keys != 0
        for name, values in (("characters", texts.chars[has]), ("words", texts.words[has])):
            section.rows.append((f"{name}, least / median / greatest", _three(values)))
            section.numbers[name] = [int(values.min()), float(np.median(values)), int(values.max())]
        if self.text_tokenizer is not None and self.recipe.model.condition == "text" and not self.recipe.model.llm:
            self._ids(section, has)
        if texts.special:
            marks = _few([f"{mark} ({count:,})" for mark, count in texts.special.most_common()])
            section.rows.append(("text that looks like special tokens", marks))
            section.numbers["special_text"] = dict(texts.special.most_common(MOST_LISTED))
            what = f"captions hold text that other trainers take for special tokens: {marks}"
            _tell(section, "note", what, "here it is plain text and cannot become a special token")
            section.listed += [
                f"special text: {self._fields(row)[0]}: {self._fields(row)[2][:200]}" for row in texts.special_rows
            ]
        return section

    def _ids(self, section: Section, has: np.ndarray) -> None:
        texts, limit = self.texts, self.recipe.model.prefix_length
        assert self.text_tokenizer is not None
        ids, most = texts.ids[has], int(texts.longest.max())
        long, empty = texts.longest + 1 > limit, has & (texts.ids == 0)
        section.rows += [
            ("text ids, least / median / greatest", _three(ids)),
            ("text ids at the 99th percentile", f"{np.quantile(ids, 0.99):.0f}"),
            ("size of the text tokenizer", f"{self.text_tokenizer.vocab_size:,} ids, trained on the captions of train"),
            (f"do not fit model.prefix_length {limit}", _share(int(long.sum()), len(long))),
            ("captions without a word (signs or emoji alone)", _share(int(empty.sum()), len(ids))),
        ]
        section.numbers |= {
            "text_ids": [int(ids.min()), float(np.median(ids)), int(ids.max())],
            "text_vocab_size": self.text_tokenizer.vocab_size,
            "prefix_length": limit,
            "longest_with_alternatives": most,
            "too_long": int(long.sum()),
            "without_a_word": int(empty.sum()),
        }
        if long.any():
            what = f"captions that do not fit model.prefix_length {limit}: {_share(int(long.sum()), len(long))}"
            enough = int(np.ceil(np.quantile(texts.longest, 0.99))) + 1
            advice = f"training refuses them; model.prefix_length {most + 1} holds all, {enough} holds 99 in 100"
            _tell(section, "warning", what, advice)
        if empty.any():
            what = f"captions without a word (signs or emoji alone): {_share(int(empty.sum()), len(ids))}"
            _tell(section, "warning", what, "to the model they are as good as no caption; write them in words")
        for kind, rows in (("too long", np.argsort(-texts.longest)[:10]), ("no word", np.nonzero(empty)[0][:10])):
            for row in rows.tolist():
                if kind == "no word" or long[row]:
                    name, _, prompt = self._fields(row)
                    section.listed.append(f"{kind}, {texts.longest[row]} ids: {name}: {prompt[:200]}")

    def _tokenizer(self) -> Section:
        section, through = Section("tokenizer", "What the tokenizer destroys"), self.through
        if through is None or not through.psnr:
            section.text = "Not looked at: " + (self.no_tokenizer or "no picture could be read.")
            section.numbers = {"skipped": section.text}
            if self.no_tokenizer and self.max_images:
                _tell(section, "note", "what the tokenizer destroys was not looked at", self.no_tokenizer)
            return section
        psnr, judge, count = np.array(through.psnr), through.encoder.spec.name, len(through.psnr)
        size, axes = self.recipe.data.image_size, self.recipe.evaluate.frechet_components
        section.text = (
            f"{count:,} evenly spaced pictures, cropped to {size} pixels, through {through.tokenizer.name} and back. "
            "No model over these codes can paint finer than this."
        )
        section.rows = [
            ("PSNR, mean over pictures", f"{psnr.mean():.2f} dB"),
            ("PSNR, worst / 5th percentile / best", _three(psnr, 0.05, digits=2) + " dB"),
        ]
        section.numbers = {
            "tokenizer": through.tokenizer.name,
            "tokenizer_sha256": through.tokenizer.weights_hash,
            "pictures": count,
            "image_size": size,
            "psnr_db": {"mean": float(psnr.mean()), "worst": float(psnr.min()), "best": float(psnr.max())},
        }
        if count > 1:
            raw, back = (torch.from_numpy(np.stack(each)) for each in zip(*through.features, strict=True))
            distance = frechet_distance(back, raw, num_components=axes)
            biased = count < UNBIASED_PICTURES
            note = f"; biased upwards below {UNBIASED_PICTURES:,} pictures, compare at equal numbers only"
            section.rows.append(
                (
                    "Fréchet distance of reconstructions to pictures",
                    f"{distance:.4g} in {min(axes, count - 1, raw.shape[1])} principal axes of the features of {judge} "
                    f"(not Inception's){note if biased else ''}",
                )
            )
            section.numbers["frechet"] = {
                "value": distance, "features": judge, "components": axes, "is_biased": biased
            }  # fmt: skip
        if psnr.mean() < POOR_PSNR_DB:
            what = f"{through.tokenizer.name} keeps {psnr.mean():.1f} dB of these pictures on average, which is little"
            _tell(section, "note", what, "try another (--tokenizer), or train one: tokenizer.train in the recipe")
        section.numbers["worst"] = []
        for value, row, crop, image in through.worst:
            name, _, prompt = self._fields(row)
            section.figures.append(Figure(f"{name}: {prompt[:120]}", (("picture", crop), (f"{value:.1f} dB", image))))
            section.numbers["worst"].append({"id": name, "psnr_db": value})
        return section

    # Records by number

    def _fields(self, row: int) -> tuple[str, str, str]:
        """Id, split and prompt."""
        assert self.store is not None
        name, split, prompt = self.store.fields(row, "id", "split", "prompt")
        return name, split, prompt

    def _show(self, section: Section, caption: str, *rows: int) -> None:
        pictures = []
        for row in rows:
            name, split, _ = self._fields(row)
            width, height = self.sides[row].tolist()
            pictures.append((f"{split}: {name}, {width}x{height}", self._look(row)))
        section.figures.append(Figure(caption, tuple(pictures)))

    def _look(self, row: int) -> UInt8[np.ndarray, "H W 3"]:
        """The whole picture for the page; of streams, which are not read twice, the small copy."""
        assert self.store is not None
        ref = ImageRef.parse(self.store.fields(row, "image")[0])
        if ref.kind != "stream":
            with suppress(*BROKEN_PICTURE):
                image = decode_image(self.reader.read(ref), grey16=self.recipe.data.crop.grey16)
                image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
                return np.asarray(image)
        return self.prints.small(np.array([row]))[0]

    @cached_property
    def reader(self) -> ImageReader:
        return ImageReader()


def _usable_tokenizer(recipe: Recipe) -> tuple[ImageTokenizer | None, str]:
    """The recipe's tokenizer, or None and why it cannot be looked at.

    Raises:
        ArraError: an unknown name, or damaged weights.
    """
    section, size = recipe.tokenizer, recipe.data.image_size
    if section.network is not None:
        return None, "the recipe trains a fresh tokenizer, which does not exist yet; name a known one with --tokenizer"
    if section.name in (*PUBLISHED, "llamagen") and section.weights is None:
        return None, f"{section.name} needs its file; give it with --set tokenizer.weights=PATH"
    tokenizer = load_named(recipe)
    sides = recipe.data.crop.patch if recipe.data.crop.kind == "buckets" else size
    if sides % tokenizer.downsampling:
        what = "data.crop.patch" if recipe.data.crop.kind == "buckets" else "data.image_size"
        return (
            None,
            f"{what} {sides} is no multiple of {tokenizer.downsampling}, which {tokenizer.name} needs; change it",
        )
    return tokenizer, ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, if it is there."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _all_tasks(store: Store) -> Iterator[Task]:
    for shard, size in enumerate(store.about["shards"]):
        for start in range(0, size, PICTURES_AT_A_TIME):
            yield Task(shard, start, min(start + PICTURES_AT_A_TIME, size))


def _clusters(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of every number that more than one row has, in row order."""
    order = np.argsort(numbers, kind="stable")
    order = order[numbers[order] >= 0]
    edges = np.concatenate([[0], np.nonzero(np.diff(numbers[order]))[0] + 1, [len(order)]])
    for place in np.nonzero(np.diff(edges) > 1)[0].tolist():
        yield order[edges[place] : edges[place + 1]]


def _tell(section: Section, level: Level, what: str, advice: str) -> None:
    section.problems.append(Problem(level, " ".join(what.split()), advice))


def _three(values: np.ndarray, middle: float = 0.5, *, digits: int = 0) -> str:
    """Least, median (or another quantile) and greatest, in words."""
    three = (values.min(), np.quantile(values, middle), values.max())
    return " / ".join(f"{value:,.{digits}f}" for value in three)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(1, total):.3g} %)" if count else "0"


def _few(texts: Sequence[str]) -> str:
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def summary(checked: Checked) -> Group:
    """The findings for the terminal."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for section in checked.sections:
        if section.rows or section.text:
            table.add_row(Text(section.title, style="bold"), "" if section.rows else Text(section.text))
        for name, value in section.rows:
            table.add_row(Text(name), Text(value))
    colors = {"error": "red", "warning": "yellow", "note": "cyan"}
    lines = []
    for problem in checked.problems:
        line = Text(f"{problem.level:8}", style=colors[problem.level])
        lines.append(line + Text(f"{problem.what}  ({problem.advice})", style="default"))
    return Group(table, Text(), *lines, Text(checked.verdict, style="bold"), Text(str(checked.out / PAGE_FILE)))
