"""Measures against closed forms, their invariances and their bounds."""

import pytest
import torch

from arra.align.measures import (
    Moments,
    cknna,
    classified,
    fit_ridge,
    fit_shared_ridge,
    hsic_unbiased,
    linear_cka,
    reading,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=9).double()).Q.float()


def test_a_turned_scaled_and_shifted_copy_is_wholly_alike():
    states = normal(40, 12)
    assert linear_cka(states, 3.5 * states @ rotation(12) + 7) == pytest.approx(1, abs=1e-6)
    assert cknna(states, 3.5 * states @ rotation(12)) == pytest.approx(1, abs=1e-9)


def test_likeness_does_not_see_turns_scale_or_order():
    one, two = normal(40, 12), normal(40, 6, seed=1) + normal(40, 12)[:, :6]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    for measure in (linear_cka, cknna):
        plain = measure(one, two)
        assert 0.1 < plain < 0.9
        assert measure(one @ rotation(12) * 0.01, two * 50) == pytest.approx(plain, abs=1e-5)
        assert measure(one[order], two[order]) == pytest.approx(plain, abs=1e-9)
        # neighbourhoods are not mutual, so the published CKNNA hears a little of which side comes first
        assert measure(two, one) == pytest.approx(plain, abs=1e-9 if measure is linear_cka else 0.01)
    assert linear_cka(one + 100, two - 3) == pytest.approx(linear_cka(one, two), abs=1e-4)


def test_unrelated_vectors_are_not_alike_however_wide():
    """Where the plain estimate says 0.95: 16 pictures in 300 dimensions."""
    found = [linear_cka(normal(16, 300, seed=n), normal(16, 300, seed=1000 + n)) for n in range(200)]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / len(found) ** 0.5
    assert abs(mean) < 3 * error
    assert error < 0.01
    by_chance = [cknna(normal(60, 20, seed=n), normal(60, 20, seed=1000 + n)) for n in range(20)]
    assert sum(by_chance) / 20 < 0.25


def test_hsic_is_the_mean_over_distinct_pictures():
    """The estimate without bias is a mean over quadruples of distinct pictures; here all of them are counted."""
    one, two = normal(6, 3).double(), normal(6, 2, seed=1).double()
    gram, other = one @ one.T, two @ two.T
    total, count = 0.0, 0
    for i in range(6):
        for j in set(range(6)) - {i}:
            for q in set(range(6)) - {i, j}:
                for r in set(range(6)) - {i, j, q}:
                    total += float(gram[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q]))
                    count += 1
    assert hsic_unbiased(gram, other) == pytest.approx(total / count, abs=1e-9)


def test_all_neighbours_are_the_likeness_of_directions():
    one, two = normal(20, 5), normal(20, 5, seed=1) + normal(20, 5)
    unit = [torch.nn.functional.normalize(each, dim=1) for each in (one, two)]
    assert cknna(one, two, k=19) == pytest.approx(linear_cka(*unit), abs=1e-6)


@pytest.mark.parametrize("k", [1, 20])
def test_neighbours_out_of_range_are_refused(k: int):
    with pytest.raises(ValueError, match=f"k: {k} is outside 2..19"):
        cknna(normal(20, 5), normal(20, 5), k=k)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(normal(3, 5), normal(3, 5))


def test_states_that_do_not_vary_tell_nothing():
    still = normal(1, 8).expand(20, 8) * 1000 + 1e-6 * normal(20, 8)
    assert linear_cka(still, normal(20, 5)) == 0
    assert cknna(still, normal(20, 5)) == 0
    ridge = fit_ridge(still, normal(20, 5))
    assert torch.allclose(ridge(still), normal(20, 5).mean(0).expand(20, 5), atol=1e-6)


def test_a_linear_map_is_found():
    states, weight = normal(300, 6), normal(6, 4, seed=1)
    ridge = fit_ridge(states, states @ weight + 2, strengths=(1e-9,))
    assert torch.allclose(ridge.weight, weight, atol=1e-5)
    assert torch.allclose(ridge.bias, torch.full((4,), 2.0), atol=1e-5)
    new = normal(50, 6, seed=3)
    score = reading(ridge(new), new @ weight + 2, mean=torch.full((4,), 2.0))
    assert (score.cosine, score.r2) == pytest.approx((1, 1), abs=1e-6)


def test_leaving_one_out_is_exact():
    """The strength is the one that wins when every picture is left out in turn."""
    states, targets = normal(12, 5), normal(12, 3, seed=1) + normal(12, 5)[:, :3]
    strengths = (1e-3, 0.3, 30.0)
    centred = states.double() - states.double().mean(0)
    unit = float(centred.square().sum()) / 5
    errors = []
    for strength in strengths:
        error = 0.0
        for out in range(12):
            kept = [row for row in range(12) if row != out]
            x, y = states.double()[kept], targets.double()[kept]
            xc, yc = x - x.mean(0), y - y.mean(0)
            weight = torch.linalg.solve(xc.T @ xc + strength * unit * torch.eye(5).double(), xc.T @ yc)
            guess = (states.double()[out] - x.mean(0)) @ weight + y.mean(0)
            error += float((guess - targets.double()[out]).square().sum())
        errors.append(error)
    assert fit_ridge(states, targets, strengths=strengths).strength == strengths[errors.index(min(errors))]


def test_noise_is_not_read():
    """More dimensions than pictures: an unregularised map would be perfect on its own pictures and useless here."""
    states, targets = normal(200, 400), normal(200, 10, seed=1)
    ridge = fit_ridge(states[:100], targets[:100])
    score = reading(ridge(states[100:]), targets[100:], mean=targets[:100].mean(0))
    assert ridge.strength >= 1
    assert abs(score.cosine) < 0.12
    assert -0.3 < score.r2 < 0.05


def test_sums_fit_what_rows_fit():
    states, targets = normal(90, 7), normal(90, 3, seed=1) + normal(90, 7)[:, :3]
    first, second = Moments(), Moments()
    first.add(states[:20], targets[:20])
    first.add(states[20:50], targets[20:50])
    second.add(states[50:], targets[50:])
    whole, plain = first.joined(second).ridge(0.1), fit_ridge(states, targets, strengths=(0.1,))
    assert torch.allclose(whole.weight, plain.weight, atol=1e-5)
    assert torch.allclose(whole.bias, plain.bias, atol=1e-5)
    error = (plain(states[50:]) - targets[50:]).square().sum()
    assert second.error(plain) == pytest.approx(float(error), rel=1e-4)
    shared = fit_shared_ridge(first, second)
    best = min(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
        key=lambda s: second.error(first.ridge(s)) + first.error(second.ridge(s)),
    )
    assert shared.strength == best


def test_classes_are_told_apart_where_they_lie_apart():
    classes = torch.arange(60) % 3
    states = normal(60, 8) + 6 * torch.nn.functional.one_hot(classes, 8).float()
    accuracy, majority = classified(states[:30], classes[:30], states[30:], classes[30:])
    assert accuracy == 1
    assert majority == pytest.approx(1 / 3)
    accuracy, _ = classified(normal(60, 8)[:30], classes[:30], normal(60, 8)[30:], classes[30:])
    assert accuracy < 0.65
