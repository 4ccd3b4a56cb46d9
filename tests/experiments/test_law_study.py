"""The study of laws on made-up rows: its verdicts can go either way, and its runs are what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from published_laws import joint_forgetting, shifted_power
from test_experiments import SHORT, TINY, small_texts

from experiments import finetunes, small_base
from experiments.claim import Claim, Interval
from experiments.study_05_law import runs as study_runs
from experiments.study_05_law import skill
from experiments.study_05_law.figure import draw
from experiments.study_05_law.report import departures, fitted, held_out, r_squared, studies
from experiments.study_05_law.verdict import (
    fits_well,
    table_of_plans,
    verdict_of_break,
    verdict_of_fits,
    verdict_of_held_out,
    verdict_of_plan,
)
from retain.lab.runner import run_key

LAW = {"a": 2e3, "alpha": 0.25, "rho": 1.5, "c": 3.2, "s": 2.0}
STEPS = range(0, 201, 10)


def run_row(rank: int, seed: int, *, coef: float = 0.0, off: float = 0.0, noise: float = 0.01) -> dict[str, Any]:
    """A run of the joint law with noise; `off` nats away from its line."""
    rng = np.random.default_rng([rank, seed, int(10 * coef)])
    P, N = 5472.0 * rank, np.maximum(np.array(STEPS, dtype=float), 1)
    learned = shifted_power(P, N, b=4.0, beta=0.4, **LAW) + noise * rng.normal(size=len(N))
    lost = joint_forgetting(P, N, c_fft=0.25, s_fft=5.0, b=4.0, beta=0.4, **LAW) + off + noise * rng.normal(size=len(N))
    rows = [
        {"step": step, "eval_loss": float(one), "soft": float(other), "hard": float(other) / 2}
        for step, one, other in zip(STEPS, learned, lost, strict=True)
    ]
    settings = {"dataset": "verilog", "method": "lora", "lora_rank": rank, "seed": seed}
    settings |= {"coef": coef} if coef else {}
    return {"key": f"{rank}-{seed}-{coef}", "settings": settings, "num_params": int(P), "began": "2026-01-02",
            "trajectory": rows}  # fmt: skip


def prediction(off: float = 0.0, when: str = "2026-01-01") -> dict[str, Any]:
    """What a law might have said of rank 32: the truth, or `off` nats beside it."""
    steps = [step for step in STEPS if step >= 50]
    P, N = 5472.0 * 32, np.array(steps, dtype=float)
    learned = shifted_power(P, N, b=4.0, beta=0.4, **LAW)
    lost = joint_forgetting(P, N, c_fft=0.25, s_fft=5.0, b=4.0, beta=0.4, **LAW) + off
    written: dict[str, Any] = {"predicted": when, "num_params": int(P), "steps": steps, "key": "predicted"}
    for reading, scale in (("soft", 1.0), ("hard", 0.5)):
        written[reading] = {
            name: {"value": value.tolist(), "ci": [(value - 0.05).tolist(), (value + 0.05).tolist()]}
            for name, value in (("finetuning_loss", learned), ("forgetting_loss", scale * lost))
        }
    return written | {"settings": {"predict": 32, "dataset": "verilog"}}


def study_rows(off: float = -0.3, noise: float = 0.01, said: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    plain = [run_row(rank, seed, noise=noise) for rank in (1, 2, 4, 8, 16, 32) for seed in (0, 1)]
    replay = [run_row(rank, seed, coef=3.0, off=off, noise=noise) for rank in (4, 16) for seed in (0, 1)]
    return [*plain, *replay, said or prediction()]


def laws_of(rows: list[dict[str, Any]]) -> dict:
    found = studies(rows)["verilog"].plain
    return {("verilog", "soft"): {form: fitted(found, "soft", form, num_resamples=0) for form in ("linear", "joint")}}


def test_the_laws_fit_where_they_hold_and_not_where_noise_hides_them():
    good = laws_of(study_rows())
    assert verdict_of_fits(good).count("**reproduced** (R² 0.9") == 2
    assert fits_well([Interval(0.93, 0.88, 0.95), Interval(0.95, 0.92, 0.97)]) == "cannot tell at this size", (
        "its low end is below"
    )
    value, low, high = r_squared(good["verilog", "soft"]["joint"])
    assert low < value < high
    assert value == pytest.approx(good["verilog", "soft"]["joint"].r_squared["forgetting_loss"])
    assert verdict_of_fits(laws_of(study_rows(noise=0.5))).count("**not reproduced**") == 2
    assert "none yet" in verdict_of_fits({})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (prediction(), "Verdict: yes. In 2 of 2 cases"),
        (prediction(off=0.3), "Verdict: no. In 0 of 2 cases"),
        (prediction(when="2026-01-03"), "Verdict: none; a prediction is younger than its run"),
    ],
)
def test_the_largest_rank_is_judged_against_what_was_written_before(said, words):
    study = studies(study_rows(said=said))["verilog"]
    found = {("verilog", reading): held_out(study, reading) for reading in ("soft", "hard")}
    assert words in verdict_of_held_out(found)
    assert "none yet" in verdict_of_held_out({("verilog", "soft"): None})


def test_replay_runs_off_the_line_are_found_and_those_on_it_are_not():
    for off, words in ((-0.3, "Verdict: yes. In 2 of 2 cases"), (0.0, "Verdict: no. In 0 of 2 cases")):
        gone = departures(studies(study_rows(off=off)))
        assert words in verdict_of_break(gone, [0.5])
        assert gone["verilog", "soft"]["KL replay 3"][0] == pytest.approx(off, abs=0.02)
    assert "none yet" in verdict_of_break({}, [])


def method_rows(off: float) -> list[dict[str, Any]]:
    """Attention alone at two ranks and IA3: they forget by the law, and learn `off` nats less than LoRA does."""
    found = []
    for method, rank in (("attention", 4), ("attention", 16), ("IA3", 2)):
        for seed in (0, 1):
            row = run_row(rank, 10 + seed)
            row["settings"]["method"] = method
            for at in row["trajectory"]:
                at["eval_loss"] += off
            found.append(row | {"key": f"{method}-{rank}-{seed}"})
    return found


def test_methods_that_leave_the_line_break_it_and_those_on_it_do_not():
    for off, broken, left in ((0.8, "**reproduced**", "**yes**"), (0.0, "**cannot tell**", "**no**")):
        found = studies([*study_rows(), *method_rows(off)])
        text = skill.text_of_methods(found, departures(found))
        assert f"the joint law holds: {broken if off else '**'}" in text
        assert f"leave LoRA's line: {left}" in text
        assert "attention in" in text
        assert len(found["verilog"].parts) == 12 + 6


def test_a_law_that_two_tables_ask_for_is_fitted_once():
    rows, how = [run_row(rank, 0) for rank in (1, 2, 4)], {"num_resamples": 0}
    law = fitted(rows, "soft", "linear", **how)
    assert fitted(list(rows), "soft", "linear", **how) is law
    assert fitted(rows[:2], "soft", "linear", **how) is not law


def test_a_law_is_worth_more_than_a_copy_where_it_holds():
    plain = studies(study_rows())["verilog"].plain
    assert min(skill.without_one_rank(plain, "soft")) > 0.5
    assert Claim(skill.without_later_steps(plain, "soft")).agrees == 1
    assert skill.gain([(np.ones(3), np.full(3, 1.1), np.full(3, 1.2))]) == pytest.approx(np.log(2))
    assert skill.gain([(np.ones(3), np.full(3, 1.2), np.full(3, 1.1))]) == pytest.approx(-np.log(2))
    assert skill.less([np.log(2)] * 3).value == pytest.approx(0.5)


def test_a_law_is_held_against_a_line_and_both_neighbours_too():
    """On runs that are lines in log steps and in log rank, neither loses to a law."""
    plain = [dict(row) for row in studies(study_rows())["verilog"].plain]
    for row in plain:
        level = np.log(row["settings"]["lora_rank"])
        row["trajectory"] = [
            at
            | {
                "soft": 3
                + 0.2 * level
                + 0.3 * np.log(max(at["step"], 1))
                + 1e-6 * np.sin(at["step"] * row["num_params"])
            }
            for at in row["trajectory"]
        ]
    assert max(skill.without_later_steps(plain, "soft", line=True)) < -1
    assert min(skill.without_later_steps(plain, "soft")) > 0, "a copy of the last value loses"
    copies, both = (skill.without_one_rank(plain, "soft", both=way) for way in (False, True))
    assert max(both[1:-1]) < -1
    assert (copies[0], copies[-1]) == (both[0], both[-1]), "at the ends there is one neighbour"
    assert [skill.side(signs) for signs in ([1, 1], [-1, 0], [0], [1, -1])] == ["above", "below", "on it", "both"]


def test_shared_exponents_are_as_good_where_they_are_shared():
    rows = study_rows()
    other = []
    for row in rows:
        moved = {"key": f"cpp {row['key']}", "settings": row["settings"] | {"dataset": "cpp"}}
        if "trajectory" in row:
            moved["trajectory"] = [at | {"soft": at["soft"] + 0.1} for at in row["trajectory"]]
        other.append(row | moved)
    found = studies([*rows, *other])
    ratios = skill.shared(found, "soft")
    assert [len(of) for of in ratios.values()] == [2, 2]
    assert max(abs(one) for of in ratios.values() for one in of) < 1
    assert "| all, shared |" in skill.exponents(found, "soft")


def plan_row(seed: int, learned: float = 3.0, lost: float = 0.09, when: str = "2026-01-01") -> dict[str, Any]:
    said = {"finetuning_loss": {"value": 3.0, "low": 2.9, "high": 3.1},
            "forgetting_loss": {"value": 0.08, "low": 0.06, "high": 0.1}}  # fmt: skip
    planned = {"predicted": when, "budget": 0.1, "words": "rank 4, 60 steps, no replay", **said}
    measured = {"finetuning_loss": learned, "forgetting_loss": lost}
    return {"settings": {"plan": 0.1, "seed": seed}, "began": "2026-01-02", "planned": planned, "measured": measured}


def test_a_plan_is_judged_by_seeds_that_no_pilot_had():
    assert "Verdict: yes. Of 2 runs" in verdict_of_plan([plan_row(1), plan_row(2)])
    assert "Verdict: in part. Of 2 runs" in verdict_of_plan([plan_row(1), plan_row(2, lost=0.11)])
    assert "Verdict: no. Of 1 runs" in verdict_of_plan([plan_row(1, lost=0.2)])
    assert "younger" in verdict_of_plan([plan_row(1, when="2026-01-03")])
    assert "none yet" in verdict_of_plan([])
    assert "none yet" in verdict_of_plan([plan_row(0), plan_row(1), {"feasible": True, "budget": 0.04}])
    assert "| rank 4, 60 steps, no replay | 7 |" in table_of_plans([plan_row(7)])


def test_the_figure(tmp_path):
    draw(study_rows(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_every_run_of_the_study_is_another():
    runs = [run for name in study_runs.TASKS for run in (*study_runs.plain_runs(name), *study_runs.other_runs(name))]
    assert len({run_key(run.settings(), "") for run in runs}) == len(runs)


def test_both_readings_begin_at_the_bases_own_values(tmp_path):
    texts = small_texts()
    base = small_base.make_base(tmp_path / "tiny", texts, TINY)
    bench = finetunes.open_bench(base, texts, SHORT)
    run = study_runs.LawRun(lora_rank=2, max_steps=4, eval_steps=2, batch_size=4, warmup_steps=1, coef=1.0)
    row = study_runs.finetune(run, bench)
    first, *_, last = row["trajectory"]
    assert first["forgetting"] == pytest.approx(0, abs=1e-6)
    assert last["soft"] > first["soft"]
    assert row["num_params"] == 2 * study_runs.finetune(replace(run, lora_rank=1, coef=0.0), bench)["num_params"]
