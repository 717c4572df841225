"""Muon against torch's own, AdamW in 8 bits against AdamW, which tensors which optimiser moves, and how far.

And the whole update on two ranks, of shards, against one process.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import arra.train.optimizer
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.models.adapters import LoraSettings, add_lora
from arra.models.chameleon_network import SharedHeadNorm
from arra.train.average import Averages
from arra.train.optimizer import (
    Muon,
    gradient_norm,
    make_optimizers,
    orthogonalized,
    scale_gradients,
)
from arra.train.optimizer_state import optimizer_tensors, restore_optimizer
from arra.train.settings import TrainSettings
from tests.train.forked_ranks import on_ranks

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
SHAPES = [(24, 8), (8, 8), (8, 24), (24, 8)]


def test_muon_follows_torch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, 0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        moved = (q - s).norm()
        assert (p - q).norm() < 0.02 * moved  # torch orthogonalises in bfloat16


@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (8, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    u, s, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    s = 0.5 + torch.rand_like(s)  # away from zero, where five steps do not reach
    result = orthogonalized((u * s[:, None]) @ v)
    values = torch.diagonal(u.mT @ result @ v.mT, dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.allclose(u.mT @ result @ v.mT, torch.diag_embed(values), atol=1e-4)


def test_stack_and_single_matrices_agree() -> None:
    torch.manual_seed(2)
    stack = torch.randn(4, 12, 5)
    alone = torch.cat([orthogonalized(stack[i : i + 1]) for i in range(4)])
    assert torch.allclose(orthogonalized(stack), alone, atol=1e-5)


def parameters() -> dict[str, nn.Parameter]:
    sizes = {
        "model.layers.0.attention.wqkv.weight": (12, 4),
        "model.layers.0.attention_norm.weight": (4,),
        "model.tok_embeddings.weight": (9, 4),
        "model.output.weight": (9, 4),
        "align.projector.first.weight": (4, 4),
        "align.projector.first.bias": (4,),
    }
    return {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}


def test_muon_takes_the_matrices_inside_blocks_alone() -> None:
    named = parameters()
    muon, adamw = make_optimizers(named, TrainSettings(steps=10, optimizer="muon"))
    names = {id(p): name for name, p in named.items()}
    assert [names[id(p)] for g in muon.param_groups for p in g["params"]] == ["model.layers.0.attention.wqkv.weight"]
    assert len([p for g in adamw.param_groups for p in g["params"]]) == len(named) - 1


@pytest.mark.parametrize("blocks", ["layers", "h", "blocks"])
def test_muon_knows_blocks_by_any_of_their_names(blocks: str) -> None:
    named = {f"model.lm.base.{blocks}.1.attn.weight": nn.Parameter(torch.ones(4, 4)), **parameters()}
    del named["model.layers.0.attention.wqkv.weight"]
    muon, _ = make_optimizers(named, TrainSettings(steps=10, optimizer="muon"))
    assert [p for g in muon.param_groups for p in g["params"]] == [next(iter(named.values()))]


def test_muon_with_nothing_to_train_is_refused() -> None:
    """It would be AdamW in silence: of a head's rows alone, or of blocks whose name is not known."""
    named = parameters()
    del named["model.layers.0.attention.wqkv.weight"]
    with pytest.raises(ArraError, match=r"train\.optimizer: muon is for the matrices of blocks, and none"):
        make_optimizers(named, TrainSettings(steps=10, optimizer="muon"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_norms_and_biases_do_not_decay(optimizer: str) -> None:
    named = parameters()
    settings = TrainSettings(steps=10, optimizer=optimizer, weight_decay=0.5, learning_rate=0.1, warmup_steps=0)
    for each in make_optimizers(named, settings):
        for p in named.values():
            p.grad = torch.zeros_like(p)
        each.step()
    for name, p in named.items():
        expected = 1.0 if p.dim() == 1 else 1 - 0.1 * 0.5
        assert torch.allclose(p, torch.full_like(p, expected)), name


class Parts(nn.Module):
    """Every kind of parameter that models here have."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 4)
        self.position_table = nn.Embedding(3, 4)
        self.rep_embedding = nn.Embedding(1, 4)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].norm = nn.LayerNorm(4)
        self.layers[0].q_norm = SharedHeadNorm(rows=2, num_heads=2, head_dim=2)
        self.layers[0].wo = nn.Linear(4, 4)
        self.layers[0].experts = nn.Parameter(torch.ones(2, 4, 5))
        self.lora_A = nn.Parameter(torch.ones(2, 4))
        self.conv = nn.Conv2d(4, 2, 3)
        self.output = nn.Linear(4, 7, bias=False)


MATRICES = {"layers.0.wo.weight", "layers.0.experts", "lora_A", "conv.weight", "output.weight"}
TABLES = {"tok_embeddings.weight", "position_table.weight", "rep_embedding.weight"}


def decayed(module: nn.Module, **changes: Any) -> set[str]:
    """Names of the parameters that an optimiser shrinks when their gradients are 0."""
    named = {f"model.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in named.values():
            p.fill_(1)
            p.grad = torch.zeros_like(p)
    settings = TrainSettings(steps=10, weight_decay=0.5, learning_rate=0.1, **changes)
    for each in make_optimizers(named, settings, modules=[module]):
        each.step()
    shrunk = {name.removeprefix("model.") for name, p in named.items() if torch.allclose(p, torch.tensor(0.95))}
    kept = {name.removeprefix("model.") for name, p in named.items() if torch.equal(p, torch.ones_like(p))}
    assert len(shrunk) + len(kept) == len(named)
    return shrunk


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_decay_and_tables_as_they_are_told(optimizer: str) -> None:
    """Norms and biases never do, though a norm of queries has a row for each head."""
    assert decayed(Parts(), optimizer=optimizer) == MATRICES | TABLES
    assert decayed(Parts(), optimizer=optimizer, decay_embeddings=False) == MATRICES


def test_a_tied_head_is_a_table() -> None:
    tied = Parts()
    tied.output.weight = tied.tok_embeddings.weight
    assert decayed(tied, decay_embeddings=False) == MATRICES - {"output.weight"}


def test_trained_rows_of_a_table_are_of_the_table() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, **shape))
    add_lora(lm, LoraSettings(rank=2), rows=[3, 4], seed=0)
    rows = {name for name, p in lm.named_parameters() if p.requires_grad and "lora" not in name}
    (of_table,) = (name for name in rows if "embed_tokens" in name)
    assert len(rows) == 2
    assert decayed(lm) - decayed(lm, decay_embeddings=False) == {of_table}


def test_muon_leaves_norms_and_tables_in_blocks_to_adamw() -> None:
    module = Parts()
    module.layers[0].bias_table = nn.Embedding(2, 2)
    named = {f"model.{name}": p for name, p in module.named_parameters()}
    muon, _ = make_optimizers(named, TrainSettings(steps=1, optimizer="muon"), modules=[module])
    (group,) = muon.param_groups
    assert [id(p) for p in group["params"]] == [id(named["model.layers.0.wo.weight"])]


def test_muon_alone_needs_no_adamw() -> None:
    named = {"model.layers.0.lora_A": nn.Parameter(torch.ones(2, 4))}
    assert [type(each) for each in make_optimizers(named, TrainSettings(steps=1, optimizer="muon"))] == [Muon]


def test_stacks_of_any_size_make_the_same_update(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, results = TrainSettings(steps=1, optimizer="muon"), []
    for most in (2**28, 2 * 4 * 64 * 64, 1):
        monkeypatch.setattr(arra.train.optimizer, "STACK_BYTES", most)
        named = {f"model.layers.{i}.w": nn.Parameter(torch.full((64, 64), 0.1)) for i in range(5)}
        results.append(torch.stack(steps(named, make_optimizers(named, settings), range(2))))
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=0, atol=1e-6)


def with_gradients(*values: list[float]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for p, value in zip(made, values, strict=True):
        p.grad = torch.tensor(value)
    return [*made, nn.Parameter(torch.zeros(3))]  # and one without a gradient


def test_gradients_are_scaled_down_together_and_never_up() -> None:
    named = with_gradients([3.0, 0.0], [4.0])
    norm = gradient_norm(named)
    assert norm == 5.0
    scale_gradients(named, norm, most=1.0)
    assert gradient_norm(named) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(named[0].grad, torch.tensor([0.6, 0.0]))
    assert gradient_norm([nn.Parameter(torch.ones(2))]) == 0


@pytest.mark.parametrize("most", [5.0, 5.0000005, 7.0, math.inf])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_what_is_not_above_the_limit_keeps_every_bit(most: float, device: str) -> None:
    named = with_gradients([3.0, 1e-30], [4.0])
    for p in named[:2]:
        p.data = p.data.to(device)
        p.grad = None if p.grad is None else p.grad.to(device)
    before = [p.grad.clone() for p in named[:2] if p.grad is not None]
    scale_gradients(named, gradient_norm(named[:2]), most=most)
    assert all(torch.equal(p.grad, b) for p, b in zip(named, before, strict=False) if p.grad is not None)


def larger(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Two matrices that AdamW in 8 bits keeps bytes of, one that is too small, and a norm."""
    generator = torch.Generator().manual_seed(3)
    sizes: dict[str, tuple[int, ...]] = {"model.layers.0.w.weight": (64, 96), "model.layers.1.w.weight": (96, 64)}
    sizes |= {"model.head.weight": (8, 8), "model.norm.weight": (64,)}
    return {n: nn.Parameter(0.02 * torch.randn(size, generator=generator).to(dtype)) for n, size in sizes.items()}


def steps(named: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], numbers: range) -> list[Tensor]:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        for each in optimizers:
            each.step()
    return [p.detach().clone() for p in named.values()]


def test_eight_bits_follow_adamw_in_a_byte_a_moment() -> None:
    exact, coarse = larger(), larger()
    start = [p.detach().clone() for p in exact.values()]
    settings = TrainSettings(steps=10, learning_rate=1e-3)
    wanted = steps(exact, make_optimizers(exact, settings), range(10))
    (adamw,) = make_optimizers(coarse, TrainSettings(steps=10, learning_rate=1e-3, optimizer="adamw8bit"))
    found = steps(coarse, [adamw], range(10))
    for a, b, s in zip(found, wanted, start, strict=True):
        assert (a - b).norm() < 0.05 * (b - s).norm()
    moments = [adamw.state[p]["state1"].dtype for p in coarse.values()]
    assert moments == [torch.uint8, torch.uint8, torch.float32, torch.float32]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_an_optimiser_goes_on_from_its_saved_state(optimizer: str) -> None:
    settings = TrainSettings(steps=10, learning_rate=1e-3, optimizer=optimizer)
    whole, first, second = larger(), larger(), larger()
    wanted = steps(whole, make_optimizers(whole, settings), range(5))
    before = make_optimizers(first, settings)
    steps(first, before, range(3))
    saved: dict[str, Tensor] = {}
    for each in before:
        saved |= {key: v.clone() for key, v in optimizer_tensors(each, {p: n for n, p in first.items()}).items()}
    after = make_optimizers(second, settings)
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    for each in after:
        restore_optimizer(each, {p: n for n, p in second.items()}, tensors=saved)
    for a, b in zip(steps(second, after, range(3, 5)), wanted, strict=True):
        assert torch.equal(a, b)


def test_eight_bits_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(steps=10, optimizer="adamw8bit")
    elsewhere = {name: nn.Parameter(p.to("meta")) for name, p in larger().items()}
    with pytest.raises(ArraError, match="adamw8bit runs on cpu and cuda, not on meta; use adamw"):
        make_optimizers(elsewhere, settings)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ArraError, match=r"adamw8bit: the package 'bitsandbytes' is missing; pip install 'arra\[lean\]'"
    ):
        make_optimizers(larger(), settings)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_papers_step_moves_a_float32_weight(optimizer: str) -> None:
    """A step of 2e-5 is a thousandth of a usual weight: float32 takes it exactly; bfloat16, as released, drops it."""
    settings = TrainSettings(steps=10, learning_rate=2e-5, weight_decay=0.0, optimizer=optimizer)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.full((64, 96), 0.02, dtype=dtype))
        (adamw,) = make_optimizers({"weight": weight}, settings)
        start = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        adamw.step()
        moved[dtype] = (start.double() - weight.detach().double()).abs()
    torch.testing.assert_close(
        moved[torch.float32], torch.full((64, 96), 2e-5, dtype=torch.float64), rtol=1e-2, atol=0.0
    )
    assert not moved[torch.bfloat16].any()


