"""The evaluation card of a run or of a set of pictures: what was measured, how, and the values behind every number.

Place in the pipeline: `arra evaluate` writes `metrics.json` (the card) and `evaluation.safetensors` (the per-picture
values) into a folder; `evaluate/compare.py` and `report/` read them and never look at a model or a picture again.

Values are named by `values_key`: `composed/nll` (N,), `composed/caption_gain` (N,), `composed/groups` (N,) int
(optional: pictures resampled together), `composed/cfg1/features` (N, F), `composed/cfg1/ranks` (N,) int, and the
references `composed/reference/reconstructions`, `composed/reference/raw` (N, F). A second judge's stand beside them:
`composed/cfg1/caption_features`, `composed/reference/caption_raw`. Rows that were measured in a space of their own keep
one number per picture, whose mean is the row's value: `test/inception.fid` (N,), `test/clip-b32.clip_score` (N,), and
where the pictures are those of the reference `test/of_reference/inception.recall` (M,). Letters: N pictures, M
reference pictures, F features.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.distances import (
    FRECHET_COMPONENTS,
    NUM_RESAMPLES,
    FrechetStatistic,
    KernelStatistic,
    MeanStatistic,
    Statistic,
    bootstrap,
)
from arra.evaluate.measured import Measured

CARD_FILE = "metrics.json"
VALUES_FILE = "evaluation.safetensors"

Better = Literal["lower", "higher"]
Subject = Literal["model", "tokenizer"]
Whose = Literal["generated", "reference"]
ProtocolValue = str | int | float | bool | None

METRICS: Mapping[str, tuple[Better, str]] = {
    "nll": ("lower", "nats/token"),
    "bits_per_token": ("lower", "bits/token"),
    "caption_gain": ("higher", "nats/token"),
    "class_gain": ("higher", "nats/token"),
    "frechet": ("lower", "feature units"),
    "kid_x1000": ("lower", "x1000"),
    "psnr_db": ("higher", "dB"),
    "fid": ("lower", "feature units"),
    "sfid": ("lower", "feature units"),
    "fd": ("lower", "feature units"),
    "fid_infinity": ("lower", "feature units"),
    "fd_infinity": ("lower", "feature units"),
    "cmmd": ("lower", "x1000"),
    "inception_score": ("higher", "classes"),
    "precision": ("higher", "fraction"),
    "recall": ("higher", "fraction"),
    "density": ("higher", "ratio"),
    "coverage": ("higher", "fraction"),
    "clip_score": ("higher", "cosine"),
    "clip_score_x100": ("higher", "x100"),
    "ms_ssim": ("higher", "similarity"),
    "ms_ssim_within": ("lower", "similarity"),
    "findings_auroc": ("higher", "AUROC"),
    "accuracy": ("higher", "fraction"),
    "copied": ("lower", "fraction"),
    "token_information": ("higher", "bits"),
    "shuffle_auroc": ("higher", "AUROC"),
}
"""Which direction is better, and the unit; retrieval (`..._at_K`) is a share where higher is better, a second judge's
distances (`JUDGE_frechet`) are as the first one's, and a part of a measure (`findings_auroc.Effusion`) is as the whole.
"""

SIZE_BIASED = frozenset({"fid", "sfid", "fd"})
"""Distances that grow as pictures get fewer, by an amount of order 1/N that depends on the model too."""
NEEDS_EQUAL_NUMBERS = SIZE_BIASED | {"inception_score", "cmmd", "precision", "recall", "density", "coverage"}
"""Measures whose expectation depends on the number of pictures; the others are means over pictures or unbiased."""
LARGEST = sys.float_info.max
ENOUGH_IMAGES = 5000
"""Pictures below which a distance of `SIZE_BIASED` is marked."""

PIXELS = "pixels"
"""What a card of a set calls the space of measures that need no network."""
ASKED = "asked_sha256"
"""Key of `Card.about`: `asked_hash` of what the pictures were asked to show."""
CLASS_BALANCE = "class_balance"
"""Key of `Card.about`: how many pictures of every class there are."""
DUPLICATES = "duplicates"
"""Key of `Card.about`: how many pictures are exact copies of another one."""
WARNINGS = "warnings"
"""Key of `Card.about`: sentences about the pictures or the measuring that a reader must see first."""

_SHARE: tuple[Better, str] = ("higher", "fraction")
_RETRIEVAL = re.compile(r"(?P<judge>.+_)?retrieval_at_(?P<k>\d+)")
_DISTANCE = re.compile(r"(?P<judge>.+_)?(?P<kind>frechet|kid_x1000)")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of a card with its interval."""

    metric: str
    """`nll`, `caption_gain`, `frechet`, `kid_x1000`, `retrieval_at_10`, `fid`, `clip_score`, `psnr_db`, ..."""
    split: str
    value: float
    num_images: int
    """Generated pictures, also where the values behind the number are of the reference's."""
    better: Better
    unit: str
    cfg_scale: float | None = None
    """Guidance of the pictures; None where no picture is generated."""
    reference: str | None = None
    """`reconstructions` (held-out pictures passed through the tokenizer), `raw`, or None."""
    subject: Subject = "model"
    """`tokenizer` marks a ceiling: what a perfect model over this tokenizer would reach."""
    low: float | None = None
    high: float | None = None
    space: str | None = None
    """The network in whose vectors it was measured, where the row has one of its own: `inception`, `rad-dino`."""
    of: Whose = "generated"
    """Whose pictures the values behind it are; recall and coverage are shares of the reference."""
    is_teachers: bool = False
    """Whether the space is of the alignment teacher's family, so that a gain there may be shared taste."""
    note: str | None = None
    """Anything that a reader of the number must know."""

    @property
    def key(self) -> tuple[str, str, float | None, str | None, str, str | None]:
        """What makes rows of two cards the same measurement."""
        return (self.metric, self.split, self.cfg_scale, self.reference, self.subject, self.space)

    @property
    def is_biased(self) -> bool:
        """Whether it is a distance of so few pictures that it says more of their number than of them."""
        return self.metric in SIZE_BIASED and self.num_images < ENOUGH_IMAGES

    @property
    def marks(self) -> tuple[str, ...]:
        """What must stand beside the number wherever it is shown."""
        found = [f"biased upwards: {self.num_images:,} pictures, under {ENOUGH_IMAGES:,}"] if self.is_biased else []
        found += ["the teacher's own space"] if self.is_teachers else []
        return (*found, *([self.note] if self.note else []))

    @property
    def values_name(self) -> str:
        """The key under which its per-picture values are kept."""
        name = self.metric if self.space is None else f"{self.space}.{self.metric}"
        if self.space is not None and self.reference is not None:
            name = f"{name}.{self.reference}"
        name = f"of_reference/{name}" if self.of == "reference" else name
        return values_key(name, split=self.split, cfg_scale=self.cfg_scale)


