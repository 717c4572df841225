"""The names that Python users take from `arra`, on a run made by the commands."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import arra
from arra.stages.paint import paint
from arra.stages.painters import load_run
from arra.stages.request import PaintOptions, PaintRequest
from arra.stages.wishes import Asked

PROMPTS = ["red circle left", "blue bar"]


def test_importing_costs_nothing_and_names_are_listed():
    code = "import sys, arra; assert 'torch' not in sys.modules; print(*dir(arra))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    promised = {"load_tokenizer", "load_encoder", "load_model", "generate", "Alignment", "ArraError"}
    assert promised <= set(done.stdout.split())
    for name in arra.__all__:
        assert getattr(arra, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'arra' has no attribute 'load_modle'"):
        arra.load_modle  # noqa: B018


def test_a_run_folder_is_a_model(pipeline, tmp_path: Path):
    model = arra.load_model(pipeline.aligned)
    tokenizer = arra.load_tokenizer("openmoji-vq4")
    settings = load_run(pipeline.aligned).recipe.sample.model_dump()
    result = arra.generate(model, tokenizer, prompts=PROMPTS, seeds=[3, 4], **settings)
    assert result.images is not None
    assert (result.images.dtype, tuple(result.images.shape)) == (torch.uint8, (2, 16, 16, 3))
    assert (result.prompts, result.seeds) == (PROMPTS, [3, 4])
    # the command paints the same pictures
    paint(PaintRequest(pipeline.aligned, Asked(prompts=tuple(PROMPTS)), seeds=[3, 4]), options=PaintOptions(tmp_path))
    for number, image in ((0, result.images[0]), (3, result.images[1])):
        with Image.open(tmp_path / f"{number:06d}.png") as painted:
            assert np.array_equal(np.asarray(painted), image.numpy())
    greedy = [arra.generate(model, prompts=PROMPTS, seeds=[seed], temperature=0).codes for seed in (0, 1)]
    assert greedy[0].equal(greedy[1])


def test_logits_are_those_that_greedy_painting_follows(pipeline):
    model = arra.load_model(pipeline.aligned)
    codes = arra.generate(model, prompts=PROMPTS, seeds=[0], temperature=0).codes
    logits = model.logits(codes, prompts=PROMPTS)
    assert tuple(logits.shape) == (2, 16, 2048)
    assert logits.argmax(2).equal(codes.flatten(1))


def test_tokenizer_encoder_and_alignment_fit_together(pipeline):
    with Image.open(pipeline.pictures / "000.png") as picture:
        images = torch.from_numpy(np.asarray(picture.resize((16, 16))).copy())[None]
    tokenizer, encoder = arra.load_tokenizer("openmoji-vq4"), arra.load_encoder("efficientnet-lite0")
    codes = tokenizer.encode(images)
    assert tuple(codes.shape) == (1, 4, 4)
    assert tokenizer.decode(codes).shape == images.shape
    features = encoder.encode(images)
    assert (features.dtype, tuple(features.shape)) == (torch.float32, (1, 1280))
    align = arra.Alignment(hidden_size=32, feature_size=1280, layer=1, target="hybnext", loss="cosine", weight=1.0)
    loss = align(torch.randn(1, 24, 32), features, torch.ones(1, 24, dtype=torch.bool))
    assert 0 <= loss.item() <= 2


def test_what_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(arra.ArraError, match=r"no model\.json in it; expected a finished run"):
        arra.load_model(tmp_path)
    with pytest.raises(arra.ArraError, match="neither a folder nor a known model"):
        arra.load_model("nowhere")
    with pytest.raises(arra.ArraError, match="neither a folder nor a known name"):
        arra.load_tokenizer("nowhere")
    with pytest.raises(arra.ArraError, match="unknown; known are"):
        arra.load_encoder("nowhere")
