"""Does the model end a user's turn by itself, and are such chats of use as replay? One command; finished runs stay.

python experiments/12_self_generated_chat/run.py [--scale laptop|gpu|paper] [--seeds 0 1] [--report]
"""

from __future__ import annotations

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
from instruct_runs import ARMS, CHAT_ARMS, SCALES, Workplace  # noqa: E402
from scales import ask, seeds_of, show  # noqa: E402

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


def main(arguments: Sequence[str] | None = None) -> None:
    asked = ask(__doc__, SCALES, arguments)
    scale = SCALES[asked.scale]
    here, there = (Results(folder / "results.jsonl", asked.scale) for folder in (HERE, INSTRUCT))
    turns, rows = [], []
    for seed in seeds_of(asked, scale.seeds):
        place = Workplace(scale, seed)
        length = {"rows": scale.pool_rows + scale.held_out, "length": scale.sampled_length}
        sampling = {"what": "turns", "model": scale.model, "seed": seed, **length}
        if not asked.report:
            here.make(sampling, lambda place=place: turns_row(place))
        turns += [row for row in [here.get(sampling)] if row is not None]
        for name in ARMS_COMPARED:
            arm, results = (ARMS | CHAT_ARMS)[name], there if name in ARMS else here
            settings = place.settings(name, arm)
            if not asked.report:
                results.make(settings, lambda arm=arm, place=place: place.run(arm))
            rows += [row for row in [results.get(settings)] if row is not None]
    show(HERE, asked.scale, report(turns, rows), lambda path: draw(turns, rows, path))


if __name__ == "__main__":
    main()
