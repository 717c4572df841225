"""Speculative Jacobi decoding: the pictures that `decode_batch` paints, from the same seeds, in fewer passes.

The noise of each code is fixed by the image's seed, so a code is a function of the codes before it. A pass reads the
last code that is known and guesses of the next ones, picks every code anew with its own noise, and keeps picks up to
and with the first that differs from what was guessed: its context was right, so it is what plain decoding draws.
Picks behind it are the next guesses (a Jacobi iteration), so every pass gains one code at least. Guesses change the
number of passes, never a picture, but for rounding: a product of more rows may round differently, and then of two codes
whose noisy scores agree to about 1e-6 the other may win.

The paper accepts a guess with a probability of its own, 1 - TV for distributions that far apart in total variation,
and draws again where it refuses: its pictures follow the model, but belong to no seed. Picking from both distributions
with the same Gumbel noise agrees with a probability of at least (1 - TV) / (1 + TV).

Each image is decoded by itself (with its null row while guided), since images would gain codes at different speeds.
That suits few images at a time, where a pass over many codes takes about as long as one over a single code.
Letters: P = h*w codes of an image, W places of a window, R rows (1, or 2 while guided), K codes of the vocabulary.
Source: Teng et al. 2024, Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi
Decoding, arXiv 2410.01699 (the window and its iteration); Daliri, Musco and Suresh 2024, Coupling without Communication
and Drafter-Invariant Speculative Decoding, arXiv 2408.07978 (the bound for shared Gumbel noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.errors import ArraError
from arra.sample.decoding import FREE, Batch, Prefixes, Reader, Rows, Watch, start_codes
from arra.sample.logits import SamplingSettings, guide, pick

MIN_WINDOW = 2
"""A window of one code is plain decoding."""


@dataclass(frozen=True)
class JacobiCodes:
    """The codes of one image, and what they took."""

    codes: Int[Tensor, "1 P"]
    passes: int
    """Times the model was asked for codes, the reading of the prefix included; plain decoding asks once for each."""


def check_window(model: Reader, window: int) -> None:
    """Nothing.

    Raises: ArraError for a window that is none, or a model that cannot take back what it has read.
    """
    if window and window < MIN_WINDOW:
        raise ArraError(
            f"generate: jacobi_window: {window} is no window; expected {MIN_WINDOW} or more codes a pass, or 0 for "
            "plain decoding"
        )
    if window and not model.keeps_all:
        raise ArraError(
            "generate: jacobi_window: this model has sliding windows or recurrent layers and cannot take back a wrong "
            "guess; leave --jacobi-window away"
        )


def decode_jacobi(
    model: Reader,
    batch: Batch,
    *,
    grid: tuple[int, int],
    settings: SamplingSettings,
    window: int,
    prefixes: Prefixes | None = None,
    watch: Watch | None = None,
) -> JacobiCodes:
    """The codes of a batch of one image, up to `window` of them from each pass.

    `watch(index, logits)` sees, code by code, the logits (1, K) each is finally taken from, before the filters.
    """
    if batch.num_images != 1:
        raise ValueError(f"one image at a time, got {batch.num_images}")
    codes = start_codes(batch)
    free = (codes[0] == FREE).nonzero()[:, 0].tolist()
    if not free:
        return JacobiCodes(codes, passes=0)
    scales = settings.cfg_scales(codes.shape[1])
    rows = Rows(model, batch, grid, codes, guided=[scales[index] != 1 for index in free], prefixes=prefixes)
    rows.begin(free[0])
    logits, places, done, passes = rows.logits[:, None], free[:1], 0, 0
    while True:
        told = _guided(logits, [scales[index] for index in places])
        picks = pick(told, settings, keys=batch.keys[0, places])
        gained = 1 + _matches(codes[0, places[:-1]], picks[:-1])
        codes[0, places] = picks
        if watch is not None:
            for index, one in zip(places[:gained], told.split(1)[:gained], strict=True):
                watch(index, one)
        done, passes = done + gained, passes + 1
        if done == len(free):
            return JacobiCodes(codes, passes=passes)
        known, guessed, places = free[done - 1], len(places) - gained, free[done : done + window]
        if new := places[guessed:-1]:  # the last one of a window is picked, but not read
            # the last distribution with the place's own noise; a repeated neighbour did no better
            codes[0, new] = pick(told[-1:].expand(len(new), -1), settings, keys=batch.keys[0, new])
        rows.seat(known, done, count=len(places))
        logits = rows.read(known, places[-1], every=True)[:, [index - known - 1 for index in places]]


def _guided(logits: Float[Tensor, "R W K"], scales: Sequence[float]) -> Float[Tensor, "W K"]:
    """Logits of the places of a window after guidance, exactly the conditional ones where its scale is 1."""
    if len(logits) == 1:
        return logits[0]
    scale = torch.tensor(scales, dtype=logits.dtype, device=logits.device)[:, None]
    return torch.where(scale == 1, logits[0], guide(logits[0], logits[1], cfg_scale=scale))


def _matches(guesses: Int[Tensor, "G"], picks: Int[Tensor, "G"]) -> int:
    """How many guesses are right before the first that is wrong."""
    return int((guesses == picks).cumprod(0).sum())
