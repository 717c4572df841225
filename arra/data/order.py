"""Which record a training visits at which position: a pure function of (seed, position), in constant memory.

No list of the epoch's order is ever held: a keyed permutation tells each place on its own, so ten million records cost
what ten do, any position can be resumed from, and any number of ranks and workers agree without talking. Where records
are fetched in groups, the groups are permuted, and the records within windows of groups.
Legend: B positions of a batch, N records.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from arra.errors import ArraError

ROUNDS = 8


@lru_cache(maxsize=4096)
def mix(seed: int, purpose: str, index: int) -> int:
    """A 63-bit number that depends on all three."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:8], "big") >> 1


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where the permutation of 0..size-1 that belongs to `key` sends each place; int64.

    A Feistel network over the next power of four, walked until the place lies inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        found[outside] = _feistel(found[outside], half, key)
        outside = found >= size
    return found.astype(np.int64)


def _feistel(values: np.ndarray, half: int, key: int) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_scramble(right, mix(key, "round", number)) & mask)
    return (left << bits) | right


def _scramble(values: np.ndarray, key: int) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = values + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _by_epoch(
    in_epoch: Callable[[int, np.ndarray], np.ndarray], epoch_length: int, positions: np.ndarray
) -> np.ndarray:
    """What an order of single epochs says of the positions of the endless walk."""
    epochs, slots = np.divmod(positions, epoch_length)
    found = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        found[here] = in_epoch(epoch, slots[here])
    return found


@dataclass(frozen=True)
class Order:
    """An endless walk over the records of one or several sources.

    An epoch visits each record of a source `weight` times: with weight 1 exactly once, with 0.5 another half of the
    source in every epoch, until all had their turn.
    """

    counts: tuple[int, ...]
    """Records of each source."""
    weights: tuple[float, ...]
    seed: int

    @property
    def epoch_length(self) -> int:
        """Visits per epoch."""
        return sum(self._visits())

    def _visits(self) -> list[int]:
        return [max(1, round(n * weight)) for n, weight in zip(self.counts, self.weights, strict=True)]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The record (counted through all sources) at each position of the endless walk; int64 (B,)."""
        return _by_epoch(self.in_epoch, self.epoch_length, positions)

    def in_epoch(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """The record at each of an epoch's slots."""
        draws = permute(slots, self.epoch_length, mix(self.seed, "order", epoch))
        visits = self._visits()
        found = np.empty(len(slots), dtype=np.int64)
        first_draw = first_record = 0
        for source, (count, each) in enumerate(zip(self.counts, visits, strict=True)):
            here = (draws >= first_draw) & (draws < first_draw + each)
            own = draws[here] - first_draw
            if each != count:
                own = self._of_source(source, count, epoch * each + own)
            found[here] = first_record + own
            first_draw, first_record = first_draw + each, first_record + count
        return found

    def _of_source(self, source: int, count: int, draws: np.ndarray) -> np.ndarray:
        rounds, places = np.divmod(draws, count)
        found = np.empty(len(draws), dtype=np.int64)
        for number in np.unique(rounds).tolist():
            here = rounds == number
            found[here] = permute(places[here], count, mix(self.seed, f"source {source}", number))
        return found


