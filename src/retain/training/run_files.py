"""What a run leaves behind as plain files, beside any tracker.

`metrics.jsonl`: every log, one object a line. `documents.jsonl`: per-document sums of each retention text at each
evaluation, for paired intervals. `retain_config.json`: everything that was set, resolved. `budget.json`: whether a
forgetting budget was kept.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from retain.files import (
    CONFIG_FILE,
    MAPPING,
    METRICS_FILE,
    NUMBER,
    append_jsonl,
    check_shape,
    is_finite,
    read_json,
    read_jsonl,
    read_settings,
    write_json,
    write_text,
)
from retain.models.loading import find_file, resolve_model_path

DOCUMENTS_FILE = "documents.jsonl"
BUDGET_FILE = "budget.json"
OF_LOSS = ("completion_only_loss", "assistant_only_loss", "dataset_text_field")  # of TRL's SFTConfig
OF_ROWS = {"loss_tokens": str, "retention_windows": int}  # what was counted of rows, and of retention texts
OF_TRAINING = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed")
# Shapes of these files, for `check_shape`.
SETTINGS = {
    "replay?": MAPPING,
    "reference?": str,
    "training_arguments": dict.fromkeys(OF_TRAINING, NUMBER),
    **{f"{name}?": kind for name, kind in OF_ROWS.items()},
}
METRICS, DOCUMENTS = {"step": int, "kept_step?": int}, {"step": int, "name": str}


def weights_step(args: TrainingArguments, state: TrainerState, *, is_in_train: bool) -> int:
    """The optimizer step whose weights the model holds: the best one where `load_best_model_at_end` restored it.

    `state.best_global_step` is another where the best evaluation came between two checkpoints.
    """
    restored = state.best_model_checkpoint if args.load_best_model_at_end and not is_in_train else None
    return int(restored.rpartition("-")[2]) if restored else state.global_step


def settings_of_run(model: str) -> dict[str, Any]:
    """The settings of the run that made a model, found beside it, on the Hub too, or above one of its checkpoints."""
    path = resolve_model_path(model)
    beside, above = find_file(path, CONFIG_FILE), Path(path).resolve().parent
    of_checkpoint = beside is None and Path(path).is_dir() and Path(path).resolve().name.startswith("checkpoint-")
    folder = above if of_checkpoint else Path(path) if beside is None else beside.parent
    return read_settings(folder, {"training_arguments?": dict, "replay_dataset?": {"source?": str}})


def read_run(folder: Path) -> dict[str, Any]:
    """What a finetuned model's folder holds of its run: `training`, `trajectory` and `documents` of a report.

    Empty where the model was not trained with `retain`.
    """
    settings = read_settings(folder, SETTINGS)
    if not settings:
        return {}
    arguments = settings["training_arguments"]
    training = {
        **(settings.get("replay") or {}),  # none beside another trainer
        "reference": settings.get("reference"),
        **{name: arguments[name] for name in OF_TRAINING},
        **{name: arguments[name] for name in OF_LOSS if name in arguments},
        **{name: settings[name] for name in OF_ROWS if settings.get(name) is not None},
    }
    if (path := folder / BUDGET_FILE).is_file():
        remedy = "delete it to go without, or finetune again"
        verdict: dict[str, Any] = read_json(path, "model", remedy)
        check_shape(verdict, {"text": str}, f"model: {str(path)!r} is damaged", remedy)
        training["budget"] = verdict["text"]
    steps: dict[int, dict[str, Any]] = {}
    rows = read_jsonl(folder / METRICS_FILE, METRICS)
    for row in rows:  # one row a step: the logs of an evaluation come in two parts
        steps.setdefault(row["step"], {}).update(row)
        if "kept_step" in row:
            training["kept_step"] = row["kept_step"]
    documents = read_jsonl(folder / DOCUMENTS_FILE, DOCUMENTS)
    measured = [{key: row[key] for key in row if key == "eval_loss" or key.startswith("retention/")} for row in rows]
    for name, of_file in ((METRICS_FILE, measured), (DOCUMENTS_FILE, documents)):
        if not is_finite(of_file):
            raise ValueError(
                f"model: {str(folder / name)!r} holds a loss that is not finite, which is no result; finetune again "
                "with a lower learning_rate or rows that leave something to predict, or delete the line"
            )
    return {"training": training, "trajectory": [steps[step] for step in sorted(steps)], "documents": documents}


class RunFilesCallback(TrainerCallback):
    """Write `metrics.jsonl` and `retain_config.json`; a resumed run drops the rows that it makes again.

    Args:
        settings: what to keep in `retain_config.json` beside the training arguments.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.began = 0  # the step that a resumed run begins with ...
        self.logged: list[Any] = []  # ... the names in its rows, and the texts measured at it
        self.documented: set[str] = set()
        self.kept: int | None = None  # the step whose weights the model holds, once training has ended

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.kept = None
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        step, again = state.global_step, int(args.eval_on_start)  # which measures the resumed step once more
        rows = [row for row in read_jsonl(folder / METRICS_FILE, METRICS) if step]
        # At the step of the checkpoint, what the checkpoint knows of: a run may be killed after its last one.
        known = [entry.items() for entry in state.log_history if entry["step"] == step]
        kept = [row for row in rows if row["step"] < step or any(row.items() <= entry for entry in known)]
        self.logged, self.began = [row.keys() for row in kept if row["step"] == step], step
        documents = read_jsonl(folder / DOCUMENTS_FILE, DOCUMENTS)
        documents = [row for row in documents if step and row["step"] <= step - again]
        self.documented = {row["name"] for row in documents if row["step"] == step}
        for name, rows in ((METRICS_FILE, kept), (DOCUMENTS_FILE, documents)):
            write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        if step < state.max_steps:
            (folder / BUDGET_FILE).unlink(missing_ok=True)
        before = read_settings(folder).get("created") if step else None
        created = before or datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / CONFIG_FILE, {**self.settings, "created": created, "training_arguments": args.to_dict()})

    def append_documents(self, args: TrainingArguments, state: TrainerState, row: dict[str, Any]) -> None:
        """Add the per-document sums of a text at a step, unless they were kept before the run was resumed."""
        kept = row["step"] == self.began and row["name"] in self.documented
        if state.is_world_process_zero and not kept:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_jsonl(Path(args.output_dir) / DOCUMENTS_FILE, row)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        measured = {name for name in logs if name.startswith("retention/")}
        if measured and state.global_step == self.began and any(measured <= names for names in self.logged):
            return  # it was measured before the run was killed
        if state.is_world_process_zero and logs:
            step = state.global_step if self.kept is None else self.kept
            append_jsonl(Path(args.output_dir) / METRICS_FILE, {"step": step, **logs})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Record which step's weights the model holds, where they are not the last."""
        self.kept = weights_step(args, state, is_in_train=False)
        if state.is_world_process_zero and self.kept != state.global_step:
            append_jsonl(Path(args.output_dir) / METRICS_FILE, {"step": state.global_step, "kept_step": self.kept})
