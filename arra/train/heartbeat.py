"""Every rank notes where it is, and a rank that does not get on is named before the job ends.

Place in the pipeline: the loop calls `beat` at every phase of a step; a daemon thread of each process does the rest. A
rank that hangs (a disk that does not answer, a lost device, a stopped process) leaves all others waiting in a
collective that cannot be interrupted, so the threads of the others find out who is behind and end their process, and
torchrun ends the job or starts it again. A training of one process is only told that it hangs: nobody waits for it, and
what it waits for may come back.

RUN/.ranks/rank-00003.json    host, process, step, what it is doing; gone at the end

Steps are counted from 0 and by updates made, so after the update of step 0 a rank validates and saves at step 1, and
then takes the data of step 1.
"""

import json
import math
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from arra.distributed import Ranks

Doing = Literal["start", "validate", "watch", "preview", "evaluate", "save", "data", "forward", "update", "finish"]
"""In the order in which a rank comes by at one step; going back to an older checkpoint is `start`."""
IN_STEP: tuple[Doing, ...] = ("data", "forward", "update")
LONG = 4.0
"""Times `hang_seconds` that phases outside a step may take, and the first step: it compiles and starts the workers."""
WATCHERS = 8
"""Ranks that look at the others, spread over all of them: each rank looking at each would be a load on the disk."""
OFTEN = 1.0
"""Seconds between two notes at most."""
LOOKS = 60
"""How often the others are looked at during `hang_seconds`, but not more often than notes are written."""
NAMED_RANKS = 8
SECONDS_TO_TELL = 5.0
EXIT_CODE = 1
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Beat:
    """Where a rank is, as it notes it."""

    rank: int
    job: str
    """Tells this start of the training from those before it, whose notes may still lie there."""
    host: str
    process: int
    turn: int
    """How often the rank came by an earlier place again, after trouble."""
    step: int
    doing: Doing
    count: int
    """Of beats: what has changed where the rank got on."""
    allowed: float
    """Seconds that this may take."""
    time: float
    """Of the rank's clock when it was noted; for readers alone."""
    where: str | None = None
    """In the program, once this takes long."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Rises as the training gets on; equal for ranks that are equally far."""
        return self.turn, self.step, get_args(Doing).index(self.doing)


