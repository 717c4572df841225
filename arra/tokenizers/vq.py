"""The VQ image tokenizer network: pixels -> a grid of integers (codes) -> pixels.

One network serves LlamaGen's published VQ-16 and VQ-8, Chameleon's VQGAN and every tokenizer trained here; only the
settings differ. Parameter names are LlamaGen's own, so its files load as they are; Meta's are in `chameleon`.
Legend: B batch, H W pixels, h w latent grid (H = h * downsampling), Z latent channels, E code dimension, K codes.

Source: LlamaGen `tokenizer/tokenizer_image/vq_model.py` (behaviour and key names); `transformers`' ChameleonVQVAE
(distances, places of attention).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from arra.errors import ArraError
from arra.settings import Settings
from arra.tokenizers import strips
from arra.tokenizers.entropy import code_entropy_loss

DISTANCES_AT_A_TIME = 2**26
"""Vectors times codes whose distances are in memory at once: 256 MiB in float32."""
NO_DECODER = (
    "its weights are the encoder half alone, as in Hugging Face's Chameleon checkpoints, and make no pictures of "
    "codes; give vqgan.ckpt of Meta's or Lumina's download"
)


class VQSettings(Settings):
    """Shape of a VQ tokenizer network. The defaults are LlamaGen's VQ-16."""

    channels: int = Field(128, gt=0, multiple_of=32)
    """Channels at full resolution; GroupNorm has 32 groups, so a multiple of 32."""
    ch_mult: tuple[Annotated[int, Field(gt=0)], ...] = Field((1, 1, 2, 2, 4), min_length=1)
    """Channel multiplier of each resolution level; the image shrinks by 2 between levels."""
    num_res_blocks: int = Field(2, gt=0)
    """Residual blocks per encoder level; the decoder has one more."""
    z_channels: int = Field(256, gt=0)
    num_codes: int = Field(16384, gt=1)
    code_dim: int = Field(8, gt=0)
    normalize: bool = True
    """Vectors and codes are brought to unit length where they are compared and decoded (LlamaGen); else they are taken
    as they are (Chameleon)."""
    attention_levels: tuple[int, ...] | None = None
    """Levels (0 is full resolution) with attention after each block; null: the lowest alone, as LlamaGen has it."""
    has_decoder: bool = True
    """Without one (the half that Hugging Face's Chameleon holds) pictures become codes, and codes no pictures."""

    @model_validator(mode="after")
    def _levels_exist(self) -> "VQSettings":
        levels, last = list(self.attended), len(self.ch_mult) - 1
        if levels != sorted(set(levels)) or not all(0 <= level <= last for level in levels):
            raise ValueError(f"attention_levels: {levels}: expected rising numbers in 0..{last}, the levels of ch_mult")
        return self

    @property
    def attended(self) -> tuple[int, ...]:
        """Levels with attention, 0 the full resolution."""
        return (len(self.ch_mult) - 1,) if self.attention_levels is None else self.attention_levels

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return int(2 ** (len(self.ch_mult) - 1))


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """A 3 x 3 convolution of the activated norm."""
    if strips.usable(x):
        return strips.norm_silu_conv(x, norm, conv)
    return cast(Tensor, conv(F.silu(norm(x))))


class ResnetBlock(nn.Module):
    """Two normed 3x3 convolutions with a skip."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; without gradients it may be `x` itself, overwritten."""
        h = norm_silu_conv(x, self.norm1, self.conv1)
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        if strips.usable(x):
            return strips.norm_silu_conv(h, self.norm2, self.conv2, added_to=skip)
        return cast(Tensor, skip + norm_silu_conv(h, self.norm2, self.conv2))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (f(normed).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, h*w, C)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return cast(Tensor, x + self.proj_out(attended.transpose(1, 2).unflatten(2, (h, w))))


class Downsample(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))  # right and bottom only


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if strips.usable(x):
            return strips.upsample_conv(x, self.conv)
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next where there is one."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, attention: bool, step: nn.Module | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.res = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.step_name = {Downsample: "downsample", Upsample: "upsample", type(None): ""}[type(step)]
        if step is not None:
            self.add_module(self.step_name, step)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return cast(Tensor, getattr(self, self.step_name)(x)) if self.step_name else x


def laid_out(x: Tensor) -> Tensor:
    """x with its channels together where that is the faster layout: a CPU's convolutions without gradients."""
    return x.contiguous(memory_format=torch.channels_last) if strips.usable(x) else x


def middle(channels: int) -> nn.ModuleList:
    """The blocks at the lowest resolution, between encoder (or decoder) levels and latents."""
    return nn.ModuleList([ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)])


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, s: VQSettings) -> None:
        super().__init__()
        widths = [s.channels] + [s.channels * m for m in s.ch_mult]
        last = len(s.ch_mult) - 1
        self.conv_in = nn.Conv2d(3, s.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                s.num_res_blocks,
                attention=i in s.attended,
                step=Downsample(widths[i + 1]) if i < last else None,
            )
            for i in range(last + 1)
        )
        self.mid = middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], s.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(laid_out(x))
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return norm_silu_conv(x, self.norm_out, self.conv_out)


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, s: VQSettings) -> None:
        super().__init__()
        widths = [s.channels * m for m in reversed(s.ch_mult)]  # lowest resolution first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(s.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                s.num_res_blocks + 1,
                attention=last - i in s.attended,
                step=Upsample(widths[i]) if i < last else None,
            )
            for i in range(last + 1)
        )
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(laid_out(z))
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return norm_silu_conv(x, self.norm_out, self.conv_out)


