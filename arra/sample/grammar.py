"""The grammar of an image, as logits processors for the `generate()` of Hugging Face `transformers`.

`arra.generate` never samples what a layout already knows, so it needs none of this. Here is the same knowledge for the
other direction: a folder saved by us and opened by `transformers` paints as well.

    from transformers import AutoModelForCausalLM
    ids = torch.tensor([layout.prefix(prompts.encode(layout.text("a red heart", grid)), grid)])
    steps = image_processors(lm, layout, grid=grid, prompt_length=ids.shape[1], cfg_scale=4.0)
    out = lm.generate(ids, logits_processor=steps, do_sample=True, top_k=0, max_new_tokens=len(layout.image(grid)))
    codes = layout.read_image(out[0].tolist())

(`top_k=0` because the default of `transformers` is 50.) Each row of a batch is looked at on its own. With `sampling=`
and `seeds=` (then `do_sample=False`) the picture is the one that `arra.generate` paints for a seed. Chameleon of
`transformers` gives codes no score at all until `unmask_codes(lm)` is called.

Letters: B rows, T tokens so far, V vocabulary.
Source: Lumina-mGPT `lumina_mgpt/inference_solver.py`, whose processors give the same scores for one row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from arra.data.layout import CODE, Grid, ImageLayout
from arra.errors import ArraError
from arra.sample.logits import SamplingSettings, guide, keep_top_k
from arra.sample.processors import KeyedDraw

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ImageState:
    """Where in an image a sequence has come to, and what that says about the next token."""

    start: int | None = None
    """Place of the open image's begin token; None outside of images."""
    grid: Grid | None = None
    """Of the open image; None until its sides are known."""
    forced: int | None = None
    """The only token that may follow."""
    codes_only: bool = False
    """Whether a code must follow."""
    guided: bool = False
    """Whether guidance applies: from the first code on to the end of the image, forced tokens among them."""


def image_state(
    layout: ImageLayout, tokens: Sequence[int], *, grid: Grid | None = None, prompt_length: int = 0
) -> ImageState:
    """The state after some tokens.

    With a grid an image of it is asked for: where the first `prompt_length` tokens have no open image, one is begun
    (after the REP token, where the layout has one), its sides are written, and what closes it follows. Without, the
    model is free to begin an image or not; after REP one begins.

    Raises:
        ArraError: the grid cannot be written, or the tokens have an open image of another one.
    """
    start = _last(tokens, layout.begin_image)
    end = None if start is None else _last(tokens[start:], layout.end_image)
    if start is None or end is not None:
        return _outside(layout, tokens, 0 if start is None or end is None else start + end, grid, prompt_length)
    written = list(tokens[start:])
    if grid is None:
        grid = _written_grid(layout, written)
        if grid is None:
            return ImageState(start)
    image, opening = layout.image(grid), layout.opening(grid)
    if any(token != right for token, right in zip(written, opening, strict=False)):
        raise ArraError(
            f"grammar: the open image begins with {written[: len(opening)]}, one of {grid[0]} x {grid[1]} codes with "
            f"{opening}; ask for the same grid"
        )
    if len(written) >= len(image):  # tokens that nobody held to the grammar
        return ImageState(start)
    following = image[len(written)]
    return ImageState(
        start,
        grid,
        forced=None if following == CODE else following,
        codes_only=following == CODE,
        guided=len(written) >= len(opening),
    )


def unconditional_context(layout: ImageLayout, tokens: Sequence[int], state: ImageState) -> list[int]:
    """What guidance's unconditional model sees in place of the tokens: the image so far, written without a condition.

    Its positions count from 0.
    """
    if state.start is None or state.grid is None:
        raise ValueError("no image is open")
    prefix = layout.prefix(None, state.grid)
    return [*prefix[: len(prefix) - len(layout.opening(state.grid))], *tokens[state.start :]]


