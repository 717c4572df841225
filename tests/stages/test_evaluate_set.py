"""`arra evaluate` of sets: numbers of whole pipelines, what a card says, refusals."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arra.errors import ArraError
from arra.evaluate.card import Evaluation, Result
from arra.evaluate.moments import MomentSums, frechet
from arra.runs import UNFINISHED
from arra.sample.chosen import write_chosen
from arra.sample.logits import SamplingSettings
from arra.stages import set_opening
from arra.stages.evaluate_set import evaluate_set
from arra.stages.evaluations import evaluate_any
from arra.stages.painters import load_run
from arra.stages.set_options import SetOptions, make_plan, parse_set_options
from tests.conftest import Pipeline
from tests.evaluate.toy_inception import random_inception
from tests.evaluate.toy_pictures import ToySpace, drawn

DINO = "dinov2-l14"


@pytest.fixture
def toy_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Networks of a few numbers in place of those that are asked for; a cache of the test's own."""
    monkeypatch.setenv("ARRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(set_opening, "open_space", lambda name, **_: ToySpace(name=name))


def saved(folder: Path, images: list[np.ndarray], *, prefix: str = "") -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{prefix}{number:03d}.png")
    return folder


def rows_of(evaluation: Evaluation) -> dict[str, Result]:
    return {f"{row.space} {row.metric}": row for row in evaluation.card.results}


def evaluated(subject: Path, **options: Any) -> Evaluation:
    return evaluate_set(subject, SetOptions(**{"num_resamples": 20, **options})).evaluation


def test_a_folder_and_an_npz_of_the_same_pictures_measure_the_same(tmp_path: Path, toy_spaces: None) -> None:
    images, real = drawn(40), drawn(50, seed=1)
    reference = str(saved(tmp_path / "real", real))
    by_folder = evaluated(saved(tmp_path / "set", images), reference=reference, spaces=(DINO,))
    np.savez(tmp_path / "set.npz", arr_0=np.stack(images))
    np.savez(tmp_path / "real.npz", arr_0=np.stack(real))
    by_file = evaluated(tmp_path / "set.npz", reference=str(tmp_path / "real.npz"), spaces=(DINO,))
    one, other = rows_of(by_folder), rows_of(by_file)
    assert one.keys() == other.keys() >= {f"{DINO} {name}" for name in ("fd", "kid_x1000", "precision", "coverage")}
    for name, row in one.items():
        assert row.value == pytest.approx(other[name].value, rel=1e-12)
        assert row.num_images == 40
        assert row.low is not None
        assert row.high is not None
    assert (tmp_path / "set.evaluation" / "card.html").is_file()
    assert not [*(tmp_path / "set").glob(".*"), *(tmp_path / "set.evaluation").glob(".*")]


def test_the_distance_is_that_of_all_features_at_once(tmp_path: Path, toy_spaces: None) -> None:
    images, real = drawn(40), drawn(50, seed=1)
    found = evaluated(
        saved(tmp_path / "set", images), reference=str(saved(tmp_path / "real", real)), spaces=(DINO,), batch_size=7
    )
    moments = []
    for pictures in (images, real):
        sums = MomentSums(12)
        sums.add(ToySpace().encode(torch.from_numpy(np.stack(pictures)))["features"])
        moments.append(sums.finish())
    assert rows_of(found)[f"{DINO} fd"].value == pytest.approx(frechet(*moments), rel=1e-9)


def test_a_set_against_itself_is_zero_and_told_so(tmp_path: Path, toy_spaces: None) -> None:
    folder = saved(tmp_path / "set", [*drawn(40), drawn(40)[3]])
    found = evaluated(folder, reference=str(folder), spaces=(DINO,), out=tmp_path / "out")
    rows = rows_of(found)
    assert rows[f"{DINO} fd"].value == pytest.approx(0, abs=1e-9)
    assert rows[f"{DINO} precision"].value == rows[f"{DINO} recall"].value == 1
    page = (tmp_path / "out" / "card.html").read_text()
    assert "41 pictures are the reference" in page
    assert found.card.about["duplicates"] == 1
    assert not (folder / "metrics.json").exists()
    assert Evaluation.load(tmp_path / "out").card == found.card


def test_pairs_training_pictures_and_teachers(tmp_path: Path, toy_spaces: None) -> None:
    real, seen = ([np.kron(image, np.ones((22, 22, 1), np.uint8)) for image in drawn(n, seed=n)] for n in (100, 9))
    held_out, train = saved(tmp_path / "real", real, prefix="p"), saved(tmp_path / "train", seen)
    painted = [(0.9 * image + 10).astype(np.uint8) for image in real[:5]]
    shutil.copy(train / "007.png", saved(tmp_path / "set", painted, prefix="p") / "p004.png")
    options = SetOptions(
        reference=str(held_out), protocol="deepeyenet", without=("inception", "biomedclip"), training=str(train)
    )
    done = evaluate_set(tmp_path / "set", options)
    rows = rows_of(done.evaluation)
    assert rows["pixels ms_ssim"].value > rows["pixels ms_ssim_within"].value
    assert rows[f"{DINO} copied"].value == pytest.approx(0.2)
    about = done.evaluation.card.about
    assert about["identical_to_training_pictures"] == 1
    assert about["not_measured"]["fid in inception"] == "left out by --without"
    assert "told for 1,089 pictures, these are 5" in " ".join(about["warnings"])
    page = done.page.read_text()
    assert "p004.png and 007.png" in page
    assert not any(row.is_teachers for row in rows.values())
    for teacher, is_own in (("toy", True), ("dinov2-l14", False)):  # the toy space is of the family "toy"
        again = evaluated(tmp_path / "set", reference=str(held_out), spaces=(DINO,), teachers=(teacher,))
        assert rows_of(again)[f"{DINO} fd"].is_teachers is is_own


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_adm_files_give_what_torch_fidelity_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FID, IS, KID, precision and recall of one network on the same pictures, from .npz in ADM's form."""
    fidelity = pytest.importorskip("torch_fidelity", reason="pip install 'arra[metrics]'")
    monkeypatch.setenv("ARRA_CACHE", str(tmp_path / "cache"))
    weights = random_inception(tmp_path / "weights.pth")
    sets = {name: drawn(4, seed=seed, sides=((12, 12),)) for name, seed in (("set", 0), ("real", 1))}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=np.stack(images))
        saved(tmp_path / name, images)
    found = evaluated(
        tmp_path / "set.npz",
        reference=str(tmp_path / "real.npz"),
        protocol="imagenet-256",
        weights={"inception": str(weights)},
        image_size=12,
    )
    monkeypatch.setattr(torch, "load", _trusting(torch.load))
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "set"), input2=str(tmp_path / "real"), fid=True, isc=True, kid=True, prc=True,
        isc_splits=1, kid_subsets=1, kid_subset_size=4, prc_neighborhood=3, cuda=False, verbose=False, cache=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), samples_shuffle=False,
    )  # fmt: skip
    ours = {name.split()[1]: row.value for name, row in rows_of(found).items()}
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["kid_x1000"] == pytest.approx(1000 * theirs["kernel_inception_distance_mean"], abs=1e-3)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    warnings = " ".join(found.card.about["warnings"])
    assert "not the published ones" in warnings
    assert "this reference has none" in warnings


