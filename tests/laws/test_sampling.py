"""Laws of sampling for every family of models: what is cached, shared, given or guided never changes a picture.

Letters: N images, P codes of each, K codes of the vocabulary, R rows.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arra.data.layout import ImageLayout
from arra.models import CausalLM, Condition, Painter
from arra.models.decoder import Decoder, DecoderSettings
from arra.sample.decoding import FREE
from arra.sample.generate import Engine, GenerationResult, generate
from arra.sample.logits import SamplingSettings
from tests.models.toy_lms import toy_lm

GRID, P = (2, 4), 8
TEXT, CODES = 40, 24
PROMPTS = ["abc", "q", "abcdef"]


class Letters:
    """A text tokenizer: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 28 for letter in prompt]

    def save(self, path: Path) -> None:
        raise NotImplementedError


def decoder(condition: str, **changes: Any) -> Decoder:
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "grid": GRID}
    fields |= {"num_codes": CODES, "num_classes": 9, "condition": condition, **changes}
    if condition == "text":
        fields |= {"text_vocab_size": 30, "prefix_length": 7}
    if condition == "caption":
        fields |= {"caption_dim": 10, "prefix_length": 4}
    torch.manual_seed(3)
    model = Decoder(DecoderSettings(**fields))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.text_tokenizer = Letters()
    return model.eval()


def language_model(family: str, *, unconditional: Any = "empty_prompt", **changes: Any) -> CausalLM:
    layout = ImageLayout(
        family="generic",
        bos=0,
        begin_image=TEXT,
        end_image=TEXT + 1,
        new_line=TEXT + 2,
        first_size=TEXT + 2,
        num_sizes=8,
        closing=(1,),
        first_code=TEXT + 11,
        num_codes=CODES,
        unconditional=unconditional,
        max_positions=512,
    )
    lm = toy_lm(family, rows=TEXT + 11 + CODES, **changes)
    return CausalLM(lm, layout=layout, grid=GRID, text_tokenizer=Letters())


MAKERS: dict[str, Callable[[], Painter]] = {
    "class": lambda: decoder("class", rep_token=True),
    "text": lambda: decoder("text"),
    "caption": lambda: decoder("caption"),
    "llama": lambda: language_model("llama", unconditional="image_only"),
    "gpt2": lambda: language_model("gpt2"),
    "gemma2": lambda: language_model("gemma2", sliding_window=6),
}
KEEPING = [name for name in MAKERS if name != "gemma2"]
"""Whose memory keeps everything; a sliding window does not."""


def conditions(model: Painter) -> dict[str, Any]:
    """Three different conditions."""
    kind = model.settings.condition
    if kind == "class":
        return {"labels": [3, 0, 8]}
    if kind == "caption":
        features = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(1))
        return {"captions": (features, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]))}
    return {"prompts": PROMPTS}


def one_condition(model: Painter, index: int) -> dict[str, Any]:
    """One of the three alone."""
    told = conditions(model)
    if "captions" in told:
        features, mask = told["captions"]
        return {"captions": (features[[index]], mask[[index]])}
    return {name: [values[index]] for name, values in told.items()}


