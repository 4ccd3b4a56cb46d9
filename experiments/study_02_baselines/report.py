"""StudyResults of the study in, table, verdict and figure out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.claim import Interval, over_seeds, ratio_over_seeds
from experiments.matched_loss import MEASURES, Seeds, by_settings, read_at, target_loss
from experiments.pages import NoReport, dress, findings, goal_line, panels, table
from retain.report.results import series
from retain.report.style import PALETTE

GAIN = 0.75  # of plain finetuning's: as much as LoRA learns in as many steps
KNOBS = {
    "learning_rate": "lr", "anchor_coef": "anchor", "coef": "coef", "replay_start": "from", "share": "share",
    "lora_rank": "rank", "strength": "strength",
}  # fmt: skip
RIVAL = "kl"
# Marek et al., 205M parameters, mathematics after 30B tokens of pretraining: forgetting, nats per token.
PAPER = {"LoRA": 0.140, "plain": 0.113, "ntp": 0.0057, "ntp real": 0.0047, "kl": 0.0028, "kl real": 0.0028}
# What the paper has below what, at the same new-task loss; `Spanish` is off-policy: the base never saw it.
NEARLY = "Replay that the model wrote nearly eliminates forgetting"
LORA = "LoRA forgets more than full finetuning for as much learned"
CLAIMS = {
    "KL keeps more than NTP, on self-generated replay": ("kl", "ntp"),
    "KL keeps more than NTP, on real replay": ("kl real", "ntp real"),
    "KL keeps much more than NTP on text that the model was not trained on": ("kl Spanish", "ntp Spanish"),
    "NTP on such text is worse than no replay": ("plain", "ntp Spanish"),
    LORA: ("plain", "LoRA"),
}
# What forgets less than what, at the same new-task loss: each at plain's rate, and each at its best.
TRAINED = "At plain's rate {} forgets less with trained embeddings"
BESIDE_PLAIN = "At plain's rate {} with trained embeddings forgets less than plain finetuning"
WHY = "Frozen embeddings are why {} forgets more than plain finetuning"
FROZEN = "At plain's rate {} forgets less than full finetuning with frozen embeddings"
AT_PLAINS_RATE = {
    TRAINED.format("full finetuning"): ("plain", "plain, embeddings frozen"),
    **{TRAINED.format(one): (f"{one}, embeddings trained", one) for one in ("OSF", "LoRA")},
    **{BESIDE_PLAIN.format(one): (f"{one}, embeddings trained", "plain") for one in ("OSF", "LoRA")},
    **{FROZEN.format(one): (one, "plain, embeddings frozen") for one in ("OSF", "LoRA")},
    "At plain's rate EAFT forgets less than plain finetuning": ("EAFT", "plain"),
    "At plain's rate STM forgets less than plain finetuning": ("STM", "plain"),
}
AT_BEST = {
    "EWC with the true Fisher information forgets less than L2-SP": ("EWC", "L2-SP"),
    "The anchor without replay forgets less than EWC": ("anchor", "EWC"),
    "The anchor without replay forgets less than plain finetuning at its best rate": ("anchor", "plain"),
    "The anchor with KL forgets less than KL alone": ("anchor+kl", "kl"),
}
KINDS = {  # of methods, a colour each
    "nothing but the rate": ("plain",),
    "replay": ("kl", "ntp", "replace", "kl_new"),
    "anchor": ("anchor", "anchor+kl"),
    "penalty on weights, interpolation": ("L2-SP", "EWC", "interpolation"),
    "adapters": ("LoRA", "OSF", "CorDA"),
    "gates on tokens": ("EAFT", "STM"),
}
LEARNING = "new-task loss, nats per token (learning goes right →)"
ALIKE = (("kl", "kl real"), ("ntp", "ntp real"))


@dataclass(frozen=True)
class Entry(Seeds):
    """One setting of one method."""

    method: str
    rows: dict[int, dict[str, Any]]

    @property
    def name(self) -> str:
        known = [(word, self.settings.get(key)) for key, word in KNOBS.items()]
        knobs = [f"{word} {float(f'{value:.2g}'):g}" for word, value in known if value]
        return f"{self.method}, {', '.join(knobs)}"


def entries_of(rows: Sequence[dict[str, Any]]) -> tuple[list[Entry], float]:
    """Entries in the order of the results, the plain run of the study first, and the target loss."""
    groups = by_settings(rows)
    target = target_loss(list(next(of for settings, of in groups if settings["name"] == "plain").values()), GAIN)
    found = []
    for settings, by_seed in groups:
        method = settings.pop("name")
        readings = {seed: read_at(row, target) for seed, row in by_seed.items()}
        for seed, row in by_seed.items():
            last = row["trajectory"][-1]["step"]
            if readings[seed] is None and settings["method"] != "interpolation" and last < settings["max_steps"]:
                raise NoReport(
                    f"{method}, seed {seed}: it ended at step {last}, above a new-task loss of {target:.4f}: the rows "
                    "that set this target have changed since; delete its row and run the study again"
                )
        found.append(Entry(settings, readings, method, by_seed))
    return found, target


def text_of(entries: Sequence[Entry], target: float) -> str:
    """All that is said of a base."""
    head = f"Target: a new-task loss of {target:.3f} nats per token."
    table, said = table_of_entries(entries), f"**Verdict.** {verdict(entries)}"
    return "\n\n".join([head, table, said, claims(entries), beside_paper(entries)])


def best_of(entries: Sequence[Entry], text: str = "prose", metric: str = "ref_kl") -> dict[str, Entry]:
    """Each method's setting with the least divergence, of those that reached the target; methods in order of it."""
    found: dict[str, Entry] = {}
    for entry in sorted((e for e in entries if e.reached), key=lambda e: e.mean(text, metric).value):
        found.setdefault(entry.method, entry)
    return found