def _trusting(load: Callable[..., Any]) -> Callable[..., Any]:
    """torch-fidelity reads its weights as pickles of the old kind, which a warning of torch's is about."""
    return lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": True})


def test_published_statistics_stand_for_the_pictures_they_are_of(tmp_path: Path, toy_spaces: None) -> None:
    real = np.stack(drawn(30, seed=1))
    images = saved(tmp_path / "set", drawn(20))
    told = ToySpace().encode(torch.from_numpy(real))["features"].double().numpy()
    arrays = {"mu": told.mean(0), "sigma": np.cov(told, rowvar=False)}
    np.savez(tmp_path / "alone.npz", **arrays)
    np.savez(tmp_path / "both.npz", arr_0=real[:8], **arrays)
    np.savez(tmp_path / "real.npz", arr_0=real)
    alone, both, pictures = (
        evaluated(images, reference=str(tmp_path / f"{name}.npz"), spaces=("inception",), without=("sfid",))
        for name in ("alone", "both", "real")
    )
    expected = rows_of(pictures)["inception fid"].value
    for found in (alone, both):
        assert rows_of(found)["inception fid"].value == pytest.approx(expected, rel=1e-6)
    assert "inception recall" not in rows_of(alone)
    assert "has statistics and no pictures" in alone.card.about["not_measured"]["recall in inception"]
    assert rows_of(both)["inception recall"].value != rows_of(pictures)["inception recall"].value
    hashes = [each.card.protocol.get("reference_statistics_sha256") for each in (alone, both, pictures)]
    assert hashes[0] == hashes[1] is not None
    assert hashes[2] is None


