"""Where an encoder's weights lie: a file, a folder in Hugging Face layout, or a repository of the hub; and their hash.

    PATH or ORG/NAME[@REVISION] --located--> path on this disk --main_file--> one file, or the index of several

Of a repository come configuration and weights as .safetensors (where it has none, .bin), no code. Reading them is
`arra.models.weights`: nothing in a file can run.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from arra.errors import ArraError
from arra.models.weights import CHECKPOINT_SUFFIXES, shard_files
from arra.runs import file_hash

REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?")
CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
SAFE_FILES, PICKLE_FILES = ("*.json", "*.safetensors"), ("*.json", "*.bin")
MAIN_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""What a folder may hold, in the order of looking: no pickle where there is another file."""
LARGEST_CONFIG = 2**22
"""Bytes; a configuration is a few thousand."""


def located(weights: str | Path, *, name: str, fetch: bool = True) -> Path:
    """The file or folder that `weights` names, fetched from the hub if it is a repository that is not here yet.

    A path on this disk comes before a repository of the same name; `fetch=False` looks at what was fetched before.

    Raises:
        ArraError: neither a path nor a repository, or it cannot be fetched.
    """
    path, found = Path(weights).expanduser(), REPOSITORY.fullmatch(str(weights))
    if path.exists():
        return path
    if found is None or ".." in str(weights):
        raise ArraError(
            f"{weights}: no such file or folder; expected the weights of encoder {name}, or a repository as ORG/NAME"
        )
    return _fetched(found["repo"], found["revision"], name=name, fetch=fetch)


def _fetched(repo: str, revision: str | None, *, name: str, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError

    at = f"{repo}@{revision}" if revision else repo
    by_hand = f"hf download {repo}{f' --revision {revision}' if revision else ''} --local-dir FOLDER"
    try:
        for patterns in (SAFE_FILES, PICKLE_FILES):
            told: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=not fetch, **told))
            if any((folder / file).is_file() for file in MAIN_FILES):
                return folder
    except GatedRepoError as error:
        raise ArraError(
            f"encoder {name}: {repo} is gated; accept its licence on huggingface.co/{repo}, log in with: hf auth login"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "could not be fetched" if fetch else "has not been fetched yet"
        raise ArraError(
            f"encoder {name}: {at} {reason}, and is not in the hub's cache; where there is a network: {by_hand}, then "
            "set weights to the folder"
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArraError(f"encoder {name}: {at} cannot be fetched ({reason}); check its name, or: {by_hand}") from error
    raise ArraError(f"encoder {name}: {at} holds none of {', '.join(MAIN_FILES)}; name a repository of weights")


def main_file(path: Path) -> Path:
    """The file of weights in a folder, or the index of several; a file is itself.

    Raises:
        ArraError: no weights in the folder.
    """
    if not path.is_dir():
        return path
    for file in MAIN_FILES:
        if (path / file).is_file():
            return path / file
    found = sorted(each for each in path.iterdir() if each.suffix in CHECKPOINT_SUFFIXES and each.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise ArraError(f"{path}: several files of weights: {', '.join(each.name for each in found)}; name one of them")
    raise ArraError(f"{path}: no weights in it; expected one of {', '.join(MAIN_FILES)}")


def weights_hash(path: Path) -> str:
    """SHA-256 of the weights in a file or folder; of several files, that of their names and hashes in order.

    Raises:
        ArraError: no weights there.
    """
    main = main_file(path)
    if not main.is_file():
        raise ArraError(f"{path}: no such file; expected weights")
    if not main.name.endswith(".index.json"):
        return _hash(main)
    told = "".join(f"{file.name} {_hash(file)}\n" for file in shard_files(main))
    return hashlib.sha256(told.encode()).hexdigest()


def _hash(path: Path) -> str:
    about = path.stat()
    return _hash_once(path.resolve(), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_once(path: Path, size: int, mtime: int) -> str:
    """A big file is read once in a process, as long as size and time stay."""
    return file_hash(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file that somebody else wrote.

    Raises:
        ArraError: missing, unreadable, or no object.
    """
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ArraError(f"{path}: {path.stat().st_size} bytes are no configuration; fetch it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArraError(f"{path.parent}: no {path.name} in it; expected an encoder in Hugging Face layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArraError(f"{path}: not readable JSON ({' '.join(str(error).split())[:120]}); fetch it again") from error
    if not isinstance(content, dict):
        raise ArraError(f"{path}: holds a {type(content).__name__}, expected an object; fetch it again")
    return content
