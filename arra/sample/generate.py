"""Images from prompts, classes or captions: one seed for each image, batch after batch, by one engine for all models.

Letters: N images, B images of one batch, P = h*w codes, H W pixels.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from pydantic import ValidationError
from torch import Tensor

from arra.errors import ArraError
from arra.models import CausalLM, Painter
from arra.sample.decoding import FREE, Batch, Prefixes, decode_batch
from arra.sample.graphs import StaticLoop, StaticReader
from arra.sample.jacobi import check_window, decode_jacobi
from arra.sample.logits import SamplingSettings, draw_keys

MAX_SEED = 2**63 - 1
"""Of those that fit every file that holds them."""
PICTURES_TOGETHER = 8
"""Pictures that a GPU decodes from codes together, always as many, so that a picture is the same bits in any company.
A CPU decodes one after the other: it has no more to do at once, and their memory is that of one."""


@runtime_checkable
class ImageTokenizer(Protocol):
    """What generation needs of an image tokenizer."""

    def decode(self, codes: Int[Tensor, "N h w"]) -> UInt8[Tensor, "N H W 3"]:
        """Pictures of the codes."""
        ...


@dataclass(frozen=True)
class GenerationResult:
    """Images in the order of `seeds` (and `prompts` or `labels`, where given), with what made them."""

    images: UInt8[Tensor, "N H W 3"] | None
    codes: Int[Tensor, "N h w"]
    prompts: list[str] | None
    labels: list[int] | None
    seeds: list[int]
    settings: SamplingSettings
    passes: list[int] | None
    """With a `jacobi_window`: times the model was asked for codes of each image; without, that is once for each code.
    """


class Engine:
    """A model made ready to paint, for as many calls as wanted; use it as a context manager.

    Within, the model is in eval mode and its matrices may lie in memory a second time, in the layout that decodes
    fastest; afterwards it is as it was.
    """

    def __init__(
        self,
        model: Painter,
        tokenizer: ImageTokenizer | None = None,
        *,
        settings: SamplingSettings,
        batch_size: int = 16,
        grid: tuple[int, int] | None = None,
        jacobi_window: int = 0,
        graphs: bool | None = None,
        compiler: str | None = None,
    ) -> None:
        """An engine for these settings.

        `graphs` decodes by steps of fixed shapes that a GPU replays (`graphs.py`); None: on CUDA, where the model can.
        `compiler` is a backend of `torch.compile` for them ("inductor"): worth its minute for thousands of images.
        Raises: ArraError for what does not go together.
        """
        if batch_size < 1:
            raise ArraError(f"generate: batch_size: {batch_size} must be at least 1")
        self.model, self.tokenizer, self.settings, self.batch_size = model, tokenizer, settings, batch_size
        check_window(model, jacobi_window)
        self.jacobi_window = jacobi_window
        self.asked_grid, self.grid = grid, grid or model.settings.grid
        self._static = self._static_loop(graphs, compiler)
        self._open = ExitStack()

    def __enter__(self) -> "Engine":
        with ExitStack() as opening:  # what was entered is left if the next one fails
            opening.enter_context(_evaluating(self.model))
            opening.enter_context(self.model.packed())
            if self._static is not None:  # it holds a copy of a language model's head
                opening.callback(self._static.forget)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.close()

    def _static_loop(self, graphs: bool | None, compiler: str | None) -> StaticLoop | None:
        """The loop of fixed shapes, where it is wanted and can be."""
        able = isinstance(self.model, StaticReader) and self.model.keeps_all and not self.jacobi_window
        able = able and (not isinstance(self.model, CausalLM) or self.model.steps_alike)
        if (graphs or compiler) and not able:
            raise ArraError(
                "generate: graphs and a compiler need steps of fixed shapes, which a Jacobi window and models with "
                "windows, recurrent layers or ALiBi do not have; leave them out"
            )
        on_cuda = self.model.device.type == "cuda"
        if not able or graphs is False or not (graphs or compiler or on_cuda):
            return None
        assert isinstance(self.model, StaticReader)
        return StaticLoop(
            self.model, self.grid, self.settings, batch_size=self.batch_size, captures=on_cuda, compiler=compiler
        )

    @torch.no_grad()
    def generate(
        self,
        *,
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        captions: tuple[Tensor, Tensor | None] | None = None,
        given_codes: Int[Tensor, "N P"] | Int[Tensor, "N h w"] | None = None,
        watch: Callable[[int, int, Tensor], None] | None = None,
    ) -> GenerationResult:
        """Images for conditions and seeds, as the function `generate` says.

        Raises: ArraError for conditions, seeds or codes that do not fit.
        """
        model, device = self.model, self.model.device
        conditions = model.condition(prompts=prompts, labels=labels, captions=captions, grid=self.asked_grid)
        rows, image_seeds = pair(len(conditions), seeds)
        names = _names(prompts=prompts, labels=labels, captions=captions)
        first_of: dict[Any, int] = {}
        numbers = [first_of.setdefault(name, row) for row, name in enumerate(names)]
        whose = [numbers[row] for row in rows]
        num_codes = self.grid[0] * self.grid[1]
        given = self._given(given_codes, len(rows), num_codes)
        keys = draw_keys(image_seeds, num_codes)
        prefixes, parts = Prefixes(), []
        together = 1 if self.jacobi_window else self.batch_size
        passes: list[int] = []
        for first in range(0, len(rows), together):
            chosen = slice(first, first + together)
            batch = Batch(
                condition=conditions.select(torch.tensor(rows[chosen]).to(device)),
                whose=whose[chosen],
                keys=keys[chosen].to(device),
                given=None if given is None else given[chosen].to(device),
            )
            told = None if watch is None else _watch_batch(watch, first)
            how: dict[str, Any] = {"grid": self.grid, "settings": self.settings, "prefixes": prefixes, "watch": told}
            if self.jacobi_window:
                found = decode_jacobi(model, batch, window=self.jacobi_window, **how)
                parts.append(found.codes)
                passes.append(found.passes)
            elif self._static is not None and watch is None:
                parts.append(self._static.decode_batch(batch, prefixes=prefixes))
            else:
                parts.append(decode_batch(model, batch, **how))
        codes = torch.cat(parts).unflatten(1, self.grid)
        return GenerationResult(
            images=None if self.tokenizer is None else decode_pictures(self.tokenizer, codes),
            codes=codes,
            prompts=None if prompts is None else [prompts[row] for row in rows],
            labels=None if labels is None else [int(labels[row]) for row in rows],
            seeds=image_seeds,
            settings=self.settings,
            passes=passes if self.jacobi_window else None,
        )

    def _given(self, given: Tensor | None, num_images: int, num_codes: int) -> Int[Tensor, "N P"] | None:
        if given is None:
            return None
        flat = given.flatten(1).to(torch.int64)
        if len(flat) not in (1, num_images) or flat.shape[1] != num_codes:
            raise ArraError(
                f"given_codes: got {tuple(given.shape)}, expected {num_images} rows (or one for all) of {num_codes} "
                f"codes, {FREE} where the picture is to be painted"
            )
        most = self.model.settings.num_codes
        if flat.numel() and (int(flat.min()) < FREE or int(flat.max()) >= most):
            raise ArraError(
                f"given_codes: {int(flat.min())}..{int(flat.max())} are outside 0..{most - 1} ({FREE} is free); they "
                "come from another tokenizer"
            )
        return flat.expand(num_images, -1)


def generate(
    model: Painter,
    tokenizer: ImageTokenizer | None = None,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    captions: tuple[Tensor, Tensor | None] | None = None,
    batch_size: int = 16,
    grid: tuple[int, int] | None = None,
    prefix_codes: Int[Tensor, "N n"] | None = None,
    given_codes: Int[Tensor, "N P"] | Int[Tensor, "N h w"] | None = None,
    watch: Callable[[int, int, Tensor], None] | None = None,
    jacobi_window: int = 0,
    **sampling: Any,
) -> GenerationResult:
    """Images for conditions and seeds: zipped when there are equally many, otherwise every condition with every seed.

    The product is ordered condition by condition. Without a tokenizer `images` is None. `given_codes` are codes that
    are as they are, one row for each image or one for all, with -1 where it is to be painted; `prefix_codes` are the
    first n codes. `grid` is the height and width in codes, a choice where the model is a language model. `watch` is
    called as watch(first image of the batch, code index, logits (B, K) after guidance). `jacobi_window` is how many
    codes a pass may gain at most by speculative Jacobi decoding, image by image; 0 is off (`arra/sample/jacobi.py`).
    `sampling` are the fields of `SamplingSettings`: cfg_scale, temperature (0 is greedy), top_k, ...

    An image is a function of the weights, its condition, its seed and the sampling settings, not of `batch_size`, of
    the order or of the other images: each has its own generator, every key is drawn before the first code, and
    pictures are decoded in a way that does not depend on their number. What is left is that matrix products may round
    differently at other numbers of rows (not on a CPU with torch 2.14, see `arra/models/products.py`) or next to longer
    prompts of a language model: of two codes whose noisy scores agree to about 1e-6 the other may win.

    The model's mode, state dict and the global random state are left as they were.
    Raises: ArraError for conditions, seeds or settings that do not fit.
    """
    settings = sampling_settings(**sampling)
    if prefix_codes is not None:
        if given_codes is not None:
            raise ArraError("generate: prefix_codes and given_codes say the same thing; pass one of them")
        given_codes = _continued(prefix_codes, grid or model.settings.grid)
    with Engine(
        model, tokenizer, settings=settings, batch_size=batch_size, grid=grid, jacobi_window=jacobi_window
    ) as engine:
        return engine.generate(
            seeds=seeds, prompts=prompts, labels=labels, captions=captions, given_codes=given_codes, watch=watch
        )


def pair(num_conditions: int, seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each image its condition's index and its seed: zipped at equal lengths, else the product by condition."""
    if not num_conditions or not len(seeds):
        raise ArraError(f"generate: {num_conditions} conditions and {len(seeds)} seeds make no image; give one of each")
    if outside := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
        word = "negative" if outside[0] < 0 else "above 2^63 - 1"
        raise ArraError(f"seeds: {outside[0]} is {word}; seeds are whole numbers from 0 to {MAX_SEED}")
    if num_conditions == len(seeds):
        return list(range(num_conditions)), [int(seed) for seed in seeds]
    product = [(row, int(seed)) for row in range(num_conditions) for seed in seeds]
    return [row for row, _ in product], [seed for _, seed in product]


