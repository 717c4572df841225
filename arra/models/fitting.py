"""Weights put into a network: whatever does not fit is named, all of it, and nothing is left out unasked.

Source: FoundationVision/LlamaGen loads with `strict=False` in places, so that a wrong file paints noise; not here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from arra.errors import ArraError


@dataclass(frozen=True)
class Fitting:
    """How a state dict may differ from the network it goes into."""

    dtype: torch.dtype | None = torch.float32
    """What floating tensors become; None keeps the file's."""
    ignore: tuple[str, ...] = ()
    """Patterns (as of file names) of keys to leave out."""
    init_missing: tuple[str, ...] = ()
    """Patterns of keys that, where missing, get a fresh initialisation."""
    owned: bool = False
    """Tensors are memory of their own already, so those of the right type are taken as they are."""
    empty: bool = False
    """Names, shapes and types alone: all stays on the meta device."""


@dataclass(frozen=True)
class Fitted:
    """What became of keys that did not go straight into the network."""

    dropped: tuple[str, ...] = ()
    """Known strays, never weights."""
    ignored: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()

    def facts(self) -> dict[str, str]:
        """The same in words."""
        kinds = {"dropped": self.dropped, "ignored": self.ignored, "initialised": self.initialised}
        return {kind: name_keys(keys) for kind, keys in kinds.items()}


def fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    fresh: Callable[[], nn.Module],
    stray: re.Pattern[str],
    how: Fitting,
    what: str = "model",
) -> Fitted:
    """What was left over; `model`, made on the meta device, now holds the weights in memory of its own (or is `empty`).

    Tensors are copied one at a time, so a mapped file never stands in memory twice; `fresh` makes the same network
    with its initial weights, and is called only if some of them are wanted.
    Raises: ArraError naming every missing, unexpected and differently shaped tensor.
    """
    expected = model.state_dict()
    dropped = [key for key in state if stray.search(key) and key not in expected]
    ignored = [key for key in state if key not in dropped and _matches(key, how.ignore)]
    weights = {key: value for key, value in state.items() if key not in {*dropped, *ignored}}
    initialised = [key for key in expected if key not in weights and _matches(key, how.init_missing)]
    if faults := find_faults(expected, weights, initialised):
        raise ArraError(f"{source}: does not fit the {what} settings: {'; '.join(faults)}; check name and settings")
    if initialised:
        weights |= {key: value for key, value in fresh().state_dict().items() if key in initialised}
    ready = {}
    for key, target in expected.items():
        value = weights.pop(key)
        dtype = how.dtype if how.dtype is not None and target.is_floating_point() else value.dtype
        if how.empty:
            ready[key] = torch.empty(value.shape, dtype=dtype, device="meta")
        else:
            ready[key] = value.to(dtype, memory_format=torch.contiguous_format, copy=not how.owned)
    model.load_state_dict(ready, assign=True)
    if how.empty:
        return Fitted(tuple(dropped), tuple(ignored), tuple(initialised))
    for module in model.modules():  # tables that are never saved: made anew by the module itself
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and all(tensor.is_meta for tensor in own):
            module.to_empty(device="cpu", recurse=False)
    return Fitted(tuple(dropped), tuple(ignored), tuple(initialised))


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def find_faults(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], initialised: Sequence[str] = ()
) -> list[str]:
    """What does not fit, each in words: missing, unexpected and differently shaped tensors, integers for numbers."""
    faults = []
    if missing := [key for key in expected if key not in weights and key not in initialised]:
        faults.append(f"missing {name_keys(missing)}")
    if unexpected := [key for key in weights if key not in expected]:
        faults.append(f"unexpected {name_keys(unexpected)} (--ignore PATTERN, ignore= in Python, leaves keys out)")
    misshapen: dict[tuple[Any, Any], list[str]] = {}
    for key in expected.keys() & weights.keys():
        shapes = tuple(weights[key].shape), tuple(expected[key].shape)
        if shapes[0] != shapes[1]:
            misshapen.setdefault(shapes, []).append(key)
    for (found, wanted), keys in sorted(misshapen.items(), key=lambda item: item[1]):
        faults.append(f"{name_keys(sorted(keys))} is {found}, expected {wanted}")
    if integers := [
        key for key in expected if key in weights and not weights[key].is_floating_point()
        and expected[key].is_floating_point()
    ]:  # fmt: skip
        faults.append(f"{name_keys(integers)} holds {weights[integers[0]].dtype}, expected floating numbers")
    return faults


def name_keys(keys: Sequence[str]) -> str:
    """Keys in one line, like ones folded: `layers.{0..11}.attention.{wqkv,wo}.weight, norm.weight`."""
    rows = [tuple(key.split(".")) for key in keys]
    for place in reversed(range(max(map(len, rows), default=0))):
        rows = _folded(rows, [place if place < len(row) and row[place].isdigit() else None for row in rows])
    for from_end in (1, 2):  # names of tensors and of the layers that hold them
        rows = _folded(rows, [len(row) - from_end if len(row) > from_end else None for row in rows])
    return ", ".join(".".join(row) for row in rows)


def _folded(rows: list[tuple[str, ...]], places: list[int | None]) -> list[tuple[str, ...]]:
    """The rows, those that differ at their place alone as one."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...] | None], list[str]] = {}
    for row, place in zip(rows, places, strict=True):
        slot = (row, None) if place is None else (row[:place], row[place + 1 :])
        groups.setdefault(slot, []).append("" if place is None else row[place])
    return [
        before if after is None else (*before, _alternatives(words), *after)
        for (before, after), words in groups.items()
    ]


def _alternatives(words: list[str]) -> str:
    if len(words) == 1 or any("{" in word for word in words):
        return words[0] if len(words) == 1 else "{" + ",".join(word.strip("{}") for word in words) + "}"
    return _number_range(words) if all(word.isdigit() for word in words) else "{" + ",".join(words) + "}"


def _number_range(numbers: list[str]) -> str:
    found = sorted({int(number) for number in numbers})
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
