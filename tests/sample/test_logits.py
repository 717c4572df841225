"""Laws of guidance, filters and the keyed draw."""

import pytest
import torch

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


def test_draws_follow_the_filtered_probabilities() -> None:
    draws = 40_000
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0, 0.0])
    settings = SamplingSettings(temperature=1.3, top_k=5)
    expected = filter_logits(logits[None], settings).softmax(-1)[0]
    keys = draw_keys([0], draws)[0]
    counts = pick(logits.expand(draws, -1), settings, keys=keys).bincount(minlength=6)
    assert counts[4] == 0
    real = expected > 0
    chi_square = ((counts - draws * expected)[real].square() / (draws * expected[real])).sum()
    assert chi_square < 18.5  # 99.9 % of the chi-square distribution with 4 degrees of freedom


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
