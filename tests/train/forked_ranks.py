"""Several ranks in a test: processes forked from it, which need not import everything anew.

They make no backward passes: autograd may have threads in this process, and then refuses to work in forked ones.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import torch._dynamo  # DTensor imports it when it is used first: here once, not in every process
import torch.distributed as dist

from arra.distributed import Ranks

FORK = multiprocessing.get_context("fork")


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a process that does `work`."""
    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode is not None
    return child.exitcode


def started_ranks(size: int, store: Path, work: Callable[[Ranks], object]) -> list[ForkProcess]:
    """Processes that do `work` together and meet at a file."""

    def of_rank(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        try:
            work(Ranks(rank=rank, size=size, local_rank=rank, local_size=size, group=dist.new_group(backend="gloo")))
        finally:
            dist.destroy_process_group()

    processes = [FORK.Process(target=of_rank, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def on_ranks(size: int, store: Path, work: Callable[[Ranks], object]) -> list[int | None]:
    """The exit codes of processes that did `work` together; None of one that did not end."""
    processes = started_ranks(size, store, work)
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
