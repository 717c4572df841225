"""Painting: speed and memory of our engine on a CPU beside the plain ways, and images/s on a GPU.

python benchmarks/sample.py [--only decode flat language memory jacobi gpu] [--threads 2] [--run RUN] [--json FILE]

Models have random weights of the published shapes; nothing that is measured depends on what they say. Every measurement
is a process of its own; the machine's read bandwidth is measured before and after, and the better one is taken.

decode    LlamaGen-B, 256 codes, guidance 2.0, 1 and 8 images: asked 60 % of the rate at which the weights can be read
          at 1 image, twice the plain way (`plain_llamagen.py`) at 8. The first call counts making the engine ready
flat      LlamaGen-B with 1,024 codes: the time of a code in the last tenth over the first, asked at most 1.2, beside
          the ratio of the bytes that must be read, weights and what is filled of the cache (75 MB a row at the end)
language  a Llama of LlamaGen-B's size with 32,000 tokens and 16,384 codes, beside `generate` of transformers: asked
          never slower, and 1.5 times as fast at 8 images with guidance
memory    what a process holds at most above its imports over `arra.sample.memory`'s arithmetic: asked 0.9 to 1.1
jacobi    passes and time of speculative Jacobi decoding by a trained run (--run), beside plain decoding
gpu       LlamaGen-L, 256 pixels, guidance 2.0, bfloat16, VQ-16: asked 100 images/s
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arra.data.layout import ImageLayout
from arra.models import CausalLM, Painter, load_decoder
from arra.sample.decoding import Batch, Rows
from arra.sample.generate import Engine
from arra.sample.grammar import image_processors
from arra.sample.logits import SamplingSettings, draw_keys, guide, pick
from arra.sample.memory import painting_memory
from arra.tokenizers.image import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings

sys.path.insert(0, str(Path(__file__).parent))
from decoder import MATRIX_PARAMETERS, SIZE, found_by, machine, memory_gb
from plain_llamagen import PlainLlamaGen

STREAMED_BYTES = 4 * MATRIX_PARAMETERS
"""What a decoding step must read at least once."""
PLAIN_STEPS = 64
"""Codes of the plain way: each takes as long as any other, since it attends to the whole padded cache."""
LONG = (32, 32)
TEXT, CODES, PROMPT = 32_000, 16_384, "a photograph of a red fox in the snow under a grey sky"
LANGUAGE_SCALE = 3.0
GPU_BATCHES = (16, 64, 128, 256)
ASKED_SHARE, ASKED_DECODE, ASKED_FLAT, ASKED_LANGUAGE, ASKED_IMAGES = 0.6, 2.0, 1.2, 1.5, 100


@dataclass(frozen=True)
class Case:
    """What a process measures."""

    job: str
    which: str = "ours"
    """ours, plain, or another way."""
    batch: int = 1
    side: int = 16
    """Of the grid, in codes."""
    cfg_scale: float = 2.0
    with_tokenizer: bool = False
    window: int = 0
    run: str = ""
    times: int = 2


class Letters:
    """A text tokenizer: an id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [3 + ord(letter) % 200 for letter in prompt]

    def save(self, path: Path) -> None:
        raise NotImplementedError


def llamagen(size: str = "b", **changes: Any) -> Painter:
    """A decoder whose head is not zero."""
    torch.manual_seed(0)
    model = load_decoder(f"llamagen-{size}", **changes)
    nn.init.normal_(model.output.weight, std=0.02)
    return model


def language_model(side: int, *, layers: int = 12, width: int = 768, heads: int = 12, inner: int = 2048) -> CausalLM:
    """A Llama that paints."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layout = ImageLayout(
        family="generic",
        bos=0,
        begin_image=TEXT,
        end_image=TEXT + 1,
        closing=(1,),
        first_code=TEXT + 2,
        num_codes=CODES,
        unconditional="empty_prompt",
        max_positions=2048,
    )
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=TEXT + 2 + CODES,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    lm.generation_config.eos_token_id = None  # as many tokens as are asked for
    return CausalLM(lm, layout=layout, grid=(side, side), text_tokenizer=Letters())


def tokenizer(**changes: Any) -> ImageTokenizer:
    """VQ-16 with random weights."""
    return ImageTokenizer(VQModel(VQSettings(**changes)), name="random", weights_hash=None)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def decoding(case: Case) -> dict[str, Any]:
    """Codes a second of the first call and of the best warm one, and the latter's seconds for a code of all images."""
    labels, num_codes = torch.arange(case.batch), case.side**2
    if case.which == "plain":
        plain = PlainLlamaGen(**SIZE).eval()
        nn.init.normal_(plain.output.weight, std=0.02)
        steps = min(PLAIN_STEPS, num_codes)
        took = [timed(lambda: plain.generate(labels, cfg_scale=2.0, steps=steps)) for _ in range(2)]
        first, warm = (steps / each for each in took)
    else:
        engine = Engine(llamagen(), settings=SamplingSettings(cfg_scale=2.0), batch_size=case.batch)
        paint = lambda: engine.generate(labels=labels.tolist(), seeds=list(range(case.batch)))  # noqa: E731
        with ExitStack() as stack:
            first = num_codes / timed(lambda: (stack.enter_context(engine), paint()))
            warm = num_codes / min(timed(paint) for _ in range(case.times))
    return {"first tokens/s": case.batch * first, "tokens/s": case.batch * warm, "seconds": 1 / warm}


