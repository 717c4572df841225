"""Exponential moving averages of the weights, which are often better than the weights themselves.

The loop updates them after every step; validation, pictures and the saved model use the first one, where there is any.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arra.train.parallel import own_part


class Averages:
    """Averages of named parameters, one for each decay; of sharded parameters each rank averages its shards.

    With `warmup` the average is over fewer steps at first: the decay after n steps is at most (1 + n) / (10 + n).
    With `offload` averages lie in the CPU's memory. From a CUDA device weights land in pinned memory while the next
    step begins, and are averaged in before the step after it, or when somebody asks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Sequence[float],
        *,
        warmup: bool = True,
        offload: bool = False,
    ) -> None:
        """Begins with the weights as they are; decays must differ."""
        if len({*decays}) < len(decays):
            raise ValueError(f"decays {list(decays)}: expected different ones")
        self.decays, self.warmup = tuple(decays), warmup
        self._parameters = dict(parameters) if decays else {}
        self._averages: list[dict[str, Tensor]] = [
            {
                name: p.detach().to("cpu", copy=True) if offload else p.detach().clone()
                for name, p in self._parameters.items()
            }
            for _ in decays
        ]
        self._landing: list[Tensor] | None = None
        if offload and any(p.device.type == "cuda" for p in self._parameters.values()):
            parts = self._parts(self._parameters.values())
            self._landing = [torch.empty_like(part, device="cpu", pin_memory=True) for part in parts]
        self._landed: tuple[torch.cuda.Event, int] | None = None
        self._swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Nothing; the weights after `step` steps are in every average."""
        assert not self._swapped, "the averages are in the parameters' place"
        self._settle()
        live = self._parts(self._parameters.values())
        if self._landing is None:
            self._take_in(live, step)
            return
        for landing, part in zip(self._landing, live, strict=True):
            landing.copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._landed = event, step

    def tensors(self) -> dict[str, Tensor]:
        """All averages, to save them or to load into: `average.NAME` of the first, `average.DECAY.NAME` of others."""
        assert not self._swapped, "the averages are in the parameters' place"
        self._settle()
        return {
            f"average.{name}" if place == 0 else f"average.{decay}.{name}": value
            for place, (decay, average) in enumerate(zip(self.decays, self._averages, strict=True))
            for name, value in average.items()
        }

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, nn.Parameter], which: int = 0) -> Iterator[None]:
        """A block in which the parameters hold an average; afterwards they are what they were, bit for bit.

        They are named as those that are averaged; without averages nothing happens. Meanwhile the average's memory
        holds the weights, so that no third copy is needed. Gathered copies of shards (FSDP2's) are not touched: gather
        them inside the block, and let go of them there.
        """
        if not self.decays:
            yield
            return
        assert not self._swapped, "the averages are in the parameters' place"
        self._settle()
        average = self._averages[which]
        pairs = [*zip(self._parts(parameters[name] for name in average), self._parts(average.values()), strict=True)]
        _swap(pairs)
        self._swapped = True
        try:
            yield
        finally:
            _swap(pairs)
            self._swapped = False

    def _settle(self) -> None:
        """Nothing; weights that have landed are averaged in."""
        if self._landed is not None and self._landing is not None:
            event, step = self._landed
            event.synchronize()
            self._landed = None
            self._take_in(self._landing, step)

    @torch.no_grad()
    def _take_in(self, live: list[Tensor], step: int) -> None:
        for decay, average in zip(self.decays, self._averages, strict=True):
            decay = min(decay, (1 + step) / (10 + step)) if self.warmup else decay
            torch._foreach_lerp_(self._parts(average.values()), live, 1 - decay)

    @staticmethod
    def _parts(values: Iterable[Tensor]) -> list[Tensor]:
        return [own_part(value) for value in values]


@torch.no_grad()
def _swap(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        held = one.clone()
        one.copy_(other)
        other.copy_(held)