def test_a_run_paints_what_a_protocol_measures(pipeline: Pipeline, tmp_path: Path, toy_spaces: None) -> None:
    run = tmp_path / "run"
    shutil.copytree(pipeline.aligned, run)
    shutil.copytree(pipeline.store, tmp_path / "store")
    options = SetOptions(spaces=(DINO,), split="train", num_images=8, num_resamples=20)
    shown = evaluate_any(run, options)
    assert "card.html" in str(shown[-1])
    (folder,) = (run / "samples").glob("evaluation-*")
    card = json.loads((folder / "metrics.json").read_text())
    assert card["protocol"]["num_images"] == card["protocol"]["reference_images"] == 8
    assert card["about"]["teachers"] == "efficientnet-lite0"
    assert card["about"]["cfg_scale"] is not None
    assert {row["split"] for row in card["results"]} == {"train"}
    write_chosen(run, SamplingSettings(temperature=0.5), steps=load_run(run).recipe.train.steps, about={})
    painted = (folder / "000000.png").read_bytes()
    evaluate_any(run, options)  # by settings chosen since: beside what was painted before
    assert len(list((run / "samples").glob("evaluation-*"))) == 2
    assert (folder / "000000.png").read_bytes() == painted
    evaluate_any(run, replace(options, seed=1))
    assert len(list((run / "samples").glob("evaluation-*"))) == 3


def test_numbers_that_happen_to_be_equal_make_no_pairs(tmp_path: Path, toy_spaces: None) -> None:
    images = [np.kron(image, np.ones((22, 22, 1), np.uint8)) for image in drawn(4)]
    folders = [saved(tmp_path / name, images) for name in ("set", "real")]
    options: dict[str, Any] = {
        "protocol": "deepeyenet",
        "without": ("inception", "biomedclip"),
        "out": tmp_path / "out",
    }
    found = evaluated(folders[0], reference=str(folders[1]), **options)
    assert found.card.about["not_measured"]["ms_ssim"] == "no pairs: the reference names other pictures"


def test_leaked_pictures_take_the_copying_check_away_and_nothing_else(tmp_path: Path, toy_spaces: None) -> None:
    real, folder = saved(tmp_path / "real", drawn(100)), saved(tmp_path / "set", drawn(6, seed=1))
    found = evaluated(folder, reference=str(real), training=str(real), spaces=(DINO,))
    assert f"{DINO} fd" in rows_of(found)
    assert "are in the training set themselves" in found.card.about["not_measured"][f"copied in {DINO}"]


