"""`arra data check`: every fault that is planted is found and told with what to do, and clean data is called clean."""

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from arra.data.images import center_crop
from arra.encoders import load_encoder
from arra.errors import ArraError
from arra.evaluate.distances import frechet_distance
from arra.report.check_page import Problem
from arra.stages.check import Checked, check_data, recipe_of, summary
from arra.tokenizers import load_tokenizer

DRAW = Callable[[Path], Path]
SMALL = ("data.image_size=16", "model.prefix_length=24", "model.text_vocab_size=300", "evaluate.splits=[heldout]")


def check(path: Path | str, out: Path, *, overrides: Sequence[str] = SMALL, **options: Any) -> Checked:
    return check_data(str(path), out=out, overrides=overrides, workers=options.pop("workers", 0), **options)


def told(checked: Checked, word: str) -> Problem:
    """The one problem that holds the word."""
    found = [problem for problem in checked.problems if word in problem.what]
    assert len(found) == 1, (word, checked.problems)
    return found[0]


def numbers(checked: Checked, title: str) -> dict[str, Any]:
    return dict(json.loads((checked.out / "check.json").read_text(encoding="utf-8"))[title])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scene(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


def write(folder: Path, items: Sequence[tuple[str, str, str]]) -> Path:
    """A folder of scenes: (name, caption, split) of each."""
    folder.mkdir()
    rows = []
    for number, (name, text, split) in enumerate(items):
        scene(number).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": text, "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


CLEAN = [
    *((f"{number:02d}.png", f"scene number {number}", "train") for number in range(8)),
    ("08.png", "a validation scene", "validation"),
    ("09.png", "a held-out scene", "heldout"),
]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write(tmp_path / "pictures", CLEAN)


def test_nothing_is_wrong_with_clean_data(clean: Path, tmp_path: Path) -> None:
    checked = check(clean, tmp_path / "out", max_images=0)
    assert checked.problems == []
    assert checked.ok
    assert checked.verdict == "Nothing is wrong with this data."
    assert sorted(path.name for path in checked.out.iterdir()) == [
        "check.html",
        "check.json",
        "duplicates.jsonl",
        "failures.jsonl",
    ]
    expected = {"path", "ok", "problems", "records", "pictures", "copies", "splits", "prompts", "captions", "tokenizer"}
    assert json.loads((checked.out / "check.json").read_text()).keys() == expected
    assert numbers(checked, "records") | {"records": 10, "failed": 0, "skipped": 0} == numbers(checked, "records")
    assert numbers(checked, "splits")["splits"] == {"heldout": 1, "train": 8, "validation": 1}


def test_loader_processes_find_what_one_process_finds(clean: Path, tmp_path: Path) -> None:
    (clean / "03.png").write_bytes(b"no picture")
    one, other = (check(clean, tmp_path / str(workers), workers=workers) for workers in (0, 2))
    assert [p.level for p in one.problems] == [p.level for p in other.problems] != []
    contents = [json.loads((each.out / "check.json").read_text()) for each in (one, other)]
    assert contents[0] | {"problems": []} == contents[1] | {"problems": []}


def test_planted_faults_are_found(clean: Path, tmp_path: Path) -> None:
    shutil.copy(clean / "00.png", clean / "copy.png")
    shutil.copy(clean / "01.png", clean / "again.png")
    scene(2).resize((96, 96)).save(clean / "like.jpg", quality=70)
    (clean / "broken.png").write_bytes((clean / "00.png").read_bytes()[:60])
    scene(30).resize((9, 9)).save(clean / "tiny.png")
    more: list[Any] = [
        {"file_name": "copy.png", "text": "SCENE  number 1", "split": "heldout"},
        {"file_name": "again.png", "text": "again <|image|> and </s>", "split": "train"},
        {"file_name": "like.jpg", "text": "!!! \N{ROCKET}", "split": "validation"},
        {"file_name": "broken.png", "text": "x", "split": "train"},
        {"file_name": "tiny.png", "text": "word " * 30, "split": "train"},
        {"file_name": "gone.png", "text": "y", "split": "train"},
    ]
    with (clean / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(each) + "\n" for each in more) + "no JSON\n")
    checked = check(clean, tmp_path / "out")
    assert not checked.ok
    levels = [problem.level for problem in checked.problems]
    assert levels == sorted(levels, key=("error", "warning", "note").index)
    errors = {
        "items that make no record": "2 (11.8 %), the first: " + str(clean / "metadata.jsonl") + ": line 16: ",
        "unreadable pictures": "1, the first: " + str(clean / "broken.png"),
        "held-out pictures that are in train too": "1 (25 %)",
    }
    for what, text in errors.items():
        problem = told(checked, what)
        assert problem.level == "error"
        assert text in problem.what
    assert levels.count("error") == len(errors)
    assert told(checked, "look like one of train").what.endswith(": 1 (25 %)")
    assert told(checked, "whose prompt is in train too").what.endswith(": 1 (25 %)")
    prompts = "whose prompt is in train too"
    for what in (
        prompts,
        "look like one of train",
        "copies of pictures within",
        "do not fit model.prefix_length",
        "a word",
    ):
        assert told(checked, what).level == "warning"
    for what in ("which get enlarged", "special tokens: <|image|> (1), </s> (1)"):
        assert told(checked, what).level == "note"
    assert [line["id"] for line in lines(checked.out / "failures.jsonl")][2:] == ["broken.png"]
    assert lines(checked.out / "duplicates.jsonl") == [
        {"kind": "exact", "ids": {"train": ["00.png"], "heldout": ["copy.png"]}},
        {"kind": "exact", "ids": {"train": ["01.png", "again.png"]}},
        {"kind": "near", "ids": {"train": ["02.png"], "validation": ["like.jpg"]}},
    ]


