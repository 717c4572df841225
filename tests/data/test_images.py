"""Any picture becomes upright RGB on white, and the crop is the one LlamaGen and ARRA use, pixel for pixel."""

import io
import random
import resource
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from arra.data.images import MAX_ASPECT, MAX_PIXELS, center_crop, to_rgb
from arra.data.records import decode_image
from tests.data.hostile import make_hostile_folder

with np.load(Path(__file__).parent.parent / "golden" / "arra" / "crop.npz") as stored:
    GOLD = {key: np.asarray(stored[key]) for key in stored.files}
CROPS = [case for case in range(11) if f"in_{case}" in GOLD and len(set(GOLD[f"crop_{case}"].tolist())) == 1]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image, **options: Any) -> np.ndarray:
    return np.asarray(to_rgb(image, **options)).astype(int)


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content)).astype(int)


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


@pytest.mark.parametrize("mode", ["L", "RGBA_opaque", "CMYK"])
def test_conversion_before_or_after_the_crop_is_the_same_where_nothing_is_transparent(mode: str) -> None:
    raw = GOLD[f"mode_{mode}_in"]
    image = Image.frombytes(mode.removesuffix("_opaque"), (raw.shape[1], raw.shape[0]), raw.tobytes())
    np.testing.assert_array_equal(center_crop(to_rgb(image), 16), GOLD[f"mode_{mode}_crop_rgb"])


def test_palette_agrees_with_the_reference() -> None:
    raw = GOLD["mode_P_in"]
    image = Image.frombytes("P", (raw.shape[1], raw.shape[0]), raw.tobytes())
    image.putpalette(GOLD["mode_P_palette"].tobytes())
    np.testing.assert_array_equal(pixels(image), GOLD["mode_P_rgb"])


def test_palette_with_a_transparent_entry() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    loaded = decoded(encode(image, transparency=1))
    assert loaded.tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]
    partly = decoded(encode(image, transparency=bytes([255, 0, 51])))  # alpha of entry 2 is a fifth
    assert partly[1, 0].tolist() == [218, 220, 222]
    assert partly[0, 1].tolist() == [255] * 3