def chosen(entries: Sequence[Entry]) -> list[Entry]:
    """What gets other seeds: every rate of plain's, and each method's best setting, at any rate and at plain's.

    Of a method that never reached the target it is the one that learned most.
    """
    found = best_of(entries)
    for entry in sorted(entries, key=lowest):
        found.setdefault(entry.method, entry)
    plain = [entry for entry in entries if entry.method == "plain"]
    return [*plain, *found.values(), *best_of(at_plains_rate(entries)).values()]


def at_plains_rate(entries: Sequence[Entry]) -> list[Entry]:
    """Those with the learning rate of the study's plain run."""
    return [e for e in entries if e.settings["learning_rate"] == entries[0].settings["learning_rate"]]


def several(entries: Sequence[Entry]) -> list[Entry]:
    """Settings with several seeds, of which claims are made."""
    return [entry for entry in entries if len(entry.rows) > 1]


def lowest(entry: Entry) -> float:
    """Best new-task loss, mean over seeds."""
    return float(np.mean([min(series(row["trajectory"], "eval_loss")[1]) for row in entry.rows.values()]))


def verdict(entries: Sequence[Entry]) -> str:
    """Is self-generated replay with KL below every other method's best setting? Paired by seed, for each measure."""
    parts = []
    for text, metric in MEASURES:
        best = best_of(several(entries), text, metric)
        if RIVAL not in best:
            return f"No verdict: {RIVAL} never reached the target loss."
        own = best.pop(RIVAL)
        found = {name: own.against(entry, text, metric) for name, entry in best.items()}
        groups = {
            "less than": [f"{name} ({e.value:.0%} less)" for name, e in found.items() if e.sign > 0],
            "more than": [f"{name} ({-e.value:.0%} more)" for name, e in found.items() if e.sign < 0],
            "not clearly different from": [name for name, e in found.items() if not e.sign],
        }
        words = "; ".join(f"{how} {', '.join(names)}" for how, names in groups.items() if names)
        parts.append(f"{metric} on {text}, {own.mean(text, metric)} nats per token: {words}")
    never = sorted({e.method for e in entries} - set(best_of(entries)))
    after = f" Never reached the target loss: {', '.join(never)}." if never else ""
    return f"At the same new-task loss `{RIVAL}` has, at each method's best setting, " + ". ".join(parts) + "." + after


