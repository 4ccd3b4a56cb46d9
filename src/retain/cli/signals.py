"""SIGTERM ends a command as Ctrl-C does, and neither signal is lost; a closed output pipe does not end it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

RESEND_DELAY = 0.05  # seconds


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM."""


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Make SIGTERM raise `Terminated`; resend a signal whose exception Python drops, as it does inside `__del__`.

    Does nothing in a process that a launcher started, which must die at once so that the others do not wait for it, and
    outside the main thread, where Python allows no handlers.
    """
    if "WORLD_SIZE" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook

    def resend(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            return hook(dropped)
        number = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        threading.Timer(RESEND_DELAY, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = resend
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class LastingStream:
    """A stream that drops output, instead of failing, once its reader has closed the pipe, as `head` does.

    Characters that its encoding lacks are written as escapes.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self._unless_closed(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._unless_closed(self.stream.flush)

    def _unless_closed(self, operation: Callable[..., object], *text: str) -> None:
        try:
            operation(*text)
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make standard output and error `LastingStream`s; one that was closed at the start is discarded."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(LastingStream(sys.stdout or nowhere)),
        redirect_stderr(LastingStream(sys.stderr or nowhere)),
    ):
        try:
            yield
        finally:
            sys.stdout.flush()
