"""What painting takes of a device's memory, part by part, before it starts; generation refuses what cannot fit.

    a model (also on meta), its tokenizer, settings --> painting_memory --> PaintingMemory{weights, ..., pictures}

Letters: B images of a batch, R rows (B, or 2B while guided), C positions read at once before the first code, T all
positions, P codes of a picture, K codes of the vocabulary, D model width, I inner width, w bytes of a number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from arra.errors import ArraError
from arra.models import CausalLM, Condition, Painter
from arra.models.head import Head
from arra.models.narrow import stored_bytes
from arra.models.products import free_bytes
from arra.sample.generate import PICTURES_TOGETHER
from arra.sample.graphs import static_length
from arra.sample.logits import SamplingSettings
from arra.tokenizers import ImageTokenizer

WIDE = 4
"""Bytes of float32."""
DRAW_BYTES = 40
"""Of each image and code while one is drawn: guided logits, the key's hash in int64 with two of its steps, noise and
scores in float64."""
PICTURE_COPIES = {"cpu": 2.5, "cuda": 4.0}
"""Tensors of full resolution while a picture is made of codes, in strips on a CPU: measured from 8 x 8 to 32 x 32 codes
to within a tenth; on a GPU the input of a block, its norm, activation and convolution."""
PACKED_KINDS = ("Linear", "Conv1D")
"""Layers whose weights a CPU packs; the latter are GPT-2's."""
GIB = 2**30


@dataclass(frozen=True)
class PaintingMemory:
    """Bytes on the device, part by part."""

    weights: int
    copies: int
    """Weights that lie there a second time: on a CPU in the layout that decodes fastest; a language model's head for
    the codes."""
    tokenizer: int
    """The image tokenizer's weights."""
    cache: int
    """Keys and values of all rows and positions; twice where null rows join others that have begun, or where steps of
    fixed shapes have a memory of their own."""
    prefixes: int
    """The same of the prefixes alone, which are kept for the next batch."""
    reading: int
    """Activations while prefixes are read."""
    logits: int
    """Of all rows, and what drawing makes of them."""
    pictures: int
    """Activations while codes become pictures."""

    @property
    def standing(self) -> int:
        """What is there all the time, however large the batch."""
        return self.weights + self.copies + self.tokenizer

    @property
    def passing(self) -> int:
        """The most that comes and goes: prefixes are read, then codes are drawn, then pictures are made."""
        return self.prefixes + max(self.reading, self.cache + self.logits, self.pictures)

    @property
    def total(self) -> int:
        """The peak."""
        return self.standing + self.passing


def painting_memory(
    model: Painter,
    tokenizer: object = None,
    *,
    batch_size: int,
    settings: SamplingSettings,
    grid: tuple[int, int] | None = None,
    prefix_length: int | None = None,
    device: torch.device | None = None,
    static: bool = False,
) -> PaintingMemory:
    """The memory that painting batches of B images takes, if every image has a prompt of its own.

    `prefix_length` C is how many positions are read at once before the first code that is painted: what the condition
    takes, and given codes at the beginning; a decoder knows the former, a language model does not. `device` is where
    the model will be, for one that is on meta; `static` says that steps of fixed shapes paint (`graphs.py`), whose
    memory has room for null rows always. Of image tokenizers the VQ networks of this package are counted. Layers of a
    language model that forget (sliding windows) are counted as if they kept all.
    """
    device, grid = device or model.device, grid or model.settings.grid
    num_codes, shape = grid[0] * grid[1], _shape(model)
    scales = settings.cfg_scales(num_codes)
    guided = any(scale != 1 for scale in scales)
    rows, joins = batch_size * (1 + guided), guided and all(scale == 1 for scale in scales[:2])
    if prefix_length is None:
        if isinstance(model, CausalLM):
            raise ValueError("prefix_length: a language model's depends on its prompts")
        prefix_length = model.settings.prefix_length
    prefix = Condition(torch.empty(rows, prefix_length, dtype=torch.int64, device="meta"))
    length = model.memory_length(prefix, grid)
    if static:  # the rows of the picture, and those that were read before it
        cached = 2 * batch_size * static_length(length) + rows // (1 + joins) * length
    else:
        cached = rows * (1 + joins) * length
    position = 2 * shape.layers * shape.kv_width * shape.width  # bytes of one position of one row
    return PaintingMemory(
        weights=held_bytes(model),
        copies=_copies(model, device),
        tokenizer=held_bytes(tokenizer.model) if isinstance(tokenizer, ImageTokenizer) else 0,
        cache=cached * position,
        prefixes=rows * (prefix_length * position + shape.codes * WIDE),
        reading=_reading(shape, rows, prefix_length),
        logits=shape.codes * (rows * WIDE + batch_size * DRAW_BYTES),
        pictures=_pictures(tokenizer, num_codes, batch_size, device) if isinstance(tokenizer, ImageTokenizer) else 0,
    )


