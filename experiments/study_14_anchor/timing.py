"""What a step of each kind of run costs, beside a plain step in the same process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.finetunes import Bench, Run, make_trainer, scratch

TIMED_STEPS, WARM_UP = 16, 8


def timed(runs: Sequence[Run]) -> list[Run]:
    """Plain, replay, the anchor with late replay as it is before and in it, and the anchor alone."""
    plain, anchor, _, _, little, _ = (replace(run, eval_steps=0, schedule=None) for run in runs)
    late = replace(anchor, replay_start=None)
    alone = replace(anchor, replay_start=None, coef=0.0)
    return [plain, little, late, alone]


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
