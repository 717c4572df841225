"""Averages of weights: closed form, the warm-up, several at once, in the weights' place and out of it again.

Those of shards are tested with the optimisers (test_optimizer.py).
"""

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from arra.train.average import Averages

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def weights(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b.c": (5,), "scalar": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(device)) for name, shape in shapes.items()}


def trained(averages: Averages, named: dict[str, nn.Parameter], steps: int) -> list[dict[str, Tensor]]:
    """The weights at the beginning and after each step."""
    history = [{name: p.detach().clone() for name, p in named.items()}]
    for step in range(1, steps + 1):
        with torch.no_grad():
            for place, p in enumerate(named.values()):
                p.add_(torch.sin(torch.arange(p.numel(), device=p.device).view_as(p) + 7.0 * step + place))
        averages.update(step)
        history.append({name: p.detach().clone() for name, p in named.items()})
    return history


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_closed_form_without_warm_up(decay: float) -> None:
    named = weights()
    averages = Averages(named, [decay], warmup=False)
    history = trained(averages, named, 6)
    for name in named:
        terms = [(1 - decay) * decay ** (6 - n) * history[n][name].double() for n in range(1, 7)]
        wanted = decay**6 * history[0][name].double() + sum(terms)
        torch.testing.assert_close(averages.tensors()[f"average.{name}"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_warm_up_averages_over_fewer_steps_at_first() -> None:
    named = weights()
    averages = Averages(named, [0.9, 0.5], warmup=True)
    history = trained(averages, named, 12)
    for most, key in ((0.9, "average.a"), (0.5, "average.0.5.a")):
        wanted = history[0]["a"].double()
        for step in range(1, 13):
            decay = min(most, (1 + step) / (10 + step))  # 2/11, 3/12, ...; a half from the 8th step on
            wanted = decay * wanted + (1 - decay) * history[step]["a"].double()
        torch.testing.assert_close(averages.tensors()[key].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offload", [False, True])
def test_each_of_several_is_what_it_is_alone_wherever_it_lies(offload: bool, device: str) -> None:
    together = weights(device)
    averages = Averages(together, [0.9, 0.5, 0.999], warmup=True, offload=offload)
    trained(averages, together, 5)
    found = averages.tensors()
    assert len(found) == 9
    for decay, prefix in [(0.9, "average."), (0.5, "average.0.5."), (0.999, "average.0.999.")]:
        named = weights()
        alone = Averages(named, [decay], warmup=True)
        trained(alone, named, 5)
        for name in named:
            value = found[prefix + name]
            assert value.device.type == ("cpu" if offload else device)
            torch.testing.assert_close(value.cpu(), alone.tensors()[f"average.{name}"], rtol=1e-6, atol=1e-6)
            assert device == "cuda" or torch.equal(value, alone.tensors()[f"average.{name}"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offload", [False, True])
def test_in_the_weights_place_and_back_bit_for_bit(offload: bool, device: str) -> None:
    named = weights(device)
    with torch.no_grad():
        named["a"][0, 0], named["a"][0, 1] = float("nan"), -0.0
    averages = Averages(named, [0.5, 0.9], warmup=False, offload=offload)
    trained(averages, named, 3)
    before = {name: p.detach().clone().view(torch.int32) for name, p in named.items()}
    kept = {name: value.clone() for name, value in averages.tensors().items()}
    memory = {name: p.data_ptr() for name, p in named.items()}
    for which, prefix in [(0, "average."), (1, "average.0.9.")]:
        with suppress(KeyboardInterrupt), averages.in_place_of(named, which):
            for name, p in named.items():
                torch.testing.assert_close(p.detach().cpu(), kept[prefix + name].cpu(), rtol=0, atol=0, equal_nan=True)
            raise KeyboardInterrupt  # as when painting is interrupted
        assert all(torch.equal(p.detach().view(torch.int32), before[name]) for name, p in named.items())
        assert {name: p.data_ptr() for name, p in named.items()} == memory  # the optimiser's own
    for name, value in averages.tensors().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0, equal_nan=True)


def test_nothing_is_updated_or_saved_while_they_stand_in() -> None:
    named = weights()
    averages = Averages(named, [0.5])
    with averages.in_place_of(named):
        for misuse in (lambda: averages.update(1), averages.tensors, lambda: averages.in_place_of(named).__enter__()):
            with pytest.raises(AssertionError, match="the averages are in the parameters' place"):
                misuse()


def test_what_is_loaded_into_them_is_what_they_go_on_from() -> None:
    named, later = weights(), weights()
    averages, resumed = Averages(named, [0.9, 0.5]), Averages(later, [0.9, 0.5])
    trained(averages, named, 4)
    with torch.no_grad():
        for name, value in resumed.tensors().items():
            value.copy_(averages.tensors()[name])
        for name, p in later.items():
            p.copy_(named[name])
    for each in (averages, resumed):
        each.update(5)
    assert all(torch.equal(value, resumed.tensors()[name]) for name, value in averages.tensors().items())


def test_without_decays_there_is_nothing() -> None:
    named = weights()
    averages = Averages(named, [])
    averages.update(1)
    assert (averages.tensors(), averages.decays) == ({}, ())
    with averages.in_place_of(named):
        assert torch.equal(named["a"], weights()["a"])


def test_decays_must_differ() -> None:
    with pytest.raises(ValueError, match=r"decays \[0.5, 0.5\]: expected different ones"):
        Averages(weights(), [0.5, 0.5])
