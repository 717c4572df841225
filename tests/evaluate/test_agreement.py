"""CLIP-Scores: those of the home libraries, from one model's two halves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as home
from safetensors.torch import load_file, save_file
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.agreement import Agreement, clip_measures, open_agreement
from arra.evaluate.sets import Space
from tests.encoders.toy_vision import toy_clip_folder

PROMPTS = ["the red fox", "a fox", "the red fox", "a prompt that is much too long"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def network(folder: Path) -> Any:
    return toy_clip_folder(folder)


@pytest.fixture(scope="module")
def agreement(folder: Path, network: Any) -> Agreement:
    return open_agreement("clip-b32", weights=folder)


@pytest.fixture(scope="module")
def processor(folder: Path, network: Any) -> Any:
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    images = home.CLIPImageProcessor(size=size[0], crop_size=size[1])
    return home.CLIPProcessor(images, home.CLIPTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_scores_equal_transformers(agreement: Agreement, network: Any, processor: Any, pictures: Tensor) -> None:
    given = processor(
        text=PROMPTS, images=list(pictures.permute(0, 3, 1, 2)), return_tensors="pt", padding=True, truncation=True,
        max_length=12,
    )  # fmt: skip
    said = network(**given)
    wanted = (said.image_embeds * said.text_embeds).sum(-1).double()
    found = agreement.scores(pictures, PROMPTS)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (agreement.num_cut(PROMPTS), agreement.context) == (1, 12)
    # the picture half is a space, whose vectors may come from another pass
    assert isinstance(agreement.space, Space)
    features = torch.cat([agreement.space.encode(one[None])["features"] for one in pictures])
    torch.testing.assert_close(agreement.scores_of(features, PROMPTS), found, atol=1e-6, rtol=0)


def test_scores_equal_torchmetrics(agreement: Agreement, network: Any, processor: Any, pictures: Tensor) -> None:
    clip_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score

    class Tensors(torch.nn.Module):
        """The network as it answered before transformers 5, which is what torchmetrics expects."""

        config = network.config

        def get_image_features(self, pixels: Tensor) -> Tensor:
            features: Tensor = network.get_image_features(pixels).pooler_output
            return features

        def get_text_features(self, *given: Tensor) -> Tensor:
            features: Tensor = network.get_text_features(*given).pooler_output
            return features

    for prompts in (["the red fox", "a fox"], ["the", "red"]):
        images = list(pictures[:2].permute(0, 3, 1, 2))
        with torch.no_grad():
            theirs = clip_score(images, prompts, model_name_or_path=lambda: (Tensors(), processor)).item()
        cosines = agreement.scores(pictures[:2], prompts)
        assert max(100 * cosines.mean().item(), 0) == pytest.approx(theirs, abs=1e-4)


def test_a_prefix_is_part_of_the_prompt(agreement: Agreement, folder: Path, pictures: Tensor) -> None:
    depicts = open_agreement("clip-b32", weights=folder, prefix="A photo depicts ")
    written = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    assert depicts.scores(pictures, PROMPTS).tolist() == agreement.scores(pictures, written).tolist()
    assert depicts.num_cut(PROMPTS) == 4


def test_a_prompt_that_just_fits_is_not_cut(agreement: Agreement) -> None:
    prompts = [" ".join(["a"] * length) for length in range(1, 30)]
    counts = agreement.tower.num_tokens(prompts)
    assert agreement.context in counts
    assert [agreement.num_cut([prompt]) for prompt in prompts] == [int(count > 12) for count in counts]


def test_measures_are_means_of_pictures() -> None:
    cosines = np.array([0.3, -0.1, 0.1])
    measures = clip_measures(cosines)
    assert measures["clip_score"].value == pytest.approx(0.1)
    assert measures["clip_score_x100"].value == pytest.approx(40 / 3)
    assert measures["clip_score_x100"].per_picture.tolist() == pytest.approx([30, 0, 10])


@pytest.mark.usefixtures("network")
def test_what_does_not_fit_is_told(agreement: Agreement, folder: Path, pictures: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"agreement 'dinov2-b14': no text half is known.*clip-l14-336, biomedclip"):
        open_agreement("dinov2-b14")
    with pytest.raises(ArraError, match="agreement clip-b32: 4 pictures and 1 prompts; give one prompt each"):
        agreement.scores(pictures, PROMPTS[:1])
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if key != "visual_projection.weight"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ArraError, match="has no projection of pictures; name a folder of the whole model"):
        open_agreement("clip-b32", weights=tmp_path)
