"""A rank that does not get on is named by the others, which end; whoever gets on or may take long is left alone."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arra.distributed import Ranks
from arra.train.heartbeat import EXIT_CODE, LONG, WATCHERS, Beat, Doing, Heartbeat, verdict
from tests.train.forked_ranks import started_ranks

BEAT = Beat(rank=0, job="j", host="h", process=4711, turn=0, step=57, doing="forward", count=9, allowed=900.0, time=0.0)


def line(*ranks: tuple[Beat | None, float], rank: int = 0, hang_seconds: float = 900.0) -> str | None:
    return verdict(dict(enumerate(ranks)), rank=rank, hang_seconds=hang_seconds, turn_seconds=10.0)


def at(doing: Doing, seconds: float, step: int = 57, **changed: Any) -> tuple[Beat, float]:
    return replace(BEAT, doing=doing, step=step, **changed), seconds


def test_who_is_behind_is_named_and_not_who_waits_for_it():
    assert line(at("forward", 950.0), at("data", 912.4), at("forward", 950.0)) == (
        "rank 1 (host h, process 4711) does not get on: at step 57 in 'data' since 912 s; the other ranks wait in "
        "'forward' of step 57"
    )


def test_where_it_is_in_the_program_is_told():
    found = line(at("forward", 950.0), at("data", 912.0, where="loading.py:88 (get)"))
    assert found is not None
    assert "in 'data', loading.py:88 (get) since 912 s" in found


def test_ties_are_told_as_such():
    both = line(at("forward", 950.0), at("data", 930.0), at("data", 920.0), at("update", 950.0))
    assert both is not None
    assert both.startswith("rank 1 (host h, process 4711) does not get on: at step 57 in 'data' since 930 s; rank 2 (")
    assert both.endswith("; the other ranks wait in 'forward' of step 57, 'update' of step 57")
    everyone = line(at("forward", 901.0), at("forward", 901.0))
    assert everyone is not None
    assert everyone.startswith("no rank gets on: rank 0 (host h, process 4711) does not get on: at step 57")


def test_nobody_is_blamed_while_somebody_behind_may_take_longer():
    waiting = at("forward", 3000.0)
    assert line(waiting, at("data", 899.0)) is None
    assert line(waiting, at("save", 3000.0, allowed=3600.0)) is None
    assert line(waiting, at("save", 3700.0, allowed=3600.0)) is not None
    assert line(waiting, at("data", 950.0), at("data", 10.0)) is None  # it moves: the others will


def test_a_rank_that_gets_on_itself_ends_nothing():
    assert line(at("forward", 900.0), at("data", 5000.0)) is None
    assert line(at("forward", 901.0), at("data", 5000.0)) is not None


def test_a_rank_that_noted_nothing_is_behind_but_may_take_long():
    found = line(at("start", 5000.0), (None, LONG * 900 + 11))
    assert found is not None
    assert found.startswith("rank 1 has noted nothing for 3611 s: it never started, or has left; the other")
    assert line(at("start", 5000.0), (None, LONG * 900 - 1)) is None


def test_who_is_to_blame_speaks_first_and_the_others_one_after_the_other():
    def first(rank: int, size: int = 3) -> float:
        """Seconds after the 900 that the rank at fault (2) may take at which a rank speaks."""
        for late in range(200):
            told = [at("data" if each == 2 else "forward", 900.0 + late) for each in range(size)]
            if line(*told, rank=rank) is not None:
                return late
        raise AssertionError(rank)

    assert [first(rank) for rank in (2, 0, 1)] == [1, 11, 21]
    watchers = range(0, 64, 64 // WATCHERS)
    assert [first(rank, 64) for rank in watchers] == [11 + 10 * place for place in range(WATCHERS)]


def test_places_are_in_the_order_of_the_loop():
    loop = [
        at("start", 0, step=0),
        at("data", 0, step=0),
        at("forward", 0, step=0),
        at("update", 0, step=0),
        at("validate", 0, step=1),
        at("save", 0, step=1),
        at("data", 0, step=1),
        at("start", 0, step=0, turn=1),  # went back to the beginning
        at("data", 0, step=0, turn=1),
    ]
    orders = [beat.order for beat, _ in loop]
    assert orders == sorted(set(orders))


def noted(run: Path, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / ".ranks" / f"rank-{rank:05d}.json").read_text())
    return content


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_notes_where_it_is_and_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / ".ranks").mkdir()
    (tmp_path / ".ranks" / "rank-00007.json").write_text("of a start with more ranks, which was killed")
    threads = threading.active_count()
    with Heartbeat(tmp_path, Ranks(), hang_seconds=1.0) as heart:
        assert [path.name for path in (tmp_path / ".ranks").glob("rank-*")] == ["rank-00000.json"]
        assert (noted(tmp_path)["doing"], noted(tmp_path)["process"]) == ("start", os.getpid())
        heart.beat(5, "data")
        heart.beat(5, "forward")
        wait_for(lambda: noted(tmp_path)["count"] == 2)
        assert (noted(tmp_path)["step"], noted(tmp_path)["doing"], noted(tmp_path)["turn"]) == (5, "forward", 0)
        assert noted(tmp_path)["allowed"] == LONG  # the first step compiles
        heart.beat(6, "forward")
        wait_for(lambda: noted(tmp_path)["count"] == 3)
        assert noted(tmp_path)["allowed"] == 1.0
        heart.beat(7, "save")
        wait_for(lambda: noted(tmp_path)["count"] == 4)
        assert noted(tmp_path)["allowed"] == LONG
        heart.beat(5, "data")  # back to a checkpoint
        wait_for(lambda: noted(tmp_path)["count"] == 5)
        assert (noted(tmp_path)["turn"], noted(tmp_path)["allowed"]) == (1, LONG)
        heart.beat(5, "forward")
        heart.beat(5, "forward")  # as often as a rank likes
        heart.beat(5, "data")  # the batch was left out
        wait_for(lambda: noted(tmp_path)["count"] == 8)
        assert noted(tmp_path)["turn"] == 2
    assert os.listdir(tmp_path) == []
    assert threading.active_count() == threads


def test_null_neither_notes_nor_watches(tmp_path: Path):
    threads = threading.active_count()
    with Heartbeat(tmp_path, Ranks(), hang_seconds=None) as heart:
        heart.beat(1, "data")
        assert threading.active_count() == threads
        assert os.listdir(tmp_path) == []


def test_a_process_alone_is_told_once_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    told = ""

    def grew(times: int) -> bool:
        nonlocal told
        told += capfd.readouterr().err
        return told.count("\n") == times

    with Heartbeat(tmp_path, Ranks(), hang_seconds=0.2) as heart:
        heart.beat(2, "data")
        heart.beat(3, "data")
        wait_for(lambda: grew(1))
        time.sleep(0.3)
        heart.beat(3, "forward")
        wait_for(lambda: grew(2))
    first, second = told.splitlines()
    assert first.startswith(f"{tmp_path}: rank 0 (host ")
    assert f"process {os.getpid()}) does not get on: at step 3 in 'data'" in first
    assert first.endswith(" s; still waiting")
    assert "at step 3 in 'forward'" in second


class Two(Ranks):
    """Two ranks, of which the other one is played by the test."""

    def share(self, value: Any) -> Any:
        return value


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("is_of_this_start", [True, False])
def test_only_beats_of_this_start_are_getting_on(
    is_of_this_start: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr("arra.train.heartbeat.os._exit", end)
    lines = iter(range(10**6))

    def other(step: int, count: int) -> None:
        """Writes the other rank's note, with another line of the program every time."""
        own = noted(tmp_path)
        job = own["job"] if is_of_this_start else "before"
        told = own | {"rank": 1, "job": job, "step": step, "count": count, "allowed": 0.5, "where": str(next(lines))}
        file = tmp_path / ".ranks" / "new"
        file.write_text(json.dumps(told))
        file.replace(tmp_path / ".ranks" / "rank-00001.json")

    with Heartbeat(tmp_path, Two(size=2), hang_seconds=0.5) as heart:
        heart.beat(1, "data")
        heart.beat(2, "data")
        for count in range(8):  # this rank waits for a slow one
            other(1, count)
            time.sleep(0.1)
        assert codes == []
        started = time.monotonic()
        while not codes:
            assert time.monotonic() < started + 30
            other(1, 8)
            time.sleep(0.05)
    assert codes == [EXIT_CODE]
    told = capfd.readouterr().err
    assert ("rank 1 (host" if is_of_this_start else "rank 1 has noted nothing for") in told
    assert "the other ranks wait in 'data' of step 2; the job ends here (train.trouble.hang_seconds: 0.5)" in told
    (tmp_path / ".ranks" / "rank-00001.json").unlink()


