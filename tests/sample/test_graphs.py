"""Laws of the loop of fixed shapes: it paints what the other loop paints, and no step of it waits for its host."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM
from arra.sample.decoding import Batch, Prefixes, decode_batch
from arra.sample.generate import Engine
from arra.sample.graphs import StaticLoop
from arra.sample.logits import SamplingSettings, draw_keys
from arra.tokenizers.prompts import prompt_tokenizer
from tests.models.toy_lms import toy_lm, toy_words
from tests.sample.test_generate import painter

GUIDANCE: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {"cfg_scale": 3.0},
    "interval": {"cfg_scale": 3.0, "cfg_interval": 4},
    "late": {"cfg_scale": 3.0, "cfg_start": 0.4},
    "between": {"cfg_scale": 3.0, "cfg_start": 0.2, "cfg_stop": 0.6},
    "rising": {"cfg_scale": 3.0, "cfg_schedule": "linear"},
}


def asked(model: Any, count: int) -> Any:
    kind = model.settings.condition
    if kind == "class":
        return model.condition(labels=[row % 9 for row in range(count)])
    if kind == "text":
        return model.condition(prompts=["abc" * (row % 3) for row in range(count)])
    torch.manual_seed(1)
    mask = torch.arange(4)[None] < torch.arange(1, count + 1)[:, None] % 4 + 1
    return model.condition(captions=(torch.randn(count, 4, 10), mask))


@pytest.mark.parametrize("kind", ["class", "text", "caption"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_it_paints_the_same(kind: str, guidance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches smaller than its own, one after the other through the same steps, with codes that are given."""
    monkeypatch.setattr("arra.sample.graphs.REACH", 8)
    model, settings = painter(kind), SamplingSettings(top_k=150, **GUIDANCE[guidance])
    loop = StaticLoop(model, (3, 5), settings, batch_size=3, captures=False)
    condition, keys = asked(model, 5), draw_keys(range(5), 15)
    given = torch.full((5, 15), -1)
    given[3:, :2], given[4, 7] = 11, 12
    prefixes = Prefixes()
    with torch.no_grad():
        for rows in (range(3), range(2, 4), range(4, 5)):
            places = torch.tensor([*rows])
            batch = Batch(condition.select(places), [*rows], keys[places], given[places])
            found = loop.decode_batch(batch, prefixes=prefixes)
            assert torch.equal(found, decode_batch(model, batch, grid=(3, 5), settings=settings))


def language_model(family: str, **changes: Any) -> CausalLM:
    """One that writes side tokens before its pictures and a new line after each row of codes."""
    layout = ImageLayout(
        family="generic", bos=0, begin_image=300, end_image=301, new_line=302, first_size=302, num_sizes=8,
        closing=(1,), first_code=311, num_codes=24, unconditional="empty_prompt", max_positions=512,
    )  # fmt: skip
    text = prompt_tokenizer(toy_words().backend_tokenizer.to_str(), reserved=layout.reserved(), source="toy")
    return CausalLM(toy_lm(family, rows=340, **changes), layout=layout, grid=(3, 4), text_tokenizer=text)


