"""Our decoder and sampler against arrays made by running LlamaGen itself on random weights (see llamagen/README.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arra.models import load_decoder
from arra.models.blocks import attention_mask, rotary_table
from arra.models.decoder import Condition, Decoder, left_padded
from arra.sample.decoding import Batch, decode_batch
from arra.sample.logits import SamplingSettings, draw_keys, filter_logits

FOLDER = Path(__file__).parent / "llamagen"
NO_DROPOUT: dict[str, Any] = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}


@pytest.fixture
def c2i() -> tuple[Decoder, dict[str, Tensor]]:
    model = load_decoder("llamagen", weights=FOLDER / "c2i_tiny.pt", num_heads=4, grid=(4, 4), **NO_DROPOUT)
    return model, arrays("c2i_tiny")


@pytest.fixture
def t2i() -> tuple[Decoder, dict[str, Tensor]]:
    model = load_decoder("llamagen", weights=FOLDER / "t2i_tiny.pt", num_heads=4, grid=(4, 4), **NO_DROPOUT)
    return model, arrays("t2i_tiny")


def ntp_loss(logits: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def agree(ours: Tensor, theirs: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def test_settings_are_read_from_shapes(c2i: Any, t2i: Any) -> None:
    settings = c2i[0].settings
    assert (settings.num_layers, settings.hidden_size, settings.num_codes) == (3, 64, 128)
    assert (settings.condition, settings.num_classes, settings.ffn_width) == ("class", 10, 256)
    settings = t2i[0].settings
    assert (settings.condition, settings.caption_dim, settings.prefix_length) == ("caption", 48, 120)


@pytest.mark.parametrize("mode", [True, False])
def test_c2i_logits_loss_and_hidden(c2i: Any, mode: bool) -> None:
    model, gold = c2i
    model.train(mode)
    logits = model.logits(gold["idx"], labels=gold["cond"])
    agree(logits, gold["logits"])
    assert ntp_loss(logits, gold["idx"]).item() == pytest.approx(gold["loss"].item(), abs=1e-5)
    tokens = torch.cat([gold["cond"][:, None], gold["idx"][:, :-1]], dim=1)
    output = model(tokens, capture=(0, 1, 2, 3))
    agree(torch.stack([output.captured[layer] for layer in range(4)]), gold["hidden"])
    agree(output.last_hidden, gold["hidden_norm"])
    torch.testing.assert_close(model.logits(gold["idx"].view(-1, 4, 4), labels=gold["cond"]), logits)


def test_rotary_table(c2i: Any) -> None:
    model, gold = c2i
    agree(rotary_table(model.settings), gold["freqs_cis"], atol=1e-6)


def test_c2i_gradients(c2i: Any) -> None:
    model, gold = c2i
    model.train()
    ntp_loss(model.logits(gold["idx"], labels=gold["cond"]), gold["idx"]).backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == {key.removeprefix("grad/") for key in gold if key.startswith("grad/")}
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, gold[f"grad/{key}"], rtol=1e-3, atol=1e-6, msg=key)


def test_ten_adamw_steps(c2i: Any) -> None:
    model, gold = c2i
    model.train()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(10):
        optimizer.zero_grad()
        loss = ntp_loss(model.logits(gold["idx"], labels=gold["cond"]), gold["idx"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.item() == pytest.approx(gold["train_losses"][step].item(), abs=1e-5)
        assert norm.item() == pytest.approx(gold["train_grad_norms"][step].item(), rel=1e-3)
    agree(model.output.weight.detach(), gold["train_final/output.weight"], atol=1e-4)
    agree(model.norm.weight.detach(), gold["train_final/norm.weight"], atol=1e-4)


def greedy(model: Decoder, condition: Condition, **guidance: Any) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    with torch.no_grad():
        keys = draw_keys([0] * len(condition), model.settings.num_positions)
        codes = decode_batch(
            model,
            Batch(condition, range(len(condition)), keys),
            grid=model.settings.grid,
            settings=SamplingSettings(temperature=0, **guidance),
            watch=lambda index, logits: seen.append(logits),
        )
    return codes, torch.stack(seen)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("cfg1", {}), ("cfg2", {"cfg_scale": 2.0}), ("cfg2_int5", {"cfg_scale": 2.0, "cfg_interval": 5})],
)
def test_c2i_generation(c2i: Any, name: str, guidance: dict[str, Any]) -> None:
    model, gold = c2i
    codes, logits = greedy(model, model.condition(labels=gold["gen_cond"]), **guidance)
    assert torch.equal(codes, gold[f"gen_{name}_tokens"].long())
    agree(logits, gold[f"gen_{name}_step_logits"])


@pytest.mark.parametrize("case", range(5))
def test_filters(c2i: Any, case: int) -> None:
    gold = c2i[1]
    temperature, top_k, top_p = gold[f"filter_{case}_args"].tolist()
    settings = SamplingSettings(temperature=temperature, top_k=int(top_k), top_p=top_p)
    probabilities = filter_logits(gold["filter_logits"], settings).softmax(-1)
    agree(probabilities, gold[f"filter_{case}_probs"], atol=1e-6)
    assert torch.equal(probabilities > 0, gold[f"filter_{case}_probs"] > 0)


def test_captions_are_left_padded(t2i: Any) -> None:
    gold = t2i[1]
    caption, mask = left_padded(gold["t5_emb"], gold["t5_mask"])
    assert torch.equal(caption, gold["caption"])
    assert torch.equal(mask, gold["caption_mask"].bool())


def test_t2i_mask(t2i: Any) -> None:
    gold = t2i[1]
    shape = tuple(gold["attn_mask_shape"].tolist())
    theirs = np.unpackbits(gold["attn_mask_packed"].numpy())[: int(np.prod(shape))].reshape(shape).astype(bool)
    ours = attention_mask(gold["caption_mask"].bool(), start=0, end=136, device=torch.device("cpu"))
    assert ours is not None
    assert torch.equal(ours, torch.from_numpy(theirs))


def test_t2i_logits_loss_and_hidden(t2i: Any) -> None:
    model, gold = t2i
    condition = model.condition(captions=(gold["t5_emb"], gold["t5_mask"]))
    tokens = torch.cat([condition.tokens, gold["idx"][:, :-1]], dim=1)
    output = model(tokens, **condition.inputs(), capture=range(4))
    agree(torch.stack([output.captured[layer][:, -17:] for layer in range(4)]), gold["hidden"], atol=2e-4)
    agree(output.last_hidden[:, -17:], gold["hidden_norm"], atol=2e-4)
    logits = model.logits(gold["idx"], captions=(gold["caption"], gold["caption_mask"]))
    agree(logits, gold["logits"])
    each = F.cross_entropy(logits.transpose(1, 2), gold["idx"], reduction="none").mean(1)
    loss = (each * gold["valid"]).sum() / gold["valid"].sum()
    assert loss.item() == pytest.approx(gold["loss"].item(), abs=1e-5)


def test_t2i_unconditional(t2i: Any) -> None:
    model, gold = t2i
    condition = model.null_condition(model.condition(captions=(gold["caption"], gold["caption_mask"])))
    tokens = torch.cat([condition.tokens, gold["idx"][:, :-1]], dim=1)
    hidden = model(tokens, **condition.inputs()).last_hidden
    agree(model.head(hidden[:, 119:]), gold["logits_uncond"])


@pytest.mark.parametrize(
    ("name", "cfg_scale", "masked"),
    [("cfg1", 1.0, True), ("cfg2", 2.0, True), ("cfg7.5", 7.5, True), ("nomask_cfg2", 2.0, False)],
)
def test_t2i_generation(t2i: Any, name: str, cfg_scale: float, masked: bool) -> None:
    model, gold = t2i
    condition = model.condition(captions=(gold["caption"], gold["caption_mask"] if masked else None))
    codes, logits = greedy(model, condition, cfg_scale=cfg_scale)
    assert torch.equal(codes, gold[f"gen_{name}_tokens"].long())
    agree(logits, gold[f"gen_{name}_step_logits"], atol=2e-4)


@pytest.mark.parametrize("style", ["train", "fsdp", "deepspeed"])
def test_checkpoint_styles(style: str) -> None:
    # the FSDP file carries a stray rotary table, from which heads and grid can be told
    known: dict[str, Any] = {} if style == "fsdp" else {"num_heads": 2, "grid": (2, 2)}
    model = load_decoder("llamagen", weights=FOLDER / f"ckpt_{style}_style.pt", **known)
    reference = load_decoder("llamagen", weights=FOLDER / "ckpt_fsdp_style.pt")
    assert model.settings == reference.settings
    assert (model.settings.num_heads, model.settings.grid, model.settings.num_classes) == (2, (2, 2), 3)
    state = model.state_dict()
    assert not any("freqs_cis" in key for key in state)
    for key, value in reference.state_dict().items():
        assert torch.equal(state[key], value)


def test_ema_entry() -> None:
    path = FOLDER / "ckpt_train_style.pt"
    known: dict[str, Any] = {"num_heads": 2, "grid": (2, 2)}
    model = load_decoder("llamagen", weights=path, **known)
    ema = load_decoder("llamagen", weights=path, entry="ema", **known)
    for ours, averaged in zip(model.state_dict().values(), ema.state_dict().values(), strict=True):
        assert torch.equal(averaged, ours * 0.5)
