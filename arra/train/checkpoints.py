"""Checkpoints of a training run: whole or absent, checked by hash, and of any number of ranks.

checkpoints/step-0000500/shard-*.safetensors   what each rank wrote: parts of tensors, by dotted name
                         checkpoint.json       step, the caller's card, shapes and types, hashes of the files above
            .step-0000500.HOST-PID.tmp/        being written; takes the name above by one renaming
            .step-0000500.before/              what had that name, for the moment of the renaming
The shards are those of `torch.distributed.checkpoint` (DCP) over safetensors: nothing here is a pickle.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.runs import UNFINISHED, file_hash, is_alive, writing
from arra.train.shards import FILE_BYTES, ShardFile, Shards, file_numbers, own_parts, read_shards

FORMAT = 1
CARD_FILE = "checkpoint.json"
STEP = re.compile(r"^step-(\d{7,})$")
WRITE_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for the slowest of them to write; one that died is noticed at once."""


@dataclass(frozen=True)
class SavedStep:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    card: Mapping[str, Any]
    """What the caller gave when it was saved."""
    tensors: Mapping[str, Tensor]
    """What it holds by name, on the meta device: shapes and types."""


class Checkpoints:
    """The checkpoints of one training. All ranks make it and call its methods, but for `failed`, together.

    One training at a time writes to `folder`, which all machines of that training see: the caller holds its lock.
    What earlier ones left unfinished is removed at the start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ranks: Ranks,
        keep_last: int,
        keep_every: int | None = None,
        keep_best: int = 0,
        in_background: bool = True,
    ) -> None:
        self.folder, self.ranks, self.in_background = folder, ranks, in_background
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self._owner = ranks.share(f"{platform.node()}-{os.getpid()}")
        # Of its own: what ranks tell each other in the background must not come between what they tell each other.
        self._group: Any = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT) if ranks.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[Path] = set()
        problem = ranks.share(self._tidy() if ranks.is_first else "")
        if problem:
            raise ArraError(problem)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], *, card: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Nothing; in the background it returns when the tensors are copied, and training may change them.

        A plain tensor is the same on all ranks and written by one; of a DTensor each rank writes its part. A step that
        was saved already is replaced. `card` is JSON; of `score` the lowest are best.

        Raises:
            ArraError: it cannot be written, or the one before it could not; earlier checkpoints are untouched.
        """
        self.wait()
        entry = {"format": FORMAT, "step": step, "ranks": self.ranks.size, "score": score, "card": dict(card)}
        entry = json.loads(json.dumps(entry))  # what is no JSON is told here, not from the background
        parts = own_parts(tensors, self.ranks)
        if self.in_background:
            # empty_like, not clone: a part of a larger memory would take all of that along
            parts = {
                name: torch.empty_like(part, device="cpu", memory_format=torch.contiguous_format).copy_(part)
                for name, part in parts.items()
            }
        path = self.folder / f"step-{step:07d}"
        shards = Shards(
            path=self._unfinished(path),
            named=path,
            tensors={name: tensors[name].detach() for name in parts},
            parts=parts,
            file_numbers=file_numbers(tensors, most_bytes=FILE_BYTES * self.ranks.size),
            commit=lambda metadata, files: self._commit(path, entry | _listing(metadata, files)),
        )
        if not self.in_background:
            self._error = shards.write(self.ranks, self._group)
            self._raise()
            return

        def write() -> None:
            self._error = shards.write(self.ranks, self._group)

        self._error = RuntimeError(f"{path}: the thread that saves it died")  # until it says how it went
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Nothing; what was begun is on the disk.

        Raises:
            ArraError: it could not be written; it is told once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._raise()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed, as far as this rank knows; `wait` tells why."""
        return self._thread is not None and not self._thread.is_alive() and self._error is not None

    def newest(self) -> SavedStep | None:
        """The newest checkpoint whose files are whole, the same on all ranks; None where there is none at all.

        Damaged ones are passed over with a warning, and removed by the next save.

        Raises:
            ArraError: there are some, and none is whole; or they are those of an earlier version.
        """
        self.wait()
        problem, paths = self.ranks.share(self._listed() if self.ranks.is_first else ("", []))
        if problem:
            raise ArraError(problem)
        damaged: list[tuple[Path, str]] = []
        for path in paths:
            problem, entry = self.ranks.share(_read_entry(path) if self.ranks.is_first else ("", {}))
            if not problem:
                # each rank reads some files: hashing all takes one as long as writing them
                names = sorted(entry["files"])[self.ranks.rank :: self.ranks.size]
                found = self.ranks.gather(_damage(path, {name: entry["files"][name] for name in names}))
                problem = next(filter(None, found), "")
            if not problem:
                if self.ranks.is_first:
                    for each, why in damaged:
                        warnings.warn(f"{each}: damaged ({why}); using the checkpoint before it", stacklevel=2)
                self._damaged = {each for each, _ in damaged}
                return _saved_step(path, entry)
            damaged.append((path, problem))
        if damaged:
            raise ArraError(
                f"{self.folder}: no checkpoint is whole ({damaged[0][0].name}: {damaged[0][1]}); put a copy in its "
                "place, or delete the folder to train from the beginning"
            )
        return None

    def load(self, saved: SavedStep, tensors: Mapping[str, Tensor]) -> None:
        """Nothing; `tensors`, plain ones or DTensors of any sharding, hold what was saved under their names.

        Raises:
            ArraError: names, shapes or types are not those that were saved, or it cannot be read.
        """
        self.wait()
        _refuse_difference(saved, tensors)
        read_shards(saved.path, tensors, group=self._group)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _commit(self, path: Path, entry: dict[str, Any]) -> None:
        """Nothing; what is written has its name, and checkpoints that are not to be kept are gone."""
        unfinished, before = self._unfinished(path), self._before(path)
        for name, file in entry["files"].items():
            if not (unfinished / name).is_file() or (unfinished / name).stat().st_size != file["bytes"]:
                raise ArraError(
                    f"{unfinished / name}: was written, and is not to be seen from {platform.node()}; the folder must "
                    "lie where all machines see it"
                )
        with (unfinished / CARD_FILE).open("w", encoding="utf-8") as stream:
            json.dump(entry | {"sha256": _entry_hash(entry)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(unfinished)
        if path.exists():
            os.replace(path, before)  # a folder that is not empty cannot be replaced in one go
        try:
            os.replace(unfinished, path)
            _sync_folder(self.folder)
        except OSError:
            if path.exists():
                os.replace(path, unfinished)
            if before.exists():
                os.replace(before, path)
            raise
        shutil.rmtree(before, ignore_errors=True)
        for each in self._damaged - {path}:
            self._discard(each)
        self._damaged = set()
        scores = {each: _read_entry(each)[1].get("score") for each in _steps(self.folder)}
        kept = kept_steps(
            {_step_of(each): score for each, score in scores.items()},
            last=self.keep_last,
            every=self.keep_every,
            best=self.keep_best,
        )
        for each in scores:
            if _step_of(each) not in kept:
                self._discard(each)

    def _tidy(self) -> str:
        """Why the folder still holds what was not finished; nothing if it does not."""
        try:
            with writing(self.folder):
                for path in self.folder.glob(".step-*.before"):
                    finished = path.with_name(path.name.removeprefix(".").removesuffix(".before"))
                    if finished.exists():
                        shutil.rmtree(path)
                    else:
                        os.replace(path, finished)
                for path in self.folder.glob(".step-*.tmp"):
                    here = UNFINISHED.match(path.name)
                    if here is None or int(here[1]) == os.getpid() or not is_alive(int(here[1])):
                        shutil.rmtree(path)
        except ArraError as error:
            return str(error)
        return ""

    def _discard(self, path: Path) -> None:
        """Nothing; the checkpoint is gone, and was never half gone under its name."""
        aside = self._unfinished(path)
        if path.exists():
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)  # what cannot go now goes at the next start

    def _unfinished(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{self._owner}.tmp")

    def _before(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.before")

    def _listed(self) -> tuple[str, list[Path]]:
        """What is wrong with the folder, if anything, and its checkpoints, newest first."""
        earlier = sorted(self.folder.glob("step-*.safetensors"))
        if earlier:
            return (
                f"{earlier[-1]}: a checkpoint of an earlier version of arra, which this one cannot go on from; finish "
                "the run with that version, or delete the folder to train from the beginning",
                [],
            )
        return "", sorted(_steps(self.folder), key=_step_of, reverse=True)


def saved_step(folder: Path, step: int) -> SavedStep:
    """The checkpoint of a step, its files compared with their hashes; for one process.

    Raises:
        ArraError: it is not there, and those that are there are named; or it is damaged.
    """
    path = folder / f"step-{step:07d}"
    if not path.is_dir():
        listed = ", ".join(map(str, steps_in(folder))) or "none"
        raise ArraError(f"{folder}: no checkpoint of step {step}; there are {listed}")
    problem, entry = _read_entry(path)
    problem = problem or _damage(path, entry["files"])
    if problem:
        raise ArraError(f"{path}: damaged ({problem}); name another step")
    return _saved_step(path, entry)


def steps_in(folder: Path) -> list[int]:
    """The steps whose checkpoints a folder holds, whole or not, in order."""
    return sorted(map(_step_of, _steps(folder)))


def read_tensors(saved: SavedStep, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint on the CPU, whatever number of ranks saved it; for one process.

    Raises:
        ArraError: it cannot be read.
    """
    tensors = {name: torch.empty_like(saved.tensors[name], device="cpu") for name in names}
    read_shards(saved.path, tensors, group=None)
    return tensors