def test_what_is_advised_mends_the_fault(tmp_path: Path) -> None:
    items = [*CLEAN, ("long.png", "word " * 30, "train")]
    folder = write(tmp_path / "pictures", items)
    advice = told(check(folder, tmp_path / "out", max_images=0), "do not fit").advice
    length = re.search(r"model.prefix_length (\d+) holds all", advice)
    assert length is not None
    for less, fits in ((1, False), (0, True)):
        chosen = [*SMALL, f"model.prefix_length={int(length[1]) - less}"]
        assert check(folder, tmp_path / "out", overrides=chosen, max_images=0).ok
        assert (check(folder, tmp_path / "out", overrides=chosen, max_images=0).problems == []) is fits


def test_resolutions_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", CLEAN)
    for number, size in enumerate([(64, 32), (128, 32), (32, 96), (8, 8)]):
        scene(number).resize(size).save(folder / f"{number:02d}.png")
    found = numbers(check(folder, tmp_path / "out", max_images=0), "pictures")
    assert (found["width"], found["height"]) == ([8, 64.0, 128], [8, 64.0, 96])
    assert found["aspect"] == [pytest.approx(1 / 3), 1.0, 4.0]
    assert found["smaller_than_image_size"] == 1
    assert found["mean_cut_by_center_crop"] == pytest.approx((1 / 2 + 3 / 4 + 2 / 3) / 10)
    chosen = {"256x256": 7, "320x160": 1, "512x128": 1, "128x384": 1}
    assert found["buckets"] == {"size": 256, "of_pictures": 10, "chosen": chosen}


def test_psnr_and_distance_are_those_of_the_tokenizer_and_the_judge(clean: Path, tmp_path: Path) -> None:
    found = numbers(check(clean, tmp_path / "out"), "tokenizer")
    crops = torch.from_numpy(np.stack([center_crop(scene(number), 16) for number in range(10)]))
    tokenizer = load_tokenizer("openmoji-vq4")
    back = tokenizer.decode(tokenizer.encode(crops))
    psnr = -10 * ((crops.double() - back.double()) / 255).square().mean((1, 2, 3)).log10()
    assert found["psnr_db"]["mean"] == pytest.approx(float(psnr.mean()))
    assert found["worst"][0] == {"id": f"{int(psnr.argmin()):02d}.png", "psnr_db": pytest.approx(float(psnr.min()))}
    judge = load_encoder("efficientnet-lite1")
    expected = frechet_distance(judge.encode(back), judge.encode(crops))
    assert found["frechet"]["value"] == pytest.approx(expected, rel=1e-3)
    assert found["frechet"]["features"] == "efficientnet-lite1"
    assert found["frechet"]["is_biased"] is True


