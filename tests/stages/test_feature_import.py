"""Feature files of the original ARRA extraction come into the store as they are, and none goes missing in silence."""

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from arra.config import Recipe, load_recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.feature_files import MAX_BYTES, MAX_VALUES, FeatureFiles, read_feature_file
from arra.stages.makers import teacher_made_by
from arra.stages.origin import columns_of
from arra.stages.prepare import PrepareOptions, asked_features, prepare
from arra.stages.train import train

INLINE = PrepareOptions(workers=0, batch_size=8, threads=1)
BIOMEDCLIP = "encoder.teacher={name: biomedclip, weights: not_on_this_machine}"
COLUMN = "features.biomedclip"


def features_of(number: int, size: int = 512) -> Tensor:
    """What some encoder said of a picture, with the first axis that the released scripts leave there."""
    return torch.randn(1, size, generator=torch.Generator().manual_seed(number))


def extract_as_arra(pictures: list[Path], out: Path, *, size: int = 512) -> None:
    """Nothing; a file for each picture, named as `pre_biomedclip_feature.py` names it: cut at the first dot."""
    out.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        torch.save(features_of(number, size), out / (picture.name.split(".")[0] + "_visual_feature.pt"))


def say_cuda(path: Path) -> None:
    """Nothing; the file says that its tensor lay on a GPU, as all of the released extraction do."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    (pickled,) = [name for name in parts if name.endswith("data.pkl")]
    on_cpu, on_gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert parts[pickled].count(on_cpu) == 1
    parts[pickled] = parts[pickled].replace(on_cpu, on_gpu)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


class Evil:
    """Would make a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_pictures: Callable[[Path], Path]) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("import") / "pictures")


@pytest.fixture
def features(tmp_path: Path, pictures: Path) -> Path:
    extract_as_arra(sorted(pictures.glob("*.png")), tmp_path / "biomedclip_feature")
    return tmp_path / "biomedclip_feature"


@pytest.fixture
def recipe_for(pictures: Path, toy_settings: tuple[str, ...]) -> Callable[..., Recipe]:
    def recipe(*more: str, path: Path = pictures) -> Recipe:
        own = ["data.source=folder", f"data.path={path}", "data.shard_records=16", *toy_settings, BIOMEDCLIP]
        return load_recipe("demo", row="aligned", overrides=[*own, *more])

    return recipe


def imported(recipe: Recipe, store: Path, features: Path, **options: Any) -> Store:
    chosen, only = asked_features(recipe, None)
    return prepare(chosen, store, options=INLINE, only=only, feature_files=features, **options).checked()


def test_files_come_in_as_they_are_and_serve_training(
    tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe], run_arra: Callable[..., Any]
) -> None:
    """The encoder is not on this machine, neither for preparation nor for training."""
    recipe, store = recipe_for("train.steps=2", "train.preview_every_steps=null"), tmp_path / "store"
    say_cuda(features / "007_visual_feature.pt")
    found = imported(recipe, store, features)
    assert found.column_names() == [COLUMN]
    entry = found.entry(COLUMN)
    assert entry is not None
    assert (entry.shape, entry.variants, entry.dtype, entry.failed) == ((512,), 1, "float32", 0)
    assert entry.made_by["imported"] == "ARRA feature files"
    assert (entry.made_by["encoder"], entry.made_by["aggregate"]) == ("biomedclip", "projected")
    names = found.table(["id"]).column("id").to_pylist()
    expected = torch.cat([features_of(int(name.split(".")[0])) for name in names]).numpy()
    np.testing.assert_array_equal(found.column(COLUMN), expected)
    assert imported(recipe, store, features).column_names() == [COLUMN]  # nothing to do
    whole = prepare(recipe, store, options=INLINE).checked()
    assert whole.entry(COLUMN) == entry  # all else was made, and it stayed
    assert "codes" in whole.column_names()
    assert columns_of(recipe) == ["codes", COLUMN]
    run = train(recipe, whole, tmp_path / "run")
    assert all(row["gva_loss"] is not None for row in run.read_metrics() if row["kind"] == "train")
    answer = run_arra("data", "show", store)
    assert "imported" in answer.out