def kept_steps(scores: Mapping[int, float | None], *, last: int, every: int | None, best: int) -> set[int]:
    """Of the saved steps those to keep: the `last` newest, multiples of `every`, and the `best` lowest scores.

    Of equal scores the earlier step is better; a NaN is no score.
    """
    steps = sorted(scores)
    scored = sorted((score, step) for step, score in scores.items() if score is not None and not math.isnan(score))
    kept = set(steps[-last:]) | {step for _, step in scored[:best]}
    return kept | {step for step in steps if every is not None and step % every == 0}


def _listing(metadata: Metadata, files: Iterable[ShardFile]) -> dict[str, Any]:
    tensors = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        tensors[name] = {"dtype": str(stored.properties.dtype).removeprefix("torch."), "shape": list(stored.size)}
    return {
        "tensors": tensors,
        "files": {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files},
    }


def _entry_hash(entry: Mapping[str, Any]) -> str:
    """The hash of all of checkpoint.json but the hash."""
    rest = {key: value for key, value in entry.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_entry(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint's card, if anything, and the card."""
    try:
        entry = json.loads((path / CARD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{CARD_FILE} is missing", {}
    except (OSError, ValueError) as error:
        return f"{CARD_FILE}: {error}", {}
    if not isinstance(entry, dict) or entry.get("sha256") != _entry_hash(entry):
        return f"{CARD_FILE}: its hash is not the one it was saved with", {}
    if entry["format"] != FORMAT:
        return f"{CARD_FILE}: format {entry['format']}, this version of arra reads {FORMAT}", {}
    strays = {file.name for file in path.glob("*.safetensors")} - entry["files"].keys()
    if strays:
        return f"{min(strays)} was not saved with it", {}
    return "", entry


def _damage(path: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with some files of a checkpoint; nothing if they are whole."""
    for name, expected in files.items():
        try:
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name}: {(path / name).stat().st_size} bytes, saved were {expected['bytes']}"
            if file_hash(path / name) != expected["sha256"]:
                return f"{name}: its hash is not the one it was saved with"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return ""


def _saved_step(path: Path, entry: Mapping[str, Any]) -> SavedStep:
    tensors = {
        name: torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]), device="meta")
        for name, each in entry["tensors"].items()
    }
    return SavedStep(path, entry["step"], entry["card"], tensors)


def _refuse_difference(saved: SavedStep, tensors: Mapping[str, Tensor]) -> None:
    advice = "the model or its optimiser is another one; use another run folder"
    for names, which in (
        (saved.tensors.keys() - tensors.keys(), "is not in this training"),
        (tensors.keys() - saved.tensors.keys(), "is not in the checkpoint"),
    ):
        if names:
            others = f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
            raise ArraError(f"{saved.path}: '{min(names)}' {which}{others}; {advice}")
    for name, tensor in tensors.items():
        held = saved.tensors[name]
        if held.shape != tensor.shape or held.dtype != tensor.dtype:
            raise ArraError(
                f"{saved.path}: '{name}' was saved as {list(held.shape)} {held.dtype}, expected {list(tensor.shape)} "
                f"{tensor.dtype}; {advice}"
            )


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if STEP.match(path.name) and path.is_dir()]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync_folder(folder: Path) -> None:
    """Nothing; the names in the folder are on the disk, not only what the files hold."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
