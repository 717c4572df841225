"""`arra reconstruct`: a folder, a recipe or a store; metrics.json, the grid, and one line for every mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arra.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draw_pictures: Callable[[Path], Path]) -> Path:
    """Pictures without captions, some of them in a folder below."""
    root = draw_pictures(tmp_path_factory.mktemp("bare") / "pictures")
    (root / "metadata.jsonl").unlink()
    (root / "below").mkdir()
    for number in range(12, 60):
        path = root / f"{number:03d}.png"
        path.rename(root / "below" / path.name) if number < 20 else path.unlink()
    return root


def test_a_folder_of_bare_pictures(folder: Path, tmp_path: Path, run_arra) -> None:
    answer = run_arra("reconstruct", "openmoji-vq4", folder, "--out", tmp_path, "--workers", "0")
    assert answer.code == 0
    for words in ("PSNR, dB", "SSIM", "codebook in use", "rFID (Inception)", "not measured", "no FID"):
        assert words in " ".join(answer.out.split())
    found = json.loads((tmp_path / "metrics.json").read_text())
    tokenizer = load_tokenizer("openmoji-vq4")
    assert (found["num_images"], found["image_size"]) == (20, 32)  # the size that the tokenizer was trained at
    assert found["tokenizer_sha256"] == tokenizer.weights_hash
    paths = sorted([*folder.glob("*.png"), *folder.glob("below/*.png")])
    side = [Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in side]))
    error = ((pixels.double() - tokenizer.decode(tokenizer.encode(pixels)).double()) / 255).square().mean((1, 2, 3))
    assert found["psnr_db"]["value"] == pytest.approx((-10 * error.log10()).mean().item(), abs=0.3)
    with Image.open(tmp_path / "reconstructions.png") as grid:
        assert grid.width > 2 * 192
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "reconstructions.png"]


def test_size_number_and_broken_pictures(folder: Path, tmp_path: Path, run_arra) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "zero.png").write_bytes(b"")
    (copy / "leaves.png").symlink_to("/etc/hostname")
    options = ["--image-size", "16", "--max-images", "21", "--workers", "0", "--out", tmp_path / "out"]
    answer = run_arra("reconstruct", "openmoji-vq4", copy, *options)
    assert answer.code == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["num_images"], found["pictures_broken"], found["image_size"]) == (20, 2, 16)
    told = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {line["id"] for line in told} == {"zero.png", "leaves.png"}
    (copy / "zero.png").unlink()
    (copy / "leaves.png").unlink()
    options[3] = "7"
    assert run_arra("reconstruct", "openmoji-vq4", copy, *options).code == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (found["num_images"], found["pictures_found"]) == (7, 20)
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_a_store_and_its_splits(pipeline, tmp_path: Path, run_arra) -> None:
    own = ["--workers", "0", "--out", tmp_path]
    assert run_arra("reconstruct", "openmoji-vq4", pipeline.store, "--split", "heldout", *own).code == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert 2 <= found["num_images"] < 60
    assert found["split"] == "heldout"
    error = run_arra("reconstruct", "openmoji-vq4", pipeline.store, "--split", "test", *own).error
    assert error.startswith(f"--split test: {pipeline.store} has heldout, train, validation; name one")


def test_a_recipe_says_the_size(tmp_path: Path, pipeline, run_arra) -> None:
    recipe = pipeline.baseline / "recipe.yaml"
    answer = run_arra("reconstruct", "openmoji-vq4", recipe, "--max-images", "4", "--workers", "0", "--out", tmp_path)
    assert answer.code == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["image_size"] == 16


def test_a_published_file(folder: Path, tmp_path: Path, run_arra) -> None:
    weights = Path(__file__).parent.parent / "golden" / "llamagen" / "vq_f16_nrb2.pt"
    own = ["--weights", weights, "--image-size", "64", "--max-images", "3", "--workers", "0", "--out", tmp_path]
    assert run_arra("reconstruct", "llamagen", folder, *own).code == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["num_codes"], found["num_codes_seen"]) == (128, 3 * 16)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nosuch", "FOLDER"], "tokenizer 'nosuch': neither a folder nor a known name"),
        (["openmoji-vq4", "NOWHERE"], "no such file or folder, and no built-in recipe"),
        (["openmoji-vq4", "EMPTY"], "looks like no known source"),
        (["openmoji-vq4", "FOLDER", "--image-size", "33"], "--image-size 33: expected a multiple of 4"),
        (["openmoji-vq4", "FOLDER", "--weights", "x.pt"], "--weights: 'openmoji-vq4' has weights of its own"),
        (["openmoji-vq4", "FOLDER", "--entry", "avg"], "--entry avg: expected model or ema"),
        (["openmoji-vq4", "FOLDER", "--judge", "eyes"], "encoder 'eyes': unknown"),
        (["openmoji-vq4", "FOLDER", "--inception", "x.pth"], "x.pth: no such"),
        (["openmoji-vq4", "FOLDER", "--perceptual", "x.pth"], "x.pth: no such"),
        (["llamagen-vq16", "FOLDER"], "its weights do not come with the package"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], told: str, folder: Path, tmp_path: Path, run_arra) -> None:
    (tmp_path / "empty").mkdir()
    places = {"FOLDER": folder, "NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty"}
    chosen = [places.get(text, text) for text in arguments]
    assert told in run_arra("reconstruct", *chosen, "--workers", "0", "--out", tmp_path / "out").error


def test_one_picture_is_too_few(tmp_path: Path, run_arra) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "one.png")
    error = run_arra("reconstruct", "openmoji-vq4", tmp_path, "--workers", "0", "--out", tmp_path / "out").error
    assert error == "reconstruction: 1 pictures; at least 2 are needed, give more"
