"""One crop for tokenizer and encoder: named by a line, the reference's pixels, and the same region at every size."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from arra.data.crops import Crop, CropSettings, Draw, choose_bucket, crop_sizes, describe
from arra.data.images import center_crop, cover, cover_size, middle
from arra.errors import ArraError

with np.load(Path(__file__).parent.parent / "golden" / "arra" / "crop.npz") as stored:
    GOLD = {key: np.asarray(stored[key]) for key in stored.files}
NOWHERE = Draw(0.0, 0.0, 0.0, 0.9)
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "center"},
    {"kind": "flip"},
    {"kind": "ten_crop", "range": 1.1},
    {"kind": "ten_crop", "range": (1.1, 1.05)},
    {"kind": "random", "min_fraction": 0.5},
    {"kind": "buckets", "patch": 8},
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom: a pixel tells where in the picture it lies."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    both = np.stack([np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))], axis=-1)
    return Image.fromarray(np.rint(np.concatenate([both, both[..., :1]], axis=-1) * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "center_crop(256)"),
        ({"grey16": "range"}, "center_crop(256, grey16=range)"),
        ({"kind": "flip"}, "flip(center_crop(256))"),
        ({"kind": "ten_crop", "range": 1.1}, "ten_crop(256, range=1.1)"),
        ({"kind": "ten_crop"}, "ten_crop(256, range=1)"),
        ({"kind": "ten_crop", "range": [1.1]}, "ten_crop(256, range=1.1)"),
        ({"kind": "ten_crop", "range": [1.1, 1.05]}, "ten_crop(256, range=1.1+1.05)"),
        ({"kind": "random"}, "random_crop(256, fraction=0.8..1, flip=0.5)"),
        ({"kind": "random", "min_fraction": 1, "flip_share": 0}, "random_crop(256, fraction=1..1, flip=0)"),
        ({"kind": "buckets"}, "buckets(256, patch=32, ratio<=4)"),
        ({"kind": "buckets", "patch": 16, "grey16": "range"}, "buckets(256, patch=16, ratio<=4, grey16=range)"),
    ],
)
def test_description(values: dict[str, Any], line: str) -> None:
    settings = CropSettings(**values)
    assert describe(settings, 256) == describe(settings, 256, at=256) == line
    elsewhere = describe(settings, 256, at=224)
    assert elsewhere == (line.replace("256", "224") if "center" in line else f"{line} at 224")


def test_descriptions_differ_where_pixels_may() -> None:
    settings = [
        *(CropSettings(**values) for values in KINDS),
        CropSettings(grey16="range"),
        CropSettings(kind="ten_crop", range=1.1000001),
        CropSettings(kind="random", min_fraction=0.5, flip_share=0.1),
        CropSettings(kind="buckets", patch=8, max_ratio=2),
    ]
    lines = {describe(each, size, at=at) for each in settings for size in (64, 128) for at in (None, 256)}
    two_sizes = sum(each.kind not in ("center", "flip") for each in settings)
    assert len(lines) == 2 * len(settings) + 2 * two_sizes + (len(settings) - two_sizes)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "center", "range": 1.1},
        {"kind": "flip", "flip_share": 0.1},
        {"kind": "ten_crop", "min_fraction": 0.5},
        {"kind": "random", "patch": 16},
        {"kind": "center", "max_ratio": 2},
    ],
)
def test_fields_of_another_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"belongs to 'kind: .*', the kind is '{values['kind']}'; remove it"):
        CropSettings(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "ten_crop", "range": 0.9},
        {"kind": "ten_crop", "range": math.nan},
        {"kind": "ten_crop", "range": [1.1, 0.9]},
        {"kind": "ten_crop", "range": []},
        {"kind": "ten_crop", "range": [1.1, 1.1]},
        {"kind": "center", "range": [1.1, 1.05]},
        {"kind": "random", "min_fraction": 0},
        {"kind": "random", "flip_share": 1.1},
        {"kind": "buckets", "max_ratio": math.inf},
        {"kind": "buckets", "patch": 0},
        {"kind": "middle"},
        {"grey16": "window"},
    ],
)
def test_senseless_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CropSettings(**values)


def test_settings_survive_writing_and_reading() -> None:
    for values in KINDS:
        settings = CropSettings(**values)
        assert CropSettings(**settings.model_dump()) == settings


@pytest.mark.parametrize(("width", "height"), [(100, 61), (32, 32), (31, 200), (7, 9)])
def test_center_and_flip(width: int, height: int) -> None:
    image = picture(width, height)
    for size in (16, 32, 48):
        views = Crop(CropSettings(), 32).views(image, size=size)
        np.testing.assert_array_equal(views, center_crop(image, size)[None])
        flipped = Crop(CropSettings(kind="flip"), 32).views(image, size=size)
        np.testing.assert_array_equal(flipped, np.stack([views[0], np.fliplr(views[0])]))


@pytest.mark.parametrize(("size", "scale", "whole", "half"), [(20, 1.25, 25, 2), (20, 1.1, 22, 1), (20, 1.35, 27, 4)])
def test_ten_crop_is_torchvisions(size: int, scale: float, whole: int, half: int) -> None:
    """Offsets of the middle crop are round(5 / 2) = 2 and round(7 / 2) = 4: halves go to the even number."""
    image = picture(whole, whole)
    far = whole - size

    def five(of: Image.Image) -> list[np.ndarray]:
        offsets = [(0, 0), (far, 0), (0, far), (far, far), (half, half)]  # left, top
        return [np.asarray(of.crop((left, top, left + size, top + size))) for left, top in offsets]

    expected = five(image) + five(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    crop = Crop(CropSettings(kind="ten_crop", range=scale), size)
    np.testing.assert_array_equal(crop.views(image), np.stack(expected))
    larger = picture(90, 71)
    square = Image.fromarray(center_crop(larger, whole))
    np.testing.assert_array_equal(crop.views(larger), crop.views(square))


def test_llamagens_ranges() -> None:
    """1.1 takes 281 and 422 pixels at 256 and 384, 1.05 takes 268 and 403."""
    for size, scale, whole in ((256, 1.1, 281), (384, 1.1, 422), (256, 1.05, 268), (384, 1.05, 403)):
        image = picture(whole, whole)
        last = Crop(CropSettings(kind="ten_crop", range=scale), size).views(image)[3]
        np.testing.assert_array_equal(last, np.asarray(image)[-size:, -size:])


def test_two_ranges_are_the_crops_of_one_and_of_the_other() -> None:
    image = picture(90, 71)
    both, *each = (Crop(CropSettings(kind="ten_crop", range=r), 32) for r in ((1.5, 1.05), 1.5, 1.05))
    assert both.num_variants == 20
    for size in (32, 48):
        expected = np.concatenate([crop.views(image, size=size) for crop in each])
        np.testing.assert_array_equal(both.views(image, size=size), expected)


def plain_random_crop(image: Image.Image, size: int, least: float, draw: Draw) -> np.ndarray:
    """ADM's random crop with its three random integers taken from `draw`."""
    sides = range(size, math.ceil(size / least) + 1)
    short = sides[math.floor(draw.zoom * len(sides))]
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    pixels = np.asarray(
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    )
    top = range(pixels.shape[0] - size + 1)[math.floor(draw.y * (pixels.shape[0] - size + 1))]
    left = range(pixels.shape[1] - size + 1)[math.floor(draw.x * (pixels.shape[1] - size + 1))]
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("least", [0.8, 0.5, 1.0])
def test_random_crop_is_adms(least: float) -> None:
    crop = Crop(CropSettings(kind="random", min_fraction=least), 16)
    chance = np.random.default_rng(3)
    for number in range(60):
        width, height = (int(side) for side in chance.integers(5, 90, 2))
        image = picture(width, height, seed=number)
        draw = Draw(*(float(value) for value in chance.random(4)))
        expected = plain_random_crop(image, 16, least, draw)
        expected = np.fliplr(expected) if draw.flip < 0.5 else expected
        np.testing.assert_array_equal(crop.views(image, draw=draw), expected[None])