def painted(model: Painter, **told: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """Codes (N, P) of one batch, and the logits (N, K) that each of them was taken from."""
    seen: dict[int, Tensor] = {}
    result = generate(model, watch=lambda first, index, logits: seen.__setitem__(index, logits.clone()), **told)
    return result.codes.flatten(1), seen


@torch.no_grad()
def null_logits(model: Painter, codes: Tensor, told: dict[str, Any]) -> Tensor:
    """(N, P, K): the unconditional twin's logits of every code, all from one pass over the codes behind its prefix."""
    null = model.null_condition(model.condition(**told), grid=GRID)
    memory: Any
    memory, first = model.prefill(null, codes[:, :0], grid=GRID)
    if model.keeps_all:
        memory = memory.spread(torch.arange(len(null)), length=model.memory_length(null, GRID))
    rest = model.decode(null, memory, codes=codes[:, :-1], index=0, grid=GRID, every=True)
    return torch.cat([first[:, None], rest], 1)


class Calls:
    """What a model is asked for while it paints."""

    def __init__(self, model: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefills: list[tuple[int, int]] = []
        """Rows and codes."""
        self.steps: list[tuple[int, int, int]] = []
        """Rows, the first code that is read, and how many."""
        prefill, decode = model.prefill, model.decode

        def noted_prefill(rows: Condition, codes: Tensor, **told: Any) -> Any:
            assert len(rows) == len(codes)
            self.prefills.append((len(rows), codes.shape[1]))
            return prefill(rows, codes, **told)

        def noted_decode(rows: Condition, *args: Any, codes: Tensor, index: int, **told: Any) -> Any:
            assert len(rows) == len(codes)
            self.steps.append((len(codes), index, codes.shape[1]))
            return decode(rows, *args, codes=codes, index=index, **told)

        monkeypatch.setattr(model, "prefill", noted_prefill)
        monkeypatch.setattr(model, "decode", noted_decode)


@pytest.fixture(params=[*MAKERS], scope="module")
def model(request: pytest.FixtureRequest) -> Painter:
    return MAKERS[request.param]()


@pytest.fixture(params=KEEPING, scope="module")
def keeping(request: pytest.FixtureRequest) -> Painter:
    return MAKERS[request.param]()


SCHEDULES: dict[str, dict[str, Any]] = {
    "off": {},
    "constant": {"cfg_scale": 2.5},
    "the middle": {"cfg_scale": 0.3, "cfg_start": 0.3, "cfg_stop": 0.7},
    "linear": {"cfg_scale": 4.0, "cfg_schedule": "linear"},
    "cosine": {"cfg_scale": 4.0, "cfg_schedule": "cosine", "cfg_power": 2.0, "cfg_stop": 0.8},
}


@pytest.mark.parametrize("schedule", [*SCHEDULES])
@torch.no_grad()
def test_every_code_is_drawn_from_the_whole_pass_under_its_own_scale(
    model: Painter, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Null rows are read from the first guided code to the last, and for no other."""
    settings, told = SCHEDULES[schedule], conditions(model)
    scales = SamplingSettings(**settings).cfg_scales(P)
    with monkeypatch.context() as patch:
        calls = Calls(model, patch)
        codes, seen = painted(model, seeds=[5, 6, 7], **told, **settings)
    assert sorted(seen) == list(range(P))
    assert len(codes.unique(dim=0)) == 3
    cond, null = model.logits(codes, **told), null_logits(model, codes, told)
    for index, scale in enumerate(scales):
        expected = null[:, index] + scale * (cond[:, index] - null[:, index])
        torch.testing.assert_close(seen[index], expected, atol=3e-4, rtol=1e-3)
    guided = [index for index, scale in enumerate(scales) if scale != 1]
    # a memory that forgets must have its null rows from the beginning
    first = min(guided, default=P) if model.keeps_all else 0
    expected_rows = [6 if guided and first <= index <= guided[-1] else 3 for index in range(1, P)]
    assert calls.steps == [(rows, index, 1) for index, rows in enumerate(expected_rows)]


def test_a_picture_belongs_to_its_condition_and_seed(model: Painter) -> None:
    """Whatever the batch size, the order, and the other pictures."""
    given: dict[str, Any] = {"cfg_scale": 3.0, "cfg_stop": 0.6, "temperature": 1.1, "top_p": 0.97}
    whole = generate(model, seeds=[0, 1], batch_size=6, **conditions(model), **given).codes
    assert len(whole.flatten(1).unique(dim=0)) == 6
    assert torch.equal(generate(model, seeds=[0, 1], batch_size=4, **conditions(model), **given).codes, whole)
    for index in range(3):
        alone = generate(model, seeds=[1], **one_condition(model, index), **given).codes
        assert torch.equal(alone[0], whole[2 * index + 1])
    with Engine(model, settings=SamplingSettings(**given), batch_size=3) as engine:
        again = [engine.generate(seeds=[seed], **conditions(model)).codes for seed in (1, 0)]
    assert torch.equal(torch.cat(again), whole[[1, 3, 5, 0, 2, 4]])


def test_a_prefix_is_read_once_for_all_its_seeds(keeping: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all batches together; so is the null row, where it is the same for all."""
    calls = Calls(keeping, monkeypatch)
    generate(keeping, seeds=range(2), batch_size=4, **conditions(keeping), cfg_scale=2.0)
    nulls = 3 if keeping.settings.condition == "caption" else 1  # under the masks of their captions
    assert sum(rows for rows, _ in calls.prefills) == 3 + nulls
    assert {count for _, count in calls.prefills} == {0}
    calls.prefills.clear()
    generate(keeping, seeds=range(2), batch_size=4, **conditions(keeping))
    assert sum(rows for rows, _ in calls.prefills) == 3


FREE_PLACES = {"some": [2, 4, 5, 7], "first and last": [0, 7]}


@pytest.mark.parametrize("free", [*FREE_PLACES.values()], ids=[*FREE_PLACES])
def test_given_codes_stay_and_are_read_together(
    model: Painter, free: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {**conditions(model), "seeds": [5, 6, 7], "cfg_scale": 2.0}
    codes = generate(model, **told).codes.flatten(1)
    given = codes.clone()
    given[:, free] = FREE
    calls = Calls(model, monkeypatch)
    found, seen = painted(model, **told, given_codes=given)
    assert torch.equal(found, codes)  # what is painted between is what was there
    assert sorted(seen) == free
    assert {count for _, count in calls.prefills} == {free[0]}
    assert calls.steps == [(6, index, until - index) for index, until in itertools.pairwise(free)]


def test_a_beginning_is_read_once_for_the_images_that_share_it(
    keeping: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, begun = one_condition(keeping, 1), torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    given = torch.cat([begun, torch.full((3, P - 3), FREE)], 1)
    with monkeypatch.context() as patch:
        calls = Calls(keeping, patch)
        found = generate(keeping, **told, seeds=[5, 6, 7], given_codes=given, cfg_scale=2.0).codes
    assert calls.prefills == [(4, 3)]  # for the condition and for its null row
    for row in range(3):
        alone = generate(keeping, **told, seeds=[5 + row], given_codes=given[[row]], cfg_scale=2.0).codes
        assert torch.equal(found[[row]], alone)


def test_codes_may_be_given_for_some_images_alone(model: Painter) -> None:
    told: dict[str, Any] = {**conditions(model), "seeds": [5, 6, 7], "cfg_scale": 2.0}
    codes = generate(model, **told).codes.flatten(1)
    given = torch.full_like(codes, FREE)
    given[1, 3:6], given[2, 0] = codes[1, 3:6], (codes[2, 0] + 1) % CODES
    found = generate(model, **told, given_codes=given).codes.flatten(1)
    assert torch.equal(found[:2], codes[:2])
    assert found[2, 0] == given[2, 0]
    alone = generate(model, **one_condition(model, 2), seeds=[7], cfg_scale=2.0, given_codes=given[[2]])
    assert torch.equal(found[[2]], alone.codes.flatten(1))
    shared = generate(model, **told, given_codes=given[[1]]).codes.flatten(1)
    assert torch.equal(shared[:, 3:6], codes[[1], 3:6].expand(3, -1))


def test_a_picture_that_is_given_costs_nothing(model: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(model, monkeypatch)
    given = torch.arange(P)[None]
    result: GenerationResult = generate(model, **conditions(model), seeds=[5, 6, 7], cfg_scale=2.0, given_codes=given)
    assert torch.equal(result.codes.flatten(1), given.expand(3, -1))
    assert not calls.prefills
    assert not calls.steps


def test_the_head_computes_what_is_drawn_and_nothing_else() -> None:
    model, rows = decoder("text"), []
    model.output.register_forward_pre_hook(lambda layer, given: rows.append(given[0].shape[:-1].numel()))
    given = torch.arange(P)[None].repeat(4, 1)
    given[:, [2, 5, 6]] = FREE
    generate(model, prompts=["a", "b", "c", "d"], seeds=[0, 1, 2, 3], given_codes=given)
    assert rows == [4, 4, 4]
