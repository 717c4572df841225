"""What the passes of a step are said to keep is what autograd keeps, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.models import Painter
from arra.models.dropout import RowDropout
from arra.train.activations import traced_passes
from tests.train.meta_models import decoder, painter, settings, tokens


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
PRECISIONS = ("float32", "autocast", "narrow")


@pytest.mark.parametrize(
    ("kind", "which", "precision"),
    [
        *(("decoder", "class", precision) for precision in PRECISIONS),
        ("decoder", "text", "float32"),
        ("decoder", "caption", "narrow"),
        *(("painter", "llama", precision) for precision in PRECISIONS),
        ("painter", "smollm", "float32"),
        ("painter", "gpt2", "autocast"),
        ("painter", "gemma2", "narrow"),
    ],
)
def test_what_autograd_keeps(kind: str, which: str, precision: str) -> None:
    """Counted without a number, it is what a real pass keeps: within 5 %."""
    full: Painter
    empty: Painter
    if kind == "decoder":
        prefix = 1 if which == "class" else 6
        told: dict[str, Any] = {"condition": which, "prefix_length": prefix, "num_heads": 4, "hidden_size": 96}
        told |= {"text_vocab_size": 30} if which == "text" else {"caption_dim": 24}
        empty, full = decoder(num_layers=5, **told), decoder(empty=False, num_layers=5, **told)
        inputs: dict[str, Tensor] = tokens(3, prefix + 15, device="cpu")
        if which != "class":
            inputs["prefix_mask"] = torch.ones(3, prefix, dtype=torch.bool)
        if which == "caption":
            inputs |= {"caption": torch.ones(3, prefix, 24), "null_caption": torch.zeros(3, dtype=torch.bool)}
    else:
        shape = {"num_hidden_layers": 5, **({"n_embd": 96, "n_layer": 5} if which == "gpt2" else WIDE)}
        empty, full = painter(which, **shape), painter(which, empty=False, **shape)
        inputs = tokens(3, 20, device="cpu")
    s = settings(precision="float32" if precision == "float32" else "bfloat16")
    metas = {name: value.to("meta") for name, value in inputs.items()}
    found = traced_passes(empty, s, inputs=metas, sharded=precision == "narrow").memory
    if precision == "narrow":
        full = full.to(torch.bfloat16)
        inputs = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in inputs.items()}
    assert found.kept == pytest.approx(kept_bytes(full, inputs, autocast=precision == "autocast"), rel=0.05)
    assert found.backward > found.kept


DROPPING: dict[str, Any] = {"num_heads": 4, "hidden_size": 48, "ffn_hidden_size": 128, "resid_dropout": 0.1,
                            "ffn_dropout": 0.1}  # fmt: skip


def test_a_lean_block_keeps_twelve_widths() -> None:
    """In float32: two streams, queries, keys, values, what attention gave, two gates, a byte for each dropped number.

    By hand for 4 rows of 16 positions, width 48, inner width 128, 4 heads, one block more.
    """
    three, four = (
        traced_passes(
            decoder(num_layers=count, **DROPPING), settings(), inputs=tokens(4, 16), sharded=False
        ).memory.kept
        for count in (3, 4)
    )
    numbers = 48 + 3 * 48 + 48 + 48 + 2 * 128 + 1 + 1 + 4  # and two norms' scales and attention's sum of each head
    assert four - three == pytest.approx(4 * 16 * (4 * numbers + 2 * 48), rel=0.01)
    assert numbers == pytest.approx(11.4 * 48, rel=0.02)


def test_a_narrow_block_keeps_what_the_plain_formulas_do() -> None:
    """In bfloat16: each norm's float32 input and two narrow forms, heads, attention, four inner widths."""
    s = settings(precision="bfloat16")
    three, four = (
        traced_passes(decoder(num_layers=count, **DROPPING), s, inputs=tokens(4, 16), sharded=True).memory.kept
        for count in (3, 4)
    )
    norm = 4 * 48 + 2 * 48 + 2 * 48 + 4
    by_hand = 2 * norm + 2 * 3 * 48 + 2 * 48 + 4 * 4 + 4 * 2 * 128 + 2 * 48
    assert four - three == pytest.approx(4 * 16 * by_hand, rel=0.15)


@pytest.mark.parametrize(("recompute", "sharded"), [("none", False), ("selective", True), ("full", False)])
def test_deeper_models_take_as_much_for_every_block(recompute: str, sharded: bool, monkeypatch: Any) -> None:
    """Gemma's blocks are of two kinds, in turn."""
    s = settings(precision="bfloat16", recompute=recompute)
    model = painter("gemma2", num_hidden_layers=6)
    found = traced_passes(model, s, inputs=tokens(2, 24), sharded=sharded)
    monkeypatch.setattr("arra.train.activations.TRACED_BLOCKS", (2, 6))
    whole = traced_passes(model, s, inputs=tokens(2, 24), sharded=sharded)
    assert whole.flops == found.flops
    assert found.memory.opening == pytest.approx(whole.memory.opening, rel=0.02)  # gradients come in another order
    assert replace(whole.memory, opening=0) == replace(found.memory, opening=0)


def test_recomputation_keeps_less_and_full_the_least(monkeypatch: Any) -> None:
    monkeypatch.setattr("arra.train.activations.TRACED_BLOCKS", (1, 2))
    model, full = painter(num_hidden_layers=8, **WIDE), settings(precision="bfloat16", recompute="full")
    found = {
        how: traced_passes(model, full.model_copy(update={"recompute": how}), inputs=tokens(4, 64), sharded=True).memory
        for how in ("none", "selective", "full")
    }
    assert found["full"].kept < 0.2 * found["selective"].kept < found["none"].kept * 0.2
    assert found["full"].peak < found["selective"].peak < found["none"].peak
    deeper = traced_passes(painter(num_hidden_layers=10, **WIDE), full, inputs=tokens(4, 64), sharded=True).memory
    assert deeper.kept - found["full"].kept == 2 * 2 * 4 * 64 * 96  # what enters each of two blocks more


def test_no_tensor_without_numbers_stays() -> None:
    """So a model of which passes were made can be copied."""
    model = painter("gpt2", n_layer=1, resid_pdrop=0.1)
    traced_passes(model, settings(), inputs=tokens(2, 16), sharded=False)
    sites = [module for module in model.modules() if isinstance(module, RowDropout)]
    assert sites
    assert all(site.seeds is None for site in sites)


def test_a_model_stays_as_it_was() -> None:
    model = decoder(num_layers=6).eval()
    before = [dict(block.__dict__) for block in model.blocks]
    traced_passes(model, settings(recompute="full"), inputs=tokens(2, 16), sharded=False)
    assert [dict(block.__dict__) for block in model.blocks] == before
    assert len(model.layers) == 6
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())
