"""Laws of guidance, filters and the keyed draw."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from arra.sample.logits import SamplingSettings, draw_keys, filter_logits, guide, keyed_uniform, pick


def test_guidance() -> None:
    cond, uncond = torch.randn(2, 9), torch.randn(2, 9)
    torch.testing.assert_close(guide(cond, uncond, cfg_scale=1.0), cond)
    assert torch.equal(guide(cond, uncond, cfg_scale=0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, cfg_scale=3.0), 3 * cond - 2 * uncond)


@pytest.mark.parametrize(
    ("scale", "interval", "count"), [(1.0, -1, 0), (2.0, -1, 16), (2.0, 5, 7), (2.0, 0, 2), (2.0, 99, 16), (1.0, 5, 0)]
)
def test_guided_codes(scale: float, interval: int, count: int) -> None:
    assert [scale] * count + [1.0] * (16 - count) == SamplingSettings(
        cfg_scale=scale, cfg_interval=interval
    ).cfg_scales(16)


@pytest.mark.parametrize(
    ("schedule", "power", "share"),
    [
        ("linear", 1.0, lambda t: t),
        ("linear", 3.0, lambda t: t),  # which has no power
        ("power", 0.5, math.sqrt),
        ("power", 2.0, lambda t: t * t),
        ("cosine", 1.0, lambda t: (1 - math.cos(math.pi * t)) / 2),
        ("cosine", 2.75, lambda t: (1 - math.cos(math.pi * t**2.75)) / 2),
    ],
)
@pytest.mark.parametrize("cfg_scale", [4.0, 0.5])
def test_schedules_grow_from_one_to_the_scale(schedule: Any, power: float, share: Any, cfg_scale: float) -> None:
    settings = SamplingSettings(cfg_scale=cfg_scale, cfg_schedule=schedule, cfg_power=power)
    scales = settings.cfg_scales(9)
    assert (scales[0], scales[-1]) == (1.0, cfg_scale)
    assert scales == pytest.approx([1 + (cfg_scale - 1) * share(code / 8) for code in range(9)], rel=1e-12)
    assert scales == sorted(scales, reverse=cfg_scale < 1)
    assert settings.cfg_scales(1) == [1.0]
    # a window leaves the scales within it as they are
    window = {"cfg_start": 0.25, "cfg_stop": 0.75}
    cut = SamplingSettings(**{**settings.model_dump(), **window}).cfg_scales(8)
    whole = settings.cfg_scales(8)
    assert cut == [1.0, 1.0, *whole[2:6], 1.0, 1.0]
    assert SamplingSettings(**{**settings.model_dump(), "cfg_interval": 3}).cfg_scales(9) == [*scales[:5], *[1.0] * 4]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "power"])
def test_a_scale_of_one_guides_no_code(schedule: Any) -> None:
    assert SamplingSettings(cfg_scale=1.0, cfg_schedule=schedule, cfg_power=0.3).cfg_scales(7) == [1.0] * 7


@pytest.mark.parametrize(
    ("start", "stop", "interval", "guided"),
    [
        (0.0, 1.0, -1, range(10)),
        (0.5, 1.0, -1, range(5, 10)),
        (0.31, 1.0, -1, range(4, 10)),  # the code at 0.3 lies before it
        (0.0, 0.31, -1, range(4)),
        (0.2, 0.6, -1, range(2, 6)),
        (0.2, 0.6, 1, range(2, 3)),  # the earlier stop counts
        (0.2, 0.4, 5, range(2, 4)),
        (0.6, 0.6, -1, range(0)),
    ],
)
def test_guidance_starts_and_stops(start: float, stop: float, interval: int, guided: range) -> None:
    settings = SamplingSettings(cfg_scale=3.0, cfg_start=start, cfg_stop=stop, cfg_interval=interval)
    assert settings.cfg_scales(10) == [3.0 if code in guided else 1.0 for code in range(10)]


def test_shares_of_the_codes_are_what_they_say() -> None:
    """0.07 times 100 is a little more than 7 in floating point."""
    settings = SamplingSettings(cfg_scale=3.0, cfg_start=0.07, cfg_stop=0.29)
    assert [code for code, scale in enumerate(settings.cfg_scales(100)) if scale != 1] == list(range(7, 29))


def kept(logits: torch.Tensor, **settings: float) -> list[int]:
    return filter_logits(logits[None], SamplingSettings(**settings)).isfinite()[0].nonzero()[:, 0].tolist()


def test_filters() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).log()
    assert kept(logits) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=2) == [1, 2, 3]  # a tie with the second stays
    assert kept(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.5) == [1, 2]  # the probability before index 3 is 0.6
    assert kept(logits, top_p=1e-6) == [1]
    assert kept(logits, min_p=0.5 - 1e-3) == [1, 2, 3]
    assert kept(logits, min_p=1.0) == [1]
    assert kept(logits, top_k=3, top_p=0.45) == [1]  # of the three left, .4 became .5


def test_greedy_needs_no_keys_and_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 3.0, 3.0]])
    assert pick(logits, SamplingSettings(temperature=0)).tolist() == [1, 0]


LOGITS = [1.0, -0.5, 0.3, 2.0, -3.0, 0.0, 0.3, 1.9, -0.5, 0.3, 1.0, -8.0]
"""With ties at several ranks."""
ALPHA = 1e-4
"""Chance that a right sampler would fail a test, were the seeds not fixed."""


def exact(logits: list[float], settings: SamplingSettings) -> list[float]:
    """The distribution that LlamaGen's rules say, one number after the other."""

    def shares(kept: list[int]) -> dict[int, float]:
        weights = {code: math.exp(logits[code] / settings.temperature) for code in kept}
        return {code: weight / sum(weights.values()) for code, weight in weights.items()}

    kept = sorted(range(len(logits)), key=lambda code: (-logits[code], code))
    if settings.top_k:
        kept = [code for code in kept if logits[code] >= logits[kept[min(settings.top_k, len(kept)) - 1]]]
    if settings.top_p < 1:
        each = shares(kept)
        kept = [code for place, code in enumerate(kept) if sum(each[c] for c in kept[:place]) <= settings.top_p]
    each = shares(kept)
    if settings.min_p:
        each = shares([code for code in kept if each[code] >= settings.min_p * max(each.values())])
    return [each.get(code, 0.0) for code in range(len(logits))]


