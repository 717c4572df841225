"""The patch discriminator of tokenizer training, and what it and the tokenizer lose to each other.

Legend: B batch, H W pixels, h w patches, each judged by one logit (high: a real picture).
Source: Isola et al. 2017 (PatchGAN), with the sizes of LlamaGen `tokenizer/tokenizer_image/discriminator_patchgan.py`.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from arra.errors import ArraError
from arra.train.settings import AdversarialLoss

MOST_CHANNELS = 8
"""Widest layer, in multiples of the first."""
MOST_ADAPTIVE_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions that give one logit per overlapping patch; it draws its first weights from `seed`.

    Batch norm always uses the batch's own statistics, in training of either side, as nothing else ever calls it.
    """

    def __init__(self, *, num_layers: int = 3, channels: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.num_layers = num_layers
        widths = [channels * min(2**i, MOST_CHANNELS) for i in range(num_layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            # batch norm has a bias of its own
            blocks.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False))
            blocks += [nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        blocks.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*blocks)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.normal_(0.0, 0.02, generator=generator)
                if module.bias is not None:
                    module.bias.data.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.data.normal_(1.0, 0.02, generator=generator)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        refuse_small_images(min(images.shape[2:]), num_layers=self.num_layers)
        return cast(Tensor, self.main(images))


def least_image_size(num_layers: int) -> int:
    """Pixels per side from which on a discriminator of so many layers sees at least one patch."""
    return int(
        3 * 2**num_layers
    )  # after the strides 3 pixels are left, which two convolutions without stride bring to 1


def refuse_small_images(image_size: int, *, num_layers: int) -> None:
    """Nothing.

    Raises:
        ArraError: the discriminator cannot see pictures of this size.
    """
    if image_size < least_image_size(num_layers):
        fitting = max((n for n in range(1, num_layers) if least_image_size(n) <= image_size), default=None)
        advice = "train without it" if fitting is None else f"at most {fitting} fit"
        raise ArraError(
            f"tokenizer.train.adversarial.num_layers: {num_layers} layers need pictures of at least "
            f"{least_image_size(num_layers)} pixels a side, these have {image_size}; {advice}"
        )


def discriminator_loss(
    real: Float[Tensor, "B 1 h w"], fake: Float[Tensor, "B 1 h w"], *, kind: AdversarialLoss
) -> Float[Tensor, ""]:
    """What the discriminator minimises: half of what it loses on real pictures, half of what on reconstructions."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    # cross-entropy of "real" and "fake"; the two other kinds differ in the tokenizer's part alone
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Float[Tensor, "B 1 h w"], *, kind: AdversarialLoss) -> Float[Tensor, ""]:
    """What the tokenizer minimises: hinge -logit, vanilla log(1 - p), non-saturating -log p, for p = sigmoid(logit)."""
    if kind == "hinge":
        return -fake.mean()
    return -F.softplus(fake).mean() if kind == "vanilla" else F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """Ratio of the two losses' gradient norms at the decoder's last layer: the factor that makes them pull alike.

    Source: Esser et al. 2021 (VQGAN), equation 7.
    """
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (of_reconstruction / (of_adversarial + 1e-4)).clamp(0.0, MOST_ADAPTIVE_WEIGHT).detach()