def test_a_disk_that_cannot_be_written_does_not_end_the_training(tmp_path: Path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with Heartbeat(tmp_path / "run", Ranks(), hang_seconds=0.2) as heart:
        heart.beat(1, "data")
        time.sleep(0.1)


def test_a_stopped_rank_is_named_and_the_other_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = tmp_path / "run"

    def work(ranks: Ranks) -> None:
        with Heartbeat(run, ranks, hang_seconds=2.0) as heart:
            for step in range(100_000):
                heart.beat(step, "data")
                time.sleep(0.02)
                heart.beat(step, "forward")
                ranks.sum([1.0])

    first, second = started_ranks(2, tmp_path / "store", work)
    assert first.pid is not None
    try:
        wait_for(lambda: (run / ".ranks" / "rank-00000.json").exists() and noted(run)["step"] > 2)
        os.kill(first.pid, signal.SIGSTOP)  # rank zero, so that it is not the only one who can tell
        second.join(60)
    finally:
        for process in (first, second):
            process.kill()
            process.join()
    assert second.exitcode == EXIT_CODE
    [line] = [each for each in capfd.readouterr().err.splitlines() if "does not get on" in each]
    assert line.startswith(f"{run}: rank 0 (host ")
    assert f"process {first.pid}) does not get on: at step " in line
    assert "the other ranks wait in 'forward' of step " in line or "no rank gets on" in line
    assert line.endswith("; the job ends here (train.trouble.hang_seconds: 2)")
