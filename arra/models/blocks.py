"""The parts the LlamaGen-style decoder is made of; `decoder.py` puts them together.

Parameter names are LlamaGen's own, so its published files load as they are.
Letters: B batch, S positions given (a slice of the sequence), T positions up to the last of them, C prefix length,
P image positions, D model width, H heads, E size of one head, E2 = E/2 pairs, F caption feature size.
Source: FoundationVision/LlamaGen, autoregressive/models/gpt.py (behaviour matched, its defects not).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from arra.models import lean
from arra.models.cache import KVCache, LayerWindow
from arra.models.dropout import dropped
from arra.models.products import inferred, inferred_pair, is_unheard
from arra.models.settings import DecoderSettings


def rotary_table(settings: DecoderSettings, device: torch.device | str = "cpu") -> Float[Tensor, "T E2 2"]:
    """(cos, sin) for each position of the sequence and each pair of head elements, float32.

    The first half of the pairs turns with the row, the second with the column. Prefix rows are (0, 0) or (1, 0), that
    of the REP token (1, 0): a row of zeros takes away its key, so that no code could look at it more than at others.
    """
    half = settings.head_dim // 2
    height, width = settings.grid
    exponents = torch.arange(0, half, 2, device=device)[: half // 2].float() / half
    frequencies = 1.0 / settings.rope_base**exponents
    position = torch.arange(height * width, device=device)
    row = torch.div(position, width, rounding_mode="floor")[:, None] * frequencies
    column = (position % width)[:, None] * frequencies
    angles = torch.cat([row, column], dim=1)  # (P, E/2)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    prefix = torch.zeros(settings.prefix_length, half, 2, device=device)
    if settings.prefix_rotary == "identity":
        prefix[..., 0] = 1.0
    elif settings.rep_token:
        prefix[-1, :, 0] = 1.0
    return torch.cat([prefix, image])


class Rotary(nn.Module):
    """Holder of the rotary table: never saved, float32 in a bfloat16 model, rebuilt where a move would lose it."""

    table: Tensor

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("table", rotary_table(settings, torch.get_default_device()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)
        # fn may have cast the table or, after meta-device construction, handed back uninitialised memory
        self.table = rotary_table(self.settings, self.table.device)
        return self


def apply_rotary(x: Float[Tensor, "B S H E"], table: Float[Tensor, "S E2 2"]) -> Float[Tensor, "B S H E"]:
    """The heads turned by the table on interleaved pairs (2i, 2i+1), computed in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, S, H, E/2, 2)
    if x.device.type == "cpu":
        # one complex product: five times faster than strided real ones on a CPU, but compilers cannot fuse it
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
        return torch.view_as_real(turned).flatten(-2).type_as(x)
    return _rotated_pairs(pairs, table).flatten(-2).type_as(x)


def _rotated_pairs(pairs: Tensor, table: Tensor) -> Tensor:
    even, odd = pairs.unbind(-1)  # (B, S, H, E/2) each
    cos, sin = table[:, None].unbind(-1)  # (S, 1, E/2) each
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


