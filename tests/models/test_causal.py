"""A Hugging Face LM in the place of a decoder: same logits as the library's, cached as whole, alone as in company."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import arra
from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, load_model, save_model
from arra.sample.generate import generate
from arra.tokenizers.prompts import prompt_tokenizer
from tests.models.toy_lms import FAMILIES, toy_lm, toy_words

TEXT, CODES, GRID = 300, 24, (3, 4)
PROMPTS = ["a red bar", "the green circle in the middle of it", ""]


def layout(**changes: Any) -> ImageLayout:
    """Every kind of token that a layout may have, behind the ids of text."""
    fields: dict[str, Any] = {
        "family": "generic", "bos": 0, "begin_image": TEXT, "end_image": TEXT + 1, "new_line": TEXT + 2,
        "first_size": TEXT + 2, "num_sizes": 8, "closing": (1,), "first_code": TEXT + 11, "num_codes": CODES,
        "unconditional": "empty_prompt", "max_positions": 512,
    }  # fmt: skip
    return ImageLayout(**{**fields, **changes})


def painter(family: str = "llama", *, seed: int = 0, written: ImageLayout | None = None, **changes: Any) -> CausalLM:
    written = written or layout()
    words = toy_words()
    text = prompt_tokenizer(words.backend_tokenizer.to_str(), reserved=written.reserved(), source="toy")
    lm = toy_lm(family, rows=TEXT + 11 + CODES + 5, seed=seed, **changes)
    return CausalLM(lm, layout=written, grid=GRID, text_tokenizer=text)


def whole(model: CausalLM, prompt: str, codes: Tensor) -> Tensor:
    """The sequence of one picture, all of it."""
    assert model.text_tokenizer is not None
    ids = model.text_tokenizer.encode(model.layout.text(prompt, tuple(codes.shape)))  # type: ignore[arg-type]
    return torch.from_numpy(model.layout.sequence(ids, codes.numpy()).tokens)[None]


SLIDING: dict[str, dict[str, Any]] = {"gemma2": {"sliding_window": 6}, "mistral": {"sliding_window": 7}}


@pytest.fixture(params=[*FAMILIES])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return painter(request.param, **SLIDING.get(request.param, {}))


@torch.no_grad()
def test_logits_and_states_are_the_librarys(model: CausalLM) -> None:
    """Over the whole vocabulary at every position, and the states after every block."""
    tokens = torch.randint(TEXT, (2, 19), generator=torch.Generator().manual_seed(0))
    theirs = model.lm(input_ids=tokens, output_hidden_states=True, use_cache=False)
    ours = model(tokens, capture=range(model.num_layers + 1))
    torch.testing.assert_close(model.lm_head(ours.last_hidden), theirs.logits, atol=1e-4, rtol=1e-4)
    assert sorted(ours.captured) == list(range(model.num_layers + 1))
    for layer in range(model.num_layers):  # the library's last one is after the final norm
        assert torch.equal(ours.captured[layer], theirs.hidden_states[layer])
    assert torch.equal(ours.last_hidden, theirs.hidden_states[-1])
    assert not torch.equal(ours.captured[model.num_layers], ours.last_hidden)


@torch.no_grad()
def test_teacher_forced_logits_are_those_before_each_code(model: CausalLM) -> None:
    """Of rows of different lengths, as each has them alone in the library's own forward pass."""
    codes = torch.randint(CODES, (3, *GRID), generator=torch.Generator().manual_seed(1))
    logits = model.logits(codes, prompts=PROMPTS)
    ids = model.layout.code_ids()
    for row, prompt in enumerate(PROMPTS):
        tokens = whole(model, prompt, codes[row])
        places = torch.isin(tokens[0], ids).nonzero()[:, 0] - 1
        theirs = model.lm(input_ids=tokens, use_cache=False).logits[0, places][:, ids]
        torch.testing.assert_close(logits[row], theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_decoding_with_the_cache_is_the_whole_pass(model: CausalLM, cfg_scale: float) -> None:
    """At every code, in a batch of prompts of different lengths, with the null rows beside them."""
    seen: dict[int, Tensor] = {}
    result = generate(
        model,
        prompts=PROMPTS,
        seeds=[3, 4, 5],
        cfg_scale=cfg_scale,
        watch=lambda first, index, logits: seen.__setitem__(index, logits.clone()),
    )
    expected = model.logits(result.codes, prompts=PROMPTS)
    if cfg_scale != 1:
        expected_null = model.logits(result.codes, prompts=[""] * 3)
        expected = expected_null + cfg_scale * (expected - expected_null)
    for index, logits in seen.items():
        torch.testing.assert_close(logits, expected[:, index], atol=2e-4, rtol=1e-3)
    assert len(seen) == GRID[0] * GRID[1]


@torch.no_grad()
def test_guidance_sees_what_training_drops_to() -> None:
    """Lumina's null row: the picture alone, its begin at position 0, with no word and no begin-of-sequence."""
    model = painter(written=layout(unconditional="image_only"))
    codes = torch.randint(CODES, (1, *GRID), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    generate(
        model,
        prompts=["a red bar"],
        seeds=[0],
        cfg_scale=3.0,
        prefix_codes=codes.flatten(1)[:, :7],
        temperature=0,
        watch=lambda first, index, logits: seen.append(logits),
    )
    dropped = torch.from_numpy(model.layout.sequence(None, codes[0].numpy()).tokens)[None]
    assert dropped[0, 0] == model.layout.begin_image
    conditional = model.logits(codes, prompts=["a red bar"])[:, 7]
    place = torch.isin(dropped[0], model.layout.code_ids()).nonzero()[7, 0] - 1
    null = model.code_head(model(dropped).last_hidden[:, place])
    torch.testing.assert_close(seen[0], null + 3.0 * (conditional - null), atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (3, 2)])
@pytest.mark.parametrize("changes", [{}, {"new_line": None, "first_size": None, "num_sizes": 0}, {"closing": ()}])
def test_a_finished_picture_always_results(grid: tuple[int, int], changes: dict[str, Any]) -> None:
    """Of any shape, in batches of any size; its sequence is one that the layout reads back."""
    model = painter(written=layout(**changes))
    results = [
        generate(model, prompts=PROMPTS, seeds=[7, 8, 9], cfg_scale=2.0, grid=grid, batch_size=size) for size in (2, 3)
    ]
    assert results[0].codes.shape == (3, *grid)
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
    written = whole(model, PROMPTS[1], results[0].codes[1])[0].tolist()
    assert np.array_equal(model.layout.read_image(written, grid=grid), results[0].codes[1].numpy())


@torch.no_grad()
def test_guidance_may_end_and_codes_may_be_given() -> None:
    model = painter()
    given = torch.arange(5)[None]
    result = generate(model, prompts=PROMPTS, seeds=[1, 2, 3], cfg_scale=2.0, cfg_interval=3, prefix_codes=given)
    assert (result.codes.flatten(1)[:, :5] == given).all()
    alone = generate(
        model, prompts=PROMPTS[1:2], seeds=[2], cfg_scale=2.0, cfg_interval=3, prefix_codes=given, batch_size=1
    )
    assert torch.equal(alone.codes[0], result.codes[1])


@torch.no_grad()
def test_what_stands_behind_or_beside_a_row_changes_nothing_in_it() -> None:
    model = painter()
    short = torch.randint(TEXT, (1, 9), generator=torch.Generator().manual_seed(0))
    long = torch.randint(TEXT, (1, 30), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.cat([short, long[:, 9:]], dim=1), long])
    together, alone = model(padded).last_hidden, model(short).last_hidden
    torch.testing.assert_close(together[:1, :9], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2"])
def test_a_folder_is_the_same_model_here_and_in_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = painter(family)
    model.about, model.companions = (
        {"start": "mean"},
        {"tokenizer_config.json": '{"tokenizer_class": "TokenizersBackend"}'},
    )
    save_model(model, tmp_path / "painter")
    again = load_model(tmp_path / "painter")
    assert isinstance(again, CausalLM)
    assert (again.settings, again.about, again.companions) == (model.settings, model.about, model.companions)
    assert not again.training
    codes = torch.randint(CODES, (3, *GRID), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again.logits(codes, prompts=PROMPTS), model.logits(codes, prompts=PROMPTS))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "painter").eval()
        tokens = whole(model, PROMPTS[0], codes[0])
        assert torch.equal(theirs(tokens).logits, model.lm(tokens).logits)
    words = AutoTokenizer.from_pretrained(tmp_path / "painter")
    assert words(PROMPTS[0])["input_ids"] == model.text_tokenizer.encode(PROMPTS[0])  # type: ignore[union-attr]
    assert sorted(path.name for path in (tmp_path / "painter").iterdir() if path.name.startswith(".")) == []


