"""Is what is measured also trained on? Rows of tokens found again among others, also where these were cut elsewhere.

N-grams are compared. Memory is bounded by what is searched for; the rows are walked once.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

ALIGNED = 32  # rows that agree so far are compared to the end of the shorter one; shorter rows must be equal
NGRAM = 16  # rows that begin elsewhere are found by n-grams of this length
MAX_PLACES = 4  # beyond which an n-gram is a licence's or a template's, and says nothing about its row
MIN_CONSECUTIVE = 4  # n-grams that must be found again one after the other, and half of those that count
MAX_BLOCK = 1 << 16  # tokens that are searched at a time
MAX_REMEMBERED = 1 << 22  # distinct rows that are recognised when they come again, some 70 bytes each


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A uniform 64-bit hash of each n-gram, shape (max(length − n + 1, 0),), uint64; finished as in SplitMix64.

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
    """Which windows of token ids stand in rows of token ids, also where the rows were cut elsewhere.

    A window is there if it is a row, or agrees with one to the end of the shorter, or if half of its n-grams stand in
    the rows one after the other. N-grams of several windows, or in many places of the rows (a licence's header, a chat
    template's opening), do not count for that half. Memory is bounded by the windows, `MAX_BLOCK` and `MAX_REMEMBERED`.

    Args:
        edges: tokens that are no part of a text where they begin or end it: those of start and end.

    Returns:
        The places of the windows found.

    >>> find_rows([[0, 7, 8, 9], [0, 4, 5]], [[7, 8, 9], [4, 5, 6]], edges={0})
    {0}
    """
    places: dict[bytes, list[int]] = {}  # windows given twice are one
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
    counts_for = (of_windows == 1) & (of_rows <= MAX_PLACES)
    for at, of_window in enumerate(hashes):
        indices = np.searchsorted(wanted, of_window)
        if _is_half_found(of_rows[indices][counts_for[indices]] > 0):
            found.add(at)
    originals = list(places.values())
    return {at for index in found for at in originals[index]}


def _counts(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How often each of the sorted `wanted` is among the hashes."""
    indices = np.minimum(np.searchsorted(wanted, hashes), max(0, len(wanted) - 1))
    hits = indices[wanted[indices] == hashes] if len(wanted) else indices[:0]
    return np.bincount(hits, minlength=len(wanted))


def _is_half_found(again: np.ndarray) -> bool:
    """Whether half of a window's n-grams were found again one after the other."""
    longest = max((len(list(group)) for hit, group in itertools.groupby(again) if hit), default=0)
    return longest >= max(MIN_CONSECUTIVE, len(again) / 2)


def _without_edges(row: Any, edges: Collection[int]) -> np.ndarray:
    """A row without what only opens and closes it."""
    tokens = np.asarray(row, dtype=np.int64)
    first, last = 0, len(tokens)
    while first < last and int(tokens[first]) in edges:
        first += 1
    while last > first and int(tokens[last - 1]) in edges:
        last -= 1
    return tokens[first:last]


def _blocks(rows: Iterable[Any], edges: Collection[int]) -> Iterator[list[np.ndarray]]:
    """Rows that are not empty, many at a time; one that comes again says nothing new."""
    block: list[np.ndarray] = []
    seen: set[int] = set()
    size = 0
    for row in rows:
        core = _without_edges(row, edges)
        mark = hash(core.tobytes())
        if not len(core) or mark in seen:
            continue
        if len(seen) == MAX_REMEMBERED:
            seen.clear()
        seen.add(mark)
        block.append(core)
        size += len(core)
        if size >= MAX_BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
