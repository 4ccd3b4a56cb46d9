"""What a step of each kind of run costs, beside a plain step in the same process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.finetunes import Bench, Run, make_trainer, scratch
from experiments.study_14_anchor.settings import anchored_runs, little_replay, plain_runs

TIMED_STEPS, WARM_UP = 16, 8


def timed(base: str, method: str) -> list[Run]:
    """Plain, replay, the last anchor with late replay as it is in the end, and as it is before."""
    kinds = plain_runs(base, method, 0)[-2], little_replay(base, method, 0), anchored_runs(base, method, 0)[-1]
    plain, little, anchor = (replace(run, eval_steps=0, schedule=None, replay_start=None) for run in kinds)
    return [plain, little, anchor, replace(anchor, coef=0.0)]


def time_round(runs: Sequence[Run], bench: Bench) -> dict[str, Any]:
    """Processor seconds of a step, over those of the plain steps before and after it."""
    plain, *others = runs
    before, rows = seconds_of(plain, bench), []
    for run in others:
        own, after = seconds_of(run, bench), seconds_of(plain, bench)
        rows.append({"settings": run.settings(), "cpu": round(2 * own / (before + after), 4), "seconds": round(own, 4)})
        before = after
    return {"timing": rows, "steps": TIMED_STEPS}


def seconds_of(run: Run, bench: Bench) -> float:
    """Mean processor seconds of a step."""
    with scratch() as folder:
        trainer = make_trainer(replace(run, max_steps=TIMED_STEPS + WARM_UP), bench, folder)
        trainer.train()
    return statistics.fmean(cpu for _, cpu in trainer.clock.seconds[-TIMED_STEPS:])
