"""What the structure promises: inference is unchanged by the paper's method, and starting costs nothing."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import arra
from arra.doctor import EXTRAS
from arra.models import Decoder, DecoderSettings, save_model
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.text import train_text_tokenizer
from arra.tokenizers.vq import VQModel, VQSettings

ROOT = Path(arra.__file__).parent
PROMPTS = ["red heart", "blue heart on fire"]
SEEDS = [0, 1]

WITHOUT_ALIGNMENT = """
import json, sys
from importlib.abc import MetaPathFinder

BLOCKED = (
    "arra.align", "arra.train.loop", "arra.train.objective", "arra.train.alignment", "arra.train.checkpoints"
)

class Gone(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.startswith("arra.align."):
            raise ImportError(f"{name} is deleted")
        return None

sys.meta_path.insert(0, Gone())

import torch
import arra
from arra.evaluate.evaluation import HeldOutSplit, evaluate_model
from arra.evaluate.settings import EvaluateSettings
import arra.report.page, arra.stages.evaluate, arra.stages.paint

folder, prompts, seeds = json.loads(sys.argv[1])
torch.set_num_threads(1)
model, tokenizer = arra.load_model(folder + "/model"), arra.load_tokenizer(folder + "/tokenizer")
result = arra.generate(model, tokenizer, prompts=prompts, seeds=seeds, cfg_scale=2.0)

class Judge:
    spec = None
    def encode(self, images, *, aggregate="mean"):
        return images.float().flatten(1)[:, ::7]

images = torch.randint(0, 256, (12, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
codes = tokenizer.encode(images)
seen = tokenizer.decode(codes)
judge = Judge()
split = HeldOutSplit(
    name="novel", prompts=prompts * 6, codes=codes, groups=torch.arange(12), reconstructions=seen,
    reconstruction_features=judge.encode(seen), raw=images, raw_features=judge.encode(images),
)
settings = EvaluateSettings(splits=("novel",), cfg_scales=(1.0,), num_resamples=3, frechet_components=4)
evaluation, _ = evaluate_model(model, tokenizer, judge, [split], settings, run="here", protocol={})
try:
    arra.Alignment
    deleted = False
except ImportError:
    deleted = True
print(json.dumps({
    "codes": result.codes.tolist(),
    "images": result.images.tolist(),
    "metrics": sorted({row.metric for row in evaluation.card.results}),
    "deleted": deleted,
    "loaded": [name for name in sys.modules if name in BLOCKED or name.startswith("arra.align")],
}))
"""


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_generation_and_evaluation_need_no_alignment(tmp_path: Path) -> None:
    """With `arra.align`, the training loop and checkpoints deleted, a model paints the same pictures, and is judged."""
    torch.manual_seed(0)
    text = train_text_tokenizer(PROMPTS, vocab_size=300)
    settings = DecoderSettings(
        num_layers=1,
        num_heads=2,
        hidden_size=16,
        num_codes=32,
        grid=(2, 3),
        condition="text",
        prefix_length=8,
        text_vocab_size=300,
    )
    model = Decoder(settings).eval()
    torch.nn.init.normal_(model.output.weight)
    model.text_tokenizer = text
    save_model(model, tmp_path / "model")
    vq = VQModel(VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, num_codes=32, code_dim=4))
    tokenizer = ImageTokenizer(vq, name="tiny", weights_hash=None)
    tokenizer.save(tmp_path / "tokenizer")
    found = json.loads(run(WITHOUT_ALIGNMENT, json.dumps([str(tmp_path), PROMPTS, SEEDS])).splitlines()[-1])
    assert found["deleted"]
    assert found["loaded"] == []
    ours = arra.generate(model, tokenizer, prompts=PROMPTS, seeds=SEEDS, cfg_scale=2.0)
    assert found["codes"] == ours.codes.tolist()
    assert ours.images is not None
    assert (torch.tensor(found["images"]) - ours.images.int()).abs().max() <= 1
    assert {"nll", "caption_gain", "frechet", "kid_x1000", "retrieval_at_1", "psnr_db"} <= set(found["metrics"])


HEAVY = ["torch", "numpy", "datasets", "pyarrow", "matplotlib", "tokenizers", "PIL"]


def test_importing_the_package_imports_nothing() -> None:
    names = [*HEAVY, "typer", "pydantic"]
    code = f"import sys, arra; dir(arra); print([name for name in {names} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    """So that it answers in under a second."""
    code = f"""
import sys
from arra.cli import main
sys.argv = ["arra", "--help"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
print([name for name in {HEAVY} if name in sys.modules])
"""
    lines = run(code).strip().splitlines()
    assert lines[-1] == "[]"
    assert any("demo" in line for line in lines)


PLUGINS = {"arra.models.transformers_decoder"}
"""Modules for a library that brings an extra, whose classes they extend; no other module imports them when imported."""


def test_a_plain_installation_starts() -> None:
    """What only extras bring is imported where it is used, so that no module asks for it when it is imported."""
    declared = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS) == set(declared["optional-dependencies"]) - {"all", "dev"}
    optional = {name for names in EXTRAS.values() for name in names} | {"peft", "pytest", "scipy", "skimage"}
    for path in ROOT.rglob("*.py"):
        at_once = {name.split(".")[0] for name in imports_of(path, at_once=True)}
        assert not imports_of(path, at_once=True) & PLUGINS, path
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        assert not at_once & optional or module in PLUGINS, path


def test_the_public_names_are_there() -> None:
    assert set(arra.__all__) == set(arra._HOMES)
    for name in arra.__all__:
        assert getattr(arra, name) is not None
        assert name in dir(arra)
    with pytest.raises(AttributeError, match="module 'arra' has no attribute 'alignment_of_planets'"):
        _ = arra.alignment_of_planets


def imports_of(path: Path, *, at_once: bool = False) -> set[str]:
    """Names of the modules that a file imports; `at_once` leaves out what waits in functions or is for types alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
        later = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if not (at_once and later):
            waiting.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "align").glob("*.py")), ids=lambda path: path.name)
def test_alignment_imports_torch_alone(path: Path) -> None:
    """Neither `import arra` (through which every room can be reached) nor any other room."""
    roots = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
    assert roots <= {"torch", "jaxtyping", "arra"}
    assert all(name.startswith("arra.align.") for name in imports_of(path) if name.split(".")[0] == "arra")


def test_no_room_has_a_drawer_for_odds_and_ends() -> None:
    names = {path.name for path in ROOT.rglob("*.py")}
    assert not names & {"utils.py", "util.py", "common.py", "misc.py", "helpers.py"}
    assert not [name for name in names if name.endswith(("_new.py", "_old.py", "_v2.py"))]
    for path in ROOT.rglob("*.py"):
        assert "except Exception:" not in path.read_text(), path
