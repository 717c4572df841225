"""The command line: parse, call one function, exit code. A user's mistake is one line and code 2.

Heavy imports happen inside the commands, so that `arra --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

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

data = typer.Typer(
    name="data",
    help="Look at data before and after preparation: check, show, verify, export.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data)

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


StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
EngineOption = Annotated[
    str, typer.Option("--engine", help="local: loader processes here; ray: actors of a Ray cluster (extra 'ray').")
]
ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="i/n", help="Make the i-th of n parts (from 0), for job arrays.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=0, help="Loader processes, or actors; default: the cores but one.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures per batch of the networks.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Make columns anew that were made otherwise than the recipe says.")
]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Make records again that failed before.")]


@app.command()
def prepare(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")],
    store: StoreOption = Path("runs/store"),
    row: RowOption = None,
    engine: EngineOption = "local",
    shard: ShardOption = None,
    workers: WorkersOption = None,
    batch_size: BatchOption = 32,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    retry_failed: RetryOption = False,
    replace: ReplaceOption = False,
    overrides: SetOption = None,
) -> None:
    """Pictures to codes and features, once; columns that are there stay, a killed run continues.

    Ends with code 1 if more items failed than data.max_failed_fraction allows; failures.jsonl lists them.

    Example: arra prepare demo --store runs/store
    """
    options = (engine, shard, workers, batch_size, threads, device, retry_failed, replace)
    _prepare(recipe, store, row, options, overrides, only=None)


@app.command()
def tokenize(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")],
    store: StoreOption = Path("runs/store"),
    row: RowOption = None,
    engine: EngineOption = "local",
    shard: ShardOption = None,
    workers: WorkersOption = None,
    batch_size: BatchOption = 32,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    retry_failed: RetryOption = False,
    replace: ReplaceOption = False,
    overrides: SetOption = None,
) -> None:
    """The codes alone: what `arra prepare` does, without the encoder's features.

    Example: arra tokenize demo --store runs/store
    """
    options = (engine, shard, workers, batch_size, threads, device, retry_failed, replace)
    _prepare(recipe, store, row, options, overrides, only=("codes",))


@app.command()
def extract(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")],
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="An encoder of `arra list encoders`; default: the recipe's teacher.")
    ] = None,
    store: StoreOption = Path("runs/store"),
    row: RowOption = None,
    engine: EngineOption = "local",
    shard: ShardOption = None,
    workers: WorkersOption = None,
    batch_size: BatchOption = 32,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    retry_failed: RetryOption = False,
    replace: ReplaceOption = False,
    overrides: SetOption = None,
) -> None:
    """The features of one encoder alone: adds a column and touches nothing else.

    Example: arra extract demo --encoder efficientnet-lite1 --store runs/store
    """
    options = (engine, shard, workers, batch_size, threads, device, retry_failed, replace)
    chosen = [*(overrides or ()), *([] if encoder is None else [f"encoder.teacher={encoder}"])]
    _prepare(recipe, store, row, options, chosen, only=("features",))


def _prepare(
    recipe: str,
    store: Path,
    row: str | None,
    options: tuple[Any, ...],
    overrides: list[str] | None,
    *,
    only: tuple[str, ...] | None,
) -> None:
    from arra.config import load_recipe
    from arra.display import Display
    from arra.stages.prepare import parse_options, summary_table
    from arra.stages.prepare import prepare as prepare_store

    loaded = load_recipe(recipe, row=row, overrides=overrides or ())
    console = _console()
    with Display(console) as display:
        found = prepare_store(loaded, store, options=parse_options(*options), only=only, progress=display.row("data"))
    console.print(summary_table(found))
    if found.failed:
        listed = store / "failures.jsonl"
        console.print(f"what failed, and why: {listed}", highlight=False, markup=False, soft_wrap=True)
    if not found.ok:
        typer.echo(found.verdict, err=True)
        raise typer.Exit(1)


@data.command()
def check(
    path: Annotated[str, typer.Argument(help="A folder or file of data, or a recipe file or name.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for check.html and lists.")] = Path("runs/check"),
    kind: Annotated[
        str | None, typer.Option("--kind", help="A kind of `arra list sources`; default: what PATH looks like.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="In place of the recipe's; its file: --set tokenizer.weights=PATH."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="The judge in whose features reconstructions are compared.")
    ] = None,
    max_images: Annotated[
        int, typer.Option("--max-images", min=0, help="Pictures through the tokenizer; 0 leaves that out.")
    ] = 1000,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    overrides: SetOption = None,
) -> None:
    """What is wrong with a set of pictures: broken, leaked, too long, too small, destroyed by the tokenizer.

    Ends with code 1 if training should not begin yet.

    Example: arra data check my_pictures
    """
    from arra.display import Display
    from arra.stages.check import check_data, summary

    console = _console()
    with Display(console) as display:
        checked = check_data(
            path,
            out=out,
            kind=kind,
            overrides=overrides or (),
            tokenizer=tokenizer,
            encoder=encoder,
            max_images=max_images,
            workers=workers,
            device=device,
            progress=display.row("check"),
        )
    console.print(summary(checked))
    raise typer.Exit(0 if checked.ok else 1)


@data.command()
def show(store: Annotated[str, typer.Argument(help="A store, or an export: a folder or a URL.")]) -> None:
    """What is in a store: its columns, who made them, what failed.

    Example: arra data show runs/store
    """
    from arra.data.remote import open_store
    from arra.stages.export import describe_store

    _console().print(describe_store(open_store(store)))


@data.command()
def verify(store: Annotated[str, typer.Argument(help="A store, or an export: a folder or a URL.")]) -> None:
    """Hash every file of a store; exit code 1 if one is damaged.

    Example: arra data verify runs/store
    """
    from arra.data.remote import open_store
    from arra.display import Display
    from arra.stages.export import verify_store

    with Display(_console()) as display:
        found = verify_store(open_store(store), progress=display.row("verify"))
    for line in found.damaged:
        typer.echo(line, err=True)
    typer.echo(f"{found.files} files, {found.bytes / 2**20:.1f} MiB: {len(found.damaged)} damaged")
    if not found.ok:
        raise typer.Exit(1)


@data.command()
def export(
    store: Annotated[str, typer.Argument(help="Folder of the store.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    columns: Annotated[
        str | None, typer.Option("--columns", help="Columns, as in codes,features.x; default: all but pixels.")
    ] = None,
    rows_per_group: Annotated[
        int, typer.Option("--rows-per-group", min=1, help="Records that are fetched together.")
    ] = 1024,
) -> None:
    """A copy of a store to publish and to train from afar: Parquet files, hashes, a data card. No pictures in it.

    Example: arra data export runs/store exports/mine
    """
    from arra.data.remote import open_store
    from arra.display import Display
    from arra.stages.export import export_store

    names = None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]
    with Display(_console()) as display:
        found = export_store(
            open_store(store), out, columns=names, rows_per_group=rows_per_group, progress=display.row("export")
        )
    typer.echo(str(found))


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
    from arra.data.remote import open_store
    from arra.stages.process import leave_with_parent
    from arra.stages.train import train as train_run

    leave_with_parent()
    run = train_run(loaded, open_store(store), out or Path("runs") / (loaded.row or loaded.name))
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
                progress=display.row("evaluate"),
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
