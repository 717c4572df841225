"""Guidance, grammar and top-k of generation against the processors of Lumina-mGPT (see arra/README.md)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.sample.grammar import Guidance, ImageGrammar, InterleavedTopK, Processor, image_processors, image_state
from arra.sample.logits import SamplingSettings
from arra.tokenizers.vocabulary import chameleon_code_name, lumina_layout

with np.load(Path(__file__).parent / "arra" / "logits_processors.npz") as stored:
    GOLD = {name: np.asarray(stored[name]) for name in stored.files}
NAMES = {"<s>": 0, "<eoss>": 8196, "<racm3:break>": 8197} | {
    chameleon_code_name(code): 4 + code for code in range(8192)
}
NAMES |= {f"<reserved{number:05d}>": number + 4 for number in range(8194, 8864)}
LAYOUT = lumina_layout(NAMES)
SEQUENCE = GOLD["sequence"].tolist()
COND, UNCOND = (torch.from_numpy(GOLD[name]) for name in ("cond", "uncond"))
LENGTHS = range(1, len(SEQUENCE) + 1)
SCALE, IMAGE_TOP_K, TEXT_TOP_K = GOLD["params_scale_imagetopk_texttopk"].tolist()


class Model:
    """Says `uncond` of everything, and notes what it is asked."""

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []
        self.masks: list[int] = []

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any, **told: Any) -> Any:
        (tokens,) = input_ids.tolist()
        self.contexts.append(tokens)
        self.masks.append(attention_mask.shape[1])
        assert (past_key_values is None) == (len(tokens) == attention_mask.shape[1])
        return SimpleNamespace(logits=UNCOND.expand(1, len(tokens), -1), past_key_values="cache")


def run(processors: list[Processor], length: int) -> Tensor:
    """The scores after the first tokens of the sequence."""
    ids, scores = torch.tensor([SEQUENCE[:length]]), COND[None]
    for process in processors:
        scores = process(ids, scores)
    return scores[0]


def chain(kind: str, model: Model) -> list[Processor]:
    guidance, grammar, top_k = image_processors(
        model, LAYOUT, cfg_scale=SCALE, image_top_k=int(IMAGE_TOP_K), text_top_k=int(TEXT_TOP_K)
    )
    return {"cfg": [guidance], "grid": [grammar], "topk": [top_k], "chain": [guidance, grammar, top_k]}[kind]


@pytest.mark.parametrize("kind", ["cfg", "grid", "topk", "chain"])
@pytest.mark.parametrize("fresh", [True, False])
def test_allowed_ids(kind: str, fresh: bool) -> None:
    """Ties at the border of top-k too; new processors for each length and the same ones for all give the same."""
    allowed = np.unpackbits(GOLD[f"{kind}/allowed_packed"], axis=1)[:, : len(COND)].astype(bool)
    processors = chain(kind, Model())
    for length in LENGTHS:
        scores = run(chain(kind, Model()) if fresh else processors, length)
        assert (scores.isfinite().numpy() == allowed[length - 1]).all(), length


def test_forced_ids_and_codes() -> None:
    states = [image_state(LAYOUT, SEQUENCE[:length]) for length in LENGTHS]
    assert [-1 if state.forced is None else state.forced for state in states] == GOLD["forced_id"].tolist()
    assert [state.codes_only for state in states] == GOLD["codes_only"].tolist()
    assert [state.guided for state in states] == GOLD["guided"].tolist()
    lengths = [0 if not state.guided else n - (state.start or 0) for n, state in zip(LENGTHS, states, strict=True)]
    assert lengths == GOLD["uncond_context_length"].tolist()


def test_guided_scores() -> None:
    for scale, name in [(1.0, "cfg/scale1_guided_value"), (3.0, "cfg/scale3_guided_value"), (4.0, "cfg/guided_value")]:
        guidance = Guidance(Model(), grammar=ImageGrammar(LAYOUT), sampling=SamplingSettings(cfg_scale=scale))
        for length, guided in zip(LENGTHS, GOLD["guided"], strict=True):
            expected = torch.from_numpy(GOLD[name]) if guided else COND
            torch.testing.assert_close(run([guidance], length), expected, atol=3e-4, rtol=0)


def test_what_the_unconditional_model_sees() -> None:
    """All from begin-image on, then one token a step; anew for the next image."""
    model = Model()
    for length in LENGTHS:
        run(chain("cfg", model), length)  # a new one each time sees it all
    guided: list[int] = (np.flatnonzero(GOLD["guided"]) + 1).tolist()
    assert [len(context) for context in model.contexts] == [
        GOLD["uncond_context_length"][length - 1] for length in guided
    ]
    for length, context in zip(guided, model.contexts, strict=True):
        assert context == SEQUENCE[length - len(context) : length]
    assert model.contexts[0] == GOLD["uncond_first_context"].tolist()
    model = Model()
    guidance = chain("cfg", model)
    for length in LENGTHS:
        run(guidance, length)
    assert [len(context) for context in model.contexts] == GOLD["uncond_calls_sequential"].tolist()
    assert model.masks == GOLD["uncond_calls_mask_length"].tolist()


def test_scores_in_full() -> None:
    for length, expected in zip(GOLD["chain/picked_lengths"], GOLD["chain/picked_values"], strict=True):
        scores = run(chain("chain", Model()), length)
        torch.testing.assert_close(scores, torch.from_numpy(expected), atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in GOLD if name.startswith("walk_")])
def test_walks(name: str) -> None:
    """From the sides to the end, whatever codes are drawn."""
    height, width = (int(side) for side in name.split("_")[1].split("x"))
    tokens = [8197, 8804 + height, 8804 + width]
    draws = np.random.default_rng(0)
    for expected in GOLD[name].tolist():
        state = image_state(LAYOUT, tokens)
        assert (-1 if state.forced is None else state.forced) == expected
        assert state.codes_only == (expected == -1)
        assert state.grid == (2 * height, 2 * width)
        tokens.append(int(draws.integers(4, 8196)) if state.forced is None else state.forced)
    assert tokens[-1] == 8196
    assert image_state(LAYOUT, tokens).start is None
    assert LAYOUT.read_image(tokens).shape == (2 * height, 2 * width)


@pytest.mark.parametrize("name", [name.split("/")[0] for name in GOLD if name.endswith("/guided_logits")])
def test_greedy_images(name: str) -> None:
    """What the reference's `generate` chose, step by step, of the guided scores it saw."""
    tokens = GOLD[f"{name}/prompt"].tolist()
    grammar, top_k = ImageGrammar(LAYOUT), InterleavedTopK(LAYOUT, 2000, 10)
    for guided, chosen in zip(GOLD[f"{name}/guided_logits"], GOLD[f"{name}/tokens"].tolist(), strict=True):
        ids = torch.tensor([tokens])
        assert image_state(LAYOUT, tokens).guided
        tokens.append(int(top_k(ids, grammar(ids, torch.from_numpy(guided)[None])).argmax()))
        assert tokens[-1] == chosen
    height, width = (int(side) for side in name.split("_")[2].split("x"))
    assert LAYOUT.read_image(tokens).shape == (2 * height, 2 * width)


@pytest.mark.parametrize("name", [name.split("/")[0] for name in GOLD if name.endswith("/prompt")])
def test_images_of_the_references_generate(name: str) -> None:
    """Every token that it chose is one that may stand there, with and without guidance."""
    tokens = GOLD[f"{name}/prompt"].tolist()
    for chosen in GOLD[f"{name}/tokens"].tolist():
        state = image_state(LAYOUT, tokens)
        assert state.forced in (None, chosen)
        assert state.codes_only == (4 <= chosen < 8196)
        tokens.append(chosen)
    height, width = (int(side) for side in name.split("_")[2].split("x"))
    assert LAYOUT.read_image(tokens).shape == (2 * height, 2 * width)
    assert image_state(LAYOUT, tokens).start is None
