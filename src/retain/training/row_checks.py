"""Checks of a run's rows: those it replays, trains on, and measures.

Every check raises a one-line `ValueError` that names the setting, its value and the remedy.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pyarrow import compute
from torch.utils.data import IterableDataset

from retain.data.overlap import find_rows
from retain.data.rows import Document, is_local_file
from retain.models.description import max_positions
from retain.replay.dataset import ReplayDataset
from retain.report.numbers import quantity
from retain.training.trainer_checks import invocation_tokens

logger = logging.getLogger(__name__)
MIN_CERTAIN_LENGTH = 16  # tokens from which two equal rows are no coincidence
MAX_ROWS_SEARCHED = 1000  # evaluation rows that are searched for in the training rows
NOT_TOKENS = ("type_ids", "position_ids")  # endings of the names of columns that hold other integers than tokens


def check_columns(name: str, rows: Any, text_field: str, field: str = "dataset_name") -> None:
    """Reject rows that TRL would reject later, or not at all; `field` is the setting that named them."""
    from datasets import Value

    columns = rows.column_names
    if columns is None:  # a stream of unknown columns
        return
    forms = (("input_ids",), ("messages",), ("conversations",), ("prompt", "completion"), (text_field,))
    form = next((form for form in forms if set(form) <= set(columns)), None)
    if form is None:
        raise ValueError(
            f"{field}: {name!r} has columns {', '.join(columns)}; it needs {text_field}, messages, or prompt and "
            "completion"
        )
    for column in form:
        kind = rows.features[column]
        may_be_text = column in (text_field, "prompt", "completion")
        if isinstance(kind, Value) and not (may_be_text and kind.dtype in ("string", "large_string")):
            raise ValueError(f"{field}: {name!r} has {kind.dtype} in {column!r}; give text, or lists of messages")
        if is_local_file(name or "") and rows.data.column(column).null_count:
            raise ValueError(f"{field}: {name!r} has rows without {column!r}; give every row one")
    if hasattr(rows, "__len__") and not any(row[column] for row in rows for column in form):
        raise ValueError(f"{field}: {name!r} has nothing in {' and '.join(form)} of any row; give rows with text")


def check_new_rows(dataset: Any, model: Any, *, packed: bool) -> None:
    """Reject training rows that are empty, too long for the model, or hold tokens it lacks, at which torch would crash.

    Args:
        packed: whether a row holds several documents, each with its own positions.
    """
    if isinstance(dataset, IterableDataset) or "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return
    rows = dataset.with_format("arrow")[:]["input_ids"]
    longest, largest = compute.max(compute.list_value_length(rows)), compute.max(compute.list_flatten(rows))
    length, limit = longest.as_py() or 0, max_positions(model)
    if length < 2:
        raise ValueError(
            f"train_dataset: its rows have at most {length} tokens, and nothing to predict; give more text"
        )
    if limit is not None and length > limit and not packed:
        raise ValueError(
            f"max_length: rows of {length} tokens, but this model has {limit} positions; use at most {limit}"
        )
    if largest.as_py() >= (vocabulary := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(
            f"train_dataset: token id {largest}, but this model has {vocabulary} tokens; use its own tokenizer"
        )


def check_rows_fit(rows: ReplayDataset, model: Any) -> None:
    """Reject replay rows with nothing to predict, too many tokens for the model, or tokens that it lacks."""
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


def check_positions(model: Any, lengths: Iterable[int]) -> None:
    """Reject rows too long for the model being trained: prompt tuning takes some of its positions."""
    longest, limit = max(lengths, default=0), max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"replay_max_length: rows of {longest} tokens, but this model, as it is trained, has {limit} positions for "
            f"them; use at most {limit}, for max_length too"
        )


def check_invoked(model: Any, rows: ReplayDataset) -> None:
    """Reject replay rows that never switch an activated LoRA on: on them the model stays its base."""
    for tokens in invocation_tokens(model):
        invocation = np.asarray(tokens, dtype=rows.tokens.dtype).tobytes()
        if not any(invocation in row.tobytes() for row in rows):
            raise ValueError(
                f"replay_dataset: no row holds the tokens {tokens} that switch aLoRA on, so on every row the model "
                "stays its base and nothing is protected; replay prompts that end with them, or set replay_coef 0"
            )


def check_held_out(
    rows: Iterable[Any], retention: Mapping[str, Sequence[Document]], where: str, edges: Collection[int] = ()
) -> None:
    """Reject retention texts that are also replayed or trained on: see `find_rows`.

    Short rows may coincide (a heading, a greeting): they count only if they make up a tenth of a text.

    Args:
        where: what these rows are called in the message.
        edges: tokens that open or close a row and are not part of its text.
    """
    windows = [(name, window) for name in retention for document in retention[name] for window in document.windows]
    found = [windows[index] for index in find_rows([window for _, window in windows], rows, edges)] if windows else []
    for name in retention:
        shared = [len(window) for text, window in found if text == name]
        count = sum(text == name for text, _ in windows)
        if shared and (max(shared) >= MIN_CERTAIN_LENGTH or 10 * len(shared) >= count):
            raise ValueError(
                f"retention: {name!r} shares {len(shared)} rows with the {where}; measure on rows never "
                f"{'replayed' if 'replay' in where else 'trained on'}"
            )


def check_not_trained_on(dataset: Any, retention: Mapping[str, Sequence[Document]], edges: Collection[int]) -> None:
    """Reject retention texts that are also trained on; warn if the training rows are unknown."""
    rows = training_rows(dataset)
    first = list(itertools.islice(rows, 1))
    if retention and dataset is not None and not first:
        logger.warning(
            "retention: texts not searched for in the training rows, which are a stream or not tokenized yet"
        )
    check_held_out(itertools.chain(first, rows), retention, "training rows", edges)


def warn_of_trained_rows(held_out: Any, dataset: Any, edges: Collection[int]) -> None:
    """Warn if at least a tenth of the evaluation rows are also trained on; only the first rows are searched for."""
    rows = [] if isinstance(held_out, Mapping) else list(itertools.islice(training_rows(held_out), MAX_ROWS_SEARCHED))
    found = find_rows(rows, training_rows(dataset), edges) if rows else ()
    if rows and 10 * len(found) >= len(rows):
        logger.warning(
            "eval_dataset: %d of %s are training rows, too: a lower loss on them is memory, not learning; hold out "
            "other rows", len(found), quantity(len(rows), "row"),
        )  # fmt: skip


def row_edges(tokenizer: Any, start_id: int) -> set[int]:
    """Tokens that open or close rows."""
    return {start_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}


def training_rows(dataset: Any) -> Iterator[Any]:
    """Token ids of the rows that a host trainer will train on: see `row_columns`.

    Yields nothing for a stream, which can be read only once, and for rows that are not tokenized when training begins
    (prompts of online methods).
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return
    first = dataset[0]
    rows = row_columns(first) if isinstance(first, Mapping) else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    for start in range(0, len(dataset) if rows else 0, 1000):
        indices = list(range(start, min(start + 1000, len(dataset))))
        if getattr(dataset, "column_names", None) is None:
            fetch = getattr(dataset, "__getitems__", None)  # torch's name for fetching a batch at once
            batch: Any = fetch(indices) if fetch else None
            if not isinstance(batch, list):  # some return one mapping of columns
                batch = [dataset[index] for index in indices]
        else:
            columns = dataset.select_columns(names).with_format("numpy")[start : start + 1000]
            batch = [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]
        for example in batch:
            for row in rows:
                yield np.concatenate([np.asarray(example[name], dtype=np.int64) for name in row])


