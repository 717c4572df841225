"""What a training costs while it runs: tokens and images per second, share of the peak, memory, time spent waiting.

Place in the pipeline: the loop tells every step to `Meters`, which adds up a log window and gives it as columns of a
row. Nothing here waits for a device, but for one measurement of an unknown device's peak at the start.

MFU counts what the model needs and not what the machine does: nothing for recomputing, padding counts as any fed
position, the alignment counts nothing (so it lowers the share by what it costs). A matrix that multiplies every
position costs 6 operations a weight (2 forward, 2 for the gradient of its input, 2 for its own), 4 where it is frozen,
2 where nothing before it is trained; the head costs the same at labelled positions alone. Attention costs 12 L D T a
token: all pairs of positions count, the half that causal attention masks is NOT taken off (as in PaLM, appendix B).
Legend: L layers, D heads times their size, T fed positions of a row.
"""

import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from arra.distributed import Ranks
from arra.models import Decoder, Painter
from arra.models.extend import head_layer

Precision = Literal["float32", "bfloat16"]
GIB = 2**30
STATUS = Path("/proc/self/status")
MEASURE_SECONDS, PRODUCT_SECONDS = 0.25, 0.05
"""What measuring a peak may take, all in all and for one product."""
FIRST_SIDE, LAST_SIDE = 256, 8192
"""Sides of the square matrices that are multiplied for it."""


class Peak(NamedTuple):
    """Dense operations per second of matrix products, in units of 10^12."""

    bfloat16: float
    tf32: float
    float32: float


PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"A100.*", Peak(312, 156, 19.5)),
    (r"H100 PCIe", Peak(756, 378, 51)),
    (r"H100 NVL", Peak(835, 417, 60)),
    (r"(H100|GH200).*", Peak(989, 494, 67)),
    (r"H200 NVL", Peak(835, 417, 60)),
    (r"H200.*", Peak(989, 494, 67)),
    (r"B200.*", Peak(2250, 1125, 75)),
    (r"L40S", Peak(362, 183, 91.6)),
    (r"L40", Peak(181, 90.5, 90.5)),
    (r"L4", Peak(121, 60, 30.3)),
    (r"A40", Peak(149.7, 74.8, 37.4)),
    (r"A10", Peak(125, 62.5, 31.2)),
    (r"A10G", Peak(70, 35, 35)),
    (r"RTX A6000", Peak(154.8, 77.4, 38.7)),
    (r"RTX 6000 Ada Generation", Peak(364.2, 182.1, 91.1)),
    (r"GeForce RTX 5090", Peak(209.5, 104.8, 104.8)),
    (r"GeForce RTX 4090", Peak(165.2, 82.6, 82.6)),
    (r"GeForce RTX 3090", Peak(71, 35.6, 35.6)),
    (r"AMD Instinct MI3(00|25)X.*", Peak(1307.4, 653.7, 163.4)),
    (r"AMD Instinct MI250X.*", Peak(191.5, 47.9, 47.9)),
)
"""By the name that the driver gives, without "NVIDIA ", the first that fits as a whole; one of two dies for MI250X.

Source: data sheets of NVIDIA (A100, H100, H200, HGX B200, L40S, L40, L4, A40, A10, RTX A6000, RTX 6000 Ada; numbers
"with sparsity" are halved), the Ampere GA102, Ada and RTX Blackwell white papers (GeForce: with float32 accumulation),
AWS (A10G), AMD (MI250X, MI300X, MI325X: matrix rates).
"""


@dataclass(frozen=True)
class ModelFlops:
    """What training steps of a model cost, in floating-point operations (a multiply-and-add is two)."""

    per_position: float
    """Of all matrices inside the blocks."""
    per_label: float
    """Of the head."""
    per_condition: float
    """Of the projection of a picture's caption, all its positions."""
    attention_width: int
    """L times D."""

    def of(self, *, positions: int, length: int, labelled: int, images: int) -> float:
        """Of a batch of so many fed positions, in rows of `length`, with so many labels and pictures."""
        own = self.per_position + 12 * self.attention_width * length
        return positions * own + labelled * self.per_label + images * self.per_condition


def model_flops(model: Painter) -> ModelFlops:
    """What a step of the model costs, read from its matrices; frozen ones cost less.

    Experts count by the share of them that a token sees. It may lie on `meta`, be quantised, have adapters or be
    shared out over ranks.
    """
    first, head = _ends(model)
    is_trained = any(parameter.requires_grad for module in first for parameter in module.parameters())
    per_position, experts = 0.0, _expert_share(model)
    for block in model.blocks:
        is_trained = is_trained or any(parameter.requires_grad for parameter in block.parameters())
        per_position += _cost(block, is_trained, experts)
    per_label = _cost(head, is_trained, experts)
    return ModelFlops(per_position, per_label, _condition_flops(model), _attention_width(model))


def _ends(model: Painter) -> tuple[list[nn.Module], nn.Module]:
    """What stands before the blocks, and the head."""
    if not isinstance(model, Decoder):
        return [model.lm.get_input_embeddings()], head_layer(model.lm)  # type: ignore[operator]
    tables = [model.cls_embedding, model.tok_embeddings]
    return [*tables, model.rep_embedding] if model.settings.rep_token else tables, model.output


