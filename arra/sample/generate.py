"""Images from prompts, classes or captions: decoding over a static KV cache, with guidance, one seed for each image.

Letters: N images, B images of one batch, R rows of one batch (B, or 2B while guided: conditional, then null), C prefix
length, P = h*w codes, K codes of the vocabulary, H W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from pydantic import ValidationError
from torch import Tensor

from arra.errors import ArraError
from arra.models import Condition, Painter
from arra.models.products import packed_weights
from arra.sample.logits import SamplingSettings, draw_keys, guide, pick


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


def generate(
    model: Painter,
    tokenizer: ImageTokenizer | None = None,
    *,
    seeds: Sequence[int],
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    captions: tuple[Tensor, Tensor | None] | None = None,
    cfg_scale: int | float = 1.0,
    cfg_interval: int = -1,
    temperature: int | float = 1.0,
    top_k: int = 0,
    top_p: int | float = 1.0,
    min_p: int | float = 0.0,
    batch_size: int = 16,
    grid: tuple[int, int] | None = None,
    prefix_codes: Int[Tensor, "N n"] | None = None,
    watch: Callable[[int, int, Tensor], None] | None = None,
) -> GenerationResult:
    """Images for conditions and seeds: zipped when there are equally many, otherwise every condition with every seed.

    The product is ordered condition by condition. Without a tokenizer `images` is None. `prefix_codes` are the first n
    codes of every image, one row each or one row for all; the rest is painted. `grid` is the height and width in codes,
    a choice where the model is a language model. `watch` is called as
    watch(first image of the batch, code index, logits (B, K) after guidance).

    An image is a function of the weights, its condition, its seed and the sampling settings, not of `batch_size`, of
    the order or of the other images: each has its own generator, every key is drawn before the first code, and
    pictures are decoded one by one. What is left is that matrix products may round differently at other numbers of
    rows (not on a CPU with oneDNN, see `arra/models/products.py`): of two codes whose noisy scores agree to about 1e-6
    the other may win.

    The model's mode, state dict and the global random state are left as they were.
    Raises: ArraError for conditions, seeds or settings that do not fit.
    """
    if batch_size < 1:
        raise ArraError(f"generate: batch_size: {batch_size} must be at least 1")
    settings = _sampling(
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    with _evaluating(model), packed_weights(model), torch.no_grad():
        conditions = model.condition(prompts=prompts, labels=labels, captions=captions, grid=grid)
        grid = grid or model.settings.grid
        rows, image_seeds = pair(len(conditions), seeds)
        num_codes = grid[0] * grid[1]
        forced = _forced_codes(model, prefix_codes, len(rows), num_codes)
        keys = draw_keys(image_seeds, num_codes)
        batches = []
        for first in range(0, len(rows), batch_size):
            chosen = torch.arange(first, min(first + batch_size, len(rows)))
            condition = conditions.select(torch.tensor(rows)[chosen].to(model.device))
            codes = paint(
                model,
                condition,
                grid=grid,
                keys=keys[chosen].to(model.device),
                settings=settings,
                prefix_codes=None if forced is None else forced[chosen].to(model.device),
                watch=None if watch is None else _watch_batch(watch, first, len(chosen)),
            )
            batches.append(codes)
        codes = torch.cat(batches).unflatten(1, grid)
        images = None if tokenizer is None else torch.cat([tokenizer.decode(one[None]) for one in codes])
    return GenerationResult(
        images=images,
        codes=codes,
        prompts=None if prompts is None else [prompts[row] for row in rows],
        labels=None if labels is None else [int(labels[row]) for row in rows],
        seeds=image_seeds,
        settings=settings,
    )


def pair(num_conditions: int, seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each image its condition's index and its seed: zipped at equal lengths, else the product by condition."""
    if not num_conditions or not len(seeds):
        raise ArraError(f"generate: {num_conditions} conditions and {len(seeds)} seeds make no image; give one of each")
    if negative := [seed for seed in seeds if seed < 0]:
        raise ArraError(f"seeds: {negative[0]} is negative; seeds are whole numbers from 0 on")
    if num_conditions == len(seeds):
        return list(range(num_conditions)), [int(seed) for seed in seeds]
    product = [(row, int(seed)) for row in range(num_conditions) for seed in seeds]
    return [row for row, _ in product], [seed for _, seed in product]


def paint(
    model: Painter,
    condition: Condition,
    *,
    grid: tuple[int, int],
    keys: Int[Tensor, "B P"],
    settings: SamplingSettings,
    prefix_codes: Int[Tensor, "B n"] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Int[Tensor, "B P"]:
    """The codes of one batch; `watch(index, logits)` sees the logits each code is taken from, before the filters."""
    num_images, num_codes = len(condition), keys.shape[1]
    num_forced = 0 if prefix_codes is None else prefix_codes.shape[1]
    codes = torch.empty(num_images, num_codes, dtype=torch.int64, device=model.device)
    if prefix_codes is not None:
        codes[:, :num_forced] = prefix_codes
    if num_forced == num_codes:
        return codes
    guided_until = settings.guided_codes(num_codes)
    rows = condition
    if guided_until > num_forced:
        rows = condition.join(model.null_condition(condition, grid=grid))
    cache: Any  # each family has its own
    cache, logits = model.prefill(rows, _for_each_row(codes[:, :num_forced], len(rows)), grid=grid)
    for index in range(num_forced, num_codes):
        if len(rows) > num_images:
            logits = guide(logits[:num_images], logits[num_images:], cfg_scale=settings.cfg_scale)
        if watch is not None:
            watch(index, logits)
        codes[:, index] = pick(logits, settings, keys=keys[:, index])
        if index + 1 == num_codes:
            break
        if len(rows) > num_images and index + 1 >= guided_until:
            rows, cache = condition, cache.rows(num_images)
        fed = _for_each_row(codes[:, index], len(rows))
        logits = model.decode_step(rows, cache, codes=fed, index=index, grid=grid)
    return codes


def _for_each_row(codes: Tensor, num_rows: int) -> Tensor:
    # conditional and null rows of an image share its codes
    return codes.repeat(num_rows // len(codes), *[1] * (codes.dim() - 1))


def _watch_batch(
    watch: Callable[[int, int, Tensor], None], first: int, num_images: int
) -> Callable[[int, Tensor], None]:
    return lambda index, logits: watch(first, index, logits[:num_images])


def _sampling(**fields: Any) -> SamplingSettings:
    try:
        return SamplingSettings(**fields)
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, got {fault['input']}" for fault in error.errors())
        raise ArraError(f"generate: {faults}") from error


def _forced_codes(model: Painter, prefix_codes: Tensor | None, num_images: int, num_codes: int) -> Tensor | None:
    if prefix_codes is None:
        return None
    if len(prefix_codes) not in (1, num_images) or prefix_codes.shape[1] > num_codes:
        raise ArraError(
            f"prefix_codes: got {tuple(prefix_codes.shape)}, expected {num_images} rows (or one for all) of at most "
            f"{num_codes} codes"
        )
    return prefix_codes.to(torch.int64).expand(num_images, -1)


@contextmanager
def _evaluating(model: Painter) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