def attention_mask(
    prefix_mask: Bool[Tensor, "B C"] | None, *, start: int, end: int, device: torch.device
) -> Bool[Tensor, "#B 1 S T"] | None:
    """Who may attend to whom for queries start..end-1 and keys 0..end-1; None where plain causal attention does it.

    Causal, padded prefix keys off, diagonal on (so that a padded query has something to attend to).
    """
    if prefix_mask is None and (start == 0 or end == start + 1):
        return None
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(end, device=device)[None, :]
    causal = (key <= query)[None]  # (1, S, T)
    if prefix_mask is None:
        return causal[:, None]
    missing = end - prefix_mask.shape[1]
    real = F.pad(prefix_mask, (0, missing), value=True) if missing > 0 else prefix_mask[:, :end]
    return (causal & real[:, None, :] | (key == query))[:, None]


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; the weight is applied after casting back, as LlamaGen does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """The normalised input in its own dtype."""
        if x.dtype == torch.float32:
            if torch.is_grad_enabled():
                return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
            return (x * lean.rms(x, self.eps)).mul_(self.weight)
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped-query self-attention with a fused projection, over the given slice and what the cache holds."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = settings.num_heads, settings.kv_heads, settings.head_dim
        self.wqkv = nn.Linear(settings.hidden_size, (self.num_heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(settings.hidden_size, settings.hidden_size, bias=False)
        self.attn_dropout = settings.attn_dropout

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        table: Tensor,
        mask: Tensor | None,
        cache: KVCache | LayerWindow | None,
        layer: int,
        start: int,
    ) -> Tensor:
        """(B, S, D): what attention to the normed stream adds to it."""
        query, key, value = self._heads(x, norm, table)
        if cache is not None:
            key, value = cache.write(layer, start, key, value)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and x.shape[1] > 1,
            dropout_p=self.attn_dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.num_heads,
        )
        return lean.linear(attended.transpose(1, 2).flatten(2), self.wo)

    def _heads(self, x: Tensor, norm: RMSNorm, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, S, E) of the normed stream, the first two turned by the rotary table."""
        turning, kinds = self.num_heads + self.kv_heads, [self.num_heads, self.kv_heads, self.kv_heads]
        if lean.usable(x, self.wqkv) and is_unheard(norm):
            heads = lean.norm_heads(x, norm.weight, self.wqkv.weight, table, turning, norm.eps)
        else:
            heads = lean.linear(norm(x), self.wqkv).unflatten(-1, (-1, self.head_dim))
            if heads.dtype == torch.float32 and not torch.is_grad_enabled():
                lean.turn_heads(heads, table, turning)
            else:
                heads = torch.cat([apply_rotary(heads[:, :, :turning], table), heads[:, :, turning:]], dim=2)
        query, key, value = heads.transpose(1, 2).split(kinds, dim=1)
        return query, key, value


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.w1 = nn.Linear(settings.hidden_size, settings.ffn_width, bias=False)
        self.w3 = nn.Linear(settings.hidden_size, settings.ffn_width, bias=False)
        self.w2 = nn.Linear(settings.ffn_width, settings.hidden_size, bias=False)

    @property
    def side_by_side(self) -> tuple[nn.Module, nn.Module]:
        """The layers that read the same input."""
        return self.w1, self.w3

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """(B, S, D): what the feed-forward of the normed stream adds to it."""
        if lean.usable(x, self.w1, self.w3, self.w2) and is_unheard(norm):
            added = lean.norm_swiglu(
                x.flatten(0, 1), norm.weight, self.w1.weight, self.w3.weight, self.w2.weight, norm.eps
            )
            return added.view_as(x)
        normed = norm(x)
        if torch.is_grad_enabled():
            return lean.linear(F.silu(lean.linear(normed, self.w1)) * lean.linear(normed, self.w3), self.w2)
        gate, value = inferred_pair(normed.flatten(0, 1), *self.side_by_side)
        return inferred(F.silu(gate).mul_(value), self.w2).view_as(x)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.attention = Attention(settings)
        self.feed_forward = FeedForward(settings)
        self.attention_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.ffn_norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.dropouts = (settings.resid_dropout, settings.ffn_dropout)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | LayerWindow | None = None,
        layer: int = 0,
        start: int = 0,
        seeds: Tensor | None = None,
        paths: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D): the residual stream after this block.

        While training, `seeds` (B,) of the rows for this block drop elements, and the factors `paths` (2, B) rows.
        """
        added = self.attention(x, self.attention_norm, table, mask, cache, layer, start)
        x = self._joined(x, added, 0, seeds, paths)
        return self._joined(x, self.feed_forward(x, self.ffn_norm), 1, seeds, paths)

    def _joined(self, x: Tensor, added: Tensor, branch: int, seeds: Tensor | None, paths: Tensor | None) -> Tensor:
        p = self.dropouts[branch]
        if not self.training or seeds is None:
            return x + added
        if paths is not None:
            return x + dropped(added, p, seeds, site=branch) * paths[branch, :, None, None].to(added.dtype)
        if lean.usable(x):
            return lean.drop_add(x, added, p, seeds, site=branch)
        return x + dropped(added, p, seeds, site=branch)


class CaptionProjection(nn.Module):
    """Two bias-free layers from caption features to the model width."""

    def __init__(self, caption_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, hidden_size, bias=False)
        self.fc2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) projected features."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class ClassEmbedding(nn.Module):
    """One vector for each class and one for the null class."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(settings.num_classes + 1, settings.hidden_size)

    def forward(self, tokens: Tensor, start: int, caption: Tensor | None, null_caption: Tensor | None) -> Tensor:
        """(B, S, D) for class ids."""
        return self.embedding_table(tokens)


class CaptionEmbedding(nn.Module):
    """Projected caption features; a null caption is a constant that is stored but never trained, as LlamaGen's."""

    uncond_embedding: Tensor

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        constant = torch.randn(settings.condition_length, settings.caption_dim) / settings.caption_dim**0.5
        self.register_buffer("uncond_embedding", constant)
        self.cap_proj = CaptionProjection(settings.caption_dim, settings.hidden_size)

    def forward(self, tokens: Tensor, start: int, caption: Tensor | None, null_caption: Tensor | None) -> Tensor:
        """(B, S, D) for prefix positions start..start+S-1."""
        if caption is None:
            raise ValueError("this decoder is conditioned on caption features: pass caption=")
        if null_caption is not None:
            constant = self.uncond_embedding.to(caption.dtype)
            caption = torch.where(null_caption[:, None, None], constant, caption)
        return self.cap_proj(caption[:, start : start + tokens.shape[1]])


class TextEmbedding(nn.Module):
    """Text tokens and their slots in the prefix."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        if settings.text_vocab_size is None:
            raise ValueError("text_vocab_size is None")
        self.text_table = nn.Embedding(settings.text_vocab_size, settings.hidden_size)
        self.position_table = nn.Embedding(settings.condition_length, settings.hidden_size)

    def forward(self, tokens: Tensor, start: int, caption: Tensor | None, null_caption: Tensor | None) -> Tensor:
        """(B, S, D) for text ids at prefix positions start..start+S-1."""
        return self.text_table(tokens) + self.position_table.weight[start : start + tokens.shape[1]]


EMBEDDINGS = {"class": ClassEmbedding, "caption": CaptionEmbedding, "text": TextEmbedding}
