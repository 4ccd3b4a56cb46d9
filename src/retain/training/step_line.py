"""Callbacks that show a trainer's steps in the progress line, print each evaluation, and time the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import (
    IntervalStrategy,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from retain.files import visible
from retain.progress import PlannedStage, ProgressLine, StageProgress

TRAINING, EVALUATIONS = "training", "evaluations"  # stages, and their kinds
TIMER_STATE = "StepTimer"  # its key in a checkpoint's trainer_state.json


class StepLine(TrainerCallback):
    """Replaces transformers' progress bars and printed logs within a `progress_line`; `metrics.jsonl` keeps the logs.

    Args:
        work_until: (step, number of steps) → work of all steps up to that one; by default all steps are equal.
        at_most: the run may end before its last step.
    """

    def __init__(self, work_until: Callable[[int, int], float] = min, *, at_most: bool = False) -> None:
        self.work_until, self.at_most = work_until, at_most
        self.stage: StageProgress | None = None
        self._printed: set[tuple[int, str]] = set()

    def take_over(self, trainer: Any) -> None:
        """Replace a trainer's own progress output with this callback."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.stage is not None:  # training restarts with a smaller batch
            self.stage.close(has_ended=False)
        steps, work = state.max_steps, self.work_until(state.max_steps, state.max_steps)
        self.stage = StageProgress(
            TRAINING, steps, "steps", work=work, initial=state.global_step, at_most=self.at_most,
            share=lambda step: self.work_until(step, steps) / work,
        )  # fmt: skip
        if args.eval_on_start:
            self.stage.pause()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.stage is not None
        self.stage.within = [PlannedStage(EVALUATIONS, EVALUATIONS, evaluations_left(args, state))]
        self.stage.update()
        self._pause_to_evaluate(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._pause_to_evaluate(control)

    def _pause_to_evaluate(self, control: TrainerControl) -> None:
        if control.should_evaluate and self.stage is not None:
            self.stage.pause()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage is not None:
            self.stage.resume(EVALUATIONS)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss next to the steps, and print the results of an evaluation once per step."""
        if self.stage is not None and "loss" in logs:
            self.stage.note = f"loss {logs['loss']:.3f}"
        results = {name.removeprefix("eval_"): logs[name] for name in logs if name.endswith(("/ref_kl", "eval_loss"))}
        new = {name: value for name, value in results.items() if (state.global_step, name) not in self._printed}
        self._printed |= {(state.global_step, name) for name in new}
        parts = [f"new-task loss {new.pop('loss'):.3f}"] if "loss" in new else []
        texts = [f"{value:.3f} on {visible(name.split('/')[1])}" for name, value in new.items()]
        parts += [f"ref_kl {', '.join(texts)}"] if texts else []
        if parts and ProgressLine.current is not None:
            ProgressLine.current.say(f"step {state.global_step}: {'; '.join(parts)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage is not None:
            self.stage.close()
            self.stage = None


def evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    """Evaluations still to come after a step has ended."""
    if args.eval_strategy == IntervalStrategy.STEPS:
        return math.ceil(state.max_steps / state.eval_steps) - int((state.global_step - 1) // state.eval_steps)
    if args.eval_strategy == IntervalStrategy.EPOCH:
        epoch = state.epoch or 0.0
        return math.ceil(round(epoch * state.max_steps / state.global_step, 6)) - math.ceil(round(epoch, 6)) + 1
    return 0


class StepTimer(TrainerCallback):
    """Measures how long a step takes, without evaluations, checkpoints and logs between steps.

    The first step of each process, which includes setup, is not timed. A checkpoint keeps the time so far.

    Attributes:
        seconds: total time of the timed steps.
        num_steps: number of timed steps.
    """

    def __init__(self) -> None:
        self.seconds, self.num_steps = 0.0, 0
        self._start_time, self._is_first = 0.0, True

    @property
    def mean(self) -> float | None:
        """Seconds per step; None before the second step."""
        return self.seconds / self.num_steps if self.num_steps else None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(TIMER_STATE) if state.global_step else None
        self.seconds, self.num_steps = saved["attributes"]["seconds"] if saved else (0.0, 0)
        self._is_first = True

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start_time = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self._is_first:
            self.seconds, self.num_steps = self.seconds + time.monotonic() - self._start_time, self.num_steps + 1
        self._is_first = False
        state.stateful_callbacks[TIMER_STATE] = {"args": {}, "attributes": {"seconds": [self.seconds, self.num_steps]}}
