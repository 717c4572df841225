"""The laws of a true comparison hold for models of classes and of captions as well."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from arra.data.batches import Batches, HeldOutBatches, InMemory
from arra.data.conditions import CaptionConditions, ClassConditions, Conditions
from arra.models import Decoder, DecoderSettings, load_decoder, save_model
from arra.runs import Run
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer
from arra.train.settings import AlignSettings, TrainSettings

RECORDS = 14
WIDTH = 6


class Captions:
    """Caption features of one to five vectors, in half precision as the store has them."""

    def take_ragged(self, rows: np.ndarray) -> list[np.ndarray]:
        return [np.random.default_rng(int(row)).normal(size=(1 + row % 5, WIDTH)).astype(np.float16) for row in rows]

    def expect(self, rows: np.ndarray) -> None:
        pass


def conditions_of(kind: str) -> Conditions:
    if kind == "class":
        return ClassConditions(torch.arange(RECORDS) % 3, null=3, dropout=0.2)
    return CaptionConditions(np.arange(RECORDS), Captions(), length=5, width=WIDTH, dropout=0.2)


def make_trainer(path: Path, kind: str, align: AlignSettings | None, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "num_codes": 16, "grid": (2, 3)}
    fields |= {"condition": kind, "multiple_of": 8, "resid_dropout": 0.1, "ffn_dropout": 0.1, "drop_path": 0.2}
    fields |= {"num_classes": 3} if kind == "class" else {"prefix_length": 5, "caption_dim": WIDTH}
    model = Decoder(DecoderSettings(**fields))
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 16, (RECORDS, 6), generator=generator)
    features = {"teacher": torch.randn(RECORDS, 8, generator=generator)}
    settings = {"steps": 8, "batch_size": 6, "warmup_steps": 0, "schedule": "constant", "checkpoint_every_steps": 3}
    settings |= {"validate_every_steps": 4, "log_every_steps": 1, "seed": 1, "device": "cpu"}
    return Trainer(
        model=model,
        alignment=None if align is None else build_alignment(align, features, hidden_size=32, seed=1),
        batches=Batches(conditions_of(kind), InMemory(codes, features), batch_size=6, seed=1),
        validation=HeldOutBatches(conditions_of(kind), codes[:5]),
        settings=TrainSettings(**{**settings, **changes}),
        run=Run.create(path, "name: tiny\n", {"seed": 1}),
    )


def trained(path: Path, kind: str, align: AlignSettings | None = None, **changes: Any) -> dict[str, Tensor]:
    trainer = make_trainer(path, kind, align, **changes)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_no_alignment_and_weight_zero_train_the_same_model(kind: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "null", kind)
    for layer in (0, 1, 2):
        assert different(plain, trained(tmp_path / f"{layer}", kind, AlignSettings(layer=layer, weight=0.0))) == []
    aligned = trained(tmp_path / "aligned", kind, AlignSettings(layer=1, components=4))
    assert len(different(plain, aligned)) > len(plain) / 2


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_the_saved_model_is_a_decoder_and_no_more(kind: str, tmp_path: Path) -> None:
    """Its keys are those of a fresh decoder, of LlamaGen's names: the projector stays in the checkpoints."""
    trainer = make_trainer(tmp_path / "run", kind, AlignSettings(layer=1))
    trainer.train()
    save_model(trainer.model, tmp_path / "run")
    saved = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert isinstance(trainer.model, Decoder)
    assert set(saved) == set(Decoder(trainer.model.settings).state_dict())
    kept = trainer.checkpoints.newest()
    assert kept is not None
    assert any(name.startswith("align.terms.main.projector") for name in kept.tensors)
    again = load_decoder(tmp_path / "run")
    assert different(trainer.model.state_dict(), again.state_dict()) == []
    assert again.settings == trainer.model.settings


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_a_resumed_run_ends_in_the_same_weights(kind: str, tmp_path: Path) -> None:
    """Whatever the model is built with the second time: what is not trained is in the checkpoint too."""
    whole = trained(tmp_path / "whole", kind, AlignSettings(layer=1), ema_decay=0.9)
    first = make_trainer(tmp_path / "run", kind, AlignSettings(layer=1), ema_decay=0.9)
    for _ in range(3):
        first.train_step()
    first.save()
    first.checkpoints.wait()
    second = make_trainer(tmp_path / "run", kind, AlignSettings(layer=1), ema_decay=0.9)
    with torch.no_grad():
        for value in second.model.state_dict(keep_vars=True).values():
            value.zero_()
    second.train()
    assert second.step == 8
    assert different(whole, second.model.state_dict()) == []


def test_the_null_caption_is_a_constant(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "caption", None, ema_decay=0.5)
    before = trainer.model.state_dict()["cls_embedding.uncond_embedding"].clone()
    trainer.train()
    assert torch.equal(before, trainer.model.state_dict()["cls_embedding.uncond_embedding"])
    assert not any("uncond" in name for name in trainer.names.values())
