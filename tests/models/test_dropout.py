"""Masks are functions of (seed of the row, site, element): right in rate, independent, the same in any company."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arra.align import Alignment
from arra.data.batches import Batches, InMemory, TrainBatch, row_seeds, text_batch
from arra.data.conditions import TextConditions
from arra.data.language import LayoutWriter, MixedBatches, PromptConditions, TextRows
from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, Decoder, DecoderSettings, Painter
from arra.models.adapters import LoraSettings, add_lora
from arra.models.blocks import Block
from arra.models.dropout import RowDropout, dropped, keep_mask, path_factors, scale, site_seeds
from arra.train.objective import compute_losses
from arra.train.parallel import recompute_blocks
from arra.train.settings import TrainSettings
from tests.models import plain_dropout
from tests.models.toy_lms import toy_lm

RECORDS, CODES, WIDTH = 20, 24, 8
LAYOUT = ImageLayout(
    family="generic", bos=0, begin_image=44, end_image=45, closing=(1,), first_code=20, num_codes=CODES,
    unconditional="empty_prompt",
)  # fmt: skip
SHARES: dict[str, Any] = {"token_dropout": 0.3, "resid_dropout": 0.3, "ffn_dropout": 0.3, "drop_path": 0.4}


def decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": 3, "num_heads": 2, "hidden_size": 32, "num_codes": CODES, "grid": (2, 3)}
    fields |= {"condition": "text", "prefix_length": 5, "text_vocab_size": 20, "multiple_of": 8, **SHARES, **changes}
    model = Decoder(DecoderSettings(**fields))
    nn.init.normal_(model.output.weight, std=0.1)
    return model


def language_model(kind: str) -> CausalLM:
    """gpt2 drops by modules of its own, the others what their blocks add, and before adapters."""
    own: dict[str, Any] = {"attn_pdrop": 0.0} if kind == "gpt2" else {}
    lm = toy_lm("llama" if kind == "lora" else kind, rows=50, **own)
    if kind == "lora":
        add_lora(lm, LoraSettings(rank=4, dropout=0.3), rows=sorted(LAYOUT.reserved()), seed=0)
    model = CausalLM(lm, layout=LAYOUT, grid=(2, 3))
    if kind != "gpt2":
        model.drop_residuals(0.3)
    return model


MODELS: dict[str, Callable[[], Painter]] = {
    "decoder": decoder,
    "decoder without paths": lambda: decoder(drop_path=0.0),
    **{kind: lambda kind=kind: language_model(kind) for kind in ("llama", "gpt2", "lora")},  # type: ignore[misc]
}


def batches(model: Painter) -> Batches | MixedBatches:
    generator = torch.Generator().manual_seed(1)
    pictures = InMemory(
        torch.randint(CODES, (RECORDS, 6), generator=generator),
        {"teacher": torch.randn(RECORDS, WIDTH, generator=generator)},
    )
    prompts = [[[3 + row % 7] * (1 + row % 4)] for row in range(RECORDS)]
    if isinstance(model, Decoder):
        return Batches(TextConditions(prompts, 5, dropout=0.2), pictures, batch_size=6, seed=1)
    written = Batches(
        PromptConditions((prompts,), ((2, 3),)), pictures, batch_size=6, seed=1, write=LayoutWriter(LAYOUT)
    )
    return MixedBatches(written, TextRows(3 + (torch.arange(5)[:, None] + torch.arange(8)) % 7), 3)


def aligning() -> Alignment:
    return Alignment(hidden_size=32, feature_size=WIDTH, layer=2, weight=0.5)


def trained(model: Painter, parts: list[TrainBatch], alignment: Alignment | None = None) -> tuple[Tensor, list[Tensor]]:
    """Sum of the parts' losses and their gradients."""
    model.zero_grad()
    told: dict[str, Any] = {
        "num_tokens": sum(int(part.labelled.sum()) for part in parts),
        "num_images": sum(int(part.predicting.any(1).sum()) for part in parts),
    }
    total = torch.zeros(())
    for part in parts:
        losses = compute_losses(model, part, alignment, **told)
        losses.total.backward()
        total += losses.total.detach()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert len(one[1]) == len(other[1])
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def cut(batch: TrainBatch, size: int) -> Iterator[TrainBatch]:
    for start in range(0, len(batch.tokens), size):
        yield batch.changed(lambda part, start=start: part[start : start + size])  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (5, 64), (2, 3, 9)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_masks_are_those_of_the_formulas(shape: tuple[int, ...], p: float) -> None:
    seeds = torch.tensor([0, 1, 2**62 + 5, -3])
    found = keep_mask(seeds, shape, site=3, p=p)
    plain = plain_dropout.kept(seeds.numpy().astype(np.uint64), shape, 3, min(p, 65535 / 65536))
    assert np.array_equal(found.numpy(), plain)


