"""What the study trains: bases, tasks, plain learning rates and the anchors of its three rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.corpora import read_cpp, read_french, read_german, read_javascript, read_perl, read_spanish
from experiments.finetunes import SMOLLM2_ROWS, BenchSettings, Run

LATE = {"replay_start": 0.85, "coef": 5.0}
LAST_THIRD = {"replay_start": 0.7, "coef": 5.0}  # of the third round


@dataclass(frozen=True)
class Task:
    """New data, and the round that is judged on it; 0: settings were chosen here."""

    label: str
    round: int
    read: Callable[[], list[str]] | None = None


@dataclass(frozen=True)
class Base:
    """A base, its rows, its schedule, and of each method the plain learning rates and the anchor of each round."""

    label: str
    bench: BenchSettings
    run: Run
    plain: dict[str, tuple[float, ...]]
    anchors: dict[str, dict[int, dict[str, Any]]]


TASKS = {
    "verilog": Task("Verilog", 0),
    "spanish": Task("Spanish", 1, read_spanish),
    "cpp": Task("C++", 1, read_cpp),
    "german": Task("German", 2, read_german),
    "javascript": Task("JavaScript", 2, read_javascript),
    "french": Task("French", 3, read_french),
    "perl": Task("Perl", 3, read_perl),
}
BASES = {
    "small": Base(
        "small base, 0.43M",
        BenchSettings(),
        Run(max_steps=96, schedule="linear", eval_steps=48),
        plain={"full": (2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3), "lora": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1e-2)},
        anchors={
            "full": {
                1: {"learning_rate": 2e-2, "anchor_coef": 20.0, "replay_rows": 8, **LATE},
                2: {"learning_rate": 4e-2, "anchor_coef": 60.0, "replay_rows": 8, **LATE},
                3: {"learning_rate": 1e-2, "anchor_coef": 50.0, "replay_rows": 8, **LAST_THIRD},
            },
            "lora": {
                1: {"learning_rate": 4e-2, "anchor_coef": 10.0, "replay_rows": 8, **LATE},
                2: {"learning_rate": 6e-2, "anchor_coef": 30.0, "replay_rows": 8, **LATE},
                3: {"learning_rate": 3e-2, "anchor_coef": 20.0, "replay_rows": 8, **LAST_THIRD},
            },
        },
    ),
    "smollm2": Base(
        "SmolLM2-135M-Instruct",
        SMOLLM2_ROWS,
        Run(max_steps=60, schedule="linear", eval_steps=60, batch_size=4, warmup_steps=6),
        plain={"lora": (2.5e-4, 5e-4, 1e-3)},
        anchors={
            "lora": {
                2: {"learning_rate": 1.6e-2, "anchor_coef": 300.0, "replay_rows": 2, **LATE},
                3: {"learning_rate": 1e-2, "anchor_coef": 300.0, "replay_rows": 1, **LAST_THIRD},
            }
        },
    ),
}
BASES["smollm2x5"] = replace(
    BASES["smollm2"],
    label="SmolLM2-135M-Instruct, 300 steps",
    run=replace(BASES["smollm2"].run, max_steps=300, eval_steps=100, warmup_steps=30),
)


BASES["smollm2short"] = replace(
    BASES["smollm2"],
    label="SmolLM2-135M-Instruct, 30 steps",
    run=replace(BASES["smollm2"].run, max_steps=30, eval_steps=30, warmup_steps=3),
    plain={"full": (5e-5, 1e-4, 2e-4)},
    anchors={"full": {3: {"learning_rate": 5e-4, "anchor_coef": 300.0, "replay_rows": 1, **LAST_THIRD}}},
)


def starting_run(base: str, method: str, seed: int) -> Run:
    """What all runs of a method share."""
    return replace(BASES[base].run, method=method, lora_rank=16 if method == "lora" else None, seed=seed)


def plain_runs(base: str, method: str, seed: int) -> list[Run]:
    """A run for each learning rate, the lowest first."""
    start = starting_run(base, method, seed)
    return [replace(start, learning_rate=rate) for rate in BASES[base].plain[method]]


def little_replay(base: str, method: str, seed: int) -> Run:
    """A sixteenth of the batch, at plain's second highest rate: a row in every fourth step where a batch has four."""
    plain = plain_runs(base, method, seed)[-2]
    if base == "small":
        return replace(plain, coef=1.0, replay_rows=2)
    return replace(plain, coef=1.0, replay_rows=1, replay_every=4)


def anchored_runs(base: str, method: str, seed: int, since: int = 0) -> list[Run]:
    """The anchors of a round and later ones."""
    start = starting_run(base, method, seed)
    return [replace(start, **how) for number, how in BASES[base].anchors[method].items() if number >= since]


def runs(base: str, method: str, task: str, seed: int) -> Sequence[Run]:
    """All that a task asks of a seed."""
    anchors = anchored_runs(base, method, seed, since=TASKS[task].round)
    replay = [little_replay(base, method, seed)] if base == "small" else []  # hours on two cores
    return [*anchors, *plain_runs(base, method, seed), *replay]
