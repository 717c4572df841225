"""Adapters train what they promise and nothing else, say so in `peft`'s own files, and leave an ordinary model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.adapters import LoraSettings, add_lora, merge_adapters, quantize, save_adapter, train_head_rows
from arra.models.chameleon import build_chameleon, chameleon_settings
from arra.models.extend import head_layer, is_tied
from arra.models.head import Head, head_loss, head_of
from tests.models import toy_chameleon
from tests.models.toy_lms import toy_lm

VOCABULARY = 50
ROWS = (40, 41, 45)
TOKENS = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "smollm", "gemma2", "phi", "gpt2", "falcon", "cohere", "granite", "chameleon")
PEFT_OPENS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # peft asks by an old name
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
Change = Callable[[Any], None]


def lora(lm: Any, **changes: Any) -> None:
    add_lora(lm, LoraSettings(rank=4, **changes), rows=ROWS, seed=1)


def head_rows(lm: Any) -> None:
    train_head_rows(lm, ROWS)


CHANGES: dict[str, Change] = {"lora": lora, "head": head_rows}


def plain(family: str) -> Any:
    if family != "chameleon":
        return toy_lm(family, rows=VOCABULARY)
    torch.manual_seed(0)
    settings = chameleon_settings("toy", toy_chameleon.config())
    lm = build_chameleon(settings, rows=None, image_tokenizer=True).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.15)
    return lm


def make(family: str, change: Change) -> Any:
    lm = plain(family).train()
    change(lm)
    return lm


def logits(lm: Any) -> Tensor:
    """As a painter computes them: the network's states under our head."""
    config = lm.config
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = head_of(head_layer(lm), scale=scale, softcap=softcap)
    assert isinstance(head, Head)
    return head(lm.base_model(TOKENS).last_hidden_state)


def trained(lm: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in lm.named_parameters() if p.requires_grad}


def train(lm: Any, steps: int = 3) -> None:
    """With decay and momentum, which move whatever they reach."""
    optimizer = torch.optim.AdamW(trained(lm).values(), lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = lm.base_model(TOKENS[:, :-1]).last_hidden_state.flatten(0, 1)
        labels = TOKENS[:, 1:].flatten()
        shares = torch.full((len(labels),), 1 / len(labels))
        head_loss(hidden, head_of(head_layer(lm)), labels, shares=shares)[0].backward()
        optimizer.step()


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_and_merged_into_an_ordinary_model(family: str, kind: str, tmp_path: Path) -> None:
    lm, base = make(family, CHANGES[kind]), plain(family)
    assert type(lm) is type(base)
    torch.testing.assert_close(logits(lm.eval()), logits(base))  # an adapter begins as nothing
    train(lm.train())
    before = logits(lm.eval()).detach()
    assert (before - logits(base)).abs().max() > 1e-2
    merge_adapters(lm)
    torch.testing.assert_close(logits(lm), before, rtol=1e-4, atol=1e-4)
    assert is_tied(lm) == is_tied(base)
    assert [*lm.state_dict()] == [*base.state_dict()]
    assert {*map(type, lm.modules())} == {*map(type, base.modules())}
    assert not hasattr(lm, "peft_config")
    theirs, vocabulary = base.state_dict(), len(head_layer(base).weight)
    others = [row for row in range(vocabulary) if row not in ROWS]
    for name, value in lm.state_dict().items():
        if value.shape[:1] == (vocabulary,):  # embeddings, head and its bias: nothing reaches another token's row
            assert torch.equal(value[others], theirs[name][others]), name
        elif kind == "head" or value.dim() == 1:
            assert torch.equal(value, theirs[name]), name
    head = (head_layer(lm).weight - head_layer(base).weight)[list(ROWS)]
    assert head.abs().min(1).values.min() > 0
    lm.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(lm))


@PEFT_OPENS
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("family", ["llama", "smollm"])
def test_peft_opens_what_is_saved(family: str, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    lm = make(family, CHANGES[kind])
    train(lm)
    save_adapter(lm, tmp_path / "adapter", base="toys/llama")
    base = toy_lm(family, rows=VOCABULARY)
    base.save_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, logits(lm.eval()))
    assert theirs.peft_config["default"].base_model_name_or_path == "toys/llama"
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 4 * sum(p.numel() for p in trained(lm).values()) * (2 if is_tied(base) else 1) + 10_000


