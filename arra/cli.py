"""The command line: parse, call one function, exit code. A user's mistake is one line and code 2.

Heavy imports happen inside the commands, so that `arra --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from arra.errors import ArraError
from arra.runs import WRITE_ERRORS
from arra.train.interrupt import TrainingInterrupted

INTERRUPTED = "interrupted; run the same command again to continue"

app = typer.Typer(
    name="arra",
    help="Train autoregressive text-to-image models with representation alignment, paint, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one key of the recipe; may be repeated.")
]
RowOption = Annotated[str | None, typer.Option("--row", help="A row of the recipe.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demo; run again to continue.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Training seeds; intervals over seeds from 2 on.")] = 1,
    minutes: Annotated[float | None, typer.Option("--minutes", min=1, help="Time to spend, about.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Your folder of captioned pictures.")] = None,
    fresh_tokenizer: Annotated[
        bool, typer.Option("--fresh-tokenizer", help="Train the image tokenizer first (about an hour).")
    ] = False,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Also train the control whose teacher is shuffled over the pictures.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """The main job: prepare, train a baseline and an aligned model, paint, evaluate, report.

    Example: arra demo --minutes 10
    """
    from arra.demo import DemoOptions, run_demo

    options = DemoOptions(
        seeds=seeds,
        minutes=minutes,
        data=None if data is None else str(data),
        fresh_tokenizer=fresh_tokenizer,
        shuffled=shuffled,
        overrides=tuple(overrides or ()),
    )
    run_demo(options, out, console=_console())


@app.command()
def prepare(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")],
    store: Annotated[Path, typer.Option("--store", help="Folder of the store.")] = Path("runs/store"),
    row: RowOption = None,
    overrides: SetOption = None,
) -> None:
    """Pictures to codes and features, once; columns that are there stay.

    Example: arra prepare demo --store runs/store
    """
    from arra.config import load_recipe
    from arra.display import Display
    from arra.stages.prepare import prepare as prepare_store

    loaded = load_recipe(recipe, row=row, overrides=overrides or ())
    with Display(_console()) as display:
        prepare_store(loaded, store, progress=lambda what, done, total: display.show("data", what, done, total))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")],
    row: RowOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; run again to resume.")] = None,
    store: Annotated[Path, typer.Option("--store", help="The store to train on.")] = Path("runs/store"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and leave.")] = False,
    overrides: SetOption = None,
) -> None:
    """Train one model; the same command resumes it.

    Example: arra train demo --row aligned --store runs/store --set train.steps=200
    """
    from arra.config import load_recipe

    loaded = load_recipe(recipe, row=row, overrides=overrides or ())
    if dry_run:
        from arra.stages.train import describe_recipe

        typer.echo(describe_recipe(loaded), nl=False)
        return
    from arra.data.store import Store
    from arra.stages.process import leave_with_parent
    from arra.stages.train import train as train_run

    leave_with_parent()
    run = train_run(loaded, Store.open(store), out or Path("runs") / (loaded.row or loaded.name))
    typer.echo(str(run.path))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to paint; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt per line.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, as in 0-7 or 1,5,9.")] = "0-7",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures.")] = None,
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", min=0, help="Guidance; 1 is off.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1, help="1 is off.")] = None,
) -> None:
    """Paint prompts with a finished run: NNNNNN.png, samples.jsonl, grid.png.

    Example: arra generate runs/demo/aligned --prompt "a red heart on fire"
    """
    from arra.stages.paint import load_run, paint_prompts, parse_seeds, read_prompts

    texts = read_prompts(prompt or [], prompts)
    numbers = parse_seeds(seeds)
    folder = out or run / "samples" / "generated"
    chosen = {"cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    written = paint_prompts(load_run(run), texts, numbers, folder, overrides=chosen)
    typer.echo(f"{len(written) - 1} pictures in {folder}, all together in {written[-1]}")


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs.")],
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
) -> None:
    """Measure finished runs on held-out pictures: metrics.json in each.

    Example: arra evaluate runs/demo/aligned
    """
    from arra.display import Display
    from arra.stages.evaluate import evaluate as evaluate_run
    from arra.stages.evaluate import results_table
    from arra.stages.process import leave_with_parent, started_by_demo

    leave_with_parent()
    console = _console()
    for run in runs:
        with Display(console, seconds_between_lines=0.0 if started_by_demo() else None) as display:
            evaluation = evaluate_run(
                run,
                threads=threads,
                progress=lambda what, done, total: display.show("evaluate", what, done, total),
            )
        console.print(results_table(evaluation))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated runs; the first one's row is the baseline.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html.")] = Path("runs/report"),
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "arra report",
) -> None:
    """One HTML page that compares runs and works offline.

    Example: arra report runs/demo/baseline runs/demo/aligned --out runs/report
    """
    from arra.stages.report import report as write_report

    typer.echo(str(write_report(runs, out, title=title)))


@app.command()
def doctor() -> None:
    """What is here, what is missing, what to do.

    Example: arra doctor
    """
    from arra.doctor import examine, show

    raise typer.Exit(0 if show(examine(), _console()) else 1)


@app.command(name="list")
def list_known(
    what: Annotated[str, typer.Argument(help="encoders, tokenizers, models or recipes.")],
) -> None:
    """Names that other commands take.

    Example: arra list encoders
    """
    from arra.doctor import known_names

    for line in known_names(what):
        typer.echo(line)


def _console():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console()


def main() -> None:
    """Runs a command; the process ends with its code: 0, 2 for a mistake of the user's, 130 when interrupted."""
    try:
        app(standalone_mode=True)
    except ArraError as error:
        _leave(f"error: {error}", 2)
    except (KeyboardInterrupt, TrainingInterrupted):
        _leave(INTERRUPTED, 130)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer has caught a KeyboardInterrupt and says nothing
            _leave(INTERRUPTED, 130)
        raise
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        _leave(f"error: {error.filename or 'writing'}: {WRITE_ERRORS[error.errno]}", 2)


def _leave(line: str, code: int) -> None:
    typer.echo(line, err=True)
    sys.exit(code)
