"""Muon against torch's own, and which tensors which optimiser moves."""

from itertools import pairwise

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
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
