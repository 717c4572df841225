"""A decoder's folder that `transformers` loads and samples: `arra export RUN OUT --to hf`.

folder or run of a decoder --> export_decoder --> config.json, generation_config.json, model.safetensors, README.md, our
own card, and the image tokenizer where the folder has one
"""

from dataclasses import replace
from pathlib import Path

import torch

from arra.models import Decoder, load_decoder
from arra.models.hub import Description, model_card, register_with_transformers
from arra.models.language_folder import quiet
from arra.models.llamagen import describe_decoder
from arra.runs import atomic_write, file_hash
from arra.sample.logits import SamplingSettings
from arra.sample.presets import own_sampling
from arra.stages.language_weights import copy_image_tokenizer, new_folder, refuse_existing
from arra.tokenizers.image import EMBEDDED

USAGE = """import arra
from transformers import AutoModelForCausalLM

arra.register_with_transformers()  # the type "arra_decoder" is known from here on
model = AutoModelForCausalLM.from_pretrained("{repo}")
tokens = model.generate(**model.inputs({asked}), guidance_scale={scale})
codes = tokens[:, {prefix}:].unflatten(1, ({height}, {width}))
images = arra.load_tokenizer({tokenizer}).decode(codes)  # uint8 (B, H, W, 3)"""

BY_HAND = """

# the same by hand: ids of classes stand behind those of codes
import torch
tokens = model.generate(torch.tensor([[{label}]]), guidance_scale={scale})"""


def export_decoder(folder: Path, out: Path, *, dtype: torch.dtype | None = None) -> list[tuple[str, str]]:
    """What was written, in words; `out` is a folder that `transformers` and `arra` open. Without a dtype it is kept.

    Raises:
        ArraError: no decoder, `transformers` is missing, or `out` is in use.
    """
    refuse_existing(out)
    register_with_transformers()
    from transformers import GenerationConfig

    from arra.models.transformers_decoder import ArraDecoderForCausalLM

    decoder = load_decoder(folder, dtype=dtype)
    sampling = own_sampling(decoder)
    model = ArraDecoderForCausalLM.of(decoder)
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    drawn |= {"min_p": sampling.min_p} if sampling.min_p else {}
    model.generation_config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        max_new_tokens=decoder.settings.num_positions,
        pad_token_id=model.config.pad_token_id,
        **(drawn if sampling.temperature > 0 else {}),
    )
    with new_folder(out) as place:
        with quiet():
            model.save_pretrained(place)
        copied = copy_image_tokenizer(folder, place)
        about = _described(decoder, sampling, copied=copied)
        card = model_card(about, repo="FOLDER_OR_REPOSITORY", library="transformers")
        atomic_write(place / "README.md", str(card))
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in decoder.state_dict().values()})
    return [
        ("tensors", f"{len(decoder.state_dict())}, {', '.join(kinds)}"),
        ("vocabulary", f"{decoder.settings.num_codes} codes, {model.config.vocab_size} tokens with the condition's"),
        ("image tokenizer", str(out / "tokenizer") if copied else ""),
        ("sha256", file_hash(out / "model.safetensors")),
    ]


def decoder_hint(out: Path) -> str:
    """How others open an exported folder."""
    return (
        f"transformers: arra.register_with_transformers(), then AutoModelForCausalLM.from_pretrained('{out}'); "
        "README.md says the rest"
    )


def _described(decoder: Decoder, sampling: SamplingSettings, *, copied: bool) -> Description:
    """What the README says, lines of Python that load and sample among it."""
    settings, codes_of = decoder.settings, decoder.about.get("codes_of")
    if copied:
        tokenizer = '"{repo}/tokenizer"'
    elif isinstance(codes_of, dict) and codes_of.get("tokenizer") == EMBEDDED:
        tokenizer = f'"{EMBEDDED}"'
    else:
        tokenizer = '"llamagen-vq16", weights="vq_ds16_c2i.pt"'
    label = min(207, settings.num_classes - 1)
    asked = {
        "class": f"labels=[{label}]",
        "text": 'prompts=["a red heart"]',
        "caption": "captions=(features, mask)",  # of the text encoder, (B, W, F) and (B, W)
    }
    usage = USAGE.format(
        repo="{repo}",
        asked=asked[settings.condition],
        scale=sampling.cfg_scale,
        prefix=settings.prefix_length,
        height=settings.grid[0],
        width=settings.grid[1],
        tokenizer=tokenizer,
    )
    if settings.condition == "class" and not settings.rep_token:
        usage += BY_HAND.format(label=settings.num_codes + label, scale=sampling.cfg_scale)
    return replace(describe_decoder(decoder), usage=usage)
