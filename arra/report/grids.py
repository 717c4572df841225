"""Grids of pictures with labels and captions: the same prompts and seeds for several models, side by side.

Place in the pipeline: takes pictures as arrays (from sample/ or the data store); the README, previews and
`report/page.py` show what comes back. Pictures are uint8 RGB and are enlarged by whole factors without smoothing: what
one sees is what the model made. Captions are drawn with the font inside Pillow, which covers Latin text.

Letters: R rows (prompts), S pictures per row (seeds), H height, W width.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from arra.errors import ArraError

SCALE = 3

_PAPER, _INK, _FAINT = (255, 255, 255), (34, 37, 42), (112, 118, 128)
_LABEL_SIZE, _CAPTION_SIZE = 15, 14
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class GridColumn:
    """A labelled group of pictures: row r shows the S pictures that one model made of prompt r."""

    label: str
    images: UInt8[np.ndarray, "R S H W 3"]
    color: str | None = None


def sample_grid(columns: Sequence[GridColumn], *, captions: Sequence[str], scale: int = SCALE) -> Image.Image:
    """The grid with labels on top and each row's caption under it.

    Raises: ArraError when the columns do not hold one row per caption.
    """
    return _grid(columns, captions=captions, scale=scale, place="under")


def readme_grid(columns: Sequence[GridColumn], *, captions: Sequence[str], scale: int = SCALE) -> Image.Image:
    """The compact grid of a README: one line per prompt, caption at the left, e.g. reconstruction | baseline | aligned.

    Raises: ArraError when the columns do not hold one row per caption.
    """
    return _grid(columns, captions=captions, scale=scale, place="left")


def strip(images: UInt8[np.ndarray, "S H W 3"], *, scale: int = SCALE) -> Image.Image:
    """The pictures side by side with a gap of one source pixel, transparent between them."""
    num, height, width = images.shape[:3]
    gap = scale
    canvas = Image.new("RGBA", (num * width * scale + (num - 1) * gap, height * scale))
    for i, picture in enumerate(images):
        canvas.paste(_enlarged(picture, scale), (i * (width * scale + gap), 0))
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """The image as an optimised PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """A `data:image/png;base64,...` address of the image."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def _grid(
    columns: Sequence[GridColumn], *, captions: Sequence[str], scale: int, place: Literal["under", "left"]
) -> Image.Image:
    for column in columns:
        if len(column.images) != len(captions):
            raise ArraError(f"grid: column {column.label!r} has {len(column.images)} rows for {len(captions)} captions")
    label_font, caption_font = ImageFont.load_default(size=_LABEL_SIZE), ImageFont.load_default(size=_CAPTION_SIZE)
    margin, gap, column_gap = 16, scale, 20
    sizes = [(column.images.shape[3] * scale, column.images.shape[2] * scale) for column in columns]
    widths = [
        max(column.images.shape[1] * (width + gap) - gap, int(label_font.getlength(column.label)) + 4)
        for column, (width, _) in zip(columns, sizes, strict=True)
    ]
    row_height = max(height for _, height in sizes)
    header, under = 34, 2 * 18 + 14
    pictures_width = sum(widths) + column_gap * (len(columns) - 1)
    aside = 150 if place == "left" else 0
    row_step = row_height + (under if place == "under" else 10)
    total = (2 * margin + aside + pictures_width, 2 * margin + header + row_step * len(captions))
    canvas = Image.new("RGB", total, _PAPER)
    draw = ImageDraw.Draw(canvas)

    left = margin + aside
    for column, (width, height), span in zip(columns, sizes, widths, strict=True):
        draw.text((left, margin), column.label, font=label_font, fill=column.color or _INK)
        for r, row in enumerate(column.images):
            top = margin + header + r * row_step
            for s, picture in enumerate(row):
                canvas.paste(_enlarged(picture, scale), (left + s * (width + gap), top + (row_height - height) // 2))
        left += span + column_gap

    for r, caption in enumerate(captions):
        top = margin + header + r * row_step
        room = pictures_width if place == "under" else aside - 14
        lines = _wrapped(caption, font=caption_font, room=room, num_lines=2 if place == "under" else 4)
        offset = row_height + 6 if place == "under" else (row_height - 18 * len(lines)) // 2
        for i, line in enumerate(lines):
            draw.text((margin, top + offset + 18 * i), line, font=caption_font, fill=_FAINT)
    return canvas


def _enlarged(picture: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _wrapped(text: str, *, font: _Font, room: int, num_lines: int) -> list[str]:
    """The text in at most `num_lines` lines of `room` pixels, cut with an ellipsis where it does not fit."""
    lines: list[str] = [""]
    for word in "".join(letter if letter.isprintable() else " " for letter in text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > num_lines:
        lines = [*lines[: num_lines - 1], " ".join(lines[num_lines - 1 :])]
    return [_cut(line, font=font, room=room) for line in lines]


def _cut(line: str, *, font: _Font, room: int) -> str:
    if font.getlength(line) <= room:
        return line
    line = line[:room]  # no letter is narrower than a pixel; keeps a page-long caption from being measured at length
    while line and font.getlength(line + "...") > room:
        line = line[:-1]
    return line.rstrip() + "..."
