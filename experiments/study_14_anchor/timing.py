"""What a step of each kind of run costs: trainers that take steps by turns, so that a busy host slows all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from transformers import TrainerCallback

from experiments.finetunes import Bench, Run, make_trainer, scratch
from experiments.study_14_anchor.settings import anchored_runs, little_replay, plain_runs

WARM_UP = 4
KINDS = ("plain", "replay", "anchor and replay", "anchor", "plain")  # between two of the same, which should agree


def timed(base: str, method: str) -> list[Run]:
    """One run for each of `KINDS`; the third and fourth are an anchored run at its end and before its replay begins."""
    kinds = plain_runs(base, method, 0)[-2], little_replay(base, method, 0), anchored_runs(base, method, 0)[-1]
    plain, little, anchor = (replace(run, eval_steps=0, schedule=None, replay_start=None) for run in kinds)
    return [plain, little, anchor, replace(anchor, coef=0.0), plain]


class Turns(TrainerCallback):
    """Lets one trainer take a step after the other; keeps the processor seconds of each of its own."""

    def __init__(self, at: int, barrier: Barrier) -> None:
        self.at, self.barrier, self.seconds, self._since = at, barrier, list[float](), 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(self.at)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.thread_time() - self._since)
        self._wait(self.barrier.parties)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(self.barrier.parties - self.at)

    def _wait(self, turns: int) -> None:
        for _ in range(turns):
            self.barrier.wait()
        self._since = time.thread_time()


def time_steps(runs: Sequence[Run], bench: Bench, cycles: int) -> dict[str, Any]:
    """Processor seconds of a step over the mean of the two plain ones in its turn, and of these over each other.

    Medians, with 95% intervals over turns.
    """
    barrier = Barrier(len(runs))

    def seconds_of(trainer: Any, turns: Turns) -> list[float]:
        torch.set_num_threads(1)  # a thread's own setting
        trainer.add_callback(turns)
        try:
            trainer.train()
        except BaseException:
            barrier.abort()
            raise
        return turns.seconds[WARM_UP:]

    with ExitStack() as stack, ThreadPoolExecutor(len(runs)) as pool:
        long = [replace(run, max_steps=cycles + WARM_UP) for run in runs]
        trainers = [make_trainer(run, bench, stack.enter_context(scratch())) for run in long]
        turns = [Turns(at, barrier) for at in range(len(runs))]
        first, *others, last = [np.array(one) for one in pool.map(seconds_of, trainers, turns)]
    plain = (first + last) / 2
    rows = [{"settings": run.settings(), **ratio_of(own / plain)} for run, own in zip(runs[1:-1], others, strict=True)]
    return {
        "timing": rows,
        "plain_twice": ratio_of(last / first),
        "cycles": cycles,
        "plain_seconds": round(float(np.median(plain)), 4),
    }


def ratio_of(ratios: np.ndarray) -> dict[str, Any]:
    """The median, and its 95% interval by bootstrap."""
    ends = bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
    return {"cpu": round(float(np.median(ratios)), 4), "ci": [round(float(end), 4) for end in ends]}
