"""The built-in LlamaGen recipes say what its authors ran, and the aligned rows differ in the alignment alone."""

from typing import Any

import pytest

from arra.config import Recipe, load_recipe

IMAGENET_TRAIN = 1_281_167
# row: (epochs, batch, learning rate), as the authors gave them; from XL on 50 epochs at 256 pixels
C2I: dict[str, tuple[int, int, float]] = {
    "b": (300, 256, 1e-4),
    "l": (300, 256, 1e-4),
    "xl": (50, 256, 2e-4),
    "xxl": (50, 512, 2e-4),
    "3b": (50, 512, 2e-4),
}
T2I = ("l", "xl", "xxl", "3b")
PAIRS = [("llamagen_c2i", row) for row in C2I] + [("llamagen_t2i", row) for row in T2I]


def without_alignment(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.model_dump(), "align": None, "row": None}


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_what_all_of_them_share(name: str, row: str) -> None:
    recipe = load_recipe(name, row=row)
    t, m = recipe.train, recipe.model
    assert (t.optimizer, t.betas, t.weight_decay, t.clip_norm) == ("adamw", (0.9, 0.95), 0.05, 1.0)
    assert (t.schedule, t.warmup_steps, t.z_weight, t.word_dropout, t.ema_decay) == ("constant", 0, 0.0, 0.0, None)
    assert (t.condition_dropout, m.initializer_range, m.size, m.multiple_of) == (0.1, 0.02, row, 256)
    assert (m.token_dropout, m.resid_dropout, m.ffn_dropout, m.attn_dropout, m.drop_path) == (0.1, 0.1, 0.1, 0.0, 0.0)
    assert (recipe.data.image_size, recipe.tokenizer.name, recipe.tokenizer.entry) == (256, "llamagen-vq16", "model")
    assert recipe.align is None


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_an_aligned_row_differs_in_the_alignment_alone(name: str, row: str) -> None:
    plain, aligned = load_recipe(name, row=row), load_recipe(name, row=f"arra-base-{row}")
    assert without_alignment(plain) == without_alignment(aligned)
    assert aligned.align is not None
    # lambda 1 on the output of the first block, as the paper has it
    assert (aligned.align.layer, aligned.align.weight, aligned.align.target, aligned.align.loss) == (
        1, 1.0, "hybnext", "cosine",
    )  # fmt: skip
    assert (aligned.align.components, aligned.align.shuffle_targets) == (None, False)


@pytest.mark.parametrize("row", C2I)
def test_classes(row: str) -> None:
    recipe, (epochs, batch, rate) = load_recipe("llamagen_c2i", row=row), C2I[row]
    assert (recipe.train.batch_size, recipe.train.learning_rate) == (batch, rate)
    # theirs leave an epoch's last pictures out, which do not fill a batch: less than a step an epoch
    whole = recipe.resolved(IMAGENET_TRAIN).train.steps
    assert whole == -(-epochs * IMAGENET_TRAIN // batch)
    assert whole - epochs * (IMAGENET_TRAIN // batch) in range(epochs)
    assert whole == {(300, 256): 1_501_368, (50, 256): 250_228, (50, 512): 125_114}[epochs, batch]
    assert recipe.model.condition == "class"
    assert (recipe.data.crop.kind, recipe.data.crop.ranges) == ("ten_crop", (1.1, 1.05))
    assert (recipe.sample.cfg_scale, recipe.sample.top_k, recipe.sample.top_p, recipe.sample.temperature) == (
        2,
        0,
        1,
        1,
    )


@pytest.mark.parametrize("row", T2I)
def test_captions(row: str) -> None:
    recipe = load_recipe("llamagen_t2i", row=row)
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.train.alternative_share) == (256, 1e-4, 0.0)
    assert (recipe.model.condition, recipe.model.prefix_length) == ("caption", 120)
    assert recipe.text_encoder is not None
    assert (recipe.text_encoder.name, recipe.text_encoder.clean, recipe.text_encoder.dtype) == (
        "flan-t5-xl", True, "bfloat16",
    )  # fmt: skip
    assert recipe.data.crop.kind == "center"
    assert (recipe.sample.cfg_scale, recipe.sample.top_k) == (7.5, 1000)


def test_the_second_stage_of_captions() -> None:
    recipe = load_recipe("llamagen_t2i", row="xl-stage2")
    assert (recipe.data.image_size, recipe.train.alternative_share, recipe.model.size) == (512, 0.3, "xl")
    assert recipe.text_encoder is not None
    assert recipe.text_encoder.short
