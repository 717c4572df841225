"""The plain way: LlamaGen's decoder written down as its formulas say, without care for speed or memory.

What `decoder.py`, `train.py` and `sample.py` measure ours against. Key names and results are LlamaGen's, so one state
dict serves both; it works as the original does: every intermediate kept for autograd, a mask and a padded cache in
decoding, the cache copied by `repeat_interleave` and rescaled whole for every token, guidance as a doubled batch.
Letters: B batch, S positions, H heads, E size of a head, D width, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_table(grid: int, head_dim: int) -> Tensor:
    """(1 + grid^2, E/2, 2): a zero row for the class, then (cos, sin) of rows and columns."""
    half = head_dim // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angles = torch.outer(torch.arange(grid).float(), frequencies)
    both = torch.cat(
        [angles[:, None].expand(grid, grid, -1), angles[None].expand(grid, grid, -1)], dim=-1
    )  # (grid, grid, E/2)
    table = torch.stack([both.cos(), both.sin()], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(1, half, 2), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """(B, S, H, E) turned on interleaved pairs."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class Attention(nn.Module):
    """Self-attention, whole sequences or one position over a padded cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(0.1)
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, table: Tensor, position: Tensor | None, mask: Tensor | None) -> Tensor:
        b, s, width = x.shape
        q, k, v = (part.view(b, s, self.heads, self.head_dim) for part in self.wqkv(x).split(width, dim=-1))
        q, k = rotate(q, table), rotate(k, table)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.cache is not None and position is not None:
            self.cache[0][:, :, position] = k
            self.cache[1][:, :, position] = v
            k, v = self.cache
        k, v = k.repeat_interleave(1, dim=1), v.repeat_interleave(1, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.drop(self.wo(y.transpose(1, 2).contiguous().view(b, s, width)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 256 * -(-int(2 * (4 * width) / 3) // 256)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)
        self.attention_norm, self.ffn_norm = Norm(width), Norm(width)

    def forward(self, x: Tensor, table: Tensor, position: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, position, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassTable(nn.Module):
    """Classes and the null class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(1001, width)


