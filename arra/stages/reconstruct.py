"""`arra reconstruct`: what a tokenizer keeps of pictures, as a table, metrics.json and a grid of pictures.

a folder, a recipe or a store -> records (in a scratch folder where there is no store) -> middle squares -> measures
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from arra.data.columns import FAILURES_FILE
from arra.data.folder import PICTURES
from arra.data.index import build_index
from arra.data.records import Failure, Found, ImageRef, Record, Source, inside
from arra.data.sources import detect_kind
from arra.data.store import RECORDS, Store
from arra.distributed import choose_device
from arra.encoders import EncoderChoice, check_encoder_name
from arra.errors import ArraError
from arra.evaluate.distances import Interval
from arra.evaluate.spaces import load_inception
from arra.report.grids import GridColumn, png_bytes, sample_grid
from arra.runs import atomic_write, writing
from arra.stages.check import recipe_of
from arra.stages.judging import Judged, judge_tokenizer
from arra.stages.process import Progress, silent
from arra.stages.squares import spaced
from arra.tokenizers import PUBLISHED, ImageTokenizer, load_tokenizer
from arra.train.perceptual import load_perceptual

METRICS_FILE, GRID_FILE = "metrics.json", "reconstructions.png"
NUM_SHOWN = 8
SHOWN_SIDE = 192
"""Pixels per side that small pictures are about enlarged to in the grid."""
USUAL_IMAGE_SIZE = 256
"""LlamaGen's."""
ALMOST_ALL = 1 - 1e-9


@dataclass(frozen=True)
class ReconstructOptions:
    """How a tokenizer is judged."""

    weights: str | None = None
    entry: Literal["model", "ema"] = "model"
    image_size: int | None = None
    """None is the recipe's, else what the tokenizer was trained at, else 256."""
    max_images: int | None = None
    """At most this many, evenly spaced."""
    split: str | None = None
    """Of a recipe's or a store's records; None is all of them."""
    judge: str | None = None
    inception: str | None = None
    perceptual: tuple[str, ...] = ()
    workers: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Reconstructed:
    """What was found, and where it is written."""

    tokenizer: str
    judged: Judged
    about: dict[str, Any]
    out: Path

    @property
    def metrics_path(self) -> Path:
        """The place of the measures."""
        return self.out / METRICS_FILE

    @property
    def grid_path(self) -> Path:
        """The place of pictures beside their reconstructions."""
        return self.out / GRID_FILE


def parse_options(*, entry: str, **options: Any) -> ReconstructOptions:
    """The options as the command line gives them.

    Raises:
        ArraError: an unknown entry or encoder.
    """
    if entry not in ("model", "ema"):
        raise ArraError(f"--entry {entry}: expected model or ema")
    if options["judge"] is not None:
        check_encoder_name(options["judge"])
    return ReconstructOptions(entry=entry, **options)  # type: ignore[arg-type]


class PictureFolder(Source):
    """All pictures below a folder, with or without captions."""

    def scan(self) -> Iterator[Found]:
        root = Path(self.path)
        for folder, below, names in os.walk(root):
            below.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() not in PICTURES:
                    continue
                path = os.path.join(folder, name)
                known = os.path.relpath(path, root)
                try:
                    yield Record(id=known, image=ImageRef("file", str(inside(root, known))), prompt=name, split="all")
                except ValueError as error:
                    yield Failure(known, path, str(error))


def reconstruct(
    tokenizer_name: str, data: str, *, out: Path, options: ReconstructOptions, progress: Progress = silent
) -> Reconstructed:
    """The measures of a tokenizer on pictures, written to `out`.

    Raises:
        ArraError: an unknown tokenizer, missing or unfit weights, no pictures, or a size the tokenizer cannot take.
    """
    device = choose_device(options.device)
    if options.weights is not None and tokenizer_name not in (*PUBLISHED, "llamagen"):
        raise ArraError(f"--weights: '{tokenizer_name}' has weights of its own; leave it out, or name a published size")
    tokenizer = load_tokenizer(tokenizer_name, weights=options.weights, entry=options.entry)
    perceptual = load_perceptual(options.perceptual) if options.perceptual else None
    inception = None if options.inception is None else load_inception(options.inception, device=device)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory(dir=out, prefix=".records-"))
        pictures = _open_pictures(data, Path(scratch), progress)
        size = options.image_size or pictures.image_size or _trained_size(tokenizer) or USUAL_IMAGE_SIZE
        if size % tokenizer.downsampling:
            raise ArraError(
                f"--image-size {size}: expected a multiple of {tokenizer.downsampling}, the pixels per code of "
                f"{tokenizer.name}"
            )
        store = pictures.store
        rows = _rows(store, options.split, data)
        judged = judge_tokenizer(
            tokenizer,
            store,
            spaced(rows, options.max_images),
            image_size=size,
            judge=pictures.judge if options.judge is None else EncoderChoice(name=options.judge),
            device=device,
            grey16=pictures.grey16,
            perceptual=perceptual,
            inception=inception,
            workers=options.workers,
            num_samples=NUM_SHOWN,
            progress=lambda done, total: progress("reconstructing", done, total),
        )
    about = {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.weights_hash,
        "data": data,
        "split": options.split,
        "image_size": size,
        "crop": "middle square",
        "pictures_found": len(rows),
        "pictures_broken": len(pictures.broken) + len(judged.failures),
    }
    done = Reconstructed(tokenizer.name, judged, about, out)
    _list_failures(out / FAILURES_FILE, [*pictures.broken, *judged.failures])
    atomic_write(done.metrics_path, json.dumps(about | judged.reconstruction.as_json(), indent=2) + "\n")
    atomic_write(done.grid_path, _grid(judged))
    return done


