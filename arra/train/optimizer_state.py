"""An optimiser's state as named tensors, which a checkpoint can hold whatever the number of ranks."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from arra.train.checkpoints import SavedStep


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `optimizer.NAME.exp_avg`, ...; a whole number is an int64 scalar."""
    return {
        f"optimizer.{name}.{key}": torch.tensor(value) if isinstance(value, int) else value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def optimizer_space(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], *, saved: SavedStep
) -> dict[str, Tensor]:
    """Tensors to load what a checkpoint holds of the optimiser into, each where a step would have placed it.

    State of its parameter's shape is sharded as that is. What the optimiser holds already is taken, not made anew.
    """
    space: dict[str, Tensor] = {}
    for parameter, name, key in _states(optimizer, names, saved.tensors):
        full = f"optimizer.{name}.{key}"
        wanted, held = saved.tensors[full], optimizer.state.get(parameter, {}).get(key)
        if isinstance(held, Tensor) and held.shape == wanted.shape and held.dtype == wanted.dtype:
            space[full] = held
        elif wanted.shape == parameter.shape:
            space[full] = torch.empty_like(parameter, dtype=wanted.dtype, requires_grad=False)
        else:
            space[full] = torch.empty_like(wanted, device=_device(optimizer, parameter, key))
    return space


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], *, tensors: Mapping[str, Tensor]
) -> None:
    """Nothing; the optimiser holds the state of its own parameters: these tensors themselves, not copies of them."""
    restored: dict[Tensor, dict[str, Tensor | int]] = {}
    for parameter, name, key in _states(optimizer, names, tensors):
        value = tensors[f"optimizer.{name}.{key}"]
        count = value.dtype == torch.int64 and not value.dim()
        restored.setdefault(parameter, {})[key] = int(value) if count else value.to(_device(optimizer, parameter, key))
    optimizer.state.update(restored)


def _states(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], keys: Iterable[str]
) -> Iterator[tuple[nn.Parameter, str, str]]:
    """Parameter, its name, and the name of a state, for every key that is of this optimiser's state."""
    own = {names[p]: p for group in optimizer.param_groups for p in group["params"] if p in names}
    for key in keys:
        name, _, state = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("optimizer.") and name in own:
            yield own[name], name, state


def _device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> torch.device:
    """Where a fresh optimiser holds it: AdamW's step count beside a fused one's parameters, else on the CPU."""
    return torch.device("cpu") if key == "step" and not optimizer.defaults.get("fused") else parameter.device
