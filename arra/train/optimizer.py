"""Optimisers: AdamW for all, in 8 bits if asked, or Muon for the blocks' matrices beside AdamW.

Weights may lie in shards on several ranks (FSDP2's DTensors); each rank then keeps the optimiser's state of its shards.
Legend: M N sides of a matrix, G matrices of one shape.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from arra.errors import ArraError
from arra.models.adapters import load_bitsandbytes
from arra.train.parallel import gathered, own_part
from arra.train.settings import TrainSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BLOCK = re.compile(r"\.(layers|h|blocks)\.\d+\.")
"""In names of parameters: of ours and most of `transformers`' networks, of GPT-2 and its kin, of MPT."""
STACK_BYTES = 2**28
"""Of matrices that Muon takes together; of sharded weights they are gathered for it."""
FUSED_DEVICES = ("cpu", "cuda")
"""Where one kernel updates a tensor: a third of the time of torch's loop on a CPU, and no temporary of its size."""


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix moves by about the same amount.

    `torch.optim.Muon` does the same and is the reference in the tests, but orthogonalises in bfloat16, which is many
    times slower on CPUs that have no units for it, and one matrix at a time; this one takes float32 and all matrices
    of a shape together. The update is scaled to the size of AdamW's (0.2 * sqrt(longer side)), so that one learning
    rate serves both.

    Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982 (the scale, decoupled weight decay).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, *, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient; of sharded ones all ranks see the whole matrix and move a part."""
        for group in self.param_groups:
            for parameters in _stacks([p for p in group["params"] if p.grad is not None]):
                updates = torch.stack([_whole(self._momentum(p, group["momentum"])) for p in parameters])
                rate = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
                for parameter, update in zip(parameters, orthogonalized(updates), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(_as_sharded(update, parameter), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the running gradient, sharded as the parameter is."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def _stacks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in runs of one shape and at most `STACK_BYTES`, but for a single one that is larger."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    for alike in shapes.values():
        most = max(1, STACK_BYTES // max(1, alike[0].numel() * alike[0].element_size()))
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def _whole(value: Tensor) -> Tensor:
    """All of a matrix, on the device where its ranks talk to each other."""
    return gathered(value, torch.device(value.device_mesh.device_type)) if isinstance(value, DTensor) else value


def _as_sharded(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Of a tensor that all ranks have, the part that this one has of the parameter."""
    if not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements).to(parameter.device)


def orthogonalized(matrices: Float[Tensor, "G M N"]) -> Float[Tensor, "G M N"]:
    """Matrices of the same singular vectors, with singular values near 1 (0.7 to 1.2), by five Newton-Schulz steps."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizers(
    parameters: dict[str, nn.Parameter], settings: TrainSettings, *, modules: Iterable[nn.Module] = ()
) -> list[torch.optim.Optimizer]:
    """The optimisers of named parameters, which may be sharded.

    Norms, biases and all else of one dimension do not decay, nor tables of embeddings where the settings say so;
    `modules` are those that the parameters belong to, which tell what is what (norms may have more dimensions).
    With "muon" the matrices inside the blocks are Muon's; embeddings, head, norms and the projector stay with AdamW.
    With "adamw8bit" AdamW's two moments take a byte each, but for small tensors.

    Raises:
        ArraError: Muon has nothing to train, the 8-bit optimiser's library is missing or cannot run on the parameters'
            device, or it is asked to train shards.
    """
    s, parts = settings, [part for module in modules for part in module.modules()]
    plain, tables = _norms_and_biases(parameters, parts), _tables(parts)
    inner = {
        name: p
        for name, p in parameters.items()
        if s.optimizer == "muon" and p.dim() == 2 and BLOCK.search(name) and p not in plain | tables
    }
    if s.optimizer == "muon" and not inner:
        raise ArraError("train.optimizer: muon is for the matrices of blocks, and none of them is trained; use adamw")
    if not s.decay_embeddings:
        plain |= tables
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, p in parameters.items():
        if name not in inner:  # one call of a kernel takes shards or whole tensors, not both
            decays, sharded = p not in plain, isinstance(p, DTensor)
            group = {"params": [], "weight_decay": s.weight_decay if decays else 0.0}
            groups.setdefault((decays, sharded), group)["params"].append(p)
    rest = [p for group in groups.values() for p in group["params"]]
    if s.optimizer == "adamw8bit":
        return [_eight_bit_adamw(list(groups.values()), s)]
    found: list[torch.optim.Optimizer] = []
    if inner:
        found.append(Muon(inner.values(), s.learning_rate, momentum=s.muon_momentum, weight_decay=s.weight_decay))
    if rest:
        fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in rest)
        found.append(torch.optim.AdamW(list(groups.values()), s.learning_rate, s.betas, eps=1e-8, fused=fused))
    return found


def _norms_and_biases(parameters: Mapping[str, nn.Parameter], parts: Sequence[nn.Module]) -> set[nn.Parameter]:
    """What scales or shifts: all of fewer than two dimensions, and of norms and biases the others too.

    Chameleon's norms of queries and keys have a row for every head.
    """
    norms = {p for part in parts if "Norm" in type(part).__name__ for p in part.parameters(recurse=False)}
    return norms | {p for name, p in parameters.items() if p.dim() < 2 or name.endswith("bias")}


def _tables(parts: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Tables of embeddings, a head tied to one among them, and what peft trains of their rows."""
    return {
        p
        for part in parts
        if isinstance(part, nn.Embedding) or isinstance(getattr(part, "base_layer", None), nn.Embedding)
        for p in part.parameters()
    }


def _eight_bit_adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW: moments quantised in blocks of 256; tensors below 4,096 elements keep float32 ones.

    Source: Dettmers et al. 2021, arXiv 2110.02861.
    """
    devices = {p.device.type for group in groups for p in group["params"]}
    if not devices <= set(FUSED_DEVICES):
        raise ArraError(
            f"train.optimizer: adamw8bit runs on {' and '.join(FUSED_DEVICES)}, not on {', '.join(sorted(devices))}; "
            "use adamw"
        )
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ArraError(
            "train.optimizer: adamw8bit does not train sharded weights; use adamw, or train.parallel.kind: ddp"
        )
    optim = load_bitsandbytes("train.optimizer: adamw8bit").optim
    adamw: torch.optim.Optimizer = optim.AdamW8bit(groups, settings.learning_rate, settings.betas, eps=1e-8)
    return adamw


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """The norm of all gradients together, on their device and not waited for; of sharded ones all ranks ask for it.

    The gradients are all sharded or all whole.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return _whole(norm)


@torch.no_grad()
def scale_gradients(parameters: Sequence[nn.Parameter], norm: Float[Tensor, ""], *, most: float) -> None:
    """Nothing; gradients of this norm are scaled down to `most` if it is more, else they keep every bit."""
    if norm.device.type == "cpu" and not norm > most:  # elsewhere, looking would wait for the device
        return
    factor = torch.where(norm > most, most / (norm + 1e-6), 1.0)
    devices: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            devices.setdefault(parameter.grad.device, []).append(own_part(parameter.grad))
    for device, gradients in devices.items():
        torch._foreach_mul_(gradients, factor.to(device))
