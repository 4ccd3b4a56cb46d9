"""SIGTERM ends a command as Ctrl-C does, and neither signal is lost; a reader of the output who leaves ends nothing."""

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
    """SIGTERM."""


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`. Python drops what is raised while an object is finalised: it is sent again.

    One of several processes dies of SIGTERM at once, so that the others do not wait. Outside of the main thread Python
    sets no handler.
    """
    if "WORLD_SIZE" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook

    def send_again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            return hook(dropped)
        number = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        threading.Timer(RESEND_DELAY, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class LastingStream:
    """A stream whose reader may leave, as `head` does: what is written then is dropped, and the work continues.

    Characters that its encoding lacks are written as escapes.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, work: Callable[..., object], *text: str) -> None:
        try:
            work(*text)
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within, standard output and error are `LastingStream`s; one that was closed when Python began goes nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(LastingStream(sys.stdout or nowhere)),
        redirect_stderr(LastingStream(sys.stderr or nowhere)),
    ):
        try:
            yield
        finally:
            sys.stdout.flush()
