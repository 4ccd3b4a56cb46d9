"""Does the model end a user's turn by itself, and are such chats of use as replay? One command; finished runs stay.

python experiments/12_self_generated_chat/run.py [--scale laptop|gpu|paper] [--arms 0 1] [--report]

`--arms` counts through every arm of seed 0, then of seed 1, and so on.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTRUCT = HERE.parent / "10_instruct"
sys.path[:0] = [str(HERE.parent), str(HERE), str(INSTRUCT), str(HERE.parent / "04_capabilities")]

from chat_report import ARMS_COMPARED, draw, report  # noqa: E402
from harness import Results  # noqa: E402
from instruct_data import sampled  # noqa: E402
from instruct_runs import ARMS, CHAT_ARMS, SCALES, Scale, Workplace, workplace  # noqa: E402
from scales import Told, conduct  # noqa: E402

from retain import ReplayDataset, choose_start_token  # noqa: E402
from retain.starts import CONTENT, chat_prefix  # noqa: E402

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
    turns = [{"role": "user", "content": CONTENT}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text.partition(CONTENT)[2], add_special_tokens=False)["input_ids"]
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
    base, tokenizer, _ = place.open()
    start = choose_start_token(tokenizer)
    return count_turns(sampled("chat", base, tokenizer, start, place.scale, place.seed), tokenizer)


def sampling_of(scale: Scale, seed: int) -> dict[str, Any]:
    length = {"rows": scale.pool_rows + scale.held_out, "length": scale.sampled_length}
    return {"what": "turns", "model": scale.model, "seed": seed, **length}


def results_of(arm: str, name: str) -> Results:
    """Arms without chats of the model's own are those of study 10."""
    return Results((INSTRUCT if arm in ARMS else HERE) / "results.jsonl", name)


def row_of(arm: str, name: str, place: Workplace) -> dict[str, Any] | None:
    return results_of(arm, name).get(place.settings(arm, (ARMS | CHAT_ARMS)[arm]))


def make(name: str, part: int) -> None:
    """One arm with one seed."""
    seed, at = divmod(part, len(ARMS_COMPARED))
    place, arm = workplace(name, seed), ARMS_COMPARED[at]
    shape = (ARMS | CHAT_ARMS)[arm]
    results_of(arm, name).make(place.settings(arm, shape), lambda: place.run(shape))


def prepare(name: str) -> None:
    """What the arms read is sampled once, where its turns are not counted yet or some arm is missing."""
    for seed in range(SCALES[name].seeds):
        place = workplace(name, seed)
        settings = sampling_of(SCALES[name], seed)
        Results(HERE / "results.jsonl", name).make(settings, lambda place=place: turns_row(place))
        if any(row_of(arm, name, place) is None for arm in ARMS_COMPARED):
            place.open()


def told(name: str) -> Told:
    """Of every seed that there is, more than the scale's own, too."""
    turns, rows = [], []
    for seed in itertools.count():
        place = workplace(name, seed)
        found = [row_of(arm, name, place) for arm in ARMS_COMPARED]
        counted = Results(HERE / "results.jsonl", name).get(sampling_of(SCALES[name], seed))
        turns, rows = [*turns, counted], [*rows, *found]
        if counted is None and not any(found):
            break
    turns, rows = ([row for row in some if row is not None] for some in (turns, rows))
    return report(turns, rows), lambda path: draw(turns, rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=lambda scale: range(len(ARMS_COMPARED) * scale.seeds), make=make, report=told,
        only="arms", prepare=prepare, arguments=arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()
