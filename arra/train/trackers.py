"""Metrics where people look at them: TensorBoard, Weights & Biases, MLflow, trackio; beside metrics.jsonl, the truth.

Place in the pipeline: rank zero opens what `train.trackers` names, gives every row of the metrics and every preview to
it, and closes it at the end. A training that is resumed goes on in the same tracker runs, whose names are kept in
trackers.json. No network is needed: unless the environment says otherwise, all of them write to this machine's disk.

run/trackers.json      by tracker, what its run is called there
    tensorboard/       tensorboard --logdir RUN/tensorboard
    wandb/             WANDB_MODE (offline unless set), WANDB_PROJECT; an offline run is sent by: wandb sync
    mlruns/            unless MLFLOW_TRACKING_URI names a server; MLFLOW_EXPERIMENT_NAME; to look at it:
                       mlflow ui --backend-store-uri sqlite:///RUN/mlruns/mlflow.db
"""

import importlib
import io
import json
import math
import os
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from arra.errors import ArraError
from arra.runs import atomic_write

NAMES_FILE = "trackers.json"
PROJECT = "arra"
"""What runs lie in where the environment names nothing else."""
SECONDS_OF_SILENCE = 60.0
"""How long a tracker that failed is left alone, so that a dead server does not hold up the training at every row."""
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Seconds, and tries; its own defaults wait for minutes."""
MOST_PARAMS, LONGEST_PARAM = 100, 6000
"""That MLflow takes at a time, and characters of a value."""


@runtime_checkable
class Tracker(Protocol):
    """Where metrics and pictures go."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing; the numbers of a row of the metrics are there, as in train/loss, at the row's step."""

    def image(self, name: str, png_bytes: bytes, *, step: int) -> None:
        """Nothing; a picture is there."""

    def close(self) -> None:
        """Nothing; all is written."""