@torch.no_grad()
def flat(case: Case) -> dict[str, Any]:
    """Milliseconds of the median code in the first and in the last tenth, in turn: what changes meanwhile hits both."""
    grid, num_codes = (case.side, case.side), case.side**2
    model, settings = llamagen(grid=grid), SamplingSettings(cfg_scale=case.cfg_scale)
    tenth, is_guided = num_codes // 10, case.cfg_scale != 1
    keys = draw_keys(range(case.batch), num_codes)
    batch = Batch(model.condition(labels=list(range(case.batch))), range(case.batch), keys)
    codes = torch.arange(num_codes).repeat(case.batch, 1)
    took: dict[str, list[float]] = {"first": [], "last": []}
    with Engine(model, settings=settings):
        rows = Rows(model, batch, grid, codes, guided=[is_guided] * num_codes, prefixes=None)
        rows.begin(0)
        rows.read(0, num_codes - 1)

        def one(index: int) -> None:
            logits = rows.read(index, index + 1)
            if is_guided:
                logits = guide(logits[: case.batch], logits[case.batch :], cfg_scale=case.cfg_scale)
            pick(logits, settings, keys=keys[:, index + 1])

        for place in range(tenth):
            for name, index in (("first", place), ("last", num_codes - 1 - tenth + place)):
                took[name].append(timed(lambda index=index: one(index)))  # type: ignore[misc]
    first, last = (statistics.median(each) for each in took.values())
    cache = 2 * 12 * SIZE["width"] * 4 * case.batch * (1 + is_guided) * num_codes
    reads = (STREAMED_BYTES + 0.95 * cache) / (STREAMED_BYTES + 0.05 * cache)
    return {"first ms": 1e3 * first, "last ms": 1e3 * last, "last / first": last / first, "of bytes read": reads}


class OnlyCodes:
    """Scores with -inf for all that is no code, by a mask that is made once."""

    def __init__(self, layout: ImageLayout) -> None:
        self.forbidden = torch.ones(TEXT + 2 + CODES, dtype=torch.bool)
        self.forbidden[layout.code_ids()] = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.forbidden, -torch.inf)


@torch.no_grad()
def library_generate(model: CausalLM, prompts: list[str], case: Case) -> Tensor:
    """What `transformers` generates: codes alone, by its own guidance ("library") or by ours ("processors")."""
    rows = model.condition(prompts=prompts)
    assert rows.prefix_mask is not None
    told: dict[str, Any] = {"inputs": rows.tokens, "attention_mask": rows.prefix_mask.long()}
    if case.which == "processors":
        grid, width = model.settings.grid, rows.tokens.shape[1]
        told["logits_processor"] = image_processors(
            model.lm, model.layout, grid=grid, prompt_length=width, cfg_scale=case.cfg_scale
        )
    else:
        told["logits_processor"] = [OnlyCodes(model.layout)]
        if case.cfg_scale != 1:
            null = model.null_condition(rows)
            assert null.prefix_mask is not None
            width = int(null.prefix_mask[0].sum())  # all null rows are the same, so they need no padding
            told |= {
                "guidance_scale": case.cfg_scale,
                "negative_prompt_ids": null.tokens[:, -width:],
                "negative_prompt_attention_mask": null.prefix_mask[:, -width:].long(),
            }
    found: Tensor = model.lm.generate(  # type: ignore[operator]
        **told, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=case.side**2, pad_token_id=1
    )
    return found


def language(case: Case) -> dict[str, Any]:
    """Seconds for a code of all images: of the first call and the best warm one."""
    model = language_model(case.side)
    prompts = [PROMPT[: 20 + 4 * (place % 8)] for place in range(case.batch)]
    with ExitStack() as stack:
        if case.which == "ours":
            settings = SamplingSettings(cfg_scale=case.cfg_scale)
            engine = Engine(model, settings=settings, batch_size=case.batch)
            paint = lambda: engine.generate(prompts=prompts, seeds=list(range(case.batch)))  # noqa: E731
            first = timed(lambda: (stack.enter_context(engine), paint()))
        else:
            paint = lambda: library_generate(model, prompts, case)  # type: ignore[return-value, assignment]  # noqa: E731
            first = timed(paint)
        warm = min(timed(paint) for _ in range(case.times))
    return {"first seconds": first / case.side**2, "seconds": warm / case.side**2}