def test_only_so_many_pictures_pass_through_the_tokenizer(clean: Path, tmp_path: Path) -> None:
    found = numbers(check(clean, tmp_path / "out", max_images=3), "tokenizer")
    assert found["pictures"] == 3
    assert {each["id"] for each in found["worst"]} == {"00.png", "04.png", "09.png"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tokenizer.name=llamagen-vq16"], "llamagen-vq16 needs its file; give it with --set tokenizer.weights=PATH"),
        (["data.image_size=18"], "data.image_size 18 is no multiple of 4, which openmoji-vq4 needs; change it"),
        (["tokenizer.network={}", "tokenizer.train={}"], "the recipe trains a fresh tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_looked_at_is_said_so(
    clean: Path, tmp_path: Path, overrides: list[str], line: str
) -> None:
    checked = check(clean, tmp_path / "out", overrides=[*SMALL, *overrides])
    assert checked.ok
    assert line in told(checked, "what the tokenizer destroys").advice
    assert line in (checked.out / "check.html").read_text(encoding="utf-8")


def test_classes_are_balanced_against_each_other_and_their_names_are_no_leak(tmp_path: Path) -> None:
    for number, name in enumerate(["train/cat", "train/cat", "train/dog", "validation/cat", "validation/owl"]):
        (tmp_path / "tree" / name).mkdir(parents=True, exist_ok=True)
        scene(number).save(tmp_path / "tree" / name / f"{number}.png")
    checked = check(tmp_path / "tree", tmp_path / "out", kind="classes", max_images=0)
    assert checked.ok
    assert numbers(checked, "splits")["classes"] == {"cat": 3, "dog": 1, "owl": 1}
    assert told(checked, "classes without a picture in train").what.endswith(": owl")
    assert "test" in told(checked, "no held-out split").advice


def test_missing_splits_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", [("0.png", "one", "test"), ("1.png", "two", "test")])
    checked = check(folder, tmp_path / "out", max_images=0)
    assert [told(checked, f"split '{name}'").level for name in ("train", "validation")] == ["error", "error"]
    assert told(checked, "evaluate.splits names heldout").advice == "for this data: --set evaluate.splits=[test]"


def test_data_of_which_nothing_is_sound_is_told_item_by_item(tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", [("0.png", " ", "train"), ("1.png", "", "train")])
    checked = check(folder, tmp_path / "out")
    assert not checked.ok
    assert len(lines(checked.out / "failures.jsonl")) == 2
    assert numbers(checked, "records")["failed"] == 2


def test_other_peoples_text_is_escaped_and_the_page_needs_no_network(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> <|image|>"
    items = [*CLEAN, ("evil.png", evil, "train"), ("twin.png", evil, "heldout")]
    checked = check(write(tmp_path / "pictures", items), tmp_path / "out")
    page = (checked.out / "check.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r'(?:src|href)="(?!data:image/png;base64,)', page)


def test_the_terminal_shows_the_problems_and_the_verdict(clean: Path, tmp_path: Path) -> None:
    (clean / "03.png").write_bytes(b"[red]")
    checked = check(clean, tmp_path / "out", max_images=0)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(summary(checked))
    text = console.export_text()
    assert "error   unreadable pictures: 1" in text
    assert "Not fit for training yet: 1 error." in text
    assert str(checked.out / "check.html") in text


def test_a_recipe_names_its_own_data(clean: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\ndata:\n  sources: [{{kind: folder, path: {clean}}}]\ntrain: {{steps: 1}}\n")
    checked = check(recipe, tmp_path / "out", max_images=0)
    assert numbers(checked, "records")["records"] == 10
    assert recipe_of("demo", None, ()).data.source == "openmoji"
    gathering = tmp_path / "gathering.yaml"
    gathering.write_text("META:\n  - path: x.json\n")
    assert recipe_of(str(gathering), None, ()).data.source == "meta"


@pytest.mark.parametrize(
    ("path", "options", "line"),
    [
        ("nowhere", {}, "nowhere: no such file or folder, and no built-in recipe; those are alignment_lab, "),
        ("{clean}", {"kind": "folders"}, "--kind folders: expected one of openmoji, auto, folder"),
        ("{clean}", {"kind": "parquet"}, "parquet"),
        ("{clean}", {"tokenizer": "nothing"}, "tokenizer 'nothing': neither a folder nor a known name"),
        ("{clean}", {"encoder": "nothing"}, "encoder 'nothing': unknown; known are efficientnet-lite0"),
        ("{clean}", {"overrides": ["data.image_sizes=8"]}, "--set data.image_sizes: unknown key"),
    ],
)
def test_wrong_input_is_one_line(clean: Path, tmp_path: Path, path: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ArraError) as caught:
        check(path.format(clean=clean), tmp_path / "out", **options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