def test_the_command_takes_them(
    tmp_path: Path, features: Path, pictures: Path, toy_settings: tuple[str, ...], run_arra: Callable[..., Any]
) -> None:
    settings = ["data.source=folder", f"data.path={pictures}", *toy_settings, "encoder.others={fine: clip-b32}"]
    told = [each for text in settings for each in ("--set", text)]
    store = ("--store", tmp_path / "store")
    answer = run_arra("extract", "demo", "--row", "aligned", "--from", features, *store, *told)
    assert "several of the recipe are meant: teacher, fine; say by one of these names" in answer.error
    answer = run_arra("extract", "demo", "--row", "aligned", "--encoder", "fine", "--from", features, *store, *told)
    assert answer.code == 0, answer
    assert Store.open(tmp_path / "store").column_names() == ["features.clip-b32"]
    answer = run_arra(
        "extract", "demo", "--row", "aligned", "--encoder", "biomedclip", "--from", features, *store, *told
    )
    assert answer.code == 0, answer
    assert Store.open(tmp_path / "store").column_names() == [COLUMN, "features.clip-b32"]
    assert "give one of the two" in run_arra("extract", "demo", "--text", "--from", features, *store).error


def test_parts_of_a_job_array_make_the_same_column(
    tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe]
) -> None:
    recipe = recipe_for()
    for part in range(2):
        found = prepare(
            recipe, tmp_path / "parts", options=replace(INLINE, shard=(part, 2)), only=("features",),
            feature_files=features,
        )  # fmt: skip
    assert (found.ok, found.pending) == (True, 0)
    whole = imported(recipe, tmp_path / "whole", features)
    parts = Store.open(tmp_path / "parts")
    assert parts.manifest_hash(COLUMN) == whole.manifest_hash(COLUMN)


# Whose file it is


