"""Which of several runs no other beats on both counts: it learned as much and moved no further from the base.

Plain dicts in, plain numbers and sentences out. Judged by the values themselves, without regard to their intervals:
a narrow win may be chance.
"""

from __future__ import annotations

from collections.abc import Sequence

from retain.report.numbers import is_number
from retain.report.sentences import listed

Point = tuple[float, float]


def ends(compared: dict, text: str | None = None) -> list[Point | None]:
    """(new-task loss, ref_kl) at the end of each run, nats per token; on one text, or the mean over all texts.

    `compared` is of `compare_at_matched_loss`. None for a run that was not measured on all of them, or not alike.
    """
    texts = list(compared["end"]) if text is None else [text]
    found: list[Point | None] = []
    for place, run in enumerate(compared["runs"]):
        entries = [compared["end"][name][place] for name in texts]
        moved = [entry["ref_kl"] for entry in entries]
        known = bool(moved) and all(map(is_number, [run["final_loss"], *moved]))
        known = known and not any(entry["unlike"] for entry in (run, *entries))
        found.append((run["final_loss"], sum(moved) / len(moved)) if known else None)
    return found


def dominators(points: Sequence[Point | None]) -> list[list[int]]:
    """For each point the places of those that are no worse on both numbers and better on one."""
    return [
        [
            place
            for place, other in enumerate(points)
            if point and other and other != point and other[0] <= point[0] and other[1] <= point[1]
        ]
        for point in points
    ]


def frontier(points: Sequence[Point | None]) -> list[int]:
    """Places of the points that nobody dominates, the one that learned least first."""
    free = [place for place, beaten in enumerate(dominators(points)) if points[place] and not beaten]
    return sorted(free, key=lambda place: tuple(-number for number in points[place] or ()))


def frontier_sentences(compared: dict) -> list[str]:
    """Who is on the frontier; who is beaten, and by whom among others; then the texts that differ from their mean."""
    points = ends(compared)
    if sum(point is not None for point in points) < 2:
        return []
    names = [f"“{run['name']}”" for run in compared["runs"]]
    best = frontier(points)
    beaten = [
        f"{names[place]} by {names[next(other for other in best if other in others)]}"
        for place, others in enumerate(dominators(points))
        if others
    ]
    mean = " (mean over the texts)" if len(compared["end"]) > 1 else ""
    told = [f"On the frontier of new-task loss against ref_kl{mean}: {listed([names[place] for place in best])}."]
    told += [f"Dominated: {'; '.join(beaten)}."] if beaten else ["No run dominates another."]
    for text in compared["end"] if mean else ():
        alone = frontier(ends(compared, text))
        if set(alone) != set(best):
            told.append(f"On {text} alone the frontier is {listed([names[place] for place in alone])}.")
    return told
