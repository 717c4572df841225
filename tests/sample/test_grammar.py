"""Images through the `generate()` of transformers: always finished, guided as ours are, each row on its own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arra.data.layout import Grid, ImageLayout
from arra.errors import ArraError
from arra.models.causal import CausalLM
from arra.sample.generate import generate
from arra.sample.grammar import (
    ImageGrammar,
    InterleavedTopK,
    image_processors,
    image_state,
    unconditional_context,
    unmask_codes,
)
from arra.sample.logits import SamplingSettings

transformers: Any = pytest.importorskip("transformers")

NUM_TEXT = 20
IDS: dict[str, Any] = {"bos": 1, "begin_image": 20, "end_image": 21, "first_code": 40, "num_codes": 9, "closing": (2,)}
GENERIC = ImageLayout(family="generic", new_line=30, first_size=22, num_sizes=6, unconditional="empty_prompt", **IDS)
LUMINA = GENERIC.model_copy(
    update={"family": "lumina", "separator": 3, "closing": (3,), "unconditional": "image_only", "size_step": 2}
)
CHAMELEON = ImageLayout(family="chameleon", separator=3, **{**IDS, "closing": ()})
LAYOUTS: dict[str, ImageLayout] = {layout.family: layout for layout in (GENERIC, LUMINA, CHAMELEON)}
PROMPTS = [[5, 6, 7, 8], [9], []]
CHOSEN = ("cfg_scale", "image_top_k", "text_top_k", "sampling", "seeds")


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A model that learns a vector for each position, so that their numbers matter."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def painted(lm: Any, layout: ImageLayout, rows: list[list[int]], grid: Grid, **options: Any) -> list[list[int]]:
    """What `generate` writes behind the rows."""
    given = padded(rows)
    width = given["input_ids"].shape[1]
    chosen = {name: options.pop(name) for name in CHOSEN if name in options}
    steps = image_processors(lm, layout, grid=grid, prompt_length=width, **chosen)
    options = {"do_sample": False, "max_new_tokens": len(layout.image(grid)) + len(layout.closing), **options}
    out = lm.generate(**given, logits_processor=transformers.LogitsProcessorList(steps), **options)
    written: list[list[int]] = out[:, width:].tolist()
    return written


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_finished_image_always_results(llama: Any, cfg_scale: float, grid: Grid) -> None:
    """From any prompt, in a batch, drawn at a high temperature: what follows is an image, then its closing."""
    torch.manual_seed(1)
    rows = [[1, *prompt] for prompt in PROMPTS]
    options: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    found = painted(llama, GENERIC, rows, grid, cfg_scale=cfg_scale, **options)
    for tokens in found:
        assert GENERIC.read_image(tokens).shape == grid
        assert tokens == GENERIC.sequence([], GENERIC.read_image(tokens)).tokens.tolist()[1:]
    assert len({tuple(tokens) for tokens in found}) > 1 or grid == (1, 1)


def greedy(lm: Any, layout: ImageLayout, prompt: list[int], grid: Grid, cfg_scale: float) -> list[int]:
    """The codes, by the plain way: two whole forward passes a code, nothing kept."""
    ids, codes = layout.code_ids(), []
    rows = [layout.prefix(prompt, grid), layout.prefix(None, grid)]
    with torch.no_grad():
        for index in range(grid[0] * grid[1]):
            cond, uncond = (lm(torch.tensor([row])).logits[0, -1, ids] for row in rows)
            codes.append(int((uncond + (cond - uncond) * cfg_scale).argmax()))
            rows = [[*row, int(ids[codes[-1]]), *layout.after(index, grid)] for row in rows]
    return codes


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("network", ["llama", "gpt2"])
def test_greedy_images_are_the_plain_ways(
    request: pytest.FixtureRequest, network: str, family: str, opened: bool
) -> None:
    """Prompts of different lengths beside each other; the image begun by the caller or by the grammar."""
    lm = request.getfixturevalue(network)
    layout, grid = LAYOUTS[family], (4, 2)
    rows = [layout.prefix(prompt, grid) for prompt in PROMPTS]
    opening = len(layout.opening(grid))
    given = rows if opened else [row[:-opening] for row in rows]
    for prompt, tokens in zip(PROMPTS, painted(lm, layout, given, grid, cfg_scale=3.0), strict=True):
        whole = [*layout.opening(grid), *tokens] if opened else tokens
        codes = layout.read_image(whole, grid=grid)
        assert codes.ravel().tolist() == greedy(lm, layout, prompt, grid, 3.0)


class Numbers:
    """A text tokenizer for prompts that are ids."""

    def encode(self, prompt: str) -> list[int]:
        return [int(word) for word in prompt.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))

    def save(self, path: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("family", LAYOUTS)
def test_arra_paints_the_same(llama: Any, family: str) -> None:
    layout, grid = LAYOUTS[family], (2, 4)
    model = CausalLM(llama, layout=layout, grid=grid, text_tokenizer=Numbers())
    asked = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    ours = generate(model, prompts=asked, seeds=[0] * len(asked), cfg_scale=3.0, temperature=0.0)
    rows = [layout.prefix(prompt, grid) for prompt in PROMPTS]
    for row, tokens, codes in zip(rows, painted(llama, layout, rows, grid, cfg_scale=3.0), ours.codes, strict=True):
        assert (layout.read_image([*row, *tokens], grid=grid) == codes.numpy()).all()


def test_a_row_does_not_know_its_neighbours(llama: Any) -> None:
    rows = [LUMINA.prefix(prompt, (2, 4)) for prompt in PROMPTS]
    alone = [painted(llama, LUMINA, [row], (2, 4), cfg_scale=4.0, image_top_k=3)[0] for row in rows]
    assert painted(llama, LUMINA, rows, (2, 4), cfg_scale=4.0, image_top_k=3) == alone
    assert alone != [painted(llama, LUMINA, [row], (2, 4))[0] for row in rows]


def test_rows_that_are_not_at_the_same_place(gpt2: Any) -> None:
    """One in text, two in images of different grids: guidance for two, a context of its own for each."""
    tokens = LUMINA.sequence([5], np.zeros((2, 2), np.int64)).tokens.tolist()
    large = LUMINA.sequence([6, 7], np.ones((4, 2), np.int64)).tokens.tolist()
    rows = [[1, 5, 6, 7], tokens[:9], large[:9]]
    scores = torch.randn(3, 50)
    (guidance, grammar, _) = image_processors(gpt2, LUMINA, cfg_scale=2.0)
    with torch.no_grad():
        first = guidance(padded(rows)["input_ids"], scores)
        again = guidance(padded([[*row, 42] for row in rows])["input_ids"], scores)  # from the cache
        for row, (short, scores_of) in enumerate(zip(rows, scores, strict=True)):
            for found, context in ((first, short), (again, [*short, 42])):
                expected = scores_of
                if row:
                    unconditional = context[context.index(20) :]
                    uncond = gpt2(torch.tensor([unconditional])).logits[0, -1]
                    expected = uncond + (scores_of - uncond) * 2
                torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
    allowed = grammar(padded(rows)["input_ids"], scores).isfinite().sum(1)
    assert allowed.tolist() == [50, 9, 1]  # the last row's two codes are there, a new line follows


def test_top_k_for_text_and_images() -> None:
    scores = torch.tensor([[5.0, 4.0, 4.0, 3.0, 2.0]]).expand(2, -1)
    ids = torch.tensor([[1, 5, 6], [1, 20, 23]])
    kept = InterleavedTopK(GENERIC, image_top_k=2, text_top_k=1)(ids, scores).isfinite()
    assert kept.tolist() == [[True, False, False, False, False], [True, True, True, False, False]]
    assert InterleavedTopK(GENERIC)(ids, scores).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(LAYOUTS)), st.integers(1, 3), st.integers(1, 3), st.data())
def test_the_grammar_is_the_layout(family: str, rows: int, columns: int, data: st.DataObject) -> None:
    """A walk that obeys it, codes drawn at will, is the sequence that training writes; so is the context beside it."""
    layout = LAYOUTS[family]
    grid = (rows * layout.size_step, columns * layout.size_step)
    prompt = data.draw(st.lists(st.integers(4, NUM_TEXT - 1), max_size=4))
    asked = layout.prefix(prompt, grid)[: -len(layout.opening(grid))]
    tokens, codes = list(asked), []
    while (state := image_state(layout, tokens, grid=grid, prompt_length=len(asked))).forced or state.codes_only:
        if state.guided:
            beside = unconditional_context(layout, tokens, state)
            whole = layout.sequence(None, np.zeros(grid, np.int64)).tokens.tolist()
            assert len(beside) <= len(whole)
            assert beside[: len(layout.prefix(None, grid))] == layout.prefix(None, grid)
        if state.codes_only:
            codes.append(data.draw(st.integers(0, layout.num_codes - 1)))
        tokens.append(int(layout.code_ids()[codes[-1]]) if state.forced is None else state.forced)
    assert tokens == layout.sequence(prompt, np.array(codes).reshape(grid)).tokens.tolist()


def test_another_image_after_one_in_the_prompt() -> None:
    """An image that the prompt shows is not the one that is asked for."""
    shown = GENERIC.write([[np.zeros((1, 2), np.int64)]]).tokens.tolist()
    assert image_state(GENERIC, shown, grid=(1, 1), prompt_length=len(shown)).forced == GENERIC.begin_image
    assert image_state(GENERIC, shown, grid=(1, 1), prompt_length=len(shown) - 1).forced == 2  # just finished: closing
    assert image_state(GENERIC, shown).forced is None


def test_the_model_is_free_without_a_grid() -> None:
    """To begin no image, to choose its sides, and to write what is none."""
    assert not image_state(GENERIC, [1, 5]).codes_only
    assert image_state(GENERIC, [1, 20]).grid is None
    assert image_state(GENERIC, [1, 20, 23]).forced is None
    assert image_state(GENERIC, [1, 20, 23, 24]).grid == (1, 2)
    for odd in ([1, 20, 5, 5], [1, 20, 23, 29], [1, 20, 22, 23], [1, 20, 23, 23, 40, 30, 5]):
        state = image_state(GENERIC, odd)
        assert (state.start, state.guided, state.forced, state.codes_only) == (1, False, None, False)


def test_what_cannot_be_asked_for(llama: Any) -> None:
    with pytest.raises(ArraError, match="the chameleon layout writes no sides; say which grid"):
        ImageGrammar(CHAMELEON)
    with pytest.raises(ArraError, match="lumina layout: sides of 3 x 2 codes cannot be written"):
        image_processors(llama, LUMINA, grid=(3, 2))
    with pytest.raises(ArraError, match=r"begins with \[20, 24, 23\], one of 1 x 2 codes with \[20, 23, 24\]"):
        image_state(GENERIC, [1, 20, 24, 23, 40], grid=(1, 2), prompt_length=5)


def test_masked_codes_are_told() -> None:
    """Else codes would be drawn at random, all as probable as each other."""
    scores = torch.zeros(1, 50)
    scores[:, 40:49] = torch.finfo(torch.float32).min
    grammar = ImageGrammar(GENERIC)
    with pytest.raises(ArraError, match=r"gives no code any score .*; call arra\.sample\.grammar\.unmask_codes"):
        grammar(torch.tensor([[1, 20, 23, 23]]), scores)


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"cfg_schedule": "linear"},
    {"cfg_schedule": "cosine", "cfg_power": 2.0, "cfg_stop": 0.7},
    {"cfg_schedule": "power", "cfg_power": 0.5, "cfg_start": 0.4},
    {"cfg_interval": 2},
]


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda told: "-".join(map(str, told.values())) or "constant")
def test_arra_paints_the_same_for_a_seed(llama: Any, family: str, schedule: dict[str, Any]) -> None:
    """Every schedule of guidance, filters, prompts of different lengths, two pictures of each."""
    layout, grid = LAYOUTS[family], (4, 2)
    sampling = SamplingSettings(cfg_scale=3.0, temperature=0.8, top_k=7, top_p=0.9, min_p=0.01, **schedule)
    model = CausalLM(llama, layout=layout, grid=grid, text_tokenizer=Numbers())
    words = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    ours = generate(model, prompts=words, seeds=[3, 4], **sampling.model_dump()).codes
    rows = [layout.prefix(prompt, grid) for prompt in PROMPTS for _ in range(2)]
    written = painted(llama, layout, rows, grid, sampling=sampling, seeds=[3, 4] * 3)
    for row, tokens, codes in zip(rows, written, ours, strict=True):
        assert (layout.read_image([*row, *tokens], grid=grid) == codes.numpy()).all()
    assert len({tuple(tokens) for tokens in written}) > 1


def test_a_draw_needs_a_grid_and_a_seed_a_row(llama: Any) -> None:
    with pytest.raises(ArraError, match="seeds: the keys of a seed are those of a whole picture; say which grid"):
        image_processors(llama, GENERIC, seeds=[0])
    with pytest.raises(ArraError, match="seeds: 2 for 1 rows; give one for each"):
        painted(llama, GENERIC, [GENERIC.prefix([5], (1, 2))], (1, 2), seeds=[0, 1])


def chameleon() -> Any:
    """Of `transformers`, with codes of the layout's ids among its tokens."""
    names = {f"IMGIMG{'ABCDEFGHIJ'[number]}Z": 40 + number for number in range(9)}
    names |= {f"<word{token}>": token for token in range(40)} | {"<image>": 49}
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, vocabulary_map=names,
        initializer_range=0.5, vq_config={
            "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8,
            "num_embeddings": 9,
        },
    )  # fmt: skip
    return transformers.ChameleonForConditionalGeneration(config).eval()


