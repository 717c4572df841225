"""Any causal LM becomes a painter: image codes and the layout's tokens join its vocabulary, with a considered start.

`arra init` reads an LM and an image tokenizer, calls `add_tokens` and `grow`, and saves a `CausalLM`; nothing here is
used afterwards. What the LM said of text it still says: old rows keep their bits, and new ones begin where an average
text token stands, so they take about their share of the probability and no more.
Letters: V old rows, N new tokens, K codes, E dimension of a codebook vector, D model width, B batch, S sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.causal import CausalLM
from arra.models.decoder import Condition

Start = Literal["codebook", "mean"]

SMALL = 0.1
"""Share of the text rows' spread that tells new tokens apart where their start is to be alike: enough to break the
symmetry, too little to be a guess that training must undo."""
ROW_MULTIPLE = 8
"""Rows of the grown tables are a multiple, which matrix units ask for."""
ROWS_AT_A_TIME = 8192
"""Rows that are widened to float64 together."""
CHECKED_TOKENS, PADDING = 12, 3
UNFIT = (RuntimeError, ValueError, TypeError, AttributeError, KeyError)
"""What networks raise that are asked in a way they do not know."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 3e-2
"""Of half precision, whose logits have three digits."""


@dataclass(frozen=True)
class RowStatistics:
    """Where rows of a table lie."""

    mean: Float[Tensor, " D"]
    deviation: Float[Tensor, " D"]
    """Standard deviation of each dimension, in float64 as all here."""

    @property
    def spread(self) -> float:
        """Root mean square distance from the mean."""
        return float(self.deviation.square().sum().sqrt())


def add_tokens(tokenizer: Any, names: Sequence[str], *, rows: int, source: str) -> list[int]:
    """Ids of new special tokens in a `transformers` tokenizer: one after another, behind all it has.

    `rows` is the number of embeddings of its model; where that is padded, new tokens take the padding first.

    Raises:
        ArraError: the tokenizer is not the model's, or has such tokens already.
    """
    from transformers import AddedToken

    first, known = len(tokenizer), tokenizer.get_vocab()
    if taken := [name for name in names if name in known]:
        raise ArraError(f"{source}: has the token {taken[0]} already, so it paints; train it as it is")
    highest = max(known.values())
    if highest >= rows:
        raise ArraError(
            f"{source}: its tokenizer goes up to id {highest}, its embeddings have {rows} rows; the two are not of one "
            "model, fetch the folder again"
        )
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(names))
    if ids != list(range(first, first + len(names))) or first <= highest:
        raise ArraError(
            f"{source}: its tokenizer's ids have gaps, so new tokens have no place behind them; name another"
        )
    return ids