class Toy(nn.Module):
    """Blocks of matrices, norms and biases whose rows do not divide among two ranks, and a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 3)) for _ in range(2)]
        )
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight


def updated(*, sharded: bool, **changes: Any) -> dict[str, Tensor]:
    """Weights, averages and norms after some updates, whole, on every rank."""
    torch.manual_seed(0)
    model, projector = Toy(), nn.Linear(3, 2)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    weights = {f"model.{name}": p for name, p in model.named_parameters()}
    others = {f"align.{name}": p for name, p in projector.named_parameters()}
    settings = TrainSettings(steps=9, learning_rate=0.01, weight_decay=0.5, **changes)
    optimizers = make_optimizers(weights | others, settings, modules=[model, projector])
    averages = Averages(weights, [0.5, 0.9], warmup=False, offload=True)
    found: dict[str, Tensor] = {}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in [*weights.values(), *others.values()]:
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        norm = gradient_norm(list(weights.values()))
        assert not isinstance(norm, DTensor)
        found[f"norm {step}"] = norm
        scale_gradients(list(weights.values()), norm, most=1.0)
        found[f"projector's norm {step}"] = norm = gradient_norm(list(others.values()))
        scale_gradients(list(others.values()), norm, most=1.0)
        for optimizer in optimizers:
            optimizer.step()
        averages.update(step + 1)
    with averages.in_place_of(weights, which=1):
        found |= {f"in place {name}": whole(p) for name, p in weights.items()}
    states = {p: n for n, p in (weights | others).items()}
    kept = [optimizer_tensors(optimizer, states) for optimizer in optimizers]
    everything: list[Mapping[str, Tensor]] = [weights, others, averages.tensors(), *kept]
    return found | {name: whole(value) for each in everything for name, value in each.items()}


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def test_an_update_of_shards_is_the_update_of_the_whole(tmp_path: Path) -> None:
    """Groups, clipping, fused AdamW, Muon and averages on two ranks, one of which has nothing of some tensors."""
    choices: list[dict[str, Any]] = [{"decay_embeddings": False}, {"optimizer": "muon"}]

    def work(ranks: Ranks) -> None:
        for changes in choices:
            found, wanted = updated(sharded=True, **changes), updated(sharded=False, **changes)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
        shards = {"w": nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,))))}
        with pytest.raises(ArraError, match=r"^train\.optimizer: adamw8bit does not train sharded weights; use adamw"):
            make_optimizers(shards, TrainSettings(steps=1, optimizer="adamw8bit"))

    assert on_ranks(2, tmp_path / "store", work) == [0, 0]
