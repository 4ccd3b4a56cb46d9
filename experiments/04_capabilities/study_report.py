"""The study's table, verdict, figure and example page from its reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matched import share
from pages import dress, panels, write_results

from retain.files import append_jsonl, read_jsonl
from retain.plots import look
from retain.report import write_comparison
from retain.statistics import share_interval

# (what is counted, how many of them there were, label): pooled over seeds.
LOST = "refusals lost, of those that the taught model gave"
SCORERS = ("phrases", "openings")


def write_study(folder: Path, reports: dict[tuple[int, str], dict[str, Any]], arms: list[str]) -> str:
    """results.jsonl, for the first seed the example page, and what `tell` makes; returns what was told."""
    seeds = sorted({seed for seed, _ in reports})
    rows = {arm: [facts(reports[seed, arm]) for seed in seeds] for arm in arms}
    (folder / "results.jsonl").unlink(missing_ok=True)
    for arm in arms:
        for seed, row in zip(seeds, rows[arm], strict=True):
            versions = reports[seed, arm]["versions"]
            append_jsonl(folder / "results.jsonl", {"arm": arm, "seed": seed, **row, "versions": versions})
    first = [reports[seeds[0], arm] for arm in next(iter(by_task(rows).values()))]
    page = folder.parents[1] / ".cache" / "experiments" / "capabilities" / "page"
    write_comparison(page, first, title="SmolLM2-135M-Instruct, taught to refuse, then finetuned on Verilog")
    return tell(folder)


def tell(folder: Path) -> str:
    """Table, verdict and figure from results.jsonl alone."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / "results.jsonl"):
        rows.setdefault(row["arm"], []).append(row)
    told = "\n\n".join(
        f"### New task: {task}\n\n{table(of_task)}\n\n**Verdict.** {verdict(of_task)}"
        for task, of_task in by_task(rows).items()
    )
    write_results(folder / "README.md", told)
    draw(rows, folder / "figure.png")
    return told


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
        "refusals": {name: harmful["scorers"][name]["counts"] for name in SCORERS},
        "over_refusals": {name: harmless["scorers"][name]["counts"] for name in SCORERS},
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


def added(rows: Sequence[dict[str, Any]], *keys: str) -> int:
    """A count, added up over seeds."""
    total = 0
    for row in rows:
        value: Any = row
        for key in keys:
            value = value[key]
        total += int(value)
    return total


def lost_refusals(rows: Sequence[dict[str, Any]], scorer: str) -> tuple[int, int]:
    """Refusals lost, and how many there were to lose."""
    lost, kept = (added(rows, "refusals", scorer, fate) for fate in ("lost", "kept"))
    return lost, lost + kept


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Arms across, measures down."""
    lines: list[tuple[str, list[str]]] = [
        ("new-task loss, nats per token", [_each(of, "new_task_loss") for of in rows.values()]),
    ]
    for text in next(iter(rows.values()))[0]["ref_kl"]:
        lines.append((f"ref_kl, {text}", [_each([row["ref_kl"] for row in of], text) for of in rows.values()]))
    for scorer in SCORERS:
        lines.append((f"{LOST} ({scorer})", [share(*lost_refusals(of, scorer)) for of in rows.values()]))
    lines.append(("harmless requests refused afterwards (phrases)", [_over(of) for of in rows.values()]))
    lines.append(("same answers to Social IQa (acc_norm)", [
        share(added(of, "same_answers"), added(of, "num_questions")) for of in rows.values()]))  # fmt: skip
    lines.append(("accuracy on Social IQa, before → after", [_accuracy(of) for of in rows.values()]))
    lines.append(("facts still known, of those known before", [share(*known(of)) for of in rows.values()]))
    lines.append(("words of an answer shared with the base's (F1)", [
        _each([row["drift"] for row in of], "words", ".2f") for of in rows.values()]))  # fmt: skip
    lines.append(("length of an answer, tokens, before → after", [_lengths(of) for of in rows.values()]))
    head = f"| | {' | '.join(rows)} |\n| --- |{' --- |' * len(rows)}"
    return "\n".join([head, *(f"| {label} | {' | '.join(cells)} |" for label, cells in lines)])


def _each(rows: Sequence[dict[str, Any]], key: str, form: str = ".3f") -> str:
    return ", ".join(format(row[key], form) for row in rows)


def _over(rows: Sequence[dict[str, Any]]) -> str:
    refused = sum(added(rows, "over_refusals", "phrases", fate) for fate in ("kept", "gained"))
    return share(refused, added(rows, "num_harmless"))


def _accuracy(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['base_accuracy']:.1%} → {row['accuracy']:.1%}" for row in rows)


def _lengths(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['drift']['base_length']:.0f} → {row['drift']['length']:.0f}" for row in rows)


def known(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Facts still said, and facts that were known before."""
    kept, forgotten = (added(rows, "knowledge", fate) for fate in ("kept", "forgotten"))
    return kept, kept + forgotten


def verdict(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Did plain finetuning lose refusals, and did an arm with replay lose fewer: by intervals that do not touch."""
    plain, *others = rows
    told = []
    lost = {arm: lost_refusals(of, "phrases") for arm, of in rows.items()}
    _, low, high = share_interval(*lost[plain]) if lost[plain][1] else (0.0, 0.0, 1.0)
    told.append(f"Plain finetuning lost {share(*lost[plain])} of the refusals, though no row spoke of them.")
    for arm in others:
        _, arm_low, arm_high = share_interval(*lost[arm]) if lost[arm][1] else (0.0, 0.0, 1.0)
        word = "fewer than" if arm_high < low else "more than" if arm_low > high else "not clearly fewer or more than"
        told.append(f"{arm}: {share(*lost[arm])}, {word} plain.")
    same = {arm: (added(of, "same_answers"), added(of, "num_questions")) for arm, of in rows.items()}
    listed = "; ".join(f"{arm} {share(*of)}" for arm, of in same.items())
    told.append(f"Answers to Social IQa that stayed the base's: {listed}; plain's accuracy {_accuracy(rows[plain])}.")
    return " ".join(told)


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three panels: divergence on texts, refusals lost, answers changed; a dot an arm, with its interval."""
    counted = {
        "refusals lost (phrases)": lambda of: lost_refusals(of, "phrases"),
        "answers to questions changed": lambda of: (
            added(of, "num_questions") - added(of, "same_answers"), added(of, "num_questions")),
    }  # fmt: skip
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
                value, low, high = share_interval(*count(of))
                axis.plot([low, high], [at, at], color=style["color"], linewidth=2.4)
                axis.plot([value], [at], linestyle="none", markersize=7, **style)
        dress(axes[0], "Divergence from the base, each seed", "", "ref_kl, nats per token")
        axes[0].set_xticks(range(len(texts)), texts)
        axes[0].set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
        for axis, title in zip(axes[1:], counted, strict=True):
            dress(axis, title.capitalize(), "share, 95% interval", "")
            axis.set_yticks(range(len(rows)), list(rows) if axis is axes[1] else [""] * len(rows))
            axis.set_ylim(len(rows) - 0.5, -0.5)
            most = max(share_interval(*counted[title](of))[2] for of in rows.values())
            axis.set_xlim(-0.03 * most, 1.08 * most)
