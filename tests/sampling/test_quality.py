"""Statistics of a pool: hand-made pools with known answers, an exact and an inexact sampler, hostile texts."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retain.sampling import quality as pool
from retain.sampling.quality import is_repeating, pool_statistics, preview_text

PROSE = """The harbour was quiet when the first boat came in. Its crew had been out for nine days and nobody on the quay
knew what they would say about the storm. An old man put down his net, looked at the sky, and asked whether the others
were far behind. They did not answer him at once; the youngest of them only pointed to the west, where the light was
going, and went to tie up. Later, over soup, the story came out in pieces, and every piece was worse than the last."""
CODE = '''def read_rows(path, limit=None):
    """Yield the rows of a table, at most `limit` of them."""
    with open(path, newline="") as file:
        reader = csv.reader(file)
        header = next(reader)
        for number, row in enumerate(reader):
            if limit is not None and number >= limit:
                return
            if len(row) != len(header):
                raise ValueError(f"line {number + 2}: {len(row)} cells, not {len(header)}")
            yield dict(zip(header, row))
'''
CITIES = ["Oslo", "Bergen", "Lund", "Turku", "Aarhus", "Visby", "Malmö", "Tampere", "Odense", "Narvik"]
TABLE = "| city | year | people | area |\n|------|------|--------|------|\n" + "".join(
    f"| {city} | {1990 + 3 * i} | {12345 + 6789 * i % 9973} | {0.5 + 7 * i % 11:.1f} |\n"
    for i, city in enumerate(CITIES)
)
OTHER_TEXTS = (
    "Лиса прыгает через собаку, а дети играют в парке.",
    "狐狸跳过了狗孩子们在公园里玩球",
    "1999 2001 17 3.5 12",
)


def tokens(text: str) -> np.ndarray:
    """Words, marks and spaces as ids: close to what a subword tokenizer makes of natural text."""
    pieces = re.findall(r"\w+|[^\w\s]|\s+", text)
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return np.array([ids[piece] for piece in pieces], dtype=np.int32)


def random_rows(count: int, length: int = 64, seed: int = 0, vocab: int = 5000) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, vocab, (count, length), dtype=np.int32))


def drawn_pool(temperature: float, num_rows: int = 200, length: int = 40, seed: int = 0) -> pool.PoolStatistics:
    """Rows drawn at a temperature from one known categorical distribution, scored under it at temperature 1."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal(50)
    logprobs = logits - np.log(np.exp(logits).sum())
    drawn_from = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    rows = rng.choice(50, (num_rows, length), p=drawn_from)
    entropy = -(np.exp(logprobs) * logprobs).sum()
    sums = {"logprob_sums": logprobs[rows].sum(1), "entropy_sums": [length * entropy] * num_rows}
    return pool_statistics(rows, prefix_lengths=[0] * num_rows, **sums)


def statistics_of(rows: list, logprob_sums: Any = None, **options: Any) -> pool.PoolStatistics:
    """Of rows of which the first token is given."""
    sums = [0.0] * len(rows) if logprob_sums is None else logprob_sums
    return pool_statistics(rows, prefix_lengths=[1] * len(rows), logprob_sums=sums, **options)


def test_the_numbers_of_a_small_pool_by_hand():
    rows = [[9, 1, 2, 3, 0, 1], [9, 8, 0, 4], [9, 1, 2, 3, 0, 1], [9]]
    found = pool_statistics(
        rows, prefix_lengths=[1, 2, 1, 1], logprob_sums=[-10.0, -3.0, -6.0, 0.0], entropy_sums=[10.0, 2.0, 5.0, 0.0],
        end_ids={0},
    )  # fmt: skip
    summary = found.summary
    assert (summary["num_rows"], summary["num_tokens"]) == (4, 12)
    assert summary["loss"]["value"] == pytest.approx(19 / 12)
    assert summary["entropy"]["value"] == pytest.approx(17 / 12)
    assert summary["loss_minus_entropy"]["value"] == pytest.approx(2 / 12)
    assert summary["loss"]["ci"][0] < 19 / 12 < summary["loss"]["ci"][1]
    assert summary["reached_end"] == 0.75
    assert summary["exact_duplicates"] == 0.25
    assert summary["repeating"] is None


def test_what_was_not_given_is_none_and_all_is_json():
    found = statistics_of([[5, 1, 2, 3]])
    for key in ("entropy", "loss_minus_entropy", "reached_end", "repeating"):
        assert found.summary[key] is None
    one = statistics_of([np.array([5, 1, 2])], logprob_sums=[-3.0], entropy_sums=[2.0], end_ids=[2])
    assert one.summary["loss"] == {"value": 1.5, "ci": None}
    assert one.warnings == []
    assert json.loads(json.dumps(dataclasses.asdict(one), allow_nan=False)) == dataclasses.asdict(one)


