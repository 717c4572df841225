"""How much memory tensors take while something runs, as torch's allocators see it.

Place in the pipeline: a probe holds it against what `arra.train.memory` says. On a GPU it is what CUDA's caching
allocator counts; on a CPU every allocation and release of this thread, kernels' own buffers included, as torch's
profiler notes them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch._C._profiler import ProfilerActivity, RecordScope, _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler, _enable_profiler, _prepare_profiler

MEMORY = "[memory]"
"""What the profiler calls an allocation or a release."""


@dataclass
class Allocated:
    """Bytes above what was there at first, known after the block."""

    peak: int = 0


@contextmanager
def allocations(device: torch.device) -> Iterator[Allocated]:
    """A block of which the most bytes of tensors at any time are known afterwards.

    On a CPU what other threads release is not seen; blocks do not nest. A step is slowed by microseconds for each
    allocation.
    """
    found = Allocated()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device) - before
        return
    config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    with _silent():
        _prepare_profiler(config, {ProfilerActivity.CPU})
        # of operators nothing is kept: millions of them would take more memory than what is measured
        _enable_profiler(config, {ProfilerActivity.CPU}, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
    try:
        yield found
    finally:
        with _silent():
            events = _disable_profiler().events()
    changes = (int(event.nbytes()) for event in events if event.name() == MEMORY)  # type: ignore[attr-defined]
    found.peak = max(accumulate(changes), default=0)


@contextmanager
def _silent() -> Iterator[None]:
    """A block in which nothing reaches the terminal's error stream: the profiler greets there, past Python."""
    sys.stderr.flush()
    own = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)
