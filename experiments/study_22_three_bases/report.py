"""What each base forgets at its target with the best replay, and whether that goes by tokens per parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.claim import Claim, over_seeds, yes_or_no
from experiments.matched_loss import read_at, target_loss
from experiments.pages import NoReport, dots, findings, panels, table
from experiments.program import Report

SEEDS, COEFS, SHARE = (0, 1, 2), (0.0, 1.0, 4.0), 0.8
# By rising tokens per parameter.
BASES = {"small": "decoder, 20", "smollm2": "SmolLM2-135M, 15,000", "gemma": "gemma-3-270m, 22,000"}
TASKS = {"verilog": "Verilog", "basque": "Basque"}
MEASURES = {
    ("prose", "forgetting"): "forgetting of prose",
    ("self-generated", "ref_kl"): "ref_kl on own documents",
}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A base on a task: bits per byte of each measure at the target, by coefficient and seed."""

    base: Row
    learned: float  # nats per token that the target lies below the start
    lost: dict[tuple[str, str], dict[float, list[float]]]

    def best(self, measure: tuple[str, str]) -> float | None:
        """The coefficient above 0 with the least of a measure; None where no one learned enough."""
        means = {coef: sum(values) / len(values) for coef, values in self.lost[measure].items() if coef}
        return min(means, key=means.__getitem__, default=None)


def cell_of(base: Row, runs: Mapping[float, Mapping[int, Row]]) -> Cell:
    """Of a base with all its runs: coefficient → seed → row."""
    plain = list(runs[0.0].values())
    target = target_loss(plain, SHARE)
    lost: dict[tuple[str, str], dict[float, list[float]]] = {measure: {} for measure in MEASURES}
    for coef, rows in runs.items():
        readings = [read_at(row, target) for row in rows.values()]
        found = [one for one in readings if one is not None]
        if len(found) < len(readings):
            continue
        for measure, values in lost.items():
            bits = 1 / (base["bytes_per_token"][measure[0]] * math.log(2))
            values[coef] = [one.value(*measure) * bits for one in found]
    return Cell(base, plain[0]["trajectory"][0]["eval_loss"] - target, lost)


def cells_of(rows: Sequence[Row]) -> dict[tuple[str, str], Cell]:
    """(task, base) → cell, of those whose runs are all there."""
    bases: dict[tuple[str, str], Row] = {}
    runs: dict[tuple[str, str], dict[float, dict[int, Row]]] = {}
    for row in sorted(rows, key=lambda row: row["settings"].get("seed", 0)):
        of = row["settings"]
        key = of["task"], of["base"]
        if "seed" in of:
            runs.setdefault(key, {}).setdefault(of.get("coef", 0.0), {})[of["seed"]] = row
        else:
            bases[key] = row
    whole = {coef: set(SEEDS) for coef in COEFS}
    return {
        (task, base): cell_of(bases[task, base], runs[task, base])
        for task in TASKS
        for base in BASES
        if {coef: set(some) for coef, some in runs.get((task, base), {}).items()} == whole
    }


def finding(cells: Sequence[Cell], measure: tuple[str, str]) -> tuple[str, str]:
    """The verdict on one task and measure, and its numbers; bases by rising tokens per parameter."""
    best = [cell.best(measure) for cell in cells]
    lost = [cell.lost[measure].get(coef, []) if coef else [] for cell, coef in zip(cells, best, strict=True)]
    if not all(lost):
        return "cannot tell", "a base did not learn enough with any coefficient"
    claims = [Claim([b - a for a, b in zip(*two, strict=True)]) for two in pairwise(lost)]
    agree = {claim.agrees for claim in claims}
    verdict = "not reproduced" if -1 in agree else "reproduced" if agree == {1} else "cannot tell"
    verdict = yes_or_no(verdict) if measure[1] == "ref_kl" else verdict  # of which the paper says nothing
    levels = ", ".join(str(over_seeds(values)) for values in lost)
    steps = " and ".join(claim.interval.text("+.3f") for claim in claims)
    return verdict, f"{levels} bits per byte by rising tokens per parameter, {steps}; {len(SEEDS)} seeds, 1M to 270M"


def report_of(rows: Sequence[Row]) -> Report:
    """The study's text and figure, of the bases whose runs are all there."""
    cells = cells_of(rows)
    if not cells:
        raise NoReport("no base has all of its runs yet")
    lines = []
    for (task, base), cell in cells.items():
        for measure, words in MEASURES.items():
            lost, best = cell.lost[measure], cell.best(measure)
            plain, with_it, prevented = over_seeds(lost[0.0]), "–", "–"
            if best:
                with_it = str(over_seeds(lost[best]))
                if plain.sign > 0:
                    shares = [1 - b / a for a, b in zip(lost[0.0], lost[best], strict=True)]
                    prevented = over_seeds(shares).percent()
            lines.append([TASKS[task], BASES[base], f"{cell.learned:.2f}", words, str(plain),
                          f"{best:g}" if best else "–", with_it, prevented])  # fmt: skip
    head = ["task", "base, tokens per parameter", "learned, nats", "measure", "plain", "best coefficient",
            "with it", "prevented"]  # fmt: skip
    found = {
        f"With the best replay {words} after {TASKS[task]} follows tokens per parameter": finding(
            [cells[task, base] for base in BASES], measure
        )
        for task in TASKS
        for measure, words in MEASURES.items()
        if all((task, base) in cells for base in BASES)
    }
    params = {label.partition(",")[0]: one.base["num_params"] for base, label in BASES.items()
              for (_, name), one in cells.items() if name == base}  # fmt: skip
    sizes = "; ".join(f"{name} {number:,}" for name, number in params.items())
    return "\n\n".join([table(head, lines), f"Parameters: {sizes}.", findings(found)]), lambda path: draw(cells, path)


def draw(cells: Mapping[tuple[str, str], Cell], path: Path) -> None:
    """What is lost with the best replay, by task and measure."""
    shown = [(task, measure) for task in TASKS if any(one == task for one, _ in cells) for measure in MEASURES]
    with panels(path, len(shown), (8.5, 2.3 * len(shown) / 2), rows=len(shown) // 2) as all_axes:
        for at, (axes, (task, measure)) in enumerate(zip(all_axes, shown, strict=True)):
            found = {}
            for base, label in BASES.items():
                cell = cells.get((task, base))
                if cell is None:
                    continue
                found[f"plain, {label}"] = over_seeds(cell.lost[measure][0.0])
                best = cell.best(measure)
                if best:
                    found[f"best replay, {label}"] = over_seeds(cell.lost[measure][best])
            dots(axes, found)
            if at % 2:  # they stand at the left already
                axes.set_yticks(range(len(found)), [""] * len(found))
            axes.set_title(f"{TASKS[task]}: {MEASURES[measure]}")
            axes.set_xlabel("bits per byte")