@dataclass(frozen=True, kw_only=True)
class Card:
    """All results of a run, or of a set of pictures, under one protocol."""

    run: str
    """The run's or the set's place."""
    protocol: Mapping[str, ProtocolValue]
    """Flat settings and hashes, which must match for a comparison; keys `run` and `model*` name the model."""
    results: tuple[Result, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the subject and need not match: guidance, sampling, seeds, commit, class balance, duplicates,
    teachers; plain values."""

    def to_json(self) -> str:
        """The card as indented JSON, keys in the order of the fields.

        Raises: ArraError when a number is not finite, as a model that diverged gives it.
        """
        for result in self.results:
            numbers = (result.value, result.low, result.high)
            if not all(math.isfinite(number) for number in numbers if number is not None):
                raise ArraError(
                    f"{self.run}: {result.metric} of {result.split} is {result.value}, expected a number; what was "
                    "measured has numbers that are not finite, as a model that diverged has"
                )
        content = {
            "run": self.run,
            "protocol": dict(self.protocol),
            "about": dict(self.about),
            "results": [dataclasses.asdict(result) for result in self.results],
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = CARD_FILE) -> "Card":
        """The card that `to_json` wrote; `where` names the file in messages.

        Raises: ArraError when the text is not an evaluation card.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArraError(f"{where}: not JSON ({error}); run `arra evaluate` again") from error
        required = {"run", "protocol", "results"}
        _require_keys(content, required, where=where, allowed=required | {"about"})
        if not isinstance(content["run"], str) or not isinstance(content["protocol"], dict):
            raise ArraError(f"{where}: `run` must be text and `protocol` a mapping; run `arra evaluate` again")
        if not isinstance(content["results"], list):
            raise ArraError(f"{where}: `results` must be a list; run `arra evaluate` again")
        for name, value in content["protocol"].items():
            if not isinstance(value, ProtocolValue):
                raise ArraError(f"{where}: protocol.{name} must be one plain value; run `arra evaluate` again")
        about = _read_about(content.get("about", {}), where=where)
        results = tuple(_read_result(row, where=f"{where}: results[{i}]") for i, row in enumerate(content["results"]))
        return cls(run=content["run"], protocol=content["protocol"], results=results, about=about)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A card together with its per-picture values."""

    card: Card
    values: Mapping[str, Tensor] = field(repr=False)

    @property
    def num_components(self) -> int | None:
        """Principal axes of the Frechet distances: the protocol's `frechet_components`.

        Raises: ArraError when the protocol says something else than a number there.
        """
        components = self.card.protocol.get("frechet_components", FRECHET_COMPONENTS)
        if components is not None and (not isinstance(components, int) or components < 1):
            raise ArraError(
                f"{self.card.run}: frechet_components: {components!r} is no number of axes; run `arra evaluate` again"
            )
        return components

    def save(self, folder: Path) -> None:
        """Writes both files into `folder`, values first: a card never stands beside older values.

        Raises: ArraError when a number is not finite, or the folder cannot be written.
        """
        card = self.card.to_json()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD_FILE).unlink(missing_ok=True)
            staged = folder / (VALUES_FILE + ".part")
            save_file({key: value.contiguous().cpu() for key, value in self.values.items()}, str(staged))
            os.replace(staged, folder / VALUES_FILE)
            staged = folder / (CARD_FILE + ".part")
            staged.write_text(card, encoding="utf-8")
            os.replace(staged, folder / CARD_FILE)
        except (OSError, SafetensorError) as error:
            raise ArraError(f"{folder}: cannot write the evaluation ({error}); free space or choose another") from error

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """The evaluation that `save` wrote.

        Raises: ArraError when a file is missing or broken.
        """
        card_path, values_path = folder / CARD_FILE, folder / VALUES_FILE
        for path in (card_path, values_path):
            if not path.is_file():
                raise ArraError(f"{path}: missing; run `arra evaluate {folder}` first")
        try:
            card = Card.from_json(card_path.read_text(encoding="utf-8"), where=str(card_path))
            values = load_file(str(values_path))
        except (OSError, UnicodeDecodeError, SafetensorError) as error:
            raise ArraError(f"{folder}: cannot read the evaluation ({error}); run `arra evaluate` again") from error
        return cls(card=card, values=values)


def values_key(name: str, *, split: str, cfg_scale: float | None = None) -> str:
    """The key of per-picture values: `composed/nll`, with guidance `composed/cfg1/ranks`, `composed/cfg1.5/ranks`."""
    return f"{split}/{name}" if cfg_scale is None else f"{split}/cfg{cfg_scale:g}/{name}"


def asked_hash(prompts: Sequence[str] | None, labels: Sequence[int] | None) -> str | None:
    """SHA-256 of what every picture of a set was asked to show, in order; None where nothing is known.

    Two sets of one hash are compared picture by picture.
    """
    asked = labels if prompts is None else prompts
    if asked is None:
        return None
    listed = [each if isinstance(each, str) else int(each) for each in asked]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def row_statistic(row: Result, values: Mapping[str, Tensor], *, num_components: int | None) -> Statistic:
    """The statistic of per-picture values that a row of a card stands for.

    Rows with a space are means of the values of their own name, whatever the metric: see `measure_row`.

    Raises: ArraError as `values_statistic`.
    """
    if row.space is None and row.of == "generated":
        return values_statistic(
            values,
            metric=row.metric,
            split=row.split,
            cfg_scale=row.cfg_scale,
            reference=row.reference,
            num_components=num_components,
        )
    return MeanStatistic(_numbers(values, row.values_name))


def values_statistic(
    values: Mapping[str, Tensor],
    *,
    metric: str,
    split: str,
    cfg_scale: float | None = None,
    reference: str | None = None,
    num_components: int | None = FRECHET_COMPONENTS,
) -> Statistic:
    """The statistic of per-picture values that a metric without a space of its own stands for.

    `frechet` and `kid_x1000` read features and a reference; `retrieval_at_K` reads ranks; with `JUDGE_` before them
    they read `JUDGE_features`, `reference/JUDGE_...` and `JUDGE_ranks`. Every other metric is the mean of the values of
    its own name.

    Raises: ArraError when the values it needs are missing or of unequal number.
    """
    if distance := _DISTANCE.fullmatch(metric):
        judge = distance["judge"] or ""
        features = _values(values, values_key(f"{judge}features", split=split, cfg_scale=cfg_scale)).float()
        references = _values(values, values_key(f"reference/{judge}{reference}", split=split)).float()
        if features.shape != references.shape:
            raise ArraError(
                f"{split}: features {tuple(features.shape)} and {reference} {tuple(references.shape)} are not of the "
                "same pictures; run `arra evaluate` again"
            )
        if distance["kind"] == "frechet":
            return FrechetStatistic(features, references, num_components=num_components)
        return KernelStatistic(features, references)
    if retrieval := _RETRIEVAL.fullmatch(metric):
        ranks = _numbers(values, values_key(f"{retrieval['judge'] or ''}ranks", split=split, cfg_scale=cfg_scale))
        return MeanStatistic((ranks < int(retrieval["k"])).float())
    return MeanStatistic(_numbers(values, values_key(metric, split=split, cfg_scale=cfg_scale)).float())


def measure(
    values: Mapping[str, Tensor],
    *,
    metric: str,
    split: str,
    cfg_scale: float | None = None,
    reference: str | None = None,
    num_components: int | None = FRECHET_COMPONENTS,
    better: Better | None = None,
    unit: str | None = None,
    subject: Subject = "model",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Result:
    """A row of a card from per-picture values, with its interval; pictures of one group are resampled together.

    `better` and `unit` are known for the metrics of `METRICS` and for retrieval, and needed for others.

    Raises: ArraError as `values_statistic`, and when there are too few pictures for an interval.
    """
    better, unit = _direction(metric, better, unit)
    statistic = values_statistic(
        values, metric=metric, split=split, cfg_scale=cfg_scale, reference=reference, num_components=num_components
    )
    groups = values.get(values_key("groups", split=split))
    interval = bootstrap(statistic, num_resamples=num_resamples, seed=seed, groups=groups)
    return Result(
        metric=metric,
        split=split,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        num_images=statistic.num_images,
        better=better,
        unit=unit,
        subject=subject,
        cfg_scale=cfg_scale,
        reference=reference,
    )


def measure_row(
    measured: Measured,
    *,
    metric: str,
    split: str,
    space: str | None = None,
    num_images: int | None = None,
    cfg_scale: float | None = None,
    reference: str | None = None,
    groups: Int[Tensor, "N"] | None = None,
    is_teachers: bool = False,
    note: str | None = None,
    better: Better | None = None,
    unit: str | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Result:
    """A row of a card from a measured number, with its interval; `row_values` is what to keep beside the card.

    `num_images` is needed where the values are of the reference's pictures; `groups` are of the generated ones. A
    single picture has no interval.

    Raises: ArraError when a value is not finite, or all pictures are of one group.
    """
    better, unit = _direction(metric, better, unit)
    if measured.of == "generated":
        num_images = len(measured.per_picture)
    elif num_images is None:
        raise ValueError(f"{metric}: its values are of the reference's pictures: say `num_images`")
    low = high = None
    if len(measured.per_picture) > 1:
        statistic = MeanStatistic(torch.from_numpy(measured.per_picture))
        own_groups = groups if measured.of == "generated" else None
        interval = bootstrap(statistic, num_resamples=num_resamples, seed=seed, groups=own_groups)
        low, high = interval.low, interval.high
    return Result(
        metric=metric,
        split=split,
        value=measured.value,
        low=low,
        high=high,
        num_images=num_images,
        better=better,
        unit=unit,
        cfg_scale=cfg_scale,
        reference=reference,
        space=space,
        of=measured.of,
        is_teachers=is_teachers,
        note=note,
    )


def row_values(row: Result, measured: Measured) -> dict[str, Tensor]:
    """What an `Evaluation` keeps of a row: its per-picture values, float32, under the row's own name."""
    return {row.values_name: torch.from_numpy(measured.per_picture).float()}


def warnings_of(card: Card) -> list[str]:
    """What a reader of the card must be told before any number, a sentence each."""
    found = [str(line) for line in card.about.get(WARNINGS, ())]
    if copies := card.about.get(DUPLICATES):
        found.append(f"{copies:,} pictures are exact copies of another one: were seeds used twice?")
    balance = list((card.about.get(CLASS_BALANCE) or {}).values())
    if balance and min(balance) != max(balance):
        found.append(
            f"Classes are unequal, {min(balance):,} to {max(balance):,} pictures per class: numbers of balanced sets "
            "are others."
        )
    rows = [row for row in card.results if row.subject == "model"]
    spaces = {row.space: row.is_teachers for row in rows if row.space is not None}
    if spaces and all(spaces.values()):
        found.append(
            f"Every space of this card ({', '.join(spaces)}) is the alignment teacher's own: a gain there may be "
            "shared taste. Measure in another space too."
        )
    kernels = {(row.space, row.split, row.cfg_scale) for row in rows if row.metric == "kid_x1000"}
    biased = [row for row in rows if row.is_biased]
    if biased:
        fewest = min(row.num_images for row in biased)
        found.append(
            f"Fréchet distances of {fewest:,} pictures are biased upwards (under {ENOUGH_IMAGES:,}): compare them at "
            "equal numbers only, and read the kernel distance (kid_x1000), which is unbiased, beside them."
        )
    if alone := sorted({row.space or "" for row in biased if (row.space, row.split, row.cfg_scale) not in kernels}):
        found.append(f"No kernel distance stands beside the biased Fréchet distance in {', '.join(alone)}.")
    return found


def describe(row: Result) -> str:
    """The row in a few words for messages: `frechet composed cfg 1 against raw`."""
    parts = [row.metric, row.split] if row.space is None else [row.metric, f"({row.space})", row.split]
    if row.cfg_scale is not None:
        parts.append(f"cfg {row.cfg_scale:g}")
    if row.reference is not None:
        parts.append(f"against {row.reference}")
    return " ".join(parts)


def _values(values: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in values:
        raise ArraError(f"no per-picture values {key}; run `arra evaluate` again")
    return values[key]


def _numbers(values: Mapping[str, Tensor], key: str) -> Shaped[Tensor, "N"]:
    """Values that are one number for each picture."""
    found = _values(values, key)
    if found.ndim != 1:
        raise ArraError(
            f"{key} has shape {tuple(found.shape)}, expected one number a picture; run `arra evaluate` again"
        )
    return found


def _direction(metric: str, better: Better | None, unit: str | None) -> tuple[Better, str]:
    """Which direction is better, and the unit: as given, else as known of the metric."""
    distance = _DISTANCE.fullmatch(metric)
    whole = distance["kind"] if distance else metric.partition(".")[0]
    known = _SHARE if _RETRIEVAL.fullmatch(metric) else METRICS.get(whole)
    if known is not None:
        better, unit = better or known[0], known[1] if unit is None else unit
    if better is None or unit is None:
        raise ValueError(f"metric {metric!r} is not known: say which is `better` and its `unit`")
    return better, unit


def _read_about(about: object, *, where: str) -> dict[str, Any]:
    """What a card says of its subject, of which what is counted here is checked."""
    if not isinstance(about, dict):
        raise ArraError(f"{where}: `about` must be a mapping; run `arra evaluate` again")
    balance = about.get(CLASS_BALANCE) or {}
    counts = [*balance.values(), about.get(DUPLICATES) or 0] if isinstance(balance, dict) else [None]
    if not all(isinstance(count, int) for count in counts):
        raise ArraError(
            f"{where}: about.{CLASS_BALANCE} and about.{DUPLICATES} must count pictures; run `arra evaluate` again"
        )
    if not isinstance(about.get(WARNINGS, []), list):
        raise ArraError(f"{where}: about.{WARNINGS} must be a list of sentences; run `arra evaluate` again")
    return about


def _read_result(row: object, *, where: str) -> Result:
    fields = {each.name: each for each in dataclasses.fields(Result)}
    required = {name for name, each in fields.items() if each.default is dataclasses.MISSING}
    content = _require_keys(row, required, where=where, allowed=set(fields))
    for name, choices in (("better", get_args(Better)), ("subject", get_args(Subject)), ("of", get_args(Whose))):
        if content.get(name, choices[0]) not in choices:
            raise ArraError(f"{where}: {name}: {content[name]!r} is not one of {', '.join(choices)}")
    for name in ("value", "low", "high", "cfg_scale"):
        number = content.get(name)
        if number is None and name != "value":
            continue
        if not isinstance(number, int | float) or isinstance(number, bool) or not -LARGEST <= number <= LARGEST:
            raise ArraError(f"{where}: {name}: {number!r} is not a number; run `arra evaluate` again")
        content[name] = float(number)
    for name in ("metric", "split", "unit"):
        if not isinstance(content[name], str):
            raise ArraError(f"{where}: {name}: {content[name]!r} is not text; run `arra evaluate` again")
    for name in ("reference", "space", "note"):
        if not isinstance(content.get(name), str | None):
            raise ArraError(f"{where}: {name}: {content[name]!r} is not text; run `arra evaluate` again")
    if not isinstance(content.get("is_teachers", False), bool):
        raise ArraError(f"{where}: is_teachers: {content['is_teachers']!r} is not true or false")
    if (
        not isinstance(content["num_images"], int)
        or isinstance(content["num_images"], bool)
        or content["num_images"] < 1
    ):
        raise ArraError(f"{where}: num_images: {content['num_images']!r} is not a number of pictures")
    return Result(**content)


def _require_keys(
    content: object, required: set[str], *, where: str, allowed: set[str] | None = None
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ArraError(f"{where}: expected a mapping, got {type(content).__name__}; run `arra evaluate` again")
    if missing := sorted(required - content.keys()):
        raise ArraError(f"{where}: no {', '.join(missing)}; run `arra evaluate` again")
    if unknown := sorted(content.keys() - (allowed or required)):
        raise ArraError(f"{where}: unknown {', '.join(unknown)}; was it written by another version of arra?")
    return content