class Heartbeat:
    """A block in which this rank notes where it is and watches whether all get on; `hang_seconds` None does nothing.

    The rank that is behind all others is named; those in a collective with it are not behind. All this is judged by
    this process's own clock, and only while it does not get on itself: as long as it does, nobody hangs.
    """

    def __init__(self, run: Path, ranks: Ranks, *, hang_seconds: float | None) -> None:
        """Called on all ranks, by the thread that trains."""
        self._run, self._folder, self._ranks = run, run / ".ranks", ranks
        self._hang_seconds = math.inf if hang_seconds is None else hang_seconds
        if ranks.is_first:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a start with more ranks, which was killed
        self._job = ranks.share(f"{platform.node()}-{os.getpid()}-{time.time_ns()}")
        self._trains = threading.get_ident()
        self._first_step: int | None = None
        self._now = self._made("start", turn=0, step=0, count=0, allowed=LONG * self._hang_seconds), time.monotonic()
        """One object, so that the other thread never sees a new note with an old time."""
        self._others: dict[int, tuple[Beat | None, float]] = {}
        """The newest note of each rank, None where it has none, and when it was first seen here."""
        self._interval = min(OFTEN, self._hang_seconds / 10)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, doing: Doing) -> None:
        """Nothing; this rank is now at `step` (updates made so far) and does this. Takes microseconds.

        All ranks call it alike, also where only one has something to do and the others wait for it. It may take
        `hang_seconds`, or `LONG` times that outside a step and in the first step.
        """
        if doing == "data" and self._first_step is None:
            self._first_step = step
        usual = doing in IN_STEP and step != self._first_step
        allowed = self._hang_seconds * (1.0 if usual else LONG)
        last, _ = self._now
        made = self._made(doing, turn=last.turn, step=step, count=last.count + 1, allowed=allowed)
        if made.order < last.order:
            made = replace(made, turn=last.turn + 1)
        self._now = made, time.monotonic()

    def __enter__(self) -> "Heartbeat":
        if self._hang_seconds < math.inf:
            self._note(self._now[0])
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join(timeout=SECONDS_TO_TELL)  # it may wait for a disk
        with suppress(OSError):
            self._file(self._ranks.rank).unlink()
            self._folder.rmdir()  # the last rank's

    def _made(self, doing: Doing, *, turn: int, step: int, count: int, allowed: float) -> Beat:
        return Beat(
            rank=self._ranks.rank,
            job=self._job,
            host=platform.node(),
            process=os.getpid(),
            turn=turn,
            step=step,
            doing=doing,
            count=count,
            allowed=allowed,
            time=time.time(),
        )

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _note(self, beat: Beat) -> None:
        """Nothing; others can read it. A full disk says so elsewhere, and must not end the training here."""
        path = self._file(beat.rank)
        temporary = path.with_name(f".{path.name}.{beat.host}-{beat.process}.tmp")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
            temporary.replace(path)  # without fsync: after a power cut nobody needs it

    def _watch(self) -> None:
        """What the thread does: notes, and where this rank has not got on for a while, looks at the others."""
        noted: Beat | None = None
        told, looked, size = -1, time.monotonic(), self._ranks.size
        watches = self._ranks.rank % _stride(size) == 0
        between = max(self._interval, self._hang_seconds / LOOKS)
        while not self._stopping.wait(self._interval):
            beat, since = self._now
            now = time.monotonic()
            if now - since > self._hang_seconds / 2:
                beat = replace(beat, where=self._where())
            if beat != noted:
                self._note(beat)
                noted = beat
            if size == 1 and now - since > beat.allowed and told != beat.count:
                told = beat.count
                _tell(f"{self._run}: {_named([(beat, now - since)])}; still waiting")
            if size > 1 and watches and now - since > between and now - looked > between:
                looked = now
                self._look(beat, since=since)

    def _look(self, own: Beat, *, since: float) -> None:
        """Nothing, or the end of this process, where a rank does not get on."""
        now = time.monotonic()
        for rank in range(self._ranks.size):
            beat = own if rank == own.rank else self._read(rank)
            before = self._others.get(rank)
            first_seen = now
            if rank == own.rank:
                first_seen = since
            elif before is not None and _count(before[0]) == _count(beat):
                first_seen = before[1]
            self._others[rank] = beat, first_seen
        line = verdict(
            {rank: (beat, now - seen) for rank, (beat, seen) in self._others.items()},
            rank=own.rank,
            hang_seconds=self._hang_seconds,
            turn_seconds=10 * self._interval,
        )
        if line is not None and not self._stopping.is_set():
            _tell(f"{self._run}: {line}; the job ends here (train.trouble.hang_seconds: {self._hang_seconds:g})")
            os._exit(EXIT_CODE)  # the thread that trains may be inside a collective, which nothing interrupts

    def _read(self, rank: int) -> Beat | None:
        try:
            beat = Beat(**json.loads(self._file(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return beat if beat.job == self._job else None

    def _where(self) -> str | None:
        """The line of this package that the training thread is in."""
        frame = innermost = sys._current_frames().get(self._trains)
        while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        found = frame or innermost
        if found is None:
            return None
        return f"{Path(found.f_code.co_filename).name}:{found.f_lineno} ({found.f_code.co_name})"


def verdict(
    ranks: Mapping[int, tuple[Beat | None, float]], *, rank: int, hang_seconds: float, turn_seconds: float
) -> str | None:
    """The line that names the ranks that do not get on; None while all do, or while another rank should say it.

    `ranks` holds of each rank its newest note and for how many seconds that has not changed. Those that are behind are
    to blame, if each has taken longer than it may and `rank`, who asks, gets on as little. They speak first, so that
    torchrun names them too; the others after them, `turn_seconds` one after the other, in case they cannot.
    """
    orders = {each: (-1, 0, 0) if beat is None else beat.order for each, (beat, _) in ranks.items()}
    least = min(orders.values())
    behind = [each for each, order in orders.items() if order == least]
    spare = min(ranks[each][1] - _allowed(ranks[each][0], hang_seconds) for each in behind)
    waiting = [each for each in ranks if each not in behind]
    turn = 0 if rank in behind else 1 + rank // _stride(len(ranks))
    if ranks[rank][1] <= hang_seconds or spare <= turn * turn_seconds:
        return None
    line = _named([ranks[each] for each in behind], numbers=behind)
    if not waiting:
        return f"no rank gets on: {line}"
    places = {f"'{beat.doing}' of step {beat.step}": None for each in waiting if (beat := ranks[each][0]) is not None}
    return f"{line}; the other ranks wait in {', '.join(places)}"


def _named(ranks: Sequence[tuple[Beat | None, float]], *, numbers: Sequence[int] = (0,)) -> str:
    """Who does not get on, where and since when."""
    parts = []
    for number, (beat, seconds) in list(zip(numbers, ranks, strict=True))[:NAMED_RANKS]:
        if beat is None:
            parts.append(f"rank {number} has noted nothing for {seconds:.0f} s: it never started, or has left")
            continue
        where = f", {beat.where}" if beat.where else ""
        parts.append(
            f"rank {number} (host {beat.host}, process {beat.process}) does not get on: at step {beat.step} in "
            f"'{beat.doing}'{where} since {seconds:.0f} s"
        )
    if len(ranks) > NAMED_RANKS:
        parts.append(f"and {len(ranks) - NAMED_RANKS} more ranks")
    return "; ".join(parts)


def _stride(size: int) -> int:
    """Every so many ranks one looks at all others."""
    return math.ceil(size / WATCHERS)


def _allowed(beat: Beat | None, hang_seconds: float) -> float:
    return LONG * hang_seconds if beat is None else beat.allowed


def _count(beat: Beat | None) -> int | None:
    return None if beat is None else beat.count


def _tell(line: str) -> None:
    """Nothing; the line is on stderr, unless nobody reads there: the thread that trains may hang in just that."""

    def write() -> None:
        os.write(2, f"{line}\n".encode())  # beside sys.stderr, whose lock may be held
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(timeout=SECONDS_TO_TELL)
