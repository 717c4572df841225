"""The folder of `arra generate`: what is written, continued, shared by processes, refused."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, save_model
from arra.runs import file_hash
from arra.sample import memory
from arra.sample.generate import Engine
from arra.stages import paint as paint_stage
from arra.stages import samples as samples_stage
from arra.stages.given import given_request
from arra.stages.paint import Painted, paint
from arra.stages.painters import load_run
from arra.stages.request import (
    PaintOptions,
    PaintRequest,
    number,
)
from arra.stages.samples import Samples
from arra.stages.wishes import Asked
from arra.tokenizers.image import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings

NAMES = ["crane", "tabby, tabby cat", "maillot"]


@pytest.fixture(scope="session")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three classes that paints 4 x 4 pixels, beside its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("painter") / "model"
    shape = {"num_layers": 1, "num_heads": 1, "hidden_size": 8, "num_codes": 16, "grid": (2, 2), "num_classes": 3}
    made = Decoder(DecoderSettings(**shape, condition="class"))
    made.about |= {"class_names": NAMES, "sampling": {"cfg_scale": 1.5, "top_k": 12}}
    save_model(made, folder)
    settings = VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, num_codes=16, code_dim=4)
    ImageTokenizer(VQModel(settings), name="tiny", weights_hash=None).save(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are shown as colours: what is tested here is not the tokenizer, which takes most of the time."""

    def decode(self: ImageTokenizer, codes: torch.Tensor) -> torch.Tensor:
        colors = (codes[..., None] * torch.tensor([37, 101, 197]) % 256).to(torch.uint8)
        return colors.repeat_interleave(self.downsampling, 1).repeat_interleave(self.downsampling, 2)

    monkeypatch.setattr(ImageTokenizer, "decode", decode)


def request(painter: Path, *labels: str, **fields: Any) -> PaintRequest:
    """A request for classes, by default every one with four seeds."""
    return PaintRequest(painter, Asked(labels=labels or ("all",)), **{"seeds": range(4), **fields})


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("lock")}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_pictures_with_what_made_them(painter: Path, tmp_path: Path) -> None:
    asked = request(painter, "1", "0", sampling={"cfg_scale": 2.0, "top_k": None}, seeds=[5, 2, 7])
    done = paint(asked, options=PaintOptions(tmp_path / "out", npz=True))
    assert (done.num_images, done.num_painted, done.num_missing) == (6, 6, 0)
    found = rows(tmp_path / "out")
    assert [(row["file"], row["label"], row["class"], row["seed"]) for row in found] == [
        (f"{place:06d}.png", label, NAMES[label], seed)
        for place, (label, seed) in enumerate((label, seed) for label in (1, 0) for seed in (5, 2, 7))
    ]
    assert {(row["cfg_scale"], row["top_k"], row["cfg_schedule"], row["top_p"]) for row in found} == {
        (2.0, 12, "constant", 1.0)  # the request's, the card's, the defaults
    }
    assert {row["model_sha256"] for row in found} == {file_hash(painter / "model.safetensors")}
    assert {row["tokenizer_sha256"] for row in found} == {file_hash(painter / "tokenizer/tokenizer.safetensors")}
    for row in found:
        with Image.open(tmp_path / "out" / row["file"]) as image:
            assert (image.size, image.mode) == ((4, 4), "RGB")
            assert image.info == {f"arra:{key}": str(value) for key, value in row.items()}
    assert {"request.json", "grid.png", "samples.npz", "samples.jsonl"} < files(tmp_path / "out").keys()
    assert done.summary().startswith(f"6 pictures in {tmp_path / 'out'} (6 painted now, ")
    assert done.summary().endswith(f"{tmp_path / 'out' / 'samples.npz'}")


def test_a_picture_depends_on_its_own_line_alone(painter: Path, tmp_path: Path) -> None:
    paint(request(painter), options=PaintOptions(tmp_path / "all", batch_size=5))
    paint(request(painter, "2", seeds=[3]), options=PaintOptions(tmp_path / "one"))
    with Image.open(tmp_path / "all/000011.png") as one, Image.open(tmp_path / "one/000000.png") as other:
        assert one.tobytes() == other.tobytes()


