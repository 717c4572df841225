"""Optimisers and the learning rate: AdamW for all, in 8 bits if asked, or Muon for the blocks' matrices beside AdamW.

Legend: M N sides of a matrix, G matrices of one shape.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.adapters import load_bitsandbytes
from arra.train.settings import TrainSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
BLOCK = re.compile(r"\.(layers|h|blocks)\.\d+\.")
"""In names of parameters: of ours and most of `transformers`' networks, of GPT-2 and its kin, of MPT."""
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
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, orthogonalized(updates), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the running gradient."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


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


def make_optimizers(parameters: dict[str, nn.Parameter], settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimisers of named parameters; weight decay falls on tensors of two or more dimensions only.

    With "muon" the matrices inside the blocks are Muon's; embeddings, head, norms and the projector stay with AdamW.
    With "adamw8bit" AdamW's two moments take a byte each, but for small tensors.
    Raises: ArraError when Muon has nothing to train, when the 8-bit optimiser's library is missing or cannot run on
    the parameters' device.
    """
    s = settings
    inner = {name for name, p in parameters.items() if s.optimizer == "muon" and p.dim() == 2 and BLOCK.search(name)}
    if s.optimizer == "muon" and not inner:
        raise ArraError("train.optimizer: muon is for the matrices of blocks, and none of them is trained; use adamw")
    rest = [parameter for name, parameter in parameters.items() if name not in inner]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if s.optimizer == "adamw8bit":
        return [_eight_bit_adamw(groups, s)]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in rest)
    adamw = torch.optim.AdamW(groups, s.learning_rate, s.betas, eps=1e-8, fused=fused)
    if not inner:
        return [adamw]
    matrices = [parameters[name] for name in parameters if name in inner]
    return [Muon(matrices, s.learning_rate, momentum=s.muon_momentum, weight_decay=s.weight_decay), adamw]


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
    optim = load_bitsandbytes("train.optimizer: adamw8bit").optim
    groups = [group for group in groups if group["params"]]  # it takes no empty ones
    adamw: torch.optim.Optimizer = optim.AdamW8bit(groups, settings.learning_rate, settings.betas, eps=1e-8)
    return adamw


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> float:
    """The norm of all gradients together; they are scaled down to `most` if it is more, else not touched."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    found = float(norm)
    if found > most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return found


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of a step, counted from 0: linear warm-up, then constant or a cosine down to the final rate."""
    s = settings
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    if s.schedule == "constant":
        return s.learning_rate
    progress = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
    return s.final_learning_rate + (s.learning_rate - s.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
