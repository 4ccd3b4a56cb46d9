"""What the study of self-generated chats says: how turns end, and what such replay keeps, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.claim import share_text
from experiments.pages import dress, findings, panels, table
from experiments.study_10_instruct.report import (
    MEASURES,
    PLAIN,
    compared,
    differences,
    footnote,
    judged,
    table_of_arms,
    value_of,
    versus,
)
from retain.report.style import look
from retain.statistics import share_interval

Row = dict[str, Any]
DOCUMENTS, CHATS, MIX, REAL = (
    "KL, self-generated",
    "KL, self-generated chats",
    "KL, documents and chats",
    "KL, real chats",
)
ARMS_COMPARED = (PLAIN, DOCUMENTS, CHATS, MIX, REAL)
JUDGED = (
    "ref_kl on real chats", "ref_kl on own chats", "forgetting on real chats", "ref_kl on own documents",
    "ref_kl on web text", "answers changed",
)  # fmt: skip
KEY = "ref_kl on real chats"  # where chat replay should help, if anywhere
MOST, HARDLY = 0.5, 0.1  # of the user's turns
COUNTED = {
    "user_turns_ended": "user turns that the model ended itself",
    "answers_opened": "rows that then open an answer",
    "answers_ended": "rows whose answer ends, too",
}


def counts(turns: Sequence[Row], name: str) -> tuple[int, int]:
    """Rows of which it is true, and all rows; over seeds."""
    return sum(row[name] for row in turns), sum(row["rows"] for row in turns)


def turns_text(turns: Sequence[Row]) -> str:
    """How sampled chats go on, and a few to read."""
    length = turns[0]["settings"]["length"]
    lines = [[words, share_text(*counts(turns, name))] for name, words in COUNTED.items()]
    shares = table([f"of rows of {length} tokens", "share, 95% interval"], lines)
    tokens = sorted(number for row in turns for number in row["user_turn_tokens"])
    middle = f"Median length of an ended user turn: {tokens[len(tokens) // 2]} tokens.\n\n" if tokens else ""
    examples = "\n\n".join("\n".join(f"> {line}" for line in quoted(text)) for text in turns[0]["examples"])
    return f"{shares}\n\n{middle}The first rows, from the opening of the user's turn on, cut:\n\n{examples}"


def quoted(text: str) -> list[str]:
    """Lines that Markdown shows as they are."""
    return [f"`{line.replace('`', chr(39))}`<br>" for line in text.split("\n") if line.strip()]


def turns_verdict(turns: Sequence[Row]) -> str:
    """Whether the model ends a user's turn by itself."""
    found = counts(turns, "user_turns_ended")
    _, low, high = share_interval(*found)
    word = "yes, mostly" if low > MOST else "hardly ever" if high < HARDLY else "partly"
    return (
        f"Does the model end a user's turn by itself? {word[0].upper()}{word[1:]}: {share_text(*found)} (the paper's "
        f"Llama-3.2-1B-Instruct: never)."
    )


def use(arms: dict[str, list[Row]], one: str, other: str) -> str:
    """Whether an arm forgets less than another on real chats, and what else differs."""
    found = versus(arms[one], arms[other], JUDGED)
    less, more = ([name for name in JUDGED if found[name].sign == way and name != KEY] for way in (-1, 1))
    sign, words = judged(arms[one], arms[other], KEY)
    word = {-1: "yes", 0: "cannot tell", 1: "no, worse"}[sign]
    others = [f"{way} of {', '.join(names)}" for way, names in (("less", less), ("more", more)) if names]
    return f"{word} ({words}{''.join(f'; {one}' for one in others)})."


