"""The entropy loss in pieces is the one that holds everything at once: value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arra.tokenizers.entropy import code_entropy_loss
from arra.tokenizers.vq import Quantizer


def at_once(z: Tensor, rows: Tensor, temperature: float = 0.01) -> Tensor:
    """The plain formula, every vector times every code in memory."""
    affinity = -(z[:, None] - rows[None]).square().sum(2) / temperature
    p, log_p = affinity.softmax(1), (affinity + 1e-5).log_softmax(1)
    mean_p = p.mean(0)
    return -(p * log_p).sum(1).mean() + (mean_p * (mean_p + 1e-5).log()).sum()


@pytest.mark.parametrize("piece", [1, 7, 16, 50, 1000, None])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_value_and_gradients(piece: int | None, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(50, 4, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    rows = F.normalize(torch.randn(12, 4, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    ours, plain = code_entropy_loss(z, rows, temperature=temperature, piece=piece), at_once(z, rows, temperature)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    of_ours = torch.autograd.grad(3 * ours, (z, rows))
    of_plain = torch.autograd.grad(3 * plain, (z, rows))
    for one, other in zip(of_ours, of_plain, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_memory_is_bounded_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of vectors times codes appears, in either direction."""
    monkeypatch.setattr("arra.tokenizers.entropy.NUMBERS_AT_A_TIME", 4 * 64)
    z, rows = torch.randn(40, 3, requires_grad=True), torch.randn(64, 3, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for each in found if isinstance(found, tuple | list) else [found]:
                largest = max(largest, each.numel() if isinstance(each, Tensor) else 0)
            return found

    with Watch():
        code_entropy_loss(z, rows).backward()
    assert 4 * 64 <= largest < 40 * 64 / 4
    assert z.grad is not None


def test_nearest_codes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(32, 4)
    z = F.normalize(torch.randn(100, 4), dim=1)
    whole = quantizer.nearest(z)
    monkeypatch.setattr("arra.tokenizers.vq.DISTANCES_AT_A_TIME", 32 * 9)
    assert torch.equal(quantizer.nearest(z), whole)
    rows = F.normalize(quantizer.embedding.weight, dim=1)
    assert torch.equal(whole, (z @ rows.T).argmax(1))
