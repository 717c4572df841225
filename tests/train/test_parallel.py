"""Weights in shards of one process: looked at, painted with and gathered, they are the model's, and stay in shards.

What several processes add up is the laws' business (laws/test_ranks.py).
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from arra.distributed import Ranks, joined_ranks
from arra.models import Decoder
from arra.sample.generate import generate
from arra.train.average import Averages
from arra.train.parallel import Engine, count_groups, fill, gathered
from arra.train.settings import ParallelSettings, TrainSettings
from tests.models.toy_lms import toy_lm
from tests.train.toy_training import make_model

CPU = torch.device("cpu")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with joined_ranks(CPU, even_alone=True) as ranks:
        yield ranks


def engine_of(model: Any, ranks: Ranks, **parallel: Any) -> Engine:
    settings = TrainSettings(steps=1, parallel=ParallelSettings(kind="fsdp", **parallel))
    return Engine(model, None, settings, ranks=ranks, device=CPU)


def sharded(model: Decoder) -> list[str]:
    return [name for name, value in model.named_parameters() if isinstance(value, DTensor)]


def painted(model: Decoder) -> Tensor:
    return generate(model, None, prompts=["ab", "c"], seeds=[0, 1], cfg_scale=2.0).codes


@pytest.mark.parametrize("reshard", [True, False])
def test_painting_with_gathered_weights_leaves_them_in_shards(reshard: bool, ranks: Ranks) -> None:
    """Also those of averages, which are in the weights' place meanwhile."""
    plain = make_model(0.1)
    model = make_model(0.1)
    engine = engine_of(model, ranks, reshard=reshard)
    averages = Averages(dict(model.named_parameters()), [0.5], warmup=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    assert len(sharded(model)) == len([*model.parameters()])
    with averages.in_place_of(dict(model.named_parameters())), engine.looking(whole=True):
        assert sharded(model) == []
        assert torch.equal(painted(model), painted(plain))
        assert sharded(model) == []
    assert len(sharded(model)) == len([*model.parameters()])
    with torch.no_grad():
        for name, value in plain.named_parameters():
            assert torch.equal(gathered(model.get_parameter(name), CPU), value.mul_(3)), name
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with torch.no_grad(), engine.looking():  # at the weights of now, not at those that were gathered before
        torch.testing.assert_close(model.eval()(tokens).last_hidden, plain.eval()(tokens).last_hidden)
        # as told for training: blocks let go of them after their forward pass, or keep them
        assert {name.startswith("layers.") for name in sharded(model)} == ({True} if reshard else set())


@pytest.mark.parametrize("family", ["smollm", "llama"])
def test_what_is_gathered_fills_an_empty_model(family: str) -> None:
    """A head that is tied to its embeddings stays one matrix, and a frozen weight frozen."""
    lm = toy_lm(family, rows=20)
    with torch.device("meta"):
        empty = toy_lm(family, rows=20)
    for model in (lm, empty):
        model.get_input_embeddings().requires_grad_(False)
    state = {name: value.clone() for name, value in lm.state_dict().items()}
    fill(empty, state)
    assert not any(parameter.is_meta for parameter in empty.parameters())
    for name, value in lm.named_parameters():
        assert torch.equal(empty.get_parameter(name), value)
        assert empty.get_parameter(name).requires_grad == value.requires_grad
    tied = empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    assert tied == (family == "smollm")


def test_groups_of_shards_are_told_or_the_machines() -> None:
    ranks = Ranks(size=8, local_size=4)
    assert count_groups(ParallelSettings(kind="hsdp"), ranks) == 2
    assert count_groups(ParallelSettings(kind="hsdp", replicas=4), ranks) == 4
