"""The head and its loss in slices say what the plain formulas say, for every kind of head and every type."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from arra.models import head as heads
from arra.models.head import CalledHead, Head, head_loss, head_losses, head_of

N, D, V = 10, 8, 40
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.0625},
    "capped": {"softcap": 3.0},
    "both": {"scale": 1.5, "softcap": 2.0},
}


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_loss(logits: Tensor, labels: Tensor, shares: Tensor, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    ntp = (shares * F.cross_entropy(logits, labels, reduction="none")).sum()
    z = (shares * logits.logsumexp(1).square()).sum()
    return ntp + z_weight * z, ntp, z


def inputs(dtype: torch.dtype = torch.float32, bias: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(N, D), (V, D), *([(V,)] if bias else [])]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator)


def same(ours: list[Tensor | None], plain: list[Tensor | None], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("z_weight", [0.0, 0.01])
@pytest.mark.parametrize("bytes_at_a_time", [1, 4 * V * 3, 2**25])
def test_loss_and_gradients(
    kind: str, bias: bool, z_weight: float, bytes_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "HEAD_BYTES", bytes_at_a_time)
    labels, shares = targets()
    ours, plain = inputs(bias=bias), inputs(bias=bias)
    found = head_loss(
        ours[0], Head(ours[1], ours[2] if bias else None, **KINDS[kind]), labels, shares=shares, z_weight=z_weight
    )
    logits = plain_logits(
        plain[0], plain[1], plain[2] if bias else None, **{"scale": 1.0, "softcap": None, **KINDS[kind]}
    )
    wanted = plain_loss(logits, labels, shares, z_weight)
    assert [x.requires_grad for x in found] == [True, False, False]
    (3 * found[0]).backward()
    (3 * wanted[0]).backward()
    same([*found, *(x.grad for x in ours)], [*wanted, *(x.grad for x in plain)])


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_finite_differences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_BYTES", 4 * V * 3)
    labels, shares = targets()

    def loss(parts: list[Tensor]) -> Tensor:
        return head_loss(parts[0], Head(parts[1], parts[2], **KINDS[kind]), labels, shares=shares, z_weight=0.01)[0]

    parts = inputs(torch.float64, bias=True)
    ways = [torch.randn_like(x) for x in parts]
    steps = [loss([x.detach() + step * way for x, way in zip(parts, ways, strict=True)]) for step in (1e-5, -1e-5)]
    loss(parts).backward()
    slope = torch.stack([(x.grad * way).sum() for x, way in zip(parts, ways, strict=True) if x.grad is not None]).sum()
    assert slope.item() == pytest.approx((steps[0] - steps[1]).item() / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_needs_a_gradient_gets_one(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    labels, shares = targets()
    parts, whole = inputs(bias=True), inputs(bias=True)
    for part, needed in zip(parts, needs, strict=True):
        part.requires_grad_(needed)
    made: list[Tensor] = []
    zeros_like = torch.zeros_like

    def count(x: Tensor, **options: Any) -> Tensor:
        made.append(x)
        return zeros_like(x, **options)

    monkeypatch.setattr(torch, "zeros_like", count)
    head_loss(parts[0], Head(parts[1], parts[2]), labels, shares=shares)[0].backward()
    assert [any(x is part for x in made) for part in parts] == list(needs)
    head_loss(whole[0], Head(whole[1], whole[2]), labels, shares=shares)[0].backward()
    same([x.grad for x in parts], [x.grad if needed else None for x, needed in zip(whole, needs, strict=True)])


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, shares = targets()
    hidden, weight = inputs()
    wanted = head_loss(hidden, Head(weight), labels, shares=shares, z_weight=0.1)
    monkeypatch.setattr(heads._HeadLoss, "forward", None)
    with torch.no_grad():
        found = head_loss(hidden, Head(weight), labels, shares=shares, z_weight=0.1)
    same(list(found), [x.detach() for x in wanted])
    assert not found[0].requires_grad
    ntp, z = head_losses(hidden, Head(weight), labels)
    same([(shares * ntp).sum(), (shares * z).sum()], [x.detach() for x in wanted[1:]])


def test_gradients_are_made_once() -> None:
    hidden, weight = inputs()
    labels, shares = targets()
    total, _, _ = head_loss(hidden, Head(weight), labels, shares=shares)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        total.backward()


def test_nothing_labelled_is_no_loss() -> None:
    _, weight = inputs()
    hidden, none = torch.zeros(0, D, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    total, _, _ = head_loss(hidden, Head(weight), none, shares=torch.zeros(0))
    total.backward()
    assert total.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()
    assert head_losses(hidden, Head(weight), none)[0].shape == (0,)


def test_one_share_is_that_of_every_position() -> None:
    labels, _ = targets()
    found, wanted = inputs(bias=True), inputs(bias=True)
    one = head_loss(found[0], Head(found[1], found[2]), labels, shares=0.3, z_weight=0.01)
    all_of_them = head_loss(wanted[0], Head(wanted[1], wanted[2]), labels, shares=torch.full((N,), 0.3), z_weight=0.01)
    one[0].backward()
    all_of_them[0].backward()
    same([*one, *(x.grad for x in found)], [*all_of_them, *(x.grad for x in wanted)], rtol=0, atol=0)
    layer = nn.Linear(D, V)
    called = [head_loss(found[0], CalledHead(layer), labels, shares=share)[0] for share in (0.3, torch.full((N,), 0.3))]
    assert torch.equal(*called)


class Conversions(TorchDispatchMode):
    """Counts conversions of whole head weights."""

    count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += call is torch.ops.aten._to_copy.default and args[0].shape == (V, D)
        return call(*args, **(kwargs or {}))


def test_weights_are_rounded_once_and_not_for_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_BYTES", 1)
    monkeypatch.setattr(heads, "BLOCK_BYTES", 4 * D)  # so that what a CPU widens again is told apart
    hidden, weight = inputs()
    labels, _ = targets()
    with torch.autocast("cpu", torch.bfloat16):
        for measure in (
            lambda: head_loss(hidden, Head(weight), labels, shares=0.1),
            lambda: head_losses(hidden, Head(weight), labels),
        ):
            with Conversions() as seen:
                measure()
            assert seen.count == 1


NARROW = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("types", [*NARROW, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("block", [1, 5 * 4 * D, 2**25])
def test_narrow_states_and_weights(
    types: tuple[torch.dtype, torch.dtype], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands are as narrow as they are; logits, loss and sums of gradients are float32, converted at the end."""
    monkeypatch.setattr(heads, "BLOCK_BYTES", block)
    monkeypatch.setattr(heads, "HEAD_BYTES", 4 * V * 3)
    labels, shares = targets()
    ours = [x.detach().to(kind).requires_grad_() for x, kind in zip(inputs(), types, strict=True)]
    wide = [x.detach().float().requires_grad_() for x in ours]
    found = head_loss(ours[0], Head(ours[1], **KINDS["both"]), labels, shares=shares, z_weight=0.01)
    wanted = plain_loss(plain_logits(wide[0], wide[1], None, **KINDS["both"]), labels, shares, 0.01)
    same([*found], [*wanted], rtol=1e-5, atol=1e-6)  # far below what bfloat16 logits would give
    found[0].backward()
    wanted[0].backward()
    for a, b in zip(ours, wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == a.dtype
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-2, atol=3e-3)
    logits = Head(ours[1], **KINDS["both"])(ours[0])
    with torch.no_grad():
        torch.testing.assert_close(Head(ours[1], **KINDS["both"])(ours[0]), logits)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain_logits(wide[0], wide[1], None, **KINDS["both"]), rtol=1e-5, atol=1e-6)


