"""What `arra generate` is asked for, and how its pictures are numbered.

    command line --> PaintRequest (what) + PaintOptions (how) --> arra.stages.paint

A picture is a function of its number: `Numbers` gives each its condition and its seed, so that any process can paint
any of them at any time.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from arra.errors import ArraError
from arra.models import CausalLM, Painter
from arra.models.narrow import WeightKind, load_torchao
from arra.sample.generate import MAX_SEED, sampling_settings
from arra.sample.presets import find_preset
from arra.stages.given import GivenRequest
from arra.stages.language import says_shape
from arra.stages.prepare import parse_part
from arra.stages.wishes import Asked, Wishes, shortened

MAX_SEEDS = 10_000
"""More in one range is a slip of the keyboard."""
USUAL_SEEDS = "0-7"


@dataclass(frozen=True)
class PaintRequest:
    """What is painted; equal requests give equal pictures."""

    model: Path
    asked: Asked
    seeds: Sequence[int] = tuple(range(8))
    num_images: int | None = None
    """Pictures in all, conditions in turn and a seed each, from the first one on; None paints every condition with
    every seed."""
    preset: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of `SamplingSettings` that are not as the preset, or else the model, has them; None is left out."""
    image_size: str | None = None
    given: GivenRequest | None = None
    weights: str | None = None
    """What the model's matrices are kept as; None leaves them as they are."""
    jacobi_window: int = 0
    text_encoder: Path | None = None
    tokenizer: str | None = None
    tokenizer_weights: Path | None = None


@dataclass(frozen=True)
class PaintOptions:
    """How the work is done; the pictures do not depend on it."""

    out: Path | None = None
    """None is a folder inside the run."""
    batch_size: int = 16
    device: str = "auto"
    part: tuple[int, int] | None = None
    """(i, n): this job paints the i-th of n parts."""
    replace: bool = False
    """Start anew where the folder holds pictures of another request."""
    npz: bool = False
    grid: bool = True
    graphs: bool | None = None
    """Steps of fixed shapes, replayed on a GPU; None: there, where the model can."""
    compiled: bool = False
    """Those steps compiled."""

    def __post_init__(self) -> None:
        if self.replace and self.part is not None:
            raise ArraError(
                "generate: --replace and --shard do not go together, jobs would delete each other's pictures; delete "
                "the folder, or begin with --replace in one job alone"
            )
        if self.compiled and self.graphs is False:
            raise ArraError("generate: --compile and --no-graphs do not go together, steps are what is compiled")


