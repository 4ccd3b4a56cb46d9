"""Is what is measured also trained on? Documents found again in a stream of rows, word for word or nearly.

A run is n consecutive words. Runs of 8 are long enough not to recur by chance, and short enough that a changed word
here and there leaves some: PaLM (arXiv 2204.02311) looks for runs of 8, GPT-3 (2005.14165) for 13, which edited text
escapes. Memory is bounded by the documents; the rows only pass by.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

Text = str | Sequence[int]  # or token ids; documents and rows must be of one kind

# Thai to Tibetan, Burmese, Khmer, kana, CJK: scripts without spaces, in which every character counts as a word.
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
CHARACTERS_PER_WORD = 3  # by which a run is longer where most words are characters

# Of `find_rows`, in tokens
ALIGNED = 32  # rows that agree so far are compared to the end of the shorter one; shorter rows must be the same
RUN = 16  # rows that begin elsewhere are found by runs of so many
MANY = 4  # places beyond which a run is a licence's or a template's, and tells nothing of its row
LEAST_RUNS = 4  # on end that must be found again, and half of those that tell
BLOCK = 1 << 16  # tokens that are looked through at a time
REMEMBERED = 1 << 22  # distinct rows that are known again, some 70 bytes each
FACTORS = np.random.default_rng(0).integers(1, 2**63, RUN, dtype=np.uint64)


@dataclass(frozen=True)
class Overlap:
    """How many of the documents were found again."""

    num_documents: int
    exact: tuple[int, ...]
    """Documents that stand in a row whole, whatever the spaces, capitals and line breaks."""
    near: dict[int, float]
    """Other documents → share of their runs that occur in the rows, where it reaches the threshold."""
    length: int

    def warning(
        self, name: str, where: str = "the training rows", meaning: str = "forgetting on them is not of old knowledge"
    ) -> str | None:
        """One line for people, with what the finding means; None where nothing was found."""
        shares = [f"{share:.2f}" for share in sorted(self.near.values())]
        found = len(self.exact) + len(shares)
        if not found:
            return None
        kinds = [f"{len(self.exact)} word for word"] * bool(self.exact)
        spread, whose = " to ".join(dict.fromkeys(shares[:: max(1, len(shares) - 1)])), "their" if shares[1:] else "its"
        kinds += [f"{len(shares)} at {spread} of {whose} {self.length}-word runs"] * bool(shares)
        return (
            f"{name}: {found} of {self.num_documents} documents {'is' if found == 1 else 'are'} also in {where} "
            f"({', '.join(kinds)}): {meaning}; leave them out"
        )


@dataclass
class _Searched:
    """A document that is looked for."""

    squeezed: str
    runs: list[int]
    is_short: bool  # of fewer words than a run: found whole or not at all
    is_exact: bool = False


@dataclass
class _Index:
    """Documents by their runs of one length."""

    wanted: set[int] = field(default_factory=set)
    found: set[int] = field(default_factory=set)
    by_anchor: dict[int, list[_Searched]] = field(default_factory=dict)
    """The run of a document that fewest documents have → documents; a row that holds one whole has its anchor."""


def find_overlap(
    texts: Mapping[str, Sequence[Text]], rows: Iterable[Text], *, length: int = 8, threshold: float = 0.5
) -> dict[str, Overlap]:
    """Look for the documents of every text in the rows, which are walked once and may be a generator of millions.

    Documents of fewer words than a run are only found whole; those without a word, never. Where most words are
    characters of a script without spaces, a run is `CHARACTERS_PER_WORD` times as long.

    Args:
        texts: name → documents, whole rather than cut into windows.
        rows: what is trained on or replayed.
        length: words (or tokens) in a run.
        threshold: share of a document's runs that must occur in the rows for it to count as near, above 0 to 1.

    Returns:
        By name what was found; the places of documents are those in `texts[name]`.
    """
    if length < 1 or not 0 < threshold <= 1:
        raise ValueError(f"overlap: length {length}, threshold {threshold}; use at least 1, and a share above 0 to 1")
    indexes: dict[int, _Index] = {}
    searched = {name: [_search(document, length, indexes) for document in texts[name]] for name in texts}
    _anchor(searched, indexes)
    for row in rows:
        _look(row, indexes)
    found = set().union(*(index.found for index in indexes.values()))
    return {name: _overlap(documents, found, length, threshold) for name, documents in searched.items()}


def _search(document: Text, length: int, indexes: dict[int, _Index]) -> _Searched | None:
    words = _words(document)
    if not words:
        return None
    unspaced = isinstance(document, str) and 2 * len(re.findall(f"[{UNSPACED}]", document)) > len(words)
    wanted = length * CHARACTERS_PER_WORD if unspaced else length
    size = min(wanted, len(words))
    runs = list(_runs(words, size))
    indexes.setdefault(size, _Index()).wanted.update(runs)
    return _Searched(_squeezed(document), runs, len(words) < wanted)


def _anchor(searched: Mapping[str, Sequence[_Searched | None]], indexes: dict[int, _Index]) -> None:
    documents = [document for of_text in searched.values() for document in of_text if document is not None]
    common = Counter(run for document in documents for run in set(document.runs))
    for document in documents:
        anchor = min(document.runs, key=common.__getitem__)
        for index in indexes.values():
            if anchor in index.wanted:
                index.by_anchor.setdefault(anchor, []).append(document)


def _look(row: Text, indexes: dict[int, _Index]) -> None:
    words, squeezed = _words(row), ""
    for size, index in indexes.items():
        hits = index.wanted.intersection(_runs(words, size))
        index.found |= hits
        for anchor in hits & index.by_anchor.keys():
            squeezed = squeezed or _squeezed(row)
            for document in index.by_anchor[anchor]:
                document.is_exact = document.is_exact or document.squeezed in squeezed
            index.by_anchor[anchor] = [document for document in index.by_anchor[anchor] if not document.is_exact]


def _overlap(documents: Sequence[_Searched | None], found: set[int], length: int, threshold: float) -> Overlap:
    exact, near = [], {}
    for at, document in enumerate(documents):
        if document is None:
            continue
        share = sum(run in found for run in document.runs) / len(document.runs)
        if document.is_exact:
            exact.append(at)
        elif share >= threshold and not document.is_short:
            near[at] = share
    return Overlap(len(documents), tuple(exact), near, length)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: Text) -> list[str] | list[int]:
    return WORDS.findall(_normal(text)) if isinstance(text, str) else list(text)


def _runs(words: list[str] | list[int], size: int) -> Iterator[int]:
    """Hashes of every `size` consecutive words; 64 bits, so that chance plays no part."""
    return map(hash, zip(*(words[at:] for at in range(size)), strict=False))


def _squeezed(text: Text) -> str:
    """A text without its spaces, in which a document without its spaces can be found."""
    return "".join(_normal(text).split()) if isinstance(text, str) else f",{','.join(map(str, text))},"


def find_rows(windows: Sequence[Any], rows: Iterable[Any], edges: Collection[int] = ()) -> set[int]:
    """Which windows of token ids stand in rows of token ids, also where the rows were cut elsewhere.

    A window is there if it is a row, or agrees with one to the end of the shorter, or if half of it stands in the rows
    on end. What stands in several windows, or in many places of the rows (a licence's header, a chat template's
    opening), does not count for that half. The rows are walked once; memory is bounded by the windows,
    `BLOCK` and `REMEMBERED`.

    Args:
        edges: tokens that are no part of a text where they begin or end it: those of start and end.

    Returns:
        The places of the windows found.
    """
    same: dict[bytes, list[int]] = {}  # windows given twice are one
    for at, window in enumerate(windows):
        core = _core(window, edges)
        if len(core):
            same.setdefault(core.tobytes(), []).append(at)
    cores = [np.frombuffer(core, np.int64) for core in same]
    by_beginning: dict[bytes, list[int]] = {}
    for at, core in enumerate(cores):
        by_beginning.setdefault(core[:ALIGNED].tobytes(), []).append(at)
    runs = [_run_hashes(core) for core in cores]
    wanted, of_windows = np.unique(np.concatenate([*runs, np.zeros(0, np.uint64)]), return_counts=True)
    of_rows, found = np.zeros(len(wanted), np.int64), set()
    for block in _blocks(rows, edges):
        for row in block:
            for at in by_beginning.get(row[:ALIGNED].tobytes(), []):
                shorter = min(len(row), len(cores[at]))
                if np.array_equal(row[:shorter], cores[at][:shorter]):
                    found.add(at)
        of_rows += _counts(_run_hashes(np.concatenate(block)), wanted)
    tells = (of_windows == 1) & (of_rows <= MANY)
    for at, of_window in enumerate(runs):
        places = np.searchsorted(wanted, of_window)
        if _is_half_there(of_rows[places][tells[places]] > 0):
            found.add(at)
    originals = list(same.values())
    return {at for index in found for at in originals[index]}


def _counts(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How often each of the sorted `wanted` is among the hashes."""
    places = np.minimum(np.searchsorted(wanted, hashes), max(0, len(wanted) - 1))
    hits = places[wanted[places] == hashes] if len(wanted) else places[:0]
    return np.bincount(hits, minlength=len(wanted))


def _is_half_there(again: np.ndarray) -> bool:
    """Whether half of a window's telling runs were found again on end."""
    longest = max((len(list(group)) for hit, group in groupby(again) if hit), default=0)
    return longest >= max(LEAST_RUNS, len(again) / 2)


def _core(row: Any, edges: Collection[int]) -> np.ndarray:
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
        core = _core(row, edges)
        mark = hash(core.tobytes())
        if not len(core) or mark in seen:
            continue
        if len(seen) == REMEMBERED:
            seen.clear()
        seen.add(mark)
        block.append(core)
        size += len(core)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _run_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of every `RUN` tokens on end; 64 bits, so that chance plays no part."""
    count, tokens = max(0, len(tokens) - RUN + 1), tokens.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for at, factor in enumerate(FACTORS):
        hashes += tokens[at : at + count] * factor
    return hashes ^ (hashes >> np.uint64(32))  # so that every bit depends on all
