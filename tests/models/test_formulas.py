"""The whole decoder against its formulas, written out once more: heads of 100, every dropout, both conditions.

The reference below shares no line with `arra.models`, nor do the draws of dropout, which `plain_dropout` writes out.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arra.models import Decoder, DecoderSettings, lean
from arra.models.blocks import Block, CaptionEmbedding, ClassEmbedding
from tests.models import plain_dropout

CODES = 24
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 100": {"num_heads": 2, "hidden_size": 200},
    "heads of 64": {"num_heads": 1, "hidden_size": 64},
    "heads of 8": {"num_heads": 4, "hidden_size": 32},
}
CAPTION: dict[str, Any] = {"condition": "caption", "caption_dim": 6, "prefix_length": 5}
OFF: dict[str, float] = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
DROPS: dict[str, dict[str, float]] = {
    "none": {},
    "token": {"token_dropout": 0.4},
    "resid": {"resid_dropout": 0.4},
    "ffn": {"ffn_dropout": 0.4},
    "path": {"drop_path": 0.6},
    "all": {"token_dropout": 0.2, "resid_dropout": 0.3, "ffn_dropout": 0.4, "drop_path": 0.5},
}


def lively(**fields: Any) -> Decoder:
    torch.manual_seed(2)
    common: dict[str, Any] = {"num_layers": 3, "num_codes": CODES, "grid": (3, 3), "num_classes": 4, "multiple_of": 8}
    model = Decoder(DecoderSettings(**{**common, **OFF, **fields})).train()
    for parameter in model.parameters():
        bound = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3 if parameter.dim() == 1 else bound)
    return model


@cache
def turning(size: int, place: int, width: int) -> Tensor:
    """What a head of `size` is multiplied with at a place of the picture; before the picture: nothing is left of it.

    Pair j of the first half of the pairs turns by the row, of the second by the column.
    """
    matrix, half = torch.zeros(size, size), size // 2
    for pair in range(half if place >= 0 else 0):
        steps, j = (place // width, pair) if pair < half // 2 else (place % width, pair - half // 2)
        angle = steps * 10000.0 ** (-2 * j / half)
        even, odd = 2 * pair, 2 * pair + 1
        matrix[even, even] = matrix[odd, odd] = math.cos(angle)
        matrix[even, odd], matrix[odd, even] = -math.sin(angle), math.sin(angle)
    return matrix


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attention(model: Decoder, x: Tensor, w: dict[str, Tensor], allowed: Tensor) -> Tensor:
    settings = model.settings
    heads = [part.unflatten(-1, (settings.num_heads, -1)) for part in (x @ w["attention.wqkv"].T).chunk(3, -1)]
    places = range(-settings.prefix_length, x.shape[1] - settings.prefix_length)
    turns = torch.stack([turning(settings.head_dim, place, settings.grid[1]) for place in places])
    query, key = (torch.einsum("shd,bnsd->bnsh", turns, each.transpose(1, 2)) for each in heads[:2])
    scores = query @ key.mT / math.sqrt(settings.head_dim)
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, heads[2]).flatten(2) @ w["attention.wo"].T


def dropped(x: Tensor, seeds: np.ndarray, site: int, p: float) -> Tensor:
    return x * torch.from_numpy(plain_dropout.kept(seeds, x.shape[1:], site, p)) / (1 - round(p * 65536) / 65536)


def reference(model: Decoder, prefix: Tensor, codes: Tensor, allowed: Tensor) -> Tensor:
    """Logits at the positions that predict codes; `prefix` are the condition's vectors."""
    s, state = model.settings, model.state_dict(keep_vars=True)
    x = torch.cat([prefix, state["tok_embeddings.weight"][codes[:, :-1]]], 1)
    seeds = plain_dropout.site_seeds(torch.randint(2**62, (len(x),)), s.num_layers + 1)
    x = dropped(x, seeds[-1], 0, s.token_dropout)
    for layer in range(s.num_layers):
        start = f"layers.{layer}."
        w = {k.removeprefix(start).removesuffix(".weight"): v for k, v in state.items() if k.startswith(start)}
        levels = round(s.drop_path * 65536) * layer // (s.num_layers - 1)
        paths = torch.from_numpy(plain_dropout.path_kept(seeds[layer], 2, levels)) / (1 - levels / 65536)
        for branch, half in enumerate(("attention", "ffn")):
            y = normed(x, w[f"{half}_norm"])
            if half == "attention":
                y, dropout = attention(model, y, w, allowed), s.resid_dropout
            else:
                gate = y @ w["feed_forward.w1"].T
                y = (gate * gate.sigmoid() * (y @ w["feed_forward.w3"].T)) @ w["feed_forward.w2"].T
                dropout = s.ffn_dropout
            # whole samples are skipped too, the attention and the feed-forward each on its own
            x = x + dropped(y, seeds[layer], branch, dropout) * paths[:, branch, None, None]
    return (normed(x, state["norm.weight"]) @ state["output.weight"].T)[:, s.prefix_length - 1 :]


