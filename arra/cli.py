"""The command line: parse, call one function, exit code. A user's mistake is one line and code 2.

Heavy imports happen inside the commands, so that `arra --help` answers at once.
"""

import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from arra.errors import ArraError, FirstProcessError
from arra.runs import WRITE_ERRORS
from arra.stages.process import is_first_process
from arra.train.interrupt import TrainingInterrupted

OURS, FORMATTED = Path(__file__).parent, warnings.formatwarning
INTERRUPTED = "interrupted; run the same command again to continue"
SECONDS_FOR_THE_FIRST, SECONDS_TO_DOUBT_IT = 2.0, 6.0
"""In which the first process leaves and torchrun ends the others; in which it surely has, if it has found the same."""

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
RecipeArgument = Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")]
StoreArgument = Annotated[str, typer.Argument(help="A store, or an export: a folder or a URL.")]
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
BatchOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Pictures, or captions, per batch of the networks.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Make columns anew that were made otherwise than the recipe says.")
]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Make records again that failed before.")]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="Image tokenizer in place of the run's: a name or a folder.")
]
TokenizerWeightsOption = Annotated[
    Path | None, typer.Option("--tokenizer-weights", help="Checkpoint file of a published tokenizer, or its folder.")
]


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


def _prepare(
    *,
    recipe: RecipeArgument,
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
    only: tuple[str, ...] | None = None,
    encoder: str | None = None,
    feature_files: Path | None = None,
) -> None:
    from arra.config import load_recipe
    from arra.display import Display
    from arra.stages.preparation import summary_table
    from arra.stages.prepare import asked_features, parse_options
    from arra.stages.prepare import prepare as prepare_store

    options = parse_options(
        engine=engine,
        shard=shard,
        workers=workers,
        batch_size=batch_size,
        threads=threads,
        device=device,
        retry_failed=retry_failed,
        replace=replace,
    )
    loaded = load_recipe(recipe, row=row, overrides=overrides or ())
    if only == ("features",):
        loaded, only = asked_features(loaded, encoder)
    console = _console()
    with Display(console) as display:
        found = prepare_store(
            loaded, store, options=options, only=only, feature_files=feature_files, progress=display.row("data")
        )
    console.print(summary_table(found))
    if found.cut:
        listed = store / "caption_features.*" / "cut.jsonl"
        console.print(f"which captions were cut: {listed}", highlight=False, markup=False, soft_wrap=True)
    if found.failed:
        listed = store / "failures.jsonl"
        console.print(f"what failed, and why: {listed}", highlight=False, markup=False, soft_wrap=True)
    if not found.ok:
        typer.echo(found.verdict, err=True)
        raise typer.Exit(1)


