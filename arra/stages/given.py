"""From a picture to codes that are given: completions, inpaintings and variations of `arra generate`.

    a file -> upright RGB, middle crop at the model's pixels -> codes -> those that stay, FREE where it is painted

Legend: N pictures to be painted, h w grid, P = h*w codes.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from arra.data.images import Grey16, middle
from arra.data.records import decode_image, read_file
from arra.errors import ArraError
from arra.sample.decoding import FREE
from arra.sample.logits import draw_keys, keyed_uniform
from arra.tokenizers import ImageTokenizer

Side = Literal["top", "bottom", "left", "right"]
KEEP = re.compile(r"\s*(top|bottom|left|right)\s*:\s*(\d*\.?\d+|\d+\.)\s*")
BOX = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")
USUAL_KEEP, USUAL_STRENGTH = "top:0.5", 0.5


@dataclass(frozen=True)
class GivenRequest:
    """Which picture is continued, mended or varied, and what of it stays."""

    kind: Literal["complete", "inpaint", "vary"]
    path: Path
    content: bytes = field(repr=False)
    """The encoded picture, read once, so that the noted hash is that of what is used."""
    side: Side = "top"
    share: float = 1.0
    """Completion: this share of the rows (of the columns, at left and right) stays at that side."""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Inpainting: x0, y0, x1, y1 in pixels of the model's picture; x1 and y1 lie outside."""
    strength: float = 0.0
    """Variation: the share of codes that are painted anew."""

    def facts(self) -> dict[str, Any]:
        """What is noted beside every picture made from it; of the file only its name and its hash."""
        kinds: dict[str, dict[str, Any]] = {
            "complete": {"keep": f"{self.side}:{self.share:g}"},
            "inpaint": {"box": list(self.box)},
            "vary": {"strength": self.strength},
        }
        how = kinds[self.kind]
        return {self.kind: self.path.name, **how, "picture_sha256": hashlib.sha256(self.content).hexdigest()}


@dataclass(frozen=True)
class GivenPicture:
    """A picture as codes, ready to be given for any seeds."""

    codes: Int[Tensor, " P"]
    painted: Bool[Tensor, " P"]
    """Where codes are painted whatever the seed."""
    strength: float
    """The share of codes that is painted besides, drawn for each seed."""

    def rows(self, seeds: Sequence[int]) -> Int[Tensor, "N P"]:
        """Given codes, FREE where painted: row i depends on the picture, its request and seeds[i] alone.

        Which codes a variation paints is drawn by the numbers that follow those the painting of that seed draws by;
        what is painted at one strength is painted at every greater one.
        """
        num_codes = len(self.codes)
        painted = self.painted.expand(len(seeds), -1)
        if self.strength > 0:
            keys = draw_keys(seeds, 2 * num_codes)[:, num_codes:]
            chance = keyed_uniform(keys.flatten(), 1).view(len(seeds), num_codes)
            painted = painted | (chance < self.strength)
        return self.codes.expand(len(seeds), -1).masked_fill(painted, FREE)


def given_request(
    *,
    complete: Path | None = None,
    keep: str | None = None,
    inpaint: Path | None = None,
    box: str | None = None,
    vary: Path | None = None,
    strength: float | None = None,
) -> GivenRequest | None:
    """What the command line asks for; None where it asks for none of the three.

    `keep` is a side and a share, as top:0.5 (the default); `box` four numbers, as 0,0,128,64; `strength` lies in
    [0, 1] (default 0.5).

    Raises:
        ArraError: two of them, an option without its picture, one that is no such text, or a file that cannot be read.
    """
    asked = {"complete": complete, "inpaint": inpaint, "vary": vary}
    found = [(kind, path) for kind, path in asked.items() if path is not None]
    if len(found) > 1:
        raise ArraError(f"generate: {' and '.join(f'--{kind}' for kind, _ in found)} do not go together; give one")
    for option, value, kind in (("keep", keep, "complete"), ("box", box, "inpaint"), ("strength", strength, "vary")):
        if value is not None and asked[kind] is None:
            raise ArraError(f"--{option}: belongs to --{kind} IMAGE; give that, or leave it out")
    if not found:
        return None
    path = found[0][1]
    if complete is not None:
        side, share = _parse_keep(USUAL_KEEP if keep is None else keep)
        return GivenRequest("complete", path, _read(path), side=side, share=share)
    if inpaint is not None:
        if box is None:
            raise ArraError("--inpaint: say what is painted anew: --box x0,y0,x1,y1, pixels of the model's picture")
        return GivenRequest("inpaint", path, _read(path), box=_parse_box(box))
    strength = USUAL_STRENGTH if strength is None else strength
    if not 0 <= strength <= 1:
        raise ArraError(f"--strength {strength:g}: expected 0 (the picture as it is) to 1 (painted anew)")
    return GivenRequest("vary", path, _read(path), strength=float(strength))


