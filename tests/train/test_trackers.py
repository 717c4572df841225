"""Trackers get the numbers of every row, go on where they were, and never stop a training.

TensorBoard is the real one; stand-ins for the others have the signatures of wandb 0.31, mlflow 3.17 and trackio 0.43.
"""

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arra.errors import ArraError
from arra.report.grids import png_bytes, strip
from arra.train import trackers
from arra.train.trackers import Tracker, numbers, open_trackers

CONFIG = {"name": "toy", "train": {"steps": 10, "betas": (0.9, 0.95), "ema_decay": None}}


@pytest.fixture
def picture() -> bytes:
    return png_bytes(strip(np.random.default_rng(0).integers(0, 255, (2, 4, 6, 3), dtype=np.uint8), scale=1))


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1 / step, "gva_loss": None, "z_loss": float("nan"), **changes}


def opened(folder: Path, *names: str) -> list[Tracker]:
    return open_trackers(names, run_folder=folder, name="toy", config=CONFIG)


def test_numbers_have_paths_of_their_own() -> None:
    assert numbers(row(3, frozen=True, note="x")) == {"train/loss": 1 / 3}
    watched = {"kind": "watch", "step": 3, "encoder": "teacher", "layer": 2, "cka": 0.5, "positions": {"cka": [0.1]}}
    assert numbers(watched) == {"watch/teacher/layer_2/cka": 0.5}
    assert numbers(watched | {"term": "main", "loss": "cosine"}) == {"watch/main/layer_2/cka": 0.5}


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    assert opened(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_rows_and_pictures_and_forgets_what_a_resumed_training_makes_again(
    tmp_path: Path, picture: bytes
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, height in ((1, 5, 1.0), (4, 6, 10.0)):
        (tracker,) = opened(tmp_path, "tensorboard")
        for step in range(first, last + 1):
            tracker.log(row(step, loss=height + step))
        tracker.image("previews", picture, step=last)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(1, 2.0), (2, 3.0), (3, 4.0), (4, 14.0), (5, 15.0), (6, 16.0)]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.height, event.width) for event in events.Images("previews")] == [(6, 4, 13)]
    assert '"steps": 10' in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


