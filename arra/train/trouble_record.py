"""What is found out about a step in trouble, and written down before anything else happens.

Place in the pipeline: the loop calls `record_trouble` on all ranks when `arra.train.trouble` judged a step, while its
gradients are still there and weights are those of the step before.

RUN/trouble/step-0000123.json    what happened, the records of the batch, sizes of weights, gradients and states;
                                 step-0000123-batch-0000130.json where batches were left out before

Legend: B rows of a rank, T sequence, D model.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from arra.data.batches import NO_RECORD
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.runs import atomic_write
from arra.train.optimizer import BLOCK
from arra.train.parallel import own_part
from arra.train.settings import TroubleSettings
from arra.train.trouble import Action, Reason

CHUNK = 1 << 22
"""Elements looked at together: a temporary of a whole embedding table may be what memory has no room for."""
NAMED_RECORDS = 8
"""In the line that a user reads; the file has all."""


@dataclass(frozen=True)
class Trouble:
    """A step in trouble, as all ranks see it."""

    step: int
    """Updates made before it."""
    position: int
    """Of its batch in the data order."""
    reason: Reason
    action: Action
    losses: Mapping[str, float]
    """By name, `loss` their total: the mean over the whole batch."""
    grad_norm: float
    learning_rate: float
    recent: Sequence[float]
    """Losses of the steps before it, oldest first."""


@dataclass(frozen=True)
class Sizes:
    """How large the numbers of one tensor, or of several, are."""

    count: int = 0
    squares: float = 0.0
    """Sum of the squares of those that are finite."""
    largest: float = 0.0
    """Absolute value among those that are finite."""
    nonfinite: int = 0

    @property
    def norm(self) -> float:
        """Of the finite numbers."""
        return math.sqrt(self.squares)

    @property
    def rms(self) -> float:
        """Root of the mean square of the finite numbers."""
        return math.sqrt(self.squares / max(1, self.count - self.nonfinite))


@dataclass(frozen=True)
class TroubleRecord:
    """What was written down."""

    path: Path
    began: str
    """Where it began, in words."""
    records: tuple[str, ...]
    """Ids of the batch's records, or of those that were seen to make the trouble."""


@dataclass
class _Seen:
    """What one rank saw of the states."""

    sizes: dict[int, Sizes] = field(default_factory=dict)
    rows: dict[int, list[int]] = field(default_factory=dict)
    """By layer: records whose states are not all finite."""