def memory(case: Case) -> dict[str, Any]:
    """Peak memory above what a toy of the same kind left, and what arithmetic says of it."""
    is_language = case.which == "language"

    def made(small: bool) -> tuple[Painter, dict[str, Any]]:
        if is_language:
            sizes = {"layers": 1, "width": 48, "heads": 4, "inner": 64} if small else {}
            prompts = [PROMPT[: 20 + 4 * (place % 8)] for place in range(case.batch)]
            return language_model(2 if small else case.side, **sizes), {"prompts": prompts}
        shape = {"num_layers": 1, "num_heads": 4, "hidden_size": 48, "num_codes": 16} if small else {}
        side = 2 if small else case.side
        return llamagen(grid=(side, side), **shape), {"labels": list(range(case.batch))}

    settings, seeds = SamplingSettings(cfg_scale=case.cfg_scale), list(range(case.batch))
    toy, told = made(small=True)  # brings in the code, which is not counted
    with Engine(toy, tokenizer(channels=32), settings=settings) as engine:
        engine.generate(seeds=seeds, **told)
    del toy, engine
    gc.collect()
    before = memory_gb()[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now's
    model, told = made(small=False)
    pictures = tokenizer() if case.with_tokenizer else None
    with Engine(model, pictures, settings=settings, batch_size=case.batch) as engine:
        engine.generate(seeds=seeds, **told)
    peak = memory_gb()[1] - before
    length = model.condition(**told).tokens.shape[1]
    parts = painting_memory(model, pictures, batch_size=case.batch, settings=settings, prefix_length=length)
    shown = {f"{name} GB": 1e-9 * value for name, value in vars(parts).items()}
    return {"peak GB": peak, "predicted GB": 1e-9 * parts.total, "ratio": 1e9 * peak / parts.total, **shown}


def jacobi(case: Case) -> dict[str, Any]:
    """Passes and seconds of each image of a trained run."""
    from arra.stages.painters import load_painter

    loaded = load_painter(Path(case.run))
    texts = loaded.model.settings.condition == "text"
    told: dict[str, Any] = {"prompts": [PROMPT]} if texts else {"labels": [0]}
    grid = loaded.model.settings.grid
    engine = Engine(loaded.model, settings=loaded.sampling, batch_size=1, jacobi_window=case.window)
    with engine:
        engine.generate(seeds=[0], **told)
        results = []
        took = timed(lambda: results.append(engine.generate(seeds=list(range(case.batch)), **told)))
    passes = results[0].passes or [grid[0] * grid[1]] * case.batch
    return {"passes": statistics.mean(passes), "seconds": took / case.batch}


def gpu(case: Case) -> dict[str, Any]:
    """Images a second of warm calls, pictures included, and without them."""
    model, pictures = llamagen("l").to("cuda", torch.bfloat16), tokenizer()
    pictures.model.to("cuda")
    found = {}
    for name, given in (("images/s", pictures), ("without pictures", None)):
        settings = SamplingSettings(cfg_scale=case.cfg_scale)
        graphs = case.which == "graphs"
        with Engine(model, given, settings=settings, batch_size=case.batch, graphs=graphs) as engine:
            paint = lambda: engine.generate(  # noqa: E731
                labels=list(range(case.batch)), seeds=list(range(case.batch))
            )
            paint()
            found[name] = case.batch / min(timed(paint) for _ in range(case.times))
    return found | {"GB": 1e-9 * torch.cuda.max_memory_allocated()}


def in_turn(cases: dict[str, Case], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What a process of its own found of each case, the fastest of some rounds."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name, case in cases.items():
            new = in_process(json.dumps(asdict(case)), options.threads)
            if name not in found or new["seconds"] < found[name]["seconds"]:
                found[name] = new
    return found


def in_process(told: str, threads: int) -> dict[str, Any]:
    """What a process of its own found."""
    return found_by(__file__, told, threads=threads)


def line(name: str, found: dict[str, Any]) -> None:
    """Prints a measurement."""
    print(f"  {name:34}" + "  ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)


def show_decode(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns ours beside the plain way."""
    print("decode: LlamaGen-B, 256 codes, guidance 2.0", flush=True)
    cases = {f"{which} {batch}": Case("decode", which, batch) for batch in (1, 8) for which in ("plain", "ours")}
    before = in_process("machine", options.threads)
    found = in_turn(cases, options)
    read = max(before["read"], in_process("machine", options.threads)["read"])
    for row in found.values():
        row["share of the limit"] = STREAMED_BYTES / read / row["seconds"]
    for name, row in found.items():
        line(name, row)
    ratios = {batch: found[f"ours {batch}"]["tokens/s"] / found[f"plain {batch}"]["tokens/s"] for batch in (1, 8)}
    print(
        f"  reads {read / 1e9:.1f} GB/s; 1 image: share {found['ours 1']['share of the limit']:.2f} (asked "
        f"{ASKED_SHARE}), {ratios[1]:.2f} of plain; 8 images: {ratios[8]:.2f} of plain (asked {ASKED_DECODE})"
    )
    return found | {"read": read, "ours / plain": {str(batch): ratio for batch, ratio in ratios.items()}}


def show_flat(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the time of early and late codes."""
    print(f"flat: LlamaGen-B, {LONG[0] * LONG[1]:,} codes (asked at most {ASKED_FLAT})", flush=True)
    found = {}
    for batch, scale in ((1, 1.0), (1, 2.0), (8, 2.0)):
        name = f"{batch} x, guidance {scale:g}"
        case = Case("flat", batch=batch, side=LONG[0], cfg_scale=scale)
        found[name] = in_process(json.dumps(asdict(case)), options.threads)
        line(name, found[name])
    return found


def show_language(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns ours beside `generate`."""
    print(f"language: Llama 12 x 768, {TEXT + 2 + CODES:,} tokens, {options.side**2} codes", flush=True)
    found: dict[str, Any] = {}
    for batch, scale, ways in ((1, 1.0, ("library", "ours")), (8, LANGUAGE_SCALE, ("library", "processors", "ours"))):
        cases = {
            f"{way}, {batch} x, guidance {scale:g}": Case("language", way, batch, options.side, scale) for way in ways
        }
        rows = in_turn(cases, options)
        for name, row in rows.items():
            line(name, row)
        *others, ours = (row["seconds"] for row in rows.values())
        asked = 1.0 if batch == 1 else ASKED_LANGUAGE
        print(f"  {min(others) / ours:.2f} times as fast as the faster of the others (asked {asked})", flush=True)
        found |= rows | {f"speedup {batch}": min(others) / ours}
    return found


def show_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns peaks and predictions."""
    print("memory: above imports, beside arithmetic (asked 0.9 to 1.1)", flush=True)
    cases = {
        "LlamaGen-B, 1 x": Case("memory"),
        "LlamaGen-B and VQ-16, 1 x": Case("memory", with_tokenizer=True),
        "LlamaGen-B, 8 x": Case("memory", batch=8),
        "language, 1 x": Case("memory", "language", side=options.side, cfg_scale=1.0),
        "language, 8 x": Case("memory", "language", batch=8, side=options.side),
    }
    found = {}
    for name, case in cases.items():
        found[name] = in_process(json.dumps(asdict(case)), options.threads)
        line(name, {key: found[name][key] for key in ("peak GB", "predicted GB", "ratio")})
    return found


def show_jacobi(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns passes and times of some windows."""
    if options.run is None:
        print("jacobi: needs a trained run: --run RUN")
        return {}
    print(f"jacobi: {options.run}, image by image", flush=True)
    found = {}
    for window in (0, 4, 8, 16, 32):
        case = Case("jacobi", batch=4, run=str(options.run), window=window)
        found[f"window {window}"] = in_process(json.dumps(asdict(case)), options.threads)
        line(f"window {window}", found[f"window {window}"])
    return found


def show_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns images a second of batches of several sizes."""
    if not torch.cuda.is_available():
        print("gpu: no CUDA device here")
        return {}
    print(f"gpu: {torch.cuda.get_device_name()}, LlamaGen-L, bfloat16 (asked {ASKED_IMAGES} images/s)", flush=True)
    found = {}
    for which in ("eager", "graphs"):
        for batch in GPU_BATCHES:
            name = f"{which}, {batch} images"
            found[name] = in_process(json.dumps(asdict(Case("gpu", which, batch))), options.threads)
            line(name, found[name])
    return found


MEASURED: dict[str, Callable[[Case], dict[str, Any]]] = {
    "decode": decoding,
    "flat": flat,
    "language": language,
    "memory": memory,
    "jacobi": jacobi,
    "gpu": gpu,
}
SHOWN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "decode": show_decode,
    "flat": show_flat,
    "language": show_language,
    "memory": show_memory,
    "jacobi": show_jacobi,
    "gpu": show_gpu,
}


def main() -> None:
    """Prints the tables, or as a child one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHOWN), default=list(SHOWN))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each case, of which the fastest counts")
    parser.add_argument("--side", type=int, default=8, help="codes along a side of the language model's pictures")
    parser.add_argument("--run", type=Path, help="a trained run, for jacobi")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers are written")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(options.threads)
        case = None if options.job == "machine" else Case(**json.loads(options.job))
        print(json.dumps(machine() if case is None else MEASURED[case.job](case)))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "threads": options.threads}
    for name in options.only:
        found[name] = SHOWN[name](options)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