class Killed(BaseException):
    """In place of SIGKILL."""


def stages_of_writing() -> list[tuple[str, int]]:
    return [
        *(("picture", count) for count in (0, 1, 7, 11)),
        *(("line", count) for count in (0, 1, 7, 11)),
        *(("torn", count) for count in (0, 5)),
        *((name, 0) for name in ("request.json", "samples.jsonl", "grid.png", "samples.npz")),
    ]


@pytest.mark.parametrize(("what", "survive"), stages_of_writing(), ids=str)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    painter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, survive: int
) -> None:
    options = PaintOptions(tmp_path / "out", batch_size=2, npz=True)
    paint(request(painter), options=PaintOptions(tmp_path / "whole", npz=True))
    left = {"picture": survive, "line": survive, "torn": survive}
    replace, write = samples_stage.os.replace, samples_stage.os.write

    def killing_replace(source: Path, target: Path) -> None:
        name = Path(target).name
        if name == what or (re.fullmatch(r"\d+\.png", name) and what == "picture" and left[what] == 0):
            raise Killed
        left["picture"] -= name.endswith(".png")
        replace(source, target)

    def killing_write(file: int, line: bytes) -> int:
        for kind in ("line", "torn"):
            if what == kind and left[kind] == 0:
                if kind == "torn":
                    write(file, line[:20])
                raise Killed
            left[kind] -= 1
        return write(file, line)

    with monkeypatch.context() as patch:
        patch.setattr(samples_stage, "WRITERS", 1)
        patch.setattr(samples_stage.os, "replace", killing_replace)
        patch.setattr(samples_stage.os, "write", killing_write)
        with pytest.raises(Killed):
            paint(request(painter), options=options)
    kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in listed(tmp_path / "out")}
    done = paint(request(painter), options=options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert done.num_painted == 12 - len(kept)
    for name, then in kept.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == then


def listed(folder: Path) -> set[str]:
    """Pictures of which there is a whole line and the file."""
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    names = {match[1] for line in lines if (match := re.fullmatch(r'\{"file": "(\d+\.png)", .*"\}', line))}
    return {name for name in names if (folder / name).is_file()}


def test_what_is_whole_is_not_painted_again(painter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PaintOptions(tmp_path, batch_size=3)
    paint(request(painter), options=options)
    before = files(tmp_path)
    for name in ("000003.png", "000007.png", "grid.png"):
        (tmp_path / name).unlink()
    chosen: list[tuple[int, int]] = []
    generate = Engine.generate

    def watched(self: Engine, **inputs: Any) -> Any:
        chosen.extend(zip(inputs["labels"], inputs["seeds"], strict=True))
        return generate(self, **inputs)

    monkeypatch.setattr(Engine, "generate", watched)
    done = paint(request(painter), options=options)
    assert chosen == [(0, 3), (1, 3)]
    assert files(tmp_path) == before
    assert "(10 there before, 2 painted now" in done.summary()
    again = paint(request(painter), options=options)
    assert "(12 there before)" in again.summary()
    assert len(chosen) == 2


def test_the_folder_takes_no_other_request(painter: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(painter, other)
    model = Decoder(DecoderSettings(**json.loads((other / "model.json").read_text())["settings"]))
    model.output.weight.data.normal_()
    model.about |= {"class_names": NAMES, "sampling": {"cfg_scale": 1.5, "top_k": 12}}
    save_model(model, other)
    paint(request(painter), options=PaintOptions(out))
    before = files(out)
    for wanted, told in (
        (request(painter, seeds=range(3)), "num_images 12 there, now 9, seeds 0-3 there, now 0-2;"),
        (request(painter, "0-1", "1"), "conditions 3 classes: 'crane', 'tabby, tabby cat', 'maillot' there, now 3 cla"),
        (request(painter, sampling={"temperature": 0.5}), "temperature 1.0 there, now 0.5;"),
        (request(painter, preset="plain"), "cfg_scale 1.5 there, now 1.0, top_k 12 there, now 0;"),
        (request(painter, num_images=12, seeds=[0]), "order every condition with every seed there, now conditions in"),
        (request(other), "model_sha256 "),
        (request(painter, jacobi_window=2), "jacobi_window null there, now 2;"),
        (request(painter, weights="bfloat16"), "weights null there, now bfloat16;"),
    ):
        with pytest.raises(ArraError) as caught:
            paint(wanted, options=PaintOptions(out))
        line = str(caught.value)
        assert line.startswith(f"{out}: holds pictures of another request: {told}")
        assert line.endswith("choose another --out, or start anew with --replace")
        assert files(out) == before
    (out / "000099.png").write_bytes(b"mine")
    paint(request(painter, "1", seeds=[2]), options=PaintOptions(out, replace=True))
    assert files(out).keys() == {"000000.png", "000099.png", "grid.png", "request.json", "samples.jsonl"}
    with Image.open(out / "000000.png") as one, Image.open(io.BytesIO(before["000006.png"])) as same:
        assert one.tobytes() == same.tobytes()


def test_asked_to_replace_and_killed_it_is_continued(painter: Path, tmp_path: Path) -> None:
    """--replace is for other requests: the same command, run again, must not begin anew."""
    options = PaintOptions(tmp_path, replace=True)
    paint(request(painter), options=options)
    (tmp_path / "000005.png").unlink()
    assert paint(request(painter), options=options).num_painted == 1


def test_files_of_others_stay(painter: Path, tmp_path: Path) -> None:
    (tmp_path / "000001.png").write_bytes(b"mine")
    with pytest.raises(ArraError, match=r"000001\.png is there, and is none of ours; choose another --out"):
        paint(request(painter), options=PaintOptions(tmp_path))
    (tmp_path / "samples.jsonl").write_text('{"file": "000001.png"}\n')
    with pytest.raises(ArraError, match=r"samples\.jsonl lists pictures, and no request\.json says what was asked for"):
        paint(request(painter), options=PaintOptions(tmp_path))
    assert files(tmp_path)["000001.png"] == b"mine"
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(ArraError, match=r"another request: request\.json is damaged; choose"):
        paint(request(painter), options=PaintOptions(tmp_path))
    assert paint(request(painter), options=PaintOptions(tmp_path, replace=True)).num_painted == 12


def test_a_damaged_picture_is_told(painter: Path, tmp_path: Path) -> None:
    options = PaintOptions(tmp_path, npz=True)
    paint(request(painter), options=options)
    before = files(tmp_path)
    (tmp_path / "samples.npz").unlink()
    (tmp_path / "000003.png").write_bytes(b"\x89PNG")
    with pytest.raises(ArraError, match=r"000003\.png: damaged; delete it, and run the same command again"):
        paint(request(painter), options=options)
    (tmp_path / "000003.png").unlink()
    paint(request(painter), options=options)
    assert files(tmp_path) == before


def test_jobs_of_an_array_share_the_work(painter: Path, tmp_path: Path) -> None:
    paint(request(painter), options=PaintOptions(tmp_path / "whole", npz=True))
    out = tmp_path / "out"
    told = []
    for part in (2, 0, 1):
        done = paint(request(painter), options=PaintOptions(out, part=(part, 3), batch_size=1, npz=True))
        told.append((done.num_painted, done.num_missing))
    assert told == [(4, 8), (4, 4), (4, 0)]
    assert files(out) == files(tmp_path / "whole")


def test_a_crash_of_several_is_continued_by_another_number(painter: Path, tmp_path: Path) -> None:
    paint(request(painter), options=PaintOptions(tmp_path / "whole"))
    out = tmp_path / "out"
    for part in (1, 4):
        assert "4 pictures of 12" not in paint(request(painter), options=PaintOptions(out, part=(part, 5))).summary()
    assert len(list(out.glob("samples.shard-*-of-5.jsonl"))) == 2
    (out / "samples.rank-1.jsonl").write_text((out / "samples.shard-1-of-5.jsonl").read_text())
    (out / "samples.shard-1-of-5.jsonl").unlink()
    done = paint(request(painter), options=PaintOptions(out))
    assert done.num_painted == 12 - 3 - 2
    assert files(out) == files(tmp_path / "whole")


def test_two_in_one_folder_are_refused(painter: Path, tmp_path: Path) -> None:
    """A lock belongs to a process, so the other one is a process."""
    samples = Samples(tmp_path, 1, lambda number: {})
    code = (
        "import sys; from pathlib import Path; from arra.stages.samples import Samples\n"
        "from arra.errors import ArraError\n"
        "try:\n    Samples(Path(sys.argv[1]), 1, dict).painting('').__enter__()\n"
        "except ArraError as error:\n    print(error)"
    )
    with samples.painting(""):
        told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout == (f"{tmp_path}: another process paints into this folder; wait for it, or use another folder\n")


@pytest.mark.parametrize(("count", "each"), [(12, [4, 4, 4]), (7, [3, 2, 2]), (2, [1, 1, 0]), (3, [1, 1, 1])])
def test_classes_are_balanced(painter: Path, tmp_path: Path, count: int, each: list[int]) -> None:
    wanted = request(painter, num_images=count, seeds=[10])
    done = paint(wanted, options=PaintOptions(tmp_path, npz=True))
    found = rows(tmp_path)
    assert [row["label"] for row in found] == [place % 3 for place in range(count)]
    assert [row["seed"] for row in found] == list(range(10, 10 + count))
    with np.load(tmp_path / "samples.npz") as packed:
        assert np.bincount(packed["label"], minlength=3).tolist() == each
    uneven = {7: "3 classes: the first gets 3 pictures, the others 2\n", 2: "3 classes: the first 2 get 1 picture, "}
    assert done.summary().startswith(uneven.get(count, f"{count} pictures in"))


def test_a_batch_that_does_not_fit_is_told_first(
    painter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 2.0**20)
    with pytest.raises(ArraError, match=r"^generate: batch_size: 12000 images together take .* there is room for \d+"):
        paint(request(painter, seeds=range(4000)), options=PaintOptions(tmp_path / "out", batch_size=20_000))
    assert not (tmp_path / "out").exists()
    paint(request(painter), options=PaintOptions(tmp_path / "out", batch_size=20_000))


def test_steps_of_fixed_shapes_paint_the_same(painter: Path, tmp_path: Path) -> None:
    for name, graphs in (("plain", False), ("fixed", True)):
        paint(request(painter), options=PaintOptions(tmp_path / name, graphs=graphs, batch_size=5))
    assert files(tmp_path / "plain") == files(tmp_path / "fixed")


def test_weights_for_a_tokenizer_that_has_its_own_are_refused(painter: Path, tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"^--tokenizer-weights vq.pt: the tokenizer .*tokenizer has its own; leave"):
        paint(request(painter, tokenizer_weights=Path("vq.pt")), options=PaintOptions(tmp_path / "out"))


def test_the_npz_is_the_pictures(painter: Path, tmp_path: Path) -> None:
    paint(request(painter), options=PaintOptions(tmp_path, npz=True, grid=False))
    assert not (tmp_path / "grid.png").exists()
    with np.load(tmp_path / "samples.npz") as packed:
        assert packed.files == ["arr_0", "label"]
        assert (packed["arr_0"].dtype, packed["arr_0"].shape) == (np.uint8, (12, 4, 4, 3))
        assert (packed["label"].dtype, packed["label"].tolist()) == (np.int64, [0] * 4 + [1] * 4 + [2] * 4)
        for place, image in enumerate(packed["arr_0"]):
            assert np.array_equal(image, np.asarray(Image.open(tmp_path / f"{place:06d}.png")))


def test_no_more_pictures_are_held_than_a_few_batches(
    painter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    generate = Engine.generate

    def watched(self: Engine, **inputs: Any) -> Any:
        counts.append(len(inputs["seeds"]))
        return generate(self, **inputs)

    monkeypatch.setattr(Engine, "generate", watched)
    wanted = request(painter, num_images=40, seeds=[0])
    paint(wanted, options=PaintOptions(tmp_path / "fast", batch_size=1))
    assert counts == [1, 2, 4, 8, 8, 8, 8, 1]
    counts.clear()
    monkeypatch.setattr(paint_stage, "SECONDS_AT_A_TIME", 0.0)  # a slow model
    paint(request(painter), options=PaintOptions(tmp_path / "slow", batch_size=5))
    assert counts == [5, 5, 2]
    assert isinstance(number(3, wanted).seeds, range)


def test_the_grid_shows_conditions_by_rows(painter: Path, tmp_path: Path) -> None:
    paint(request(painter), options=PaintOptions(tmp_path))
    with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / "000005.png") as picture:
        shown = np.asarray(grid)
        wanted = np.asarray(picture.resize((12, 12), Image.Resampling.NEAREST))
    windows = np.lib.stride_tricks.sliding_window_view(shown, (12, 12, 3))[:, :, 0]
    assert (windows == wanted).all((2, 3, 4)).any()


def test_a_split_of_the_run_s_own_store(pipeline: Any, tmp_path: Path) -> None:
    store = load_run(pipeline.aligned).store
    assert store is not None
    held_out = store.rows("heldout")
    wanted = PaintRequest(pipeline.aligned, Asked(split="heldout"), num_images=3, seeds=[1])
    paint(wanted, options=PaintOptions(tmp_path / "own"))
    assert [(row["prompt"], row["id"], row["seed"]) for row in rows(tmp_path / "own")] == [
        (*store.fields(int(row), "prompt", "id"), seed) for row, seed in zip(held_out[:3], (1, 2, 3), strict=True)
    ]
    named = PaintRequest(pipeline.aligned, Asked(split="heldout", store=str(pipeline.store)), num_images=3, seeds=[1])
    assert paint(named, options=PaintOptions(tmp_path / "own")).num_painted == 0  # the same request
    with pytest.raises(ArraError, match="no records in split 'tset'; it has heldout"):
        paint(PaintRequest(pipeline.aligned, Asked(split="tset")), options=PaintOptions(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_picture_is_read_as_the_run_s_own(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(pipeline.aligned)
    crop = loaded.recipe.data.crop.model_copy(update={"grey16": "range"})
    recipe = loaded.recipe.model_copy(update={"data": loaded.recipe.data.model_copy(update={"crop": crop})})
    monkeypatch.setattr(paint_stage, "load_painter", lambda *_, **__: replace(loaded, recipe=recipe))
    asked: list[Any] = []

    def read(*_: Any, grey16: str, **__: Any) -> Any:
        asked.append(grey16)
        raise ArraError("seen")

    monkeypatch.setattr(paint_stage, "read_given", read)
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ArraError, match="seen"):
        paint(PaintRequest(pipeline.aligned, Asked(prompts=("red circle",)), given=given_request(vary=path)))
    assert asked == ["range"]


def test_a_split_needs_a_store_of_the_model_s_classes(painter: Path, pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(ArraError, match="a model that no store belongs to; name the one whose split is meant, as in"):
        paint(PaintRequest(painter, Asked(split="heldout")), options=PaintOptions(tmp_path))
    asked = Asked(split="heldout", store=str(pipeline.store))
    with pytest.raises(ArraError, match="has no class"):
        paint(PaintRequest(painter, asked), options=PaintOptions(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("!?", "prompt '!?': no word in it; say what to paint"),
        ("the", "prompt 'the': no word in it; say what to paint"),
        ("red bar " * 30, "prompt 'red bar red bar red bar red bar red b...': "),
    ],
)
def test_prompts_that_make_no_picture_are_refused(pipeline: Any, tmp_path: Path, prompt: str, message: str) -> None:
    wanted = PaintRequest(pipeline.aligned, Asked(prompts=("red bar", prompt)))
    with pytest.raises(ArraError) as caught:
        paint(wanted, options=PaintOptions(tmp_path / "out"))
    line = str(caught.value)
    assert line.startswith(message)
    assert "say what to paint" in line or "tokens, this model has room for 7; shorten it" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--preset", "lamagen-c2i"], "preset 'lamagen-c2i': unknown; did you mean 'llamagen-c2i'?"),
        (["--cfg-schedule", "up"], "generate: cfg_schedule: "),
        (["--cfg-power", "0"], "generate: cfg_power: "),
        (["--keep", "top:0.5"], "--keep: belongs to --complete IMAGE"),
        (["--weights", "int3"], "--weights int3: unknown"),
        (["--num-images", "4", "--seeds", "0-3"], "--seeds 0-3: with --num-images every picture has its own"),
        (["--prompt", "x"], "generate: --label and --prompt do not go together"),
        (["--shard", "4/4"], "--shard 4/4: expected i/n"),
        (["--shard", "0/4", "--replace"], "generate: --replace and --shard do not go together"),
        (["--split", "test"], "generate: --split says what to paint"),
        (["--label", "3"], "--label 3: expected classes of 0..2"),
        (["--device", "abacus"], "device: 'abacus' is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    painter: Path, tmp_path: Path, run_arra: Callable[..., Any], options: list[str], line: str
) -> None:
    answer = run_arra("generate", painter, "--label", "0", "--out", tmp_path / "out", *options)
    assert answer.error.startswith(line)
    assert not (tmp_path / "out").exists()


def test_the_command(painter: Path, tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    out, asked = tmp_path / "out", ("--label", "all", "--num-images", 7, "--batch-size", 2)
    how = ("--cfg-schedule", "cosine", "--cfg-power", 2, "--cfg-start", 0.1, "--cfg-stop", 0.9, "--preset", "arra-fid")
    answer = run_arra("generate", painter, "--out", out, *asked, *how, "--npz", "--no-grid")
    assert (answer.code, answer.err) == (0, "")
    assert "generate: painting 7/7" in answer.out
    lines = answer.out.splitlines()
    assert lines[-2] == "3 classes: the first gets 3 pictures, the others 2"
    assert lines[-1].startswith(f"7 pictures in {out} (7 painted now, ")
    assert {name for name in files(out) if not name[0].isdigit()} == {"request.json", "samples.jsonl", "samples.npz"}
    keys = ("cfg_scale", "cfg_schedule", "cfg_power", "cfg_start", "cfg_stop", "top_k")
    assert [tuple(row[key] for key in keys) for row in rows(out)] == [(2.0, "cosine", 2.0, 0.1, 0.9, 0)] * 7
    assert "(7 there before)" in run_arra("generate", painter, "--out", out, *asked, *how, "--npz", "--no-grid").out
    assert "top_k" in run_arra("generate", painter, "--out", out, *asked, *how, "--top-k", 3).error


def test_a_given_picture_stays_where_it_is_kept(painter: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    (tmp_path / "given.png").write_bytes(file.getvalue())
    given = given_request(complete=tmp_path / "given.png", keep="top:0.5")
    paint(request(painter, "0", given=given), options=PaintOptions(tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert {(row["complete"], row["keep"], row["picture_sha256"]) for row in found} == {
        ("given.png", "top:0.5", file_hash(tmp_path / "given.png"))
    }
    other = given_request(complete=tmp_path / "given.png", keep="left:0.5")
    with pytest.raises(ArraError, match=r"another request: keep top:0\.5 there, now left:0\.5;"):
        paint(request(painter, "0", given=other), options=PaintOptions(tmp_path / "out"))


def test_what_is_said_at_the_end(tmp_path: Path) -> None:
    done = Painted(tmp_path, 100, 25, 10.0, 50)
    assert done.images_per_second == 2.5
    assert done.summary() == f"50 pictures of 100 in {tmp_path} (25 there before, 25 painted now, 2.5 images/s)"