def test_rgb_and_grey_with_a_transparent_colour() -> None:
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert decoded(encode(rgb, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = Image.fromarray(np.array([[9, 7]], dtype=np.uint8))
    assert decoded(encode(grey, transparency=9)).tolist() == [[[255] * 3, [7] * 3]]
    wide = Image.fromarray(np.array([[0, 1000, 65535, 514]], dtype=np.uint16))
    assert decoded(encode(wide, transparency=1000))[0, :, 0].tolist() == [0, 255, 255, 2]


def test_alpha_is_laid_on_white() -> None:
    """Every colour at every alpha, rounded once; premultiplied ones as far as they can be undone."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    expected = np.floor((value * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    rgba = Image.fromarray(np.stack([value, value, value, alpha], axis=-1).astype(np.uint8))
    np.testing.assert_array_equal(pixels(rgba)[..., 0], expected)
    la = Image.fromarray(np.stack([value, alpha], axis=-1).astype(np.uint8))
    np.testing.assert_array_equal(pixels(la)[..., 0], expected)
    assert np.abs(pixels(rgba.convert("RGBa"))[..., 0] - expected).max() <= 1
    assert np.abs(pixels(la.convert("La"))[..., 0] - expected).max() <= 1
    assert pixels(Image.new("RGBX", (1, 1), (1, 2, 3, 0))).tolist() == [[[1, 2, 3]]]  # X is no alpha


def test_a_palette_with_alpha_beside_it() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([(1, 255), (1, 0)])
    assert pixels(image).tolist() == [[[40, 50, 60], [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_scaled(kind: str) -> None:
    raw = np.array([[0, 128, 129, 255, 256, 32639, 32768, 65535]], dtype=np.uint16)
    loaded = decoded(encode(Image.fromarray(raw), kind))
    assert loaded[0, :, 0].tolist() == [0, 0, 1, 1, 1, 127, 128, 255]
    assert np.ptp(loaded, axis=2).max() == 0


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_byte_order_of_sixteen_bits(mode: str) -> None:
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (3, 1), np.array([[0, 257, 65535]], dtype=order).tobytes())
    assert pixels(image)[0, :, 0].tolist() == [0, 1, 255]
    assert pixels(image, grey16="range")[0, :, 0].tolist() == [0, 1, 255]


def test_twelve_bits_in_a_sixteen_bit_file() -> None:
    """`full` leaves a DICOM export nearly black; `range` spreads it over what it has, whatever the mode."""
    raw = np.array([[100, 1100, 2100, 4100]])
    for image in (
        Image.fromarray(raw.astype(np.uint16)),
        Image.fromarray(raw.astype(np.int32)),
        Image.fromarray(raw.astype(np.float32)),
        Image.fromarray((raw - 1100).astype(np.int32)),  # Hounsfield units go below 0
    ):
        assert pixels(image, grey16="range")[0, :, 0].tolist() == [0, 64, 128, 255]
    assert pixels(Image.fromarray(raw.astype(np.uint16)))[0, :, 0].tolist() == [0, 4, 8, 16]
    eight = Image.fromarray(np.array([[10, 20]], dtype=np.uint8))
    assert pixels(eight, grey16="range")[0, :, 0].tolist() == [10, 20]  # eight bits are never stretched


@pytest.mark.parametrize("value", [0, 300, 65535])
def test_a_picture_of_one_value_has_no_range(value: int) -> None:
    image = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
    np.testing.assert_array_equal(pixels(image, grey16="range"), pixels(image))


def tiff(values: np.ndarray, *, bits: int, white: int) -> bytes:
    """A grey TIFF file with that many bits a sample; `white` 0 means that 0 is white."""
    bitstring = "".join(f"{value:0{bits}b}" for value in values.ravel().tolist())
    data = int(bitstring, 2).to_bytes(len(bitstring) // 8, "big")
    data = values.astype("<u2").tobytes() if bits == 16 else data
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, white), (273, 122), (277, 1), (278, height)]
    entries = [(tag, 3, 1, value) for tag, value in tags] + [(279, 4, 1, len(data))]
    return b"II*\0" + struct.pack("<IH", 8, 9) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4) + data


def test_what_tiff_says_of_its_greys() -> None:
    """Pillow minds neither 12 bits, which would come out nearly black, nor white as 0 above 8 bits."""
    values = np.array([[0, 2048, 4095, 16]])
    assert decoded(tiff(values, bits=12, white=1))[0, :, 0].tolist() == [0, 128, 255, 1]
    wide = np.array([[0, 32768, 65535, 257]])
    assert decoded(tiff(wide, bits=16, white=1))[0, :, 0].tolist() == [0, 128, 255, 1]
    assert decoded(tiff(wide, bits=16, white=0))[0, :, 0].tolist() == [255, 127, 0, 254]
    with Image.open(io.BytesIO(tiff(values, bits=16, white=0))) as image:
        assert pixels(image, grey16="range")[0, :, 0].tolist() == [255, 127, 0, 254]


def test_wide_integers_and_floats() -> None:
    """Read from 0 to the least of 1 (floats), 255, 65535 that holds them all; the rest is cut."""
    for values, dtype, expected in (
        ([-5, 0, 32768, 65535, 10**6], np.int32, [0, 0, 128, 255, 255]),
        ([0, 7, 255], np.int32, [0, 7, 255]),
        ([0, 1], np.int32, [0, 1]),
        ([-2.0, 0.0, 0.5, 1.0], np.float32, [0, 0, 128, 255]),
        ([-1.0, 0.0, 127.6, 255.0], np.float32, [0, 0, 128, 255]),
        ([0.0, 257.0, 1e9], np.float32, [0, 1, 255]),
        ([np.nan, np.inf, -np.inf, 0.0, 51.0], np.float32, [0, 255, 0, 0, 51]),
        ([np.nan, np.nan], np.float32, [0, 0]),
    ):
        image = Image.fromarray(np.array([values], dtype=dtype))
        assert image.mode in ("I", "F")
        assert pixels(image)[0, :, 0].tolist() == expected
    odd = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, -3e38, 3e38, 0.0]], dtype=np.float32))
    assert pixels(odd, grey16="range")[0, :, 0].tolist() == [0, 255, 0, 0, 255, 128]


def test_cmyk_in_jpeg_is_read_as_adobe_writes_it() -> None:
    colors = Image.fromarray(noise(4, 4, 3)).resize((64, 64), Image.Resampling.NEAREST)
    content = encode(colors.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in content
    assert np.abs(decoded(content) - np.asarray(colors)).mean() < 2


def test_lab_is_read_as_colour() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    colors = Image.fromarray(np.array([[[220, 60, 50], [60, 180, 90], [90, 90, 200], [128] * 3]], dtype=np.uint8))
    image = ImageCms.profileToProfile(colors, srgb, lab, outputMode="LAB")
    assert image is not None
    assert np.abs(decoded(encode(image, "TIFF")) - np.asarray(colors)).max() <= 6


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "MPO"])
def test_of_several_pages_the_first_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (20, 16), color) for color in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(first, kind, save_all=True, append_images=[second], **options)
    assert np.abs(decoded(content) - np.asarray(first)).max() <= (1 if kind == "MPO" else 0)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"],
)
def test_white_stays_white_in_every_mode(mode: str) -> None:
    white: Any = {
        "I;16": 65535,
        "I": 255,
        "F": 255.0,
        "La": (255, 255),
        "LAB": (255, 128, 128),
        "RGBa": (255,) * 4,
    }.get(mode)
    through = Image.new("RGBA" if mode == "PA" else "RGB", (5, 4), "white")
    start = through.convert(mode) if white is None else Image.new(mode, (5, 4), white)
    rgb = to_rgb(start)
    assert (rgb.mode, rgb.size) == ("RGB", (5, 4))
    assert np.asarray(rgb).min() >= (254 if mode == "LAB" else 255)


@pytest.mark.parametrize("mark", [None, 0, 1, 254, 255, 65536, -1, b"", b"\0\x80", (1, 2, 3), "x"])
def test_modes_with_any_mark_of_transparency_give_rgb_or_a_value_error(mark: Any) -> None:
    for mode in Image.MODES:
        for grey16 in ("full", "range"):
            image = Image.new(mode, (5, 4))
            if mark is not None:
                image.info["transparency"] = mark
            with suppress(ValueError):
                assert to_rgb(image, grey16=grey16).mode == "RGB"
            assert mark is not None or to_rgb(image, grey16=grey16).size == (5, 4)


UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_every_exif_orientation_is_undone(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    upright = Image.fromarray(noise(20, 31, 3))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    options |= {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    for orientation in range(1, 9):
        stored_as = upright.transpose(UNDO[orientation]) if orientation in UNDO else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        loaded = decoded(encode(stored_as, kind, exif=exif, **options))
        assert loaded.shape == (20, 31, 3)
        assert np.abs(loaded - np.asarray(upright)).max() <= (3 if kind == "AVIF" else 0), orientation


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "F", "LA"])
def test_orientation_is_undone_in_every_mode(mode: str) -> None:
    image = Image.fromarray(noise(6, 9)).convert("L")
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(image.transpose(UNDO[6]), "TIFF", exif=exif)
    np.testing.assert_array_equal(decoded(turned), pixels(image))


def test_broken_exif_loses_no_picture() -> None:
    image = Image.fromarray(noise(6, 9, 3))
    for exif in (
        b"Exif\0\0garbage",
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02abcd",
    ):
        np.testing.assert_array_equal(decoded(encode(image, exif=exif)), np.asarray(image))
        assert decode_image(encode(image, "JPEG", exif=exif)).size == (9, 6)


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
    with pytest.raises(ValueError, match=r"not a readable image .*pixels") as caught:
        decode_image(png_claiming(side, side))
    assert "\n" not in str(caught.value)


def test_needles_are_refused() -> None:
    """A picture of one row would be scaled to the crop's height, and to gigabytes of width."""
    with pytest.raises(ValueError, match=f"one side is more than {MAX_ASPECT} times the other"):
        decode_image(encode(Image.new("L", (MAX_ASPECT + 1, 1))))
    assert decode_image(encode(Image.new("L", (1, MAX_ASPECT)))).size == (1, MAX_ASPECT)
    with pytest.raises(ValueError, match="0x5: no pixels"):
        to_rgb(Image.new("RGB", (0, 5)))


def test_one_pixel_is_a_picture() -> None:
    image = decode_image(encode(Image.new("RGB", (1, 1), "red")))
    assert center_crop(image, 16).reshape(-1, 3).tolist() == [[255, 0, 0]] * 256


@pytest.mark.parametrize("content", [b"", b"no image", png_claiming(4, 4)], ids=["empty", "text", "no-pixels"])
def test_unreadable_pictures_are_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a readable image \(.+\)$"):
        decode_image(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_one_line(kind: str) -> None:
    """Whatever a damaged file makes Pillow do, the caller meets one line (and no warnings)."""
    chance = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    whole = encode(Image.fromarray(noise(20, 24, 3)), kind, **options)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 2, 5])):
            damaged[chance.randrange(chance.choice([60, len(damaged)]))] = chance.randrange(256)
        cut = len(damaged) if chance.random() < 0.7 else chance.randrange(len(damaged))
        with suppress(ValueError):
            assert decode_image(bytes(damaged[:cut])).mode == "RGB"