def compare(model: Decoder, run: Any, plain: Any) -> None:
    """Logits, loss gradients of all parameters: the model's and the formulas'."""
    found = []
    for function in (run, plain):
        model.zero_grad()
        torch.manual_seed(9)
        logits = function()
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(
            gradients[name], gradient, atol=2e-4 * float(gradient.abs().max()), rtol=1e-3, msg=name
        )


@pytest.mark.parametrize("lean_ones", [True, False], ids=["lean", "plain"])
@pytest.mark.parametrize("drops", DROPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_classes(shape: str, drops: str, lean_ones: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lean_ones:
        monkeypatch.setattr(lean, "usable", lambda *_: False)
    model = lively(**SHAPES[shape], **DROPS[drops])
    labels, codes = torch.tensor([0, 4, 2]), torch.randint(CODES, (3, 9))
    allowed = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, -1, -1)
    assert isinstance(model.cls_embedding, ClassEmbedding)
    table = model.cls_embedding.embedding_table.weight
    compare(
        model,
        lambda: model.logits(codes, labels=labels),
        lambda: reference(model, table[labels][:, None], codes, allowed),
    )


@pytest.mark.parametrize("drops", ["none", "all"])
@pytest.mark.parametrize("shape", ["heads of 100", "heads of 8"])
def test_captions(shape: str, drops: str) -> None:
    """Padding, a caption that was dropped under its own mask, and the tanh form of the projection's GELU."""
    model = lively(**SHAPES[shape], **CAPTION, **DROPS[drops])
    embedding = model.cls_embedding
    assert isinstance(embedding, CaptionEmbedding)
    features, codes = torch.randn(3, 5, 6), torch.randint(CODES, (3, 9))
    lengths, null = [2, 5, 1], torch.tensor([False, False, True])
    given = torch.zeros(3, 5, 6)
    allowed = torch.ones(13, 13, dtype=torch.bool).tril().repeat(3, 1, 1)
    for sample, length in enumerate(lengths):
        given[sample, 5 - length :] = features[sample, :length]
        allowed[sample, :, : 5 - length] = False
        allowed[sample].fill_diagonal_(True)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    condition = model.condition(captions=(features, mask))
    inputs = {**condition.inputs(), "null_caption": null}

    def run() -> Tensor:
        tokens = torch.cat([condition.tokens, codes[:, :-1]], 1)
        return model.head(model(tokens, **inputs).last_hidden[:, 4:])

    def plain() -> Tensor:
        vectors = torch.where(null[:, None, None], embedding.uncond_embedding, given)
        x = vectors @ embedding.cap_proj.fc1.weight.T
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return reference(model, x @ embedding.cap_proj.fc2.weight.T, codes, allowed)

    compare(model, run, plain)


def test_attention_dropout_zeroes_weights_and_scales_the_rest() -> None:
    """With one head, one value that is 1 everywhere and no scores, an output counts the weights that stayed."""
    model = lively(num_heads=1, hidden_size=32, num_layers=1, attn_dropout=0.5)
    block = model.layers[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.attention.wqkv.weight.zero_()
        block.attention.wqkv.weight[64:, 0] = 1.0
        block.attention.wo.weight.copy_(torch.eye(32))
        x = torch.zeros(200, 9, 32)
        x[..., 0] = 1.0
        block.attention_norm.weight.fill_(1.0)
        norm, table = block.attention_norm, model.rotary.table[:9]
        value = (1 / (1 / 32 + 1e-5)) ** 0.5
        out = block.attention(x, norm, table, None, None, 0, 0)[..., 0] / value
        kept = out * torch.arange(1, 10) * 0.5  # each weight is 1 / (position + 1), doubled where it stayed
        torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
        assert 0.4 < float(kept[:, 8].mean() / 9) < 0.6
        model.eval()
        still = block.attention(x, norm, table, None, None, 0, 0)[..., 0] / value
        torch.testing.assert_close(still, torch.ones(200, 9))


@pytest.mark.parametrize("layers", [1, 6])
def test_every_matrix_begins_alike(layers: int) -> None:
    """N(0, 0.02) whatever the depth, norms 1, head 0; the null caption has a scale of its own."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": layers, "num_heads": 2, "hidden_size": 128, "num_codes": 256}
    model = Decoder(DecoderSettings(**fields, condition="caption", caption_dim=400))
    for name, parameter in model.named_parameters():
        if name == "output.weight":
            assert parameter.count_nonzero() == 0
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones(128))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
            assert abs(parameter.mean().item()) < 1e-3
    assert isinstance(model.cls_embedding, CaptionEmbedding)
    null = model.cls_embedding.uncond_embedding
    assert null.shape == (120, 400)
    assert null.std().item() == pytest.approx(1 / 20, rel=0.03)
