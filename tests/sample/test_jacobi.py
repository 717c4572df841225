"""Laws of speculative Jacobi decoding: plain decoding's codes from every seed, in fewer passes where guesses are right.

Letters: R rows, n codes, P codes of an image, K codes of the vocabulary.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, Condition, Decoder, DecoderSettings, load_model
from arra.sample.decoding import FREE, Batch, Reader, decode_batch
from arra.sample.generate import Engine, generate
from arra.sample.jacobi import decode_jacobi
from arra.sample.logits import SamplingSettings, draw_keys, filter_logits, guide, pick
from arra.tokenizers.prompts import prompt_tokenizer
from tests.models import toy_chameleon
from tests.models.toy_lms import toy_lm, toy_words

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "constant": {"cfg_scale": 2.0},
    "interval": {"cfg_scale": 2.0, "cfg_interval": 4},
    "start": {"cfg_scale": 3.0, "cfg_start": 0.4, "top_p": 0.8},
    "middle": {"cfg_scale": 3.0, "cfg_start": 0.3, "cfg_stop": 0.7, "temperature": 0.6},
    "linear": {"cfg_scale": 2.5, "cfg_schedule": "linear", "top_k": 7},
    "cosine": {"cfg_scale": 2.5, "cfg_schedule": "cosine", "min_p": 0.05},
    "greedy": {"cfg_scale": 2.0, "temperature": 0},
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "class": {"labels": [3, 4]},
    "text": {"prompts": ["ab", "abcd"]},
    "caption": {"captions": (torch.linspace(-2, 2, 80).view(2, 4, 10), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))},
}


class Letters:
    """A text tokenizer for tests: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 28 for letter in prompt]

    def save(self, path: Path) -> None:
        raise NotImplementedError


def decoder(condition: str = "class", **changes: Any) -> Decoder:
    """One whose codes depend on those before them, yet are often guessed."""
    fields: dict[str, Any] = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "num_codes": 40}
    fields |= {"grid": (3, 5), "num_classes": 9, "condition": condition}
    if condition == "text":
        fields |= {"text_vocab_size": 30, "prefix_length": 7}
    if condition == "caption":
        fields |= {"caption_dim": 10, "prefix_length": 4}
    model = Decoder(DecoderSettings(**{**fields, **changes}))
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.text_tokenizer = Letters()
    return model.eval()


def language_model(family: str, **changes: Any) -> CausalLM:
    """One that writes side tokens before its pictures and a new line after each row of codes."""
    layout = ImageLayout(
        family="generic", bos=0, begin_image=300, end_image=301, new_line=302, first_size=302, num_sizes=8,
        closing=(1,), first_code=311, num_codes=24, unconditional="empty_prompt", max_positions=512,
    )  # fmt: skip
    text = prompt_tokenizer(toy_words().backend_tokenizer.to_str(), reserved=layout.reserved(), source="toy")
    return CausalLM(toy_lm(family, rows=340, **changes), layout=layout, grid=(3, 4), text_tokenizer=text)


def chameleon(folder: Path) -> CausalLM:
    fields = toy_chameleon.config()
    toy_chameleon.save(folder, fields, toy_chameleon.state(fields, rows=None))
    text = toy_chameleon.text_tokenizer(folder / "text" / "tokenizer.json")
    model = load_model("chameleon", weights=folder, text_tokenizer=text, layout="lumina", grid=(4, 4))
    assert isinstance(model, CausalLM)
    return model


def same_codes(model: Any, *, window: int, **given: Any) -> list[int]:
    """Passes for each image, whose codes are plain decoding's."""
    plain = generate(model, **given)
    found = generate(model, **given, jacobi_window=window)
    assert plain.passes is None
    assert found.passes is not None
    assert torch.equal(found.codes, plain.codes)
    return found.passes


@pytest.mark.parametrize(
    ("how", "window"), [*((how, 6) for how in SETTINGS), ("plain", 2), ("middle", 2), ("linear", 40), ("greedy", 40)]
)
def test_a_seed_gives_the_codes_of_plain_decoding(how: str, window: int) -> None:
    passes = same_codes(decoder(), **CONDITIONS["class"], seeds=[0, 1], window=window, **SETTINGS[how])
    assert max(passes) <= 15
    assert sum(passes) < 15 * 2  # some guesses are right


@pytest.mark.parametrize("how", ["constant", "middle"])
@pytest.mark.parametrize(
    ("condition", "changes"),
    [("text", {"num_layers": 2}), ("caption", {}), ("text", {"rep_token": True}), ("class", {"num_kv_heads": None})],
)
def test_whatever_a_decoder_is_conditioned_on(condition: str, changes: dict[str, Any], how: str) -> None:
    same_codes(decoder(condition, **changes), **CONDITIONS[condition], seeds=[0, 1], window=4, **SETTINGS[how])