def grow(
    lm: nn.Module,
    *,
    first: int,
    num_tokens: int,
    code_places: slice,
    codebook: Float[Tensor, "K E"],
    start: Start,
    seed: int,
) -> None:
    """Nothing; the LM has rows for `num_tokens` new tokens from id `first` on, the codes among them at `code_places`.

    With start "codebook" codes that are near in the codebook are near as embeddings: all distances keep their
    proportions; mean and spread are those of the text embeddings. With "mean" every code begins at the mean of text,
    give or take a little. A head of its own begins alike but small, so that all codes are about equally likely.
    Rows below `first` keep their bits; the same seed gives the same rows.

    Raises:
        ArraError: the LM has no head that can grow.
    """
    if head_layer(lm) is None:
        raise ArraError(f"{type(lm).__name__}: has no output embeddings, so it can predict no code; name another LM")
    tied = is_tied(lm)
    num_rows = max(-(-(first + num_tokens) // ROW_MULTIPLE) * ROW_MULTIPLE, len(embeddings(lm)))
    with torch.random.fork_rng(devices=[]):  # its own start of new rows draws numbers, and is overwritten below
        lm.resize_token_embeddings(num_rows, mean_resizing=False)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    directions = code_directions(codebook, embeddings(lm).shape[1], generator=generator)
    told = (first, range(first, num_rows)[code_places], directions if start == "codebook" else None)
    _fill(embeddings(lm), *told, 1.0, generator)
    head = head_layer(lm)
    assert head is not None
    if not tied:
        _fill(head.weight, *told, SMALL, generator)
    if getattr(head, "bias", None) is not None:
        with torch.no_grad():
            head.bias[first:] = head.bias[:first].mean()


def embeddings(lm: nn.Module) -> Float[Tensor, "V D"]:
    """The row of every token as the LM reads it."""
    weight: Tensor = lm.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def head_layer(lm: nn.Module) -> Any:
    """The LM's last layer, None where it has none."""
    return lm.get_output_embeddings()  # type: ignore[operator]


def is_tied(lm: nn.Module) -> bool:
    """Whether the LM's head is its embeddings."""
    return head_layer(lm) is not None and head_layer(lm).weight is embeddings(lm)


@torch.no_grad()
def _fill(
    weight: Tensor,
    first: int,
    places: range,
    directions: Tensor | None,
    scale: float,
    generator: torch.Generator,
) -> None:
    """Nothing; rows from `first` on begin around the mean of those below, codes in their directions if given."""
    text = row_statistics(weight[:first])
    noise = torch.randn(len(weight) - first, weight.shape[1], generator=generator)
    weight[first:] = (text.mean + SMALL * text.deviation * noise).to(weight)
    if directions is not None:
        weight[places.start : places.stop] = (text.mean + scale * text.spread * directions).to(weight)


@torch.no_grad()
def row_statistics(rows: Float[Tensor, "V D"]) -> RowStatistics:
    """Mean and deviation of rows."""
    parts = rows.split(ROWS_AT_A_TIME)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(rows)
    square = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / len(rows)
    return RowStatistics(mean, square.sqrt())


def code_directions(
    codebook: Float[Tensor, "K E"], width: int, *, generator: torch.Generator
) -> Float[Tensor, "K {width}"]:
    """Codebook vectors in a space of `width` dimensions, in float64: mean 0, mean square norm 1.

    Distances keep their proportions: exactly where the space is wide enough, nearly elsewhere (Johnson-Lindenstrauss).
    """
    vectors = codebook.detach().double().cpu()
    vectors = vectors - vectors.mean(0)
    dimension = vectors.shape[1]
    turn = torch.randn(width, dimension, generator=generator, dtype=torch.float64)
    if dimension <= width:
        turn = torch.linalg.qr(turn).Q  # orthonormal columns
    turned = vectors @ turn.T
    norm = turned.square().sum(1).mean().sqrt()
    return turned / norm.clamp(min=torch.finfo(torch.float64).tiny)


@torch.inference_mode()
def check_logits(model: CausalLM, *, source: str, seed: int = 0) -> None:
    """Nothing, if our states and head give the LM's own logits, also from its cache, and no token sees a later one.

    Raises:
        ArraError: they do not; the LM does something after or before its head that is not known here.
    """
    generator = torch.Generator().manual_seed(seed)
    name = type(model.lm).__name__
    tokens = torch.randint(len(embeddings(model.lm)), (2, CHECKED_TOKENS), generator=generator).to(model.device)
    try:
        theirs = model.lm(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float()
        shorter = model.lm(input_ids=tokens[:, :-2], attention_mask=torch.ones_like(tokens[:, :-2])).logits.float()
        ours = model.lm_head(model(tokens).last_hidden)
        painted = _painted(model, tokens)
    except IndexError as error:  # of another table with a row for every token
        raise ArraError(f"{source}: {name} cannot take new tokens ({error}); name another LM") from error
    except UNFIT as error:
        reason = " ".join(str(error).split())[:120]
        raise ArraError(
            f"{source}: {name} cannot be asked as training and painting do ({reason}); name another LM"
        ) from error
    bound = TOLERANCE.get(next(model.lm.parameters()).dtype, COARSE_TOLERANCE) * max(1.0, float(theirs.abs().max()))
    if not float((shorter - theirs[:, :-2]).abs().max()) <= bound:
        raise ArraError(
            f"{source}: {name} lets tokens see later ones (or gives no finite logits); expected a causal language model"
        )
    if not float((ours - theirs).abs().max()) <= bound:
        raise ArraError(
            f"{source}: the head of {name} does more than is known here (scale, bias, soft cap): logits differ by "
            f"{float((ours - theirs).abs().max()):.2g}; name another LM"
        )
    if not float((painted - theirs).abs().max()) <= bound:
        raise ArraError(f"{source}: {name} gives other logits from its cache or beside padding; name another LM")


def _painted(model: CausalLM, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
    """Logits as painting comes by them: behind padding, the beginning at once, then a token and then two."""
    padding = tokens.new_zeros(len(tokens), PADDING)
    padded = torch.cat([padding, tokens], dim=1)
    mask = torch.cat([padding.bool(), torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    end = padded.shape[1]
    cache = model.memory(Condition(padded, mask), grid=model.settings.grid)
    parts = [
        model(padded[:, start:stop], cache=cache).last_hidden
        for start, stop in ((0, end - 3), (end - 3, end - 2), (end - 2, end))
    ]
    return model.lm_head(torch.cat(parts, dim=1)[:, PADDING:])