def assert_follows(counts: Tensor, expected: Tensor) -> None:
    """Pearson's chi-square test; what cannot come must not have come."""
    counts, expected = counts.double(), expected.double() * counts.sum()
    assert counts[expected == 0].sum() == 0
    order = expected.argsort(descending=True)
    often = int((expected >= 10).sum())  # below, the statistic is not distributed so: those are one with the last
    counts, expected = (
        torch.cat([x[order[: often - 1]], x[order[often - 1 :]].sum()[None]]) for x in (counts, expected)
    )
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > ALPHA


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_k": 6, "temperature": 1.7},  # the sixth is one of three equals, which stay
        {"top_p": 0.6},
        {"top_p": 0.9, "temperature": 0.8},
        {"min_p": 0.18},
        {"min_p": 0.4, "temperature": 1.4},
        {"top_k": 8, "top_p": 0.8, "min_p": 0.15, "temperature": 1.2},
        {"top_k": 4, "top_p": 0.7},
        {"top_p": 0.95, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution_of_the_filters(chosen: dict[str, Any]) -> None:
    settings, draws = SamplingSettings(**chosen), 60_000
    picked = pick(torch.tensor(LOGITS).expand(draws, -1), settings, keys=draw_keys([1], draws)[0])
    assert_follows(picked.bincount(minlength=len(LOGITS)), torch.tensor(exact(LOGITS, settings), dtype=torch.float64))


def test_draws_over_a_whole_vocabulary_follow_it() -> None:
    logits = 2 * torch.randn(16384, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(top_k=2000, top_p=0.95)
    expected = filter_logits(logits[None], settings).double().softmax(-1)[0]
    places = torch.arange(16384) % 40  # bins of codes from everywhere
    keys = draw_keys([2], 1200)[0]
    picked = torch.cat([pick(logits.expand(len(part), -1), settings, keys=part) for part in keys.split(200)])
    assert (expected[picked] > 0).all()
    assert_follows(places[picked].bincount(minlength=40), torch.zeros(40).double().index_add(0, places, expected))


def test_draws_of_one_image_and_of_neighbouring_seeds_are_independent() -> None:
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    keys = draw_keys(range(3000), 8)
    picked = pick(shares.log().float().expand(keys.numel(), -1), SamplingSettings(), keys=keys.flatten()).view(-1, 8)
    expected = torch.outer(shares, shares).flatten()
    for first, second in ((picked[:, 0::2], picked[:, 1::2]), (picked[0::2], picked[1::2])):  # disjoint pairs
        assert_follows((4 * first + second).flatten().bincount(minlength=16), expected)


def test_noise_is_uniform_and_independent_over_keys_and_codes() -> None:
    noise = keyed_uniform(draw_keys([7], 500)[0], 300)
    assert noise.min() > 0
    assert noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.003)
    assert noise.var().item() == pytest.approx(1 / 12, abs=0.001)
    centred = noise - noise.mean()
    for shifted in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * shifted).mean().item() * 12) < 0.015


def test_known_noise() -> None:
    # SplitMix64 from state 1234567, the generator's published first outputs
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = torch.tensor([((x >> 12) + 0.5) * 2.0**-52 for x in outputs], dtype=torch.float64)
    assert torch.equal(keyed_uniform(torch.tensor([1234567]), 3)[0], expected)


def test_keys_depend_on_the_seed_alone() -> None:
    assert torch.equal(draw_keys([3, 8, 3], 10)[[0, 1]], draw_keys([3, 8], 10))
    assert torch.equal(draw_keys([8], 20)[:, :10], draw_keys([8], 10))
    assert len(draw_keys([1, 2], 50).unique()) == 100


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"cfg_scale": float("inf")}, "finite"),
        ({"temperature": float("nan")}, "finite"),
        ({"cfg_start": 0.8, "cfg_stop": 0.1}, "no code is between"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SamplingSettings(**wrong)
