"""Find token windows in rows of tokens, even if the rows were cut elsewhere: is what is measured also trained on?

Compares n-grams, in one pass over the rows; memory is bounded by the windows searched for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from retain.data.rows import Document, Text

# Rows with this many equal first tokens are compared to the end of the shorter; shorter rows must be equal.
ALIGNED = 32
NGRAM = 16  # length of the n-grams by which rows that begin elsewhere are found
MAX_PLACES = 4  # an n-gram in more places is boilerplate, such as a licence or a template, and is not evidence
MIN_CONSECUTIVE = 4  # n-grams of a window that must be found in a row, and at least half of those that count
MAX_BLOCK = 1 << 16  # tokens searched at a time
MAX_REMEMBERED = 1 << 22  # distinct rows remembered to skip repeats, some 70 bytes each
# What it means if a measured text was trained on.
OVERLAP_MEANINGS = {
    "new_task": "the gain on them is memory, not learning",
    "retention": "forgetting on them is not of old knowledge",
}


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A uniform 64-bit hash of each n-gram, shape (max(length − n + 1, 0),), uint64; mixed as in SplitMix64.

    >>> hashes = ngram_hashes(np.array([5, 6, 7, 5, 6]), 2)
    >>> len(hashes), len(set(hashes.tolist()))
    (4, 3)
    """
    count = max(len(tokens) - n + 1, 0)
    ids = tokens.astype(np.uint64) + np.uint64(1)  # so that a token 0 counts too
    mixed = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_odd_factors(n)):
        mixed += ids[place : place + count] * factor
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(multiplier)
    return mixed ^ (mixed >> np.uint64(31))


@lru_cache
def _odd_factors(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def find_rows(windows: Sequence[Any], rows: Iterable[Any], edges: Collection[int] = ()) -> set[int]:
    """Find the windows of token ids that occur in rows of token ids, even if the rows were cut elsewhere.

    A window occurs if it is a row, or agrees with one to the end of the shorter (of at least `ALIGNED` tokens), or if
    half of its n-grams occur consecutively in the rows. N-grams of several windows, or in many places of the rows (a
    licence, a chat template), do not count. Memory is bounded by the windows, `MAX_BLOCK` and `MAX_REMEMBERED`.

    Args:
        edges: tokens ignored at both ends of a window or row: start and end tokens.

    Returns:
        Indices of the windows found.

    >>> find_rows([[0, 7, 8, 9], [0, 4, 5]], [[7, 8, 9], [4, 5, 6]], edges={0})
    {0}
    """
    places: dict[bytes, list[int]] = {}  # equal windows are searched once
    for at, window in enumerate(windows):
        core = _without_edges(window, edges)
        if len(core):
            places.setdefault(core.tobytes(), []).append(at)
    cores = [np.frombuffer(core, np.int64) for core in places]
    by_beginning: dict[bytes, list[int]] = {}
    for at, core in enumerate(cores):
        by_beginning.setdefault(core[:ALIGNED].tobytes(), []).append(at)
    hashes = [ngram_hashes(core, NGRAM) for core in cores]
    wanted, of_windows = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]), return_counts=True)
    of_rows, found = np.zeros(len(wanted), np.int64), set()
    for block in _blocks(rows, edges):
        for row in block:
            for at in by_beginning.get(row[:ALIGNED].tobytes(), []):
                shorter = min(len(row), len(cores[at]))
                if np.array_equal(row[:shorter], cores[at][:shorter]):
                    found.add(at)
        of_rows += _counts(ngram_hashes(np.concatenate(block), NGRAM), wanted)
    counted = (of_windows == 1) & (of_rows <= MAX_PLACES)
    for at, of_window in enumerate(hashes):
        indices = np.searchsorted(wanted, of_window)
        if _is_half_found(of_rows[indices][counted[indices]] > 0):
            found.add(at)
    originals = list(places.values())
    return {at for index in found for at in originals[index]}


def _counts(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How often each of the sorted `wanted` occurs in the hashes."""
    indices = np.minimum(np.searchsorted(wanted, hashes), max(0, len(wanted) - 1))
    hits = indices[wanted[indices] == hashes] if len(wanted) else indices[:0]
    return np.bincount(hits, minlength=len(wanted))


def _is_half_found(hits: np.ndarray) -> bool:
    """Whether half of a window's n-grams, and `MIN_CONSECUTIVE`, are consecutive hits."""
    longest = max((len(list(group)) for hit, group in itertools.groupby(hits) if hit), default=0)
    return longest >= max(MIN_CONSECUTIVE, len(hits) / 2)


def _without_edges(row: Any, edges: Collection[int]) -> np.ndarray:
    """A row without the edge tokens at its ends."""
    tokens = np.asarray(row, dtype=np.int64)
    first, last = 0, len(tokens)
    while first < last and int(tokens[first]) in edges:
        first += 1
    while last > first and int(tokens[last - 1]) in edges:
        last -= 1
    return tokens[first:last]


def _blocks(rows: Iterable[Any], edges: Collection[int]) -> Iterator[list[np.ndarray]]:
    """Blocks of distinct rows without their edges; empty rows and repeats are skipped."""
    block: list[np.ndarray] = []
    seen: set[int] = set()
    size = 0
    for row in rows:
        core = _without_edges(row, edges)
        digest = hash(core.tobytes())
        if not len(core) or digest in seen:
            continue
        if len(seen) == MAX_REMEMBERED:
            seen.clear()
        seen.add(digest)
        block.append(core)
        size += len(core)
        if size >= MAX_BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def document_tokens(document: Document | Text) -> list[int]:
    """All tokens of a document, without start tokens."""
    if isinstance(document, Text):
        return document.ids
    return [token for window in document.windows for token in window[1:]]


def overlap_warnings(
    sources: dict[str, Any], rows: dict[str, Iterable[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A warning for each measured text with documents that are also in training rows.

    Args:
        sources: `new_task` and `retention` → name → documents.
        rows: where the rows are from → their token ids.
    """
    measured = [(kind, name, row) for kind in OVERLAP_MEANINGS for name in sources[kind] for row in sources[kind][name]]
    windows = [document_tokens(document) for *_, document in measured] if rows else []
    special_ids, lines = set(tokenizer.all_special_ids), []
    for where, trained in rows.items():
        counts = Counter(measured[at][:2] for at in sorted(find_rows(windows, trained, special_ids)))
        for (kind, name), count in counts.items():
            documents = f"{count} of {len(sources[kind][name])} documents {'is' if count == 1 else 'are'}"
            lines.append(f"{name}: {documents} also in {where}: {OVERLAP_MEANINGS[kind]}; leave them out")
    return lines
