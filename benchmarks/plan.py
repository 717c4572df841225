"""What `arra plan` says of memory beside what real trainings take.

python benchmarks/plan.py [--only decoder recompute language] [--device cpu|cuda] [--threads 1] [--json FILE]

Every training is a process of its own: some steps of `arra.train.loop.Trainer` with random weights and batches, with
validation batches of 64 rows and a checkpoint. Its peak is counted by torch's allocators (`arra.train.allocations`),
kernels' own buffers included, beside what the process holds at most above its imports. Held against it is the plan's
total without its reserve: asked within 10 % on a CPU, within 15 % on a GPU.

decoder    LlamaGen's blocks at 512 numbers wide, 16,384 codes, AdamW, aligned with CLIP's features
recompute  six blocks at 384, Muon, an average of weights, full recomputation
language   a Llama with 32,000 tokens beside the codes, LoRA, four micro-batches
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from arra.config import Recipe, load_recipe
from arra.distributed import own_device
from arra.stages.init import init_painter
from arra.stages.plan_probe import RandomBatches, random_trainer
from arra.stages.planned_model import planned_model
from arra.train.allocations import allocations
from arra.train.memory import LOOKING_ROWS, Sharing
from arra.train.savings import rows_of

sys.path.insert(0, str(Path(__file__).parent))
from decoder import memory_gb

STEPS = 4
MIB = 2**20
ASKED = {"cpu": 0.10, "cuda": 0.15}
SMALL = ["tokenizer.name=openmoji-vq4", "tokenizer.weights=null", "data.crop={kind: center, range: 1.0}"]
ALWAYS = [f"train.steps={STEPS}", "train.validate_every_steps=2", f"train.checkpoint_every_steps={STEPS}",
          "train.checkpoint_in_background=false", "train.preview_every_steps=null",
          "train.log_every_steps=1"]  # fmt: skip
CASES: dict[str, tuple[str, list[str]]] = {
    "decoder": (
        "llamagen_c2i",
        ["model={condition: class, size: null, num_layers: 4, num_heads: 8, hidden_size: 512, resid_dropout: 0.1, "
         "ffn_dropout: 0.1}", "train.batch_size=16", "train.precision=float32"],
    ),
    "recompute": (
        "llamagen_c2i",
        [*SMALL, "data.image_size=64", "align=null", "train.batch_size=64", "train.precision=float32",
         "model={condition: class, size: null, num_layers: 6, num_heads: 8, hidden_size: 384}", "train.optimizer=muon",
         "train.recompute=full", "train.ema_decay=0.999"],
    ),
    "language": (
        "llm_openmoji",
        ["model.llm.train=lora", "train.optimizer=adamw", "train.batch_size=32", "train.micro_batch_size=8",
         "train.preview_every_steps=null"],
    ),
}  # fmt: skip
"""A recipe and what is changed of it."""
LANGUAGE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of a case, in MiB."""

    case: str
    device: str
    predicted: float
    measured: float
    resident: float
    """Of the process above what it held before the training was made; 0 on a GPU."""
    error: float
    """(predicted - measured) / measured."""


def language_folder(folder: Path) -> Path:
    """A small Llama with random weights and a byte-level tokenizer, extended by the codes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    words.train_from_iterator(["a red circle"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "llm")
    LlamaForCausalLM(LlamaConfig(**LANGUAGE)).save_pretrained(folder / "llm")
    init_painter(str(folder / "llm"), folder / "painter", tokenizer="openmoji-vq4", image_size=32)
    return folder / "painter"


def recipe_of(case: str, device: str, folder: Path) -> Recipe:
    """The case's recipe."""
    name, changes = CASES[case]
    told = [f"model.llm.folder={language_folder(folder)}"] if case == "language" else []
    return load_recipe(name, overrides=[*changes, *told, *ALWAYS, f"train.device={device}"]).resolved(1000)


def measure(case: str, device_name: str) -> Result:
    """The case in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_of(case, device_name, Path(scratch))
        planned, device = planned_model(recipe), own_device(device_name)
        rows = rows_of(recipe.train, ranks=1)
        memory = planned.memory(recipe.train, sharing=Sharing(), rows=rows, device_type=device.type)
        predicted = memory.total - memory.reserve
        before, _ = memory_gb()
        with allocations(device) as allocated:
            trainer = random_trainer(recipe, planned, run=Path(scratch) / "run", device=device, steps=STEPS)
            trainer.validation = [RandomBatches(planned, {}, LOOKING_ROWS).batch(10**6)]
            trainer.train()
        _, highest = memory_gb()
        resident = 0.0 if device.type == "cuda" else (highest - before) * 1e9
        peak = allocated.peak
        parts = (predicted / MIB, peak / MIB, resident / MIB)
        return Result(case, str(device), *parts, error=predicted / peak - 1)


def in_own_process(case: str, device: str, threads: int) -> Result:
    """The case in a process of its own."""
    command = [sys.executable, __file__, "--here", case, "--device", device, "--threads", str(threads)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return Result(**told)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every case is as near as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", choices=list(ASKED), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", choices=list(CASES), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    if asked.here:
        print(json.dumps(asdict(measure(asked.here, asked.device))))
        return 0
    results = [in_own_process(case, asked.device, asked.threads) for case in asked.only]
    print(f"{'case':<12}{'plan, MiB':>12}{'measured':>12}{'resident':>12}{'error':>9}")
    for each in results:
        print(f"{each.case:<12}{each.predicted:>12.1f}{each.measured:>12.1f}{each.resident:>12.1f}{each.error:>+9.1%}")
    if asked.json is not None:
        told = {"torch": torch.__version__, "device": asked.device, "asked": ASKED[asked.device]}
        asked.json.write_text(json.dumps(told | {"results": [asdict(each) for each in results]}, indent=2) + "\n")
    return int(any(abs(each.error) > ASKED[asked.device] for each in results))


if __name__ == "__main__":
    sys.exit(main())
