"""The steps of a trainer in the line of progress."""

from __future__ import annotations

import pytest
from conftest import make_model
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from retain.progress import progress_line
from retain.training.config import ReplayConfig
from retain.training.step_line import StepLine, evaluations_left
from retain.training.trainer import ReplayTrainer


class EvaluationCounter(TrainerCallback):
    """What `evaluations_left` said behind each step, and how many evaluations came by then."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []
        self.evaluations = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.told.append((evaluations_left(args, state), self.evaluations))

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


@pytest.mark.parametrize("when", [
    {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 7}, {"eval_strategy": "epoch", "num_train_epochs": 2},
    {"eval_strategy": "epoch", "max_steps": 4}, {"eval_strategy": "no", "max_steps": 2},
])  # fmt: skip
def test_the_evaluations_to_come_are_those_that_come(tmp_path, when, capsys):
    rows = [{"input_ids": [3, at, 5], "labels": [3, at, 5]} for at in range(6)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
                                  per_device_train_batch_size=2, **when)  # fmt: skip
    counter = EvaluationCounter()
    trainer = Trainer(make_model(), arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[counter])
    StepLine().take_over(trainer)
    with progress_line() as line:
        trainer.train()
    assert [left for left, _ in counter.told] == [counter.evaluations - before for _, before in counter.told]
    shown = capsys.readouterr()
    assert "{'" not in shown.out + shown.err
    assert shown.err.count("new-task loss") == counter.evaluations
    steps = trainer.state.max_steps
    assert shown.err.splitlines()[-1].startswith(f"training: {steps} steps in ")
    assert line.pace.keys() == {"training"} | ({"evaluations"} if counter.evaluations else set())


def test_a_trainer_of_ones_own_keeps_the_bars_of_its_host(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    kinds = (ProgressCallback, PrinterCallback)
    trainer = ReplayTrainer(make_model(), arguments, replay_config=ReplayConfig(replay_coef=0))
    assert any(isinstance(one, kinds) for one in trainer.callback_handler.callbacks)
    StepLine().take_over(trainer)
    assert not any(isinstance(one, kinds) for one in trainer.callback_handler.callbacks)
