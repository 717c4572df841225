"""When memory runs out: one line that says what was asked for and which settings of this recipe need less.

Place in the pipeline: `arra train` wraps building and training in `out_of_memory_told`. What a training needs is known
before it starts by `arra.train.memory`; this speaks when it was too much.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.train.parallel import SHARDED
from arra.train.savings import Trained, savings
from arra.train.settings import TrainSettings

ON_DEVICE = re.compile(r"out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE)
"""Of CUDA and its libraries, NCCL, XPU and MPS."""
ON_CPU = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory")
"""Of torch's allocators on POSIX and Windows; both also when the system refuses (error code 12)."""
WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?|\d+ bytes)", re.IGNORECASE)
ROOM = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
SPLIT = re.compile(r"([\d.]+) (\w+) is reserved by PyTorch but unallocated")
UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SPLIT_GIB = 2.0
"""Reserved and not used, from which on it is worth asking for segments that grow."""


@contextmanager
def out_of_memory_told(
    settings: TrainSettings,
    ranks: Ranks,
    *,
    where: str,
    language_model: Trained | None = None,
    four_bit: bool = False,
) -> Iterator[None]:
    """A block in which running out of memory, on a device or not, becomes one line that says what to change.

    `where` begins the line; `language_model`: what of one is trained, None for another model; `four_bit`: its frozen
    matrices are.

    Raises:
        ArraError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError, also where it has no class of its own
        on_device = isinstance(error, torch.OutOfMemoryError) or bool(ON_DEVICE.search(str(error)))
        if not (on_device or isinstance(error, MemoryError) or ON_CPU.search(str(error))):
            raise
        found = savings(
            settings,
            ranks=ranks.size,
            sharded=settings.parallel.kind in SHARDED or settings.parallel.offload,
            on_device=on_device,
            language_model=language_model,
            four_bit=four_bit,
        )
        same, other = ([each.written for each in found if each.same is wanted] for wanted in (True, False))
        if on_device and _is_split(str(error)):
            same.insert(0, "the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True")
        advice = []
        if same:
            advice.append(f"with the same result: {' or '.join(same)}")
        if other:
            advice.append(f"with another result: {' or '.join(other)}")
        told = "; ".join(advice) or "nothing of the recipe is left to save it with: more ranks, or a smaller model"
        whose = f" on rank {ranks.rank}" if ranks.size > 1 else ""
        raise ArraError(f"{where}: out of memory{whose} {_circumstances(str(error), on_device)}; {told}") from error


def _circumstances(message: str, on_device: bool) -> str:
    """Where, how much was asked for, and how much there was, as far as the allocator says."""
    room, wanted = ROOM.search(message), WANTED.search(message)
    place = (f"on cuda:{room[1]}" if room else "on the device") if on_device else "on the CPU"
    asked = f": {_readable(wanted[1])} more were asked for" if wanted else ""
    return f"{place}{asked}" + (f", {room[3]} of {room[2]} were free" if room else "")


def _readable(amount: str) -> str:
    """Bytes in GiB; what is said in another unit as it is."""
    number = re.fullmatch(r"(\d+) bytes", amount)
    return f"{int(number[1]) / 2**30:,.2f} GiB" if number else amount


def _is_split(message: str) -> bool:
    """Whether much memory lies in pieces that are too small for what was asked for."""
    unused = SPLIT.search(message)
    return unused is not None and float(unused[1]) * UNITS.get(unused[2], 1) >= SPLIT_GIB * 2**30
