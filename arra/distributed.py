"""Where the work runs: device, CPU threads, and the processes that torchrun starts. Bottom of the pipeline.

What ranks tell each other through `Ranks` lies in the CPU's memory and goes over a group of its own (gloo), so it never
waits for an accelerator. Gradients go over the default group (NCCL between CUDA devices).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from arra.errors import ArraError, FirstProcessError

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells every process it starts."""
_JOINED = count()
JOIN_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other; a slower rank is named sooner by `arra.train.heartbeat`."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, seen from one of them; by default it is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1
    group: Any = None
    """Over the CPUs; None for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank zero, which writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Every value summed over all ranks, in float64; the same bits on all of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        found: list[float] = total.tolist()
        return found

    def share(self, value: T) -> T:
        """What rank zero holds, on every rank."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0, group=self.group)
        found: T = held[0]
        return found

    def gather(self, value: T) -> list[T]:
        """What each rank holds, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value, group=self.group)
        return held

    def barrier(self) -> None:
        """Nothing; all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def by_all(self, act: Callable[[], T]) -> T:
        """What `act` gives on this rank; all call it, and none goes on if one has failed.

        Raises:
            ArraError: that of the first rank which had one, on every rank.
        """
        found: Any = None
        problem: str | None = None
        try:
            found = act()
        except ArraError as error:
            problem = str(error)
            if self.size == 1:
                raise
        problem = next((told for told in self.gather(problem) if told is not None), None)
        if problem is not None:
            raise ArraError(problem) if self.is_first else FirstProcessError(problem)
        return cast(T, found)

    def by_first(self, act: Callable[[], T]) -> T:
        """What `act` gives on rank zero, which alone calls it, on every rank.

        Raises:
            ArraError: rank zero's, on every rank, so that none waits for it.
        """
        return cast(T, self.share(self.by_all(lambda: act() if self.is_first else None)))


ALONE = Ranks()
"""One process."""


def is_launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined_ranks(device: torch.device, *, even_alone: bool = False) -> Iterator[Ranks]:
    """A block in which the processes that torchrun started work together.

    One process needs no group, unless it wants what only groups have (`even_alone`): weights that lie apart.
    """
    told: dict[str, Any] = {"timeout": JOIN_TIMEOUT}
    if not is_launched():
        if not even_alone:
            yield ALONE
            return
        told |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        # torchrun may keep its store when it starts all again, with the addresses of processes that are gone
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # a command may join more than once, and every process as often
        prefix = f"attempt-{attempt}-{next(_JOINED)}"
        told |= {"store": dist.PrefixStore(prefix, store), "rank": rank, "world_size": size}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        told["device_id"] = device
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **told)
    try:
        yield Ranks(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            group=dist.new_group(backend="gloo", timeout=JOIN_TIMEOUT),
        )
    finally:
        dist.destroy_process_group()


def own_device(name: str = "auto") -> torch.device:
    """The device of this process: `choose_device`, where torchrun started several the one of its number.

    Raises:
        ArraError: there are fewer devices than processes on this machine, or all are told to share one.
    """
    device = choose_device(name)
    if not is_launched() or device.type == "cpu":
        return device
    if device.type != "cuda" or name not in ("auto", "cuda"):
        raise ArraError(f"device: '{name}' for {os.environ['WORLD_SIZE']} processes; use auto, cuda or cpu")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ArraError(
            f"device: process {number + 1} of this machine, which has {count} CUDA devices; start at most as many with "
            "--nproc-per-node"
        )
    return torch.device("cuda", number)


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        ArraError: `name` is no device, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ArraError(
            f"device: '{name}' is unknown; expected auto, cpu, mps, cuda or a number as in cuda:1"
        ) from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if available == 0:
        raise ArraError(f"device: '{name}' is not available on this machine; use auto or cpu")
    if device.index is not None and device.index >= available:
        raise ArraError(
            f"device: '{name}' does not exist, this machine has {available} of this type; "
            f"use {device.type}:0{f' to {device.type}:{available - 1}' if available > 1 else ''}"
        )
    return device


def set_threads(number: int | None) -> None:
    """Nothing; CPU work of torch uses `number` threads from now on, `None` leaves torch's own choice."""
    if number is None:
        return
    if number < 1:
        raise ArraError(f"threads: expected an integer > 0, found {number}; leave it out for the default")
    torch.set_num_threads(number)
