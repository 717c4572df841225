"""From logits to the next code: guidance, then temperature, top-k, top-p, min-p, then a keyed draw.

Order and rules of the filters are LlamaGen's (min-p, which comes last, is ours).
Letters: B batch, K codes, N steps.
Source: FoundationVision/LlamaGen, autoregressive/models/generate.py (top_k_top_p_filtering, sample); schedules that
grow with the place in the picture: Muse (linear), RAR (cosine of a power).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from arra.settings import Settings

# LlamaGen's floor of the temperature
MIN_TEMPERATURE = 1e-5


class SamplingSettings(Settings):
    """How codes are drawn."""

    cfg_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """uncond + cfg_scale * (cond - uncond); 1 is off and costs nothing."""
    cfg_schedule: Literal["constant", "linear", "cosine", "power"] = "constant"
    """How the scale grows from 1 at the first code to `cfg_scale` at the last: not at all (it is constant), or by
    t, t^cfg_power or (1 - cos(pi t^cfg_power)) / 2 of the way, t = code / (codes - 1)."""
    cfg_power: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of the power and the cosine schedule."""
    cfg_start: float = Field(default=0.0, ge=0, le=1)
    """No guidance for this first share of the codes."""
    cfg_stop: float = Field(default=1.0, ge=0, le=1)
    """No guidance from this share of the codes on."""
    cfg_interval: int = Field(default=-1, ge=-1)
    """LlamaGen's way to stop: guide codes 0..cfg_interval + 1 (it counts decode steps, after the prefill); -1 is all.
    """
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """0 is greedy: the most probable code, the lower one of two equal."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most probable codes, and those equal to the k-th; 0 is off."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep codes, most probable first, while the probability before them is at most top_p; 1 is off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep codes at least min_p times as probable as the most probable one; 0 is off."""

    @model_validator(mode="after")
    def _guides_something(self) -> "SamplingSettings":
        if self.cfg_start > self.cfg_stop:
            raise ValueError(f"'cfg_start' is {self.cfg_start}, behind 'cfg_stop' {self.cfg_stop}: no code is between")
        return self

    def cfg_scales(self, num_codes: int) -> list[float]:
        """The scale at each code; exactly 1 where guidance is off."""
        start, stop = (round(share * num_codes, 6) for share in (self.cfg_start, self.cfg_stop))  # 0.07 of 100 is 7
        if self.cfg_interval >= 0:
            stop = min(stop, self.cfg_interval + 2)
        return [
            self._scale_at(code / max(num_codes - 1, 1)) if start <= code < stop else 1.0 for code in range(num_codes)
        ]

    def _scale_at(self, t: float) -> float:
        """The scale of the schedule at a place in [0, 1] of the picture."""
        if self.cfg_schedule == "constant":
            return self.cfg_scale
        if self.cfg_schedule != "linear":
            t = t**self.cfg_power
        if self.cfg_schedule == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return 1 + (self.cfg_scale - 1) * t


def guide(
    cond: Float[Tensor, "B K"], uncond: Float[Tensor, "B K"], *, cfg_scale: float | Float[Tensor, "B 1"]
) -> Float[Tensor, "B K"]:
    """Logits under classifier-free guidance."""
    return uncond + (cond - uncond) * cfg_scale


def keep_top_k(logits: Float[Tensor, "B K"], top_k: int) -> Float[Tensor, "B K"]:
    """Logits with -inf below the k-th largest; ties with it stay."""
    if top_k == 0:
        return logits
    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Float[Tensor, "B K"], top_p: float) -> Float[Tensor, "B K"]:
    """Logits with -inf where the probability of all better codes together exceeds `top_p`; the best one stays."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    cumulative = ordered.softmax(-1).cumsum(-1)
    dropped = torch.zeros_like(cumulative, dtype=torch.bool)
    dropped[:, 1:] = cumulative[:, :-1] > top_p
    return logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)


def keep_min_p(logits: Float[Tensor, "B K"], min_p: float) -> Float[Tensor, "B K"]:
    """Logits with -inf where the probability is below `min_p` times the largest."""
    if min_p <= 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def filter_logits(logits: Float[Tensor, "B K"], settings: SamplingSettings) -> Float[Tensor, "B K"]:
    """Logits after temperature, top-k, top-p and min-p, in this order; their softmax is what codes are drawn from."""
    scaled = logits / max(settings.temperature, MIN_TEMPERATURE)
    return keep_min_p(keep_top_p(keep_top_k(scaled, settings.top_k), settings.top_p), settings.min_p)


def draw_keys(seeds: Sequence[int], num_steps: int) -> Int[Tensor, "B N"]:
    """One 64-bit key for each image and step, from a generator of the image's own: row i depends on seeds[i] alone."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randint(-(2**63), 2**63 - 1, (num_steps,), generator=generator))
    return torch.stack(rows)


def keyed_uniform(keys: Int[Tensor, "B"], num_codes: int) -> Float[Tensor, "B K"]:
    """One number in (0, 1), float64, for each key and code: the same on every device and at any batch size.

    Source: the SplitMix64 generator, started at the key (Steele, Lea and Flood 2014).
    """

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign, SplitMix64's do not

    counter = torch.arange(1, num_codes + 1, device=keys.device)
    x = keys[:, None] + counter * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64; products wrap around
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    x = x ^ shifted(x, 31)
    # 52 bits and a half: neither 0 nor 1 can come out, and the number is exact
    return (shifted(x, 12).double() + 0.5) * 2.0**-52


def pick(
    logits: Float[Tensor, "B K"], settings: SamplingSettings, *, keys: Int[Tensor, "B"] | None = None
) -> Int[Tensor, "B"]:
    """The next code of each row: the most probable at temperature 0, otherwise drawn with the row's key.

    The draw is a race (argmax of log-probability plus Gumbel noise). A rounding error of size e in the logits changes
    its winner with a probability of about e, whereas inverting the cumulative distribution adds up such errors over
    all codes: at 16,384 codes and e = 2e-6 that was 1e-6 against 5e-4 for each draw.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    if keys is None:
        raise ValueError("a draw needs keys")
    noise = -(-keyed_uniform(keys, logits.shape[-1]).log()).log()
    return (filter_logits(logits, settings).double() + noise).argmax(-1)
