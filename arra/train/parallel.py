"""Parallelism, recomputation and compilation, applied to a model from outside; the model knows nothing of them.

    model, alignment -> Engine -> losses of a part of the batch, gradients summed over all ranks

With `ddp` every rank has all weights, with `fsdp` (PyTorch's FSDP2, `fully_shard`) each block is a group whose weights,
gradients and optimiser lie in shards on all ranks, and what is outside the blocks (embeddings, last norm, head) is a
group of its own that stays gathered from the forward to the end of the backward pass. With `hsdp` shards lie within
groups of ranks. The projectors are small and the same everywhere. Losses are parts of the whole batch's mean, so
gradients are summed, never averaged.
Legend: R ranks, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from arra.align import Alignments
from arra.data.batches import TrainBatch
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.models import CausalLM, Decoder, ModelOutput, Painter
from arra.train.objective import Losses, compute_losses
from arra.train.settings import ParallelSettings, TrainSettings

SHARDED = ("fsdp", "hsdp")
BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
"""What torch calls sending buffers round in every step, of which none changes here; renamed after 2.11."""


class Engine:
    """A model and its alignment as the loop trains them, on one process or many."""

    def __init__(
        self,
        model: Painter,
        alignment: Alignments | None,
        settings: TrainSettings,
        *,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        """Wraps the model; on ranks after the first it may be on the meta device where it is sharded."""
        self.model, self.alignment, self.settings, self.ranks, self.device = model, alignment, settings, ranks, device
        self.kind = kind_for(model, settings, ranks=ranks, device=device)
        if settings.compile:
            compile_blocks(model)
        recompute_blocks(model, settings)  # what is compiled is computed again as a whole
        self.objective: nn.Module = Objective(model, alignment)
        if ranks.size > 1 and alignment is not None:
            for value in (*alignment.parameters(), *alignment.buffers()):  # teachers may differ in a last bit
                dist.broadcast(value.detach(), src=0)
        if self.kind in SHARDED:
            shard(model, settings, ranks=ranks, device=device)
        elif ranks.size > 1:
            # of a language model experts, or parts for other inputs, may stay out of a batch
            told: dict[str, Any] = {BUFFERS: False, "gradient_as_bucket_view": True}
            wrapped = DistributedDataParallel(
                self.objective, find_unused_parameters=isinstance(model, CausalLM), **told
            )
            wrapped.register_comm_hook(None, lambda _, bucket: _summed(bucket))
            self.objective = wrapped

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all weights."""
        return self.kind in SHARDED

    def losses(self, part: TrainBatch, **told: Any) -> Losses:
        """`compute_losses` of a part that lies on the device, in the precision of the settings."""
        with self.narrowed():
            found: Losses = self.objective(part, **told)
        return found

    def narrowed(self) -> AbstractContextManager[object]:
        """A block in which products run in the type that the settings ask for; sharded weights have it already."""
        return narrowed(self.settings, sharded=self.is_sharded, device_type=self.device.type)

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """A block for the passes of one part of the batch; after the last one gradients are the whole batch's."""
        if isinstance(self.model, FSDPModule):
            # shards are summed after every part, so that no rank ever holds all gradients
            self.model.set_requires_all_reduce(is_last)
        alone = not is_last and isinstance(self.objective, DistributedDataParallel)
        with self.objective.no_sync() if alone else nullcontext():  # type: ignore[operator]
            yield
        if is_last and self.ranks.size > 1 and self.alignment is not None:
            pending = [
                dist.all_reduce(parameter.grad, async_op=True)
                for parameter in self.alignment.parameters()
                if parameter.grad is not None
            ]
            for work in pending:
                work.wait()

    @contextmanager
    def looking(self, *, whole: bool = False) -> Iterator[None]:
        """A block in which the model is used and not trained; all ranks enter it together where it is sharded.

        With `whole` every rank holds all weights meanwhile, which painting needs to be quick.
        """
        if not isinstance(self.model, FSDPModule):
            with self.narrowed():
                yield
            return
        groups = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        if whole:
            self.model.set_reshard_after_forward(False)
            for module in groups:
                module.unshard()
        try:
            yield
        finally:
            if whole:
                for module in groups:
                    is_root = id(module) == id(self.model)
                    module.set_reshard_after_forward(not is_root and self.settings.parallel.reshard, recurse=False)
            for module in groups:  # what stays gathered would not be gathered anew after the next update
                module.reshard()

    def whole_state(self) -> dict[str, Tensor]:
        """All weights and saved buffers by name, in the CPU's memory of rank zero; others get none. All ranks call.

        What has several names (a head tied to its embeddings) is one tensor under all of them.
        """
        found, whole = dict[str, Tensor](), dict[Tensor, Tensor]()
        for name, value in self.model.state_dict(keep_vars=True).items():
            if value not in whole:
                full = gathered(value, self.device)
                whole[value] = full.cpu() if self.ranks.is_first else full.new_empty(0)
            if self.ranks.is_first:
                found[name] = whole[value]
        return found


