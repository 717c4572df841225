"""Chameleon against arrays made by running ARRA's and Lumina-mGPT's own code on random weights (see arra/README.md).

Letters: B batch, T sequence, V vocabulary, D width.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arra import Alignment
from arra.data.layout import ImageLayout
from arra.models.causal import CausalLM
from arra.models.chameleon import ReadChameleon, SharedHeadNorm, read_chameleon
from arra.models.decoder import Condition

FOLDER = Path(__file__).parent / "arra"
ROWS = {
    "head_mp1": 1,
    "head_mp2": 2,
    "old_per_head": None,
    "head_swin_mp2_gqa": 2,
    "head_gqa_mp1": 1,
    "head_bias_theta": 1,
}
Z_WEIGHT = 1e-5
WINDOWS = {"train_head_clamped": slice(0, -1), "train_toy_window": slice(-17, -1)}
CODES = slice(4, 68)
LAYOUT = ImageLayout(
    family="lumina", bos=0, separator=70, begin_image=69, end_image=68, new_line=72, first_size=73, num_sizes=16,
    size_step=2, closing=(70,), first_code=4, num_codes=64, max_positions=4096,
)  # fmt: skip


@pytest.fixture(scope="module")
def gold() -> dict[str, Tensor]:
    with np.load(FOLDER / "chameleon_tiny.npz") as stored:
        return {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ReadChameleon]:
    told = json.loads((FOLDER / "chameleon_configs.json").read_text())

    def by_name(variant: str) -> ReadChameleon:
        folder = tmp_path_factory.mktemp(variant)
        config = told["variants"][variant] | {"vocabulary_map": told["reduced_vocabulary_map"]}
        (folder / "config.json").write_text(json.dumps({"model_type": "chameleon", **config}))
        (folder / "weights.pt").symlink_to(FOLDER / f"chameleon_tiny_{variant}.pt")
        return read_chameleon(folder)

    return by_name


def wrapped(read: ReadChameleon) -> CausalLM:
    return CausalLM(read.lm, layout=LAYOUT, grid=(4, 4), head_norm_rows=read.head_norm_rows)


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the square of the normaliser, means over labels, written as plainly as can be."""
    rows, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ce = F.cross_entropy(rows, wanted)
    z = torch.logsumexp(rows[wanted >= 0], dim=-1).square().mean()
    return ce, z


