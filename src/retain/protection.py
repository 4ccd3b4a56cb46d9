"""What must hold before a run is called protected; each check refuses in one line with the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retain.config import ReplayConfig
from retain.data import Document
from retain.models import max_positions
from retain.reference import Reference
from retain.replay import ReplayDataset

OVERLAP = 32  # tokens by which rows are looked up; at least half as many must agree to count as the same row


def check_rows_fit(rows: ReplayDataset, model: Any) -> None:
    """Rows must have something to predict, fit the model's positions, and use its tokens.

    Raises:
        ValueError: naming what does not fit.
    """
    if not rows.num_predictions.sum():
        raise ValueError(f"replay_dataset: {rows.source!r} has no row of two tokens or more; give longer rows")
    longest, limit = int(np.diff(rows.offsets).max()), max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(f"replay_dataset: rows of {longest} tokens, but this model has {limit} positions; cut them")
    largest, vocabulary = int(rows.tokens.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise ValueError(
            f"replay_dataset: token id {largest}, but this model has {vocabulary} tokens; sample from this model"
        )


def check_held_out(rows: ReplayDataset, retention: Mapping[str, Sequence[Document]]) -> None:
    """What is replayed must not be measured on.

    Two rows are the same if they agree to the end of the shorter one: a licence header that many files begin with
    is not a row.

    Raises:
        ValueError: naming the text and how many rows it shares.
    """
    by_beginning: dict[tuple[int, ...], list[list[int]]] = {}
    for index in range(len(rows)):
        row = rows[index].tolist()
        by_beginning.setdefault(tuple(row[:OVERLAP]), []).append(row)
    for name, documents in retention.items():
        windows = [window for document in documents for window in document.windows if len(window) >= OVERLAP // 2]
        shared = sum(
            any(row[: len(window)] == window[: len(row)] for row in by_beginning.get(tuple(window[:OVERLAP]), []))
            for window in windows
        )
        if shared:
            raise ValueError(
                f"retention: {name!r} shares {shared} rows with the replay dataset; measure on rows never replayed"
            )


def make_reference(config: ReplayConfig, model: Any, peft_config: Any) -> Reference:
    """The adapter switched off where there is or will be one, else a frozen copy of the model as it is now.

    Raises:
        ValueError: if what was asked for cannot be had.
    """
    has_adapter = peft_config is not None or hasattr(model, "disable_adapter")
    if config.replay_reference == "adapter" and not has_adapter:
        raise ValueError("replay_reference: 'adapter', but there is no adapter; use copy, or --use_peft")
    if config.replay_reference != "copy" and has_adapter:
        return Reference()
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError("replay_reference: a copy under DeepSpeed ZeRO-3 is not supported; use an adapter or FSDP2")
    return Reference.copy_of(model)
