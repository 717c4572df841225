"""Our training loop against ten steps that LlamaGen itself took, and its loss on captions (see llamagen/README.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.align import Alignment, Places
from arra.data.batches import Batches, InMemory, TrainBatch, make_batch
from arra.data.conditions import CaptionConditions, ClassConditions, Prefix
from arra.models import Decoder, load_decoder
from arra.runs import Run
from arra.train.loop import Trainer
from arra.train.objective import compute_losses
from arra.train.passes import select
from arra.train.settings import TrainSettings

FOLDER = Path(__file__).parent / "llamagen"
NO_DROPOUT: dict[str, Any] = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
RECIPE: dict[str, Any] = {
    "steps": 10,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "schedule": "constant",
    "weight_decay": 0.05,
    "clip_norm": 1.0,
    "condition_dropout": 0.0,
    "log_every_steps": 1,
    "device": "cpu",
}


def golden(name: str) -> tuple[Decoder, dict[str, Tensor]]:
    model = load_decoder("llamagen", weights=FOLDER / f"{name}.pt", num_heads=4, grid=(4, 4), **NO_DROPOUT)
    with np.load(FOLDER / f"{name}.npz") as stored:
        return model, {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}


def trainer(folder: Path, **changes: Any) -> tuple[Trainer, dict[str, Tensor]]:
    model, gold = golden("c2i_tiny")
    # the null class is among the labels
    batches = Batches(ClassConditions(gold["cond"], null=10), InMemory(gold["idx"]), batch_size=4, seed=0)
    settings = TrainSettings(**{**RECIPE, **changes})
    return Trainer(model, None, batches, [], settings, Run.create(folder, "name: golden\n", {})), gold


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_ten_steps_are_those_of_the_original(micro_batch_size: int | None, tmp_path: Path) -> None:
    ours, gold = trainer(tmp_path, micro_batch_size=micro_batch_size)
    ours.train()
    rows = ours.run.read_metrics()
    assert [row["loss"] for row in rows] == pytest.approx(gold["train_losses"].tolist(), abs=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(gold["train_grad_norms"].tolist(), rel=1e-3)
    for name in ("output.weight", "norm.weight"):
        final = gold[f"train_final/{name}"]
        torch.testing.assert_close(ours.parameters[name].detach(), final, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"weight_decay": 0.0}, {"betas": (0.9, 0.999)}, {"clip_norm": 0.1}])
def test_every_setting_of_the_original_matters(change: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise the test above would not notice a wrong one."""
    ours, gold = trainer(tmp_path, **change)
    ours.train()
    final = ours.parameters["output.weight"].detach() - gold["train_final/output.weight"]
    assert final.abs().max() > 3e-4


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_decays_as_in_the_original(warmup: bool, tmp_path: Path) -> None:
    """Constantly, unless it is to warm up."""
    ours, _ = trainer(tmp_path, ema_decay=0.99, ema_warmup=warmup, steps=3)
    expected = {name: value.detach().clone() for name, value in ours.parameters.items()}
    for step in range(3):
        ours.train_step()
        decay = min(0.99, (2 + step) / (11 + step)) if warmup else 0.99
        for name, value in ours.parameters.items():
            expected[name] = expected[name] * decay + value.detach() * (1 - decay)
    for name, average in ours.averages.tensors().items():
        torch.testing.assert_close(average, expected[name.removeprefix("average.")])


class Ragged:
    """Caption features as the store gives them: as many vectors as a caption has tokens."""

    def __init__(self, features: Tensor, lengths: Tensor) -> None:
        self.values = [row[:length].numpy() for row, length in zip(features, lengths.tolist(), strict=True)]

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self.values[row] for row in rows]

    def expect(self, rows: np.ndarray) -> None:
        raise NotImplementedError


def caption_batch(gold: dict[str, Tensor]) -> TrainBatch:
    conditions = CaptionConditions(np.arange(4), Ragged(gold["t5_emb"], gold["lens"]), length=120, width=48)
    prefix = conditions.take(torch.arange(4), torch.ones(4, 3), torch.ones(4, 120))
    return make_batch(prefix, gold["idx"])


def test_captions_of_the_store_are_laid_out_as_the_original_does() -> None:
    _, gold = golden("t2i_tiny")
    batch = caption_batch(gold)
    assert batch.caption is not None
    assert batch.prefix_mask is not None
    assert torch.equal(batch.caption, gold["caption"])
    assert torch.equal(batch.prefix_mask, gold["caption_mask"].bool())


def test_the_loss_over_valid_records_is_that_of_the_original() -> None:
    """It weighs records without features by 0; here they are left out, which is the same mean."""
    model, gold = golden("t2i_tiny")
    batch = caption_batch(gold)
    valid = gold["valid"].bool()
    parts: dict[str, Any] = {name: None if value is None else value[valid] for name, value in vars(batch).items()}
    losses = compute_losses(model, TrainBatch(**parts), None)
    assert losses.total.item() == pytest.approx(gold["loss"].item(), abs=1e-5)
    assert compute_losses(model, batch, None).total.item() != pytest.approx(gold["loss"].item(), abs=1e-3)
    assert compute_losses(model, select(batch, slice(0, 2)), None).total.item() != pytest.approx(
        gold["loss"].item(), abs=1e-4
    )


def test_a_dropped_caption_keeps_its_mask() -> None:
    """Every caption null: the original's unconditional logits, under the masks of the captions."""
    model, gold = golden("t2i_tiny")
    batch = caption_batch(gold)
    prefix = Prefix(batch.tokens[:, :120], batch.prefix_mask, batch.caption, torch.ones(4, dtype=torch.bool))
    dropped = make_batch(prefix, gold["idx"])
    hidden = model(dropped.tokens[:, :-1], **dropped.inputs()).last_hidden
    logits = model.head(hidden[dropped.predicting]).view(4, 16, -1)
    torch.testing.assert_close(logits, gold["logits_uncond"], atol=5e-5, rtol=1e-5)


class Aligned(Alignment):
    """Keeps the states that are aligned, one row of them for each record."""

    def forward(self, hidden: Tensor, features: Tensor, positions: Tensor | Places, **told: Any) -> Tensor:
        self.seen = Places.of(positions).of_states(hidden).view(len(hidden), 16, -1).detach()
        return super().forward(hidden, features, positions, **told)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", ["c2i_tiny", "t2i_tiny"])
def test_what_is_aligned_are_the_originals_states_that_predict_codes(name: str, layer: int) -> None:
    """From the last position of the condition to the one before the last code; layer 1 is the first block's output."""
    model, gold = golden(name)
    if name == "c2i_tiny":
        prefix = Prefix(gold["cond"][:, None])
    else:
        batch = caption_batch(gold)
        prefix = Prefix(batch.tokens[:, :120], batch.prefix_mask, batch.caption, batch.null_caption)
    alignment = Aligned(hidden_size=64, feature_size=8, layer=layer)
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    losses = compute_losses(model, make_batch(prefix, gold["idx"], features={"teacher": features}), alignment)
    torch.testing.assert_close(alignment.seen, gold["hidden"][layer][:, -16:], atol=2e-4, rtol=1e-5)
    assert losses.gva is not None
    cosine = torch.cosine_similarity(alignment.projector(alignment.seen), features[:, None], dim=2)
    assert losses.gva.item() == pytest.approx((1 - cosine.mean(1)).mean().item(), abs=1e-5)
    if name == "c2i_tiny":
        assert losses.total.item() == pytest.approx(gold["loss"].item() + losses.gva.item(), abs=1e-5)