class PlainLlamaGen(nn.Module):
    """The class-conditional decoder."""

    def __init__(self, *, layers: int, heads: int, width: int, codes: int = 16384, grid: int = 16) -> None:
        super().__init__()
        self.grid = grid
        self.cls_embedding = ClassTable(width)
        self.tok_embeddings = nn.Embedding(codes, width)
        self.tok_dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = Norm(width)
        self.output = nn.Linear(width, codes, bias=False)
        self.table = rotary_table(grid, width // heads)

    def forward(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Logits (B, S, K) at the positions that predict the codes."""
        x = torch.cat([self.cls_embedding.embedding_table(labels)[:, None], self.tok_embeddings(codes[:, :-1])], dim=1)
        x = self.tok_dropout(x)
        for layer in self.layers:
            x = layer(x, self.table[: x.shape[1]], None, None)
        return self.output(self.norm(x)).float()

    def loss(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy."""
        logits = self(labels, codes)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), codes.view(-1))

    @torch.no_grad()
    def generate(self, labels: Tensor, *, cfg_scale: float, steps: int) -> Tensor:
        """The first `steps` codes of each image, guided, drawn by multinomial."""
        num_images, length = len(labels), 8 * -(-(1 + self.grid**2) // 8)
        both = torch.cat([labels, torch.full_like(labels, 1000)])
        for layer in self.layers:
            shape = (2 * num_images, layer.attention.heads, length, layer.attention.head_dim)  # type: ignore[union-attr]
            layer.attention.cache = (torch.zeros(shape), torch.zeros(shape))  # type: ignore[union-attr]
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(2 * num_images, 1, 1)
        found, kept = [], []
        x = self.cls_embedding.embedding_table(both)[:, None]
        for step in range(steps):
            position = torch.tensor([step])
            mask = causal[:, None, position]
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                for layer in self.layers:
                    x = layer(x, self.table[position], position, mask)
            logits = self.output(self.norm(x)).float()[:, -1]
            cond, uncond = logits.split(num_images)
            probabilities = F.softmax(uncond + (cond - uncond) * cfg_scale, dim=-1)
            kept.append(probabilities.clone())
            found.append(torch.multinomial(probabilities, 1))
            x = self.tok_embeddings(torch.cat([found[-1], found[-1]]))
        for layer in self.layers:
            layer.attention.cache = None  # type: ignore[union-attr]
        return torch.cat(found, dim=1)


def plain_swish(x: Tensor) -> Tensor:
    """x * sigmoid(x), written out."""
    return x * torch.sigmoid(x)


def plain_resnet_block(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block of the tokenizer, one whole tensor after the other."""
    h = block.conv1(plain_swish(block.norm1(x)))  # type: ignore[operator]
    h = block.conv2(plain_swish(block.norm2(h)))  # type: ignore[operator]
    return (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x) + h  # type: ignore[operator]


def plain_attention(block: nn.Module, x: Tensor) -> Tensor:
    """Attention over all positions by two batched products and a softmax."""
    b, c, height, width = x.shape
    normed = block.norm(x)  # type: ignore[operator]
    q, k, v = (conv(normed).reshape(b, c, height * width) for conv in (block.q, block.k, block.v))  # type: ignore[operator]
    weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * c**-0.5, dim=2)
    attended = torch.bmm(v, weights.permute(0, 2, 1)).reshape(b, c, height, width)
    return x + block.proj_out(attended)  # type: ignore[operator]


def plain_levels(x: Tensor, levels: nn.ModuleList) -> Tensor:
    """The resolutions of an encoder or decoder in turn."""
    for level in levels:
        for number, block in enumerate(level.res):  # type: ignore[arg-type]
            x = plain_resnet_block(block, x)
            if len(level.attn):  # type: ignore[arg-type]
                x = plain_attention(level.attn[number], x)  # type: ignore[index]
        if hasattr(level, "downsample"):
            x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[union-attr, operator]
        if hasattr(level, "upsample"):
            x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[union-attr, operator]
    return x


def plain_middle(x: Tensor, blocks: nn.ModuleList) -> Tensor:
    """The blocks at the lowest resolution."""
    x = plain_resnet_block(blocks[0], x)
    return plain_resnet_block(blocks[2], plain_attention(blocks[1], x))


@torch.no_grad()
def plain_encode(model: nn.Module, images: Tensor) -> Tensor:
    """Codes of images by the tokenizer network `model`."""
    encoder = model.encoder
    x = plain_middle(plain_levels(encoder.conv_in(images), encoder.conv_blocks), encoder.mid)  # type: ignore[union-attr, operator, arg-type]
    z = model.quant_conv(encoder.conv_out(plain_swish(encoder.norm_out(x))))  # type: ignore[union-attr, operator]
    z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
    rows, flat = F.normalize(model.quantize.embedding.weight, dim=-1), z.reshape(-1, z.shape[-1])  # type: ignore[union-attr, arg-type]
    distance = (flat**2).sum(1, keepdim=True) + (rows**2).sum(1) - 2 * torch.einsum("nd,kd->nk", flat, rows)
    return distance.argmin(1).view(z.shape[:3])


@torch.no_grad()
def plain_decode(model: nn.Module, codes: Tensor) -> Tensor:
    """Pictures of codes by the tokenizer network `model`."""
    decoder = model.decoder
    z = F.normalize(model.quantize.embedding.weight, dim=-1)[codes].permute(0, 3, 1, 2)  # type: ignore[union-attr, arg-type]
    x = plain_middle(decoder.conv_in(model.post_quant_conv(z)), decoder.mid)  # type: ignore[union-attr, operator, arg-type]
    x = plain_levels(x, decoder.conv_blocks)  # type: ignore[union-attr, arg-type]
    return decoder.conv_out(plain_swish(decoder.norm_out(x)))  # type: ignore[union-attr, operator]
