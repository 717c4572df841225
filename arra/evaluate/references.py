"""What was seen of reference pictures, kept by what they are, so that they are looked at once.

    pictures' content, resizing, network, outputs --> key --> CACHE/references/KEY/{LOOK.OUTPUT.npy, ...} --> Seen

Legend: N pictures.
"""

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
from arra.evaluate.collecting import DIGESTS, KEPT_VECTORS, Look, Seen, collect
from arra.evaluate.moments import Moments
from arra.evaluate.sets import Collected, PictureSet
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
    found = ranks.by_first(lambda: [look.name for look in looks if _read(folders[look.name], look) is not None])
    missing = [look for look in looks if look.name not in found]
    if missing:
        staged = cache / f".{_key(content, pictures, missing[0], keep)}.{os.uname().nodename}-{os.getpid()}.tmp"
        staged = ranks.share(staged)
        ranks.by_first(lambda: _begin(cache, staged))
        seen = collect(
            pictures, missing, folder=staged, ranks=ranks, device=device, batch_size=batch_size, keep=keep,
            progress=progress,
        )  # fmt: skip
        ranks.by_first(lambda: _keep(seen, missing, staged, folders))
    parts = [_read(folders[look.name], look) for look in looks]
    together = [part for part in parts if part is not None]
    assert len(together) == len(looks), "another process deletes what is kept of references"
    return replace(together[0], outputs={key: one for part in together for key, one in part.outputs.items()})


def _key(content: str, pictures: PictureSet, look: Look, keep: int) -> str:
    parts = [str(LAYOUT), content, pictures.resize, look.name, look.identity, *look.sizes, *sorted(look.distributions)]
    return hashlib.sha256("\n".join([*parts, str(keep)]).encode()).hexdigest()[:24]


def _begin(cache: Path, staged: Path) -> None:
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        remove_unfinished(cache)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()


def _keep(seen: Seen, looks: Sequence[Look], staged: Path, folders: Mapping[str, Path]) -> None:
    """Nothing; what a pass has left lies in a folder for each look, whole or not at all."""
    with writing(staged):
        for look in looks:
            part, target = staged / look.name, folders[look.name]
            part.mkdir()
            keys = [f"{look.name}.{output}" for output in look.sizes]
            for key in keys:
                os.replace(staged / f"{key}.npy", part / f"{key}.npy")
            shutil.copyfile(staged / f"{DIGESTS}.npy", part / f"{DIGESTS}.npy")
            save_file(_arrays(seen, keys), str(part / MOMENTS_FILE))
            about: dict[str, Any] = {"count": seen.count, "shapes": dict(seen.shapes), "look": look.name}
            atomic_write(part / ABOUT_FILE, json.dumps(about | {"identity": look.identity}, indent=2) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            with suppress(FileExistsError):  # another process has just kept the same
                os.rename(part, target)
        shutil.rmtree(staged, ignore_errors=True)


def _arrays(seen: Seen, keys: Sequence[str]) -> dict[str, np.ndarray]:
    found = {f"{key}.rows": np.asarray(seen.outputs[key].rows, dtype=np.int64) for key in keys}
    for key in keys:
        moments = seen.outputs[key].moments
        if moments is not None:
            found |= {f"{key}.mean": moments.mean, f"{key}.covariance": moments.covariance}
    return found


def _read(folder: Path, look: Look) -> Seen | None:
    """What is kept of a look; None where it is not there, or not whole."""
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        arrays = load_file(str(folder / MOMENTS_FILE))
        outputs, count = {}, int(about["count"])
        for output, size in look.sizes.items():
            key = f"{look.name}.{output}"
            features = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
            rows, moments = arrays[f"{key}.rows"], None
            if features.shape != (len(rows), size) or features.dtype != np.float32:
                return None
            if output in look.distributions:
                moments = Moments(mean=arrays[f"{key}.mean"], covariance=arrays[f"{key}.covariance"], count=count)
            outputs[key] = Collected(moments=moments, features=features, rows=rows)
        digests = np.load(folder / f"{DIGESTS}.npy", allow_pickle=False)
        return Seen(count=count, outputs=outputs, digests=digests, shapes=about["shapes"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, EOFError):
        return None
