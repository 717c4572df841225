"""An LM's vocabulary grows by codes: what it had keeps its bits, what is new starts where it is said to."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM
from arra.models.extend import (
    SMALL,
    Start,
    add_tokens,
    check_logits,
    code_directions,
    embeddings,
    grow,
    head_layer,
    is_tied,
    row_statistics,
)
from arra.tokenizers.vocabulary import generic_layout, generic_names
from tests.models.toy_lms import FAMILIES, toy_lm, toy_words

NUM_CODES = 64
NAMES = generic_names(NUM_CODES, num_sizes=4)


def codebook(size: int = NUM_CODES, dimension: int = 8, seed: int = 1) -> Tensor:
    vectors = torch.randn(size, dimension, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=1) + 0.3


def grown(family: str, *, start: Start = "codebook", seed: int = 0, padding: int = 0) -> tuple[Any, int]:
    """The LM, and its first new id."""
    words = toy_words()
    lm = toy_lm(family, rows=len(words) + padding)
    ids = add_tokens(words, NAMES, rows=len(embeddings(lm)), source="toy")
    codes = slice(len(ids) - NUM_CODES, len(ids))
    grow(lm, first=ids[0], num_tokens=len(ids), code_places=codes, codebook=codebook(), start=start, seed=seed)
    return lm, ids[0]


def code_rows(weight: Tensor, first: int) -> Tensor:
    start = first + len(NAMES) - NUM_CODES
    return weight.detach()[start : start + NUM_CODES]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = [values.flatten().argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize("padding", [0, 20, 200])
@pytest.mark.parametrize("family", FAMILIES)
def test_old_rows_keep_their_bits_and_their_logits(family: str, padding: int) -> None:
    before = toy_lm(family, rows=300 + padding)
    after, first = grown(family, padding=padding)
    assert first == 300  # padding is used first
    assert len(embeddings(after)) == max(-(-(300 + len(NAMES)) // 8) * 8, 300 + padding)
    assert after.config.vocab_size == len(embeddings(after)) == len(head_layer(after).weight)
    assert is_tied(after) == is_tied(before)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    for name, value in old.items():
        kept = 300 if len(value) == 300 + padding else len(value)
        assert torch.equal(new[name][:kept], value[:kept]), name
    tokens = torch.randint(300, (2, 9))
    torch.testing.assert_close(after(tokens).logits[..., :300], before(tokens).logits[..., :300], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2", "phi"])
def test_codes_begin_among_the_text_and_near_their_neighbours(family: str) -> None:
    lm, first = grown(family)
    text, codes = embeddings(lm).detach()[:300], code_rows(embeddings(lm), first)
    torch.testing.assert_close(codes.mean(0), text.mean(0), atol=1e-5, rtol=0)
    rms = [rows.square().sum(1).mean().sqrt() for rows in (codes, text)]
    torch.testing.assert_close(*rms, atol=0, rtol=1e-4)
    pairs = torch.triu_indices(NUM_CODES, NUM_CODES, 1)
    apart = [torch.cdist(rows, rows)[*pairs] for rows in (codebook(), codes)]
    torch.testing.assert_close(apart[1] / apart[1].mean(), apart[0] / apart[0].mean(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "smollm"])
def test_with_the_mean_all_codes_begin_nearly_alike(family: str) -> None:
    lm, first = grown(family, start="mean")
    text, codes = row_statistics(embeddings(lm)[:300]), row_statistics(code_rows(embeddings(lm), first))
    assert codes.spread == pytest.approx(SMALL * text.spread, rel=0.1)
    assert (codes.mean - text.mean).norm() < 2 * SMALL * text.spread / NUM_CODES**0.5
    assert codes.deviation.min() > 0


@pytest.mark.parametrize("start", ["codebook", "mean"])
def test_a_head_of_its_own_finds_all_codes_about_equally_likely(start: Start) -> None:
    lm, first = grown("llama", start=start)
    head = head_layer(lm).weight
    text, codes = row_statistics(head[:300]), row_statistics(code_rows(head, first))
    assert codes.spread == pytest.approx(SMALL * text.spread, rel=0.1)
    logits = lm(torch.randint(300, (4, 16))).logits
    loss = -code_rows(logits.flatten(0, 1).T, first).log_softmax(0).mean()
    assert float(loss) == pytest.approx(math.log(NUM_CODES), abs=0.05)


def test_a_bias_of_the_head_begins_at_its_mean() -> None:
    lm, first = grown("phi")
    bias = head_layer(lm).bias.detach()
    torch.testing.assert_close(bias[first:], bias[:first].mean().expand(len(bias) - first))


def test_the_seed_decides_and_the_callers_dice_are_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    one, first = grown("llama", seed=3)
    torch.manual_seed(7)
    words, lm = toy_words(), toy_lm("llama", rows=300)
    ids = add_tokens(words, NAMES, rows=300, source="toy")
    codes = slice(len(ids) - NUM_CODES, len(ids))
    torch.manual_seed(7)
    grow(lm, first=ids[0], num_tokens=len(ids), code_places=codes, codebook=codebook(), start="codebook", seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), lm.state_dict().values(), strict=True))
    other, _ = grown("llama", seed=4)
    assert not torch.equal(embeddings(one)[first:], embeddings(other)[first:])


def test_a_codebook_wider_than_the_model_keeps_its_order_of_distances() -> None:
    vectors = codebook(dimension=256)
    directions = code_directions(vectors, 96, generator=torch.Generator().manual_seed(0))
    assert directions.shape == (NUM_CODES, 96)
    assert rank_correlation(torch.cdist(vectors, vectors), torch.cdist(directions, directions)) > 0.4
    near = codebook(dimension=4).repeat(1, 64)  # four dimensions in 256, as codebooks have in truth
    directions = code_directions(near, 96, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(torch.cdist(near, near), torch.cdist(directions, directions)) > 0.9


def test_a_codebook_of_one_point_gives_finite_rows() -> None:
    directions = code_directions(torch.ones(5, 8), 16, generator=torch.Generator())
    assert torch.equal(directions, torch.zeros(5, 16, dtype=torch.float64))


def test_half_precision_stays_so() -> None:
    words = toy_words()
    lm = toy_lm("llama", rows=300).bfloat16()
    ids = add_tokens(words, NAMES, rows=300, source="toy")
    codes = slice(len(ids) - NUM_CODES, len(ids))
    grow(lm, first=ids[0], num_tokens=len(ids), code_places=codes, codebook=codebook(), start="codebook", seed=0)
    assert {value.dtype for value in lm.state_dict().values()} == {torch.bfloat16}
    check_logits(painter(lm, words), source="toy")


def test_tokens_are_special_and_behind_all_others() -> None:
    words = toy_words()
    ids = add_tokens(words, NAMES, rows=300, source="toy")
    assert ids == list(range(300, 300 + len(NAMES)))
    text = "a red<|image_start|><|image_code_63|> bar"
    assert words.decode(words(text)["input_ids"], skip_special_tokens=True) == "a red bar"
    assert words("<|image_code_63|>")["input_ids"] == [ids[-1]]


def test_what_cannot_be_extended_is_refused() -> None:
    words = toy_words()
    with pytest.raises(ArraError, match=r"^toy: its tokenizer goes up to id 299, its embeddings have 256 rows; .*"):
        add_tokens(words, NAMES, rows=256, source="toy")
    add_tokens(words, NAMES, rows=300, source="toy")
    with pytest.raises(ArraError, match=r"^toy: has the token <\|image_start\|> already"):
        add_tokens(words, NAMES, rows=600, source="toy")


def test_ids_with_gaps_are_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    content = json.loads(toy_words().backend_tokenizer.to_str())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 310
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(ArraError, match=r"^toy: its tokenizer's ids have gaps"):
        add_tokens(words, NAMES, rows=400, source="toy")


def painter(lm: Any, words: Any) -> CausalLM:
    return CausalLM(lm, layout=layout(words.get_vocab()), grid=(2, 2))


def layout(vocabulary: dict[str, int]) -> ImageLayout:
    return generic_layout(vocabulary, num_codes=NUM_CODES)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_logits_are_the_models_own(family: str) -> None:
    lm, _ = grown(family)
    words = toy_words()
    add_tokens(words, NAMES, rows=300, source="toy")
    check_logits(painter(lm, words), source="toy")


def test_a_head_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _ = grown("llama")
    words = toy_words()
    add_tokens(words, NAMES, rows=300, source="toy")
    forward = type(lm).forward

    def squared(self: nn.Module, **told: Any) -> Any:
        output = forward(self, **told)
        return type(output)(logits=output.logits * 1.01)

    monkeypatch.setattr(type(lm), "forward", squared)
    with pytest.raises(ArraError, match=r"^toy: the head of LlamaForCausalLM does more than is known here"):
        check_logits(painter(lm, words), source="toy")


def test_a_model_that_sees_what_comes_is_refused() -> None:
    words = toy_words()
    ids = add_tokens(words, NAMES, rows=300, source="toy")
    lm = toy_lm("bert", rows=ids[-1] + 1)
    with pytest.raises(ArraError, match=r"^toy: BertLMHeadModel lets tokens see later ones"):
        check_logits(painter(lm, words), source="toy")


def test_a_model_that_cannot_paint_from_a_cache_is_refused() -> None:
    """Of Mamba the library's cache takes one token at a time; beside padding others forget or remember too much."""
    words = toy_words()
    ids = add_tokens(words, NAMES, rows=300, source="toy")
    lm = toy_lm("mamba", rows=ids[-1] + 1, state_size=8)
    with pytest.raises(
        ArraError, match=r"^toy: MambaForCausalLM cannot be asked as training and painting do \("
    ) as told:
        check_logits(painter(lm, words), source="toy")
    assert "\n" not in str(told.value)


def test_a_model_that_heeds_padding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _ = grown("llama")
    words = toy_words()
    add_tokens(words, NAMES, rows=300, source="toy")
    forward = type(lm.model).forward

    def heedless(self: nn.Module, *given: Any, **told: Any) -> Any:
        told.pop("attention_mask", None)
        return forward(self, *given, **told)

    monkeypatch.setattr(type(lm.model), "forward", heedless)
    with pytest.raises(ArraError, match=r"^toy: LlamaForCausalLM gives other logits from its cache or beside padding"):
        check_logits(painter(lm, words), source="toy")


def test_a_network_below_the_head_is_found_where_its_name_is_wrong() -> None:
    """Llama 4's classes call the network by a name that only its multimodal parent has."""
    words = toy_words()
    ids = add_tokens(words, NAMES, rows=300, source="toy")
    shape: dict[str, Any] = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    lm = toy_lm("llama4_text", rows=ids[-1] + 1, **shape)
    assert lm.base_model is lm
    check_logits(painter(lm, words), source="toy")
