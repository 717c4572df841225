"""What CheXGenBench's scripts read of an exported set."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arra.errors import ArraError
from arra.stages.chexgenbench import export_set
from arra.stages.picture_sets import open_set

PROMPTS = ["no effusion", 'a "small", left\nopacity', "no effusion"]


def painted(folder: Path, prompts: list[str]) -> Path:
    folder.mkdir()
    rows = []
    for number, prompt in enumerate(prompts):
        image = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number:06d}.png")
        rows.append(json.dumps({"file": f"{number:06d}.png", "prompt": prompt, "seed": number}))
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_table_and_pictures(tmp_path: Path) -> None:
    pictures = open_set(painted(tmp_path / "set", PROMPTS))
    told: list[tuple[int, int]] = []
    done = export_set(pictures, tmp_path / "out", progress=lambda what, now, total, *more: told.append((now, total)))
    with (tmp_path / "out/CSV/prompt_INFO.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [row["annotated_prompt"] for row in rows] == PROMPTS
    assert [row["img_savename"] for row in rows] == [row["synthetic_filename"] for row in rows]
    for row, expected in zip(rows, pictures.read(range(3)), strict=True):
        with Image.open(tmp_path / "out/synthetic_images" / row["img_savename"]) as image:
            assert np.array_equal(np.asarray(image), expected)
    assert (done.num_images, done.num_prompts, told) == (3, 2, [(3, 3)])
    assert done.rows[0] == ("pictures", "3 of 2 prompts; the benchmark paints one for each, and counts all")
    assert str(tmp_path / "out") in done.hint


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "bare/a.png")
    with pytest.raises(ArraError, match=r"bare: CheXGenBench wants the prompt of every picture"):
        export_set(open_set(tmp_path / "bare"), tmp_path / "out")
    with pytest.raises(ArraError, match=r"set: exists already; name another folder"):
        export_set(open_set(painted(tmp_path / "set", PROMPTS)), tmp_path / "set")