def decode_pictures(tokenizer: ImageTokenizer, codes: Int[Tensor, "N h w"]) -> UInt8[Tensor, "N H W 3"]:
    """The pictures of codes, each the same bits whatever stands beside it."""
    if not codes.is_cuda:
        return torch.cat([tokenizer.decode(one[None]) for one in codes])
    parts = []
    for some in codes.split(PICTURES_TOGETHER):
        filling = some[-1:].expand(PICTURES_TOGETHER - len(some), -1, -1)
        parts.append(tokenizer.decode(torch.cat([some, filling]))[: len(some)])
    return torch.cat(parts)


def sampling_settings(**fields: Any) -> SamplingSettings:
    """The settings.

    Raises: ArraError, in one line, for what is none.
    """
    try:
        return SamplingSettings(**fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{fault['loc'][0]}: {fault['msg']}, got {fault['input']}"
            if fault["loc"]
            else fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        )
        raise ArraError(f"generate: {faults}") from error


def _names(
    *, prompts: Sequence[str] | None, labels: Sequence[int] | None, captions: tuple[Tensor, Tensor | None] | None
) -> list[Any]:
    """What tells conditions apart, one of the three."""
    if prompts is not None:
        return list(prompts)
    if labels is not None:
        return [int(label) for label in labels]
    assert captions is not None
    parts = [part.detach().cpu().contiguous().flatten(1) for part in captions if part is not None]
    return [
        hashlib.sha256(b"".join(part[row].view(torch.uint8).numpy().tobytes() for part in parts)).digest()
        for row in range(len(parts[0]))
    ]


def _watch_batch(watch: Callable[[int, int, Tensor], None], first: int) -> Callable[[int, Tensor], None]:
    return lambda index, logits: watch(first, index, logits)


def _continued(prefix: Tensor, grid: tuple[int, int]) -> Int[Tensor, "N P"]:
    """Given codes of which the first ones are known."""
    num_codes = grid[0] * grid[1]
    if prefix.shape[1] > num_codes:
        raise ArraError(f"prefix_codes: got {tuple(prefix.shape)}, expected rows of at most {num_codes} codes")
    free = prefix.new_full((len(prefix), num_codes - prefix.shape[1]), FREE, dtype=torch.int64)
    return torch.cat([prefix.to(torch.int64), free], 1)


@contextmanager
def _evaluating(model: Painter) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