def read_given(
    request: GivenRequest, tokenizer: ImageTokenizer, *, grid: tuple[int, int], grey16: Grey16 = "full"
) -> GivenPicture:
    """The picture as the model sees pictures: upright RGB, its middle at the pixels of `grid`, as codes.

    Raises:
        ArraError: no picture of a known format, a decompression bomb, or a request that leaves nothing of the picture,
            nothing to paint, or reaches outside it.
    """
    step = tokenizer.downsampling
    painted = _painted(request, grid, step)  # what does not fit is told before the network works
    try:
        image = decode_image(request.content, grey16=grey16)
    except ValueError as error:
        advice = "" if ";" in str(error) else "; give a PNG, a JPEG or another picture"
        raise ArraError(f"--{request.kind} {request.path}: {error}{advice}") from error
    pixels = torch.from_numpy(middle(image, width=grid[1] * step, height=grid[0] * step).copy())
    device = next(tokenizer.model.parameters()).device
    codes = tokenizer.encode(pixels[None].to(device))[0].to("cpu", torch.int64)
    return GivenPicture(codes.flatten(), painted.flatten(), request.strength)


def _read(path: Path) -> bytes:
    try:
        return read_file(str(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArraError(f"{path}: cannot be read ({reason}); expected the file of a picture") from error


def _parse_keep(text: str) -> tuple[Side, float]:
    match = KEEP.fullmatch(text)
    if match is None or not 0 < float(match[2]) < 1:
        raise ArraError(
            f"--keep {text}: expected top, bottom, left or right and a share between 0 and 1, as in top:0.5"
        )
    return match[1], float(match[2])  # type: ignore[return-value]


def _parse_box(text: str) -> tuple[int, int, int, int]:
    match = BOX.fullmatch(text)
    left, top, right, bottom = map(int, match.groups()) if match else (0, 0, 0, 0)
    if left >= right or top >= bottom:
        raise ArraError(f"--box {text}: expected x0,y0,x1,y1 in pixels, x0 < x1 and y0 < y1, as in 0,0,128,64")
    return left, top, right, bottom


def _painted(request: GivenRequest, grid: tuple[int, int], step: int) -> Bool[Tensor, "h w"]:
    """Which codes are painted whatever the seed."""
    height, width = grid
    if request.kind == "vary":
        return torch.zeros(height, width, dtype=torch.bool)
    if request.kind == "inpaint":
        left, top, right, bottom = request.box
        if right > width * step or bottom > height * step:
            raise ArraError(
                f"--box {','.join(map(str, request.box))}: outside the model's picture of {width * step} x "
                f"{height * step} pixels (the middle of {request.path.name}, resized)"
            )
        painted = torch.zeros(height, width, dtype=torch.bool)
        painted[top // step : math.ceil(bottom / step), left // step : math.ceil(right / step)] = True
        return painted
    down = request.side in ("top", "bottom")
    lines = height if down else width
    kept = math.floor(lines * request.share + 0.5)
    if not 0 < kept < lines:
        what = "rows" if down else "columns"
        raise ArraError(
            f"--keep {request.side}:{request.share:g}: keeps {kept} of {lines} {what} of codes; keep at least one and "
            "leave one to paint"
        )
    place = torch.arange(lines)
    stays = place < kept if request.side in ("top", "left") else place >= lines - kept
    return ~(stays[:, None] if down else stays[None, :]).expand(height, width)
