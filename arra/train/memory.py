"""What a training takes of every device's memory, part by part, before it starts; `arra plan` prints it.

    a model on the meta device, its passes, settings, ranks --> training_memory --> Memory{weights, ..., activations}

What stays for the whole training (weights, gradients, moments, averages) is counted tensor by tensor. What comes and
goes in a step is found by making its passes without numbers (`arra.train.activations`). Parts are at their largest at
different moments of a step; the total is that of the worst moment (`_worst`).
Letters: N elements of a tensor, d its first side, R ranks that share one set of weights, B rows of a micro-batch,
S positions of a row, D model width, V vocabulary, L blocks, w bytes of a number in products (2 in bfloat16, else 4).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import NamedTuple

from torch import Tensor, nn

from arra.align import Projector
from arra.models import CausalLM, Painter
from arra.models.head import CUDA_HEAD_BYTES, HEAD_BYTES
from arra.train.activations import PassBytes
from arra.train.optimizer import STACK_BYTES, Muon, make_optimizers
from arra.train.parallel import SHARDED
from arra.train.settings import TrainSettings

WIDE = 4
"""Bytes of float32: of what is trained, its gradients, moments and averages, and of gradients while they are summed."""
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: half a byte, a byte of scale for 64 of them, and four bytes for 256 of those."""
EIGHT_BIT_LEAST, EIGHT_BIT_BLOCK = 4096, 256
"""Of bitsandbytes: smaller tensors keep float32 moments, larger ones have a float32 scale for each block."""
RESERVE_BYTES = 2 * 2**30
"""Assumed, not computed: the driver's context and kernels, NCCL's buffers, what lies idle between tensors, and the part
of its nominal memory that a card does not offer."""
MOMENT_COPIES = 3
"""Of the largest stack of matrices while Muon orthogonalises it: its updates, and the iterate before and after a
step; two Gram matrices come with them."""
LOOKING_ROWS = 64
"""Of a validation batch."""


class Held(NamedTuple):
    """A parameter, as far as memory goes."""

    shape: tuple[int, ...]
    bytes_each: float
    trained: bool
    orthogonalised: bool
    """Whether Muon trains it, which keeps one number for each of its own."""


@dataclass(frozen=True)
class Parts:
    """The parameters of a model in the groups that are gathered together."""

    blocks: tuple[tuple[Held, ...], ...]
    root: tuple[Held, ...]
    """Outside the blocks: embeddings, last norm, head."""

    @property
    def all(self) -> tuple[Held, ...]:
        """Those of every group."""
        return (*(held for block in self.blocks for held in block), *self.root)


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a training share it."""

    kind: str = "ddp"
    """ddp, fsdp or hsdp."""
    ranks: int = 1
    replicas: int = 1
    """hsdp: groups of ranks that each have all weights."""

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all weights."""
        return self.kind in SHARDED

    @property
    def in_buckets(self) -> bool:
        """Whether gradients lie in ddp's buckets, which stay."""
        return self.ranks > 1 and not self.is_sharded

    @property
    def shards(self) -> int:
        """Ranks R that share one set of weights."""
        return self.ranks // self.replicas if self.is_sharded else 1


@dataclass(frozen=True)
class Sequences:
    """The rows of a micro-batch, each alike."""

    labelled: int
    """Positions of a row that carry loss."""
    aligned: int
    """Positions of a row that each alignment term takes."""


@dataclass(frozen=True)
class Memory:
    """Bytes on every device, part by part; on the first rank, whose shards are the largest."""

    weights: int
    """What is trained in float32; what is frozen in its own type."""
    gradients: int
    optimizer: int
    averages: int
    projector: int
    """Of the alignment, the same on all ranks: weights, gradients, moments."""
    gathered: int
    """Sharded weights while they are whole, and gradients before they are shards."""
    activations: int
    """The passes over a micro-batch, up to the head, and the alignment's."""
    head: int
    """A slice of the logits, gradients of the states, the sum of the head's gradients."""
    update: int = 0
    """While the optimiser moves the weights, beside its state: Muon's stacks of matrices."""
    looking: int = 0
    """Activations of a validation batch."""
    apart: int = 0
    """What of the parts is never there at the same moment as the rest."""
    reserve: int = RESERVE_BYTES
    let_go: int = 0
    """Of the gradients, while the run looks at itself: all but those in ddp's buckets."""
    host: int = 0
    """In the machine's own memory, for each rank: what is offloaded, and the copy of a checkpoint that is written in
    the background."""

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.projector

    @property
    def total(self) -> int:
        """On the device, at the worst moment."""
        parts = self.gathered + self.activations + self.head + self.update + self.looking
        return self.state + parts - self.apart + self.reserve


