"""How a run ends, at a target loss or on a signal with a checkpoint, and how it resumes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from retain.checks import Unchosen
from retain.files import CONFIG_FILE, read_settings
from retain.models.description import launched

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model.bin", ".gguf")  # endings of file names
SAME_ON_RESUME = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing"),
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay"),
)


def train(trainer: Any, checkpoint: str | None, *, keep: bool = True) -> None:
    """Train, and save the model if `keep` is set; a signal ends training with a checkpoint.

    A run that was killed after its last step makes no step more, though transformers would make one.
    """
    args = trainer.args
    check_holds_optimizer(trainer, checkpoint)
    if checkpoint is not None and _has_ended(trainer, _trainer_state(Path(checkpoint))):
        trainer.get_batch_samples = lambda *rest: ([], None)
    stopping = StopWithCheckpoint()
    trainer.add_callback(stopping)
    with stopping.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
        if keep:
            trainer.save_model(args.output_dir)  # before anything that may fail


def _has_ended(trainer: Any, state: dict[str, Any]) -> bool:
    callbacks = trainer.callback_handler.callbacks
    targets = [callback.target for callback in callbacks if isinstance(callback, StopAtLoss)]
    lowest = min((row.get("eval_loss", math.inf) for row in state["log_history"]), default=math.inf)
    return 0 < trainer.args.max_steps <= state["global_step"] or any(lowest <= target for target in targets)


def check_holds_optimizer(trainer: Any, resumed: str | Path | bool | None) -> None:
    """Refuse to resume from a checkpoint of the weights alone: transformers would start Adam and the schedule anew.

    Args:
        resumed: `resume_from_checkpoint` as transformers takes it: a path, True for the last checkpoint, or nothing.
    """
    last = get_last_checkpoint(trainer.args.output_dir) if resumed is True else resumed
    checkpoint = Path(last) if last else None
    if checkpoint and _holds_weights_alone(checkpoint) and not _has_ended(trainer, _trainer_state(checkpoint)):
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} holds no state of the optimizer and the schedule "
            "(save_only_model), without which both would start anew; start again in another folder, with "
            "save_only_model false to be able to resume"
        )


def _holds_weights_alone(checkpoint: Path) -> bool:
    """Whether a whole checkpoint holds no schedule; `latest` names DeepSpeed's state."""
    return bool(_trainer_state(checkpoint)) and not any(
        (checkpoint / name).exists() for name in ("scheduler.pt", "latest")
    )


def check_no_model(folder: Path) -> None:
    """Reject an output folder that already holds a model."""
    if weights := _weight_files(folder):
        raise ValueError(
            f"output_dir: {str(folder)!r} holds a model ({min(weights)}), which would be lost; choose another folder"
        )


def _weight_files(folder: Path) -> list[str]:
    return [file.name for ending in WEIGHTS for file in folder.glob(f"*{ending}") if not file.name.startswith(".")]


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdigit()]


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by step: `trainer_state.json` is the last file of each to be written."""
    return sorted(filter(_trainer_state, _checkpoints(folder)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def how_to_resume(folder: Path) -> str:
    """What to do after a run in this folder was interrupted, as a sentence."""
    if (checkpoints := whole_checkpoints(folder)) and _holds_weights_alone(checkpoints[-1]):
        return "its checkpoints hold weights alone (save_only_model); start again in another folder"
    if checkpoints:
        return "run the same command with --resume_from_checkpoint true to resume from the last checkpoint"
    if _checkpoints(folder) or _weight_files(folder):  # a new run would refuse to overwrite these
        return "there is no whole checkpoint; run the same command with --resume_from_checkpoint true to begin again"
    return "there is no checkpoint yet; run the same command to begin again"


def checkpoint_to_resume(training_args: Any) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, or for "true" the last complete one.

    Removes checkpoints that a killed process left half-written.

    Raises:
        ValueError: for an incomplete checkpoint, and for a folder with files that the run would overwrite: checkpoints
            that are not to be resumed, or a model, which may be the one to finetune.
    """
    given, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    is_new = not given or str(given).lower() == "false"
    if is_new and (old := _checkpoints(folder)):
        raise ValueError(
            f"output_dir: {str(folder)!r} holds {min(old).name} of an earlier run; resume it with "
            "--resume_from_checkpoint true, or choose another folder"
        )
    if is_new or not (folder / CONFIG_FILE).exists():  # no run to resume
        check_no_model(folder)
    if is_new:
        return None
    if str(given).lower() != "true":
        if not _trainer_state(Path(given)):
            raise ValueError(f"resume_from_checkpoint: {given!r} is not a whole checkpoint; give a checkpoint-N folder")
        return str(given)
    *_, last = None, *whole_checkpoints(folder)
    if training_args.process_index == 0:
        for path in _checkpoints(folder):  # PEFT would copy a half-written model card into the new one
            if last is None or _step_of(path) > _step_of(last):
                shutil.rmtree(path)
    return None if last is None else str(last)


