"""Autoregressive text-to-image models with representation alignment: data, training, generation, evaluation, reports.

    tokenizer = arra.load_tokenizer("openmoji-vq4")
    model = arra.load_model("runs/demo/aligned")
    result = arra.generate(model, tokenizer, prompts=["a red heart on fire"], seeds=[0])

Names are resolved on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arra.align import Alignment
    from arra.encoders import clean_caption, load_encoder, load_text_encoder
    from arra.errors import ArraError
    from arra.models import load_model, save_model
    from arra.models.hub import register_with_transformers
    from arra.sample.generate import generate
    from arra.tokenizers import load_tokenizer

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "ArraError",
    "clean_caption",
    "generate",
    "load_encoder",
    "load_model",
    "load_text_encoder",
    "load_tokenizer",
    "register_with_transformers",
    "save_model",
]

_HOMES = {
    "Alignment": "arra.align",
    "ArraError": "arra.errors",
    "clean_caption": "arra.encoders",
    "generate": "arra.sample.generate",
    "load_encoder": "arra.encoders",
    "load_model": "arra.models",
    "load_text_encoder": "arra.encoders",
    "load_tokenizer": "arra.tokenizers",
    "register_with_transformers": "arra.models.hub",
    "save_model": "arra.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arra' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
