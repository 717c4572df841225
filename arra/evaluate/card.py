"""The evaluation card of a run: what was measured, how, and the per-picture values behind every number.

Place in the pipeline: `arra evaluate` writes `metrics.json` (the card) and `evaluation.safetensors` (the values) into a
run folder; `evaluate/compare.py` and `report/` read them and never look at a model again.

Values are named by `values_key`: `composed/nll` (N,), `composed/caption_gain` (N,), `composed/groups` (N,) int
(optional: pictures resampled together), `composed/cfg1/features` (N, F), `composed/cfg1/ranks` (N,) int, and the
references `composed/reference/reconstructions`, `composed/reference/raw` (N, F). A second judge's stand beside them:
`composed/cfg1/caption_features`, `composed/reference/caption_raw`. Letters: N pictures, F features.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

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

CARD_FILE = "metrics.json"
VALUES_FILE = "evaluation.safetensors"

Better = Literal["lower", "higher"]
Subject = Literal["model", "tokenizer"]
ProtocolValue = str | int | float | bool | None

METRICS: Mapping[str, tuple[Better, str]] = {
    "nll": ("lower", "nats/token"),
    "caption_gain": ("higher", "nats/token"),
    "class_gain": ("higher", "nats/token"),
    "frechet": ("lower", "feature units"),
    "kid_x1000": ("lower", "x1000"),
    "psnr_db": ("higher", "dB"),
}
"""Which direction is better, and the unit; retrieval (`..._at_K`) is a share where higher is better, and a second
judge's distances (`JUDGE_frechet`) are as the first one's."""

_SHARE: tuple[Better, str] = ("higher", "fraction")
_RETRIEVAL = re.compile(r"(?P<judge>.+_)?retrieval_at_(?P<k>\d+)")
_DISTANCE = re.compile(r"(?P<judge>.+_)?(?P<kind>frechet|kid_x1000)")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of a card with its interval."""

    metric: str
    """`nll`, `caption_gain`, `frechet`, `kid_x1000`, `retrieval_at_10`, `caption_frechet`, `psnr_db`, ..."""
    split: str
    value: float
    num_images: int
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

    @property
    def key(self) -> tuple[str, str, float | None, str | None, str]:
        """What makes rows of two cards the same measurement."""
        return (self.metric, self.split, self.cfg_scale, self.reference, self.subject)


