"""The study's table, verdict, figure and example page from its reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.claim import Interval, share_text
from experiments.pages import dress, findings, panels
from experiments.program import Report
from retain.files import append_jsonl, read_jsonl
from retain.report.report import ForgettingReport, write_comparison
from retain.report.style import look
from retain.statistics import share_interval

LOST = "refusals lost, of those that the taught model gave"


def write_study(folder: Path, reports: dict[tuple[int, str], dict[str, Any]], arms: list[str]) -> None:
    """results.jsonl and, for the first seed, the example page."""
    seeds = sorted({seed for seed, _ in reports})
    rows = {arm: [facts(reports[seed, arm]) for seed in seeds] for arm in arms}
    (folder / "results.jsonl").unlink(missing_ok=True)
    for arm in arms:
        for seed, row in zip(seeds, rows[arm], strict=True):
            versions = reports[seed, arm]["versions"]
            append_jsonl(folder / "results.jsonl", {"arm": arm, "seed": seed, **row, "versions": versions})
    first = [reports[seeds[0], arm] for arm in next(iter(by_task(rows).values()))]
    page = folder.parents[1] / ".cache" / "experiments" / "capabilities" / "page"
    write_comparison(
        page,
        [ForgettingReport(report) for report in first],
        title="SmolLM2-135M-Instruct, taught to refuse, then finetuned on Verilog",
    )


def report_of(folder: Path) -> Report:
    """Table, verdict and figure from results.jsonl alone."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / "results.jsonl"):
        rows.setdefault(row["arm"], []).append(row)
    parts = [
        f"### New task: {task}\n\n{table_of_arms(of_task)}\n\n**Verdict.** {verdict(of_task)}"
        for task, of_task in by_task(rows).items()
    ]
    parts += [claim(rows)] if set(rows) >= INSTRUCTED and PLAIN in rows else []
    return "\n\n".join(parts), lambda path: draw(rows, path)


PLAIN, INSTRUCTED = "plain", {"plain, instructions", "KL replay, instructions"}