def test_what_a_killed_evaluation_left_goes_with_the_next(
    tmp_path: Path, toy_spaces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = saved(tmp_path / "set", drawn(6)), saved(tmp_path / "real", drawn(7))
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = folder / f".seen.abc.{platform.node()}-{dead.pid}.tmp"
    left.mkdir()
    (left / "features").write_bytes(b"x")
    names = list[str]()

    class Looking(ToySpace):
        def encode(self, images: Any) -> Any:
            names.extend(path.name for path in folder.glob(".seen*"))
            return super().encode(images)

    monkeypatch.setattr(set_opening, "open_space", lambda name, **_: Looking(name=name))
    evaluated(folder, reference=str(real), spaces=(DINO,))
    assert [name for name in names if not UNFINISHED.match(name)] == []
    assert len(set(names)) == 1
    assert not [*folder.glob(".*")]


def test_what_measures_nothing_leaves_the_card_that_is_there(tmp_path: Path, toy_spaces: None) -> None:
    folder = saved(tmp_path / "set", drawn(6))
    evaluated(folder, reference=str(saved(tmp_path / "real", drawn(7))), spaces=(DINO,))
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(
        ArraError, match=r"nothing to measure \(fd, .* in dinov2-l14; fid, kid_x1000 in inception;.*: no r"
    ):
        evaluated(folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_a_split_of_a_store_is_measured_beside_the_store(pipeline: Pipeline, tmp_path: Path, toy_spaces: None) -> None:
    done = evaluate_set(
        pipeline.store,
        SetOptions(
            reference=str(saved(tmp_path / "real", drawn(7))), spaces=(DINO,), split="train", out=None, num_resamples=20
        ),
    )
    assert done.folder == pipeline.store.with_name(f"{pipeline.store.name}.evaluation")
    shutil.rmtree(done.folder)


REFUSALS = [
    ({"protocol": "mimic"}, "protocol 'mimic': unknown; did you mean 'mimic-cxr'?"),
    ({"spaces": ("dino",)}, "space 'dino': unknown"),
    ({"spaces": (DINO,), "without": ("cmmd",)}, "--without cmmd: not a space or metric of spaces"),
    ({"spaces": (DINO,), "without": (DINO,)}, "--without: nothing of spaces is left"),
    ({"spaces": (DINO,)}, "nothing to measure .*no reference; name one, as in --reference FOLDER"),
    ({"spaces": (DINO,), "reference": "nowhere"}, "nowhere"),
    ({"spaces": (DINO,), "reference": "", "split": "test"}, "--split test: of stores and runs, .* have none"),
    ({"spaces": (DINO,), "num_images": 4, "cfg_scale": 2.0}, "--num-images, --cfg-scale: of what a run paints"),
    ({"spaces": (DINO,), "filter": "box"}, "--filter box: nothing is resized; give --image-size too"),
    ({"spaces": (DINO,), "findings": Path("x.csv")}, "--findings x.csv: no findings are measured"),
    ({"spaces": (DINO,), "weights": {"inception": "w.pth"}}, "--weights inception=...: nothing is measured in it"),
    ({"spaces": (DINO,), "image_size": 5000}, "--image-size 5000: expected pixels, 1 to 4,096"),
    ({"spaces": (DINO,), "filter": "nearest", "image_size": 8}, "--filter nearest"),
]


@pytest.mark.parametrize(("options", "line"), REFUSALS)
def test_what_cannot_be_measured_is_refused(
    options: dict[str, Any], line: str, tmp_path: Path, toy_spaces: None
) -> None:
    with pytest.raises(ArraError, match=line) as caught:
        evaluated(saved(tmp_path / "set", drawn(6)), **options)
    assert "\n" not in str(caught.value)


def test_missing_weights_say_how_to_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = saved(tmp_path / "set", drawn(6))
    with pytest.raises(ArraError, match=r"wget .*or measure without it: --without inception"):
        evaluated(folder, reference=str(folder), spaces=("inception",), out=tmp_path / "out")


def test_options_of_the_command_line() -> None:
    options = parse_set_options(weights=[f"{DINO}=a=b"], inception=Path("w.pth"), spaces=(DINO,))
    assert options.weights == {DINO: "a=b", "inception": "w.pth"}
    with pytest.raises(ArraError, match=re.escape("--weights x: expected SPACE=PATH")):
        parse_set_options(weights=["x"], inception=None)
    assert SetOptions(cfg_scale=2.0, image_size=8).of_sets_alone == "--image-size, --cfg-scale"
    assert not SetOptions(cfg_scale=2.0).are_asked_for


def test_spaces_beside_a_protocol_are_measured_once() -> None:
    plan = make_plan(SetOptions(protocol="imagenet-256", spaces=("inception", DINO)))
    named = [(each.metric, each.space) for each in plan.measures]
    assert len(named) == len(set(named))
    assert ("density", "inception") in named
    assert ("fd", DINO) in named
    assert plan.spaces == ("inception", DINO)
