"""Laws of the decoder: caching, padding and batch-mates change nothing; any grid, any condition, any dtype."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models import load_decoder
from arra.models.blocks import _rotated_pairs, apply_rotary, rotary_table
from arra.models.decoder import Condition, Decoder, DecoderSettings
from arra.models.llamagen import SIZES

NUM_CODES = 40
KINDS: dict[str, dict[str, Any]] = {
    "class": {"condition": "class", "num_classes": 5},
    "caption": {"condition": "caption", "caption_dim": 12, "prefix_length": 6},
    "text": {"condition": "text", "text_vocab_size": 30, "prefix_length": 7},
    "text-zero": {"condition": "text", "text_vocab_size": 30, "prefix_length": 7, "prefix_rotary": "zero"},
}


class Letters:
    """A text tokenizer for tests: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 28 for letter in prompt]

    def save(self, path: Any) -> None:
        raise NotImplementedError


def tiny(kind: str, **changes: Any) -> Decoder:
    """A decoder with every weight alive (a zero head and unit norms would hide faults)."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "num_codes": NUM_CODES}
    model = Decoder(DecoderSettings(**{**fields, "grid": (3, 4), **KINDS[kind], **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.text_tokenizer = Letters()
    return model


def condition_of(model: Decoder, rows: int = 3) -> Condition:
    if model.settings.condition == "class":
        return model.condition(labels=[0, 4, 5][:rows])
    if model.settings.condition == "text":
        return model.condition(prompts=["", "abc", "abcdef"][:rows])
    length = model.settings.prefix_length
    features = torch.randn(rows, length, model.settings.caption_dim, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor([1, 4, length])[:rows, None]
    return model.condition(captions=(features, mask))


def codes_of(rows: int = 3, positions: int = 12) -> Tensor:
    return torch.randint(0, NUM_CODES, (rows, positions), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("cuts", [(), (1,), (4, 9), "each"])
def test_cached_decoding_equals_full_forward(kind: str, kv_heads: int | None, cuts: Any) -> None:
    model = tiny(kind, num_kv_heads=kv_heads)
    condition = condition_of(model)
    tokens = torch.cat([condition.tokens, codes_of()[:, :-1]], dim=1)
    full = model(tokens, **condition.inputs(), capture=(0, 1, 2))
    cache = model.new_cache(len(tokens))
    assert cache.length == tokens.shape[1]
    edges = [0, *(range(1, tokens.shape[1]) if cuts == "each" else cuts), tokens.shape[1]]
    parts = [
        model(tokens[:, start:end], **condition.inputs(), capture=(0, 1, 2), cache=cache, start=start)
        for start, end in pairwise(edges)
    ]
    close: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-5}  # states are of size 10 here
    torch.testing.assert_close(torch.cat([part.last_hidden for part in parts], 1), full.last_hidden, **close)
    for layer in range(3):
        ours = torch.cat([part.captured[layer] for part in parts], 1)
        torch.testing.assert_close(ours, full.captured[layer], **close)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_mates_change_nothing(kind: str) -> None:
    model = tiny(kind)
    condition, codes = condition_of(model), codes_of()
    tokens = torch.cat([condition.tokens, codes[:, :-1]], dim=1)
    together = model(tokens, **condition.inputs()).last_hidden
    for row in range(3):
        alone = condition.select(torch.tensor([row]))
        torch.testing.assert_close(model(tokens[row : row + 1], **alone.inputs()).last_hidden[0], together[row])


@pytest.mark.parametrize("kind", ["caption", "text", "text-zero"])
def test_content_of_padding_changes_nothing(kind: str) -> None:
    model = tiny(kind)
    condition, codes = condition_of(model), codes_of()
    padding = ~condition.prefix_mask  # type: ignore[operator]
    tokens = torch.cat([condition.tokens, codes[:, :-1]], dim=1)
    before = model(tokens, **condition.inputs()).last_hidden
    inputs = condition.inputs()
    if kind == "caption":
        inputs["caption"] = torch.where(padding[..., None], 7.0, inputs["caption"])
    else:
        tokens[:, : padding.shape[1]][padding] = 13
    after = model(tokens, **inputs).last_hidden
    real = torch.nn.functional.pad(~padding, (0, codes.shape[1] - 1), value=True)
    assert torch.equal(before[real], after[real])


def test_an_unpadded_mask_is_causal_attention() -> None:
    model = tiny("text")
    tokens = torch.cat([torch.full((2, 7), 3), codes_of(2)[:, :-1]], dim=1)
    torch.testing.assert_close(
        model(tokens, prefix_mask=torch.ones(2, 7, dtype=torch.bool)).last_hidden, model(tokens).last_hidden
    )


def test_padding_a_caption_more_changes_nothing() -> None:
    # with LlamaGen's zero rotary a caption slot has no position: the same vectors in a longer prefix act the same
    model, longer = tiny("caption"), tiny("caption", prefix_length=9)
    state = model.state_dict() | {"cls_embedding.uncond_embedding": torch.zeros(9, 12)}
    longer.load_state_dict(state)
    features, codes = torch.randn(2, 6, 12), codes_of(2)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    wide = nn.functional.pad(features, (0, 0, 0, 3)), nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(
        model.logits(codes, captions=(features, mask)), longer.logits(codes, captions=wide), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_unseen(kind: str) -> None:
    model = tiny(kind)
    condition, codes = condition_of(model), codes_of()
    changed = codes.clone()
    changed[:, 5] = (changed[:, 5] + 1) % NUM_CODES
    inputs = {"class": "labels", "caption": "captions", "text": "prompts"}[model.settings.condition]
    given: Any = {"labels": [0, 4, 5], "prompts": ["", "abc", "abcdef"], "captions": (condition.caption, None)}[inputs]
    before, after = model.logits(codes, **{inputs: given}), model.logits(changed, **{inputs: given})
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])


def test_null_conditions() -> None:
    model = tiny("class")
    assert model.null_condition(condition_of(model)).tokens.tolist() == [[5]] * 3
    model = tiny("text")
    null, empty = model.null_condition(condition_of(model)), model.condition(prompts=[""] * 3)
    assert torch.equal(null.tokens, empty.tokens)
    assert torch.equal(null.prefix_mask, empty.prefix_mask)  # type: ignore[arg-type]
    model = tiny("caption")
    condition = condition_of(model)
    null = model.null_condition(condition)
    assert null.prefix_mask is condition.prefix_mask
    stored = model.cls_embedding.uncond_embedding
    replaced = Condition(condition.tokens, condition.prefix_mask, stored.expand(3, -1, -1))  # type: ignore[operator]
    torch.testing.assert_close(
        model(condition.tokens, **null.inputs()).last_hidden,
        model(condition.tokens, **replaced.inputs()).last_hidden,
    )


def test_the_null_caption_is_stored_and_never_trained() -> None:
    model = tiny("caption").train()
    assert "cls_embedding.uncond_embedding" in model.state_dict()
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())
    condition = condition_of(model)
    output = model(condition.tokens, **model.null_condition(condition).inputs())
    output.last_hidden.sum().backward()
    assert model.cls_embedding.uncond_embedding.grad is None
    copy.deepcopy(model)


def test_modes_differ_in_dropout_alone() -> None:
    still = tiny("class", token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0)
    codes = codes_of()
    torch.testing.assert_close(
        still.train().logits(codes, labels=[0, 1, 2]), still.eval().logits(codes, labels=[0, 1, 2])
    )
    lively = tiny("class").train()
    assert not torch.equal(lively.logits(codes, labels=[0, 1, 2]), lively.logits(codes, labels=[0, 1, 2]))


def test_rotary_follows_rows_and_columns() -> None:
    settings = tiny("text").settings
    table = rotary_table(settings)
    assert table.shape == (7 + 12, 4, 2)
    assert torch.equal(table[:7, :, 0], torch.ones(7, 4))
    image = table[7:].unflatten(0, (3, 4))
    turn = torch.tensor([2.0, 3.0])  # first frequency is 1: the angle is the row, or the column, itself
    torch.testing.assert_close(image[2, 3, [0, 2]], torch.stack([turn.cos(), turn.sin()], dim=-1))
    assert torch.equal(image[:, 0, :2], image[:, 3, :2])
    assert torch.equal(image[0, :, 2:], image[2, :, 2:])
    assert not torch.equal(image[0, 1, 2:], image[0, 2, 2:])
    assert rotary_table(tiny("text-zero").settings)[:7].count_nonzero() == 0


def test_both_ways_of_turning_agree() -> None:
    table, x = rotary_table(tiny("class").settings), torch.randn(2, 13, 4, 8)
    torch.testing.assert_close(apply_rotary(x, table), _rotated_pairs(x.unflatten(-1, (-1, 2)), table).flatten(-2))


def test_rotary_survives_moves() -> None:
    with torch.device("meta"):
        model = Decoder(tiny("class").settings)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model = model.to_empty(device="cpu").bfloat16()
    assert torch.equal(model.rotary.table, rotary_table(model.settings))
    assert model.rotary.table.dtype == torch.float32
    assert not any("rotary" in key for key in model.state_dict())


def test_bfloat16_gives_float32_logits() -> None:
    model = tiny("text").bfloat16()
    exact = tiny("text").logits(codes_of(1), prompts=["abc"])
    logits = model.logits(codes_of(1), prompts=["abc"])
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().mean() < 0.1 * exact.std()


COUNTS = {
    "b": (110_888_448, 112_282_368, 88, 90),
    "l": (342_910_976, 345_031_680, 172, 174),
    "xl": (774_699_520, 777_678_080, 256, 258),
    "xxl": (1_410_972_672, 1_414_940_160, 340, 342),
    "xxxl": (3_893_027_840, 3_902_261_760, 340, 342),
    "1b": (1_199_616_000, 1_205_954_560, 158, 160),
    "3b": (3_096_659_200, 3_110_249_600, 172, 174),
    "7b": (6_614_589_440, 6_635_655_168, 228, 230),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_on_the_meta_device(size: str) -> None:
    c2i, t2i, c2i_keys, t2i_keys = COUNTS[size]
    with torch.device("meta"):
        by_class = Decoder(DecoderSettings(**SIZES[size]))
        by_caption = Decoder(DecoderSettings(**SIZES[size], condition="caption"))
    assert (sum(p.numel() for p in by_class.parameters()), len(by_class.state_dict())) == (c2i, c2i_keys)
    assert (sum(p.numel() for p in by_caption.parameters()), len(by_caption.state_dict())) == (t2i, t2i_keys)


def test_initialisation() -> None:
    model = Decoder(DecoderSettings(num_layers=1, num_heads=4, hidden_size=128, num_codes=512))
    assert model.output.weight.count_nonzero() == 0
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.norm.weight, torch.ones(128))
    logits = model.eval().logits(torch.zeros(1, 256, dtype=torch.int64), labels=[3])
    assert torch.equal(logits, torch.zeros(1, 256, 512))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_heads": 3}, "hidden_size"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"prefix_length": 2}, "prefix_length"),
        ({"prefix_rotary": "identity"}, "prefix_rotary"),
        ({"condition": "text", "text_vocab_size": 9}, "prefix_length"),
        ({"condition": "text", "prefix_length": 9}, "text_vocab_size"),
        ({"num_layer": 3}, "num_layer"),
    ],
)
def test_settings_that_make_no_model(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        DecoderSettings(**{"num_layers": 1, "num_heads": 4, "hidden_size": 32, **fields})


def test_wrong_conditions_are_told() -> None:
    model = tiny("class")
    with pytest.raises(ArraError, match=r"conditioned on class, got text; pass labels="):
        model.condition(prompts=["a"])
    with pytest.raises(ArraError, match=r"9 is outside 0\.\.5"):
        model.condition(labels=[1, 9])
    with pytest.raises(ArraError, match="expected one row each of 3 x 4"):
        model.logits(codes_of(3, 11), labels=[0, 1, 2])
    with pytest.raises(ArraError, match=r"expected \(B, 6, 12\)"):
        tiny("caption").condition(captions=(torch.zeros(1, 5, 12), None))
    with pytest.raises(ArraError, match="do not fit"):
        tiny("text").condition(prompts=["abcdefg"])


def test_codes_of_another_tokenizer_are_refused() -> None:
    model = load_decoder(
        "llamagen", num_layers=1, num_heads=2, hidden_size=16, num_codes=20, grid=(2, 2), num_classes=3
    )
    for wrong in (20, -1):
        with pytest.raises(ArraError, match=r"outside 0\.\.19"):
            model.logits(torch.tensor([[0, 1, 2, wrong]]), labels=[0])
