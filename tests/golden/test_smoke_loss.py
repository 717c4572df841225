"""The loss curve of thirty steps: a changed loss, model, optimiser or schedule shows here first.

After a change that is meant: `pytest tests/golden --regenerate`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arra.data.batches import Batches, InMemory
from arra.data.conditions import TextConditions
from arra.models import Decoder, DecoderSettings
from arra.runs import Run
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer
from arra.train.settings import AlignSettings, TrainSettings

GOLDEN = Path(__file__).parent / "smoke_loss.json"
STEPS = 30
SHOWN = ("loss", "ntp_loss", "gva_loss", "z_loss", "grad_norm")
RECORDS, SIDE, CODES = 20, 4, 32


def synthetic_batches() -> Batches:
    """Pictures of two moving stripes; the prompt and the feature say which."""
    place = torch.arange(SIDE * SIDE)
    kinds = torch.arange(RECORDS)
    codes = (place[None] * (1 + kinds[:, None] % 3) + kinds[:, None]) % CODES
    angle = kinds[:, None] * torch.arange(1, 9)[None] * 0.7
    return Batches(
        conditions=TextConditions([[[2 + row % 5, 7 + row // 5]] for row in range(RECORDS)], 4, dropout=0.1),
        pictures=InMemory(codes, {"teacher": torch.cat([angle.cos(), angle.sin()], 1) + 0.5}),
        batch_size=8,
        seed=0,
    )


def curve(folder: Path, **changes: Any) -> list[dict[str, float]]:
    """What every step reports. Dropout is off: its random numbers differ between processors, the rest do not."""
    torch.manual_seed(0)
    model = Decoder(
        DecoderSettings(
            num_layers=2,
            num_heads=2,
            hidden_size=32,
            num_codes=CODES,
            grid=(SIDE, SIDE),
            condition="text",
            prefix_length=4,
            text_vocab_size=12,
            multiple_of=8,
            token_dropout=0.0,
            resid_dropout=0.0,
            ffn_dropout=0.0,
        )
    )
    batches = synthetic_batches()
    assert isinstance(batches.pictures, InMemory)
    assert batches.pictures.features is not None
    fields: dict[str, Any] = {"steps": STEPS, "batch_size": 8, "warmup_steps": 5, "log_every_steps": 1}
    settings = TrainSettings(**{**fields, "learning_rate": 5e-3, "z_weight": 1e-2, "clip_norm": 2.0, **changes})
    align = build_alignment(AlignSettings(layer=1, components=6), batches.pictures.features, hidden_size=32, seed=0)
    run = Run.create(folder, "name: smoke\n", {})
    Trainer(model=model, alignment=align, batches=batches, validation=[], settings=settings, run=run).train()
    return [{key: row[key] for key in SHOWN} for row in run.read_metrics()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_thirty_steps(optimizer: str, tmp_path: Path, regenerate: bool) -> None:
    found = curve(tmp_path, optimizer=optimizer)
    assert len(found) == STEPS
    stored: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if regenerate:
        stored[optimizer] = {key: [round(row[key], 6) for row in found] for key in SHOWN}
        text = json.dumps(stored, indent=1, sort_keys=True)
        GOLDEN.write_text(text.replace(",\n   ", ", ").replace("[\n   ", "[").replace("\n  ]", "]") + "\n")
    for key in SHOWN:
        assert [row[key] for row in found] == pytest.approx(stored[optimizer][key], rel=1e-3), key
    assert found[-1]["ntp_loss"] < 0.8 * found[0]["ntp_loss"]
    assert found[-1]["gva_loss"] < 0.8 * found[0]["gva_loss"]
