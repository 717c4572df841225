"""Checkpoints of a training run: whole or absent, checked by hash, the newest whole one wins.

checkpoints/step-0000500.safetensors   model, average, projector and optimiser tensors, by dotted name
            step-0000500.json          step, seconds, hash of the file above; written last
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from arra.runs import atomic_file, atomic_write, file_hash


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed training starts from."""

    step: int
    seconds: float
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, *, step: int, seconds: float, tensors: dict[str, Tensor], keep: int) -> None:
    """Nothing; the checkpoint is in the folder, and older ones beyond `keep` are gone."""
    weights = folder / f"step-{step:07d}.safetensors"
    with atomic_file(weights) as path:
        safetensors.torch.save_file(_apart(tensors), path)
    card = {"step": step, "seconds": seconds, "sha256": file_hash(weights)}
    atomic_write(weights.with_suffix(".json"), json.dumps(card) + "\n")
    for old in sorted(folder.glob("step-*.json"))[:-keep]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own: the format holds no sharing (8-bit optimisers share their tables)."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose file is whole; a damaged one is passed over with a warning."""
    for card_path in sorted(folder.glob("step-*.json"), reverse=True):
        weights = card_path.with_suffix(".safetensors")
        try:
            card: dict[str, Any] = json.loads(card_path.read_text())
            if file_hash(weights) == card["sha256"]:
                return Checkpoint(card["step"], card["seconds"], safetensors.torch.load_file(weights))
            problem = "its hash is not the one it was saved with"
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            problem = str(error)
        warnings.warn(f"{weights}: damaged ({problem}); using the checkpoint before it", stacklevel=2)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `optimizer.NAME.exp_avg`, ...; a whole number is an int64 scalar."""
    return {
        f"optimizer.{name}.{key}": torch.tensor(value) if isinstance(value, int) else value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """Nothing; the optimiser holds the saved state of its own parameters."""
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, name in names.items():
        if parameter not in own:
            continue
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            # scalars (AdamW's step count) lie where a fresh optimiser holds them: beside a fused one's parameters
            beside = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[parameter] = {
                key: int(value)
                if value.dtype == torch.int64 and not value.dim()
                else value.to(parameter.device if value.dim() else beside, copy=True)
                for key, value in state.items()
            }