def test_chameleon_of_transformers_paints_once_its_codes_are_unmasked() -> None:
    lm, grid = chameleon(), (2, 3)
    model = CausalLM(lm, layout=CHAMELEON, grid=grid, text_tokenizer=Numbers())
    rows = [CHAMELEON.prefix(prompt, grid) for prompt in PROMPTS]
    with pytest.raises(ArraError, match=r"call arra\.sample\.grammar\.unmask_codes\(lm\) first"):
        painted(lm, CHAMELEON, rows, grid)
    unmask_codes(lm)
    words = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    told: list[dict[str, Any]] = [{"cfg_scale": 1.0}, {"cfg_scale": 3.0}]
    for more in told:
        ours = generate(model, prompts=words, seeds=[0] * 3, temperature=0.0, **more).codes
        for row, tokens, codes in zip(rows, painted(lm, CHAMELEON, rows, grid, **more), ours, strict=True):
            assert (CHAMELEON.read_image([*row, *tokens], grid=grid) == codes.numpy()).all()
    ids = torch.tensor([[1, 5, 20, 41]])
    with torch.no_grad():
        expected = lm.lm_head(lm.model(ids).last_hidden_state)
        assert torch.equal(lm(ids).logits, expected)
        assert torch.equal(lm(ids).logits, expected)