def test_random_crops_reach_every_place_and_flip_as_often_as_asked() -> None:
    image = ramp(200, 100)
    crop = Crop(CropSettings(kind="random", min_fraction=0.5, flip_share=0.25), 20)
    widest = crop.views(image, draw=NOWHERE)[0]
    np.testing.assert_array_equal(widest, crop.views(image, draw=Draw(0.01, 0.01, 0.0, 0.25))[0])
    last = 1 - 1e-9
    np.testing.assert_array_equal(crop.views(image, draw=Draw(0.0, last, last, last))[0, :, -1, 0].max(), 252)
    closest = crop.views(image, draw=Draw(last, last, last, last))[0].astype(int)
    assert np.ptp(closest[..., 1]) < 0.55 * np.ptp(widest[..., 1].astype(int))
    np.testing.assert_array_equal(crop.views(image, draw=Draw(0.0, 0.0, 0.0, 0.24))[0], np.fliplr(widest))


def test_draws_lie_between_zero_and_one() -> None:
    for numbers in ((1.0, 0.0, 0.0, 0.0), (0.0, -0.1, 0.0, 0.0), (0.0, 0.0, math.nan, 0.0)):
        with pytest.raises(ValueError, match="numbers must lie in"):
            Draw(*numbers)
    with pytest.raises(ValueError, match="a random crop needs a draw"):
        Crop(CropSettings(kind="random"), 16).views(picture(20, 20))


