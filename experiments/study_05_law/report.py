"""What the study of laws found: fits, the held-out rank, and where the line breaks. Rows in, words and a figure out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from experiments.claim import Interval
from experiments.pages import table
from retain import fit_forgetting_law
from retain.laws.law import ForgettingLaw

MIN_STEPS = 50  # as in the paper: earlier measurements are left out
READINGS = ("soft", "hard")
PAPER = {"OpenOrca": (0.9450, 0.9598), "News": (0.9736, 0.9769)}  # R² of L_f(L_ft) and of L_f(P, N)
ACROSS = 0.185  # the paper's R² of the line across methods
WELL = 0.9
Rows = Sequence[dict[str, Any]]


def points(rows: Rows, reading: str) -> list[dict[str, Any]]:
    """Rows for a fit: one per evaluation from `MIN_STEPS` on; each rank and seed is a run."""
    return [
        {
            "run": row["key"],
            "dataset": row["settings"]["dataset"],
            "num_params": row["num_params"],
            "num_steps": at["step"],
            "finetuning_loss": at["eval_loss"],
            "forgetting_loss": at[reading],
        }
        for row in rows
        for at in row["trajectory"]
        if at["step"] >= MIN_STEPS
    ]


def fitted(rows: Rows, reading: str, form: str, **how: Any) -> ForgettingLaw:
    """A law of these runs; what they cannot say is kept in `law.warnings`."""
    return _fitted(json.dumps(points(rows, reading)), form, **how)


@cache
def _fitted(found: str, form: str, **how: Any) -> ForgettingLaw:
    """Of points in JSON, so that a law that several tables ask for is fitted once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_forgetting_law(json.loads(found), form, **how)


@dataclass(frozen=True)
class Study:
    """The runs of one data set by what they are, and the prediction that was written before the largest rank."""

    plain: Rows
    methods: dict[str, Rows]
    replay: dict[float, Rows]
    prediction: dict[str, Any] | None

    @property
    def kinds(self) -> dict[str, Rows]:
        """What the law of plain LoRA was not fitted to, by name."""
        return {**self.methods, **{f"KL replay {coef:g}": rows for coef, rows in self.replay.items()}}

    @property
    def parts(self) -> Rows:
        """Plain runs of LoRA, and those of methods that train fewer parts of the model."""
        return [*self.plain, *(row for name, rows in self.methods.items() if name != "full" for row in rows)]

    @property
    def largest(self) -> Rows:
        most = max((row["settings"]["lora_rank"] for row in self.plain), default=0)
        return [row for row in self.plain if row["settings"]["lora_rank"] == most]


def studies(rows: Rows) -> dict[str, Study]:
    """Data set → its runs."""
    runs = [row for row in rows if "trajectory" in row]
    found = {}
    for name in dict.fromkeys(row["settings"]["dataset"] for row in runs):
        mine = [row for row in runs if row["settings"]["dataset"] == name]
        lora = [row for row in mine if row["settings"]["method"] == "lora"]
        coefs = sorted({row["settings"].get("coef", 0.0) for row in lora} - {0.0})
        predictions = [row for row in rows if "predicted" in row and row["settings"].get("dataset") == name]
        found[name] = Study(
            plain=[row for row in lora if not row["settings"].get("coef")],
            methods={
                one: [row for row in mine if row["settings"]["method"] == one]
                for one in dict.fromkeys(row["settings"]["method"] for row in mine)
                if one != "lora"
            },
            replay={coef: [row for row in lora if row["settings"].get("coef") == coef] for coef in coefs},
            prediction=predictions[0] if predictions else None,
        )
    return found


# Fits


def r_squared(law: ForgettingLaw, num_resamples: int = 2000) -> Interval:
    """R² of L_f, with the 95% interval over runs (drawn with replacement, the law kept as it is)."""
    fit = law.problem.predict(law.estimate)[0][law.form.outputs.index("forgetting_loss")]
    measured, names = law.runs.columns["forgetting_loss"], law.runs.names
    codes = law.runs.run_codes
    left, level, square, number = (
        np.bincount(codes, weights=value)
        for value in ((measured - fit) ** 2, measured, measured**2, np.ones(len(codes)))
    )
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), num_resamples)
    drawn = np.vstack([np.ones(len(names), dtype=int), drawn])
    spread = drawn @ square - (drawn @ level) ** 2 / (drawn @ number)
    values = 1 - (drawn @ left) / spread
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def by_rank(rows: Rows, reading: str) -> float:
    """R² of the line with one slope and a level of its own for each number of parameters."""
    found = points(rows, reading)
    sizes = [at["num_params"] for at in found]
    columns = [[float(size == own) for size in sizes] for own in sorted(set(sizes))]
    terms = np.array([[at["finetuning_loss"] for at in found], *columns]).T
    lost = np.array([at["forgetting_loss"] for at in found])
    left = lost - terms @ np.linalg.lstsq(terms, lost, rcond=None)[0]
    return float(1 - (left**2).sum() / ((lost - lost.mean()) ** 2).sum())


