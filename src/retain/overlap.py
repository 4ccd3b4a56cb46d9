"""Is what is measured also trained on? Documents found again in a stream of rows, word for word or nearly.

A run is n consecutive words. Runs of 8 are long enough not to recur by chance, and short enough that a changed word
here and there leaves some: PaLM (arXiv 2204.02311) looks for runs of 8, GPT-3 (2005.14165) for 13, which edited text
escapes. Memory is bounded by the documents; the rows only pass by.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Text = str | Sequence[int]  # or token ids; documents and rows must be of one kind

# Thai to Tibetan, Burmese, Khmer, kana, CJK: scripts without spaces, in which every character counts as a word.
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
CHARACTERS_PER_WORD = 3  # by which a run is longer where most words are characters


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