@dataclass(frozen=True)
class ImageGrammar:
    """Scores under the grammar: 0 for a forced token and -inf for all others, -inf for all but codes inside a row."""

    layout: ImageLayout
    grid: Grid | None = None
    prompt_length: int = 0

    def __post_init__(self) -> None:
        if self.grid is not None:
            self.layout.check_grid(self.grid)
        elif self.layout.first_size is None:
            raise ArraError(
                f"grammar: the {self.layout.family} layout writes no sides; say which grid is to be painted"
            )

    def state(self, tokens: Sequence[int]) -> ImageState:
        """The state after some tokens."""
        return image_state(self.layout, tokens, grid=self.grid, prompt_length=self.prompt_length)

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The scores; those of rows outside of images stay as they are."""
        scores = scores.clone()
        codes = self.layout.code_ids().to(scores.device)
        for row, tokens in enumerate(input_ids.tolist()):
            state = self.state(tokens)
            if state.forced is None and not state.codes_only:
                continue
            allowed = codes if state.forced is None else torch.tensor([state.forced], device=scores.device)
            kept = scores[row, allowed] if state.forced is None else 0.0
            if state.codes_only and bool((scores[row, codes] <= torch.finfo(scores.dtype).min).all()):
                raise ArraError(
                    "grammar: the model gives no code any score (Chameleon of transformers masks them); call "
                    "arra.sample.grammar.unmask_codes(lm) first"
                )
            scores[row] = -torch.inf
            scores[row, allowed] = kept
        return scores


class Guidance:
    """Scores under classifier-free guidance inside of images; the unconditional model sees the image alone.

    Of `sampling` the fields of guidance are read; each row has the scale of the code it has come to. `lm` is called as
    `transformers` models are. Its cache grows by one token a step and starts anew with another image.
    """

    def __init__(self, lm: Callable[..., Any], *, grammar: ImageGrammar, sampling: SamplingSettings) -> None:
        self.lm, self.grammar, self.sampling = lm, grammar, sampling
        self._seen: list[list[int]] = []
        self._cache: Any = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The scores; those of rows outside of images, or without all their sides, stay as they are."""
        if self.sampling.cfg_scale == 1:
            return scores
        rows: dict[int, float] = {}
        contexts = []
        for row, tokens in enumerate(input_ids.tolist()):
            state = self.grammar.state(tokens)
            if state.guided and (scale := self._scale(tokens, state)) != 1:
                rows[row] = scale
                contexts.append(unconditional_context(self.grammar.layout, tokens, state))
        if not rows:
            return scores
        uncond = self._unconditional(contexts, device=input_ids.device).to(scores)
        guided = scores.clone()
        for place, (row, scale) in enumerate(rows.items()):
            guided[row] = guide(scores[row, None], uncond[place, None], cfg_scale=scale)[0]
        return guided

    def _scale(self, tokens: Sequence[int], state: ImageState) -> float:
        """Of the code that comes next; for what the grammar forces after the last one, of that."""
        assert state.grid is not None
        assert state.start is not None
        layout = self.grammar.layout
        template = layout.image(state.grid)
        index = template[: len(tokens) - state.start].count(CODE)
        scales = self.sampling.cfg_scales(state.grid[0] * state.grid[1])
        return scales[min(index, len(scales) - 1)]

    def _unconditional(self, contexts: list[list[int]], *, device: torch.device) -> Float[Tensor, "R V"]:
        """The scores after the contexts, padded on the left where their lengths differ."""
        if [context[:-1] for context in contexts] == self._seen:
            new = 1
        else:
            new, self._cache = max(map(len, contexts)), None
        self._seen = contexts
        width = max(map(len, contexts))
        mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts], device=device)
        tokens = torch.tensor([[0] * (width - len(context)) + context for context in contexts], device=device)
        told = {}
        if not mask.all():
            told["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, width - new :]
        output = self.lm(
            input_ids=tokens[:, width - new :],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **told,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass(frozen=True)
class InterleavedTopK:
    """Scores with -inf below the k-th largest, ties kept: one k inside of images, another for text; 0 is off."""

    layout: ImageLayout
    image_top_k: int = 0
    text_top_k: int = 0

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The scores."""
        inside = torch.tensor([self._inside(tokens) for tokens in input_ids.tolist()], device=scores.device)
        image, text = keep_top_k(scores, self.image_top_k), keep_top_k(scores, self.text_top_k)
        return torch.where(inside[:, None], image, text)

    def _inside(self, tokens: list[int]) -> bool:
        start = _last(tokens, self.layout.begin_image)
        return start is not None and self.layout.end_image not in tokens[start:]


def image_processors(
    lm: Callable[..., Any],
    layout: ImageLayout,
    *,
    grid: Grid | None = None,
    prompt_length: int = 0,
    cfg_scale: float = 1.0,
    image_top_k: int = 0,
    text_top_k: int = 0,
    sampling: SamplingSettings | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Processor]:
    """Guidance, grammar and top-k in this order, for `generate(logits_processor=...)`; temperature comes after them.

    With a grid every row becomes a finished image of it; `prompt_length` is the width of what `generate` is given.
    `sampling` says more of guidance than `cfg_scale` (which it replaces): schedules and intervals. With `seeds`, one
    for each row, codes are drawn as `arra.generate` draws them, with all that `sampling` says: `generate` is to be
    told `do_sample=False`. Make new ones for each call.

    Raises:
        ArraError: the grid cannot be written, or is missing where the layout writes no sides or codes are drawn here.
    """
    sampling = SamplingSettings(cfg_scale=cfg_scale) if sampling is None else sampling
    grammar = ImageGrammar(layout, grid, prompt_length)
    guidance = Guidance(lm, grammar=grammar, sampling=sampling)
    steps: list[Processor] = [guidance, grammar, InterleavedTopK(layout, image_top_k, text_top_k)]
    if seeds is None:
        return steps
    if grid is None:
        raise ArraError("seeds: the keys of a seed are those of a whole picture; say which grid is to be painted")
    draw = KeyedDraw(
        seeds, sampling=sampling, code_ids=layout.code_ids(), num_positions=grid[0] * grid[1], begin=layout.begin_image
    )
    return [*steps, draw]


def unmask_codes(lm: nn.Module) -> None:
    """Nothing; a model of `transformers` gives every token the score that its head gives, from this call on.

    For Chameleon, whose class there overwrites the scores of all codes with the lowest number after its head.
    """
    heard: list[Tensor] = []

    def hear(head: nn.Module, given: Any, logits: Tensor) -> Tensor:
        heard[:] = [logits]
        return logits.clone()  # the one that is overwritten

    def answer(model: nn.Module, given: Any, output: Any) -> Any:
        output.logits = heard.pop()
        return output

    lm.get_output_embeddings().register_forward_hook(hear)  # type: ignore[operator]
    lm.register_forward_hook(answer)


def _last(tokens: Sequence[int], wanted: int) -> int | None:
    """The last place of a token."""
    return next((place for place in range(len(tokens) - 1, -1, -1) if tokens[place] == wanted), None)


def _outside(layout: ImageLayout, tokens: Sequence[int], end: int, grid: Grid | None, prompt_length: int) -> ImageState:
    """The state where no image is open; the last one's end token is at `end`, 0 where there was none."""
    announced = layout.rep is not None and len(tokens) > 0 and tokens[-1] == layout.rep
    if grid is None:
        return ImageState(forced=layout.begin_image if announced else None)
    if end < prompt_length or not end:
        return ImageState(forced=layout.begin_image if announced or layout.rep is None else layout.rep)
    written = len(tokens) - end - 1
    return ImageState(forced=layout.closing[written] if written < len(layout.closing) else None)


def _written_grid(layout: ImageLayout, image: Sequence[int]) -> Grid | None:
    """The grid that the first tokens of an image say; None where they do not say one."""
    sides = [(token - (layout.first_size or 0)) * layout.size_step for token in image[1:3]]
    most = layout.num_sizes * layout.size_step
    return (sides[0], sides[1]) if len(sides) == 2 and all(0 < side <= most for side in sides) else None
