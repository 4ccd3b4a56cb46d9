"""Training to a target loss: comparisons at the same new-task loss, bases of one quality whatever their size."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
        self.step = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is None or self.metric not in metrics:
            return
        self.loss = metrics[self.metric]
        if self.loss <= self.target and self.step is None:
            self.step = state.global_step
            control.should_training_stop = True

    def __str__(self) -> str:
        if self.reached:
            return f"target loss: reached {self.loss:.4f} (asked {self.target:g}) at step {self.step}"
        found = "never evaluated" if self.loss is None else f"the loss is {self.loss:.4f}"
        return f"target loss: not reached; {found}, asked {self.target:g}; give it more steps"


def check_stop_at_loss(args: Any, target: float | None) -> None:
    """Refuse a target where nothing is evaluated.

    Raises:
        ValueError: naming the missing setting.
    """
    if target is not None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise ValueError(f"stop_at_loss: {target:g} needs evaluations; set eval_strategy steps, and eval_steps")
