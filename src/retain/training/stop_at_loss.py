"""Training to a target loss: comparisons at the same new-task loss, bases of one quality at every size."""

from __future__ import annotations

import math
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopAtLoss(TrainerCallback):
    """End training at the first evaluation whose loss is no higher than the target; nats per token.

    Args:
        target: the loss on the trainer's `eval_dataset`.
        metric: what the evaluation calls it.
    """

    def __init__(self, target: float, metric: str = "eval_loss") -> None:
        self.target, self.metric = target, metric
        self.loss: float | None = None  # of the last evaluation
        self.step: int | None = None  # at which the target was reached

    @property
    def reached(self) -> bool:
        return self.step is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was measured before the run was resumed counts, too."""
        self.loss, self.step = None, None
        for row in state.log_history:
            self._read(row, row["step"])

    def _read(self, measured: dict[str, Any], step: int) -> None:
        if self.metric in measured and not self.reached:
            self.loss = measured[self.metric]
            self.step = step if self.loss <= self.target else None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._read(metrics or {}, state.global_step)
        control.should_training_stop |= self.reached

    def was_reached(self, log_history: list[dict[str, Any]]) -> bool:
        """Whether a run with this history has ended."""
        return any(row.get(self.metric, math.inf) <= self.target for row in log_history)

    def __str__(self) -> str:
        if self.reached:
            return f"target loss: reached {self.loss:.4f} (target {self.target:g}) at step {self.step}"
        found = "never evaluated" if self.loss is None else f"the loss is {self.loss:.4f}"
        return f"target loss: not reached; {found}, target {self.target:g}; give it more steps"


def check_early_stopping(args: Any, patience: int | None) -> None:
    """Refuse patience where nothing is evaluated, or nothing says what is better.

    Raises:
        ValueError: naming the missing setting.
    """
    if patience is not None and (args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO):
        raise ValueError(
            f"early_stopping_patience: {patience} needs metric_for_best_model, e.g. retention/wiki/ref_kl, and "
            "eval_strategy steps or epoch; set both"
        )


def check_stop_at_loss(args: Any, target: float | None) -> None:
    """Refuse a target where nothing is evaluated.

    Raises:
        ValueError: naming the missing setting.
    """
    if target is not None and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(f"stop_at_loss: {target:g} needs evaluations; set eval_strategy steps, and eval_steps")
