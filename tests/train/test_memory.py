"""What a training is said to take is what it takes: shards, moments, and what autograd keeps, tensor by tensor."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.data.layout import ImageLayout
from arra.models import CausalLM, Decoder, Painter
from arra.models.adapters import LoraSettings, add_lora, quantize
from arra.models.decoder import DecoderSettings
from arra.models.head import HEAD_BYTES
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
    passes,
    projector_activations,
    projectors_of,
    state_memory,
    training_memory,
)
from arra.train.optimizer import make_optimizers
from arra.train.settings import AlignSettings, TrainSettings
from tests.models.toy_lms import toy_lm

ODD: dict[str, Any] = {"num_layers": 3, "num_heads": 3, "hidden_size": 36, "ffn_hidden_size": 75, "num_codes": 17,
                       "grid": (4, 4), "num_classes": 4}  # fmt: skip
"""Sides that two ranks do not divide."""


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 10, **changes})


def decoder(*, empty: bool = True, **changes: Any) -> Decoder:
    with torch.device("meta" if empty else "cpu"):
        return Decoder(DecoderSettings(**{**ODD, **changes})).train()


def painter(family: str = "llama", *, empty: bool = True, **changes: Any) -> CausalLM:
    written = ImageLayout(family="generic", begin_image=40, end_image=41, first_code=42, num_codes=16)
    with torch.device("meta" if empty else "cpu"):
        model = CausalLM(toy_lm(family, rows=58, **changes), layout=written, grid=(4, 4))
    model.lm.requires_grad_(True)
    return model.train()


def tokens(rows: int, length: int, *, device: str = "meta") -> dict[str, Tensor]:
    return {"tokens": torch.zeros(rows, length, dtype=torch.int64, device=device)}


def test_shards_are_those_of_fsdp(tmp_path: Path) -> None:
    """Weights, gradients and moments of the first of two ranks, byte for byte."""
    script = Path(__file__).parent / "two_ranks.py"
    commands = [[sys.executable, str(script), str(rank), str(tmp_path), json.dumps(ODD)] for rank in range(2)]
    ranks = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for command in commands]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    model = decoder()
    state = state_memory(parts_of(model, settings()), settings(), sharing=Sharing("fsdp", 2))
    assert [state.weights, state.gradients, state.optimizer] == json.loads((tmp_path / "held.json").read_text())
    assert state.weights > 4 * sum(parameter.numel() for parameter in model.parameters()) // 2


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


def kept_bytes(model: Painter, inputs: Mapping[str, Tensor], *, autocast: bool = False) -> int:
    """Bytes that autograd really keeps of a forward pass, each storage once; no weights and no inputs."""
    given = (*model.parameters(), *model.buffers(), *inputs.values())
    known = {value.untyped_storage().data_ptr() for value in given}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in known:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(**inputs).last_hidden
    kept.setdefault(hidden.untyped_storage().data_ptr(), hidden)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


WIDE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256}


def cases() -> Iterator[Any]:
    for condition in ("class", "text", "caption"):
        yield pytest.param("decoder", condition, id=f"decoder-{condition}")
    for family in ("llama", "smollm", "gpt2", "gemma2"):
        yield pytest.param("painter", family, id=family)


@pytest.mark.parametrize("precision", ["float32", "autocast", "narrow"])
@pytest.mark.parametrize(("kind", "which"), list(cases()))
def test_what_autograd_keeps(kind: str, which: str, precision: str) -> None:
    """Counted without a number, it is what a real pass keeps: within 5 %."""
    full: Painter
    empty: Painter
    if kind == "decoder":
        prefix = 1 if which == "class" else 6
        told: dict[str, Any] = {"condition": which, "prefix_length": prefix, "num_heads": 4, "hidden_size": 96}
        told |= {"text_vocab_size": 30} if which == "text" else {"caption_dim": 24}
        empty, full = decoder(num_layers=6, **told), decoder(empty=False, num_layers=6, **told)
        inputs: dict[str, Tensor] = tokens(3, prefix + 15, device="cpu")
        if which != "class":
            inputs["prefix_mask"] = torch.ones(3, prefix, dtype=torch.bool)
        if which == "caption":
            inputs |= {"caption": torch.ones(3, prefix, 24), "null_caption": torch.zeros(3, dtype=torch.bool)}
    else:
        shape = {"num_hidden_layers": 6, **({"n_embd": 96, "n_layer": 6} if which == "gpt2" else WIDE)}
        empty, full = painter(which, **shape), painter(which, empty=False, **shape)
        inputs = tokens(3, 20, device="cpu")
    s = settings(precision="float32" if precision == "float32" else "bfloat16")
    metas = {name: value.to("meta") for name, value in inputs.items()}
    found = passes(empty, s, metas, sharded=precision == "narrow")
    if precision == "narrow":
        full = full.to(torch.bfloat16)
        inputs = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in inputs.items()}
    assert found.kept == pytest.approx(kept_bytes(full, inputs, autocast=precision == "autocast"), rel=0.05)
    assert found.backward > found.kept


def test_a_lean_block_keeps_twelve_widths() -> None:
    """In float32: two streams, queries, keys, values, what attention gave, two gates, a byte for each dropped number.

    By hand for 4 rows of 16 positions, width 48, inner width 128, 4 heads, one block more.
    """
    told: dict[str, Any] = {
        "num_heads": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 128,
        "resid_dropout": 0.1,
        "ffn_dropout": 0.1,
    }
    three, four = (
        passes(decoder(num_layers=count, **told), settings(), tokens(4, 16), sharded=False).kept for count in (3, 4)
    )
    numbers = 48 + 3 * 48 + 48 + 48 + 2 * 128 + 1 + 1 + 4  # and two norms' scales and attention's sum of each head
    assert four - three == pytest.approx(4 * 16 * (4 * numbers + 2 * 48), rel=0.01)
    assert numbers == pytest.approx(11.4 * 48, rel=0.02)


def test_a_narrow_block_keeps_what_the_plain_formulas_do() -> None:
    """In bfloat16: each norm's float32 input and two narrow forms, heads, attention, four inner widths."""
    told: dict[str, Any] = {
        "num_heads": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 128,
        "resid_dropout": 0.1,
        "ffn_dropout": 0.1,
    }
    s = settings(precision="bfloat16")
    three, four = (passes(decoder(num_layers=count, **told), s, tokens(4, 16), sharded=True).kept for count in (3, 4))
    norm = 4 * 48 + 2 * 48 + 2 * 48 + 4
    by_hand = 2 * norm + 2 * 3 * 48 + 2 * 48 + 4 * 4 + 4 * 2 * 128 + 2 * 48
    assert four - three == pytest.approx(4 * 16 * by_hand, rel=0.15)