def test_rows_of_nothing_drawn_have_no_mean():
    found = statistics_of([[1], [1]], entropy_sums=[0, 0])
    assert found.summary["loss"] is None


def test_exact_draws_agree_with_their_entropy():
    for seed in range(4):
        found = drawn_pool(1.0, seed=seed)
        assert not [line for line in found.warnings if "distribution" in line]
    low, high = found.summary["loss_minus_entropy"]["ci"]
    assert low < 0 < high


@pytest.mark.parametrize(("temperature", "kind"), [(0.7, "sharper"), (0.9, "sharper"), (1.2, "flatter")])
def test_draws_at_another_temperature_do_not(temperature, kind):
    (line,) = (line for line in drawn_pool(temperature).warnings if "distribution" in line)
    assert kind in line


def test_few_rows_are_no_evidence_against_a_sampler():
    assert not [line for line in drawn_pool(0.7, num_rows=8).warnings if "distribution" in line]


def test_rows_resampled_in_groups_have_the_same_interval(monkeypatch):
    whole = drawn_pool(1.0, num_rows=900, length=8).summary["loss"]
    monkeypatch.setattr(pool, "MAX_GROUPS", 300)
    grouped = drawn_pool(1.0, num_rows=900, length=8).summary["loss"]
    assert grouped["value"] == pytest.approx(whole["value"])
    assert np.diff(grouped["ci"]) == pytest.approx(np.diff(whole["ci"]), rel=0.2)


@pytest.mark.parametrize("cycle", [1, 3, 7])
@pytest.mark.parametrize("length", [16, 40, 512])
def test_loops_are_repeating(cycle, length):
    assert length < 8 * cycle or is_repeating(np.arange(length) % cycle)


def test_more_kinds_of_repeating():
    text = tokens(PROSE)
    assert is_repeating(tokens("the " * 20))
    assert is_repeating(np.tile(text, 3))
    assert is_repeating(np.tile(text[:40], 2))
    loop = 5000 + np.arange(300) % 6
    assert is_repeating(np.concatenate([text, loop]))  # loses itself in a loop
    assert is_repeating(np.concatenate([loop, text]))  # and finds out of it at the next document


@pytest.mark.parametrize("text", [PROSE, CODE, TABLE, ", ".join(CITIES), *OTHER_TEXTS])
@pytest.mark.parametrize("length", [24, 64, 512])
def test_natural_text_code_and_tables_are_not_repeating(text, length):
    assert not is_repeating(tokens(text)[:length])


def test_a_row_too_short_to_judge_is_neither():
    assert is_repeating(np.zeros(15, dtype=int)) is None
    assert is_repeating(np.zeros(16, dtype=int)) is True


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=8))
def test_the_number_of_duplicates_equals_its_naive_twin(rows):
    arrays = [np.array(row, dtype=np.int64) for row in rows]
    assert pool.num_duplicates(arrays) == sum(row in rows[:index] for index, row in enumerate(rows))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters()))
def test_any_text_has_a_preview(text):
    shown = preview_text([text], 1)
    assert set(shown).isdisjoint(map(chr, [*range(10), *range(11, 32), 127, 0x9B, 0x202E, 0x2066])) or "\t" in text
    shown.encode()


def test_warnings_are_sentences_of_a_degenerate_pool():
    loop = np.arange(64) % 3
    rows = [*random_rows(15), loop, loop]
    exact, repeating, low = statistics_of(rows, [-6.0] * 17).warnings
    assert exact == "5.9% of the rows are exact duplicates of earlier ones (many is 1%)."
    assert repeating == "11.8% of the rows repeat themselves (many is 5%)."
    assert low.startswith("The model's loss on its own rows is 0.095 [0.095, 0.095] nats per token (low is 0.5)")


def test_a_sound_pool_has_no_warnings():
    found = statistics_of(random_rows(64), [-63 * 3.0] * 64, entropy_sums=[63 * 3.0] * 64)
    assert found.warnings == []


HOSTILE = "\x1b[2J\x1b]0;owned\x07</pre><script>alert(1)</script> \u202egnp.exe \udce9 {{ 7*7 }} \r gone\x9b31m\x00"


def test_no_text_acts_on_the_terminal():
    texts = [HOSTILE, "two\n\tlines", *(f"text {i}" for i in range(8))]
    shown = preview_text(texts, count=10)
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)) == {"\n", "\t"}
    assert "\\x1b[2J" in shown
    assert "\n  two\n  \tlines\n" in shown
    assert shown.count("\nrow ") == 10
    assert re.findall(r"\nrow (\d+)\n", preview_text(texts, count=3)) == ["0", "4", "9"]
    assert preview_text(texts, count=0).count("\nrow ") == 0
    assert "<script" in shown
    assert preview_text(["y" * 2000], 1).endswith("\n  " + "y" * 1200 + " …\n")
