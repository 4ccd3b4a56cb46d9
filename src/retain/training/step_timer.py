"""How long an optimizer step takes, without what a trainer does between steps: evaluations, checkpoints, logs."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerState

TIMER_STATE = "StepTimer"  # its place in a checkpoint's trainer_state.json


class StepTimer(TrainerCallback):
    """Adds up the steps of a run but for the first of each process, which also sets things up; a checkpoint keeps it.

    Attributes:
        seconds: of all that were timed.
        num_steps: how many these are.
    """

    def __init__(self) -> None:
        self.seconds, self.num_steps = 0.0, 0
        self._began, self._is_first = 0.0, True

    @property
    def mean(self) -> float | None:
        """Seconds per step; None before there were two."""
        return self.seconds / self.num_steps if self.num_steps else None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(TIMER_STATE) if state.global_step else None
        self.seconds, self.num_steps = kept["attributes"]["seconds"] if kept else (0.0, 0)
        self._is_first = True

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self._is_first:
            self.seconds, self.num_steps = self.seconds + time.monotonic() - self._began, self.num_steps + 1
        self._is_first = False
        state.stateful_callbacks[TIMER_STATE] = {"args": {}, "attributes": {"seconds": [self.seconds, self.num_steps]}}
