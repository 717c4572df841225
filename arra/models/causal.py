"""A Hugging Face causal LM that paints: prompt and codes are tokens of one vocabulary, laid out by an `ImageLayout`.

It takes the place of `Decoder` in training, sampling and evaluation: same calls, same results. The network is
`transformers`' own, of any architecture whose blocks are a list and whose head is a matrix; only its head is computed
here, where it is wanted and for the tokens that are wanted (so Chameleon's masking of image logits never happens).
Letters: B batch, S positions given, C prefix length, P = h*w image positions, D width, K codes, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from arra.data.layout import CODE, Grid, ImageLayout
from arra.errors import ArraError
from arra.models.decoder import Condition, ModelOutput, TextTokenizer, checked_codes
from arra.models.dropout import RowDropout, random_seeds, site_seeds
from arra.models.growing import all_growing, growing_cache, join_caches, spread_cache
from arra.models.head import CalledHead, Head, head_of
from arra.settings import Settings

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


@dataclass
class LanguageCache:
    """What has been read so far: attention's memory, how far it reaches, and the head's rows for codes."""

    layers: Any
    """A cache of `transformers`."""
    filled: int
    code_head: Head | CalledHead
    code_ids: Int[Tensor, " K"]
    """The token of every code."""

    def rows(self, count: int) -> "LanguageCache":
        """The same with the first `count` rows of the batch alone; this one must not be used any more."""
        self.layers.batch_select_indices(torch.arange(count))
        return self

    def spread(self, places: Int[Tensor, "R"], *, length: int) -> "LanguageCache":
        """One with room for `length` positions whose row i is a copy of row `places[i]`; for growing layers alone."""
        return replace(self, layers=spread_cache(self.layers, places, room=length))

    def rewind(self, length: int) -> None:
        """Nothing; what was read after the first `length` positions is forgotten.

        Raises: ValueError where a memory that does not keep everything would have to.
        """
        if length == self.filled:
            return
        if not all(hasattr(layer, "room") for layer in self.layers.layers):
            raise ValueError("this memory cannot go back")
        for layer in self.layers.layers:
            layer.filled = length
        self.filled = length

    def join(self, other: "LanguageCache") -> "LanguageCache":
        """These rows followed by those of one with as much room; for growing layers alone."""
        return replace(self, layers=join_caches(self.layers, other.layers))


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
        self._sites: list[RowDropout] = []
        """Where it drops by rows, in the order in which they were made."""
        layout.check_grid(grid)
        self._blocks = _blocks(self.base)  # a list, not a module: the LM owns them
        rows, highest = int(self.config.vocab_size), max(layout.reserved())
        if highest >= rows:
            raise ArraError(f"layout: token {highest} is outside the model's vocabulary of {rows}")

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
        start: int = 0,
        dropout_seeds: Int64[Tensor, "B"] | None = None,
    ) -> ModelOutput:
        """Hidden states of positions start..start+S-1; the state at position t predicts the token at t+1.

        Without a mask rows begin at the first position, and what stands behind a row changes nothing in it. False in
        `prefix_mask` marks padding on the left, which takes no position. With a cache, positions below `start` are
        read from it and the new ones are stored. While training, `dropout_seeds` say what of each row is dropped, also
        when a block is computed again in the backward pass before the next call; None draws them.
        """
        self._note_seeds(tokens, dropout_seeds)
        end = start + tokens.shape[1]
        told: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            told["past_key_values"] = cache.layers
        if prefix_mask is None or bool(prefix_mask.all()):
            told["position_ids"] = torch.arange(start, end, device=tokens.device)[None].expand(len(tokens), -1)
        else:
            real = torch.ones(len(tokens), end, dtype=torch.int64, device=tokens.device)
            width = min(end, prefix_mask.shape[1])
            real[:, :width] = prefix_mask[:, :width]
            told |= {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)[:, start:]}
        whole_rows = nullcontext() if "attention_mask" in told or cache is not None else one_sequence_each()
        with self._listening(capture) as captured, whole_rows:
            output = self.base(input_ids=tokens, return_dict=True, **told)
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
    def keeps_all(self) -> bool:
        """Whether its memory keeps every position (no sliding windows, no recurrent layers)."""
        return all_growing(self.lm.config)

    def memory_length(self, rows: Condition, grid: Grid) -> int:
        """Positions that a memory needs room for."""
        return rows.tokens.shape[1] + len(self._template(grid))

    def prefill(
        self, rows: Condition, codes: Int[Tensor, "B n"], *, grid: Grid
    ) -> tuple[LanguageCache, Float[Tensor, "B K"]]:
        """A memory of the prefix and the first n codes, and the logits of the code after them.

        It has room for just those where it can be spread, otherwise for the whole picture.
        """
        tokens = torch.cat([rows.tokens, self._body(codes, grid)], dim=1)
        room = tokens.shape[1] if self.keeps_all else self.memory_length(rows, grid)
        ids = self.layout.code_ids().to(self.device)
        cache = LanguageCache(growing_cache(self.lm.config, room=room), 0, self.lm_head.rows(ids), ids)
        hidden = self(tokens, prefix_mask=rows.prefix_mask, cache=cache).last_hidden
        return cache, cache.code_head(hidden[:, -1])

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
        body, count = self._template(grid), codes.shape[1]
        places = [place for place, token in enumerate(body) if token == CODE]
        first, end = places[index], (places[index + count] if index + count < len(places) else len(body))
        tokens = torch.tensor(body[first:end], dtype=torch.int64, device=self.device).repeat(len(codes), 1)
        own = torch.tensor([place - first for place in places[index : index + count]], device=self.device)
        tokens[:, own] = cache.code_ids[codes]
        start = rows.tokens.shape[1] + first
        cache.rewind(start)
        hidden = self(tokens, prefix_mask=rows.prefix_mask, cache=cache, start=start).last_hidden
        if not every:
            return cache.code_head(hidden[:, -1])
        behind = torch.cat([own[1:], own.new_tensor([end - first])]) - 1
        return cache.code_head(hidden[:, behind])

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
        tokens = torch.cat([condition.tokens, self._body(flat[:, :-1], told)], dim=1)
        hidden = self(tokens, prefix_mask=condition.prefix_mask).last_hidden
        places = torch.tensor([place for place, token in enumerate(self._template(told)) if token == CODE])
        return self.code_head(hidden[:, (places + width - 1).to(hidden.device)])

    def _body(self, codes: Int[Tensor, "B n"], grid: Grid) -> Int[Tensor, "B S"]:
        """The first n codes as tokens, with what the layout puts between and behind them, up to the next code."""
        body = self._template(grid)
        places = [place for place, token in enumerate(body) if token == CODE]
        count = codes.shape[1]
        end = places[count] if count < len(places) else len(body)
        tokens = torch.tensor(body[:end], dtype=torch.int64, device=self.device).repeat(len(codes), 1)
        tokens[:, places[:count]] = self.layout.code_ids().to(self.device)[codes]
        return tokens

    def _template(self, grid: Grid) -> list[int]:
        """What follows the prefix: `CODE` where codes stand, and the tokens between and behind them."""
        return self.layout.image(grid)[len(self.layout.opening(grid)) :]


@dataclass(frozen=True)
class _OutputDropout:
    """A forward hook that drops of what a module gives."""

    site: RowDropout

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training:
            return output
        return (self.site(output[0]), *output[1:]) if isinstance(output, tuple) else self.site(output)


@contextmanager
def one_sequence_each() -> Iterator[None]:
    """A block in which `transformers` takes every row for one sequence.

    Given no mask it looks at the positions whether rows are packed, and waits for an accelerator to see them.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)


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
