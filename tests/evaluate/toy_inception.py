"""An Inception of random weights in the layout of the published file."""

from pathlib import Path
from typing import Any

import pytest
import torch


def random_inception(path: Path) -> Path:
    """Random weights in the layout of torch-fidelity's published file."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="FID's network; pip install 'arra[metrics]'"
    )

    class Shapes(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined]
        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            """Nothing to load."""

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(module.torch, "load", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "to", lambda self, *args: self)
        shapes = Shapes("inception-v3-compat", ["2048"], feature_extractor_weights_path="none").state_dict()
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in shapes.items():
        if value.dim() > 1:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.ones(value.shape)
        else:
            state[name] = (
                torch.full(value.shape, 0.01) if value.is_floating_point() else torch.zeros(value.shape).long()
            )
    torch.save(state, path)
    return path
