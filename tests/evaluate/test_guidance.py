"""The search over sampling settings: rounds and budgets, pairing, what the interval of a difference is worth."""

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.distances import kernel_distance
from arra.evaluate.guidance import Objective, Round, StrangersKernel, halve, num_pictures, plan_rounds
from arra.sample.logits import SamplingSettings

SPLIT, METRIC = "validation", "hits"


def settings_of(*scales: float) -> list[SamplingSettings]:
    return [SamplingSettings(cfg_scale=scale) for scale in scales]


class Judge:
    """Settings of scale s hit with probability 1 - |s - best| / 10, on the same chances for all: paired."""

    def __init__(self, num_images: int, *, best: float = 3.0, seed: int = 77) -> None:
        self.chances = torch.from_numpy(np.random.default_rng(seed).random(num_images))
        self.best, self.asked = best, dict[float, list[int]]()

    def __call__(self, settings: SamplingSettings, num_images: int) -> dict[str, Tensor]:
        self.asked.setdefault(settings.cfg_scale, []).append(num_images)
        share = 1 - abs(settings.cfg_scale - self.best) / 10
        groups = torch.arange(len(self.chances))
        return {
            f"{SPLIT}/{METRIC}": (self.chances[:num_images] < share).double(),
            f"{SPLIT}/groups": groups[:num_images],
            f"{SPLIT}/reference_groups": groups,
        }


def searched(judge: Judge, scales: list[float], rounds: list[Round], **how: int):
    tried = dict.fromkeys(settings_of(*scales), ())
    first, plain = next(iter(tried)), SamplingSettings(cfg_scale=1.0)
    roles = {**tried, first: ("before",), plain: ("no guidance",)}
    objective = Objective((METRIC,), SPLIT, None)
    return halve(roles, rounds, judge, objective=objective, metrics=[METRIC], num_resamples=200, **how)  # type: ignore[arg-type]


def test_a_budget_is_kept_and_used() -> None:
    free = plan_rounds(27, num_images=243, num_kept=2)
    assert free == [Round(27, 27), Round(11, 81), Round(6, 243)]
    assert num_pictures(free) == 27 * 27 + 11 * (81 - 27) + 6 * (243 - 81)
    for budget in (700, 1000, 2000, 10_000):
        rounds = plan_rounds(27, num_images=243, num_kept=2, budget=budget)
        assert num_pictures(rounds) <= budget
        if budget < num_pictures(free):
            more = plan_rounds(27, num_images=rounds[-1].num_images + 1, num_kept=2)
            assert num_pictures(more) > budget
    assert plan_rounds(3, num_images=1000) == [Round(3, 1000)]  # so few settings all get all pictures
    assert plan_rounds(100, num_images=8) == [Round(100, 8)]
    with pytest.raises(ArraError, match=r"--budget: 27 settings need at least 648 pictures, the budget has 100"):
        plan_rounds(27, num_images=243, num_kept=2, budget=100)


def test_the_best_wins_and_settings_with_a_role_stay() -> None:
    judge = Judge(900)
    scales = [10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    rounds = [Round(10, 100), Round(5, 300), Round(3, 900)]
    trials = searched(judge, scales, rounds)
    assert trials[0].settings.cfg_scale == 3.0
    assert trials[0].roles == ("winner",)
    assert (trials[0].difference, trials[0].margin) == (0, 0)
    by_scale = {trial.settings.cfg_scale: trial for trial in trials}
    assert {scale for scale, trial in by_scale.items() if trial.num_images == 900} == {3.0, 1.0, 10.0}
    assert by_scale[10.0].roles == ("before",)
    assert by_scale[1.0].roles == ("no guidance",)
    assert len(trials) == 10
    assert [trial.num_images for trial in trials] == sorted((trial.num_images for trial in trials), reverse=True)
    assert not by_scale[9.0].is_within_noise  # 0.4 against 1.0 on 100 pictures
    # compared with the winner on the pictures that both have
    hits = judge.chances[:100] < 1 - 6 / 10
    assert by_scale[9.0].difference == pytest.approx(1 - float(hits.double().mean()))
    assert by_scale[9.0].values[METRIC] == pytest.approx(float(hits.double().mean()))


def test_equal_settings_are_within_noise_and_differences_are_paired() -> None:
    judge = Judge(400, best=9.0)
    trials = searched(judge, [1.0, 4.999, 5.0, 4.0], [Round(4, 400)])
    by_scale = {trial.settings.cfg_scale: trial for trial in trials}
    assert by_scale[4.999].is_within_noise
    assert by_scale[5.0].is_within_noise
    assert not by_scale[4.0].is_within_noise
    # what 4.0 hits (half) 5.0 hits too: only the tenth between them is uncertain, and that for three comparisons
    share = trials[0].values[METRIC] - by_scale[4.0].values[METRIC]
    assert share == pytest.approx(0.1, abs=0.05)
    assert by_scale[4.0].margin == pytest.approx(2.394 * (share * (1 - share) / 400) ** 0.5, rel=0.15)


def test_metrics_together_are_shares_of_what_they_are_without_guidance() -> None:
    one = Objective(("frechet",), SPLIT, None)
    assert one.scaled({"frechet": 5.0}).score({"frechet": 4.0}) == 4.0
    two = Objective(("frechet", "retrieval_at_1"), SPLIT, None).scaled({"frechet": 5.0, "retrieval_at_1": 0.2})
    assert two.score({"frechet": 4.0, "retrieval_at_1": 0.3}) == pytest.approx((4 / 5 - 0.3 / 0.2) / 2)


def test_the_kernel_distance_leaves_own_references_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 6, generator=generator) for n in (5, 9))
    kernel = StrangersKernel(x, y)
    # two sets without any own pair: the plain distance, weighted together over which references are strangers
    k = lambda a, b: ((a.double() @ b.double().T) / 6 + 1) ** 3  # noqa: E731
    strangers = torch.ones(5, 9, dtype=torch.bool)
    strangers.fill_diagonal_(False)
    within = (k(x, x).sum() - k(x, x).diagonal().sum()) / 20 + (k(y, y).sum() - k(y, y).diagonal().sum()) / 72
    expected = 1000 * float(within - 2 * k(x, y)[strangers].mean())
    assert kernel(np.ones(5), np.ones(9)) == pytest.approx(expected, rel=1e-12)
    plain = kernel_distance(x, y)
    shift = -2000 * float(k(x, y)[strangers].mean() - k(x, y).mean())
    assert kernel(np.ones(5), np.ones(9)) == pytest.approx(plain + shift, rel=1e-9)
    # a resample is the set with its copies, pairs of copies left out
    twice = StrangersKernel(torch.cat([x, x[:1]]), y)
    assert kernel(np.array([1.0, 1, 1, 1, 1]), np.ones(9)) != pytest.approx(twice(np.ones(6), np.ones(9)))
    assert kernel(np.array([0.0, 1, 1, 1, 1]), np.ones(9)) == pytest.approx(
        StrangersKernel(x, y)(np.array([0.0, 2, 2, 2, 2]), np.full(9, 3.0)), rel=1e-12
    )


def test_copies_of_prompts_bring_no_nearness() -> None:
    """Pictures that repeat their own reference are as far as pictures of strangers, on average: the bias is gone."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(60):
        y = torch.randn(12, 8, generator=generator)
        found.append(StrangersKernel(y.clone(), y)(np.ones(12), np.ones(12)))
    assert abs(np.mean(found)) < 3 * np.std(found) / 60**0.5 + 1e-9
    assert kernel_distance(y.clone(), y) < -100
