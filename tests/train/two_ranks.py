"""One of two ranks that train a decoder in shards for a step: python two_ranks.py RANK FOLDER SETTINGS.

The first writes what it holds, in bytes: FOLDER/held.json.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from arra.models import Decoder
from arra.models.decoder import DecoderSettings
from arra.train.optimizer import make_optimizers
from arra.train.settings import TrainSettings


def local_bytes(values: Iterable[Any]) -> int:
    """Of shards; what is whole (counters) is left out."""
    return sum(value.to_local().numel() * value.element_size() for value in values if isinstance(value, DTensor))


def main(rank: int, folder: Path, settings: dict[str, Any]) -> None:
    """Nothing; a step is made."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = Decoder(DecoderSettings(**settings))
    for block in model.layers:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=False)
    named = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    (optimizer,) = make_optimizers(named, TrainSettings(steps=1), modules=[model])
    hidden = model(torch.zeros(2, 16, dtype=torch.int64)).last_hidden
    model.output(hidden).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    if rank == 0:
        held = [local_bytes(values) for values in (model.parameters(), gradients, moments)]
        (folder / "held.json").write_text(json.dumps(held))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