def tree_of(root: Path, *names: str) -> Path:
    """Pictures at the given places, and a list of them."""
    lines = []
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number * 20, 0, 0)).save(path)
        lines.append(json.dumps({"file_name": name, "text": f"picture {number}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def failures(store: Path) -> dict[str, str]:
    lines = (store / "failures.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def rows_of(store: Store) -> dict[str, float]:
    """The first value of every record that has one."""
    reader, names = store.reader(COLUMN), store.table(["id"]).column("id").to_pylist()
    values = reader.take(np.nonzero(reader.valid())[0])[:, 0]
    return dict(zip([name for name, valid in zip(names, reader.valid(), strict=True) if valid], values, strict=True))


def save(path: Path, value: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.full((1, 512), value), path)


def test_the_layout_that_the_training_reads(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> None:
    """Two subsets have pictures of one name; the folder three above a picture tells them apart."""
    root = tree_of(tmp_path / "jpg", "p10/p1/s1/x.png", "p11/p2/s2/x.png", "p11/p2/s2/y.png")
    for subset, stem, value in (("p10", "x", 1.0), ("p11", "x", 2.0), ("p11", "y", 3.0)):
        save(tmp_path / "out" / subset / "visual_features" / f"{stem}_visual_feature.pt", value)
    store = imported(recipe_for(path=root), tmp_path / "store", tmp_path / "out")
    assert rows_of(store) == {"p10/p1/s1/x.png": 1.0, "p11/p2/s2/x.png": 2.0, "p11/p2/s2/y.png": 3.0}


def test_names_are_cut_at_the_last_dot_or_the_first(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> None:
    """As the training looks for them, else as the extraction wrote them."""
    root = tree_of(tmp_path / "jpg", "a.b.png", "c.d.png")
    save(tmp_path / "out" / "a.b_visual_feature.pt", 1.0)
    save(tmp_path / "out" / "a_visual_feature.pt", 9.0)
    save(tmp_path / "out" / "c_visual_feature.pt", 2.0)
    store = imported(recipe_for(path=root), tmp_path / "store", tmp_path / "out")
    assert rows_of(store) == {"a.b.png": 1.0, "c.d.png": 2.0}


def test_what_cannot_be_told_apart_is_a_failure(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> None:
    """The extraction wrote pictures of one name, or of one beginning, into one file: it is of the last of them."""
    names = ("s1/x.png", "s2/x.png", "a.b.png", "a.c.png", "twice.png", "none.png", "fine.png")
    root, out = tree_of(tmp_path / "jpg", *names), tmp_path / "out"
    for stem in ("x", "a", "fine"):
        save(out / f"{stem}_visual_feature.pt", 1.0)
    for subset in ("p10", "p11"):
        save(out / subset / "visual_features" / "twice_visual_feature.pt", 1.0)
    recipe = recipe_for(path=root)
    found = prepare(recipe, tmp_path / "store", options=INLINE, only=("features",), feature_files=out)
    assert (found.ok, found.failed) == (False, 6)
    told = failures(tmp_path / "store")
    for name in ("s1/x.png", "s2/x.png", "a.b.png", "a.c.png"):
        assert "2 records have pictures of this name" in told[name]
    assert "another file has this name" in told["twice.png"]
    assert f"{out}: no file none_visual_feature.pt" in told["none.png"]
    assert Store.open(tmp_path / "store").column_names() == []
    tolerant = recipe_for("data.max_failed_fraction=0.9", path=root)
    assert rows_of(imported(tolerant, tmp_path / "store", out)) == {"fine.png": 1.0}


# What is in it


def test_one_vector_however_it_is_laid(tmp_path: Path) -> None:
    expected = features_of(3)[0]
    for name, tensor in {
        "row": features_of(3),
        "flat": expected,
        "slice": torch.cat([features_of(2), features_of(3)])[1:],
        "parameter": torch.nn.Parameter(features_of(3)),
    }.items():
        torch.save(tensor, tmp_path / f"{name}.pt")
        np.testing.assert_array_equal(read_feature_file(tmp_path / f"{name}.pt"), expected.numpy())
    torch.save(expected, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read_feature_file(tmp_path / "old.pt"), expected.numpy())
    torch.save(expected.bfloat16(), tmp_path / "half.pt")
    np.testing.assert_array_equal(read_feature_file(tmp_path / "half.pt"), expected.bfloat16().float().numpy())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Evil(), "refused: not a plain tensor, and opening it could run code"),
        ({"feature": torch.zeros(1, 512)}, "holds a dict, expected a tensor of floats"),
        (None, "holds a NoneType"),
        (torch.zeros(1, 512, dtype=torch.int64), "holds a tensor of torch.int64"),
        (torch.zeros(2, 512), "a tensor of 2 x 512, expected 1 x F or F"),
        (torch.zeros(1, 1, 512), "a tensor of 1 x 1 x 512"),
        (torch.zeros(()), "a tensor of one value"),
        (torch.zeros(0), "a tensor of 0,"),
        (torch.zeros(1).expand(10**9), "a tensor of 1000000000,"),
        (torch.zeros(1, MAX_VALUES + 1), f"a tensor of 1 x {MAX_VALUES + 1}"),
        (torch.zeros(512, device="meta"), "holds a tensor of torch.float32 (torch.strided), expected"),
        (torch.zeros(1, 512).to_sparse(), "expected a tensor of floats"),
        (torch.full((1, 512), float("nan")), "holds numbers that are not finite"),
        (torch.full((1, 512), float("inf")), "holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: .*") as refusal:
        read_feature_file(tmp_path / "x.pt")
    assert reason in str(refusal.value)
    assert not (tmp_path / "unpickled").exists()


def test_damaged_files_are_refused_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(features_of(0), path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(bytes(broken[: rng.integers(1, len(whole) + 1)]))
        said = None
        try:
            assert read_feature_file(path).ndim == 1  # the damage lies in the numbers, or in nothing
        except ValueError as error:
            said = str(error)
        assert said is None or (said.startswith(f"{path}: ") and "\n" not in said)
    for content in (b"", b"no tensor", b"\x80\x02.", bytes(MAX_BYTES + 1)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt: "):
            read_feature_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="compressed"):
        read_feature_file(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no plain file"):  # reading it would wait for ever
        read_feature_file(path)


def test_bad_files_are_failures_of_their_records(
    tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), features / "001_visual_feature.pt")
    torch.save(features_of(1, 256), features / "002_visual_feature.pt")  # of MedSAM, which has the same suffix
    torch.save(torch.full((1, 512), float("nan")), features / "003_visual_feature.pt")
    torch.save(torch.full((1, 512), 1e6), features / "004_visual_feature.pt")
    (features / "005_visual_feature.pt").unlink()
    half = "data.features_dtype=float16"
    found = prepare(recipe_for(half), tmp_path / "s", options=INLINE, only=("features",), feature_files=features)
    assert not found.ok
    told = failures(tmp_path / "s")
    reasons = {
        "001.png": "refused", "002.png": "256 values, expected 512 of biomedclip (projected)", "003.png": "not finite",
        "004.png": "values beyond float16; set data.features_dtype: float32", "005.png": "no file 005_visual_feature",
    }  # fmt: skip
    assert told.keys() == reasons.keys()
    assert all(reason in told[name] for name, reason in reasons.items())
    assert not (tmp_path / "unpickled").exists()
    store = imported(recipe_for(half, "data.max_failed_fraction=0.1"), tmp_path / "s", features)
    assert store.entry(COLUMN).failed == 5  # type: ignore[union-attr]
    for number in (1, 2, 3, 4, 5):
        torch.save(features_of(number), features / f"{number:03d}_visual_feature.pt")
    recipe, mended = recipe_for(half), replace(INLINE, retry_failed=True)
    prepare(recipe, tmp_path / "s", options=mended, only=("features",), feature_files=features).checked()
    store = imported(recipe, tmp_path / "s", features)
    assert store.entry(COLUMN).failed == 0  # type: ignore[union-attr]
    assert store.column(COLUMN)[4].tolist() == features_of(4)[0].half().tolist()


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("encoder.teacher={name: biomedclip, output: cls}",), "hold its output 'projected', the recipe takes 'cls'"),
        (("encoder.teacher={name: biomedclip, layers: [3]}",), "one vector of each picture at the encoder's own size"),
        (("encoder.teacher={name: biomedclip, bands: 3}", "align.target=causal"), "has 'bands' in the recipe"),
        (("encoder.teacher=medsam", "align.components=null"), r"512 values, expected 256 of medsam .mean."),
        (("data.crop={kind: ten_crop, range: 1.1}",), "data.crop: ten_crop shows several; set data.crop.kind: center"),
    ],
)  # fmt: skip
def test_files_of_something_else_are_refused(
    tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe], changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ArraError, match=message):
        imported(recipe_for(*changes), tmp_path / "store", features)


def test_folders_without_them_are_told(tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe]) -> None:
    with pytest.raises(ArraError, match=r"--from .*nowhere: no such folder; expected files NAME_visual_feature\.pt"):
        FeatureFiles.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArraError, match=r"empty: no files NAME_visual_feature\.pt in it"):
        FeatureFiles.find(tmp_path / "empty")
    for path in list(features.glob("*.pt")):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(ArraError, match=r"its 60 files are named as no picture of .*, the first as 'other-000'"):
        imported(recipe_for(), tmp_path / "store", features)


def test_features_made_otherwise_are_not_written_over(
    tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe]
) -> None:
    recipe = recipe_for("encoder.teacher=clip-b32")
    store = imported(recipe, tmp_path / "store", features)
    store.write("features.clip-b32", np.zeros((60, 512), np.float32), {"encoder": "clip-b32", "weights": "a" * 64})
    with pytest.raises(ArraError, match=r"column 'features.clip-b32' was made with weights 'aaaa.*--replace"):
        imported(recipe, tmp_path / "store", features)