def arms_verdict(rows: Sequence[Row]) -> str:
    """Whether such chats are of use as replay: alone, and beside documents."""
    arms = compared(rows)
    if not {PLAIN, DOCUMENTS, CHATS, MIX} <= set(arms):
        return "As replay: no verdict yet; the runs are not finished."
    return (
        f"As replay, by ref_kl on real chats. Alone, better than no replay? {use(arms, CHATS, PLAIN)} Better than "
        f"documents? {use(arms, CHATS, DOCUMENTS)} Half of each, better than documents alone? "
        f"{use(arms, MIX, DOCUMENTS)} {footnote(arms)}"
    )


def report(turns: Sequence[Row], rows: Sequence[Row]) -> str:
    """Everything between the marks of the README."""
    parts = [turns_text(turns), f"**{turns_verdict(turns)}**"] if turns else []
    arms = compared(rows)
    pairs = [(arm, other) for other in (PLAIN, DOCUMENTS) for arm in arms if arm not in (PLAIN, DOCUMENTS)]
    parts += [table_of_arms(rows, JUDGED), differences(arms, pairs, JUDGED)] if rows else []
    parts.append(f"**Verdict. {arms_verdict(rows)}**")
    said: dict[str, tuple[str, str]] = {}
    if turns:
        ended = counts(turns, "user_turns_ended")
        _, low, high = share_interval(*ended)
        never = "reproduced" if high < HARDLY else "not for this model" if low > MOST else "cannot tell"
        said["A model never ends the user's turn that it writes"] = (never, share_text(*ended))
    if {PLAIN, DOCUMENTS, CHATS} <= set(arms):
        found = {other: judged(arms[CHATS], arms[other], KEY) for other in (PLAIN, DOCUMENTS)}
        use_of = {-1: "of use", 0: "cannot tell whether of use", 1: "worse than nothing"}[found[PLAIN][0]]
        better = {-1: "better than documents", 0: "not told apart from documents", 1: "worse than documents"}
        numbers = "; ".join(f"{words}, against {other}" for other, (_, words) in found.items())
        said["Self-generated chats as replay (A: open)"] = (f"{use_of}, {better[found[DOCUMENTS][0]]}", numbers)
    return "\n\n".join([*parts, findings(said)]).rstrip()


def draw(turns: Sequence[Row], rows: Sequence[Row], path: Path) -> None:
    """How rows go on; divergence from the base on each text, arm by arm."""
    arms = compared(rows)
    with panels(path, 2, (11.5, 3.6)) as axes:
        if turns:
            for at, name in enumerate(COUNTED):
                value, low, high = (100 * x for x in share_interval(*counts(turns, name)))
                style = look(1, 2)
                axes[0].plot([low, high], [at, at], color=style["color"], linewidth=2.2)
                axes[0].plot([value], [at], linestyle="none", markersize=6, **style)
        axes[0].set_yticks(range(len(COUNTED)), ["user turn ended", "answer opened", "answer ended"])
        axes[0].set_ylim(len(COUNTED) - 0.5, -0.5)
        axes[0].set_xlim(0, 101)
        dress(axes[0], "How chats go on that the model writes itself", "% of rows, 95% interval", "")
        names = [name for name in MEASURES if name.startswith("ref_kl")]
        for at, (arm, runs) in enumerate(arms.items()):
            found = [value_of(runs, MEASURES[name]) for name in names]
            style, shift = look(at, len(arms)), (at - (len(arms) - 1) / 2) * 0.14
            for place, (value, low, high) in enumerate(found):
                axes[1].plot([place + shift] * 2, [low, high], color=style["color"], linewidth=1.6)
                label = {"label": arm} if not place else {}
                axes[1].plot([place + shift], [value], linestyle="none", markersize=5, **style, **label)
        axes[1].set_xticks(range(len(names)), [name.removeprefix("ref_kl on ") for name in names])
        axes[1].set_ylim(bottom=0)
        dress(axes[1], "Divergence from the base at the same Verilog loss", "", "ref_kl, nats per token")
        if arms:
            handles, labels = axes[1].get_legend_handles_labels()
            axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), fontsize=8)
