"""Signals that come while Ray starts. Ray puts its own handler of SIGTERM in place then, which raises SystemExit
wherever Python happens to be: also where Python ignores exceptions (in what it calls around a fork, in a destructor).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

ENDING = frozenset({signal.SIGINT, signal.SIGTERM})
AGAIN_S = 0.02


@contextmanager
def interruptible() -> Iterator[None]:
    """The block ends with KeyboardInterrupt where a SIGINT or SIGTERM came within it, whatever became of the exception
    that its handler raised; SIGTERM's handler is then what it was before. Outside the main thread nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    came = False
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        # the interpreter itself writes the numbers of signals there, whoever handles them
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        stack.enter_context(_sent_again_where_ignored())
        try:
            yield
        except BaseException as error:
            if _came(reader):
                raise KeyboardInterrupt from error
            raise
        came = _came(reader)
    if came:
        raise KeyboardInterrupt


@contextmanager
def _sent_again_where_ignored() -> Iterator[None]:
    """A signal whose exception Python ignored is sent once more, a moment later, and nothing is printed of it."""
    before, over = sys.unraisablehook, threading.Event()

    def again() -> None:
        if not over.wait(AGAIN_S):
            os.kill(os.getpid(), signal.SIGTERM)

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, (KeyboardInterrupt, SystemExit)):
            threading.Thread(target=again, name="signal-again", daemon=True).start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        over.set()
        sys.unraisablehook = before


def _came(reader: int) -> bool:
    try:
        return not ENDING.isdisjoint(os.read(reader, 1 << 16))
    except BlockingIOError:
        return False