@pytest.mark.parametrize("how", ["middle", "linear", "greedy"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "chameleon"])
def test_language_models_with_tokens_between_codes(family: str, how: str, tmp_path: Path) -> None:
    model = chameleon(tmp_path) if family == "chameleon" else language_model(family)
    same_codes(model, prompts=["a red bar", "blue"], seeds=[0, 1], window=4, **SETTINGS[how])


@pytest.mark.parametrize("how", ["plain", "middle"])
@pytest.mark.parametrize("kept", ["alternate", "top", "bottom", "holes", "all"])
def test_given_codes_are_right_guesses(kept: str, how: str) -> None:
    """A run of them takes no pass and no place in a window."""
    places = {
        "alternate": range(0, 15, 2), "top": range(7), "bottom": range(8, 15), "holes": [2, 3, 4, 5, 6, 7, 8, 11],
        "all": range(15),
    }[kept]  # fmt: skip
    given = torch.full((1, 15), FREE)
    given[:, list(places)] = torch.arange(15)[list(places)] + 9
    model = decoder()
    assert same_codes(model, labels=[2], seeds=[0], given_codes=given, window=3, **SETTINGS[how])[0] <= 15 - len(places)
    each = torch.cat([torch.full((1, 15), FREE), given.roll(1, 1)])  # every image has its own
    same_codes(model, labels=[2], seeds=[0, 1], given_codes=each, window=3, **SETTINGS[how])


@pytest.mark.parametrize("how", ["plain", "middle"])
def test_no_code_is_read_in_vain(how: str) -> None:
    """Not the last one, not those behind the last that is painted, and null rows only while they count."""
    model, read = decoder(), []
    model.register_forward_pre_hook(
        lambda module, args, told: read.append((args[0].shape, told.get("start", 0))), with_kwargs=True
    )
    given = torch.full((1, 15), FREE)
    given[:, 13:] = 1
    found = generate(model, labels=[2], seeds=[0], given_codes=given, jacobi_window=4, **SETTINGS[how])
    ends = [start + shape[1] for shape, start in read]
    assert max(ends) == 1 + 12  # the class and the codes before the last free one, which is the 13th
    assert found.passes is not None
    joining = int(how == "middle")
    assert len(read) == found.passes[0] + joining
    decoding = [shape[0] for shape, start in read if start]
    assert decoding[0] == 1
    assert decoding[-1] == 1
    assert (2 in decoding) == (how == "middle")


def test_a_model_without_context_takes_a_pass_for_a_window() -> None:
    """All codes come from one distribution, so a guess with their noise is right; of the prefix comes one code."""
    model = decoder()
    nn.init.zeros_(model.output.weight)
    for window, expected in ((2, 8), (4, 5), (7, 3), (14, 2), (99, 2)):
        passes = same_codes(model, labels=[2], seeds=[0, 1], window=window, cfg_scale=2.0)
        assert passes == [expected] * 2


@pytest.mark.parametrize("how", ["plain", "linear", "middle"])
def test_watch_sees_each_code_once_in_order_with_its_logits(how: str) -> None:
    model, seen = decoder(), []
    settings = SamplingSettings(**SETTINGS[how])
    with Engine(model, settings=settings, jacobi_window=4) as engine:
        codes = engine.generate(
            labels=[3, 4], seeds=[7, 8], watch=lambda first, index, logits: seen.append((first, index, logits.clone()))
        ).codes
    assert [(first, index) for first, index, _ in seen] == list(product(range(2), range(15)))
    with torch.no_grad():
        cond, null = model.logits(codes, labels=[3, 4]), model.logits(codes, labels=[9, 9])
    keys = draw_keys([7, 8], 15)
    for image, index, logits in seen:
        scale = settings.cfg_scales(15)[index]
        expected = guide(cond[image, index][None], null[image, index][None], cfg_scale=scale)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert pick(logits, settings, keys=keys[image : image + 1, index]) == codes.flatten(1)[image, index]


@dataclass
class Read:
    """The codes that rows of a `Table` have been fed."""

    codes: Tensor

    def rows(self, count: int) -> "Read":
        return Read(self.codes[:count])

    def spread(self, places: Tensor, *, length: int) -> "Read":
        return Read(self.codes[places])

    def join(self, other: "Read") -> "Read":
        return Read(torch.cat([self.codes, other.codes]))


