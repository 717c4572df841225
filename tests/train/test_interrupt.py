"""Signals: they ask a training to stop, and only who insists at the keyboard breaks a step off."""

import os
import signal

import pytest

import arra.train.interrupt
from arra.train.interrupt import ASKING, interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_sets_the_flag_inside_the_block(number: int) -> None:
    kept = [signal.getsignal(each) for each in ASKING]
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
    assert [signal.getsignal(each) for each in ASKING] == kept


def insist() -> None:
    """A scheduler asks; then somebody at the keyboard, whose signal torchrun passes on as well; who then insists."""
    with interruptible() as stopped:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stopped()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")


def test_a_second_interrupt_from_the_keyboard_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.9, 11.1])
    monkeypatch.setattr(arra.train.interrupt.time, "monotonic", lambda: next(now))
    kept = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        insist()
    assert signal.getsignal(signal.SIGINT) == kept
