"""Statistics and a preview of a pool of replay rows that a model drew from its own distribution.

Only the tokens drawn after each row's prefix count. Loss and entropy are nats per token of the model's own distribution
at temperature 1, and for exact draws they agree: the mean of −log p(x) over x ~ p is the entropy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from retain.data.overlap import ngram_hashes
from retain.files import visible_text, write_json
from retain.replay.dataset import STATISTICS, read_manifest, read_shards
from retain.sampling.starts import Starts
from retain.statistics import bootstrap_ratio

# Limits beyond which a pool gets a warning; exact draws of a sound model stay well below the shares of rows.
MAX_DUPLICATES = 0.01  # long rows at temperature 1 hardly ever coincide
MAX_REPEATING = 0.05  # share of rows that repeat themselves; under 1% of human texts of 512 tokens do, code included
MIN_LOSS = 0.5  # nats per token, a choice among 1.6 tokens; code has about 0.7 and prose 2 to 3.5
MAX_DIFFERENCE = 0.01  # between loss and entropy, nats per token; about 0.3% of temperature
MIN_ROWS = 16  # rows that make the interval of that difference reliable
# A row is repeating if a third of its 16-grams are copies of earlier ones; those of tables and code are mostly new.
REPEAT, MIN_DISTINCT = 16, 2 / 3
MIN_JUDGED = 16  # drawn tokens; in rows under 64 the n-grams are a quarter of the row
MAX_GROUPS = 2048  # groups of rows to resample in a large pool: the same interval in bounded memory
# The preview
MAX_CHARS = 1200  # per row
MAX_OPEN_TURNS = 0.9  # share of chat rows without an end of turn: some models open a user turn and never end it


@dataclass(frozen=True)
class PoolStatistics:
    """Statistics of a pool; `dataclasses.asdict` of it is JSON.

    Attributes:
        summary: over the pool. A mean is {"value", "ci"}: nats per token, with a 95% interval over rows, or `ci` None
            for one row. Shares are of all rows, `repeating` of the `num_judged`. None means not measured.
        warnings: a sentence for each problem of the pool.
    """

    summary: dict[str, Any]
    warnings: list[str]


def pool_statistics(
    rows: Sequence[Any],
    *,
    prefix_lengths: Sequence[int],
    logprob_sums: ArrayLike,
    entropy_sums: ArrayLike | None = None,
    end_ids: Collection[int] = (),
) -> PoolStatistics:
    """Statistics of a pool, and what is wrong with it.

    Args:
        rows: token ids of each row, shape (length,), including its prefix.
        prefix_lengths: given tokens of each row, shape (rows,).
        logprob_sums: log-probability summed over the drawn tokens, shape (rows,), nats; under the model's full
            distribution at temperature 1, even if the tokens were drawn from another.
        entropy_sums: entropy of that distribution summed over the drawn positions, shape (rows,), nats.
        end_ids: tokens that end a document or a turn.

    >>> rows = [[0, 5, 6], [0, 5, 6], [0, 7, 8]]
    >>> found = pool_statistics(rows, prefix_lengths=[1, 1, 1], logprob_sums=[-4.0, -4.0, -7.0])
    >>> found.summary["exact_duplicates"], found.summary["loss"]["value"]
    (0.3333333333333333, 2.5)
    """
    drawn = [np.asarray(row)[given:] for row, given in zip(rows, prefix_lengths, strict=True)]
    tokens = np.array([len(row) for row in drawn])
    loss = -np.asarray(logprob_sums, dtype=np.float64)
    entropy = None if entropy_sums is None else np.asarray(entropy_sums, dtype=np.float64)
    judged = [flag for flag in map(is_repeating, drawn) if flag is not None]
    ended = [np.isin(row, list(end_ids)).any() for row in drawn]
    summary = {
        "num_rows": len(drawn),
        "num_tokens": int(tokens.sum()),
        "exact_duplicates": num_duplicates(drawn) / len(drawn),
        "num_judged": len(judged),
        "repeating": sum(judged) / len(judged) if judged else None,
        "reached_end": float(np.mean(ended)) if end_ids else None,
        "loss": _pool_mean(loss, tokens),
        "entropy": _pool_mean(entropy, tokens),
        "loss_minus_entropy": _pool_mean(None if entropy is None else loss - entropy, tokens),
    }
    return PoolStatistics(summary, _pool_warnings(summary))


def is_repeating(tokens: np.ndarray) -> bool | None:
    """Whether a third of the 16-grams of a row of shape (length,) are copies of earlier ones; None if too short."""
    if len(tokens) < MIN_JUDGED:
        return None
    ngrams = ngram_hashes(tokens, min(REPEAT, len(tokens) // 4))
    return np.unique(ngrams).size < MIN_DISTINCT * ngrams.size


def num_duplicates(drawn: Sequence[np.ndarray]) -> int:
    """How many rows have the same tokens as an earlier one."""
    digests = {hashlib.blake2b(row.astype(np.int64).tobytes(), digest_size=16).digest() for row in drawn}
    return len(drawn) - len(digests)


def _pool_mean(sums: np.ndarray | None, tokens: np.ndarray) -> dict[str, Any] | None:
    """Σ sums / Σ tokens, both of shape (rows,), with its interval."""
    if sums is None or not tokens.any():
        return None
    groups = np.arange(len(tokens)) % MAX_GROUPS
    num, den = (np.bincount(groups, weights=values) for values in (sums, tokens))
    value, *ci = bootstrap_ratio(num[den > 0], den[den > 0])
    return {"value": value, "ci": ci if np.isfinite(ci).all() else None}


def _pool_warnings(summary: dict[str, Any]) -> list[str]:
    duplicates, repeating = summary["exact_duplicates"], summary["repeating"] or 0.0
    loss, gap = summary["loss"], summary["loss_minus_entropy"]
    # Zero lies outside the interval stretched to twice its width, about four standard errors.
    certain = gap and gap["ci"] and summary["num_rows"] >= MIN_ROWS
    certain = certain and not 2 * gap["ci"][0] <= gap["value"] <= 2 * gap["ci"][1]
    kind = "sharper" if gap and gap["value"] < 0 else "flatter"
    checks = {
        f"{duplicates:.1%} of the rows are exact duplicates of earlier ones (many is {MAX_DUPLICATES:.0%}).":
            duplicates > MAX_DUPLICATES,
        f"{repeating:.1%} of the rows repeat themselves (many is {MAX_REPEATING:.0%}).": repeating > MAX_REPEATING,
        f"The model's loss on its own rows is {display(loss)} nats per token (low is {MIN_LOSS}): a model that has "
        "collapsed has little to say.": loss and loss["value"] < MIN_LOSS,
        f"Loss − entropy is {display(gap)} nats per token and of exact draws it is 0: the rows come from a "
        f"{kind} distribution than the model's own at temperature 1.": certain and abs(gap["value"]) > MAX_DIFFERENCE,
    }  # fmt: skip
    return [sentence for sentence, applies in checks.items() if applies]


def display(value: Any) -> str:
    """A count, a share, or a mean with its interval, as text."""
    if isinstance(value, dict):
        interval = ", ".join(map(display, value["ci"] or []))
        return f"{display(value['value'])} [{interval}]" if interval else display(value["value"])
    if value is None:
        return ""
    return (f"{value:.3f}" if isinstance(value, float) else f"{value:,}").replace("-", "−")


def pool_lines(folder: Path, tokenizer: Any, starts: Starts, preview: int) -> list[str]:
    """Write `statistics.json`; return lines to print: its summary, its warnings, and a preview of this many rows."""
    manifest = read_manifest(folder)
    entropy = ("entropy",) if manifest["sampler"]["engine"] != "vllm" else ()
    columns = read_shards(folder, manifest, ("input_ids", "prefix_length", "logprob", *entropy))
    rows, prefix_lengths = columns["input_ids"], [int(length) for length in columns["prefix_length"]]
    ends = end_ids(tokenizer, manifest["start_token"]["id"], starts)
    statistics = pool_statistics(
        rows,
        prefix_lengths=prefix_lengths,
        logprob_sums=columns["logprob"],
        entropy_sums=columns.get("entropy"),
        end_ids=ends,
    )
    write_json(folder / STATISTICS, asdict(statistics))
    names = {key: key.replace("num_", "").replace("_minus_", " − ").replace("_", " ") for key in statistics.summary}
    lines = [f"  {names[key]}: {display(value)}" for key, value in statistics.summary.items() if value is not None]
    lines += [f"warning: {warning}" for warning in statistics.warnings]
    drawn = [row[given:] for row, given in zip(rows, prefix_lengths, strict=True)]
    chats = [row for index, row in enumerate(drawn) if starts.of_row(index)[0].end_of_turn is not None]
    num_open = sum(not np.isin(row, ends).any() for row in chats)
    if num_open > MAX_OPEN_TURNS * len(chats):
        lines.append(
            f"warning: only {len(chats) - num_open} of {len(chats)} chat rows end their turn: this model does "
            "not write whole turns of this role, or max_length is too short; use start document or prompts"
        )
    if preview:
        lines.append(preview_text([tokenizer.decode(row) for row in drawn], preview))
    return lines


def end_ids(tokenizer: Any, start_id: int, starts: Starts) -> Sequence[int]:
    """Tokens that end a document or a turn."""
    separator = {start_id} if start_id != tokenizer.bos_token_id else set()
    ends = {tokenizer.eos_token_id, *separator, *(mode.end_of_turn for mode in starts.modes)}
    return sorted(token for token in ends if token is not None)


def preview_text(texts: Sequence[str], count: int) -> str:
    """`count` rows spread over the pool, with control characters made visible so that a terminal can show them."""
    lines: list[str] = []
    for row in np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)).tolist():
        text = visible_text(texts[row])
        cut = text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " …"
        lines += ["", f"row {row}", *(f"  {line}" for line in cut.split("\n"))]
    return "\n".join(lines) + "\n"