def check_same_run(checkpoint: str, args: TrainingArguments, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse to resume a run with settings other than those it started with.

    Args:
        args: arguments that nobody set and the model decides are not compared.
        settings: current values of parts of `retain_config.json`; parts that the file lacks are not compared.
    """
    folder = Path(checkpoint).resolve().parent
    given = {name: value for name, value in args.to_dict().items() if not isinstance(value, Unchosen)}
    now = {"training_arguments": {name: given[name] for name in SAME_ON_RESUME if name in given}, **(settings or {})}
    if change := next(_changes(now, read_settings(folder)), None):
        name, value, before = change
        if name == "new_rows":
            raise ValueError(
                f"new_rows: the run in {str(folder)!r} started with other rows of the new task (their file, the "
                "tokenizer, or its chat template was changed); give the same rows, or another folder"
            )
        how, remedy = ("without it", "leave it out") if before is None else (f"with {before!r}", "use that")
        now_it_is = "missing" if value is None else repr(value)
        raise ValueError(
            f"{name}: {now_it_is}, but the run in {str(folder)!r} started {how}; {remedy}, or use another folder"
        )


def _changes(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each changed setting: its name, its value now, and its value before."""
    for name, value in now.items():
        value_before = before.get(name, value)
        if isinstance(value, dict) and isinstance(value_before, dict):
            yield from _changes(value, value_before)
        elif value != value_before:
            yield name, value, value_before


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The content of `trainer_state.json`; empty if it is missing or cut off, which makes the checkpoint incomplete."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class StopWithCheckpoint(TrainerCallback):
    """Ends training with a checkpoint after the current step on SIGINT or SIGTERM; a second signal ends it at once.

    The signal is then raised again for the handlers that were there before (`cli.signals`); if they let training
    continue, there is one checkpoint. An ignored signal stays ignored, like SIGINT in a shell's background job.
    Only in a single process: several would stop at different steps and wait for each other.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.handlers: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which a signal waits for the end of a step, or of the context."""
        if not launched() and threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            caught = (number for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None))
            self.handlers = {number: signal.signal(number, self._receive) for number in caught}
        try:
            yield
            self._raise_received()
        finally:
            self._restore_handlers()

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        self._restore_handlers()
        os.write(2, b"\nretain: stopping after this step, with a checkpoint; once more to stop at once\n")

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _raise_received(self) -> None:
        number, self.received = self.received, None
        if number is not None:
            signal.raise_signal(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.save_strategy == "no":
            self._raise_received()
        control.should_save |= self.received is not None

    on_evaluate = on_step_end  # a signal may have come during a long evaluation

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._raise_received()


class StopAtLoss(TrainerCallback):
    """Ends training at the first evaluation whose loss is at most the target, in nats per token."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.loss: float | None = None  # at the last evaluation, or when the target was reached
        self.step: int | None = None  # at which the target was reached

    @property
    def reached(self) -> bool:
        return self.step is not None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Read the evaluations from before the run was resumed."""
        self.loss, self.step = None, None
        for row in state.log_history:
            self._read(row, row["step"])

    def _read(self, measured: dict[str, Any], step: int) -> None:
        if "eval_loss" in measured and not self.reached:
            self.loss = measured["eval_loss"]
            self.step = step if self.loss <= self.target else None

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self._read(metrics, state.global_step)
        control.should_training_stop |= self.reached

    def __str__(self) -> str:
        if self.reached:
            return f"target loss: reached {self.loss:.4f} (target {self.target:g}) at step {self.step}"
        found = "never evaluated" if self.loss is None else f"the loss is {self.loss:.4f}"
        return f"target loss: not reached; {found}, target {self.target:g}; give it more steps"


def check_stopping(args: Any, target: float | None, patience: int | None = None) -> None:
    """Raise a `ValueError` for a target loss or patience without evaluations, or patience without a metric."""
    evaluates = args.eval_strategy != IntervalStrategy.NO
    if target is not None and not evaluates:
        raise ValueError(f"stop_at_loss: {target:g} needs evaluations; set eval_strategy steps, and eval_steps")
    if patience is not None and not (evaluates and args.metric_for_best_model):
        raise ValueError(
            f"early_stopping_patience: {patience} needs metric_for_best_model, e.g. retention/wiki/ref_kl, and "
            "eval_strategy steps or epoch; set both"
        )
