"""How prompts, captions and codes become a sequence: training, sampling, evaluation write it with this code.

Codes are stored, not sequences, so one store serves every model. LlamaGen-style decoders have a prefix of their own
(`text_prefix`, `caption_prefix`); language models have an `ImageLayout`, which says what each token id means and in
which order ids stand. From the same layout come the labels and the code mask of training, the prefix and the forced
tokens of sampling, and the way back to codes.

Legend: B captions, C prefix positions, F caption feature; h w grid of an image in codes, K codes, T sequence.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Integer
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from arra.errors import ArraError
from arra.settings import Settings

PAD = 0
BOI = 1
CODE = -1
"""Stands for a code in the sequence of an image whose codes are not known yet."""
NO_LABEL = -100
"""Label of a token without loss."""

Grid: TypeAlias = tuple[int, int]
"""Height and width of an image in codes."""
Piece: TypeAlias = list[int] | Integer[np.ndarray, "h w"]
"""Part of a turn: ids of text, or the codes of an image."""


def text_prefix(ids: Sequence[int], prefix_length: int) -> tuple[list[int], list[bool]]:
    """Tokens and mask (True = real) of a prefix: padding on the left, then the ids, then the begin-of-image token.

    Raises: ArraError when the ids and the begin-of-image token do not fit.
    """
    if len(ids) + 1 > prefix_length:
        raise ArraError(
            f"prompt: {len(ids)} tokens and the begin-of-image token do not fit the {prefix_length} prefix positions; "
            "shorten the prompt or train with a longer prefix"
        )
    padding = prefix_length - len(ids) - 1
    return [PAD] * padding + [*ids, BOI], [False] * padding + [True] * (len(ids) + 1)


def append_rep(
    tokens: Int[Tensor, "B C"], mask: Bool[Tensor, "B C"] | None
) -> tuple[Int[Tensor, "B C+1"], Bool[Tensor, "B C+1"] | None]:
    """Tokens and mask of prefixes with the REP token behind them: it has no id but a vector of the decoder's own, and
    is a real position in every row."""
    widened = torch.nn.functional.pad(tokens, (0, 1), value=PAD)
    return widened, None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)


def caption_prefix(
    features: Sequence[Float[np.ndarray, "_ F"]], prefix_length: int, *, width: int
) -> tuple[Float[Tensor, "B C F"], Bool[Tensor, "B C"]]:
    """Caption features of their own lengths as one array, in their type: zeros on the left, where the mask is False.

    Raises: ArraError when there are more vectors than positions.
    """
    longest = max(map(len, features), default=0)
    if longest > prefix_length:
        raise ArraError(
            f"caption features: {longest} vectors do not fit the {prefix_length} prefix positions; raise "
            "model.prefix_length, or make them with fewer"
        )
    dtype = features[0].dtype if features else np.dtype(np.float32)
    padded = np.zeros((len(features), prefix_length, width), dtype)
    mask = np.zeros(padded.shape[:2], dtype=bool)
    for place, value in enumerate(features):
        padded[place, prefix_length - len(value) :] = value
        mask[place, prefix_length - len(value) :] = True
    return torch.from_numpy(padded), torch.from_numpy(mask)


@dataclass(frozen=True)
class Written:
    """A sequence; nothing in it is shifted."""

    tokens: Int64[np.ndarray, "T"]
    labels: Int64[np.ndarray, "T"]
    """The token itself where it carries loss, else `NO_LABEL`."""
    code_mask: Bool[np.ndarray, "T"]
    """Codes of images that carry loss; the hidden state one to the left predicts each."""
    rep_mask: Bool[np.ndarray, "T"] | None = None
    """Where a REP token stands before an image that carries loss; None where the layout has none."""


class ImageLayout(Settings):
    """How a language model writes an image: which token ids mean what, and their order.

    rep, begin, side tokens (height, then width), rows of codes with a new-line token after each, end. What a family
    lacks is null. `arra.tokenizers.vocabulary` makes layouts from token names.

    Source: Lumina-mGPT `lumina_mgpt/data/item_processor.py` (lumina); facebookresearch/chameleon (chameleon).
    """

    family: Literal["lumina", "chameleon", "generic"]
    bos: NonNegativeInt | None = None
    """First token of every sequence that has a prompt."""
    separator: NonNegativeInt | None = None
    """Ends the prompt's turn."""
    begin_image: NonNegativeInt
    end_image: NonNegativeInt
    new_line: NonNegativeInt | None = None
    """After every row of codes, the last included."""
    first_size: int | None = None
    """A side of n codes is token first_size + n // size_step; null: sides are not written."""
    size_step: PositiveInt = 1
    """Codes per step of a side token; sides are multiples of it where they are written."""
    num_sizes: NonNegativeInt = 0
    """Side tokens are first_size + 1 .. first_size + num_sizes."""
    closing: tuple[NonNegativeInt, ...] = ()
    """Ends the image's turn, after end_image."""
    rep: NonNegativeInt | None = None
    """The REP token, right before begin_image of every image that is answered; null: none is written."""
    rep_id: NonNegativeInt | None = None
    """The token that the vocabulary has for REP, written or not; null: it has none."""
    first_code: NonNegativeInt
    """Id of code 0, or the least id of a code where code_order says which is which."""
    num_codes: PositiveInt
    code_order: tuple[NonNegativeInt, ...] | None = Field(default=None, repr=False)
    """The id of every code; null: first_code + code."""
    template: str = "{prompt}"
    """What is encoded in place of the prompt; {width} and {height} are the image's pixels."""
    pixels_per_code: PositiveInt = 16
    unconditional: Literal["image_only", "empty_prompt"] = "image_only"
    """What a sequence without condition is, in training and as guidance's null row: all from begin_image on, with the
    REP token before it where there is one (no bos, no text, positions from 0), or the sequence of a prompt that has no
    ids."""
    max_positions: PositiveInt | None = None
    """Longest sequence of the model; null: no limit."""

    @model_validator(mode="after")
    def _ids_mean_one_thing(self) -> "ImageLayout":
        if (self.first_size is None) != (self.num_sizes == 0):
            raise ValueError("'first_size' and 'num_sizes' say together which tokens are sides; give both or neither")
        if self.first_size is not None and self.first_size < -1:
            raise ValueError(f"'first_size' is {self.first_size}; side tokens would have negative ids")
        if self.code_order is not None:
            if len(self.code_order) != self.num_codes or len(set(self.code_order)) != self.num_codes:
                raise ValueError(f"'code_order' must name {self.num_codes} ids, each once")
            if min(self.code_order) != self.first_code:
                raise ValueError(f"'first_code' is {self.first_code}, the least id of 'code_order' another")
        if self.rep is not None and self.rep_id not in (None, self.rep):
            raise ValueError(f"'rep' is {self.rep}, but 'rep_id' says that {self.rep_id} is the REP token")
        parts = {
            "begin_image": [self.begin_image],
            "end_image": [self.end_image],
            "new_line": _given(self.new_line),
            "a side": self._size_ids,
            "a code": self._ids.tolist(),
            "rep": self._rep_ids,
            # these may share ids: some models have one for all
            "bos, separator or closing": {*_given(self.bos), *_given(self.separator), *self.closing},
        }
        meaning: dict[int, str] = {}
        for name, ids in parts.items():
            for token in ids:
                if token in meaning:
                    raise ValueError(f"id {token} is both {meaning[token]} and {name}; every id means one thing")
                meaning[token] = name
        if self.template.count("{prompt}") != 1:
            raise ValueError("'template' must hold {prompt} once")
        return self

    @property
    def _ids(self) -> Int64[np.ndarray, "K"]:
        return _code_ids(self.first_code, self.num_codes, self.code_order)

    @property
    def _codes(self) -> dict[int, int]:
        return _codes_of_ids(self.first_code, self.num_codes, self.code_order)

    @property
    def _size_ids(self) -> list[int]:
        return [] if self.first_size is None else [self.first_size + n for n in range(1, self.num_sizes + 1)]

    @property
    def _rep_ids(self) -> list[int]:
        return _given(self.rep if self.rep_id is None else self.rep_id)

    def code_ids(self) -> Int[Tensor, "K"]:
        """The token id of every code."""
        return torch.from_numpy(self._ids.copy())

    def reserved(self) -> frozenset[int]:
        """Ids that text of a user may never become."""
        named = [self.begin_image, self.end_image, *_given(self.bos), *_given(self.separator), *_given(self.new_line)]
        return frozenset([*named, *self._rep_ids, *self.closing, *self._size_ids, *self._ids.tolist()])

    def image_ids(self) -> frozenset[int]:
        """Ids that are written for images alone: codes, sides, begin and end, new-line, REP."""
        named = [self.begin_image, self.end_image, *_given(self.new_line), *_given(self.rep)]
        return frozenset([*named, *self._size_ids, *self._ids.tolist()])

    def text(self, prompt: str, grid: Grid) -> str:
        """What is to be encoded for a prompt: the template, filled in."""
        height, width = (str(side * self.pixels_per_code) for side in grid)
        values = {"{prompt}": prompt, "{width}": width, "{height}": height}
        return re.sub(r"\{(?:prompt|width|height)\}", lambda found: values[found[0]], self.template)

    def check_grid(self, grid: Grid) -> None:
        """Nothing.

        Raises:
            ArraError: this layout cannot write an image of the grid.
        """
        height, width = grid
        if height < 1 or width < 1:
            raise ArraError(f"{self.family} layout: a grid of {height} x {width} codes; sides are at least 1")
        if self.first_size is None:
            return
        most = self.num_sizes * self.size_step
        if any(side % self.size_step or side > most for side in grid):
            raise ArraError(
                f"{self.family} layout: sides of {height} x {width} codes cannot be written; expected multiples of "
                f"{self.size_step} ({self.size_step * self.pixels_per_code} pixels) up to {most}; choose another size"
            )

    def opening(self, grid: Grid) -> list[int]:
        """The tokens from begin_image to the first code."""
        self.check_grid(grid)
        sizes = [] if self.first_size is None else [self.first_size + side // self.size_step for side in grid]
        return [self.begin_image, *sizes]

    def prefix(self, prompt_ids: Sequence[int] | None, grid: Grid) -> list[int]:
        """Everything before the first code; without ids the form that has no condition."""
        return [*self._question(prompt_ids), *_given(self.rep), *self.opening(grid)]

    def after(self, index: int, grid: Grid) -> list[int]:
        """The tokens that must follow code `index` (in raster order) before the next code, or to the very end."""
        height, width = grid
        if not 0 <= index < height * width:
            raise ValueError(f"code {index} of a grid of {height} x {width}")
        row_ends = _given(self.new_line) if index % width == width - 1 else []
        return row_ends if index < height * width - 1 else [*row_ends, self.end_image, *self.closing]

    def image(self, grid: Grid) -> list[int]:
        """An image's tokens from begin_image to end_image, `CODE` where codes stand."""
        height, width = grid
        row = [CODE] * width + _given(self.new_line)
        return [*self.opening(grid), *row * height, self.end_image]

    def sequence(self, prompt_ids: Sequence[int] | None, codes: Integer[np.ndarray, "h w"]) -> Written:
        """A prompt and its image; without ids the form that has no condition. All of the image's turn carries loss."""
        if prompt_ids is None and self.unconditional == "image_only":
            tokens = np.array([*_given(self.rep), *self._image_ids(codes), *self.closing], np.int64)
            return self._written(tokens, tokens.copy())
        return self.write([[list(prompt_ids or [])], [codes]])

    def write(self, turns: Sequence[Sequence[Piece]]) -> Written:
        """A conversation: what is asked and what is answered, in turns; each turn is pieces of text and images.

        Answers carry loss: text, images with the REP token before each, and the tokens that end them. An answer ends
        with `closing`; where that is empty and another turn follows, with the separator. Images that are asked about
        have no REP token.
        """
        tokens, ends = _given(self.bos), _given(self.separator)
        labels = [NO_LABEL] * len(tokens)
        for number, pieces in enumerate(turns):
            turn: list[int] = []
            answer = number % 2 == 1
            for piece in pieces:
                if isinstance(piece, np.ndarray):
                    turn += [*(_given(self.rep) if answer else []), *self._image_ids(piece)]
                else:
                    turn += piece
            turn += (self.closing or (ends if number + 1 < len(turns) else [])) if answer else ends
            tokens += turn
            labels += turn if answer else [NO_LABEL] * len(turn)
        return self._written(np.array(tokens, np.int64), np.array(labels, np.int64))

    def length(self, num_prompt_ids: int | None, grid: Grid) -> int:
        """Number of tokens of a sequence; None as in `sequence`."""
        prompt = None if num_prompt_ids is None else [0] * num_prompt_ids
        return len(self._question(prompt)) + len(_given(self.rep)) + len(self.image(grid)) + len(self.closing)

    def check_fits(self, num_prompt_ids: int | None, grid: Grid, *, where: str) -> None:
        """Nothing.

        Raises:
            ArraError: the sequence has more tokens than the model has positions; `where` names the sequence.
        """
        needed = self.length(num_prompt_ids, grid)
        if self.max_positions is not None and needed > self.max_positions:
            height, width = (side * self.pixels_per_code for side in grid)
            raise ArraError(
                f"{where}: {needed} tokens do not fit the model's {self.max_positions} positions (the prompt has "
                f"{num_prompt_ids or 0}, the image of {width} x {height} pixels {len(self.image(grid))}); "
                "choose a smaller image size" + (", or shorten the prompt" if num_prompt_ids else "")
            )

    def read_image(self, tokens: Sequence[int], *, grid: Grid | None = None) -> Int64[np.ndarray, "h w"]:
        """The codes of the one image in a sequence, the inverse of `sequence`.

        `grid` is needed where neither sides nor rows are written and the image is no square.

        Raises:
            ArraError: no image, several, or one that is not written as this layout writes it.
        """
        found = [int(token) for token in tokens]
        if found.count(self.begin_image) != 1:
            raise ArraError(f"{self._where}: {found.count(self.begin_image)} begin-image tokens; expected one image")
        start = found.index(self.begin_image)
        if self.rep is not None and start and found[start - 1] != self.rep:
            raise ArraError(f"{self._where}: token {found[start - 1]} before begin-image; expected REP, {self.rep}")
        if self.end_image not in found[start:]:
            raise ArraError(f"{self._where}: the image has no end; it was cut off after {len(found) - start} tokens")
        segment = found[start : found.index(self.end_image, start) + 1]
        codes = [self._codes[token] for token in segment if token in self._codes]
        height, width = grid or self._grid_of(segment, len(codes))
        expected = self.image((height, width))
        if len(segment) != len(expected):
            raise ArraError(
                f"{self._where}: {len(segment)} tokens for {height} x {width} codes; expected {len(expected)}"
            )
        for place, (token, right) in enumerate(zip(segment, expected, strict=True)):
            if (token in self._codes) if right == CODE else token == right:
                continue
            name = "a code" if right == CODE else str(right)
            raise ArraError(f"{self._where}: token {token} at place {place} of the image; expected {name}")
        return np.array(codes, np.int64).reshape(height, width)

    @property
    def _where(self) -> str:
        return f"{self.family} image"

    def _grid_of(self, segment: list[int], num_codes: int) -> Grid:
        if self.first_size is not None:
            sides = segment[1:3]
            if len(sides) < 2 or not all(side in self._size_ids for side in sides):
                raise ArraError(f"{self._where}: {sides} after begin-image; expected height and width")
            height, width = ((side - self.first_size) * self.size_step for side in sides)
            return height, width
        if self.new_line is not None and self.new_line in segment:
            height = segment.count(self.new_line)
        else:
            height = math.isqrt(num_codes)
        if not num_codes or num_codes % height:
            raise ArraError(f"{self._where}: {num_codes} codes make no grid of {height} rows; name the grid")
        return height, num_codes // height

    def _question(self, prompt_ids: Sequence[int] | None) -> list[int]:
        if prompt_ids is None:
            if self.unconditional == "image_only":
                return []
            prompt_ids = []
        return [*_given(self.bos), *prompt_ids, *_given(self.separator)]

    def _image_ids(self, codes: Integer[np.ndarray, "h w"]) -> list[int]:
        height, width = codes.shape
        opening = self.opening((height, width))
        if codes.min() < 0 or codes.max() >= self.num_codes:
            raise ArraError(
                f"{self.family} layout: codes {codes.min()}..{codes.max()}, the model has 0..{self.num_codes - 1}; "
                "prepare the store with the model's image tokenizer"
            )
        rows = self._ids[codes]
        if self.new_line is not None:
            rows = np.concatenate([rows, np.full((height, 1), self.new_line)], axis=1)
        return [*opening, *rows.ravel().tolist(), self.end_image]

    def _written(self, tokens: Int64[np.ndarray, "T"], labels: Int64[np.ndarray, "T"]) -> Written:
        return Written(tokens, labels, np.isin(labels, self._ids), None if self.rep is None else labels == self.rep)


def _given(token: int | None) -> list[int]:
    return [] if token is None else [token]


# not on the model: pydantic would compare arrays kept there, and carry them along to a changed copy
@lru_cache(maxsize=16)
def _code_ids(first_code: int, num_codes: int, order: tuple[int, ...] | None) -> Int64[np.ndarray, "K"]:
    ids = np.arange(first_code, first_code + num_codes) if order is None else np.array(order, np.int64)
    ids.setflags(write=False)
    return ids


@lru_cache(maxsize=16)
def _codes_of_ids(first_code: int, num_codes: int, order: tuple[int, ...] | None) -> dict[int, int]:
    return {token: code for code, token in enumerate(_code_ids(first_code, num_codes, order).tolist())}