@PEFT_OPENS
def test_four_bits_train_and_merge_at_full_width(tmp_path: Path) -> None:
    from peft import PeftModel

    def four_bits(lm: Any) -> None:
        quantize(lm)
        lora(lm)

    lm, base = make("phi", four_bits), toy_lm("phi", rows=VOCABULARY)
    frozen = [p for p in lm.parameters() if p.dtype == torch.uint8]
    assert len(frozen) == sum(isinstance(m, nn.Linear) for m in base.base_model.modules())
    with torch.no_grad():
        off = (logits(lm.eval()) - logits(base)).norm() / (logits(base) - logits(base).mean()).norm()
    assert 0 < off < 0.5  # narrowed, not something else
    start = {name: p.detach().clone() for name, p in trained(lm).items()}
    train(lm.train())  # after a look in eval mode, as previews have it
    assert all(not torch.equal(p, start[name]) for name, p in trained(lm).items())
    before = logits(lm.eval()).detach()
    save_adapter(lm, tmp_path, base="toys/phi")
    narrow = toy_lm("phi", rows=VOCABULARY)
    quantize(narrow)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(narrow, tmp_path).eval().base_model.model
        torch.testing.assert_close(logits(theirs), before)
    merge_adapters(lm)
    torch.testing.assert_close(logits(lm), before, rtol=1e-4, atol=1e-4)
    assert [*lm.state_dict()] == [*base.state_dict()]
    assert all(p.dtype == torch.float32 for p in lm.parameters())


def test_adapters_of_a_narrow_model_are_float32() -> None:
    lm = toy_lm("llama", rows=VOCABULARY).to(torch.bfloat16)
    lora(lm)
    assert {p.dtype for p in trained(lm).values()} == {torch.float32}
    assert {p.dtype for p in lm.parameters() if not p.requires_grad} == {torch.bfloat16}
    train(lm)
    before = logits(lm).detach()
    merge_adapters(lm)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert (logits(lm) - before).abs().mean() < 0.05 * before.abs().mean()


def test_the_start_is_the_seeds_and_nobody_elses() -> None:
    def started(seed: int) -> list[Tensor]:
        lm = toy_lm("llama", rows=VOCABULARY)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        add_lora(lm, LoraSettings(rank=2), rows=ROWS, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [p.detach() for name, p in trained(lm).items() if "lora_A" in name]

    one, same, other = started(1), started(1), started(2)
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))


def test_names_say_what_is_trained() -> None:
    """Checkpoints know parameters by these names, so they must not change."""
    names = [*trained(make("llama", lora))]
    assert names[:3] == [
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    ]
    assert len(names) == 1 + 2 * 7 * 2 + 1
    assert [*trained(make("llama", head_rows))] == ["lm_head.trainable_tokens_delta.default"]
    assert [*trained(make("smollm", head_rows))] == ["model.embed_tokens.trainable_tokens_delta.default"]
    assert sum("lora_A" in name for name in trained(make("gpt2", lambda lm: lora(lm, targets=("c_attn",))))) == 2
    some = trained(make("llama", lambda lm: lora(lm, targets=("q_proj", "v_proj"))))
    assert sum("lora_A" in name for name in some) == 4


def test_settings_reach_the_layers() -> None:
    lm = make("llama", lambda lm: lora(lm, alpha=6.0, dropout=0.25, rank_stabilized=True))
    layer = lm.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 6.0 / 4**0.5
    assert layer.lora_dropout["default"].p == 0.25


def test_listeners_go_on_listening() -> None:
    lm = toy_lm("llama", rows=VOCABULARY)
    heard: list[nn.Module] = []
    for module in (lm.model.layers[1], lm.model.layers[0].mlp):
        module.register_forward_hook(lambda module, args, output: heard.append(module))
    lora(lm)
    logits(lm)
    assert heard == [lm.model.layers[0].mlp, lm.model.layers[1]]


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy_lm("llama", rows=VOCABULARY)
    with pytest.raises(ArraError, match=r"lora\.targets: LlamaForCausalLM has no layer 'w1'; it has down_proj, gate_p"):
        lora(lm, targets=("q_proj", "w1"))
    with pytest.raises(ArraError, match="has no layer 'lm_head'"):
        lora(lm, targets=("lm_head",))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ArraError, match=r"the package 'peft' is missing; pip install 'arra\[llm\]'"):
        lora(lm)
    with pytest.raises(ArraError, match=r"the package 'bitsandbytes' is missing; pip install 'arra\[lean\]'"):
        quantize(lm)