@pytest.mark.parametrize(("recompute", "sharded"), [("none", False), ("selective", True), ("full", False)])
def test_deeper_models_take_as_much_for_every_block(recompute: str, sharded: bool, monkeypatch: Any) -> None:
    """Gemma's blocks are of two kinds, in turn."""
    s = settings(precision="bfloat16", recompute=recompute)
    model = painter("gemma2", num_hidden_layers=8)
    found = passes(model, s, tokens(2, 24), sharded=sharded)
    monkeypatch.setattr("arra.train.memory.TRACED_BLOCKS", (2, 8))
    assert passes(model, s, tokens(2, 24), sharded=sharded) == found


def test_recomputation_keeps_less_and_full_the_least() -> None:
    model, full = painter(num_hidden_layers=8, **WIDE), settings(precision="bfloat16", recompute="full")
    found = {
        how: passes(model, full.model_copy(update={"recompute": how}), tokens(4, 64), sharded=True)
        for how in ("none", "selective", "full")
    }
    assert found["full"].kept < 0.2 * found["selective"].kept < found["none"].kept * 0.2
    assert found["full"].peak < found["selective"].peak < found["none"].peak
    deeper = passes(painter(num_hidden_layers=10, **WIDE), full, tokens(4, 64), sharded=True)
    assert deeper.kept - found["full"].kept == 2 * 2 * 4 * 64 * 96  # what enters each of two blocks more


def test_a_model_stays_as_it_was() -> None:
    model = decoder(num_layers=6).eval()
    before = [dict(block.__dict__) for block in model.blocks]
    passes(model, settings(recompute="full"), tokens(2, 16), sharded=False)
    assert [dict(block.__dict__) for block in model.blocks] == before
    assert len(model.layers) == 6
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())


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
    assert head_bytes(model, settings(), positions=1000) == 1000 * 36 * 8 + 3 * HEAD_BYTES + weight
    model.output.weight.requires_grad_(False)
    assert head_bytes(model, settings(), positions=8) == 8 * 36 * 8 + 3 * 4 * 8 * 2**16
    rows = painter(empty=False)
    add_lora(rows.lm, LoraSettings(rank=2), rows=[42, 43], seed=0)
    assert head_bytes(rows, settings(), positions=2) == 2 * 32 * 8 + 3 * 4 * 2 * 58 + 2 * 4 * 58 * 32


def test_projectors() -> None:
    align = AlignSettings(components=5, inner_size=7, more={"other": {"encoder": "second", "projector": "linear"}})
    first, second = projectors_of(align, {"teacher": 9, "second": 11}, hidden_size=36)
    count = 36 * 7 + 7 + 7 * 5 + 5 + 36 * 11 + 11
    parts = parts_of(decoder(), settings())
    found = state_memory(parts, settings(), sharing=Sharing("fsdp", 2), projectors=(first, second))
    assert found.projector == 16 * count
    assert projector_activations((first, second), 36, positions=10) == 4 * 10 * (2 * 36 + 2 * 7 + 3 * 5 + 3 * 11)


def everything(s: TrainSettings, *, rows: int = 2, sharing: Sharing | None = None) -> Memory:
    asked = Sequences(lambda count: tokens(count, 16), labelled=16, aligned=16)
    return training_memory(decoder(), s, sharing=sharing or Sharing("fsdp", 2), sequences=asked, rows=rows)


def test_offloaded_state_lies_with_the_host() -> None:
    told: dict[str, Any] = {"ema_decay": 0.9, "checkpoint_in_background": False}
    here, there = (everything(settings(**told, parallel={"kind": "fsdp", "offload": o})) for o in (False, True))
    assert here.host == 0
    assert there.state == 0
    assert there.host == here.state
    assert here.total - there.total == here.state
    assert here.total == here.state + here.gathered + here.activations + here.head + RESERVE_BYTES
    averages = everything(settings(**told, ema_offload=True))
    assert (averages.averages, averages.host) == (0, 2 * here.averages)
    assert everything(settings(ema_decay=0.9)).host == here.state  # the copy that is written


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
