"""Training that resumes from its last whole checkpoint, and leaves one when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retain.training.stop_at_loss import StopAtLoss


def train(trainer: Any, checkpoint: str | None) -> None:
    """Train and save; a signal ends it with a checkpoint.

    A run that was killed after its last step is at its end: transformers would make one step more.
    """
    args = trainer.args
    if checkpoint is not None and _has_ended(trainer, _trainer_state(Path(checkpoint))):
        trainer.get_batch_samples = lambda *rest: ([], None)
    stopping = StopWithCheckpoint()
    trainer.add_callback(stopping)
    with stopping.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(args.output_dir)  # before anything that may fail


def _has_ended(trainer: Any, state: dict[str, Any]) -> bool:
    watches = [one for one in trainer.callback_handler.callbacks if isinstance(one, StopAtLoss)]
    return 0 < trainer.args.max_steps <= state["global_step"] or any(
        watch.was_reached(state["log_history"]) for watch in watches
    )


def checkpoint_to_resume(training_args: Any) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a path, or for "true" the last one written whole.

    A killed process may leave a checkpoint half-written; `trainer_state.json` is the last file to be written.

    Raises:
        ValueError: for a checkpoint that is not whole, and for a folder with checkpoints that are not to be resumed:
            the run would write over them, and a run killed in between would resume from a mixture.
    """
    given, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not given or str(given).lower() == "false":
        if old := [path.name for path in folder.glob("checkpoint-*") if path.is_dir()]:
            raise ValueError(
                f"output_dir: {str(folder)!r} holds {min(old)} of an earlier run; resume it with "
                "--resume_from_checkpoint true, or choose another folder"
            )
        return None
    if str(given).lower() != "true":
        if not _trainer_state(Path(given)):
            raise ValueError(f"resume_from_checkpoint: {given!r} is not a whole checkpoint; give a checkpoint-N folder")
        return str(given)
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    whole = [path for path in found if _trainer_state(path)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What `trainer_state.json` holds; nothing where it is missing, or cut off: the checkpoint is not whole."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class StopWithCheckpoint(TrainerCallback):
    """SIGINT or SIGTERM ends training after the current step, with a checkpoint; a second one ends it at once.

    The signal is raised again then, so what it means is for the handlers that were there before (`cli.signals`) to say.
    In one process alone: several would stop at different steps, and wait for one another.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.handlers: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this context a signal waits for the end of a step, or of the context."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
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
        if self.received is not None:
            signal.raise_signal(self.received)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.save_strategy == "no":
            self._raise_received()
        control.should_save |= self.received is not None

    on_evaluate = on_step_end  # which may have taken long

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._raise_received()
