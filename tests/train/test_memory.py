"""What a training is said to take of a device is what it takes: shards, moments, the head, what is offloaded."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from arra.models.adapters import LoraSettings, add_lora, quantize
from arra.models.head import CUDA_HEAD_BYTES, HEAD_BYTES
from arra.train.activations import traced_passes
from arra.train.alignment import empty_projectors
from arra.train.memory import (
    RESERVE_BYTES,
    Memory,
    Sequences,
    Sharing,
    gathered_bytes,
    head_bytes,
    largest_rows,
    local_elements,
    parts_of,
    projector_activations,
    state_memory,
    training_memory,
)
from arra.train.optimizer import make_optimizers
from arra.train.settings import AlignSettings, TrainSettings
from tests.train.meta_models import decoder, painter, settings, tokens


@pytest.fixture
def first_of_two() -> Iterator[DeviceMesh]:
    """Ranks of which the other one is not there: what is gathered has its size and not its numbers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def local_bytes(values: Iterable[Any]) -> int:
    """Of shards; what is whole (counters) is left out."""
    return sum(value.to_local().nbytes for value in values if isinstance(value, DTensor))


def test_shards_are_those_of_fsdp(first_of_two: DeviceMesh) -> None:
    """Weights, gradients and moments of the first of two ranks, byte for byte."""
    model = decoder(empty=False)
    for block in model.layers:
        fully_shard(block, mesh=first_of_two)
    fully_shard(model, mesh=first_of_two, reshard_after_forward=False)
    named = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    (optimizer,) = make_optimizers(named, settings(), modules=[model])
    model.output(model(**tokens(2, 16, device="cpu")).last_hidden).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    held = [local_bytes(values) for values in (model.parameters(), gradients, moments)]
    state = state_memory(parts_of(decoder(), settings()), settings(), sharing=Sharing("fsdp", 2))
    assert [state.weights, state.gradients, state.optimizer] == held
    assert state.weights > 4 * sum(parameter.numel() for parameter in decoder().parameters()) // 2


def test_rows_are_rounded_up() -> None:
    assert [local_elements((7, 5), shards) for shards in (1, 2, 3, 8)] == [35, 20, 15, 5]
    assert local_elements((7,), 2) == 4
    assert Sharing("hsdp", 8, 2).shards == 4
    assert Sharing("ddp", 8).shards == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("part", ["all", "lora"])
def test_one_device_holds_what_is_there(optimizer: str, part: str) -> None:
    """Of tensors that are trained: weights, gradients, moments (but for counters and one table of 8-bit values)."""
    model = painter("smollm", empty=False, hidden_size=64, intermediate_size=96)
    if part == "lora":
        model.lm.to(torch.bfloat16)
        add_lora(model.lm, LoraSettings(rank=4), rows=[42, 43], seed=0)
    s = settings(optimizer=optimizer, ema_decay=(0.9, 0.99))
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(trained, s, modules=[model])
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    moments = 0
    for each in optimizers:
        each.step()
        for state in each.state.values():
            kept = [v for k, v in state.items() if isinstance(v, Tensor) and k != "step" and "qmap" not in k]
            moments += sum(value.nbytes for value in kept)
    found = state_memory(parts_of(model, s), s, sharing=Sharing())
    count = sum(parameter.numel() for parameter in trained.values())
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert found.gradients == 4 * count
    assert found.averages == 8 * count
    assert found.optimizer == moments


def test_frozen_matrices_in_four_bits() -> None:
    """As bitsandbytes stores them, give or take its few tables."""
    pytest.importorskip("bitsandbytes")
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
    model, real = (painter(empty=empty, **shape) for empty in (True, False))
    for each in (model, real):
        each.lm.requires_grad_(False)
    found = state_memory(parts_of(model, settings(), four_bit=True), settings(), sharing=Sharing()).weights
    quantize(real.lm)
    stored = 0
    for parameter in real.parameters():
        stored += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            stored += state.absmax.nbytes + state.state2.absmax.nbytes
    assert found == pytest.approx(stored, rel=0.01)
    assert found < 0.3 * state_memory(parts_of(model, settings()), settings(), sharing=Sharing()).weights