@dataclass(frozen=True)
class WindowedOrder:
    """An endless walk over records that are fetched in groups: each window of it touches `window` groups alone.

    An epoch visits the groups in mixed order, each once (or as often as its source's weight says), and mixes the
    records of `window` groups at a time.
    """

    sizes: tuple[int, ...]
    """Records of each group; groups follow each other."""
    groups: Order
    """The walk over the groups."""
    window: int

    @classmethod
    def build(
        cls, counts: Sequence[int], weights: Sequence[float], sizes: Sequence[int], *, window: int, seed: int
    ) -> "WindowedOrder":
        """The walk over groups of `sizes` records, which belong to sources of `counts` records.

        Raises:
            ArraError: a weight is no whole number: an epoch would take a part of a group.
        """
        if sum(sizes) != sum(counts) or window < 1:
            raise ValueError(f"groups of {sum(sizes)} records for {sum(counts)}, window {window}")
        if set(weights) == {1}:
            return cls(tuple(sizes), Order((len(sizes),), (1.0,), seed), window)
        for weight in weights:
            if weight != round(weight):
                raise ArraError(
                    f"data.sources: weight {weight:g}; an export is read in groups of records, expected whole numbers; "
                    "use whole weights, or train from a store on a local disk"
                )
        ends = np.searchsorted(np.cumsum(sizes), np.cumsum(counts), side="right")
        if not np.isin(np.cumsum(counts), np.cumsum(sizes)).all():
            raise ValueError("a group holds records of two sources")
        return cls(tuple(sizes), Order(tuple(np.diff([0, *ends]).tolist()), tuple(weights), seed), window)

    @cached_property
    def epoch_length(self) -> int:
        """Visits per epoch."""
        return int(self._epoch(0)[1][-1])  # weights are whole numbers, so all epochs are as long

    @cached_property
    def _walks(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups in the order of an epoch's visits, and the slot at which each begins, then the epoch's length."""
        if epoch not in self._walks:
            if len(self._walks) >= 2:
                self._walks.pop(next(iter(self._walks)))
            visited = self.groups.in_epoch(epoch, np.arange(self.groups.epoch_length))
            self._walks[epoch] = visited, np.cumsum([0, *self._sizes[visited]])
        return self._walks[epoch]

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array(self.sizes, dtype=np.int64)

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum(self._sizes) - self._sizes

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The record at each position of the endless walk; int64 (B,)."""
        return _by_epoch(self.in_epoch, self.epoch_length, positions)

    def in_epoch(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """The record at each of an epoch's slots."""
        visited, edges = self._epoch(epoch)
        bounds = np.append(edges[: -1 : self.window], edges[-1])
        windows = np.searchsorted(bounds, slots, side="right") - 1
        places = np.empty(len(slots), dtype=np.int64)
        for window in np.unique(windows).tolist():
            here, start, stop = windows == window, int(bounds[window]), int(bounds[window + 1])
            key = mix(self.groups.seed, f"window {epoch}", window)
            places[here] = start + permute(slots[here] - start, stop - start, key)
        visits = np.searchsorted(edges, places, side="right") - 1
        return self._firsts[visited[visits]] + places - edges[visits]


@dataclass(frozen=True)
class Plan:
    """Which records make the batch of a step.

    Without buckets, with groups or not, batches follow the walk across epochs. With buckets (lengths, aspects) a batch
    holds records of one bucket, an epoch visits every bucket whole in mixed order, and a bucket's last batch is as
    short as it must be: nothing is dropped.
    """

    orders: tuple[Order | WindowedOrder, ...]
    """One per bucket; one alone where there are none."""
    records: tuple[np.ndarray | None, ...]
    """Which record each order's number stands for; None is the number itself."""
    batch_size: int
    seed: int

    @classmethod
    def build(
        cls,
        counts: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        buckets: np.ndarray | None = None,
        groups: Sequence[int] | None = None,
        window: int = 1,
    ) -> "Plan":
        """The plan over sources of `counts` records; `buckets` (N,) names the bucket of each.

        `groups` are the sizes of what is fetched together, in the order of the records; `window` groups are mixed.

        Raises:
            ArraError: groups and a weight that is no whole number.
        """
        pairs = [pair for pair in zip(counts, weights or [1.0] * len(counts), strict=True) if pair[0]]
        counts, given = [count for count, _ in pairs], tuple(weight for _, weight in pairs)
        if groups is not None:
            if buckets is not None:
                raise ValueError("groups and buckets do not go together")
            windowed = WindowedOrder.build(counts, given, groups, window=window, seed=seed)
            return cls((windowed,), (None,), batch_size, seed)
        if buckets is None:
            return cls((Order(tuple(counts), given, seed),), (None,), batch_size, seed)
        edges = np.cumsum([0, *counts])
        orders, records = [], []
        for bucket in np.unique(buckets).tolist():
            inside = np.nonzero(buckets == bucket)[0]
            per_source = np.diff(np.searchsorted(inside, edges)).tolist()
            present = [(n, weight) for n, weight in zip(per_source, given, strict=True) if n]
            orders.append(
                Order(tuple(n for n, _ in present), tuple(w for _, w in present), mix(seed, "bucket", bucket))
            )
            records.append(inside)
        return cls(tuple(orders), tuple(records), batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch (of plain batches: the last one reaches into the next epoch)."""
        return sum(-(-order.epoch_length // self.batch_size) for order in self.orders)

    def batch(self, step: int) -> np.ndarray:
        """The records of a step's batch, counted from 0; int64 (B,), shorter only at the end of a bucket."""
        if self.records[0] is None:
            return self.orders[0].at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))
        epoch, place = divmod(step, self.steps_per_epoch)
        place = int(permute(np.array([place]), self.steps_per_epoch, mix(self.seed, "batches", epoch))[0])
        for order, records in zip(self.orders, self.records, strict=True):
            batches = -(-order.epoch_length // self.batch_size)
            if place < batches:
                last = min((place + 1) * self.batch_size, order.epoch_length)
                found = order.in_epoch(epoch, np.arange(place * self.batch_size, last))
                return found if records is None else records[found]
            place -= batches
        raise AssertionError("a place lies in one of the buckets")


def part_of(records: np.ndarray, rank: int, num_ranks: int) -> slice:
    """The places of a batch that belong to a rank: contiguous, together the whole, sizes differ by one at most."""
    return slice(len(records) * rank // num_ranks, len(records) * (rank + 1) // num_ranks)