def table_of_fits(laws: dict[tuple[str, str], dict[str, ForgettingLaw]], found: dict[str, Study]) -> str:
    """R² of both laws and the slope of the line, beside the paper's."""
    head = (
        "data",
        "L_f read",
        "R² of L_f(L_ft)",
        "the line with a level for each rank",
        "R² of L_f(P, N)",
        "slope c_fft",
    )
    lines: list[list[object]] = []
    for (name, reading), of in laws.items():
        slope = Interval(of["linear"].params["c_fft"], *of["linear"].conf_int()["c_fft"])
        own = f"{by_rank(found[name].plain, reading):.3f}"
        lines.append([name, reading, r_squared(of["linear"]), own, r_squared(of["joint"]), slope])
    for name, (linear, joint) in PAPER.items():
        slope_there = {"OpenOrca": "1.733", "News": "1.062"}[name]
        lines.append([f"paper: {name}, Llama 2 7B", "", f"{linear:.4f}", "", f"{joint:.4f}", slope_there])
    return table(head, lines)


# The held-out rank


@dataclass(frozen=True)
class HeldOut:
    """The largest rank against what was predicted: errors in nats, and the share of points within 95% intervals."""

    error: float
    naive: float
    inside: float
    inside_new_task: float
    before: bool


def held_out(study: Study, reading: str) -> HeldOut | None:
    """Error of the law, and of taking the next smaller rank's mean curve instead."""
    prediction, runs = study.prediction, study.largest
    if prediction is None or not runs or runs[0]["num_params"] != prediction["num_params"]:
        return None
    ranks = sorted({row["settings"]["lora_rank"] for row in study.plain})
    smaller = [row for row in study.plain if row["settings"]["lora_rank"] == ranks[-2]]
    naive = np.mean([curve(row, reading, prediction["steps"]) for row in smaller], axis=0)
    measured = np.array([curve(row, reading, prediction["steps"]) for row in runs])
    learned = np.array([curve(row, "eval_loss", prediction["steps"]) for row in runs])
    of, new = prediction[reading]["forgetting_loss"], prediction[reading]["finetuning_loss"]
    return HeldOut(
        error=float(np.sqrt(np.mean((measured - of["value"]) ** 2))),
        naive=float(np.sqrt(np.mean((measured - naive) ** 2))),
        inside=share_inside(measured, of["ci"]),
        inside_new_task=share_inside(learned, new["ci"]),
        before=all(prediction["predicted"] <= row["began"] for row in runs),
    )


def curve(row: dict[str, Any], name: str, steps: Sequence[int]) -> list[float]:
    at = {point["step"]: point[name] for point in row["trajectory"]}
    return [at[step] for step in steps]


def share_inside(values: np.ndarray, ci: Sequence[Sequence[float]]) -> float:
    return float(np.mean((values >= np.array(ci[0])) & (values <= np.array(ci[1]))))


def table_of_held_out(found: dict[tuple[str, str], HeldOut | None]) -> str:
    head = (
        "data", "L_f read", "error of the law, nats (RMS)", "error of the next smaller rank's curve",
        "points of L_f within the 95% interval", "points of L_ft", "written before the run",
    )  # fmt: skip
    return table(head, [
        [*case, f"{one.error:.3f}", f"{one.naive:.3f}", f"{one.inside:.0%}", f"{one.inside_new_task:.0%}",
         "yes" if one.before else "no"]
        for case, one in found.items() if one is not None
    ])  # fmt: skip


# Where the line breaks


def residuals(rows: Rows, reading: str, line: Sequence[float]) -> list[float]:
    """Each run's mean distance from a line (slope, level), nats."""
    return [
        float(
            np.mean([at["forgetting_loss"] - np.polyval(line, at["finetuning_loss"]) for at in points([row], reading)])
        )
        for row in rows
    ]


def line_of(rows: Rows, reading: str) -> np.ndarray:
    found = points(rows, reading)
    return np.polyfit([at["finetuning_loss"] for at in found], [at["forgetting_loss"] for at in found], 1)


def departure(plain: Rows, others: Rows, reading: str) -> Interval:
    """How far runs lie from the plain runs' line, beyond what plain runs do; Welch's 95% interval over runs.

    Each plain run is held against the line of the others, so that both are runs that the line has not seen.
    """
    own = [
        residuals([row], reading, line_of([other for other in plain if other is not row], reading))[0] for row in plain
    ]
    theirs = residuals(others, reading, line_of(plain, reading))
    interval = ttest_ind(theirs, own, equal_var=False).confidence_interval(0.95)
    return Interval(float(np.mean(theirs) - np.mean(own)), float(interval.low), float(interval.high))


def across(study: Study, reading: str) -> float:
    """R² of one line through plain and replay runs together."""
    rows = [*study.plain, *(row for of in study.replay.values() for row in of)]
    found = points(rows, reading)
    lost = np.array([at["forgetting_loss"] for at in found])
    fit = np.polyval(line_of(rows, reading), [at["finetuning_loss"] for at in found])
    return float(1 - ((lost - fit) ** 2).sum() / ((lost - lost.mean()) ** 2).sum())


Departures = dict[tuple[str, str], dict[str, Interval]]


def departures(found: dict[str, Study]) -> Departures:
    """Data set and reading → kind of run → its departure from the line."""
    result: Departures = {}
    for name, study in found.items():
        for reading in READINGS:
            result[name, reading] = {
                kind: departure(study.plain, rows, reading) for kind, rows in study.kinds.items() if len(rows) > 1
            }
    return result


def table_of_departures(found: dict[str, Study], gone: Departures) -> str:
    kinds = list(dict.fromkeys(kind for of in gone.values() for kind in of))
    head = ("data", "L_f read", *kinds, "R² of one line through plain and replay")
    return table(head, [
        [name, reading, *(of.get(kind, "") for kind in kinds), f"{across(found[name], reading):.3f}"]
        for (name, reading), of in gone.items()
    ])  # fmt: skip