def narrowed(settings: TrainSettings, *, sharded: bool, device_type: str) -> AbstractContextManager[object]:
    """A block in which products run in the type that the settings ask for; sharded weights have it already."""
    if settings.precision == "float32" or sharded:
        return nullcontext()
    # what is computed again is narrowed again: kept until then, all narrow weights would lie there together
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=settings.recompute == "none")


class Objective(nn.Module):
    """Model and loss as one module, so that whoever wraps it sees every use of a weight in its forward pass."""

    def __init__(self, model: Painter, alignment: Alignments | None) -> None:
        super().__init__()
        self.model = model
        self._alignment = (alignment,)  # not a part: its parameters may stay out of a step, and are summed apart

    def forward(self, part: TrainBatch, **told: Any) -> Losses:
        """The losses of a part of the batch."""
        return compute_losses(self.model, part, self._alignment[0], **told)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Nothing; an empty model holds these tensors themselves, and what was one weight of several names still is."""
    names: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            names.setdefault(parameter, []).append((part, name))
    model.load_state_dict(state, assign=True)
    for (first, own), *others in names.values():
        for part, name in others:
            setattr(part, name, getattr(first, own))


def gathered(value: Tensor, device: torch.device) -> Tensor:
    """The whole of a tensor that may lie in shards; all ranks call."""
    if not isinstance(value, DTensor):
        return value.detach()
    whole: Tensor = cast(DTensor, value.detach().to(device)).full_tensor()
    return whole


def own_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory: its shard, or all of one that is not sharded."""
    return cast(DTensor, value.detach()).to_local() if isinstance(value, DTensor) else value.detach()


def can_be_cut(model: Painter) -> bool:
    """Whether the weights are numbers, each for itself: four-bit ones are not."""
    return all(parameter.is_floating_point() for parameter in model.parameters())


def state_bytes(model: Painter) -> int:
    """What a rank that has everything holds: weights, and of those trained gradient and two moments, float32."""
    return sum(
        parameter.numel() * (parameter.element_size() + 12 * parameter.requires_grad)
        for parameter in model.parameters()
    )


def kind_for(model: Painter, settings: TrainSettings, *, ranks: Ranks, device: torch.device) -> str:
    """`chosen_kind` of a model that may lie on the meta device; raises as that does."""
    return chosen_kind(
        settings,
        ranks=ranks,
        state_bytes=state_bytes(model),
        device_bytes=memory_of(device),
        may_shard=can_be_cut(model),
    )


def chosen_kind(
    settings: TrainSettings, *, ranks: Ranks, state_bytes: int, device_bytes: int | None, may_shard: bool = True
) -> str:
    """ddp, fsdp or hsdp: as the settings say; `auto` shards what would take more than half of a device.

    `device_bytes` None is no accelerator. What cannot be sharded (`may_shard`, 8-bit moments) `auto` leaves whole.

    Raises:
        ArraError: groups that do not divide the ranks, settings of shards without shards, or shards of 8-bit moments.
    """
    parallel = settings.parallel
    kind: str = parallel.kind
    may_shard = may_shard and settings.optimizer != "adamw8bit"
    if kind == "auto":
        large = device_bytes is not None and state_bytes > device_bytes / 2 and ranks.size > 1
        kind = "fsdp" if parallel.offload or (large and may_shard) else "ddp"
    if kind == "ddp" and parallel.offload:
        raise ArraError("train.parallel.offload: is of sharded weights; set train.parallel.kind: fsdp")
    if kind in SHARDED and settings.optimizer == "adamw8bit":
        raise ArraError(f"train.optimizer: adamw8bit does not train sharded weights ({kind}); use adamw, or kind: ddp")
    if parallel.replicas is not None and kind != "hsdp":
        raise ArraError(f"train.parallel.replicas: is of kind hsdp, found {kind}; leave it out")
    if kind == "hsdp" and ranks.size % (groups := count_groups(parallel, ranks)):
        raise ArraError(f"train.parallel.replicas: {groups} groups do not divide {ranks.size} ranks")
    return kind


