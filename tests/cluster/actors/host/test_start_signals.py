"""A signal while Ray starts: heard wherever its exception went."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from cluster.actors.host.start_signals import interruptible


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a command that is about to start Ray."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler, "not Ray's"
    assert signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGTERM, before)


def rays_handler(number: int, frame: object) -> None:
    sys.exit(number)


class Ignoring:
    """Python ignores what its destructor raises."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_rays_exit_is_an_interrupt(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.signal(signal.SIGTERM, rays_handler)
        signal.raise_signal(number)


def test_one_whose_exception_was_ignored_comes_again_at_once_and_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.signal(signal.SIGTERM, rays_handler)
        Ignoring()
        time.sleep(60.0)
    assert time.monotonic() - began < 50, "it waited for the block's end"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_one_that_somebody_swallowed_is_heard_at_the_end_of_the_block(fails: bool) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.signal(signal.SIGTERM, rays_handler)
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        if fails:
            raise RuntimeError("Failed to connect to GCS")


def test_other_ends_are_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="no route"), interruptible():
        raise RuntimeError("no route")
    with pytest.raises(SystemExit), interruptible():
        raise SystemExit(3)
    with interruptible():
        os.kill(os.getpid(), signal.SIGCHLD)


def test_in_another_thread_nothing_is_touched() -> None:
    seen: list[object] = []

    def inside() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(60)
    assert seen == [signal.default_int_handler]
