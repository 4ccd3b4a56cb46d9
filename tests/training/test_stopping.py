"""How a signal ends training, and where it does not."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from transformers import TrainerControl

from retain.training.stopping import StopWithCheckpoint


@contextmanager
def handled(number: int, handler: Callable[..., Any] | int) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def saves(stopping: StopWithCheckpoint) -> bool:
    """Whether a step ends with a checkpoint."""
    control: Any = TrainerControl()
    args: Any = SimpleNamespace(save_strategy="steps")
    stopping.on_step_end(args, None, control)  # type: ignore[arg-type]
    if control.should_save:
        stopping.on_save(args, None, control)  # type: ignore[arg-type]
    return bool(control.should_save)


def test_a_handler_that_lets_training_go_on_gets_one_checkpoint() -> None:
    """Every step after the signal wrote one: to stop, the handler would have had to raise."""
    heard: list[int] = []
    stopping = StopWithCheckpoint()
    with handled(signal.SIGTERM, lambda number, frame: heard.append(number)), stopping.listening():
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        assert [saves(stopping) for _ in range(3)] == [True, False, False]
    assert heard == [signal.SIGTERM]


def test_an_ignored_signal_stays_ignored() -> None:
    """In the background of a shell script, Ctrl-C was said to stop the run, which went on with a checkpoint a step."""
    stopping = StopWithCheckpoint()
    with handled(signal.SIGINT, signal.SIG_IGN), stopping.listening():
        signal.raise_signal(signal.SIGINT)
        assert not saves(stopping)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
