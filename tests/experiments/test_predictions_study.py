"""Study 19: its law, its intervals and its verdicts on made-up rows that go either way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.pages import NoReport
from experiments.study_19_predictions import run as study
from retain.files import append_jsonl, write_json


def made_up(folder: Path, *, off: float = 0.0, rise: float = 1.0, noise: float = 0.05) -> None:
    """Results in which held-out KL is `off` above the budget, and the rise on other tasks so many times the law's."""
    rng = np.random.default_rng(0)
    for task in study.TASKS:
        times = 1.0 if task == study.FIRST else rise
        for run in study.runs():
            cost = 0.8 * times * run.budget**1.1 * math.exp(noise * rng.standard_normal())
            kl = run.budget * (1 + off) * math.exp(0.03 * rng.standard_normal())
            row: dict[str, Any] = {"settings": run.settings(), "bench": task, "kept": True, "rise": cost}
            row |= {"held_out_kl": kl, "held_out_kl_whole": 1.1 * kl}
            append_jsonl(folder / "results.jsonl", {"key": f"{task}-{run}", **row})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "HERE", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("how", "verdicts"),
    [({}, ["yes", "yes", "yes"]), ({"off": 0.4}, ["no", "no", "yes"]), ({"off": 0.055}, ["yes", "cannot tell", "yes"]),
     ({"rise": 2.0}, ["yes", "yes", "no"]), ({"rise": -1.0}, ["yes", "yes", "no"])],
)  # fmt: skip
def test_verdicts_follow_the_rule(how: dict[str, float], verdicts: list[str], folder: Path) -> None:
    made_up(folder, **how)
    write_json(folder / "law.json", study.law_of(study.rows_of(study.FIRST)))
    text, draw = study.report("laptop")
    assert [line.split("**")[1] for line in text.splitlines() if line.startswith("- ")] == verdicts
    assert " in logs, 48 runs; over 3 tasks " in text
    draw(folder / "figure.png")
    assert (folder / "figure.png").exists()


def test_a_law_covers_what_it_says(folder: Path) -> None:
    """Of new runs with the noise of the old ones, nine in ten lie inside its intervals."""
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(300):
        rises = [
            (budget, math.exp(0.2 * rng.standard_normal()) * budget) for budget in (*study.BUDGETS, *study.BUDGETS)
        ]
        rows = [{"settings": {"budget": budget}, "rise": rise} for budget, rise in rises]
        law = study.law_of(rows[:-1])
        inside.append(study.is_inside(law, rows[-1]))
    assert 0.85 < np.mean(inside) < 0.95


def test_other_tasks_wait_for_the_law(folder: Path) -> None:
    with pytest.raises(ValueError, match="the law comes first"):
        study.make("laptop", "cpp")
    with pytest.raises(NoReport, match="verilog 0"):
        study.report("laptop")
