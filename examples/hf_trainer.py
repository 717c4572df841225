"""`arra.Alignment` inside the Hugging Face `Trainer`: a few lines, in your own training code.

A model of `arra init` learns the pictures of a store, each state that predicts a code pulled towards the feature of the
whole picture. The projector is trained beside the model and is not saved with it: what comes out is an ordinary folder.

    arra init models/painter --llm models/smollm2 --tokenizer openmoji-vq4 --image-size 32
    arra prepare demo --store runs/store
    python examples/hf_trainer.py models/painter runs/store runs/hf_trainer 100

Needs transformers, accelerate and one process: with several, wrap the projector in DistributedDataParallel too.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import arra
from arra.data.language import padded_batch
from arra.data.remote import open_store
from arra.models import CausalLM


class AlignedTrainer(Trainer):
    """A `Trainer` whose loss has the alignment in it; batches bring `features` (B, F) and `code_mask` (B, T)."""

    loss_is_scaled_for_ga = False  # each batch's loss is a mean

    def __init__(self, *args: Any, align: arra.Alignment, **options: Any) -> None:
        super().__init__(*args, **options)
        self.align = align.to(self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            optimizer.add_param_group({"params": list(self.align.parameters())})
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **ignored: Any) -> Any:
        features, code_mask = inputs.pop("features"), inputs.pop("code_mask")
        outputs = model(**inputs, output_hidden_states=True)
        hidden = outputs.hidden_states[self.align.layer]  # of all layers but the last: the state after the k-th block
        self.gva_loss = self.align(hidden[:, :-1], features, code_mask[:, 1:])
        loss = outputs.loss + self.align.weight * self.gva_loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        super().log({**logs, "gva_loss": self.gva_loss.item()}, *args)


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Sequences padded behind, with the features of their pictures."""
    batch = padded_batch([row["written"] for row in rows])
    return {
        "input_ids": batch.tokens,
        "attention_mask": torch.ones_like(batch.tokens),  # padding is behind, where nothing sees it
        "labels": batch.labels,
        "code_mask": batch.code_mask,
        "features": torch.stack([row["features"] for row in rows]),
    }


def read_pictures(painter: CausalLM, store_folder: str) -> list[dict[str, Any]]:
    """The training pictures of a store as the painter writes them, each with its centred feature."""
    assert painter.text_tokenizer is not None
    store = open_store(store_folder)
    (teacher,) = [name for name in store.column_names() if name.startswith("features.")][:1]
    rows, prompts, layout = store.rows("train", columns=["codes", teacher]), store.prompts(), painter.layout
    codes, features = store.reader("codes").take(rows), torch.from_numpy(store.reader(teacher).take(rows)).float()
    features -= features.mean(0)
    pictures = []
    for row, grid, feature in zip(rows, codes, features, strict=True):
        ids = painter.text_tokenizer.encode(layout.text(prompts[row], grid.shape))
        pictures.append({"written": layout.sequence(ids, grid), "features": feature})
    return pictures


def main(painter_folder: str, store_folder: str, out: str, steps: str) -> AlignedTrainer:
    """The trainer when it is done; the folder `out` holds the model, which `transformers` and `arra generate` read."""
    painter = arra.load_model(painter_folder)
    assert isinstance(painter, CausalLM)
    pictures = read_pictures(painter, store_folder)
    align = arra.Alignment(
        hidden_size=painter.hidden_size, feature_size=len(pictures[0]["features"]), layer=1, weight=1.0
    )
    args = TrainingArguments(
        out, max_steps=int(steps), per_device_train_batch_size=8, learning_rate=3e-4, logging_steps=5, report_to="none",
        remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_pretrained(painter_folder)
    trainer = AlignedTrainer(lm, args, train_dataset=pictures, data_collator=collate, align=align)
    trainer.train()
    trainer.save_model(out)
    AutoTokenizer.from_pretrained(painter_folder).save_pretrained(out)
    (Path(out) / "model.json").write_text((Path(painter_folder) / "model.json").read_text())
    return trainer


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