def memory_of(device: torch.device) -> int | None:
    """Bytes of an accelerator; None of a CPU, whose memory processes share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def count_groups(parallel: ParallelSettings, ranks: Ranks) -> int:
    """Groups of ranks that each hold the whole model: one for each machine unless told."""
    return parallel.replicas or max(1, ranks.size // ranks.local_size)


def shard(model: Painter, settings: TrainSettings, *, ranks: Ranks, device: torch.device) -> None:
    """Nothing; the weights lie in shards on all ranks, as rank zero had them.

    Blocks are sent round and cut one at a time, so no other rank ever holds more than its shards and one block.

    Raises:
        ArraError: weights of a type that cannot be cut (four-bit ones).
    """
    if not can_be_cut(model):
        raise ArraError(
            f"train.parallel.kind: {settings.parallel.kind}: quantised weights cannot be sharded; use ddp, or "
            "model.llm.four_bit: false"
        )
    mesh = _mesh(settings.parallel, ranks, device)
    narrow = settings.precision == "bfloat16"
    offload: OffloadPolicy = OffloadPolicy()
    if settings.parallel.offload and device.type != "cpu":
        offload = CPUOffloadPolicy()
    told: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
    types: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if narrow else {}
    inner = MixedPrecisionPolicy(**types, cast_forward_inputs=False)  # rotary tables stay as wide as they are
    plant = _Plant(model, device, ranks)
    for block in model.blocks:
        plant.materialize(block)
        fully_shard(block, **told, mp_policy=inner, reshard_after_forward=settings.parallel.reshard)
    plant.materialize(model)
    model.register_forward_hook(_note_backward)
    fully_shard(model, **told, mp_policy=MixedPrecisionPolicy(**types), reshard_after_forward=False)
    for group in (model, *model.blocks):
        group.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        group.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows no scaled sums


def _note_backward(model: nn.Module, inputs: Any, output: ModelOutput) -> None:
    """Nothing; a gradient reaches the states, by which FSDP knows of a backward pass, though all below is frozen."""
    if torch.is_grad_enabled() and not output.last_hidden.requires_grad:
        output.last_hidden.requires_grad_()


def _mesh(parallel: ParallelSettings, ranks: Ranks, device: torch.device) -> DeviceMesh:
    if parallel.kind != "hsdp":
        return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",))
    groups = count_groups(parallel, ranks)
    return init_device_mesh(device.type, (groups, ranks.size // groups), mesh_dim_names=("replicate", "shard"))


class _Plant:
    """Puts rank zero's weights and buffers on every rank's device, part by part."""

    def __init__(self, model: nn.Module, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks, self.done = device, ranks, set[int]()
        names = dict[nn.Parameter, int]()
        for part in model.modules():
            for parameter in part._parameters.values():
                if parameter is not None:
                    names[parameter] = names.get(parameter, 0) + 1
        tied = [parameter for parameter, count in names.items() if count > 1]
        self.tied: dict[nn.Parameter, nn.Parameter | None] = dict.fromkeys(tied)
        """Weights with several names, which stay one; of no others is a reference kept, so that they are freed."""

    def materialize(self, module: nn.Module) -> None:
        """Nothing; all of the module that was not yet is in place, with the values that rank zero had."""
        for part in module.modules():
            if id(part) in self.done:
                continue
            self.done.add(id(part))
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = self._placed(parameter)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self._sent(buffer)

    def _placed(self, parameter: nn.Parameter) -> nn.Parameter:
        known = self.tied.get(parameter)
        if known is not None:
            return known
        new = nn.Parameter(self._sent(parameter.detach()), requires_grad=parameter.requires_grad)
        if parameter in self.tied:
            self.tied[parameter] = new
        return new

    def _sent(self, value: Tensor) -> Tensor:
        held = torch.empty_like(value, device=self.device) if value.is_meta else value.to(self.device).contiguous()
        if self.ranks.size > 1:
            dist.broadcast(held, src=0)
        return held


def _summed(bucket: dist.GradBucket) -> Any:
    """A future of the gradients of all ranks; DDP's own hook divides them by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def recompute_blocks(model: Painter, settings: TrainSettings) -> None:
    """Nothing; in the backward pass blocks compute again what the settings say, instead of keeping it.

    Compiled blocks, and the decoder's in float32, compute all that is cheap again of themselves, so `selective` adds
    nothing to them.
    """
    lean = settings.compile or (isinstance(model, Decoder) and settings.precision == "float32")
    if settings.recompute == "none" or (settings.recompute == "selective" and lean):
        return
    contexts = None if settings.recompute == "full" else partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        block.forward = _recomputing(block.forward, contexts)


def _recomputing(forward: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    told: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **told, **kwargs)

    return recomputing


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _dear() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _dear() -> frozenset[Any]:
    """Operations whose results are kept: matrix products and attention; asked for at every operation."""
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    products = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default]
    return frozenset([*products, *(getattr(aten, name).default for name in names if hasattr(aten, name))])


def compile_blocks(model: Painter) -> None:
    """Nothing; every block is compiled when it is first called."""
    blocks = model.blocks
    # each block may be its own program: numbers that differ between blocks are constants in it
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks) + 8)
    for block in blocks:
        block.forward = torch.compile(block.forward)
