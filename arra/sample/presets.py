"""How the references draw codes, by name, and by which of them a model paints where neither recipe nor card says.

arra.models --> own_sampling --> SamplingSettings <-- PRESETS (what a user may name instead)
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from arra.errors import ArraError
from arra.models import CausalLM, Painter
from arra.sample.logits import SamplingSettings


@dataclass(frozen=True)
class Preset:
    """Sampling settings that others use, and where they say so."""

    settings: SamplingSettings
    use: str
    """What they are for, in a few words."""
    source: str


PRESETS: Mapping[str, Preset] = {
    "llamagen-c2i": Preset(
        SamplingSettings(cfg_scale=4.0, top_k=2000),
        "classes, pictures to look at",
        "FoundationVision/LlamaGen, autoregressive/sample/sample_c2i.py",
    ),
    "llamagen-fid": Preset(
        SamplingSettings(cfg_scale=1.5),
        "classes, pictures to measure",
        "FoundationVision/LlamaGen, autoregressive/sample/sample_c2i_ddp.py (best in its paper: 2.0 for B, then 1.75)",
    ),
    "arra-fid": Preset(
        SamplingSettings(cfg_scale=2.0), "classes, pictures to measure", "the ARRA paper, appendix 7.2: cfg 2.00"
    ),
    "llamagen-t2i": Preset(
        SamplingSettings(cfg_scale=7.5, top_k=1000),
        "captions",
        "FoundationVision/LlamaGen, autoregressive/sample/sample_t2i.py",
    ),
    "lumina": Preset(
        SamplingSettings(cfg_scale=4.0, top_k=2000),
        "prompts: Lumina-mGPT, ARRA, other language models",
        "Alpha-VLLM/Lumina-mGPT and ARRA, the calls of their inference demos (image_top_k 2000, temperature 1)",
    ),
    "lumina-3": Preset(
        SamplingSettings(cfg_scale=3.0, top_k=2000),
        "prompts, nearer to the data",
        "Alpha-VLLM/Lumina-mGPT and ARRA, inference_solver.py, create_logits_processor's own defaults",
    ),
    "chameleon": Preset(
        SamplingSettings(cfg_scale=3.0, temperature=0.7, top_p=0.9),
        "prompts: Meta's Chameleon, Anole",
        # of its two scales the one for pictures in the prompt (1.2) has nothing to act on where there are none
        "facebookresearch/chameleon, chameleon/inference/chameleon.py, Options.Image (guidance_scale_text)",
    ),
    "plain": Preset(SamplingSettings(), "what was learnt, as it was learnt", "no guidance, no filter"),
}


def find_preset(name: str) -> Preset:
    """The preset.

    Raises:
        ArraError: there is none of this name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ArraError(f"preset '{name}': unknown; {hint}known are {', '.join(PRESETS)}")
    return PRESETS[name]


def own_sampling(model: Painter) -> SamplingSettings:
    """How a model paints that no recipe speaks for: as its card says, else as its family does in the reference.

    Raises:
        ArraError: the card says what are no sampling settings.
    """
    told = model.about.get("sampling")
    try:
        return SamplingSettings(**told) if isinstance(told, dict) else family_default(model)
    except ValidationError as error:
        raise ArraError(
            f"model.json: about.sampling: {error.errors()[0]['msg']}; mend it or save the model again"
        ) from error


def family_default(model: Painter) -> SamplingSettings:
    """How models of this family paint in the reference, for one that neither a recipe nor its card speaks for.

    Language models without a reference of their own paint as Lumina-mGPT does; decoders that read words have none
    either (ours come with a recipe or a card) and paint plainly.
    """
    if isinstance(model, CausalLM):
        return PRESETS["chameleon" if model.layout.family == "chameleon" else "lumina"].settings
    return PRESETS[
        {"class": "llamagen-c2i", "caption": "llamagen-t2i", "text": "plain"}[model.settings.condition]
    ].settings
