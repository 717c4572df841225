"""What is measured and with what: a set of pictures, a space to see them in, and the numbers of one pass over them.

    PictureSet --read--> pictures --Space.encode--> vectors --collect--> Collected --> arra.evaluate.measures

Legend: B batch, N pictures of a set, K of them whose vectors are kept, H W pixels, F feature.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from arra.evaluate.moments import Moments

Filter = Literal["bicubic", "bilinear", "lanczos", "box"]
"""Pillow's, which all average over the pixels that they shrink; never torch without antialiasing."""


@runtime_checkable
class PictureSet(Protocol):
    """Pictures that are measured together: of a folder, an .npz, or a store; only what is asked for is read."""

    name: str
    """Where they lie, for messages and cards."""
    ids: Sequence[str]
    """One each, in a fixed order: the path in a folder, the record of a store, the number in an .npz."""
    prompts: Sequence[str] | None
    """What each shows, where it is known."""
    labels: Sequence[int] | None
    """Classes, where they are known."""
    records: Sequence[str] | None
    """The record of a store that each is, or was painted for: pictures of one record are a pair."""
    about: Mapping[str, Any]
    """What is known of how they were made: cfg_scale, sampling, seeds, model_sha256, ...; plain values."""
    resize: str
    """What was done to sizes: `none`, `384 -> 256 bicubic (Pillow)`."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Some pictures, in the order asked for.

        Raises:
            ArraError: one cannot be read; the line names it.
        """
        ...

    def content_hash(self) -> str:
        """SHA-256 of all that `read` gives, or of what that is made from, whatever the set is called."""
        ...


@runtime_checkable
class Space(Protocol):
    """A frozen network in whose vectors pictures are compared."""

    name: str
    """`inception`, `xrv-densenet121`, `rad-dino`, `dinov2-l14`, `clip-l14-336`, `efficientnet-lite1`, ..."""
    sizes: Mapping[str, int]
    """Numbers per picture by output: `features`; Inception has `spatial` and `logits` too."""
    weights_sha256: str
    family: str
    """Architecture and training data; of the teacher's family a space is marked."""
    resize: str
    """How it makes pictures its size: `299 px, bilinear as TensorFlow 1, not antialiased`."""

    def encode(self, images: UInt8[Tensor, "B H W 3"]) -> dict[str, Float[Tensor, "B F"]]:
        """Float32 vectors of pictures of one size, by output; each as if the picture were alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one pass over a set has left of one output of one space."""

    moments: Moments | None
    """Of all N pictures; None for what is no distribution (logits, scores)."""
    features: Float32[np.ndarray, "K F"] = field(repr=False)
    """Mapped from a file or in memory; of all pictures, or of K evenly spaced ones."""
    rows: Int[np.ndarray, "K"] = field(repr=False)
    """Which pictures of the set those are."""


def chosen_rows(count: int, most: int | None) -> Int[np.ndarray, " N"]:
    """At most so many of the rows 0 to `count` - 1, in order, each as likely as any other, always the same ones.

    Evenly spaced ones would not do: where classes or prompts are in turn they would be of a few classes alone.
    """
    if most is None or count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


Blocks = Float32[np.ndarray, "N F"]
"""Features as `Collected` keeps them: possibly mapped from a file, so functions read slices, never the whole."""


@dataclass
class SomePictures:
    """Some pictures of a set, as a set."""

    whole: PictureSet
    rows: Sequence[int] = field(repr=False)

    def __post_init__(self) -> None:
        def some(values: Sequence[Any] | None) -> Sequence[Any] | None:
            return None if values is None else [values[row] for row in self.rows]

        whole = self.whole
        self.name, self.resize = whole.name, whole.resize
        self.ids: Sequence[str] = [whole.ids[row] for row in self.rows]
        self.prompts: Sequence[str] | None = some(whole.prompts)
        self.labels: Sequence[int] | None = some(whole.labels)
        self.records: Sequence[str] | None = some(whole.records)
        self.about: Mapping[str, Any] = {**whole.about, "chosen": f"{len(self.rows)} of {len(whole)}"}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """See `PictureSet.read`."""
        return self.whole.read([self.rows[row] for row in rows])

    def content_hash(self) -> str:
        """See `PictureSet.content_hash`."""
        told = hashlib.sha256(self.whole.content_hash().encode())
        told.update(np.asarray(self.rows, dtype="<i8").tobytes())
        return told.hexdigest()
