"""Where the work runs: the device and the number of CPU threads. Bottom of the pipeline, all rooms may ask it."""

import torch

from arra.errors import ArraError


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
