"""Language models painted from packed weights: each row's own bits, and a network that is as it was afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arra.models import CausalLM
from arra.models.packing import packed_calls
from tests.models.test_causal import CODES, GRID, PROMPTS, painter

P = GRID[0] * GRID[1]
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE, "qwen2": WIDE, "gpt2": {"n_embd": 64, "n_inner": 128}, "phi": WIDE,
}  # fmt: skip
"""Heads that share keys, biases, matrices that lie the other way round, a head with a bias."""


def steps(model: CausalLM, chosen: list[int], codes: Tensor) -> Tensor:
    """Logits of some rows of the three prompts, painted together: a prefix, codes one by one, and several at once."""
    rows = model.condition(prompts=PROMPTS).select(torch.tensor(chosen))
    memory, logits = model.prefill(rows, codes[chosen, :0], grid=GRID)
    memory, found = memory.spread(torch.arange(len(rows)), length=model.memory_length(rows, GRID)), [logits]
    for first, end in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (8, 9)]:
        fed = codes[chosen, first:end]
        found.append(model.decode(rows, memory, codes=fed, index=first, grid=GRID))
    return torch.stack(found, 1)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fits", [True, False])
@torch.no_grad()
def test_a_rows_logits_are_the_same_bits_in_any_company(
    family: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or beside others, padded or not; packed, or from the weights as they lie where memory is short."""
    model = painter(family, **FAMILIES[family])
    codes = torch.randint(CODES, (3, P), generator=torch.Generator().manual_seed(0))
    plain = steps(model, [0, 1, 2], codes)
    if not fits:
        monkeypatch.setattr("arra.models.packing.free_bytes", lambda: 0.0)
    with model.packed():
        together = steps(model, [0, 1, 2], codes)
        for chosen in ([0], [1], [2], [1, 2], [1, 1, 1, 1, 0]):
            assert torch.equal(steps(model, chosen, codes), together[chosen])
    torch.testing.assert_close(together, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_the_network_is_left_as_it_was() -> None:
    """Its state dict, modes, attributes and listeners, also when painting fails; gradients are as ever within."""
    model = painter("qwen2", **WIDE)
    model.lm.train()
    heard: list[int] = []
    layers = [part for part in model.modules() if type(part) is nn.Linear]
    handle = layers[0].register_forward_hook(lambda *told: heard.append(1))
    attributes = [dict(layer.__dict__) for layer in layers]
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [part.training for part in model.modules()]
    tokens = torch.arange(6)[None]
    expected = model(tokens).last_hidden
    with model.packed():
        assert list(model.state_dict()) == list(state)
        assert sum("forward" in layer.__dict__ for layer in layers) == len(layers) - 2  # the heard one and the head
        late = layers[1].register_forward_hook(lambda *told: heard.append(2))
        assert torch.equal(model(tokens).last_hidden, expected)
        model(tokens).last_hidden.sum().backward()
        late.remove()
    with pytest.raises(IndexError), model.packed():
        model(torch.tensor([[10**6]]))
    assert all(layer.weight.grad is not None for layer in layers[:-1])
    assert heard == [1, 1, 2, 1, 2]
    handle.remove()
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [layer.__dict__.keys() for layer in layers] == [kept.keys() for kept in attributes]


class Other(Tensor):
    """Weights that only know themselves how they are multiplied with."""


@torch.no_grad()
def test_weights_of_other_kinds_are_left_alone() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(16, 32)
    layers = [plain, nn.Linear(16, 32).bfloat16(), nn.Linear(16, 32, device="meta"), nn.Embedding(4, 16)]
    other = nn.Linear(16, 32)
    other.weight = nn.Parameter(other.weight.detach().as_subclass(Other))
    held = nn.Linear(16, 32)
    held.forward = held.forward  # type: ignore[method-assign]  # as offloading does
    own = held.__dict__["forward"]
    with packed_calls([*layers, other, held]):
        assert [("forward" in layer.__dict__) for layer in (*layers, other)] == [True, False, False, False, False]
        assert held.__dict__["forward"] is own
        for shape in ((16,), (0, 16), (2, 3, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(plain(x), nn.functional.linear(x, plain.weight, plain.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert plain(torch.randn(4, 16)).dtype == torch.bfloat16
    assert held.__dict__["forward"] is own


@torch.no_grad()
def test_the_head_over_codes_is_made_once_while_packed() -> None:
    """And anew afterwards, when weights may have changed."""
    model = painter()
    rows, codes = model.condition(prompts=PROMPTS), torch.zeros(3, 0, dtype=torch.int64)
    with model.packed():
        heads = [model.prefill(rows, codes, grid=GRID)[0].head for _ in range(2)]
        with model.packed():
            heads.append(model.prefill(rows, codes, grid=GRID)[0].head)
        heads.append(model.prefill(rows, codes, grid=GRID)[0].head)
        assert all(head is heads[0] for head in heads)
        before = model.prefill(rows, codes, grid=GRID)[1]
    model.lm.get_output_embeddings().weight.mul_(2)  # type: ignore[operator]
    with model.packed():
        torch.testing.assert_close(model.prefill(rows, codes, grid=GRID)[1], 2 * before)
    torch.testing.assert_close(model.prefill(rows, codes, grid=GRID)[1], 2 * before)
