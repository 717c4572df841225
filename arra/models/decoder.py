"""The LlamaGen-style decoder: condition and codes go in, the next code's logits come out; `train` and `sample` call it.

A sequence is C prefix positions (a class, caption features or text tokens, and perhaps the REP token behind them)
followed by P = h*w codes in raster order. Parameter names are LlamaGen's own, so its published files load as they are.
Letters: B batch, S positions given (a slice of the sequence), C prefix length, W of it without the REP token, P image
positions, D model width, F caption feature size, K codes.
Source: FoundationVision/LlamaGen, autoregressive/models/gpt.py (behaviour matched, its defects not).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from arra.data.conditions import Prefix, text_prefixes
from arra.errors import ArraError
from arra.models import lean
from arra.models.blocks import EMBEDDINGS, Block, RMSNorm, Rotary, attention_mask
from arra.models.cache import KVCache, LayerWindow
from arra.models.dropout import dropped, path_factors, random_seeds, site_seeds
from arra.models.head import CalledHead, Head, head_of
from arra.models.hub import DecoderFromHub
from arra.models.products import is_unheard, packed_layers
from arra.models.settings import DecoderSettings
from arra.models.stepping import PackedBlock, Stepper

__all__ = ["Condition", "Decoder", "DecoderSettings", "ModelOutput", "TextTokenizer", "left_padded"]


@runtime_checkable
class TextTokenizer(Protocol):
    """What a text-conditioned decoder needs of its tokenizer."""

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt in the prefix's own id space."""
        ...

    def save(self, path: Path) -> None:
        """The file written from which the same tokenizer can be loaded."""
        ...