@pytest.mark.parametrize("guidance", ["on", "between"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_language_models_paint_the_same(family: str, guidance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths, in chunks whose prefixes have others; with new lines between the codes."""
    monkeypatch.setattr("arra.sample.graphs.REACH", 4)  # so that a new line's place is the first of a new reach
    monkeypatch.setattr("arra.models.causal.PREFIX_STEP", 8)
    model, settings = language_model(family), SamplingSettings(**GUIDANCE[guidance])
    chunks = [["a red bar", "a", "blue"], ["a red bar", "green"], ["a blue bar a red bar", "a"]]
    with Engine(model, settings=settings, batch_size=2, graphs=True) as static, nobody_waits():
        found = [static.generate(prompts=prompts, seeds=range(len(prompts))).codes for prompts in chunks]
    with Engine(model, settings=settings, batch_size=2) as plain:
        for codes, prompts in zip(found, chunks, strict=True):
            assert torch.equal(codes, plain.generate(prompts=prompts, seeds=range(len(prompts))).codes)


def test_captions_of_one_engine_may_be_padded_or_not() -> None:
    model, settings = painter("caption"), SamplingSettings(cfg_scale=2.0)
    features, mask = asked(model, 2).caption, torch.tensor([[False, True, True, True], [False, False, True, True]])
    with Engine(model, settings=settings, batch_size=2, graphs=True) as static, Engine(model, settings=settings) as by:
        for real in (None, mask, None):
            found, plain = (each.generate(captions=(features, real), seeds=[0, 1]) for each in (static, by))
            assert torch.equal(found.codes, plain.codes)


@torch.no_grad()
def test_an_engine_that_is_opened_again_paints_with_the_weights_of_then() -> None:
    """Of a language model's head it holds a copy; nothing of it is kept while the engine is closed."""
    model, found = language_model("llama"), []
    head = model.lm.get_output_embeddings()  # type: ignore[operator]
    engine = Engine(model, settings=SamplingSettings(), batch_size=2, graphs=True)
    for _ in range(2):
        with engine:
            found.append(engine.generate(prompts=["a", "blue"], seeds=[0, 1]).codes)
        assert engine._static is not None
        assert engine._static._picture is None
        assert not engine._static._steps
        head.weight.copy_(head.weight.flip(0))
    assert not torch.equal(*found)
    with Engine(model, settings=SamplingSettings()) as other:
        assert torch.equal(other.generate(prompts=["a", "blue"], seeds=[0, 1]).codes, found[0])


def test_attention_that_counts_by_itself_has_no_fixed_shapes() -> None:
    windows = {"attention_types": [[["global", "local"], 1]], "window_size": 6, "num_layers": 2}
    for model in (language_model("bloom"), language_model("falcon", alibi=True), language_model("gpt_neo", **windows)):
        assert not model.steps_alike
        with pytest.raises(ArraError, match="ALiBi do not have; leave them out"):
            Engine(model, settings=SamplingSettings(), graphs=True)
    assert all(language_model(family).steps_alike for family in ("falcon", "llama", "gpt2"))


class NobodyWaits(TorchDispatchMode):
    """Refuses what makes a host wait for its accelerator, and what a graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, "a number is read from the device"
        assert "nonzero" not in name, "a shape depends on values"
        return func(*args, **(kwargs or {}))


@contextmanager
def nobody_waits() -> Iterator[list[Any]]:
    """A block whose steps, collected, make nobody wait."""
    steps: list[Any] = []
    make = StaticLoop._step

    def watched(self: StaticLoop, *arguments: Any) -> Any:
        step = make(self, *arguments)

        def run() -> None:
            with NobodyWaits():
                step()
            steps.append(step)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticLoop, "_step", watched)
        yield steps


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0}])
@pytest.mark.parametrize("kind", ["class", "text"])
def test_no_step_waits_for_its_host(kind: str, filters: dict[str, Any]) -> None:
    model = painter(kind)
    loop = StaticLoop(model, (3, 5), SamplingSettings(cfg_scale=2.0, **filters), batch_size=2, captures=False)
    with torch.no_grad(), nobody_waits() as steps:
        loop.decode_batch(Batch(asked(model, 2), [0, 1], draw_keys([0, 1], 15)))
    assert len(steps) == 14


COMPILED = """
import torch
import arra.sample.graphs
from arra.models.decoder import Decoder, DecoderSettings
from arra.sample.decoding import Batch, decode_batch
from arra.sample.graphs import StaticLoop
from arra.sample.logits import SamplingSettings, draw_keys

torch.manual_seed(3)
model = Decoder(DecoderSettings(num_layers=3, num_heads=4, hidden_size=64, num_codes=50, grid=(3, 5), num_classes=9))
torch.nn.init.normal_(model.output.weight, std=0.3)
settings = SamplingSettings(cfg_scale=2.0)
batch = Batch(model.eval().condition(labels=[1, 2]), [0, 1], draw_keys([0, 1], 15))
with torch.no_grad():
    loop = StaticLoop(model, (3, 5), settings, batch_size=2, captures=False, compiler="aot_eager")
    assert torch.equal(loop.decode_batch(batch), decode_batch(model, batch, grid=(3, 5), settings=settings))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    arra.sample.graphs.REACH = 1  # more kinds of steps than torch compiles unless told to
    loop = StaticLoop(model, (3, 5), settings, batch_size=2, captures=False, compiler="aot_eager")
    assert torch.equal(loop.decode_batch(batch), decode_batch(model, batch, grid=(3, 5), settings=settings))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 15
"""


def test_compiled_blocks_paint_the_same() -> None:
    """Traced whole, and once for all blocks; on a GPU an optimising compiler follows.

    In a process without the tests' type checks, which a compiler stumbles over.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_graphs_paint_the_same(guidance: str) -> None:
    model, settings = painter("class").cuda(), SamplingSettings(**GUIDANCE[guidance])
    batch = Batch(asked(model, 3), [0, 1, 2], draw_keys(range(3), 15).cuda())
    with torch.no_grad():
        loop = StaticLoop(model, (3, 5), settings, batch_size=4, captures=True)
        for _ in range(2):
            assert torch.equal(loop.decode_batch(batch), decode_batch(model, batch, grid=(3, 5), settings=settings))