def test_small_shares_survive_float16() -> None:
    """The loss's own scale (a gradient scaler's) comes after the gradients are made, so they must not vanish before."""
    labels, _ = targets()
    hidden, weight = (x.detach().half().requires_grad_() for x in inputs())
    total, _, _ = head_loss(hidden, Head(weight), labels, shares=torch.full((N,), 1e-7))
    (total * 2.0**16).backward()
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    (plain_loss(wide[0] @ wide[1].T, labels, torch.full((N,), 1e-7), 0.0)[0] * 2.0**16).backward()
    for a, b in zip((hidden, weight), wide, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2e-3, atol=1e-6)


def test_autocast_narrows_the_products_and_nothing_else() -> None:
    labels, shares = targets()
    hidden, weight = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        total, ntp, z = head_loss(hidden, Head(weight), labels, shares=shares, z_weight=0.01)
        logits = Head(weight)(hidden)
    rounded = hidden.detach().bfloat16().float() @ weight.detach().bfloat16().float().T
    same([total, ntp, z], list(plain_loss(rounded, labels, shares, 0.01)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, rounded)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = inputs()
    plain_loss(exact[0] @ exact[1].T, labels, shares, 0.01)[0].backward()
    same([hidden.grad, weight.grad], [x.grad for x in exact], rtol=5e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_a_cpu_gives() -> None:
    labels, shares = targets()
    for dtype in (torch.float32, torch.bfloat16):
        here, there = inputs(dtype), [x.detach().cuda().requires_grad_() for x in inputs(dtype)]
        found = head_loss(there[0], Head(there[1]), labels.cuda(), shares=shares.cuda(), z_weight=0.01)
        wanted = head_loss(here[0], Head(here[1]), labels, shares=shares, z_weight=0.01)
        found[0].backward()
        wanted[0].backward()
        pairs = [*zip(found, wanted, strict=True), *((a.grad, b.grad) for a, b in zip(there, here, strict=True))]
        for a, b in pairs:
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a.cpu().float(), b.float(), rtol=1e-2, atol=1e-3)


def logits_of(change: Callable[[nn.Linear], object]) -> tuple[Head | CalledHead, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(D, V)
    change(layer)
    return head_of(layer, scale=0.5, softcap=4.0), layer


def test_a_plain_layer_is_its_weights() -> None:
    head, layer = logits_of(lambda layer: None)
    assert isinstance(head, Head)
    assert head.weight is layer.weight
    hidden = torch.randn(2, 3, D)
    torch.testing.assert_close(head(hidden), plain_logits(hidden, layer.weight, layer.bias, 0.5, 4.0))
    ids = torch.tensor([7, 3, 3])
    torch.testing.assert_close(head.rows(ids)(hidden), head(hidden)[..., ids])


def test_a_layer_that_is_heard_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CALLED_ROWS", 4)
    doubled: list[int] = []

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        doubled.append(len(output))
        return 2 * output

    head, layer = logits_of(lambda layer: layer.register_forward_hook(double))
    assert isinstance(head, CalledHead)
    labels, shares = targets()
    hidden = inputs()[0]
    found = head_loss(hidden, head, labels, shares=shares, z_weight=0.01)
    assert doubled == [4, 4, 2]
    found[0].backward()
    ours = [hidden.grad, *(p.grad for p in layer.parameters())]
    hidden.grad = layer.weight.grad = layer.bias.grad = None
    logits = plain_logits(hidden, 2 * layer.weight, 2 * layer.bias, 0.5, 4.0)
    wanted = plain_loss(logits, labels, shares, 0.01)
    wanted[0].backward()
    same([*found, *ours], [*wanted, hidden.grad, *(p.grad for p in layer.parameters())])
    ids = torch.tensor([7, 3, 12])
    torch.testing.assert_close(head.rows(ids)(hidden), logits[:, ids])
    torch.testing.assert_close(head.rows(ids).rows(ids[:2] - 6 + 5 * torch.arange(2))(hidden), logits[:, ids[[1, 2]]])


def test_rows_are_the_same_bits_whatever_stands_beside_them() -> None:
    hidden, weight = torch.randn(33, 64), torch.randn(96, 64)
    with torch.no_grad():
        whole = Head(weight)(hidden)
        for count in (1, 2, 5, 16):
            assert torch.equal(Head(weight)(hidden[:count]), whole[:count])
