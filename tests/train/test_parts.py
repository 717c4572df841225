"""Training a part of a language model goes on where it stopped, to the same bits, whatever its weights are kept in."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.data.batches import TrainBatch
from arra.data.language import padded_batch
from arra.data.layout import ImageLayout
from arra.models import CausalLM
from arra.models.adapters import LoraSettings, add_lora, merge_adapters, quantize, train_head_rows
from arra.runs import Run
from arra.train.loop import Trainer
from arra.train.settings import TrainSettings
from tests.models.toy_lms import toy_lm

LAYOUT = ImageLayout(
    family="generic", bos=0, begin_image=44, end_image=45, closing=(1,), first_code=20, num_codes=24,
    unconditional="empty_prompt",
)  # fmt: skip
STEPS = 4


class Steps:
    """A batch for every step."""

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        generator = torch.Generator().manual_seed(step)
        codes = torch.randint(24, (4, 2, 2), generator=generator).numpy()
        prompts = torch.randint(2, 20, (4, 3), generator=generator).tolist()
        return padded_batch([LAYOUT.sequence(ids[:row], codes[row]) for row, ids in enumerate(prompts)])


def lora(lm: Any) -> None:
    add_lora(lm, LoraSettings(rank=4, dropout=0.1), rows=sorted(LAYOUT.reserved()), seed=0)


def four_bits(lm: Any) -> None:
    quantize(lm)
    lora(lm)


def head(lm: Any) -> None:
    train_head_rows(lm, sorted(LAYOUT.reserved()))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (lora, {}),
    "four bits and an 8-bit optimiser": (four_bits, {"optimizer": "adamw8bit"}),
    "head": (head, {}),
    "recomputed": (lora, {"recompute": "full"}),
    "averaged": (lora, {"ema_decay": 0.5}),
}


def trainer(path: Path, case: str) -> Trainer:
    change, settings = CASES[case]
    lm = toy_lm("smollm", rows=50, hidden_size=64)
    change(lm)
    model = CausalLM(lm, layout=LAYOUT, grid=(2, 2))
    told = TrainSettings(
        steps=STEPS, batch_size=4, micro_batch_size=3, checkpoint_every_steps=2, warmup_steps=1, validate_every_steps=1,
        **settings,
    )  # fmt: skip
    validation = [Steps().batch(99)]
    return Trainer(
        model=model, alignment=None, batches=Steps(), validation=validation, settings=told,
        run=Run.create(path, "name: toy\n", {"seed": 0}),
    )  # fmt: skip


def state(model: CausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_a_part_is_trained_and_resumed(case: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", case)
    start = state(whole.model)  # type: ignore[arg-type]
    whole.train()
    wanted = state(whole.model)  # type: ignore[arg-type]
    for name, p in whole.model.named_parameters():
        assert torch.equal(wanted[name], start[name]) != p.requires_grad, name
    saved = whole.checkpoints.newest()
    assert saved is not None
    kept = {name.removeprefix("model.") for name in saved.tensors if name.startswith("model.")}
    assert kept == {name for name, p in whole.model.named_parameters() if p.requires_grad}

    shutil.rmtree(saved.path)  # back to the checkpoint before
    again = trainer(tmp_path / "whole", case)
    again.train()
    assert again.step == STEPS
    for name, value in state(again.model).items():  # type: ignore[arg-type]
        assert torch.equal(value, wanted[name]), name
    merge_adapters(again.model.lm)  # type: ignore[arg-type]
    assert [*again.model.lm.state_dict()] == [*toy_lm("smollm", rows=50, hidden_size=64).state_dict()]  # type: ignore[union-attr]
