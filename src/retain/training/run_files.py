"""The plain files that a run writes, with any tracker.

`metrics.jsonl`: every log, one object a line. `documents.jsonl`: per-document sums of each retention text at each
evaluation, for paired intervals. `retain_config.json`: every setting, with defaults resolved. `budget.json`: whether a
forgetting budget was kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from retain.files import (
    CONFIG_FILE,
    MAPPING,
    METRICS_FILE,
    NUMBER,
    append_jsonl,
    check_shape,
    read_json,
    read_jsonl,
    read_settings,
    without_nan,
    write_json,
    write_text,
)
from retain.models.adapters import adapted_model
from retain.models.loading import find_file, resolve_model_path

DOCUMENTS_FILE = "documents.jsonl"
BUDGET_FILE = "budget.json"
LOSS_ARGUMENTS = ("completion_only_loss", "assistant_only_loss", "dataset_text_field")  # of TRL's SFTConfig
COUNTED_TOKENS = {"loss_tokens": str, "retention_windows": int}  # what counts in rows and in retention texts
REPORTED_ARGUMENTS = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed")
# Shapes of these files, for `check_shape`.
SETTINGS = {
    "replay?": MAPPING,
    "reference?": str,
    "training_arguments": dict.fromkeys(REPORTED_ARGUMENTS, NUMBER),
    **{f"{name}?": kind for name, kind in COUNTED_TOKENS.items()},
}
BASE = {"model": str, "revision?": str, "fingerprint?": str}
METRICS, DOCUMENTS = {"step": int, "kept_step?": int}, {"step": int, "name": str}


def weights_step(args: TrainingArguments, state: TrainerState, *, is_in_train: bool) -> int:
    """The optimizer step of the model's current weights: the best one, if `load_best_model_at_end` restored it.

    `state.best_global_step` differs from it if the best evaluation came between two checkpoints.
    """
    restored = state.best_model_checkpoint if args.load_best_model_at_end and not is_in_train else None
    return int(restored.rpartition("-")[2]) if restored else state.global_step


def settings_of_run(model: str) -> dict[str, Any]:
    """The settings of the run that made a model: from its folder or Hub repository, or the folder of a checkpoint."""
    path = resolve_model_path(model)
    config_file, parent = find_file(path, CONFIG_FILE), Path(path).resolve().parent
    is_checkpoint = config_file is None and Path(path).is_dir() and Path(path).resolve().name.startswith("checkpoint-")
    folder = parent if is_checkpoint else Path(path) if config_file is None else config_file.parent
    return read_settings(folder, {"training_arguments?": dict, "replay_dataset?": {"source?": str}, "base?": BASE})


def named_base(model: Any, fingerprint: str | None) -> dict[str, str | None]:
    """How `retain_config.json` names the model to be trained: id or absolute path, commit on the Hub, fingerprint."""
    name, is_whole = model.name_or_path, not (getattr(model, "is_quantized", False) or is_deepspeed_zero3_enabled())
    return {
        "model": str(Path(name).absolute()) if name and Path(name).exists() else name,
        "revision": getattr(model.config, "_commit_hash", None),
        # loaded whole or in another precision, such a model has another
        "fingerprint": fingerprint if is_whole and model.dtype != torch.float16 else None,
    }


@dataclass(frozen=True)
class NamedBase:
    """The base of a finetuned model, from its files: `source` says which.

    Attributes:
        fingerprint: None if no file holds it.
    """

    model: str
    source: str
    revision: str | None = None
    fingerprint: str | None = None

    def differs_from(self, other: NamedBase) -> bool:
        """Whether name, revision or fingerprint differ, of what both know."""
        names = ("model", "revision", "fingerprint")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def check(self, model: Any, fingerprint: str) -> None:
        """Raise a `ValueError` if the base, once loaded, has another fingerprint, which float16 always gives it."""
        if model.dtype != torch.float16 and self.fingerprint not in (None, fingerprint):
            raise ValueError(f"base: {self.model!r} is no longer {self.source}; give --base")


def base_of(model: str, run: Mapping[str, Any]) -> NamedBase:
    """The base that an adapter names, the one that the run was started from, or the one that drew its replay rows.

    Args:
        run: `settings_of_run(model)`.

    Raises:
        ValueError: if none is known.
    """
    base, name = run.get("base") or {}, adapted_model(model)
    if name and base.get("model") != name:
        return NamedBase(name, f"the base that the adapter {model!r} names")
    if base.get("model"):
        source = f"the model that the run in {model!r} was started from"
        return NamedBase(base["model"], source, base.get("revision"), base.get("fingerprint"))
    manifest = (run.get("replay_dataset") or {}).get("manifest") or {}
    if not (name := manifest.get("model")):
        raise ValueError(f"base: {model!r} does not name its base; give --base")
    return NamedBase(name, "the model that wrote the run's replay rows", None, manifest.get("model_fingerprint"))


def read_run(folder: Path) -> dict[str, Any]:
    """The run recorded in a finetuned model's folder: `training`, `trajectory` and `documents` of a report.

    Empty if the model was not trained with `retain`.
    """
    settings = read_settings(folder, SETTINGS)
    if not settings:
        return {}
    arguments = settings["training_arguments"]
    training = {
        **(settings.get("replay") or {}),  # `ForgettingCallback` has none
        "reference": settings.get("reference"),
        **{name: arguments[name] for name in REPORTED_ARGUMENTS},
        **{name: arguments[name] for name in LOSS_ARGUMENTS if name in arguments},
        **{name: settings[name] for name in COUNTED_TOKENS if settings.get(name) is not None},
    }
    if (path := folder / BUDGET_FILE).is_file():
        remedy = "delete it to go without, or finetune again"
        verdict: dict[str, Any] = read_json(path, "model", remedy)
        check_shape(verdict, {"text": str}, f"model: {str(path)!r} is damaged", remedy)
        training["budget"] = verdict["text"]
    steps: dict[int, dict[str, Any]] = {}
    rows = read_jsonl(folder / METRICS_FILE, METRICS)
    for row in rows:  # merged by step: the logs of an evaluation come in two parts
        steps.setdefault(row["step"], {}).update(row)
        if "kept_step" in row:
            training["kept_step"] = row["kept_step"]
    documents = read_jsonl(folder / DOCUMENTS_FILE, DOCUMENTS)
    measured = [{key: row[key] for key in row if key == "eval_loss" or key.startswith("retention/")} for row in rows]
    for name, values in ((METRICS_FILE, measured), (DOCUMENTS_FILE, documents)):
        if without_nan(values) != values:
            raise ValueError(
                f"model: {str(folder / name)!r} holds a loss that is not finite, which is no result; finetune again "
                "with a lower learning_rate or rows that leave something to predict, or delete the line"
            )
    return {"training": training, "trajectory": [steps[step] for step in sorted(steps)], "documents": documents}


class RunFilesCallback(TrainerCallback):
    """Write `metrics.jsonl` and `retain_config.json`; a resumed run drops the rows that it will write again.

    Args:
        settings: what `retain_config.json` holds besides the training arguments.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.resumed_step = 0
        self.logged_names: list[Any] = []  # names in each row logged at the resumed step before
        self.measured_texts: set[str] = set()  # texts measured at the resumed step before
        self.kept_step: int | None = None  # the step of the model's weights, once training has ended

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.kept_step = None
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        step, remeasures = state.global_step, int(args.eval_on_start)  # the resumed step is measured once more
        rows = [row for row in read_jsonl(folder / METRICS_FILE, METRICS) if step]
        # Of the checkpoint's step keep only what it has logged itself: the killed run may have continued after it.
        in_checkpoint = [entry.items() for entry in state.log_history if entry["step"] == step]
        kept = [row for row in rows if row["step"] < step or any(row.items() <= entry for entry in in_checkpoint)]
        self.logged_names, self.resumed_step = [row.keys() for row in kept if row["step"] == step], step
        documents = read_jsonl(folder / DOCUMENTS_FILE, DOCUMENTS)
        documents = [row for row in documents if step and row["step"] <= step - remeasures]
        self.measured_texts = {row["name"] for row in documents if row["step"] == step}
        for name, rows in ((METRICS_FILE, kept), (DOCUMENTS_FILE, documents)):
            write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        if step < state.max_steps:
            (folder / BUDGET_FILE).unlink(missing_ok=True)
        resumed_created = read_settings(folder).get("created") if step else None
        created = resumed_created or datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / CONFIG_FILE, {**self.settings, "created": created, "training_arguments": args.to_dict()})

    def append_documents(self, args: TrainingArguments, state: TrainerState, row: dict[str, Any]) -> None:
        """Add the per-document sums of a text at a step, unless they were written before the run was resumed."""
        is_written = row["step"] == self.resumed_step and row["name"] in self.measured_texts
        if state.is_world_process_zero and not is_written:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_jsonl(Path(args.output_dir) / DOCUMENTS_FILE, row)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        measured = {name for name in logs if name.startswith("retention/")}
        if (
            measured
            and state.global_step == self.resumed_step
            and any(measured <= names for names in self.logged_names)
        ):
            return  # written before the run was killed
        if state.is_world_process_zero and logs:
            step = state.global_step if self.kept_step is None else self.kept_step
            append_jsonl(Path(args.output_dir) / METRICS_FILE, {"step": step, **logs})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Record the step of the model's weights, if it is not the last one."""
        self.kept_step = weights_step(args, state, is_in_train=False)
        if state.is_world_process_zero and self.kept_step != state.global_step:
            append_jsonl(Path(args.output_dir) / METRICS_FILE, {"step": state.global_step, "kept_step": self.kept_step})