@pytest.mark.parametrize(("target", "count"), [(256, 25), (512, 49), (768, 73), (1024, 97)])
def test_buckets_are_luminas(target: int, count: int) -> None:
    sizes = crop_sizes(target)
    assert len(sizes) == len(set(sizes)) == count
    np.testing.assert_array_equal(sizes, GOLD[f"crop_sizes_{target}"])
    chosen = [choose_bucket(int(width), int(height), sizes) for width, height in GOLD["picture_sides"]]
    np.testing.assert_array_equal(chosen, GOLD[f"chosen_crops_{target}"])
    assert choose_bucket(70, 70, [(64, 128), (128, 64), (32, 128)]) == (128, 64)
    crop = Crop(CropSettings(kind="buckets"), target)
    assert crop.buckets == sizes
    assert [crop.sides(int(width), int(height)) for width, height in GOLD["picture_sides"]] == chosen


@pytest.mark.parametrize("case", range(11))
def test_bucket_pixels_are_luminas(case: int) -> None:
    crop = Crop(CropSettings(kind="buckets", patch=16), 64)
    np.testing.assert_array_equal(crop.buckets, GOLD["toy_crop_size_list_target64_patch16"])
    views = crop.views(Image.fromarray(GOLD[f"in_{case}"]))
    np.testing.assert_array_equal(views, GOLD[f"lumina_var_center_crop_mid_{case}"][None])


@pytest.mark.parametrize(("case", "off_by"), [(3, 0), (4, 1), (9, 0), (10, 0)])
def test_oblong_crops_are_the_references(case: int, off_by: int) -> None:
    """Case 4 is tall; Pillow 13, the reference's, resizes tall pictures down first and across second, 12 never does."""
    width, height = (int(side) for side in GOLD[f"crop_{case}"])
    found = middle(Image.fromarray(GOLD[f"in_{case}"]), width=width, height=height)
    assert np.abs(found.astype(int) - GOLD[f"center_crop_{case}"]).max() <= off_by


@pytest.mark.parametrize("case", range(11))
def test_the_whole_that_a_crop_is_cut_from_is_luminas(case: int) -> None:
    """Its random offset lies between the two ends; case 4 is tall, see above."""
    image, (width, height) = Image.fromarray(GOLD[f"in_{case}"]), (int(side) for side in GOLD[f"crop_{case}"])
    whole = cover(image, width=width, height=height)
    far = whole.width - width, whole.height - height
    assert far == tuple(GOLD[f"lumina_offset_range_{case}"])
    assert whole.size == cover_size(image.size, width=width, height=height)
    for (left, top), name in (((0, 0), "low"), (far, "high")):
        found = np.asarray(whole.crop((left, top, left + width, top + height))).astype(int)
        assert np.abs(found - GOLD[f"lumina_center_crop_{name}_{case}"]).max() <= (case == 4)


