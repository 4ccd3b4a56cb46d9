"""Forgetting measured inside a trainer: held-out texts against the base, at every evaluation."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import SchedulerType, TrainerState, TrainingArguments
from transformers.trainer_utils import default_compute_objective

from retain.checks import several
from retain.data.rows import Document, as_documents, bytes_of_text, special_spellings, without_copies
from retain.measuring.tokens import (
    Forward,
    batches,
    document_sums,
    logits_at,
    measuring_title,
    negated,
    padded,
    summarize,
)
from retain.models.head import reshard
from retain.models.reference import Reference, evaluation_mode
from retain.report.metrics import GAIN, LOGGED, METRICS
from retain.training.run_files import RunFilesCallback, weights_step

logger = logging.getLogger(__name__)

OWN_METRICS = tuple(name for name in LOGGED if name != "loss")  # names that no host's metric has
NEW_TASK_TEXT = "new task"  # what a report calls the held-out rows of the new task
Tables = dict[str, dict[str, dict[str, Any]]]  # name of the text → metric → value, interval and sizes


class RetentionMeasurer(RunFilesCallback):
    """Measures the model being trained against its frozen base on named texts, at most once per optimizer step.

    The values go into the trainer's log, into the metrics of its evaluation (which early stopping and the choice of
    the best checkpoint read) and, with per-document sums, into files. Its owner sets the texts and the reference.

    Attributes:
        documents: name of the text → its documents.
        new_task: held-out rows of the new task, which `measure_new_task` measures.
        reference: the frozen base; None if nothing is compared with it.
        sums: name of the text, or `NEW_TASK_TEXT` → the latest per-document sums.
        tables: optimizer step whose weights were measured → text → metric → value and interval.
        trainer: its log takes the values; if None, only the files, `log_history` and the evaluation's metrics do.
    """

    trainer: Any = None

    def __init__(self) -> None:
        super().__init__({})
        self.documents: dict[str, list[Document]] = {}
        self.new_task: list[Document] = []
        self.reference: Reference | None = None
        self.sums: dict[str, dict[str, list[float]]] = {}
        self.tables: dict[int, Tables] = {}
        self._values: dict[int, dict[str, float]] = {}  # the same steps → values by their names in logs
        self._measured_with: dict[tuple[int, str], str] = {}  # step, prefix → the evaluation set that has the values
        self._is_logged = True
        self._is_in_train = self._is_proven = False

    # Hooks

    def prepare(self, args: TrainingArguments, state: TrainerState, model: Any, processing_class: Any) -> None:
        """Called before each measurement, for a subclass that takes the base itself."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget earlier measurements, which are of other weights."""
        self.prepare(args, state, kwargs["model"], kwargs.get("processing_class"))
        self.tables, self._measured_with, self._is_in_train = {}, {}, True
        super().on_train_begin(args, state, control)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any, **kwargs: Any) -> None:
        if not self._is_proven:  # not earlier: FSDP2 fixes dtypes at its first forward pass, which must be training's
            self.prove_reference(model, state)
        self._is_proven = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_in_train = False
        super().on_train_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        """Add our values to an evaluation as it is logged: other callbacks may read it before `on_evaluate`."""
        super().on_log(args, state, control, logs)
        if evaluation_prefix(logs) is not None:
            self.prepare(args, state, model, kwargs.get("processing_class"))
            self._join(logs, args, state, model)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.prepare(args, state, kwargs["model"], kwargs.get("processing_class"))
        self._join(kwargs["metrics"], args, state, kwargs["model"])
        self.measure_and_log(args, state, control, kwargs["model"])

    # Measuring

    def measure_and_log(self, args: Any, state: Any, control: Any, model: Any) -> dict[str, float]:
        """Measure the model's current weights, unless that was done before, and log the values once."""
        step = self._measure_once(args, state, model)
        if not self._is_logged and step == state.global_step:  # the host logs under its current step
            self._log(dict(self._values[step]), args, state, control)
        self._is_logged = True
        return self._values[step]

    def _log(self, logs: dict[str, float], args: Any, state: Any, control: Any) -> None:
        if self.trainer is not None:
            self.trainer.log(logs)
            return
        state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        self.on_log(args, state, control, logs)

    def _measure_once(self, args: Any, state: TrainerState, model: Any) -> int:
        """Measure the model's current weights if that was not done before; return the step they are from."""
        step = weights_step(args, state, is_in_train=self._is_in_train)
        if step not in self.tables:
            if self.reference is not None:
                self.reference.to(args.device)
            self.prove_reference(model, state)
            with evaluation_mode(model):
                self._values[step] = self._measure(step, args, state, model)
            self._is_logged = not self._values[step]
        return step

    def _measure(self, step: int, args: Any, state: TrainerState, model: Any) -> dict[str, float]:
        """The values by their names in logs; also fills the step's tables."""
        self.tables[step] = {}
        for name, documents in self.documents.items():  # on every process, to keep sharded processes in step
            self.tables[step][name] = self._compare(name, documents, args, model)
            self.append_documents(args, state, {"step": step, "name": name, **self.sums[name]})
        values = [table[metric]["value"] for table in self.tables[step].values() for metric in LOGGED]
        return dict(zip(retention_names(self.documents), values, strict=True))

    def _compare(self, name: str, documents: Sequence[Document], args: Any, model: Any) -> dict[str, Any]:
        """Metric → value and interval for one text; also stores its per-document sums."""
        sizes: dict[str, Any] = {"batch_tokens": batch_tokens(args, documents), "device": args.device}
        sums = document_sums(*self._forwards(model), documents, text=name, title=measuring_title(name), **sizes)
        self.sums[name] = sums.kept()
        return summarize(sums, seed=args.seed)

    def measure_new_task(self, args: TrainingArguments, model: Any) -> dict[str, Any]:
        """Base and model on the held-out rows of the new task: `new_task` of a report; empty without such rows."""
        if not self.new_task:
            return {}
        with evaluation_mode(model):
            table = self._compare(NEW_TASK_TEXT, self.new_task, args, model)
        return {NEW_TASK_TEXT: table | {GAIN.name: negated(table["forgetting"])}}

    def _join(self, metrics: dict[str, float], args: Any, state: TrainerState, model: Any) -> None:
        """Add the values measured at this step to the host's evaluation.

        If it evaluates several sets, only the first gets them, so that patience counts evaluations.
        """
        step, evaluated = self._measure_once(args, state, model), evaluation_prefix(metrics) or ""
        objective = getattr(self.trainer, "compute_objective", default_compute_objective)
        if state.is_hyper_param_search and objective is default_compute_objective:  # it adds up all metrics
            return
        prefix = "eval" if evaluated.startswith("eval_") else evaluated
        if evaluated and self._measured_with.setdefault((step, prefix), evaluated) == evaluated:
            metrics.update({f"{prefix}_{name}": value for name, value in self._values[step].items()})

    def table(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """The measurement of the current weights, else the newest: text → metric → value and interval."""
        newest = next(reversed(self.tables.values()), {})
        return self.tables.get(weights_step(args, state, is_in_train=self._is_in_train), newest)

    # Forward passes

    def prove_reference(self, model: Any, state: TrainerState) -> None:
        """Prove that the reference still predicts what it did when training began: see `Reference.prove_again`."""
        if self.reference is not None:
            with self._autocast(model.device):
                self.reference.prove_again(model, state.global_step)
            reshard(model)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context with the dtype of training, even before the host has wrapped the model."""
        if self.trainer is not None:
            return self.trainer.accelerator.autocast()
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(AcceleratorState().mixed_precision)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def _forwards(self, model: Any) -> tuple[Forward, Forward]:
        """The base and the model as functions from `input_ids` and `attention_mask` to logits."""

        def ref_forward(**batch: Tensor) -> Tensor:
            assert self.reference is not None
            with self._autocast(model.device), self.reference.base(model) as base:
                return logits_at(base, batch)

        def forward(**batch: Tensor) -> Tensor:
            with self._autocast(model.device):
                return logits_at(model, batch)

        return ref_forward, forward


def batch_tokens(args: TrainingArguments, documents: Sequence[Document]) -> int:
    """Padded tokens per forward pass: as many rows as the host evaluates at once."""
    return args.per_device_eval_batch_size * max(len(window) for document in documents for window in document.windows)


def evaluated_batches(args: TrainingArguments, texts: Mapping[str, Sequence[Document]]) -> list[dict[str, Tensor]]:
    """The batches in which both models read the texts."""
    return [
        padded(windows)
        for documents in texts.values()
        for _, windows in batches(documents, batch_tokens(args, documents))
    ]


def retention_names(texts: Iterable[str]) -> list[str]:
    """The names of these texts' values in logs.

    >>> retention_names(["wiki"])
    ['retention/wiki/forgetting', 'retention/wiki/ref_kl', 'retention/wiki/ref_agreement', 'retention/wiki/loss']
    """
    return [f"retention/{name}/{metric}" for name in texts for metric in LOGGED]


def evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """The prefix of a host's evaluation: `eval`, or `eval_<name>` for one of several sets; None for other logs.

    >>> evaluation_prefix({"eval_news_loss": 2.5, "eval_news_runtime": 1.0})
    'eval_news'
    """
    ends = [key for key in logs if key.endswith("_runtime") and key != "train_runtime"]
    return ends[0].removesuffix("_runtime") if ends else None


def check_best_metric(args: TrainingArguments, names: Sequence[str]) -> None:
    """Set `greater_is_better` to suit a `metric_for_best_model` among `names`, which are measured at evaluations.

    transformers assumes that larger is better unless a name ends in "loss".

    Raises:
        ValueError: if the metric is meant to be one of `names` but is not, or the scheduler waits for the other
            direction.
    """
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    ours = name.startswith(("retention/", "choices/")) or name.endswith(OWN_METRICS)
    if name not in names and (ours or ("/" in name and get_close_matches(name, names, cutoff=0.8))):
        remedy = f"use one of {', '.join(names)}" if names else "nothing is measured; give retention texts"
        when = "at every evaluation (choices_every 1 would)" if name.startswith("choices/") else "at evaluations"
        raise ValueError(f"metric_for_best_model: {args.metric_for_best_model!r} is not measured {when}; {remedy}")
    if name not in names:
        return
    rises = name.startswith("choices/") or METRICS[name.rpartition("/")[2]].higher_is_better
    if not rises and args.greater_is_better:
        logger.warning("greater_is_better: set to False, since a lower %s is better", name)
        args.greater_is_better = False
    on_plateau = args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if on_plateau and rises and dict(args.lr_scheduler_kwargs or {}).get("mode") != "max":
        raise ValueError(
            f"lr_scheduler_kwargs: a higher {name} is better, but the scheduler waits for a lower one; set mode: max"
        )


def retention_documents(
    name: str, source: Iterable[str | Document], max_documents: int | None = None, **cut: Any
) -> list[Document]:
    """The first `max_documents` documents of a text (None: all), without copies; `cut` as in `as_documents`."""
    items = several("texts", name, source)
    chosen = as_documents(name, items[:max_documents], **cut)
    documents, warnings = without_copies(f"retention/{name}", chosen, "documents")
    for warning in warnings:
        logger.warning(warning)
    tokens = sum(document.num_tokens for document in documents)
    logger.info("retention/%s: %d of %d documents, %d tokens", name, len(documents), len(items), tokens)
    return documents


def new_task_documents(dataset: Any, limit: int, tokenizer: Any) -> list[Document]:
    """The first rows of `SFTTrainer`'s evaluation set, unpacked; only the tokens that its loss counts are predicted."""
    rows: list[Document] = []
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return rows
    special = special_spellings(tokenizer)
    for row in itertools.islice(dataset, limit):
        ends = list(itertools.accumulate(row.get("seq_lengths") or [len(row["input_ids"])]))
        for begin, end in itertools.pairwise([0, *ends]):
            ids, labels = row["input_ids"][begin:end], (row.get("labels") or row["input_ids"])[begin:end]
            mask = [False, *(label != -100 for label in labels[1:])]
            predicted = list(itertools.compress(ids, mask))
            if predicted:
                rows.append(Document([ids], bytes_of_text(predicted, tokenizer, special), [mask]))
    return without_copies(NEW_TASK_TEXT, rows[:limit], "rows")[0]
