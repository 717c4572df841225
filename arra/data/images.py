"""Pixels before any network: any PIL mode to upright RGB, and the resizing that every crop begins with.

Conversion comes before resizing, so palettes and 16-bit greys are resized as colours. Of pictures with several pages or
frames (TIFF, GIF, WebP, APNG) the first is taken. Colour profiles (ICC) are not applied: values are read as sRGB, as
the reference does. CMYK in JPEG is read as Adobe writes it (inverted), whoever wrote it; that is Pillow's rule.

Legend: H W pixels.
"""

import struct
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

Image.init()
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000") if name in Image.OPEN
)
"""Formats that are read, as far as Pillow has them; MPO counts as JPEG. Others are refused: some (EPS, PSD, ...) call
programs or are seldom fuzzed."""
MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused before decoding: they are decompression bombs or need a smaller copy."""
MAX_ASPECT = 100
"""Pictures longer than this are refused: their short side brought to a crop's size, the long one fills the memory."""

Grey16 = Literal["full", "range"]
"""How greys of more than 8 bits are scaled.

`full`: by all that the format can hold, so pictures keep their brightness relative to each other. `range`: each picture
by its own least and greatest value, for 12-bit data in 16-bit files (DICOM exports), which `full` leaves nearly black.
"""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation. `ImageOps.exif_transpose` also rewrites the metadata, and fails on odd ones."""
BROKEN_EXIF = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error)


def to_rgb(image: Image.Image, *, grey16: Grey16 = "full") -> Image.Image:
    """Upright 8-bit RGB; transparent parts become white, greys of more than 8 bits are scaled as `grey16` says.

    `full` scales 16-bit greys from 0..65535, 12-bit ones in TIFF from 0..4095. Floats and integers of 32 bits have no
    natural range: they are scaled from 0 to the least of 1 (floats only), 255 and 65535 that holds their greatest
    value; what lies beyond is cut. `range` scales from the least to the greatest finite value; a picture of one value
    has no range and goes by `full`. NaN becomes black. Pillow itself cuts colours of 16 bits, and greys with alpha, to
    8 bits, so `grey16` does not touch them.

    Raises:
        ValueError: no pixels, more than `MAX_PIXELS`, or one side more than `MAX_ASPECT` times the other.
        OSError: the file behind a picture not yet decoded is broken (Pillow's decoders raise other errors too).
    """
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"{width}x{height}: no pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}; make a smaller copy")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
    image.load()
    turn = _turn(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image, grey16)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no way from La to RGBA
    if image.has_transparency_data:
        try:
            seen = image.convert("RGBA")
        except TypeError as error:
            raise ValueError(f"mode {image.mode} with transparency {image.info.get('transparency')!r:.40}") from error
        image = Image.new("RGB", seen.size, "white")
        image.paste(seen, mask=seen)
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright; none where the EXIF data is broken, as viewers do."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BROKEN_EXIF:
        return None


def _eight_bits(image: Image.Image, grey16: Grey16) -> Image.Image:
    """The grey picture scaled to 8 bits; with alpha where the file names one value that is transparent."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    least, greatest = _window(values, grey16, (tags.get(BITSPERSAMPLE) or (16,))[0])
    grey = np.empty(values.shape, np.uint8)
    with np.errstate(invalid="ignore"):  # NaNs of the signalling kind
        for row, scaled in zip(values, grey, strict=True):  # row by row, as floats take 8 bytes a pixel
            wide = np.rint((row.astype(np.float64) - least) * 255 / (greatest - least))
            scaled[:] = np.clip(np.nan_to_num(wide, nan=0.0), 0, 255)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # least is white; Pillow minds it in 8 bits only
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _window(values: np.ndarray, grey16: Grey16, num_bits: int) -> tuple[float, float]:
    """The values that become black and white."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    least, greatest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if grey16 == "range" and least < greatest:
        return least, greatest
    if values.dtype.itemsize == 2:
        return 0.0, 2.0**num_bits - 1
    limits = (1.0, 255.0) if values.dtype.kind == "f" else (255.0,)
    return 0.0, next((limit for limit in limits if greatest <= limit), 65535.0)


def cover_size(sides: tuple[int, int], *, width: int, height: int) -> tuple[int, int]:
    """Width and height that `cover` gives to a picture of these sides."""
    across, down = sides
    while across >= 2 * width and down >= 2 * height:
        across, down = across // 2, down // 2
    scale = max(width / across, height / down)
    return round(across * scale), round(down * scale)


def cover(image: Image.Image, *, width: int, height: int) -> Image.Image:
    """The whole picture, resized until it just covers `width` x `height`.

    Halved by box while both sides are at least twice as long as needed, then bicubic.

    Source: the ADM crop, as LlamaGen `dataset/augmentation.py`, Lumina-mGPT and ARRA use it.
    """
    sides = cover_size(image.size, width=width, height=height)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image if image.size == sides else image.resize(sides, Image.Resampling.BICUBIC)


def middle(image: Image.Image, *, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """The middle `width` x `height` of the picture resized by `cover`."""
    image = cover(image, width=width, height=height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Centre square of the picture at `size` pixels."""
    return middle(image, width=size, height=size)