def claims(entries: Sequence[Entry]) -> str:
    """The paper's findings one by one, on forgetting of prose at each method's best setting, paired by seed."""
    best = best_of(several(entries), "prose", "forgetting")
    said: dict[str, tuple[str, str]] = {}
    if {"kl", "plain"} <= set(best):
        said[NEARLY] = nearly(entries, best)
    for claim, (one, other) in CLAIMS.items():
        if not {one, other} <= set(best):
            continue
        found = best[one].against(best[other], "prose", "forgetting")
        answer = {1: "reproduced", 0: "cannot tell", -1: "not reproduced"}[found.sign]
        if claim == LORA and answer == "reproduced" and all(at_lowest_rate(entries, best[x]) for x in (one, other)):
            answer += ", each at the lowest rate tried"
        said[claim] = (answer, f"{one} {found.percent()} less than {other}")
    for one, other in ALIKE:
        if one in best and other in best:
            e = best[one].against(best[other], "prose", "forgetting")
            apart = {1: "self-generated forgets less", 0: "not told apart", -1: "real forgets less"}[e.sign]
            words = f'{e.percent()} less than real; no margin for "as good" was fixed beforehand'
            said[f"Self-generated replay is as good as real ({one.upper()})"] = (apart, words)
    same_rate = best_of(at_plains_rate(several(entries)), "prose", "forgetting")
    said |= comparisons(best, AT_BEST) | comparisons(same_rate, AT_PLAINS_RATE)
    said |= explanations(said, same_rate)
    return f"{findings(said)}\n\n{looked_at_after(best, same_rate, len(said))}"


