"""What was seen of reference pictures, kept by what they are, so that they are looked at once.

    pictures' content, resizing, network, outputs --> key --> CACHE/references/KEY/{LOOK.OUTPUT.npy, ...} --> Seen

Legend: N pictures.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.evaluate.collecting import DIGEST_BYTES, DIGESTS, KEPT_VECTORS, Look, Seen, collect, file_name
from arra.evaluate.moments import Moments
from arra.evaluate.sets import Collected, PictureSet, chosen_rows
from arra.runs import atomic_write, remove_unfinished, writing

LAYOUT = 1
"""Of the kept files; what was kept in another layout is made anew."""
ABOUT_FILE, MOMENTS_FILE = "about.json", "moments.safetensors"


def see_reference(
    pictures: PictureSet,
    looks: Sequence[Look],
    *,
    cache: Path,
    ranks: Ranks,
    device: torch.device,
    batch_size: int,
    keep: int = KEPT_VECTORS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Seen:
    """What was seen of a set now or before, on every rank; looks that were not kept are made in one pass.

    `cache` is a folder that all ranks see; a part of it that is damaged or was not finished is made anew.

    Raises:
        ArraError: as `collect`.
    """
    content = ranks.by_first(pictures.content_hash)
    folders = {look.name: cache / _key(content, pictures, look, keep) for look in looks}

    def read(look: Look) -> Seen | None:
        return _read(folders[look.name], look, count=len(pictures), keep=keep)

    found = ranks.by_first(lambda: [look.name for look in looks if read(look) is not None])
    missing = [look for look in looks if look.name not in found]
    if missing:
        staged = cache / f".{_key(content, pictures, missing[0], keep)}.{os.uname().nodename}-{os.getpid()}.tmp"
        staged = ranks.share(staged)
        ranks.by_first(lambda: _begin(cache, staged))
        seen = collect(
            pictures, missing, folder=staged, ranks=ranks, device=device, batch_size=batch_size, keep=keep,
            progress=progress,
        )  # fmt: skip
        ranks.by_first(lambda: _keep(seen, missing, staged, folders, read))
    parts = [read(look) for look in looks]
    together = [part for part in parts if part is not None]
    if len(together) < len(looks):
        raise ArraError(f"{cache}: what was just kept there of {pictures.name} is gone; was it emptied? run again")
    return replace(together[0], outputs={key: one for part in together for key, one in part.outputs.items()})


def _key(content: str, pictures: PictureSet, look: Look, keep: int) -> str:
    parts = [str(LAYOUT), content, pictures.resize, look.name, look.identity, *look.sizes, *sorted(look.distributions)]
    return hashlib.sha256("\n".join([*parts, str(keep)]).encode()).hexdigest()[:24]


def _begin(cache: Path, staged: Path) -> None:
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process moves or deletes its own meanwhile
            remove_unfinished(cache)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()


def _keep(
    seen: Seen,
    looks: Sequence[Look],
    staged: Path,
    folders: Mapping[str, Path],
    read: Callable[[Look], Seen | None],
) -> None:
    """Nothing; what a pass has left lies in a folder for each look, whole or not at all."""
    with writing(staged):
        for look in looks:
            part, target = staged / folders[look.name].name, folders[look.name]
            part.mkdir()
            keys = [f"{look.name}.{output}" for output in look.sizes]
            for key in keys:
                os.replace(staged / file_name(key), part / file_name(key))
            shutil.copyfile(staged / file_name(DIGESTS), part / file_name(DIGESTS))
            save_file(_arrays(seen, keys), str(part / MOMENTS_FILE))
            about: dict[str, Any] = {"count": seen.count, "shapes": dict(seen.shapes), "look": look.name}
            atomic_write(part / ABOUT_FILE, json.dumps(about | {"identity": look.identity}, indent=2) + "\n")
            if read(look) is None:  # else another process has just kept the same, and reads it by now
                _replace(part, target, aside=part.with_suffix(".damaged"))
        shutil.rmtree(staged, ignore_errors=True)


def _replace(part: Path, target: Path, *, aside: Path) -> None:
    with suppress(FileNotFoundError):
        os.rename(target, aside)
    try:
        os.rename(part, target)
    except OSError as error:  # another process was faster
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _arrays(seen: Seen, keys: Sequence[str]) -> dict[str, np.ndarray]:
    found = {f"{key}.rows": np.asarray(seen.outputs[key].rows, dtype=np.int64) for key in keys}
    for key in keys:
        moments = seen.outputs[key].moments
        if moments is not None:
            found |= {f"{key}.mean": moments.mean, f"{key}.covariance": moments.covariance}
    return found


def _read(folder: Path, look: Look, *, count: int, keep: int) -> Seen | None:
    """What is kept of a look; None where it is not there, or not whole."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        arrays = load_file(str(folder / MOMENTS_FILE))
        outputs = {}
        if about["count"] != count:
            return None
        for output, size in look.sizes.items():
            key = f"{look.name}.{output}"
            features = np.load(folder / file_name(key), mmap_mode="r", allow_pickle=False)
            rows, moments = arrays[f"{key}.rows"], None
            if not np.array_equal(rows, chosen_rows(count, keep)):
                return None
            if features.shape != (len(rows), size) or features.dtype != np.float32:
                return None
            if output in look.distributions:
                mean, covariance = arrays[f"{key}.mean"], arrays[f"{key}.covariance"]
                if mean.shape != (size,) or covariance.shape != (size, size) or mean.dtype != np.float64:
                    return None
                moments = Moments(mean=mean, covariance=covariance, count=count)
            outputs[key] = Collected(moments=moments, features=features, rows=rows)
        digests = np.load(folder / file_name(DIGESTS), allow_pickle=False)
        if digests.shape != (count, DIGEST_BYTES) or digests.dtype != np.uint8:
            return None
        return Seen(count=count, outputs=outputs, digests=digests, shapes=dict(about["shapes"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, EOFError):
        return None
