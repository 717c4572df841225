"""A Hugging Face LM in the place of a decoder: same logits as the library's, cached as whole, alone as in company."""

import json
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import arra
from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, load_model, save_model
from arra.models.adapters import LoraSettings, add_lora, merge_adapters
from arra.models.causal import one_sequence_each
from arra.models.extend import is_tied
from arra.sample.generate import generate
from arra.tokenizers.prompts import prompt_tokenizer
from arra.train.parallel import recompute_blocks
from arra.train.settings import TrainSettings
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
def test_ids_of_codes_in_any_order() -> None:
    """Fed, read and predicted by the layout's table, by both ways through the network."""
    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(2)) + TEXT + 11
    model = painter(written=layout(code_order=tuple(order.tolist())))
    codes = torch.randint(CODES, (3, *GRID), generator=torch.Generator().manual_seed(1))
    logits = model.logits(codes, prompts=PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        tokens = whole(model, prompt, codes[row])
        places = torch.isin(tokens[0], order).nonzero()[:, 0] - 1
        theirs = model.lm(input_ids=tokens, use_cache=False).logits[0, places][:, order]
        torch.testing.assert_close(logits[row], theirs, atol=1e-4, rtol=1e-4)
    condition = model.condition(prompts=PROMPTS)
    memory, found = model.prefill(condition, codes.flatten(1)[:, :2], grid=GRID)
    cache = memory.spread(torch.arange(3), length=model.memory_length(condition, GRID))
    for index in range(2, GRID[0] * GRID[1]):
        torch.testing.assert_close(found, logits[:, index], atol=1e-4, rtol=1e-3)
        if index + 1 < GRID[0] * GRID[1]:
            fed = codes.flatten(1)[:, index, None]
            found = model.decode(condition, cache, codes=fed, index=index, grid=GRID)


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
@pytest.mark.parametrize("count", [1, 5])
def test_guidance_may_end_and_codes_may_be_given(count: int) -> None:
    """While painting, or before it begins; then logits are those of the prompt alone."""
    model = painter()
    given = torch.arange(count)[None]
    seen: dict[int, Tensor] = {}
    result = generate(
        model,
        prompts=PROMPTS,
        seeds=[1, 2, 3],
        cfg_scale=2.0,
        cfg_interval=3,
        prefix_codes=given,
        watch=lambda first, index, logits: seen.__setitem__(index, logits),
    )
    assert (result.codes.flatten(1)[:, :count] == given).all()
    plain = model.logits(result.codes, prompts=PROMPTS)
    for index, logits in seen.items():
        assert torch.allclose(logits, plain[:, index], atol=2e-4, rtol=1e-3) == (index > 4)  # as LlamaGen counts
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
    (folder / "model.json").write_text("[" * 100_000)
    refused("not valid JSON")
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


def set_config(**changes: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return harm


def shards_at(name: str) -> Callable[[Path], None]:
    """The weights moved out of the folder, and an index that names them."""

    def harm(folder: Path) -> None:
        moved = (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        keys = load_file(moved)
        index = {"metadata": {}, "weight_map": {key: name.format(outside=moved) for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return harm


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs(folder.parent / "ran")}, protocol=2))


def zipped(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Runs(folder.parent / "ran")}, folder / "pytorch_model.bin")


def with_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (shards_at("../outside.safetensors"), "index.json: expected the names of files beside it"),
        (shards_at("{outside}"), "index.json: expected the names of files beside it"),
        (shards_at("model-00001-of-00001.safetensors"), "shards missing: model-00001"),
        (pickled, "a pickle that is damaged or holds more than tensors"),
        (zipped, "a pickle that is damaged or holds more than tensors"),
        (with_adapter, "adapter_config.json beside the weights; merge the adapter"),
        (set_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"its weights are quantised \(gptq\)"),
        (set_config(num_hidden_layers=10**7), "num_hidden_layers is 10000000, expected at most 4096"),
        (set_config(num_hidden_layers=1), r"no place for: model\.layers\.1\.input_layernorm\.weight, .* and 5 more"),
        (set_config(num_attention_heads=0), "can be read .ZeroDivisionError"),
        (set_config(hidden_size="wide"), "can be read .StrictDataclass"),
        (set_config(dtype="os.system"), "can be read .AttributeError"),
    ],
)
def test_what_is_not_in_the_folder_or_no_network_is_refused(
    harm: Callable[[Path], None], match: str, tmp_path: Path
) -> None:
    """`transformers` would follow an index anywhere, fetch what an adapter names, and narrow or cut the network."""
    folder = tmp_path / "painter"
    save_model(painter(), folder)
    harm(folder)
    with pytest.raises(ArraError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_code_for_attention_is_fetched(tmp_path: Path) -> None:
    """A configuration may name a repository of kernels; the library's own attention is taken."""
    save_model(painter(), tmp_path / "painter")
    expected = load_model(tmp_path / "painter")
    set_config(attn_implementation="org/kernel", _attn_implementation="org/kernel")(tmp_path / "painter")
    found = load_model(tmp_path / "painter")
    assert isinstance(found, CausalLM)
    assert isinstance(expected, CausalLM)
    assert found.config._attn_implementation == expected.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["smollm", "gpt2"])
