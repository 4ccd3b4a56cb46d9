"""A pool to look at: its statistics, what is wrong with it, and a few of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from retain.files import visible_text, write_json
from retain.replay.dataset import STATISTICS, read_manifest, read_shards
from retain.replay.stored_predictions import bytes_per_token
from retain.sampling.quality import PoolStatistics, display, pool_statistics
from retain.sampling.starts import Starts

MAX_CHARS = 1200  # of a row
MAX_OPEN_TURNS = 0.9  # share of the chat rows: some models open a user turn and never end it


def pool_lines(folder: Path, tokenizer: Any, starts: Starts, preview: int) -> list[str]:
    """Write `statistics.json`; its summary and warnings, and a preview of this many rows, to print."""
    manifest = read_manifest(folder)
    entropy = ("entropy",) if manifest["sampler"]["engine"] != "vllm" else ()
    columns = read_shards(folder, manifest, ("input_ids", "prefix_length", "logprob", *entropy))
    rows, given = columns["input_ids"], [int(length) for length in columns["prefix_length"]]
    statistics = pool_statistics(
        rows,
        prefix_lengths=given,
        logprob_sums=columns["logprob"],
        entropy_sums=columns.get("entropy"),
        end_ids=end_ids(tokenizer, manifest["start_token"]["id"], starts),
    )
    write_json(folder / STATISTICS, asdict(statistics))
    known = ((key, value) for key, value in statistics.summary.items() if value is not None)
    lines = [f"  {_spaced(key)}: {display(value)}" for key, value in known]
    lines += [f"warning: {warning}" for warning in statistics.warnings]
    turns = [end for at, end in enumerate(statistics.rows["first_end"]) if starts.of_row(at)[0].end_of_turn is not None]
    if turns.count(None) > MAX_OPEN_TURNS * len(turns):
        lines.append(
            f"warning: only {len(turns) - turns.count(None)} of {len(turns)} chat rows end their turn: this model does "
            "not write whole turns of this role, or max_length is too short; use start document or prompts"
        )
    if kind := manifest["store_reference"]:
        size = bytes_per_token(folder, statistics.summary["num_tokens"])
        lines.append(f"  stored predictions: {kind}, {size:.1f} bytes per token")
    if preview:
        texts = [tokenizer.decode(row[length:]) for row, length in zip(rows, given, strict=True)]
        lines.append(preview_text(texts, statistics, preview))
    return lines


def end_ids(tokenizer: Any, start_id: int, starts: Starts) -> Sequence[int]:
    """Tokens that end a document or a turn."""
    separator = {start_id} if start_id != tokenizer.bos_token_id else set()
    ends = {tokenizer.eos_token_id, *separator, *(mode.end_of_turn for mode in starts.modes)}
    return sorted(token for token in ends if token is not None)


def preview_text(texts: Sequence[str], statistics: PoolStatistics, count: int) -> str:
    """`count` rows spread over the pool, to read in a terminal: no character of a row acts on it."""
    assert len(texts) == len(statistics.rows["num_tokens"]), "a text for each row"
    parts: list[str] = []
    for at in np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)).tolist():
        text = visible_text(texts[at])
        cut = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
        parts += ["", " · ".join(_notes(statistics, at)), *(f"  {line}" for line in cut.split("\n"))]
    return "\n".join(parts) + "\n"


def _notes(statistics: PoolStatistics, row: int) -> Iterator[str]:
    yield f"row {row}"
    if statistics.rows["repeating"][row]:
        yield "repeating"
    for key, column in statistics.rows.items():
        if key != "repeating" and column[row] is not None:
            yield f"{_spaced(key)} {display(column[row])}"


def _spaced(key: str) -> str:
    return key.replace("num_", "").replace("_minus_", " − ").replace("_", " ")
