"""One point of a training run's path: every retention text measured against the base, kept in plain files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import SchedulerType, TrainerState, TrainingArguments

from retain.checks import several
from retain.data.rows import Document, as_documents, without_copies
from retain.files import append_jsonl
from retain.measuring.tokens import Forward, batches, document_sums, padded, summarize
from retain.metrics import LOGGED, METRICS
from retain.training.run_files import DOCUMENTS_FILE

logger = logging.getLogger(__name__)

OWN_METRICS = tuple(name for name in LOGGED if name != "loss")  # no metric of a host has such a name
Tables = dict[str, dict[str, dict[str, Any]]]  # name of the text → metric → value, interval and sizes
Sets = dict[tuple[int, str], str]  # step and prefix of an evaluation → prefix of one of its sets


def batch_tokens(args: TrainingArguments, documents: Sequence[Document]) -> int:
    """Padded tokens per forward pass: as many rows as the host evaluates at once."""
    return args.per_device_eval_batch_size * max(len(window) for document in documents for window in document.windows)


def evaluated_batches(args: TrainingArguments, texts: Mapping[str, Sequence[Document]]) -> list[dict[str, Tensor]]:
    """The batches in which `measure_texts` puts the texts to both models."""
    return [
        padded(windows)
        for documents in texts.values()
        for _, windows in batches(documents, batch_tokens(args, documents))
    ]


def measure_texts(
    ref_forward: Forward,
    forward: Forward,
    texts: Mapping[str, Sequence[Document]],
    *,
    args: TrainingArguments,
    state: TrainerState,
    step: int,
) -> Tables:
    """Measure every text, and append the per-document sums to `documents.jsonl`.

    Every process measures all documents, so that they stay in step under sharding.
    """
    tables = {}
    for name, documents in texts.items():
        tokens = batch_tokens(args, documents)
        sums = document_sums(ref_forward, forward, documents, batch_tokens=tokens, device=args.device, text=name)
        tables[name] = summarize(sums, seed=args.seed)
        if state.is_world_process_zero:
            row: dict[str, Any] = {"step": step, "name": name, **sums.kept()}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_jsonl(Path(args.output_dir) / DOCUMENTS_FILE, row)
    return tables


def logged_names(texts: Iterable[str]) -> list[str]:
    """What the values of these texts are called: `retention/<name>/<metric>`."""
    return [f"retention/{name}/{metric}" for name in texts for metric in LOGGED]


def logged(tables: Tables) -> dict[str, float]:
    """What goes into the log, by its name; in the units of `METRICS`."""
    values = [table[metric]["value"] for table in tables.values() for metric in LOGGED]
    return dict(zip(logged_names(tables), values, strict=True))


def evaluated_set(logs: Mapping[str, Any]) -> str | None:
    """The prefix of a host's evaluation: `eval`, or `eval_<name>` of one of several sets; None for other logs."""
    return next(
        (key.removesuffix("_runtime") for key in logs if key.endswith("_runtime") and key != "train_runtime"), None
    )


def add_to_metrics(metrics: dict[str, float], values: Mapping[str, float], step: int, sets: Sets) -> None:
    """Add to a host's evaluation what was measured at its step, where early stopping and the best checkpoint look.

    Args:
        sets: which evaluation set got the values: the first of several, so that patience counts evaluations.
    """
    of_set = evaluated_set(metrics) or ""
    prefix = "eval" if of_set.startswith("eval_") else of_set
    if of_set and sets.setdefault((step, prefix), of_set) == of_set:
        metrics.update({f"{prefix}_{name}": value for name, value in values.items()})


def check_best_metric(args: TrainingArguments, names: Sequence[str]) -> bool:
    """Whether `metric_for_best_model` is one of `names`; `greater_is_better` then follows from the metric.

    transformers takes the larger value for better where a name does not end in "loss".

    Raises:
        ValueError: where it is meant to be one of them, and is not measured at every evaluation.
    """
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    ours = name.startswith(("retention/", "choices/")) or name.endswith(OWN_METRICS)
    if name not in names and (ours or ("/" in name and get_close_matches(name, names, cutoff=0.8))):
        remedy = f"use one of {', '.join(names)}" if names else "nothing is measured; give retention texts"
        when = "at every evaluation (choices_every 1 would)" if name.startswith("choices/") else "at evaluations"
        raise ValueError(f"metric_for_best_model: {args.metric_for_best_model!r} is not measured {when}; {remedy}")
    if name not in names:
        return False
    rises = name.startswith("choices/") or METRICS[name.rpartition("/")[2]].higher_is_better
    if not rises and args.greater_is_better:
        logger.warning("greater_is_better: set to False, since a lower %s is better", name)
        args.greater_is_better = False
    follows = args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if follows and rises and dict(args.lr_scheduler_kwargs or {}).get("mode") != "max":
        raise ValueError(f"lr_scheduler_kwargs: a higher {name} is better, and the scheduler waits for a lower one; "
                         "give mode: max")  # fmt: skip
    return True


def take_documents(
    name: str, source: Iterable[str] | Sequence[Document], max_tokens: int | None, seed: int, **cut: Any
) -> list[Document]:
    """Whole documents in an order drawn with `seed`, until `max_tokens` are spent; at least one, in their own order."""
    items = several("texts", name, source)
    taken: dict[int, list[Document]] = {}
    left = max_tokens
    for at in np.random.default_rng(seed).permutation(len(items)).tolist():
        try:
            found = as_documents(name, [items[at]], **cut)
        except ValueError:  # a text of no token
            continue
        size = sum(document.num_tokens for document in found)
        if left is not None and size > left and taken:
            break
        taken[at] = found
        left = None if left is None else left - size
    if not taken:
        return as_documents(name, [], **cut)  # which says so
    whole = [document for at in sorted(taken) for document in taken[at]]
    documents, said = without_copies(f"retention/{name}", whole, "documents")
    for sentence in said:
        logger.warning(sentence)
    tokens = sum(document.num_tokens for document in documents)
    logger.info("retention/%s: %d of %d documents, %d tokens", name, len(documents), len(items), tokens)
    return documents