def test_an_imported_column_must_be_the_recipes(
    tmp_path: Path, features: Path, recipe_for: Callable[..., Recipe]
) -> None:
    store = imported(recipe_for(), tmp_path / "store", features)
    fits = recipe_for()
    assert teacher_made_by(fits, fits.encoder.choice("teacher"), store) == store.entry(COLUMN).made_by  # type: ignore[union-attr]
    cropped = recipe_for("data.crop={kind: flip}")
    with pytest.raises(ArraError, match=r"imported features are one of each picture, data.crop: flip shows several"):
        teacher_made_by(cropped, cropped.encoder.choice("teacher"), store)
    store.write(COLUMN, np.zeros((60, 768), np.float32), {**store.entry(COLUMN).made_by})  # type: ignore[union-attr]
    with pytest.raises(ArraError, match="imported features of 768 values, biomedclip gives 512"):
        teacher_made_by(fits, fits.encoder.choice("teacher"), store)
    store.write(COLUMN, np.zeros((60, 512), np.float32), {**store.entry(COLUMN).made_by, "encoder": "medsam"})  # type: ignore[union-attr]
    with pytest.raises(ArraError, match="was imported as features of 'medsam', the recipe's encoder is 'biomedclip'"):
        teacher_made_by(fits, fits.encoder.choice("teacher"), store)
