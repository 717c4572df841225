"""What a step costs is what is counted while it runs; a window adds up, and begins anew."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.data.batches import TrainBatch, text_batch
from arra.data.layout import ImageLayout
from arra.distributed import Ranks
from arra.models import CausalLM, Decoder, DecoderSettings, Painter
from arra.models.adapters import LoraSettings, add_lora, train_head_rows
from arra.train import meters
from arra.train.flops import count_flops
from arra.train.meters import Meters, known_peak, measured_flops, model_flops, peak_flops, peak_memory
from arra.train.objective import compute_losses
from tests.models.toy_lms import toy_lm

CPU = torch.device("cpu")
ROWS, PREFIX, GRID, WIDTH, HEADS, CODES, CAPTION = 3, 5, (2, 4), 32, 4, 24, 20
POSITIONS = GRID[0] * GRID[1]
FED = PREFIX + POSITIONS - 1


def decoder(**changes: Any) -> Decoder:
    fields: dict[str, Any] = {"condition": "text", "text_vocab_size": 30, "num_layers": 2, **changes}
    return Decoder(
        DecoderSettings(
            num_heads=HEADS, hidden_size=WIDTH, num_codes=CODES, grid=GRID, prefix_length=PREFIX, **fields
        )
    ).train()  # fmt: skip


def pictures(model: Decoder) -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(CODES, (ROWS, POSITIONS), generator=generator)
    batch = text_batch([[5, 6], [7], []], codes, prefix_length=PREFIX)
    if model.settings.condition != "caption":
        return batch
    caption = torch.randn(ROWS, PREFIX, CAPTION, generator=generator)
    return TrainBatch(batch.tokens, batch.labels, batch.code_mask, None, caption=caption)


def painter(family: str, **changes: Any) -> CausalLM:
    layout = ImageLayout(
        family="generic", bos=0, begin_image=30, end_image=31, first_code=32, num_codes=CODES,
        unconditional="empty_prompt", max_positions=512,
    )  # fmt: skip
    return CausalLM(toy_lm(family, rows=60, **changes).train(), layout=layout, grid=GRID)


def rows_of_text() -> TrainBatch:
    tokens = torch.randint(60, (ROWS, FED + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(FED + 1) % 3 == 0, -100)
    return TrainBatch(tokens, labels, torch.zeros_like(tokens, dtype=torch.bool), None)


def counted(model: Painter, batch: TrainBatch) -> int:
    return count_flops(lambda: compute_losses(model, batch, None).total.backward())


def predicted(model: Painter, batch: TrainBatch) -> float:
    labelled = int(batch.labelled.sum())
    return model_flops(model).of(positions=ROWS * FED, length=FED, labelled=labelled, images=ROWS)


def attention_made_again(width: int, layers: int) -> int:
    """Fused attention computes its scores once more in the backward pass, which no model asks for."""
    return 2 * ROWS * FED * FED * width * layers


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 2}, {"rep_token": True}, {"condition": "caption", "caption_dim": CAPTION}],
    ids=["plain", "grouped", "rep", "caption"],
)  # fmt: skip
def test_a_decoders_step(changes: dict[str, Any]) -> None:
    model = decoder(**changes)
    batch = pictures(model)
    assert predicted(model, batch) == counted(model, batch) - attention_made_again(WIDTH, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "falcon"])
def test_a_language_models_step(family: str) -> None:
    """Grouped queries, biases, heads wider than the model, one matrix for embeddings and head."""
    model = painter(family)
    told = predicted(model, rows_of_text())
    width = model.config.num_attention_heads * (getattr(model.config, "head_dim", None) or 8)
    again = counted(model, rows_of_text()) - told
    assert again in (0, attention_made_again(width, 2))


def test_frozen_matrices_cost_four_and_two_where_nothing_before_them_is_trained() -> None:
    whole, model = model_flops(painter("llama")), painter("llama")
    add_lora(model.lm, LoraSettings(rank=2, targets=("q_proj",)), rows=[40], seed=0)
    size = whole.per_position / 6
    lora = 2 * (2 * WIDTH + 2 * WIDTH)
    assert model_flops(model).per_position == 4 * size + 6 * lora
    assert model_flops(model).per_label == whole.per_label * 4 / 6
    head = painter("llama", tie_word_embeddings=False)
    train_head_rows(head.lm, [40])
    assert model_flops(head).per_position == 2 * size
    some = decoder(num_layers=3)
    some.requires_grad_(False)
    some.layers[1].requires_grad_(True)
    block = sum(p.numel() for p in some.layers[1].parameters() if p.dim() == 2)
    assert model_flops(some).per_position == (2 + 6 + 4) * block
    assert model_flops(some).per_label == 4 * WIDTH * CODES


def test_a_frozen_lower_part_is_counted_as_it_runs() -> None:
    model = decoder(num_layers=3)
    model.cls_embedding.requires_grad_(False)
    model.tok_embeddings.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    batch = pictures(model)
    spared = 8 * ROWS * FED * FED * WIDTH  # attention counts whole in every block
    assert predicted(model, batch) - spared == counted(model, batch) - attention_made_again(WIDTH, 2)


def test_experts_count_by_the_share_that_a_token_sees() -> None:
    model = painter("mixtral", num_local_experts=4, num_experts_per_tok=2)
    dense = painter("mistral")
    expert = 3 * 32 * 48
    per_layer = model_flops(dense).per_position / 6 / 2 - expert
    assert model_flops(model).per_position in (
        6 * 2 * (per_layer + 2 * expert),
        6 * 2 * (per_layer + 2 * expert + 4 * 32),  # with the router as a layer of its own
    )


def test_a_model_on_the_meta_device_costs_the_same() -> None:
    with torch.device("meta"):
        on_meta = decoder()
    assert model_flops(on_meta) == model_flops(decoder())


def test_a_window_adds_up_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "measured_flops", lambda *_: 1e9)
    model = decoder()
    told = Meters(model, device=CPU, ranks=Ranks(size=2))
    assert told.row().keys() == {"peak_memory_gib"}
    for seconds in (1.0, 3.0):
        told.waited(0.5)
        told.step(tokens=240, length=12, images=20, labelled=160, seconds=seconds)
    row = told.row()
    cost = 2 * model_flops(model).of(positions=240, length=12, labelled=160, images=20)
    assert (row["tokens_per_second"], row["images_per_second"], row["waiting_share"]) == (120, 10, 0.25)
    assert row["mfu"] == round(cost / 4.0 / 2e9, 4) > 0
    told.step(tokens=240, length=12, images=20, labelled=160, seconds=2.0)
    assert told.row()["tokens_per_second"] == 120
    assert told.row().keys() == {"peak_memory_gib"}


def test_precision_chooses_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "measured_flops", lambda device, kind, threads: {torch.bfloat16: 4e9}.get(kind, 1e9))
    assert Meters(decoder(), device=CPU).peak == 1e9
    assert Meters(decoder(), device=CPU, precision="bfloat16").peak == 4e9


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA L40", 181),
        ("NVIDIA L4", 121), ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71), ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_devices_by_name(name: str, tera: float | None) -> None:
    found = known_peak(name)
    assert (None if found is None else found.bfloat16) == tera


@pytest.mark.parametrize(("products", "tera"), [("ieee", 19.5), ("tf32", 156)])
def test_float32_is_as_fast_as_its_products_are_computed(
    monkeypatch: pytest.MonkeyPatch, products: str, tera: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    device, kept = torch.device("cuda", 0), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = products
        assert peak_flops(device, torch.float32) == tera * 1e12
        assert peak_flops(device, torch.bfloat16) == 312e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept


def test_an_unknown_device_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_flops.cache_clear()
    calls = []

    def product(matrix: Tensor) -> float:
        calls.append(len(matrix))
        return 2 * len(matrix) ** 3 / 1e12

    monkeypatch.setattr(meters, "_product_seconds", product)
    clock = iter(float(tick) / 100 for tick in range(1000))
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    assert math.isclose(peak_flops(CPU, torch.float32), 1e12)
    first = len(calls)
    assert max(calls) > min(calls)  # products grow until they are long enough to be worth timing
    assert peak_flops(CPU, torch.float32) == measured_flops(CPU, torch.float32, torch.get_num_threads())
    assert len(calls) == first
    measured_flops.cache_clear()


def test_peak_memory_never_falls() -> None:
    before = peak_memory(CPU)
    held = torch.ones(2**24)
    after = peak_memory(CPU)
    assert after >= before > 2**20
    assert after >= 4 * len(held)