def _with_options_of(shared: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command takes, beside its own arguments and options, those of `shared`, as its `**options`."""

    def named(function: Callable[..., None]) -> list[inspect.Parameter]:
        parameters = inspect.signature(function).parameters.values()
        return [one.replace(kind=one.KEYWORD_ONLY) for one in parameters if hasattr(one.annotation, "__metadata__")]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command.__signature__ = inspect.Signature([*named(command), *named(shared)])  # type: ignore[attr-defined]
        return command

    return decorate


@app.command()
@_with_options_of(_prepare)
def prepare(**options: Any) -> None:
    """Pictures to codes and features, once; columns that are there stay, a killed run continues.

    Ends with code 1 if more items failed than data.max_failed_fraction allows; failures.jsonl lists them.

    Example: arra prepare demo --store runs/store
    """
    _prepare(**options)


@app.command()
@_with_options_of(_prepare)
def tokenize(**options: Any) -> None:
    """The codes alone: what `arra prepare` does, without the encoder's features.

    Example: arra tokenize demo --store runs/store
    """
    _prepare(**options, only=("codes",))


@app.command()
@_with_options_of(_prepare)
def extract(
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="A teacher by its name in the recipe, or any encoder; default: every teacher."),
    ] = None,
    feature_files: Annotated[
        Path | None, typer.Option("--from", help="Folder of feature files that ARRA's own extraction made.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Features of the captions, by the recipe's text encoder; reads no picture.")
    ] = False,
    **options: Any,
) -> None:
    """The features alone, of every teacher or of one encoder: adds columns and touches nothing else.

    Example: arra extract demo --encoder efficientnet-lite1 --store runs/store

    Example: arra extract arra_mimic --from biomedclip_feature --store runs/mimic/store

    Example: arra extract llamagen_t2i --text --set text_encoder.weights=flan-t5-xl --store runs/t2i/store
    """
    if text and encoder is not None:
        raise ArraError("--text and --encoder are two encoders; give one, the text encoder is named in the recipe")
    if text and feature_files is not None:
        raise ArraError("--text and --from: the files are features of pictures; give one of the two")
    only = ("caption_features" if text else "features",)
    _prepare(**options, only=only, encoder=encoder, feature_files=feature_files)


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
def show(store: StoreArgument) -> None:
    """What is in a store: its columns, who made them, what failed.

    Example: arra data show runs/store
    """
    from arra.data.remote import open_store
    from arra.stages.export import describe_store

    _console().print(describe_store(open_store(store)))


@data.command()
def verify(store: StoreArgument) -> None:
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
    recipe: RecipeArgument,
    row: RowOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; run again to resume.")] = None,
    store: Annotated[Path, typer.Option("--store", help="The store to train on.")] = Path("runs/store"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and leave.")] = False,
    overrides: SetOption = None,
) -> None:
    """Train one model; the same command resumes it.

    Example: arra train demo --row aligned --store runs/store --set train.steps=200

    On several devices or machines torchrun starts it: torchrun --nproc-per-node 8 -m arra train llamagen_c2i --row b
    """
    from arra.config import load_recipe

    loaded = load_recipe(recipe, row=row, overrides=overrides or ())
    if dry_run:
        from arra.stages.description import describe_recipe

        typer.echo(describe_recipe(loaded), nl=False)
        return
    from arra.data.remote import open_store
    from arra.display import Display
    from arra.stages.process import leave_with_parent, silent, started_by_demo
    from arra.stages.train import train as train_run

    leave_with_parent()
    quiet = started_by_demo() or not is_first_process()
    with nullcontext() if quiet else Display(_console()) as display:
        run = train_run(
            loaded,
            open_store(store),
            out or Path("runs") / (loaded.row or loaded.name),
            progress=silent if display is None else display.row("train"),
        )
    if is_first_process():
        typer.echo(str(run.path))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A finished run, or a folder of `arra import` or `arra init`.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to paint; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file: a prompt per line, .jsonl, or .tsv or .csv with a column.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="A class: its number, numbers as in 0-9, its name, or all.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="What a split's records say, as in validation.")] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Whose split; default: the store that the run was trained on.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Seeds, as in 0-7 (the default) or 1,5,9, for every prompt.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", min=1, help="So many in all: prompts or classes in turn, a new seed each."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures; run again to continue.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start anew where the folder holds pictures of another request.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Settings of a reference, as llamagen-c2i, lumina, chameleon, plain.")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", min=0, help="Guidance; 1 is off.")] = None,
    cfg_schedule: Annotated[
        str | None, typer.Option("--cfg-schedule", help="How guidance grows: constant, linear, cosine or power.")
    ] = None,
    cfg_power: Annotated[
        float | None, typer.Option("--cfg-power", min=0, help="Of the cosine and the power schedule.")
    ] = None,
    cfg_start: Annotated[
        float | None, typer.Option("--cfg-start", min=0, max=1, help="No guidance for this first share of the codes.")
    ] = None,
    cfg_stop: Annotated[
        float | None, typer.Option("--cfg-stop", min=0, max=1, help="No guidance from this share of the codes on.")
    ] = None,
    cfg_interval: Annotated[
        int | None, typer.Option("--cfg-interval", min=-1, help="Guide codes 0 to this + 1 alone; -1 guides all.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1, help="1 is off.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", min=0.0, max=1, help="0 is off.")] = None,
    complete: Annotated[
        Path | None, typer.Option("--complete", help="A picture of which a part stays; the rest is painted.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", help="For --complete: side and share that stays, as top:0.5 (the default).")
    ] = None,
    inpaint: Annotated[Path | None, typer.Option("--inpaint", help="A picture of which a box is painted anew.")] = None,
    box: Annotated[
        str | None, typer.Option("--box", help="For --inpaint: x0,y0,x1,y1 in pixels of the model's picture.")
    ] = None,
    vary: Annotated[Path | None, typer.Option("--vary", help="A picture of which some codes are painted anew.")] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="For --vary: the share of codes, 0 to 1; 0.5 is the default.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="For language models: pixels, as 512 or as 768x512 (wide).")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Keep matrices as float32, bfloat16, float16, int8 or int4.")
    ] = None,
    jacobi_window: Annotated[
        int, typer.Option("--jacobi-window", min=0, help="Guess so many codes ahead (Jacobi decoding); 0 is off.")
    ] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures painted together.")] = 16,
    shard: ShardOption = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also samples.npz, as ADM's evaluation reads it.")] = False,
    grid: Annotated[bool, typer.Option("--grid/--no-grid", help="grid.png, with the first pictures.")] = True,
    text_encoder: Annotated[
        Path | None, typer.Option("--text-encoder", help="Folder of the text encoder of a caption model.")
    ] = None,
    tokenizer: TokenizerOption = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    device: DeviceOption = "auto",
    graphs: Annotated[
        bool | None,
        typer.Option("--graphs/--no-graphs", help="Steps of fixed shapes, replayed on a GPU; default: there alone."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile those steps: a minute or more, for thousands of pictures.")
    ] = False,
) -> None:
    """Paint prompts or classes with a trained model: NNNNNN.png, samples.jsonl, grid.png. Run again to continue.

    Example: arra generate runs/demo/aligned --prompt "a red heart on fire"

    Example: arra generate runs/arra-base-b --label 207 --label "tabby cat" --seeds 0-3 --cfg-scale 2

    On several devices or machines torchrun starts it: torchrun --nproc-per-node 8 -m arra generate runs/b --label all
    """
    from arra.display import Display
    from arra.stages.given import given_request
    from arra.stages.paint import paint
    from arra.stages.process import silent
    from arra.stages.request import PaintRequest, chosen_seeds, parse_options
    from arra.stages.wishes import read_asked

    request = PaintRequest(
        run,
        read_asked(prompt or [], prompts, label or [], split=split, store=store),
        seeds=chosen_seeds(seeds, num_images),
        num_images=num_images,
        preset=preset,
        sampling={
            "cfg_scale": cfg_scale,
            "cfg_schedule": cfg_schedule,
            "cfg_power": cfg_power,
            "cfg_start": cfg_start,
            "cfg_stop": cfg_stop,
            "cfg_interval": cfg_interval,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        },
        image_size=image_size,
        given=given_request(complete=complete, keep=keep, inpaint=inpaint, box=box, vary=vary, strength=strength),
        weights=weights,
        jacobi_window=jacobi_window,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        tokenizer_weights=tokenizer_weights,
    )
    options = parse_options(
        out=out,
        batch_size=batch_size,
        device=device,
        shard=shard,
        replace=replace,
        npz=npz,
        grid=grid,
        graphs=graphs,
        compiled=compiled,
    )
    with Display(_console()) if is_first_process() else nullcontext() as display:
        painted = paint(request, options=options, progress=silent if display is None else display.row("generate"))
    if is_first_process():
        typer.echo(painted.summary())


@app.command()
def evaluate(
    subjects: Annotated[list[Path], typer.Argument(help="Finished runs, folders of pictures, or .npz files.")],
    reference: Annotated[
        str | None, typer.Option("--reference", help="Compare with: a folder, an .npz, a store, a run.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="What to measure, by name (arra list protocols).")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option("--space", help="Compare in: inception, or one of `arra list encoders`; may be repeated."),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="A space or metric to leave out; may be repeated.")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option("--weights", metavar="SPACE=PATH", help="Weights of a space; may be repeated.")
    ] = None,
    inception: Annotated[Path | None, typer.Option("--inception", help="Inception weights of torch-fidelity.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Of stores and runs: whose pictures, or prompts, are taken.")
    ] = None,
    training: Annotated[
        str | None, typer.Option("--training", help="Training pictures, to look for copies: a folder, store or run.")
    ] = None,
    training_split: Annotated[str, typer.Option("--training-split", help="Of that store or run.")] = "train",
    teacher: Annotated[
        list[str] | None, typer.Option("--teacher", help="Encoder that the model was aligned to, if no run says so.")
    ] = None,
    findings: Annotated[
        Path | None, typer.Option("--findings", help="Table of chest X-ray findings; default: read from prompts.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Bring all pictures to so many pixels a side.")
    ] = None,
    filter: Annotated[
        str | None, typer.Option("--filter", help="For that: bicubic (the default), bilinear, lanczos or box.")
    ] = None,
    max_images: Annotated[int | None, typer.Option("--max-images", min=2, help="Measure so many of them.")] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", min=2, help="A run paints so many to be measured.")
    ] = None,
    cfg_scale: Annotated[
        float | None, typer.Option("--cfg-scale", min=0, help="Guidance that a run paints these with.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="A run paints anew over pictures of another model or other settings.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the card; default: beside the pictures.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures looked at together.")] = 32,
    resamples: Annotated[int, typer.Option("--resamples", min=2, help="Of the bootstrap.")] = 500,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of intervals and of what a run paints.")] = 0,
    threads: ThreadsOption = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure finished runs on held-out pictures, or sets of pictures against a reference: metrics.json, card.html.

    Example: arra evaluate runs/demo/aligned

    Example: arra evaluate samples --reference real --space inception --inception weights.pth

    Example: arra evaluate runs/cxr --protocol mimic-cxr --without rad-dino

    On several devices or machines torchrun starts it: torchrun --nproc-per-node 8 -m arra evaluate samples.npz ...
    """
    from arra.display import Display
    from arra.stages.evaluations import evaluate_any
    from arra.stages.process import leave_with_parent, silent, started_by_demo
    from arra.stages.set_options import parse_set_options

    leave_with_parent()
    options = parse_set_options(
        weights=weights or [],
        inception=inception,
        reference=reference,
        protocol=protocol,
        spaces=tuple(space or ()),
        without=tuple(without or ()),
        image_size=image_size,
        filter=filter,
        max_images=max_images,
        split=split,
        training=training,
        training_split=training_split,
        teachers=tuple(teacher or ()),
        findings=findings,
        cfg_scale=cfg_scale,
        num_images=num_images,
        replace=replace,
        tokenizer_weights=tokenizer_weights,
        out=out,
        batch_size=batch_size,
        device=device,
        threads=threads,
        num_resamples=resamples,
        seed=seed,
    )
    console, interval = _console(), 0.0 if started_by_demo() else None
    for subject in subjects:
        with Display(console, seconds_between_lines=interval) if is_first_process() else nullcontext() as display:
            shown = evaluate_any(subject, options, progress=silent if display is None else display.row("evaluate"))
        if is_first_process():
            console.print(*shown, sep="\n")


@app.command()
def reconstruct(
    tokenizer: Annotated[str, typer.Argument(help="A tokenizer of `arra list tokenizers`, or a tokenizer folder.")],
    data: Annotated[str, typer.Argument(help="A folder of pictures, a recipe file or name, or a store.")],
    weights: Annotated[str | None, typer.Option("--weights", help="Checkpoint file of a published tokenizer.")] = None,
    entry: Annotated[str, typer.Option("--entry", help="Weights to take from that file: model or ema.")] = "model",
    inception: Annotated[
        str | None, typer.Option("--inception", help="torch-fidelity's Inception weights, for rFID.")
    ] = None,
    perceptual: Annotated[
        list[str] | None, typer.Option("--perceptual", help="VGG16's weights, and LPIPS' heads, for LPIPS.")
    ] = None,
    judge: Annotated[str | None, typer.Option("--judge", help="An encoder, for the other Fréchet distance.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Pixels per side.")] = None,
    max_images: Annotated[
        int | None, typer.Option("--max-images", min=2, help="At most so many, evenly spaced.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="A split of the recipe or the store; default: all.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for metrics.json and a grid.")] = Path("runs/reconstruct"),
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """What a tokenizer keeps of pictures: PSNR, SSIM, LPIPS, Fréchet distances, use of its codebook.

    Example: arra reconstruct openmoji-vq4 my_pictures --image-size 64
    """
    from arra.display import Display
    from arra.distributed import set_threads
    from arra.stages.reconstruct import parse_options, reconstruction_table
    from arra.stages.reconstruct import reconstruct as reconstruct_pictures

    set_threads(threads)
    options = parse_options(
        weights=weights,
        entry=entry,
        image_size=image_size,
        max_images=max_images,
        split=split,
        judge=judge,
        inception=inception,
        perceptual=tuple(perceptual or ()),
        workers=workers,
        device=device,
    )
    console = _console()
    with Display(console) as display:
        found = reconstruct_pictures(tokenizer, data, out=out, options=options, progress=display.row("reconstruct"))
    console.print(reconstruction_table(found))
    typer.echo(f"{found.metrics_path}, pictures in {found.grid_path}")


@app.command()
def probe(
    run: Annotated[Path, typer.Argument(help="A finished run, aligned or not.")],
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="teacher, judge, one of the recipe's others, or of `arra list encoders`."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Held-out pictures, at most.")] = 256,
    split: Annotated[str, typer.Option("--split", help="Where they are from.")] = "validation",
    layers: Annotated[str | None, typer.Option("--layers", help="As in 0-3 or 1,5,9; default: all.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option("--checkpoint", min=0, help="The run as it was at this step, if it was kept.")
    ] = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="Propose align.layer and align.weight.")] = False,
    share: Annotated[
        float, typer.Option("--share", min=0.001, help="Of the next-token gradient, for the proposed weight.")
    ] = 0.125,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; default: RUN/probe.")] = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """What every layer and position knows of an encoder's features: probe.json, probe.html, a table.

    Example: arra probe runs/demo/aligned

    Example: arra probe runs/demo/baseline --suggest
    """
    from arra.display import Display
    from arra.stages.probe import probe as probe_run
    from arra.stages.probe import table

    console = _console()
    with Display(console) as display:
        found = probe_run(
            run,
            encoder=encoder,
            images=images,
            split=split,
            layers=layers,
            checkpoint=checkpoint,
            suggest=suggest,
            share=share,
            out=out,
            tokenizer_weights=tokenizer_weights,
            threads=threads,
            device=device,
            progress=display.row("probe"),
        )
    console.print(table(found), soft_wrap=False)
    typer.echo(str(found.out / "probe.html"))


@app.command()
def guidance(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="What decides, as kid_x1000 or caption_retrieval_at_1; repeated: their mean."),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option("--space", help="Judge in this one too: inception, or of `arra list encoders`; may be repeated."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=8, help="Held-out prompts for the finalists, at most.")] = 256,
    cfg: Annotated[str | None, typer.Option("--cfg", help="Scales, as in 1,1.5,2,3,5 (the default).")] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="As in constant,cosine:2,power:2.5,constant@0.1-0.8 (power, where it is on)."),
    ] = None,
    temperature: Annotated[
        str | None, typer.Option("--temperature", help="As in 0.7,1; default: the run's own and 1.")
    ] = None,
    top_k: Annotated[
        str | None, typer.Option("--top-k", help="As in 0,100 (0 is off); default: the run's own.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="At most so many pictures, as 5000, or so long, as 90s, 10min, 2h.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Whose prompts; none that the run reports.")] = "validation",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of prompts and of the pictures.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures painted together.")] = 64,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be tried, and leave.")] = False,
    tokenizer_weights: TokenizerWeightsOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Search guidance, its schedule, temperature and top-k on held-out prompts; the run paints with the best.

    Writes sampling.json (read by generate and evaluate; delete it to paint as the recipe says), guidance.json and
    guidance.html into the run. Run again to continue.

    Example: arra guidance runs/demo/aligned --budget 10min

    Example: arra guidance runs/demo/aligned --cfg 1,2,4,8 --schedule constant,cosine:2 --top-k 0,200 --dry-run
    """
    from arra.display import Display
    from arra.stages.guidance import guidance as search_guidance
    from arra.stages.guidance import summary
    from arra.stages.guidance_options import parse_options

    options = parse_options(
        cfg=cfg,
        schedule=schedule,
        temperature=temperature,
        top_k=top_k,
        budget=budget,
        metrics=tuple(metric or ()),
        spaces=tuple(space or ()),
        images=images,
        split=split,
        seed=seed,
        batch_size=batch_size,
        dry_run=dry_run,
    )
    console = _console()
    with Display(console) as display:
        found = search_guidance(
            run,
            options=options,
            tokenizer_weights=tokenizer_weights,
            threads=threads,
            device=device,
            progress=display.row("guidance"),
        )
    console.print(summary(found))


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Evaluated runs; the first one's row is the baseline. Or one run as it is being trained."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html, .md, .tex, .csv.")] = Path("runs/report"),
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "arra report",
) -> None:
    """One HTML page that compares runs and works offline; of one run that is not evaluated, its training so far.

    Example: arra report runs/demo/baseline runs/demo/aligned --out runs/report
    """
    from arra.stages.report import report as write_report

    typer.echo(str(write_report(runs, out, title=title)))


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(help="A: an evaluated run or set of pictures, or its metrics.json.")],
    candidate: Annotated[Path, typer.Argument(help="B: the one that is held against it.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a page: an .html file, or a folder for comparison.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Two evaluations side by side: every difference with its interval and how likely it is noise.

    Refuses what was measured differently, and names it.

    Example: arra compare runs/demo/baseline runs/demo/aligned --out comparison.html
    """
    from arra.stages.compare import compare_places, comparison_table

    found = compare_places(baseline, candidate, out=out)
    if as_json:
        typer.echo(found.to_json())
    else:
        _console().print(comparison_table(found))
    if found.page is not None:
        typer.echo(str(found.page), err=as_json)


@app.command()
def lab(
    recipe: Annotated[str, typer.Argument(help="A recipe file or the name of a built-in one.")] = "alignment_lab",
    rows: Annotated[
        str, typer.Option("--rows", help="Rows of the recipe with commas between; the first one is the baseline.")
    ] = "baseline,hybnext,at,rep,patch,both",
    seeds: Annotated[int, typer.Option("--seeds", help="Training seeds of every row.")] = 3,
    out: Annotated[Path, typer.Option("--out", help="Folder of the lab; run again to continue.")] = Path("runs/lab"),
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the baseline, whose compute every row gets.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Runs at a time, one thread each; default: cards, else cores.")
    ] = None,
    charge_teacher: Annotated[
        bool, typer.Option("--charge-teacher", help="A row also pays for its teachers' pass over the pictures.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Alignments side by side at equal training compute: lab.json, lab.md and lab.html, with intervals.

    Ends with code 1 if a run failed; the others are in the table.

    Example: arra lab --steps 20 --seeds 1 --rows baseline,hybnext --out runs/smoke
    """
    from arra.stages.lab import LabOptions, run_lab

    options = LabOptions(
        recipe=recipe,
        rows=tuple(name.strip() for name in rows.split(",") if name.strip()),
        seeds=seeds,
        steps=steps,
        processes=processes,
        charge_teacher=charge_teacher,
        overrides=tuple(overrides or ()),
    )
    done = run_lab(options, out, console=_console())
    raise typer.Exit(1 if done.failures else 0)


@app.command()
def reproduce(
    tables: Annotated[list[str], typer.Argument(help="Recipes with a table of a paper: files or built-in names.")],
    rows: Annotated[
        str | None,
        typer.Option("--rows", help="Rows with commas between, and those they are held against; default: all."),
    ] = None,
    scale: Annotated[
        str, typer.Option("--scale", help="embedded: small models on embedded data; full: the recipes as they stand.")
    ] = "embedded",
    seeds: Annotated[int, typer.Option("--seeds", help="Training seeds of every row.")] = 3,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of stores, runs and results; run again to continue.")
    ] = Path("runs/paper"),
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", help="Runs at a time, one thread each; 0: all in this process; default: cards, else cores."
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option("--devices", help="Accelerators with commas between, as in 0,1,2,3; a run on each.")
    ] = None,
    ranks: Annotated[
        int, typer.Option("--ranks", help="Processes of every training (torchrun), each on a device of its own.")
    ] = 1,
    shard: ShardOption = None,
    equal_compute: Annotated[
        bool | None,
        typer.Option(
            "--equal-compute/--own-steps",
            help="Rows get the compute of their recipe without alignment, or its steps; default: equal if embedded.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="SPACE=PATH", help="At full scale: weights of a protocol's network."),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="At full scale: a space or metric to leave out.")
    ] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(
            "--reference", metavar="PROTOCOL=PATH", help="At full scale: compare with this; default: the run's split."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List rows, and which are one training, and leave.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Tables of the paper, whole: prepare, train, evaluate, and the paper's numbers beside ours with verdicts.

    What several rows share is done once; the same command continues. Ends with code 1 if a run failed.

    Example: arra reproduce table1 --scale embedded

    Example: arra reproduce table1 --scale full --rows arra-hybnext --devices 0,1,2,3,4,5,6,7 --ranks 8
    """
    from arra.stages.reproduce import list_rows, run_reproduce
    from arra.stages.reproduce_options import parse_options

    options = parse_options(
        tables=tables,
        rows=rows,
        scale=scale,
        seeds=seeds,
        processes=processes,
        devices=devices,
        ranks=ranks,
        shard=shard,
        equal_compute=equal_compute,
        overrides=overrides or (),
        weights=weights or (),
        without=without or (),
        references=references or (),
    )
    if dry_run:
        _console().print(list_rows(options))
        return
    done = run_reproduce(options, out, console=_console())
    raise typer.Exit(1 if done.failures else 0)


@app.command()
def checkpoint(
    run: Annotated[Path, typer.Argument(help="A run, finished or not.")],
    step: Annotated[str, typer.Option("--step", help="A step, newest, or best (lowest validation loss).")] = "newest",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write the model to; without it, list the checkpoints.")
    ] = None,
    average: Annotated[
        bool, typer.Option("--average/--no-average", help="Take the averaged weights, where there are any.")
    ] = True,
) -> None:
    """List a run's checkpoints, or make a model's folder from one; `arra generate` and `arra export` take it.

    Example: arra checkpoint runs/aligned

    Example: arra checkpoint runs/aligned --step best --out best
    """
    from arra.stages.checkpoint import checkpoint_table, model_of_checkpoint

    if out is None:
        _console().print(checkpoint_table(run))
    else:
        typer.echo(str(model_of_checkpoint(run, step, out=out, average=average)))


@app.command(name="import")
def import_weights(
    source: Annotated[
        Path, typer.Argument(help="A .pt, .pth or .safetensors file, or a folder with one or its shards.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    entry: Annotated[str, typer.Option("--entry", help="model or ema: the weights to take from the file.")] = "model",
    size: Annotated[str | None, typer.Option("--size", help="b, l, xl, xxl, xxxl, 1b, 3b or 7b; checked.")] = None,
    num_heads: Annotated[
        int | None, typer.Option("--num-heads", min=1, help="Of a decoder of no published size.")
    ] = None,
    grid: Annotated[str | None, typer.Option("--grid", help="Rows x columns of codes, as 24x24 (384 pixels).")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: the file's.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="PATTERN", help="Keys to leave out; may be repeated.")
    ] = None,
    init_missing: Annotated[
        list[str] | None,
        typer.Option("--init-missing", metavar="PATTERN", help="Missing keys to initialise afresh; may be repeated."),
    ] = None,
    text_tokenizer: Annotated[
        Path | None,
        typer.Option("--text-tokenizer", help="Chameleon's family: tokenizer.json, if not beside the weights."),
    ] = None,
    zero_image_head: Annotated[
        bool | None,
        typer.Option(
            "--zero-image-head/--keep-image-head",
            help="Chameleon's family: the head's rows of codes start from nought, or as they are.",
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="Chameleon's family: lumina or chameleon; default: by the source.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Chameleon's family: what is read in place of {prompt}.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Chameleon's family: pixels per side; default: 512.")
    ] = None,
) -> None:
    """Published weights to arra's format: LlamaGen's, Chameleon's, Lumina-mGPT's, ARRA's. No file can run code.

    Every missing and unexpected key is named, and is an error unless a pattern covers it.

    Example: arra import c2i_L_384.pt models/llamagen-l --grid 24x24

    Example: arra import vq_ds16_c2i.pt models/vq16

    Example: arra import Lumina-mGPT-7B-512 models/lumina --text-tokenizer text_tokenizer.json --dtype bfloat16

    Example: arra import vqgan.ckpt models/chameleon-vq
    """
    from arra.stages.weights import import_weights as import_into

    if entry not in ("model", "ema"):
        raise ArraError(f"--entry {entry}: unknown; expected model or ema")
    done = import_into(
        source,
        out,
        entry="ema" if entry == "ema" else "model",
        size=size,
        num_heads=num_heads,
        grid=grid,
        dtype=dtype,
        ignore=ignore or (),
        init_missing=init_missing or (),
        text_tokenizer=text_tokenizer,
        zero_image_head=zero_image_head,
        layout=layout,
        template=template,
        image_size=image_size,
    )
    typer.echo(done.summary())
    typer.echo(str(done.path))


@app.command(name="export")
def export_weights(
    source: Annotated[Path, typer.Argument(help="A run, the folder of a model or a tokenizer, or painted pictures.")],
    out: Annotated[Path, typer.Argument(help="File to write, for hf, lumina and pictures a folder; must be new.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="hf (language models' default), lumina; llamagen (others' default), chameleon; chexgenbench.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16; default: float32, for hf and lumina as it is."),
    ] = None,
    layout: Annotated[
        str, typer.Option("--layout", help='train: {"model": weights}; fsdp: the weights alone (--from-fsdp).')
    ] = "train",
) -> None:
    """A checkpoint that the original LlamaGen, transformers or Lumina-mGPT loads, or pictures for CheXGenBench.

    Example: arra export runs/llamagen_c2i model.pt --to llamagen

    Example: arra export runs/llamagen_c2i exported --to hf

    Example: arra export runs/arra-adapt exported --to lumina --dtype bfloat16

    Example: arra export runs/cxr/samples/test exported --to chexgenbench
    """
    from arra.stages.weights import export_weights as export_to

    done = export_to(source, out, to=to, dtype=dtype, layout=layout)
    typer.echo(done.summary())
    typer.echo(done.hint)
    typer.echo(str(done.path))


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new.")],
    llm: Annotated[str, typer.Option("--llm", help="A causal LM: a folder in Hugging Face layout, or a hub's name.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="An image tokenizer of `arra list tokenizers`, or a tokenizer folder.")
    ],
    tokenizer_weights: TokenizerWeightsOption = None,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Pixels per side of its pictures.")] = 256,
    start: Annotated[
        str, typer.Option("--start", help="codebook: codes that look alike begin alike; mean: all begin alike.")
    ] = "codebook",
    rows: Annotated[
        bool, typer.Option("--rows/--no-rows", help="Write sides and ends of rows, for pictures of any aspect.")
    ] = True,
    rep_token: Annotated[
        bool, typer.Option("--rep-token/--no-rep-token", help="A token before the picture, for align.target: rep.")
    ] = False,
    template: Annotated[
        str, typer.Option("--template", help="What the model reads for a prompt; {width} and {height} may be in it.")
    ] = "{prompt}",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the new rows.")] = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: the LM's.")
    ] = None,
) -> None:
    """Any causal language model gets the codes of an image tokenizer as words; `arra train` teaches it to paint.

    Example: arra init models/painter --llm models/smollm2 --tokenizer openmoji-vq4 --image-size 32
    """
    from arra.stages.init import init_painter

    done = init_painter(
        llm,
        out,
        tokenizer=tokenizer,
        tokenizer_weights=tokenizer_weights,
        image_size=image_size,
        start=start,
        rows=rows,
        rep_token=rep_token,
        template=template,
        seed=seed,
        dtype=dtype,
    )
    typer.echo(done.summary())
    typer.echo(str(done.path))


@app.command()
def plan(
    recipe: RecipeArgument,
    gpus: Annotated[
        list[str],
        typer.Option(
            "--gpu", "--gpus", metavar="NxCARD", help="Devices: 8xa6000-48g, 8xh100, 4x48 (GiB each), cpu; repeatable."
        ),
    ],
    row: RowOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="In place of a language model that is not there: chameleon-7b, chameleon-34b."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="A store, which tells how many pictures there are.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make 20 real steps here, and reckon with the speed that they reach.")
    ] = False,
    scale: Annotated[
        str | None, typer.Option("--scale", help="Of a table's rows: full (the default), embedded.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Of a table's rows, each trained so often.")] = 1,
    overrides: SetOption = None,
) -> None:
    """What a training takes of every device's memory, how long it trains, what of the disk; nothing is started.

    Of a recipe with a paper's table and no --row every row is told. Ends with code 1 if it fits on none of the
    machines asked for; of a table, if none of them fits every row.

    Example: arra plan llamagen_c2i --row 3b --gpu 4x48 --gpu 8xa100

    Example: arra plan arra_mimic --row arra-adapt --gpu 8xa6000-48g

    Example: arra plan table1 --gpu 8xa6000-ada
    """
    from arra.stages.plan_request import PlanRequest, answer

    found = answer(
        PlanRequest(
            recipe=str(recipe),
            machines=tuple(gpus),
            row=row,
            overrides=tuple(overrides or ()),
            stand_in=model,
            store=store,
            probing=probe,
            scale=scale,
            seeds=seeds,
        )
    )
    _console().print(found.shown, soft_wrap=True)
    raise typer.Exit(0 if found.fits else 1)


@app.command()
def doctor() -> None:
    """What is here, what is missing, what to do.

    Example: arra doctor
    """
    from arra.doctor import examine, show

    raise typer.Exit(0 if show(examine(), _console()) else 1)


@app.command(name="list")
def list_known(
    what: Annotated[str, typer.Argument(help="encoders, tokenizers, models, recipes, sources, presets or protocols.")],
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
    warnings.formatwarning = _formatted
    # transformers loads torchao where it is installed, and torch grumbles at how that is written
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
    try:
        app(standalone_mode=True)
    except ArraError as error:
        _leave(f"error: {error}", 2, is_told=isinstance(error, FirstProcessError))
    except (KeyboardInterrupt, TrainingInterrupted):
        _leave(INTERRUPTED, 130, is_told=True)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer has caught a KeyboardInterrupt and says nothing
            _leave(INTERRUPTED, 130, is_told=True)
        raise
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        _leave(f"error: {error.filename or 'writing'}: {WRITE_ERRORS[error.errno]}", 2)


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as it is printed: our own are lines for users, others' say where they are from."""
    if OURS in Path(filename).parents:
        return f"warning: {message}\n"
    return FORMATTED(message, category, filename, lineno, line)


def _leave(line: str, code: int, *, is_told: bool = False) -> None:
    """Ends the process with a line; `is_told` where the first process is known to say the same."""
    if not is_first_process():
        # what all processes find, the first one tells, and torchrun ends this one; what only this one found, it tells
        time.sleep(SECONDS_FOR_THE_FIRST if is_told else SECONDS_TO_DOUBT_IT)
        line = "" if is_told else f"process {os.environ['RANK']}: {line}"
    if line:
        typer.echo(line, err=True)
    sys.exit(code)
