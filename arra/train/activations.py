"""What a step's passes take of a device's memory, found by making them over tensors without numbers.

    a model on the meta device, inputs --> forward and backward pass over fake tensors --> PassBytes

Fake tensors have shapes and no numbers: every tensor that autograd keeps, and every intermediate while it lives, is
counted as PyTorch would make it, for any network. `arra.train.memory` adds what stays from step to step.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arra.models import Painter, dropout
from arra.train.parallel import narrowed, recompute_blocks
from arra.train.settings import TrainSettings

TRACED_BLOCKS = (2, 4)
"""Depths at which passes are made; deeper models add a block's share, the mean of two for those that alternate."""


@dataclass(frozen=True)
class PassBytes:
    """Bytes that the passes over a micro-batch take beside weights and their gradients."""

    kept: int
    """What autograd keeps from the forward to the backward pass."""
    forward: int
    """The most at any time of the forward pass, autocast's copies of weights included."""
    backward: int
    """The most at any time of the backward pass."""

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.forward, self.backward)


def pass_bytes(model: Painter, settings: TrainSettings, *, inputs: Mapping[str, Tensor], sharded: bool) -> PassBytes:
    """What a forward and a backward pass up to the head take, recomputation as in the settings.

    Passes are made at two depths; of deeper models each further block adds as much as those between. Weights and
    gradients that are ready are not counted, a block's copies in autocast's type and a gradient on its way are.
    `compile` is taken to keep as much. Attention is counted as the kernels that keep no S x S.
    """
    depth = len(model.blocks)
    shallow, deep = TRACED_BLOCKS
    if depth <= deep:
        return _traced(model, settings, inputs, sharded=sharded, depth=depth)
    first, second = (_traced(model, settings, inputs, sharded=sharded, depth=count) for count in TRACED_BLOCKS)

    def deeper(few: int, many: int) -> int:
        return many + (many - few) * (depth - deep) // (deep - shallow)

    return PassBytes(
        kept=deeper(first.kept, second.kept),
        forward=deeper(first.forward, second.forward),
        backward=deeper(first.backward, second.backward),
    )


def _traced(
    model: Painter, settings: TrainSettings, inputs: Mapping[str, Tensor], *, sharded: bool, depth: int
) -> PassBytes:
    """The passes of the model's first blocks over fake tensors."""
    narrow = settings.precision == "bfloat16"
    with _cut(model, depth), _recomputed(model, settings), _unsliced_masks(), FakeTensorMode():

        def fake(value: Tensor, kind: torch.dtype, *, trained: bool = False) -> Tensor:
            return torch.empty(value.shape, dtype=kind, requires_grad=trained)

        def product_type(value: Tensor) -> torch.dtype:
            return torch.bfloat16 if narrow and sharded and value.is_floating_point() else value.dtype

        tensors = {
            f"model.{name}": fake(value, product_type(value), trained=value.requires_grad)
            for name, value in model.named_parameters()
        }
        for value in tensors.values():
            if value.requires_grad:  # ready, it is counted elsewhere
                value.register_post_accumulate_grad_hook(_drop_gradient)
        tensors |= {f"model.{name}": fake(value, value.dtype) for name, value in model.named_buffers()}
        given = {name: fake(value, product_type(value)) for name, value in inputs.items()}
        with _Living([*tensors.values(), *given.values()]) as living:
            step = _Step(model, living, narrowed(settings, sharded=sharded, device_type="cpu"))
            step.train()
            found: PassBytes = functional_call(step, tensors, (given,))
    return found


class _Step(nn.Module):
    """The passes as one call, so that recomputation sees the same weights."""

    def __init__(self, model: nn.Module, living: "_Living", narrow: AbstractContextManager[object]) -> None:
        super().__init__()
        self.model, self.living, self.narrow = model, living, narrow

    def forward(self, given: dict[str, Tensor]) -> PassBytes:
        """What they take."""
        with self.narrow:
            hidden = self.model(**given).last_hidden
        kept, forward = self.living.now, self.living.peak
        self.living.peak = 0
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
        return PassBytes(kept, forward, self.living.peak)


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors while they live, but for those given."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {value.untyped_storage()._cdata: None for value in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _cut(model: Painter, depth: int) -> Iterator[None]:
    """A block in which the model has its first blocks alone."""
    first = model.blocks[0]
    listed = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and first in part)
    kept = listed._modules
    listed._modules = dict(list(kept.items())[:depth])
    try:
        yield
    finally:
        listed._modules = kept


@contextmanager
def _unsliced_masks() -> Iterator[None]:
    """A block in which dropout's masks are made at once, as accelerators do."""
    size = dropout.CHUNK
    dropout.CHUNK = 2**62
    try:
        yield
    finally:
        dropout.CHUNK = size


@contextmanager
def _recomputed(model: Painter, settings: TrainSettings) -> Iterator[None]:
    """A block in which the model's blocks recompute as in training."""
    training = model.training
    before = [block.__dict__.get("forward") for block in model.blocks]
    recompute_blocks(model, settings)
    try:
        yield
    finally:
        for block, forward in zip(model.blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
        model.train(training)
