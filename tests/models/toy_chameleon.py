"""Chameleons of toy size with random weights, in every layout of published files, and Meta's network written out.

Letters: B batch, T sequence, D width, H heads, d numbers of a head.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from arra.tokenizers.vocabulary import chameleon_code_name

VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8}


def vocabulary(num_codes: int = 16) -> dict[str, int]:
    """Names and ids as Chameleon has them, with fewer codes and single bytes for text."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *map(chameleon_code_name, range(num_codes)), "<eoss>", "<racm3:break>"]
    names += [f"<reserved{number:05d}>" for number in (8706, 8707, 8799, *range(8801, 8817))]
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    return {name: token for token, name in enumerate(names)}


def text_tokenizer(path: Path, num_codes: int = 16) -> Path:
    """The file, now a tokenizer of single bytes with that vocabulary."""
    made = Tokenizer(models.BPE(vocab=vocabulary(num_codes), merges=[], ignore_merges=True))
    signs = Regex(r"IMGIMG[A-J]{1,4}Z|<reserved\d{5}>|</?[a-z]+>|<racm3:break>")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(signs, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made.to_str())
    return path


def config(num_codes: int = 16, **changes: Any) -> dict[str, Any]:
    """A config.json as the fork writes it, `<image>` in the place of a reserved token."""
    names = {"<image>" if name == "<reserved08707>" else name: token for name, token in vocabulary(num_codes).items()}
    fields = {
        "architectures": ["ChameleonXLLMXForConditionalGeneration"], "model_type": "chameleon",
        "vocab_size": -(-len(names) // 4) * 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "swin_norm": False, "bos_token_id": 1,
        "model_parallel_size": 1, "dropout": 0.05, "mask_image_logits": True, "z_loss_weight": 1e-5,
        "vq_config": {**VQ, "num_embeddings": num_codes}, "vocabulary_map": names, "transformers_version": "4.45.2",
    }  # fmt: skip
    return {**fields, **changes}


def state(config: Mapping[str, Any], *, rows: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Lively random weights in Hugging Face's names; `rows` as in shared norms, None: one a head."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    head = width // heads

    def matrix(out: int, into: int) -> Tensor:
        return 1.5 * torch.randn(out, into, generator=generator) / into**0.5

    def gains(*shape: int) -> Tensor:
        return 1 + 0.2 * torch.randn(*shape, generator=generator)

    made = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], width, generator=generator)}
    for number in range(config["num_hidden_layers"]):
        here = f"model.layers.{number}."
        for name, out in (("q", heads), ("k", keys), ("v", keys)):
            made[f"{here}self_attn.{name}_proj.weight"] = matrix(out * head, width)
        made[f"{here}self_attn.o_proj.weight"] = matrix(width, width)
        for name, count in (("q", heads), ("k", keys)):
            made[f"{here}self_attn.{name}_norm.weight"] = gains(rows or count, head)
            made[f"{here}self_attn.{name}_norm.bias"] = 0.1 * torch.randn(rows or count, head, generator=generator)
        made[f"{here}mlp.gate_proj.weight"] = matrix(inner, width)
        made[f"{here}mlp.up_proj.weight"] = matrix(inner, width)
        made[f"{here}mlp.down_proj.weight"] = matrix(width, inner)
        made[f"{here}input_layernorm.weight"] = gains(width)
        made[f"{here}post_attention_layernorm.weight"] = gains(width)
    return made | {"model.norm.weight": gains(width), "lm_head.weight": matrix(config["vocab_size"], width)}


