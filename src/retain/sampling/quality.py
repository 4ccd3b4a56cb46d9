"""Statistics of a pool of replay rows that a model drew from its own distribution: is it any good, before training.

A prefix of each row is given; only the tokens drawn after it count. Loss and entropy are nats per token of the model's
own distribution at temperature 1, and for exact draws they agree: the mean of −log p(x) over x ~ p is the entropy.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retain.statistics import bootstrap_ratio

# What makes a pool suspicious. Exact draws of a sound model stay well below the shares of rows.
MAX_EXACT = 0.01  # exact duplicates: long rows at temperature 1 hardly ever coincide
MAX_DUPLICATES = 0.05  # exact and near duplicates together
MAX_REPEATING = 0.05  # rows that repeat themselves: people's texts do in under 1% of 512 tokens, code included
MIN_LOSS = 0.5  # nats per token, a choice among 1.6 tokens; code has about 0.7 and prose 2 to 3.5
MIN_DIFFERENCE = 0.01  # of loss and entropy, nats per token; about 0.3% of temperature
MIN_ROWS = 16  # for the interval of that difference to be evidence
# What makes a row repeating, and two rows near duplicates.
REPEAT, MIN_DISTINCT = 16, 2 / 3  # a third of its 16-grams came before, word for word; tables and code have new ones
MIN_JUDGED = 16  # drawn tokens; in rows under 64 the n-grams are a quarter of the row
SHINGLE, JACCARD = 5, 0.8  # of the sets of token 5-grams
BANDS, BAND = 16, 4  # finds a pair of Jaccard index 0.8 with probability 1 − (1 − 0.8⁴)¹⁶ = 0.9998
COUNTED = 1 << 22  # n-grams of the pool that are counted exactly; of more, the hashes in a 2⁻ˢ part of their range
MAX_GROUPS = 2048  # of rows resampled together in a large pool: the same interval in bounded memory
# The language guess.
MIN_CODE = 0.06  # share of visible characters that are symbols: prose has 0.01, most code 0.07 to 0.2
SYMBOLS = "{}()[]<>;=_/\\*#&|+$^~@`"
STOP_WORDS = {
    "en": "the of and to in is that it was for with as on be by this are at from his have not you which they but",
    "de": "der die und das den von zu mit ist des im dem nicht ein eine auf sich als auch es wird sie er ich",
    "fr": "le la les de des et est en une un du que qui dans pour pas au sur par plus il elle ce avec sont je vous",
    "es": "el la los las de y que en un una del se por con no para es al lo como más su fue pero",
    "it": "il la di e che un una del della non per è in con le si dei da sono gli nel al ma anche",
    "pt": "o a os as de e que do da em um uma não para com se por no na dos é mais foi como ao",
    "nl": "de het een van en is in dat op te zijn voor met niet aan er die om ook als maar door",
}

_RNG = np.random.default_rng(0)  # of the hash functions, the same in every run
_PLACES = _RNG.integers(0, 1 << 63, REPEAT, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _RNG.integers(0, 1 << 31, BANDS * BAND, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS = _RNG.integers(0, 1 << 32, BANDS * BAND, dtype=np.uint32)


@dataclass(frozen=True)
class PoolStatistics:
    """Statistics of a pool; `dataclasses.asdict` of it is JSON.

    Attributes:
        summary: over the pool. A mean is {"value", "ci"}: nats per token, with a 95% interval over rows, or `ci` None
            for one row. Shares are of the rows; `repeating` of the `num_judged`. None is what was not measured.
        rows: for each of num_tokens, loss, entropy, first_end, repeating, distinct_2, language, duplicate_of and
            near_duplicate_of, a list of shape (rows,).
        warnings: what is wrong with the pool, a sentence each.
    """

    summary: dict[str, Any]
    rows: dict[str, list[Any]]
    warnings: list[str]


def pool_statistics(
    rows: Sequence[Any], *, prefix_lengths: int | Sequence[int] = 1,
    logprob_sums: Sequence[float] | np.ndarray | None = None,
    mean_entropies: Sequence[float] | np.ndarray | None = None,
    end_ids: Collection[int] = (), texts: Sequence[str] | None = None,
    num_forward_tokens: int | None = None, num_asked: int | None = None,
) -> PoolStatistics:  # fmt: skip
    """Statistics of each row and of the pool.

    Args:
        rows: token ids of each row, shape (length,), its prefix first.
        prefix_lengths: given tokens of each row, shape (rows,), or one number for all.
        logprob_sums: log-probability of the drawn tokens, summed, shape (rows,), nats; under the model's full
            distribution at temperature 1, whatever was drawn from.
        mean_entropies: mean entropy of that distribution over the drawn positions, shape (rows,), nats per token.
        end_ids: tokens that end a document, or a turn.
        texts: the rows decoded, shape (rows,); only the language guess reads them.
        num_forward_tokens: tokens that went through the model to draw these rows.
        num_asked: rows that were asked for.

    Raises:
        ValueError: if there are no rows.
    """
    if not len(rows):
        raise ValueError("rows: the pool is empty; sample at least one row")
    prefixes = np.broadcast_to(np.asarray(prefix_lengths), len(rows))
    drawn = [np.asarray(rows[i])[prefixes[i] :] for i in range(len(rows))]
    tokens = np.array([len(row) for row in drawn])
    loss = None if logprob_sums is None else -np.asarray(logprob_sums, dtype=np.float64)
    entropy = None if mean_entropies is None else np.asarray(mean_entropies, dtype=np.float64) * tokens
    gap = None if loss is None or entropy is None else loss - entropy
    ends = [np.flatnonzero(np.isin(row, list(end_ids))) for row in drawn]
    exact, nothing = exact_duplicates(drawn), [None] * len(drawn)
    columns: dict[str, list[Any]] = {
        "num_tokens": tokens.tolist(),
        "loss": nothing if loss is None else (loss / np.maximum(tokens, 1)).tolist(),
        "entropy": nothing if entropy is None else (entropy / np.maximum(tokens, 1)).tolist(),
        "first_end": [int(found[0]) if len(found) else None for found in ends],
        "repeating": [is_repeating(row) for row in drawn],
        "distinct_2": [distinct_share([row], 2) for row in drawn],
        "language": nothing if texts is None else [guess_language(text) for text in texts],
        "duplicate_of": exact,
        "near_duplicate_of": near_duplicates(drawn, [i for i, of in enumerate(exact) if of is None]),
    }
    assert {len(column) for column in columns.values()} == {len(drawn)}, "one of each for each row"
    summary = {"num_asked": num_asked, "num_forward_tokens": num_forward_tokens} | _shares(columns, bool(end_ids))
    means = {"loss": loss, "entropy": entropy, "loss_minus_entropy": gap}
    summary |= {key: _mean(sums, tokens) for key, sums in means.items()}
    summary |= {f"distinct_{n}": distinct_share(drawn, n) for n in (1, 2, 3)}
    return PoolStatistics(summary, columns, _warnings(summary))


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A uniform hash of each n-gram, n ≤ 16, uint64, shape (max(length − n + 1, 0),); finished as in SplitMix64."""
    count = max(len(tokens) - n + 1, 0)
    ids = tokens.astype(np.uint64) + np.uint64(1)  # so that a token 0 counts too
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(n):
        mixed += ids[place : place + count] * _PLACES[place]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def distinct_share(rows: Sequence[np.ndarray], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different n-grams over all n-grams of rows of shape (length,); None without any.

    It falls with the size of the pool: compare pools of one size. Exact up to 4 million n-grams, beyond that within 2%.
    """
    total = sum(max(len(row) - n + 1, 0) for row in rows)
    part = max(0, (total // COUNTED).bit_length())
    below = np.uint64((1 << (64 - part)) - 1)
    hashes = [found[found <= below] for found in (ngram_hashes(row, n) for row in rows)]
    return min(1.0, np.unique(np.concatenate(hashes)).size * 2**part / total) if total else None


def is_repeating(tokens: np.ndarray) -> bool | None:
    """Whether a third of a row's 16-grams, tokens of shape (length,), are copies of earlier ones; None if too short."""
    n = min(REPEAT, len(tokens) // 4)
    return (distinct_share([tokens], n) or 0.0) < MIN_DISTINCT if len(tokens) >= MIN_JUDGED else None


def exact_duplicates(drawn: Sequence[np.ndarray]) -> list[int | None]:
    """The first earlier row of the same tokens, or None, for each row."""
    first: dict[bytes, int] = {}
    digests = [hashlib.blake2b(row.astype(np.int64).tobytes(), digest_size=16).digest() for row in drawn]
    earliest = [first.setdefault(digest, index) for index, digest in enumerate(digests)]
    return [None if earlier == index else earlier for index, earlier in enumerate(earliest)]


def near_duplicates(drawn: Sequence[np.ndarray], among: Sequence[int]) -> list[int | None]:
    """An earlier row whose set of token 5-grams has a Jaccard index of 0.8 or more, or None, for each row.

    Candidates come from MinHash (64 hashes, 16 bands; Broder 1997): per band, the first and the previous row with the
    same hashes, so at most 32 for a row even where the pool has collapsed. Each is then verified exactly.

    Args:
        among: the rows to compare, ascending; say, those that are no exact duplicates.
    """
    places = [index for index in among if len(drawn[index])]
    found: list[int | None] = [None] * len(drawn)
    own, of = np.empty(0), -1
    sets = (_shingles(drawn[index]).astype(np.uint32) for index in places)
    signatures = [(hashes[:, None] * _FACTORS + _SHIFTS).min(axis=0) for hashes in sets]
    for later, earlier in _candidates(np.array(signatures)) if places else ():
        row, other = places[later], places[earlier]
        if found[row] is None:
            own, of = (own, of) if of == row else (_shingles(drawn[row]), row)
            theirs = _shingles(drawn[other])
            shared = np.intersect1d(own, theirs, assume_unique=True).size
            found[row] = other if shared >= JACCARD * (len(own) + len(theirs) - shared) else None
    return found


def guess_language(text: str) -> str:
    """A cheap guess: a script other than Latin, "code" by its symbols, one of seven languages, or "unknown".

    A script must have most of the letters; a language's stop words 15% of ten words or more, and a fifth more than the
    next language's.
    """
    counts = Counter(text)
    scripts: Counter[str] = Counter()
    for char in filter(str.isalpha, counts):  # "LATIN SMALL LETTER A", "CJK UNIFIED IDEOGRAPH-4E00"
        scripts[unicodedata.name(char, "unknown").split()[0].capitalize()] += counts[char]
    if scripts["Hiragana"] * 10 > scripts["Cjk"]:  # kanji between kana
        scripts["Japanese"] = scripts.pop("Hiragana") + scripts.pop("Katakana", 0) + scripts.pop("Cjk", 0)
    script = max(scripts, key=lambda name: scripts[name], default="Latin")
    if script != "Latin" and scripts[script] >= 10 and scripts[script] * 2 > scripts.total():
        return "Han" if script == "Cjk" else script
    shown = sum(count for char, count in counts.items() if not char.isspace())
    if shown >= 40 and sum(counts[char] for char in SYMBOLS) >= MIN_CODE * shown:
        return "code"
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    scores = Counter({name: sum(words[word] for word in stop.split()) for name, stop in STOP_WORDS.items()})
    (best, top), (_, second) = scores.most_common(2)
    return best if words.total() >= 10 and top >= max(0.15 * words.total(), 1.2 * second) else "unknown"


def _mean(sums: np.ndarray | None, tokens: np.ndarray) -> dict[str, Any] | None:
    """Σ sums / Σ tokens, shapes (rows,), with its interval."""
    if sums is None or not tokens.any():
        return None
    groups = np.arange(len(tokens)) % MAX_GROUPS
    num, den = (np.bincount(groups, weights=values) for values in (sums, tokens))
    value, *ci = bootstrap_ratio(num[den > 0], den[den > 0])
    return {"value": value, "ci": ci if np.isfinite(ci).all() else None}


def _shares(columns: dict[str, list[Any]], has_ends: bool) -> dict[str, Any]:
    num_rows = len(columns["num_tokens"])
    some = {key: num_rows - column.count(None) for key, column in columns.items()}
    judged = [flag for flag in columns["repeating"] if flag is not None]
    median = float(np.median([np.inf if end is None else end for end in columns["first_end"]]))
    languages = Counter(name for name in columns["language"] if name is not None)
    return {
        "num_rows": num_rows, "num_distinct_rows": num_rows - some["duplicate_of"],
        "num_tokens": sum(columns["num_tokens"]), "exact_duplicates": some["duplicate_of"] / num_rows,
        "near_duplicates": some["near_duplicate_of"] / num_rows,
        "num_judged": len(judged),
        "repeating": sum(judged) / len(judged) if judged else None,
        "reached_end": some["first_end"] / num_rows if has_ends else None,
        "median_first_end": median if np.isfinite(median) else None,  # a row that reaches none is longer than any
        "languages": {name: count / num_rows for name, count in languages.most_common()},
    }  # fmt: skip


def _shingles(tokens: np.ndarray) -> np.ndarray:
    return np.unique(ngram_hashes(tokens, min(SHINGLE, len(tokens))))


def _candidates(signatures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of rows that share a band and half of their hashes, shape (rows, BANDS · BAND)."""
    pairs = []
    for band in range(0, BANDS * BAND, BAND):
        keys = np.ascontiguousarray(signatures[:, band : band + BAND]).view(f"V{4 * BAND}").ravel()
        _, groups = np.unique(keys, return_inverse=True)
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
        first = np.repeat(order[starts], np.diff(starts, append=len(order)))
        for earlier in (first, np.roll(order, 1)):
            same = (groups[order] == groups[earlier]) & (earlier < order)
            alike = (signatures[order[same]] == signatures[earlier[same]]).mean(axis=1) >= 0.5
            pairs.append(np.stack([order[same], earlier[same]], axis=1)[alike])
    return [(later, earlier) for later, earlier in np.unique(np.concatenate(pairs), axis=0).tolist()]


def _warnings(summary: dict[str, Any]) -> list[str]:
    asked, distinct, exact = summary["num_asked"], summary["num_distinct_rows"], summary["exact_duplicates"]
    copies, repeating = exact + summary["near_duplicates"], summary["repeating"] or 0.0
    loss, gap = summary["loss"], summary["loss_minus_entropy"]
    # Zero lies outside the interval stretched to twice its width, about four standard errors.
    sure = gap and gap["ci"] and summary["num_rows"] >= MIN_ROWS
    sure = sure and not 2 * gap["ci"][0] <= gap["value"] <= 2 * gap["ci"][1]
    kind = "sharper" if gap and gap["value"] < 0 else "flatter"
    checks = {
        f"{asked} rows were asked for and the pool has {distinct} distinct ones.":
            asked is not None and distinct < (1 - MAX_EXACT) * asked,
        f"{exact:.1%} of the rows are exact duplicates of earlier ones (many is {MAX_EXACT:.0%}).": exact > MAX_EXACT,
        f"{copies:.1%} of the rows are exact or near duplicates (many is {MAX_DUPLICATES:.0%}).":
            copies > MAX_DUPLICATES,
        f"{repeating:.1%} of the rows repeat themselves (many is {MAX_REPEATING:.0%}).": repeating > MAX_REPEATING,
        f"The model's loss on its own rows is {shown(loss)} nats per token (low is {MIN_LOSS}): a model that has "
        "collapsed has little to say.": loss and loss["value"] < MIN_LOSS,
        f"Loss − entropy is {shown(gap)} nats per token and of exact draws it is 0: the rows come from a "
        f"{kind} distribution than the model's own at temperature 1.": sure and abs(gap["value"]) > MIN_DIFFERENCE,
    }  # fmt: skip
    return [sentence for sentence, wrong in checks.items() if wrong]


def shown(value: Any) -> str:
    """A count, a share, a mean with its interval, or shares by name."""
    if isinstance(value, dict) and "ci" in value:
        interval = ", ".join(map(shown, value["ci"] or []))
        return f"{shown(value['value'])} [{interval}]" if interval else shown(value["value"])
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(share)}" for name, share in value.items())
    if value is None or isinstance(value, str):
        return value or ""
    return (f"{value:.3f}" if isinstance(value, float) else f"{value:,}").replace("-", "−")