def test_tied_weights_are_saved_once_and_tied_again(family: str, tmp_path: Path) -> None:
    """Of a model that adapters have changed, too."""
    model = painter(family)
    add_lora(model.lm, LoraSettings(rank=2), rows=sorted(model.layout.image_ids()), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    merge_adapters(model.lm)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again, CausalLM)
    assert is_tied(model.lm)
    assert is_tied(again.lm)
    assert not any("lm_head" in key for key in load_file(tmp_path / "model.safetensors"))
    codes = torch.randint(CODES, (3, *GRID), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again.logits(codes, prompts=PROMPTS), model.logits(codes, prompts=PROMPTS))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
def test_half_precision_paints_and_stays(family: str, tmp_path: Path) -> None:
    """Logits are float32 and near those of the full weights; a picture is its own whatever stands beside it."""
    model = painter(family)
    save_model(model, tmp_path / "wide")
    narrow = load_model(tmp_path / "wide", dtype=torch.bfloat16)
    codes = torch.randint(CODES, (3, *GRID), generator=torch.Generator().manual_seed(1))
    wide, found = (each.logits(codes, prompts=PROMPTS) for each in (model, narrow))
    assert found.dtype == torch.float32
    assert (found - wide).norm() < 0.03 * (wide - wide.mean()).norm()
    together = generate(narrow, prompts=PROMPTS, seeds=[1, 2, 3], cfg_scale=2.0).codes
    assert torch.equal(generate(narrow, prompts=PROMPTS[:1], seeds=[1], cfg_scale=2.0).codes[0], together[0])
    save_model(narrow, tmp_path / "narrow")
    again = load_model(tmp_path / "narrow", dtype=None)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_mask_of_nothing_is_no_mask() -> None:
    model = painter("gpt2")
    tokens = torch.randint(TEXT, (2, 9), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(model(tokens, prefix_mask=real).last_hidden, model(tokens).last_hidden)


def test_threads_leave_the_library_as_it_was() -> None:
    """Whichever of them is done first."""
    from transformers import masking_utils

    own = masking_utils.find_packed_sequence_indices
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.set()
        with one_sequence_each():
            done.wait(10)

    thread = threading.Thread(target=other)
    with one_sequence_each():
        thread.start()
        inside.wait(10)
        time.sleep(0.05)  # it has come to where it would take this one's function for the library's
    done.set()
    thread.join()
    assert masking_utils.find_packed_sequence_indices is own


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
        if again:
            recompute_blocks(model, TrainSettings(steps=1, recompute="full"))
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
