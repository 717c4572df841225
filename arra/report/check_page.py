"""The page of `arra data check`: what was found in a data set, with the pictures that show it, in one file.

Place in the pipeline: `arra.stages.check` examines and hands over sections; here they become HTML that looks like the
report and works without a network. Captions and file names are other people's text: the template escapes everything.

Legend: H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arra.report.grids import data_url
from arra.report.style import styled_page

PAGE_FILE = "check.html"
Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
SHOWN_SIDE = 160
"""Pixels per side at which pictures are shown, about: smaller ones are enlarged by a whole factor without smoothing."""


@dataclass(frozen=True)
class Problem:
    """One thing to know about a data set, and what to do."""

    level: Level
    what: str
    advice: str


@dataclass(frozen=True)
class Figure:
    """Pictures that belong together, each with a word about it."""

    caption: str
    pictures: tuple[tuple[str, np.ndarray], ...]
    """uint8 (H, W, 3), each of its own size."""


@dataclass
class Section:
    """What one examination found."""

    name: str
    """What `check.json` calls it."""
    title: str
    text: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)
    """What was counted or measured, and the value as a person reads it."""
    problems: list[Problem] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    """Examples, one line each."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The same for machines."""


def ranked(sections: Sequence[Section]) -> list[Problem]:
    """The problems of all sections, errors first."""
    return sorted((each for section in sections for each in section.problems), key=lambda p: LEVELS.index(p.level))


def check_page(sections: Sequence[Section], *, title: str, verdict: str, attribution: str = "") -> str:
    """The page as HTML."""
    return styled_page(
        "check.html.j2",
        title=title,
        verdict=verdict,
        problems=ranked(sections),
        sections=sections,
        shown=shown_picture,
        attribution=attribution,
    )


def shown_picture(picture: UInt8[np.ndarray, "H W 3"]) -> dict[str, Any]:
    """Address, width and height of a picture for the page."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
    longest = max(image.size)
    scale = max(1, SHOWN_SIDE // longest) if longest <= SHOWN_SIDE else SHOWN_SIDE / longest
    return {
        "url": data_url(image),
        "width": max(1, round(image.width * scale)),
        "height": max(1, round(image.height * scale)),
        "is_enlarged": scale > 1,
    }