def test_sites_and_paths_are_those_of_the_formulas() -> None:
    seeds = torch.tensor([0, 1, 2**62 + 5])
    by_layer, plain = site_seeds(seeds, 4), plain_dropout.site_seeds(seeds, 4)
    assert np.array_equal(by_layer.numpy().astype(np.uint64), plain)
    factors = path_factors(by_layer, 0.6, site=2)
    for layer in range(4):
        levels = round(0.6 * 65536) * layer // 3
        kept = torch.from_numpy(plain_dropout.path_kept(plain[layer], 2, levels)).T
        torch.testing.assert_close(factors[layer], kept / (1 - levels / 65536))


def test_an_element_stays_or_goes_whatever_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other rows, longer sequences, wider states, and the portions in which draws are made."""
    seeds = torch.arange(5)
    whole = keep_mask(seeds, (6, 40), site=0, p=0.3)
    assert torch.equal(keep_mask(seeds[3:4], (6, 40), site=0, p=0.3), whole[3:4])
    assert torch.equal(keep_mask(seeds[:0], (6, 40), site=0, p=0.3), whole[:0])
    assert torch.equal(keep_mask(seeds, (4, 33), site=0, p=0.3), whole[:, :4, :33])
    monkeypatch.setattr("arra.models.dropout.CHUNK", 47)
    assert torch.equal(keep_mask(seeds, (6, 40), site=0, p=0.3), whole)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("plain_seeds", [True, False])
def test_rates_are_right_and_draws_independent(p: float, plain_seeds: bool) -> None:
    """Also of seeds that follow one another. Deviations are in standard errors, of which 5 come once in 10^6."""
    seeds = torch.arange(32) if plain_seeds else row_seeds(0, "dropout", 0, 32)

    def stays(seeds: Tensor, site: int = 0) -> Tensor:
        return keep_mask(seeds, (128, 128), site=site, p=p).double()

    kept, share = stays(seeds), 1 / scale(p)
    assert share == pytest.approx(1 - p, abs=1e-5)
    each = (kept - share) / math.sqrt(share * (1 - share))
    layers = site_seeds(seeds, 2)
    others = {
        "next site": stays(seeds, 1),
        "next layer": stays(layers[0]),
        "the layer after": stays(layers[1]),
    }
    products = {name: each * (mask - share) for name, mask in others.items()}
    products |= {f"row + {n}": each[n:] * (kept[:-n] - share) for n in (1, 2, 16)}
    products |= {f"position + {n}": each[:, n:] * (kept[:, :-n] - share) for n in (1, 2, 3, 32, 64)}
    products |= {f"element + {n}": each[..., n:] * (kept[..., :-n] - share) for n in (1, 2, 3, 4, 32, 64)}
    four = each[:, 1:, 2:] * each[:, :-1, 2:] * each[:, 1:, :-2] * each[:, :-1, :-2]
    products |= {"rectangle": four * math.sqrt(share * (1 - share))}
    for name, product in products.items():
        mean = float(product.mean()) / math.sqrt(share * (1 - share))
        assert abs(mean) * math.sqrt(product.numel()) < 5, name
    for part in (each, each[..., ::2], each[..., 1::2]):
        assert abs(float(part.mean())) * math.sqrt(part.numel()) < 5
    for axis in range(3):  # counts along every axis vary as those of independent draws do
        sums = each.sum(axis) / math.sqrt(each.shape[axis])
        assert abs(float(sums.square().mean()) - 1) * math.sqrt(sums.numel() / 2) < 6 + 2 / (share * (1 - share)) ** 0.5


def test_dropping_scales_what_stays_and_its_gradient() -> None:
    x, seeds = torch.randn(3, 5, 8, requires_grad=True), torch.arange(3)
    out = dropped(x, 0.25, seeds, site=1)
    kept = keep_mask(seeds, (5, 8), site=1, p=0.25)
    torch.testing.assert_close(out, x * kept / 0.75)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    assert dropped(x, 0.0, seeds) is x
    narrow = dropped(x.bfloat16(), 0.25, seeds, site=1)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow != 0, kept)


def test_a_row_is_known_by_its_seed_in_flattened_states() -> None:
    site, x = RowDropout(0.5), torch.ones(3, 4, 8)
    site.seeds = torch.arange(3)
    assert torch.equal(site(x.flatten(0, 1)), site(x).flatten(0, 1))
    assert torch.equal(site(x), dropped(x, 0.5, torch.arange(3)))
    with pytest.raises(ArraError, match=r"dropout: states of shape \(4, 8\) do not show which of 3 rows"):
        site(torch.ones(4, 8))
    assert site.eval()(x) is x
    drawing = RowDropout(0.5)
    assert not torch.equal(drawing(x), drawing(x))


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_batch_drop_what_the_whole_drops(name: str) -> None:
    """Any micro-batches, any ranks' parts; rows of text and pictures; aligned."""
    model = MODELS[name]().train()
    made, alignment = batches(model), aligning()
    whole = made.batch(4)
    wanted = trained(model, [whole], alignment)
    assert_same(trained(model, list(cut(whole, 4)), alignment), wanted)
    parts = [made.batch(4, rank=rank, num_ranks=4) for rank in range(4)]
    assert_same(trained(model, parts, alignment), wanted)
    other = replace(whole, dropout_seeds=made.batch(5).dropout_seeds)
    assert abs(float(trained(model, [other], alignment)[0] - wanted[0])) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_drops_the_same_again(name: str) -> None:
    model = MODELS[name]().train()
    batch = batches(model).batch(0)
    wanted = trained(model, [batch])
    copied = copy.deepcopy(model)
    recompute_blocks(model, TrainSettings(steps=1, recompute="full"))
    torch.manual_seed(3)
    assert_same(trained(model, [batch]), wanted)
    assert_same(trained(copied, [batch]), wanted)  # a copy of the model has sites of its own


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_whatever_was_drawn_before(name: str) -> None:
    """A resumed training, another process; with an alignment or without. Nothing is drawn of torch's generator."""
    first = MODELS[name]().train()
    batch = batches(first).batch(7)
    losses, gradients = trained(first, [batch])
    torch.manual_seed(99)
    again = MODELS[name]().train()
    before = torch.get_rng_state()
    found = trained(again, [batches(again).batch(7)])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], losses)
    assert all(map(torch.equal, found[1], gradients))
    weightless = Alignment(hidden_size=32, feature_size=WIDTH, layer=1, weight=0.0)
    assert all(map(torch.equal, trained(again, [batch], weightless)[1], gradients))


