"""Is what is measured also trained on? Documents found again in a stream of rows, word for word or nearly.

Both searches compare n-grams. Those of 8 words are long enough not to recur by chance, and short enough that a changed
word here and there leaves some: PaLM (arXiv 2204.02311) looks for 8-grams, GPT-3 (2005.14165) for 13-grams, which
edited text escapes. Memory is bounded by the documents; the rows are walked once.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# Thai to Tibetan, Burmese, Khmer, kana, CJK: scripts without spaces, in which every character counts as a word.
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
# Of `find_overlap`
WORDS_PER_NGRAM = 8
MIN_NEAR = 0.5  # share of a document's n-grams that occur in the rows, from which it is near
CHARACTERS_PER_WORD = 3  # by which an n-gram is longer where most words are characters

# Of `find_rows`, in tokens
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


@dataclass(frozen=True)
class Overlap:
    """How many of the documents were found again."""

    num_documents: int
    exact: tuple[int, ...]
    """Documents that are found whole, regardless of spaces, capitals and punctuation."""
    near: dict[int, float]
    """Other documents → share of their n-grams that occur in the rows, from `MIN_NEAR`."""

    def warning(self, name: str, where: str, meaning: str) -> str | None:
        """One line for people, with what the finding means; None where nothing was found."""
        shares = [f"{share:.2f}" for share in sorted(self.near.values())]
        found = len(self.exact) + len(shares)
        if not found:
            return None
        kinds = [f"{len(self.exact)} word for word"] * bool(self.exact)
        spread, whose = " to ".join(dict.fromkeys(shares[:: max(1, len(shares) - 1)])), "their" if shares[1:] else "its"
        kinds += [f"{len(shares)} at {spread} of {whose} {WORDS_PER_NGRAM}-grams"] * bool(shares)
        return (
            f"{name}: {found} of {self.num_documents} documents {'is' if found == 1 else 'are'} also in {where} "
            f"({', '.join(kinds)}): {meaning}; leave them out"
        )


@dataclass(frozen=True)
class _Document:
    """The n-grams of a document that is searched for, and their length in words."""

    ngrams: list[int]
    length: int
    is_short: bool  # of fewer words than an n-gram: found whole or not at all

    @classmethod
    def of(cls, text: str) -> _Document:
        words = _words(text)
        unspaced = 2 * len(re.findall(f"[{UNSPACED}]", text)) > len(words)
        wanted = WORDS_PER_NGRAM * (CHARACTERS_PER_WORD if unspaced else 1)
        size = min(wanted, len(words))
        return cls(_word_ngrams(words, size) if words else [], size, len(words) < wanted)


def find_overlap(texts: Mapping[str, Sequence[str]], rows: Iterable[str]) -> dict[str, Overlap]:
    """Search for the documents of every text in the rows, which may be a generator of millions.

    A document whose every n-gram occurs is found whole. Those of fewer words than an n-gram are found whole or not at
    all; those without a word, never. Where most words are characters of a script without spaces, an n-gram is
    `CHARACTERS_PER_WORD` times as long.

    Args:
        texts: name → documents, whole rather than cut into windows.
        rows: what is trained on or replayed.

    Returns:
        By name what was found; the places of documents are those in `texts[name]`.

    >>> find_overlap({"poem": ["Roses are red", "Violets are blue"]}, ["He wrote: roses  are red."])["poem"].exact
    (0,)
    """
    documents = {name: [_Document.of(text) for text in of_name] for name, of_name in texts.items()}
    wanted: dict[int, set[int]] = {}  # by length
    for document in itertools.chain(*documents.values()):
        wanted.setdefault(document.length, set()).update(document.ngrams)
    found: set[int] = set()
    for row in rows:
        words = _words(row)
        for size, ngrams in wanted.items():
            found |= ngrams.intersection(_word_ngrams(words, size)) if ngrams else set()
    return {name: _overlap(of_text, found) for name, of_text in documents.items()}


def _overlap(documents: Sequence[_Document], found: set[int]) -> Overlap:
    exact, near = [], {}
    for at, document in enumerate(documents):
        share = sum(ngram in found for ngram in document.ngrams) / max(1, len(document.ngrams))
        if share == 1:
            exact.append(at)
        elif share >= MIN_NEAR and not document.is_short:
            near[at] = share
    return Overlap(len(documents), tuple(exact), near)


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _word_ngrams(words: list[str], size: int) -> list[int]:
    ngrams: list[int] = ngram_hashes(np.fromiter(map(hash, words), np.int64, len(words)), size).tolist()
    return ngrams


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