def save(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """The folder, now holding a config.json and the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def to_pairs(rows: Tensor, head: int) -> Tensor:
    """Rows in Meta's order, where the numbers that turn together stand side by side."""
    return torch.stack(rows.unflatten(0, (-1, 2, head // 2)).unbind(1), 2).reshape(rows.shape)


def to_meta(weights: Mapping[str, Tensor], config: Mapping[str, Any], *, fused: bool) -> list[dict[str, Tensor]]:
    """What each of Meta's files holds: as many files as q/k norms have rows."""
    head = config["hidden_size"] // config["num_attention_heads"]
    ranks = len(weights["model.layers.0.self_attn.q_norm.weight"])
    files: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(head // 2)} for _ in range(ranks)]

    def share(name: str, value: Tensor, dim: int | None) -> None:
        parts = [value] * ranks if dim is None else value.chunk(ranks, dim)
        for file, part in zip(files, parts, strict=True):
            file[name] = part.clone()

    share("tok_embeddings.weight", weights["model.embed_tokens.weight"], 1)
    share("norm.weight", weights["model.norm.weight"], None)
    share("output.weight", weights["lm_head.weight"], 0)
    for number in range(config["num_hidden_layers"]):
        theirs, ours = f"layers.{number}.", f"model.layers.{number}."
        for name, dim in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
            value = weights[f"{ours}self_attn.{name}_proj.weight"]
            share(f"{theirs}attention.w{name}.weight", to_pairs(value, head) if name in "qk" else value, dim)
        for which in "qk":
            for part in ("weight", "bias"):
                rows = to_pairs(weights[f"{ours}self_attn.{which}_norm.{part}"].flatten(), head)
                share(f"{theirs}attention.{which}_normalization.{part}", rows, 0)
        for name, there, dim in (("gate", "w1", 0), ("down", "w2", 1), ("up", "w3", 0)):
            share(f"{theirs}feed_forward.{there}.weight", weights[f"{ours}mlp.{name}_proj.weight"], dim)
        share(f"{theirs}attention_norm.weight", weights[f"{ours}input_layernorm.weight"], None)
        share(f"{theirs}ffn_norm.weight", weights[f"{ours}post_attention_layernorm.weight"], None)
        if fused:
            for file in files:
                for whole, names in (("attention.wqkv", "qkv"), ("feed_forward.w13", "13")):
                    room = whole.split(".")[0]
                    parts = [file.pop(f"{theirs}{room}.w{name}.weight") for name in names]
                    file[f"{theirs}{whole}.weight"] = torch.cat(parts)
    return files


def save_meta(folder: Path, config: Mapping[str, Any], files: list[dict[str, Tensor]]) -> Path:
    """The folder, now as Meta publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "multiple_of": 256,
        "n_heads": config["num_attention_heads"], "norm_eps": config["rms_norm_eps"], "vocab_size": -1,
        "rope_theta": config["rope_theta"], "swin_norm": config["swin_norm"], "qk_normalization": True,
    }  # fmt: skip
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        model["n_kv_heads"] = config["num_key_value_heads"]
    (folder / "params.json").write_text(json.dumps({"seed": 1, "model_parallel_size": 99, "model": model}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": len(files)}))
    for rank, content in enumerate(files):
        name = "consolidated.pth" if len(files) == 1 else f"consolidated.{rank:02d}.pth"
        torch.save(content, folder / name)
    return folder


def meta_logits(files: list[dict[str, Tensor]], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Logits (T, V) of a sequence by Meta's network on all ranks at once; neighbouring numbers turn together."""
    heads, eps = config["num_attention_heads"] // len(files), config["rms_norm_eps"]
    head = config["hidden_size"] // config["num_attention_heads"]
    keys = config["num_key_value_heads"] // len(files)
    turns = torch.arange(len(ids))[:, None] * config["rope_theta"] ** (-torch.arange(0, head, 2) / head)
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]  # (T, 1, d / 2)

    def turned(states: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    def norm(states: Tensor, name: str) -> Tensor:
        return F.rms_norm(states, states.shape[-1:], files[0][name], eps)

    def attention(states: Tensor, here: str) -> Tensor:
        total = torch.zeros_like(states)
        for file in files:
            q, k, v = (states @ file[f"{here}attention.w{name}.weight"].T for name in "qkv")
            shaped = []
            for which, value, count in (("q", q, heads), ("k", k, keys)):
                gain, shift = (file[f"{here}attention.{which}_normalization.{part}"] for part in ("weight", "bias"))
                shaped.append(turned(F.layer_norm(value.unflatten(1, (count, head)), (head,), gain, shift)))
            mixed = F.scaled_dot_product_attention(
                shaped[0].transpose(0, 1)[None], shaped[1].transpose(0, 1)[None],
                v.unflatten(1, (keys, head)).transpose(0, 1)[None], is_causal=True, enable_gqa=True,
            )[0]  # fmt: skip
            total = total + mixed.transpose(0, 1).flatten(1) @ file[f"{here}attention.wo.weight"].T
        return total

    def feed_forward(states: Tensor, here: str) -> Tensor:
        total = torch.zeros_like(states)
        for file in files:
            gate, down, up = (file[f"{here}feed_forward.w{name}.weight"] for name in (1, 2, 3))
            total = total + (F.silu(states @ gate.T) * (states @ up.T)) @ down.T
        return total

    states = torch.cat([file["tok_embeddings.weight"][ids] for file in files], -1)
    for number in range(config["num_hidden_layers"]):
        here = f"layers.{number}."
        for part, name in ((attention, "attention_norm"), (feed_forward, "ffn_norm")):
            if config["swin_norm"]:
                states = states + norm(part(states, here), f"{here}{name}.weight")
            else:
                states = states + part(norm(states, f"{here}{name}.weight"), here)
    return norm(states, "norm.weight") @ torch.cat([file["output.weight"] for file in files]).T
