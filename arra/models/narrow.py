"""Weights of a model in fewer bits, for painting: cast to 16 bits, or its matrices as whole numbers of 8 or 4 bits.

    load_model -> on its device -> narrow_weights -> sample
The whole numbers are `torchao`'s (extra `lean`): a row of a matrix (8 bits) or 32 weights of one (4 bits) share a
scale, and its layer gets the products that go with them. Embeddings, norms and the head (which may be the embeddings,
and whose rounding every logit shows) are bfloat16 beside them, and so is what the layers give each other.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.causal import CausalLM
from arra.models.decoder import Decoder
from arra.models.extend import head_layer
from arra.models.products import compute_rows_alone

WeightKind = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""What weights are stored as."""
NARROWED = "narrowed"
"""Key of the kind in a model's `about`."""
GROUP_SIZE = 32
"""Weights of a row that share a scale in 4 bits: 5 bits each in all. Groups of 128 save 0.75 of them and
cost 2.5 times as much likelihood (on the demo's model 0.073 nats per code instead of 0.029)."""
CPU_ROWS = 16
"""A CPU's 4-bit kernel takes this many rows of a matrix at a time."""
CUDA_WIDTH = 512
"""A GPU's 4-bit kernel pads rows to 1,024 weights: shorter ones than these would grow."""


def narrow_weights(model: Decoder | CausalLM, kind: str) -> None:
    """Nothing; the model's weights are of that kind from now on, on the device where it is, for inference only.

    "float32", "bfloat16" and "float16" cast all of them; the rotary table stays float32, norms compute in float32, and
    logits are handed out in float32. "int8" and "int4" narrow the linear layers but the head and make the rest
    bfloat16. A layer whose shape the 4-bit kernel cannot take (rows of a multiple of 32 weights; on a GPU at least 512,
    on a CPU a multiple of 16 rows) is bfloat16 too. An image stays a function of weights, condition and seed.

    Narrow after moving the model: 4-bit weights are packed for one device, a CPU or a GPU of compute capability 8. The
    model is put in eval mode, takes no gradients, and `save_model` refuses it. `benchmarks/narrow.py` measures what it
    costs in quality and time; a CPU reads 4 bits faster than float32 up to about eight rows, 8 bits it widens for
    every product, which saves memory but no time.
    Raises: ArraError for an unknown kind, a model that is narrowed already, a missing torchao, a device or a model
    for which there is no such kind.
    """
    _check(model, kind)
    whole = kind in ("int8", "int4")
    config = _config(kind, model.device) if whole else None
    layers = _layers_to_narrow(model, kind) if whole else []
    dtype = torch.bfloat16 if whole else getattr(torch, kind)
    for layer in layers:
        if kind == "int4":  # its scales are of the layer's own type, and must be that of the products
            layer.weight.data = layer.weight.data.to(dtype)
            compute_rows_alone(layer)
        load_torchao(kind).quantization.quantize_(layer, config)
    for parameter in model.parameters():  # not the model, whose buffers (rotary angles of `transformers`) stay
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.eval().requires_grad_(False)
    if kind != "float32":
        model.about[NARROWED] = kind


def refuse_narrowed(model: Decoder | CausalLM) -> None:
    """Nothing.

    Raises: ArraError for a model whose weights are not what was trained or loaded.
    """
    if kind := model.about.get(NARROWED):
        raise ArraError(
            f"save_model: the weights were narrowed to {kind} for painting; load the model again and save that, "
            "with dtype=torch.bfloat16 where 16 bits are wanted"
        )


def load_torchao(kind: str) -> ModuleType:
    """The library of whole-number weights.

    Raises: ArraError when it is not installed.
    """
    try:
        with quiet_torchao():
            import torchao.quantization
    except ImportError as error:
        raise ArraError(
            f"weights: {kind}: the package 'torchao' is missing; pip install 'arra[lean]' -c constraints.txt"
        ) from error
    found: ModuleType = torchao
    return found


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """A block in which torchao may be imported without a word of kernels for other machines and of torch's plans."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(model: Decoder | CausalLM, kind: str) -> None:
    """Nothing.

    Raises: ArraError for an unknown kind or a model that cannot become it.
    """
    if kind not in get_args(WeightKind):
        raise ArraError(f"weights: {kind}: unknown; expected one of {', '.join(get_args(WeightKind))}")
    for name, parameter in model.named_parameters():
        if NARROWED in model.about or type(parameter) is not nn.Parameter:
            raise ArraError(
                f"weights: {kind}: the model's are {model.about.get(NARROWED) or type(parameter).__name__} already; "
                "load it again"
            )
        if kind == "float16" and parameter.numel() and not parameter.abs().max() <= torch.finfo(torch.float16).max:
            raise ArraError(f"weights: float16: {name} holds a weight beyond its range of 65504; use bfloat16")


def _layers_to_narrow(model: Decoder | CausalLM, kind: str) -> list[nn.Linear]:
    """The linear layers but the head, of those the ones that the kind's kernel takes.

    Raises: ArraError where there are none.
    """
    head, device = model.output if isinstance(model, Decoder) else head_layer(model.lm), model.device.type
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer is not head]
    if kind == "int4":
        layers = [layer for layer in layers if layer.in_features % GROUP_SIZE == 0]
        if device == "cpu":
            layers = [layer for layer in layers if layer.out_features % CPU_ROWS == 0]
        else:
            layers = [layer for layer in layers if layer.in_features >= CUDA_WIDTH]
    if not layers:
        raise ArraError(f"weights: {kind}: no layer of this model has a shape for it on {device}; use bfloat16")
    return layers


def _config(kind: str, device: torch.device) -> Any:
    """torchao's word for a kind on a device.

    Raises: ArraError where torchao or a kernel is missing.
    """
    quantization = load_torchao(kind).quantization
    if kind == "int8":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    told = {"group_size": GROUP_SIZE, "set_inductor_config": False}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return quantization.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **told)
    if device.type == "cpu":
        return _cpu_int4()(**told)
    raise ArraError(
        f"weights: int4: no kernel for this device ({device}); it takes a CPU or a GPU of compute capability 8, "
        "use int8 or bfloat16"
    )


def _cpu_int4() -> Any:
    """torchao's configuration for a CPU's 4-bit kernel, which it keeps apart."""
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        version = load_torchao("int4").__version__
        raise ArraError(
            f"weights: int4: torchao {version} has no kernel for a CPU where it is looked for; "
            "pip install 'arra[lean]' -c constraints.txt, or use int8"
        ) from error
    return PrototypeInt4WeightOnlyConfig


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes, whatever it is stored as."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, name)) for name in names)