@pytest.mark.parametrize("name", MODELS)
def test_by_hand_every_pass_drops_otherwise_and_painting_never(name: str) -> None:
    model = MODELS[name]()
    tokens = batches(model).batch(0).tokens[:, :-1]
    seeds = torch.arange(len(tokens))
    quiet = model.eval()(tokens).last_hidden
    assert torch.equal(model(tokens, dropout_seeds=seeds).last_hidden, quiet)
    model.train()
    first, second = model(tokens).last_hidden, model(tokens).last_hidden
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    third = model(tokens).last_hidden
    torch.manual_seed(1)
    assert torch.equal(model(tokens).last_hidden, third)
    assert torch.equal(model.eval()(tokens).last_hidden, quiet)


def test_rows_of_data_have_seeds_of_their_own() -> None:
    """Of all positions, pictures and text; held-out rows have none."""
    made = batches(language_model("llama"))
    assert isinstance(made, MixedBatches)
    seeds: list[int] = []
    for position in range(20):
        found = made.batch(position).dropout_seeds
        assert found is not None
        assert len(found) == 6 + 3
        seeds += found.tolist()
    assert len(set(seeds)) == len(seeds)
    assert made.text.batch(torch.arange(2)).dropout_seeds is None
    assert text_batch([[2]], torch.zeros(1, 6, dtype=torch.int64), prefix_length=5).dropout_seeds is None


def test_a_network_of_modules_keeps_its_names_and_its_rates() -> None:
    model = language_model("gpt2")
    names, kinds = [*model.state_dict()], {name: type(part) for name, part in model.lm.named_modules()}
    rates = {name: part.p for name, part in model.lm.named_modules() if isinstance(part, nn.Dropout) and part.p}
    assert rates
    model.eval()
    assert {name: type(part) for name, part in model.lm.named_modules()} == kinds
    for _ in range(2):
        model.train()
        found = {name: part.p for name, part in model.lm.named_modules() if isinstance(part, RowDropout)}
        assert found == rates
    assert [*model.state_dict()] == names
    model(torch.zeros(2, 5, dtype=torch.int64))
    noted = [part.seeds for part in model.lm.modules() if isinstance(part, RowDropout)]
    assert len({tuple(each.tolist()) for each in noted if each is not None}) == len(rates)


@pytest.fixture
def traceable() -> Iterator[None]:
    """The checks of types in tests, which no compiler can look through, are off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("shape", [(5, 8), (3, 7)])
def test_compiled_it_is_one_graph_and_the_same_bits(shape: tuple[int, int]) -> None:
    x, seeds = torch.randn(2, *shape), torch.tensor([4, 5])
    compiled = torch.compile(lambda x, seeds: dropped(x, 0.3, seeds, site=1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, seeds), dropped(x, 0.3, seeds, site=1))


@pytest.mark.usefixtures("traceable")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_blocks_are_compiled_once_for_all_layers() -> None:
    """Nothing but tensors tells them apart."""
    model = decoder(num_layers=4).train()
    plain = model(torch.zeros(2, 8, dtype=torch.int64), dropout_seeds=torch.arange(2)).last_hidden
    counts = []

    def counting(graph: Any, inputs: Any) -> Any:
        counts.append(graph)
        return graph.forward

    for block in model.blocks:
        assert isinstance(block, Block)
        block.compile(backend=counting, fullgraph=True)
    found = model(torch.zeros(2, 8, dtype=torch.int64), dropout_seeds=torch.arange(2)).last_hidden
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    assert len(counts) == 1