@dataclass
class Calls:
    """What the stand-ins were asked for."""

    made: list[dict[str, Any]] = field(default_factory=list)
    logged: list[tuple[Any, ...]] = field(default_factory=list)
    closed: int = 0
    error: Exception | None = None

    def happens(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, module = Calls(), ModuleType("wandb")

    class Run:
        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            calls.happens()
            calls.logged.append((data, step))

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.made[-1]["axis"] = (name, step_metric)

        def finish(self, exit_code: int | None = None) -> None:
            calls.closed += 1

    def init(
        entity: Any = None, project: Any = None, dir: Any = None, id: Any = None, name: Any = None, notes: Any = None,
        tags: Any = None, config: Any = None, mode: Any = None, resume: Any = None, settings: Any = None,
    ) -> Run:  # fmt: skip
        calls.happens()
        calls.made.append({"project": project, "dir": dir, "id": id, "name": name, "config": config, "mode": mode})
        calls.made[-1]["resume"] = resume
        return Run()

    told: dict[str, Any] = {"init": init, "Settings": lambda console: console, "Image": lambda image: image.size}
    told["errors"] = SimpleNamespace(Error=type("Error", (Exception,), {}))
    for name, value in told.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, module = Calls(), ModuleType("trackio")

    class Run:
        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            calls.logged.append((metrics, step))

        def finish(self) -> None:
            calls.closed += 1

    def init(
        project: str, name: str | None = None, space_id: str | None = None, config: dict[str, Any] | None = None,
        resume: str = "never", embed: bool = True,
    ) -> Run:  # fmt: skip
        calls.made.append({"project": project, "name": name, "config": config, "resume": resume})
        return Run()

    module.init, module.Image = init, lambda value, caption=None: value.size  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return calls


@dataclass(frozen=True)
class Named:
    """A metric or a parameter."""

    key: str
    value: Any
    timestamp: int = 0
    step: int = 0


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    modules = {name: ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.exceptions")}
    runs: list[str] = []

    class Client:
        def __init__(self, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
            calls.happens()
            calls.made.append({"uri": tracking_uri})

        def search_experiments(self) -> list[Any]:
            return [SimpleNamespace(experiment_id="7")]

        def search_runs(self, experiment_ids: list[str], filter_string: str = "", max_results: int = 1000) -> list[str]:
            return [run for run in runs if filter_string == f"attributes.run_id = '{run}'"]

        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
            calls.made[-1]["experiment"] = (name, artifact_location)
            return "7"

        def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
            runs.append(f"run{len(runs)}")
            return SimpleNamespace(info=SimpleNamespace(run_id=runs[-1]))

        def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
            calls.made[-1]["again"] = (run_id, status)

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
            calls.happens()
            calls.logged += [(run_id, each.key, each.value, each.step) for each in [*metrics, *params]]

        def log_image(self, run_id: str, image: Any, key: str | None = None, step: int | None = None) -> None:
            calls.logged.append((run_id, key, image.size, step))

        def set_terminated(self, run_id: str, status: str | None = None) -> None:
            calls.closed += 1

    modules["mlflow"].MlflowClient = Client  # type: ignore[attr-defined]
    modules["mlflow.entities"].Metric = modules["mlflow.entities"].Param = Named  # type: ignore[attr-defined]
    modules["mlflow.exceptions"].MlflowException = type("MlflowException", (Exception,), {})  # type: ignore[attr-defined]
    for name in ("sqlalchemy", "alembic"):
        modules[name] = ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", *trackers.MLFLOW_PATIENCE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_wandb_writes_to_the_disk_and_goes_on_under_its_id(tmp_path: Path, wandb: Calls, picture: bytes) -> None:
    for step in (1, 2):
        (tracker,) = opened(tmp_path, "wandb")
        tracker.log(row(step))
        tracker.image("previews", picture, step=step)
        tracker.close()
    first, second = wandb.made
    assert first == second
    assert len(first.pop("id")) == 8
    assert first == {
        "project": "arra", "dir": str(tmp_path), "name": "toy", "config": CONFIG, "mode": "offline", "resume": None,
        "axis": ("*", "step"),
    }  # fmt: skip
    # no step of theirs: after a resumed training made steps again, rows of theirs would be dropped
    assert wandb.logged[:2] == [({"train/loss": 1.0, "step": 1}, None), ({"previews": (13, 4), "step": 1}, None)]
    assert wandb.closed == 2


def test_wandb_obeys_the_environment(tmp_path: Path, wandb: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "emoji")
    opened(tmp_path, "wandb")
    assert [wandb.made[0][key] for key in ("mode", "project", "resume")] == ["online", "emoji", "allow"]


def test_trackio_runs_of_two_folders_are_two(tmp_path: Path, trackio: Calls, picture: bytes) -> None:
    for folder in ("a", "b", "a"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tracker,) = opened(tmp_path / folder, "trackio")
        tracker.log(row(2))
        tracker.image("previews", picture, step=2)
        tracker.close()
    names = [made["name"] for made in trackio.made]
    assert names[0] == names[2] != names[1]
    assert all(made["name"].startswith("toy-") and made["resume"] == "allow" for made in trackio.made)
    assert trackio.made[0]["config"]["train"] == {"steps": 10, "betas": [0.9, 0.95], "ema_decay": None}
    assert trackio.logged[:2] == [({"train/loss": 0.5}, 2), ({"previews": (13, 4)}, 2)]
    assert trackio.closed == 3


def test_mlflow_writes_into_the_run_unless_told_a_server(
    tmp_path: Path, mlflow: Calls, monkeypatch: pytest.MonkeyPatch, picture: bytes
) -> None:
    for _ in range(2):
        (tracker,) = opened(tmp_path, "mlflow")
        tracker.log(row(2))
    tracker.image("previews", picture, step=2)
    tracker.close()
    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    place = (tmp_path / "mlruns" / "artifacts").as_uri()
    assert mlflow.made == [{"uri": uri, "experiment": ("arra", place)}, {"uri": uri, "again": ("run0", "RUNNING")}]
    params = {key: value for _, key, value, step in mlflow.logged if step == 0}
    assert params == {"name": "toy", "train.steps": "10", "train.betas": "(0.9, 0.95)", "train.ema_decay": "None"}
    assert [each for each in mlflow.logged if each[3]] == [
        *[("run0", "train/loss", 0.5, 2)] * 2,
        ("run0", "previews", (13, 4), 2),
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    (tmp_path / "other").mkdir()
    opened(tmp_path / "other", "mlflow")
    assert mlflow.made[-1] == {"uri": "http://server:5000", "experiment": ("arra", None)}
    assert not (tmp_path / "other" / "mlruns").exists()


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "sqlalchemy"), ("trackio", "trackio")],
)
def test_a_missing_package_is_told_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: Calls, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ArraError, match=rf"^train.trackers: {name}: the package '{package}' is missing; pip install"):
        opened(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_warns_once_and_is_tried_again_later(
    tmp_path: Path, wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    (tracker,) = opened(tmp_path, "wandb")
    wandb.error = OSError("no route\nto host")
    with pytest.warns(RuntimeWarning, match=r"^tracker wandb: no route to host; training goes on, metrics.jsonl has"):
        tracker.log(row(1))
    wandb.error = None
    tracker.log(row(2))
    assert wandb.logged == []  # it is left alone for a while
    now[0] += trackers.SECONDS_OF_SILENCE
    tracker.log(row(3))
    assert [data["step"] for data, _ in wandb.logged] == [3]
    wandb.error = sys.modules["wandb"].errors.Error("again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log(row(4))


def test_what_is_no_failure_of_a_tracker_is_not_hidden(tmp_path: Path, wandb: Calls) -> None:
    (tracker,) = opened(tmp_path, "wandb")
    wandb.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        tracker.log(row(1))


def test_a_tracker_must_begin_but_need_not_go_on(tmp_path: Path, wandb: Calls) -> None:
    wandb.error = sys.modules["wandb"].errors.Error("no API key")
    with pytest.raises(ArraError, match=r"wandb cannot begin \(no API key\); set WANDB_MODE=offline"):
        opened(tmp_path, "wandb")
    wandb.error = None
    opened(tmp_path, "wandb")
    wandb.error = OSError("down")
    with pytest.warns(RuntimeWarning, match="tracker wandb: down"):
        assert opened(tmp_path, "wandb") == []
    wandb.error = None
    opened(tmp_path, "wandb")
    assert wandb.made[0]["id"] == wandb.made[-1]["id"]  # its name was not forgotten


def test_a_damaged_list_of_names_costs_the_names_alone(tmp_path: Path, wandb: Calls) -> None:
    (tmp_path / "trackers.json").write_text("[")
    opened(tmp_path, "wandb")
    assert wandb.made[0]["id"] in (tmp_path / "trackers.json").read_text()
