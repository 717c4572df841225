"""A folder of FLAN-T5 in Hugging Face layout: the real architecture and a real unigram tokenizer, of toy size."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = ("red", "green", "blue", "circle", "square", "bar", "frame", "left", "right", "middle", "a", "photo", "of")
SETTINGS = {
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def make_toy_t5(folder: Path, *, d_model: int = 512, seed: int = 0, shard_size: str = "5GB") -> Path:
    """A whole encoder-decoder as `transformers` writes it; 512 is the width of flan-t5-small, 2048 that of -xl."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    network = T5ForConditionalGeneration(T5Config(d_model=d_model, **SETTINGS))
    with torch.no_grad():  # fresh networks have equal norms, and attention that hardly looks anywhere
        for name, value in network.named_parameters():
            value.copy_(1 + 0.1 * torch.randn_like(value) if "layer_norm" in name else 3 * value)
    network.save_pretrained(folder, max_shard_size=shard_size)
    unigram_tokenizer().save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "extra_ids": 0, "model_max_length": 512}))
    return folder


def unigram_tokenizer() -> Tokenizer:
    """Whole words with a blank before them, single letters, and T5's three special pieces first."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.1 * place) for place, word in enumerate(WORDS)]
    pieces += [(letter, -6.0 - 0.1 * place) for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789.,:-'")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    split = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
