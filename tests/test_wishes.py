"""Classes and prompts as the command line gives them."""

from pathlib import Path

import pytest

from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, save_model
from arra.stages.painters import load_painter
from arra.stages.wishes import Asked, label_wishes, prompt_wishes, read_asked
from arra.tokenizers.image import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.encoders.toy_t5 import make_toy_t5

NAMES = ["tench, Tinca tinca", "crane", "tabby, tabby cat", "crane", "maillot"]


def model(names: list[str] | None = None, condition: str = "class") -> Decoder:
    shape = {"num_layers": 1, "num_heads": 1, "hidden_size": 8, "num_codes": 4, "grid": (1, 2), "num_classes": 5}
    made = Decoder(DecoderSettings(**shape, condition=condition))
    if names is not None:
        made.about["class_names"] = names
    return made


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        (["0"], [0]),
        (["1-3"], [1, 2, 3]),
        (["4", "0-1"], [4, 0, 1]),
        (["Tabby Cat"], [2]),
        (["tench, tinca tinca", "maillot", "tinca tinca"], [0, 4, 0]),
    ],
)
def test_labels(asked: list[str], labels: list[int]) -> None:
    wishes = label_wishes(model(NAMES), asked)
    assert wishes.labels == labels
    assert wishes.texts == [NAMES[label] for label in labels]
    assert wishes.facts == [{"label": label, "class": NAMES[label]} for label in labels]
    places = list(range(len(labels)))
    assert wishes.inputs(places[::-1] * 2) == {"labels": labels[::-1] * 2}


def test_a_model_that_knows_no_names_takes_numbers() -> None:
    for names in (None, NAMES[:3]):
        wishes = label_wishes(model(names), ["3"])
        assert (wishes.labels, wishes.texts, wishes.facts) == ([3], ["3"], [{"label": 3}])
    with pytest.raises(ArraError, match=r"does not know the names of its classes; give 0\.\.4"):
        label_wishes(model(), ["crane"])


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("5", "--label 5: expected classes of 0..4"),
        ("3-1", "--label 3-1: expected classes of 0..4"),
        ("0-5", "--label 0-5: expected classes of 0..4"),
        ("crane", "several classes are called so: 1, 3; give the number"),
        ("maillott", "no such class; did you mean 'maillot'?"),
        ("x", "no such class; give a number of 0..4 or one of tench"),
        ("-1", "--label -1: no such class"),
        ("", "--label : no such class"),
    ],
)
def test_classes_that_are_none(asked: str, line: str) -> None:
    with pytest.raises(ArraError) as caught:
        label_wishes(model(NAMES), [asked])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_model_does_not_take() -> None:
    with pytest.raises(ArraError, match="--label and --prompt do not go together"):
        read_asked(["x"], None, ["1"])
    with pytest.raises(ArraError, match="generate: no prompt; give --prompt TEXT or --prompts FILE, or --label"):
        read_asked([], None, [])
    assert read_asked([], None, ["1", "2"]) == Asked(labels=("1", "2"))
    assert read_asked(["a", "b"], None, []) == Asked(prompts=("a", "b"))
    with pytest.raises(ArraError, match=r"--prompt: this model paints classes; give --label, one of 0\.\.4"):
        prompt_wishes(model(), ["a cat"])
    with pytest.raises(ArraError, match="--label: this model is conditioned on caption; give --prompt"):
        label_wishes(model(condition="caption"), ["1"])
    with pytest.raises(ArraError, match="reads captions through flan-t5-xl; give its folder with --text-encoder"):
        prompt_wishes(model(condition="caption"), ["a cat"])


def test_a_text_encoder_of_another_width(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'text' is not installed")
    painter = model(condition="caption")  # captions of 2048
    painter.about["text_encoder"] = {"name": "flan-t5-small", "clean": True}
    with pytest.raises(ArraError, match="its vectors are 512 wide, the model takes 2048; give the folder of"):
        prompt_wishes(painter, ["a red bar"], folder=make_toy_t5(tmp_path / "t5"))


def test_a_tokenizer_of_other_pixels_per_code(tmp_path: Path) -> None:
    """As many codes, another picture: only the training script's arguments tell."""
    settings = VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, num_codes=4, code_dim=4)
    ImageTokenizer(VQModel(settings), name="half", weights_hash=None).save(tmp_path / "vq")
    for told, fits in (({"downsample_size": 2}, True), ({"downsample_size": 16}, False), ({}, True), ([16], True)):
        painter = model()
        painter.about["origin"] = {"args": told}
        folder = save_model(painter, tmp_path / "model")
        if fits:
            assert load_painter(folder, tokenizer=str(tmp_path / "vq")).tokenizer.name == "half"
            continue
        with pytest.raises(ArraError, match="2 pixels per code, the model was trained with 16"):
            load_painter(folder, tokenizer=str(tmp_path / "vq"))
