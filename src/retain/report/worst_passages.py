"""What a page writes out to read, with colour as a second carrier: both models' texts and the worst documents.

Colours are shares of full strength in percent, which the page mixes into its own background.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from os.path import commonprefix
from typing import NamedTuple

from retain.report.numbers import cell, heat
from retain.report.results import Continuation, MovedDocument, ReportRuns, TokenResult

MAX_WORDS = 1500  # of a generation that is compared word by word: the comparison is quadratic
FULL_HEAT = 3.0  # nats: a token's divergence from which its colour is full, the same in every report
MAX_TOKENS = 20_000  # on a page; a token costs some 150 bytes of it
MAX_TOKEN_CHARS, MAX_TOP_CHARS = 200, 40


class ShownToken(NamedTuple):
    """A token to write out, its heat, whether the two models put different tokens first, and its numbers."""

    piece: str
    heat: int
    other: bool
    numbers: str


def worst_documents(runs: ReportRuns) -> tuple[dict[str, list[tuple[int, MovedDocument]]], int]:
    """By text the documents that moved most, each with the place of its run; and how many were left out for room."""
    shown: dict[str, list[tuple[int, MovedDocument]]] = {}
    room, left_out = MAX_TOKENS, 0
    for text in dict.fromkeys(text for run in runs for text in run.worst):
        for place, run in enumerate(runs):
            for document in run.worst.get(text, []):
                if len(document.tokens) > room:
                    left_out += 1
                else:
                    room -= len(document.tokens)
                    shown.setdefault(text, []).append((place, document))
    return shown, left_out


def shown_token(token: TokenResult) -> ShownToken:
    before, after, moved = (cell(value).value for value in (token.base_loss, token.loss, token.ref_kl))
    base, tuned = (top[:MAX_TOP_CHARS].replace("\n", "⏎") for top in (token.base_top, token.tuned_top))
    numbers = f"loss {before} → {after}, ref_kl {moved}; first for the base: “{base}”, tuned: “{tuned}”"
    piece = token.text[:MAX_TOKEN_CHARS].replace("\n", "⏎\n")
    return ShownToken(piece, heat(token.ref_kl or 0.0, FULL_HEAT), base != tuned, numbers)


class ShownPrompt(NamedTuple):
    """A prompt, in `title` without the lines that open all of them, and what followed, by the place of the run."""

    title: str
    how: str
    texts: dict[int, Continuation]

    @property
    def first(self) -> Continuation:
        return next(iter(self.texts.values()))


def generations(runs: ReportRuns) -> list[ShownPrompt]:
    """Per prompt and way of writing what the models wrote; `how` is empty where there is one way only."""
    found: dict[tuple[str, str], dict[int, Continuation]] = {}
    for place, run in enumerate(runs):
        for row in run.generations:
            found.setdefault((row.prompt, row.how), {})[place] = row
    several = len({how for _, how in found}) > 1
    prompts = {prompt for prompt, _ in found}
    start = commonprefix([*prompts]).rfind("\n") + 1 if len(prompts) > 1 else 0  # noqa: RUF071 (of characters)
    return [ShownPrompt(prompt[start:], how * several, texts) for (prompt, how), texts in found.items()]


def differences(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, each marked True where its words are not the base's.

    >>> differences("a red cat", "a blue cat")
    [(False, 'a '), (True, 'blue'), (False, ' cat')]
    """
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (base, tuned))
    if max(len(before), len(after)) > MAX_WORDS:
        return [(False, tuned)]
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    codes = [(tag != "equal", "".join(after[j1:j2])) for tag, _, _, j1, j2 in matcher.get_opcodes() if j2 > j1]
    pieces: list[tuple[bool, str]] = []
    for place, (changed, text) in enumerate(codes):
        between = pieces and pieces[-1][0] and place + 1 < len(codes) and codes[place + 1][0]
        changed = changed or bool(between and text.isspace())  # a mark runs on over the space between words
        if pieces and pieces[-1][0] == changed:
            text = pieces.pop()[1] + text
        pieces.append((changed, text))
    return pieces
