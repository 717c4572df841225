"""Networks saved whole are read without making anything that a file names."""

from pathlib import Path

import pytest
import torch
from torch import nn

from arra.encoders.pickled_modules import module_state
from arra.errors import ArraError


@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_dict_of_a_saved_network(zipped: bool, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    torch.save(network, tmp_path / "network.pt", _use_new_zipfile_serialization=zipped)
    found = module_state(tmp_path / "network.pt", classes=("torch.nn.",))
    assert found is not None
    wanted = network.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_network_that_holds_itself_comes_to_an_end(zipped: bool, tmp_path: Path) -> None:
    network = nn.Module()
    network._modules |= {"a": network, "b": network}
    torch.save(network, tmp_path / "network.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArraError, match=r"network\.pt: not a readable file of a network \(it holds itself"):
        module_state(tmp_path / "network.pt", classes=("torch.nn.",))
