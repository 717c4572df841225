"""A Hugging Face causal LM that paints: prompt and codes are tokens of one vocabulary, laid out by an `ImageLayout`.

It takes the place of `Decoder` in training, sampling and evaluation: same calls, same results. The network is
`transformers`' own, of any architecture whose blocks are a list and whose head is a matrix; only its head is computed
here, where it is wanted and for the tokens that are wanted (so Chameleon's masking of image logits never happens).
Letters: B batch, S positions given, C prefix length, P = h*w image positions, D width, K codes, V vocabulary.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from arra.data.layout import CODE, Grid, ImageLayout
from arra.errors import ArraError
from arra.models.decoder import Condition, ModelOutput, TextTokenizer, checked_codes
from arra.models.dropout import RowDropout, random_seeds, site_seeds
from arra.models.growing import all_growing, growing_cache, window_cache
from arra.models.head import CalledHead, Head, head_of, packed_head
from arra.models.language_cache import CodeHead, ImageBody, LanguageCache, Places
from arra.models.packing import packed_calls
from arra.settings import Settings

PREFIX_STEP = 32
"""Lengths of prefixes that steps of fixed shapes are made for are multiples of it."""
_ONE_AT_A_TIME = threading.RLock()
"""Held while functions of `transformers` are replaced: two threads would leave each other's behind."""
BRANCHES = ("self_attn", "attn", "attention", "mlp", "feed_forward")
"""What blocks of `transformers` call their two branches."""


class LanguageSettings(Settings):
    """What `model.json` says of a painting language model beside the network's own config.json."""

    layout: ImageLayout
    grid: Grid
    """Height and width in codes of the pictures it paints unless told otherwise."""
    head_norm_rows: int | None = None
    """Of Chameleon's kin: rows of query and key norms that heads share (Lumina); None gives each head its own."""

    @property
    def condition(self) -> str:
        """A language model reads text."""
        return "text"

    @property
    def num_codes(self) -> int:
        """Codes K of the image tokenizer."""
        return self.layout.num_codes

    @property
    def num_positions(self) -> int:
        """Image positions P = h*w."""
        return self.grid[0] * self.grid[1]


