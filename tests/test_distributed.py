"""Devices are chosen by name, a wrong name is told in one line, and what the first rank does all ranks know."""

from pathlib import Path

import pytest
import torch

from arra.distributed import Ranks, choose_device, set_threads
from arra.errors import ArraError, FirstProcessError
from tests.train.forked_ranks import on_ranks


def test_cpu_by_name_and_auto_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == choose_device("auto") == choose_device() == torch.device("cpu")


def test_auto_is_the_first_cuda_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ArraError, match="this machine has 2 of this type; use cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cudda", "'cudda' is unknown; expected auto, cpu"),
        ("", "is unknown"),
        ("cuda", "'cuda' is not available on this machine; use auto or cpu"),
        ("meta", "not available"),
        ("cpu:3", "does not exist, this machine has 1 of this type; use cpu:0"),
    ],
)
def test_wrong_names(name: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArraError, match=words):
        choose_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_real_cuda_device():
    assert torch.zeros(1, device=choose_device("auto")).is_cuda


def test_threads():
    before = torch.get_num_threads()
    try:
        set_threads(None)
        assert torch.get_num_threads() == before
        set_threads(2)
        assert torch.get_num_threads() == 2
        with pytest.raises(ArraError, match="threads: expected an integer > 0, found 0"):
            set_threads(0)
    finally:
        torch.set_num_threads(before)


def test_what_the_first_rank_finds_or_refuses_ends_all(tmp_path: Path):
    """Its error is the only one to be printed: that of the others says so by its kind."""

    def refused() -> str:
        raise ArraError("out: is in use")

    def work(ranks: Ranks) -> None:
        assert ranks.by_first(lambda: f"of rank {ranks.rank}") == "of rank 0"
        with pytest.raises(ArraError, match="out: is in use") as told:
            ranks.by_first(refused)
        assert isinstance(told.value, FirstProcessError) != ranks.is_first

    assert on_ranks(2, tmp_path / "store", work) == [0, 0]