def claim(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The paper's findings: more answers change than accuracy can have, and more than half of the refusals are lost.

    One seed is no verdict: it is said what was seen.
    """
    found = "seen in one seed" if len(rows[PLAIN]) == 1 else "reproduced"
    hidden = all(share_interval(*changed(row))[1] > max(map(abs, accuracy_change(row))) for row in rows[PLAIN])
    gone = all(share_interval(*phrases_lost(row))[1] > 0.5 for row in rows["plain, instructions"])
    points = "; ".join(Interval(*(100 * x for x in accuracy_change(row))).text("+.1f") for row in rows[PLAIN])
    accuracy = f"on Verilog accuracy {_accuracy(rows[PLAIN])}, {points} points at the widest, chance 33%; "
    lost = {arm: each(rows[arm], phrases_lost) for arm in sorted(INSTRUCTED, reverse=True)}
    return findings({
        "Equal accuracy hides forgetting": (
            found if hidden else "cannot tell", f"{accuracy}answers that stay {each(rows[PLAIN], answers)}"
        ),
        "Refusals are lost": (
            found if gone else "cannot tell",
            f"of those taught before: {'; '.join(f'{arm} {words}' for arm, words in lost.items())}",
        ),
    })  # fmt: skip


def accuracy_change(row: dict[str, Any]) -> Interval:
    """Of the share of right answers; the 95% interval is the widest that so many changed answers allow.

    A change between two wrong answers leaves accuracy as it is; how many are such is not in the rows.
    """
    number, total = changed(row)
    net = row["accuracy"] - row["base_accuracy"]
    half = 1.96 * math.sqrt(max(number / total - net**2, 0) / total)
    return Interval(net, net - half, net + half)


def by_task(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The arms of each new task, the plain one first."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm, of_arm in rows.items():
        found.setdefault(of_arm[0]["new_task"], {})[arm] = of_arm
    return found


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """What the study compares of one run; counts, so that seeds can be added up."""
    harmful, harmless = (next(one for one in report["refusals"].values() if one["kind"] == kind)
                         for kind in ("harmful", "harmless"))  # fmt: skip
    (choices,) = report["choices"].values()
    compared = choices["rules"]["acc_norm"]
    return {
        "new_task": next(iter(report["new_task"])),
        "new_task_loss": next(iter(report["new_task"].values()))["loss"]["value"],
        "ref_kl": {text: one["ref_kl"]["value"] for text, one in report["retention"].items()},
        "forgetting": {text: one["forgetting"]["value"] for text, one in report["retention"].items()},
        "refusals": {name: of["counts"] for name, of in harmful["scorers"].items()},
        "over_refusals": {name: of["counts"] for name, of in harmless["scorers"].items()},
        "num_prompts": harmful["num_prompts"],
        "num_harmless": harmless["num_prompts"],
        "same_answers": round(compared["agreement"]["value"] * choices["num_questions"]),
        "num_questions": choices["num_questions"],
        "accuracy": compared["accuracy"]["value"],
        "base_accuracy": compared["base_accuracy"]["value"],
        "knowledge": report["knowledge"]["counts"],
        "drift": {
            name: report["drift"]["greedy"][name]["value"] for name in ("words", "length", "base_length", "ended")
        },
    }


Count = Callable[[dict[str, Any]], tuple[int, int]]  # of one run: how many, of how many


def each(rows: Sequence[dict[str, Any]], count: Count) -> str:
    """A count with its interval, a seed at a time: requests of two seeds are no independent draws."""
    return "; ".join(share_text(*count(row)) for row in rows)


def lost_refusals(row: dict[str, Any], scorer: str) -> tuple[int, int]:
    """Refusals lost, and how many there were to lose."""
    lost, kept = (row["refusals"][scorer][fate] for fate in ("lost", "kept"))
    return lost, lost + kept


def phrases_lost(row: dict[str, Any]) -> tuple[int, int]:
    return lost_refusals(row, "phrases")


def answers(row: dict[str, Any]) -> tuple[int, int]:
    """Questions that are answered as before, and all."""
    return row["same_answers"], row["num_questions"]


def table_of_arms(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Arms across, measures down."""
    lines: list[tuple[str, list[str]]] = [
        ("new-task loss, nats per token", [_each(of, "new_task_loss") for of in rows.values()]),
    ]
    for text in next(iter(rows.values()))[0]["ref_kl"]:
        lines.append((f"ref_kl, {text}", [_each([row["ref_kl"] for row in of], text) for of in rows.values()]))
    for scorer in next(iter(rows.values()))[0]["refusals"]:
        lines.append((f"{LOST} ({scorer})", [each(of, partial(lost_refusals, scorer=scorer)) for of in rows.values()]))
    lines.append(("harmless requests refused afterwards (phrases)", [each(of, _over) for of in rows.values()]))
    lines.append(("same answers to Social IQa (acc_norm)", [each(of, answers) for of in rows.values()]))
    lines.append(("accuracy on Social IQa, before → after", [_accuracy(of) for of in rows.values()]))
    lines.append(("facts still known, of those known before", [each(of, known) for of in rows.values()]))
    lines.append(("words of an answer shared with the base's (F1)", [
        _each([row["drift"] for row in of], "words", ".2f") for of in rows.values()]))  # fmt: skip
    lines.append(("length of an answer, tokens, before → after", [_lengths(of) for of in rows.values()]))
    head = f"| | {' | '.join(rows)} |\n| --- |{' --- |' * len(rows)}"
    return "\n".join([head, *(f"| {label} | {' | '.join(cells)} |" for label, cells in lines)])


def _each(rows: Sequence[dict[str, Any]], key: str, form: str = ".3f") -> str:
    return ", ".join(format(row[key], form) for row in rows)


def _over(row: dict[str, Any]) -> tuple[int, int]:
    return sum(row["over_refusals"]["phrases"][fate] for fate in ("kept", "gained")), row["num_harmless"]


def _accuracy(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['base_accuracy']:.1%} → {row['accuracy']:.1%}" for row in rows)


def _lengths(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['drift']['base_length']:.0f} → {row['drift']['length']:.0f}" for row in rows)


def changed(row: dict[str, Any]) -> tuple[int, int]:
    same, every = answers(row)
    return every - same, every


def known(row: dict[str, Any]) -> tuple[int, int]:
    """Facts still said, and facts that were known before."""
    kept, forgotten = (row["knowledge"][fate] for fate in ("kept", "forgotten"))
    return kept, kept + forgotten


def apart(row: dict[str, Any], plain: dict[str, Any]) -> int:
    """Of one seed: -1 where fewer refusals are lost than by plain finetuning, 1 where more, by intervals; else 0."""
    (_, low, high), (_, least, most) = (
        share_interval(*found) if (found := phrases_lost(one))[1] else (0.0, 0.0, 1.0) for one in (row, plain)
    )
    return -1 if high < least else 1 if low > most else 0


def verdict(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Did plain finetuning lose refusals, and did an arm with replay lose fewer in every seed: by intervals apart."""
    plain, *others = rows
    parts = [f"Plain finetuning lost {each(rows[plain], phrases_lost)} of the refusals, though no row spoke of them."]
    for arm in others:
        signs = {apart(row, bare) for row, bare in zip(rows[arm], rows[plain], strict=True)}
        sign = signs.pop() if len(signs) == 1 else 0
        word = {-1: "fewer than", 0: "not clearly fewer or more than", 1: "more than"}[sign]
        parts.append(f"{arm}: {each(rows[arm], phrases_lost)}, {word} plain.")
    listed = "; ".join(f"{arm} {each(of, answers)}" for arm, of in rows.items())
    parts.append(f"Answers to Social IQa that stayed the base's: {listed}; plain's accuracy {_accuracy(rows[plain])}.")
    return " ".join(parts)


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three panels: divergence on texts, refusals lost, answers changed; a dot an arm, with its interval."""
    counted: dict[str, Count] = {"refusals lost (phrases)": phrases_lost, "answers to questions changed": changed}
    with panels(path, 3, (11.5, 3.2)) as axes:
        for at, (arm, of) in enumerate(rows.items()):
            style = look(at, len(rows))
            texts = list(of[0]["ref_kl"])
            for place, text in enumerate(texts):
                values = [row["ref_kl"][text] for row in of]
                spread = place + (at - (len(rows) - 1) / 2) * 0.14
                axes[0].plot(
                    [spread] * len(values), values, linestyle="none", label=arm if not place else None, **style
                )
            for axis, count in zip(axes[1:], counted.values(), strict=True):
                for place, row in enumerate(of):
                    value, low, high = share_interval(*count(row))
                    height = at + (place - (len(of) - 1) / 2) * 0.2
                    axis.plot([low, high], [height, height], color=style["color"], linewidth=2.4)
                    axis.plot([value], [height], linestyle="none", markersize=7, **style)
        dress(axes[0], "Divergence from the base, each seed", "", "ref_kl, nats per token")
        axes[0].set_xticks(range(len(texts)), texts)
        axes[0].set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
        for axis, title in zip(axes[1:], counted, strict=True):
            dress(axis, title.capitalize(), "share, 95% interval", "")
            axis.set_yticks(range(len(rows)), list(rows) if axis is axes[1] else [""] * len(rows))
            axis.set_ylim(len(rows) - 0.5, -0.5)
            most = max(share_interval(*counted[title](row))[2] for of in rows.values() for row in of)
            axis.set_xlim(-0.03 * most, 1.08 * most)