@dataclass(frozen=True)
class Condition:
    """What the prefix of each sequence says, ready for `Decoder.forward`."""

    tokens: Int[Tensor, "B C"]
    prefix_mask: Bool[Tensor, "B C"] | None = None
    caption: Float[Tensor, "B W F"] | None = None
    null_caption: Bool[Tensor, "B"] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward pass that repeat on every call."""
        told = {"prefix_mask": self.prefix_mask, "caption": self.caption, "null_caption": self.null_caption}
        return {name: value for name, value in told.items() if value is not None}

    def select(self, rows: Int[Tensor, "N"]) -> "Condition":
        """The rows of the given indices, in their order."""
        parts = (self.tokens, self.prefix_mask, self.caption, self.null_caption)
        return Condition(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]

    def join(self, other: "Condition") -> "Condition":
        """These rows followed by those of a condition of the same kind."""
        joined: list[Tensor | None] = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"conditions differ in kind: one has {field.name}, the other has not")
            joined.append(None if mine is None else torch.cat([mine, theirs]))
        return Condition(*joined)  # type: ignore[arg-type]


class ModelOutput(NamedTuple):
    """Hidden states of one forward pass (a tuple, so that wrappers which search outputs for tensors find them)."""

    last_hidden: Tensor
    """(B, S, D) after the final norm."""
    captured: dict[int, Tensor]
    """Layer -> (B, S, D): 0 = embeddings, k = residual stream after the k-th block, before the final norm."""


class Decoder(nn.Module, DecoderFromHub):
    """A transformer that predicts image codes from left to right, top to bottom, after a condition."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.text_tokenizer: TextTokenizer | None = None
        self._stepper: Stepper | None = None
        self.about: dict[str, Any] = {}  # free facts that model.json keeps: origin of the weights, text encoder
        self.cls_embedding: nn.Module = EMBEDDINGS[settings.condition](settings)
        self.tok_embeddings = nn.Embedding(settings.num_codes, settings.hidden_size)
        self.layers = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))
        self.norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.output = nn.Linear(settings.hidden_size, settings.num_codes, bias=False)
        self.rotary = Rotary(settings)
        if not self.norm.weight.is_meta:  # nothing to fill, and it takes as long as building
            self._initialize()
        if settings.rep_token:  # last, so that all other weights are those of the model without it
            self.rep_embedding = nn.Embedding(1, settings.hidden_size)
            if not self.norm.weight.is_meta:
                nn.init.normal_(self.rep_embedding.weight, std=settings.initializer_range)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.settings.initializer_range)
        nn.init.zeros_(self.output.weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, first to last, as parallelism and recomputing take them."""
        return list(self.layers)

    @contextmanager
    def packed(self) -> Iterator[None]:
        """A block in which it paints fastest on a CPU, with its matrices packed.

        For painting alone: nothing may be trained, wrapped or listened to anew in it.
        """
        with packed_layers(self):
            before, self._stepper = self._stepper, self._made_stepper()
            try:
                yield
            finally:
                self._stepper = before

    def _made_stepper(self) -> Stepper | None:
        """What takes single positions through the blocks; None where layers are not packed or somebody listens."""
        parts, settings = [], self.settings
        if self.training:
            return None
        for block in self.layers:
            part = PackedBlock.of(block) if all(map(is_unheard, block.modules())) else None
            if part is None:
                return None
            parts.append(part)
        return Stepper(
            blocks=tuple(parts),
            num_heads=settings.num_heads,
            kv_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            ffn_width=settings.ffn_width,
            eps=torch.tensor(settings.norm_eps),
        )

    def new_cache(self, batch_size: int, *, length: int | None = None) -> KVCache:
        """Room for whole sequences of `batch_size` rows, the last code excepted (nothing comes after it)."""
        settings = self.settings
        return KVCache.allocate(
            num_layers=settings.num_layers,
            batch_size=batch_size,
            num_kv_heads=settings.kv_heads,
            length=settings.prefix_length + settings.num_positions - 1 if length is None else length,
            head_dim=settings.head_dim,
            device=self.device,
            dtype=self.norm.weight.dtype,
        )

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        *,
        prefix_mask: Bool[Tensor, "B C"] | None = None,
        caption: Float[Tensor, "B W F"] | None = None,
        null_caption: Bool[Tensor, "B"] | None = None,
        capture: Sequence[int] = (),
        cache: KVCache | None = None,
        start: int = 0,
        dropout_seeds: Int64[Tensor, "B"] | None = None,
    ) -> ModelOutput:
        """Hidden states of positions start..start+S-1; the state at position t predicts the code at t+1.

        `tokens` at prefix positions are class or text ids (anything for captions and REP), at later ones codes. False
        in `prefix_mask` marks padding. Rows of `null_caption` use the stored null caption. With a cache, positions
        below `start` are read from it and the new ones written to it; without one `start` is 0. While training,
        `dropout_seeds` say what of each row is dropped, but for attention's own dropout; None draws them.
        """
        if start and cache is None:
            raise ValueError("start > 0 needs the cache that holds the positions before it")
        end = start + tokens.shape[1]
        table = self.rotary.table[start:end]
        mask = attention_mask(prefix_mask, start=start, end=end, device=tokens.device)
        x = self._embed(tokens, start, caption, null_caption)
        seeds, paths = self._drops(tokens, dropout_seeds)
        if seeds is not None:
            x = dropped(x, self.settings.token_dropout, seeds[-1])
        captured = {0: x} if 0 in capture else {}
        single = cache is not None and end == start + 1 and not capture and not torch.is_grad_enabled()
        if self._stepper is not None and cache is not None and single:
            return ModelOutput(self.norm(self._stepper(x, table, mask, cache, start)), captured)
        for index, block in enumerate(self.layers):
            drops = [None if each is None else each[index] for each in (seeds, paths)]
            x = block(x, table, mask, cache, index, start, *drops)
            if index + 1 in capture:
                captured[index + 1] = x
        return ModelOutput(self.norm(x), captured)

    def _drops(self, tokens: Tensor, seeds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """While training: the rows' seeds for each block and, last, for the embeddings; factors of every branch."""
        if not self.training:
            return None, None
        if seeds is None:
            seeds = random_seeds(len(tokens), tokens.device)
        by_site, share = site_seeds(seeds, self.settings.num_layers + 1), self.settings.drop_path
        return by_site, path_factors(by_site[:-1], share, site=2) if share else None

    def _embed(self, tokens: Tensor, start: int, caption: Tensor | None, null_caption: Tensor | None) -> Tensor:
        num_prefix = min(max(self.settings.prefix_length - start, 0), tokens.shape[1])
        codes = self.tok_embeddings(tokens[:, num_prefix:])
        if num_prefix == 0:
            return codes
        num_asked = min(max(self.settings.condition_length - start, 0), tokens.shape[1])
        parts = [codes]
        if num_asked < num_prefix:
            parts.insert(0, self.rep_embedding.weight.expand(len(tokens), 1, -1))
        if num_asked:
            parts.insert(0, self.cls_embedding(tokens[:, :num_asked], start, caption, null_caption))
        return torch.cat(parts, dim=1)

    @property
    def keeps_all(self) -> bool:
        """Whether its memory keeps every position, so that rows can be shared and positions taken back."""
        return True

    def memory_length(self, rows: Condition, grid: tuple[int, int]) -> int:
        """Positions that a memory needs room for; nothing comes after the last code."""
        return self.settings.prefix_length + self.settings.num_positions - 1

    def prefill(
        self, rows: Condition, codes: Int[Tensor, "B n"], *, grid: tuple[int, int]
    ) -> tuple[KVCache, Float[Tensor, "B K"]]:
        """A memory of just the prefix and the first n codes, and the logits of the code after them."""
        tokens = torch.cat([rows.tokens, codes], dim=1)
        cache = self.new_cache(len(rows), length=tokens.shape[1])
        hidden = self(tokens, **rows.inputs(), cache=cache).last_hidden
        return cache, self.head(hidden[:, -1])

    def decode(
        self,
        rows: Condition,
        cache: KVCache,
        *,
        codes: Int[Tensor, "B n"],
        index: int,
        grid: tuple[int, int],
        every: bool = False,
    ) -> Float[Tensor, "B K"] | Float[Tensor, "B n K"]:
        """The logits after feeding the codes at index..index+n-1: of the code behind the last, or behind every one.

        What the memory held from `index` on is overwritten.
        """
        start = self.settings.prefix_length + index
        hidden = self(codes, **rows.inputs(), cache=cache, start=start).last_hidden
        return self.head(hidden if every else hidden[:, -1])

    def static_condition(self, rows: Condition) -> Condition:
        """The rows in a form of few lengths: all are of one here."""
        return rows

    def static_places(self, prefix_length: int, grid: tuple[int, int]) -> Int64[Tensor, " P"]:
        """The position of every code."""
        return torch.arange(self.settings.num_positions, device=self.device) + prefix_length

    def tail(self, index: int, grid: tuple[int, int]) -> tuple[int, ...]:
        """Tokens that are fed behind the code at `index`: here none."""
        return ()

    def decode_at(
        self,
        prefix_mask: Bool[Tensor, "B C"] | None,
        cache: KVCache,
        *,
        codes: Int[Tensor, "B 1"],
        place: Int[Tensor, "1"],
        reach: int,
        tail: tuple[int, ...] = (),
        block: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "B K"]:
        """`decode` of one code as a program of fixed shapes: it is fed at position `place`, a number on the device.

        At most the first `reach` positions are looked at, of the first rows of the cache. `block` stands in for calling
        a block (compiled, say).
        """
        table = self.rotary.table.index_select(0, place)
        mask = (torch.arange(reach, device=place.device) <= place)[None, None, None]  # (1, 1, 1, reach)
        if prefix_mask is not None:
            width = min(reach, prefix_mask.shape[1])
            mask = mask & F.pad(prefix_mask[:, :width], (0, reach - width), value=True)[:, None, None]
        x = self.tok_embeddings(codes)
        for own, layer in zip(cache.both[:, :, : len(codes)], self.layers, strict=True):
            window = LayerWindow(own[0], own[1], place, reach)
            x = layer(x, table, mask, window) if block is None else block(layer, x, table, mask, window)
        return self.head(self.norm(x)[:, -1])

    @property
    def hidden_size(self) -> int:
        """Width D of the states."""
        return self.settings.hidden_size

    @property
    def lm_head(self) -> Head | CalledHead:
        """The head as the loss takes it; it holds the decoder's own weights."""
        return head_of(self.output)

    def head(self, hidden: Float[Tensor, "*any D"]) -> Float[Tensor, "*any K"]:
        """Logits over the codes in float32, from states after the final norm."""
        return lean.linear(hidden, self.output).float()

    def logits(
        self,
        codes: Int[Tensor, "B P"] | Int[Tensor, "B h w"],
        *,
        labels: Sequence[int] | Int[Tensor, "B"] | None = None,
        captions: tuple[Tensor, Tensor | None] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Float[Tensor, "B P K"]:
        """Teacher-forced logits at the positions that predict the codes, under the module's current mode."""
        condition = self.condition(labels=labels, captions=captions, prompts=prompts)
        flat = checked_codes(codes, len(condition), grid=self.settings.grid, num_codes=self.settings.num_codes)
        flat = flat.to(self.device)
        tokens = torch.cat([condition.tokens, flat[:, :-1]], dim=1)
        hidden = self(tokens, **condition.inputs()).last_hidden
        return self.head(hidden[:, self.settings.prefix_length - 1 :])

    def condition(
        self,
        *,
        labels: Sequence[int] | Int[Tensor, "B"] | None = None,
        prompts: Sequence[str] | None = None,
        captions: tuple[Tensor, Tensor | None] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Condition:
        """The prefix for labels, prompts or captions, whichever this decoder was built for.

        `captions` is (features (B, W, F), mask (B, W) or None), real vectors in any order of padding: they are moved
        to the end and the padding is zeroed, as LlamaGen's sampler does.
        Raises: ArraError when the kind or a value does not fit the decoder.
        """
        if grid not in (None, self.settings.grid):
            raise ArraError(f"grid: this decoder paints {self.settings.grid} codes and nothing else, got {grid}")
        given = {"class": labels, "text": prompts, "caption": captions}
        kinds = [kind for kind, value in given.items() if value is not None]
        if kinds != [self.settings.condition]:
            word = {"class": "labels=", "text": "prompts=", "caption": "captions="}[self.settings.condition]
            raise ArraError(
                f"condition: this decoder is conditioned on {self.settings.condition}, got "
                f"{' and '.join(kinds) or 'nothing'}; pass {word}"
            )
        if labels is not None:
            return self._class_condition(labels)
        if prompts is not None:
            return self._text_condition(prompts)
        assert captions is not None
        return self._caption_condition(*captions)

    def null_condition(self, condition: Condition, *, grid: tuple[int, int] | None = None) -> Condition:
        """The unconditional twin of a condition: null class, null caption under the same mask, or the empty prompt."""
        tokens = condition.tokens
        if self.settings.condition == "class":
            return self._with_rep(Prefix(torch.full_like(tokens[:, :1], self.settings.num_classes)))
        if self.settings.condition == "caption":
            null = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
            return Condition(tokens, condition.prefix_mask, condition.caption, null)
        return self._text_prefixes([[]]).select(torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device))

    def _with_rep(self, prefix: Prefix) -> Condition:
        """The prefixes, with the REP token behind them where this decoder has one."""
        whole = prefix.with_rep(self.settings.rep_token)
        return Condition(whole.tokens, whole.mask, whole.caption, whole.null_caption)

    def _text_prefixes(self, prompts: Sequence[Sequence[int]]) -> Condition:
        prefix = text_prefixes(prompts, self.settings.condition_length)
        assert prefix.mask is not None
        return self._with_rep(Prefix(prefix.tokens.to(self.device), prefix.mask.to(self.device)))

    def _class_condition(self, labels: Sequence[int] | Tensor) -> Condition:
        tokens = torch.as_tensor(labels, device=self.device, dtype=torch.int64)
        outside = tokens[(tokens < 0) | (tokens > self.settings.num_classes)]
        if len(outside):
            raise ArraError(
                f"labels: {outside[0].item()} is outside 0..{self.settings.num_classes} "
                f"({self.settings.num_classes} is the null class)"
            )
        return self._with_rep(Prefix(tokens[:, None]))

    def _text_condition(self, prompts: Sequence[str]) -> Condition:
        if self.text_tokenizer is None:
            raise ArraError("prompts: this decoder has no text tokenizer; load it from a model folder or set one")
        return self._text_prefixes([self.text_tokenizer.encode(prompt) for prompt in prompts])

    def _caption_condition(self, features: Tensor, mask: Tensor | None) -> Condition:
        expected = (self.settings.condition_length, self.settings.caption_dim)
        if features.dim() != 3 or tuple(features.shape[1:]) != expected:
            raise ArraError(
                f"captions: features are {tuple(features.shape)}, expected (B, {expected[0]}, {expected[1]})"
            )
        features = features.to(self.device, self.norm.weight.dtype)
        if mask is not None:
            features, mask = left_padded(features, mask.to(self.device))
        # caption positions carry no ids of their own
        placeholders = torch.zeros(features.shape[:2], dtype=torch.int64, device=self.device)
        null = torch.zeros(len(features), dtype=torch.bool, device=self.device)
        return self._with_rep(Prefix(placeholders, mask, features, null))


def checked_codes(
    codes: Int[Tensor, "B P"] | Int[Tensor, "B h w"], rows: int, *, grid: tuple[int, int], num_codes: int
) -> Int[Tensor, "B P"]:
    """The codes, one row for each picture.

    Raises: ArraError when they are not `rows` pictures of the grid, or not codes of that many.
    """
    flat = codes.flatten(1)
    if len(flat) != rows or flat.shape[1] != grid[0] * grid[1]:
        raise ArraError(
            f"codes: got {tuple(codes.shape)} for {rows} conditions, expected one row each of "
            f"{grid[0]} x {grid[1]} codes"
        )
    if flat.numel() and (flat.min() < 0 or flat.max() >= num_codes):
        raise ArraError(
            f"codes: {flat.min()}..{flat.max()} are outside 0..{num_codes - 1}; they come from another tokenizer"
        )
    return flat


def left_padded(
    features: Float[Tensor, "B W F"], mask: Bool[Tensor, "B W"] | Int[Tensor, "B W"]
) -> tuple[Float[Tensor, "B W F"], Bool[Tensor, "B W"]]:
    """Features and mask with the real vectors at the end, in their order, and zeros before them."""
    real = mask.bool()
    order = real.to(torch.int64).argsort(dim=1, stable=True)
    real = real.gather(1, order)
    moved = features.gather(1, order[..., None].expand_as(features))
    return torch.where(real[..., None], moved, 0.0), real