def refuse_too_large(memory_with: Callable[[int], PaintingMemory], *, batch_size: int, device: torch.device) -> None:
    """Nothing; with the model in place there is room for painting so many images together.

    Raises: ArraError when there is not; it says how many there is room for.
    """
    free, needed = _free(device), memory_with(batch_size).passing
    if needed <= free:
        return
    low, high = 0, batch_size  # images that fit, images that do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory_with(middle).passing <= free else (low, middle)
    advice = f"there is room for {low}: batch_size {low}" if low else "not even one image fits; paint a smaller grid"
    raise ArraError(
        f"generate: batch_size: {batch_size} images together take {needed / GIB:.1f} GiB beside the model, "
        f"{free / GIB:.1f} GiB are free on {device}; {advice}"
    )


def held_bytes(module: nn.Module) -> int:
    """Bytes of its parameters and buffers; quantised ones as they lie there."""
    return sum(map(stored_bytes, (*module.parameters(), *module.buffers())))


@dataclass(frozen=True)
class _Shape:
    """What of a model's size painting depends on."""

    layers: int
    kv_width: int
    """Key-value heads times the size of one."""
    hidden: int
    inner: int
    codes: int
    width: int
    """Bytes w of a number in the memory of attention."""


def _shape(model: Painter) -> _Shape:
    if not isinstance(model, CausalLM):
        own = model.settings
        kv_width = own.kv_heads * own.head_dim
        width = model.norm.weight.element_size()
        return _Shape(own.num_layers, kv_width, own.hidden_size, own.ffn_width, own.num_codes, width)
    config = model.config
    heads = int(config.num_attention_heads)
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon
        kv_heads = 1
    hidden = int(config.hidden_size)
    head_dim = _first(config, "head_dim") or hidden // heads
    inner = _first(config, "intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden
    width = model.lm.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    return _Shape(model.num_layers, kv_heads * head_dim, hidden, inner, model.settings.num_codes, width)


def _first(config: Any, *names: str) -> int | None:
    """The first of some attributes that is there and not None."""
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if value is not None), None)


def _copies(model: Painter, device: torch.device) -> int:
    of_codes, inner = 0, model.base if isinstance(model, CausalLM) else model
    if isinstance(model, CausalLM) and isinstance(head := model.lm_head, Head):
        of_codes = model.settings.num_codes * model.hidden_size * head.weight.element_size()
    if device.type != "cpu":
        return of_codes
    weights = (part.get_parameter("weight") for part in inner.modules() if type(part).__name__ in PACKED_KINDS)
    return of_codes + sum(weight.numel() * WIDE for weight in weights if weight.dtype == torch.float32)


def _reading(shape: _Shape, rows: int, length: int) -> int:
    """The stream and its norm, the gate, its activation and the other branch; and a mask of bool and of float32."""
    numbers = rows * length * (2 * shape.hidden + 3 * shape.inner)
    return numbers * shape.width + rows * length**2 * (1 + WIDE)


def _pictures(tokenizer: ImageTokenizer, num_codes: int, batch_size: int, device: torch.device) -> int:
    own = tokenizer.model.settings
    pixels = num_codes * own.downsampling**2
    copies, together = PICTURE_COPIES["cpu"], 1
    if device.type == "cuda":
        copies, together = PICTURE_COPIES["cuda"], PICTURES_TOGETHER
    finished = 2 * batch_size * pixels * 3  # in uint8, and while they are put together
    return int(copies * together * pixels * own.channels * own.ch_mult[0] * WIDE) + finished


def _free(device: torch.device) -> float:
    """Bytes that can be had, what torch keeps for itself included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return free_bytes() if device.type == "cpu" else float("inf")
