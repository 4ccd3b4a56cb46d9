"""Does replay from earlier tasks' start tokens keep four tasks learned in sequence? One command; finished runs stay.

python -m experiments 06 [--report]
python -m experiments 06 --scale gpu    # at the size of Marek et al., a seed; `make gpu` has it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from experiments.finetunes import StudyResults, drawn_rows, scratch
from experiments.pages import NoReport
from experiments.program import Report, conduct, seeds_of
from experiments.study_06_continual_tasks.report import METHODS, draw, report
from retain import ReplayConfig, ReplayDataset, ReplayTrainer
from retain.lab.models import make_config, make_model
from retain.lab.streams import Stream
from retain.lab.tasks import EOS, PAD, TASKS, VOCABULARY, DigitTask, digit_tokenizer, exact_match
from retain.models.description import default_device

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the study takes."""

    model_size: str = "134k"
    digits: int = 2
    batch_size: int = 256
    replay_rows: int = 128
    first_steps: int = 600
    steps: int = 300
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    coef: float = 1.0
    schedule: str = "linear"
    eval_steps: int = 25
    held_out_rows: int = 512
    seeds: int = 3


PAPER: dict[str, Any] = {"model_size": "2M", "digits": 3, "first_steps": 2000, "steps": 2000, "learning_rate": 1e-4}
SCALES = {
    "laptop": Scale(),
    "gpu": Scale(**PAPER, batch_size=2048, replay_rows=512, coef=10.0, warmup_steps=100, eval_steps=250, seeds=1),
}


class Accuracies(TrainerCallback):
    """Exact match on the held-out rows of every task, every so many steps of the whole sequence."""

    def __init__(self, tests: dict[str, np.ndarray], every: int, answer_length: int, first_step: int) -> None:
        self.tests, self.every, self.answer_length, self.first_step = tests, every, answer_length, first_step
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        """Measure now, and keep it under this step of the task."""
        means = {task: exact_match(model, rows, self.answer_length).mean() for task, rows in self.tests.items()}
        self.found.append({"step": self.first_step + step} | {task: round(float(at), 4) for task, at in means.items()})


def arguments(scale: Scale, steps: int, folder: Path, seed: int) -> TrainingArguments:
    """AdamW as the paper's; rows come in the order of their numbers."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=scale.batch_size,
        learning_rate=scale.learning_rate,
        lr_scheduler_type=scale.schedule,
        warmup_steps=scale.warmup_steps,
        adam_beta2=0.99,
        weight_decay=0.02,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=default_device() == "cpu",
        seed=seed,
    )


def test_rows(task: DigitTask, most: int) -> np.ndarray:
    """Held-out rows; of a task with a hundred items or fewer all of them, as a tenth would be too few to count."""
    return task.held_out_rows(most) if task.num_items > 100 else task.rows(np.arange(task.num_items))


def replay_of(model: Any, earlier: Sequence[DigitTask], scale: Scale, seed: int) -> ReplayDataset:
    """Rows for a whole task, never used twice: the model's own, from the earlier tasks' start tokens in turn."""
    starts = [earlier[number % len(earlier)].start_id for number in range(scale.steps * scale.replay_rows)]
    rows = drawn_rows(model, starts, earlier[0].length, seed)
    return ReplayDataset.from_rows(rows, f"{len(earlier)} start tokens")


def learn(model: Any, task: int, method: str, tasks: Sequence[DigitTask], scale: Scale, seed: int) -> list[dict]:
    """Train on one task, with the replay of the method where there are earlier ones; accuracies over its steps."""
    protected = task > 0 and method != "none"
    steps, before = (scale.steps, scale.first_steps + (task - 1) * scale.steps) if task else (scale.first_steps, 0)
    tests = {one.name: test_rows(one, scale.held_out_rows) for one in tasks}
    watch = Accuracies(tests, scale.eval_steps, tasks[0].answer_length, before)
    stream = 1000 * seed + 10 * task
    with scratch() as folder:
        trainer = ReplayTrainer(
            model=model,
            args=arguments(scale, steps, folder, seed),
            train_dataset=Stream(
                lambda numbers: tasks[task].training_rows(numbers, stream + 1), steps * scale.batch_size
            ),
            data_collator=default_data_collator,
            processing_class=digit_tokenizer(tasks[0].name),
            replay_config=ReplayConfig(
                replay_objective=method if protected else "kl",  # type: ignore[arg-type]
                replay_coef=scale.coef if protected else 0.0,
                per_device_replay_batch_size=scale.replay_rows,
            ),
            replay_dataset=replay_of(model, tasks[:task], scale, stream + 2) if protected else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        watch.measure(trainer.model, 0)
        trainer.train()
    return watch.found


def run_sequence(method: str, seed: int, scale: Scale, first: dict[int, Any]) -> dict[str, Any]:
    """The four tasks one after the other; the first, which no method touches, is learned once per seed."""
    tasks = [DigitTask(name, scale.digits) for name in TASKS]
    config = make_config(scale.model_size, vocab_size=len(VOCABULARY), max_length=tasks[0].length)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tasks[0].start_id, EOS, PAD
    model = make_model(config, seed).to(default_device())
    if seed not in first:
        found = learn(model, 0, method, tasks, scale, seed)
        first[seed] = {name: weight.clone() for name, weight in model.state_dict().items()}, found
    weights, trajectory = first[seed]
    model.load_state_dict(weights)
    trajectory = list(trajectory)
    for task in range(1, len(tasks)):
        trajectory += learn(model, task, method, tasks, scale, seed)
    return {"trajectory": trajectory}


def fixed_of(scale: Scale) -> dict[str, Any]:
    return {name: value for name, value in asdict(scale).items() if name != "seeds"}


def make(name: str, seed: int) -> None:
    scale, results, first = SCALES[name], StudyResults(HERE / "results.jsonl", name), {}
    for method in METHODS:
        settings = {"method": method, "seed": seed, **fixed_of(scale)}
        results.make(settings, lambda method=method: run_sequence(method, seed, scale, first))


def page(name: str) -> Report:
    if not (rows := StudyResults(HERE / "results.jsonl", name).rows_with(fixed_of(SCALES[name]))):
        raise NoReport("no run is made yet")
    return report(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=page, arguments=arguments)
