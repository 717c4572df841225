"""A painting language model's exported folder: `transformers` paints with it as we do, and it is still ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arra
from arra.data.layout import ImageLayout
from arra.models import CausalLM, save_model
from arra.sample.generate import generate
from arra.sample.grammar import image_processors, unmask_codes
from arra.sample.logits import SamplingSettings
from arra.stages.painters import load_painter
from arra.stages.weights import export_weights, import_weights
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.prompts import prompt_tokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.models import toy_chameleon
from tests.models.toy_lms import FAMILIES, toy_lm, toy_words

transformers: Any = pytest.importorskip("transformers")

TEXT, CODES, GRID = 300, 24, (2, 3)
PROMPTS = ["a red bar", "the green circle in the middle of it", ""]
LAYOUT = ImageLayout(
    family="generic", bos=0, begin_image=TEXT, end_image=TEXT + 1, new_line=TEXT + 2, first_size=TEXT + 2, num_sizes=8,
    closing=(1,), first_code=TEXT + 11, num_codes=CODES, unconditional="empty_prompt", max_positions=512,
)  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {"gemma2": {"sliding_window": 6}, "mistral": {"sliding_window": 7}}


def painter(family: str) -> CausalLM:
    text = prompt_tokenizer(toy_words().backend_tokenizer.to_str(), reserved=LAYOUT.reserved(), source="toy")
    lm = toy_lm(family, rows=TEXT + 11 + CODES, **WINDOWS.get(family, {}))
    return CausalLM(lm, layout=LAYOUT, grid=GRID, text_tokenizer=text)


def codes_under_transformers(lm: Any, model: CausalLM, **chosen: Any) -> Tensor:
    """Of all prompts in one batch, under greedy choice, or under our draw."""
    assert model.text_tokenizer is not None
    layout, grid = model.layout, model.settings.grid
    rows = [layout.prefix(model.text_tokenizer.encode(layout.text(prompt, grid)), grid) for prompt in PROMPTS]
    width = max(map(len, rows))
    given = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    steps = image_processors(lm, layout, grid=grid, prompt_length=width, **chosen)
    written = lm.generate(
        given, attention_mask=mask, logits_processor=steps, do_sample=False, max_new_tokens=len(layout.image(grid))
    )
    begun = [row[width - len(own) :].tolist() for row, own in zip(written, rows, strict=True)]
    return torch.stack([torch.from_numpy(layout.read_image(row, grid=grid)) for row in begun])


def paints_the_same(lm: Any, model: CausalLM) -> None:
    for scale in (1.0, 2.5):
        ours = generate(model, prompts=PROMPTS, seeds=[0] * 3, cfg_scale=scale, temperature=0).codes
        assert torch.equal(codes_under_transformers(lm, model, cfg_scale=scale), ours)
    drawn = SamplingSettings(cfg_scale=2.0, cfg_schedule="linear", top_k=10)
    ours = generate(model, prompts=PROMPTS, seeds=[4, 5, 6], **drawn.model_dump()).codes
    assert torch.equal(codes_under_transformers(lm, model, sampling=drawn, seeds=[4, 5, 6]), ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_paints_the_same(family: str, tmp_path: Path) -> None:
    model = painter(family)
    save_model(model, tmp_path / "model")
    export_weights(tmp_path / "model", tmp_path / "exported", to="hf")
    paints_the_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), model)


@pytest.mark.parametrize("layout", ["lumina", "chameleon"])
def test_chameleons_kin_paint_the_same(layout: str, tmp_path: Path) -> None:
    """Norms that heads share are written out; codes get their scores once they are unmasked."""
    fields = toy_chameleon.config()
    toy_chameleon.save(tmp_path / "source", fields, toy_chameleon.state(fields, rows=2))
    toy_chameleon.text_tokenizer(tmp_path / "source" / "tokenizer.json")
    import_weights(tmp_path / "source", tmp_path / "model", image_size=64, layout=layout)
    export_weights(tmp_path / "model", tmp_path / "exported")
    model = arra.load_model(tmp_path / "model")
    assert isinstance(model, CausalLM)
    lm = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "exported")
    unmask_codes(lm)
    paints_the_same(lm, model)


def test_the_folder_is_ours_as_well(tmp_path: Path) -> None:
    """Card and image tokenizer go along, and others may read what they may read of the rest."""
    model = painter("llama")
    save_model(model, tmp_path / "model")
    vq = VQModel(VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=CODES, code_dim=4))
    ImageTokenizer(vq, name="tiny", weights_hash=None).save(tmp_path / "model" / "tokenizer")
    export_weights(tmp_path / "model", tmp_path / "exported", dtype="float32")
    loaded = load_painter(tmp_path / "exported")
    assert loaded.tokenizer.name == "tiny"
    for folder in ("model", "exported"):
        assert len({file.stat().st_mode for file in (tmp_path / folder).glob("*.*")}) == 1
    assert loaded.model.settings == model.settings
    ours = generate(model, prompts=PROMPTS, seeds=[0, 1, 2]).codes
    assert torch.equal(generate(loaded.model, prompts=PROMPTS, seeds=[0, 1, 2]).codes, ours)
