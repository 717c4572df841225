"""Logits processors for the `generate()` of `transformers` that need no grammar: our draw, and guidance of decoders.

    model = AutoModelForCausalLM.from_pretrained("exported")  # after arra.register_with_transformers()
    steps = code_processors(model, sampling=SamplingSettings(cfg_scale=2.0, cfg_schedule="cosine"), seeds=[0])
    tokens = model.generate(**model.inputs(labels=[207]), logits_processor=steps, do_sample=False)

Letters: B rows, T tokens so far, V vocabulary, K codes of the image tokenizer.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.errors import ArraError
from arra.sample.logits import SamplingSettings, draw_keys, guide, pick

if TYPE_CHECKING:
    from arra.models.transformers_decoder import ArraDecoderForCausalLM


class KeyedDraw:
    """Scores that leave one code: the one that `arra.generate` draws for the row's seed. For `do_sample=False`.

    `code_ids` are the tokens of codes 0..K-1, `num_positions` how many a picture has, `begin` the token that begins
    one; without it codes count from the row's begin. Rows where something else than a code may follow stay as they are.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        sampling: SamplingSettings,
        code_ids: Int[Tensor, "K"],
        num_positions: int,
        begin: int | None = None,
    ) -> None:
        self.sampling, self.code_ids, self.begin = sampling, code_ids, begin
        self.keys = draw_keys(seeds, num_positions)

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The scores.

        Raises: ArraError when there are not as many rows as seeds.
        """
        if len(scores) != len(self.keys):
            raise ArraError(
                f"seeds: {len(self.keys)} for {len(scores)} rows; give one for each (num_return_sequences counts), and "
                "no beams"
            )
        ids = self.code_ids.to(scores.device)
        written = torch.isin(input_ids, ids)
        if self.begin is not None:
            begun = (input_ids == self.begin).cumsum(1)
            written &= begun == begun[:, -1:]
        index = written.sum(1)
        others = scores.index_fill(1, ids, -torch.inf)
        rows = (others.amax(1) <= torch.finfo(scores.dtype).min) & (index < self.keys.shape[1])
        rows &= scores[:, ids].isfinite().any(1)
        left = scores.clone()
        if rows.any():
            keys = self.keys.to(scores.device)[rows, index[rows]]
            drawn = pick(scores[rows][:, ids], self.sampling, keys=keys)
            left[rows] = torch.full_like(left[rows], -torch.inf).scatter_(1, ids[drawn][:, None], 0.0)
        return left


class DecoderGuidance:
    """Scores under classifier-free guidance of an exported decoder, by any schedule, for any number of rows.

    Its own cache grows by one code a step, and is read anew where rows change places.
    """

    def __init__(self, model: "ArraDecoderForCausalLM", *, sampling: SamplingSettings) -> None:
        settings = model.decoder.settings
        self.model, self.prefix, self.codes = model, settings.prefix_length, settings.num_codes
        self.scales = sampling.cfg_scales(settings.num_positions)
        self._seen: Tensor | None = None
        self._cache: Any = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The scores."""
        index = input_ids.shape[1] - self.prefix
        scale = self.scales[index] if index < len(self.scales) else 1.0
        if scale == 1:
            return scores
        null = self.model.null_ids(input_ids[:, : self.prefix])
        uncond = self._unconditional(torch.cat([null, input_ids[:, self.prefix :]], 1))
        guided = scores.clone()
        guided[:, : self.codes] = guide(scores[:, : self.codes], uncond.to(scores), cfg_scale=scale)
        return guided

    def _unconditional(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B K"]:
        seen = 0 if self._seen is None else self._seen.shape[1]
        if self._seen is None or not torch.equal(tokens[:, :seen], self._seen):
            seen, self._cache = 0, None
        self._seen = tokens
        pad = self.model.config.pad_token_id
        real = torch.ones_like(tokens) if pad is None else (tokens != pad).long()
        output = self.model(tokens[:, seen:], attention_mask=real, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1, : self.codes]
        return logits


def code_processors(
    model: "ArraDecoderForCausalLM", *, sampling: SamplingSettings, seeds: Sequence[int] | None = None
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Guidance as `sampling` says, for an exported decoder's `generate(logits_processor=...)`.

    With `seeds`, one for each row, codes are drawn as `arra.generate` draws them: `do_sample=False`. Without, draws,
    temperature and top-k are left to `generate`. Make new ones for each call.
    """
    steps: list[Callable[[Tensor, Tensor], Tensor]] = [DecoderGuidance(model, sampling=sampling)]
    if seeds is not None:
        settings = model.decoder.settings
        ids = torch.arange(settings.num_codes)
        steps.append(KeyedDraw(seeds, sampling=sampling, code_ids=ids, num_positions=settings.num_positions))
    return steps
