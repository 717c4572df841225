"""The arithmetic of painting's memory is that of the tensors there are, on meta as well; what cannot fit is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, Condition, Painter
from arra.models.decoder import Decoder, DecoderSettings
from arra.sample import memory
from arra.sample.graphs import static_length
from arra.sample.logits import SamplingSettings
from arra.sample.memory import PaintingMemory, held_bytes, painting_memory, refuse_too_large
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.models.toy_lms import toy_lm

GRID, GUIDED = (3, 4), SamplingSettings(cfg_scale=2.0)
DECODER = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "num_codes": 24, "grid": GRID}


LANGUAGE = ("llama", "qwen3", "gpt2", "falcon")


def language_model(family: str) -> Painter:
    layout = ImageLayout(
        family="generic", bos=0, begin_image=40, end_image=41, new_line=42, first_code=43, num_codes=24
    )
    heads = {"num_key_value_heads": 4} if family == "gpt2" else {}  # which has no fewer
    return CausalLM(toy_lm(family, rows=43 + 24, **heads), layout=layout, grid=GRID)


MAKERS: dict[str, Callable[[], Painter]] = {
    "class": lambda: Decoder(DecoderSettings(**DECODER)),
    "caption": lambda: Decoder(DecoderSettings(**DECODER, condition="caption")),
    **{name: partial(language_model, name) for name in LANGUAGE},
}


def cache_bytes(cache: Any) -> int:
    """Of all tensors of a memory of attention."""
    if hasattr(cache, "both"):
        return int(cache.both.nbytes)
    return sum(layer.all_keys.nbytes + layer.all_values.nbytes for layer in cache.layers.layers)


@pytest.mark.parametrize("name", [*MAKERS])
@torch.no_grad()
def test_cache_and_prefixes_are_those_that_are_made(name: str) -> None:
    model = MAKERS[name]().eval()
    length = 9 if name in LANGUAGE else model.settings.prefix_length  # type: ignore[union-attr]
    tokens, caption = torch.zeros(6, length, dtype=torch.int64), None
    if name == "caption":
        caption = torch.zeros(6, length, 2048)
    condition = Condition(tokens, caption=caption)
    prefixes, logits = model.prefill(condition, torch.zeros(6, 0, dtype=torch.int64), grid=GRID)
    whole = prefixes.spread(torch.arange(6), length=model.memory_length(condition, GRID))
    found = painting_memory(model, batch_size=3, settings=GUIDED, prefix_length=length)
    assert found.cache == cache_bytes(whole)
    assert found.prefixes == cache_bytes(prefixes) + logits.nbytes
    off = painting_memory(model, batch_size=3, settings=SamplingSettings(), prefix_length=length)
    assert (2 * off.cache, 2 * off.prefixes) == (found.cache, found.prefixes)


def test_rows_that_join_late_and_steps_of_fixed_shapes_take_more() -> None:
    model = MAKERS["class"]()
    once = painting_memory(model, batch_size=3, settings=GUIDED)
    late = painting_memory(model, batch_size=3, settings=SamplingSettings(cfg_scale=2.0, cfg_start=0.5))
    fixed = painting_memory(model, batch_size=3, settings=GUIDED, static=True)
    length = model.memory_length(model.condition(labels=[0]), GRID)
    assert late.cache == 2 * once.cache
    assert fixed.cache == once.cache + once.cache // length * static_length(length)
    assert once.total == once.standing + once.passing


def test_a_model_on_meta_is_counted_as_the_real_one() -> None:
    settings = DecoderSettings(**DECODER)
    with torch.device("meta"):
        outline = Decoder(settings)
    real = painting_memory(Decoder(settings), batch_size=5, settings=GUIDED)
    assert painting_memory(outline, batch_size=5, settings=GUIDED, device=torch.device("cpu")) == real
    assert real.weights == sum(tensor.nbytes for tensor in Decoder(settings).state_dict().values()) + _tables(outline)
    on_gpu = painting_memory(outline.bfloat16(), batch_size=5, settings=GUIDED, device=torch.device("cuda"))
    assert on_gpu.copies == 0
    assert 2 * on_gpu.cache == real.cache


def _tables(model: Decoder) -> int:
    """Buffers that are not stored."""
    stored = model.state_dict()
    return sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in stored)


def test_pictures_are_made_one_by_one_on_a_cpu_and_eight_together_on_a_gpu() -> None:
    network = VQModel(VQSettings(channels=32, ch_mult=(1, 2), num_codes=24))
    tokenizer = ImageTokenizer(network, name="toy", weights_hash=None)
    model = MAKERS["class"]()

    def pictures(device: str, batch_size: int) -> int:
        return painting_memory(
            model, tokenizer, batch_size=batch_size, settings=GUIDED, device=torch.device(device)
        ).pictures

    finished = 2 * 3 * 12 * 4  # uint8, twice, for each image
    assert pictures("cpu", 9) - pictures("cpu", 1) == 8 * finished
    assert pictures("cuda", 1) > 8 * (pictures("cpu", 1) - finished)
    assert painting_memory(model, tokenizer, batch_size=1, settings=GUIDED).tokenizer == held_bytes(network)


@pytest.mark.parametrize(("free", "fits"), [(10_000, 6), (1_000_000, 7), (3_999, 2), (1_700, 0)])
def test_a_batch_that_does_not_fit_is_refused_with_the_one_that_does(
    free: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: float(free))

    def memory_with(rows: int) -> PaintingMemory:
        return PaintingMemory(10**9, 0, 0, cache=1600 * rows, prefixes=0, reading=0, logits=200, pictures=0)

    if fits == 7:
        refuse_too_large(memory_with, batch_size=7, device=torch.device("cpu"))
        return
    told = f"batch_size {fits}$" if fits else "not even one image fits"
    with pytest.raises(
        ArraError, match=f"generate: batch_size: 7 images together take .* GiB are free on cpu; .*{told}"
    ):
        refuse_too_large(memory_with, batch_size=7, device=torch.device("cpu"))


def test_quantised_weights_count_as_they_lie() -> None:
    class Halves(torch.Tensor):
        """Says it has twice the numbers that it holds."""

        held: Tensor

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["held"], None

    weight = torch.zeros(8, 4).as_subclass(Halves)
    weight.held = torch.zeros(8, 2, dtype=torch.int8)
    layer = torch.nn.Linear(4, 8)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight.held = weight.held  # type: ignore[attr-defined]
    assert held_bytes(layer) == 16 + 8 * 4
