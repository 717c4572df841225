"""Any picture becomes upright RGB on white, and the crop is the one LlamaGen and ARRA use, pixel for pixel."""

import io
import random
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arra.data.images import MAX_ASPECT, MAX_PIXELS, center_crop, to_rgb
from arra.data.records import Record, load_image
from arra.errors import ArraError

with np.load(Path(__file__).parent.parent / "golden" / "arra" / "crop.npz") as stored:
    GOLD = {key: np.asarray(stored[key]) for key in stored.files}
CROPS = sorted(int(key.removeprefix("crop_")) for key in GOLD if key.startswith("crop_"))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_record(image: Image.Image, kind: str = "PNG", **options: Any) -> Record:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Record("one", "a picture", "train", buffer.getvalue())


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(image)).astype(int)


@pytest.mark.parametrize("case", CROPS)
def test_crop_is_the_reference_crop(case: int) -> None:
    ours = center_crop(Image.fromarray(GOLD[f"in_{case}"]), int(GOLD[f"crop_{case}"][0]))
    np.testing.assert_array_equal(ours, GOLD[f"center_crop_{case}"])


def plain_crop_sizes(width: int, height: int, size: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Every size the crop resizes to, and its offset (left, top): the arithmetic of the ADM crop written out."""
    steps = []
    while width >= 2 * size and height >= 2 * size:
        width, height = width // 2, height // 2
        steps.append((width, height))
    factor = size / (width if width < height else height)
    if factor != 1:
        width, height = round(width * factor), round(height * factor)
        steps.append((width, height))
    return steps, ((width - size) // 2, (height - size) // 2)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (300, 200, 32),
        (64, 64, 32),
        (63, 127, 32),
        (128, 129, 32),
        (32, 32, 32),
        (31, 500, 32),
        (7, 3, 16),
        (32, 33, 32),
    ],
)
def test_crop_arithmetic(width: int, height: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[int, int], int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, to: tuple[int, int], resample: int) -> Image.Image:
        asked.append((to, resample))
        return resize(self, to, resample)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = Image.fromarray(noise(height, width, 3))
    found = center_crop(image, size)
    steps, (left, top) = plain_crop_sizes(width, height, size)
    assert [to for to, _ in asked] == steps
    kinds = [kind for _, kind in asked]
    assert kinds == [Image.Resampling.BOX] * (len(kinds) - 1) + kinds[-1:]
    for to, kind in asked:
        image = resize(image, to, kind)
    np.testing.assert_array_equal(found, np.asarray(image)[top : top + size, left : left + size])


def test_crop_of_its_own_size_changes_nothing() -> None:
    image = noise(16, 16, 3)
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), 16), image)


@pytest.mark.parametrize(
    ("mode", "off_by"), [("L", 0), ("RGBA_opaque", 0), ("1", 0), ("CMYK", 0), ("RGBA", 1), ("LA", 1)]
)
def test_modes_agree_with_the_reference(mode: str, off_by: int) -> None:
    """Exactly where nothing is transparent; elsewhere we round where the reference truncates."""
    raw = GOLD[f"mode_{mode}_in"]
    if mode == "1":
        image = Image.fromarray(raw)
    else:
        image = Image.frombytes(mode.removesuffix("_opaque"), (raw.shape[1], raw.shape[0]), raw.tobytes())
    difference = pixels(image) - GOLD[f"mode_{mode}_rgb"]
    assert np.abs(difference).max() <= off_by


def test_palette_agrees_with_the_reference() -> None:
    raw = GOLD["mode_P_in"]
    image = Image.frombytes("P", (raw.shape[1], raw.shape[0]), raw.tobytes())
    image.putpalette(GOLD["mode_P_palette"].tobytes())
    np.testing.assert_array_equal(pixels(image), GOLD["mode_P_rgb"])


def test_palette_with_a_transparent_entry() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    loaded = load_image(as_record(image, transparency=1))
    assert np.asarray(loaded).tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]
    partly = load_image(as_record(image, transparency=bytes([255, 0, 51])))  # alpha of entry 2 is a fifth
    assert np.asarray(partly)[1, 0].tolist() == [218, 220, 222]
    assert np.asarray(partly)[0, 1].tolist() == [255] * 3


def test_rgb_and_grey_with_a_transparent_colour() -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    loaded = load_image(as_record(rgb, transparency=(1, 2, 3)))
    assert np.asarray(loaded).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = Image.fromarray(np.array([[9, 7]], dtype=np.uint8))
    assert np.asarray(load_image(as_record(grey, transparency=9))).tolist() == [[[255] * 3, [7] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled(kind: str) -> None:
    raw = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(as_record(Image.fromarray(raw), kind))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert np.ptp(np.asarray(loaded), axis=2).max() == 0


def test_big_endian_sixteen_bit_greys() -> None:
    raw = np.array([[0, 256, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), raw.tobytes())
    assert pixels(image)[0, :, 0].tolist() == [0, 1, 255]


def test_wide_integers_and_floats() -> None:
    """32-bit integers are read as 16-bit greys unless all fit 8 bits; floats are taken as 0..255."""
    wide = Image.fromarray(np.array([[-5, 0, 32768, 65535, 10**6]], dtype=np.int32))
    assert wide.mode == "I"
    assert pixels(wide)[0, :, 0].tolist() == [0, 0, 127, 255, 255]
    assert pixels(Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32)))[0, :, 0].tolist() == [0, 7, 255]
    floats = Image.fromarray(np.array([[-1.0, 0.0, 127.6, 255.0, 1e9, np.nan, np.inf]], dtype=np.float32))
    assert pixels(floats)[0, :, 0].tolist() == [0, 0, 127, 255, 255, 0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_white_stays_white_in_every_mode(mode: str) -> None:
    white = {"I;16": 65535, "I": 255, "F": 255.0}.get(mode)
    start = Image.new("RGB", (5, 4), "white").convert(mode) if white is None else Image.new(mode, (5, 4), white)
    rgb = to_rgb(start)
    assert (rgb.mode, rgb.size) == ("RGB", (5, 4))
    assert np.asarray(rgb).min() == 255


def test_every_exif_orientation_is_undone() -> None:
    upright = Image.fromarray(noise(20, 31, 3))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation in range(1, 9):
        stored_as = upright.transpose(undo[orientation]) if orientation in undo else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        loaded = load_image(as_record(stored_as, exif=exif))
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(upright), err_msg=str(orientation))


def png_claiming(width: int, height: int) -> bytes:
    """A tiny PNG file whose header promises these sides."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 13_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    """Above our limit, above Pillow's warning and above Pillow's own refusal."""
    assert side**2 > MAX_PIXELS
    with pytest.raises(ArraError, match="record 'bomb': not a readable image") as caught:
        load_image(Record("bomb", "a bomb", "train", png_claiming(side, side)))
    assert "\n" not in str(caught.value)


def test_needles_are_refused() -> None:
    """A picture of one row would be scaled to the crop's height, and to gigabytes of width."""
    with pytest.raises(ArraError, match=f"one side is more than {MAX_ASPECT} times the other"):
        load_image(as_record(Image.new("L", (MAX_ASPECT + 1, 1))))
    assert load_image(as_record(Image.new("L", (1, MAX_ASPECT)))).size == (1, MAX_ASPECT)


@pytest.mark.parametrize("content", [b"", b"no image", png_claiming(4, 4)], ids=["empty", "text", "no-pixels"])
def test_unreadable_pictures_name_their_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ArraError, match=r"broken\.png: not a readable image .*; replace it or remove its line"):
        load_image(Record("broken", "x", "train", path))


def test_a_missing_file_names_record_and_path(tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"gone\.png: image of record 'r1' cannot be read"):
        load_image(Record("r1", "x", "train", tmp_path / "gone.png"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_one_line(kind: str) -> None:
    """Whatever a damaged file makes Pillow do, the user reads one line (and no warnings)."""
    chance = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    whole = as_record(Image.fromarray(noise(20, 24, 3)), kind, **options).image
    assert isinstance(whole, bytes)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 2, 5])):
            damaged[chance.randrange(chance.choice([60, len(damaged)]))] = chance.randrange(256)
        cut = len(damaged) if chance.random() < 0.7 else chance.randrange(len(damaged))
        with suppress(ArraError):
            assert load_image(Record("r", "x", "train", bytes(damaged[:cut]))).mode == "RGB"
