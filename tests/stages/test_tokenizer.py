"""A tokenizer trained by a recipe: its card, what it forgets and keeps, what is refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arra.config import Recipe, load_recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.prepare import PrepareOptions, prepare
from arra.stages.squares import center_pictures
from arra.tokenizers import ImageTokenizer, load_tokenizer
from arra.train.perceptual import PerceptualDistance

INLINE = PrepareOptions(workers=0, threads=1)
DECODER = ("tokenizer.train={part: decoder, steps: 2, batch_size: 4, warmup_steps: 1, device: cpu}",)


@dataclass(frozen=True)
class Toy:
    """Captioned pictures, and recipes over them."""

    pictures: Path
    settings: tuple[str, ...]

    def recipe(self, *changes: str) -> Recipe:
        own = ["data.source=auto", f"data.path={self.pictures}", "data.image_size=16"]
        settings = [text for text in self.settings if not text.startswith(("align.", "data.image_size", "tokenizer."))]
        return load_recipe("demo", row="baseline", overrides=[*own, *settings, *changes])


@pytest.fixture
def toy(tmp_path: Path, draw_pictures: Callable[[Path], Path], toy_settings: tuple[str, ...]) -> Toy:
    return Toy(draw_pictures(tmp_path / "pictures"), toy_settings)


def codes_of(store: Store) -> np.ndarray:
    return store.reader("codes").take(np.arange(len(store)))


@pytest.mark.slow
def test_a_decoder_trained_further_keeps_the_stores_codes(toy: Toy, tmp_path: Path) -> None:
    """A store made before stays valid: no code is made again, and the language models over it go on to fit."""
    before = prepare(toy.recipe(), tmp_path / "store", options=INLINE, only=("codes",)).checked()
    codes, entry = codes_of(before), before.entry("codes")
    made: list[str] = []

    def progress(what: str, done: int, total: int, note: str = "") -> None:
        made.append(what)

    found = prepare(toy.recipe(*DECODER), tmp_path / "store", options=INLINE, only=("codes",), progress=progress)
    store = found.checked()
    assert "training the tokenizer" in made
    assert (found.done, found.already) == (0, 60)
    assert store.entry("codes") == entry
    tuned, start = load_tokenizer(tmp_path / "store" / "tokenizer"), load_tokenizer("openmoji-vq4")
    assert tuned.weights_hash != start.weights_hash
    assert tuned.codes_of == start.codes_of == {"tokenizer": "openmoji-vq4", "weights": start.weights_hash}
    pixels = center_pictures(toy.recipe(), store, rows=np.arange(60))
    assert torch.equal(tuned.encode(pixels), torch.from_numpy(codes.astype(np.int64)))
    assert not torch.equal(tuned.decode(tuned.encode(pixels[:4])), start.decode(start.encode(pixels[:4])))
    back = prepare(toy.recipe(), tmp_path / "store", options=INLINE, only=("codes",))
    assert back.already == 60
    # another training of the decoder needs no --replace either; one of all parts does
    again = toy.recipe(*DECODER, "tokenizer.train.steps=1")
    assert prepare(again, tmp_path / "store", options=INLINE, only=("codes",)).already == 60
    with pytest.raises(ArraError, match="trained otherwise than the recipe says"):
        prepare(toy.recipe(*DECODER, "tokenizer.train.part=all"), tmp_path / "store", options=INLINE)


def test_the_lineage_of_codes_survives_a_second_tuning(toy: Toy, tmp_path: Path) -> None:
    prepare(toy.recipe(*DECODER), tmp_path / "one", options=INLINE, only=("codes",)).checked()
    named = f"tokenizer.name={tmp_path / 'one' / 'tokenizer'}"
    prepare(toy.recipe(named, *DECODER), tmp_path / "two", options=INLINE, only=("codes",)).checked()
    first, second = load_tokenizer(tmp_path / "one" / "tokenizer"), load_tokenizer(tmp_path / "two" / "tokenizer")
    assert first.weights_hash != second.weights_hash
    assert second.codes_of == first.codes_of == load_tokenizer("openmoji-vq4").codes_of
    with pytest.raises(ArraError, match="is where the trained tokenizer goes; copy it elsewhere first"):
        prepare(toy.recipe(named, *DECODER), tmp_path / "one", options=INLINE)


def test_frozen_weights_are_saved_in_full_precision(toy: Toy, tmp_path: Path) -> None:
    """float16 would round the encoder of a tokenizer that came in float32, and change its codes."""
    torch.manual_seed(0)
    start = load_tokenizer("openmoji-vq4")
    with torch.no_grad():
        for parameter in start.model.parameters():
            parameter.add_(1e-5 * torch.randn_like(parameter))
    ImageTokenizer(start.model, name="full", weights_hash=None).save(tmp_path / "full")
    named = f"tokenizer.name={tmp_path / 'full'}"
    prepare(toy.recipe(named, *DECODER), tmp_path / "store", options=INLINE, only=("codes",)).checked()
    state = load_tokenizer(tmp_path / "full").model.state_dict()
    tuned = load_tokenizer(tmp_path / "store" / "tokenizer").model.state_dict()
    frozen = [name for name in state if not name.startswith(("decoder.", "post_quant_conv."))]
    assert all(torch.equal(state[name], tuned[name]) for name in frozen)


FRESH = (
    "tokenizer.network={channels: 32, ch_mult: [1, 1], num_res_blocks: 1, z_channels: 8, num_codes: 64, code_dim: 4}",
    "tokenizer.train={steps: 4, batch_size: 4, warmup_steps: 1, log_every_steps: 2, device: cpu}",
)


def test_the_card_tells_what_was_trained_and_what_it_keeps(toy: Toy, tmp_path: Path) -> None:
    with_adversary = "tokenizer.train.adversarial={start_step: 2, num_layers: 2, channels: 8}"
    recipe = toy.recipe(*FRESH, with_adversary)
    store = prepare(recipe, tmp_path / "store", options=INLINE, only=("codes",)).checked()
    folder = tmp_path / "store" / "tokenizer"
    tokenizer = load_tokenizer(folder)
    card = tokenizer.about["validation"]
    assert (card["split"], card["at_most_images"], card["image_size"]) == ("validation", 2000, 16)
    rows = store.rows("validation")
    assert card["num_images"] == len(rows)
    pixels = center_pictures(recipe, store, rows=rows)
    back = tokenizer.decode(tokenizer.encode(pixels))
    error = ((pixels.double() - back.double()) / 255).square().mean((1, 2, 3))
    assert card["psnr_db"]["value"] == pytest.approx((-10 * error.log10()).mean().item(), abs=0.02)
    assert card["rfid"] is None
    assert "rfid" in card["not_measured"]
    assert tokenizer.about["made_from"]["train"]["adversarial"]["start_step"] == 2
    rows_of_log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows_of_log] == [2, 4]
    assert "discriminator" not in rows_of_log[0]
    assert rows_of_log[1]["discriminator"] > 0
    assert 0 < rows_of_log[1]["code_use"] <= 1


def test_pictures_read_while_training_give_the_same_at_any_number_of_workers(toy: Toy, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        crop = ["tokenizer.train.crop={kind: random, min_fraction: 0.6}", f"tokenizer.train.workers={workers}"]
        folder = tmp_path / f"{workers}"
        prepare(toy.recipe(*FRESH, *crop), folder, options=INLINE, only=("codes",)).checked()
        found.append(load_tokenizer(folder / "tokenizer").weights_hash)
    assert found[0] == found[1]


def test_an_older_card_without_the_new_settings_is_the_same_training(toy: Toy, tmp_path: Path) -> None:
    prepare(toy.recipe(*FRESH), tmp_path / "store", options=INLINE, only=("codes",)).checked()
    card_path = tmp_path / "store" / "tokenizer" / "tokenizer.json"
    card = json.loads(card_path.read_text())
    kept = ["steps", "batch_size", "warmup_steps", "learning_rate", "betas", "weight_decay", "clip_norm", "l1_weight"]
    kept += ["commitment", "entropy_weight", "restart_every_steps", "ema_decay", "augment", "seed"]
    train = {key: card["about"]["made_from"]["train"][key] for key in kept}
    card["about"]["made_from"]["train"] = train | {"checkpoint_every_steps": 77}
    for field in ("normalize", "attention_levels", "has_decoder"):
        del card["about"]["made_from"]["network"][field]
    card_path.write_text(json.dumps(card))
    found = prepare(
        toy.recipe(*FRESH, "tokenizer.train.workers=1"), tmp_path / "store", options=INLINE, only=("codes",)
    )
    assert (found.done, found.already) == (0, 60)
    with pytest.raises(ArraError, match="trained otherwise"):
        prepare(toy.recipe(*FRESH, "tokenizer.train.l2_weight=0.5"), tmp_path / "store", options=INLINE)


def test_the_files_of_lpips_count_by_what_is_in_them(toy: Toy, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {n: v for n, v in PerceptualDistance().state_dict().items() if n.startswith("features.")}
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(state | heads, tmp_path / "lpips.pth")
    lpips = f"tokenizer.train.perceptual={{files: [{tmp_path / 'lpips.pth'}], weight: 0.3}}"
    prepare(toy.recipe(*FRESH, lpips), tmp_path / "store", options=INLINE, only=("codes",)).checked()
    about = load_tokenizer(tmp_path / "store" / "tokenizer").about
    assert about["validation"]["lpips"]["value"] > 0
    assert "files" not in about["made_from"]["train"]["perceptual"]
    (tmp_path / "lpips.pth").rename(tmp_path / "moved.pth")
    moved = lpips.replace("lpips.pth", "moved.pth")
    assert prepare(toy.recipe(*FRESH, moved), tmp_path / "store", options=INLINE, only=("codes",)).already == 60
    with pytest.raises(ArraError, match=r"lpips\.pth: no such file; fetch it, or leave LPIPS out"):
        prepare(toy.recipe(*FRESH, lpips), tmp_path / "store", options=INLINE)
    torch.save(state | heads | {"features.0.bias": torch.zeros(64) + 1}, tmp_path / "moved.pth")
    with pytest.raises(ArraError, match="trained otherwise"):
        prepare(toy.recipe(*FRESH, moved), tmp_path / "store", options=INLINE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["data.image_size=31"], "data.image_size: 31 is no multiple of 2, the pixels per code of this tokenizer"),
        (
            ["tokenizer.train.adversarial={}"],
            "num_layers: 3 layers need pictures of at least 24 pixels a side, these have 16; at most 2 fit",
        ),
        (["tokenizer.train.learning_rate=1e30", "tokenizer.train.warmup_steps=0"], "training diverged at step "),
        (
            ["tokenizer.network.normalize=false", "tokenizer.train.entropy_weight=0.1"],
            "tokenizer.train.entropy_weight: made for normalised codes, this tokenizer's are not; set it to 0",
        ),
        (["tokenizer.network.has_decoder=false"], "tokenizer: its weights are the encoder half alone"),
    ],
)
def test_what_does_not_fit_is_told_before_hours_of_training(
    toy: Toy, tmp_path: Path, changes: list[str], told: str
) -> None:
    with pytest.raises(ArraError, match=told):
        prepare(toy.recipe(*FRESH, *changes), tmp_path / "store", options=INLINE, only=("codes",))


def test_too_many_pictures_for_memory_are_told(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arra.stages.tokenizer_training.MOST_HELD_GIB", 1e-4)
    with pytest.raises(ArraError, match=r"set tokenizer\.train\.crop to \{kind: random\}"):
        prepare(toy.recipe(*FRESH), tmp_path / "store", options=INLINE, only=("codes",))


def test_a_fresh_network_has_no_codes_to_keep(toy: Toy) -> None:
    with pytest.raises(ArraError, match="part: decoder keeps the codes of a tokenizer; name one, and remove 'network'"):
        toy.recipe(*FRESH, "tokenizer.train.part=decoder")


@pytest.mark.slow
def test_tuning_on_another_domain_brings_pictures_nearer(toy: Toy, tmp_path: Path) -> None:
    """Gradients in place of drawings: the decoder learns to smooth what the drawings' decoder outlines."""
    folder = tmp_path / "gradients"
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    y, x = np.mgrid[0:48, 0:48] / 48
    for number in range(30):
        waves = [0.5 + 0.5 * np.sin(3 * (a * x + b * y) + 6 * c) for a, b, c in rng.normal(size=(3, 3))]
        pixels = (np.stack(waves, 2) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "validation" if number % 5 == 0 else "train"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"waves {number}", "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    about: dict[str, Any] = {}
    for steps in (1, 40):
        train = f"tokenizer.train={{part: decoder, steps: {steps}, batch_size: 8, learning_rate: 1e-3, augment: 0}}"
        recipe = Toy(folder, toy.settings).recipe(train, "tokenizer.train.ema_decay=0.9", "tokenizer.train.device=cpu")
        prepare(recipe, tmp_path / f"{steps}", options=INLINE, only=("codes",)).checked()
        about[str(steps)] = load_tokenizer(tmp_path / f"{steps}" / "tokenizer").about["validation"]
    assert about["40"]["psnr_db"]["value"] > about["1"]["psnr_db"]["value"] + 1.0
    assert about["40"]["code_perplexity"] == about["1"]["code_perplexity"]