def test_what_is_gathered_by_hand() -> None:
    """Two blocks and the buffer of one, the root, and a block's gradients, narrow and wide."""
    model = decoder()
    block = sum(parameter.numel() for parameter in model.layers[0].parameters())
    root = sum(parameter.numel() for parameter in model.parameters()) - 3 * block
    narrow = settings(precision="bfloat16")
    parts = parts_of(model, narrow)
    sharing = Sharing("fsdp", 4)
    gradients = max(2 * root + 6 * block, 6 * root)
    assert gathered_bytes(parts, narrow, sharing=sharing) == 2 * (3 * block + root) + gradients
    whole = settings(precision="bfloat16", parallel={"kind": "fsdp", "reshard": False})
    assert gathered_bytes(parts, whole, sharing=sharing) == 2 * (4 * block + root) + gradients
    assert gathered_bytes(parts, narrow, sharing=Sharing("ddp", 4)) == 0


def test_the_heads_part_by_hand() -> None:
    model = decoder(num_codes=2**16)
    weight = 4 * 2**16 * 36
    for device, slice_bytes in (("cpu", HEAD_BYTES), ("cuda", CUDA_HEAD_BYTES)):
        found = head_bytes(model, settings(), positions=2000, device_type=device)
        assert found.kept == 2000 * 36 * 4 + weight
        assert found.passing == 2000 * 36 * 4 + slice_bytes
    model.output.weight.requires_grad_(False)
    assert head_bytes(model, settings(), positions=8).total == 8 * 36 * 8 + 4 * 8 * 2**16
    narrow = head_bytes(model, settings(precision="bfloat16"), positions=8)
    assert narrow.total == 8 * 36 * 6 + 6 * 8 * 2**16 + weight // 2  # a narrow copy of the slice, and of the head
    rows = painter(empty=False)
    add_lora(rows.lm, LoraSettings(rank=2), rows=[42, 43], seed=0)
    assert head_bytes(rows, settings(), positions=2).total == 2 * 32 * 8 + 4 * 2 * 58 + 2 * 4 * 58 * 32


def test_projectors() -> None:
    align = AlignSettings(components=5, inner_size=7, more={"other": {"encoder": "second", "projector": "linear"}})
    first, second = empty_projectors(align, {"teacher": 9, "second": 11}, hidden_size=36)
    count = 36 * 7 + 7 + 7 * 5 + 5 + 36 * 11 + 11
    parts = parts_of(decoder(), settings())
    found = state_memory(parts, settings(), sharing=Sharing("fsdp", 2), projectors=(first, second))
    assert found.projector == 16 * count
    assert projector_activations((first, second), 36, positions=10) == 4 * 10 * (2 * 36 + 2 * 7 + 3 * 5 + 3 * 11)


def everything(s: TrainSettings, *, rows: int = 2, sharing: Sharing | None = None, looking: int = 0) -> Memory:
    model, sharing = decoder(), sharing or Sharing("fsdp", 2)
    passes = traced_passes(model, s, inputs=tokens(rows, 16), sharded=sharing.is_sharded).memory
    asked = Sequences(labelled=16, aligned=16)
    return training_memory(model, s, sharing=sharing, passes=passes, sequences=asked, rows=rows, looking=looking)


def test_offloaded_state_lies_with_the_host() -> None:
    told: dict[str, Any] = {"ema_decay": 0.9, "checkpoint_in_background": False}
    here, there = (everything(settings(**told, parallel={"kind": "fsdp", "offload": o})) for o in (False, True))
    assert here.host == 0
    assert there.state == 0
    assert there.host == here.state
    assert here.total - there.total == here.state
    parts = here.state + here.gathered + here.activations + here.head
    assert here.total == parts - here.apart + RESERVE_BYTES
    assert 0 <= here.apart < here.activations + here.head
    averages = everything(settings(**told, ema_offload=True))
    assert (averages.averages, averages.host) == (0, 2 * here.averages)
    saved = here.state - here.gradients - here.projector // 4
    assert everything(settings(ema_decay=0.9)).host == saved  # the copy that is written


@pytest.mark.parametrize(
    ("sharing", "stay"), [(Sharing(), False), (Sharing("fsdp", 2), False), (Sharing("ddp", 2), True)]
)
def test_gradients_make_room_for_validation(sharing: Sharing, stay: bool) -> None:
    """But in ddp's buckets."""
    large = 2**30
    found = everything(settings(), sharing=sharing, looking=large)
    assert found.let_go == (0 if stay else found.gradients)
    assert found.total == found.state - found.let_go + found.gathered + large + found.reserve


def test_the_most_rows_that_fit() -> None:
    @cache
    def memory_of(rows: int) -> Memory:
        return everything(settings(), rows=rows)

    for wanted in (1, 37):
        room = memory_of(wanted).total
        assert largest_rows(memory_of, room, most=64) == wanted
        assert largest_rows(memory_of, room - 1, most=64) == wanted - 1
    assert largest_rows(memory_of, 2**40, most=64) == 64
    assert largest_rows(memory_of, room, most=1) == 1