class Table:
    """A model of three codes out of three whose logits are written down for every beginning."""

    keeps_all = True

    def __init__(self) -> None:
        self.logits = 0.9 * torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(1))
        """By condition (or none) and the codes before, 3 where there is none yet."""

    def memory_length(self, rows: Condition, grid: tuple[int, int]) -> int:
        return 3

    def null_condition(self, condition: Condition, *, grid: tuple[int, int] | None = None) -> Condition:
        return Condition(torch.zeros_like(condition.tokens))

    def prefill(self, rows: Condition, codes: Tensor, *, grid: tuple[int, int]) -> tuple[Read, Tensor]:
        return Read(codes), self._after(rows, codes)

    def decode(
        self, rows: Condition, cache: Read, *, codes: Tensor, index: int, grid: tuple[int, int], every: bool = False
    ) -> Tensor:
        known = torch.cat([cache.codes[:, :index], codes], 1)
        cache.codes = known
        behind = [self._after(rows, known[:, :end]) for end in range(index + 1, known.shape[1] + 1)]
        return torch.stack(behind, 1) if every else behind[-1]

    def _after(self, rows: Condition, codes: Tensor) -> Tensor:
        padded = torch.cat([codes, codes.new_full((len(codes), 2), 3)], 1)
        return self.logits[rows.tokens[:, 0], padded[:, 0], padded[:, 1]]


def test_codes_follow_the_exact_distribution() -> None:
    """Of all 27 pictures, enumerated; and most are made in fewer passes than codes."""
    model, draws = Table(), 500
    assert isinstance(model, Reader)
    settings = SamplingSettings(cfg_scale=1.5, cfg_schedule="linear", temperature=1.5, top_p=0.9)
    scales = settings.cfg_scales(3)
    pictures = torch.tensor(list(product(range(3), repeat=3)))
    exact = torch.ones(27, dtype=torch.float64)
    for index, scale in enumerate(scales):
        rows = torch.ones(27, 1, dtype=torch.int64)
        cond, null = (model._after(Condition(tokens), pictures[:, :index]) for tokens in (rows, 0 * rows))
        chances = filter_logits(guide(cond, null, cfg_scale=scale), settings).double().softmax(-1)
        exact *= chances.gather(1, pictures[:, index, None])[:, 0]
    assert exact.sum() == pytest.approx(1)
    keys = draw_keys(range(draws), 3)
    counts, passes = torch.zeros(27, dtype=torch.float64), torch.zeros(4)
    for seed in range(draws):
        batch = Batch(Condition(torch.ones(1, 1, dtype=torch.int64)), whose=[0], keys=keys[seed : seed + 1])
        found = decode_jacobi(model, batch, grid=(1, 3), settings=settings, window=2)
        counts[int(found.codes[0] @ torch.tensor([9, 3, 1]))] += 1
        passes[found.passes] += 1
        if seed < 50:
            assert torch.equal(found.codes, decode_batch(model, batch, grid=(1, 3), settings=settings))
    assert counts[exact == 0].sum() == 0
    possible = exact > 0
    assert 12 < possible.sum() < 27  # the filter takes some away
    assert draws * exact[possible].min() > 3
    assert chisquare(counts[possible].numpy(), draws * exact[possible].numpy()).pvalue > 0.001
    assert passes[2] > 100  # guesses that were right
    assert passes[3] > 100  # and wrong ones


def test_shared_noise_agrees_as_often_as_the_bound_says() -> None:
    keys, settings = draw_keys([0], 20_000)[0], SamplingSettings()
    generator = torch.Generator().manual_seed(0)
    for strength in (0.3, 1.0, 3.0):
        one, other = torch.randn(2, 12, generator=generator) * strength
        apart = (one.softmax(-1) - other.softmax(-1)).abs().sum().item() / 2
        picks = [pick(logits.expand(len(keys), -1), settings, keys=keys) for logits in (one, other)]
        agreed = (picks[0] == picks[1]).float().mean().item()
        assert (1 - apart) / (1 + apart) - 0.012 < agreed < 1 - apart + 0.012  # 3.4 deviations


@pytest.mark.parametrize("window", [1, -1, -8])
def test_windows_that_are_none_are_told(window: int) -> None:
    with pytest.raises(
        ArraError, match=rf"jacobi_window: {window} is no window; expected 2 or more codes a pass, or 0"
    ):
        generate(decoder(), labels=[1], seeds=[0], jacobi_window=window)


def test_a_memory_that_forgets_is_told() -> None:
    model = language_model("mistral", sliding_window=5)
    with pytest.raises(ArraError, match="cannot take back a wrong guess; leave --jacobi-window away"):
        generate(model, prompts=["a"], seeds=[0], jacobi_window=4)
    generate(model, prompts=["a"], seeds=[0])


def test_one_code_is_that_of_the_prefix() -> None:
    assert same_codes(decoder(grid=(1, 1)), labels=[1], seeds=[0, 1], window=4, cfg_scale=2.0) == [1, 1]
