"""Liger's kernel gives what the slices give, and is asked only for what it can do.

No GPU is needed: Triton's interpreter runs the real kernels on the CPU, in a process of its own, since it must be
chosen before Triton is imported. What it cannot show is that they compile, and how fast they are.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arra import doctor
from arra.models import liger
from arra.models.head import CalledHead, Head, head_loss

N, D, V = 12, 16, 50
INTERPRETED = """
import itertools, json, sys

sys.modules["peft"] = None  # Liger looks whether it is there, which takes seconds
import torch
from arra.models import liger
from arra.models.head import Head, head_loss

def values(on_liger, bias, scale, z_weight, trained, narrow):
    liger.DEVICES = ("cpu",) if on_liger else ()
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for shape in ((12, 16), (50, 16), (50,))]
    needed = [parts[0]] + ([parts[1]] if trained else []) + ([parts[2]] if bias else [])
    for part in needed:
        part.requires_grad_()
    labels = torch.randint(50, (12,), generator=generator)
    head = Head(parts[1], parts[2] if bias else None, scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        found = head_loss(parts[0], head, labels, shares=0.25, z_weight=z_weight)
    (3 * found[0]).backward()
    assert [each.requires_grad for each in found] == [True, False, False]
    return [*found, *(part.grad for part in needed)]

worst = {"float32": 0.0, "bfloat16": 0.0}
kernels = []
kernel = liger._kernel
liger._kernel = lambda: kernels.append(1) or kernel()
cases = [*itertools.product((False, True), (1.0, 0.5), (0.0, 0.01), (True,), (False,))]
cases += [(False, 1.0, 0.01, False, False), (True, 1.0, 0.01, True, True)]
for case in cases:
    for ours, theirs in zip(values(False, *case), values(True, *case), strict=True):
        name = "bfloat16" if case[-1] else "float32"
        assert ours.dtype == theirs.dtype == torch.float32
        worst[name] = max(worst[name], ((ours - theirs).abs() / (1 + ours.abs())).max().item())
print(json.dumps([worst, len(kernels), len(cases)]))
"""
HAS_LIGER = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


@pytest.mark.skipif(not HAS_LIGER, reason="needs the packages liger-kernel (extra 'fast') and triton")
def test_the_real_kernel_gives_what_the_slices_give() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    worst, kernels, cases = json.loads(done.stdout.splitlines()[-1])
    assert kernels == cases  # not by the slices both times
    assert worst["float32"] < 1e-5
    assert worst["bfloat16"] < 3e-2  # logits and gradients are rounded to it


class Kernel:
    """The kernel as its documentation says, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Any:
        self.asked.append({"type": hidden.dtype, **options})
        logits = hidden @ weight.T if options["bias"] is None else hidden @ weight.T + options["bias"]
        z_loss = (options["lse_square_scale"] * logits.logsumexp(1).square()).sum()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return SimpleNamespace(loss=(loss + z_loss).float(), z_loss=z_loss)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel()
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    monkeypatch.setattr(liger, "is_usable", lambda: True)
    monkeypatch.setattr(liger, "_kernel", lambda: found)
    return found


def parts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def test_it_is_asked_once_for_sums_in_float32(kernel: Kernel) -> None:
    hidden, weight, labels = parts()
    with torch.autocast("cpu", torch.bfloat16):
        head_loss(hidden, Head(weight), labels, shares=1 / N, z_weight=0.01)[0].backward()
    (asked,) = kernel.asked
    assert asked["type"] == torch.bfloat16
    assert asked["accum_dtype"] == torch.float32
    assert asked["reduction"] == "sum"
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_z_is_told_where_it_has_no_weight(kernel: Kernel) -> None:
    hidden, weight, labels = parts()
    total, ntp, z = head_loss(hidden, Head(weight), labels, shares=1 / N)
    assert len(kernel.asked) == 1
    assert total.item() == ntp.item()
    assert z.item() == pytest.approx((hidden @ weight.T).logsumexp(1).square().mean().item())


@pytest.mark.parametrize(
    "case", ["shares", "softcap", "float16", "float64", "frozen states", "no gradients", "called", "nothing", "device"]
)
def test_the_slices_do_what_it_cannot(case: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    types = {"float16": torch.float16, "float64": torch.float64}
    hidden, weight, labels = parts(types.get(case, torch.float32))
    head: Head | CalledHead = Head(weight, softcap=3.0 if case == "softcap" else None)
    if case == "called":
        layer = nn.Linear(D, V, bias=False)
        head = CalledHead(layer)
    if case == "frozen states":
        hidden = hidden.detach()
    if case == "nothing":
        hidden, labels = hidden[:0], labels[:0]
    if case == "device":
        monkeypatch.setattr(liger, "DEVICES", ("cuda",))
    shares = torch.full((N,), 1 / N) if case == "shares" else 1 / N
    with torch.set_grad_enabled(case != "no gradients"):
        total, _, _ = head_loss(hidden, head, labels, shares=shares)
    assert not kernel.asked
    assert total.item() >= 0


@pytest.mark.parametrize(("version", "usable"), [("0.8.5", True), ("1.0.0", True), ("0.7.9", False), (None, False)])
def test_an_old_package_is_none(version: str | None, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", told)
    assert liger.is_usable.__wrapped__() == usable


@pytest.mark.parametrize("usable", [True, False])
def test_the_doctor_says_which_it_is(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "is_usable", lambda: usable)
    found = doctor.loss_finding()
    assert ("Liger" in found.what) == usable
    assert ("pip install 'arra[fast]'" in found.advice) == (not usable)
