"""One point of a training run's path: every retention text measured against the base, kept in plain files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments

from retain.callbacks import DOCUMENTS_FILE
from retain.data import Document, as_documents, without_copies
from retain.files import append_jsonl
from retain.metrics import Forward, document_sums, summarize

logger = logging.getLogger(__name__)

LOGGED_METRICS = ("loss", "forgetting", "ref_kl", "ref_agreement")
Tables = dict[str, dict[str, dict[str, Any]]]  # name of the text → metric → value, interval and sizes


def batch_tokens(args: TrainingArguments, documents: Sequence[Document]) -> int:
    """Padded tokens per forward pass: as many rows as the host evaluates at once."""
    return args.per_device_eval_batch_size * max(len(window) for document in documents for window in document.windows)


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
        sums = document_sums(ref_forward, forward, documents, batch_tokens=tokens, device=args.device)
        tables[name] = summarize(sums, seed=args.seed)
        if state.is_world_process_zero:
            row: dict[str, Any] = {"step": step, "name": name, **sums.kept()}
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            append_jsonl(Path(args.output_dir) / DOCUMENTS_FILE, row)
    return tables


def logged(tables: Tables) -> dict[str, float]:
    """What goes into the log: `retention/<name>/<metric>`, nats per token but for the agreement."""
    return {
        f"retention/{name}/{metric}": table[metric]["value"]
        for name, table in tables.items()
        for metric in LOGGED_METRICS
    }


def take_documents(
    name: str, source: Iterable[str] | Sequence[Document], max_tokens: int | None, seed: int, **cut: Any
) -> list[Document]:
    """Whole documents in an order drawn with `seed`, until `max_tokens` are spent; at least one, in their own order."""
    items: list[Any] = list(source)
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
