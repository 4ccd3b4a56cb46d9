"""Texts found again in the rows: word for word, nearly, or not at all; against a naive twin."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from retain.data import overlap
from retain.data.overlap import find_overlap

WORDS = [f"{a}{b}" for a in ("red", "blue", "Green", "ÉTÉ", "straße") for b in ("fox", "dog", "bird", "stone")]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30)


def found(documents: list, rows: list, length: int = 8):
    with mock.patch.object(overlap, "WORDS_PER_NGRAM", length):
        return find_overlap({"wiki": documents}, iter(rows))["wiki"]


def words(count: int, seed: int, kind: str = "w") -> str:
    rng = random.Random(seed)
    return " ".join(f"{kind}{rng.randrange(10**9)}" for _ in range(count))


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    parts = text.casefold().split()
    return [tuple(parts[at : at + length]) for at in range(len(parts) - length + 1)]


@settings(deadline=None, max_examples=60)
@given(st.lists(texts, min_size=1, max_size=6), st.lists(texts, max_size=6), st.integers(1, 5), st.randoms())
def test_it_equals_a_naive_twin(documents, rows, length, rng):
    documents, rows = [" ".join(document) for document in documents], [" ".join(row) for row in rows]
    result = found(documents, rows, length)
    seen = {run for row in rows for run in runs(row, length)}
    for at, document in enumerate(documents):
        own = runs(document, length)
        share = sum(run in seen for run in own) / len(own) if own else 0.0
        whole = share == 1 or (not own and any(f" {document} ".casefold() in f" {row} ".casefold() for row in rows))
        assert (at in result.exact) == whole
        assert result.near.get(at) == (share if share >= 0.5 and not whole else None)
    rng.shuffle(rows)
    assert found(documents, rows, length) == result, "the order of the rows plays no part"


@settings(deadline=None, max_examples=60)
@given(texts, texts, texts, st.lists(st.sampled_from([" ", "\n", "\t", "  ", "\u00a0"]), min_size=1), st.booleans())
def test_spaces_capitals_and_surroundings_hide_nothing(before, document, after, spaces, upper):
    row = "".join(word + spaces[at % len(spaces)] for at, word in enumerate([*before, *document, *after]))
    assert found([" ".join(document)], [row.upper() if upper else row]).exact == (0,)


def test_a_document_with_some_words_changed_is_near():
    document = words(100, 1)
    parts = document.split()
    parts[10] = parts[50] = "changed"
    result = found([words(100, 2), document], [words(50, 3), " ".join(parts)])
    assert result.exact == ()
    assert result.near == {1: (93 - 16) / 93}
    halves = [" ".join(document.split()[:50]), " ".join(document.split()[50:])]
    assert found([document], halves).near == {0: 86 / 93}, "cut into two rows"


def test_short_documents_are_only_found_whole():
    rows = ["He said: thank you\nvery much. Then he left the old town by the river."]
    result = found(["Thank you very much.", "thank you very", "thank them very much", "???", "", "art"], rows)
    assert result.exact == (0, 1)
    assert result.near == {}
    assert found(["ash"], ["a crash"]).exact == (), "not inside a word"


def test_scripts_without_spaces_are_compared_by_characters():
    rng = random.Random(0)
    for low in (0x4E00, 0x0E01, 0x3041):  # CJK, Thai, Hiragana
        pool = "".join(char for char in map(chr, range(low, low + 45)) if char.isalnum())
        text = "".join(rng.choices(pool, k=300))
        changed = f"{text[:150]}{pool[0] * 5}{text[155:]}"
        common = " ".join(text[at : at + 12] + "。" for at in range(0, 300, 12)[::-1])  # the same phrases, shuffled
        assert found([text], [f"前{text}後"]).exact == (0,)
        assert 0.8 < found([text], [changed]).near[0] < 1
        assert found([text], [common]).near == {}


def test_rows_are_walked_once_for_all_texts():
    walked = []

    def rows() -> Iterator[str]:
        for at in range(5):
            walked.append(at)
            yield f"row {at} " + words(20, at)

    result = find_overlap({"a": [words(20, 3), "row 2"], "b": [words(20, 9)], "c": []}, rows())
    assert walked == [*range(5)]
    assert [result[name].exact for name in "abc"] == [(0, 1), (), ()]


def test_many_documents_with_one_beginning_are_told_apart():
    header = words(40, 0)
    documents = [f"{header} {words(60, seed)}" for seed in range(1, 9)]
    result = found(documents, [documents[2], f"{header} {words(60, 99)}"])
    assert (result.exact, result.near) == ((2,), {})
    assert found([documents[0]] * 3, [documents[0]]).exact == (0, 1, 2)


def test_the_warning_is_one_line():
    document = words(60, 1)
    near = document.replace(document.split()[30], "changed")
    result = found([document, words(60, 2), words(9, 3)], [near, words(9, 3)])
    assert result.warning("a", "b", "so what") == (
        "a: 2 of 3 documents are also in b (1 word for word, 1 at 0.85 of its 8-grams): so what; leave them out"
    )
    several = found([document, words(60, 2)], [document.replace(document.split()[30], "x"), words(60, 2)[:400]])
    line = several.warning("a", "b", "c")
    assert line.startswith("a: 2 of 2 documents are also in b (2 at")
    assert " of their 8-grams)" in line
    assert found([document], [document]).warning("a", "b", "c") == (
        "a: 1 of 1 documents is also in b (1 word for word): c; leave them out"
    )
    assert found([document], []).warning("a", "b", "c") is None
