"""The files of a checkpoint: DCP's shards over safetensors, which any number of ranks writes and any other reads.

`torch.distributed.checkpoint` (DCP) finds out which part of a tensor lies where, and reads the parts that a rank needs.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.runs import file_hash, writing

FILE_BYTES = 2**28
"""About the most of a rank in one file: DCP holds a file in memory, twice, before it writes it."""


@dataclass(frozen=True)
class ShardFile:
    """A file that a rank has written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shards:
    """What all ranks write together."""

    path: Path
    """The folder to write to."""
    named: Path
    """Its name in messages: that of the whole."""
    tensors: Mapping[str, Tensor]
    """Of what this rank writes, where which part belongs; their content is not read."""
    parts: Mapping[str, Tensor]
    """Of the same names, the content."""
    file_numbers: Mapping[str, int]
    """Of all ranks' names."""
    commit: Callable[[Metadata, list[ShardFile]], None]
    """Called on rank zero, when all have written."""

    def write(self, ranks: Ranks, group: Any) -> BaseException | None:
        """What went wrong, the same on all ranks, and then nothing is left behind; None if all went well."""
        _expect_one_process()
        try:
            dcp.save(
                dict(self.tensors),
                storage_writer=_Writer(self),
                planner=_Planner(self.parts),
                process_group=group,
                no_dist=ranks.size == 1,
            )
        except (CheckpointException, RuntimeError) as error:  # the latter: a rank has died
            if ranks.is_first:
                shutil.rmtree(self.path, ignore_errors=True)
            return _cause(error)
        return None


def own_parts(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """What this rank writes, by name: of a DTensor its local part, of what several ranks hold alike about its share.

    Known without asking the others, so that no rank copies what another one writes.
    """
    loads: dict[int, list[int]] = {}
    parts = {}
    # the largest first, each to whoever has least so far
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        part, replicas, replica = tensor.detach(), ranks.size, ranks.rank
        if isinstance(part, DTensor):
            coordinate = part.device_mesh.get_coordinate()
            replicas, replica = 1, 0 if coordinate is not None else -1  # -1: it lies on other ranks
            for dim, placement in enumerate(part.placements):
                if placement.is_replicate():
                    size = part.device_mesh.size(dim)
                    replicas, replica = replicas * size, replica * size + (coordinate[dim] if coordinate else -1)
            part = part.to_local()
        load = loads.setdefault(replicas, [0] * replicas)
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if owner == replica:
            parts[name] = part
    return parts


def file_numbers(tensors: Mapping[str, Tensor], *, most_bytes: int) -> dict[str, int]:
    """The number, from 1, of the file of every name: in their order, about `most_bytes` in each."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > most_bytes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += tensor.nbytes
    return numbers


class _Planner(dcp.DefaultSavePlanner):
    """Which part lies where is told by the tensors that DCP gets, its content by `parts`."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts
        self.memories: set[int] = set()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """A part in memory of its own: safetensors hold no sharing (8-bit optimisers share their tables)."""
        part = self.parts[index.fqn].contiguous()
        memory = part.untyped_storage().data_ptr()
        shared = memory in self.memories
        self.memories.add(memory)
        return part.clone() if shared else part


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's writer of safetensors, which also hashes what a rank wrote; rank zero ends with `commit`."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(str(shards.path), fqn_to_index_mapping=dict(shards.file_numbers), save_distributed=True)
        self.shards = shards

    @property
    def metadata_path(self) -> str:
        """Where DCP looks for what it would overwrite; the writer's own looks in the working directory."""
        return str(self.shards.path / super().metadata_path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan, and a folder to write to."""
        with writing(self.shards.named):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """What was written, with its files' hashes."""
        with writing(self.shards.named):
            results = super().write_data(plan, planner).wait()
            files = {}
            for name in {result.storage_data.relative_path for result in results}:
                path = self.shards.path / name
                files[name] = ShardFile(name, path.stat().st_size, file_hash(path))
        future: Future[list[WriteResult]] = Future()
        future.set_result([replace(each, storage_data=files[each.storage_data.relative_path]) for each in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing; on rank zero, when all have written."""
        with writing(self.shards.named):
            self.shards.commit(metadata, list({each.storage_data for of_rank in results for each in of_rank}))


def read_shards(path: Path, tensors: Mapping[str, Tensor], *, group: Any) -> None:
    """Nothing; the tensors hold what the folder's files do. `group` is that of all ranks; None: this process alone.

    Raises:
        ArraError: it cannot be read.
    """
    _expect_one_process()
    try:
        dcp.load(
            dict(tensors),
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, OSError | SafetensorError):
            raise ArraError(f"{path}: cannot be read ({cause}); try again, or use a copy") from error
        raise cause from error


def _expect_one_process() -> None:
    """Nothing; DCP's warning at every call of a process that is alone is not shown: it is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _cause(error: BaseException) -> BaseException:
    """The error of a rank behind DCP's own: one for the user if there is one."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, ArraError)), causes[0])