@dataclass(frozen=True, kw_only=True)
class Card:
    """All results of a run under one protocol (flat settings and hashes; keys `run` and `model*` name the model)."""

    run: str
    protocol: Mapping[str, ProtocolValue]
    results: tuple[Result, ...]

    def to_json(self) -> str:
        """The card as indented JSON, keys in the order of the fields."""
        content = {
            "run": self.run,
            "protocol": dict(self.protocol),
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
        except json.JSONDecodeError as error:
            raise ArraError(f"{where}: not JSON ({error}); run `arra evaluate` again") from error
        _require_keys(content, {"run", "protocol", "results"}, where=where)
        if not isinstance(content["run"], str) or not isinstance(content["protocol"], dict):
            raise ArraError(f"{where}: `run` must be text and `protocol` a mapping; run `arra evaluate` again")
        if not isinstance(content["results"], list):
            raise ArraError(f"{where}: `results` must be a list; run `arra evaluate` again")
        results = tuple(_read_result(row, where=f"{where}: results[{i}]") for i, row in enumerate(content["results"]))
        return cls(run=content["run"], protocol=content["protocol"], results=results)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A card together with its per-picture values."""

    card: Card
    values: Mapping[str, Tensor] = field(repr=False)

    @property
    def num_components(self) -> int | None:
        """Principal axes of the Frechet distances: the protocol's `frechet_components`."""
        components = self.card.protocol.get("frechet_components", FRECHET_COMPONENTS)
        return None if components is None else int(components)

    def save(self, folder: Path) -> None:
        """Writes both files into `folder`, values first: a card never stands beside older values.

        Raises: ArraError when the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD_FILE).unlink(missing_ok=True)
            staged = folder / (VALUES_FILE + ".part")
            save_file({key: value.contiguous().cpu() for key, value in self.values.items()}, str(staged))
            os.replace(staged, folder / VALUES_FILE)
            staged = folder / (CARD_FILE + ".part")
            staged.write_text(self.card.to_json(), encoding="utf-8")
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


def values_statistic(
    values: Mapping[str, Tensor],
    *,
    metric: str,
    split: str,
    cfg_scale: float | None = None,
    reference: str | None = None,
    num_components: int | None = FRECHET_COMPONENTS,
) -> Statistic:
    """The statistic of per-picture values that a metric stands for.

    `frechet` and `kid_x1000` read features and a reference; `retrieval_at_K` reads ranks; with `JUDGE_` before them
    they read `JUDGE_features`, `reference/JUDGE_...` and `JUDGE_ranks`. Every other metric is the mean of the values of
    its own name.

    Raises: ArraError when the values it needs are missing or of unequal number.
    """

    def get(key: str) -> Tensor:
        if key not in values:
            raise ArraError(f"no per-picture values {key}; run `arra evaluate` again")
        return values[key]

    if distance := _DISTANCE.fullmatch(metric):
        judge = distance["judge"] or ""
        features = get(values_key(f"{judge}features", split=split, cfg_scale=cfg_scale)).float()
        references = get(values_key(f"reference/{judge}{reference}", split=split)).float()
        if features.shape != references.shape:
            raise ArraError(
                f"{split}: features {tuple(features.shape)} and {reference} {tuple(references.shape)} are not of the "
                "same pictures; run `arra evaluate` again"
            )
        if distance["kind"] == "frechet":
            return FrechetStatistic(features, references, num_components=num_components)
        return KernelStatistic(features, references)
    if retrieval := _RETRIEVAL.fullmatch(metric):
        ranks = get(values_key(f"{retrieval['judge'] or ''}ranks", split=split, cfg_scale=cfg_scale))
        return MeanStatistic((ranks < int(retrieval["k"])).float())
    return MeanStatistic(get(values_key(metric, split=split, cfg_scale=cfg_scale)).float())


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
    distance = _DISTANCE.fullmatch(metric)
    known = _SHARE if _RETRIEVAL.fullmatch(metric) else METRICS.get(distance["kind"] if distance else metric)
    if known is not None:
        better, unit = better or known[0], known[1] if unit is None else unit
    if better is None or unit is None:
        raise ValueError(f"metric {metric!r} is not known: say which is `better` and its `unit`")
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


def describe(row: Result) -> str:
    """The row in a few words for messages: `frechet composed cfg 1 against raw`."""
    parts = [row.metric, row.split]
    if row.cfg_scale is not None:
        parts.append(f"cfg {row.cfg_scale:g}")
    if row.reference is not None:
        parts.append(f"against {row.reference}")
    return " ".join(parts)


def _read_result(row: object, *, where: str) -> Result:
    fields = {each.name: each for each in dataclasses.fields(Result)}
    required = {name for name, each in fields.items() if each.default is dataclasses.MISSING}
    content = _require_keys(row, required, where=where, allowed=set(fields))
    for name, choices in (("better", get_args(Better)), ("subject", get_args(Subject))):
        if content.get(name, choices[0]) not in choices:
            raise ArraError(f"{where}: {name}: {content[name]!r} is not one of {', '.join(choices)}")
    for name in ("value", "low", "high", "cfg_scale"):
        number = content.get(name)
        if number is None and name != "value":
            continue
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise ArraError(f"{where}: {name}: {number!r} is not a number; run `arra evaluate` again")
        content[name] = float(number)
    for name in ("metric", "split", "unit"):
        if not isinstance(content[name], str):
            raise ArraError(f"{where}: {name}: {content[name]!r} is not text; run `arra evaluate` again")
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