def open_trackers(names: Sequence[str], *, run_folder: Path, name: str, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of these names, each going on in the run that it has for this folder, or with a new one.

    `name` is what people call the training, `config` its resolved recipe. One that fails while training warns once, and
    is tried again from time to time; one that cannot go on with a resumed training is left out, with a warning.

    Raises:
        ArraError: a package is missing, or a tracker cannot begin.
    """
    for each in names:
        require_package(each)
    kept = _kept_names(run_folder)
    opened: list[Tracker] = []
    for each in names:
        kind = TRACKERS[each]
        errors = kind.errors()
        try:
            tracker = kind(run_folder, name=name, config=config, known=kept.get(each))
        except errors as error:
            if each not in kept:
                raise ArraError(f"train.trackers: {each} cannot begin ({_one_line(error)}); {kind.advice}") from error
            _warn(each, error)
            continue
        kept[each] = tracker.id
        opened.append(_Guarded(each, tracker, errors))
    if names:
        atomic_write(run_folder / NAMES_FILE, json.dumps(kept, indent=2) + "\n")
    return opened


def require_package(name: str) -> None:
    """Nothing.

    Raises:
        ArraError: the tracker's package is not installed.
    """
    try:
        for package in TRACKERS[name].packages:
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ArraError(
            f"train.trackers: {name}: the package '{error.name}' is missing; pip install 'arra[track]' -c "
            "constraints.txt"
        ) from error


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row by a path of its kind, as in train/loss, watch/teacher/layer_3/cka."""
    where = [str(row["kind"])]
    where += [str(row[key]) for key in ("term", "encoder") if key in row][:1]
    where += [f"layer_{row['layer']}"] if "layer" in row else []
    return {
        "/".join([*where, key]): float(value)
        for key, value in row.items()
        if key not in ("kind", "step", "layer") and _is_number(value) and math.isfinite(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Guarded:
    """A tracker whose failures cost its rows and not the training."""

    def __init__(self, name: str, tracker: Tracker, errors: tuple[type[Exception], ...]) -> None:
        self.name, self.tracker, self.errors = name, tracker, errors
        self.silent_until, self.has_warned = -math.inf, False

    def log(self, row: Mapping[str, Any]) -> None:
        self._try(lambda: self.tracker.log(row))

    def image(self, name: str, png_bytes: bytes, *, step: int) -> None:
        self._try(lambda: self.tracker.image(name, png_bytes, step=step))

    def close(self) -> None:
        self._try(self.tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if time.monotonic() < self.silent_until:
            return
        try:
            action()
        except self.errors as error:
            self.silent_until = time.monotonic() + SECONDS_OF_SILENCE
            if not self.has_warned:
                _warn(self.name, error)
            self.has_warned = True


class _TensorBoard:
    packages, advice = ("tensorboard",), "free space or choose another folder with --out"

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        return (OSError,)

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any], known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.id = folder / "tensorboard", "tensorboard"
        self.folder.mkdir(exist_ok=True)
        self.config, self.resumed, self.opens = config, known is not None, SummaryWriter
        self.writer: Any = None

    def _at(self, step: int) -> Any:
        """The writer; events at and after its first step, which a killed process left behind, do not count any more."""
        if self.writer is None:
            self.writer = self.opens(str(self.folder), purge_step=step if self.resumed else None)
            if not self.resumed:
                text = json.dumps(self.config, indent=2, default=str)
                self.writer.add_text("recipe", "\n".join(f"    {line}" for line in text.splitlines()))
        return self.writer

    def log(self, row: Mapping[str, Any]) -> None:
        for key, value in numbers(row).items():
            self._at(row["step"]).add_scalar(key, value, row["step"])

    def image(self, name: str, png_bytes: bytes, *, step: int) -> None:
        pixels = np.asarray(_picture(png_bytes))
        self._at(step).add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _WandB:
    packages, advice = ("wandb",), "set WANDB_MODE=offline to write to this disk alone"

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        import wandb

        return (wandb.errors.Error, OSError)

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any], known: str | None) -> None:
        import wandb

        self.id, self.library = known or _new_id(), wandb
        mode = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder),
            id=self.id,
            name=name,
            config=dict(config),
            mode=mode,
            # offline the runs of one id become one when they are sent
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off"),
        )
        # a step of its own: theirs only rises, and drops what a resumed training makes again
        self.run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Any]) -> None:
        self.run.log({**numbers(row), "step": row["step"]})

    def image(self, name: str, png_bytes: bytes, *, step: int) -> None:
        self.run.log({name: self.library.Image(_picture(png_bytes)), "step": step})

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    packages = ("mlflow", "sqlalchemy", "alembic")
    advice = "check MLFLOW_TRACKING_URI, or unset it to write into the run's folder"

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return (MlflowException, OSError)

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any], known: str | None) -> None:
        for key, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric: Any = Metric
        self.own: Path | None = None
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:  # a database: plain files are refused since MLflow 3.7
            self.own = (folder / "mlruns").resolve()
            self.own.mkdir(exist_ok=True)
            uri = f"sqlite:///{self.own / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=uri)
        found = self._find(known)
        self.id: str = found or self._create(name)
        if found is not None:
            self.client.update_run(self.id, status="RUNNING")
            return
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in _flat(config)]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + MOST_PARAMS])

    def _find(self, known: str | None) -> str | None:
        """The run, unless it was made elsewhere or deleted."""
        if known is None:
            return None
        found = self.client.search_runs(self._experiments(), f"attributes.run_id = '{known}'", max_results=1)
        return known if found else None

    def _experiments(self) -> list[str]:
        return [each.experiment_id for each in self.client.search_experiments()]

    def _create(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            pictures = None if self.own is None else (self.own / "artifacts").as_uri()
            place = self.client.create_experiment(experiment, artifact_location=pictures)
        else:
            place = found.experiment_id
        return str(self.client.create_run(place, run_name=name).info.run_id)

    def log(self, row: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(
            self.id, metrics=[self.metric(key, value, now, row["step"]) for key, value in numbers(row).items()]
        )

    def image(self, name: str, png_bytes: bytes, *, step: int) -> None:
        self.client.log_image(self.id, _picture(png_bytes), key=name, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class _Trackio:
    packages, advice = ("trackio",), "unset TRACKIO_SPACE_ID to write to this disk alone"

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        return (OSError, ValueError, sqlite3.Error)

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any], known: str | None) -> None:
        import trackio

        self.library = trackio
        self.id = known or f"{name}-{_new_id()}"  # names are its identities: another folder's may be called the same
        told = json.loads(json.dumps(config, default=str))
        self.run = trackio.init(project=PROJECT, name=self.id, config=told, resume="allow", embed=False)

    def log(self, row: Mapping[str, Any]) -> None:
        self.run.log(dict(numbers(row)), step=row["step"])

    def image(self, name: str, png_bytes: bytes, *, step: int) -> None:
        self.run.log({name: self.library.Image(_picture(png_bytes))}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}


def _kept_names(folder: Path) -> dict[str, str]:
    """What trackers call the run; empty where the file is missing or damaged, as a new run is no loss."""
    try:
        kept = json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _picture(png_bytes: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png_bytes)).convert("RGB")


def _warn(name: str, error: Exception) -> None:
    warnings.warn(
        f"tracker {name}: {_one_line(error)}; training goes on, metrics.jsonl has all rows",
        RuntimeWarning,
        stacklevel=3,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