@pytest.mark.parametrize("variant", ROWS)
@torch.no_grad()
def test_every_weight_layout(variant: str, gold: dict[str, Tensor], read: Callable[[str], ReadChameleon]) -> None:
    """transformers 5.23 gave bit for bit the same numbers as the fork, so one array stands for both."""
    found = read(variant)
    assert found.head_norm_rows == ROWS[variant]
    model = wrapped(found)
    output = model(gold["input_ids"], capture=range(4))
    logits = model.lm_head(output.last_hidden)
    torch.testing.assert_close(logits, gold[f"{variant}/logits"], atol=1e-4, rtol=0)
    theirs = gold[f"{variant}/hidden_states"]
    for layer in range(3):  # 0: embeddings, k: what block k - 1 gives
        torch.testing.assert_close(output.captured[layer], theirs[layer], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.last_hidden, theirs[3], atol=1e-4, rtol=0)  # after the final norm
    assert (output.captured[3] - theirs[3]).abs().max() > 1e-2  # ours is before it
    ce, z = losses(logits, gold["labels"])
    torch.testing.assert_close(ce, gold[f"{variant}/loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(z, gold[f"{variant}/z_loss"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_unconditional_context(gold: dict[str, Tensor], read: Callable[[str], ReadChameleon]) -> None:
    """Guidance's null row is everything from begin-image on, at positions from 0."""
    model = wrapped(read("head_mp1"))
    start = int(gold["head_mp1/tail_start"])
    theirs = gold["head_mp1/tail_from_boi_logits"]
    tail = gold["input_ids"][:1, start : start + theirs.shape[1]]
    assert int(tail[0, 0]) == LAYOUT.begin_image
    logits = model.lm_head(model(tail).last_hidden)
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)
    codes = torch.from_numpy(LAYOUT.read_image(tail[0].tolist())).flatten()[None]
    nothing = Condition(tail[:, :1], torch.ones(1, 1, dtype=torch.bool))
    rows = model.null_condition(nothing)
    places = [place for place, token in enumerate(tail[0].tolist()) if CODES.start <= token < CODES.stop]
    memory, found = model.prefill(rows, codes[:, :0], grid=(4, 4))
    cache = memory.spread(torch.arange(len(rows)), length=model.memory_length(rows, (4, 4)))
    for index, place in enumerate(places):  # decoding step by step
        torch.testing.assert_close(found, theirs[:, place - 1, CODES], atol=1e-4, rtol=0)
        if index + 1 < len(places):
            found = model.decode(rows, cache, codes=codes[:, index, None], index=index, grid=(4, 4))


@torch.no_grad()
def test_masked_image_logits_make_the_loss_infinite(
    gold: dict[str, Tensor], read: Callable[[str], ReadChameleon]
) -> None:
    """What the released flag, and transformers' own forward, do to image logits; ours never does it."""
    lm = read("head_mp1").lm
    assert torch.isinf(gold["head_mp1/masked_loss"])
    ids, labels = gold["input_ids"], gold["labels"]
    theirs = lm(ids).logits
    torch.testing.assert_close(theirs[0, -1], gold["head_mp1/masked_logits_last_row"], atol=1e-4, rtol=0)
    assert torch.isinf(losses(theirs, labels)[0])
    assert torch.isfinite(losses(gold["head_mp1/logits"], labels)[0])
    rest = torch.ones(160, dtype=torch.bool)
    rest[CODES] = False
    torch.testing.assert_close(theirs[..., rest], gold["head_mp1/logits"][..., rest], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tag", WINDOWS)
def test_training_losses_and_gradients(tag: str, gold: dict[str, Tensor], read: Callable[[str], ReadChameleon]) -> None:
    """ARRA's objective on its own window of positions; gradients pass through norms that heads share."""
    found = read("train")
    assert isinstance(found.lm.model.layers[0].self_attn.q_norm, SharedHeadNorm)
    assert len(found.left.ignored) == 4  # the projector, no part of the language model
    align = Alignment(hidden_size=64, feature_size=24, layer=1)
    weights = torch.load(FOLDER / "chameleon_tiny_train.pt", weights_only=True)
    theirs = {key: value for key, value in weights.items() if key.startswith("adaptor.")}
    align.projector.load_state_dict(dict(zip(align.projector.state_dict(), theirs.values(), strict=True)))
    model = wrapped(found)

    output = model(gold["input_ids"], capture=(align.layer,))
    ce, z = losses(model.lm_head(output.last_hidden), gold["labels"])
    positions = torch.zeros_like(gold["labels"], dtype=torch.bool)
    positions[:, WINDOWS[tag]] = True
    gva = align(output.captured[align.layer], gold[f"{tag}/target"], positions)
    total = ce + Z_WEIGHT * z + gva
    for name, value, atol in (("ce", ce, 1e-5), ("z_loss", z, 1e-4), ("gva", gva, 1e-5), ("total", total, 1e-5)):
        torch.testing.assert_close(value, gold[f"{tag}/{name}"], atol=atol, rtol=0)

    named: dict[str, Any] = dict(found.lm.named_parameters())
    named |= dict(zip(theirs, align.projector.parameters(), strict=True))
    listened = torch.autograd.grad(gva, list(named.values()), retain_graph=True, allow_unused=True)
    heard = {name for name, grad in zip(named, listened, strict=True) if grad is not None}
    total.backward()
    norms = [key for key in gold if key.startswith(f"{tag}/grad_norm/")]
    assert {key.rpartition("/")[2] for key in norms} == set(named)
    for key in norms:
        grad = named[key.rpartition("/")[2]].grad
        torch.testing.assert_close(grad.norm(), gold[key], rtol=1e-3, atol=1e-7)
    if tag == "train_toy_window":
        for name, parameter in named.items():
            stored = gold[f"{tag}/grad/{name}"]
            torch.testing.assert_close(parameter.grad, stored, rtol=1e-3, atol=1e-5 * float(stored.abs().max()))
        assert heard == {key.rpartition("/")[2] for key in gold if key.startswith(f"{tag}/gva_grad_norm/")}
        for name, grad in zip(named, listened, strict=True):
            if grad is not None:
                torch.testing.assert_close(grad.norm(), gold[f"{tag}/gva_grad_norm/{name}"], rtol=1e-3, atol=1e-7)
