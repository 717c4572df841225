"""What is measured: folders, painted sets, archives, stores; what is read, how it is hashed, what is refused."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arra.data.images import center_crop
from arra.errors import ArraError
from arra.evaluate.sets import PictureSet
from arra.stages.npz_pictures import read_statistics
from arra.stages.picture_folders import Fit, chosen_rows
from arra.stages.picture_sets import open_reference, open_set
from arra.stages.samples import Samples

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)


def save(folder: Path, images: dict[str, np.ndarray]) -> Path:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def painted(folder: Path, facts: list[dict[str, Any]], *, num_images: int | None = None) -> Path:
    """A folder as `arra generate` leaves it."""
    save(folder, {f"{number:06d}.png": noise(4, 4) for number in range(len(facts))})
    save(folder, {"grid.png": noise(9, 9)})
    Samples(folder, len(facts), lambda number: facts[number]).merge()
    request = {"num_images": num_images or len(facts), "seeds": "0-1", "order": "in turn"}
    (folder / "request.json").write_text(json.dumps(request))
    return folder


def test_a_folder_is_read_by_name_whole_and_in_any_order(tmp_path: Path) -> None:
    images = {"b.png": noise(5, 7), "a/z.png": noise(4, 4), "a/.hidden.png": noise(2, 2), ".x/y.png": noise(2, 2)}
    save(tmp_path / "set", images)
    (tmp_path / "set/notes.json").write_text("{}")
    found = open_set(tmp_path / "set")
    assert isinstance(found, PictureSet)
    assert (list(found.ids), len(found), found.resize) == (["a/z.png", "b.png"], 2, "none")
    assert (found.prompts, found.labels, found.about) == (None, None, {})
    read = found.read([1, 0, 1])
    assert [
        np.array_equal(one, images[name]) for one, name in zip(read, ["b.png", "a/z.png", "b.png"], strict=True)
    ] == [True] * 3


def test_the_hash_is_of_pixels_and_order_not_of_names(tmp_path: Path) -> None:
    first, second = noise(4, 4), noise(4, 4)
    one = open_set(save(tmp_path / "one", {"a.png": first, "b.png": second})).content_hash()
    assert open_set(save(tmp_path / "two", {"x/1.png": first, "x/2.png": second})).content_hash() == one
    assert open_set(save(tmp_path / "three", {"a.png": second, "b.png": first})).content_hash() != one
    assert open_set(tmp_path / "one", image_size=2).content_hash() != one
    changed = first.copy()
    changed[3, 3, 2] ^= 1
    assert open_set(save(tmp_path / "one", {"a.png": changed})).content_hash() != one


def test_class_folders_and_texts_tell_labels_and_prompts(tmp_path: Path) -> None:
    classes = save(tmp_path / "classes", {f"{name}/{n}.png": noise(2, 2) for name in ("dog", "cat") for n in range(2)})
    found = open_set(classes)
    assert (found.labels, found.about["class_balance"]) == ([0, 0, 1, 1], "2 each of 2 classes")
    assert open_set(save(tmp_path / "splits", {"train/a.png": noise(2, 2), "val/b.png": noise(2, 2)})).labels is None
    only = open_set(tmp_path / "splits", split="validation")
    assert list(only.ids) == ["val/b.png"]
    texts = save(tmp_path / "texts", {"a.png": noise(2, 2), "b.png": noise(2, 2)})
    (texts / "b.txt").write_text("a blue bar\n")
    assert open_set(texts).prompts is None  # one alone says nothing about the set
    (texts / "a.txt").write_text("a red bar\n")
    assert open_set(texts).prompts == ["a red bar", "a blue bar"]


@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "lanczos", "box"])
def test_sizes_are_changed_as_pillow_does_and_told(tmp_path: Path, filter: Any) -> None:
    square, wide = noise(12, 12), noise(12, 20)
    found = open_set(save(tmp_path, {"a.png": square, "b.png": wide}), image_size=8, filter=filter)
    kind = Image.Resampling[filter.upper()]
    small = np.asarray(Image.fromarray(wide).resize((13, 8), kind))
    expected = [np.asarray(Image.fromarray(square).resize((8, 8), kind)), small[:, 2:10]]
    assert all(np.array_equal(*pair) for pair in zip(found.read([0, 1]), expected, strict=True))
    assert found.resize == f"several sizes -> 8 {filter} (Pillow), middle square"


def test_what_was_done_to_sizes_in_words() -> None:
    assert Fit(256).told([(384, 384)]) == "384 -> 256 bicubic (Pillow)"
    assert Fit(256).told([(256, 256)]) == "none"
    assert Fit(None).told([(3, 4), (9, 9)]) == "none"
    assert Fit(256).told([(256, 300)]) == "middle square of 256"
    assert Fit(256).told([(256, 256), (512, 384)]) == "512 x 384 -> 256 bicubic (Pillow), middle square"


def test_greys_of_16_bits_transparency_and_jpeg(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0x8080, np.uint16)).save(tmp_path / "a.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (2, 2), (10, 10, 10)).save(tmp_path / "c.jpg")
    found = open_set(tmp_path)
    assert [int(one[0, 0, 0]) for one in found.read([0, 1, 2])] == [128, 255, 10]
    assert found.about == {"jpeg_files": 1}


def test_some_pictures_are_the_same_of_every_set_and_of_all_classes() -> None:
    rows = chosen_rows(1000, 200)
    assert (len(rows), sorted(set(rows.tolist())), chosen_rows(5, 9).tolist()) == (200, rows.tolist(), [0, 1, 2, 3, 4])
    assert np.array_equal(rows, chosen_rows(1000, 200))
    assert set(chosen_rows(1000, 100)) < set(rows)
    assert len(set(rows % 10)) == 10  # classes in turn; evenly spaced rows would be of two


def test_fewer_pictures_are_told(tmp_path: Path) -> None:
    save(tmp_path, {f"{number}.png": noise(2, 2) for number in range(6)})
    found = open_set(tmp_path, max_images=4)
    assert (len(found), found.about["chosen"][:6]) == (4, "4 of 6")
    assert [found.read([row])[0].tolist() for row in range(4)] == [one.tolist() for one in found.read(range(4))]


def test_a_painted_set_comes_with_what_made_it(tmp_path: Path) -> None:
    facts = [
        {"prompt": f"a bar {n % 2}", "id": f"r{n % 2}", "seed": n // 2, "cfg_scale": 2.0, "top_k": None, "odd": n}
        for n in range(4)
    ]
    found = open_set(painted(tmp_path / "out", facts))
    assert list(found.ids) == [f"{n:06d}.png" for n in range(4)]  # and no grid.png
    assert found.prompts == ["a bar 0", "a bar 1"] * 2
    assert found.records == ["r0", "r1"] * 2
    assert found.about == {"cfg_scale": 2.0, "top_k": None, "seeds": "0-1", "order": "in turn"}
    assert len({one.tobytes() for one in found.read(range(4))}) == 4
    copied = save(tmp_path / "copied", {"grid.png": noise(9, 9), "000000.png": noise(4, 4)})
    assert (list(open_set(copied).ids), open_set(copied).about) == (["000000.png"], {"left_out": "grid.png"})


def test_the_same_condition_and_seed_twice_is_told(tmp_path: Path) -> None:
    facts = [{"label": label, "class": "x", "seed": 7} for label in (0, 0, 1)]
    found = open_set(painted(tmp_path, facts))
    assert found.about["same_condition_and_seed"] == 1
    assert (found.labels, found.about["class_balance"], found.prompts) == ([0, 0, 1], "1 to 2 each of 2 classes", None)


def test_an_unfinished_set_is_refused(tmp_path: Path) -> None:
    folder = painted(tmp_path / "few", [{"seed": 0}], num_images=5)
    with pytest.raises(ArraError, match=r"1 of 5 pictures are painted; run the arra generate that began it again$"):
        open_set(folder)
    (folder / "samples.rank-0.jsonl").write_text("")
    with pytest.raises(ArraError, match=r"1 lists of parts are not merged yet"):
        open_set(folder)
    (folder / "samples.rank-0.jsonl").unlink()
    (folder / "samples.jsonl").unlink()
    with pytest.raises(ArraError, match=r"not painted to the end \(no samples.jsonl yet\)"):
        open_set(folder)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"file": "../000000.png"}', "line 2: names no picture"),
        ('{"file": "000009.png"}', "line 2: picture '000009.png' does not exist"),
        ("{", "line 2: not JSON"),
        ("[]", "line 2: names no picture"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, line: str, told: str) -> None:
    folder = painted(tmp_path, [{"seed": 0}])
    with (folder / "samples.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ArraError, match=re.escape(told)):
        open_set(folder)


def test_a_picture_that_cannot_be_read_ends_it(tmp_path: Path) -> None:
    save(tmp_path, {"a.png": noise(4, 4), "b.png": noise(4, 4)})
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    with pytest.raises(ArraError, match=rf"^{tmp_path / 'b.png'}: not a readable image .*sets are measured whole$"):
        open_set(tmp_path).read([0, 1])
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ArraError, match=r"b.png"):  # sides are looked at before
        open_set(tmp_path, image_size=2)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("empty", "no pictures; expected files as .png"),
        ("missing", "missing: does not exist; expected a folder of pictures"),
        ("file.txt", "file.txt: is a file; expected a folder of pictures"),
        ("strange", "x.dcm: format .dcm is not read"),
        ("linked", "a.png: picture 'a.png' leaves"),
        ("folders", "away: a link that leaves"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path: Path, name: str, told: str) -> None:
    save(tmp_path / "other", {"a.png": noise(2, 2)})
    for made in ("empty", "strange", "linked", "folders"):
        (tmp_path / made).mkdir()
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "strange/x.dcm").write_text("")
    (tmp_path / "linked/a.png").symlink_to(tmp_path / "other/a.png")
    (tmp_path / "folders/away").symlink_to(tmp_path / "other")
    with pytest.raises(ArraError, match=re.escape(told)):
        open_set(tmp_path / name).read([0])


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "set", {"a.png": noise(2, 2)})
    for options, told in (
        ({"image_size": 0}, "--image-size 0"),
        ({"filter": "cubic"}, "--filter cubic: unknown; expected one of bicubic"),
        ({"max_images": 0}, "--max-images 0"),
        ({"split": "test"}, "no pictures in a folder of split 'test'"),
    ):
        with pytest.raises(ArraError, match=re.escape(told)):
            open_set(tmp_path / "set", **options)
    with pytest.raises(ArraError, match="--split test: of stores and runs"):
        open_set(painted(tmp_path / "painted", [{"seed": 0}]), split="test")


@pytest.mark.parametrize("packed", [False, True])
def test_an_npz_of_adm(tmp_path: Path, packed: bool) -> None:
    images, labels = noise(6, 12, 12), np.array([0, 1, 2, 0, 1, 2])
    (np.savez_compressed if packed else np.savez)(tmp_path / "set.npz", images, labels)  # ADM: arr_0, arr_1
    found = open_set(tmp_path / "set.npz")
    assert isinstance(found, PictureSet)
    assert np.array_equal(np.stack(found.read([5, 0, 3])), images[[5, 0, 3]])
    assert (found.labels, found.ids[5], found.resize) == (labels.tolist(), "5", "none")
    assert found.about == {"class_balance": "2 each of 3 classes"}
    other = tmp_path / "other.npz"
    np.savez(other, label=labels, arr_0=images)
    assert open_set(other).content_hash() == found.content_hash()
    np.savez(other, arr_0=images[::-1])
    assert open_set(other).content_hash() != found.content_hash()
    small = open_set(tmp_path / "set.npz", image_size=8, max_images=3)
    rows = chosen_rows(6, 3)
    expected = [np.asarray(Image.fromarray(images[row]).resize((8, 8), Image.Resampling.BICUBIC)) for row in rows]
    assert np.array_equal(np.stack(small.read([0, 1, 2])), np.stack(expected))
    assert (small.resize, small.labels) == ("12 -> 8 bicubic (Pillow)", labels[rows].tolist())


def test_our_own_npz_is_the_folder_it_was_made_of(tmp_path: Path) -> None:
    folder = painted(tmp_path / "out", [{"label": n, "seed": n} for n in range(3)])
    samples = Samples(folder, 3, lambda number: {})
    samples.write_npz([0, 1, 2])
    packed, files = open_set(folder / "samples.npz"), open_set(folder)
    assert np.array_equal(np.stack(packed.read(range(3))), np.stack(files.read(range(3))))
    assert packed.labels == files.labels == [0, 1, 2]


def statistics(size: int) -> tuple[np.ndarray, np.ndarray]:
    points = RANDOM.normal(size=(3 * size, size))
    return points.mean(0), np.cov(points, rowvar=False)


def test_published_statistics(tmp_path: Path) -> None:
    (mu, sigma), (mu_s, sigma_s) = statistics(4), statistics(3)
    np.savez(tmp_path / "ref.npz", arr_0=noise(2, 4, 4), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = open_reference(tmp_path / "ref.npz")
    assert found.pictures is not None
    assert found.statistics is not None
    assert (len(found.pictures), found.name) == (2, str(tmp_path / "ref.npz"))
    features, spatial = found.statistics.of("features", size=4), found.statistics.of("spatial", size=3)
    assert features is not None
    assert spatial is not None
    assert np.array_equal(features.mean, mu)
    assert np.allclose(spatial.covariance, sigma_s, rtol=1e-15)
    assert (features.count, found.statistics.of("logits", size=9)) == (None, None)
    with pytest.raises(ArraError, match=r"mu has 4 numbers, features of this space have 2048; .* another network$"):
        found.statistics.of("features", size=2048)
    np.savez(tmp_path / "fid.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    alone = open_reference(tmp_path / "fid.npz")
    assert alone.pictures is None
    assert alone.statistics is not None
    assert alone.name == str(tmp_path / "fid.npz")
    assert alone.statistics.of("spatial", size=3) is None
    assert alone.statistics.sha256 != found.statistics.sha256
    with pytest.raises(ArraError, match="holds statistics and no pictures; it can be a reference alone"):
        open_set(tmp_path / "fid.npz")
    np.savez(tmp_path / "only.npz", arr_0=noise(2, 4, 4))
    assert read_statistics(tmp_path / "only.npz") is None


GOOD = statistics(3)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"mu": GOOD[0]}, "no arr_0, found mu"),
        ({"mu": GOOD[0], "arr_0": noise(1, 2, 2)}, "mu alone; expected both mu and sigma"),
        ({"mu": GOOD[0][:2], "sigma": GOOD[1]}, "mu (2,) and sigma (3, 3) do not fit"),
        ({"mu": GOOD[0], "sigma": GOOD[1] * np.array([1, 1, np.nan])}, "sigma is float64 and not all finite"),
        ({"mu": GOOD[0], "sigma": GOOD[1] + np.triu(np.ones((3, 3)), 1)}, "sigma is no covariance"),
        ({"mu": GOOD[0], "sigma": -GOOD[1]}, "sigma is no covariance"),
        ({"mu": GOOD[0].astype(int), "sigma": GOOD[1]}, "mu is int64"),
        ({"arr_0": noise(1, 2, 2).astype(np.float32)}, "arr_0 is float32 (1, 2, 2, 3); expected uint8"),
        ({"arr_0": noise(4, 2, 2).transpose(0, 3, 1, 2).copy()}, "move the colours to the end"),
        ({"arr_0": noise(2, 2)}, "arr_0 is uint8 (2, 2, 3)"),
        ({"arr_0": noise(0, 2, 2)}, "arr_0 is uint8 (0, 2, 2, 3)"),
        ({"arr_0": noise(2, 2, 2), "label": np.zeros(3, int)}, "label of (3,) is larger than it can be"),
        ({"arr_0": noise(2, 2, 2), "label": np.zeros(2)}, "label is float64 (2,); expected whole numbers (2,)"),
        ({"arr_0": noise(2, 2, 2), "arr_1": np.zeros(1, int)}, "arr_1 is int64 (1,); expected whole numbers (2,)"),
        ({"other": noise(1, 2, 2)}, "no arr_0, found other"),
        ({"arr_0": np.asfortranarray(noise(4, 3, 2))}, "Fortran order"),
        ({"arr_0": np.array([{}])}, "an array of Python objects, which could run code"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_npz_that_is_not_as_it_should_be(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ArraError, match=re.escape(told)) as caught:
        open_reference(tmp_path / "x.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'x.npz'}: ")
    assert "\n" not in str(caught.value)


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(ArraError, match=r"x.npz: no such file"):
        open_set(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(ArraError, match=r"cannot be read as .npz"):
        open_set(path)
    np.savez_compressed(path, arr_0=noise(40, 8, 8))
    content = bytearray(path.read_bytes())
    content[900:920] = b"\0" * 20
    path.write_bytes(content)
    with pytest.raises(ArraError, match=r"cannot be read as .npz"):  # its checksum
        open_set(path)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 64, 64, 3)}
        )
        file.write(bytes(9))
    with pytest.raises(ArraError, match=r"arr_0 has 9 bytes, \(1000000, 64, 64, 3\) take 12288000000"):
        open_set(path)
    np.savez(path, arr_0=noise(4, 8, 8))
    found = open_set(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ArraError, match=r"cannot be read \(picture 3 has"):
        found.read([3])


def test_a_split_of_a_store(pipeline: Any) -> None:
    found = open_set(pipeline.store, split="heldout")
    assert isinstance(found, PictureSet)
    assert (len(found.ids), found.about["split"], found.labels) == (len(found), "heldout", None)
    assert found.resize == "center_crop(16), as in training (Pillow: box, bicubic)"
    order = [2, 0, 1]
    for row, image in zip(order, found.read(order), strict=True):
        with Image.open(pipeline.pictures / found.ids[row]) as original:
            assert np.array_equal(image, center_crop(original.convert("RGB"), 16))
    assert found.prompts is not None
    lines = [json.loads(line) for line in (pipeline.pictures / "metadata.jsonl").read_text().splitlines()]
    assert found.prompts[2] == next(line["text"] for line in lines if line["file_name"] == found.ids[2])
    of_run = open_set(pipeline.aligned, split="heldout")
    assert of_run.content_hash() == found.content_hash() == open_set(pipeline.store, split="heldout").content_hash()
    assert open_set(pipeline.store, split="train").content_hash() != found.content_hash()
    large = open_set(pipeline.store, split="heldout", image_size=24, max_images=2)
    assert (large.read([0])[0].shape, len(large)) == ((24, 24, 3), 2)
    assert large.content_hash() != found.content_hash()


def test_what_a_store_cannot_give_is_refused(pipeline: Any, toy_copy: Any) -> None:
    with pytest.raises(ArraError, match=r"a store; say which of its splits, as in --split "):
        open_set(pipeline.store)
    with pytest.raises(ArraError, match="no records in split 'novel'"):
        open_set(pipeline.store, split="novel")
    (toy_copy.store / "manifest.json").unlink()
    (toy_copy.aligned / "store.json").write_text("{}")
    with pytest.raises(ArraError, match=r"the store it was trained on is gone or has changed"):
        open_set(toy_copy.aligned, split="heldout")
