"""The patch discriminator: its shape, its losses in closed form, and the adaptive weight on a toy."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arra.errors import ArraError
from arra.train.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    least_image_size,
)

REAL, FAKE = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1), torch.tensor([-3.0, 0.25]).view(2, 1, 1, 1)


def test_the_published_shape() -> None:
    """LlamaGen's discriminator: n_layers 3, ndf 64; each logit sees 70 x 70 pixels."""
    network = PatchDiscriminator()
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert [m.stride[0] for m in network.modules() if isinstance(m, nn.Conv2d)] == [2, 2, 2, 1, 1]
    assert [m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d)] == [True, *3 * [False], True]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 3
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = network.eval()(images)  # batch norm's own statistics would tie all pixels together
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_the_first_weights_are_normal_and_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    one = PatchDiscriminator(seed=5)
    torch.manual_seed(2)
    same, other = PatchDiscriminator(seed=5).state_dict(), PatchDiscriminator(seed=6).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.state_dict()["main.0.weight"], other["main.0.weight"])
    widest = max((m for m in one.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    assert widest.weight.std().item() == pytest.approx(0.02, rel=0.01)
    norms = torch.cat([m.weight for m in one.modules() if isinstance(m, nn.BatchNorm2d)])
    assert norms.mean().item() == pytest.approx(1.0, abs=0.003)
    assert norms.std().item() == pytest.approx(0.02, rel=0.1)
    biases = [value for name, value in one.state_dict().items() if name.endswith(".bias")]
    assert sum(value.abs().sum() for value in biases) == 0


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_the_least_picture_has_one_patch(num_layers: int) -> None:
    network, least = PatchDiscriminator(num_layers=num_layers, channels=4), least_image_size(num_layers)
    assert network(torch.zeros(2, 3, least, least)).shape == (2, 1, 1, 1)
    with pytest.raises(ArraError, match=f"need pictures of at least {least} pixels a side, these have {least - 1}"):
        network(torch.zeros(2, 3, least, least - 1))


def test_advice_for_small_pictures() -> None:
    with pytest.raises(ArraError, match=r"have 16; at most 2 fit"):
        PatchDiscriminator()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ArraError, match=r"have 4; train without it"):
        PatchDiscriminator()(torch.zeros(1, 3, 4, 4))


def test_losses_in_closed_form() -> None:
    hinge = 0.5 * ((0.5 + 0.0) / 2 + (0.0 + 1.25) / 2)
    assert discriminator_loss(REAL, FAKE, kind="hinge").item() == pytest.approx(hinge)
    assert generator_loss(FAKE, kind="hinge").item() == pytest.approx(2.75 / 2)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    entropy = -0.5 * sum(
        (math.log(sigmoid(real)) + math.log(1 - sigmoid(fake))) / 2
        for real, fake in zip(REAL.flatten().tolist(), FAKE.flatten().tolist(), strict=True)
    )
    assert discriminator_loss(REAL, FAKE, kind="vanilla").item() == pytest.approx(entropy)
    assert discriminator_loss(REAL, FAKE, kind="non_saturating").item() == pytest.approx(entropy)
    saturating = sum(math.log(1 - sigmoid(fake)) for fake in FAKE.flatten().tolist()) / 2
    assert generator_loss(FAKE, kind="vanilla").item() == pytest.approx(saturating)
    usual = -sum(math.log(sigmoid(fake)) for fake in FAKE.flatten().tolist()) / 2
    assert generator_loss(FAKE, kind="non_saturating").item() == pytest.approx(usual)
    ones, zeros = torch.ones_like(REAL), torch.zeros_like(REAL)
    library = F.binary_cross_entropy_with_logits
    assert entropy == pytest.approx(0.5 * (library(REAL, ones) + library(FAKE, zeros)).item())
    assert usual == pytest.approx(library(FAKE, ones).item())


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non_saturating"])
def test_losses_pull_the_right_way(kind: Any) -> None:
    """The discriminator wants real ones up and reconstructions down, the tokenizer its reconstructions up."""
    real, fake = torch.zeros(1, 1, 1, 1, requires_grad=True), torch.zeros(1, 1, 1, 1, requires_grad=True)
    discriminator_loss(real, fake, kind=kind).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert real.grad.item() < 0 < fake.grad.item()
    fake.grad = None
    generator_loss(fake, kind=kind).backward()
    assert fake.grad is not None
    assert fake.grad.item() < 0


def test_the_adaptive_weight_is_a_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    x = 2 * weight
    reconstruction, adversarial = (x**2).sum(), 5 * x.sum()
    found = adaptive_weight(reconstruction, adversarial, weight)
    # gradients: 8 w = (24, 32), norm 40; (10, 10), norm sqrt(200)
    assert found.item() == pytest.approx(40 / (math.sqrt(200) + 1e-4), rel=1e-6)
    assert not found.requires_grad
    assert weight.grad is None
    assert adaptive_weight(1e9 * reconstruction, adversarial, weight).item() == 1e4
    (reconstruction + found * adversarial).backward()  # the graph is still there
    assert weight.grad is not None
