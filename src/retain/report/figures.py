"""Which figures with lines a report has, as plain data: `plots` draws them, `interactive` hands them to plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retain.report.comparison import end_of, series, texts_of, trained_tokens
from retain.report.frontier import Point, ends, frontier

LEARNING = "new-task loss, nats per token (learning →)"


def panels(runs: Sequence[dict], compared: dict | None) -> list[dict[str, Any]]:
    """Each figure: kind, title, words (its description), xlabel, ylabel, lines; only what was measured.

    A line: name, run (its place), x, y, and `steps` where x is not the step. `compared`: of `compare_at_matched_loss`.
    """
    found = [_learning(runs, compared, text) for text in texts_of(runs)]
    return [panel for panel in found if panel] + _curves(runs)


def _learning(runs: Sequence[dict], compared: dict | None, text: str) -> dict[str, Any] | None:
    """Forgetting over new-task loss: a line per trajectory, or the end of every run where one has none.

    Never both: what was evaluated during training and what was measured after it are other losses.
    """
    points = ends(compared, text) if compared else [None] * len(runs)
    paths = [
        _path(run, place, text) if trained_tokens(run) == trained_tokens(runs[0]) else None
        for place, run in enumerate(runs)
    ]
    followed = any(paths) and all(path or not point for path, point in zip(paths, points, strict=True))
    if not followed:
        paths = [
            point and _line(run, place, {None: point})
            for place, (run, point) in enumerate(zip(runs, points, strict=True))
        ]
    lines = [line for line in paths if line]
    if len(lines) < 2 and not followed:
        return None
    last = {line["run"]: (line["x"][-1], line["y"][-1]) for line in lines}
    best = sorted((last[place] for place in frontier(points)), reverse=True)
    return {
        "kind": "frontier", "title": text, "words": f"Learning against divergence from the base on {text}",
        "xlabel": LEARNING, "ylabel": "ref_kl, nats per token", "lines": lines,
        "frontier": best if len(best) > 1 else [],
        "matched_loss": compared["matched_loss"] if compared and followed else None,
    }  # fmt: skip


def _path(run: dict, place: int, text: str) -> dict[str, Any] | None:
    """One run where both the new-task loss and the text were evaluated, up to the model that it left."""
    losses = dict(zip(*series(run, "eval_loss"), strict=True))
    moved = dict(zip(*series(run, f"retention/{text}/ref_kl"), strict=True))
    end = end_of(run)
    points = {step: (losses[step], moved[step]) for step in losses if step in moved and end is not None and step <= end}
    return _line(run, place, points) if len(points) > 1 else None


def _line(run: dict, place: int, points: Mapping[Any, Point]) -> dict[str, Any]:
    x, y = ([point[axis] for point in points.values()] for axis in (0, 1))
    return {"name": run["name"], "run": place, "x": x, "y": y, "steps": list(points)}


def _curves(runs: Sequence[dict]) -> list[dict[str, Any]]:
    counted = dict.fromkeys(trained_tokens(run) for run in runs)  # losses over other tokens have axes of their own
    wanted: list[tuple[str, str, Any]] = [
        ("eval_loss", "New-task loss" + (f" ({tokens or 'tokens not told'})" if len(counted) > 1 else ""), tokens)
        for tokens in counted
    ]
    wanted += [(f"retention/{text}/ref_kl", f"Divergence on {text}", None) for text in texts_of(runs)]
    wanted += [("replay/kl", "Divergence on the replay rows", None), ("replay/coef", "Strength of replay", None)]
    figures = []
    for key, title, tokens in wanted:
        of_key = [key != "eval_loss" or trained_tokens(run) == tokens for run in runs]
        read = [(run["name"], place, *series(run, key)) for place, run in enumerate(runs) if of_key[place]]
        lines = [{"name": name, "run": place, "x": x, "y": y} for name, place, x, y in read if len(x) > 1]
        constant = key == "replay/coef" and all(len(set(line["y"])) == 1 for line in lines)
        if lines and not constant:
            figures.append({
                "kind": "curve", "title": title, "words": f"{title} over steps", "xlabel": "step", "lines": lines,
                "ylabel": "coefficient" if key == "replay/coef" else "nats per token",
                "zero": key != "eval_loss", "marks": not key.startswith("replay/"),
            })  # fmt: skip
    return figures