@dataclass(frozen=True)
class _Pictures:
    store: Store
    image_size: int | None
    judge: EncoderChoice
    grey16: Any
    broken: tuple[Failure, ...] = ()


def _open_pictures(data: str, scratch: Path, progress: Progress) -> _Pictures:
    """The records of a store, a recipe or a folder; the last two are indexed in a scratch folder."""
    path = Path(data)
    is_store = path.is_dir() and (path / "manifest.json").is_file()
    bare = path.is_dir() and not is_store and detect_kind(path) in ("folder", "classes")
    recipe = recipe_of("demo" if is_store or bare else data, None, [])
    judge, grey16 = recipe.encoder.choice("judge"), recipe.data.crop.grey16
    if is_store:
        return _Pictures(Store.open(path), None, judge, grey16)
    sources: Sequence[Source] = [PictureFolder(path=data)] if bare else recipe.data.all_sources
    indexed = build_index(
        sources,
        scratch,
        max_failed_fraction=ALMOST_ALL,
        progress=lambda count: progress("reading records", count, 0),
    )
    if indexed.store is None:
        raise ArraError(f"{data}: none of {indexed.failed} items can be read; see: arra data check {data}")
    size = (
        None if path.is_dir() or recipe.data.path == data else recipe.data.image_size
    )  # a recipe says it, data do not
    failures = scratch / RECORDS / FAILURES_FILE
    lines = failures.read_text(encoding="utf-8").splitlines() if failures.is_file() else []
    return _Pictures(indexed.store, size, judge, grey16, tuple(Failure(**json.loads(line)) for line in lines))


def _rows(store: Store, split: str | None, data: str) -> np.ndarray:
    if split is None:
        return np.arange(len(store))
    if split not in store.about["splits"]:
        raise ArraError(
            f"--split {split}: {data} has {', '.join(sorted(store.about['splits']))}; name one, or none for all"
        )
    return store.rows(split)


def _list_failures(path: Path, failures: Sequence[Failure]) -> None:
    """Nothing; the file lists what was left out, or is not there."""
    if failures:
        atomic_write(path, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in failures))
    else:
        path.unlink(missing_ok=True)


def _trained_size(tokenizer: ImageTokenizer) -> int | None:
    made_from = tokenizer.about.get("made_from")
    size = made_from.get("image_size") if isinstance(made_from, dict) else None
    return size if isinstance(size, int) and size > 0 else None


def _grid(judged: Judged) -> bytes:
    names, pictures, back = zip(*judged.samples, strict=True)
    scale = max(1, SHOWN_SIDE // pictures[0].shape[0])
    columns = [
        GridColumn("original", np.stack(pictures)[:, None]),
        GridColumn("reconstruction", np.stack(back)[:, None]),
    ]
    return png_bytes(sample_grid(columns, captions=names, scale=scale))


def reconstruction_table(found: Reconstructed) -> Table:
    """The measures for the terminal, 80 columns wide."""
    r, about = found.judged.reconstruction, found.about
    table = Table(
        title=escape(f"{found.tokenizer} on {about['data']}"), title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for column in ("", "value", "95 % interval; note"):
        table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    broken = f"; {about['pictures_broken']} broken ones left out: {FAILURES_FILE}" if about["pictures_broken"] else ""
    chosen = f"{r.num_images:,} of {about['pictures_found']:,}" if r.num_images < about["pictures_found"] else "all"
    table.add_row("pictures", f"{r.num_images:,}", f"{chosen}, middle squares of {about['image_size']} pixels{broken}")
    biased = "; biased upwards by few pictures, compare at equal numbers" if r.is_biased else ""
    axes = f"in {r.frechet_components} axes of {r.frechet_features}'s features, no FID{biased}"
    inception = f"reference: these pictures, not a training set's statistics{biased}"
    for name, label, digits, note in (
        ("psnr_db", "PSNR, dB", ".2f", "mean over pictures, 8-bit pixels"),
        ("ssim", "SSIM", ".4f", "Gaussian window, data range 1"),
        ("ssim_llamagen", "SSIM, LlamaGen's", ".4f", "flat window, data range 2: higher, as its paper's"),
        ("lpips", "LPIPS (VGG)", ".4f", ""),
        ("frechet", "Fréchet distance", ".4g", axes),
        ("rfid", "rFID (Inception)", ".3f", inception),
    ):
        interval: Interval | None = getattr(r, name)
        if interval is None:
            table.add_row(label, "-", f"not measured: {r.not_measured[name]}")
        else:
            ends = f"{interval.low:{digits}} to {interval.high:{digits}}"
            table.add_row(label, f"{interval.value:{digits}}", f"{ends}{note and '; '}{note}")
    table.add_row(
        "codebook in use", f"{100 * r.code_use:.1f} %", f"of {r.num_codes:,} codes, {r.num_codes_seen:,} seen"
    )
    table.add_row("codebook perplexity", f"{r.code_perplexity:,.0f}", "equally frequent codes that would carry as much")
    return table
