"""Painting step by step with a language model is its whole pass, however its memory is filled, taken back and moved."""

from typing import Any

import pytest
import torch
from torch import Tensor

from arra.models import CausalLM
from arra.sample.generate import generate
from arra.sample.logits import SamplingSettings
from tests.models.test_causal import CODES, GRID, PROMPTS, SLIDING, painter
from tests.models.toy_lms import FAMILIES

P = GRID[0] * GRID[1]
RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"full_attn_idxs": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
}
FORGETFUL = {*SLIDING, *RECURRENT}


@pytest.fixture(params=[*FAMILIES, *RECURRENT])
def model(request: pytest.FixtureRequest) -> CausalLM:
    family = request.param
    found = painter(family, **{**SLIDING, **RECURRENT}.get(family, {}))
    assert found.keeps_all == (family not in FORGETFUL)
    return found


def codes_of(rows: int, seed: int = 1) -> Tensor:
    return torch.randint(CODES, (rows, P), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("runs", [[1] * (P - 1), [1, 3, 2, 5]])
def test_codes_in_runs_give_the_logits_of_the_whole_pass(model: CausalLM, runs: list[int]) -> None:
    """Behind the last code of each run, and behind every one of it; rows of different lengths, and of one."""
    for prompts in (PROMPTS, PROMPTS[1:2] * 2):
        codes = codes_of(len(prompts))
        expected = model.logits(codes, prompts=prompts, grid=GRID)
        rows = model.condition(prompts=prompts)
        for every in (False, True):
            memory, logits = model.prefill(rows, codes[:, :0], grid=GRID)
            close(logits, expected[:, 0])
            if model.keeps_all:
                memory = memory.spread(torch.arange(len(rows)), length=model.memory_length(rows, GRID))
            index = 0
            for count in runs:
                fed = codes[:, index : index + count]
                logits = model.decode(rows, memory, codes=fed, index=index, grid=GRID, every=every)
                index += count
                close(logits, expected[:, index - count + 1 : index + 1] if every else expected[:, index])


@torch.no_grad()
def test_what_was_read_is_taken_back(model: CausalLM) -> None:
    """Other codes from an earlier place on give what they give when nothing else was ever read."""
    codes, others = codes_of(3), codes_of(3, seed=2)
    rows = model.condition(prompts=PROMPTS)
    memory, _ = model.prefill(rows, codes[:, :2], grid=GRID)
    if not model.keeps_all:
        model.decode(rows, memory, codes=codes[:, 2:5], index=2, grid=GRID)
        with pytest.raises(ValueError, match="cannot go back"):
            model.decode(rows, memory, codes=others[:, 3:5], index=3, grid=GRID)
        return
    memory = memory.spread(torch.arange(3), length=model.memory_length(rows, GRID))
    for index in range(2, 9):
        model.decode(rows, memory, codes=codes[:, index, None], index=index, grid=GRID)
    mixed = torch.cat([codes[:, :5], others[:, 5:]], 1)
    expected = model.logits(mixed, prompts=PROMPTS, grid=GRID)
    close(model.decode(rows, memory, codes=mixed[:, 5:7], index=5, grid=GRID), expected[:, 7])
    for index in range(7, P - 1):
        found = model.decode(rows, memory, codes=mixed[:, index, None], index=index, grid=GRID)
        close(found, expected[:, index + 1])


@torch.no_grad()
def test_rows_move_with_what_they_have_read(model: CausalLM) -> None:
    """Spread, joined with those of another memory and cut, each goes on as it would alone."""
    if not model.keeps_all:
        pytest.skip("such memories stay as they are")
    codes, order = codes_of(4), torch.tensor([2, 0, 0])
    rows = model.condition(prompts=PROMPTS)
    length = model.memory_length(rows, GRID)
    first, _ = model.prefill(rows, codes_of(1)[:, :2].expand(3, -1), grid=GRID)
    last, _ = model.prefill(rows.select(torch.tensor([1])), codes_of(1)[:, :2], grid=GRID)
    memory = first.spread(order, length=length).join(last.spread(torch.tensor([0]), length=length))
    named = rows.select(torch.tensor([2, 0, 0, 1]))
    codes[:, :2] = codes_of(1)[:, :2]
    expected = model.logits(codes, prompts=[PROMPTS[place] for place in (2, 0, 0, 1)], grid=GRID)
    close(model.decode(named, memory, codes=codes[:, 2, None], index=2, grid=GRID), expected[:, 3])
    close(model.decode(named, memory, codes=codes[:, 3:6], index=3, grid=GRID), expected[:, 6])
    memory, named = memory.rows(2), named.select(torch.arange(2))
    close(model.decode(named, memory, codes=codes[:2, 6, None], index=6, grid=GRID), expected[:2, 7])


@torch.no_grad()
def test_null_rows_that_join_late_are_those_from_the_start(model: CausalLM) -> None:
    seen: dict[int, Tensor] = {}
    guidance: dict[str, Any] = {"cfg_scale": 2.5, "cfg_start": 0.3, "cfg_stop": 0.8}
    result = generate(
        model,
        prompts=PROMPTS,
        seeds=[3, 4, 5],
        watch=lambda first, index, logits: seen.__setitem__(index, logits.clone()),
        **guidance,
    )
    scales = SamplingSettings(**guidance).cfg_scales(P)
    assert scales[0] == scales[-1] == 1
    plain, null = (model.logits(result.codes, prompts=prompts) for prompts in (PROMPTS, [""] * 3))
    for index, logits in seen.items():
        close(logits, null[:, index] + scales[index] * (plain[:, index] - null[:, index]))
    assert len(seen) == P


@torch.no_grad()
def test_a_prefix_is_read_once_for_all_its_seeds(model: CausalLM) -> None:
    """And once for all null rows, which are equal."""
    rows: list[tuple[int, int]] = []
    model.base.register_forward_pre_hook(
        lambda module, args, told: rows.append(tuple(told["input_ids"].shape)), with_kwargs=True
    )
    generate(model, prompts=PROMPTS[:1], seeds=range(5), cfg_scale=2.0, batch_size=3)
    long = [count for count, length in rows if length > GRID[1]]
    assert long == ([2] if model.keeps_all else [6, 4])


@torch.no_grad()
def test_a_step_neither_copies_nor_enlarges_the_memory() -> None:
    model = painter()
    rows, codes = model.condition(prompts=PROMPTS), codes_of(3)
    memory, _ = model.prefill(rows, codes[:, :0], grid=GRID)
    memory = memory.spread(torch.arange(3), length=model.memory_length(rows, GRID))
    layer = memory.layers.layers[0]
    places = layer.all_keys.data_ptr(), layer.all_values.data_ptr()
    for index in range(4):
        model.decode(rows, memory, codes=codes[:, index, None], index=index, grid=GRID)
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == places
        assert layer.keys.shape[2] == layer.get_seq_length() == memory.filled
