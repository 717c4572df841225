"""The order of training is a permutation, whole and keyed, whoever asks for which part of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arra.data.order import Order, Plan, mix, part_of, permute


def walk(order: Order, count: int, start: int = 0) -> list[int]:
    return order.at(np.arange(start, start + count)).tolist()


def test_permute_is_a_permutation_of_every_size_and_of_its_key() -> None:
    for size in range(1, 301):
        one, other = (permute(np.arange(size), size, key) for key in (1, 2))
        assert np.array_equal(np.sort(one), np.arange(size)), size
        assert np.array_equal(np.sort(other), np.arange(size)), size
        assert np.array_equal(one, permute(np.arange(size), size, 1)), size
        if size > 12:
            assert not np.array_equal(one, other), size


def test_a_place_is_told_alone_also_of_very_many() -> None:
    size = 10_000_000
    places = np.array([0, 1, 2, 77, 5_000_000, size - 1])
    together = permute(places, size, 9)
    assert (together >= 0).all()
    assert (together < size).all()
    assert [int(permute(np.array([place]), size, 9)[0]) for place in places] == together.tolist()
    assert permute(np.arange(0), size, 9).tolist() == []
    many = permute(np.arange(200_000), size, 9)
    assert len(np.unique(many)) == 200_000


def test_no_place_is_preferred() -> None:
    """Over many keys each record comes first, and follows another, as often as the next one (chi-square, 5 sigma)."""
    for size in (10, 37):
        firsts: Counter[int] = Counter()
        gaps: Counter[int] = Counter()
        for seed in range(2000):
            first, second = permute(np.arange(2), size, mix(seed, "order", 0)).tolist()
            firsts[first] += 1
            gaps[(second - first) % size] += 1
        for counts, kinds in ((firsts, size), (gaps, size - 1)):
            expected = 2000 / kinds
            chi_square = sum((counts[n] - expected) ** 2 / expected for n in counts) + expected * (kinds - len(counts))
            assert chi_square < kinds + 5 * (2 * kinds) ** 0.5, counts


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 5))
def test_with_weight_one_every_epoch_visits_each_record_once(counts: list[int], seed: int) -> None:
    order = Order(tuple(counts), (1.0,) * len(counts), seed)
    total = sum(counts)
    assert order.epoch_length == total
    visited = walk(order, 3 * total)
    for epoch in range(3):
        assert sorted(visited[epoch * total : (epoch + 1) * total]) == list(range(total))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 5),
)
def test_a_weight_is_visits_per_epoch_and_all_records_have_their_turn(
    counts: list[int], weights: list[float], seed: int
) -> None:
    order = Order(tuple(counts), tuple(weights[: len(counts)]), seed)
    epochs = 12
    visited = walk(order, epochs * order.epoch_length)
    edges = np.cumsum([0, *counts])
    for source, (count, weight) in enumerate(zip(counts, weights, strict=False)):
        visits = max(1, round(count * weight))
        seen: list[int] = []
        for epoch in range(epochs):
            here = visited[epoch * order.epoch_length : (epoch + 1) * order.epoch_length]
            own = [record for record in here if edges[source] <= record < edges[source + 1]]
            assert len(own) == visits
            seen += own
        times = Counter(seen)
        turns = visits * epochs / count  # no record is ahead of another by more than a turn
        assert max(times.values()) <= np.ceil(turns)
        assert min(times[record] for record in range(edges[source], edges[source + 1])) >= np.floor(turns)


def test_positions_are_told_in_any_order() -> None:
    order = Order((11, 7), (0.5, 2.0), 3)
    whole = walk(order, 200)
    jumping = np.random.default_rng(0).permutation(200)
    assert order.at(jumping).tolist() == [whole[position] for position in jumping]
    assert walk(order, 50, start=150) == whole[150:]
    far = order.at(np.array([10**12]))
    assert 0 <= far[0] < 18


def test_seeds_and_epochs_differ() -> None:
    order = Order((50,), (1.0,), 0)
    first, second = walk(order, 50), walk(order, 50, start=50)
    assert first != second
    assert first != walk(Order((50,), (1.0,), 1), 50)
    assert first != list(range(50))


BUCKETS = np.array([3, 1, 1, 3, 9, 1, 3, 1, 1, 1, 3, 1, 9])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("counts", [(13,), (6, 7)])
def test_buckets_drop_nothing(batch_size: int, counts: tuple[int, ...]) -> None:
    plan = Plan.build(counts, batch_size=batch_size, seed=1, buckets=BUCKETS)
    orders = []
    for epoch in range(3):
        batches = [plan.batch(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(13))
        short = [BUCKETS[batch[0]] for batch in batches if len(batch) < batch_size]
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert len(set(BUCKETS[batch])) == 1
        assert len(short) == len(set(short))  # of each bucket at most the last
        orders.append([batch.tolist() for batch in batches])
    assert orders[0] != orders[1]


def test_buckets_keep_the_weights_of_sources() -> None:
    plan = Plan.build((6, 7), batch_size=2, seed=1, weights=(2.0, 1.0), buckets=BUCKETS)
    visited = Counter(np.concatenate([plan.batch(step) for step in range(plan.steps_per_epoch)]).tolist())
    assert visited == {record: 2 if record < 6 else 1 for record in range(13)}


def test_without_buckets_batches_follow_the_walk() -> None:
    plan = Plan.build((5, 6), batch_size=4, seed=2, weights=(1.0, 0.5))
    order = Order((5, 6), (1.0, 0.5), 2)
    found = np.concatenate([plan.batch(step) for step in range(20)])
    assert found.tolist() == walk(order, 80)
    assert plan.steps_per_epoch == 2


@given(count=st.integers(0, 60), num_ranks=st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_the_ranks_parts_are_the_whole(count: int, num_ranks: int) -> None:
    records = np.arange(count)
    parts = [records[part_of(records, rank, num_ranks)] for rank in range(num_ranks)]
    assert np.concatenate(parts).tolist() == records.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
