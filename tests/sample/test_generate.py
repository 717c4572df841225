"""Laws of generation: an image belongs to its seed, guidance of one is no guidance, the model is left as it was."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.decoder import Decoder, DecoderSettings
from arra.sample.generate import MAX_SEED, Engine, generate
from arra.sample.logits import SamplingSettings

PROMPTS = ["", "abc", "abcdef"]


class Letters:
    """A text tokenizer for tests: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 28 for letter in prompt]

    def save(self, path: Path) -> None:
        raise NotImplementedError


class Squares:
    """An image tokenizer for tests: one grey pixel for each code."""

    def decode(self, codes: Tensor) -> Tensor:
        return codes[..., None].expand(-1, -1, -1, 3).to(torch.uint8)


def painter(condition: str = "text", num_kv_heads: int | None = 2, **changes: Any) -> Decoder:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "hidden_size": 64, "num_codes": 200, "grid": (3, 5)}
    if condition == "text":
        fields |= {"text_vocab_size": 30, "prefix_length": 7}
    if condition == "caption":
        fields |= {"caption_dim": 10, "prefix_length": 4}
    fields |= {"condition": condition, "num_kv_heads": num_kv_heads, "num_classes": 9}
    model = Decoder(DecoderSettings(**{**fields, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.text_tokenizer = Letters()
    return model.eval()


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("cfg_interval", [-1, 4])
def test_an_image_belongs_to_its_seed(cfg_scale: float, cfg_interval: int) -> None:
    model, seeds = painter(), list(range(13))
    given: dict[str, Any] = {"cfg_scale": cfg_scale, "cfg_interval": cfg_interval, "top_p": 0.95}
    codes = generate(model, prompts=["abc"], seeds=seeds, batch_size=13, **given).codes
    assert len(codes.flatten(1).unique(dim=0)) == 13
    for batch_size in (1, 3, 5, 8):
        assert torch.equal(generate(model, prompts=["abc"], seeds=seeds, batch_size=batch_size, **given).codes, codes)
    order = [7, 2, 11, 0, 5]
    assert torch.equal(generate(model, prompts=["abc"], seeds=order, batch_size=3, **given).codes, codes[order])
    mixed = generate(model, prompts=["q", "abc", "zzzz"], seeds=[1, 7, 2], **given)
    assert torch.equal(mixed.codes[1], codes[7])


@pytest.mark.parametrize("condition", ["class", "caption", "text"])
def test_guidance_of_one_is_no_guidance(condition: str) -> None:
    model = painter(condition)
    kinds: dict[str, dict[str, Any]] = {
        "class": {"labels": [3, 4]},
        "text": {"prompts": PROMPTS[:2]},
        "caption": {"captions": (torch.randn(2, 4, 10), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))},
    }
    given = kinds[condition]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    plain = generate(model, **given, seeds=[0, 1], cfg_scale=1.0)
    assert max(rows) == 2  # no null half
    nearly = generate(model, **given, seeds=[0, 1], cfg_scale=1.0 + 1e-9)
    assert torch.equal(plain.codes, nearly.codes)
    guided = generate(model, **given, seeds=[0, 1], cfg_scale=6.0)
    assert not torch.equal(plain.codes, guided.codes)


def test_captions_that_differ_in_their_mask_are_two() -> None:
    model, features = painter("caption"), torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    both = generate(model, captions=(features.expand(2, -1, -1), mask), seeds=[0, 0]).codes
    assert not torch.equal(*both)
    for row in range(2):
        assert torch.equal(generate(model, captions=(features, mask[[row]]), seeds=[0]).codes[0], both[row])


def test_the_null_half_ends_with_the_interval() -> None:
    model, rows = painter(), []
    model.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    generate(model, prompts=["a"], seeds=range(4), cfg_scale=2.0, cfg_interval=5)
    assert rows == [2] + [8] * 6 + [4] * 8  # one prompt and its null row are read once


def test_greedy_equals_the_teacher_forced_argmax() -> None:
    model = painter()
    codes = generate(model, prompts=PROMPTS, seeds=[0, 0, 0], temperature=0).codes
    with torch.no_grad():
        assert torch.equal(model.logits(codes, prompts=PROMPTS).argmax(-1), codes.flatten(1))


def test_prompts_and_seeds() -> None:
    model = painter()
    zipped = generate(model, prompts=PROMPTS, seeds=[4, 5, 6])
    assert (zipped.prompts, zipped.seeds) == (PROMPTS, [4, 5, 6])
    product = generate(model, Squares(), prompts=PROMPTS[1:], seeds=[4, 5, 6])
    assert product.prompts == ["abc"] * 3 + ["abcdef"] * 3
    assert product.seeds == [4, 5, 6] * 2
    assert torch.equal(product.codes[1], zipped.codes[1])
    assert torch.equal(product.codes[5], zipped.codes[2])
    assert zipped.images is None
    assert product.images is not None
    assert product.images.shape == (6, 3, 5, 3)
    assert torch.equal(product.images[..., 0].long(), product.codes)
    labelled = generate(painter("class"), labels=[1, 9], seeds=[MAX_SEED])
    assert (labelled.labels, labelled.seeds, labelled.prompts) == ([1, 9], [MAX_SEED] * 2, None)


@pytest.mark.parametrize("cfg_interval", [-1, 4])
@pytest.mark.parametrize("num_forced", [0, 1, 6, 14, 15])
def test_forced_codes_continue_the_same_image(num_forced: int, cfg_interval: int) -> None:
    model = painter()
    given: dict[str, Any] = {"prompts": ["abc"], "seeds": [0, 1, 2], "cfg_scale": 2.0, "cfg_interval": cfg_interval}
    codes = generate(model, **given).codes
    forced = codes.flatten(1)[:, :num_forced]
    assert torch.equal(generate(model, **given, prefix_codes=forced).codes, codes)
    shared = generate(model, **given, prefix_codes=forced[:1]).codes.flatten(1)
    assert torch.equal(shared[:, :num_forced], forced[:1].expand(3, -1))


def test_the_model_is_left_as_it_was() -> None:
    model = painter().train()
    model.layers[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    random_state = torch.get_rng_state()
    generate(model, prompts=["abc"], seeds=[0], cfg_scale=2.0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random_state)
    model.logits(torch.zeros(1, 15, dtype=torch.int64), prompts=["a"]).sum().backward()
    with pytest.raises(ArraError):
        generate(model, prompts=["far too long a prompt"], seeds=[0])
    assert [module.training for module in model.modules()] == modes


def test_several_engines_paint_with_one_model() -> None:
    """Side by side; the first to be left breaks nothing of the other."""
    model = painter().train()
    with Engine(model, settings=SamplingSettings(cfg_scale=2.0)) as whole:
        expected = whole.generate(prompts=["abc"], seeds=[0, 1, 2]).codes
        with Engine(model, settings=SamplingSettings(cfg_scale=2.0), batch_size=2) as inner:
            assert torch.equal(inner.generate(prompts=["abc"], seeds=[0, 1, 2]).codes, expected)
        assert not any(module.training for module in model.modules())
        assert torch.equal(whole.generate(prompts=["abc"], seeds=[0, 1, 2]).codes, expected)
    assert all(module.training for module in model.modules())


def test_an_engine_that_cannot_be_opened_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Decoder) -> None:
        raise MemoryError

    model = painter().train()
    monkeypatch.setattr(Decoder, "packed", no_room)
    with pytest.raises(MemoryError), Engine(model, settings=SamplingSettings()):
        pass
    assert all(module.training for module in model.modules())


def test_one_code_and_one_row() -> None:
    model = painter(grid=(1, 1))
    assert generate(model, prompts=["abc"], seeds=[0, 1], cfg_scale=2.0).codes.shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"seeds": []}, "0 seeds"),
        ({"seeds": [-1]}, "-1 is negative"),
        ({"seeds": [0, 2**63]}, r"9223372036854775808 is above 2\^63 - 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"batch_size": 0}, "batch_size"),
        ({"prefix_codes": torch.zeros(2, 3, dtype=torch.int64)}, "expected 1 rows"),
        ({"prefix_codes": torch.zeros(1, 16, dtype=torch.int64)}, "at most 15"),
        ({"given_codes": torch.full((1, 15), 200)}, r"200\.\.200 are outside 0\.\.199"),
        ({"given_codes": torch.full((1, 15), -2)}, r"-2\.\.-2 are outside"),
    ],
)
def test_wrong_arguments_are_told(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ArraError, match=word):
        generate(painter(), **{"prompts": ["a"], "seeds": [0], **wrong})


def test_generation_works_without_align() -> None:
    program = """
import sys
sys.modules["arra.align"] = None
import arra.models, arra.sample.generate as g
from arra.models import load_model
model = load_model("llamagen-b", num_layers=1, hidden_size=48, num_codes=8, num_classes=2, grid=(2, 2))
assert g.generate(model, labels=[1], seeds=[0]).codes.shape == (1, 2, 2)
assert sys.modules["arra.align"] is None
assert not any(name.startswith("arra.train") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