def test_a_broken_folder_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "painter"
    save_model(painter(), folder)
    card = (folder / "model.json").read_text()

    def refused(match: str) -> None:
        with pytest.raises(ArraError, match=match) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)

    (folder / "model.json").write_text(card.replace('"num_codes": 24', '"num_codes": "many"'))
    refused("settings.layout.num_codes")
    (folder / "model.json").write_text(card.replace(f'"first_code": {TEXT + 11}', '"first_code": 5000'))
    refused("outside the model's vocabulary")
    (folder / "model.json").write_text(card)
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer.json")
    (folder / "tokenizer.json").write_text(words)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("no causal language model that can be read")
    (folder / "model.safetensors").write_bytes(weights)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    refused("weights missing")
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "llamb"'))
    refused("no causal language model that can be read")
    (folder / "config.json").unlink()
    refused("no config.json")


def test_a_network_whose_code_would_come_along_is_refused(tmp_path: Path) -> None:
    """Nothing from a folder is run, whatever its config asks for."""
    folder = tmp_path / "painter"
    save_model(painter(), folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = (
        (folder / "config.json")
        .read_text()
        .replace(
            '"model_type": "llama"',
            '"model_type": "evil", "auto_map": {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}',
        )
    )
    (folder / "config.json").write_text(config)
    with pytest.raises(ArraError, match="no causal language model"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_wrong_wishes_are_told() -> None:
    model = painter()
    for options, match in (
        ({"labels": [1]}, "conditioned on text"),
        ({"prompts": ["a " * 600]}, "do not fit the model's 512 positions"),
        ({"prompts": ["a"], "grid": (9, 4)}, "cannot be written"),
        ({"prompts": ["a"], "prefix_codes": torch.zeros(1, 13, dtype=torch.int64)}, "prefix_codes"),
    ):
        with pytest.raises(ArraError, match=match):
            generate(model, seeds=[0], **options)
    with pytest.raises(ArraError, match="they come from another tokenizer"):
        model.logits(torch.full((1, *GRID), CODES), prompts=["a"])
    with pytest.raises(ArraError, match="expected one row each of 3 x 4"):
        model.logits(torch.zeros(1, 11, dtype=torch.int64), prompts=["a"])
    with pytest.raises(ValueError, match=r"layer 3 is outside 0\.\.2"):
        model(torch.zeros(1, 3, dtype=torch.int64), capture=[3])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputing_and_dropping_in_the_blocks(family: str) -> None:
    """Recomputed gradients are the same, with dropout too; dropout is heard while training and not while painting."""
    own: dict[str, Any] = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = painter(family, **own)
    tokens = torch.randint(TEXT, (2, 12), generator=torch.Generator().manual_seed(0))
    quiet = model(tokens).last_hidden.detach()
    model.drop_residuals(0.5)
    assert torch.equal(model(tokens).last_hidden, quiet)
    gradients = []
    for again in (False, True):
        model.train()
        model.recompute = again
        model.zero_grad()
        torch.manual_seed(5)
        output = model(tokens, capture=[1])
        (output.last_hidden.square().mean() + output.captured[1].square().mean()).backward()
        assert not torch.allclose(output.last_hidden, quiet)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    assert not any(isinstance(module, nn.Dropout) and module.p == 0.5 for module in model.modules())


def test_the_public_way_in(tmp_path: Path) -> None:
    save_model(painter(), tmp_path)
    model = arra.load_model(tmp_path)
    assert arra.generate(model, prompts=["a red bar"], seeds=[0, 1]).codes.shape == (2, *GRID)
