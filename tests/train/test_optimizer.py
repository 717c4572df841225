"""Muon against torch's own, AdamW in 8 bits against AdamW, which tensors which optimiser moves, and how far."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arra.errors import ArraError
from arra.train.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from arra.train.optimizer import Muon, learning_rate, make_optimizers, orthogonalized
from arra.train.settings import TrainSettings

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


def test_rate_warms_up_and_ends_low() -> None:
    s = TrainSettings(steps=100, learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
    rates = [learning_rate(step, s) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    constant = TrainSettings(steps=100, learning_rate=1.0, warmup_steps=10, schedule="constant")
    assert learning_rate(99, constant) == 1.0


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
def test_an_optimiser_goes_on_from_its_saved_state(optimizer: str, tmp_path: Path) -> None:
    settings = TrainSettings(steps=10, learning_rate=1e-3, optimizer=optimizer)
    whole, first, second = larger(), larger(), larger()
    wanted = steps(whole, make_optimizers(whole, settings), range(5))
    before = make_optimizers(first, settings)
    steps(first, before, range(3))
    saved: dict[str, Tensor] = {}
    for each in before:
        saved |= optimizer_tensors(each, {p: n for n, p in first.items()})
    save_checkpoint(tmp_path, step=3, seconds=0.0, tensors=saved, keep=1)
    kept = newest_checkpoint(tmp_path)
    assert kept is not None
    after = make_optimizers(second, settings)
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    for each in after:
        restore_optimizer(each, {p: n for n, p in second.items()}, kept.tensors)
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
