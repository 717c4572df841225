"""What of a recipe says what a run computes, and what may change from one start of it to the next."""

from typing import Any

from arra.config import Recipe
from arra.runs import without_keys

FREE = (
    "data.expected_records",
    *(
        f"train.{name}"
        for name in (
            "checkpoint_every_steps",
            "checkpoint_in_background",
            "compile",
            "device",
            "ema_offload",
            "keep_best",
            "keep_checkpoints",
            "keep_every_steps",
            "micro_batch_size",
            "parallel",
            "recompute",
            "threads",
            "trackers",
            "trouble.hang_seconds",
            "trouble.most",
            "trouble.nonfinite",
            "trouble.skip_batches",
            "trouble.spike",
            "trouble.spike_deviations",
        )
    ),
)
"""What may change from one start of a run to the next: it leaves what is computed as it is, but for rounding."""


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings, as YAML has them, without those in `FREE`."""
    found: dict[str, Any] = without_keys(recipe.model_dump(mode="json"), FREE)
    return found
