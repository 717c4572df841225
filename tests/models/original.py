"""LlamaGen's state dicts restated from its description alone: names, shapes and counts, without our networks."""

from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]

# name: (layers, heads, width, feed-forward, parameters c2i, parameters t2i, entries c2i, entries t2i)
GPT_TABLE = {
    "b": (12, 12, 768, 2048, 110_888_448, 112_282_368, 88, 90),
    "l": (24, 16, 1024, 2816, 342_910_976, 345_031_680, 172, 174),
    "xl": (36, 20, 1280, 3584, 774_699_520, 777_678_080, 256, 258),
    "xxl": (48, 24, 1536, 4096, 1_410_972_672, 1_414_940_160, 340, 342),
    "xxxl": (48, 40, 2560, 6912, 3_893_027_840, 3_902_261_760, 340, 342),
    "1b": (22, 32, 2048, 5632, 1_199_616_000, 1_205_954_560, 158, 160),
    "3b": (24, 32, 3200, 8704, 3_096_659_200, 3_110_249_600, 172, 174),
    "7b": (32, 32, 4096, 11008, 6_614_589_440, 6_635_655_168, 228, 230),
}
# channel multipliers: (parameters, entries)
VQ_TABLE = {(1, 1, 2, 2, 4): (71_883_403, 344), (1, 2, 2, 4): (70_109_835, 300)}


def gpt_shapes(
    layers: int, width: int, ffn: int, *, codes: int = 16384, classes: int | None = 1000, caption_dim: int = 2048
) -> Shapes:
    shapes: Shapes = {"tok_embeddings.weight": (codes, width), "output.weight": (codes, width), "norm.weight": (width,)}
    if classes is not None:
        shapes["cls_embedding.embedding_table.weight"] = (classes + 1, width)
    else:
        shapes["cls_embedding.uncond_embedding"] = (120, caption_dim)
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, caption_dim)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
    for layer in range(layers):
        for name, shape in {
            "attention.wqkv": (3 * width, width),
            "attention.wo": (width, width),
            "feed_forward.w1": (ffn, width),
            "feed_forward.w2": (width, ffn),
            "feed_forward.w3": (ffn, width),
            "attention_norm": (width,),
            "ffn_norm": (width,),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    return shapes


def vq_shapes(
    mult: tuple[int, ...], *, base: int = 128, latent: int = 256, codes: int = 16384, code_dim: int = 8
) -> Shapes:
    shapes: Shapes = {"quantize.codebook_used": (65536,), "quantize.embedding.weight": (codes, code_dim)}

    def conv(name: str, inside: int, outside: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outside, inside, kernel, kernel)
        shapes[f"{name}.bias"] = (outside,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name: str, inside: int, outside: int) -> None:
        norm(f"{name}.norm1", inside)
        conv(f"{name}.conv1", inside, outside, 3)
        norm(f"{name}.norm2", outside)
        conv(f"{name}.conv2", outside, outside, 3)
        if inside != outside:
            conv(f"{name}.nin_shortcut", inside, outside, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths = [base * factor for factor in mult]
    last, deep = len(mult) - 1, widths[-1]
    conv("quant_conv", latent, code_dim, 1)
    conv("post_quant_conv", code_dim, latent, 1)
    conv("encoder.conv_in", 3, base, 3)
    conv("encoder.conv_out", deep, latent, 3)
    conv("decoder.conv_in", latent, deep, 3)
    conv("decoder.conv_out", base, 3, 3)
    norm("encoder.norm_out", deep)
    norm("decoder.norm_out", base)
    for side in ("encoder", "decoder"):
        residual(f"{side}.mid.0", deep, deep)
        attention(f"{side}.mid.1", deep)
        residual(f"{side}.mid.2", deep, deep)
    for level, (before, after) in enumerate(pairwise([base, *widths])):
        block = f"encoder.conv_blocks.{level}"
        for number in range(2):
            residual(f"{block}.res.{number}", after if number else before, after)
            if level == last:
                attention(f"{block}.attn.{number}", after)
        if level < last:
            conv(f"{block}.downsample.conv", after, after, 3)
    for level, (before, after) in enumerate(pairwise([deep, *reversed(widths)])):
        block = f"decoder.conv_blocks.{level}"
        for number in range(3):
            residual(f"{block}.res.{number}", after if number else before, after)
            if level == 0:
                attention(f"{block}.attn.{number}", after)
        if level < last:
            conv(f"{block}.upsample.conv", after, after, 3)
    return shapes
