"""Changes of a recipe that need less memory: `arra plan` tries each, a training that ran out of memory names them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arra.train.parallel import SHARDED
from arra.train.settings import TrainSettings

Trained = Literal["all", "lora", "head"]


@dataclass(frozen=True)
class Saving:
    """A change that a recipe has not taken yet."""

    changes: Mapping[str, Any]
    """Values by the recipe's dotted keys."""
    same: bool
    """Whether the result stays as it is, but for rounding."""

    @property
    def written(self) -> str:
        """As `--set` takes it."""
        return ", ".join(f"{key}={str(each).lower()}" for key, each in self.changes.items())


def rows_of(settings: TrainSettings, *, ranks: int) -> int:
    """Rows of a micro-batch: as the settings say, never more than a rank's part of the batch."""
    share = -(-settings.batch_size // ranks)
    return min(share, settings.micro_batch_size or share)


def savings(
    settings: TrainSettings,
    *,
    ranks: int,
    sharded: bool,
    on_device: bool = True,
    language_model: Trained | None = None,
    four_bit: bool = False,
) -> list[Saving]:
    """What needs less memory, the cheapest first; changes that the rest of the recipe would refuse are left out.

    `sharded`: weights lie in shards already; `on_device`: memory of an accelerator is short, not the CPUs';
    `language_model`: what of one is trained, None for another model; `four_bit`: its frozen matrices are.
    """
    can_be_cut = not four_bit and settings.optimizer != "adamw8bit"
    same = _same(settings, ranks=ranks, sharded=sharded, on_device=on_device, can_be_cut=can_be_cut)
    other = _other(settings, sharded=sharded, language_model=language_model, four_bit=four_bit)
    return [Saving(changes, same=True) for changes in same] + [Saving(changes, same=False) for changes in other]


def _same(
    s: TrainSettings, *, ranks: int, sharded: bool, on_device: bool, can_be_cut: bool
) -> Iterator[dict[str, Any]]:
    rows = rows_of(s, ranks=ranks)
    if rows > 1:
        yield {"train.micro_batch_size": rows // 2}
    if on_device and s.ema_decays and not s.ema_offload:
        yield {"train.ema_offload": True}
    if ranks > 1 and not sharded and can_be_cut:
        yield {"train.parallel.kind": "fsdp"}
    if s.recompute == "none" and s.precision == "bfloat16" and not s.compile:  # elsewhere it may add nothing
        yield {"train.recompute": "selective"}
    if s.recompute != "full":
        yield {"train.recompute": "full"}
    if on_device and not s.parallel.offload and can_be_cut:
        kind = {} if s.parallel.kind in SHARDED else {"train.parallel.kind": "fsdp"}
        yield {**kind, "train.parallel.offload": True}


def _other(
    s: TrainSettings, *, sharded: bool, language_model: Trained | None, four_bit: bool
) -> Iterator[dict[str, Any]]:
    if s.precision == "float32":
        yield {"train.precision": "bfloat16"}
    if s.optimizer == "adamw" and not sharded:
        yield {"train.optimizer": "adamw8bit"}
    lora = {}
    if language_model == "all":
        lora = {"model.llm.train": "lora", "model.llm.frozen_dtype": "bfloat16"}
        yield lora
    if language_model in ("all", "lora") and not four_bit:
        whole: dict[str, Any] = {"train.parallel.kind": "ddp"} if s.parallel.kind in SHARDED else {}
        whole |= {"train.parallel.offload": False} if s.parallel.offload else {}
        yield {**lora, "model.llm.four_bit": True, **whole}
