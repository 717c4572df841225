"""Language models of toy size and random weights, in Hugging Face folders, with a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["a red bar on the left", "the green circle in the middle", "an orange frame on the right", "blue squares"]
SPECIAL = ("<|begin|>", "<|end|>")
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "smollm": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "mistral": {"tie_word_embeddings": False},
    "gpt2": {},
    "phi": {"tie_word_embeddings": False},
    "cohere": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "falcon": {},
}
"""Phi's head has a bias, Cohere's and Granite's a scale, Gemma's a soft cap."""


def toy_words() -> Any:
    """A byte-level `transformers` tokenizer of 300 tokens, two of them special."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def toy_lm(family: str, *, rows: int, seed: int = 0, **changes: Any) -> Any:
    """A causal LM with so many embeddings, all weights random and of a size that tells them apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"smollm": "llama"}.get(family, family)
    config = AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES.get(family, {}), "vocab_size": rows, **changes})
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in lm.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return lm


def save_toy_lm(folder: Path, family: str = "llama", *, padding: int = 0, **changes: Any) -> Path:
    """The folder, now an LM of the family with `padding` embeddings more than its tokenizer has ids."""
    words = toy_words()
    toy_lm(family, rows=len(words) + padding, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
