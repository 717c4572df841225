"""A run folder: recipe, manifest, metrics, and writing that survives a kill. Every stage below `train` reads from it.

runs/NAME/recipe.yaml      the resolved recipe; a folder never changes what is trained
          manifest.json    versions, git commit, and what the caller gives (seed, hashes); as at the first start
          metrics.jsonl    one row per line, append only
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from arra.errors import ArraError

WRITE_ERRORS = {
    errno.ENOSPC: "no space left on device; free some or pass --out elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or pass --out elsewhere",
    errno.EACCES: "not writable for this user; change its permissions or pass --out elsewhere",
    errno.EPERM: "not writable for this user; change its permissions or pass --out elsewhere",
    errno.EIO: "the disk reports an error; look at the system's log, or pass --out elsewhere",
    errno.EFBIG: "larger than a file may be here; raise that limit (ulimit -f) or pass --out elsewhere",
    errno.EROFS: "on a read-only file system; pass --out elsewhere",
    errno.ENOTDIR: "part of this path is a file, expected a folder; move the file or pass --out elsewhere",
    errno.EEXIST: "is a file, expected a folder; move the file or pass --out elsewhere",
    errno.EISDIR: "is a folder, expected a file; move the folder or pass --out elsewhere",
}
UNFINISHED = re.compile(
    rf"^\..+\.{re.escape(platform.node())}-(\d+)\.tmp$"
)  # what `atomic_file` leaves behind after a kill; the number is the process


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """A block in which a failed write to `path` (disk full, no permission, ...) becomes a one-line ArraError."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise ArraError(f"{path}: {WRITE_ERRORS[error.errno]}") from error
    except SafetensorError as error:  # how that library tells a full disk
        raise ArraError(f"{path}: cannot be written ({error}); free space and try again") from error


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` at the end of the block, or never.

    Raises:
        ArraError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            usual = temporary.stat().st_mode
            temporary.unlink()
            yield temporary
            if temporary.stat().st_mode != usual:  # safetensors lets nobody but the owner read
                temporary.chmod(stat.S_IMODE(usual))
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(
                OSError
            ):  # the name is free after success; after a failure the first error is the one to tell
                temporary.unlink()


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Nothing; `path` holds `content`, or, whatever happens on the way, what it held before."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def let_others_read(folder: Path) -> None:
    """Nothing; whoever may read what this process writes may read the files in the folder, those of safetensors too."""
    probe = folder / ".mode"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in filter(Path.is_file, folder.iterdir()):
        file.chmod(usual)


def remove_unfinished(folder: Path) -> None:
    """Nothing; files and folders below `folder` that dead processes did not finish are gone."""
    for path in list(folder.rglob(".*.tmp")):  # all names first: what is in a folder that goes goes with it
        match = UNFINISHED.match(path.name)
        if match and not is_alive(int(match[1])):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def file_hash(path: Path | str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Run:
    """One run folder. `create` starts or resumes it, `open` reads a finished or running one."""

    path: Path

    @classmethod
    def create(
        cls,
        path: Path | str,
        recipe_yaml: str,
        manifest: Mapping[str, Any],
        *,
        free: Sequence[str] = (),
        noted: Mapping[str, Any] | None = None,
    ) -> "Run":
        """A new run, or the one that is there if it has the same recipe and manifest.

        `manifest` holds what must not change between starts (seed, hashes of inputs); `noted` what may. Versions are
        added, and all of it is kept as it was at first. The recipe's keys `free` (dotted) may be others now;
        `take_recipe` writes them down.

        Raises:
            ArraError: the folder holds a run of another recipe or other inputs, or cannot be written.
        """
        run = cls(Path(path))
        given = json.loads(json.dumps(dict(manifest)))
        if run.recipe_path.exists():
            try:
                own = yaml.safe_load(run.recipe_yaml())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ArraError(f"{run.recipe_path}: damaged; delete the run folder and train again") from error
            run._refuse_difference("recipe", without_keys(own, free), without_keys(yaml.safe_load(recipe_yaml), free))
            kept = run.manifest()
            run._refuse_difference("manifest", {key: kept.get(key) for key in given}, given)
            return run
        facts = environment() | dict(noted or {}) | given
        atomic_write(run.path / "manifest.json", json.dumps(facts, indent=2) + "\n")
        atomic_write(run.recipe_path, recipe_yaml)  # last: a folder with a recipe is a run
        return run

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """The run in an existing folder.

        Raises:
            ArraError: there is no run.
        """
        run = cls(Path(path))
        if not run.recipe_path.is_file():
            found = "has no recipe.yaml" if run.path.is_dir() else "no such folder"
            raise ArraError(f"{run.path}: not a run, {found}; {_runs_near(run.path)}")
        return run

    @property
    def recipe_path(self) -> Path:
        """The place of the resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        """The place of the metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    def take_recipe(self, recipe_yaml: str) -> None:
        """Nothing; the run has this recipe, which may differ from its own in what does not change the training.

        For whoever holds the lock: a start that is refused leaves the recipe of the one that runs.
        """
        own = self.recipe_yaml()
        if own != recipe_yaml and yaml.safe_load(own) != yaml.safe_load(recipe_yaml):
            atomic_write(self.recipe_path, recipe_yaml)

    def recipe_yaml(self) -> str:
        """The resolved recipe as text."""
        return self.recipe_path.read_text(encoding="utf-8")

    def manifest(self) -> dict[str, Any]:
        """Versions, commit, and what was given to `create`."""
        path = self.path / "manifest.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise ArraError(f"{path}: missing or not JSON; delete the run folder and train again") from None
        if not isinstance(content, dict):
            raise ArraError(f"{path}: expected a JSON object; delete the run folder and train again")
        return content

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Nothing; `row` is the last line of metrics.jsonl, whole even if the process is killed right after."""
        line = (json.dumps(dict(row)) + "\n").encode()
        with writing(self.metrics_path), self.metrics_path.open("ab+", buffering=0) as file:
            _drop_torn_line(file.fileno())
            if os.write(file.fileno(), line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows, in the order of writing. A torn last line (the process was killed in it) is left out.

        Raises:
            ArraError: a line before the last is no JSON object.
        """
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ArraError(f"{self.metrics_path}: line {number} is no JSON object; delete that line")
            rows.append(row)
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Nothing; rows whose `step` lies after `step`, the resume point, are gone."""
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step]
        if self.metrics_path.exists():
            atomic_write(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A block in which no other process trains in this run; the system releases it if this process dies.

        Unfinished files of dead processes are removed. Take it once per process: the lock belongs to the process.

        Raises:
            ArraError: another process holds it.
        """
        path = self.path / ".lock"
        with writing(self.path):
            file = path.open("a+")
        with file:
            try:
                # A record lock, unlike flock, is not inherited by data loader processes, which may outlive this one.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise ArraError(
                    f"{self.path}: another process ({holder}) trains in this run; wait for it or use another folder"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            remove_unfinished(self.path)
            yield

    def _refuse_difference(self, what: str, kept: Any, now: Any) -> None:
        difference = _first_difference(kept, now)
        if difference is not None:
            key, old, new = difference
            raise ArraError(
                f"{self.path}: another {what}: {key} is {_show(old)} in this run, now {_show(new)}; "
                "use another folder or delete this one"
            )


def _runs_near(path: Path) -> str:
    """The runs inside a folder, else beside it, in words."""
    for folder in (path, path.parent):
        names = sorted(str(recipe.parent) for recipe in folder.glob("*/recipe.yaml"))
        if names:
            return f"runs there: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    return "make one with: arra demo"


def without_keys(tree: Any, keys: Sequence[str]) -> Any:
    """The tree without some dotted keys."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: [each.partition(".")[2] for each in keys if each.partition(".")[0] == key] for key in tree}
    return {key: without_keys(value, inner[key]) for key, value in tree.items() if "" not in inner[key]}


class _Absent:
    """Stands for a key that one side does not have."""


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key at which two trees differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            below = _first_difference(
                old.get(name, _Absent), new.get(name, _Absent), f"{key}.{name}" if key else str(name)
            )
            if below is not None:
                return below
        return None
    # NaN equals NaN here, and 1 is not 1.0: a changed type may change what a run computes.
    return None if type(old) is type(new) and (old == new or repr(old) == repr(new)) else (key, old, new)


def _show(value: Any) -> str:
    return "absent" if value is _Absent else repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."


def _drop_torn_line(descriptor: int) -> None:
    """Cut a last line that a killed process did not finish, so that the next row does not grow onto it."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    os.ftruncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def leave_with(parent: int) -> None:
    """Nothing; this process ends soon after its parent, also where the parent was killed and could not say so."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def environment() -> dict[str, Any]:
    """Versions and commit that something is made with."""
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "arra": _version("arra"),
        "git_commit": _git_commit(Path(__file__).parent.parent),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    """The commit of the clone at `root`, with `-dirty` after it if files were changed; None outside a clone."""
    if not (root / ".git").exists():
        return None  # an installed package may lie inside somebody else's repository
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
