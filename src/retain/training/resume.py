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
    if checkpoint is not None and _has_ended(trainer, _state(Path(checkpoint))):
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
        ValueError: for a checkpoint that is not whole, and for a folder with checkpoints from which nobody wants to go
            on: they would be written over, and a run that is killed in between would go on from what is left of them.
    """
    asked, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not asked or str(asked).lower() == "false":
        if old := [path.name for path in folder.glob("checkpoint-*") if path.is_dir()]:
            raise ValueError(
                f"output_dir: {str(folder)!r} holds {min(old)} of an earlier run; go on from it with "
                "--resume_from_checkpoint true, or choose another folder"
            )
        return None
    if str(asked).lower() != "true":
        if not _is_whole(Path(asked)):
            raise ValueError(f"resume_from_checkpoint: {asked!r} is not a whole checkpoint; give a checkpoint-N folder")
        return str(asked)
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    whole = [path for path in found if _is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    return bool(_state(checkpoint))


def _state(checkpoint: Path) -> dict[str, Any]:
    """What `trainer_state.json` says; nothing where it is not there, or cut off."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class StopWithCheckpoint(TrainerCallback):
    """SIGINT or SIGTERM ends training after the step that is being made, with a checkpoint; a second one at once.

    For one process: several would stop at different steps, and wait for one another.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a signal waits for the end of a step; it is raised when leaving at the latest."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            self._stop_if_asked()
        finally:
            self._listen_no_more()

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = number
        self._listen_no_more()
        os.write(2, b"\nretain: stopping after this step, with a checkpoint; once more to stop at once\n")

    def _listen_no_more(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _stop_if_asked(self) -> None:
        if self.asked is not None:
            signal.raise_signal(self.asked)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked is not None and args.save_strategy == "no":
            self._stop_if_asked()
        control.should_save |= self.asked is not None

    on_evaluate = on_step_end  # which may have taken long

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop_if_asked()
