"""Does replay lower forgetting of prose? A template: copy it to study_NN_name/run.py, with a README.

Rule, fixed before the runs: the whole 95% interval of forgetting with replay minus without, paired by seed, lies below
0; differences of at most 0.01 nats do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.claim import Claim, over_seeds
from experiments.finetunes import BenchSettings, Run, StudyResults, finetune, small_bench
from experiments.pages import NoReport, dots, findings, panels, table
from experiments.program import Report, conduct, seeds_of

HERE = Path(__file__).parent
ARMS = {"plain": 0.0, "replay": 1.0}  # replay coefficients
FINDING = "Replay lowers forgetting"


@dataclass(frozen=True)
class Scale:
    max_steps: int = 60
    seeds: int = 3


SCALES = {"laptop": Scale()}


def make(name: str, seed: int) -> None:
    """Finetune the small base, which knows prose, on Verilog without and with replay."""
    scale, bench = SCALES[name], small_bench(BenchSettings(seed=seed))
    results = StudyResults(HERE / "results.jsonl", bench.fingerprint)
    for arm, coef in ARMS.items():
        run = Run(coef=coef, max_steps=scale.max_steps, replay_rows=8, seed=seed)
        settings = {"arm": arm, **run.settings()}
        results.make(settings, lambda run=run: finetune(run, bench))


def report(name: str) -> Report:
    """Forgetting at the end of each run, nats per token, and the verdict on its difference."""
    every = StudyResults(HERE / "results.jsonl", "").rows.values()
    rows = sorted(every, key=lambda row: row["settings"]["seed"])
    forgetting: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for row in rows:
        forgetting[row["settings"]["arm"]].append(row["trajectory"][-1]["retention/prose/forgetting"])
    plain, replay = forgetting["plain"], forgetting["replay"]
    if len(plain) < 2 or len(plain) != len(replay):
        raise NoReport("fewer than two seeds, or not every arm of each, are made yet")
    claim = Claim([a - b for a, b in zip(replay, plain, strict=True)], direction=-1, margin=0.01)
    intervals = {arm: over_seeds(values) for arm, values in forgetting.items()}

    def draw(path: Path) -> None:
        with panels(path, 1, (5.0, 1.8)) as (axes,):
            dots(axes, intervals)
            axes.set_xlabel("forgetting, nats per token")

    answer = findings({FINDING: (claim.verdict, f"{claim.interval} nats per token, {len(plain)} seeds")})
    return f"{table(('arm', 'forgetting'), intervals.items())}\n\n{answer}", draw


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=seeds_of, make=make, report=report, prepare=lambda name: small_bench(),
        arguments=arguments,
    )  # fmt: skip
