"""A decoder as a causal LM of `transformers`: `generate()`, its processors, beams and training loops work on it.

Nothing here is needed to paint with `arra`; importing the module makes the class known to `AutoModelForCausalLM`, so
that a folder of `arra export RUN OUT --to hf` opens without code in it. One vocabulary holds all: codes 0..K-1, then
what stands before them: classes K..K+classes (the last is the null class), text ids from K on (K is padding), or for a
caption K where one of its vectors stands, K+1 for one of the null caption's, K+2 for padding; last the REP token.
Letters: B batch, S positions given, C prefix length, W of it without the REP token, F caption feature size, K codes,
V vocabulary, P image positions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from arra.data.layout import PAD
from arra.errors import ArraError
from arra.models import save_outline
from arra.models.blocks import Rotary, rotary_table
from arra.models.cache import KVCache
from arra.models.decoder import Condition, Decoder
from arra.models.llamagen import SIZES
from arra.models.settings import DecoderSettings

MODEL_TYPE, PREFIX, TOKENIZER_FILE = "arra_decoder", "decoder.", "tokenizer.json"
ONE_FILE = "500GB"
"""Shard size: `arra` reads a decoder's weights from one file."""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class ArraDecoderConfig(PreTrainedConfig):
    """The shape of a decoder (`settings`, the fields of `DecoderSettings`), and the ids of its vocabulary."""

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True  # config.json is to say everything
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, settings: Mapping[str, Any] | None = None, about: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        known = DecoderSettings(**(SIZES["b"] if settings is None else settings))
        told = {
            "hidden_size": known.hidden_size,
            "num_hidden_layers": known.num_layers,
            "num_attention_heads": known.num_heads,
            "num_key_value_heads": known.kv_heads,
            "head_dim": known.head_dim,
            "intermediate_size": known.ffn_width,
            "max_position_embeddings": known.prefix_length + known.num_positions,
            "initializer_range": known.initializer_range,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            **_vocabulary(known),
        }
        super().__init__(**{**kwargs, **told})
        self.settings = known.model_dump(mode="json")
        self.about = dict(about or {})


def _vocabulary(settings: DecoderSettings) -> dict[str, int | None]:
    """The ids behind those of codes."""
    first = settings.num_codes
    count = {
        "class": settings.num_classes + 1,
        "text": settings.text_vocab_size or 0,
        "caption": 3,
    }[settings.condition]
    return {
        "first_condition_id": first,
        "null_token_id": {"class": first + settings.num_classes, "text": None, "caption": first + 1}[
            settings.condition
        ],
        "pad_token_id": {"class": None, "text": first + PAD, "caption": first + 2}[settings.condition],
        "rep_token_id": first + count if settings.rep_token else None,
        "vocab_size": first + count + settings.rep_token,
    }


