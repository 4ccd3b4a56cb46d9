"""SIGTERM ends a command as Ctrl-C does, and neither signal is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
