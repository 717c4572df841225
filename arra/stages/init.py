"""A language model that can be trained to paint: `arra init`.

An LM of any architecture and an image tokenizer give a Hugging Face folder whose vocabulary has the tokenizer's codes;
`arra train` takes it as `model.llm.folder`.
"""

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from arra.data.layout import ImageLayout
from arra.errors import ArraError
from arra.models import CausalLM, save_model
from arra.models.extend import Start, add_tokens, check_logits, embeddings, grow, is_tied
from arra.models.head import head_losses
from arra.models.language_folder import TOKENIZER_FILE, quiet, read_companions, read_language_model
from arra.runs import file_hash
from arra.stages.weights import DTYPES, Done, read_template
from arra.tokenizers.image import ImageTokenizer, load_tokenizer
from arra.tokenizers.prompts import prompt_tokenizer
from arra.tokenizers.vocabulary import generic_layout, generic_names

SIDES = 64
"""Sides that get a token: up to 1024 pixels at 16 pixels per code."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS_FILES = ("model*.safetensors", "pytorch_model*.bin")
"""In the order in which `transformers` looks for them."""


@dataclass(frozen=True)
class FirstLoss:
    """What random codes cost before the first step, in nats per code."""

    among_all: float
    """Of the whole vocabulary: what training shows."""
    among_codes: float


def init_painter(
    llm: str,
    out: Path,
    *,
    tokenizer: str,
    tokenizer_weights: Path | None = None,
    image_size: int = 256,
    start: str = "codebook",
    rows: bool = True,
    rep_token: bool = False,
    template: str = "{prompt}",
    seed: int = 0,
    dtype: str | None = None,
) -> Done:
    """The folder of a language model whose vocabulary holds the codes of an image tokenizer, ready to be trained.

    `llm` is a folder in Hugging Face layout or a repository's name. With `rows` pictures of any aspect can be written:
    their sides first, a new-line token after every row. With `rep_token` the vocabulary has the REP token too, which a
    recipe with `align.target: rep` writes before every picture.

    Raises:
        ArraError: an option that does not fit, or an LM, a tokenizer that cannot be read or extended.
    """
    if start not in get_args(Start):
        raise ArraError(f"--start {start}: unknown; expected {' or '.join(get_args(Start))}")
    if dtype is not None and dtype not in DTYPES:
        raise ArraError(f"--dtype {dtype}: unknown; expected one of {', '.join(DTYPES)}")
    read_template(template)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ArraError(f"{out}: exists already; name a new folder")
    images = load_tokenizer(tokenizer, weights=tokenizer_weights)
    side, rest = divmod(image_size, images.downsampling)
    if rest or not side:
        raise ArraError(
            f"--image-size {image_size}: no multiple of {images.downsampling}, the pixels per code of {images.name}"
        )
    folder = _folder(llm)
    lm = read_language_model(folder, dtype=None if dtype is None else DTYPES[dtype])
    if lm.config.model_type == "chameleon":  # type: ignore[union-attr]
        raise ArraError(f"{llm}: Chameleon has codes of its own; bring it in with arra import")
    before = _size(lm)
    with quiet():
        words = read_hub_tokenizer(folder)
        layout = extend_vocabulary(
            lm, words, images, start=start, seed=seed, side=side, rows=rows, rep_token=rep_token, template=template,
            source=llm,
        )  # fmt: skip
        about = {
            "origin": {"source": folder.resolve().name if Path(llm).is_dir() else llm, "sha256": _hashes(folder)},
            "codes_of": images.codes_of,
            "start": start,
            "seed": seed,
        }
        model = CausalLM(lm, layout=layout, grid=(side, side), about=about)
        _give_tokenizer(model, words, source=str(folder))
        check_logits(model, source=llm)
        loss = first_loss(model)
        save_model(model, out)
    return Done(out, _rows(model, before, loss, tokenizer=images.name))


def _give_tokenizer(model: CausalLM, words: Any, *, source: str) -> None:
    """Nothing; the model has the tokenizer of its prompts and the files that `transformers` keeps beside it."""
    with tempfile.TemporaryDirectory() as place:
        words.save_pretrained(place)
        model.companions = read_companions(Path(place))
        text = (Path(place) / TOKENIZER_FILE).read_text(encoding="utf-8")
    model.text_tokenizer = prompt_tokenizer(text, reserved=model.layout.reserved(), source=source)


def extend_vocabulary(
    lm: nn.Module,
    words: Any,
    images: ImageTokenizer,
    *,
    start: str,
    seed: int,
    side: int,
    rows: bool,
    rep_token: bool,
    template: str,
    source: str,
) -> ImageLayout:
    """The layout of an LM and its tokenizer, which have the codes and signs now.

    Raises:
        ArraError: they cannot be extended, or a picture of `side` codes has more tokens than the LM positions.
    """
    sizes = max(SIDES, side) if rows else 0
    names = generic_names(images.num_codes, num_sizes=sizes, rows=rows, rep_token=rep_token)
    bos = words.bos_token_id if words("a")["input_ids"][:1] == [words.bos_token_id] else None
    end = words.eos_token_id
    ids = add_tokens(words, names, rows=len(embeddings(lm)), source=source)
    layout = generic_layout(
        dict(zip(names, ids, strict=True)),
        num_codes=images.num_codes,
        bos=bos,
        closing=() if end is None else (end,),
        template=template,
        pixels_per_code=images.downsampling,
        max_positions=getattr(lm.config.get_text_config(), "max_position_embeddings", None),  # type: ignore[union-attr,operator]
        source=source,
    )
    layout.check_fits(0, (side, side), where=source)
    numbers = torch.arange(images.num_codes)[None, None]
    grow(
        lm,
        first=ids[0],
        num_tokens=len(ids),
        code_places=slice(len(ids) - images.num_codes, len(ids)),
        codebook=images.model.quantize.rows(numbers)[0, :, 0].T,
        start="mean" if start == "mean" else "codebook",
        seed=seed,
    )
    return layout


def read_hub_tokenizer(folder: Path) -> Any:
    """The `transformers` tokenizer of a folder.

    Raises:
        ArraError: there is none, or none that can be written as tokenizer.json.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what the tokenizers library raises of a broken file has no class of its own
        reason = " ".join(str(error).split())[:160]
        raise ArraError(f"{folder}: its tokenizer cannot be read ({reason}); fetch tokenizer.json again") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ArraError(f"{folder}: its tokenizer cannot be written as tokenizer.json; name another LM")
    for told in ("local_files_only", "is_local"):  # how it was read here is kept by the library, and says nothing later
        tokenizer.init_kwargs.pop(told, None)
    return tokenizer