@pytest.mark.parametrize("case", range(11))
def test_nothing_is_padded(case: int) -> None:
    """ARRA pads pictures to a square when it paints, and not when it trains: one and the same crop here, as trained.

    Padded first by hand, ours is theirs, so the border is all the difference.
    """
    image, (width, height) = Image.fromarray(GOLD[f"in_{case}"]), (int(side) for side in GOLD[f"crop_{case}"])
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    theirs = GOLD[f"center_resize_{case}"]
    np.testing.assert_array_equal(middle(square, width=width, height=height), theirs)
    crop = Crop(CropSettings(), width)
    if width == height:
        ours = crop.views(image)[0]
        assert (ours == theirs).all() == (image.width == image.height)
    white = Image.new("RGB", image.size, "white")
    assert crop.views(white).min() == 255


def test_arras_crop_for_training() -> None:
    """512 pixels whatever the target, of a picture of 64 x 48."""
    found = center_crop(Image.fromarray(GOLD["in_1"]), 512)
    np.testing.assert_array_equal(found[::16, ::16], GOLD["arra_var_center_crop_1_every16"])


def test_buckets_scale_with_the_encoders_area() -> None:
    """At 224 beside 512 a patch of 32 pixels becomes one of 14."""
    crop = Crop(CropSettings(kind="buckets"), 512)
    for width, height in ((512, 512), (1920, 1080), (100, 900)):
        across, down = crop.sides(width, height)
        assert crop.sides(width, height, size=224) == (across * 14 // 32, down * 14 // 32)
    assert crop.views(picture(90, 30), size=224).shape == (1, 126, 378, 3)


def test_buckets_need_whole_patches() -> None:
    with pytest.raises(ArraError, match="crop: image size 500 is no multiple of patch 32; change one of them"):
        Crop(CropSettings(kind="buckets"), 500)


@pytest.mark.parametrize("values", KINDS, ids=str)
@pytest.mark.parametrize(("width", "height"), [(400, 300), (170, 390)])
def test_every_size_shows_the_same_region(values: dict[str, Any], width: int, height: int) -> None:
    """A pixel of a ramp tells its place, so corners of the views must agree to about a pixel of the coarser one."""
    image = ramp(width, height)
    crop = Crop(CropSettings(**values), 64)
    chance = np.random.default_rng(0)
    for _ in range(8):
        draw = Draw(*(float(value) for value in chance.random(4)))
        base = crop.views(image, draw=draw).astype(float)
        assert base.shape[0] == crop.num_variants
        assert base.shape[2:0:-1] == crop.sides(width, height)
        for size in (40, 128):
            other = crop.views(image, size=size, draw=draw)
            assert other.shape[2:0:-1] == crop.sides(width, height, size=size)
            for view, seen in zip(base, other.astype(float), strict=True):
                for axis, channel in ((1, 0), (0, 1)):
                    left, right = (np.take(view[..., channel].mean(1 - axis), [0, -1]) for view in (view, seen))
                    step = np.abs(np.diff(view[..., channel].mean(1 - axis))).mean() * max(1, 64 / size)
                    assert np.abs(left - right).max() < 1.6 * step


@pytest.mark.parametrize("values", KINDS, ids=str)
def test_views_are_pure_and_fit_torch(values: dict[str, Any]) -> None:
    image = picture(75, 40)
    before = image.tobytes()
    crop = Crop(CropSettings(**values), 16)
    draw = Draw(0.3, 0.6, 0.9, 0.2)
    first, second = crop.views(image, draw=draw), crop.views(image, draw=draw)
    np.testing.assert_array_equal(first, second)
    assert image.tobytes() == before
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert first.flags.writeable
