"""Does the model end a user's turn by itself, and are such chats of use as replay? One command; finished runs stay.

python -m experiments 12 [--arms 0 1] [--report]

`--arms` counts through every arm of seed 0, then of seed 1, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.finetunes import StudyResults
from experiments.pages import NoReport
from experiments.program import Report, conduct
from experiments.study_10_instruct.data import sampled
from experiments.study_10_instruct.runs import ARMS, CHAT_ARMS, SCALES, Scale, Workplace, workplace
from experiments.study_12_self_generated_chat.report import ARMS_COMPARED, draw, report
from retain import ReplayDataset, choose_start_token
from retain.data.rows import user_turn_text
from retain.sampling.starts import chat_prefix

HERE = Path(__file__).parent
INSTRUCT = HERE.parent / "study_10_instruct"

EXAMPLES, SHOWN = 3, 420  # rows shown, and characters of each


def turn_of(own: list[int], end: int, opening: list[int]) -> tuple[int | None, bool, bool]:
    """Of a row behind its beginning: tokens of the user's turn (None: never ended), answer opened, answer ended."""
    if end not in own:
        return None, False, False
    first = own.index(end)
    opened = own[first + 1 : first + 1 + len(opening)] == opening
    return first, opened, opened and end in own[first + 1 :]


def answer_opening(tokenizer: Any, end: int) -> list[int]:
    """What the chat template writes between the end of a user's turn and the answer."""
    _, found, behind = user_turn_text("QUESTION", tokenizer).partition("QUESTION")
    assert found
    tokens = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return tokens[tokens.index(end) + 1 :]


def count_turns(rows: ReplayDataset, tokenizer: Any) -> dict[str, Any]:
    """How the sampled chats go on, with the first few to read."""
    _, end = chat_prefix(tokenizer, "user")
    opening = answer_opening(tokenizer, end)
    own = [rows[at][int(rows.prefix_lengths[at]) :].tolist() for at in range(len(rows))]
    found = [turn_of(row, end, opening) for row in own]
    ended = [length for length, _, _ in found if length is not None]
    return {
        "rows": len(found),
        "user_turns_ended": len(ended),
        "answers_opened": sum(opened for _, opened, _ in found),
        "answers_ended": sum(done for _, _, done in found),
        "user_turn_tokens": sorted(ended),
        "examples": [tokenizer.decode(row)[:SHOWN] for row in own[:EXAMPLES]],
    }


def turns_row(place: Workplace) -> dict[str, Any]:
    """Sample the chats that the arms replay, and count their turns."""
    start = choose_start_token(place.tokenizer)
    return count_turns(sampled("chat", place.base, place.tokenizer, start, place.scale, place.seed), place.tokenizer)


def sampling_of(scale: Scale, seed: int) -> dict[str, Any]:
    length = {"rows": scale.pool_rows + scale.held_out, "length": scale.sampled_length}
    return {"what": "turns", "model": scale.model, "seed": seed, **length}


def row_of(arm: str, name: str, place: Workplace) -> dict[str, Any] | None:
    """An arm's row; one without chats of the model's own is study 10's, with what is measured on chats here."""
    own = StudyResults(HERE / "results.jsonl", name)
    if arm in CHAT_ARMS:
        return own.get(place.settings(arm, CHAT_ARMS[arm]))
    settings = place.settings(arm, ARMS[arm])
    row, chats = StudyResults(INSTRUCT / "results.jsonl", name).get(settings), own.get(on_chats(settings))
    if row is None or chats is None:
        return None
    if row["trajectory"] != chats["trajectory"]:
        raise NoReport(
            f"{arm}, seed {place.seed}: chats were measured on a model that learned otherwise than study 10's; delete "
            "its row here and the folders .cache/experiments/instruct/tuned-*, and run study 10 and this one again"
        )
    return row | {"texts": row["texts"] | chats["texts"]}


def on_chats(settings: dict[str, Any]) -> dict[str, Any]:
    return {"what": "chats", **settings}


def make(name: str, part: int) -> None:
    """One arm with one seed; with the first also the seed's turns, where nobody has counted them yet."""
    seed, at = divmod(part, len(ARMS_COMPARED))
    place, arm = workplace(name, seed), ARMS_COMPARED[at]
    shape = (ARMS | CHAT_ARMS)[arm]
    settings, own = place.settings(arm, shape), StudyResults(HERE / "results.jsonl", name)
    if at == 0:
        own.make(sampling_of(SCALES[name], seed), lambda: turns_row(place))
    if arm in CHAT_ARMS:
        own.make(settings, lambda: place.run(arm, shape))
    else:
        StudyResults(INSTRUCT / "results.jsonl", name).make(settings, lambda: place.run(arm, shape))
        own.make(on_chats(settings), lambda: place.on_chats(arm, shape))


def prepare(name: str) -> None:
    """What the arms share is opened once, where some arm is missing."""
    for place in (workplace(name, seed) for seed in range(SCALES[name].seeds)):
        if any(row_of(arm, name, place) is None for arm in ARMS_COMPARED):
            _ = place.base, place.pools


def page(name: str) -> Report:
    """Of every seed that there is, more than the scale's own, too."""
    turns, rows = [], []
    for seed in itertools.count():
        place = workplace(name, seed)
        found = [row_of(arm, name, place) for arm in ARMS_COMPARED]
        counted = StudyResults(HERE / "results.jsonl", name).get(sampling_of(SCALES[name], seed))
        turns, rows = [*turns, counted], [*rows, *found]
        if counted is None and not any(found):
            break
    turns, rows = ([row for row in some if row is not None] for some in (turns, rows))
    return report(turns, rows), lambda path: draw(turns, rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=lambda scale: range(len(ARMS_COMPARED) * scale.seeds), make=make, report=page,
        only="arms", prepare=prepare, arguments=arguments,
    )  # fmt: skip
