"""What a computation costs: floating-point operations of its matrix products, convolutions and attention, as they run.

Place in the pipeline: `arra lab` gives every row the same training compute by it. torch's own counter is told what it
does not know: oneDNN's products, attention on a CPU, and products added in place. Elementwise work (norms, activations,
softmax) and the optimiser are left out, as in every such count. Attention counts all pairs of positions, masked or not.
Legend: N rows, I inner width, O output width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def count_flops(compute: Callable[[], object]) -> int:
    """The operations (two for each multiply-and-add) of calling `compute`, backward passes in it included."""
    with FlopCounterMode(display=False, custom_mapping=_unknown_to_torch()) as counter:
        compute()
    return int(counter.get_total_flops())


def operation_flops(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, found: Any) -> int:
    """The operations of one call of an operator of torch, which gave `found`; 0 of what is not counted.

    For whoever sees operators pass and must not have the counter's own hooks on modules beside them.
    """
    count = _counts().get(operation._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=found))


@cache
def _counts() -> dict[Any, Callable[..., int]]:
    """By operator; those unknown to torch are told shapes, as the registry's own tell themselves."""

    def shaped(count: Callable[..., int]) -> Callable[..., int]:
        def of(*args: Any, out_val: Any, **kwargs: Any) -> int:
            shapes = [value.shape if isinstance(value, torch.Tensor) else value for value in args]
            return count(*shapes, out_shape=out_val.shape if isinstance(out_val, torch.Tensor) else None, **kwargs)

        return of

    return {**flop_registry, **{packet: shaped(count) for packet, count in _unknown_to_torch().items()}}


def _product(a: Shape, b: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """(N, I) times (O, I) transposed."""
    return 2 * prod(a) * b[0]


def _added_product(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    """(N, I) times (I, O)."""
    return 2 * prod(a) * b[1]


def _vector_product(a: Shape, _: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(a)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _unknown_to_torch() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    found: dict[Any, Callable[..., int]] = {
        aten.addmm_: _added_product,
        aten.mv: _vector_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found[torch.ops.mkldnn._linear_pointwise] = _product
    return found
