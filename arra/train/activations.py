"""What a step's passes take of a device's memory and what they compute, by making them over tensors without numbers.

    a model on the meta device, inputs --> forward and backward pass over fake tensors --> PassBytes, operations

Fake tensors have shapes and no numbers: every tensor that autograd keeps, and every intermediate while it lives, is
counted as PyTorch would make it, for any network. `arra.train.memory` adds what stays from step to step.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arra.models import Painter, dropout
from arra.train.flops import operation_flops
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
    opening: int
    """The most while the last block goes backward, with the gradients that have come."""
    closing: int
    """The most while the first block goes backward, with all gradients that have come."""

    @property
    def peak(self) -> int:
        """The most at any time, gradients left out."""
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class Traced:
    """What the passes over a micro-batch take and compute, up to the head."""

    memory: PassBytes
    flops: int
    """Operations of both passes, with what is computed again."""


def traced_passes(model: Painter, settings: TrainSettings, *, inputs: Mapping[str, Tensor], sharded: bool) -> Traced:
    """What a forward and a backward pass up to the head take and compute, recomputation as in the settings.

    Passes are made at two depths; of deeper models each further block adds as much as those between. Weights are not
    counted, a block's copies in autocast's type and a gradient on its way are. `compile` is taken to keep as much.
    Attention is counted as the kernels that keep no S x S.
    """
    depth = len(model.blocks)
    shallow, deep = TRACED_BLOCKS
    if depth <= deep:
        return _traced(model, settings, inputs, sharded=sharded, depth=depth)
    first, second = (_traced(model, settings, inputs, sharded=sharded, depth=count) for count in TRACED_BLOCKS)

    def deeper(few: int, many: int) -> int:
        return many + (many - few) * (depth - deep) // (deep - shallow)

    both = zip(astuple(first.memory), astuple(second.memory), strict=True)
    return Traced(PassBytes(*(deeper(few, many) for few, many in both)), deeper(first.flops, second.flops))


def looking_bytes(model: Painter, settings: TrainSettings, *, inputs: Mapping[str, Tensor], sharded: bool) -> int:
    """Bytes that a forward pass without gradients takes at most, as validation makes it, however deep the model is."""
    training, depth = model.training, min(TRACED_BLOCKS[0], len(model.blocks))
    with torch.no_grad(), _faked(model, settings, inputs, sharded=sharded, depth=depth) as faked:
        found: PassBytes = functional_call(faked.step.eval(), faked.tensors, (faked.given,))
    model.train(training)
    return found.forward


def _traced(
    model: Painter, settings: TrainSettings, inputs: Mapping[str, Tensor], *, sharded: bool, depth: int
) -> Traced:
    """The passes of the model's first blocks over fake tensors."""
    with _faked(model, settings, inputs, sharded=sharded, depth=depth) as faked:
        step, living = faked.step.train(), faked.living
        places = {id(value): place for place, block in enumerate(model.blocks) for value in block.parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                place = places.get(id(parameter))
                faked.tensors[f"model.{name}"].register_post_accumulate_grad_hook(
                    partial(
                        living.take_gradient, before_last=place is not None and place < depth - 1, later=bool(place)
                    )
                )
        memory: PassBytes = functional_call(step, faked.tensors, (faked.given,))
    return Traced(memory, living.flops)


@dataclass(frozen=True)
class _Faked:
    """A model's first blocks over fake tensors."""

    step: "_Step"
    tensors: dict[str, Tensor]
    """Weights and buffers."""
    given: dict[str, Tensor]
    living: "_Living"


@contextmanager
def _faked(
    model: Painter, settings: TrainSettings, inputs: Mapping[str, Tensor], *, sharded: bool, depth: int
) -> Iterator[_Faked]:
    """A block in which the model has so many blocks, and computes with tensors that have no numbers."""
    narrow = settings.precision == "bfloat16" and sharded
    with _cut(model, depth), _recomputed(model, settings), _own_seeds(model), _unsliced_masks(), FakeTensorMode():

        def product_type(value: Tensor) -> torch.dtype:
            return torch.bfloat16 if narrow and value.is_floating_point() else value.dtype

        tensors = {
            f"model.{name}": torch.empty(value.shape, dtype=product_type(value), requires_grad=value.requires_grad)
            for name, value in model.named_parameters()
        }
        tensors |= {
            f"model.{name}": torch.empty(value.shape, dtype=value.dtype) for name, value in model.named_buffers()
        }
        given = {name: torch.empty(value.shape, dtype=product_type(value)) for name, value in inputs.items()}
        with _Living([*tensors.values(), *given.values()]) as living:
            step = _Step(model, living, narrowed(settings, sharded=sharded, device_type="cpu"))
            yield _Faked(step, tensors, given, living)


class _Step(nn.Module):
    """The passes as one call, so that recomputation sees the same weights."""

    def __init__(self, model: nn.Module, living: "_Living", narrow: AbstractContextManager[object]) -> None:
        super().__init__()
        self.model, self.living, self.narrow = model, living, narrow

    def forward(self, given: dict[str, Tensor]) -> PassBytes:
        """What they take."""
        living = self.living
        with self.narrow:
            hidden = self.model(**given).last_hidden
        kept, forward = living.now, living.peak
        living.turn()
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
        return PassBytes(kept, forward, living.peak, living.opening or living.peak_with, living.peak_with)


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors while they live, but for those given."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.ready = 0
        """Of all, and of gradients that are ready among them."""
        self.peak = self.peak_with = 0
        """The most without these, and with them."""
        self.opening = 0
        """The most with them before the last block was done; 0 until then."""
        self.flops = 0
        self.seen: dict[int, Any] = {value.untyped_storage()._cdata: None for value in known}

    def turn(self) -> None:
        """Nothing; the backward pass begins, of which the most is counted anew."""
        self.peak = self.peak_with = self.now

    def take_gradient(self, parameter: Tensor, *, before_last: bool, later: bool) -> None:
        """Nothing; a parameter's gradient is ready, of a block before the last one or later than the first, or both."""
        assert parameter.grad is not None
        if before_last and not self.opening:
            self.opening = self.peak_with
        if later:
            self.peak_with = self.now
        self.ready += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, found=found)
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen[key] = weakref.finalize(storage, self._forget, key, size)
            self.now += size
            self.peak = max(self.peak, self.now - self.ready)
            self.peak_with = max(self.peak_with, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size


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
def _own_seeds(model: nn.Module) -> Iterator[None]:
    """A block after which dropout by rows has the seeds from before, and none without numbers."""
    places = [(module, module.seeds) for module in model.modules() if isinstance(module, dropout.RowDropout)]
    try:
        yield
    finally:
        for module, seeds in places:
            module.seeds = seeds


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
