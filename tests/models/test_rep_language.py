"""The REP token of language models: right before the image, in training, sampling and `transformers` own generation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from arra.data.language import LayoutWriter, PromptConditions
from arra.data.layout import ImageLayout
from arra.models import CausalLM, load_model, save_model
from arra.sample.generate import generate
from arra.sample.grammar import image_processors
from arra.tokenizers.prompts import prompt_tokenizer
from tests.models.toy_lms import toy_lm, toy_words

GRID, POSITIONS = (3, 4), 12
TEXT, CODES = 300, 24
REP = TEXT + 11 + CODES
ASKED = ["a red bar", "the green circle in the middle of it", ""]


def layout(**changes: Any) -> ImageLayout:
    fields: dict[str, Any] = {
        "family": "generic", "bos": 0, "begin_image": TEXT, "end_image": TEXT + 1, "new_line": TEXT + 2,
        "first_size": TEXT + 2, "num_sizes": 8, "closing": (1,), "first_code": TEXT + 11, "num_codes": CODES,
        "unconditional": "empty_prompt", "max_positions": 512, "rep": REP,
    }  # fmt: skip
    return ImageLayout(**{**fields, **changes})


FORMS = {
    "empty prompt": layout(),
    "image only": layout(unconditional="image_only", separator=1),
    "no sides": layout(first_size=None, num_sizes=0, new_line=None, closing=()),
}


def painter(written: ImageLayout) -> CausalLM:
    text = prompt_tokenizer(toy_words().backend_tokenizer.to_str(), reserved=written.reserved(), source="toy")
    return CausalLM(toy_lm("llama", rows=REP + 1), layout=written, grid=GRID, text_tokenizer=text)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_language_models_paint_what_teacher_forcing_says(form: str) -> None:
    """Guided and not; and the null row is the sequence that training writes of a dropped prompt."""
    model = painter(FORMS[form])
    result = generate(model, prompts=ASKED, seeds=[0, 1, 2], temperature=0.0)
    logits = model.logits(result.codes, prompts=ASKED)
    assert torch.equal(logits.argmax(-1).view_as(result.codes), result.codes)
    guided = generate(model, prompts=ASKED, seeds=[0, 1, 2], temperature=0.0, cfg_scale=2.5)
    cond = model.logits(guided.codes, prompts=ASKED)
    nulls = [model.layout.sequence(None, codes.numpy()) for codes in guided.codes]
    tokens = torch.stack([torch.from_numpy(each.tokens) for each in nulls])
    mask = torch.stack([torch.from_numpy(each.code_mask) for each in nulls])
    hidden = model(tokens[:, :-1]).last_hidden[mask[:, 1:]].view(3, POSITIONS, -1)
    uncond = model.head(hidden)
    assert torch.equal((uncond + (cond - uncond) * 2.5).argmax(-1).view_as(guided.codes), guided.codes)


@pytest.mark.parametrize("form", FORMS)
def test_the_states_of_a_language_models_batch(form: str) -> None:
    """REP is one row's only token of its kind, right before begin-image; the aligned state is its own in any batch."""
    model = painter(FORMS[form])
    assert model.text_tokenizer is not None
    ids = tuple([[model.text_tokenizer.encode(prompt)] for prompt in ASKED] for _ in range(1))
    conditions = PromptConditions(ids, (GRID,), dropout=0.5)
    chance = torch.tensor([[0.9] * 3, [0.9] * 3, [0.1] * 3])
    prefix = conditions.take(torch.arange(3), chance, torch.ones(3, 1))
    codes = torch.randint(CODES, (3, POSITIONS), generator=torch.Generator().manual_seed(1))
    batch = LayoutWriter(model.layout)(prefix, codes)
    assert batch.grid == GRID
    assert batch.rep_mask is not None
    assert torch.equal(batch.rep_mask, batch.tokens == REP)
    assert batch.rep_mask.sum(1).tolist() == [1, 1, 1]
    assert (batch.tokens[:, 1:][batch.rep_mask[:, :-1]] == TEXT).all()
    together = model(batch.tokens[:, :-1], capture=(1,)).captured[1][batch.rep_mask[:, :-1]]
    told = model.condition(prompts=ASKED)
    null = model.null_condition(told)
    opening = len(model.layout.opening(GRID)) + 1
    for row, condition in ((0, told), (1, told), (2, null)):
        alone = model(condition.tokens, prefix_mask=condition.prefix_mask, capture=(1,)).captured[1]
        assert (condition.tokens[:, -opening] == REP).all()
        torch.testing.assert_close(together[row], alone[row, -opening], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_transformers_own_generation_writes_it() -> None:
    """The grammar forces REP and begin-image behind a bare prompt, and the picture is ours."""
    model = painter(FORMS["empty prompt"])
    prompt = [0, *model.text_tokenizer.encode(ASKED[0])]  # type: ignore[union-attr]
    processors = image_processors(model.lm, model.layout, grid=GRID, prompt_length=len(prompt), cfg_scale=2.5)
    length = len(model.layout.image(GRID)) + 2
    out = model.lm.generate(  # type: ignore[operator]
        torch.tensor([prompt]), logits_processor=processors, do_sample=False, max_new_tokens=length
    )
    ours = generate(model, prompts=ASKED[:1], seeds=[0], temperature=0.0, cfg_scale=2.5).codes[0]
    expected = model.layout.sequence(prompt[1:], ours.numpy()).tokens.tolist()
    assert out[0].tolist() == expected


def test_a_language_models_folder_says_whether_it_writes_it(tmp_path: Path) -> None:
    for name, written in (("without", layout(rep=None, rep_id=REP)), ("with", layout(rep_id=REP))):
        model = load_model(save_model(painter(written), tmp_path / name))
        assert isinstance(model, CausalLM)
        assert model.layout == written
        told = model.condition(prompts=ASKED)
        assert (told.tokens == REP).sum(1).tolist() == [int(name == "with")] * 3
