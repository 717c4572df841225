"""The judge of a recipe, and a tokenizer judged by it: for its card after training, and for `arra reconstruct`.

Legend: B pictures, H W pixels, F feature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from arra.data.images import Grey16
from arra.data.records import Failure
from arra.data.store import Store
from arra.encoders import EncoderChoice, Output, open_encoder
from arra.errors import ArraError
from arra.evaluate.reconstruction import Reconstruction, ReconstructionMeter
from arra.evaluate.sets import Space
from arra.stages.squares import center_loads, spaced
from arra.tokenizers import ImageTokenizer
from arra.train.perceptual import PerceptualDistance

PIXELS_AT_A_TIME = 2**20
"""Through the networks: 16 pictures of 256 pixels a side."""


class Judge:
    """An encoder that says of a picture what its choice asks for, where nothing else is asked."""

    def __init__(self, choice: EncoderChoice, *, device: torch.device | str = "cpu") -> None:
        """Loaded on the device.

        Raises:
            ArraError: its weights or a package are missing.
        """
        self.choice, self.encoder = choice, open_encoder(choice, device=device)
        self.spec = self.encoder.spec

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights it has."""
        return self.encoder.weights_hash

    def encode(
        self,
        images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"],
        *,
        aggregate: Output | None = None,
        layers: Sequence[int] | None = None,
        grid: int | None = None,
    ) -> Float[Tensor, "B F"] | Float[Tensor, "B P F"]:
        """See `Encoder.encode`; what is None is the choice's."""
        choice = self.choice
        return self.encoder.encode(
            images, aggregate=aggregate or choice.output, layers=layers or choice.layers, grid=grid or choice.grid
        )


@dataclass
class Judged:
    """What became of pictures that went through a tokenizer."""

    reconstruction: Reconstruction
    samples: list[tuple[str, UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"]]] = field(default_factory=list)
    """Id, picture and reconstruction of some of them, evenly spaced."""
    failures: list[Failure] = field(default_factory=list)


def judge_tokenizer(
    tokenizer: ImageTokenizer,
    store: Store,
    rows: np.ndarray,
    *,
    image_size: int,
    judge: EncoderChoice,
    device: torch.device,
    grey16: Grey16 = "full",
    perceptual: PerceptualDistance | None = None,
    inception: Space | None = None,
    workers: int | None = None,
    num_samples: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """The measures of some records' middle squares through a tokenizer and back; broken ones are left out, and told.

    Raises:
        ArraError: fewer than two pictures can be read.
    """
    tokenizer.model.to(device)
    meter = ReconstructionMeter(
        tokenizer,
        Judge(judge, device=device),
        device,
        None if perceptual is None else perceptual.to(device),
        inception,
    )
    shown = set(spaced(rows, num_samples).tolist()) if num_samples else set()
    samples, failures, waiting = [], [], list[tuple[int, np.ndarray]]()
    together = max(1, PIXELS_AT_A_TIME // image_size**2)

    def flush() -> None:
        back = meter.add(torch.from_numpy(np.stack([pixels for _, pixels in waiting]))).numpy()
        for (row, pixels), image in zip(waiting, back, strict=True):
            if row in shown:
                samples.append((str(store.fields(row, "id")[0]), pixels, image))
        waiting.clear()

    for done, loaded in center_loads(store, rows, pixels=image_size, grey16=grey16, workers=workers):
        first = store.shard_starts[loaded.task.shard] + loaded.task.start
        for place, views in zip(loaded.places, loaded.views["x"], strict=True):
            waiting.append((first + place, views[0]))
            if len(waiting) == together:
                flush()
        failures += loaded.failures
        progress(done, len(rows))
    if waiting:
        flush()
    if not meter.values and failures:
        raise ArraError(f"{failures[0].where}: {failures[0].reason}; none of {len(rows)} pictures can be read")
    return Judged(meter.measured(), samples, failures)