def parts_of(model: Painter, settings: TrainSettings, *, four_bit: bool = False) -> Parts:
    """The model's parameters, each once, by group; `four_bit` counts frozen matrices as `quantize` would store them.

    Raises:
        ArraError: Muon has nothing to train.
    """
    narrow = set(_quantised(model)) if four_bit else set()
    orthogonalised = set(_orthogonalised(model, settings)) if settings.optimizer == "muon" else set()

    def held(parameter: nn.Parameter) -> Held:
        each = FOUR_BITS if parameter in narrow else parameter.element_size()
        return Held(tuple(parameter.shape), each, parameter.requires_grad, parameter in orthogonalised)

    own = {parameter: number for number, block in enumerate(model.blocks) for parameter in block.parameters()}
    blocks: list[list[Held]] = [[] for _ in model.blocks]
    root: list[Held] = []
    for parameter in model.parameters():
        (blocks[own[parameter]] if parameter in own else root).append(held(parameter))
    return Parts(tuple(map(tuple, blocks)), tuple(root))


def _orthogonalised(model: Painter, settings: TrainSettings) -> Iterator[nn.Parameter]:
    """The matrices that are Muon's."""
    trained = {f"model.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for optimizer in make_optimizers(trained, settings, modules=[model]):
        if isinstance(optimizer, Muon):
            yield from optimizer.param_groups[0]["params"]


def _quantised(model: Painter) -> Iterator[nn.Parameter]:
    """Weights of linear layers but the head's, where they are frozen."""
    head = output_layer(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module is not head:
            yield module.weight  # type: ignore[misc]


def local_elements(shape: Sequence[int], shards: int) -> int:
    """Elements of a tensor on the first of R ranks: ceil(d / R) rows, as FSDP2 cuts; all N on one."""
    if shards == 1 or not shape:
        return prod(shape)
    return ceil(shape[0] / shards) * prod(shape[1:])


def moment_bytes(held: Held, settings: TrainSettings, *, shards: int) -> int:
    """Bytes of the optimiser's state on a rank: 8 N for AdamW, 4 N for Muon's matrices.

    adamw8bit: 2 N and 8 bytes for each 256 elements, but 8 N below 4,096 elements. Nothing for what is frozen.
    Counters of steps are left out.
    """
    count = local_elements(held.shape, shards)
    if not held.trained:
        return 0
    if settings.optimizer == "muon" and held.orthogonalised:
        return WIDE * count
    if settings.optimizer == "adamw8bit" and count >= EIGHT_BIT_LEAST:
        return 2 * (count + WIDE * ceil(count / EIGHT_BIT_BLOCK))
    return 2 * WIDE * count


def state_memory(
    parts: Parts, settings: TrainSettings, *, sharing: Sharing, projectors: Sequence[nn.Module] = ()
) -> Memory:
    """The parts that stay from step to step, the others nought.

    On each of R ranks weights take 4 n(R) bytes where they are trained and their own type's where not, gradients
    4 n(R), moments those of `moment_bytes`, each average 4 n(R), with n(R) = ceil(d / R) N / d. Projectors take
    16 N on every rank.
    """
    shards, held = sharing.shards, parts.all
    local = [local_elements(each.shape, shards) for each in held]
    trained = sum(count for each, count in zip(held, local, strict=True) if each.trained)
    projector = [
        Held(tuple(p.shape), WIDE, trained=True, orthogonalised=False) for one in projectors for p in one.parameters()
    ]
    return Memory(
        weights=sum(ceil(each.bytes_each * count) for each, count in zip(held, local, strict=True)),
        gradients=WIDE * trained,
        optimizer=sum(moment_bytes(each, settings, shards=shards) for each in held),
        averages=WIDE * trained * len(settings.ema_decays),
        projector=sum(2 * WIDE * prod(each.shape) + moment_bytes(each, settings, shards=1) for each in projector),
        gathered=0,
        activations=0,
        head=0,
        reserve=0,
    )


def gathered_bytes(parts: Parts, settings: TrainSettings, *, sharing: Sharing) -> int:
    """Bytes of sharded weights while they are whole, and of gradients before they are shards; 0 where nothing is.

    With b the elements of the largest block, p those of the two largest neighbours (one computes, the next is on its
    way), r those of the root group, and b', r' those of them that are trained: w (p + b + r) weights, the b being the
    buffer that they travel in, and the more of w r' + (w + 4) b' and (w + 4) r' gradients: a block's are summed over
    ranks in float32 while the root's wait, the root's at the end. Without `reshard` all blocks stay whole.
    """
    if not sharing.is_sharded:
        return 0
    w = _product_bytes(settings)
    sizes = [sum(prod(held.shape) for held in block) for block in parts.blocks]
    pairs = [sum(sizes[place : place + 2]) for place in range(len(sizes))]
    whole = max(pairs, default=0) if settings.parallel.reshard else sum(sizes)
    trained = [sum(prod(held.shape) for held in block if held.trained) for block in parts.blocks]
    block, root = max(trained, default=0), sum(prod(held.shape) for held in parts.root if held.trained)
    weights = w * (whole + max(sizes, default=0) + sum(prod(held.shape) for held in parts.root))
    return weights + max(w * root + (w + WIDE) * block, (w + WIDE) * root)


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the loss on labelled states."""

    passing: int
    """While a slice of the logits is there: the states, the slice and what is made of it."""
    kept: int
    """Until the backward pass: gradients of the states, and of the head where it is trained."""

    @property
    def total(self) -> int:
        """The most."""
        return self.passing + self.kept


def head_bytes(model: Painter, settings: TrainSettings, *, positions: int, device_type: str = "cuda") -> HeadBytes:
    """Bytes of the loss on `positions` labelled states.

    w D for the states, 4 D for their gradients; a slice of logits in float32, a copy in the products' type where that
    is narrower, on a CPU one in float32 again; 4 D V for the sum of the head's gradients where it or rows of it are
    trained. Where only rows are, w D V more for the head with these rows laid over it. A head that is called (adapters,
    quantised) takes slices of `CALLED_ROWS` and keeps what autograd does.
    """
    w, layer = _product_bytes(settings), output_layer(model)
    rows = getattr(layer, "token_adapter", layer)
    weight: Tensor = getattr(rows, "base_layer", rows).weight  # type: ignore[assignment]
    most = CUDA_HEAD_BYTES if device_type == "cuda" else HEAD_BYTES
    copies = 1.0 if w == WIDE else 1.5 if device_type == "cuda" else 2.5
    logits = int(copies * min(max(most, WIDE * len(weight)), WIDE * positions * len(weight)))
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    laid = weight.element_size() * weight.numel() if trained and not weight.requires_grad else 0
    narrow = w * weight.numel() if w < weight.element_size() else 0
    return HeadBytes(
        passing=positions * model.hidden_size * w + logits + laid + narrow,
        kept=WIDE * positions * model.hidden_size + (WIDE * weight.numel() if trained else 0),
    )


def output_layer(model: Painter) -> nn.Module:
    """The layer that gives logits, adapters included."""
    layer: nn.Module = model.lm.get_output_embeddings() if isinstance(model, CausalLM) else model.output  # type: ignore[operator]
    return layer


def projector_activations(projectors: Sequence[Projector], hidden_size: int, *, positions: int) -> int:
    """Bytes that alignment terms keep for so many positions each, in float32.

    4 (D + 2 I + 3 G) for each: the states, both sides of the inner layer of width I, and projections, their directions
    and targets of width G.
    """
    widths = [
        hidden_size + 2 * (0 if one.second is None else one.second.in_features) + 3 * one.target_size
        for one in projectors
    ]
    return WIDE * positions * sum(widths)


def muon_bytes(parts: Parts) -> int:
    """Bytes while Muon orthogonalises its largest stack of matrices (M, N), G of a shape: 3 G M N and 2 G M^2, M <= N.

    Of sharded weights every rank has whole matrices meanwhile.
    """
    shapes: dict[tuple[int, ...], int] = {}
    for held in parts.all:
        if held.orthogonalised:
            shapes[held.shape] = shapes.get(held.shape, 0) + 1
    return max((_stack_bytes(shape, count) for shape, count in shapes.items()), default=0)


def _stack_bytes(shape: tuple[int, ...], count: int) -> int:
    together = min(count, max(1, STACK_BYTES // (WIDE * prod(shape))))
    return WIDE * together * (MOMENT_COPIES * prod(shape) + 2 * min(shape) ** 2)


def training_memory(
    model: Painter,
    settings: TrainSettings,
    *,
    sharing: Sharing,
    passes: PassBytes,
    sequences: Sequences,
    rows: int,
    parts_of_batch: int = 1,
    looking: int = 0,
    projectors: Sequence[Projector] = (),
    four_bit: bool = False,
    device_type: str = "cuda",
) -> Memory:
    """What every device holds at the worst moment of a step with micro-batches of so many rows.

    The model is on the meta device; `passes` are those of such a micro-batch with these settings and this sharing,
    `parts_of_batch` how many a step has, `looking` what a validation batch takes.
    """
    parts = parts_of(model, settings, four_bit=four_bit)
    state = state_memory(parts, settings, sharing=sharing, projectors=projectors)
    head = head_bytes(model, settings, positions=rows * sequences.labelled, device_type=device_type)
    aligned = projector_activations(projectors, model.hidden_size, positions=rows * sequences.aligned)
    found = replace(
        state,
        gathered=gathered_bytes(parts, settings, sharing=sharing),
        activations=passes.peak + aligned,
        head=head.total,
        update=muon_bytes(parts),
        looking=looking,
        reserve=RESERVE_BYTES,
        let_go=0 if sharing.in_buckets else state.gradients + state.projector // WIDE,
        host=state.state - state.gradients - state.projector // WIDE if settings.checkpoint_in_background else 0,
    )
    grows = parts_of_batch == 1 and sharing.ranks == 1
    worst = _worst(found, passes, head, aligned=aligned, grows=grows)
    found = replace(found, apart=found.total - found.reserve - worst)
    if settings.ema_offload:
        landing = found.averages // max(1, len(settings.ema_decays))  # weights on their way to them
        found = replace(found, averages=0, host=found.host + found.averages + landing)
    if settings.parallel.offload and sharing.is_sharded:
        away = found.state - found.projector
        found = replace(found, weights=0, gradients=0, optimizer=0, averages=0, let_go=0, host=found.host + away)
    return found


def _worst(found: Memory, passes: PassBytes, head: HeadBytes, *, aligned: int, grows: bool) -> int:
    """Bytes at the worst moment of a step.

    `grows`: gradients come in the backward pass and are let go before the next one; else (micro-batches are summed,
    buckets or shards of several ranks) they are there in both passes.
    """
    stays = found.state - found.gradients + found.gathered
    before, projector = (0 if grows else found.gradients), found.projector // WIDE  # of which a quarter are gradients
    stays -= projector if grows else 0
    forward = max(passes.forward, passes.kept + head.total, passes.kept + head.kept + aligned)
    if grows:
        # the alignment's part goes backward first, blocks one by one after it
        backward = max(
            passes.kept + head.kept + aligned + projector,
            passes.opening + head.kept + projector,
            passes.closing + head.kept + projector,
        )
    else:
        backward = head.kept + max(passes.backward, passes.kept + aligned)
    held = found.gradients + (projector if grows else 0)
    after = max(held + found.update, held - found.let_go + found.looking)
    return stays + max(before + forward, before + backward, after)


def largest_rows(memory_of: Callable[[int], Memory], device_bytes: int, *, most: int) -> int:
    """The most rows of a micro-batch, up to `most`, whose memory fits the device; 0 where not even one does.

    Memory rises nearly evenly with rows, so few numbers of them are looked at.
    """
    low, high = 1, most
    largest = memory_of(high).total
    if largest <= device_bytes:
        return most
    least = memory_of(low).total
    if least > device_bytes:
        return 0
    while low + 1 < high:  # low fits, high does not
        guess = low + int((device_bytes - least) * (high - low) / (largest - least))
        guess = min(max(guess, low + 1), high - 1)
        needed = memory_of(guess).total
        if needed <= device_bytes:
            low, least = guess, needed
        else:
            high, largest = guess, needed
    return low


def _product_bytes(settings: TrainSettings) -> int:
    return 2 if settings.precision == "bfloat16" else WIDE
