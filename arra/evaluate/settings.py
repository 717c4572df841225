"""What an evaluation measures."""

from pydantic import Field

from arra.settings import Settings


class EvaluateSettings(Settings):
    """Splits, guidance and intervals of an evaluation."""

    splits: tuple[str, ...] = ("composed", "novel")
    """Held-out splits; neither was used for any choice during training."""
    cfg_scales: tuple[float, ...] = (1.0, 2.0)
    """Guidance of the generated pictures; 1 is off."""
    temperature: float = Field(1.0, ge=0)
    """Of the painted pictures; below 1 they are cleaner and less varied."""
    max_images: int | None = Field(None, gt=1)
    """At most this many pictures per split, evenly spaced; null is all of them."""
    num_resamples: int = Field(200, gt=1)
    frechet_components: int = Field(64, gt=0)
    """Principal axes of the reference in which the Frechet distance is taken."""
    batch_size: int = Field(64, gt=0)
    grid_prompts: int = Field(8, gt=0)
    """Prompts per split in the report's grid, evenly spaced."""
    grid_seeds: int = Field(3, gt=0)
    """Pictures per prompt in the report's grid, with seeds 0, 1, ..."""
    seed: int = Field(0, ge=0)
    """Picture i of a split is painted with seed `seed` + i; the resampling uses it too."""
