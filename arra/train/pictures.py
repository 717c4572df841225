"""The pictures a tokenizer is trained on: drawn by (seed, step) from memory, or read and cropped anew while training.

Legend: N pictures in memory, B batch, S pixels a side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from arra.data.crops import CropSettings, Draw
from arra.data.loading import Loaded, Loader, Task, View, load_tasks
from arra.data.order import Order
from arra.errors import ArraError

CROP = "crop"


@runtime_checkable
class Pictures(Protocol):
    """Gives the batch of every step."""

    def draw(self, step: int, generator: torch.Generator) -> Float[Tensor, "B 3 S S"]:
        """The pictures of a step in [-1, 1], the same whenever it is asked for; `generator` is the step's own."""
        ...

    def close(self) -> None:
        """Nothing; processes that read have left."""
        ...


@dataclass(frozen=True)
class HeldPictures:
    """Pictures held in memory at twice the size, drawn with replacement, mirrored, some of them distorted."""

    pictures: UInt8[Tensor, "N 3 S2 S2"]
    batch_size: int
    augment: float
    """Share that is scaled, shifted and recoloured."""

    def draw(self, step: int, generator: torch.Generator) -> Float[Tensor, "B 3 S S"]:
        chosen = torch.randint(len(self.pictures), (self.batch_size,), generator=generator)
        return augmented(self.pictures[chosen], share=self.augment, generator=generator)

    def close(self) -> None:
        return None


def augmented(
    pictures: UInt8[Tensor, "B 3 S S"], *, share: float, generator: torch.Generator
) -> Float[Tensor, "B 3 S/2 S/2"]:
    """Pictures at half their size in [-1, 1], half of them mirrored; a share scaled, shifted and recoloured."""
    x = pictures.float() / 127.5 - 1
    count = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    changed = (uniform(0.0, 1.0) < share).float()
    mirror = 1 - 2 * (uniform(0.0, 1.0) < 0.5).float()
    scale = 1 + changed * uniform(-0.3, 0.3)
    shift = changed[:, None] * torch.stack([uniform(-0.2, 0.2), uniform(-0.2, 0.2)], 1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = mirror * scale, scale, shift
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1  # white outside
    order = torch.rand(count, 3, generator=generator).argsort(1)
    recolour = (changed * uniform(0.0, 1.0) > 0.5)[:, None, None, None]
    x = torch.where(recolour, x.gather(1, order[:, :, None, None].expand_as(x)), x)
    return F.avg_pool2d(x, 2)


class ReadPictures:
    """Pictures of a store's rows, read by loader processes ahead of their step, in another random crop each time.

    Every picture is visited once per epoch; which picture and which crop stands at a position is a function of the
    seed and the position alone.
    """

    def __init__(
        self,
        loader: Loader,
        rows: np.ndarray,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        workers: int,
    ) -> None:
        self.walk = Walk(loader, rows, seed)
        self.batch_size, self.steps, self.workers = batch_size, steps, workers
        self.next_step = 0
        self.coming: Iterator[Loaded] | None = None

    def draw(self, step: int, generator: torch.Generator) -> Float[Tensor, "B 3 S S"]:
        """The pictures of a step.

        Raises:
            ArraError: a picture cannot be read any more, or is another one than it was.
        """
        if self.coming is None or step != self.next_step:
            self.close()
            self.coming = load_tasks(StepTasks(step, self.steps, self.batch_size), self.walk, workers=self.workers)
        loaded = next(self.coming)
        self.next_step = step + 1
        if loaded.failures:
            failure = loaded.failures[0]
            raise ArraError(f"{failure.where or failure.id}: picture of record '{failure.id}': {failure.reason}")
        pixels = torch.from_numpy(np.concatenate(loaded.views[CROP]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def close(self) -> None:
        """Nothing; what was read ahead is dropped, and the processes have left."""
        self.coming = None


def random_views(crop: CropSettings, image_size: int) -> dict[str, View]:
    """What the loader of `ReadPictures` makes of each picture."""
    return {CROP: View(crop, image_size, image_size)}


class Walk:
    """Loads positions of the endless walk over the rows; lives in every loader process."""

    def __init__(self, loader: Loader, rows: np.ndarray, seed: int) -> None:
        self.loader, self.rows, self.seed = loader, rows, seed
        self.order = Order((len(rows),), (1.0,), seed)

    def __call__(self, task: Task) -> Loaded:
        """The pictures at the task's positions, each in its own crop."""
        positions = np.arange(task.start, task.stop)
        rows = self.rows[self.order.at(positions)].tolist()
        draws = [Draw(*np.random.default_rng([self.seed, position]).random(4)) for position in positions.tolist()]
        return self.loader.load_rows(rows, draws, task=task)


@dataclass(frozen=True)
class StepTasks(Sequence[Task]):
    """The positions of the steps from `first` to before `stop`, without a list of them."""

    first: int
    stop: int
    batch_size: int

    def __len__(self) -> int:
        return self.stop - self.first

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> "StepTasks": ...
    def __getitem__(self, index: int | slice) -> "Task | StepTasks":
        steps = range(self.first, self.stop)[index]
        if isinstance(steps, range):
            return StepTasks(steps.start, steps.stop, self.batch_size)
        return Task(0, steps * self.batch_size, (steps + 1) * self.batch_size)
