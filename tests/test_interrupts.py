"""Ctrl-C ends a command as an interruption, whatever a library makes of it."""

import signal

import pytest

from skyrun.interrupts import Interrupted, interruptible


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