def test_hostile_pictures_end_as_expected(tmp_path: Path) -> None:
    """Each is a picture or one line, quickly and in little memory; what only captions spoil is a sound picture here."""
    folder = make_hostile_folder(tmp_path / "set", count=600)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for item in folder.items:
        if item.file is None:
            continue
        reason, image = "", None
        try:
            image = decode_image(item.file.read_bytes())
        except ValueError as error:
            reason = str(error)
        spoilt_elsewhere = "caption" in item.kind or "split" in item.kind
        assert (image is None) == bool(reason)
        assert item.expected == "either" or (image is not None) == (item.expected == "good" or spoilt_elsewhere), item
        assert "\n" not in reason
        assert image is None or image.mode == "RGB"
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_hostile_items_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second, other = (make_hostile_folder(tmp_path / f"{n}" / "set", count=300, seed=n // 2) for n in range(3))
    assert len({item.id for item in first.items}) == len(first.items) == 300
    for one, two in zip(first.items, second.items, strict=True):
        assert (one.kind, one.name, one.expected) == (two.kind, two.name, two.expected)
        assert one.file is None or two.file is None or one.file.read_bytes() == two.file.read_bytes()
    assert (first.path / "metadata.jsonl").read_bytes() == (second.path / "metadata.jsonl").read_bytes()
    assert (first.path / "00001.png").read_bytes() != (other.path / "00001.png").read_bytes()
