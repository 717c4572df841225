"""A painter's folder without `arra.generate`: `transformers` decodes, our processors keep it to the grammar.

The seed's picture is the one that `arra.generate` paints; a Chameleon is opened by
`ChameleonForConditionalGeneration`, and `arra.sample.grammar.unmask_codes(lm)` lets it paint.

python examples/hf_generate.py runs/painter openmoji-vq4 painted "a red heart" "a green apple"
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM

import arra
from arra.models.language_folder import read_language_card
from arra.sample.grammar import image_processors
from arra.sample.logits import SamplingSettings


def main(folder: str, tokenizer: str, out: str, *prompts: str) -> None:
    """Nothing; the folder `out` holds 0.png, 1.png, ..., one for each prompt."""
    lm, images = AutoModelForCausalLM.from_pretrained(folder).eval(), arra.load_tokenizer(tokenizer)
    card = read_language_card(Path(folder))
    layout, grid = card.settings.layout, card.settings.grid
    Path(out).mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        asked = torch.tensor([layout.prefix(card.text.encode(layout.text(prompt, grid)), grid)])
        written = lm.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            logits_processor=image_processors(
                lm,
                layout,
                grid=grid,
                prompt_length=asked.shape[1],
                sampling=SamplingSettings(cfg_scale=2.0, temperature=0.7),
                seeds=[number],
            ),
            do_sample=False,  # a processor draws
            max_new_tokens=len(layout.image(grid)),
        )
        codes = torch.from_numpy(layout.read_image(written[0].tolist()))
        Image.fromarray(images.decode(codes[None])[0].numpy()).save(Path(out) / f"{number}.png")


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
