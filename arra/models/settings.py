"""Shape and dropout of the LlamaGen-style decoder: what `model.json` stores and a recipe's model section says."""

from typing import Any, Literal

from pydantic import Field, model_validator

from arra.settings import Settings

DEFAULT_PREFIX_LENGTH = {"class": 1, "caption": 120}


class DecoderSettings(Settings):
    """Shape and dropout of a decoder."""

    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_kv_heads: int | None = None
    """Key-value heads shared by groups of query heads; None means one for each query head."""
    ffn_hidden_size: int | None = None
    """Inner width of the feed-forward; None means LlamaGen's rule: 8/3 of the width, rounded up to `multiple_of`."""
    multiple_of: int = Field(default=256, gt=0)
    num_codes: int = Field(default=16384, gt=0)
    grid: tuple[int, int] = (16, 16)
    """Height and width of the image in codes."""
    condition: Literal["class", "caption", "text"] = "class"
    num_classes: int = Field(default=1000, gt=0)
    """Classes without the null class, whose id is `num_classes`."""
    caption_dim: int = Field(default=2048, gt=0)
    prefix_length: int = Field(default=1, gt=0)
    """Positions before the codes, the REP token included: without it 1 for a class, 120 (LlamaGen's) for captions
    unless given, to be given for text."""
    rep_token: bool = False
    """Whether the last prefix position is the REP token: a learned vector whose state training may align."""
    text_vocab_size: int | None = Field(default=None, gt=0)
    prefix_rotary: Literal["zero", "identity"] = "zero"
    """Rotary row of condition positions: LlamaGen's (0, 0), or (1, 0), the default for text."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    token_dropout: float = Field(default=0.1, ge=0, lt=1)
    resid_dropout: float = Field(default=0.1, ge=0, lt=1)
    ffn_dropout: float = Field(default=0.1, ge=0, lt=1)
    attn_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of attention weights; LlamaGen's models have none. Drawn within the attention itself: unlike all other dropout it
    differs with ranks and micro-batches."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a sample skips what the last block adds; it rises from 0 at the first one (stochastic depth)."""
    initializer_range: float = 0.02

    @model_validator(mode="before")
    @classmethod
    def _fill_by_condition(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        condition = data.get("condition", "class")
        filled = dict(data)
        if "prefix_length" not in filled:
            if condition == "text":
                raise ValueError("prefix_length: a text condition needs its number of prefix positions")
            filled["prefix_length"] = DEFAULT_PREFIX_LENGTH.get(condition, 1) + bool(filled.get("rep_token"))
        filled.setdefault("prefix_rotary", "identity" if condition == "text" else "zero")
        return filled

    @model_validator(mode="after")
    def _fits_together(self) -> "DecoderSettings":
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"hidden_size: {self.hidden_size} over {self.num_heads} heads must give a head size divisible by 4 "
                "(two rotary axes of pairs)"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads: {self.kv_heads} does not divide num_heads {self.num_heads}")
        if min(self.grid) < 1:
            raise ValueError(f"grid: {self.grid} must be at least (1, 1)")
        if self.condition_length < 1:
            raise ValueError(f"prefix_length: {self.prefix_length} leaves no position beside the REP token")
        if self.condition == "class" and self.condition_length != 1:
            raise ValueError(f"prefix_length: a class takes one position, got {self.condition_length}")
        if self.condition != "text" and self.prefix_rotary != "zero":
            raise ValueError(f"prefix_rotary: {self.condition} conditions follow LlamaGen, whose only choice is 'zero'")
        if self.condition == "text" and self.text_vocab_size is None:
            raise ValueError("text_vocab_size: a text condition needs the size of its vocabulary")
        return self

    @property
    def condition_length(self) -> int:
        """Prefix positions of the condition, without the REP token."""
        return self.prefix_length - self.rep_token

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads after resolving None."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward after resolving None."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        raw = int(2 * (4 * self.hidden_size) / 3)
        return self.multiple_of * -(-raw // self.multiple_of)

    @property
    def num_positions(self) -> int:
        """Image positions P = h*w."""
        return self.grid[0] * self.grid[1]