class CausalLM(nn.Module):
    """A causal LM of `transformers` that predicts image codes after a prompt."""

    def __init__(
        self,
        lm: nn.Module,
        *,
        layout: ImageLayout,
        grid: Grid,
        head_norm_rows: int | None = None,
        text_tokenizer: TextTokenizer | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.settings = LanguageSettings(layout=layout, grid=grid, head_norm_rows=head_norm_rows)
        self.text_tokenizer = text_tokenizer
        self.about: dict[str, Any] = dict(about or {})
        self.companions: dict[str, str] = {}
        """Texts of the small files that Hugging Face keeps beside tokenizer.json, by name."""
        self._kept: CodeHead | None = None
        """The head over the codes while the weights are packed: they do not change there."""
        self._sites: list[RowDropout] = []
        """Where it drops by rows, in the order in which they were made."""
        layout.check_grid(grid)
        self._blocks = _blocks(self.base)  # a list, not a module: the LM owns them
        rows, highest = int(self.config.vocab_size), max(layout.reserved())
        if highest >= rows:
            raise ArraError(f"layout: token {highest} is outside the model's vocabulary of {rows}")

    def keep_blocks(self, count: int) -> None:
        """Nothing; `blocks` are the first ones alone, after the others were taken out of the network."""
        del self._blocks[count:]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, first to last, as parallelism and recomputing take them."""
        return list(self._blocks)

    def train(self, mode: bool = True) -> "CausalLM":
        """This model, in that mode; for training every `nn.Dropout` of the network becomes a `RowDropout`.

        So do those of adapters that were put in before. What the network drops by itself (attention weights within
        torch's fused attention, functions instead of modules) is drawn from torch's generator as ever.
        """
        super().train(mode)
        if mode:
            for parent in list(self.lm.modules()):
                for name, part in parent.named_children():
                    if type(part) is nn.Dropout and part.p:
                        site = RowDropout(part.p).train(part.training)
                        setattr(parent, name, site)
                        self._sites.append(site)
        return self

    def drop_residuals(self, p: float) -> None:
        """Nothing; while training a share `p` of what attention and feed-forward add to the stream is dropped.

        Source: Lumina-mGPT's and ARRA's modelling file, `config.dropout`.
        Raises: ArraError when the blocks have no such parts.
        """

        for block in self._blocks:
            parts = [part for name, part in block.named_children() if name in BRANCHES]
            if len(parts) != 2:
                raise ArraError(
                    f"model.llm.dropout: {type(block).__name__} has not one attention and one feed-forward; use 0"
                )
            for part in parts:
                site = RowDropout(p)
                part.register_forward_hook(_OutputDropout(site))
                self._sites.append(site)

    @property
    def base(self) -> nn.Module:
        """The network below the head."""
        found: nn.Module = self.lm.base_model  # type: ignore[assignment]
        return getattr(self.lm, "model", found) if found is self.lm else found  # Llama 4 names a part it has not

    @property
    def config(self) -> Any:
        """The text part of the network's configuration."""
        return self.lm.config.get_text_config()  # type: ignore[union-attr,operator]

    @property
    def layout(self) -> ImageLayout:
        """How prompts and pictures are written as tokens."""
        return self.settings.layout

    @property
    def num_layers(self) -> int:
        """Blocks that an alignment may listen to."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Width D of the states."""
        return int(self.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.lm.parameters()).device

    @property
    def lm_head(self) -> Head | CalledHead:
        """The head over the whole vocabulary; it holds the LM's own weights."""
        config, scale = self.config, 1.0
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            scale = float(factor)
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            scale /= float(divisor)
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return head_of(self._output_layer, scale=scale, softcap=softcap)

    @property
    def code_head(self) -> Head | CalledHead:
        """The head over the codes, in their order."""
        return self.lm_head.rows(self.layout.code_ids().to(self.device))

    @contextmanager
    def packed(self) -> Iterator[None]:
        """A block in which it paints fastest: matrices packed, and the head over the codes made once.

        What `packed_calls` says of weights and memory holds. For painting alone: nothing may be trained, wrapped or
        moved within.
        """
        if self._kept is not None:
            yield
            return
        head = self._output_layer
        with packed_calls(part for part in self.base.modules() if part is not head) as packs:
            try:
                with torch.no_grad():
                    rows = self._code_head()
                    self._kept = CodeHead(packed_head(rows.logits), rows.ids) if packs else rows  # type: ignore[arg-type]
                yield
            finally:
                self._kept = None

    def _code_head(self) -> CodeHead:
        if self._kept is not None:
            return self._kept
        ids = self.layout.code_ids().to(self.device)
        return CodeHead(self.lm_head.rows(ids), ids)

    @property
    def _output_layer(self) -> nn.Module:
        layer: nn.Module = self.lm.get_output_embeddings()  # type: ignore[operator]
        return layer

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        *,
        prefix_mask: Bool[Tensor, "B C"] | None = None,
        capture: Sequence[int] = (),
        cache: LanguageCache | None = None,
        dropout_seeds: Int64[Tensor, "B"] | None = None,
    ) -> ModelOutput:
        """Hidden states of the tokens given; the state at position t predicts the token at t+1.

        Without a mask rows begin at the first position, and what stands behind a row changes nothing in it. False in
        `prefix_mask` marks padding on the left, which takes no position. With a cache, which knows the padding by
        itself, the tokens follow those that it holds, and it takes them in. While training, `dropout_seeds` say what of
        each row is dropped, also when a block is computed again in the backward pass before the next call; None draws
        them.
        """
        self._note_seeds(tokens, dropout_seeds)
        if cache is None:
            start, end, kept = 0, tokens.shape[1], {"use_cache": False}
            places = Places.of(prefix_mask, rows=len(tokens), length=end, device=tokens.device)
            told_how = nullcontext() if places.real is not None else one_sequence_each()
        else:
            start, end = cache.filled, cache.filled + tokens.shape[1]
            kept = {"use_cache": True, "past_key_values": cache.layers}
            places, told_how = cache.places, heads_grouped_alike(tokens)
        with self._listening(capture) as captured, told_how:
            output = self.base(input_ids=tokens, return_dict=True, **kept, **places.inputs(start, end))
        if cache is not None:
            cache.filled = end
        return ModelOutput(output.last_hidden_state, captured)

    def _note_seeds(self, tokens: Tensor, seeds: Tensor | None) -> None:
        """Nothing; every site knows the rows' seeds."""
        if not self.training or not self._sites:
            return
        if seeds is None:
            seeds = random_seeds(len(tokens), tokens.device)
        for site, own in zip(self._sites, site_seeds(seeds, len(self._sites)), strict=True):
            site.seeds = own

    @contextmanager
    def _listening(self, capture: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """A block in which the wanted layers' states are noted as they pass."""
        captured: dict[int, Tensor] = {}
        handles = []

        def note(layer: int, state: Any) -> None:
            state = state[0] if isinstance(state, tuple | list) else state
            captured.setdefault(layer, state)

        for layer in capture:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(f"capture: layer {layer} is outside 0..{self.num_layers}")
            if layer == 0:
                handles.append(
                    self._blocks[0].register_forward_pre_hook(
                        lambda module, args, kwargs: note(0, args or kwargs["hidden_states"]), with_kwargs=True
                    )
                )
            else:
                handles.append(
                    self._blocks[layer - 1].register_forward_hook(
                        lambda module, args, output, layer=layer: note(layer, output)
                    )
                )
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def head(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any K"]:
        """Logits over the codes in float32, from states after the final norm."""
        return self.code_head(hidden)

    def condition(
        self,
        *,
        labels: Any = None,
        prompts: Sequence[str] | None = None,
        captions: Any = None,
        grid: Grid | None = None,
    ) -> Condition:
        """Everything before the first code, padded on the left: prompt, begin of image and size tokens.

        Raises: ArraError for another kind of condition, or a prompt that leaves no room for the picture.
        """
        if prompts is None or labels is not None or captions is not None:
            raise ArraError("condition: a language model is conditioned on text; pass prompts=")
        if self.text_tokenizer is None:
            raise ArraError("prompts: this model has no text tokenizer; load it from a model folder or set one")
        grid = grid or self.settings.grid
        rows = []
        for prompt in prompts:
            ids = self.text_tokenizer.encode(self.layout.text(prompt, grid))
            self.layout.check_fits(len(ids), grid, where=f"prompt '{prompt[:40]}'")
            rows.append(self.layout.prefix(ids, grid))
        return self._padded(rows, width=max(map(len, rows), default=0))

    def null_condition(self, condition: Condition, *, grid: Grid | None = None) -> Condition:
        """The unconditional twin of a condition: the layout's form without a prompt, as training drops it."""
        row = self.layout.prefix(None, grid or self.settings.grid)
        width = max(condition.tokens.shape[1], len(row))
        return self._padded([row] * len(condition), width=width)

    def _padded(self, rows: Sequence[Sequence[int]], *, width: int) -> Condition:
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, row in enumerate(rows):
            tokens[place, width - len(row) :] = torch.tensor(row)
            mask[place, width - len(row) :] = True
        return Condition(tokens.to(self.device), mask.to(self.device))

    @property
    def steps_alike(self) -> bool:
        """Whether `decode_at` can be asked.

        Not where attention makes biases of its own from a mask of padding (ALiBi), or takes the last key that it is
        given for the newest (GPT-Neo's windows).
        """
        told = inspect.signature(self.base.forward).parameters
        own = getattr(self.config, "alibi", False) or "local" in getattr(self.config, "attention_layers", ())
        return "position_ids" in told and not own

    @property
    def keeps_all(self) -> bool:
        """Whether its memory keeps every position (no sliding windows, no recurrent layers)."""
        return all_growing(self.lm.config)

    def memory_length(self, rows: Condition, grid: Grid) -> int:
        """Positions that a memory needs room for."""
        return rows.tokens.shape[1] + len(self._template(grid))

    def memory(self, rows: Condition, *, grid: Grid, room: int | None = None) -> LanguageCache:
        """An empty memory for the picture, with room for so many positions; None: for all."""
        length = self.memory_length(rows, grid)
        layers = growing_cache(self.lm.config, room=length if room is None else room)
        places = Places.of(rows.prefix_mask, rows=len(rows), length=length, device=self.device)
        return LanguageCache(layers, places, self._code_head(), self._image_body(grid))

    def prefill(
        self, rows: Condition, codes: Int[Tensor, "B n"], *, grid: Grid
    ) -> tuple[LanguageCache, Float[Tensor, "B K"]]:
        """A memory of the prefix and the first n codes, and the logits of the code after them.

        It has room for just those where it can be spread, otherwise for the whole picture.
        """
        body = self._image_body(grid)
        room = rows.tokens.shape[1] + body.end(codes.shape[1])
        cache = self.memory(rows, grid=grid, room=room if self.keeps_all else None)
        tokens = torch.cat([rows.tokens, body.written(cache.head.ids[codes], 0)], dim=1)
        hidden = self(tokens, cache=cache).last_hidden
        return cache, cache.head.logits(hidden[:, -1])

    def decode(
        self,
        rows: Condition,
        cache: LanguageCache,
        *,
        codes: Int[Tensor, "B n"],
        index: int,
        grid: Grid,
        every: bool = False,
    ) -> Float[Tensor, "B K"] | Float[Tensor, "B n K"]:
        """The logits after feeding the codes at index..index+n-1 with what the layout puts between and behind them.

        Of the code behind the last one, or behind every one. What the memory held from `index` on is overwritten.
        """
        cache.rewind(rows.tokens.shape[1] + cache.body.end(index))
        hidden = self(cache.body.written(cache.head.ids[codes], index), cache=cache).last_hidden
        if every:
            return cache.head.logits(hidden[:, cache.body.predicting(index, codes.shape[1])])
        return cache.head.logits(hidden[:, -1])

    def static_condition(self, rows: Condition) -> Condition:
        """The rows with more padding on the left: few lengths, so that steps of fixed shapes are made few times."""
        missing = -rows.tokens.shape[1] % PREFIX_STEP
        assert rows.prefix_mask is not None
        return Condition(F.pad(rows.tokens, (missing, 0)), F.pad(rows.prefix_mask, (missing, 0)))

    def static_places(self, prefix_length: int, grid: Grid) -> Int64[Tensor, " P"]:
        """The position of every code."""
        return torch.tensor(self._image_body(grid).places, device=self.device) + prefix_length

    def tail(self, index: int, grid: Grid) -> tuple[int, ...]:
        """Tokens that are fed behind the code at `index`."""
        return tuple(self.layout.after(index, grid))

    def decode_at(
        self,
        prefix_mask: Bool[Tensor, "B C"] | None,
        cache: LanguageCache,
        *,
        codes: Int[Tensor, "B 1"],
        place: Int[Tensor, "1"],
        reach: int,
        tail: tuple[int, ...] = (),
        block: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "B K"]:
        """`decode` of one code as a program of fixed shapes: it is fed at position `place`, a number on the device.

        At most the first `reach` positions are looked at; `block` is for decoders of LlamaGen's kind. Which rows of
        `cache` are meant is said by `prefix_mask`: as many as it has.
        """
        assert prefix_mask is not None
        device, width = place.device, prefix_mask.shape[1]
        places = place + torch.arange(1 + len(tail), device=device)  # (S,)
        behind = cache.body.tokens.index_select(0, places[1:] - width)
        tokens = torch.cat([cache.head.ids[codes], behind.expand(len(codes), -1)], dim=1)
        real = F.pad(prefix_mask[:, :reach], (0, max(reach - width, 0)), value=True)
        mask = real[:, None, None] & (torch.arange(reach, device=device) <= places[:, None])  # (B, 1, S, reach)
        if self.config._attn_implementation != "sdpa":  # the others add it
            dtype = next(self.lm.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
        hidden = self.base(
            input_ids=tokens,
            position_ids=places[None] - (~prefix_mask).sum(1, keepdim=True),
            attention_mask=mask,
            past_key_values=window_cache(cache.layers, places, num_rows=len(codes), reach=reach),
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        return cache.head.logits(hidden[:, -1])

    def logits(
        self,
        codes: Int[Tensor, "B P"] | Int[Tensor, "B h w"],
        *,
        labels: Any = None,
        captions: Any = None,
        prompts: Sequence[str] | None = None,
        grid: Grid | None = None,
    ) -> Float[Tensor, "B P K"]:
        """Teacher-forced logits at the positions that predict the codes, under the module's current mode."""
        told = grid or (self.settings.grid if codes.dim() == 2 else (int(codes.shape[1]), int(codes.shape[2])))
        condition = self.condition(labels=labels, captions=captions, prompts=prompts, grid=told)
        flat = checked_codes(codes, len(condition), grid=told, num_codes=self.settings.num_codes).to(self.device)
        width = condition.tokens.shape[1]
        body, ids = self._image_body(told), self.layout.code_ids().to(self.device)
        tokens = torch.cat([condition.tokens, body.written(ids[flat[:, :-1]], 0)], dim=1)
        hidden = self(tokens, prefix_mask=condition.prefix_mask).last_hidden
        return self.code_head(hidden[:, [place + width - 1 for place in body.places]])

    def _template(self, grid: Grid) -> list[int]:
        """What follows the prefix: `CODE` where codes stand, and the tokens between and behind them."""
        return self.layout.image(grid)[len(self.layout.opening(grid)) :]

    def _image_body(self, grid: Grid) -> ImageBody:
        template = self._template(grid)
        places = tuple(place for place, token in enumerate(template) if token == CODE)
        return ImageBody(torch.tensor(template, device=self.device), places)


@dataclass(frozen=True)
class _OutputDropout:
    """A forward hook that drops of what a module gives."""

    site: RowDropout

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training:
            return output
        return (self.site(output[0]), *output[1:]) if isinstance(output, tuple) else self.site(output)


def one_sequence_each() -> AbstractContextManager[None]:
    """A block in which `transformers` takes every row for one sequence.

    Given no mask it looks at the positions whether rows are packed, and waits for an accelerator to see them.
    """
    from transformers import masking_utils

    return _replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def heads_grouped_alike(tokens: Int64[Tensor, "B S"]) -> AbstractContextManager[None]:
    """A block in which heads that share keys share them with a mask as without, on a CPU.

    `transformers` would do it in two ways, which round differently, so that a row could tell whether another one is
    padded. Here it is always the faster one: one token's heads are queries of one head, more tokens' are left to torch.
    """
    if tokens.device.type != "cpu":
        return nullcontext()
    from transformers.integrations import sdpa_attention

    several = tokens.shape[1] > 1
    return _replaced(sdpa_attention, "use_gqa_in_sdpa", lambda attention_mask, key, value: several)


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A block in which a function of a module is another one; nothing where the module has none of that name."""
    if not hasattr(module, name):
        yield
        return
    with _ONE_AT_A_TIME:
        found = getattr(module, name)
        setattr(module, name, function)
        try:
            yield
        finally:
            setattr(module, name, found)


def _blocks(base: nn.Module) -> list[nn.Module]:
    """The blocks of a `transformers` network, first to last.

    Raises: ArraError when there is no list of as many modules as the configuration has layers.
    """
    count = int(base.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ArraError(
        f"{type(base).__name__}: no list of its {count} blocks found; this architecture is not one that can be trained "
        "here, name another language model"
    )