def comparisons(best: dict[str, Entry], pairs: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Whether one method forgets less than another, and how much, for each claim of which both are there."""
    said = {}
    for claim, (one, other) in pairs.items():
        if {one, other} <= set(best):
            found = best[one].against(best[other], "prose", "forgetting")
            answer = {1: "yes", 0: "cannot tell", -1: "no"}[found.sign]
            said[claim] = (answer, f"{best[one].name} {found.percent()} less than {best[other].name}")
    return said


def explanations(said: dict[str, tuple[str, str]], same_rate: dict[str, Entry]) -> dict[str, tuple[str, str]]:
    """Whether frozen embeddings are why OSF and LoRA forget more than plain finetuning, by the rule of `run.py`.

    The rule takes for granted that they do, at plain's rate; where no interval shows it, the answer says so.
    """
    found = {}
    for method in ("OSF", "LoRA"):
        both = [said.get(claim.format(method)) for claim in (TRAINED, BESIDE_PLAIN)]
        if all(both):
            (helps, more), (beside_plain, numbers) = both
            answer = helps if helps != "yes" else {"no": "in part"}.get(beside_plain, "yes")
            if answer == "yes" and times(same_rate[method], same_rate["plain"]).low <= 1:
                answer += ", though at that rate it is not shown to forget more"
            found[WHY.format(method)] = (answer, f"{more}; {numbers}")
    return found


def seed_pairs(one: Entry, other: Entry) -> list[tuple[float, float]]:
    """Forgetting of prose with every seed that both have."""
    both = [(one.readings[seed], other.readings[seed]) for seed in one.readings.keys() & other.readings.keys()]
    return [(mine.value("prose", "forgetting"), its.value("prose", "forgetting")) for mine, its in both if mine and its]


def times(one: Entry, other: Entry) -> Interval:
    """How many times as much one forgets, of logarithms: the same whichever is divided by the other."""
    return ratio_over_seeds([mine / its for mine, its in seed_pairs(one, other)])


def looked_at_after(best: dict[str, Entry], same_rate: dict[str, Entry], number: int) -> str:
    """What no rule asks: what a correction for all findings leaves, and what the question of embeddings assumes."""
    pairs = [(claim, best, pair) for claim, pair in (CLAIMS | AT_BEST).items()]
    pairs += [(claim, same_rate, pair) for claim, pair in AT_PLAINS_RATE.items()]
    lost = []
    for claim, entries, (one, other) in pairs:
        if {one, other} <= set(entries):
            shares = [1 - mine / its for mine, its in seed_pairs(entries[one], entries[other])]
            if over_seeds(shares).sign and not over_seeds(shares, 1 - 0.05 / number).sign:
                lost.append(f'"{claim}"')
    parts = [
        "Looked at after the runs, no part of the rule. Corrected for all findings of this base "
        f"at once (Student's t over seeds), {' and '.join(lost) or 'none'} would no longer be told apart."
    ]
    compared = [(f"{one} at that rate", same_rate, one, "plain finetuning") for one in ("OSF", "LoRA")]
    compared += [
        (f"{one} with trained embeddings", best, f"{one}, embeddings trained", "plain finetuning at its best rate")
        for one in ("OSF", "LoRA")
    ]
    if all({method, "plain"} <= set(entries) for _, entries, method, _ in compared):
        told = [
            f"{name} {times(entries[method], entries['plain']).text('.2f')} times that of {what}"
            for name, entries, method, what in compared
        ]
        parts.append(f"At plain's rate, and then each at its best, forgetting of prose is: {'; '.join(told)}.")
    return " ".join(parts)


def nearly(entries: Sequence[Entry], best: dict[str, Entry]) -> tuple[str, str]:
    """Whether replay leaves as little as in the paper: the direction, and what is left of plain at its own and best."""
    own, paper = best["kl"].mean("prose", "forgetting").value, PAPER["kl"] / PAPER["plain"]
    left = [own / plain.mean("prose", "forgetting").value for plain in (entries[0], best["plain"])]
    less = best["kl"].against(best["plain"], "prose", "forgetting")
    size = "size not" if min(left) > 2 * paper else "size as well"
    answer = {1: f"direction reproduced, {size}", 0: "cannot tell", -1: "not reproduced"}[less.sign]
    return answer, f"{min(left):.0%} to {max(left):.0%} is left of plain's, by its rate; in the paper {paper:.1%}"


def at_lowest_rate(entries: Sequence[Entry], chosen: Entry) -> bool:
    """Whether a method is best at the lowest learning rate that it was run with, or the only one: a lower one may be
    better still."""
    rates = [entry.settings["learning_rate"] for entry in entries if entry.method == chosen.method]
    return bool(chosen.settings["learning_rate"] == min(rates))


def beside_paper(entries: Sequence[Entry]) -> str:
    """The paper's forgetting and ours, each also as a share of what plain finetuning forgets."""
    best, plain, lines = best_of(several(entries), "prose", "forgetting"), entries[0], []
    for name, value in PAPER.items():
        if name in best:
            ours = (plain if name == "plain" else best[name]).mean("prose", "forgetting")
            share = ours.value / plain.mean("prose", "forgetting").value
            lines.append([name, f"{value:.4f}", f"{value / PAPER['plain']:.1%}", ours, f"{share:.1%}"])
    head = ("method", "paper: forgetting", "of plain's", "here: forgetting on prose", "of plain's")
    return table(head, lines, "---")


COLUMNS = (
    "run", "seeds", "forgetting on prose", "ref_kl on prose", "ref_kl on own rows", "prevented: forgetting",
    "prevented: ref_kl prose", "steps to target",
)  # fmt: skip


def table_of_entries(entries: Sequence[Entry]) -> str:
    """Least divergence first; prevented is against the study's plain run."""
    order = sorted(entries, key=lambda e: e.mean("prose", "ref_kl").value if e.reached else float("inf"))
    return "\n".join([table(COLUMNS, [], "---"), *(_line(entry, entries[0]) for entry in order)])


def _line(entry: Entry, plain: Entry) -> str:
    cells = [entry.name, str(len(entry.rows))]
    if not entry.reached:
        return f"| {' | '.join(cells)} | target not reached: {lowest(entry):.3f} at best ||||||"
    cells += [str(entry.mean(*measure)) for measure in MEASURES]
    cells += ["–", "–"] if entry is plain else [entry.against(plain, *measure).percent() for measure in MEASURES[:2]]
    cells.append("–" if entry.settings["method"] == "interpolation" else f"{entry.last_step:.0f}")
    return f"| {' | '.join(cells)} |"


def draw(entries: Sequence[Entry], target: float, path: Path) -> None:
    """The way to the same loss and what has been forgotten there: each method's best setting, means over seeds."""
    best = list(best_of(several(entries), "prose", "forgetting").values())
    shown = best if entries[0] in best else [*best, entries[0]]
    ranked = sorted(shown, key=lambda entry: entry.mean("prose", "forgetting").value)
    with panels(path, 2, (13.0, 0.27 * len(ranked) + 1.2)) as (way, end):
        for entry in ranked:
            if _family(entry) == entry.method:  # other sources of replay have their own figure
                way.plot(*trace(entry, "ref_kl"), color=_color(entry), linewidth=1.3, alpha=0.8)
        for kind, color in zip(KINDS, PALETTE, strict=True):
            if color in map(_color, ranked):
                way.plot([], [], color=color, label=kind)
        way.figure.legend(loc="outside lower center", ncols=len(KINDS), fontsize=8.5)
        way.set_xlim(way.get_xlim()[1], target - 0.3)  # learning to the right
        way.set_ylim(bottom=0.003)
        _log(way, "y")
        goal_line(way, x=target, words=" same loss")
        end.set_yticks(range(len(ranked)), [_label(entry) for entry in ranked])
        for at, (entry, label) in enumerate(zip(ranked, end.get_yticklabels(), strict=True)):
            found, color = entry.mean("prose", "forgetting"), _color(entry)
            end.plot([found.low, found.high], [at, at], color=color, linewidth=2.2, alpha=0.6)
            end.plot(found.value, at, color=color, marker="o", markersize=7)
            label.set_color(color)
        end.invert_yaxis()
        _log(end, "x")
        dress(way, "On the way: divergence from the base on prose", LEARNING, "ref_kl, nats per token")
        dress(end, "At the same new-task loss: forgetting of prose", "forgetting, nats per token, 95% interval", "")


def _family(entry: Entry) -> str:
    """The method without the source of its replay, or what it trains."""
    return entry.method.partition(" ")[0].rstrip(",")


def _label(entry: Entry) -> str:
    if entry.method == "plain":
        return entry.name
    return entry.method if "," in entry.method else entry.method.replace(" ", ", ")


def _log(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


SOURCES = {"": ("self-generated", "-"), "real": ("real", "--"), "Spanish": ("Spanish, off-policy", ":")}


def draw_sources(entries: Sequence[Entry], target: float, path: Path) -> None:
    """Forgetting over new-task loss for each objective and source of replay at its best setting, and without replay."""
    best = best_of(entries, "prose", "forgetting")
    with panels(path, 1, (7.0, 4.4)) as (axes,):
        axes.plot(*trace(entries[0], "forgetting"), color=PALETTE[0], label="without replay")
        for at, objective in enumerate(("kl", "ntp")):
            for source, (words, line) in SOURCES.items():
                if entry := best.get(f"{objective} {source}".strip()):
                    x, y = trace(entry, "forgetting")
                    name = f"{objective.upper()}, {words}, coefficient {entry.settings['coef']:g}"
                    axes.plot(x, y, color=PALETTE[1 + at], linestyle=line, label=name)
        axes.set_xlim(axes.get_xlim()[1], target - 0.25)
        _log(axes, "y")
        axes.set_ylim(top=1.8 * axes.get_ylim()[1])
        goal_line(axes, x=target, words=" same loss")
        dress(axes, "Where replay comes from", LEARNING, "forgetting of prose, nats per token")
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)


def _color(entry: Entry) -> str:
    return next(color for color, methods in zip(PALETTE, KINDS.values(), strict=True) if _family(entry) in methods)


def trace(entry: Entry, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """New-task loss and the metric on prose at every evaluation but the first, means over seeds while all run."""
    curves = [
        [series(row["trajectory"], key)[1] for key in ("eval_loss", f"retention/prose/{metric}")]
        for row in entry.rows.values()
    ]
    common = min(len(losses) for losses, _ in curves)
    x, y = np.mean([[values[1:common] for values in curve] for curve in curves], axis=0)
    return x, y