@torch.inference_mode()
def first_loss(model: CausalLM, *, seed: int = 0) -> FirstLoss:
    """The loss on one picture of random codes without a prompt."""
    layout, grid = model.layout, model.settings.grid
    codes = torch.randint(layout.num_codes, grid, generator=torch.Generator().manual_seed(seed))
    written = layout.sequence([], codes.numpy())
    tokens = torch.from_numpy(written.tokens)[None]
    places = torch.from_numpy(written.code_mask).nonzero()[:, 0]
    hidden = model(tokens.to(model.device)).last_hidden[0, places - 1]
    among_all, _ = head_losses(hidden, model.lm_head, tokens[0, places])
    among_codes, _ = head_losses(hidden, model.code_head, codes.flatten())
    return FirstLoss(float(among_all.mean()), float(among_codes.mean()))


def _folder(llm: str) -> Path:
    """The folder of an LM, fetched if it is a repository's name."""
    if Path(llm).is_dir():
        return Path(llm)
    if Path(llm).exists() or not HUB_NAME.fullmatch(llm):
        raise ArraError(
            f"{llm}: no such folder; expected a language model in Hugging Face layout, or a repository's name"
        )
    try:
        for pattern in WEIGHTS_FILES:
            folder = Path(snapshot_download(llm, allow_patterns=[*HUB_FILES, pattern], ignore_patterns=["*/*"]))
            if any(folder.glob(pattern)):
                return folder
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArraError(
            f"{llm}: neither a folder nor a repository that can be fetched ({reason}); check the name, token and "
            f"connection, or fetch it elsewhere: hf download {llm} --local-dir FOLDER"
        ) from error
    raise ArraError(f"{llm}: the repository holds no {' or '.join(WEIGHTS_FILES)}; name another language model")


def _hashes(folder: Path) -> dict[str, str]:
    found = next((files for pattern in WEIGHTS_FILES if (files := sorted(folder.glob(pattern)))), [])
    return {path.name: file_hash(path) for path in found}


def _size(lm: nn.Module) -> tuple[int, int]:
    """Parameters, and rows of the embeddings."""
    return sum(parameter.numel() for parameter in lm.parameters()), len(embeddings(lm))


def _rows(model: CausalLM, before: tuple[int, int], loss: FirstLoss, *, tokenizer: str) -> list[tuple[str, str]]:
    layout, lm, (height, width) = model.layout, model.lm, model.settings.grid
    (count, rows), dtype = _size(lm), str(next(lm.parameters()).dtype).removeprefix("torch.")
    codes, pixels = layout.num_codes, layout.pixels_per_code
    among = f"{loss.among_codes:.2f} among codes alone, of which ln {codes} is {math.log(codes):.2f}"
    return [
        ("kind", f"{type(lm).__name__}, {model.num_layers} layers of {model.hidden_size}"),
        ("parameters", f"{before[0]:,} before, {count:,} now ({dtype})"),
        ("vocabulary", f"{before[1]:,} rows before, {rows:,} now, head {'tied' if is_tied(lm) else 'of its own'}"),
        ("codes", f"{codes:,} of {tokenizer}: ids {layout.first_code}..{layout.first_code + codes - 1}"),
        ("picture", f"{width * pixels} x {height * pixels} pixels: {layout.length(0, (height, width))} tokens"),
        ("rep token", "" if layout.rep_id is None else f"id {layout.rep_id}, for align.target: rep"),
        ("positions", "" if layout.max_positions is None else f"{layout.max_positions:,}"),
        ("first loss", f"{loss.among_all:.2f} nats per random code, {among}"),
    ]