@dataclass(frozen=True)
class Quantized:
    """What the quantiser says of a batch; losses are means over all elements, code dimension included."""

    vectors: Float[Tensor, "B E h w"]  # straight-through: value of the codebook row, gradient of the encoder
    codes: Int[Tensor, "B h w"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    entropy_loss: Float[Tensor, ""]


class Quantizer(nn.Module):
    """Nearest codebook row; with `normalize` by cosine, rows and vectors normalised when used, not in storage."""

    embedding: nn.Embedding

    def __init__(self, num_codes: int, code_dim: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.embedding = nn.Embedding(num_codes, code_dim)
        bound = 1.0 / num_codes
        rows = torch.empty(num_codes, code_dim).uniform_(-bound, bound)
        self.embedding.weight.data = F.normalize(rows, dim=-1) if normalize else rows

    def table(self) -> Float[Tensor, "K E"]:
        """Codebook rows as they are compared and decoded."""
        return F.normalize(self.embedding.weight, dim=-1) if self.normalize else self.embedding.weight

    def compared(self, z: Float[Tensor, "B E h w"]) -> Float[Tensor, "B E h w"]:
        """Encoder vectors as they are compared with the rows."""
        return F.normalize(z, dim=1) if self.normalize else z

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
        """Index of the row nearest to each of the `compared` vectors; the first of equals."""
        rows = self.table()
        found = []
        for part in z.split(max(1, DISTANCES_AT_A_TIME // len(rows))):
            distance = (part**2).sum(1, keepdim=True) + (rows**2).sum(1) - 2 * part @ rows.T
            found.append(distance.argmin(1))
        return torch.cat(found)

    def codes(self, z: Float[Tensor, "B E h w"]) -> Int[Tensor, "B h w"]:
        """Codes of encoder vectors."""
        flat = self.compared(z).permute(0, 2, 3, 1).flatten(0, 2)  # (B*h*w, E)
        return self.nearest(flat).view(z.shape[0], *z.shape[2:])

    def rows(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B E h w"]:
        """Codebook rows, channels first."""
        return F.embedding(codes, self.table()).permute(0, 3, 1, 2)

    def beside(self, z: Float[Tensor, "N E"], noise: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Rows for codes that are to lie next to these encoder vectors.

        `noise` is in units of a normalised vector's length; of others, in units of the root mean square of each.
        """
        if self.normalize:
            return F.normalize(F.normalize(z, dim=1) + noise, dim=1)
        return z + noise * z.square().mean(1, keepdim=True).sqrt()

    def forward(
        self, z: Float[Tensor, "B E h w"], *, commitment: float = 0.25, entropy_weight: float = 0.0
    ) -> Quantized:
        """Raises ArraError for an entropy loss of vectors that are not normalised."""
        codes, z = self.codes(z), self.compared(z)
        quantized = self.rows(codes)
        return Quantized(
            vectors=z + (quantized - z).detach(),
            codes=codes,
            codebook_loss=((quantized - z.detach()) ** 2).mean(),
            commitment_loss=commitment * ((quantized.detach() - z) ** 2).mean(),
            entropy_loss=self._entropy_loss(z, entropy_weight) if entropy_weight else z.new_zeros(()),
        )

    def _entropy_loss(self, z: Tensor, weight: float) -> Tensor:
        if not self.normalize:  # its temperature of 0.01 is made for squared distances of at most 4: others saturate
            raise ArraError(
                "entropy_weight: the entropy loss is made for normalised codes, this tokenizer's are not; set it to 0"
            )
        return weight * code_entropy_loss(z.permute(0, 2, 3, 1).flatten(0, 2), self.table())


class VQModel(nn.Module):
    """Encoder, quantiser and decoder. Images are float in [-1, 1]; the output is unbounded, nominally [-1, 1]."""

    decoder: Decoder
    """Not there without `has_decoder`."""

    def __init__(self, settings: VQSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        if settings.has_decoder:
            self.decoder = Decoder(settings)
        self.quantize = Quantizer(settings.num_codes, settings.code_dim, normalize=settings.normalize)
        self.quant_conv = nn.Conv2d(settings.z_channels, settings.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(settings.code_dim, settings.z_channels, 1)

    def latents(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E h w"]:
        """Vectors before quantisation, not normalised."""
        return cast(Tensor, self.quant_conv(self.encoder(images)))

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes of images in [-1, 1]."""
        return self.quantize.codes(self.latents(images))

    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, nominally in [-1, 1]; as `decode_vectors`."""
        return self.decode_vectors(self.quantize.rows(codes))

    def decode_vectors(self, vectors: Float[Tensor, "B E h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, nominally in [-1, 1].

        Raises:
            ArraError: the network has no decoder.
        """
        if not self.settings.has_decoder:
            raise ArraError(f"tokenizer: {NO_DECODER}")
        return cast(Tensor, self.decoder(self.post_quant_conv(vectors)))

    def num_parameters(self) -> int:
        return sum(math.prod(p.shape) for p in self.parameters())