@dataclass(frozen=True)
class Numbers:
    """The condition and the seed of every picture, by its number."""

    num_conditions: int
    seeds: Sequence[int]
    in_turn: bool
    """Each seed once, conditions in turn; else every condition with every seed, a condition's pictures together."""

    def __len__(self) -> int:
        return len(self.seeds) if self.in_turn else self.num_conditions * len(self.seeds)

    def place(self, number: int) -> int:
        """Which condition."""
        return number % self.num_conditions if self.in_turn else number // len(self.seeds)

    def seed(self, number: int) -> int:
        """Which seed."""
        return self.seeds[number] if self.in_turn else self.seeds[number % len(self.seeds)]

    def sheet(self, rows: int, columns: int) -> list[list[int]]:
        """Numbers for a grid of at most so many rows (conditions) and columns (their first pictures), all full."""
        if not self.in_turn:
            width = len(self.seeds)
            return [
                [row * width + column for column in range(min(columns, width))]
                for row in range(min(rows, self.num_conditions))
            ]
        there = min(self.num_conditions, len(self))
        each = min(columns, len(self) // there)
        return [[column * there + row for column in range(each)] for row in range(min(rows, there))]


def check_request(request: PaintRequest) -> None:
    """Nothing; what can be told without the model is right.

    Raises:
        ArraError: an unknown preset or kind of weights, a missing torchao, or a setting out of its range.
    """
    if request.preset is not None:
        find_preset(request.preset)
    sampling_settings(**{key: value for key, value in request.sampling.items() if value is not None})
    if request.weights is None:
        return
    if request.weights not in get_args(WeightKind):
        raise ArraError(f"--weights {request.weights}: unknown; expected one of {', '.join(get_args(WeightKind))}")
    if request.weights.startswith("int"):
        load_torchao(request.weights)


def number(num_conditions: int, request: PaintRequest) -> Numbers:
    """The numbers of a request.

    Raises:
        ArraError: --num-images and several seeds, or seeds beyond the last one.
    """
    if request.num_images is None:
        return Numbers(num_conditions, request.seeds, in_turn=False)
    first, count = request.seeds[0], request.num_images
    if first + count - 1 > MAX_SEED:
        raise ArraError(f"--num-images {count}: seeds from {first} on would go beyond {MAX_SEED}; begin lower")
    return Numbers(num_conditions, range(first, first + count), in_turn=True)


def balance_note(wishes: Wishes, numbers: Numbers) -> str:
    """What to say where conditions cannot be painted equally often: always for classes, else if some are left out."""
    each, rest = divmod(len(numbers), numbers.num_conditions)
    if not numbers.in_turn or not rest or (each and (wishes.labels is None or wishes.of_records)):
        return ""
    first = "first gets" if rest == 1 else f"first {rest} get"
    pictures = "1 picture" if not each else f"{each + 1} pictures"
    return f"{_counted(wishes)}: the {first} {pictures}, the others {each or 'none'}"


def _counted(wishes: Wishes) -> str:
    """How many conditions of which kind."""
    kind = "record" if wishes.of_records else "prompt" if wishes.labels is None else "class"
    plural = "" if len(wishes) == 1 else "es" if kind == "class" else "s"
    return f"{len(wishes)} {kind}{plural}"


def parse_options(
    *,
    out: Path | None,
    batch_size: int,
    device: str,
    shard: str | None,
    replace: bool,
    npz: bool,
    grid: bool,
    graphs: bool | None,
    compiled: bool,
) -> PaintOptions:
    """The options as the command line gives them.

    Raises:
        ArraError: a shard that is not i/n, or that is to replace.
    """
    part = None if shard is None else parse_part(shard, "--shard")
    return PaintOptions(out, batch_size, device, part, replace, npz, grid, graphs, compiled)


def chosen_seeds(text: str | None, num_images: int | None) -> Sequence[int]:
    """The seeds that --seeds names, by default 0 to 7; with --num-images the first one alone, by default 0.

    Raises:
        ArraError: it is no such text, or several seeds where one is expected.
    """
    if num_images is None:
        return parse_seeds(USUAL_SEEDS if text is None else text)
    seeds = parse_seeds("0" if text is None else text)
    if len(seeds) > 1:
        raise ArraError(f"--seeds {text}: with --num-images every picture has its own; give the first, as in --seeds 0")
    return seeds


def parse_seeds(text: str) -> list[int]:
    """Seeds from a text such as 0-7 or 1,5,9.

    Raises:
        ArraError: it is no such text.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ArraError(f"--seeds {text}: expected numbers as in 0-7 or 1,5,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MAX_SEED or last - first >= MAX_SEEDS:
            raise ArraError(
                f"--seeds {text}: expected at most {MAX_SEEDS} seeds, none above {MAX_SEED}; --num-images paints more"
            )
        seeds += range(first, last + 1)
    return seeds


def parse_grid(model: Painter, text: str | None) -> tuple[int, int] | None:
    """Height and width in codes of an image size in pixels, as 512 or 768x512 (width x height); None of None.

    Raises:
        ArraError: it is no such text, or the model cannot paint it.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,5})(?:\s*[xX]\s*(\d{1,5}))?\s*", text)
    if match is None:
        raise ArraError(f"--image-size {text}: expected pixels, as 512, or width x height, as 768x512")
    if not isinstance(model, CausalLM):
        raise ArraError("--image-size: this model paints pictures of one size; leave it out")
    width, height = int(match[1]), int(match[2] or match[1])
    step = model.layout.pixels_per_code
    if width % step or height % step:
        raise ArraError(f"--image-size {text}: sides must be multiples of {step} pixels, those of one code")
    grid = (height // step, width // step)
    if grid != model.settings.grid and not says_shape(model.layout):
        own = " x ".join(str(side * step) for side in reversed(model.settings.grid))
        raise ArraError(f"--image-size {text}: this model's pictures do not say their shape; it paints {own} alone")
    try:
        model.layout.check_grid(grid)
    except ArraError as error:
        raise ArraError(f"--image-size {text}: {error}") from error
    model.layout.check_fits(0, grid, where=f"--image-size {text}")
    return grid


def described(wishes: Wishes, numbers: Numbers) -> dict[str, Any]:
    """Conditions, seeds and their order for `request.json`: in words, and by hash where they are long."""
    first = ", ".join(f"'{shortened(text)}'" for text in wishes.texts[:3])
    told = hashlib.sha256()
    for fact in wishes.facts:
        told.update(json.dumps(fact, ensure_ascii=False).encode() + b"\n")
    return {
        "num_images": len(numbers),
        "conditions": f"{_counted(wishes)}: {first}{', ...' if len(wishes) > 3 else ''}",
        "conditions_sha256": told.hexdigest(),
        "captions_by": wishes.captions_by,
        "order": "conditions in turn" if numbers.in_turn else "every condition with every seed",
        "seeds": _seeds_in_words(numbers.seeds),
    }


def _seeds_in_words(seeds: Sequence[int]) -> str:
    """As `parse_seeds` reads them."""
    parts: list[list[int]] = []
    for seed in [seeds[0], seeds[-1]] if isinstance(seeds, range) else seeds:
        if parts and (seed == parts[-1][1] + 1 or isinstance(seeds, range)):
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