def _cost(module: nn.Module, is_trained: bool, expert_share: float) -> float:
    """Operations at a position; `is_trained` tells whether gradients of the matrices' inputs are wanted."""
    return math.fsum(
        size * (2 + 2 * is_trained + 2 * weight.requires_grad) for weight, size in _matrices(module, expert_share)
    )


def _matrices(module: nn.Module, expert_share: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Every matrix that multiplies what passes through a module, with the number of its weights."""
    for part in module.modules():
        own = part._parameters.get("weight")
        if own is not None and hasattr(part, "in_features"):  # of quantised layers the sizes say it, not the tensor
            yield own, float(part.in_features * part.out_features)  # type: ignore[operator]
        elif own is not None and hasattr(part, "nf"):  # GPT-2's linear layer
            yield own, own.numel()
        for parameter in part.parameters(recurse=False):
            if parameter.dim() == 3:
                yield parameter, parameter.numel() * expert_share


def _expert_share(model: Painter) -> float:
    if isinstance(model, Decoder):
        return 1.0
    config = model.config
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return float(getattr(config, "num_experts_per_tok", 1)) / count if count else 1.0


def _condition_flops(model: Painter) -> float:
    if not isinstance(model, Decoder) or model.settings.condition != "caption":
        return 0.0
    cost, is_trained = 0.0, False  # caption features want no gradient
    for layer in model.cls_embedding.cap_proj.children():  # type: ignore[union-attr]
        cost += _cost(layer, is_trained, 1.0)
        is_trained = is_trained or any(parameter.requires_grad for parameter in layer.parameters())
    return cost * model.settings.condition_length


def _attention_width(model: Painter) -> int:
    if isinstance(model, Decoder):
        return model.settings.num_layers * model.settings.hidden_size
    config, heads = model.config, int(model.config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or model.hidden_size // heads
    return model.num_layers * heads * int(head_dim)


class Meters:
    """Collects steps over a log window; `row` gives them as columns and begins the next window.

    Counts are of the whole batch, over all ranks; times are this rank's.
    """

    def __init__(
        self, model: Painter, *, device: torch.device, precision: Precision = "float32", ranks: Ranks | None = None
    ) -> None:
        """Set up after the model lies where it trains and the number of CPU threads is set."""
        self.device = device
        self.flops = model_flops(model)
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.peak = peak_flops(device, kind) * (1 if ranks is None else ranks.size)
        """Operations per second of all ranks together."""
        self._begin()

    def _begin(self) -> None:
        self._tokens = self._images = 0
        self._seconds = self._waited = self._operations = 0.0

    def waited(self, seconds: float) -> None:
        """Nothing; so long the step that comes next, or its start, stood still for want of data."""
        self._waited += seconds

    def step(self, *, tokens: int, length: int, images: int, labelled: int, seconds: float) -> None:
        """Nothing; a step fed `tokens` positions in rows of `length`, and took so long with all waiting."""
        self._tokens += tokens
        self._images += images
        self._seconds += seconds
        self._operations += self.flops.of(positions=tokens, length=length, labelled=labelled, images=images)

    def row(self) -> dict[str, float]:
        """Columns of the window: tokens_per_second, images_per_second, mfu, peak_memory_gib, waiting_share.

        Shares lie in 0..1; memory is the most since the start. A window without steps has the memory alone.
        """
        found: dict[str, float] = {}
        if self._seconds:
            found = {
                "tokens_per_second": round(self._tokens / self._seconds, 1),
                "images_per_second": round(self._images / self._seconds, 2),
                "mfu": round(self._operations / self._seconds / self.peak, 4),
                "waiting_share": round(min(1.0, self._waited / self._seconds), 4),
            }
        self._begin()
        return found | {"peak_memory_gib": round(peak_memory(self.device) / GIB, 3)}


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a CUDA device, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():  # what getrusage says of a child begins with its parent's peak
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def peak_flops(device: torch.device, kind: torch.dtype) -> float:
    """Operations per second that matrix products of this type reach at best: by the device's name, else measured.

    A part of a divided device (MIG), a laptop's chip and a CPU are measured, once for each number of threads.
    """
    if device.type == "cuda":
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            if kind == torch.bfloat16:
                return 1e12 * known.bfloat16
            return 1e12 * (known.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else known.float32)
    return measured_flops(device, kind, torch.get_num_threads())


def known_peak(name: str) -> Peak | None:
    """What the table says of a device of this name."""
    short = name.removeprefix("NVIDIA ")
    if " MIG " in short:
        return None
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, short)), None)


@lru_cache
def measured_flops(device: torch.device, kind: torch.dtype, threads: int) -> float:
    """Operations per second of the fastest of some matrix products now; takes 0.3 s at most."""
    side, started, fastest = FIRST_SIDE, time.perf_counter(), math.inf
    matrix = torch.ones(side, side, dtype=kind, device=device)
    _product_seconds(matrix)  # sets up the library
    best = 0.0
    while (left := MEASURE_SECONDS - (time.perf_counter() - started)) > fastest or not best:
        if 8 * fastest < min(PRODUCT_SECONDS, left) and side < LAST_SIDE:
            side, fastest = 2 * side, math.inf
            matrix = torch.ones(side, side, dtype=kind, device=device)
        fastest = min(fastest, _product_seconds(matrix))
        best = max(best, 2 * side**3 / fastest)
    return best


def _product_seconds(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    product = matrix @ matrix
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    elif product.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started
