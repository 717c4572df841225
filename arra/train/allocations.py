"""How much memory tensors take while something runs, as torch's allocators see it.

Place in the pipeline: a probe holds it against what `arra.train.memory` says. On a GPU it is what CUDA's caching
allocator counts; on a CPU every allocation and release of this thread, kernels' own buffers included, as torch's
profiler notes them (which makes what runs slower: time it apart).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy


@dataclass
class Allocated:
    """Bytes above what was there at first, known after the block."""

    peak: int = 0


@contextmanager
def allocations(device: torch.device) -> Iterator[Allocated]:
    """A block of which the most bytes of tensors at any time are known afterwards.

    On a CPU what other threads release is not seen, nor what was allocated before; blocks do not nest.
    """
    found = Allocated()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device) - before
        return
    # the older of torch's two profilers: the newer one writes lines of its own to the terminal
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        yield found
    finally:
        events = _disable_profiler_legacy()
    own = max(events, key=len, default=[])  # the thread that ran the block
    steps = (event.cpu_memory_usage() for event in own if event.kind() == "memory_alloc")
    found.peak = max(accumulate(steps), default=0)