def record_trouble(
    trouble: Trouble,
    run: Path,
    *,
    ranks: Ranks,
    parameters: Mapping[str, nn.Parameter],
    rows: Int[Tensor, " B"] | None = None,
    ids: Callable[[Sequence[int]], Sequence[str]] | None = None,
    states: Iterable[Mapping[int, Tensor]] = (),
) -> TroubleRecord:
    """What was found out, the same on all ranks, after rank zero wrote it to `RUN/trouble/`.

    Called on all ranks with the gradients of the whole batch in `parameters` (names begin with `model.` or `align.`),
    which may be sharded; weights are not gathered. `rows` are the rank's records (text, which has none, last), `ids`
    gives their names and is called on rank zero. `states` computes the batch again without gradients: for each of the
    rank's micro-batches, in the order of `rows`, the states (B, T, D) that a model captures, by layer; without it the
    file has none.

    Raises:
        ArraError: the file cannot be written.
    """
    gradients = _over_ranks({name: p.grad for name, p in parameters.items()}, ranks)
    weights = _over_ranks({name: p.detach() for name, p in parameters.items()}, ranks)
    own = [] if rows is None else [row for row in rows.tolist() if row != NO_RECORD]
    seen = ranks.gather(_look_at(states, own))
    numbers = sorted({layer for each in seen for layer in each.sizes})
    layers = {layer: _sum([each.sizes[layer] for each in seen if layer in each.sizes]) for layer in numbers}
    bad = {layer: [row for each in seen for row in each.rows.get(layer, ())] for layer in layers}
    batch = [row for each in ranks.gather(own) for row in each]
    began = where_it_began(weights=weights, gradients=gradients, layers=layers)
    first_bad = next((bad[layer] for layer, sizes in layers.items() if sizes.nonfinite), [])
    part = f"-batch-{trouble.position:07d}" if trouble.position != trouble.step else ""
    path = run / "trouble" / f"step-{trouble.step:07d}{part}.json"

    def write() -> tuple[str, ...]:
        named = (lambda numbers: [str(number) for number in numbers]) if ids is None else ids
        content = {
            **asdict(trouble),
            "began": began,
            "records": list(named(batch)),
            "records_with_nonfinite_states": list(named(first_bad)),
            "parts": [
                {
                    "name": name,
                    "numbers": weights[name].count,
                    "weight_norm": weights[name].norm,
                    "grad_norm": gradients[name].norm,
                    "largest_gradient": gradients[name].largest,
                    "nonfinite_gradients": gradients[name].nonfinite,
                    "nonfinite_weights": weights[name].nonfinite,
                }
                for name in weights
            ],
            "states": [
                {"layer": layer, "rms": sizes.rms, "largest": sizes.largest, "nonfinite": sizes.nonfinite}
                for layer, sizes in layers.items()
            ],
        }
        atomic_write(path, json.dumps(_writable(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return tuple(content["records_with_nonfinite_states"] or content["records"])

    return TroubleRecord(path, began, ranks.by_first(write))


def where_it_began(*, weights: Mapping[str, Sizes], gradients: Mapping[str, Sizes], layers: Mapping[int, Sizes]) -> str:
    """Where the first number that is not finite was met, in words; where all are finite, the largest gradient.

    Parts are in the order of the forward pass. Weights come before states, which come before gradients; states are
    looked at in the order of the forward pass, gradients from the head down, as the backward pass makes them.
    """
    for name, sizes in weights.items():
        if sizes.nonfinite:
            return f"non-finite weights in {name}"
    for layer, sizes in layers.items():
        if sizes.nonfinite:
            return f"first non-finite states {f'after block {layer}' if layer else 'in the embeddings'}"
    for name, sizes in reversed(list(gradients.items())):
        if sizes.nonfinite:
            return f"first non-finite gradients in {name}"
    largest = max(gradients, key=lambda name: gradients[name].norm, default="nothing")
    return f"all gradients are finite, the largest are in {largest}"


def trouble_line(trouble: Trouble, record: TroubleRecord, *, run: Path) -> str:
    """What happened in a step, with which records, where it began and where it is written down; for a log or error."""
    loss, records = trouble.losses["loss"], record.records
    odd = [name for name, each in trouble.losses.items() if name != "loss" and not math.isfinite(each)]
    if trouble.reason == "spike":
        mean = math.fsum(trouble.recent) / max(1, len(trouble.recent))
        what = f"loss rose to {loss:.4g} from {mean:.4g}"
    else:
        what = f"gradient norm is {trouble.grad_norm}" if math.isfinite(loss) else f"loss is {loss}"
        if 0 < len(odd) < len(trouble.losses) - 1:  # where only features are damaged, the others are finite
            what += f", of {' and '.join(odd)}"
    more = ", ..." if len(records) > NAMED_RECORDS else ""
    named = f", records {', '.join(records[:NAMED_RECORDS])}{more}" if records else ""
    return (
        f"{run}: step {trouble.step}: {what} (batch {trouble.position}{named}); {record.began}; saved in "
        f"{record.path.relative_to(run)}"
    )


def stop_error(
    trouble: Trouble,
    record: TroubleRecord,
    *,
    run: Path,
    checkpoint: int | None,
    settings: TroubleSettings,
    survived: int,
) -> ArraError:
    """The line that ends the training; `checkpoint` is the newest one's step, `survived` how often it went on."""
    whole = "there is no checkpoint yet" if checkpoint is None else f"the checkpoint of step {checkpoint} is whole"
    wanted = settings.nonfinite if trouble.reason == "nonfinite" else settings.spike
    if wanted == "stop":
        advice = f"lower train.learning_rate, or set train.trouble.{trouble.reason}: rewind"
    else:
        advice = (
            f"training went on after trouble {survived} times, as often as train.trouble.most allows; lower "
            "train.learning_rate, or look at these records"
        )
    return ArraError(f"{trouble_line(trouble, record, run=run)}; {whole}; {advice}")


def sizes_of(value: Tensor) -> Sizes:
    """Of the numbers that this process holds of a tensor: of a sharded one its own shard."""
    numbers = value.detach().reshape(-1)
    kind = torch.float32 if value.device.type == "mps" else torch.float64  # that device has no float64
    told = []
    for chunk in numbers.split(CHUNK):
        finite = chunk.isfinite()
        kept = torch.where(finite, chunk, 0).to(kind)
        largest = kept.abs().max() if len(chunk) else kept.new_zeros(())
        told.append(torch.stack([kept.square().sum(), largest, (~finite).sum().to(kind)]))
    squares, largests, nonfinite = torch.stack(told).T.tolist()
    return Sizes(len(numbers), math.fsum(squares), max(largests), round(math.fsum(nonfinite)))


def _over_ranks(values: Mapping[str, Tensor | None], ranks: Ranks) -> dict[str, Sizes]:
    """Sizes of each part of the model, over all ranks, in the order of the names."""
    own = {name: (sizes_of(own_part(value)), _num_shards(value)) for name, value in values.items() if value is not None}
    parts: dict[str, list[Sizes]] = {part_of(name): [] for name in values}
    everywhere = ranks.gather(own)
    for name, (_, shards) in own.items():
        whole, copies = _sum([each[name][0] for each in everywhere]), ranks.size // shards
        parts[part_of(name)].append(
            replace(
                whole,
                count=whole.count // copies,
                squares=whole.squares / copies,
                nonfinite=whole.nonfinite // copies,
            )
        )
    return {name: _sum(each) for name, each in parts.items()}


def part_of(name: str) -> str:
    """What a parameter belongs to: its block, its alignment term, or its module; `model.` is not told."""
    if name.startswith("align."):
        return ".".join(name.split(".")[:3])
    name = f".{name.removeprefix('model.')}"
    block = BLOCK.search(name)
    part = name[: block.end() - 1] if block else name.rpartition(".")[0]
    return (part or name)[1:]


def _num_shards(value: Tensor) -> int:
    """Among how many ranks a tensor is shared out; the others hold copies."""
    if not isinstance(value, DTensor):
        return 1
    return math.prod(value.device_mesh.size(i) for i, each in enumerate(value.placements) if each.is_shard())


def _look_at(states: Iterable[Mapping[int, Float[Tensor, "B T D"]]], rows: Sequence[int]) -> _Seen:
    """Sizes of the states of each layer, and which records' states are not all finite."""
    seen, start = _Seen(), 0
    for captured in states:
        for layer, state in captured.items():
            seen.sizes[layer] = _sum([seen.sizes.get(layer, Sizes()), sizes_of(state)])
            bad = (~state.isfinite()).flatten(1).any(1).tolist()
            own = rows[start : start + len(state)]  # rows of text come last and are no records
            seen.rows.setdefault(layer, []).extend(row for row, is_bad in zip(own, bad, strict=False) if is_bad)
        start += max((len(state) for state in captured.values()), default=0)
    return seen


def _sum(parts: Sequence[Sizes]) -> Sizes:
    return Sizes(
        sum(each.count for each in parts),
        math.fsum(each.squares for each in parts),
        max((each.largest for each in parts), default=0.0),
        sum(each.nonfinite for each in parts),
    )


def _writable(value: Any) -> Any:
    """The same with "nan", "inf" and "-inf" for numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _writable(each) for key, each in value.items()}
    return [_writable(each) for each in value] if isinstance(value, list | tuple) else value
