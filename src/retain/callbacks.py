"""What a run leaves behind as plain files, whatever tracker is used beside it.

`metrics.jsonl`: every log, one object a line. `documents.jsonl`: per-document sums of each retention text at each
evaluation, for paired intervals. `retain_config.json`: everything that was set, resolved. `budget.json`: whether a
forgetting budget was kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retain.files import CONFIG_FILE, append_jsonl, read_jsonl, write_json, write_text

METRICS_FILE = "metrics.jsonl"
DOCUMENTS_FILE = "documents.jsonl"
BUDGET_FILE = "budget.json"


def read_run(folder: Path) -> dict[str, Any]:
    """What a finetuned model's folder tells of its run: `training`, `trajectory` and `documents` of a report.

    Empty where the model was not trained with `retain`.
    """
    if not (folder / CONFIG_FILE).is_file():
        return {}
    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    arguments = settings["training_arguments"]
    names = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed")
    training = {
        **settings["replay"],
        "reference": settings["reference"],
        **{name: arguments[name] for name in names},
    }
    if (folder / BUDGET_FILE).is_file():
        training["budget"] = json.loads((folder / BUDGET_FILE).read_text(encoding="utf-8"))["text"]
    steps: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(folder / METRICS_FILE):  # one row a step: the logs of an evaluation come in two parts
        steps.setdefault(row["step"], {}).update(row)
    return {
        "training": training,
        "trajectory": [steps[step] for step in sorted(steps)],
        "documents": read_jsonl(folder / DOCUMENTS_FILE),
    }


class RunFilesCallback(TrainerCallback):
    """Write `metrics.jsonl` and `retain_config.json`; a resumed run drops the rows it is about to make again.

    Args:
        settings: what to keep in `retain_config.json` beside the training arguments.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        step, again = state.global_step, int(args.eval_on_start)  # which measures the step it goes on from once more
        for name, last in ((METRICS_FILE, step), (DOCUMENTS_FILE, step - again)):
            kept = [row for row in read_jsonl(folder / name) if row.get("step", 0) <= last]
            write_text(folder / name, "".join(json.dumps(row) + "\n" for row in kept if step))
        (folder / BUDGET_FILE).unlink(missing_ok=True)
        write_json(folder / CONFIG_FILE, {**self.settings, "training_arguments": args.to_dict()})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            append_jsonl(Path(args.output_dir) / METRICS_FILE, {"step": state.global_step, **logs})
