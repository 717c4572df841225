"""The lean functions say what the plain formulas say, keep what they promise, and stand aside where they must."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arra.data.batches import make_batch
from arra.data.conditions import Prefix
from arra.models import lean, load_decoder, products
from arra.models.blocks import apply_rotary, rotary_table
from arra.models.decoder import Decoder
from arra.models.dropout import dropped, path_factors
from arra.models.products import inferred, packed_layers, product
from arra.models.settings import DecoderSettings
from arra.sample.generate import generate
from arra.train.objective import compute_losses

EPS = 1e-5


def tiny(**changes: object) -> Decoder:
    torch.manual_seed(0)
    fields = {"num_layers": 2, "num_heads": 4, "hidden_size": 64, "num_codes": 96, "grid": (4, 4), "num_classes": 5}
    model = load_decoder("llamagen", **{**fields, **changes})
    nn.init.normal_(model.output.weight)
    return model.train()


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and the gradients of a fixed weighing of it."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    weighing = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weighing).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def agree(ours: list[Tensor], plain: list[Tensor]) -> None:
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_norm_product_and_turn() -> None:
    table = rotary_table(DecoderSettings(num_layers=1, num_heads=2, hidden_size=16, grid=(2, 3)))[:5]
    x, norm, weight = torch.randn(3, 5, 16), torch.rand(16) + 0.5, torch.randn(32, 16)

    def plain(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        heads = F.linear(F.rms_norm(x, (16,), norm, EPS), weight).unflatten(-1, (4, 8))
        return torch.cat([apply_rotary(heads[:, :, :3], table), heads[:, :, 3:]], dim=2)

    agree(
        gradients(lambda x, n, w: lean.norm_heads(x, n, w, table, 3, EPS), x, norm, weight),
        gradients(plain, x, norm, weight),
    )


def test_norm_and_gate() -> None:
    def plain(x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        normed = F.rms_norm(x, (16,), norm, EPS)
        return F.linear(F.silu(F.linear(normed, w1)) * F.linear(normed, w3), w2)

    inputs = [torch.randn(10, 16), torch.rand(16) + 0.5, torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)]
    agree(
        gradients(lambda x, n, w1, w3, w2: lean.norm_swiglu(x, n, w1, w3, w2, EPS), *inputs), gradients(plain, *inputs)
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_drops_what_the_plain_form_drops(p: float) -> None:
    x, y, seeds = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.tensor([3, 4])
    agree(
        gradients(lambda x, y: lean.drop_add(x, y, p, seeds, site=1), x, y),
        gradients(lambda x, y: x + dropped(y, p, seeds, site=1), x, y),
    )


@pytest.mark.parametrize("condition", ["class", "caption"])
def test_a_model_trains_the_same_without_them(condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(condition=condition, caption_dim=12, **({"prefix_length": 3} if condition == "caption" else {}))
    codes = torch.randint(96, (2, 16))
    if condition == "class":
        prefix = Prefix(torch.tensor([[1], [5]]))
    else:
        mask = torch.tensor([[False, True, True], [True, True, True]])
        prefix = Prefix(torch.zeros(2, 3, dtype=torch.int64), mask, torch.randn(2, 3, 12), torch.tensor([False, True]))
    batch = make_batch(prefix, codes)

    def run() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        losses = compute_losses(model, batch, None, z_weight=0.01)
        losses.total.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [losses.total.detach(), losses.ntp, losses.z, *grads]

    ours = run()
    monkeypatch.setattr(lean, "usable", lambda *_: False)
    agree(ours, run())


def test_what_a_block_keeps_for_the_backward_pass() -> None:
    model = tiny(hidden_size=128, num_heads=4, grid=(8, 8), token_dropout=0.0)
    batch = make_batch(Prefix(torch.tensor([[0], [1]])), torch.randint(96, (2, 64)))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_losses(model, batch, None)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    positions, block = 2 * 64, model.settings
    widths = 6 + 2 * block.ffn_width / 128  # stream twice, q, k, v, attended, and the gate's two branches
    expected = 4 * 128 * positions * (widths + 0.5 + 0.1) * block.num_layers  # two masks of a byte, norms and sums
    outside = 4 * 128 * positions * 4  # embeddings, the final norm, the states that the head reads
    assert sum(size for place, size in kept.items() if place not in weights) < expected + outside


def test_a_wrapped_layer_is_called() -> None:
    model = tiny(token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0)
    codes, heard = torch.randint(96, (1, 16)), []
    before = model.logits(codes, labels=[1])
    for layer in (model.layers[0].attention.wqkv, model.layers[1].feed_forward.w2, model.output):  # type: ignore[union-attr]
        layer.register_forward_hook(lambda module, inputs, output: heard.append(module))  # type: ignore[union-attr]
    torch.testing.assert_close(model.logits(codes, labels=[1]), before)
    with torch.no_grad():
        model.logits(codes, labels=[1])
    assert len(heard) == 6


def test_other_types_take_the_plain_way() -> None:
    model = tiny(token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0)
    codes = torch.randint(96, (2, 16))
    expected = model.logits(codes, labels=[1, 2])
    for changed in (torch.float64, torch.bfloat16):
        found = model.to(changed).logits(codes, labels=[1, 2])
        assert (found - expected).abs().mean() < 0.05
        found.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        tiny().logits(codes, labels=[1, 2]).sum().backward()


@pytest.mark.parametrize("shape", [(1, 8, 24), (5, 64, 192), (3, 256, 96), (0, 8, 4)])
def test_products(shape: tuple[int, int, int]) -> None:
    rows, size, width = shape
    a, b = torch.randn(rows, size), torch.randn(width, size).T
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-4, atol=1e-4)


def test_packed_weights_give_the_same_bits_at_any_number_of_rows() -> None:
    layer = nn.Linear(64, 192, bias=False)
    x = torch.randn(40, 64)
    with torch.no_grad():
        unpacked = inferred(x, layer)
        with packed_layers(nn.Sequential(layer)):
            assert torch.equal(inferred(x, layer), unpacked)
            for rows in (4, 5, 7, 16, 33):
                assert torch.equal(inferred(x[:rows], layer), unpacked[:rows])
            assert list(nn.Sequential(layer).state_dict()) == ["0.weight"]
        layer.weight.mul_(2)
        assert torch.equal(inferred(x, layer), 2 * unpacked)


@pytest.mark.skipif(not products._ONEDNN, reason="this build of torch has no oneDNN to pack for")
def test_packing_leaves_a_model_alone_where_a_layer_is_wrapped_or_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_packed(layer: nn.Module) -> bool:
        with packed_layers(nn.Sequential(layer)):
            return any("packed" in key for key in layer.__dict__)

    assert is_packed(nn.Linear(64, 192, bias=False))
    assert not is_packed(nn.Linear(64, 192, bias=True))
    heard = nn.Linear(64, 192, bias=False)
    heard.register_forward_hook(lambda module, inputs, output: None)
    assert not is_packed(heard)
    monkeypatch.setattr("arra.models.products.free_bytes", lambda: 1000.0)
    assert not is_packed(nn.Linear(64, 192, bias=False))


def test_drop_path_skips_whole_samples() -> None:
    model = tiny(drop_path=0.5, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, num_layers=3)
    factors = path_factors(torch.arange(3 * 999).view(3, 999), 0.5, site=2)
    assert [each.unique().tolist() for each in factors] == [[1], pytest.approx([0, 1 / 0.75]), [0, 2]]
    tokens = torch.cat([torch.ones(64, 1, dtype=torch.int64), torch.randint(96, (1, 15)).expand(64, -1)], 1)
    captured = model(tokens, capture=(2, 3)).captured
    same = (captured[2] == captured[3]).all(2).all(1)
    assert 4 <= int(same.sum()) <= 30  # both halves of the last block skipped: a quarter of 64
    states = {tuple(row.flatten()[:8].tolist()) for row in captured[3]}
    assert len(states) > 1
    model.eval()
    out = model(tokens).last_hidden
    torch.testing.assert_close(out, out[:1].expand_as(out))


def test_attention_dropout_is_for_training_alone() -> None:
    model = tiny(attn_dropout=0.5, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0)
    codes = torch.randint(96, (1, 16))
    first, second = (model.logits(codes, labels=[1]) for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model.logits(codes, labels=[1]), model.logits(codes, labels=[1]))


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_painting_with_packed_weights_is_painting(num_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(num_kv_heads=num_kv_heads).eval()
    packed = generate(model, labels=[0, 3], seeds=[1, 2], cfg_scale=2.0).codes
    assert not any("packed" in key for module in model.modules() for key in module.__dict__)
    with model.packed():
        assert model._stepper is not None
    assert model._stepper is None
    monkeypatch.setattr("arra.models.decoder.Decoder._made_stepper", lambda model: None)  # packed, block by block
    assert torch.equal(generate(model, labels=[0, 3], seeds=[1, 2], cfg_scale=2.0).codes, packed)
    monkeypatch.setattr("arra.models.products.free_bytes", lambda: 0.0)
    assert torch.equal(generate(model, labels=[0, 3], seeds=[1, 2], cfg_scale=2.0).codes, packed)


class Adapted(nn.Module):
    """A layer as adapters wrap it: a base layer, whose weight it shows, and something added."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.added(x)
        return found


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_painting_hears_an_adapter(name: str) -> None:
    model, plain = tiny().eval(), tiny().eval()
    for block in model.layers:
        feed_forward = block.feed_forward
        assert isinstance(feed_forward, nn.Module)
        setattr(feed_forward, name, Adapted(getattr(feed_forward, name)))
    seen: dict[int, Tensor] = {}

    def watch(first: int, index: int, logits: Tensor) -> None:
        seen[index] = logits

    codes = generate(model, labels=[1], seeds=[0], temperature=0, watch=watch).codes
    expected = model.logits(codes, labels=[1])
    torch.testing.assert_close(torch.stack([seen[index] for index in range(16)], 1), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain.logits(codes, labels=[1]), atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_any_part_are_heard(training: bool) -> None:
    model = tiny().train(training)
    block = model.layers[1]
    parts = [block, block.attention, block.feed_forward, block.attention_norm, block.ffn_norm]
    heard: list[object] = []
    for part in parts:
        assert isinstance(part, nn.Module)
        part.register_forward_hook(lambda module, inputs, output: heard.append(module))
    if training:
        model.logits(torch.randint(96, (1, 16)), labels=[1]).sum().backward()
    else:
        generate(model, labels=[1], seeds=[0])
    assert [heard.count(part) for part in parts] == [1 if training else 16] * len(parts)
