"""Strips say what whole tensors say, at every height, and leave the caller's pictures alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arra.tokenizers import strips
from arra.tokenizers.vq import VQModel, VQSettings


def lively(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("height", [1, 2, 7, 8, 13])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
def test_norm_activation_and_convolution(height: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, conv = lively(nn.GroupNorm(4, 16, eps=1e-6)), lively(nn.Conv2d(16, 6, 3, padding=1))
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(conv, nn.Conv2d)
    x = torch.randn(2, 16, height, 5) * 3 + 40  # far from zero: sums of squares would cancel
    with torch.no_grad():
        plain = conv(F.silu(norm(x)))
        monkeypatch.setattr(strips, "STRIP_BYTES", rows * 16 * 5 * 4)
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(strips.norm_silu_conv(laid_out, norm, conv), plain, rtol=1e-4, atol=1e-4)
        target = torch.randn_like(plain)
        expected = target + plain
        assert strips.norm_silu_conv(x, norm, conv, added_to=target) is target
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (8, 8)])
def test_upsampling_and_convolution(size: tuple[int, int]) -> None:
    conv = lively(nn.Conv2d(5, 7, 3, padding=1))
    assert isinstance(conv, nn.Conv2d)
    x = torch.randn(2, 5, *size)
    with torch.no_grad():
        plain = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(strips.upsample_conv(x, conv), plain, rtol=1e-4, atol=1e-5)


def test_a_network_says_the_same_with_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", 4096)
    torch.manual_seed(0)
    settings = VQSettings(channels=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=32, num_codes=64, code_dim=8)
    model = VQModel(settings).eval()
    images, codes = torch.rand(2, 3, 32, 24) * 2 - 1, torch.randint(64, (2, 8, 6))
    kept = images.clone()
    plain = model.latents(images), model.decode(codes)
    with torch.no_grad():
        ours = model.latents(images), model.decode(codes)
    assert torch.equal(images, kept)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    model.decode(codes).sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
