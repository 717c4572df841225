"""The machines of `arra plan`: what is written on the command line, and what cards of a name have.

    "8xa6000-48g" --parse_machine--> Machine{8 cards, 48 GiB, TFLOP/s, GB/s}

Peaks of matrix products are those of `arra.train.meters`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from arra.distributed import own_device
from arra.errors import ArraError
from arra.models.products import free_bytes
from arra.train.meters import Peak, known_peak, measured_flops

GIB = 2**30
CPU = "cpu"


@dataclass(frozen=True)
class Card:
    """What a data sheet says of a card."""

    driver: str
    """Its name for `known_peak`."""
    memory: tuple[int, ...]
    """GiB, the usual size first."""
    bandwidth: int
    """Of its memory, 10^9 bytes a second."""
    link: int
    """To its neighbours in one machine, 10^9 bytes a second in one direction: NVLink, else PCIe of 16 lanes."""


CARDS = {
    "a10": Card("A10", (24,), 600, 32),
    "a100": Card("A100-SXM4-80GB", (80, 40), 2039, 300),
    "a40": Card("A40", (48,), 696, 32),
    "a6000": Card("RTX A6000", (48,), 768, 32),
    "a6000-ada": Card("RTX 6000 Ada Generation", (48,), 960, 32),  # the paper's "A6000 Ada"
    "b200": Card("B200", (180, 192), 8000, 900),
    "gh200": Card("GH200 480GB", (96, 144), 4000, 450),
    "h100": Card("H100 80GB HBM3", (80, 94), 3350, 450),
    "h200": Card("H200", (141,), 4800, 450),
    "l4": Card("L4", (24,), 300, 32),
    "l40s": Card("L40S", (48,), 864, 32),
    "mi300x": Card("AMD Instinct MI300X", (192,), 5300, 448),
    "rtx3090": Card("GeForce RTX 3090", (24,), 936, 32),
    "rtx4090": Card("GeForce RTX 4090", (24,), 1008, 32),
    "rtx5090": Card("GeForce RTX 5090", (32,), 1792, 64),
    "t4": Card("Tesla T4", (16,), 320, 16),
    "v100": Card("Tesla V100-SXM2-32GB", (32, 16), 900, 150),
}
"""Cards by the names that the command line takes.

Source: data sheets of NVIDIA (A10, A100, A40, RTX A6000, RTX 6000 Ada, B200, GH200, H100 SXM, H200, L4, L40S, GeForce,
T4, V100) and AMD (MI300X: 7 links of 128 GB/s, both directions).
"""
OLDER = {"t4": Peak(8.1, 8.1, 8.1), "v100": Peak(15.7, 15.7, 15.7)}
"""Cards without products in bfloat16: it is computed in float32 there."""
WRITTEN = re.compile(
    r"(?:(\d{1,6})\s*x\s*)?([a-z]+[a-z0-9]*(?:-ada)?|\d+(?:\.\d+)?)(?:-(\d+)g(?:i?b)?)?", re.IGNORECASE
)
CPU_BANDWIDTH, CPU_LINK = 20.0, 10.0
"""Assumed of a CPU: two channels of memory, what processes of one machine tell each other through it, 10^9 bytes/s."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind that train together."""

    written: str
    count: int
    bytes_each: int
    device_type: str = "cuda"
    name: str | None = None
    """In `CARDS`, or "cpu"; None of cards of which only the memory is known."""

    @property
    def card(self) -> Card | None:
        """What is known of each."""
        return None if self.name is None or self.name == CPU else CARDS[self.name]

    def has_devices_like(self, device: torch.device) -> bool:
        """Whether each computes as fast as a device of this machine does."""
        if device.type != "cuda" or self.card is None:
            return self.name == device.type == CPU
        here = known_peak(torch.cuda.get_device_name(device))
        return here is not None and here == known_peak(self.card.driver)

    @property
    def bandwidth(self) -> float | None:
        """Of each one's memory, bytes a second; None where it is not known."""
        card = self.card
        return 1e9 * (card.bandwidth if card else CPU_BANDWIDTH) if self.name else None

    @property
    def link(self) -> float | None:
        """From each one to the others, bytes a second; None where it is not known."""
        card = self.card
        return 1e9 * (card.link if card else CPU_LINK) if self.name else None

    def peak(self, precision: str) -> float | None:
        """Operations a second of dense products in float32 or bfloat16 at best; None where they are not known.

        A CPU's are measured here, on one core: as many processes as there are devices share the cores.
        """
        if self.name is None:
            return None
        if self.name == CPU:
            return measured_flops(torch.device("cpu"), getattr(torch, precision), torch.get_num_threads())
        found = OLDER.get(self.name) or known_peak(CARDS[self.name].driver)
        assert found is not None, f"{self.name}: no peak is known"
        return 1e12 * (found.bfloat16 if precision == "bfloat16" else found.float32)


def parse_machine(written: str) -> Machine:
    """Devices as the command line names them: "8xa6000-48g", "8xh100", "4x48" (GiB each), "cpu", "2xcpu-24g".

    Raises:
        ArraError: it says none of these, or a size that no such card has.
    """
    found = WRITTEN.fullmatch(written.strip())
    expected = "expected how many and how large, as in 4x48 (GiB), or their name, as in 8xh100, 8xa6000-48g or cpu"
    if found is None or 0 in [int(part) for part in (found[1], found[3]) if part is not None]:
        raise ArraError(f"--gpu {written}: {expected}")
    count, kind, size = int(found[1] or 1), found[2].lower(), int(found[3]) if found[3] else None
    if kind[0].isdigit():
        if size is not None or found[1] is None or not float(kind):
            raise ArraError(f"--gpu {written}: {expected}")
        return Machine(written.strip(), count, int(float(kind) * GIB))
    if kind == CPU:
        each = memory_here(torch.device("cpu")) // count if size is None else size * GIB
        return Machine(written.strip(), count, each, device_type=CPU, name=CPU)
    if kind not in CARDS:
        known = ", ".join((*CARDS, CPU))
        raise ArraError(
            f"--gpu {written}: '{found[2]}' is unknown; known are {known}; or write how many and how large, as in 4x48 "
            "(GiB)"
        )
    sizes = CARDS[kind].memory
    if size is not None and size not in sizes:
        told = " or ".join(map(str, sizes))
        raise ArraError(f"--gpu {written}: {kind} has {told} GiB, found {size}; for another card write its GiB")
    return Machine(written.strip(), count, (size or sizes[0]) * GIB, name=kind)


@lru_cache
def memory_here(device: torch.device) -> int:
    """Bytes that a device of this machine has; of a CPU what is free now.

    Raises:
        ArraError: the system does not say how much is free.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    free = free_bytes()
    if free == float("inf"):
        raise ArraError("--gpu cpu: this system does not say how much memory is free; write it, as in cpu-24g")
    return int(free)


def device_kind_here(name: str = "auto") -> str:
    """ "cuda" or "cpu": the kind of device that `train.device` means here."""
    return own_device(name).type
