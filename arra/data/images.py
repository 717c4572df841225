"""Pixels before any network: any PIL mode to upright RGB, and the one crop that tokenizer and encoder share.

Legend: H W pixels.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused before decoding: they are decompression bombs or need a smaller copy."""
MAX_ASPECT = 100
"""Pictures longer than this are refused: their short side brought to a crop's size, the long one fills the memory."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB; transparent parts become white, 16-bit greys are scaled to 8 bits.

    Raises:
        ValueError: more than `MAX_PIXELS` pixels, or one side more than `MAX_ASPECT` times the other.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width}x{image.height}: one side is more than {MAX_ASPECT} times the other")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255.0 / 65535.0 if image.mode == "I" and values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Centre square at `size` pixels: halved by box while both sides are at least twice the size, then bicubic.

    Source: the ADM crop, as LlamaGen `dataset/augmentation.py` and ARRA use it.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