class LibraryCache(KVCache):
    """A cache of `transformers` in the place of ours."""

    cache: Any

    def __init__(self, cache: Any) -> None:
        object.__setattr__(self, "cache", cache)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys and values at all positions so far, after storing the new ones."""
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, layer)
        return stored

    def write_step(self, layer: int, start: int, both: Float[Tensor, "B 2 H E"]) -> tuple[Tensor, Tensor]:
        """The same for one position."""
        keys, values = both[:, :, :, None].unbind(1)
        return self.write(layer, start, keys, values)


class ArraDecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """A LlamaGen-style decoder under `transformers`; its weights keep the names they have in `arra`."""

    config_class = ArraDecoderConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: ArraDecoderConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(DecoderSettings(**config.settings))
        self.decoder.about = dict(config.about)
        self.register_load_state_dict_pre_hook(_under_our_prefix)
        self.post_init()

    @classmethod
    def of(cls, decoder: Decoder) -> "ArraDecoderForCausalLM":
        """The model around a decoder; the weights are the decoder's own, not a copy."""
        config = ArraDecoderConfig(settings=decoder.settings.model_dump(mode="json"), about=decoder.about)
        with torch.device("meta"):
            model = cls(config)
        model.decoder = decoder
        config.dtype = decoder.norm.weight.dtype
        return model.train(decoder.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The model of a folder or of a hub's repository, with its text tokenizer; options are the library's."""
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        if model.decoder.settings.condition == "text":
            model.decoder.text_tokenizer = _text_tokenizer(pretrained_model_name_or_path, kwargs)
        return found

    def save_pretrained(
        self, save_directory: Any, *, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Nothing; the folder is one that both `transformers` and `arra` open. Options are the library's.

        Raises: ArraError for push_to_hub, which would upload before the folder is whole.
        """
        if options.get("push_to_hub"):
            raise ArraError(
                "save_pretrained: push_to_hub would leave model.json out; call model.push_to_hub(REPOSITORY)"
            )
        state = self.state_dict() if state_dict is None else state_dict
        bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
        super().save_pretrained(save_directory, state_dict=bare, **{"max_shard_size": ONE_FILE, **options})
        if options.get("is_main_process", True):
            save_outline(self.decoder, Path(save_directory))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Rotary) and not module.table.is_meta:  # in no file, and lost on the way from meta
            module.table = rotary_table(module.settings, module.table.device)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the codes; conditions have their own."""
        return self.decoder.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The head, over the codes alone."""
        return self.decoder.output

    def inputs(
        self,
        *,
        labels: Sequence[int] | Int[Tensor, "B"] | None = None,
        prompts: Sequence[str] | None = None,
        captions: tuple[Tensor, Tensor | None] | None = None,
    ) -> dict[str, Tensor]:
        """What `generate` is to be given for labels, prompts or captions: ids, their mask, features.

        Raises: ArraError as `Decoder.condition` does.
        """
        condition = self.decoder.condition(labels=labels, prompts=prompts, captions=captions)
        ids = self._ids(condition)
        told = {"input_ids": ids, "attention_mask": self._real(ids).long()}
        return told if condition.caption is None else {**told, "caption": condition.caption}

    def null_ids(self, ids: Int[Tensor, "B C"]) -> Int[Tensor, "B C"]:
        """The unconditional twins of the conditions that `generate` was given."""
        decoder, config = self.decoder, self.config
        if decoder.settings.condition == "text":
            return self._ids(decoder.null_condition(Condition(ids))).to(ids.device)
        kept = ids == (-1 if config.rep_token_id is None else config.rep_token_id)
        if config.pad_token_id is not None:
            kept |= ids == config.pad_token_id
        return torch.where(kept, ids, config.null_token_id)

    def _get_logits_processor(self, generation_config: Any, **told: Any) -> Any:
        """The library's, whose guidance is told the unconditional twin of every row, codes given behind it included.

        Raises: ArraError for guidance of beams, whose rows change places behind its back.
        """
        if generation_config.guidance_scale not in (None, 1):
            if generation_config.num_beams > 1:
                raise ArraError(
                    "guidance_scale: that of transformers does not follow beams; leave it out and pass "
                    "logits_processor=arra.sample.processors.code_processors(model, sampling=...)"
                )
            null, mask = told["negative_prompt_ids"], told["negative_prompt_attention_mask"]
            if null is None:
                given, width = told["encoder_input_ids"], self.decoder.settings.prefix_length
                null = torch.cat([self.null_ids(given[:, :width]), given[:, width:]], dim=1)
            mask = self._real(null).long() if mask is None else mask
            each = generation_config.num_return_sequences
            told["negative_prompt_ids"] = null.repeat_interleave(each, dim=0)
            told["negative_prompt_attention_mask"] = mask.repeat_interleave(each, dim=0)
        return super()._get_logits_processor(generation_config=generation_config, **told)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        caption: Float[Tensor, "B W F"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits (B, S, V) of the token after each one; those of conditions are the lowest number, as none follows.

        0 in `attention_mask` (B, positions so far) marks padding of the prefix. `caption` holds vectors in their
        places, needed where the prefix is read and is not the null caption's alone. The loss is that of codes:
        `labels` (-100: ignored) may be the ids themselves.
        Raises: ArraError for a prefix of another width, ids in a wrong place, no caption, or a cache of fixed size.
        """
        config, start = self.config, 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is None and (not self.training if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None and past_key_values.is_compileable:
            raise ArraError("past_key_values: a cache of fixed size, all of which would be read; leave it out")
        width = max(self.decoder.settings.prefix_length - start, 0)
        asked, codes = input_ids[:, :width], input_ids[:, width:]
        self._check(asked, codes, attention_mask, start)
        told = self._told(asked, attention_mask, caption, start)
        hidden = self.decoder(
            torch.cat([self._condition_tokens(asked), codes], dim=1),
            **told,
            cache=None if past_key_values is None else LibraryCache(past_key_values),
            start=start,
        ).last_hidden
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.head(hidden[:, kept])
        beyond = config.vocab_size - logits.shape[-1]
        logits = F.pad(logits, (0, beyond), value=torch.finfo(logits.dtype).min)
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels >= config.first_condition_id, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _told(
        self, asked: Tensor, attention_mask: Tensor | None, caption: Tensor | None, start: int
    ) -> dict[str, Tensor]:
        """What the decoder hears of the prefix beside its tokens."""
        settings, told = self.decoder.settings, {}
        if settings.condition == "class":
            return {}
        if attention_mask is not None:
            told["prefix_mask"] = attention_mask[:, : settings.prefix_length].bool()
        elif not start:
            told["prefix_mask"] = self._real(asked)
        if settings.condition == "caption" and asked.shape[1]:
            null = (asked == self.config.null_token_id).any(1)
            if caption is None and not null.all():
                raise ArraError("caption: the features of the caption are missing; pass what inputs(captions=) gives")
            if caption is None:
                shape = (len(asked), settings.condition_length, settings.caption_dim)
                caption = torch.zeros(shape, device=asked.device, dtype=self.dtype)
            told |= {"caption": caption, "null_caption": null}
        return told

    def _check(self, asked: Tensor, codes: Tensor, attention_mask: Tensor | None, start: int) -> None:
        """Nothing; looks at values where the prefix is read, at sizes always."""
        settings, first = self.decoder.settings, self.config.first_condition_id
        end, most = start + asked.shape[1] + codes.shape[1], self.config.max_position_embeddings
        if end > most:
            raise ArraError(
                f"input_ids: {end} positions, this decoder has {settings.prefix_length} for the condition and "
                f"{settings.num_positions} for codes; max_new_tokens={settings.num_positions} paints a whole picture"
            )
        if start:
            return
        if asked.shape[1] < settings.prefix_length or bool((asked < first).any()) or bool((codes >= first).any()):
            raise ArraError(
                f"input_ids: expected {settings.prefix_length} ids from {first} on for the condition, then codes below "
                f"{first}; make them by model.inputs({self._word}=...)"
            )
        if attention_mask is not None and bool((attention_mask[:, : asked.shape[1]].bool() & ~self._real(asked)).any()):
            raise ArraError(
                "attention_mask: says that padding of the condition is to be seen; pass the one that "
                f"model.inputs({self._word}=...) gives"
            )

    @property
    def _word(self) -> str:
        return {"class": "labels", "text": "prompts", "caption": "captions"}[self.decoder.settings.condition]

    def _real(self, ids: Int[Tensor, "B C"]) -> Tensor:
        """Where no padding stands."""
        pad = self.config.pad_token_id
        return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad

    def _condition_tokens(self, asked: Tensor) -> Tensor:
        """The decoder's own ids of what stands in the prefix; what the REP token's place says is never read."""
        if self.decoder.settings.condition == "caption":
            return torch.zeros_like(asked)
        return asked - self.config.first_condition_id

    def _ids(self, condition: Condition) -> Int[Tensor, "B C"]:
        """A condition in ids of the one vocabulary."""
        config = self.config
        ids = condition.tokens + config.first_condition_id
        if condition.null_caption is not None:
            ids = torch.where(condition.null_caption[:, None], config.null_token_id, ids)
        if condition.prefix_mask is not None:
            ids = torch.where(condition.prefix_mask, ids, config.pad_token_id)
        if config.rep_token_id is not None:
            ids[:, -1] = config.rep_token_id
        return ids


def _under_our_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Nothing; names as files have them become the module's, as for a loop of training that loads a file by itself."""
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + PREFIX)]:
        state[prefix + PREFIX + key.removeprefix(prefix)] = state.pop(key)


def _text_tokenizer(name: Any, options: Mapping[str, Any]) -> Any:
    """The text tokenizer beside a model's weights."""
    from arra.tokenizers.text import load_text_tokenizer

    known = {option: options[option] for option in HUB_OPTIONS if option in options}
    return load_text_tokenizer(cached_file(name, TOKENIZER_FILE, **known))


AutoConfig.register(MODEL_TYPE, ArraDecoderConfig, exist_ok=True)
AutoModelForCausalLM.register(ArraDecoderConfig, ArraDecoderForCausalLM, exist_ok=True)
