"""One position through a decoder on a CPU: the formulas of `blocks.py` in the fewest steps, from packed weights.

A step of decoding is a few megabytes of weights for each of a hundred small calls, so that calls themselves count. Here
are none that are not arithmetic: everything that stays the same is looked up once, when the weights are packed.
Letters: B batch, R rows (B, filled up for the products), D width, H heads, G key-value heads, E size of a head,
E2 = E/2 pairs, W inner width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from arra.models.cache import KVCache
from arra.models.products import MIN_ROWS, packed_of, packed_sum, packed_whole


@dataclass(frozen=True)
class PackedBlock:
    """The weights of a block, matrices in oneDNN's layout."""

    attention_norm: Float[Tensor, " D"]
    wqkv: Tensor
    wo: Tensor
    ffn_norm: Float[Tensor, " D"]
    w1_w3: Tensor
    w2: Tensor

    @classmethod
    def of(cls, block: Any) -> "PackedBlock | None":
        """A block's weights; None where a matrix is not packed."""
        wqkv, wo = packed_of(block.attention.wqkv), packed_of(block.attention.wo)
        w1_w3, w2 = packed_of(block.feed_forward.w1, pair=True), packed_of(block.feed_forward.w2)
        if wqkv is None or wo is None or w1_w3 is None or w2 is None:
            return None
        norms = block.attention_norm.weight.detach(), block.ffn_norm.weight.detach()
        return cls(norms[0], wqkv, wo, norms[1], w1_w3, w2)


@dataclass(frozen=True)
class Stepper:
    """What takes one position of a batch through all blocks, without gradients."""

    blocks: tuple[PackedBlock, ...]
    num_heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    eps: Float[Tensor, ""]

    def __call__(
        self,
        x: Float[Tensor, "B 1 D"],
        table: Float[Tensor, "1 E2 2"],
        mask: Bool[Tensor, "#B 1 1 T"] | None,
        cache: KVCache,
        start: int,
    ) -> Float[Tensor, "B 1 D"]:
        """The residual stream after the last block; the cache grows by position `start`."""
        batch, heads, turning = len(x), self.num_heads, self.num_heads + self.kv_heads
        filling = (0, 0, 0, MIN_ROWS - batch) if batch < MIN_ROWS else None
        rows = x[:, 0] if filling is None else F.pad(x[:, 0], filling)
        turns = torch.view_as_complex(table)[0]  # (E/2,)
        new = cache.both[:, :, :, :, start].unbind(0)  # (2, B, G, E) for each layer
        keys = cache.both[:, 0, :, :, : start + 1].unbind(0)
        values = cache.both[:, 1, :, :, : start + 1].unbind(0)
        is_grouped = heads != self.kv_heads
        for layer, block in enumerate(self.blocks):
            found = packed_whole(self._normed(rows, block.attention_norm), block.wqkv)
            found = (found if filling is None else found[:batch]).view(batch, -1, self.head_dim)
            torch.view_as_complex(found.view(batch, -1, self.head_dim // 2, 2))[:, :turning].mul_(turns)
            new[layer].copy_(found[:, heads:].view(batch, 2, self.kv_heads, self.head_dim).transpose(0, 1))
            attended = F.scaled_dot_product_attention(
                found[:, :heads].unsqueeze(2), keys[layer], values[layer], attn_mask=mask, enable_gqa=is_grouped
            ).view(batch, -1)
            rows = packed_sum(rows, attended if filling is None else F.pad(attended, filling), block.wo)
            both = packed_whole(self._normed(rows, block.ffn_norm), block.w1_w3)
            gate = F.silu(both[:, : self.ffn_width]).mul_(both[:, self.ffn_width :])
            rows = packed_sum(rows, gate, block.w2)
        return rows[:batch, None]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight)
