"""Every row of every recipe makes a model; every command line that we print or document parses."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from arra.cli import app
from arra.config import Recipe, load_recipe, parse_recipe, recipes_folder, row_names
from arra.stages.description import describe_recipe
from arra.stages.model import decoder_settings, tokenizer_network
from arra.train.settings import TrainSettings
from tests.models.original import GPT_TABLE

ROOT = Path(__file__).parent.parent.parent
BUILT_IN = [path.stem for path in sorted(recipes_folder().glob("*.yaml"))]
ROWS = [(path.stem, row) for path in sorted(recipes_folder().glob("*.yaml")) for row in (None, *row_names(path))]
DOCUMENTS = [
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "examples/*.py",
        "examples/*.sh",
        "benchmarks/*.md",
        "arra/**/*.py",
        "recipes/*.yaml",
    )
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_of_every_recipe_makes_a_model(name: str, row: str | None):
    recipe = load_recipe(name, row=row)
    described = describe_recipe(recipe)
    assert parse_recipe(described, Recipe, source="described") == recipe
    if recipe.model.llm is not None:  # its shape comes with a folder that is made first
        assert re.search(rf"^# model: {recipe.model.llm.folder} is not there yet", described, re.MULTILINE)
        return
    network = tokenizer_network(recipe)
    settings = decoder_settings(recipe, num_codes=network.num_codes, downsampling=network.downsampling)
    size, condition = recipe.model.size, recipe.model.condition
    parameters = r"\d[\d,]*" if size is None else f"{GPT_TABLE[size][4 if condition == 'class' else 5]:,}"
    assert re.search(f"^# decoder: {parameters} parameters$", described, re.MULTILINE)
    assert settings.num_positions == (recipe.data.image_size // network.downsampling) ** 2


def commands_in(text: str) -> Iterator[str]:
    """The arguments of every whole `arra ...` line in fenced blocks, examples, comments and code spans."""
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in fenced:
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(r"\$? ?(?:[\w./]*/)?(?:torchrun .* -m )?arra (.*)", line.strip())
            if command:
                yield command[1]
            if "ARGS=" in line and line.startswith("make demo"):
                yield "demo " + line.split('ARGS="')[1].split('"')[0]
    yield from re.findall(r"^ +Example: arra (.*)$", text, re.MULTILINE)
    jobs = r"^(?:#   )?sbatch (?:--\S+ )*examples/slurm_(\w+)\.sh (.*)$"
    yield from (f"{stage} {arguments}" for stage, arguments in re.findall(jobs, text, re.MULTILINE))
    yield from re.findall(r"(?<!`)`(?:[\w./]*/)?arra ([a-z][^`\n]*)`", text)


DOCUMENTED = [
    (str(path.relative_to(ROOT)), command)
    for path in DOCUMENTS
    for command in commands_in(path.read_text(encoding="utf-8"))
    if not re.search(r"[\[\]|{}]|\.\.\.", command)  # a grammar, not a command
]


@pytest.mark.parametrize(("document", "command"), DOCUMENTED)
def test_every_documented_command_parses(document: str, command: str):
    arguments = shlex.split(command, comments=True)
    found = typer.main.get_command(app)
    while hasattr(found, "commands"):
        name = arguments.pop(0)
        assert name in found.commands, f"{document}: arra {command}"
        found = found.commands[name]
    if arguments or name in ("demo", "doctor"):  # a bare name is only mentioned
        given = found.make_context(name, list(arguments)).params
        if given.get("recipe") in BUILT_IN:
            load_recipe(given["recipe"], row=given.get("row"), overrides=given.get("overrides") or ())


def test_documented_commands_are_found():
    found = {command.split()[0] for _, command in DOCUMENTED}
    assert found == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    names = ["alignment", "alignment_lab", "data", "encoders", "evaluation", "generation", "guide", "language_models"]
    names += ["alignment_study", "llamagen", "paper_tables", "planning", "probe", "tokenizers", "training", "weights"]
    wanted = {*(f"docs/{name}.md" for name in names), "README.md"}
    wanted |= {"examples/slurm_reproduce.sh", "examples/slurm_train.sh"}
    assert wanted <= {document for document, _ in DOCUMENTED}
    training = [command for document, command in DOCUMENTED if document == "docs/training.md"]
    assert any(command.startswith("train llamagen_c2i --row 3b") for command in training)  # under torchrun, two lines


def test_settings_in_the_page_on_training_are_settings() -> None:
    """Keys in its tables and its YAML, with the values given there."""
    text = (ROOT / "docs" / "training.md").read_text()
    trouble = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0])["train"]
    TrainSettings(steps=1, **trouble)
    rows = 0
    for header, table in re.findall(r"^\| (.*?) \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE):
        for key, value in re.findall(r"^\| `(\w+): (\w+)`", table, re.MULTILINE):
            given = {key: yaml.safe_load("4" if value == "N" else value)}
            TrainSettings(**{"steps": 1, **({"parallel": given} if header == "`train.parallel`" else given)})
            rows += 1
    assert rows > 10
