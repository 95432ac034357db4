"""Ctrl-C ends a command as an interruption, whatever a library makes of it."""

import signal
import sys
import threading

import pytest
import torch

from skyrun.cli.signals import Interrupted, interruptible, raise_if_asked
from skyrun.engine.together import do_as_told, workers
from skyrun.parallel import team as team_module


def test_an_interrupt_that_a_library_turned_into_an_error():
    with pytest.raises(Interrupted), interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None


def test_a_plain_interrupt_and_a_plain_error():
    with pytest.raises(Interrupted), interruptible():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")


def test_the_handler_before_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_on_purpose_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_is_swallowed_on_the_way_is_raised_again():
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with pytest.raises(Interrupted), interruptible():
            raise_if_asked()
            Finalized()  # no exception leaves a finalizer
            raise_if_asked()
            raise AssertionError("the interrupt was lost")
    finally:
        sys.unraisablehook = hook
    with interruptible():
        raise_if_asked()


@pytest.mark.skipif(sys.platform == "win32", reason="a thread of Windows cannot interrupt another one")
def test_an_interrupt_while_workers_are_started_leaves_none(monkeypatch):
    started, is_raised, start = [], threading.Event(), team_module.start_processes

    def interrupt(*_):
        is_raised.set()
        raise KeyboardInterrupt

    def interrupted(*arguments):
        started.append(start(*arguments))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert is_raised.wait(60)
        return started[0]

    before = signal.signal(signal.SIGINT, interrupt)
    monkeypatch.setattr(team_module, "start_processes", interrupted)
    team = workers(2, torch.device("cpu"))
    try:
        with pytest.raises(KeyboardInterrupt):
            team.send(do_as_told)
        ended = [handler.proc.poll() for handler in started[0].subprocess_handlers.values()]
        assert ended == [-signal.SIGKILL] * 2
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("TailLog")]
    finally:
        signal.signal(signal.SIGINT, before)
        started[0].close(signal.SIGKILL)