def rows_fingerprint(dataset: Any) -> str | None:
    """A hash of the rows that a host trainer will train on; None if `training_rows` yields none."""
    digest, empty_digest = hashlib.sha256(), hashlib.sha256().hexdigest()
    for row in training_rows(dataset):
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
    return digest.hexdigest()[:16] if digest.hexdigest() != empty_digest else None


def row_columns(example: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The columns of token ids that make up each row of a trainer's example, by TRL's column names.

    `input_ids` of supervised training, and names with that ending, are whole rows; answers (`chosen_ids` and
    `rejected_ids` of DPO and reward models, `completion_ids` of KTO) follow `prompt_ids` if the example has them.

    >>> row_columns({"prompt_ids": [3, 7], "chosen_ids": [9], "rejected_ids": [8], "position_ids": [0, 1]})
    [('prompt_ids', 'chosen_ids'), ('prompt_ids', 'rejected_ids')]
    """
    arrays = {name: np.asarray(value) for name, value in example.items() if name.endswith("_ids")}
    tokens = [
        name
        for name, array in arrays.items()
        if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size) and not name.endswith(NOT_TOKENS)
    ]
    whole = [(name,) for name in tokens if name.endswith("input_ids")]
    prompt = ("prompt_ids",) if "prompt_ids" in tokens else ()
    # KTO's KL_completion_ids pair a prompt with the completions of other rows
    no_answers = {*prompt, *(name for (name,) in whole), *(f"KL_{name}" for name in tokens)}
    answers = [(*prompt, name) for name in tokens if name not in no_answers]
    return whole + answers or [prompt] * bool(prompt)
